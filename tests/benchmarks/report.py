"""From runs to numbers, and from numbers to Markdown."""

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from caldpo_ray.compute.flops import ForwardCost
from caldpo_ray.schema import Row
from tests.benchmarks.systems import TRL, TRL_LORA, TRL_PRECOMPUTED, Measured, System
from tests.benchmarks.work import our_flops, trl_flops

Runs = dict[System, list[Measured]]
PACKAGES = ("caldpo-ray", "torch", "transformers", "trl", "peft", "ray", "deepspeed")
MISSING = "–"
CHECKED_STEPS = 10
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}  # of losses, relative
REASONS = {
    "float32": "only the order of sums differs, and what becomes of it over the steps",
    "bfloat16": "bfloat16 keeps 8 bits, and the systems round at different places",
}


def compare_losses(
    names: tuple[str, str], losses: Sequence[float], others: Sequence[float], tolerance: float
) -> dict[str, Any]:
    """The largest relative difference of the first steps' losses. Exits with code 1 where one is above the tolerance, or NaN."""
    pairs = list(zip(losses, others, strict=True))[:CHECKED_STEPS]
    differences = [abs(one - other) / abs(other) for one, other in pairs]
    if not all(difference <= tolerance for difference in differences):
        listed = "".join(f"\n  step {at}: {one:.6f} and {other:.6f}" for at, (one, other) in enumerate(pairs, 1))
        raise SystemExit(f"losses of {' and of '.join(names)} differ by more than {tolerance:.0e}:{listed}")
    return {"steps": len(pairs), "largest_difference": max(differences), "tolerance": tolerance}


def compare_threads(names: tuple[str, str], threads: int, others: int) -> None:
    """Exits with code 1 where one of two systems computes with more threads."""
    if threads != others:
        raise SystemExit(
            f"{names[0]} computes with {threads} threads, {names[1]} with {others}: choose ours with --threads"
        )


def machine() -> dict[str, Any]:
    """What was measured on, without names of hosts."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    """As Linux calls it."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def own_flops(system: System, rows: Sequence[Row], cost: ForwardCost, gpu: bool) -> float:
    """FLOPs per pair of the system's own algorithm, its reference included where the timed seconds hold it."""
    if system.ours:
        return our_flops(cost, rows, system.with_reference)
    return trl_flops(cost, rows, system.with_reference, every_position=not gpu)


def summarise(
    runs: Runs, peaks: Sequence[float], rows: Sequence[Row], costs: dict[bool, ForwardCost], gpu: bool
) -> dict[str, Any]:
    """Medians over the repetitions; `peaks` are FLOP/s of the matrix product by repetition, `costs` by "is it LoRA"."""
    rates = {system: statistics.median(run.rows_per_second for run in several) for system, several in runs.items()}
    found = {}
    for system, several in runs.items():
        cost, timed = costs[system.lora], rows[-several[0].num_timed_rows :]
        tokens = statistics.fmean(row.num_tokens for row in timed)
        shares = [run.rows_per_second / peak for run, peak in zip(several, peaks, strict=True)]
        own, needed = own_flops(system, timed, cost, gpu), our_flops(cost, timed, with_reference=False)
        trl = rates[TRL_LORA if system.lora else TRL]
        found[system.name] = {
            "pairs_per_second": rates[system],
            "all_pairs_per_second": [run.rows_per_second for run in several],
            "against_trl": rates[system] / trl,
            "against_trl_precomputed": None if system.lora else rates[system] / rates[TRL_PRECOMPUTED],
            "tokens_per_second": rates[system] * tokens,
            "own_flops_per_pair": own,
            "share_of_peak": own * statistics.median(shares),
            "needed_flops_per_pair": needed,
            "needed_share_of_peak": needed * statistics.median(shares),
            "mib": {role: statistics.median(run.mib.get(role, 0.0) for run in several) for role in several[0].mib},
            "training_mib": statistics.median(_training_mib(run, system) for run in several),
            "whole_mib": statistics.median(run.whole_mib for run in several),
            "gpu_mib": max((run.gpu_mib for run in several if run.gpu_mib is not None), default=None),
            "setup_seconds": statistics.median(run.setup_seconds for run in several),
            "whole_seconds": statistics.median(run.whole_seconds for run in several),
            "other_seconds": statistics.median(run.other_seconds for run in several),
            "runs": [vars(run) for run in several],
        }
    return found


def _training_mib(run: Measured, system: System) -> float:
    """The processes that train: all of TRL, or our policy workers."""
    return run.mib["policy"] if system.ours else run.mib["driver"]


# -- Markdown -----------------------------------------------------------------------------------------------------------


def table(columns: dict[str, Callable[[Any], str]], entries: Iterable[Any]) -> str:
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[cell(entry) for cell in columns.values()] for entry in entries]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(key: str, form: str, unit: str = "") -> Callable[[Any], str]:
    def cell(entry: Any) -> str:
        value = entry.get(key)
        return MISSING if value is None else f"{value:{form}}{unit}"

    return cell


def _percent(key: str) -> Callable[[Any], str]:
    return lambda entry: f"{100 * entry[key]:.0f} %"


def systems_table(systems: dict[str, Any], gpu: bool) -> str:
    entries = [{"name": name, **facts} for name, facts in systems.items()]
    return table(
        {
            "system": lambda entry: entry["name"],
            "pairs/s": _number("pairs_per_second", ".2f"),
            "× TRL": _number("against_trl", ".2f"),
            "× TRL precomputed": _number("against_trl_precomputed", ".2f"),
            "tokens/s": _number("tokens_per_second", ".0f"),
            "share of peak, own work": _percent("share_of_peak"),
            "share of peak, needed work": _percent("needed_share_of_peak"),
            "peak memory of training (MiB)": _number("training_mib", ".0f"),
            "of the whole system (MiB)": _number("whole_mib", ".0f"),
            **({"peak GPU memory (MiB)": _number("gpu_mib", ".0f")} if gpu else {}),
            "seconds before the first step": _number("setup_seconds", ".0f"),
        },
        entries,
    )


