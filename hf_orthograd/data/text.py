"""What scripts on language models share: text, questions with answers, and chats as model inputs and labels."""

from collections.abc import Callable, Sequence

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..objectives import IGNORED_LABEL


def prepare_text_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    messages_column: str | None = None,
    separator: str | None = None,
    max_length: int | None = None,
    is_encoder_decoder: bool = False,
) -> Dataset | IterableDataset:
    """Turns rows into `input_ids`, `attention_mask` and `labels`, keeping the other columns.

    A row is plain text, all of which is learned. Or it is a prompt and its answer. Or it is the messages of a chat, as
    `apply_chat_template` takes them, of which the last, the assistant's, is learned. Prompts have labels of -100, as has
    what a template writes behind the token that ends an answer. A prompt and an answer become a chat where the tokenizer
    has a template for one and no `separator` is given; else that joins them, and the end token follows. Rows must look as
    those did that the model was trained on: `tokenizer.decode` shows one. Pad with
    [`~transformers.DataCollatorForSeq2Seq`], which pads labels by -100.

    Args:
        text_column, prompt_column, answer_column, messages_column (`str`, *optional*): One of the three forms.
        separator (`str`, *optional*): What stands between a prompt and its answer, in place of a chat template; a blank where the
            tokenizer has no template.
        max_length (`int`, *optional*): Most tokens of a row, those of the answer included.
        is_encoder_decoder (`bool`): Whether the model reads the prompt in an encoder, as T5: labels are then the answer alone.

    Raises:
        ValueError: None or several of the forms, a column that is not there, or one that collators would take for labels. Or,
            naming the row: text that is empty or no text, a chat that does not end with the assistant or that the template
            refuses, a row that is too long, which would be cut.
    """
    forms = {
        "text": (text_column,),
        "question": (prompt_column, answer_column),
        "chat": (messages_column,),
    }
    asked = [form for form, columns in forms.items() if any(columns)]
    if len(asked) != 1 or None in forms[asked[0]]:
        raise ValueError(
            "Rows are one of: `text_column`; `prompt_column` with `answer_column`; `messages_column`. Given: "
            f"{text_column!r}; {prompt_column!r} with {answer_column!r}; {messages_column!r}."
        )
    (form,) = asked
    _check_columns(dataset.column_names, forms[form])
    if is_encoder_decoder and form != "question":
        raise ValueError("An encoder-decoder model reads a prompt: pass `prompt_column` and `answer_column`.")
    encode = _encoder(form, tokenizer, is_encoder_decoder, separator)

    def prepare(row: dict, number: int) -> dict[str, list[int]]:
        try:
            prompt, answer, learned = encode(*(row[name] for name in forms[form]))
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        length = len(prompt) + len(answer)
        if max_length is not None and length > max_length:
            raise ValueError(
                f"Row {number} has {length} tokens, more than `max_length`, {max_length}: it would be cut. Split it, or raise "
                "the length."
            )
        inputs = prompt if is_encoder_decoder else prompt + answer
        labels = answer[:learned] + [IGNORED_LABEL] * (len(answer) - learned)
        labels = labels if is_encoder_decoder else [IGNORED_LABEL] * len(prompt) + labels
        return {"input_ids": inputs, "attention_mask": [1] * len(inputs), "labels": labels}

    shown = {} if isinstance(dataset, IterableDataset) else {"desc": "Tokenizing"}
    return dataset.map(prepare, with_indices=True, remove_columns=list(forms[form]), **shown)


def _check_columns(names: list[str] | None, read: Sequence[str]) -> None:
    """A stream may not know its columns."""
    missing = [name for name in read if names is not None and name not in names]
    if missing:
        raise ValueError(f"The data set has no column {', '.join(map(repr, missing))}, only {', '.join(names)}.")
    taken = [name for name in ("label", "label_ids") if name in set(names or ()).difference(read)]
    if taken:
        raise ValueError(
            f"The data set has a column {taken[0]!r}, which collators take for the labels of each row. Rename it, or remove it."
        )


