"""Inner products on tiny configurations of real architectures, taken from transformers by class name."""

import pytest
import torch
import transformers
from engines import forget_batch, retain_batch

from hf_orthograd.gradients import GramEngine, LoopEngine
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters
from hf_orthograd.projection import solve_projections, update_weights


TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "image_size": 16, "patch_size": 4, "num_labels": 5}  # fmt: skip
CTC = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
       "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
       "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
       "layerdrop": 0.0, "pad_token_id": 0}  # fmt: skip
SPEECH = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


ENCODER_DECODER = {**SPEECH, "max_position_embeddings": 16}
KV = {**TEXT, "num_key_value_heads": 1}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {**KV, "num_experts_per_tok": 2}


def vision_config(**settings):
    return {"vision_config": {**IMAGE, **settings}, "num_labels": 5}


# class of the model, its configuration, what it reads
ARCHITECTURES = {
    "WhisperForConditionalGeneration": (
        {**SPEECH, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16}, "features"),
    "MoonshineForConditionalGeneration": (
        {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "encoder_num_hidden_layers": 2,
         "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2,
         "pad_token_id": 0, "decoder_start_token_id": 1}, "long audio"),
    "Speech2TextForConditionalGeneration": (
        {**SPEECH, "input_feat_per_channel": 16, "conv_channels": 24, "max_source_positions": 40,
         "max_target_positions": 16}, "frames"),
    "Wav2Vec2ForCTC": (CTC, "audio"),
    "HubertForCTC": ({**CTC, "feat_extract_norm": "layer", "do_stable_layer_norm": True}, "audio"),
    "WavLMForCTC": (CTC, "audio"),
    "ViTForImageClassification": (IMAGE, "image"),
    "DeiTForImageClassification": (IMAGE, "image"),
    "Dinov2ForImageClassification": ({**IMAGE, "mlp_ratio": 2}, "image"),
    "SwinForImageClassification": (
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2,
         "num_labels": 5}, "image"),
    "ConvNextForImageClassification": (
        {"image_size": 16, "patch_size": 2, "hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2,
         "num_labels": 5}, "image"),
    "CLIPForImageClassification": (vision_config(), "image"),
    "SiglipForImageClassification": (vision_config(), "image"),
    "VideoMAEForVideoClassification": ({**IMAGE, "num_frames": 4, "tubelet_size": 2}, "video"),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
        "image"),
    "LlamaForCausalLM": ({**TEXT, "num_key_value_heads": 1}, "text"),
    "Qwen3ForCausalLM": ({**TEXT, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}, "text"),
    "GPT2LMHeadModel": ({"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}, "text"),
    "BertForSequenceClassification": ({**TEXT, "num_labels": 5}, "text class"),
    "BertForMaskedLM": (TEXT, "text"),
    "T5ForConditionalGeneration": (
        {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2,
         "decoder_start_token_id": 0}, "text"),
    "MistralForCausalLM": ({**KV, "sliding_window": 4}, "text"),
    "Gemma2ForCausalLM": ({**KV, "head_dim": 16, "sliding_window": 4}, "text"),
    "Gemma3ForCausalLM": ({**KV, "head_dim": 16, "sliding_window": 4}, "text"),
    "Phi3ForCausalLM": ({**KV, **ENDS}, "text"),
    "Qwen2ForCausalLM": (KV, "text"),
    "OPTForCausalLM": (
        {"vocab_size": 50, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "ffn_dim": 48, "max_position_embeddings": 16, **ENDS}, "text"),
    "GPTNeoXForCausalLM": (TEXT, "text"),
    "BloomForCausalLM": ({"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 2}, "text"),
    "Olmo2ForCausalLM": (KV, "text"),
    "SmolLM3ForCausalLM": ({**KV, **ENDS}, "text"),
    "MixtralForCausalLM": ({**EXPERTS, "num_local_experts": 4}, "text"),
    "Qwen3MoeForCausalLM": ({**EXPERTS, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24}, "text"),
    "OlmoeForCausalLM": ({**EXPERTS, **ENDS, "num_experts": 4}, "text"),
    "MambaForCausalLM": ({"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "text"),
    "Mamba2ForCausalLM": (
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 16,
         "n_groups": 1, "chunk_size": 4}, "text"),
    "RobertaForTokenClassification": ({**TEXT, "num_labels": 50}, "text"),
    "DebertaV2ForSequenceClassification": ({**TEXT, "num_labels": 5}, "text class"),
    "ElectraForSequenceClassification": ({**TEXT, "embedding_size": 16, "num_labels": 1}, "text number"),
    "RobertaForSequenceClassification": (
        {**TEXT, "num_labels": 5, "problem_type": "multi_label_classification"}, "text labels"),
    "DistilBertForQuestionAnswering": (
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}, "span"),
    "AlbertForMaskedLM": ({**TEXT, "embedding_size": 16}, "text"),
    "BartForConditionalGeneration": (ENCODER_DECODER, "text"),
    "ASTForAudioClassification": (
        {**IMAGE, "frequency_stride": 4, "time_stride": 4, "max_length": 40, "num_mel_bins": 16}, "spectrum"),
    "Wav2Vec2ForSequenceClassification": ({**CTC, "num_labels": 5, "classifier_proj_size": 16}, "audio class"),
    "VivitForVideoClassification": ({**IMAGE, "num_frames": 4, "tubelet_size": [2, 4, 4]}, "video"),
    "BeitForImageClassification": (IMAGE, "image"),
    "SegformerForSemanticSegmentation": (
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 24], "patch_sizes": [3, 3],
         "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
         "num_labels": 5}, "pixels"),
    "BlipForConditionalGeneration": (
        {"text_config": {**TEXT, **ENDS, "encoder_hidden_size": 32, "max_position_embeddings": 16},
         "vision_config": IMAGE, "projection_dim": 16}, "captions"),
    "GitForCausalLM": ({**TEXT, **ENDS, "vision_config": IMAGE}, "captions"),
    "LlavaForConditionalGeneration": (
        {"text_config": {**KV, "model_type": "llama"}, "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
         "image_token_index": 49, "vision_feature_layer": -1}, "image tokens"),
}  # fmt: skip


def make_batch(kind, count, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 20, (count, 9), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(count):  # samples of unequal lengths
        mask[row, 9 - row % 4 :] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    classes = torch.randint(0, 5, (count,), generator=generator)

    def noise(*shape):
        return torch.randn(count, *shape, generator=generator)

    return {
        "features": lambda: {"input_features": noise(16, 40), "labels": labels},
        "frames": lambda: {"input_features": noise(40, 16), "labels": labels},
        "audio": lambda: {"input_values": noise(400), "labels": labels[:, :5]},
        "long audio": lambda: {"input_values": noise(4000), "labels": labels},
        "image": lambda: {"pixel_values": noise(3, 16, 16), "labels": classes},
        "video": lambda: {"pixel_values": noise(4, 3, 16, 16), "labels": classes},
        "text": lambda: {"input_ids": tokens, "attention_mask": mask, "labels": labels},
        "text class": lambda: {"input_ids": tokens, "attention_mask": mask, "labels": classes},
        "text number": lambda: {"input_ids": tokens, "attention_mask": mask, "labels": classes.float()},
        "text labels": lambda: {"input_ids": tokens, "attention_mask": mask, "labels": (noise(5) > 0).float()},
        "span": lambda: {
            "input_ids": tokens,
            "attention_mask": mask,
            "start_positions": classes // 2,
            "end_positions": torch.where(torch.arange(count) == 1, 99, classes),  # one was cut off and does not count
        },
        "spectrum": lambda: {"input_values": noise(40, 16), "labels": classes},
        "audio class": lambda: {"input_values": noise(400), "labels": classes},
        "pixels": lambda: {
            "pixel_values": noise(3, 16, 16),
            "labels": torch.randint(0, 5, (count, 16, 16), generator=generator).masked_fill(noise(16, 16) > 1, 255),
        },
        "captions": lambda: {
            "pixel_values": noise(3, 16, 16),
            "input_ids": tokens,
            "attention_mask": mask,
            "labels": labels,
        },
        "image tokens": lambda: {
            "pixel_values": noise(3, 16, 16),
            "input_ids": torch.cat([torch.full((count, 16), 49), tokens], dim=1),
            "attention_mask": torch.cat([torch.ones(count, 16, dtype=torch.long), mask], dim=1),
            "labels": torch.cat([torch.full((count, 16), -100), labels], dim=1),
        },
    }[kind]()


def make_model(name, attention):
    settings, kind = ARCHITECTURES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**settings)
    model = model_class._from_config(config, attn_implementation=attention)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("batched_mm")  # keeps the tokens of each sample together
    with torch.no_grad():  # initial zeros (tokens, biases, layer scale) would hide what depends on them
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), kind


