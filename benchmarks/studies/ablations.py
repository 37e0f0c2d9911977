"""What of OrthoGrad matters: per-sample or mean projection, the retain term, k, LoRA, the solver's iterations.

    python benchmarks/studies/ablations.py --data_folder <CIFAR-10 as parquet>

The image study's models, sets, steps and stopping rule, at 5 % retain data; each variant changes one thing in OrthoGrad with ascent at a
learning rate of 1e-4 (LoRA: 1e-3). Settings are not chosen anew for each variant.
"""

import argparse
from pathlib import Path

import torch
from harness import RESULTS, Records
from images import ImageStudy
from peft import LoraConfig, get_peft_model
from tables import COLUMNS, cells, to_markdown


LORA = "LoRA"
WITHOUT_RULE = {"eval_strategy": "no", "forget_target": None}

# name: (method, what changes)
VARIANTS = {
    "OrthoGrad, k = 64, alpha = 0.5": ("orthograd", {}),
    "no projection": ("graddiff", {}),
    "mean projection": ("mean_projection", {}),
    "tensor by tensor": ("orthograd", {"projection_scope": "per_tensor"}),
    "update corrected": ("orthograd", {"projection_target": "update"}),
    **{f"k = {k}": ("orthograd", {"per_device_train_batch_size": k}) for k in (2, 4, 8, 16, 32, 128)},
    **{f"mean projection, k = {k}": ("mean_projection", {"per_device_train_batch_size": k}) for k in (8, 128)},
    **{f"alpha = {alpha}": ("orthograd", {"alpha": alpha}) for alpha in (0.0, 0.1, 0.3, 0.7, 0.9)},
    "no projection, alpha = 0.9": ("graddiff", {"alpha": 0.9}),
    **{
        f"{number} iterations of cg": ("orthograd", {"projection_solver": "cg", "projection_iterations": number})
        for number in (1, 3, 10)
    },
    "NPO": ("orthograd_npo", {}),
    "NPO, no projection": ("npo", {}),
    "SimNPO": ("orthograd", {"forget_loss": "simnpo"}),
    "SimNPO, no projection": ("simnpo", {}),
    "NPO, update corrected": ("orthograd_npo", {"projection_target": "update"}),
    "NPO, all 48 steps": ("orthograd_npo", WITHOUT_RULE),
    "NPO, no projection, all 48 steps": ("npo", WITHOUT_RULE),
    "NPO, all 48 steps, k = 128": ("orthograd_npo", WITHOUT_RULE | {"per_device_train_batch_size": 128}),
    "LoRA": ("orthograd", {LORA: True}),
    "LoRA, no projection": ("graddiff", {LORA: True}),
    "LoRA, alpha = 0": ("orthograd", {LORA: True, "alpha": 0.0}),
    "LoRA, no projection, alpha = 0": ("gradient_ascent", {LORA: True}),
}


class Ablations(ImageStudy):
    """Each variant on each request; `stage_final` and `stage_report` are all there is."""

    lora = False

    def original(self, seed: int):
        model = super().original(seed)
        if not self.lora:
            return model
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))

    def stage_final(self) -> None:
        for seed in self.seeds:
            for variant, (method, changes) in VARIANTS.items():
                for kind in self.kinds:
                    request = self.request(kind, seed)
                    self.records.get(f"{variant} {request}", lambda m=method, c=changes, r=request: self.vary(m, c, r))

    def vary(self, method: str, changes: dict, request) -> dict:
        self.reference("retrained", request)
        self.lora = LORA in changes
        extra = {name: value for name, value in changes.items() if name != LORA}
        try:
            return self.unlearn(request, method, 1e-3 if self.lora else 1e-4, "0.05", attacked=False, extra=extra)
        finally:
            self.lora = False

    def stage_report(self) -> None:
        """Of each kind the seeds that the first variant has; variants that lack one of them are left out."""
        parts, columns = [], COLUMNS[: COLUMNS.index("relearn steps")]
        for kind in self.kinds:
            seeds = [seed for seed in self.seeds if f"{next(iter(VARIANTS))} {kind}-{seed}" in self.records.runs]
            requests = [self.request(kind, seed) for seed in seeds]
            known = [[self.reference(what, one) for one in requests] for what in ("original", "retrained")]
            rows = {"original": (known[0], None), "retrained": (known[1], None)}
            for variant in VARIANTS:
                records = [self.records.runs.get(f"{variant} {request}") for request in requests]
                if None not in records:
                    rows[variant] = (records, records)
            shown = {
                label: (cells(records, *known, self.better)[: len(columns)], runs)
                for label, (records, runs) in rows.items()
            }
            title = f"## {kind}, {len(seeds)} seeds" if len(seeds) > 1 else f"## {kind}, one seed"
            parts.append(f"{title}\n\n{to_markdown(shown, columns, {})}")
        (RESULTS / "study_ablations.md").write_text("# Ablations\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument("--work_folder", type=Path, default=Path("out/studies/images"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", default=["final", "report"], choices=["final", "report"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = Ablations(arguments.data_folder, arguments.work_folder, Records(RESULTS / "study_ablations.json"))
    study.seeds = tuple(arguments.seeds)
    for stage in arguments.stages:
        getattr(study, f"stage_{stage}")()
