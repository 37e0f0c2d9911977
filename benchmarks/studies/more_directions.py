"""More retain gradients, and so more directions that a step keeps, from the same utterances."""

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from hf_orthograd.data.speech import SpeechCollator


def in_parts(rows: Dataset, count: int, start: int) -> Dataset:
    """Each utterance as so many rows: one is held to one part of the tokens, behind the right ones before it.

    Args:
        start (`int`): The token that a decoder starts with, which the transcripts begin with, too.

    Raises:
        ValueError: A transcript has fewer tokens than parts.
    """

    def split(batch: dict[str, list]) -> dict[str, list]:
        made = {name: [] for name in (*batch, "decoder_input_ids")}
        for number, labels in enumerate(batch["labels"]):
            tokens = torch.tensor(labels[1:])
            if len(tokens) < count:
                raise ValueError(f"A transcript has {len(tokens)} tokens, which make no {count} parts.")
            for places in torch.arange(len(tokens)).tensor_split(count):
                said = torch.full_like(tokens, -100)
                said[places] = tokens[places]
                row = {name: values[number] for name, values in batch.items()}
                row |= {"labels": said.tolist(), "decoder_input_ids": [start, *labels[1:-1]]}
                for name, value in row.items():
                    made[name].append(value)
        return made

    return rows.map(split, batched=True, keep_in_memory=True)


@dataclass
class PartCollator:
    """Pads what the decoder reads, too, where rows have it."""

    collate: SpeechCollator

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate(examples)
        if "decoder_input_ids" in examples[0]:
            read = [torch.as_tensor(example["decoder_input_ids"]) for example in examples]
            batch["decoder_input_ids"] = pad_sequence(
                read, batch_first=True, padding_value=self.collate.processor.tokenizer.pad_token_id
            )
        return batch
