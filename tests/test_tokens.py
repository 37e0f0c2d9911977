"""Rows that a language model has no embedding or no position for are named before the first step."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.validation import check_tokens


SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 20,
}
TEN = {"max_position_embeddings": 10}
MODELS = {  # and how many tokens a row may have
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=10, n_embd=16, n_layer=1, n_head=2)), 10),
    "opt": (lambda: OPTForCausalLM(OPTConfig(vocab_size=20, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16,
                                             num_attention_heads=2, num_hidden_layers=1, **TEN)), 10),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SMALL, **TEN)), 10),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, **TEN, pad_token_id=1)), 8),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **TEN)), None),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2)), None),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                                       num_heads=2, decoder_start_token_id=0)), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_as_long_as_there_are_positions(kind):
    """As long as the model can read, no longer; none that turns or compares positions has such a limit."""
    make, limit = MODELS[kind]
    model, longest = make(), limit or 40
    rows = Dataset.from_dict({"input_ids": [[3, 4], [5] * longest]})
    check_tokens({"train_dataset": rows}, model)
    known = {"input_ids": rows.with_format("torch")[1]["input_ids"][None]}
    model(**known, labels=known["input_ids"])
    if limit is None:
        return
    longer = Dataset.from_dict({"input_ids": [[3, 4], [5] * (limit + 1)]})
    with pytest.raises(
        ValueError,
        match=f"Row 1 of `train_dataset` has {limit + 1} tokens in `input_ids`, but .* has {limit} positions",
    ):
        check_tokens({"train_dataset": longer}, model)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=longer.with_format("torch")[1]["input_ids"][None])


def test_tokens_of_another_vocabulary_are_refused_before_anything_runs(tmp_path):
    rows = {"input_ids": [[3, 4, 5]] * 5, "attention_mask": [[1, 1, 1]] * 5, "labels": [[3, 4, 5]] * 5}
    retain = Dataset.from_dict({**rows, "input_ids": [[], *[[6, 4, 5]] * 3, [3, 20, 5]]})
    args = OrthoGradConfig(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2)
    sets = {"train_dataset": retain, "forget_dataset": Dataset.from_dict(rows)}
    with pytest.raises(
        ValueError, match="Row 4 of `train_dataset` has the token 20 in `input_ids`, but .* knows 0 to 19"
    ):
        OrthoGradTrainer(MODELS["gpt2"][0](), args, **sets)


@pytest.mark.parametrize("target", ["wte", "wpe"])
def test_tables_are_found_under_an_adapter(target):
    adapted = get_peft_model(MODELS["gpt2"][0](), LoraConfig(r=2, target_modules=[target]))
    for tokens, problem in (([-1, 3], "has the token -1"), ([3] * 11, "has 11 tokens in `input_ids`")):
        with pytest.raises(ValueError, match=f"Row 1 of `forget_dataset` {problem}"):
            check_tokens({"forget_dataset": Dataset.from_dict({"input_ids": [None, tokens]})}, adapted)


def test_a_decoder_has_positions_for_its_labels():
    config = BartConfig(vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, **TEN)  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, -100] * 6]})
    with pytest.raises(
        ValueError, match="Row 0 of `train_dataset` has 12 tokens in `labels`, but .* has 10 positions"
    ):
        check_tokens({"train_dataset": rows}, BartForConditionalGeneration(config))


def test_what_is_known_otherwise_is_left_to_the_model():
    """A model of several parts, or of another kind; rows that a transform makes, or that are no lists."""
    long = Dataset.from_dict({"input_ids": [[3, 99] * 20]})
    parts = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**SMALL), BertConfig(**SMALL, **TEN))
    check_tokens({"train_dataset": long}, EncoderDecoderModel(parts))
    plain = torch.nn.Linear(2, 2)
    plain.config = SimpleNamespace(max_position_embeddings=10)
    check_tokens({"train_dataset": long}, plain)
    for rows in (
        long.with_transform(lambda batch: batch),
        Dataset.from_dict({"input_ids": ["text"]}),
        [{"input_ids": [99]}],
    ):
        check_tokens({"train_dataset": rows}, MODELS["gpt2"][0]())
