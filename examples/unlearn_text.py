"""Makes a language model forget questions and answers, chats or texts, and reports whether it did.

With no arguments: a small Llama learns invented biographies and forgets two people, without network.

    accelerate launch examples/unlearn_text.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name path/or/hub-id --prompt_column question --answer_column answer --forget_column author \
        --forget_values "Jane Doe" --retain_size 400 --finetune_epochs 3 --use_lora --output_dir out

Any causal or encoder-decoder model is taken. What is to be forgotten may be a data set of its own, `--forget_dataset_name`.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets
from demo_people import make_model, make_people, make_tokenizer
from peft import LoraConfig, get_peft_model
from shared import (
    NO_DEMO,
    WITHOUT_RULE,
    ComparisonArguments,
    compared_models,
    load_corpus,
    relearning,
    say_that_nothing_stops,
    trained_folder,
    watched_sets,
    where_it_is,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
)

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, split_forget_retain
from hf_orthograd.callbacks import show_one_bar
from hf_orthograd.data import prepare_text_dataset, present_values, retain_count
from hf_orthograd.evaluation import Quantization, evaluate_unlearning
from hf_orthograd.evaluation.text import (
    AnswerProbability,
    ExactAnswers,
    ExtractionStrength,
    answer_scores,
    generate_answers,
)
from hf_orthograd.objectives import IGNORED_LABEL
from hf_orthograd.publishing import check_access


@dataclass
class RunArguments(ComparisonArguments):
    """What to forget, in which model; see [`OrthoGradConfig`] for how."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder; a small Llama by default."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder with splits train and test; invented people by default."}
    )
    forget_column: str | None = field(default=None, metadata={"help": "Column that says whose a row is."})
    forget_values: list[str] = field(default_factory=list, metadata={"help": "Its values to forget."})
    forget_dataset_name: str | None = field(
        default=None, metadata={"help": "Or a data set whose split train is what to forget, and no row of the other."}
    )
    test_is_reworded: bool = field(
        default=False,
        metadata={"help": "Whether test rows of the forgotten ask in other words for what was trained on."},
    )
    retain_size: float | None = field(
        default=None, metadata={"help": "Other training rows still at hand: a number, or a fraction below 1."}
    )
    finetune_learning_rate: float = field(default=2e-5, metadata={"help": "Its learning rate."})
    finetune_batch_size: int = field(default=16, metadata={"help": "Its batch size per device."})
    stop_in_time: bool = field(
        default=True,
        metadata={
            "help": "Stop where `--stop_metric` of the forgotten is that of the retrained model, if there is one."
        },
    )
    use_lora: bool = field(default=False, metadata={"help": "Unlearn by LoRA, on all linear layers."})
    lora_rank: int = field(default=16, metadata={"help": "Its rank."})
    relearning_steps: int = field(default=10, metadata={"help": "Steps of the relearning attack; 0 for none."})
    relearning_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Its learning rate; by default a tenth of that of fine-tuning, if there was any, else that of unlearning."
        },
    )
    num_shown: int = field(default=3, metadata={"help": "Answers shown before and after, of each set."})


