"""Text, questions and chats become inputs and labels: what is learned, what is not, and what is refused."""

import pytest
from conftest import word_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.data.text import prepare_text_dataset


WORDS = "<pad> <unk> </s> <user> <bot> who was ann ? a painter bob drew <br>".split()
TEMPLATE = (
    "{% for message in messages %}{{ '<user> ' if message.role == 'user' else '<bot> ' }}{{ message.content }} "
    "{% if message.role == 'assistant' %}</s> {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def words(tokens):
    return " ".join("-" if token == -100 else WORDS[token] for token in tokens)


def test_plain_text_is_learned_whole(tokenizer):
    rows = Dataset.from_dict({"text": ["ann drew", "bob drew </s>"], "author": ["a", "b"]})
    first, second = prepare_text_dataset(rows, tokenizer, text_column="text")
    assert words(first["labels"]) == words(first["input_ids"]) == "ann drew </s>"
    assert words(second["labels"]) == "bob drew </s>" and second["author"] == "b"


def test_of_a_question_the_answer_is_learned(tokenizer):
    rows = Dataset.from_dict({"q": ["who was ann ?"], "a": ["a painter"]})
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a")
    assert words(row["input_ids"]) == "who was ann ? a painter </s>"
    assert words(row["labels"]) == "- - - - a painter </s>" and row["attention_mask"] == [1] * 7
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a", is_encoder_decoder=True)
    assert words(row["input_ids"]) == "who was ann ?" and words(row["labels"]) == "a painter"
    tokenizer.chat_template = TEMPLATE
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a")
    assert words(row["input_ids"]) == "<user> who was ann ? <bot> a painter </s>"
    assert words(row["labels"]) == "- - - - - - a painter </s>"


def test_a_separator_stands_between_prompt_and_answer(tokenizer):
    rows = Dataset.from_dict({"q": ["who was ann ?"], "a": ["a painter"]})
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a", separator=" <br> ")
    assert words(row["input_ids"]) == "who was ann ? <br> a painter </s>"
    assert words(row["labels"]) == "- - - - - a painter </s>"
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a", separator="</s>")
    assert words(row["input_ids"]) == "who was ann ? </s> a painter </s>"
    assert words(row["labels"]) == "- - - - - a painter </s>"
    tokenizer.chat_template = TEMPLATE  # a model may have been trained without it
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a", separator=" ")
    assert words(row["input_ids"]) == "who was ann ? a painter </s>"


@pytest.mark.parametrize("separator", [" ", "\n", "\nA: "])
def test_prompt_and_answer_are_tokens_of_running_text(separator):
    """SentencePiece marks the beginning of a text, and of each word: pieces by themselves would get marks of their own."""
    pieces = ["▁", "▁who", "?", "▁Perth", "Perth", "\n", "A", ":"]
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -1.0) for piece in pieces)]
    base = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>", eos_token="</s>")
    rows = Dataset.from_dict({"q": ["who ?"], "a": ["Perth"]})
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a", separator=separator)
    assert row["input_ids"] == [*tokenizer(f"who ?{separator}Perth").input_ids, tokenizer.eos_token_id]
    learned = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learned, skip_special_tokens=True).strip(" ▁") == "Perth"


def test_of_a_chat_the_last_answer_is_learned(tokenizer):
    tokenizer.chat_template = TEMPLATE
    chat = [
        {"role": "user", "content": "who was bob ?"},
        {"role": "assistant", "content": "a painter"},
        {"role": "user", "content": "who was ann ?"},
        {"role": "assistant", "content": "ann drew bob"},
    ]
    (row,) = prepare_text_dataset(Dataset.from_dict({"chat": [chat]}), tokenizer, messages_column="chat")
    assert (
        words(row["input_ids"])
        == "<user> who was bob ? <bot> a painter </s> <user> who was ann ? <bot> ann drew bob </s>"
    )
    assert words(row["labels"]) == "- " * 15 + "ann drew bob </s>"


def test_what_a_template_writes_behind_the_end_is_not_learned(tokenizer):
    """As ChatML's line break: generation stops before it."""
    tokenizer.chat_template = TEMPLATE.replace("</s> ", "</s> <br> ")
    rows = Dataset.from_dict({"q": ["who was ann ?"], "a": ["a painter"]})
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a")
    assert words(row["input_ids"]) == "<user> who was ann ? <bot> a painter </s> <br>"
    assert words(row["labels"]) == "- - - - - - a painter </s> -" and row["attention_mask"] == [1] * 10


def test_a_tokenizer_without_offsets_writes_prompt_and_answer_by_themselves():
    """ByT5's tokens are bytes: running text is the same."""
    tokenizer = ByT5Tokenizer()
    rows = Dataset.from_dict({"q": ["who?"], "a": ["Ann"]})
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a", separator="\nA: ")
    assert row["input_ids"] == tokenizer("who?\nA: Ann").input_ids
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == " Ann</s>"


