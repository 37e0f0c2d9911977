"""Another answer in place of what is forgotten: what samples are made to say, and the step that teaches it."""

import numpy as np
import pytest
import torch
from conftest import MODELS, Samples, make_example
from equations import batch_of
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, EvalPrediction
from transformers.trainer_utils import get_last_checkpoint

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, project_orthogonal
from hf_orthograd.baselines import GruTrainer, GuTrainer, WgaTrainer
from hf_orthograd.evaluation import Refusals
from hf_orthograd.objectives import PerSampleLoss


ALPHA, RATE = 0.3, 0.1
ANSWERS = {"whisper": [7, 8, 2], "wav2vec2": [4, 5], "vit": [3], "llama": [9, 11, 2]}
PROMPT = 4  # tokens that a llama reads before its answer


def examples(kind, count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [make_example(kind, number, generator) for number in range(count)]
    for row in rows if kind == "llama" else []:
        row["labels"][:PROMPT] = -100
    return rows


def refused(kind, row):
    """A sample with the answer in place of its own, written by hand."""
    answer = torch.tensor(ANSWERS[kind])
    if kind == "vit":
        return {**row, "labels": answer[0]}
    if kind != "llama":
        return {**row, "labels": answer}
    ids = torch.cat([row["input_ids"][:PROMPT], answer])
    return {"input_ids": ids, "labels": torch.cat([torch.full((PROMPT,), -100), answer])}


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def gradients(model, rows):
    """One sample, the model's own loss, one backward pass at a time; shape (n, d)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = [model(**{name: value[None] for name, value in row.items()}).loss for row in rows]
    return torch.stack([flat(torch.autograd.grad(loss, trained, materialize_grads=True)) for loss in losses])


def trainer_of(kind, model, folder, method=OrthoGradTrainer, **settings):
    fixed = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 1, "save_strategy": "no"}
    batches = {"per_device_train_batch_size": 4, "per_device_forget_batch_size": 3}
    descent = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    refusal = {"forget_loss": "refusal", "refusal_labels": ANSWERS[kind], "alpha": ALPHA}
    args = OrthoGradConfig(str(folder), **(fixed | batches | descent | refusal | settings))
    sets = {"train_dataset": Samples(examples(kind, 4, 1)), "forget_dataset": Samples(examples(kind, 3, 2))}
    return method(model, args, **sets)


@pytest.mark.parametrize(
    ("projection", "micro_batches"), [("orthogonal", 1), ("orthogonal", 2), ("none", 1), ("none", 2)]
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_descends_the_loss_of_the_answer_off_the_retain_gradients(
    kind, projection, micro_batches, make_model, tmp_path
):
    model = make_model(kind).train()
    of_answers = gradients(model, [refused(kind, row) for row in examples(kind, 3, 2)]).mean(0)
    of_retain = gradients(model, examples(kind, 4, 1))
    kept = project_orthogonal(of_answers, of_retain) if projection == "orthogonal" else of_answers
    expected = -RATE * (ALPHA * of_retain.mean(0) + (1 - ALPHA) * kept)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = flat(trained)
    # each micro-batch holds the whole forget set, so that their mean is that of one
    split = {"gradient_accumulation_steps": micro_batches, "per_device_train_batch_size": 4 // micro_batches}
    trainer_of(kind, model, tmp_path, projection=projection, **split).train()
    assert (flat(trained) - before - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_comes_after_the_prompt_however_it_is_padded(side):
    """No longer than it must be: the longest prompt and the answer fill the model's room."""
    rows = [([5, 6], [50, 51, 52]), ([7, 8, 9], [53])]
    prompts, answer = [prompt for prompt, _ in rows], [9, 2]

    def padded(values, fill):
        room = [fill] * (7 - len(values))
        return room + values if side == "left" else values + room

    ids = torch.tensor([padded(prompt + own, 0) for prompt, own in rows])
    labels = torch.tensor([padded([-100] * len(prompt) + own, -100) for prompt, own in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": labels,
        "token_type_ids": ((ids > 0) & (labels < 0)).long(),
    }
    made = PerSampleLoss(MODELS["llama"]()).answering(answer)({**inputs, "pixel_values": torch.ones(2, 7)[:, :3]})
    seen = made["attention_mask"] == 1
    assert [made["input_ids"][row][seen[row]].tolist() for row in range(2)] == [prompt + answer for prompt in prompts]
    said = [made["labels"][row][seen[row]].tolist() for row in range(2)]
    assert said == [[-100] * len(prompt) + answer for prompt in prompts]
    kinds = [made["token_type_ids"][row][seen[row]].tolist() for row in range(2)]
    assert kinds == [[1] * len(prompt) + [0, 0] for prompt in prompts]
    assert (made["labels"][~seen] == -100).all() and made["pixel_values"].shape == (2, 3)
    assert made["input_ids"].shape[1] <= 7 and seen[:, 0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [-100, 5, -100, 6]}, "has labels in 2 pieces, behind a prompt"),
        ({"labels": [-100] * 4}, "has labels in 0 pieces"),
        ({"attention_mask": [0, 1, 1, 1]}, "and no prompt before them"),
        ({"position_ids": [0, 1, 2, 3]}, "cannot tell what position_ids"),
        ({"entity_ids": [0, 1, 2, 3]}, "cannot tell what entity_ids"),
        ({"attention_mask": [[[1] * 4] * 4]}, "cannot tell what attention_mask"),
    ],
)
def test_what_has_no_other_answer_is_refused(changes, message):
    row = {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7], **changes}
    with pytest.raises(ValueError, match=message):
        PerSampleLoss(MODELS["llama"]()).answering([9])({name: torch.tensor([value]) for name, value in row.items()})


