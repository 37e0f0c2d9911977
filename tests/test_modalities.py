"""Models that read several things at once, or whose samples are hard to tell apart: followed exactly, or refused by name."""

import copy
import logging

import pytest
import torch
import transformers
from test_architectures import IMAGE, KV, TEXT, make_batch

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.objectives import FixedNegatives


EXPERTS = {**KV, "num_local_experts": 4, "num_experts_per_tok": 2}


class Rows(list):
    """A data set of dicts."""


def rows(make, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return Rows(make(generator, number) for number in range(count))


def unlearn(model, make, folder, **arguments):
    config = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4} | arguments.pop("config", {})
    args = OrthoGradConfig(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, **config
    )
    trainer = OrthoGradTrainer(
        model, args, train_dataset=rows(make, 4, 1), forget_dataset=rows(make, 4, 2), **arguments
    )
    trainer.train()
    return trainer


# ---- Images as patches of all samples in one row ----


@pytest.fixture
def qwen():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**KV, "rope_parameters": rope}, vision_config=vision, image_token_id=49, vision_start_token_id=48,
        vision_end_token_id=47, video_token_id=46,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def seen(generator, number, sides=(4, 4, 4, 4)):
    """An image of 16 or 64 patches, four of which are one token, and words on it."""
    side = sides[number % 4]
    tokens = torch.cat([torch.full((side * side // 4,), 49), torch.randint(3, 40, (6,), generator=generator)])
    return {
        "input_ids": tokens,
        "labels": tokens.masked_fill(tokens == 49, -100),
        "pixel_values": torch.randn(side * side, 24, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def unequal(generator, number):
    return seen(generator, number, sides=(4, 4, 8, 4))


def join_patches(examples):
    """As the processor of Qwen2-VL does."""
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([example["input_ids"] for example in examples], batch_first=True, padding_value=0)
    labels = pad([example["labels"] for example in examples], batch_first=True, padding_value=-100)
    joined = {name: torch.cat([example[name] for example in examples]) for name in ("pixel_values", "image_grid_thw")}
    mask = (tokens != 0).long()
    types = (tokens == 49).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types, **joined}


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_patches_of_equal_images_are_followed(qwen, tmp_path):
    start = {name: value.clone() for name, value in qwen.state_dict().items()}
    found = unlearn(qwen, seen, tmp_path, data_collator=join_patches)
    assert found.gradient_engine.name == "gram"
    after = parameters_of(qwen)
    qwen.load_state_dict(start)
    before = parameters_of(qwen)
    unlearn(qwen, seen, tmp_path, data_collator=join_patches, config={"gradient_engine": "loop"})
    assert (parameters_of(qwen) - after).norm() <= 1e-4 * (after - before).norm()


def test_patches_of_unequal_images_are_refused_by_name_unless_frozen(qwen, tmp_path):
    with pytest.raises(ValueError, match=r"\[(4, )*16(, 4)*\] image tokens: .* Freeze both"):
        unlearn(qwen, unequal, tmp_path, data_collator=join_patches)
    qwen.model.visual.requires_grad_(False)
    assert unlearn(qwen, unequal, tmp_path, data_collator=join_patches).gradient_engine.name == "gram"


# ---- Contrastive losses ----


def pair(generator, number):
    tokens = torch.randint(3, 40, (6,), generator=generator)
    return {"input_ids": tokens, "pixel_values": torch.randn(3, 16, 16, generator=generator)}


def kl(start_logits, logits):
    """KL(start || model), from its definition."""
    start, own = start_logits.softmax(-1), logits.softmax(-1)
    return (start * (start / own).log()).sum(-1)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    text = {**TEXT, "eos_token_id": 2, "max_position_embeddings": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16))


@pytest.fixture
def others(clip):
    with torch.no_grad():
        return clip(**torch.utils.data.default_collate(rows(pair, 6, seed=9)))


@pytest.fixture
def negatives(others):
    return FixedNegatives(others.image_embeds, others.text_embeds)


def test_pairs_against_fixed_ones_are_the_softmax_over_them(clip, others, negatives):
    batch = torch.utils.data.default_collate(rows(pair, 3, seed=4))
    outputs = clip(**batch)
    found = negatives(outputs)
    scale = clip.logit_scale.exp()
    for row in range(3):
        image, text = outputs.image_embeds[row], outputs.text_embeds[row]
        sides = [
            torch.cat([(image @ text)[None], others.text_embeds @ image]),
            torch.cat([(image @ text)[None], others.image_embeds @ text]),
        ]
        expected = sum(-(scale * side).log_softmax(0)[0] for side in sides) / 2
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    assert (negatives.divergences(outputs, outputs) == 0).all()
    with torch.no_grad():
        start = clip(**torch.utils.data.default_collate(rows(pair, 3, seed=5)))
    for row, divergence in enumerate(negatives.divergences(outputs, start)):
        expected = 0
        for side, other, bank in (("image", "text", others.text_embeds), ("text", "image", others.image_embeds)):
            own, begun = (
                torch.cat(
                    [
                        (one[f"{side}_embeds"][row] @ one[f"{other}_embeds"][row])[None],
                        bank @ one[f"{side}_embeds"][row],
                    ]
                )
                for one in (outputs, start)
            )
            expected += kl(scale * begun, scale * own) / 2
        torch.testing.assert_close(divergence, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="SigLIP adds a bias"):
        biased = {**outputs, "logits_per_image": outputs.logits_per_image - 10}
        FixedNegatives(others.image_embeds, others.text_embeds)(transformers.utils.ModelOutput(biased))


@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_contrastive_model_unlearns_against_fixed_pairs(clip, negatives, tmp_path, retain_loss):
    own = {"compute_loss_func": negatives, "compute_divergence_func": negatives.divergences}
    trainer = unlearn(clip, pair, tmp_path, **own, config={"retain_loss": retain_loss})
    assert trainer.gradient_engine.name == "gram"
    assert trainer.state.log_history[0]["projection_rank"] == 4


def test_contrastive_loss_of_a_batch_is_refused_and_the_way_out_named(clip, tmp_path):
    def in_batch(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits_per_image
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")

    with pytest.raises(ValueError, match="loss of CLIPModel is not known.*FixedNegatives"):
        unlearn(clip, pair, tmp_path)
    with pytest.raises(ValueError, match="depends on the others of its batch.*FixedNegatives"):
        unlearn(clip, pair, tmp_path, compute_loss_func=in_batch)
    with pytest.raises(ValueError, match=r"must both have shape \(n, d\)"):
        FixedNegatives(torch.zeros(2, 3), torch.zeros(2, 4))


# ---- Samples whose rows an engine cannot tell apart ----


def text(generator, number):
    tokens = torch.randint(3, 40, (8,), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def test_sorted_experts_are_told_and_the_way_out_named(tmp_path, caplog):
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS))
    with pytest.raises(ValueError, match="set_experts_implementation.'batched_mm'"):
        unlearn(model, text, tmp_path, config={"gradient_engine": "gram"})
    with caplog.at_level(logging.WARNING):
        assert unlearn(model, text, tmp_path).gradient_engine.name != "gram"
    assert "sort the tokens of all samples together" in caplog.text
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    assert unlearn(model, text, tmp_path).gradient_engine.name == "gram"


def test_state_space_model_with_a_state_in_place_is_followed(tmp_path):
    config = transformers.RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, context_length=16)
    assert unlearn(transformers.RwkvForCausalLM(config), text, tmp_path).gradient_engine.name == "gram"


def test_frames_among_the_samples_fall_back_loudly(tmp_path, caplog):
    """TimeSformer repeats a token over frames and samples in one dimension."""

    def clip(generator, number):
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": torch.tensor(number % 5)}

    config = transformers.TimesformerConfig(**IMAGE, num_frames=4)
    model = transformers.TimesformerForVideoClassification(config)
    with caplog.at_level(logging.WARNING):
        assert unlearn(model, clip, tmp_path).gradient_engine.name == "func"
    assert "Not using the gradient engine 'gram'" in caplog.text and "cls_token" in caplog.text


def answered(generator, number):
    tokens = torch.randint(3, 40, (6 + number % 3,), generator=generator)
    labels = tokens.masked_fill(torch.arange(len(tokens)) < 3, -100)  # of the prompt nothing is learned
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False])
def test_padding_on_either_side_makes_no_difference(side, tied, tmp_path):
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def pad(examples):
        sequences = {name: [example[name] for example in examples] for name in fill}
        pad_sequence = torch.nn.utils.rnn.pad_sequence
        return {
            name: pad_sequence(values, batch_first=True, padding_value=fill[name], padding_side=side)
            for name, values in sequences.items()
        }

    found = {}
    config = transformers.MistralConfig(**KV, sliding_window=4, tie_word_embeddings=tied)
    for way in ("padded", "alone"):
        torch.manual_seed(0)
        model = transformers.MistralForCausalLM(config)
        one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "per_device_forget_batch_size": 1}
        sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0.0}
        trainer = unlearn(model, answered, tmp_path, data_collator=pad, config=sgd | (one if way == "alone" else {}))
        assert trainer.gradient_engine.name == "gram"
        found[way] = parameters_of(model)
    torch.manual_seed(0)
    start = parameters_of(transformers.MistralForCausalLM(config))
    assert (found["padded"] - found["alone"]).norm() <= 1e-4 * (found["alone"] - start).norm()


