"""Another answer in place of what is forgotten: what samples are made to say, and the step that teaches it."""

import pytest
import torch
from conftest import MODELS, Samples, make_example
from equations import batch_of
from transformers import BertConfig, BertForMaskedLM
from transformers.trainer_utils import get_last_checkpoint

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, project_orthogonal
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


def trainer_of(kind, model, folder, **settings):
    fixed = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 1, "save_strategy": "no"}
    batches = {"per_device_train_batch_size": 4, "per_device_forget_batch_size": 3}
    descent = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    refusal = {"forget_loss": "refusal", "refusal_labels": ANSWERS[kind], "alpha": ALPHA}
    args = OrthoGradConfig(str(folder), **(fixed | batches | descent | refusal | settings))
    sets = {"train_dataset": Samples(examples(kind, 4, 1)), "forget_dataset": Samples(examples(kind, 3, 2))}
    return OrthoGradTrainer(model, args, **sets)


@pytest.mark.parametrize("projection", ["orthogonal", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_descends_the_loss_of_the_answer_off_the_retain_gradients(kind, projection, make_model, tmp_path):
    model = make_model(kind).train()
    of_answers = gradients(model, [refused(kind, row) for row in examples(kind, 3, 2)]).mean(0)
    of_retain = gradients(model, examples(kind, 4, 1))
    kept = project_orthogonal(of_answers, of_retain) if projection == "orthogonal" else of_answers
    expected = -RATE * (ALPHA * of_retain.mean(0) + (1 - ALPHA) * kept)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = flat(trained)
    trainer_of(kind, model, tmp_path, projection=projection).train()
    assert (flat(trained) - before - expected).norm() <= 1e-5 * expected.norm()


def test_an_answer_comes_after_the_prompt_however_it_is_padded():
    ids = torch.tensor([[5, 6, 50, 51, 0, 0], [0, 0, 7, 8, 52, 53]])
    mask = (ids > 0).long()
    labels = torch.where(ids >= 50, ids, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.ones(2, 3)}
    made = PerSampleLoss(MODELS["llama"]()).answering([9, 2])(inputs)
    kept = [made["input_ids"][row][made["attention_mask"][row] == 1].tolist() for row in range(2)]
    assert kept == [[5, 6, 9, 2], [7, 8, 9, 2]]
    assert made["labels"].tolist() == [[-100, -100, 9, 2, -100, -100, -100, -100], [-100] * 4 + [9, 2, -100, -100]]
    assert made["pixel_values"] is inputs["pixel_values"]


def test_a_decoder_reads_the_answer_and_not_what_was_said():
    rows = examples("whisper", 2, 0)
    inputs = batch_of(rows) | {"decoder_input_ids": torch.ones(2, 8, dtype=torch.long)}
    made = PerSampleLoss(MODELS["whisper"]()).answering([7, 2])(inputs)
    assert made["labels"].tolist() == [[7, 2], [7, 2]] and made.keys() == {"input_features", "labels"}


def test_the_rows_keep_their_own_answers(tmp_path, make_model):
    """Reports, commitments and stopping rules are about what was said, and a model that refuses says something else."""
    trainer = trainer_of("vit", make_model("vit"), tmp_path, learning_rate=1.0, max_steps=20, logging_steps=1)
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


def test_tokens_that_are_read_where_they_are_labelled_have_no_other_answer():
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    labels = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="those of a model with BertConfig have not"):
        PerSampleLoss(BertForMaskedLM(config)).answering([1])({"input_ids": labels, "labels": labels})
