"""Makes a speech recogniser forget a speaker, and reports in word error rate what that did.

With no arguments: a small Whisper is trained on seven synthetic speakers and forgets one of them, without network.

    accelerate launch examples/unlearn_asr.py --model_name_or_path openai/whisper-tiny.en \
        --dataset_name path/or/hub-id --forget_column speaker --forget_values 1088 --retain_size 36 \
        --finetune_epochs 3 --max_audio_seconds 10 --output_dir out
"""

import copy
import json
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from datasets import DatasetDict, concatenate_datasets, disable_progress_bars, load_dataset
from shared import NO_DEMO, WITHOUT_RULE, ComparisonArguments, compared_models, trained_folder, where_it_is
from students import check_parts, make_student
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor, HfArgumentParser

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, split_forget_retain
from hf_orthograd.callbacks import show_one_bar
from hf_orthograd.data import VarySpeech, check_corpus, present_values
from hf_orthograd.data.speech import (
    SpeechCollator,
    is_whisper_like,
    load_audio_folder,
    most_likely_tokens,
    normalize_text,
    prepare_speech_dataset,
    shorten_whisper,
    transcript_labels,
    transcripts,
)
from hf_orthograd.evaluation import (
    CharacterErrorRate,
    CharacterErrors,
    Quantization,
    Refusals,
    UnlearningReport,
    WordErrorRate,
    WordErrors,
    evaluate_unlearning,
    plot_unlearning,
)
from hf_orthograd.publishing import check_access