Encode = Callable[..., tuple[list[int], list[int], int]]


def _encoder(form: str, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool, separator: str | None) -> Encode:
    """A function from what a row holds to the tokens of its prompt, those of its answer, and how many of these are learned."""

    def whole(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int], int]:
        return prompt, answer, len(answer)

    def text(content: str) -> tuple[list[int], list[int], int]:
        return whole([], _ended(tokenizer(_checked(content)).input_ids, tokenizer))

    def chat(messages: Sequence[dict]) -> tuple[list[int], list[int], int]:
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("the chat does not end with a message of the assistant, which would be learned.")
        _checked(messages[-1]["content"])
        return _written(list(messages), tokenizer)

    def question(prompt: str, answer: str) -> tuple[list[int], list[int], int]:
        if is_encoder_decoder:
            return whole(tokenizer(_checked(prompt)).input_ids, tokenizer(text_target=_checked(answer)).input_ids)
        if tokenizer.chat_template is not None and separator is None:
            return chat([{"role": "user", "content": _checked(prompt)}, {"role": "assistant", "content": answer}])
        return whole(*_joined(_checked(prompt), " " if separator is None else separator, _checked(answer), tokenizer))

    return {"text": text, "chat": chat, "question": question}[form]


def _written(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], int]:
    """A chat as the template writes it: up to its last answer, from there on, and how many tokens of that are learned."""

    def write(chat: list[dict], **settings: bool) -> list[int]:
        try:
            return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **settings)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    written, prompt = write(messages), write(messages[:-1], add_generation_prompt=True)
    # with another answer, which begins and ends otherwise, the template's own part stays
    answer = messages[-1]["content"]
    other = ("?" if answer.lstrip()[0] != "?" else "!") + " " + ("?" if answer.rstrip()[-1] != "?" else "!")
    changed = write([*messages[:-1], {**messages[-1], "content": other}])
    if prompt == write(
        messages[:-1]
    ):  # the template has no words that begin an answer, or does not know that they are asked for
        prompt = written[: max(len(prompt), _alike(written, changed))]
    if written[: len(prompt)] != prompt:
        raise ValueError(
            "the tokens before the answer are others when there is no answer yet: the template writes them differently, or the "
            "answer's first token reaches into them."
        )
    answered = written[len(prompt) :]
    closing = answered[len(answered) - min(_alike(written[::-1], changed[::-1]), len(answered) - 1) :]
    ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids}
    ends.update(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    behind = next((len(closing) - place - 1 for place, token in enumerate(closing) if token in ends), 0)
    return prompt, answered, len(answered) - behind


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _joined(
    prompt: str, separator: str, answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokens of a text that a prompt begins and an answer ends, cut where the answer begins; a blank is part of the word behind it.

    A tokenizer that does not say where its tokens stand in the text writes both by themselves.
    """
    between = separator.rstrip(" ")
    if tokenizer.is_fast:  # as in running text: a token may depend on what stands before it
        found = tokenizer(prompt + separator + answer, return_offsets_mapping=True)
        start = len(prompt + between)
        cut = next(place for place, (_, end) in enumerate(found.offset_mapping) if end > start)
        tokens = found.input_ids
        return tokens[:cut], _ended(tokens[cut:], tokenizer)
    learned = tokenizer(separator[len(between) :] + answer, add_special_tokens=False).input_ids
    read = tokenizer(prompt).input_ids
    read = read[:-1] if read[-1:] == [tokenizer.eos_token_id] else read
    if between:
        read = read + tokenizer(between, add_special_tokens=False).input_ids
    return read, _ended(learned, tokenizer)


def _checked(content: str) -> str:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"there is no text, but {content!r}. Remove the row.")
    return content


def _ended(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With the token that ends a text, which a model has to learn to stop at."""
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
