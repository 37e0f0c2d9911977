"""Padding on the left: a row's loss, metrics and wrong labels are those that it has alone, or the side is refused."""

import pytest
import torch
from conftest import word_tokenizer
from datasets import Dataset
from test_text_metrics import make_trainer
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.baselines import RandomLabelTrainer
from hf_orthograd.evaluation.measure import measure, per_sample_losses
from hf_orthograd.evaluation.text import MinKProbability, TokenLoss


WORDS = ["<pad>", *(f"w{number}" for number in range(1, 22))]
TEXTS = [[3, 9, 4, 17, 6], [5, 12, 8, 3, 20, 11, 2, 7, 14], [13, 4, 19]]


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS, pad_token="<pad>")


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=22, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def texts(rows=TEXTS):
    """Plain texts: each token is a label, of which the first is predicted by nothing."""
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], "labels": rows})


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_have_the_losses_and_metrics_that_they_have_alone(side, tokenizer, tmp_path):
    tokenizer.padding_side = side
    trainer = make_trainer(llama(), tokenizer, tmp_path)
    metrics = [TokenLoss(), MinKProbability()]
    together = measure(trainer, texts(), metrics)
    alone = [measure(trainer, texts([row]), metrics) for row in TEXTS]
    assert together.losses == pytest.approx([float(one.losses[0]) for one in alone], rel=1e-5)
    for metric in metrics:
        for place in (0, 1):
            expected = [one.counts[metric.name][place][0] for one in alone]
            assert together.counts[metric.name][place] == pytest.approx(expected, rel=1e-5), metric.name
    assert together.counts[TokenLoss.name][1].tolist() == [len(row) - 1 for row in TEXTS]


def learned(tokenizer, folder, model, method=OrthoGradTrainer):
    args = OrthoGradConfig(
        str(folder), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    sets = {"train_dataset": texts([row[::-1] for row in TEXTS] * 3), "forget_dataset": texts()}
    return method(model, args, data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer, **sets)


def test_a_model_that_counts_positions_from_the_left_is_refused(tokenizer, tmp_path):
    """OPT has a table of positions, too, and looks them up by the mask."""
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.5}
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=22, **size))
    with pytest.raises(
        ValueError,
        match=r"Row 0 of `forget_dataset` .* GPT2LMHeadModel counts positions from the left.*`padding_side`",
    ):
        learned(tokenizer, tmp_path, gpt).train()
    tokenizer.padding_side = "right"
    learned(tokenizer, tmp_path, gpt).train()
    tokenizer.padding_side = "left"
    size = {
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    }
    opt = OPTForCausalLM(OPTConfig(vocab_size=22, max_position_embeddings=16, init_std=0.5, **size))
    learned(tokenizer, tmp_path, opt).train()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_has_one_wrong_answer_whatever_is_beside_it(side, tokenizer, tmp_path):
    tokenizer.padding_side = side
    trainer = learned(tokenizer, tmp_path, llama(), RandomLabelTrainer)
    drawn = []
    for other in (1, 2):  # a longer row, and a shorter one
        (batch,) = trainer.batches_of("forget_dataset", [[0, other]])
        labels = batch.inputs["labels"]
        wrong = trainer._wrong(labels, batch.rows.tolist())
        assert (wrong != labels)[labels != -100].all() and (wrong == labels)[labels == -100].all()
        drawn.append(wrong[0][labels[0] != -100].tolist())
    assert drawn[0] == drawn[1]


def test_rows_that_a_collator_joins_are_refused(tokenizer, tmp_path):
    trainer = make_trainer(llama(), tokenizer, tmp_path)

    def join(rows):
        return {name: torch.cat([torch.tensor(row[name]) for row in rows])[None] for name in ("input_ids", "labels")}

    trainer.data_collator = join
    with pytest.raises(
        ValueError, match="3 rows have 1 losses: the trainer's `data_collator` makes one row of several"
    ):
        per_sample_losses(trainer, texts())
