"""Ctrl-C, and nodes that die, are about to go, or come. Printed: how long the run stood still."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caldpo_ray.cluster.placement import live_nodes
from caldpo_ray.config import TrainSection
from tests.conftest import wait_until
from tests.faults.conftest import NUM_STEPS, POLICY, Nodes, seconds_until_it_goes_on
from tests.ray.runs import LiveRun, Run, assert_same, kill, pids, start, train, write_config
from tests.ray.test_invariants import assert_lines_close

pytestmark = pytest.mark.ray
DRIVER_SECONDS = 180  # for a driver to see that the head is gone
ON_ONE_NODE = ("train.label_selector=null", "train.num_cpus_per_worker=0.5")


def tell(what: str, seconds: float, asked: float) -> None:
    print(f"\n{what}: {seconds:.1f} s until the next step (asked for: {asked:g} s)", flush=True)


def assert_each_step_once(run: Run) -> None:
    assert [line["step"] for line in run.lines()] == list(range(1, NUM_STEPS + 1))


def places(run: Run, role: str) -> list[dict[str, Any]]:
    found = json.loads((run.path / "manifest.json").read_text())["places"]
    return [place for place in found if place["role"] == role]


def test_ctrl_c_in_a_terminal(config: Path, slow: Path) -> None:
    """Every process of the terminal's group gets the signal, those of the run's own cluster too, and a checkpoint is saved."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "caldpo_ray", "train", str(config), "run.name=terminal", *ON_ONE_NODE]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    run = LiveRun(config.parent / "runs" / "terminal", process)
    run.wait_for_step(3)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said = run.finish(130, seconds=60)
    print(f"\nCtrl-C: {time.monotonic() - started:.1f} s to the end, with a checkpoint", flush=True)
    assert "a checkpoint is saved first" in said and "Traceback" not in said
    assert run.newest_checkpoint() == run.lines()[-1]["step"] >= 3


def test_a_second_ctrl_c_does_not_wait(config: Path, nodes: Nodes, slow: Path) -> None:
    nodes.have(2)
    run = start(config, "interrupted")
    run.wait_for_step(2)
    worker = pids("RayTrainWorker")[1]
    os.kill(worker, signal.SIGSTOP)  # nothing can be saved now
    run.process.send_signal(signal.SIGINT)
    assert run.process.stdout is not None
    assert any("a checkpoint is saved first" in line for line in run.process.stdout)
    run.process.send_signal(signal.SIGINT)
    run.finish(130, seconds=60)
    with suppress(ProcessLookupError):
        kill(worker)
    assert run.newest_checkpoint() == 0


def test_dead_processes_and_dead_nodes(config: Path, undisturbed: Run, nodes: Nodes, slow: Path) -> None:
    """A worker, a node where there is another one, and a node whose place must come first."""
    nodes.have(3)
    run = start(config, "killed", "train.save_every=2", "train.max_failures=10")
    run.wait_for_checkpoint(2)
    workers = pids("RayTrainWorker")
    kill(workers[1])
    tell("a dead policy worker", seconds_until_it_goes_on(run, workers), 15)

    run.wait_for_checkpoint(run.newest_checkpoint() + 2)
    workers = pids("RayTrainWorker")
    nodes.kill(nodes.of("RayTrainWorker", 1))
    tell("a lost node, with another one at hand", seconds_until_it_goes_on(run, workers), 45)

    run.wait_for_checkpoint(run.newest_checkpoint() + 2)
    workers = pids("RayTrainWorker")
    nodes.kill(nodes.of("RayTrainWorker", 0))
    nodes.have(2)
    tell("a lost node, whose successor comes at once", seconds_until_it_goes_on(run, workers), 45)
    slow.unlink()
    run.finish()
    assert_each_step_once(run)
    assert_same(run, undisturbed)


def test_a_node_that_is_about_to_go(config: Path, undisturbed: Run, nodes: Nodes, slow: Path) -> None:
    """The workers save, although no checkpoint is due, and go on elsewhere before the node is gone. It is no failure.

    The notice comes while they start, before they listen.
    """
    nodes.have(3)
    run = start(config, "preempted", "train.max_failures=0")
    wait_until(lambda: len(pids("RayTrainWorker")) == 2, "two policy workers")
    assert not run.lines()
    workers, going = pids("RayTrainWorker"), nodes.of("RayTrainWorker", 0)
    nodes.drain(going, 120)
    assert going.node_id not in {node.node_id for node in live_nodes()}, "nothing new is meant for it"
    seconds = seconds_until_it_goes_on(run, workers)
    tell("a node that goes in 120 s", seconds, 120)
    saved = run.newest_checkpoint()
    assert 1 <= saved <= 10
    slow.unlink()
    said = run.finish()
    nodes.kill(going)
    assert f"a checkpoint of step {saved} is saved: the node of rank" in said
    assert "is about to go, and the run goes on elsewhere" in said
    assert_each_step_once(run)
    assert_same(run, undisturbed)