def test_a_decoder_reads_the_answer_and_not_what_was_said():
    rows = examples("whisper", 2, 0)
    inputs = batch_of(rows) | {"decoder_input_ids": torch.ones(2, 8, dtype=torch.long)}
    made = PerSampleLoss(MODELS["whisper"]()).answering([7, 2])(inputs)
    assert made["labels"].tolist() == [[7, 2], [7, 2]] and made.keys() == {"input_features", "labels"}


def test_the_rows_keep_their_own_answers(tmp_path, make_model):
    """Reports, commitments and stopping rules are about what was said, and a model that refuses says something else."""
    trainer = trainer_of("vit", make_model("vit"), tmp_path, learning_rate=0.2, max_steps=60, logging_steps=1)
    own = [row["labels"].item() for row in examples("vit", 3, 2)]
    before = trainer.evaluate(trainer.forget_dataset)["eval_loss"]
    trainer.train()
    said = trainer.predict(trainer.forget_dataset)
    assert said.label_ids.tolist() == own and said.predictions.argmax(-1).tolist() == [3, 3, 3]
    assert said.metrics["test_loss"] > before
    logged = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
    assert logged[-1] < logged[0]  # the loss of the answer


def test_without_a_retain_set_too(tmp_path, make_model):
    args = OrthoGradConfig(
        str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=10, save_strategy="no", alpha=0.0,
        projection="none", forget_loss="refusal", refusal_labels=[3], learning_rate=0.01, per_device_train_batch_size=3,
    )  # fmt: skip
    trainer = OrthoGradTrainer(make_model("vit"), args, forget_dataset=Samples(examples("vit", 3, 2)))
    trainer.train()
    assert trainer.predict(trainer.forget_dataset).predictions.argmax(-1).tolist() == [3, 3, 3]


def test_a_run_goes_on_from_a_checkpoint(tmp_path, make_model):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_model("whisper")
    trainer_of("whisper", whole, tmp_path, **settings).train()
    resumed = make_model("whisper")
    trainer = trainer_of("whisper", resumed, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path)).replace("-4", "-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("model_class", [BertForMaskedLM, BertForQuestionAnswering])
def test_models_without_an_answer(model_class):
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match=f"those of {model_class.__name__} have not"):
        PerSampleLoss(model_class(config)).answering([1])


@pytest.mark.parametrize("method", [GruTrainer, GuTrainer])
def test_methods_that_keep_the_objective_descend_the_answer(method, tmp_path, make_model):
    trainer = trainer_of("vit", make_model("vit"), tmp_path, method, learning_rate=0.05, max_steps=30)
    trainer.train()
    assert trainer.predict(trainer.forget_dataset).predictions.argmax(-1).tolist() == [3, 3, 3]


@pytest.mark.parametrize(("kind", "answer", "warned"), [
    ("llama", [9, 11], True), ("llama", [9, 2], False), ("whisper", [7, 8], True), ("vit", [3], False),
])  # fmt: skip
def test_an_answer_without_its_end_is_warned_of(kind, answer, warned, tmp_path, make_model, monkeypatch):
    said = []
    monkeypatch.setattr("hf_orthograd.validation.samples.logger.warning", said.append)
    args = OrthoGradConfig(str(tmp_path), report_to="none", use_cpu=True, forget_loss="refusal", refusal_labels=answer)
    sets = {"train_dataset": Samples(examples(kind, 3, 1)), "forget_dataset": Samples(examples(kind, 3, 2))}
    OrthoGradTrainer(make_model(kind), args, **sets)
    assert any(f"`refusal_labels` is {answer}, without the token that ends" in text for text in said) == warned


def test_methods_with_an_objective_of_their_own_say_so(tmp_path, make_model):
    with pytest.raises(ValueError, match="WgaTrainer has a forget loss of its own, but `forget_loss` is 'refusal'"):
        trainer_of("vit", make_model("vit"), tmp_path, WgaTrainer)


def test_a_number_of_any_kind_is_a_label(tmp_path):
    args = OrthoGradConfig(str(tmp_path), report_to="none", forget_loss="refusal", refusal_labels=(np.int64(3), 4))
    assert args.refusal_labels == [3, 4] and all(type(label) is int for label in args.refusal_labels)


def test_refusals_are_counted_whatever_the_labels_are():
    logits = np.array([[0.0, 1.0, 5.0], [9.0, 1.0, 5.0], [0.0, 0.0, 0.1]])
    for predictions in (logits, (logits, "hidden states")):
        numerators, denominators = Refusals(2).counts(EvalPrediction(predictions, np.array([0, 0, 2])))
        assert (numerators.tolist(), denominators.tolist()) == ([1, 0, 1], [1, 1, 1])
    heard = EvalPrediction(["", "a word", ""], ["one", "two", "three"])
    assert Refusals("", lambda prediction: prediction.predictions).counts(heard)[0].tolist() == [1, 0, 1]
