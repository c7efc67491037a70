"""Speed and memory of this project and of TRL: the same model, rows, batches, optimiser and precision, one after the other.

    make bench                                                          # or, with options:
    .venv/bin/python -m tests.benchmarks.throughput [DATA] [--pairs N] [--repetitions N] [--dtype bfloat16] [--output FOLDER]

`DATA` is what `data.train` takes (default: the harmless rows of Anthropic HH if they lie in ../shared, else rows of the embedded
world at several ratios of prompt to response). Nothing of the rows is printed. First the losses of ten steps must agree, or this
ends with code 1; then every system runs in turn (A B C A B C), each alone on the machine; then the memory of the LM head, scaling,
and the stages before training (`rows.py`). `throughput.json` and `throughput.md` are written after each part, `rows.json` and
`rows.md` after the last. How rates are taken: see `systems.py`.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.benchmarks import head_memory, scaling
from tests.benchmarks.inputs import ABOUT_1B, HH, first_pairs, make_model, mixed_world_pairs, tokenised, write_lines
from tests.benchmarks.report import (
    TOLERANCES,
    Runs,
    compare_losses,
    compare_threads,
    machine,
    markdown,
    summarise,
)
from tests.benchmarks.systems import (
    FIRST_STEADY_STEP,
    LORA,
    OURS,
    OURS_COLD,
    SYSTEMS,
    TRL,
    TRL_BOTH,
    TRL_PRECOMPUTED,
    Measured,
    Setting,
    System,
    trl_weights,
    with_precompute,
)

CHECKED = (TRL, OURS, TRL_PRECOMPUTED, OURS_COLD)  # not LoRA: each system draws adapters of its own
STEPS = 12
PARTS = ("systems", "head", "scaling", "rows")
STARTED = time.monotonic()


def say(message: str) -> None:
    passed = int(time.monotonic() - STARTED)
    print(f"[{passed // 60:2d}:{passed % 60:02d}] {message}", flush=True)


def prepare(options: argparse.Namespace, folder: Path) -> Setting:
    """Model and rows, as texts, in files that every system reads."""
    source = options.data
    if source is None:
        source = str(write_lines(folder / "world.jsonl", mixed_world_pairs(options.pairs)))
    model = make_model(source, folder, ABOUT_1B if options.gpu else None)
    rows = write_lines(folder / "rows.jsonl", first_pairs(source, model, options.pairs))
    return Setting(
        folder, model, rows, options.batch_size, options.dtype, options.gpu, options.workers, options.threads, tuple(options.set),
        options.trl_weights,
    )  # fmt: skip


def run(system: System, setting: Setting) -> Measured:
    assert system.run is not None
    started = time.monotonic()
    measured = system.run(setting)
    say(f"{system.name}: {measured.rows_per_second:.2f} pairs/s ({time.monotonic() - started:.0f} s)")
    return measured


def choose_attention(setting: Setting) -> Setting:
    """TRL's attention: SDPA, or the faster of it and FlashAttention in a run each where the latter is installed for a GPU."""
    if not (setting.gpu and setting.dtype == "bfloat16" and importlib.util.find_spec("flash_attn")):
        return setting
    several = [replace(setting, trl_attention=name) for name in ("sdpa", "flash_attention_2")]
    rates = {each.trl_attention: run(TRL, each).rows_per_second for each in several}
    fastest = max(several, key=lambda each: rates[each.trl_attention])
    measured = ", ".join(f"{name} {rate:.2f} pairs/s" for name, rate in rates.items())
    say(f"TRL goes on with {fastest.trl_attention}: {measured}")
    return fastest


def first_runs(setting: Setting) -> tuple[Runs, dict[str, Any], list[float]]:
    """One run of each checked system, which counts as its first, and peaks between them.

    Exits with code 1 where losses differ, or the threads of the CPU where ours were not chosen.
    """
    runs: Runs = {}
    checks, peaks, tolerance = [], [peak_flops(setting)], TOLERANCES[setting.dtype]
    for system in CHECKED:
        measured = run(system, setting)
        for other, (first,) in runs.items():
            names = (system.name, other.name)
            if setting.threads is None and not setting.gpu:
                compare_threads(names, measured.extra["num_threads"], first.extra["num_threads"])
            checks.append(compare_losses(names, measured.losses, first.losses, tolerance))
        runs[system] = [measured]
        peaks.append(peak_flops(setting))
    largest = max(check["largest_difference"] for check in checks)
    say(f"losses of {checks[0]['steps']} steps agree to {largest:.1e}")
    return runs, {**checks[0], "largest_difference": largest, "systems": [system.name for system in CHECKED]}, peaks


