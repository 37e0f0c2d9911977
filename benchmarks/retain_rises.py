"""How often a retain sample's loss really rises in a step of AdamW: gradient against update as projection target.

    python benchmarks/retain_rises.py --model_name_or_path <folder> --dataset_name <folder> --speaker 1088

Real weights and speech: the loss of every retain sample of every step is taken before and after it, in evaluation mode
(what `UnlearningMonitor` logs with `monitor_steps=1`). Prints one table and writes it into benchmarks/results/.
"""

import argparse
import json
import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from datasets import load_dataset
from step_cost import machine
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, split_forget_retain
from hf_orthograd.data.speech import SpeechCollator, prepare_speech_dataset, shorten_whisper


RESULTS = Path(__file__).parent / "results"


def run(arguments: argparse.Namespace, alpha: float, target: str) -> list[dict]:
    """Returns what was logged of each step."""
    transformers.set_seed(0)
    processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
    shorten_whisper(model, processor, arguments.seconds)
    rows = load_dataset(arguments.dataset_name)["train"]
    sets = split_forget_retain(
        rows, column="speaker", values=[arguments.speaker], retain_size=arguments.retain_size, stratify_by="speaker"
    )
    columns = {"audio_column": "audio", "text_column": "text"}
    sets = {name: prepare_speech_dataset(own, processor, **columns) for name, own in sets.items()}
    args = OrthoGradConfig(
        tempfile.mkdtemp(), max_steps=arguments.steps, per_device_train_batch_size=12, per_device_forget_batch_size=6,
        alpha=alpha, projection_target=target, forget_loss="npo", npo_beta=2.0, optim="adamw_torch",
        learning_rate=arguments.learning_rate, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=1.0,
        monitor_steps=1, logging_steps=1, save_strategy="no", report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    trainer = OrthoGradTrainer(
        model, args, train_dataset=sets["retain"], forget_dataset=sets["forget"], processing_class=processor,
        data_collator=SpeechCollator(processor, model.config.decoder_start_token_id),
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "retain_rises" in entry]


def to_row(alpha: float, target: str, logs: list[dict]) -> str:
    def mean(name: str) -> float:
        return sum(entry[name] for entry in logs) / len(logs)

    rises = sum(entry["retain_rises"] > 0 for entry in logs)
    names = ("largest_retain_rise", "retain_change", "retain_change_predicted")
    changes = " | ".join(f"{mean(name):+.1e}" for name in names)
    kept = f"{mean('update_kept'):.3f}" if target == "update" else ""
    losses = f"{logs[0]['forget_loss']:.3f} to {logs[-1]['forget_loss']:.3f}"
    return (
        f"| {alpha} | {target} | {rises} of {len(logs)} | {mean('retain_rises'):.1%} | {changes} | {kept} | {losses} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a Whisper")
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder with columns audio, text and speaker")
    parser.add_argument("--speaker", required=True, help="whom to forget")
    parser.add_argument("--retain_size", type=int, default=36)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=15, help="window")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.1])
    arguments = parser.parse_args()
    lines = [
        "# Retain losses that rise in a step",
        "",
        f"{date.today()}, {machine('cpu')}, float32, "
        f"python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        + f". {Path(arguments.model_name_or_path).name}, {Path(arguments.dataset_name).name}, speaker {arguments.speaker}, "
        f"{arguments.retain_size} retain utterances; NPO, 12 retain and 6 forget samples a step, AdamW at a constant "
        f"{arguments.learning_rate:g}, weight decay 0.1, clipping 1.0; one seed. Made by `benchmarks/retain_rises.py`.",
        "",
        "| alpha | projection_target | steps in which a retain sample's loss rose | share of retain samples whose loss rose | "
        "largest rise of a step, mean | change of a retain loss, mean | predicted | norm of the step kept | "
        "forget loss, first to last step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    everything = []
    for alpha in arguments.alphas:
        for target in ("gradient", "update"):
            logs = run(arguments, alpha, target)
            everything.append({"alpha": alpha, "target": target, "logs": logs})
            lines.append(to_row(alpha, target, logs))
            print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "retain_rises.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "retain_rises.json").write_text(json.dumps(everything) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
