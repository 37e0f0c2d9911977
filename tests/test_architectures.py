"""Inner products on tiny configurations of real architectures, taken from transformers by class name."""

import pytest
import torch
import transformers
from engines import forget_batch, retain_batch

from hf_orthograd.gradients import GramEngine, LoopEngine
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters


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
    }[kind]()


def make_model(name, attention):
    settings, kind = ARCHITECTURES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**settings)
    model = model_class._from_config(config, attn_implementation=attention)
    with torch.no_grad():  # initial zeros (tokens, biases, layer scale) would hide what depends on them
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), kind


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gram_is_that_of_the_float64_loop(name, attention):
    try:
        model, kind = make_model(name, attention)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(f"transformers has no {attention} attention for {name}")
    forget, retain = make_batch(kind, 3, seed=1), make_batch(kind, 4, seed=2)
    parameters = Parameters({name: p for name, p in model.named_parameters() if p.requires_grad}, {})
    losses = PerSampleLoss(model)
    found = GramEngine(parameters, losses).measure(model, [forget_batch(forget)], [retain_batch(retain)]).gram

    model.double()
    forget, retain = ({k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in (forget, retain))
    expected = LoopEngine(parameters, losses).measure(model, [forget_batch(forget)], [retain_batch(retain)]).gram
    norms = expected.diagonal().sqrt()
    assert ((found - expected).abs() / torch.outer(norms, norms)).max() <= 1e-5
