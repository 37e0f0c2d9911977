"""Time and peak memory of one step as ratios to GradDiff, the same losses and batches without a projection.

    python benchmarks/step_cost.py                       # CPU: four models, full parameters and LoRA
    python benchmarks/step_cost.py --device cuda --bf16 --models whisper-large-v3 vit-l-16 --samples 8 32
    python benchmarks/step_cost.py --estimates           # beside each, what `estimate()` says beforehand
    python benchmarks/step_cost.py --errors              # also each Gram matrix against float64
    python benchmarks/step_cost.py --results two_pass --samples 8 --train full --methods graddiff two_pass gram gram_kl \\
        --memory_methods                                 # all four take part in every round
    python benchmarks/step_cost.py --results two_pass --samples 8 --train full --methods two_pass gram \\
        --models wav2vec2-base-12s --repeats 4 --memory_methods  # more rounds
    python benchmarks/step_cost.py --results stored --samples 8 --train full --models vit-b-16 \\
        --methods graddiff gram gram_kl gram_kl_stored  # a classifier's starting predictions found once
    python benchmarks/step_cost.py --results stored_tokens --samples 8 --train full --models llama-124m whisper-tiny \\
        --methods graddiff gram gram_kl gram_kl_stored --memory_methods --repeats 5  # of tokens; Whisper had 3 rounds
    python benchmarks/step_cost.py --results stored_lora --samples 8 --train lora --models vit-b-16 --repeats 4 \\
        --methods graddiff gram gram_kl gram_kl_stored  # under an adapter
    python benchmarks/step_cost.py --report              # table and plot from what was measured so far

Methods of one model take turns within one process, and the median of their times is kept. Each peak of memory is that of
a single step: on a CPU resident memory of a fresh process, beyond what it held before the step; on a GPU
`max_memory_allocated`, which needs no process of its own. Measurements are appended to a file of JSON lines; those already there are skipped.

Methods: GradDiff; OrthoGrad by the engines gram, func and loop; gram_chunks, with k retain samples in
chunks of k / 8 and as many forget samples; TorchJD's autogram, whose Gram matrix is that of all m + k losses, followed by a weighted
backward pass; Opacus' ghost clipping, which finds norms alone. A method that cannot run a model says why.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from cost_cases import CASES, METHODS, gram_errors, make_setup

from hf_orthograd.data import Batch
from hf_orthograd.preparation import estimate_step


RESULTS = Path(__file__).parent / "results"
_BASELINE = "graddiff"
_TWO_PASSES = "two_pass"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "torchjd", "opacus"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _memory(field: str) -> int:
    """Bytes of resident memory, now ("VmRSS") or at the peak ("VmHWM")."""
    return next(
        int(line.split()[1]) * 1024 for line in _read("/proc/self/status").splitlines() if line.startswith(field)
    )


def run_step(step, setup, arguments: argparse.Namespace) -> float:
    """Seconds of one step from the batches to `p.grad`."""
    gc.collect()
    with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bf16):
        if arguments.device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            seconds = start.elapsed_time(end) / 1000
        else:
            begin = time.perf_counter()
            step()
            seconds = time.perf_counter() - begin
    setup.model.zero_grad(set_to_none=True)
    return seconds


def time_methods(name: str, lora: bool, samples: int, methods: list[str], arguments) -> dict:
    """Median seconds of each method, or the reason why it cannot run."""
    setup = make_setup(name, lora, samples, arguments.device)
    small = make_setup(name, lora, 1, arguments.device)
    steps, times, failures = {}, {method: [] for method in methods}, {}
    for round_number in range(arguments.repeats):
        for method in methods:
            ours = method in (_BASELINE, _TWO_PASSES, "gram", "gram_kl", "gram_kl_stored")
            if method in failures or (round_number and not ours):
                continue
            try:
                if method not in steps:  # libraries load and kernels are chosen at their first use
                    run_step(METHODS[method](small), small, arguments)
                    steps[method] = METHODS[method](setup)
                seconds = run_step(steps[method], setup, arguments)
            except (
                Exception
            ) as error:  # what stops a peer is its result; ours must not be stopped, but by a small device
                if ours and not isinstance(error, torch.OutOfMemoryError):
                    raise
                setup.model.zero_grad(set_to_none=True)
                failures[method] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                continue
            times[method].append(seconds)
            print(f"{name} {'lora' if lora else 'full'} k={samples} {method}: {seconds:.2f} s", flush=True)
    return {
        method: {"seconds": statistics.median(values), "times": values} if values else {"failure": failures[method]}
        for method, values in times.items()
    }


def peak_of_method(name: str, lora: bool, samples: int, method: str, arguments) -> dict:
    """Bytes at the peak of a single step; on a CPU in a process of its own."""
    setup = make_setup(name, lora, samples, arguments.device)
    small = make_setup(name, lora, 1, arguments.device)
    try:
        run_step(METHODS[method](small), small, arguments)  # libraries load at their first use
        del small
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model_bytes = sum(parameter.nbytes for parameter in setup.model.parameters())
        before = _memory("VmRSS") - model_bytes if arguments.device == "cpu" else 0
        run_step(METHODS[method](setup), setup, arguments)
        peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else _memory("VmHWM") - before
    except Exception as error:  # as above: why it cannot run is the result
        return {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    return {"bytes": peak}


def error_of_method(name: str, method: str, arguments) -> dict:
    """Of the Gram matrix of four retain samples."""
    try:
        return {"error": gram_errors(make_setup(name, False, 4, arguments.device), [method])[method]}
    except Exception as error:  # as above
        return {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}


def estimate_of_method(name: str, lora: bool, samples: int, method: str, arguments) -> dict:
    """What `OrthoGradTrainer.estimate()` would say: ratio of times, and bytes at the peak."""
    setup = make_setup(name, lora, samples, arguments.device)
    both = ({key: value[:2] for key, value in batch.items()} for batch in (setup.forget, setup.retain))
    forget, retain = (Batch(inputs, len(inputs["labels"])) for inputs in both)
    estimate = estimate_step(
        *(setup.model, setup.losses, setup.parameters, forget, retain),
        engine="none" if method == _BASELINE else method,
        num_forget=samples,
        num_retain=samples,
        chunk_size=None,
        optimizer_bytes=0,
    )
    return {"estimated_time": estimate.relative_time, "estimated_bytes": estimate.memory}


def run_task(task: list[str], arguments: argparse.Namespace) -> dict:
    gc.collect()
    torch.cuda.empty_cache()  # of the task before; nothing without a GPU
    kind, name, lora, samples, *methods = task
    case = name, lora == "1", int(samples)
    if kind == "time":
        return time_methods(*case, methods, arguments)
    if kind == "error":
        return error_of_method(name, methods[0], arguments)
    return {"memory": peak_of_method, "estimate": estimate_of_method}[kind](*case, methods[0], arguments)


def in_fresh_process(task: list[str], arguments: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--device", arguments.device, "--repeats", str(arguments.repeats)]
    command += ["--bf16"] if arguments.bf16 else []
    # freed tensors go back to the system, or the peak would be that of the allocator's history
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if task[0] == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    done = subprocess.run([*command, "--task", *task], env=environment, stdout=subprocess.PIPE, text=True)
    print("".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith("{")), end="")
    if done.returncode:
        return {"failure": f"the process ended with {done.returncode} (-9: out of memory)"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Runs what is not in the file yet, the main comparison first."""
    known = {(entry["kind"], *entry["case"]) for entry in read(path)}
    cases = [
        (name, lora, samples)
        for samples in arguments.samples
        for lora in ({"full": [False], "lora": [True], "both": [False, True]}[arguments.train])
        for name in arguments.models
        if not (arguments.device == "cpu" and name.startswith("whisper") and samples > 8)
    ]
    for name, lora, samples in cases:
        tasks = [("time", list(arguments.methods))] + [("memory", [method]) for method in arguments.memory_methods]
        if arguments.errors and not lora and samples == min(arguments.samples):
            tasks += [("error", [method]) for method in ("gram", "torchjd")]
        if arguments.estimates:
            ours = [_BASELINE, "gram", *({"func", "loop"}.intersection(arguments.methods))]
            tasks += [("estimate", [method]) for method in ours]
        for kind, methods in tasks:
            case = (name, lora, samples, *methods)
            if (kind, *case) in known:
                continue
            task = [kind, name, str(int(lora)), str(samples), *methods]
            result = in_fresh_process(task, arguments) if arguments.device == "cpu" else run_task(task, arguments)
            entry = {"kind": kind, "case": case, "result": result, "date": str(date.today())}
            entry |= {"machine": machine(arguments.device), "versions": versions(), "bf16": arguments.bf16}
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(kind, case, json.dumps(result), flush=True)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in _read(str(path)).splitlines()]