def test_workers_come_and_go(config: Path, undisturbed: Run, nodes: Nodes, slow: Path) -> None:
    """One node, two, and one again: the same global batches."""
    nodes.have(2)
    alone = min(nodes.all(), key=id)
    for node in nodes.all() - {alone}:
        nodes.kill(node)
    wait_until(lambda: nodes.num_alive() == 2, "Ray to know that only the head and one node are left")
    run = start(config, "elastic", "train.num_workers=[1, 2]", "train.save_every=4")
    run.wait_for_step(3)
    workers = pids("RayTrainWorker")
    assert len(workers) == 1
    nodes.have(2)
    tell("a new node", seconds_until_it_goes_on(run, workers), 60)
    workers = pids("RayTrainWorker")
    assert len(workers) == 2

    run.wait_for_checkpoint(run.newest_checkpoint() + 4)
    nodes.kill(nodes.of("RayTrainWorker", 1))
    tell("a lost node, without another one", seconds_until_it_goes_on(run, workers), 45)
    assert len(pids("RayTrainWorker")) == 1
    slow.unlink()
    said = run.finish()
    assert "is saved: the run goes on with 2 workers" in said
    assert_each_step_once(run)
    ours, theirs = ([line | {"rewards/accuracies": 0.0} for line in each.lines()] for each in (run, undisturbed))
    assert_lines_close(ours, theirs, 2e-3)


def test_a_dead_reference_actor_stops_nobody(config: Path, large: Path, nodes: Nodes, slow: Path) -> None:
    """Its process, then its node. The reference is a large one, which is not done when training begins.

    Nor does it end with the policy workers: others come, and find what it has answered.
    """
    nodes.have(3)
    where = "reference.label_selector={group: policy}"
    run = start(config, "reference", f"reference.name_or_path={large}", "reference.store=null", where)
    run.wait_for_step(1)
    actors = pids("ReferenceScorer")
    os.kill(actors[0], signal.SIGSTOP)  # or it might be done before
    before = pids("RayTrainWorker")
    kill(before[0])
    wait_until(lambda: len(set(pids("RayTrainWorker")) - set(before)) == 2, "a new group of workers")
    seconds_until_it_goes_on(run, before)  # what it has answered is known
    assert pids("ReferenceScorer") == actors, "the reference was not loaded again"
    os.kill(actors[0], signal.SIGCONT)
    workers = pids("RayTrainWorker")
    kill(actors[0])
    again = wait_until(lambda: set(pids("ReferenceScorer")) - set(actors), "a reference actor in another process")
    nodes.kill(nodes.of("ReferenceScorer"))
    nodes.have(3)
    wait_until(lambda: set(pids("ReferenceScorer")) - again - set(actors), "one on another node")
    slow.unlink()
    run.finish()
    assert {place["pid"] for place in places(run, "policy worker")} == set(workers), "the policy was not started again"
    assert_each_step_once(run)
    waited = max(line["wait/reference_seconds"] for line in run.lines()[1:])  # the first step waits for the first actor
    print(f"\na dead reference actor, and its node: the policy waited at most {waited:.1f} s for a step", flush=True)


def test_what_a_checkpoint_costs(world: Path, large: Path, nodes: Nodes, tmp_path: Path) -> None:
    """Of 17 million parameters, in the time of training."""
    nodes.have(2)
    section = {"num_cpus_per_worker": 1, "label_selector": POLICY, "batch_size": 64, "epochs": 3, "save_every": 5}
    run = train(write_config(tmp_path, world, model={"name_or_path": str(large)}, train=section), "large")
    size = sum(weight.size for weight in run.weights().values())
    after = [line for line in run.lines() if line["step"] > 1 and line["step"] % 5 == 1]  # a checkpoint
    assert len(after) == (run.lines()[-1]["step"] - 1) // 5, "no checkpoint is left out"
    assert all(line["wait/checkpoint_seconds"] > 0 for line in after), "a wait that is not counted costs nothing"
    stall = sum(line["wait/checkpoint_seconds"] for line in after) / len(after)
    step = sum(line["wall_seconds"] for line in run.lines()) / len(run.lines())
    share, by_default = stall / (50 * step + stall), stall / (60 * TrainSection().save_minutes + stall)
    print(f"\na checkpoint of {size / 1e6:.1f} M parameters stops training for {stall:.2f} s,", end=" ")
    print(f"{by_default:.2%} of training at the default cadence of {TrainSection().save_minutes:g} minutes", end=" ")
    print(f"(asked for: 3 %), {share:.1%} at one every 50 steps of {step:.2f} s", flush=True)


def test_the_head_is_lost(config: Path, undisturbed: Run, nodes: Nodes, slow: Path) -> None:
    """The driver ends with it. The same command goes on in another cluster."""
    nodes.have(2)
    run = start(config, "headless", "train.save_every=2")
    run.wait_for_checkpoint(4)
    nodes.end()
    lost = time.monotonic()
    said = run.process.communicate(timeout=DRIVER_SECONDS)[0]
    print(f"\nthe driver of a head that is lost ended after {time.monotonic() - lost:.1f} s with", end=" ")
    print(f"code {run.process.returncode}, and said at last: {said.splitlines()[-1:]}", flush=True)
    assert run.process.returncode not in (0, 2), "neither done, nor not to be tried again"
    before, saved = run.lines(), run.newest_checkpoint()
    other = Nodes()
    other.have(2)
    started = time.monotonic()
    run = start(config, "headless", "train.save_every=2")
    wait_until(lambda: run.lines() and run.lines()[-1]["step"] > saved and run.lines()[-1] not in before, "a step")
    tell("resumed in another cluster", time.monotonic() - started, 25)
    slow.unlink()
    run.finish()
    other.end()
    assert run.last_step_kept(before) == saved
    assert_each_step_once(run)
    assert_same(run, undisturbed)