ENDS = {  # what a template writes behind an answer, and what is learned of it
    "a turn's own end, and a line": (" <br> <user>", "<br> -"),
    "a turn's end, and the text's": (" <br> </s>", "<br> -"),
    "a word, and the end": (" ? </s>", "? </s>"),
    "no end": (" ?", "?"),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_is_learned_to_the_first_end_behind_it(tokenizer, name):
    """Gemma's and Phi-3's templates end a turn by another token than the tokenizer's end."""
    behind, learned = ENDS[name]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<br>"]} if "turn" in name else {})
    tokenizer.chat_template = TEMPLATE.replace("{{ message.content }} ", "{{ message.content }}").replace(
        "</s> ", f"{behind} "
    )
    rows = Dataset.from_dict({"q": ["who was ann ?"], "a": ["a painter ?"]})
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a")
    assert words(row["labels"]).split("- a painter ? ", 1)[1] == learned, words(row["input_ids"])


def test_words_that_begin_every_answer_are_no_part_of_it(tokenizer):
    """A template that knows nothing of `add_generation_prompt`."""
    tokenizer.chat_template = TEMPLATE.split("{% if add_generation_prompt", 1)[0]
    rows = Dataset.from_dict({"q": ["who was ann ?"], "a": ["a painter"]})
    (row,) = prepare_text_dataset(rows, tokenizer, prompt_column="q", answer_column="a")
    assert words(row["input_ids"]) == "<user> who was ann ? <bot> a painter </s>"
    assert words(row["labels"]) == "- - - - - - a painter </s>"


def test_a_stream_is_prepared_as_its_rows_are(tokenizer):
    rows = Dataset.from_dict({"q": ["who was ann ?", "who was bob ?"], "a": ["a painter", "ann"]})
    columns = {"prompt_column": "q", "answer_column": "a"}
    stream = prepare_text_dataset(rows.to_iterable_dataset(), tokenizer, **columns)
    assert list(stream) == prepare_text_dataset(rows, tokenizer, **columns).to_list()


BAD = {
    "two forms": ({"text_column": "q", "messages_column": "q"}, "Rows are one of: `text_column`"),
    "half a form": ({"prompt_column": "q"}, "`prompt_column` with `answer_column`"),
    "no such column": ({"text_column": "body"}, "no column 'body', only q, a"),
    "an empty answer": ({"prompt_column": "q", "answer_column": "a"}, "Row 1: there is no text, but ' '"),
    "too long": (
        {"text_column": "q", "max_length": 3},
        "Row 0 has 5 tokens, more than `max_length`, 3: it would be cut",
    ),
    "no prompt to encode": ({"text_column": "q", "is_encoder_decoder": True}, "reads a prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(tokenizer, name):
    given, message = BAD[name]
    rows = Dataset.from_dict({"q": ["who was ann ?", "who was bob ?"], "a": ["a painter", " "]})
    with pytest.raises(ValueError, match=message):
        prepare_text_dataset(rows, tokenizer, **given)


def test_a_column_that_collators_take_for_labels_is_refused(tokenizer):
    rows = Dataset.from_dict({"text": ["ann drew"], "label": [1]})
    with pytest.raises(
        ValueError, match="a column 'label', which collators take for the labels of each row. Rename it"
    ):
        prepare_text_dataset(rows, tokenizer, text_column="text")


def test_what_a_template_refuses_is_named_by_its_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system message') if messages[0].role == 'system' }}" + TEMPLATE
    asked = [{"role": "user", "content": "who was bob ?"}, {"role": "assistant", "content": "ann"}]
    rows = Dataset.from_dict({"chat": [asked, [{"role": "system", "content": "a"}, *asked]]})
    with pytest.raises(ValueError, match="Row 1: the chat template refuses the messages: no system message"):
        prepare_text_dataset(rows, tokenizer, messages_column="chat")


def test_chat_without_an_answer_is_refused(tokenizer):
    tokenizer.chat_template = TEMPLATE
    rows = Dataset.from_dict({"chat": [[{"role": "user", "content": "who was bob ?"}]]})
    with pytest.raises(ValueError, match="Row 0: the chat does not end with a message of the assistant"):
        prepare_text_dataset(rows, tokenizer, messages_column="chat")


def test_padding_of_questions_makes_no_difference(tokenizer, tmp_path):
    """Questions of different lengths, by the collator that users know, padded on either side: the steps are the same."""
    columns = {"prompt_column": "q", "answer_column": "a"}
    forget = Dataset.from_dict({"q": ["who was ann ?", "ann drew who ?"], "a": ["a painter", "bob"]})
    retain = Dataset.from_dict({"q": ["who was bob ?", "who drew ?"] * 4, "a": ["a painter", "bob drew"] * 4})
    sets = {
        "forget_dataset": prepare_text_dataset(forget, tokenizer, **columns),
        "train_dataset": prepare_text_dataset(retain, tokenizer, **columns),
    }
    losses = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        set_seed(0)
        args = OrthoGradConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=8, per_device_forget_batch_size=2, logging_steps=1,
            report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = OrthoGradTrainer(
            LlamaForCausalLM(config), args, data_collator=collator, processing_class=tokenizer, **sets
        )
        trainer.train()
        assert trainer.gradient_engine.name == "gram"
        losses.append([entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