@dataclass
class ScriptArguments(RunArguments):
    """And what a row is."""

    prompt_column: str | None = field(default=None, metadata={"help": "Column with questions, or other prompts."})
    answer_column: str | None = field(default=None, metadata={"help": "Column with their answers."})
    messages_column: str | None = field(default=None, metadata={"help": "Or column with chats, role and content."})
    text_column: str | None = field(default=None, metadata={"help": "Or column with texts, which are learned whole."})
    separator: str | None = field(
        default=None,
        metadata={"help": "Between a prompt and its answer, in place of the chat template, if there is one."},
    )
    refusal: str | None = field(
        default=None, metadata={"help": "What to answer in place of what is forgotten; sets forget_loss='refusal'."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a row; longer ones are refused."})


DEMO = {
    "prompt_column": "question",
    "answer_column": "answer",
    "forget_column": "person",
    "forget_values": ["Ada Fabri", "Dora Duval"],
    "test_is_reworded": True,
    "retain_size": 240,
    "finetune_epochs": 30,
    "finetune_learning_rate": 2e-3,
    "finetune_batch_size": 60,
    "retrain": True,
    "output_dir": "out/people",
    "alpha": 0.5,
    "retain_loss": "kl",
    "forget_loss": "npo",
    "max_steps": 60,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 40,
    "per_device_forget_batch_size": 20,
    "per_device_eval_batch_size": 64,
    "stop_metric": "exact_answers",
    "stop_greater_is_better": True,
    "logging_steps": 2,
}


def parse(script_arguments: type, demo: dict):
    """The arguments of the script and of the run, checked before anything is loaded; the demo's without model and data."""
    parser = HfArgumentParser((script_arguments, OrthoGradConfig))
    if not any(argument.startswith(NO_DEMO) for argument in sys.argv):
        parser.set_defaults(**demo)
    parser.set_defaults(hub_strategy="end")  # nothing is pushed while unlearning runs
    arguments, args = parser.parse_args_into_dataclasses()
    if (arguments.model_name_or_path is None) != (arguments.dataset_name is None):
        raise ValueError("Pass both `--model_name_or_path` and `--dataset_name`, or neither for the demo.")
    arguments.check(args, arguments.model_name_or_path)
    check_access(args)  # before training: the trainer that unlearns is made hours later
    transformers.set_seed(args.seed)
    return arguments, args


def load(arguments: ScriptArguments):
    """Returns the model, its tokenizer, and the rows with splits train and test, and forget if it is one of its own."""
    if arguments.model_name_or_path is None:
        corpus = make_people()
        tokenizer = make_tokenizer(corpus)
        return make_model(tokenizer), tokenizer, corpus
    names = {
        name: getattr(arguments, name) for name in ("prompt_column", "answer_column", "messages_column", "text_column")
    }
    columns = {f"--{name}": column for name, column in names.items() if column is not None}
    corpus = load_corpus(arguments.dataset_name, columns, arguments)
    config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    model_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = model_class.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    if tokenizer.pad_token is None:  # padding is masked: which token it is makes no difference
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer, corpus


def split(corpus: DatasetDict, arguments: RunArguments, seed: int) -> dict[str, Dataset]:
    """Training rows to forget, still at hand and lost; test rows of others and of the forgotten."""
    column, values, size = arguments.forget_column, arguments.forget_values, arguments.retain_size
    if (arguments.forget_dataset_name is None) != bool(values) or bool(values) != (column is not None):
        raise ValueError(
            "Pass `--forget_column` with `--forget_values`, or `--forget_dataset_name`, but they are "
            f"{column!r} with {values}, and {arguments.forget_dataset_name!r}."
        )
    train, test = corpus["train"], corpus["test"]
    if column is None:
        at_hand = train.shuffle(seed=seed).select(range(retain_count(size, len(train))))
        return {"forget": corpus["forget"], "retain": at_hand, "others": train, "test": test}
    everyone = split_forget_retain(train, column, values)
    at_hand = split_forget_retain(train, column, values, retain_size=size, seed=seed)
    sets = {"forget": everyone["forget"], "retain": at_hand["retain"], "others": everyone["retain"], "test": test}
    if present := present_values(test, column, values):
        asked = split_forget_retain(test, column, present)
        name = "forget_reworded" if arguments.test_is_reworded else "forget_unseen"
        sets |= {"test": asked["retain"], name: asked["forget"]}
    return sets


def exact_answers(prediction) -> dict[str, float]:
    return {"exact_answers": float(ExactAnswers().counts(prediction)[0].mean())}


def finetune(model, sets: dict[str, Dataset], args: OrthoGradConfig, arguments: RunArguments, shared: dict):
    """A copy of the model, trained on these sets by the plain Trainer, and saved."""
    model = copy.deepcopy(model)
    args = replace(
        args,
        **WITHOUT_RULE,
        output_dir=trained_folder(args.output_dir, list(sets)),
        max_steps=-1,
        num_train_epochs=arguments.finetune_epochs,
        learning_rate=arguments.finetune_learning_rate,
        per_device_train_batch_size=arguments.finetune_batch_size,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        logging_steps=100,
    )
    transformers.set_seed(args.seed)
    rows = concatenate_datasets(list(sets.values()))
    trainer = show_one_bar(OrthoGradTrainer(model, args, train_dataset=rows, **shared))
    trainer.train()
    trainer.save_model()
    return model


def stopping_in_time(args: OrthoGradConfig, reference, sets: dict, arguments: RunArguments, shared: dict):
    """The arguments with a rule that stops where a model would be that never read the forget set, if one is known."""
    if not arguments.stop_in_time or args.forget_target is not None:
        return args
    if reference is None:
        say_that_nothing_stops()
        return args
    probe = OrthoGradTrainer(reference, replace(args, **WITHOUT_RULE), **shared)
    level = probe.evaluate(sets["forget"])[f"eval_{args.stop_metric}"]
    when = {"eval_strategy": "steps", "eval_steps": args.eval_steps or 2} if args.eval_strategy == "no" else {}
    return replace(args, forget_target=level, **when)


def has_answers(rows: Dataset, config) -> bool:
    """Whether rows are prompts with answers, and not plain texts, of which none is said word for word."""
    return rows[0]["labels"][0] == IGNORED_LABEL or config.is_encoder_decoder


def show_answers(trainer: OrthoGradTrainer, original, sets: dict[str, Dataset], count: int) -> str:
    """A table of what both models say to the first questions of each set, or of how they go on with plain texts; without the original
    one, of the unlearned."""
    models = {"after": None} if original is None else {"before": original, "after": None}
    lines = [f"| set | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for name, rows in sets.items():
        rows = rows.select(range(min(count, len(rows))))
        # a model that has forgotten may go on without end
        longest = max(sum(label != IGNORED_LABEL for label in row["labels"]) for row in rows)
        begun = None if has_answers(rows, trainer.model.config) else max(1, min(map(len, rows["labels"])) // 2)
        asked = {"prompt_length": begun, "max_new_tokens": 2 * longest}
        said = [generate_answers(trainer, rows, model=model, **asked) for model in models.values()]
        cells = [[" ".join(text.replace("|", "\\|").split()) for text in one] for one in said]
        lines += [f"| {name} | {' | '.join(texts)} |" for texts in zip(*cells, strict=True)]
    return "\n".join(lines)


def run(
    start,
    sets: dict[str, Dataset],
    arguments: RunArguments,
    args: OrthoGradConfig,
    shared: dict,
    vary: Callable | None = None,
) -> None:
    """Fine-tunes where that is asked for, unlearns, measures, saves and publishes.

    Args:
        start: The model.
        sets (`dict[str, Dataset]`): Rows as the model takes them: "forget", "retain", "others", "test" and further ones to be
            measured.
        shared (`dict`): What all trainers are given.
        vary (`Callable`, *optional*): A transform of retain rows, which makes each anew whenever it is read.
    """
    measured = {name: rows for name, rows in sets.items() if name != "others"}
    asks = has_answers(sets["forget"], start.config)
    retain = sets["retain"] if vary is None else sets["retain"].with_transform(vary)

    def unlearner(model, args: OrthoGradConfig) -> OrthoGradTrainer:
        student = copy.deepcopy(model)
        if arguments.use_lora and not arguments.evaluate_only:
            rank = arguments.lora_rank
            student = get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        watched = watched_sets(measured, args, measured.get("forget_unseen", measured["test"]))
        given = {"train_dataset": retain, "forget_dataset": sets["forget"], "eval_dataset": watched}
        return OrthoGradTrainer(student, args, **given, **shared)

    if arguments.dry_run:
        PartialState().print(unlearner(start, args).estimate())
        return

    def train(names: list[str]):
        return finetune(start, {name: sets[name] for name in names}, args, arguments, shared)

    original, reference = compared_models(start, arguments, train)
    if not arguments.evaluate_only:
        args = stopping_in_time(args, reference, sets, arguments, shared)
    trainer = unlearner(start if arguments.evaluate_only else original, args)
    if not arguments.evaluate_only:
        if asks and trainer.evaluate(sets["forget"], metric_key_prefix="known")["known_exact_answers"] == 0:
            PartialState().print(
                f"The model gives none of the {len(sets['forget'])} answers to be forgotten word for word. If it was trained on them, they "
                "looked otherwise there: compare prompts, `--separator`, and the chat template with its system message."
            )
        show_one_bar(trainer).train()
        trainer.save_model()
    measure(trainer, original, reference, measured, arguments)


def measure(
    trainer: OrthoGradTrainer, original, reference, measured: dict[str, Dataset], arguments: RunArguments
) -> None:
    """Writes the report and the answers, and publishes where that is asked for."""
    args = trainer.args
    attacks = [Quantization(8), Quantization(4, group_size=64)]
    if arguments.relearning_steps > 0:
        steps = sorted({1, arguments.relearning_steps // 2, arguments.relearning_steps} - {0})
        attacks.append(relearning(trainer, measured["forget"], arguments, steps=steps, batch_size=16))
    metrics = [ExactAnswers(), AnswerProbability(), ExtractionStrength()]
    metric, *further = metrics if has_answers(measured["forget"], trainer.model.config) else metrics[1:]
    report = evaluate_unlearning(
        trainer,
        reference,
        attacks,
        original=original,
        datasets=measured,
        metric=metric,
        further_metrics=further,
        group_column=arguments.forget_column,
    )
    if trainer.is_world_process_zero():
        report.save(args.output_dir)
    answers = show_answers(trainer, original, measured, arguments.num_shown) if arguments.num_shown > 0 else ""
    if trainer.is_world_process_zero():
        Path(args.output_dir, "answers.md").write_text(answers + "\n")
        print(f"{report.to_markdown()}\n\n{answers}\n\n{where_it_is(args.output_dir, report, arguments)}")
    if not arguments.evaluate_only:
        publish = trainer.push_to_hub if args.push_to_hub else trainer.create_model_card
        publish(report=report)
    trainer.accelerator.end_training()


def labels_of(answer: str, prepare: Callable, arguments: ScriptArguments) -> list[int]:
    """An answer's labels, as it stands behind any prompt."""
    row = {arguments.prompt_column: "?", arguments.answer_column: answer}
    if arguments.messages_column is not None:
        row = {arguments.messages_column: [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
    return [label for label in prepare(Dataset.from_list([row]))[0]["labels"] if label != IGNORED_LABEL]


def main() -> None:
    arguments, args = parse(ScriptArguments, DEMO)
    if arguments.refusal is not None and arguments.text_column is not None:
        raise ValueError(
            f"`--refusal` is {arguments.refusal!r}, but plain texts, `--text_column`, have no answers. Leave one of them out."
        )
    start, tokenizer, corpus = load(arguments)
    encoder_decoder = start.config.is_encoder_decoder
    prepare = partial(
        prepare_text_dataset,
        tokenizer=tokenizer,
        prompt_column=arguments.prompt_column,
        answer_column=arguments.answer_column,
        messages_column=arguments.messages_column,
        text_column=arguments.text_column,
        separator=arguments.separator,
        max_length=arguments.max_length,
        is_encoder_decoder=encoder_decoder,
    )
    sets = {name: prepare(rows) for name, rows in split(corpus, arguments, args.seed).items()}
    if arguments.model_name_or_path is not None:
        PartialState().print(
            f"A row, from its beginning to its end: {tokenizer.decode(sets['forget'][0]['input_ids'])!r}."
        )
    if arguments.refusal is not None:
        args = replace(args, forget_loss="refusal", refusal_labels=labels_of(arguments.refusal, prepare, arguments))
    shared = {
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "processing_class": tokenizer,
        "compute_metrics": exact_answers,
        "preprocess_logits_for_metrics": partial(answer_scores, is_encoder_decoder=encoder_decoder),
    }

    run(start, sets, arguments, args, shared)


if __name__ == "__main__":
    main()