LEGEND = """
Every figure is the median of the repetitions. *pairs/s*: steady state (all steps but the first two, each from the end of the one
before to its own), except for the cold store, where every step counts and the seconds that the reference had scored before
training began are added. LoRA is compared with TRL's LoRA. *tokens/s* counts a row's prompt once and each response once, for
every system alike. *Share of peak*: FLOPs without padding, over the FLOP/s of a large matrix product in the same dtype, measured
before every run and the best kept per repetition; *own work* is what the system's own algorithm executes (TRL: two whole
sequences, its head's logits twice, its reference), *needed work* what the task needs (a shared prompt once, the head on responses
alone). *Peak memory of training*: resident, of TRL's process, which holds its reference model too, or of all our policy workers,
which hold none; by process below. *Of the whole system*: of all processes at once, Ray's included, in proportional set size (a
page that several map is shared out among them), the largest of the looks taken every second or few. *Seconds before the first
step*: from the command, with imports, Ray's start, tokenising and loading (and TRL's precomputing).
""".strip()


def memory_table(systems: dict[str, Any]) -> str:
    entries = [{"name": name, **facts["mib"]} for name, facts in systems.items() if "policy" in facts["mib"]]
    return table(
        {
            "peak resident memory (MiB)": lambda entry: entry["name"],
            "policy workers": _number("policy", ".0f"),
            "reference actor": _number("reference", ".0f"),
            "feed": _number("feed", ".0f"),
            "driver": _number("driver", ".0f"),
            "all of Ray's own processes": _number("ray", ".0f"),
        },
        entries,
    )


def head_table(found: list[dict[str, Any]]) -> str:
    return table(
        {
            "system": lambda entry: entry["system"],
            "prompt + response (tokens)": _number("tokens", "d"),
            "all logits in float32 (MiB)": _number("all_logits_mib", ".0f"),
            "peak above the loaded model (MiB)": _number("above_mib", ".0f"),
            "peak of the process (MiB)": _number("peak_mib", ".0f"),
        },
        found,
    )


def scaling_table(found: list[dict[str, Any]]) -> str:
    return table(
        {
            "rows": lambda entry: entry["name"],
            "prompt (tokens)": _number("prompt_tokens", "d"),
            "response (tokens)": _number("response_tokens", "d"),
            "k": _number("k", "d"),
            "workers": _number("workers", "d"),
            "pairs/s": _number("pairs_per_second", ".2f"),
            "rows/s": _number("rows_per_second", ".2f"),
            "responses/s": _number("responses_per_second", ".2f"),
            "tokens/s": _number("tokens_per_second", ".0f"),
            "TRL pairs/s": _number("trl_pairs_per_second", ".2f"),
        },
        found,
    )


def markdown(found: dict[str, Any]) -> str:
    """The whole page; parts that were not measured are left out."""
    host, setting = found["machine"], found["setting"]
    gpus = f", {', '.join(host['gpus'])}" if setting["gpu"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    on_gpu = f", TRL's in micro-batches of {setting['trl_micro_batch']} with {setting['trl_attention']}"
    parts = [
        "# caldpo_ray and TRL on the same rows",
        f"{host['processor']}, {host['cores']} cores, {host['memory_gib']:.0f} GiB{gpus}; Python {host['python']}, {versions}.",
        f"{setting['pairs']} pairs of {setting['data']}, mean tokens: prompt {setting['prompt_tokens']:.0f}, chosen"
        f" {setting['chosen_tokens']:.0f}, rejected {setting['rejected_tokens']:.0f}; batch {setting['batch_size']} pairs"
        f"{on_gpu if setting['gpu'] else ''}, {setting['dtype']}, {setting['parameters'] / 1e6:.0f}M parameters; ours with"
        f" {setting['workers']} worker(s).",
    ]
    if "systems" in found:
        parts += [
            _trust(found),
            systems_table(found["systems"], setting["gpu"]),
            LEGEND,
            memory_table(found["systems"]),
        ]
    if "head_memory" in found:
        parts += [
            "## Memory of the LM head\n\nOne pair, vocabulary 151,936, forward and backward, float32, a trunk of two small layers.",
            head_table(found["head_memory"]),
        ]
    if "scaling" in found:
        parts += [
            "## Scaling\n\nThe second of two epochs, when our store knows all; rows of the embedded world, whose lengths are"
            " means and vary by a half.",
            scaling_table(found["scaling"]),
        ]
    return "\n\n".join(parts) + "\n"


def _trust(found: dict[str, Any]) -> str:
    """What the table of systems rests on: repetitions, the peak, and losses that agree."""
    setting, check = found["setting"], found["check"]
    return (
        f"{setting['repetitions']} repetition(s), interleaved. Peak of the matrix product by repetition:"
        f" {', '.join(f'{peak / 1e9:.0f}' for peak in found['peak_flops'])} GFLOP/s. The losses of {check['steps']} steps agree to"
        f" {check['largest_difference']:.1e} between {'; '.join(check['systems'])}. Allowed in {setting['dtype']} is"
        f" {check['tolerance']:.0e}: {REASONS[setting['dtype']]}. Not compared: LoRA, whose adapters each system draws for itself."
    )
