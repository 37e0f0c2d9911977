"""Can a strong attacker tell which images a small ViT has unlearned? U-LiRA, with shadow models that unlearn by the same method.

    python benchmarks/studies/lira.py --data_folder <CIFAR-10 as parquet>

Candidates are 500 training images, which the model that shadows start from never saw, and 500 test images. Each shadow is
fine-tuned on half of them and on retained images, and unlearns that half at the settings chosen in the studies of images and of
retain terms, with 5 % of the retain set at hand. Each shadow in turn is then attacked by one who knows the others. A run ends when the
loss on what it forgets is that of images never seen, or so much higher ("further"), or after 48 steps, or after more ("at most").
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from harness import RESULTS, Records, machine_note
from image_data import Request, fine_tune
from images import ImageStudy, add_folders
from methods import METHODS, unlearn
from retention import DEFAULT, RetentionStudy
from retention import VARIANTS as RETAIN_TERMS
from study import CHOSEN_AT, main
from tables import plot_means
from torch.utils.data import ConcatDataset

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import (
    ShadowLosses,
    attack_shadows,
    membership_inference,
    per_sample_losses,
    shadow_losses,
)


NUM_SHADOWS = 16
RETAINED = 1500  # retained images that a shadow is trained on beside its half of the candidates
CONTROLS = {"nothing": "nothing unlearned", "never": "never trained on"}
WITH_RETAIN_TERM = (DEFAULT, "NPO, kl, varied")  # of the study of retain terms
MOST = 144  # steps of runs that do not get there in the studies' 48
# name: (variant, nats beyond the loss on images never seen)
LONGER = {f"{variant}, at most {MOST} steps": (variant, 0.0) for variant in (*WITH_RETAIN_TERM, "orthograd_npo")}
LONGER[f"{DEFAULT}, at most {MOST} steps, 0.1 nats further"] = DEFAULT, 0.1


class ShadowStudy(ImageStudy):
    """The image study's models, sets and settings, and for retain terms those of their study; `attacked` holds the records of this one."""

    kinds, seeds = ("random",), (0,)
    methods = ("graddiff", "npo", "mean_projection", "scrub", "orthograd", "orthograd_npo")

    def __init__(self, data_folder: Path, work_folder: Path, records: Records, attacked: Records):
        super().__init__(data_folder, work_folder, records)
        self.attacked = attacked
        self.retention = RetentionStudy(data_folder, work_folder, Records(RESULTS / "study_retention.json"))

    def stage_final(self) -> None:
        for name in (*CONTROLS, *self.methods, *WITH_RETAIN_TERM, *LONGER):
            for seed in self.seeds:
                request = self.request("random", seed)
                self.attacked.get(f"{name} {request}", lambda name=name, request=request: self.attack(name, request))

    def attack(self, name: str, request: Request) -> dict[str, list[float]]:
        """Of each shadow: the attack's AUC and TPR at 1 % FPR, and the AUC of a threshold on the loss; mean losses, and differences by image."""
        longer = name in LONGER
        name, further = LONGER.get(name, (name, 0.0))
        study, method, extra = self, name, {}
        if name in WITH_RETAIN_TERM:
            study, method, extra = self.retention, RETAIN_TERMS[name].method, RETAIN_TERMS[name].extra
            study.varied = RETAIN_TERMS[name].varied
        if longer:
            extra = extra | {"max_steps": MOST}
        bench, sets = self.bench("random"), study.sets(request, CHOSEN_AT)
        candidates = ConcatDataset([sets["forget"], sets["proxy"]])
        retained = sets["others"].select(np.arange(RETAINED))
        start = self.retrained(request)
        setting = None if name in CONTROLS else study.chosen("random", name)
        numbers, steps = itertools.count(), []

        def train(shadow, half):
            number = next(numbers)
            of = "never" if name == "never" else "shadow"
            images = retained if name == "never" else ConcatDataset([half, retained])
            return fine_tune(shadow, images, number, self.work, f"{of}-{request}-{number}")

        def forget(shadow, half):
            if name in CONTROLS:
                return shadow
            target = {"forget_target": losses(shadow, sets["validation"]).mean() + further} if further else {}
            own = sets | {"forget": half}
            trainer, record = unlearn(bench, method, setting, shadow, own, request.seed, extra | target)
            steps.append(record["steps"])
            return trainer.model

        def losses(shadow, images=candidates):
            args = OrthoGradConfig(str(self.work / "run"), per_device_eval_batch_size=250, report_to="none")
            args.disable_tqdm = True
            return per_sample_losses(OrthoGradTrainer(shadow, args), images)

        found = shadow_losses(
            start, candidates, train=train, unlearn=forget, losses=losses, num_shadows=NUM_SHADOWS, seed=request.seed
        )
        attacks, pairs = attack_shadows(found), zip(found.unlearned, found.unseen, strict=True)
        return {
            "auc": [one.auc for one in attacks],
            "tpr": [one.tpr_at_1_percent_fpr for one in attacks],
            "threshold": [membership_inference(*(losses[~np.isnan(losses)] for losses in pair)).auc for pair in pairs],
            "losses": [float(np.nanmean(rows)) for rows in (found.unlearned, found.unseen)],
            "steps": steps,
            "by_sample": differences_by_sample(found),
        }

    def stage_report(self) -> None:
        heads = ("method", "U-LiRA AUC", "U-LiRA TPR at 1 % FPR", "AUC of a threshold on the loss", "steps")
        heads += ("loss, unlearned", "loss, never seen", "spread of differences", "ratio of deviations")
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        panels = {"AUC, U-LiRA": {}, "AUC, threshold on the loss": {}}
        labels = CONTROLS | {name: METHODS[name].label for name in type(self).methods}
        longer = {name: name.replace(variant, labels.get(variant, variant)) for name, (variant, _) in LONGER.items()}
        for name, label in (labels | {name: name for name in WITH_RETAIN_TERM} | longer).items():
            runs = [self.attacked.runs.get(f"{name} random-{seed}") for seed in self.seeds]
            if None in runs:
                continue
            values = {key: np.concatenate([run[key] for run in runs]) for key in ("auc", "tpr", "threshold")}
            shown = [f"{one.mean():.3f} ({one.std(ddof=1):.3f})" for one in values.values()]
            steps = [step for run in runs for step in run.get("steps", [])]
            shown.append(f"{np.median(steps):g}" if steps else "")
            losses = [run.get("losses", [np.nan] * 2) for run in runs]
            shown += ["" if np.isnan(one).any() else f"{np.mean(one):.3f}" for one in zip(*losses, strict=True)]
            told = [run.get("by_sample", [np.nan] * 2) for run in runs]
            shown += ["" if np.isnan(one).any() else f"{np.mean(one):.2f}" for one in zip(*told, strict=True)]
            lines.append("| " + " | ".join([label, *shown]) + " |")
            for panel, key in zip(panels.values(), ("auc", "threshold"), strict=True):
                panel[label] = values[key]
        count = NUM_SHADOWS * len(self.seeds)
        head = f"# Which images were unlearned? Mean (standard deviation) over {count} shadow models"
        (RESULTS / "study_lira.md").write_text("\n\n".join([head, _NOTE, "\n".join(lines), machine_note()]) + "\n")
        plot_means(panels, RESULTS / "study_lira.png")