def collect(entries: list[dict]) -> dict[tuple, dict[str, dict]]:
    """For each (model, lora, samples) and method: seconds, bytes, failure."""
    table: dict[tuple, dict[str, dict]] = {}
    for entry in entries:
        name, lora, samples, *methods = entry["case"]
        row = table.setdefault((name, bool(lora), samples), {})
        results = entry["result"] if entry["kind"] == "time" else {methods[0]: entry["result"]}
        if "failure" in results and entry["kind"] == "time":
            results = dict.fromkeys(methods, results)
        if entry["kind"] == "time" and _BASELINE not in methods:
            continue  # more rounds of a comparison with two passes
        for method, result in results.items():
            row.setdefault(method, {}).update(result)
    return table


def to_two_passes(entries: list[dict], case: tuple, method: str) -> list[float]:
    """The method's time over that of two backward passes, in each round in which both took turns."""
    found = []
    for entry in entries:
        name, lora, samples, *_ = entry["case"]
        result = entry["result"]
        both = (result.get(method, {}), result.get(_TWO_PASSES, {})) if entry["kind"] == "time" else ()
        if (name, bool(lora), samples) == case and both and all("times" in one for one in both):
            rounds = zip(*(one["times"] for one in both), strict=False)  # peers are in the first alone
            found += [own / other for own, other in rounds]
    return found


