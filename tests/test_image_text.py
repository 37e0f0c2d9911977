"""Models of images and text: whose image is whose, what a captioner says, and what another answer is to them."""

import pytest
import torch
import transformers
from conftest import word_tokenizer
from test_architectures import KV
from test_modalities import unlearn
from test_text_metrics import make_trainer

from hf_orthograd.evaluation.text import generate_answers
from hf_orthograd.evaluation.text.generation import generate_tokens
from hf_orthograd.objectives import PerSampleLoss


WORDS = "<pad> <start> <end> a three cat of red".split()
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("numbers", [(1, 1, 2, 0), (1, 1, 1, 0)], ids=["as many as samples", "one missing"])
def test_other_numbers_of_images_are_refused_by_name_unless_frozen(numbers, tmp_path):
    """Four images for four samples split into equal parts, whoever's they are."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER},
        text_config={"model_type": "llama", **KV},
        image_token_index=49,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)  # the projector alone reads images of unknown owners

    def with_images(generator, number):
        tokens = torch.cat(
            [
                torch.full((4 * numbers[number],), 49),
                torch.randint(3, 40, (14 - 4 * numbers[number],), generator=generator),
            ]
        )
        images = torch.randn(numbers[number], 3, 16, 16, generator=generator)
        return {"input_ids": tokens, "labels": tokens.masked_fill(tokens == 49, -100), "pixel_values": images}

    def join(examples):
        joined = {name: torch.stack([example[name] for example in examples]) for name in ("input_ids", "labels")}
        return {**joined, "pixel_values": torch.cat([example["pixel_values"] for example in examples])}

    with pytest.raises(ValueError, match=r"image tokens: .* Freeze both"):
        unlearn(model, with_images, tmp_path, data_collator=join)
    model.model.multi_modal_projector.requires_grad_(False)
    assert unlearn(model, with_images, tmp_path, data_collator=join).gradient_engine.name == "gram"


@pytest.fixture
def captioner(tmp_path):
    """A trainer of BLIP, whose `generate()` drops the last token of a prompt and hands over to its decoder."""
    tokenizer = word_tokenizer(WORDS, pad_token="<pad>", eos_token="<end>")
    text = {
        "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "encoder_hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config=TOWER)
    return make_trainer(transformers.BlipForConditionalGeneration(config), tokenizer, tmp_path)


def test_blip_is_asked_with_its_whole_prompt(captioner):
    """Prompts of one token and of two, against the most likely token, one after the other."""
    generator, rows = torch.Generator().manual_seed(1), []
    for prompt in ([1], [1, 3], [1], [1, 6]):
        image = torch.randn(3, 16, 16, generator=generator)
        labels = [-100] * len(prompt) + [4, 2]
        rows.append({"pixel_values": image, "input_ids": [*prompt, 4, 2], "attention_mask": [1] * len(labels)})
        rows[-1]["labels"] = labels
    model = captioner.model.eval()
    model.text_decoder.generation_config.repetition_penalty = 9.0  # which greedy decoding has not
    expected = []
    for row in rows:
        told = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        said = []
        while len(said) < 5 and said[-1:] != [2]:
            with torch.no_grad():
                logits = model(pixel_values=row["pixel_values"][None], input_ids=torch.tensor([told + said])).logits
            said.append(int(logits[0, -1].argmax()))
        expected.append(said)
    found = generate_tokens(captioner, rows, max_new_tokens=5)
    assert [said[: len(right)] for said, right in zip(found, expected, strict=True)] == expected
    assert all(len(said) <= 5 for said in found)
    assert model.text_decoder.generation_config.repetition_penalty == 9.0


def test_a_way_to_generate_that_is_not_known_is_refused(captioner):
    config = transformers.Kosmos2Config(
        text_config={"vocab_size": 20, "embed_dim": 32, "layers": 1, "ffn_dim": 32, "attention_heads": 4},
        vision_config=TOWER, latent_query_num=2,
    )  # fmt: skip
    row = {"input_ids": [1, 4], "labels": [-100, 4]}
    with pytest.raises(ValueError, match="Kosmos2ForConditionalGeneration has no `generate\\(\\)`, or one of its own"):
        generate_answers(captioner, [row], model=transformers.Kosmos2ForConditionalGeneration(config))


def test_another_answer_is_of_the_kind_of_the_own_one():
    """PaliGemma reads kind 0, the prompt, in both directions, and kind 1 from left to right."""
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    answering = PerSampleLoss(transformers.LlamaForCausalLM(config)).answering([7, 8, 2])
    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 2], [0, 3, 6, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 5, 2], [-100, -100, 6, 2]]),
        "token_type_ids": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]),
    }
    made = answering(batch)
    assert made["token_type_ids"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert made["labels"].tolist() == [[-100, -100, 7, 8, 2], [-100, -100, 7, 8, 2]]
    with pytest.raises(ValueError, match="cannot tell what image_attention_mask in the batches"):
        answering({**batch, "image_attention_mask": torch.ones(2, 4, 3)})
