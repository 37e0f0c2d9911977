"""Memory of a step for models that do not fit this machine, counted on tensors without contents.

    python benchmarks/memory_on_paper.py

Each model is made on the meta device and counted by what `OrthoGradTrainer.estimate()` uses: parameters, gradients,
optimizer state, what the graph keeps, what the inner products keep. Attention keeps its inputs and its output, as
fused kernels do. "of 8 devices" has parameters and optimizer state sharded by FSDP2, k and m samples on each device.
Where `step_cost.py` has measured the same case, its figure stands beside. Writes benchmarks/results/memory_on_paper.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from cost_cases import CASES, LORA_RANK
from peft import LoraConfig, get_peft_model
from step_cost import collect, read
from torch import Tensor, nn
from transformers import AttentionInterface

from hf_orthograd.data import Batch
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters
from hf_orthograd.preparation import Estimate, estimate_step


RESULTS = Path(__file__).parent / "results"
DEVICES, ADAM = 8, 8


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps, without its work."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(module, query, key, value, attention_mask, **settings):
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("fused_on_paper", _attend)


@dataclass(frozen=True)
class Row:
    """A model as it would be trained.

    Attributes:
        name (`str`): For the table.
        make (`Callable`): Makes the model on the current device.
        inputs (`dict[str, tuple]`): Shape of one sample's tensors; those with limits are integers.
        lora (`bool`): Whether an adapter on queries and values is trained.
        samples (`int`): k, and as many forget samples.
        dtype (`torch.dtype`): Of the weights.
        measured (`tuple`, *optional*): The case of `step_cost.py`.
        optimizer_bytes (`int`): For each trained number.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: dict[str, tuple]
    lora: bool
    samples: int
    dtype: torch.dtype = torch.float32
    measured: tuple | None = None
    optimizer_bytes: int = ADAM

    def estimate(self) -> Estimate:
        with torch.device("meta"):
            base = self.make()
        base.set_attn_implementation("fused_on_paper")
        base = base.to(self.dtype).train()
        model = base
        if self.lora:
            with torch.device("meta"):
                model = get_peft_model(base, LoraConfig(r=LORA_RANK, target_modules=["q_proj", "v_proj"]))
        batch = {
            name: torch.empty(2, *shape, device="meta", dtype=torch.long if limits else self.dtype)
            for name, (shape, *limits) in self.inputs.items()
        }
        if "input_ids" in batch:
            batch["labels"] = batch["input_ids"].clone()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return estimate_step(
            *(model, PerSampleLoss(base), Parameters(trained, {}), Batch(batch, 2), Batch(batch, 2)),
            engine="gram",
            num_forget=self.samples,
            num_retain=self.samples,
            chunk_size=None,
            optimizer_bytes=self.optimizer_bytes,
        )


def llama(width: int, layers: int, heads: int, key_heads: int, inner: int) -> Callable[[], nn.Module]:
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads,
    )  # fmt: skip
    return lambda: transformers.LlamaForCausalLM(config)


def known(case: str, lora: bool, samples: int) -> Row:
    kind = "LoRA" if lora else "all"
    own = CASES[case]
    row = Row(f"{case} ({own.reads}), {kind}", own.make, own.inputs, lora, samples, optimizer_bytes=0)
    return Row(**{**row.__dict__, "measured": (case, lora, samples)})


TOKENS = {"input_ids": ((512,), 0, 32000)}
LARGE = CASES["whisper-large-v3"]
ROWS = [
    known("vit-b-16", False, 32),
    known("vit-b-16", True, 32),
    known("whisper-tiny", False, 8),
    known("llama-124m", False, 32),
    Row("ViT-L/16 (224 x 224), all", CASES["vit-l-16"].make, CASES["vit-l-16"].inputs, False, 32),
    Row("Whisper-large-v3 (30 s), all", LARGE.make, LARGE.inputs, False, 8),
    Row("Whisper-large-v3 (30 s), LoRA, bfloat16", LARGE.make, LARGE.inputs, True, 8, torch.bfloat16),
    Row("Llama 7 B (512 tokens), LoRA, bfloat16", llama(4096, 32, 32, 32, 11008), TOKENS, True, 8, torch.bfloat16),
    Row("Llama 7 B (512 tokens), all, bfloat16", llama(4096, 32, 32, 32, 11008), TOKENS, False, 8, torch.bfloat16),
    Row("Llama 70 B (512 tokens), LoRA, bfloat16", llama(8192, 80, 64, 8, 28672), TOKENS, True, 8, torch.bfloat16),
]


def main() -> None:
    costs = collect(read(RESULTS / "step_cost_cpu.jsonl"))
    lines = [
        "# Memory of a step, on paper",
        "",
        f"{date.today()}, torch {version('torch')}, transformers {version('transformers')}, peft {version('peft')}. GiB; k retain "
        f"and as many forget samples a step and device; AdamW, but no optimizer state beside what was measured; LoRA of rank "
        f"{LORA_RANK} on queries and values. Made by `benchmarks/memory_on_paper.py`, which says what is counted.",
        "",
        f"| model | k | trained | GradDiff | OrthoGrad | measured | each of {DEVICES} devices, FSDP2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = row.estimate()
        width = torch.finfo(row.dtype).bits // 8
        total = found.projected + found.frozen
        resident = width * total + row.optimizer_bytes * found.projected
        sharded = found.memory - resident * (1 - 1 / DEVICES)
        measured = costs[row.measured]["gram"]["bytes"] if row.measured else 0
        cells = [f"{number / (1 << 30):.1f}" for number in (found.plain_memory, found.memory, measured, sharded)]
        cells[2] = cells[2] if measured else ""
        lines.append(f"| {row.name} | {row.samples} | {found.projected:,} of {total:,} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    (RESULTS / "memory_on_paper.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