def peak_flops(setting: Setting) -> float:
    """Of a large matrix product now, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.peak", setting.dtype, *(["cuda"] if setting.gpu else [])]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def all_runs(setting: Setting, repetitions: int, runs: Runs, first_peaks: list[float]) -> tuple[Runs, list[float]]:
    """All systems in turn, as often as asked; `runs` holds what ran already. The best peak of each repetition."""
    peaks = []
    for repetition in range(repetitions):
        found = [peak_flops(setting), *([] if repetition else first_peaks)]
        for system in SYSTEMS:
            several = runs.setdefault(system, [])
            if system is TRL_BOTH:
                several.append(with_precompute(runs[TRL_PRECOMPUTED][repetition]))
            elif len(several) <= repetition:
                several.append(run(system, setting))
                found.append(peak_flops(setting))
        peaks.append(max(found))
    return {system: runs[system] for system in SYSTEMS}, peaks


def costs_of(setting: Setting) -> tuple[dict[bool, Any], int]:
    """FLOPs of a forward pass, without and with LoRA, and the number of parameters."""
    from caldpo_ray.compute.flops import forward_cost
    from caldpo_ray.config import LoraSection, ModelSection
    from caldpo_ray.models import add_lora, load_model

    model = load_model(ModelSection(name_or_path=str(setting.model)), setting.dtype)
    plain, parameters = forward_cost(model, False), sum(p.numel() for p in model.parameters())
    lora = LoraSection(r=LORA["r"], alpha=LORA["lora_alpha"], target_modules=LORA["target_modules"])
    return {False: plain, True: forward_cost(add_lora(model, lora, 0), False)}, parameters


def facts_of(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    rows = tokenised(setting.rows, setting.model)
    means = [fmean(len(row.prompt_ids) for row in rows), *(fmean(len(r.response_ids[i]) for r in rows) for i in (0, 1))]
    return {
        "data": Path(options.data).name if options.data else "the embedded world",
        "pairs": len(rows),
        **dict(zip(("prompt_tokens", "chosen_tokens", "rejected_tokens"), means, strict=True)),
        "batch_size": setting.batch_size,
        "dtype": setting.dtype,
        "trl_weights": trl_weights(setting),
        "trl_micro_batch": setting.trl_micro_batch,
        "trl_attention": setting.trl_attention,
        "gpu": setting.gpu,
        "workers": setting.workers,
        "threads": setting.threads,
        "overrides": setting.overrides,
        "repetitions": options.repetitions,
    }


def write(found: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "throughput.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "throughput.md").write_text(markdown(found))


def measure_systems(setting: Setting, repetitions: int, costs: dict[bool, Any]) -> dict[str, Any]:
    say(f"first the losses of {len(CHECKED)} systems, in {repetitions} x {len(SYSTEMS) - 1} runs")
    runs, check, first_peaks = first_runs(setting)
    runs, peaks = all_runs(setting, repetitions, runs, first_peaks)
    rows = tokenised(setting.rows, setting.model)
    return {"check": check, "peak_flops": peaks, "systems": summarise(runs, peaks, rows, costs, setting.gpu)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        setting = choose_attention(prepare(options, Path(scratch)))
        costs, parameters = costs_of(setting)
        facts = {**facts_of(setting, options), "parameters": parameters}
        found: dict[str, Any] = {"machine": machine(), "setting": facts}
        if "systems" not in options.skip:
            found |= measure_systems(setting, options.repetitions, costs)
        write(found, options.output)
        if "head" not in options.skip:
            say(f"memory of the LM head: {len(head_memory.LENGTHS) + 1} processes")
            found["head_memory"] = head_memory.measure()
            write(found, options.output)
        if "scaling" not in options.skip:
            points = scaling.points(len(found["machine"]["gpus"]) if setting.gpu else 2)
            say(f"scaling: {len(points)} points")
            found["scaling"] = []
            for entry in scaling.measure(setting, points, say):
                found["scaling"].append(entry)
                write(found, options.output)
    if "rows" not in options.skip:
        numbers = [str(number) for number in options.rows]
        say(f"cost of the stages before training, for {', '.join(numbers)} rows")
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.rows", "--rows", *numbers, "--output", options.output], check=True
        )
    print(f"\n{markdown(found)}\nEvery run: {(options.output / 'throughput.json').absolute()}")
    if "rows" not in options.skip:
        print(f"The stages before training: {(options.output / 'rows.md').absolute()}")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", nargs="?", default=str(HH) if HH.exists() else None)
    add("--batch-size", type=int, help="default: 8 pairs, 32 on a GPU")
    add("--pairs", type=int, help="default: twelve batches")
    add("--repetitions", type=int, default=3)
    add("--dtype", default="float32", choices=tuple(TOLERANCES))
    add("--gpu", action="store_true", help="train about 1B parameters on a GPU")
    add("--workers", type=int, default=1, help="our policy workers")
    add("--threads", type=int, help="torch threads of each; default: the cores shared by them")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more of our config")
    add(
        "--trl-weights", default="float32", choices=tuple(TOLERANCES),
        help="TRL's where --dtype is bfloat16, without LoRA: its frozen weights are bfloat16 then",
    )  # fmt: skip
    add("--skip", nargs="+", default=[], choices=PARTS, help="parts that are neither measured nor in the files")
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of the stages before training")
    add("--output", type=Path, default=Path("bench"))
    options = parser.parse_args(arguments)
    options.batch_size = options.batch_size or (32 if options.gpu else 8)
    options.pairs = options.pairs or STEPS * options.batch_size
    if options.pairs % options.batch_size or options.pairs <= FIRST_STEADY_STEP * options.batch_size:
        parser.error("--pairs: whole batches, and more than the first two, which are not timed")
    return options


if __name__ == "__main__":
    main()
