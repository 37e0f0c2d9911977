"""Models of true sizes with random weights, their batches, and the steps that `step_cost.py` compares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_orthograd.data import Batch
from hf_orthograd.gradients import (
    ForgetBatch,
    FunctionalEngine,
    GramEngine,
    LoopEngine,
    PlainEngine,
    summarize_step,
)
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import ALONE, Parameters
from hf_orthograd.preparation import KeepPredictions, StartingModel, StoredPredictions
from hf_orthograd.projection import solve_projection, solve_projections, update_weights


ALPHA = 0.5
LORA_RANK = 16


@dataclass(frozen=True)
class Case:
    """A model and what it reads.

    Attributes:
        make (`Callable`): Builds the model.
        inputs (`dict[str, tuple]`): Shape of one sample's tensors, and for integers the range they are drawn from.
        reads (`str`): The same in words, for the table.
    """

    make: Callable[[], nn.Module]
    inputs: dict[str, tuple]
    reads: str

    def batch(self, size: int, seed: int, device: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        batch = {}
        for name, (shape, *limits) in self.inputs.items():
            if limits:
                batch[name] = torch.randint(*limits, (size, *shape), generator=generator)
            else:
                batch[name] = torch.randn(size, *shape, generator=generator)
        if "input_ids" in batch:
            batch["labels"] = batch["input_ids"].clone()
        return {name: tensor.to(device) for name, tensor in batch.items()}


def _whisper(width: int, layers: int, heads: int, mels: int):
    config = transformers.WhisperConfig(
        vocab_size=51865, num_mel_bins=mels, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, dropout=0.0,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _vit(width: int, layers: int, heads: int):
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _wav2vec2():
    # without dropout and SpecAugment, which stop the peers
    config = transformers.Wav2Vec2Config(
        vocab_size=32, pad_token_id=0, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, apply_spec_augment=False,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=50257, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _smollm2():
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _llama_1b():
    """The sizes of Llama 3.2 1B."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _speech(mels: int) -> dict:
    return {"input_features": ((mels, 3000),), "labels": ((40,), 10, 50000)}


_IMAGE = {"pixel_values": ((3, 224, 224),), "labels": ((), 0, 10)}

CASES = {
    "whisper-tiny": Case(lambda: _whisper(384, 4, 6, 80), _speech(80), "30 s, 40 tokens"),
    "vit-b-16": Case(lambda: _vit(768, 12, 12), _IMAGE, "224 x 224"),
    "wav2vec2-base": Case(_wav2vec2, {"input_values": ((32000,),), "labels": ((12,), 1, 32)}, "2 s, 12 letters"),
    # about the mean length of an utterance of LibriSpeech
    "wav2vec2-base-12s": Case(
        _wav2vec2, {"input_values": ((192000,),), "labels": ((120,), 1, 32)}, "12 s, 120 letters"
    ),
    "llama-124m": Case(_llama, {"input_ids": ((128,), 10, 50257)}, "128 tokens"),
    "smollm2-135m": Case(_smollm2, {"input_ids": ((128,), 10, 49152)}, "128 tokens"),
    # for accelerators
    "whisper-large-v3": Case(lambda: _whisper(1280, 32, 20, 128), _speech(128), "30 s, 40 tokens"),
    "llama-1b": Case(_llama_1b, {"input_ids": ((128,), 10, 128256)}, "128 tokens"),
    "vit-l-16": Case(lambda: _vit(1024, 24, 16), _IMAGE, "224 x 224"),
}


@dataclass
class Setup:
    """One model with both its batches.

    Attributes:
        model (`torch.nn.Module`): In training mode, possibly with an adapter.
        parameters ([`Parameters`]): Those that are trained.
        losses (`PerSampleLoss`): Of the model.
        forget, retain (`dict`): The batches.
    """

    model: nn.Module
    parameters: Parameters
    losses: PerSampleLoss
    forget: dict
    retain: dict


def make_setup(name: str, lora: bool, samples: int, device: str) -> Setup:
    torch.manual_seed(0)
    case = CASES[name]
    with torch.device(device):  # where random weights of a large model take no time
        base = case.make()
    model = base
    if lora:
        model = get_peft_model(base, LoraConfig(r=LORA_RANK, target_modules=["q_proj", "v_proj"]))
    model = model.to(device).train()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    batches = (case.batch(samples, seed, device) for seed in (1, 2))
    return Setup(model, Parameters(trained, {}), PerSampleLoss(base), *batches)


