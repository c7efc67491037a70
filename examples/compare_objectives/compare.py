"""Six objectives on the world, each at three betas with three seeds: a sweep, its policies judged by the true reward, the claims.

    python examples/compare_objectives/compare.py [key=value ...]    # from the root of the checkout; overrides for the sweep

Everything lands in runs/compare_objectives. The same command again resumes what was interrupted, and finishes at once when
all is there. `caldpo report runs/compare_objectives/compare` draws it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from claims import REWARD
from table import show

from caldpo_ray import load_config, sweep, train
from caldpo_ray.errors import InputError, RunError
from caldpo_ray.reporting.progress import say
from caldpo_ray.run_dir import RunDir
from caldpo_ray.storage import write_atomically
from caldpo_ray.world import create_world

CONFIGS = Path(__file__).parent
OUTPUT = Path("runs/compare_objectives")  # as in the configs
NUM_EVAL = 2000  # a thousand rows choose, a thousand are reported
NUM_SAMPLES = 2000


def compare(overrides: Sequence[str]) -> None:
    """World, supervised base, sweep, samples, table, claims."""
    create_world(OUTPUT / "world", num_eval=NUM_EVAL)
    base = train(load_config(CONFIGS / "sft.yaml"))
    home = sweep(load_config(CONFIGS / "compare.yaml", overrides))
    lines = pq.read_table(home.path / "trials.parquet").to_pylist()
    runs = [RunDir(home.trials / line["trial"]) for line in lines if line["state"] == "completed"]
    of_base, *of_runs = judge_all([base, *runs], base)
    judged = dict(zip([run.path.name for run in runs], of_runs, strict=True))
    trials = [line | judged.get(line["trial"], {}) for line in lines]
    say(f"\nThe reference: true reward {of_base[REWARD]:.3f}, grammatical {of_base['world/grammatical']:.1%}\n")
    show(trials, of_base[REWARD])


def judge_all(runs: Sequence[RunDir], base: RunDir) -> list[dict[str, float]]:
    """True reward, grammaticality and KL of each run's policy, as `world/*`; remembered in its `eval.json`."""
    started = [None if _judged(run) else _start(run, base) for run in runs]
    for run, task in zip(runs, started, strict=True):
        if task is not None:
            import ray

            found = {f"world/{name}": value for name, value in ray.get(task).items()}
            write_atomically(run.eval, json.dumps(_evaluation(run) | found, indent=1))
    return [_judged(run) for run in runs]


def _start(run: RunDir, base: RunDir) -> Any:
    import ray

    from caldpo_ray.cluster.connection import connect
    from caldpo_ray.held_out.sampling import sample_world

    connect(verbose=False)
    return ray.remote(num_cpus=1)(sample_world).remote(str(run.model), str(base.model), num_samples=NUM_SAMPLES)


def _evaluation(run: RunDir) -> dict[str, Any]:
    return dict(json.loads(run.eval.read_text())) if run.eval.exists() else {}


def _judged(run: RunDir) -> dict[str, float]:
    return {name: value for name, value in _evaluation(run).items() if name.startswith("world/")}


if __name__ == "__main__":
    try:
        compare(sys.argv[1:])
    except (InputError, RunError) as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 3)
