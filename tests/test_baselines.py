"""Each method against its paper's defining equation, written out with other means: softmax and sums in place of losses."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from equations import RATE, batch_of, flat, gradient, mean_kl, mean_surprise, other
from peft import LoraConfig, get_peft_model
from torch.utils.data import default_collate

from hf_orthograd import OrthoGradConfig, project_orthogonal
from hf_orthograd.baselines import (
    BASELINES,
    BadTeacherTrainer,
    RandomLabelTrainer,
    ScrubTrainer,
    WgaTrainer,
    dampen_synapses,
    saliency_masks,
)
from hf_orthograd.data import Batch
from hf_orthograd.objectives import PerSampleLoss, kl_divergence


def test_scrub_alternates_and_follows_its_equation(vit_trainer, make_model):
    trainer = vit_trainer(ScrubTrainer, max_steps=4, options={"retain_weight": 0.3, "gamma": 0.7, "forget_share": 0.5})
    trainer.teacher = teacher = other(make_model)
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)
    expected = copy.deepcopy(trainer.model)
    for step in range(4):
        if step == 0:  # the paper maximises the divergence on the forget set
            update = -gradient(expected, lambda model: mean_kl(model, teacher, forget))
        else:  # step 2 lies past half of the steps
            update = gradient(
                expected,
                lambda model: 0.3 * mean_kl(model, teacher, retain) + 0.7 * mean_surprise(model, retain),
            )
        torch.nn.utils.vector_to_parameters(flat(expected) - RATE * update, expected.parameters())
    start = flat(trainer.model)
    trainer.train()
    torch.testing.assert_close(flat(trainer.model), flat(expected), rtol=0, atol=1e-5)
    assert (flat(expected) - start).norm() > 1e-2
    logged = [set(entry) & {"forget_loss", "retain_loss"} for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [{"forget_loss"}, {"retain_loss"}, {"retain_loss"}, {"retain_loss"}]


def test_scrub_warns_of_a_rule_that_may_end_it_early(vit_trainer, caplog):
    evaluated = batch_of(vit_trainer().forget_dataset)
    rule = {"eval_strategy": "steps", "eval_steps": 1, "forget_target": 2.0}
    vit_trainer(ScrubTrainer, options={"eval_dataset": {"forget": Dataset.from_dict(evaluated)}}, **rule)
    assert "`forget_target` may end the run before them" in caplog.text


def test_scrub_starts_from_its_teacher(vit_trainer):
    trainer = vit_trainer(ScrubTrainer)
    assert torch.equal(flat(trainer.teacher), flat(trainer.model))
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())


def test_bad_teacher(vit_trainer, make_model):
    incompetent = other(make_model)
    trainer = vit_trainer(BadTeacherTrainer, options={"incompetent": incompetent})
    trainer.teacher = competent = other(make_model).requires_grad_(False)
    with torch.no_grad():
        competent.classifier.bias.add_(torch.arange(5.0))
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)

    def loss(model):  # the mean over all eight samples
        return (mean_kl(model, competent, retain) + mean_kl(model, incompetent, forget)) / 2

    expected = flat(trainer.model) - RATE * gradient(copy.deepcopy(trainer.model), loss)
    trainer.train()
    torch.testing.assert_close(flat(trainer.model), expected, rtol=0, atol=1e-5)


def test_bad_teacher_draws_an_incompetent_model(vit_trainer):
    trainer = vit_trainer(BadTeacherTrainer)
    assert type(trainer.incompetent) is type(trainer.model)
    assert not torch.allclose(flat(trainer.incompetent), flat(trainer.model))


def wrong_labels(trainer):
    labels = batch_of(trainer.forget_dataset)["labels"]
    return trainer._wrong(labels, range(len(labels)))


def test_random_labels(vit_trainer):
    trainer = vit_trainer(RandomLabelTrainer)
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)
    wrong = wrong_labels(trainer)
    assert (wrong != forget["labels"]).all() and ((0 <= wrong) & (wrong < 5)).all()
    assert torch.equal(wrong, wrong_labels(trainer))

    def loss(model):
        return mean_surprise(model, forget | {"labels": wrong}) + mean_surprise(model, retain)

    expected = flat(trainer.model) - RATE * gradient(copy.deepcopy(trainer.model), loss)
    trainer.train()
    torch.testing.assert_close(flat(trainer.model), expected, rtol=0, atol=1e-5)


def test_random_labels_of_tokens_leave_padding_alone(vit_trainer):
    trainer = vit_trainer(RandomLabelTrainer)
    trainer._count = 11
    labels = torch.tensor([3, 4, 5, -100])
    drawn = trainer._wrong(labels[None], [0])[0]
    assert drawn[3] == -100 and (drawn[:3] != labels[:3]).all() and (drawn[:3] >= 0).all() and (drawn[:3] < 11).all()


def test_random_labels_of_ctc_leave_the_blank_out(make_model, make_samples, tmp_path):
    trainer = _random_labels("wav2vec2", make_model, make_samples, tmp_path)
    trainer.train()  # looks classes up
    blank, vocabulary = trainer.model.config.pad_token_id, trainer.model.config.vocab_size
    labels = torch.tensor([label for label in range(vocabulary) if label != blank] + [-100])
    drawn = torch.stack([trainer._wrong(labels[None], [row])[0] for row in range(200)])
    assert (drawn[:, -1] == -100).all() and (drawn[:, :-1] != labels[:-1]).all() and (drawn != blank).all()
    assert set(drawn[:, :-1].flatten().tolist()) == set(labels[:-1].tolist())


def test_a_decoder_reads_the_right_tokens_before_a_wrong_label(make_model, make_samples, tmp_path, monkeypatch):
    trainer = _random_labels("whisper", make_model, make_samples, tmp_path)
    model, batch, read = trainer.model, batch_of(trainer.forget_dataset), []
    expected = model(**batch).logits
    monkeypatch.setattr(
        type(trainer.per_sample_loss), "__call__", lambda self, model, inputs: read.append(inputs) or torch.ones(1)
    )
    trainer._count = model.config.vocab_size
    trainer.forget_loss(model, Batch(batch, 4, rows=torch.arange(4)))
    assert (read[0]["labels"] != batch["labels"]).any()
    torch.testing.assert_close(model(**{**read[0], "labels": None}).logits, expected)


def _random_labels(kind, make_model, make_samples, folder):
    args = OrthoGradConfig(
        str(folder), max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, projection="none"
    )
    sets = {"train_dataset": make_samples(kind, 4, seed=1), "forget_dataset": make_samples(kind, 4, seed=2)}
    return RandomLabelTrainer(make_model(kind), args, **sets)


def test_random_labels_are_of_classes_alone(vit_trainer, make_model):
    """Of several labels, or a number, there is no other class."""
    trainer = vit_trainer(RandomLabelTrainer)
    trainer.model.config.problem_type = "multi_label_classification"
    trainer.forget_dataset.examples = [
        {**example, "labels": torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])} for example in trainer.forget_dataset.examples
    ]
    trainer.train_dataset.examples = [
        {**example, "labels": torch.zeros(5)} for example in trainer.train_dataset.examples
    ]
    with pytest.raises(
        ValueError, match="another class for each label, but those of ViT.* 'multi_label_classification'"
    ):
        trainer.train()


def test_random_labels_leave_pixels_alone_that_do_not_count(vit_trainer, monkeypatch):
    trainer = vit_trainer(RandomLabelTrainer)
    trainer._count = 3
    monkeypatch.setattr(type(trainer.per_sample_loss), "ignored_label", 255)  # as a segmenter's
    drawn = trainer._wrong(torch.tensor([[255, 0, 1, 255]]), [0])[0]
    assert drawn[[0, 3]].tolist() == [255, 255] and drawn[1] in (1, 2) and drawn[2] in (0, 2)


def test_salun_trains_the_salient_half(vit_trainer):
    trainer = vit_trainer(RandomLabelTrainer, options={"saliency": 0.5})
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)
    start, model = flat(trainer.model), copy.deepcopy(trainer.model).eval()
    saliency = gradient(model, lambda model: mean_surprise(model, forget)).abs()
    salient = saliency > saliency.median()  # the paper's threshold

    def loss(model):
        return mean_surprise(model, forget | {"labels": wrong_labels(trainer)}) + mean_surprise(model, retain)

    expected = start - RATE * salient * gradient(model, loss)
    trainer.train()
    after = flat(trainer.model)
    # a handful of entries as large as the median may fall on either side
    assert ((after - expected).abs() > 1e-5).float().mean() < 1e-3
    assert 0.49 < (after != start).float().mean() <= 0.5001
    with pytest.raises(ValueError, match="`saliency` must lie in"):
        vit_trainer(RandomLabelTrainer, options={"saliency": 1.5})


def test_weights_without_a_gradient_are_never_salient():
    """As the embeddings of tokens that do not come, which may be most weights of a language model."""
    (mask,) = saliency_masks([torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 2.0, -1.0])], 0.5)
    assert mask.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_salun_says_how_many_weights_are_left(make_samples, make_model, tmp_path, caplog):
    args = OrthoGradConfig(
        str(tmp_path), max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, projection="none"
    )
    sets = {"train_dataset": make_samples("vit", 4, seed=1), "forget_dataset": make_samples("vit", 4, seed=2)}
    adapter = get_peft_model(make_model("vit"), LoraConfig(r=4, target_modules=["q_proj", "query"]))
    RandomLabelTrainer(adapter, args, saliency=0.9, **sets).train()
    assert "`saliency` is 0.9, but" in caplog.text and "of the weights have a gradient at all" in caplog.text


def test_saliency_masks_rank_across_tensors():
    masks = saliency_masks([torch.tensor([1.0, -5.0]), torch.tensor([[3.0], [-0.1]])], 0.5)
    assert [mask.flatten().tolist() for mask in masks] == [[0.0, 1.0], [1.0, 0.0]]


def test_synaptic_dampening(make_model, make_samples, loop_gradients):
    model, forget, retain = make_model("vit").eval(), make_samples("vit", 3, seed=2), make_samples("vit", 5, seed=1)
    everything = [*(forget[index] for index in range(3)), *(retain[index] for index in range(5))]
    on_forget = loop_gradients(model, [forget[index] for index in range(3)]).square().mean(0)
    on_all = loop_gradients(model, everything).square().mean(0)
    start = flat(model)
    dampened = on_forget > 1.5 * on_all
    expected = torch.where(dampened, start * torch.clamp(0.8 * on_all / on_forget, max=1.0), start)
    batches = [default_collate(everything[:3])], [default_collate(everything[:4]), default_collate(everything[4:])]
    with pytest.raises(ValueError, match="holds no batch"):
        dampen_synapses(model, batches[0], iter(()))
    share = dampen_synapses(model, *batches, selection=1.5, dampening=0.8)
    torch.testing.assert_close(flat(model), expected, rtol=1e-4, atol=1e-6)
    # importances that are zero but for rounding may fall on either side
    assert share == pytest.approx(dampened.float().mean().item(), abs=2e-3) and 0.01 < share < 0.9


def test_divergence_of_tokens_counts_labelled_positions():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    p, q = target.softmax(-1), logits.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    labels = torch.tensor([[1, 2, -100], [-100, 4, 0]])
    expected = torch.stack([each[0, :2].mean(), each[1, 1:].mean()])
    torch.testing.assert_close(kl_divergence(logits, target, labels != -100), expected)


def test_teachers_count_positions_as_losses_do(make_model, make_samples):
    """A language model's position t predicts label t + 1; the frames of CTC end with the sample."""
    for kind in ("llama", "wav2vec2"):
        model, teacher, batch = make_model(kind), make_model(kind), batch_of(make_samples(kind, 3))
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            now, before = model(**batch), teacher(**batch)
        p, q = before.logits.softmax(-1), now.logits.softmax(-1)
        each = (p * (p / q).log()).sum(-1)
        if kind == "llama":
            rows = [each[i, :-1][batch["labels"][i, 1:] != -100].mean() for i in range(3)]
        else:
            frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
            rows = [each[i, : frames[i]].mean() for i in range(3)]
        torch.testing.assert_close(PerSampleLoss(model).divergences(now, before, batch), torch.stack(rows))