def gradient_of(loss, model):
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    parameters = (p for p in model.parameters() if p.requires_grad)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
    )


def step_direction(measured, model):
    """The gradient that a step hands over with alpha = 0, by the engine's own final pass, in float64."""
    projection = solve_projections(measured.grams, solver="exact", num_iterations=None, rtol=None)
    names = measured.parameters.projected
    loss = measured.combine(update_weights(0.0, projection, names, device=model.device, has_term=False))
    return gradient_of(loss, model).double()


def make_model_or_skip(name, attention):
    try:
        return make_model(name, attention)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(f"transformers has no {attention} attention for {name}")


@pytest.fixture(autouse=True)
def convolutions_in_float32(monkeypatch):
    """torch's default for a GPU is TF32, which is further from float64 than what is asserted."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_gram_and_step_are_those_of_the_float64_loop(device, name, attention):
    """Inner products, the loss of a sample by itself, and a step that no retain sample feels."""
    model, kind = make_model_or_skip(name, attention)
    model.to(device)
    batches = make_batch(kind, 3, seed=1), make_batch(kind, 4, seed=2)
    forget, retain = ({key: value.to(device) for key, value in batch.items()} for batch in batches)
    parameters = Parameters({name: p for name, p in model.named_parameters() if p.requires_grad}, {})
    losses = PerSampleLoss(model)
    alone = {key: value[:1] for key, value in retain.items()}
    torch.testing.assert_close(losses(model, retain)[:1], model(**alone).loss[None], rtol=1e-5, atol=1e-5)
    measured = GramEngine(parameters, losses).measure(model, [forget_batch(forget)], [retain_batch(retain)])
    found = measured.gram
    direction = step_direction(measured, model)

    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # its grouped products take no float64
    model.double()
    forget, retain = ({k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in (forget, retain))
    loop = LoopEngine(parameters, losses).measure(model, [forget_batch(forget)], [retain_batch(retain)])
    norms = loop.gram.diagonal().sqrt()
    assert ((found - loop.gram).abs() / torch.outer(norms, norms)).max() <= 1e-5
    for row in range(4):
        gradient = gradient_of(losses(model, retain)[row], model)
        cosine = (direction @ gradient) / (direction.norm() * gradient.norm())
        assert cosine.abs() <= 1e-4