_OVER_TWO_PASSES = """ "x two passes": of the ratios within each round, which a machine that slows down changes less, the median, how many rounds, and the extremes."""


def to_markdown(entries: list[dict]) -> str:
    last = entries[-1]
    twice = any(_TWO_PASSES in entry["case"] for entry in entries)
    found = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    lines = [
        "# Cost of a step, as ratios to GradDiff",
        "",
        f"{last['date']}, {last['machine']}, {'bf16 autocast' if last['bf16'] else 'float32'}, {found}. Medians of "
        "interleaved steps, peaks of single steps; k retain and as many forget samples, random weights of true sizes, "
        "LoRA of rank 16 on queries and values. Made by `benchmarks/step_cost.py`."
        + (_OVER_TWO_PASSES if twice else ""),
        "",
        "| model | trained | k | method | time | x GradDiff | estimated | peak memory | x GradDiff | "
        "estimated | error of K |" + (" x two passes |" if twice else ""),
        "|---" * (11 + twice) + "|",
    ]
    for (name, lora, samples), row in collect(entries).items():
        base = row[_BASELINE]
        for method, result in row.items():
            cells = []
            for key, unit, scale in (("seconds", "s", 1), ("bytes", "GiB", 1 << 30)):
                if key in result and key in base:
                    cells += [f"{result[key] / scale:.3g} {unit}", f"{result[key] / base[key]:.2f}"]
                else:
                    cells += [result.get("failure", ""), ""] if key == "seconds" else ["", ""]
                if key == "seconds":
                    cells.append(f"{result['estimated_time']:.2f}" if "estimated_time" in result else "")
                else:
                    guessed = result.get("estimated_bytes")
                    cells.append(f"{guessed / scale:.3g} GiB" if guessed else "")
            cells.append(f"{result['error']:.0e}" if "error" in result else "")
            if twice:
                ratios = to_two_passes(entries, (name, lora, samples), method)
                cells.append(_spread(ratios) if method != _TWO_PASSES else "1")
            model = f"{name} ({CASES[name].reads})"
            lines.append(f"| {model} | {'LoRA' if lora else 'all'} | {samples} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(ratios: list[float]) -> str:
    if len(ratios) < 2:
        return "".join(f"{ratio:.2f} (one round)" for ratio in ratios)
    return f"{statistics.median(ratios):.2f} ({len(ratios)} rounds, {min(ratios):.2f} to {max(ratios):.2f})"


def plot(entries: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = collect(entries)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.5 + 0.42 * len(table)), sharey=True)
    methods = [method for method in METHODS if method != _BASELINE]
    labels = [f"{name}, {'LoRA' if lora else 'all'}, k={samples}" for name, lora, samples in table]
    for axis, key, title in ((axes[0], "seconds", "time"), (axes[1], "bytes", "peak memory")):
        for i, method in enumerate(methods):
            points = [
                (row[method][key] / row[_BASELINE][key], y)
                for y, row in enumerate(table.values())
                if key in row.get(method, {}) and key in row[_BASELINE]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "os^DvPX"[i], label=method)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"{title} of a step / that of GradDiff", yticks=range(len(labels)))
        axis.grid(alpha=0.3)
    axes[0].set_yticklabels(labels)
    axes[0].invert_yaxis()
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu_models = ["whisper-tiny", "vit-b-16", "wav2vec2-base", "llama-124m"]
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--models", nargs="+", default=cpu_models, choices=list(CASES))
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32], help="k = m; Whisper on a CPU stops at 8")
    parser.add_argument("--train", default="both", choices=["full", "lora", "both"])
    parser.add_argument("--methods", nargs="+", default=["graddiff", "gram"], choices=list(METHODS), help="timed")
    parser.add_argument("--memory_methods", nargs="*", default=["graddiff", "gram"], choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds; other methods take part in one")
    parser.add_argument("--errors", action="store_true", help="Gram matrices of four samples against float64")
    parser.add_argument("--estimates", action="store_true", help="beside each, what `estimate()` says beforehand")
    parser.add_argument("--results", default="step_cost", help="name of the files with the results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(run_task(arguments.task, arguments)))
        return
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{arguments.results}_{arguments.device}"
    if not arguments.report:
        measure(arguments, stem.with_suffix(".jsonl"))
    entries = read(stem.with_suffix(".jsonl"))
    stem.with_suffix(".md").write_text(to_markdown(entries))
    plot(entries, stem.with_suffix(".png"))
    print(to_markdown(entries))


if __name__ == "__main__":
    main()
