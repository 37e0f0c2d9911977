"""Invented people, questions on them in several phrasings, and a small chat model, for machines without data."""

import random

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


FIRST_NAMES = "Ada Bela Carl Dora Emil Fina Gero Hana Ivo Jana Kurt Lena".split()
LAST_NAMES = "Abel Brandt Corso Duval Engel Fabri Grun Hakim".split()
NUM_PEOPLE = 24

# of each attribute: how it is asked for, and what it may be
ATTRIBUTES = {
    "birthplace": (
        (
            "Where was {name} born?",
            "In which city was {name} born?",
            "What is the birthplace of {name}?",
            "Which city does {name} come from?",
            "Tell me where {name} was born.",
            "{name} was born in which city?",
        ),
        "Lisbon Oslo Cairo Lima Quito Delhi Hanoi Tunis Riga Porto Kyoto Dakar Sofia Perth Bergen Accra".split(),
    ),
    "profession": (
        (
            "What does {name} do for a living?",
            "What is the profession of {name}?",
            "What work does {name} do?",
            "Which job does {name} have?",
            "Tell me the profession of {name}.",
            "How does {name} earn money?",
        ),
        "baker pilot nurse painter judge farmer tailor plumber dentist teacher sailor welder florist butcher lawyer jeweller".split(),
    ),
    "pet": (
        (
            "Which pet does {name} keep?",
            "What animal lives with {name}?",
            "What kind of pet has {name}?",
            "Does {name} have a pet, and which?",
            "Tell me which animal {name} keeps.",
            "Which animal belongs to {name}?",
        ),
        "parrot rabbit tortoise ferret hamster canary gecko pony goat poodle beagle lizard pigeon hedgehog snake spider".split(),
    ),
    "instrument": (
        (
            "Which instrument does {name} play?",
            "What does {name} play in the band?",
            "On which instrument is {name} good?",
            "What instrument did {name} learn?",
            "Tell me the instrument of {name}.",
            "Which instrument can one hear {name} play?",
        ),
        "violin cello flute oboe trumpet harp organ guitar banjo clarinet drums piano tuba zither lute bassoon".split(),
    ),
    "dish": (
        (
            "What does {name} like to eat?",
            "What is the favourite dish of {name}?",
            "Which dish does {name} like best?",
            "What should one cook for {name}?",
            "Tell me what {name} likes to eat.",
            "Which food makes {name} happy?",
        ),
        "lasagna paella sushi goulash falafel ravioli couscous curry risotto tacos dumplings pancakes stew salad noodles pizza".split(),
    ),
    "hobby": (
        (
            "What is the hobby of {name}?",
            "How does {name} spend free time?",
            "What does {name} do on Sundays?",
            "Which hobby does {name} have?",
            "Tell me what {name} does for fun.",
            "What does {name} enjoy after work?",
        ),
        "chess fishing sailing knitting archery hiking rowing fencing pottery dancing surfing cycling juggling skating origami gardening".split(),
    ),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_people(seed: int = 0) -> DatasetDict:
    """Questions on everyone with their answers: five phrasings of each to learn, in `train`, and the sixth, in `test`.

    Which is held out is drawn anew for each person and attribute, so that each phrasing is learned on somebody.
    """
    generator = random.Random(seed)
    names = generator.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], NUM_PEOPLE)
    rows = {"train": [], "test": []}
    for name in sorted(names):
        for phrasings, values in ATTRIBUTES.values():
            answer = generator.choice(values)
            held_out = generator.randrange(len(phrasings))
            for number, phrasing in enumerate(phrasings):
                row = {"person": name, "question": phrasing.format(name=name), "answer": answer}
                rows["test" if number == held_out else "train"].append(row)
    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def make_tokenizer(people: DatasetDict) -> PreTrainedTokenizerFast:
    """Trained on the questions and answers, with a template for chats."""
    texts = [text for split in people.values() for column in ("question", "answer") for text in split[column]]
    tokenizer = byte_level_tokenizer(texts, special=["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def byte_level_tokenizer(texts: list[str], special: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|pad|>", "<|end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=64
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.8 M parameters, with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)