def test_samples_joined_into_one_row_are_refused(tmp_path):
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**KV))
    with pytest.raises(ValueError, match="padding-free, leaves no batch of samples"):
        unlearn(model, answered, tmp_path, data_collator=transformers.DataCollatorWithFlattening())


# ---- Heads, through the trainer ----

HEADS = {
    "span": (transformers.DistilBertForQuestionAnswering, {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2}),
    "text number": (transformers.BertForSequenceClassification, {**TEXT, "num_labels": 1}),
    "text labels": (
        transformers.BertForSequenceClassification,
        {**TEXT, "num_labels": 5, "problem_type": "multi_label_classification"},
    ),
    "pixels": (
        transformers.SegformerForSemanticSegmentation,
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 24], "num_labels": 5,
         "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "drop_path_rate": 0.0},
    ),
}  # fmt: skip


def divergences_by_hand(kind, outputs, start, inputs):
    """From the model to where it started: one number for each sample."""
    if kind == "text number":
        return (outputs.logits - start.logits).square().mean(1)
    if kind == "text labels":
        pairs = [torch.stack([one.logits, torch.zeros_like(one.logits)], -1) for one in (start, outputs)]
        return kl(*pairs).mean(1)
    if kind == "span":
        return (kl(start.start_logits, outputs.start_logits) + kl(start.end_logits, outputs.end_logits)) / 2
    found = []
    for row, labels in enumerate(inputs["labels"]):
        logits = [
            torch.nn.functional.interpolate(one.logits[row : row + 1], size=labels.shape, mode="bilinear")[0].permute(
                1, 2, 0
            )
            for one in (start, outputs)
        ]
        found.append(kl(*logits)[labels != 255].mean())
    return torch.stack(found)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_unlearn_and_hold_their_predictions(kind, tmp_path):
    model_class, settings = HEADS[kind]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def take(generator, number):
        seed = int(torch.randint(1 << 30, (), generator=generator))
        return {name: value[0] for name, value in make_batch(kind, 1, seed).items()}

    config = {"retain_loss": "kl", "freeze_batch_norm": True, "max_steps": 1}
    trainer = unlearn(model, take, tmp_path, config=config)
    logged = trainer.state.log_history[0]
    assert logged["retain_divergence"] == pytest.approx(0, abs=1e-6)  # at the start nothing has moved
    inputs = torch.utils.data.default_collate(rows(take, 3, seed=3))
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs)
        assert (trainer.per_sample_loss.divergences(outputs, outputs, inputs).abs() <= 1e-6).all()
        moved = copy.deepcopy(model)
        for parameter in moved.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        found = trainer.per_sample_loss.divergences(moved(**inputs), outputs, inputs)
        torch.testing.assert_close(
            found, divergences_by_hand(kind, moved(**inputs), outputs, inputs), rtol=1e-3, atol=1e-5
        )
        own = [model(**{name: value[row : row + 1] for name, value in inputs.items()}).loss for row in range(3)]
        losses = trainer.per_sample_loss(model, inputs)
    torch.testing.assert_close(losses, torch.stack(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({"num_labels": 5}, torch.tensor(0.5), r"this model has 5 outputs .*For one class a row give whole numbers"),
        ({"num_labels": 5}, torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0]), "has the label 2.0, but .* numbers from 0 to 1"),
        (
            {"num_labels": 1},
            torch.tensor(float("nan")),
            "has the label nan, but problem_type='regression' takes finite",
        ),
    ],
)
def test_labels_that_fit_no_head_are_named(settings, labels, message, tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **settings))

    def take(generator, number):
        return {"input_ids": torch.randint(3, 40, (8,), generator=generator), "labels": labels}

    with pytest.raises(ValueError, match=message):
        unlearn(model, take, tmp_path)


def test_a_question_whose_answer_was_cut_off_is_let_through(tmp_path):
    """Positions outside of the text count for nothing, also in the row that is looked at first."""
    model = transformers.DistilBertForQuestionAnswering(transformers.DistilBertConfig(**HEADS["span"][1]))

    def take(generator, number):
        places = {name: torch.tensor(number if number else 8) for name in ("start_positions", "end_positions")}
        return {"input_ids": torch.randint(3, 40, (8,), generator=generator), **places}

    unlearn(model, take, tmp_path)


def test_missing_positions_are_named(tmp_path):
    model = transformers.DistilBertForQuestionAnswering(transformers.DistilBertConfig(**HEADS["span"][1]))

    def take(generator, number):
        return {"input_ids": torch.randint(3, 40, (8,), generator=generator), "start_positions": torch.tensor(1)}

    with pytest.raises(ValueError, match="have no 'end_positions'"):
        unlearn(model, take, tmp_path)