def differences_by_sample(found: ShadowLosses) -> list[float]:
    """How the losses of single images differ between models that unlearned them and models that never saw them.

    Returns:
        The standard deviation over images of the difference of their mean losses, in nats, less what chance makes of it; and the
        ratio of the deviations over models, pooled over images. A method that makes each image one that was never seen has 0 and 1.
    """
    counts = [(~np.isnan(losses)).sum(0) for losses in (found.unlearned, found.unseen)]
    enough = np.minimum(*counts) > 2
    means, variances = (
        [function(losses[:, enough], 0) for losses in (found.unlearned, found.unseen)]
        for function in (np.nanmean, lambda losses, axis: np.nanvar(losses, axis, ddof=1))
    )
    by_chance = sum(variance / count[enough] for variance, count in zip(variances, counts, strict=True)).mean()
    spread = np.sqrt(max(0.0, np.var(means[0] - means[1], ddof=1) - by_chance))
    return [float(spread), float(np.sqrt(variances[0].mean() / variances[1].mean()))]


_NOTE = """"Spread of differences": over images, the deviation of the mean loss of models that unlearned an image less that of models that never saw it, in nats, \
without what chance makes of it. "Ratio of deviations": how much the loss of an image varies over the former, to the latter. Where each image becomes one that was never seen they are 0 and 1. Empty \
cells were not recorded."""


def make_study(arguments: argparse.Namespace) -> ShadowStudy:
    records = Records(RESULTS / "study_images.json"), Records(RESULTS / "study_lira.json")
    return ShadowStudy(arguments.data_folder, arguments.work_folder, *records)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    main(make_study, parser, ("final", "report"), ())
