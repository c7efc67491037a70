"""Faults injected into whole runs: memory, a rank that hangs, numbers that are none, two attempts of one run, taken GPUs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from caldpo_ray.run_dir import RunDir, read_metrics
from tests.conftest import wait_until
from tests.ray.runs import Run, start, write_config

pytestmark = pytest.mark.ray
BY_THE_CLOCK = "train.save_minutes=0.005"  # after nearly every step


@pytest.mark.long
def test_a_run_survives_full_memory_and_a_rank_that_hangs(
    baseline_config: Path, baseline: RunDir, tmp_path: Path
) -> None:
    """With smaller micro-batches and the same global batches; and one reads where the rank hung.

    One failure is allowed, and only the hanging rank counts as one. Both ranks save when the clock of rank 0 asks for it.
    """
    config = Path(shutil.copy(baseline_config, tmp_path))
    config.write_text(config.read_text().replace("name: cal_dpo", "name: tests.ray.objectives:afflicted"))
    overrides = [
        f"objective.folder={tmp_path}",
        "train.num_workers=2",
        "train.micro_batch_tokens=1024",
        "train.max_failures=1",
        "train.deepspeed.zero_stage=2",
    ]
    run = start(config, "afflicted", *overrides, BY_THE_CLOCK, "train.wait_timeout_seconds=25")
    said = run.finish()
    halvings = re.findall(r"train\.micro_batch_tokens goes from (\d+) to (\d+)", said)
    assert halvings and all(int(before) == 2 * int(after) for before, after in halvings), said
    found = json.loads((run.path / "memory.json").read_text())
    assert found == {"asked": 1024, "tokens": int(halvings[-1][1])}
    assert re.search(r"rank 1 has stood in afflicted, \S+/objectives\.py line \d+", said), said
    assert "rank 0 has waited for other ranks" in said
    assert "in afflicted" in (run.path / "stacks" / "rank-1.txt").read_text()
    assert_saved_by_the_clock(run)
    assert_learned_alike(run, baseline)


def test_steps_without_finite_numbers_are_left_out_and_named(world: Path, cluster: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:24]]
    for at, score in ((6, 1), (7, 1), (13, 2)):
        rows[at]["chosen_score"] = score
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        tmp_path, world, data={"train": str(file), "shuffle": False},
        train={"batch_size": 4, "on_nonfinite": "skip", "max_skipped_steps": 2, "save_every": 5},
    )  # fmt: skip
    config.write_text(config.read_text().replace("name: cal_dpo", "name: tests.ray.objectives:poisoned"))
    run = start(config, "skipping")
    said = run.finish()
    lines = run.lines()
    assert [(line["step"], line["split"]) for line in lines] == [
        (1, "train"), (2, "skipped"), (3, "train"), (4, "skipped"), (5, "train"), (6, "train"),
    ]  # fmt: skip
    loss, gradient = lines[1], lines[3]
    assert "the loss is not finite" in loss["reason"] and len(loss["row_ids"]) == 2
    assert "a gradient is not finite" in gradient["reason"] and len(gradient["row_ids"]) == 4
    assert all(name in said for name in (*loss["row_ids"], *gradient["row_ids"]))
    assert said.count("the step was not applied") == 2
    assert all(np.isfinite(weight).all() for weight in run.weights().values())
    state = json.loads((run.path / "checkpoints" / "step-00000006" / "trainer_state.json").read_text())
    assert (state["rows"], state["skipped_steps"]) == (24, 2)


def test_the_later_of_two_attempts_goes_on_and_the_older_one_stops(
    baseline_config: Path, baseline: RunDir, tmp_path: Path
) -> None:
    """To the bits of a run that nobody disturbed and that saved at the end only; with its store neither loads the reference."""
    config = Path(shutil.copy(baseline_config, tmp_path))
    config.write_text(config.read_text().replace("name: cal_dpo", "name: tests.ray.objectives:held_up"))
    overrides = (f"objective.folder={tmp_path}", BY_THE_CLOCK)
    older = start(config, "contested", *overrides)
    older.wait_for_step(1)
    newer = start(config, "contested", *overrides)
    claim = older.path / "attempt.json"
    wait_until(lambda: json.loads(claim.read_text())["pid"] == newer.process.pid, "the newer attempt to take over")
    (tmp_path / "go").touch()
    said = older.finish(3)
    assert f"(process {newer.process.pid} on " in said and "this older one stops, and writes no more there" in said
    newer.finish()
    assert json.loads((newer.path / "status.json").read_text())["state"] == "complete"
    assert reference_actors(baseline) and not reference_actors(newer)
    learned = ["loss", "logratios/chosen", "logratios/rejected", "grad_norm"]
    assert newer.values(*learned) == Run(baseline.path).values(*learned)
    assert_saved_by_the_clock(newer)
    ours, theirs = newer.weights(), Run(baseline.path).weights()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def reference_actors(run: Run | RunDir) -> set[int]:
    """Processes that held the reference model at any time of a finished run."""
    places = json.loads((run.path / "manifest.json").read_text())["places"]
    return {place["pid"] for place in places if place["role"] == "reference actor"}


def assert_saved_by_the_clock(run: Run) -> None:
    """Before the last step, too; and without evaluations that the config did not ask for."""
    assert len(list(run.path.glob("checkpoints/step-*"))) > 1
    assert [line["step"] for line in run.lines() if line["split"] == "eval"] == [6, 12, 18, 24, 26]


def assert_learned_alike(run: Run, baseline: RunDir) -> None:
    ours, theirs = (
        [line for line in read_metrics(path / "metrics.jsonl") if line["split"] == "train"]
        for path in (run.path, baseline.path)
    )
    assert [line["rows"] for line in ours] == [line["rows"] for line in theirs]
    for name in ("loss", "logratios/chosen", "logratios/rejected", "grad_norm"):
        np.testing.assert_allclose(
            [line[name] for line in ours], [line[name] for line in theirs], rtol=2e-3, atol=2e-3, err_msg=name
        )


def test_gpus_that_another_job_holds_are_not_waited_for_without_an_end(
    world: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    config = write_config(tmp_path, world, train={"use_gpu": True, "placement_timeout_seconds": 5})
    holder = ray.remote(num_cpus=0, num_gpus=2)(Holder).remote()
    ray.get(holder.ready.remote())
    said = start(config, "no-room").finish(2)
    ray.kill(holder)
    wait_until(lambda: ray.available_resources().get("GPU") == 3, "the GPUs to be free again")
    assert (
        "2 policy workers were not placed within train.placement_timeout_seconds = 5: each needs 0.5 CPU, 1 GPU" in said
    )
    assert "CPU and 1 GPU free now" in said


class Holder:
    """Another job's process."""

    def ready(self) -> None:
        pass


