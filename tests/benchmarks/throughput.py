"""Pairs per second of this project and of TRL: the same model, rows, batches, optimiser and precision, one after the other.

    make bench                                                    # or, with options:
    .venv/bin/python tests/benchmarks/throughput.py [DATA] [--pairs N] [--repetitions N] [--dtype bfloat16] [--output FOLDER]

`DATA` is what `data.train` takes (default: the harmless rows of Anthropic HH if they lie in ../shared, else the embedded world).
Nothing of the rows is printed. First the losses of ten steps must agree; then every system runs in turn, each alone on the
machine, as often as asked. Rates are those of the steps after the first two; what comes before the first step is apart.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from caldpo_ray.config import DataSection
from caldpo_ray.data import make_row
from caldpo_ray.formats import get_format, recognise
from caldpo_ray.models import load_tokenizer
from caldpo_ray.schema import BadRow, RawRecord, Row
from caldpo_ray.sources import iterate, list_sources

ROOT = Path(__file__).parents[2]
HH = ROOT.parent / "shared/data/hh-rlhf/harmless-base-test.jsonl.gz"
BATCH_SIZE, MAX_LENGTH, BETA, LEARNING_RATE = 8, 512, 0.1, 1e-4
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
FIRST_STEADY_STEP, CHECKED_STEPS, TOLERANCE = 2, 10, 1e-3


@dataclass(frozen=True)
class Measured:
    """One run: losses and seconds of its steps, seconds before the first one, and peak resident memory in MiB."""

    losses: list[float]
    step_seconds: list[float]
    setup_seconds: float
    peak_mib: float

    @property
    def seconds_per_pair(self) -> float:
        return statistics.fmean(self.step_seconds[FIRST_STEADY_STEP:]) / BATCH_SIZE


@dataclass(frozen=True)
class Setting:
    """What all systems share."""

    folder: Path
    model: Path
    rows: Path
    dtype: str
    num_workers: int


# -- the two systems -----------------------------------------------------------------------------------------------------


def run_trl(setting: Setting, precompute: bool, lora: bool) -> Measured:
    settings = {
        "model": str(setting.model), "rows": str(setting.rows), "folder": str(setting.folder / "trl"), "dtype": setting.dtype,
        "batch_size": BATCH_SIZE, "max_length": MAX_LENGTH, "beta": BETA, "learning_rate": LEARNING_RATE,
        "precompute": precompute, "lora": LORA if lora else None,
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("trl_run.py")), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"TRL failed:\n{done.stderr[-3000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run_ours(setting: Setting, lora: bool) -> Measured:
    """`caldpo train` as a user runs it, with the reference log-probs in the store."""
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    config = {
        "run": {"name": "run", "output_dir": str(folder)},
        "model": {"name_or_path": str(setting.model), "dtype": setting.dtype},
        "data": {"train": str(setting.rows), "max_length": MAX_LENGTH, "shuffle": False},
        "reference": {"store": str(setting.folder / "store")},
        "objective": {"name": "dpo", "beta": BETA},
        "train": {
            "num_workers": setting.num_workers, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1.0,
        },
    }  # fmt: skip
    if lora:
        config["model"]["lora"] = {
            "r": LORA["r"],
            "alpha": LORA["lora_alpha"],
            "target_modules": LORA["target_modules"],
        }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    caldpo = [sys.executable, "-m", "caldpo_ray"]
    subprocess.run([*caldpo, "reference", "build", str(file)], check=True, stdout=subprocess.DEVNULL)
    started = time.time()
    process = subprocess.Popen([*caldpo, "train", str(file)], stdout=subprocess.DEVNULL)
    metrics, first, peaks = folder / "run" / "metrics.jsonl", 0.0, dict[int, float]()
    while process.poll() is None:
        if not first and metrics.exists():
            first = time.time()
        peaks |= policy_peaks(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    if process.returncode != 0:
        raise SystemExit(f"caldpo train failed with code {process.returncode}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [BATCH_SIZE / line["pairs_per_second"] for line in lines]
    return Measured([line["loss"] for line in lines], seconds, first - started - seconds[0], sum(peaks.values()))


def policy_peaks(driver: int) -> dict[int, float]:
    """Peak resident MiB so far of the policy workers below this driver, by pid."""
    found = {}
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                status = Path(f"/proc/{process.pid}/status").read_text()
                found[process.pid] = int(status.split("VmHWM:")[1].split()[0]) / 1024
        except (psutil.Error, OSError, IndexError):
            continue  # it ended meanwhile
    return found


SYSTEMS: dict[str, Callable[[Setting], Measured]] = {
    "TRL": lambda setting: run_trl(setting, precompute=False, lora=False),
    "TRL, reference precomputed": lambda setting: run_trl(setting, precompute=True, lora=False),
    "caldpo_ray, warm store": lambda setting: run_ours(setting, lora=False),
    "TRL, LoRA": lambda setting: run_trl(setting, precompute=False, lora=True),
    "caldpo_ray, LoRA, warm store": lambda setting: run_ours(setting, lora=True),
}
TRL, TRL_PRECOMPUTED, OURS, TRL_LORA, OURS_LORA = SYSTEMS
OURS_COLD = "caldpo_ray, cold store"


# -- what the machine could do ------------------------------------------------------------------------------------------


def machine_facts(setting: Setting) -> dict[str, float]:
    """In a process of its own: peak FLOP/s of a matrix product, and seconds to score one pair by the reference's function."""
    code = "import json, sys; from tests.benchmarks.throughput import measure_machine; measure_machine(*json.loads(sys.argv[1]))"
    arguments = json.dumps([str(setting.model), str(setting.rows), setting.dtype])
    done = subprocess.run(
        [sys.executable, "-c", code, arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_machine(model_path: str, rows_path: str, dtype: str) -> None:
    import torch

    from caldpo_ray.batching import head_chunk_positions, plan_batch
    from caldpo_ray.config import ModelSection, ReferenceSection
    from caldpo_ray.models import load_model
    from caldpo_ray.scoring import ResponseScorer, choose_layout, score_rows

    size = 3072
    left, right = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(6):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    rows = our_rows(Path(rows_path), model_path)
    model = load_model(ModelSection(name_or_path=model_path), dtype)
    scorer = ResponseScorer(model, pad_id=0)
    scorer.layout = choose_layout(scorer).layout
    lengths, scored = [row.num_tokens for row in rows], [sum(map(len, row.response_ids)) for row in rows]
    budget, chunk = ReferenceSection(store=None).batch_tokens, head_chunk_positions(model.config.vocab_size)
    started = time.perf_counter()
    for plan in plan_batch(lengths, scored, 1, budget, chunk)[0]:
        score_rows(scorer, [rows[place] for place in plan.places], plan.num_head_chunks)
    print(
        json.dumps(
            {
                "peak_flops": 2 * size**3 / min(times),
                "scoring_seconds_per_pair": (time.perf_counter() - started) / len(rows),
            }
        )
    )


def our_rows(file: Path, model: str) -> list[Row]:
    tokenizer, data = load_tokenizer(model, None, False), DataSection(train=str(file), max_length=MAX_LENGTH)
    lines = file.read_text().splitlines()
    return [make_row(json.loads(line), data, tokenizer, str(at), 2)[0] for at, line in enumerate(lines)]


def useful_flops(rows: Sequence[Row], config: dict[str, Any], shared: bool, passes: int) -> float:
    """Floating-point operations per pair that a system's own algorithm needs, without padding.

    `shared`: the prompt once and the LM head on responses only; else two whole sequences. `passes`: 3 for forward and
    backward, 4 with a reference's forward in every step. Attention counts the pairs that attend to each other.
    """
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    trunk = layers * (4 * width**2 + 3 * width * config["intermediate_size"])
    total = 0.0
    for row in rows:
        prompt, responses = len(row.prompt_ids), [len(ids) for ids in row.response_ids]
        if shared:
            tokens, scored = prompt + sum(responses), sum(responses)
            attended = prompt**2 / 2 + sum(prompt * count + count**2 / 2 for count in responses)
        else:
            tokens = scored = sum(prompt + count for count in responses)
            attended = sum((prompt + count) ** 2 / 2 for count in responses)
        total += 2 * (trunk * tokens + width * config["vocab_size"] * scored) + 4 * layers * width * attended
    return passes * total / len(rows)


# -- rows and model -----------------------------------------------------------------------------------------------------


def usable_rows(source: str, model: Path, count: int) -> Iterator[dict[str, str]]:
    """The first `count` pairs as plain texts that need no cutting."""
    tokenizer, data = load_tokenizer(str(model), None, False), DataSection(train=source, max_length=MAX_LENGTH)
    for file in list_sources(source):
        for batch in iterate(file, 256):
            for number, record in batch:
                pair = None if isinstance(record, BadRow) else as_pair(record, data, tokenizer, str(number))
                if pair is not None:
                    yield pair
                    count -= 1
                if not count:
                    return


def as_pair(record: RawRecord, data: DataSection, tokenizer: Any, name: str) -> dict[str, str] | None:
    try:
        _, num_cut = make_row(record, data, tokenizer, name, 2)
    except ValueError:
        return None
    example = get_format(recognise(record))(record)
    return (
        None
        if num_cut
        else {"prompt": str(example.prompt), "chosen": str(example.responses[0]), "rejected": str(example.responses[1])}
    )


def prepare(source: str, folder: Path, pairs: int, dtype: str, num_workers: int) -> Setting:
    from caldpo_ray.models import resolve_model

    sys.path.insert(0, str(ROOT / "examples/hh_harmless"))
    from make_model import main as make_model

    make_model(source, str(folder / "shape"))
    model = resolve_model(str(folder / "shape"), None, False, folder / "model", 0, folder / "models.json")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in usable_rows(source, Path(model.path), pairs)))
    return Setting(folder, Path(model.path), rows, dtype, num_workers)


