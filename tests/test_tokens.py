"""Rows that a language model has no embedding or no position for are named before the first step."""

import pytest
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
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
from hf_orthograd.validation.samples import check_tokens


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
    check_tokens(rows, "train_dataset", model)
    known = {"input_ids": rows.with_format("torch")[1]["input_ids"][None]}
    model(**known, labels=known["input_ids"])
    if limit is None:
        return
    longer = Dataset.from_dict({"input_ids": [[3, 4], [5] * (limit + 1)]})
    with pytest.raises(
        ValueError, match=f"Row 1 of `train_dataset` has {limit + 1} tokens, but .* has {limit} positions"
    ):
        check_tokens(longer, "train_dataset", model)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=longer.with_format("torch")[1]["input_ids"][None])


def test_tokens_of_another_vocabulary_are_refused_before_the_first_step(tmp_path):
    rows = {"input_ids": [[3, 4, 5]] * 5, "attention_mask": [[1, 1, 1]] * 5, "labels": [[3, 4, 5]] * 5}
    retain = Dataset.from_dict({**rows, "input_ids": [[6, 4, 5]] * 4 + [[3, 20, 5]]})
    trainer = OrthoGradTrainer(
        MODELS["gpt2"][0](),
        OrthoGradConfig(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2),
        train_dataset=retain,
        forget_dataset=Dataset.from_dict(rows),
    )
    with pytest.raises(ValueError, match="Row 4 of `train_dataset` has the token 20 in `input_ids`, but .* knows 20"):
        trainer.train()
