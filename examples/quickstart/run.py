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
from caldpo_ray.reporting.progress import say
from caldpo_ray.rows import write_atomically
from caldpo_ray.run_dir import RunDir, read_metrics
from caldpo_ray.store import list_references
from caldpo_ray.world import create_world, mean_and_standard_error, optimum_at_kl

CONFIGS = Path(__file__).parent
OUTPUT = Path("runs/quickstart")  # as in the configs
CONTRASTS: tuple[tuple[str, list[str]], ...] = (
    ("cal_dpo.yaml", []),
    ("dpo.yaml", []),
    ("dpo.yaml", ["run.name=dpo_beta1", "objective.beta=1.0"]),
)
OBJECTIVES = {"cal_dpo": "Cal-DPO", "dpo": "DPO"}
LAST_STEPS = 16  # the conclusion averages the log-ratio over these


def quickstart(overrides: Sequence[str]) -> None:
    """World, supervised base, three preference runs, samples, figure, conclusion."""
    seconds: dict[str, float] = {}
    with phase("world", seconds):
        create_world(OUTPUT / "world")
    with phase("sft", seconds):
        base = train(load_config(CONFIGS / "sft.yaml", overrides))
    configs = [load_config(CONFIGS / file, [*changes, *overrides]) for file, changes in CONTRASTS]
    runs, sampled = [], [start_sampling(base, reference=base)]
    for config in configs:
        with phase(config.run.name, seconds):
            runs.append(train_with_shared_reference(config))
        sampled.append(start_sampling(runs[-1], reference=base))  # goes on while the next run starts its workers
    with phase("samples", seconds):
        of_base, *of_runs = [samples(run, started) for run, started in zip([base, *runs], sampled, strict=True)]
    with phase("figure", seconds):
        results = [
            measured(name_of(config), chosen_log_ratio(run), facts)
            for config, run, facts in zip(configs, runs, of_runs, strict=True)
        ]
        dynamics = {result.name: train_lines(run) for result, run in zip(results, runs, strict=True)}
        start = measured("SFT base", Estimate(0, 0), of_base)  # it is the reference: its log-ratios are zero
        draw(OUTPUT / "figure.png", dynamics, configs[0].objective.calibration_target, results, start)
    report(base, runs, seconds)
    say(f"\nConclusion (± one standard error, a difference counts beyond {CLEAR:g} of them; one seed)")
    for line in conclude(results[0], results[1:]):
        say(f"- {line}")


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a phase and note how long it took."""
    say(f"\n== {name}")
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def train_with_shared_reference(config: Config) -> RunDir:
    """Train, and say how many log-probs of the base were in the store before and how many the run had to add."""
    before = stored_log_probs(config)
    run: RunDir = train(config)
    say(f"reference store: {before} log-probs before this run, {stored_log_probs(config) - before} added by it")
    return run


def stored_log_probs(config: Config) -> int:
    return sum(reference["entries"] for reference in list_references(str(config.reference.store)))


def start_sampling(run: RunDir, reference: RunDir) -> Any:
    """A task that samples the run's model and judges it: true reward, grammaticality, KL. None if that was done before."""
    if (run.path / "samples.json").exists():
        return None
    import ray  # here, so that a finished quickstart is shown again without waiting for these

    from caldpo_ray.cluster.connection import connect
    from caldpo_ray.held_out.sampling import sample_world

    connect(verbose=False)
    return ray.remote(num_cpus=0.5)(sample_world).remote(str(run.model), str(reference.model))


def samples(run: RunDir, started: Any) -> dict[str, float]:
    """What sampling found, remembered in the run's folder."""
    file = run.path / "samples.json"
    if started is not None:
        import ray

        write_atomically(file, json.dumps(ray.get(started), indent=1))
    return dict(json.loads(file.read_text()))


def name_of(config: Config) -> str:
    """Objective and beta as people write them."""
    objective = config.objective.model_dump()
    return f"{OBJECTIVES[objective['name']]} β={objective['beta']:g}"


def train_lines(run: RunDir) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.metrics) if line["split"] == "train"]


def chosen_log_ratio(run: RunDir) -> Estimate:
    """h_w over the last steps; the standard error is that of the scatter between steps."""
    return Estimate(*mean_and_standard_error([line["logratios/chosen"] for line in train_lines(run)[-LAST_STEPS:]]))


def measured(name: str, chosen: Estimate, facts: dict[str, float]) -> Result:
    """Estimates from one sampling. The optimum rises with the KL, so the error of the KL counts in the shortfall."""
    grammatical, reward, kl = (Estimate(facts[key], facts[f"{key}_se"]) for key in ("grammatical", "true_reward", "kl"))
    low, high = (point.reward for point in optimum_at_kl([max(0.0, kl.value - kl.se), kl.value + kl.se]))
    shortfall = Estimate(facts["optimum_reward"], (high - low) / 2) - reward
    return Result(name, chosen, grammatical, reward, kl, shortfall)


def report(base: RunDir, runs: Sequence[RunDir], seconds: dict[str, float]) -> None:
    """Where everything is and how long it took."""
    say("")
    for run in (base, *runs):
        say(f"run      {run.path}")
    say(f"figure   {(OUTPUT / 'figure.png').absolute()}")
    say(
        f"seconds  {', '.join(f'{name} {taken:.0f}' for name, taken in seconds.items())}; {sum(seconds.values()):.0f} in all"
    )


if __name__ == "__main__":
    try:
        quickstart(sys.argv[1:])
    except (InputError, RunError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 3)