# -- the table ----------------------------------------------------------------------------------------------------------


def require_same_losses(setting: Setting) -> dict[str, Measured]:
    """One run of each full-weights system; their losses must agree before anything is timed."""
    runs = {name: SYSTEMS[name](setting) for name in (TRL, OURS)}
    pairs = list(zip(runs[OURS].losses, runs[TRL].losses, strict=True))[:CHECKED_STEPS]
    worst = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    print(f"losses of {len(pairs)} steps agree to {worst:.1e}", flush=True)
    if len(pairs) < CHECKED_STEPS or worst > TOLERANCE:
        raise SystemExit(f"the losses of the two systems differ: {pairs}")
    return runs


def table(found: dict[str, Any]) -> str:
    columns = (
        "system",
        "pairs/s",
        "against TRL",
        "share of peak",
        "peak memory (MiB)",
        "seconds before the first step",
    )
    lines = [columns, ("---",) * len(columns)]
    for name, facts in found["systems"].items():
        rates = (
            f"{facts['pairs_per_second']:.2f}",
            f"{facts['against_trl']:.2f}x",
            f"{100 * facts['share_of_peak']:.0f} %",
        )
        rest = (f"{facts[key]:.0f}" if facts[key] else "" for key in ("peak_mib", "setup_seconds"))
        lines.append((name, *rates, *rest))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summarise(setting: Setting, runs: dict[str, list[Measured]], machine: dict[str, float]) -> dict[str, Any]:
    config = json.loads((setting.model / "config.json").read_text())
    rows = our_rows(setting.rows, str(setting.model))
    flops = {
        name: useful_flops(
            rows, config, shared="caldpo" in name, passes=3 if "caldpo" in name or "precomputed" in name else 4
        )
        for name in runs
    }
    seconds = {name: statistics.median(run.seconds_per_pair for run in several) for name, several in runs.items()}
    systems = {
        name: {
            "pairs_per_second": 1 / seconds[name],
            "all_pairs_per_second": [1 / run.seconds_per_pair for run in several],
            "share_of_peak": flops[name] / seconds[name] / machine["peak_flops"],
            "peak_mib": statistics.median(run.peak_mib for run in several),
            "setup_seconds": statistics.median(run.setup_seconds for run in several),
        }
        for name, several in runs.items()
    }
    cold = seconds[OURS] + machine["scoring_seconds_per_pair"]
    systems[OURS_COLD] = {
        "pairs_per_second": 1 / cold,
        "share_of_peak": flops[OURS] * 4 / 3 / cold / machine["peak_flops"],
        "peak_mib": None,
        "setup_seconds": None,
    }
    for name, facts in systems.items():
        facts["against_trl"] = (
            facts["pairs_per_second"] / systems[TRL_LORA if "LoRA" in name else TRL]["pairs_per_second"]
        )
    lengths = [(len(row.prompt_ids), *(len(ids) for ids in row.response_ids)) for row in rows]
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), **machine},
        "pairs": len(rows),
        "mean_tokens": dict(
            zip(("prompt", "chosen", "rejected"), map(statistics.fmean, zip(*lengths, strict=True)), strict=True)
        ),
        "dtype": setting.dtype,
        "workers": setting.num_workers,
        "systems": systems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=str(HH) if HH.exists() else None)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("bench"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = chosen.data
        if source is None:
            from caldpo_ray.world import create_world

            create_world(folder / "world")
            source = str(folder / "world" / "train.jsonl")
        setting = prepare(source, folder, chosen.pairs, chosen.dtype, chosen.workers)
        runs = {name: [] for name in SYSTEMS} | {name: [run] for name, run in require_same_losses(setting).items()}
        for repetition in range(chosen.repetitions):
            for name, system in SYSTEMS.items():
                if len(runs[name]) <= repetition:
                    runs[name].append(system(setting))
                    print(f"{name}: {1 / runs[name][-1].seconds_per_pair:.2f} pairs/s", flush=True)
        found = summarise(setting, runs, machine_facts(setting))
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "throughput.json").write_text(json.dumps(found, indent=1))
    (chosen.output / "throughput.md").write_text(table(found) + "\n")
    print(table(found))
    print(f"facts in {(chosen.output / 'throughput.json').absolute()}")


if __name__ == "__main__":
    main()