def test_a_wait_ends_unless_something_goes_on(cluster: str) -> None:
    import ray

    from caldpo_ray.errors import RunError
    from caldpo_ray.resilience.waiting import wait_for

    sleeper = ray.remote(num_cpus=0)(_sleep)
    late = sleeper.remote(3600)
    with pytest.raises(RunError, match=r"waited 0 s for somebody, and nothing came.*train\.wait_timeout_seconds"):
        wait_for(late, "somebody", 0.2)
    ray.cancel(late, force=True)
    nowhere = sleeper.options(num_gpus=4).remote(0)
    with pytest.raises(RunError, match=r"; Ray has no room for .*1 process of 4 GPU.* GPU free in the whole cluster;"):
        wait_for(nowhere, "somebody", 5)  # Ray counts what waits once a second
    ray.cancel(nowhere)
    news = iter(range(1000))
    assert wait_for(sleeper.remote(1), "somebody", 0.1, lambda: next(news)) == 1


def _sleep(seconds: int) -> int:
    import time

    time.sleep(seconds)
    return seconds


# On a cluster whose memory monitor kills before the machine is short of memory.
SHORT_OF_MEMORY = """
import sys

import psutil
import ray

import caldpo_ray

memory = psutil.virtual_memory()
threshold = (memory.total - memory.available + 5 * 2**30) / memory.total
settings = {"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100}
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _system_config=settings)
caldpo_ray.train(*sys.argv[1:2], sys.argv[2:])
"""


