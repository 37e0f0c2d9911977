"""What scripts on language models share: text, questions with answers, and chats as model inputs and labels."""

from collections.abc import Callable, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..objectives import IGNORED_LABEL


def prepare_text_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    messages_column: str | None = None,
    separator: str = " ",
    max_length: int | None = None,
    is_encoder_decoder: bool = False,
) -> Dataset:
    """Turns rows into `input_ids`, `attention_mask` and `labels`, keeping the other columns.

    A row is plain text, all of which is learned. Or it is a prompt and its answer. Or it is the messages of a chat, as
    `apply_chat_template` takes them, of which the last, the assistant's, is learned. Prompts have labels of -100, as has
    what a template writes behind the token that ends an answer. A prompt and an answer become a chat where the tokenizer
    has a template for one; else `separator` joins them, and the end token follows. Rows must look as those did that the
    model was trained on: `tokenizer.decode` shows one. Pad with [`~transformers.DataCollatorForSeq2Seq`], which pads labels
    by -100.

    Args:
        text_column, prompt_column, answer_column, messages_column (`str`, *optional*): One of the three forms.
        separator (`str`): What stands between a prompt and its answer without a chat template.
        max_length (`int`, *optional*): Most tokens of a row, those of the answer included.
        is_encoder_decoder (`bool`): Whether the model reads the prompt in an encoder, as T5: labels are then the answer alone.

    Raises:
        ValueError: None or several of the forms, or a column that is not there. Or, naming the row: text that is empty
            or no text, a chat that does not end with the assistant, a row that is too long, which would be cut.
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
    missing = [name for name in forms[form] if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The data set has no column {', '.join(map(repr, missing))}, only {', '.join(dataset.column_names)}."
        )
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

    return dataset.map(prepare, with_indices=True, remove_columns=list(forms[form]), desc="Tokenizing")


Encode = Callable[..., tuple[list[int], list[int], int]]


def _encoder(form: str, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool, separator: str) -> Encode:
    """A function from what a row holds to the tokens of its prompt, those of its answer, and how many of these are learned."""

    def whole(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int], int]:
        return prompt, answer, len(answer)

    def text(content: str) -> tuple[list[int], list[int], int]:
        return whole([], _ended(tokenizer(_checked(content)).input_ids, tokenizer))

    def chat(messages: Sequence[dict]) -> tuple[list[int], list[int], int]:
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("the chat does not end with a message of the assistant, which would be learned.")
        _checked(messages[-1]["content"])
        template = {"tokenize": True, "return_dict": False}
        written = tokenizer.apply_chat_template(list(messages), **template)
        prompt = tokenizer.apply_chat_template(list(messages[:-1]), add_generation_prompt=True, **template)
        if written[: len(prompt)] != prompt:
            raise ValueError("the template writes the messages before the answer differently when there is none yet.")
        answer = written[len(prompt) :]
        return prompt, answer, _to_its_end(answer, tokenizer)

    def question(prompt: str, answer: str) -> tuple[list[int], list[int], int]:
        if is_encoder_decoder:
            return whole(tokenizer(_checked(prompt)).input_ids, tokenizer(text_target=_checked(answer)).input_ids)
        if tokenizer.chat_template is not None:
            return chat([{"role": "user", "content": _checked(prompt)}, {"role": "assistant", "content": answer}])
        # each by itself, so that no token spans both; a blank is part of the word behind it
        between = separator.rstrip(" ")
        learned = tokenizer(separator[len(between) :] + _checked(answer), add_special_tokens=False).input_ids
        read = _without_end(tokenizer(_checked(prompt)).input_ids, tokenizer)
        if between:
            read = read + tokenizer(between, add_special_tokens=False).input_ids
        return whole(read, _ended(learned, tokenizer))

    return {"text": text, "chat": chat, "question": question}[form]


def _checked(content: str) -> str:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"there is no text, but {content!r}. Remove the row.")
    return content


def _ended(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With the token that ends a text, which a model has to learn to stop at."""
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _to_its_end(answer: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a chat's answer has, without what the template writes behind the end at which generation stops, as a line break."""
    end = tokenizer.eos_token_id
    return len(answer) - answer[::-1].index(end) if end in answer else len(answer)


def _without_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens
