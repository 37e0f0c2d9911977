import gc
from functools import partial

import hub_server  # sets what the client reads when it is imported


# isort: split

import huggingface_hub
import pytest
import torch
import transformers
from equations import RATE
from published import report_of, rows, unlearned_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.requests import RequestHistory


torch.set_num_threads(1)


def pytest_collection_finish():
    """accelerate collects garbage whenever a run begins, and would walk over all that was imported: half a second each time."""
    gc.collect()
    gc.freeze()


class Samples(Dataset):
    """Examples with a `labels` entry each, stacked by the default collator."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def _whisper(dropout=0.0):
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        dropout=dropout, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _wav2vec2(dropout=0.0):
    config = transformers.Wav2Vec2Config(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, mask_time_length=2, mask_time_prob=0.2, apply_spec_augment=dropout > 0,
        hidden_dropout=dropout, attention_dropout=dropout, activation_dropout=dropout, feat_proj_dropout=0.0,
        final_dropout=dropout, layerdrop=0.0, pad_token_id=0, ctc_loss_reduction="mean",
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def _vit(dropout=0.0):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=5, hidden_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _llama(dropout=0.0):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, attention_dropout=dropout,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _masked(labels, count):
    """The last `count` labels do not count: samples have unequal lengths."""
    if count:
        labels[-count:] = -100
    return labels


def word_tokenizer(words, **special):
    """A tokenizer whose tokens are these words, between blanks; an unknown one is the first."""
    base = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=base, **special)


def make_example(kind, number, generator):
    def tokens(low, high, length):
        return torch.randint(low, high, (length,), generator=generator)

    if kind == "whisper":
        features = torch.randn(16, 40, generator=generator)
        return {"input_features": features, "labels": _masked(tokens(3, 64, 8), number % 4)}
    if kind == "wav2vec2":
        attention_mask = torch.ones(400, dtype=torch.long)
        attention_mask[400 - 40 * (number % 3) :] = 0
        features = torch.randn(400, generator=generator) * attention_mask
        labels = _masked(tokens(1, 20, 6), number % 3)
        return {"input_values": features, "attention_mask": attention_mask, "labels": labels}
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": tokens(0, 5, 1)[0]}
    ids = tokens(1, 64, 10)
    attention_mask = torch.ones_like(ids)
    length = 10 - number % 4
    attention_mask[length:] = 0
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": _masked(ids.clone(), 10 - length)}


MODELS = {"whisper": _whisper, "wav2vec2": _wav2vec2, "vit": _vit, "llama": _llama}


@pytest.fixture
def make_model():
    def make(kind, dropout=0.0):
        torch.manual_seed(0)
        return MODELS[kind](dropout)

    return make


@pytest.fixture
def make_samples():
    def make(kind, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return Samples([make_example(kind, number, generator) for number in range(count)])

    return make


@pytest.fixture
def loop_gradients():
    """Per-sample gradients the plain way: one sample, the model's own loss, one backward, flattened; shape (n, d)."""

    def compute(model, samples, names=None):
        rows = []
        for example in samples:
            model.zero_grad()
            model(**{key: value[None] for key, value in example.items()}).loss.backward()
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                        for name, p in model.named_parameters()
                        if p.requires_grad and (names is None or name in names)
                    ]
                )
            )
        model.zero_grad()
        return torch.stack(rows)

    return compute


@pytest.fixture(scope="session")
def running_hub():
    yield hub_server.HUB.start()
    hub_server.HUB.shutdown()


@pytest.fixture
def hub(running_hub, monkeypatch):
    """An empty Hub on loopback, and a user who is logged in and may write."""
    running_hub.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return running_hub


@pytest.fixture
def parakeet_extractor():
    try:
        return transformers.ParakeetFeatureExtractor()
    except ImportError as error:  # transformers 5.17 wants librosa for it
        pytest.skip(str(error).strip().splitlines()[0])


@pytest.fixture
def unlearned(make_model, make_samples, tmp_path):
    """Makes trainers that have made one step, with all they write in `out`."""
    return partial(unlearned_trainer, make_model, make_samples, tmp_path / "out")


@pytest.fixture
def folder(hub, unlearned, tmp_path, monkeypatch):
    """A prepared folder, and no waiting between tries."""
    trainer = unlearned()
    trainer.create_model_card(report=report_of(trainer))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.clear()
    return tmp_path / "out" / "public"


@pytest.fixture
def sets(make_samples):
    """Three forget sets and a retain set."""
    own = {f"forget {n}": rows(make_samples("vit", 4, seed=n)) for n in (1, 2, 3)}
    return own | {"retain": rows(make_samples("vit", 8, seed=9))}


@pytest.fixture
def history(tmp_path, make_model):
    make_model("vit").save_pretrained(tmp_path / "original")
    return RequestHistory.create(tmp_path / "history", tmp_path / "original")


@pytest.fixture
def vit_trainer(make_model, make_samples, tmp_path):
    """SGD without clipping, all four samples of each set in every batch: a step is `-RATE` times a gradient."""

    def make(trainer_class=OrthoGradTrainer, *, max_steps=1, options=None, **config):
        args = OrthoGradConfig(
            str(tmp_path), max_steps=max_steps, learning_rate=RATE, lr_scheduler_type="constant",
            max_grad_norm=0, per_device_train_batch_size=4, per_device_forget_batch_size=4, save_strategy="no",
            logging_steps=1, report_to="none", disable_tqdm=True, **({"projection": "none", "optim": "sgd"} | config),
        )  # fmt: skip
        sets = {"train_dataset": make_samples("vit", 4, seed=1), "forget_dataset": make_samples("vit", 4, seed=2)}
        return trainer_class(make_model("vit"), args, **sets, **(options or {}))

    return make
