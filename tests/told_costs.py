"""The tables of README and docs on cost, made from the records of the benchmarks: `{page: tables}`, each a list of lines."""

import statistics
import sys

from test_studies import RESULTS
from told_images import EMPTY, rows


sys.path.insert(0, str(RESULTS.parent))
import step_cost


NAMES = {
    "whisper-tiny": "Whisper-tiny, 30 s",
    "vit-b-16": "ViT-B/16, 224 x 224",
    "llama-124m": "Llama of GPT-2 size, 128 tokens",
    "wav2vec2-base": "Wav2Vec2-base, 2 s",
    "wav2vec2-base-12s": "Wav2Vec2-base, 12 s",
    "smollm2-135m": "SmolLM2-135M, 128 tokens",
    "llama-1b": "Llama of 1 B parameters, 128 tokens",
    "vit-l-16": "ViT-L/16, 224 x 224",
}
STEPS = step_cost.read(RESULTS / "step_cost_cpu.jsonl")
PASSES = step_cost.read(RESULTS / "two_pass_cpu.jsonl")
FOUND = step_cost.collect(STEPS)


def over(case: tuple, quantity: str, method: str = "gram", base: str = "graddiff") -> float:
    return FOUND[case][method][quantity] / FOUND[case][base][quantity]


def steps(cases: list[tuple]) -> list[str]:
    return [
        f"| {NAMES[name]} | {'LoRA' if lora else 'all'} | {k} | {over((name, lora, k), 'seconds'):.2f} | {over((name, lora, k), 'bytes'):.2f} |"
        for name, lora, k in cases
    ]


README = [("whisper-tiny", False, 8), ("vit-b-16", False, 32), ("llama-124m", False, 32)]
README += [("vit-b-16", True, 32), ("llama-124m", True, 32)]
ALL = [*README[:3], ("wav2vec2-base", False, 32), ("vit-b-16", True, 32), ("wav2vec2-base", True, 32)]
ALL += [("whisper-tiny", True, 8), ("llama-124m", True, 32)]


def a_step() -> list[str]:
    return steps(ALL)


def a_step_in_short() -> list[str]:
    return steps(README)


def over_two_passes() -> list[str]:
    positions = {
        "whisper-tiny": 1500,
        "wav2vec2-base-12s": 599,
        "vit-b-16": 197,
        "llama-124m": 128,
        "wav2vec2-base": 99,
    }
    lines = []
    for name, length in positions.items():
        ratios = step_cost.to_two_passes(PASSES, (name, False, 8), "gram")
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        cells = [NAMES[name], str(length), "8", f"{statistics.median(ratios):.2f}", spread, str(len(ratios))]
        lines.append(f"| {' | '.join(cells)} |")
    for name, said in (
        ("vit-b-16", " ([earlier](../benchmarks/results/step_cost_cpu.md))"),
        ("llama-124m", " (earlier)"),
    ):
        (ratio,) = step_cost.to_two_passes(STEPS, (name, False, 32), "gram")
        lines.append(f"| {NAMES[name]}{said} | {positions[name]} | 32 | {ratio:.2f} | | 1 |")
    return lines


GPU = step_cost.collect(step_cost.read(RESULTS / "gpu_cuda.jsonl"))


def on_a_gpu() -> list[str]:
    cells = {}
    for name in ("smollm2-135m", "llama-1b", "vit-l-16"):
        base, ours, held = (GPU[(name, False, 16)][method] for method in ("graddiff", "gram", "gram_kl"))
        times = [f"{one['seconds'] / base['seconds']:.2f}" for one in (ours, held)]
        cells[NAMES[name]] = [*times, f"{ours['bytes'] / base['bytes']:.2f}"]
    return rows(cells)


def on_a_gpu_in_short() -> str:
    ours, held = (
        [own[method]["seconds"] / own["graddiff"]["seconds"] for own in GPU.values()] for method in ("gram", "gram_kl")
    )
    ranges = [f"{min(ratios):.1f} to {max(ratios):.1f}" for ratios in (ours, held)]
    return f'On an H200 a short step in bf16 took {ranges[0]} times as long as GradDiff\'s, with "kl" {ranges[1]}:'