def _engine_step(
    engine_class, parts: int | None = None, make_term: Callable[[Setup], KeepPredictions] | None = None
) -> Callable[[Setup], Callable[[], None]]:
    def prepare(setup: Setup) -> Callable[[], None]:
        engine, size = engine_class(setup.parameters, setup.losses), len(setup.retain["labels"])
        forget, device = setup.forget, setup.parameters.device
        if parts is not None:  # retain samples in the memory of a part of them; forget samples have to fit it
            engine.chunk_size = max(1, size // parts)
            forget = {name: tensor[: engine.chunk_size] for name, tensor in forget.items()}

        term = make_term(setup) if make_term is not None else None
        rows = torch.arange(size, device=device)

        def step() -> None:
            batches = [ForgetBatch(forget, len(forget["labels"]))], [Batch(setup.retain, size, rows=rows)]
            gradients = engine.measure(setup.model, *batches, retain_term=term)
            grams = summarize_step(gradients).grams
            projection = solve_projections(grams) if grams else None
            names = gradients.parameters.projected
            weights = update_weights(ALPHA, projection, names, device=device, has_term=term is not None)
            gradients.combine(weights).backward()

        return step

    return prepare


def _start_at_hand(setup: Setup) -> KeepPredictions:
    return KeepPredictions(StartingModel(setup.model), setup.losses)


def _start_stored(setup: Setup) -> KeepPredictions:
    size = len(setup.retain["labels"])
    batch = Batch(setup.retain, size, rows=torch.arange(size, device=setup.parameters.device))
    answer = partial(StartingModel(setup.model).outputs, setup.losses)
    stored = StoredPredictions.find(answer, setup.losses, [batch], size, ALONE)
    return KeepPredictions(stored, setup.losses)


def _two_pass_step(setup: Setup) -> Callable[[], None]:
    """GradDiff with a backward pass for each batch: half the memory, for who may call backward twice."""

    def step() -> None:
        (-(1 - ALPHA) * setup.losses(setup.model, setup.forget).mean()).backward()
        (ALPHA * setup.losses(setup.model, setup.retain).mean()).backward()

    return step


def _concatenated(setup: Setup) -> Mapping:
    return {name: torch.cat((tensor, setup.retain[name])) for name, tensor in setup.forget.items()}


def _weights(gram: Tensor, num_forget: int) -> Tensor:
    """Weights of all m + k losses in the update, from the Gram matrix of all of them."""
    num_retain = len(gram) - num_forget
    rows = torch.zeros(1 + num_retain, len(gram), dtype=torch.float64, device=gram.device)
    rows[0, :num_forget] = 1 / num_forget
    rows[1:, num_forget:] = torch.eye(num_retain)
    coefficients = solve_projection(rows @ gram.double() @ rows.T).coefficients
    retain = ALPHA / num_retain + (1 - ALPHA) * coefficients
    return torch.cat((-(1 - ALPHA) * rows[0, :num_forget], retain.to(rows))).float()


def _torchjd_step(setup: Setup) -> Callable[[], None]:
    from torchjd.autogram import Engine

    engine, inputs = Engine(setup.model, batch_dim=0), _concatenated(setup)
    num_forget = len(setup.forget["labels"])

    def step() -> None:
        losses = setup.losses(setup.model, inputs)
        gram = engine.compute_gramian(losses)
        losses.backward(_weights(gram, num_forget))

    return step


def _opacus_step(setup: Setup) -> Callable[[], None]:
    """Norms alone, the diagonal of the Gram matrix: less than a projection needs."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    inputs = _concatenated(setup)
    wrapped = GradSampleModuleFastGradientClipping(setup.model, strict=False, loss_reduction="sum")

    def step() -> None:
        wrapped.enable_hooks()
        losses = setup.losses(wrapped, inputs)
        losses.sum().backward(retain_graph=True)
        norms = wrapped.get_norm_sample()
        wrapped.disable_hooks()
        wrapped.zero_grad()
        (losses @ norms.clamp(max=1.0).to(losses)).backward()

    return step


# name to a function that takes a setup and returns one whole step up to `p.grad`
METHODS: dict[str, Callable[[Setup], Callable[[], None]]] = {
    "graddiff": _engine_step(PlainEngine),
    "two_pass": _two_pass_step,
    "gram": _engine_step(GramEngine),
    "gram_kl": _engine_step(GramEngine, make_term=_start_at_hand),
    "gram_kl_stored": _engine_step(GramEngine, make_term=_start_stored),
    "gram_chunks": _engine_step(GramEngine, parts=8),
    "func": _engine_step(FunctionalEngine),
    "loop": _engine_step(LoopEngine),
    "torchjd": _torchjd_step,
    "opacus": _opacus_step,
}


def gram_errors(setup: Setup, methods: list[str]) -> dict[str, float]:
    """Largest error of the retain samples' Gram matrix, relative to norms, against one float64 backward per sample."""

    def retain_block(engine_class) -> Tensor:
        engine = engine_class(setup.parameters, setup.losses)
        sizes = len(setup.forget["labels"]), len(setup.retain["labels"])
        batches = [ForgetBatch(setup.forget, sizes[0])], [Batch(setup.retain, sizes[1])]
        return engine.measure(setup.model, *batches).gram[1:, 1:]

    found = {}
    if "gram" in methods:
        found["gram"] = retain_block(GramEngine)
    if "torchjd" in methods:
        from torchjd.autogram import Engine

        engine = Engine(setup.model, batch_dim=0)
        found["torchjd"] = engine.compute_gramian(setup.losses(setup.model, setup.retain)).detach().double()
    setup.model.double()
    for batch in (setup.forget, setup.retain):
        batch.update({name: value.double() for name, value in batch.items() if value.is_floating_point()})
    expected = retain_block(LoopEngine)
    norms = expected.diagonal().sqrt()
    return {name: ((gram - expected).abs() / torch.outer(norms, norms)).max().item() for name, gram in found.items()}
