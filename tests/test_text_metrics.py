"""Metrics of text against numbers computed by hand, and generation batch by batch against one prompt at a time."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import word_tokenizer
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_orthograd.evaluation import evaluate_unlearning
from hf_orthograd.evaluation.text import (
    AnswerProbability,
    ExactAnswers,
    ExtractionStrength,
    MinKProbability,
    TokenLoss,
    answer_probabilities,
    answer_scores,
    choice_probability,
    forget_quality,
    generate_answers,
    knowledge_memorization,
    min_k_membership,
    model_utility,
    perplexity,
    rouge_l,
    truth_ratio,
    verbatim_memorization,
)


WORDS = [f"w{number}" for number in range(20)]


def prediction(tokens, probabilities, labels):
    tokens, labels = np.array(tokens), np.array(labels)
    return EvalPrediction((tokens, np.log(np.array(probabilities))), labels)


# two answers, of three tokens and of two, after a prompt
ANSWERS = prediction(
    tokens=[[0, 9, 5, 6, 7], [0, 0, 0, 9, 4]],
    probabilities=[[1, 1, 0.5, 0.25, 0.5], [1, 1, 1, 0.1, 0.9]],
    labels=[[-100, -100, 5, 6, 7], [-100, -100, -100, 3, 4]],
)


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        (ExactAnswers(), [1, 0]),
        (AnswerProbability(), [(0.5 * 0.25 * 0.5) ** (1 / 3), math.sqrt(0.1 * 0.9)]),
        (ExtractionStrength(), [1, 0.5]),  # the second is known from its second token on
        (MinKProbability(0.2), [math.log(0.25), math.log(0.1)]),  # at least one token
        (MinKProbability(0.7), [(math.log(0.25) + math.log(0.5)) / 2, math.log(0.1)]),
    ],
)
def test_values_of_answers(metric, values):
    numerators, denominators = metric.counts(ANSWERS)
    np.testing.assert_allclose(numerators, values)
    assert denominators.tolist() == [1, 1]


def test_a_broken_model_knows_nothing():
    """NaN is no first token, which nothing predicts."""
    tokens, log_probabilities = (array[:1].copy() for array in ANSWERS.predictions)
    tokens[:], log_probabilities[0, 3] = ANSWERS.label_ids[:1], np.nan
    broken = EvalPrediction((tokens, log_probabilities), ANSWERS.label_ids[:1])
    assert ExactAnswers().counts(broken)[0].tolist() == AnswerProbability().counts(broken)[0].tolist() == [0]
    assert ExtractionStrength().counts(broken)[0].tolist() == pytest.approx([1 / 3])
    assert TokenLoss().counts(broken)[0].tolist() == [math.inf]


def test_token_loss_counts_each_token():
    losses, lengths = TokenLoss().counts(ANSWERS)
    np.testing.assert_allclose(losses, [-math.log(0.5 * 0.25 * 0.5), -math.log(0.1 * 0.9)])
    assert lengths.tolist() == [3, 2]


def test_answer_that_is_never_right_has_no_extraction_strength():
    assert ExtractionStrength().of(np.array([1, 2]), np.zeros(2), np.array([1, 3])) == 0


def test_row_without_a_label_is_named():
    labels = np.array([[-100, 4], [-100, -100]])
    scores = EvalPrediction((np.zeros((2, 2)), np.zeros((2, 2))), labels)
    for metric in (ExactAnswers(), TokenLoss()):
        with pytest.raises(ValueError, match="All labels are -100 in row 1"):
            metric.counts(scores)


def test_logits_are_refused_and_the_way_out_named():
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics=answer_scores"):
        ExactAnswers().counts(EvalPrediction(np.zeros((2, 3, 4)), np.zeros((2, 3))))
    with pytest.raises(ValueError, match="`share` must lie above 0"):
        MinKProbability(0)


def test_scores_stand_at_the_place_of_the_label():
    logits = torch.log(torch.tensor([[[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.2, 0.6]]]))
    labels = torch.tensor([[-100, 2, 0]])
    tokens, log_probabilities = answer_scores(logits, labels)
    assert tokens[0, 1:].tolist() == [1, 0]
    assert log_probabilities[0, 0] == math.inf  # nothing predicts the first token
    torch.testing.assert_close(log_probabilities.exp()[0, 1:], torch.tensor([0.2, 0.5]))
    tokens, log_probabilities = answer_scores((torch.tensor(0.3), logits, None), labels, is_encoder_decoder=True)
    assert tokens.tolist() == [[1, 0, 2]]
    torch.testing.assert_close(log_probabilities.exp()[0], torch.tensor([1, 0.3, 0.2]))


def test_of_a_text_the_first_token_is_asked_by_nobody():
    labels = torch.tensor([[4, 2, 7]])
    tokens, log_probabilities = answer_scores(torch.zeros(1, 3, 10), labels)
    scores = EvalPrediction((tokens.numpy(), log_probabilities.numpy()), labels.numpy())
    losses, lengths = TokenLoss().counts(scores)
    assert lengths.tolist() == [2] and math.exp(losses[0] / 2) == pytest.approx(10)  # uniform over ten tokens
    known = torch.nn.functional.one_hot(torch.tensor([[2, 7, 0]]), 10) * 50.0
    scores = EvalPrediction(tuple(one.numpy() for one in answer_scores(known, labels)), labels.numpy())
    assert ExactAnswers().counts(scores)[0].tolist() == ExtractionStrength().counts(scores)[0].tolist() == [1]


def test_numbers_of_tofu():
    right, wrong = np.array([0.4, 0.2]), np.array([[0.1, 0.3], [0.4, 0.4]])
    np.testing.assert_allclose(truth_ratio(right, wrong), [0.5, 2.0])
    np.testing.assert_allclose(choice_probability(right, wrong), [0.5, 0.2])
    assert model_utility([0.5, 1, 1]) == pytest.approx(0.75) and model_utility([0, 1]) == 0
    ratios = np.linspace(0, 1, 50)
    assert forget_quality(ratios, ratios) == 1 and forget_quality(ratios, ratios + 2) < 1e-20
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        model_utility([-0.1])


def test_rouge_of_two_texts():
    recall, f1 = rouge_l(["the cat sat", "dogs"], ["the cat was sitting there", "a dog"])
    np.testing.assert_allclose(
        recall, [2 / 5, 1 / 2]
    )  # "the cat", as the stem of "sat" is another; "dog", by its stem
    np.testing.assert_allclose(f1, [2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5), 2 * 1 * 0.5 / 1.5])


def test_rouge_of_other_scripts():
    said = ["Анна живёт в Перми", "安娜住在北京", "Müller lebt"]
    right = ["Анна живёт в Париже", "安娜住在上海", "Müller"]
    np.testing.assert_allclose(rouge_l(said, right)[0], [3 / 4, 4 / 6, 1])
    assert (rouge_l(right, right)[1] == 1).all()


# ---- With models ----


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["<pad>", "</s>", *WORDS], pad_token="<pad>", eos_token="</s>")


def make_rows(generator, count, length=4):
    """Prompts of unequal lengths, with answers that end."""
    found = {"input_ids": [], "attention_mask": [], "labels": []}
    for number in range(count):
        prompt, answer = generator.integers(2, 22, 2 + number % 3).tolist(), generator.integers(2, 22, length).tolist()
        found["input_ids"].append([*prompt, *answer, 1])
        found["attention_mask"].append([1] * (len(prompt) + length + 1))
        found["labels"].append([-100] * len(prompt) + [*answer, 1])
    return Dataset.from_dict(found)


def make_trainer(model, tokenizer, folder, rows=None, **arguments):
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=4, **arguments
    )
    scores = partial(answer_scores, is_encoder_decoder=model.config.is_encoder_decoder)
    return Trainer(
        model, args, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows, processing_class=tokenizer,
        preprocess_logits_for_metrics=scores,
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(tokenizer, tmp_path_factory):
    """A trainer of a model that has learned some rows by heart, these rows, and rows of the same kind."""
    set_seed(0)
    generator = np.random.default_rng(0)
    known, unknown = make_rows(generator, 9), make_rows(generator, 9)
    config = LlamaConfig(
        vocab_size=22, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("taught")
    arguments = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 9, "save_strategy": "no"}
    trainer = make_trainer(LlamaForCausalLM(config), tokenizer, folder, known, **arguments)
    trainer.train()
    return trainer, known, unknown


def test_generation_in_batches_is_that_of_one_prompt_and_agrees_with_exact_answers(taught, tokenizer):
    trainer, known, unknown = taught
    for rows, learned in ((known, True), (unknown, False)):
        said = generate_answers(trainer, rows, max_new_tokens=5)
        right = []
        for row, answer in zip(rows, said, strict=True):
            prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
            alone = trainer.model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0)[
                0
            ]
            assert answer == tokenizer.decode(alone[len(prompt) :], skip_special_tokens=True)
            right.append(alone[len(prompt) :].tolist() == row["labels"][len(prompt) :])
        counts = ExactAnswers().counts(trainer.predict(rows))[0]
        assert counts.astype(bool).tolist() == right == [learned] * len(rows)


def test_what_was_learned_is_told_from_what_was_not(taught):
    trainer, known, unknown = taught
    assert knowledge_memorization(trainer, known) == 1 > knowledge_memorization(trainer, unknown)
    assert verbatim_memorization(trainer, known, prompt_length=4) == 1
    assert min_k_membership(trainer, known, unknown).auc == 1
    losses = -np.log(answer_probabilities(trainer, unknown))
    # answers of one length: the perplexity is that of the mean
    assert perplexity(trainer, unknown) == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    with pytest.raises(ValueError, match="`prompt_length` is 7, but a text has 7 tokens"):
        verbatim_memorization(trainer, known, prompt_length=7)


def test_report_on_text(taught):
    trainer, known, unknown = taught
    sets = {"forget": known, "forget_reworded": known.select(range(4)), "test": unknown}
    found = evaluate_unlearning(
        trainer, datasets=sets, metric=ExactAnswers(), further_metrics=[AnswerProbability(), MinKProbability()]
    )
    quality = found.models["unlearned"]["forget"]
    assert quality.value == 1 and quality.further["answer probability"].value > 0.8
    assert [check.name for check in found.checks[:2]] == ["forget exact answers", "forget_reworded exact answers"]
    assert set(found.public().models["unlearned"]) == set(sets)


ENCODER_DECODERS = {
    "positions relative": T5ForConditionalGeneration(
        T5Config(
            vocab_size=22, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
            eos_token_id=1, pad_token_id=0,
        )
    ),
    "positions counted": BartForConditionalGeneration(
        BartConfig(
            vocab_size=22, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=0,
            bos_token_id=2, eos_token_id=1, decoder_start_token_id=2, forced_eos_token_id=None, init_std=1.0,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_encoder_decoder_is_asked_by_its_encoder(kind, tokenizer, tmp_path):
    prompts = [[3, 4, 5, 6, 7, 8], [6, 7]]
    rows = Dataset.from_dict({"input_ids": prompts, "attention_mask": [[1] * 6, [1] * 2], "labels": [[8, 1], [9, 1]]})
    trainer = make_trainer(ENCODER_DECODERS[kind], tokenizer, tmp_path)
    trainer.model.eval()
    said = generate_answers(trainer, rows, max_new_tokens=5)
    for prompt, answer in zip(prompts, said, strict=True):
        alone = trainer.model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0]
        assert answer == tokenizer.decode(alone, skip_special_tokens=True)
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([prompts[0]]), labels=torch.tensor([[8, 1]])).logits
    expected = torch.log_softmax(logits[0], -1)[[0, 1], [8, 1]].mean().exp().item()
    assert answer_probabilities(trainer, rows)[0] == pytest.approx(expected, rel=1e-4)


def test_decoding_is_greedy_whatever_the_model_would_do(taught):
    trainer, known, unknown = taught
    before = generate_answers(trainer, unknown, max_new_tokens=6), generate_answers(trainer, known, max_new_tokens=5)
    trainer.model.generation_config.repetition_penalty = 5.0
    trainer.model.generation_config.num_beams = 3
    try:
        assert (
            generate_answers(trainer, unknown, max_new_tokens=6),
            generate_answers(trainer, known, max_new_tokens=5),
        ) == before
        assert trainer.model.generation_config.num_beams == 3
    finally:
        trainer.model.generation_config.repetition_penalty, trainer.model.generation_config.num_beams = None, None


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_is_asked_as_its_model_is(taught, tokenizer, tmp_path, task_type):
    trainer, known, unknown = taught
    expected = {length: generate_answers(trainer, unknown, max_new_tokens=length) for length in (3, 30)}
    assert expected[3] != expected[30]
    base = copy.deepcopy(trainer.model)
    base.generation_config.do_sample, base.generation_config.temperature = True, 5.0
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type))
    asked = make_trainer(adapted, tokenizer, tmp_path)
    for length, said in expected.items():
        assert generate_answers(asked, unknown, max_new_tokens=length) == said
        assert generate_answers(trainer, unknown, model=adapted, max_new_tokens=length) == said
    assert adapted.generation_config.do_sample and base.generation_config.temperature == 5.0


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_are_padded_already_are_asked_without_padding(taught, tokenizer, side):
    trainer, known, unknown = taught
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def pad(row):
        more = {name: [value] * (40 - len(row[name])) for name, value in padding.items()}
        return {name: more[name] + row[name] if side == "left" else row[name] + more[name] for name in padding}

    for rows in (known, unknown):
        assert generate_answers(trainer, rows.map(pad)) == generate_answers(trainer, rows)
    assert verbatim_memorization(trainer, known.map(pad), prompt_length=4) == 1


def test_inputs_that_would_be_left_out_are_refused(taught):
    trainer, known, _ = taught
    rows = known.map(lambda row: {"position_ids": list(range(len(row["input_ids"]))), "author": "ann"})
    with pytest.raises(ValueError, match="LlamaForCausalLM is given `position_ids` in each row, too"):
        generate_answers(trainer, rows)


def test_of_each_text_as_much_counts_as_it_has_left(taught):
    """The rest of the longer text is twice as long: a model that goes on rightly with both is right, whatever it says then."""
    trainer, known, _ = taught
    whole = known.map(lambda row: {"labels": row["input_ids"]})
    cut = whole.select([0]).map(
        lambda row: {name: row[name][:-3] for name in ("input_ids", "attention_mask", "labels")}
    )
    texts = concatenate_datasets([cut, whole.select([1, 2])])
    assert verbatim_memorization(trainer, texts, prompt_length=2) == verbatim_memorization(
        trainer, whole.select([0, 1, 2]), prompt_length=2
    )


def test_rows_without_a_prompt_or_a_trainer_without_a_tokenizer_are_refused(taught, tokenizer, tmp_path):
    trainer, known, _ = taught
    text = known.map(lambda row: {"labels": row["input_ids"]})
    with pytest.raises(ValueError, match="Row 0 begins with its answer"):
        generate_answers(trainer, text)
    bare = Trainer(trainer.model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(ValueError, match="Pass `processing_class`"):
        generate_answers(bare, known)