@dataclass
class ScriptArguments(ComparisonArguments):
    """What to forget, in which model; see [`OrthoGradConfig`] for how."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder; a demo model by default."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder with splits train and test; a spoken demo corpus by default."},
    )
    forget_column: str = field(default="speaker", metadata={"help": "Column that says whose an utterance is."})
    forget_values: list[str] = field(default_factory=list, metadata={"help": "Values of that column to forget."})
    retain_size: float | None = field(
        default=None, metadata={"help": "Utterances of the others still at hand: a number, or a fraction below 1."}
    )
    audio_column: str = field(default="audio", metadata={"help": "Column with the audio."})
    text_column: str = field(default="text", metadata={"help": "Column with the transcript."})
    finetune_learning_rate: float = field(default=2e-5, metadata={"help": "Its learning rate."})
    finetune_batch_size: int = field(default=8, metadata={"help": "Its batch size per device."})
    max_audio_seconds: int | None = field(default=None, metadata={"help": "Whisper: window shorter than 30 s."})
    stop_in_time: bool = field(
        default=True,
        metadata={
            "help": "Without `--forget_target`, stop where `--stop_metric` of the forgotten is that of the retrained model, "
            "or without one that of their test utterances before unlearning."
        },
    )
    vary_retain: bool | None = field(
        default=None,
        metadata={"help": "Shift and mask the retain utterances anew at each step; by default with retain_loss='kl'."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Measure at most so many utterances of each set; all by default."}
    )
    freeze_decoder: bool = field(
        default=False,
        metadata={
            "help": "Whisper: unlearn by the encoder alone; its lower layers alone cost others less, see `--trained_encoder_layers`."
        },
    )
    trained_encoder_layers: int | None = field(
        default=None,
        metadata={
            "help": "Whisper: unlearn by what is below, and the first so many layers of the encoder, alone; half of them "
            "cost the others less than all in the study of recognisers that fail on a speaker."
        },
    )
    refusal: str | None = field(
        default=None,
        metadata={
            "help": "Make forgotten utterances be transcribed so, '.' say, which counts as no word; sets forget_loss='refusal'."
        },
    )
    use_lora: bool = field(default=False, metadata={"help": "Unlearn by a LoRA adapter on the attention projections."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    compare_projections: list[str] = field(
        default_factory=list, metadata={"help": "Repeat the run with these `projection`s, for the table alone."}
    )

    def __post_init__(self):
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise ValueError(f"`--max_eval_samples` must be at least 1, but is {self.max_eval_samples}.")


DEMO = {
    "forget_values": ["lena"],
    "retain_size": 60,
    "finetune_epochs": 20,
    "finetune_learning_rate": 1e-3,
    "retrain": True,
    "compare_projections": ["none"],
    "output_dir": "out/demo",
    "forget_loss": "npo",
    "max_steps": 60,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 30,
    "logging_steps": 1,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}

SETS = {
    "forget": "forgotten, trained on",
    "forget_unseen": "forgotten, unseen",
    "retain": "others, at hand",
    "test": "others, unseen",
}


def load(arguments: ScriptArguments):
    """Returns the model, its processor, and the corpus with splits train and test."""
    if arguments.model_name_or_path is None:
        from demo_corpus import build_demo_corpus, build_demo_recogniser

        disable_progress_bars()  # of preparing and saving, which take seconds here
        transformers.utils.logging.disable_progress_bar()
        corpus = build_demo_corpus()
        return *build_demo_recogniser(corpus["train"]["text"]), corpus
    of_files = Path(arguments.dataset_name, "train", "metadata.csv").exists()
    corpus = (load_audio_folder if of_files else load_dataset)(arguments.dataset_name)
    columns = ("audio_column", "text_column", "forget_column")
    check_corpus(corpus, {f"--{name}": getattr(arguments, name) for name in columns})
    processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
    config = transformers.AutoConfig.from_pretrained(arguments.model_name_or_path)
    auto_class = AutoModelForSpeechSeq2Seq if config.is_encoder_decoder else AutoModelForCTC
    model = auto_class.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
    if arguments.max_audio_seconds is not None:
        shorten_whisper(model, processor, arguments.max_audio_seconds)
    return model, processor, corpus


def split(corpus: DatasetDict, arguments: ScriptArguments) -> DatasetDict:
    """Training rows to forget, still at hand and lost; test rows of other speakers and of the forgotten one."""
    by_speaker = {"column": arguments.forget_column, "values": arguments.forget_values}
    everyone = split_forget_retain(corpus["train"], **by_speaker)
    at_hand = split_forget_retain(
        corpus["train"], **by_speaker, retain_size=arguments.retain_size, stratify_by=arguments.forget_column
    )
    sets = {
        "forget": everyone["forget"],
        "retain": at_hand["retain"],
        "others": everyone["retain"],
        "test": corpus["test"],
    }
    if asked := present_values(corpus["test"], **by_speaker):
        unseen = split_forget_retain(corpus["test"], arguments.forget_column, asked)
        sets |= {"test": unseen["retain"], "forget_unseen": unseen["forget"]}
    return DatasetDict(sets)


class Recogniser:
    """A model with what its trainers share: data, collator and error rates."""

    def __init__(self, model, processor, sets: DatasetDict, max_eval_samples: int | None = None):
        self.sets, whisper = sets, is_whisper_like(model)
        self.measured = {
            name: sets[name].take(min(max_eval_samples or sys.maxsize, len(sets[name])))
            for name in SETS
            if name in sets
        }
        self.transcribe = transcripts(processor, whisper)
        self.rates = (WordErrorRate(keep_in_memory=True), CharacterErrorRate(keep_in_memory=True))
        self.shared = {
            "data_collator": SpeechCollator(processor, model.config.decoder_start_token_id if whisper else None),
            "processing_class": processor,
            "compute_metrics": self.error_rates,
            "preprocess_logits_for_metrics": None if whisper else most_likely_tokens,
            "eval_dataset": self.measured,
        }
        # a model that has forgotten may go on without end: twice the longest transcript is enough to count as wrong
        longest = max(len(labels) for rows in sets.values() for labels in rows["labels"])
        self.evaluation = {"predict_with_generate": whisper, "generation_max_length": 2 * longest}

    def error_rates(self, prediction) -> dict[str, float]:
        predictions, references = self.transcribe(prediction)
        both = [rate.compute(predictions=predictions, references=references) for rate in self.rates]
        return {name: value for rate in both for name, value in rate.items()}

    def finetune(self, model, sets: list[str], args: OrthoGradConfig, arguments: ScriptArguments):
        """A copy of the model, trained on these sets by the plain Trainer, and saved."""
        model = copy.deepcopy(model)
        forgotten = ", ".join(arguments.forget_values)
        PartialState().print(
            f"Learning from all speakers, {forgotten} {'among them' if 'forget' in sets else 'left out'} ..."
        )
        args = replace(
            args,
            output_dir=trained_folder(args.output_dir, sets),
            max_steps=-1,
            num_train_epochs=arguments.finetune_epochs,
            learning_rate=arguments.finetune_learning_rate,
            per_device_train_batch_size=arguments.finetune_batch_size,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            logging_steps=50,
            **WITHOUT_RULE,
            **self.evaluation,
        )
        spoken = concatenate_datasets([self.sets[name] for name in sets])
        trainer = show_one_bar(OrthoGradTrainer(model, args, train_dataset=spoken, **self.shared))
        trainer.train()
        trainer.save_model()
        return model

    def probe(self, model, args: OrthoGradConfig) -> OrthoGradTrainer:
        """A trainer that only measures."""
        return OrthoGradTrainer(model, replace(args, **WITHOUT_RULE, **self.evaluation), **self.shared)

    def unlearner(self, model, args: OrthoGradConfig, arguments: ScriptArguments) -> OrthoGradTrainer:
        retain = self.sets["retain"]
        if arguments.vary_retain or (arguments.vary_retain is None and args.retain_loss == "kl"):
            retain = retain.with_transform(VarySpeech(self.shared["processing_class"].feature_extractor))
        # what the run is watched on; the rest is measured before and after
        watched = {name: self.measured[name] for name in ("forget", "retain")}
        if args.forget_target == "reference" and "forget_unseen" in self.measured:
            watched["reference"] = self.measured["forget_unseen"]
        sets = {"train_dataset": retain, "forget_dataset": self.sets["forget"], "eval_dataset": watched}
        args = replace(args, save_strategy="no", **self.evaluation)
        return show_one_bar(OrthoGradTrainer(model, args, **self.shared | sets))

    def stopping_in_time(self, args: OrthoGradConfig, reference, arguments: ScriptArguments) -> OrthoGradConfig:
        """The arguments with a rule that stops where a model would be that never heard the speaker, if one is known."""
        if not arguments.stop_in_time or args.forget_target is not None:
            return args
        level = "reference"
        if reference is not None:
            level = self.probe(reference, args).evaluate(self.measured["forget"])[f"eval_{args.stop_metric}"]
        elif "forget_unseen" not in self.measured:
            return args
        when = {"eval_strategy": "steps", "eval_steps": args.eval_steps or 2} if args.eval_strategy == "no" else {}
        return replace(args, forget_target=level, **when)

    def unlearn(self, trainer: OrthoGradTrainer) -> dict:
        """Returns a row of the results: rates per set, losses per step, time."""
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        history = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
        return self.rates_of(trainer) | {"seconds": seconds, "history": history}

    def examine(self, trainer: OrthoGradTrainer, original, reference, arguments: ScriptArguments) -> UnlearningReport:
        further = [CharacterErrors(self.transcribe)]
        if arguments.refusal is not None:
            heard = lambda prediction: self.transcribe(prediction)[0]  # noqa: E731
            further.append(Refusals(normalize_text(arguments.refusal), heard))
        return evaluate_unlearning(
            trainer,
            reference,
            [Quantization(8), Quantization(4, group_size=64)],
            original=original,
            datasets=self.measured,
            metric=WordErrors(self.transcribe),
            further_metrics=further,
            group_column=arguments.forget_column,
        )

    def rates_of(self, trainer: OrthoGradTrainer) -> dict[str, dict[str, float]]:
        metrics = trainer.evaluate(self.measured)
        return {
            name: {rate: 100 * metrics[f"eval_{name}_{rate}"] for rate in ("wer", "cer")} for name in self.measured
        }


def to_markdown(rows: dict[str, dict]) -> str:
    shown = [name for name in SETS if all(name in row for row in rows.values())]
    lines = ["| WER / CER (%) | " + " | ".join(SETS[name] for name in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for method, row in rows.items():
        cells = [f"{row[name]['wer']:.1f} / {row[name]['cer']:.1f}" for name in shown]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: dict[str, dict], found: UnlearningReport, arguments: ScriptArguments, args: OrthoGradConfig) -> None:
    """Writes the report, results.json, results.md and curves.png, and prints the table."""
    found.save(args.output_dir)
    output, table = Path(args.output_dir), to_markdown(rows)
    results = {
        "rows": rows,
        "arguments": asdict(arguments) | args.to_sanitized_dict(),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1, default=str))
    (output / "results.md").write_text(table + "\n")
    histories = {method: row["history"] for method, row in rows.items() if "history" in row}
    qualities = {
        method: {SETS[name]: row[name]["wer"] for name in SETS if name in row} for method, row in rows.items()
    }
    plot_unlearning(histories, qualities, "word error rate (%)", output / "curves.png")
    print(f"\n{table}\n\n{where_it_is(args.output_dir, found, arguments)}")


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, OrthoGradConfig))
    if not any(argument.startswith(NO_DEMO) for argument in sys.argv):
        parser.set_defaults(**DEMO)
    parser.set_defaults(hub_strategy="end")  # nothing is pushed while unlearning runs
    arguments, args = parser.parse_args_into_dataclasses()
    if (arguments.model_name_or_path is None) != (arguments.dataset_name is None):
        raise ValueError("Pass both `--model_name_or_path` and `--dataset_name`, or neither for the demo.")
    arguments.check(args, arguments.model_name_or_path)
    check_access(args)  # before fine-tuning: the trainer that unlearns is made hours later
    say = PartialState().print  # in the first process
    transformers.set_seed(args.seed)
    say("Data and model ...")
    model, processor, corpus = load(arguments)
    check_parts(model, arguments)
    if arguments.refusal is not None:
        labels = transcript_labels(arguments.refusal, processor, getattr(model.config, "decoder_start_token_id", None))
        args = replace(args, forget_loss="refusal", refusal_labels=labels)
    columns = {"audio_column": arguments.audio_column, "text_column": arguments.text_column}
    sets = {
        name: prepare_speech_dataset(rows, processor, **columns) for name, rows in split(corpus, arguments).items()
    }
    recogniser = Recogniser(model, processor, DatasetDict(sets), arguments.max_eval_samples)
    if arguments.dry_run:
        say(recogniser.unlearner(make_student(model, arguments), args, arguments).estimate())
        return

    def train(names: list[str]):
        return recogniser.finetune(model, names, args, arguments)

    def load_another(name: str):
        another = type(model).from_pretrained(name, dtype=torch.float32)
        if arguments.max_audio_seconds is not None:
            shorten_whisper(another, processor, arguments.max_audio_seconds)
        return another

    original, reference = compared_models(model, arguments, train, load_another)
    known = {"before": original, "retrained": reference, "unlearned": model if arguments.evaluate_only else None}
    rows = {name: recogniser.rates_of(recogniser.probe(one, args)) for name, one in known.items() if one is not None}
    if arguments.evaluate_only:
        trainer = recogniser.unlearner(model, args, arguments)
    else:
        args = recogniser.stopping_in_time(args, reference, arguments)
    for projection in () if arguments.evaluate_only else (*arguments.compare_projections, args.projection):
        say(f'Unlearning, projection="{projection}" ...')
        student = make_student(original, arguments)
        transformers.set_seed(args.seed)
        trainer = recogniser.unlearner(student, replace(args, projection=projection), arguments)
        rows[f'projection="{projection}"'] = recogniser.unlearn(trainer)

    say("Saving and measuring ...")
    if not arguments.evaluate_only:
        trainer.save_model()
    examined = recogniser.examine(trainer, original, reference, arguments)
    if trainer.is_world_process_zero():
        report(rows, examined, arguments, args)
    if not arguments.evaluate_only:
        publish = trainer.push_to_hub if args.push_to_hub else trainer.create_model_card
        publish(report=examined)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