@pytest.mark.long
@pytest.mark.skipif(psutil.virtual_memory().available < 14 * 2**30, reason="takes 10 GiB of memory")
def test_a_worker_that_ray_killed_for_its_memory_is_followed_by_smaller_micro_batches(
    baseline_config: Path, baseline: RunDir, tmp_path: Path
) -> None:
    """And by the same global batches."""
    config = Path(shutil.copy(baseline_config, tmp_path))
    config.write_text(config.read_text().replace("name: cal_dpo", "name: tests.ray.objectives:hungry"))
    overrides = ["run.name=hungry", "train.micro_batch_tokens=1024", "train.max_failures=4"]
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(config), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    run = Run(baseline.path.parent / "hungry")
    found = json.loads((run.path / "memory.json").read_text())
    assert found["asked"] == 1024 and found["tokens"] < 1024
    assert f"train.micro_batch_tokens = {found['tokens']}: 1024 did not fit into memory before" in said
    assert_learned_alike(run, baseline)


# A driver, of ours or not, with a placement group that Ray keeps when it is killed: there its maker lives on, whereas Ray loses
# a group that is made in the milliseconds of the kill, which no test can hit each time.
KEEPER = """
import sys

import ray
from ray.util import placement_group

from caldpo_ray.cluster.connection import connect

connect(verbose=False) if sys.argv[1] == "ours" else ray.init(log_to_driver=False, logging_level="ERROR")


class Keeper:
    def keep(self):
        group = placement_group([{"memory": 1}])
        assert group.wait(60)
        return group.id.hex()


keeper = ray.remote(num_cpus=0)(Keeper).options(name=sys.argv[2], namespace="keepers", lifetime="detached").remote()
print("keeps", ray.get(keeper.keep.remote()), flush=True)
sys.stdin.read()
"""
NEWCOMER = "from caldpo_ray.cluster.connection import connect; connect(verbose=False)"


def test_what_ray_keeps_of_our_killed_drivers_is_removed_and_nothing_else(cluster: str) -> None:
    import ray
    from ray.util import placement_group_table

    def open_driver(whose: str, name: str) -> tuple[subprocess.Popen[str], str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        driver = subprocess.Popen([sys.executable, "-c", KEEPER, whose, name], text=True, **pipes)
        assert driver.stdout is not None
        said, group = driver.stdout.readline().split()
        assert said == "keeps"
        return driver, group

    def state(group: str) -> str:
        return str(placement_group_table()[group]["state"])

    drivers = {
        name: open_driver(whose, name) for whose, name in [("ours", "dead"), ("others", "foreign"), ("ours", "live")]
    }
    try:
        for name in ("dead", "foreign"):
            drivers[name][0].kill()
            drivers[name][0].communicate()
        ids = [group[-8:] for _, group in drivers.values()]
        wait_until(lambda: [dead(job) for job in ids] == [True, True, False], "Ray to see two dead drivers")
        assert [state(group) for _, group in drivers.values()] == ["CREATED"] * 3
        done = subprocess.run([sys.executable, "-c", NEWCOMER], capture_output=True, text=True, check=True)
        assert "removed 1 placement group(s) of caldpo_ray drivers that were killed" in done.stdout
        wait_until(lambda: state(drivers["dead"][1]) == "REMOVED", "the group to be removed")
        assert [state(drivers[name][1]) for name in ("foreign", "live")] == ["CREATED"] * 2
    finally:
        for name, (driver, _) in drivers.items():
            driver.kill()
            driver.communicate()
            ray.kill(ray.get_actor(name, namespace="keepers"))


def dead(job: str) -> bool:
    """Whether Ray counts this job, given by its id in hexadecimal digits, as ended."""
    import ray
    from ray._raylet import GcsClient

    jobs = GcsClient(address=ray.get_runtime_context().gcs_address).get_all_job_info()
    return any(key.hex() == job and facts.is_dead for key, facts in jobs.items())
