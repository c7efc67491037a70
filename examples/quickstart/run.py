"""Quickstart: a small world, a supervised base, then Cal-DPO and DPO, judged by the world's true reward.

    make quickstart                                      # or, from the root of the checkout:
    python examples/quickstart/run.py [key=value ...]    # overrides for all four runs

Everything lands in runs/quickstart. The same command again resumes what was interrupted, and finishes at once when all
is there.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conclusion import CLEAR, Estimate, Result, conclude
from figure import draw

from caldpo_ray import load_config, train
from caldpo_ray.config import Config
from caldpo_ray.errors import InputError, RunError
from caldpo_ray.progress import say
from caldpo_ray.rows import write_atomically
from caldpo_ray.run_dir import RunDir, read_metrics
from caldpo_ray.store import list_references
from caldpo_ray.world import create_world, mean_and_standard_error, optimum_at_kl

CONFIGS = Path(__file__).parent
OUTPUT = Path("runs/quickstart")  # as in the configs
BASE = OUTPUT / "sft"
PREFERENCE_RUNS: tuple[tuple[str, list[str]], ...] = (
    ("cal_dpo.yaml", []),
    ("dpo.yaml", []),
    ("dpo.yaml", ["run.name=dpo_beta1", "objective.beta=1.0"]),
)
LAST_STEPS = 16  # the conclusion takes the log-ratio over these


def quickstart(overrides: Sequence[str]) -> None:
    """World, supervised base, three preference runs, samples, figure, conclusion."""
    seconds: dict[str, float] = {}
    with phase("world", seconds):
        create_world(OUTPUT / "world")
    with phase("sft", seconds):
        train(load_config(CONFIGS / "sft.yaml", overrides))
    configs = [load_config(CONFIGS / file, [*changes, *overrides]) for file, changes in PREFERENCE_RUNS]
    for config in configs:
        with phase(config.run.name, seconds):
            known = stored_log_probs(config)
            train(config)
            say(f"reference store: {known} log-probs before this run, {stored_log_probs(config) - known} more after it")
    runs = [RunDir(Path(config.run_dir)) for config in configs]
    with phase("samples", seconds):
        base, *sampled = sample([RunDir(BASE), *runs])
    with phase("figure", seconds):
        results = [
            measured(name_of(config), chosen_log_ratio(run), facts)
            for config, run, facts in zip(configs, runs, sampled, strict=True)
        ]
        dynamics = {result.name: train_lines(run) for result, run in zip(results[:2], runs, strict=False)}
        target = configs[0].objective.calibration_target
        # The base is the reference: its log-ratios are zero.
        draw(OUTPUT / "figure.png", dynamics, target, [*results, measured("SFT base", Estimate(0, 0), base)])
    report(results, seconds)


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a phase and note how long it took."""
    say(f"\n== {name}")
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def stored_log_probs(config: Config) -> int:
    """Responses in the reference store, which the preference runs share."""
    return sum(reference["entries"] for reference in list_references(str(config.reference.store)))


def sample(runs: Sequence[RunDir]) -> list[dict[str, float]]:
    """True reward, KL to the base and grammaticality of every run, kept in its folder; two run at a time."""
    import ray

    from caldpo_ray.evaluation import sample_world
    from caldpo_ray.pipeline import connect

    files = [run.path / "samples.json" for run in runs]
    missing = [(run, file) for run, file in zip(runs, files, strict=True) if not file.exists()]
    if missing:
        connect(verbose=False)
        task = ray.remote(sample_world)
        for (_, file), facts in zip(
            missing, ray.get([task.remote(str(run.model), str(BASE / "model")) for run, _ in missing]), strict=True
        ):
            write_atomically(file, json.dumps(facts, indent=1))
    return [json.loads(file.read_text()) for file in files]


def name_of(config: Config) -> str:
    """Objective and beta as people write them."""
    name = config.objective.name
    return f"{'Cal-DPO' if name == 'cal_dpo' else name.upper()} β={config.objective.beta:g}"


def train_lines(run: RunDir) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.metrics) if line["split"] == "train"]


def chosen_log_ratio(run: RunDir) -> Estimate:
    """h_w of the last steps; its standard error from the scatter of the steps."""
    return Estimate(*mean_and_standard_error([line["logratios/chosen"] for line in train_lines(run)[-LAST_STEPS:]]))


def measured(name: str, chosen: Estimate, facts: dict[str, float]) -> Result:
    """Estimates from one sampling; the optimum moves with the KL, so the KL's error counts in the shortfall."""
    grammatical, reward, kl = (Estimate(facts[key], facts[f"{key}_se"]) for key in ("grammatical", "true_reward", "kl"))
    low, high = (point.reward for point in optimum_at_kl([max(0.0, kl.value - kl.se), kl.value + kl.se]))
    shortfall = Estimate(facts["optimum_reward"], (high - low) / 2) - reward
    return Result(name, chosen, grammatical, reward, kl, shortfall)


def report(results: Sequence[Result], seconds: dict[str, float]) -> None:
    """Where things are, how long they took, and what they show."""
    say(f"\nruns    {', '.join(str(OUTPUT / name) for name in seconds if (OUTPUT / name / 'model').is_dir())}")
    say(f"figure  {OUTPUT / 'figure.png'}")
    say(f"seconds {', '.join(f'{name} {taken:.0f}' for name, taken in seconds.items())}; {sum(seconds.values()):.0f} in all")
    say(f"\nConclusion (± one standard error; a difference counts beyond {CLEAR:g} of them; one seed)")
    for line in conclude(results[0], results[1:]):
        say(f"- {line}")


if __name__ == "__main__":
    try:
        quickstart(sys.argv[1:])
    except (InputError, RunError) as error:
        sys.exit(f"quickstart: {error}")