def other_ways() -> list[str]:
    vit, whisper, llama, waves = (
        (name, False, 8) for name in ("vit-b-16", "whisper-tiny", "llama-124m", "wav2vec2-base")
    )

    def spread(method: str) -> str:
        times = [over(case, "seconds", method, "gram") for case in (vit, whisper, llama)]
        return f"{min(times):.1f} to {max(times):.1f}"

    def errors(case: tuple) -> str:
        theirs, ours = (FOUND[case][method]["error"] for method in ("torchjd", "gram"))
        return f"{100 * theirs:.1g} % ({ours:.0e})".replace("e-0", "e-")

    memory = {case: f"{over(case, 'bytes', 'torchjd', 'gram'):.1f}" for case in (vit, whisper, waves)}
    missed = f"Whisper {errors(whisper)}: it misses the tied vocabulary"
    cells = {
        "`torchjd` autogram, k = 8, Whisper, ViT, Llama": [
            *(spread("torchjd"), f"Whisper {memory[whisper]}, ViT {memory[vit]}", missed)
        ],
        "`torchjd` autogram, k = 8, Wav2Vec2": [
            *(f"{over(waves, 'seconds', 'torchjd', 'gram'):.1f}", memory[waves], errors(waves))
        ],
        "`torch.func`": [
            *(spread("func"), f"{over(('vit-b-16', False, 32), 'bytes', 'func', 'gram'):.1f} at k = 32", EMPTY)
        ],
    }
    return [line.replace("|  |", "| |") for line in rows(cells)]


def on_paper() -> list[str]:
    """As the benchmark wrote them."""
    written = (RESULTS / "memory_on_paper.md").read_text().splitlines()
    return [line for line in written if line.startswith("| ")][1:]


def an_adapter() -> str:
    found = step_cost.collect(step_cost.read(RESULTS / "smollm2_cost_cpu.jsonl"))[("smollm2-135m", True, 16)]
    time, memory = (found["gram"][of] / found["graddiff"][of] for of in ("seconds", "bytes"))
    return f"takes {time:.2f} times the time of GradDiff's and {memory:.2f} times its memory"


def a_retain_term_by_lora() -> str:
    found = step_cost.collect(step_cost.read(RESULTS / "retain_term_cost_cpu.jsonl"))[("vit-b-16", True, 8)]
    taken = step_cost.read(RESULTS / "stored_lora_cpu.jsonl")[0]["result"]
    times = zip(taken["gram_kl_stored"]["times"], taken["gram"]["times"], strict=True)
    stored = statistics.median(held / plain for held, plain in times)
    ratio = found["gram_kl"]["seconds"] / found["gram"]["seconds"]
    return f'With LoRA a ViT-B takes {ratio:.2f} times the time of "nll", and {stored:.2f} with predictions found once'


def stored_predictions() -> str:
    found = step_cost.collect(step_cost.read(RESULTS / "stored_cpu.jsonl"))[("vit-b-16", False, 8)]
    less = (found["gram_kl"]["bytes"] - found["gram_kl_stored"]["bytes"]) / 2**30
    return f"A step of a ViT-B takes {less:.1f} GiB less."


def one_summed_loss() -> str:
    ratios = {
        name: statistics.median(step_cost.to_two_passes(PASSES, (name, False, 8), "graddiff"))
        for name in ("wav2vec2-base-12s", "vit-b-16", "llama-124m")
    }
    assert all(abs(ratios[name] - 1) < 0.05 for name in ("vit-b-16", "llama-124m"))
    return f"One summed loss takes {ratios['wav2vec2-base-12s']:.1f} times as long as two passes on 12 s of speech, and as long on"


SAID = {
    "docs/modalities.md": [an_adapter],
    "docs/choosing_settings.md": [a_retain_term_by_lora, stored_predictions],
    "docs/cost.md": [one_summed_loss],
    "README.md": [on_a_gpu_in_short],
}
TABLES = {
    "README.md": [a_step_in_short],
    "docs/cost.md": [a_step, over_two_passes, other_ways, on_a_gpu],
    "docs/scaling.md": [on_paper],
}