def test_every_method_takes_the_divergence_as_its_retain_loss(vit_trainer, make_model):
    """NPO-KL, GradDiff-KL, and a subclass: after the first step retain samples pull back to where they were."""
    for trainer in (
        vit_trainer(**BASELINES["graddiff"], retain_loss="kl", max_steps=2),
        vit_trainer(WgaTrainer, options={"beta": 0.0}, retain_loss="kl", max_steps=2),
    ):
        forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)
        start, expected = copy.deepcopy(trainer.model), copy.deepcopy(trainer.model)
        for _ in range(2):

            def loss(model, start=start, forget=forget, retain=retain):
                return -0.5 * mean_surprise(model, forget) + 0.5 * mean_kl(model, start, retain)

            update = gradient(expected, loss)
            torch.nn.utils.vector_to_parameters(flat(expected) - RATE * update, expected.parameters())
        trainer.train()
        torch.testing.assert_close(flat(trainer.model), flat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_combinations_train(name, vit_trainer):
    """The first step is `alpha * mean_i g_i - (1 - alpha) * g`, with what the projection leaves of g; in NPO slopes are 1 then."""
    settings = BASELINES[name]
    trainer = vit_trainer(**settings)
    model, start, alpha = copy.deepcopy(trainer.model), flat(trainer.model), settings["alpha"]

    def rows(samples):
        names = [n for n, _ in model.named_parameters()]
        each = [dict(zip(names, gradients_of(model, [sample]), strict=True)) for sample in samples]
        return {n: torch.stack([own[n].flatten() for own in each]).double() for n in names}

    forget, retain = rows(trainer.forget_dataset), rows(trainer.train_dataset)
    together = settings.get("projection_scope") != "per_tensor"
    groups = [list(forget)] if together else [[name] for name in forget]
    expected = {}
    for group in groups:
        ascended, kept = (torch.cat([own[n] for n in group], dim=1) for own in (forget, retain))
        ascended = ascended.mean(0)
        if settings["forget_loss"] == "simnpo":  # slope 2 sigmoid(-beta loss), sample by sample
            slopes = 2 * torch.sigmoid(-losses_of(model, trainer.forget_dataset)).double()
            ascended = (slopes[:, None] * torch.cat([forget[n] for n in group], dim=1)).mean(0)
        basis = {"orthogonal": kept, "mean": kept.mean(0, keepdim=True), "none": kept[:0]}[settings["projection"]]
        ascended = project_orthogonal(ascended, basis, rtol=1e-9 if together else 1e-6)
        update = alpha * kept.mean(0) - (1 - alpha) * ascended
        expected |= dict(zip(group, update.split([forget[n].shape[1] for n in group]), strict=True))
    trainer.train()
    step = (flat(trainer.model) - start).double() / -RATE
    expected = torch.cat([expected[n] for n, _ in model.named_parameters()])
    # per tensor some directions are too weak for float32
    assert (step - expected).norm() <= (5e-2 if not together else 1e-3) * expected.norm()
    assert expected.norm() > 1e-3


def losses_of(model, samples):
    with torch.no_grad():
        return torch.stack([model(**{key: value[None] for key, value in sample.items()}).loss for sample in samples])


def gradients_of(model, samples):
    model.zero_grad()
    for sample in samples:
        model(**{key: value[None] for key, value in sample.items()}).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_finetuning_ignores_the_forget_set(vit_trainer):
    trainer = vit_trainer(**BASELINES["finetune"])
    retain = batch_of(trainer.train_dataset)
    expected = flat(trainer.model) - RATE * gradient(
        copy.deepcopy(trainer.model), lambda model: mean_surprise(model, retain)
    )
    trainer.train()
    torch.testing.assert_close(flat(trainer.model), expected, rtol=0, atol=1e-5)


def test_baseline_takes_the_default_configuration(vit_trainer):
    """It has no projection: `projection` and `forget_loss` are not used, and the user's arguments stay as they are."""
    trainer = vit_trainer(ScrubTrainer, projection="orthogonal", forget_loss="npo")
    assert (trainer.args.projection, trainer.args.forget_loss) == ("none", "ascent")
    trainer.train()
    assert trainer.gradient_engine.name == "none" and trainer.state.global_step == trainer.state.max_steps


def test_baseline_with_a_corrected_update_is_refused(vit_trainer):
    with pytest.raises(ValueError, match="ScrubTrainer has no projection, but `projection_target` is 'update'"):
        vit_trainer(ScrubTrainer, projection="orthogonal", projection_target="update")


def test_loss_that_is_not_finite_stops_a_baseline(vit_trainer):
    trainer = vit_trainer(ScrubTrainer)
    with torch.no_grad():
        trainer.teacher.classifier.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="At step 1 `forget_loss` is not finite"):
        trainer.train()


def test_the_guide_names_all_combinations():
    written = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    assert [name for name in BASELINES if f'"{name}"' not in written] == []
