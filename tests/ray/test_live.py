"""What is alive while a run runs, and what is not: the promises of the architecture, read from Ray's own state."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import wait_until
from tests.ray.runs import LiveRun, live_actors, pids, start, write_config
from tests.ray.test_evaluate import plain_logps

pytestmark = pytest.mark.ray
ROWS, STEPS = 40, 26
REFERENCE_VOCABULARY = (
    100_000  # one matrix far larger than all of the policy; the rows beyond the tokenizer's are never asked for
)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than the policy, over the same tokens."""
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(world / "model", vocab_size=REFERENCE_VOCABULARY, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join((world / "train.jsonl").read_text().splitlines(keepends=True)[:ROWS]))
    return file


def dataset_executions(job: str) -> list[str]:
    """States of the dataset executions that a job has started."""
    import ray
    from ray.data._internal.stats import get_or_create_stats_actor

    known = ray.get(get_or_create_stats_actor().get_datasets.remote(job))
    return [dataset["state"] for dataset in known.values()]


def job_of(pid: int) -> str:
    (job,) = {actor["JobID"] for actor in live_actors() if actor["Pid"] == pid}
    return str(job)


@pytest.fixture(scope="module")
def run(world: Path, rows: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory, cluster: str) -> LiveRun:
    """Two policy workers and a reference actor, each with a GPU of its own in Ray's books, seen alive and then finished."""
    folder = tmp_path_factory.mktemp("live")
    config = write_config(
        folder, world, data={"train": str(rows)}, reference={"name_or_path": str(reference), "num_gpus_per_actor": 1},
        train={"use_gpu": True, "batch_size": ROWS, "epochs": STEPS}, model={"dtype": "float32", "trust_remote_code": True},
    )  # fmt: skip
    config.write_text(config.read_text().replace("name: cal_dpo", "name: tests.ray.objectives:observed"))
    run = start(config, "live", f"objective.folder={folder}")
    scorer = wait_until(lambda: pids("ReferenceScorer"), "a reference actor")
    job = job_of(scorer[0])
    run.alive["executions while the reference scores"] = dataset_executions(job)
    run.wait_for_step(3)
    run.alive |= {"policy": pids("RayTrainWorker"), "scorer": scorer, "feed": pids("Feed")}
    run.alive["executions in all"] = dataset_executions(job)
    run.alive["said"] = run.finish()
    return run


def observed(run: LiveRun) -> dict[int, list[dict[str, Any]]]:
    files = sorted(run.path.parents[1].glob("[0-9].jsonl"))
    return {int(file.stem): [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def test_two_policy_processes_form_one_group_beside_one_reference_actor(run: LiveRun) -> None:
    ranks = observed(run)
    assert sorted(ranks) == [0, 1]
    assert sorted(run.alive["policy"]) == sorted({fact["pid"] for facts in ranks.values() for fact in facts})
    assert {fact["world_size"] for facts in ranks.values() for fact in facts} == {2}
    assert len({fact["group"] for facts in ranks.values() for fact in facts}) == 1
    assert len(run.alive["scorer"]) == len(run.alive["feed"]) == 1
    assert len({*run.alive["policy"], *run.alive["scorer"], *run.alive["feed"]}) == 4


def test_the_reference_is_one_dataset_execution_however_many_epochs(run: LiveRun) -> None:
    assert run.alive["executions while the reference scores"].count("RUNNING") == 1
    assert len(run.alive["executions in all"]) == 2, "rows, and reference"
    assert run.lines()[-1]["epoch"] == STEPS


def test_no_policy_process_ever_held_the_reference(run: LiveRun, world: Path) -> None:
    hidden = AutoConfig.from_pretrained(world / "model").hidden_size
    largest = max(fact["largest_tensor"] for facts in observed(run).values() for fact in facts)
    assert largest < REFERENCE_VOCABULARY * hidden / 10


def test_policy_and_reference_have_gpus_of_their_own(run: LiveRun) -> None:
    places = json.loads((run.path / "manifest.json").read_text())["places"]
    gpus = [(place["node"], gpu) for place in places for gpu in place["gpus"]]
    assert sorted(place["role"] for place in places) == ["policy worker", "policy worker", "reference actor"]
    assert len(gpus) == len(set(gpus)) == 3


def test_what_a_person_should_know_reaches_the_terminal(run: LiveRun) -> None:
    said = run.alive["said"]
    assert re.search(r"warning: step 2\d: the loss leapt to [\d.]+, far above the ", said), said
    assert said.count("the loss leapt") == said.count("model.trust_remote_code is on") == 1


def test_the_manifest_says_how_busy_the_reference_was(run: LiveRun) -> None:
    scoring = json.loads((run.path / "manifest.json").read_text())["reference"]["scoring"]
    assert scoring["scored"] == scoring["wanted"] > 0
    assert scoring["busy_seconds"] > 0 <= scoring["idle_seconds"]
    assert scoring["busy_seconds"] + scoring["idle_seconds"] < scoring["seconds"], (
        "of one actor, which had to start first"
    )


def test_its_log_ratios_are_those_of_plain_transformers(run: LiveRun, rows: Path, reference: Path) -> None:
    gaps = plain_logps(run.path / "init", rows) - plain_logps(reference, rows)
    first = run.lines()[0]
    assert first["logratios/chosen"] == pytest.approx(gaps[:, 0].mean(), abs=1e-3)
    assert first["logratios/rejected"] == pytest.approx(gaps[:, 1].mean(), abs=1e-3)
    assert math.isclose(first["rewards/accuracies"], (gaps[:, 0] > gaps[:, 1]).mean(), abs_tol=1 / ROWS)
