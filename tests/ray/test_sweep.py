"""Sweeps for real: killed and gone on with, stopped trials, failed trials, and one pass over the reference for all."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import caldpo_ray
from caldpo_ray.config import load_config
from caldpo_ray.errors import InputError
from caldpo_ray.run_dir import read_metrics
from caldpo_ray.store import list_references
from tests.conftest import wait_until
from tests.ray.runs import live_actors, write_config

pytestmark = pytest.mark.ray
METRIC = "rewards/accuracies"


def sweep_config(folder: Path, world: Path, sweep: dict[str, Any], **train: Any) -> Path:
    train = {"num_workers": 1, "max_steps": 4, **train}
    return write_config(folder, world, data={"eval": str(world / "eval.jsonl")}, train=train, sweep=sweep)


def lines(home: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(home / "trials.parquet").to_pylist())


def status(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / "status.json").read_text()))


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


@pytest.fixture(scope="module")
def home(world: Path, tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    """Two objectives, a point each, two seeds; killed with its driver when one trial was done, and gone on with."""
    space = {"cal_dpo": {"beta": [0.1]}, "dpo": {"beta": [0.5]}}
    sweep = {"objectives": ["cal_dpo", "dpo"], "space": space, "seeds": 2}
    config = sweep_config(tmp_path_factory.mktemp("sweep"), world, sweep)
    home = config.parent / "runs" / "config"
    command = [sys.executable, "-m", "caldpo_ray", "sweep", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: process.poll() is not None or outcomes(home), "a trial")
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = outcomes(home)
    assert len(before) < 4
    caldpo_ray.sweep(config)
    assert {path: stamp for path, stamp in outcomes(home).items() if path in before} == before  # not run again
    return home


def outcomes(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in home.glob("trials/*/outcome.json")}


def test_every_point_of_the_grid_runs_with_every_seed(home: Path) -> None:
    table = lines(home)
    assert len(table) == 4 and {line["state"] for line in table} == {"completed"}
    assert {(line["objective"], line["point"], line["seed"]) for line in table} == {
        (objective, f"beta-{beta}", seed) for objective, beta in (("cal_dpo", 0.1), ("dpo", 0.5)) for seed in (7, 8)
    }
    assert {(line["steps"], line["rows"]) for line in table} == {(4, 128)}
    assert all(math.isfinite(line[f"{half}/{METRIC}"]) for line in table for half in ("selection", "report"))


def test_the_halves_are_all_held_out_rows(home: Path, world: Path) -> None:
    """Neither half is empty, and their accuracies combine to that of the whole."""
    trial = home / "trials" / lines(home)[0]["trial"]
    ends = {line["split"]: line for line in read_metrics(trial / "metrics.jsonl") if line["split"] != "train"}
    assert set(ends) == {"eval", "report"}
    whole = caldpo_ray.evaluate(str(trial))
    share = (whole[METRIC] - ends["report"][METRIC]) / (ends["eval"][METRIC] - ends["report"][METRIC])
    assert whole["eval_rows"] == 80 and share * 80 == pytest.approx(round(share * 80), abs=1e-3) and 0.25 < share < 0.75


def test_the_reference_was_scored_once_for_all(home: Path) -> None:
    result = json.loads((home / "sweep.json").read_text())
    (stored,) = list_references(home.parent / ".cache" / "reference")
    scored = result["reference"]["rows_scored"]
    assert 0 < scored <= 480 and stored["entries"] <= 2 * scored  # rows have two responses, some of them equal
    seconds, saved = (result["reference"][name] for name in ("seconds", "seconds_saved"))
    assert 2 * seconds < saved < 4 * seconds
    for trial in home.glob("trials/*/manifest.json"):
        assert {place["role"] for place in json.loads(trial.read_text())["places"]} == {"policy worker"}


def test_results_are_whole(home: Path) -> None:
    result = json.loads((home / "sweep.json").read_text())
    assert result["metric"] == METRIC and result["mode"] == "max" and result["seeds"] == [7, 8]
    assert {entry["objective"] for entry in result["leader_board"]} == {"cal_dpo", "dpo"}
    assert all(entry["seeds"] == 2 and len(entry["interval"]) == 2 for entry in result["leader_board"])
    assert [each["objective"] for each in result["differences_to_dpo"]] == ["cal_dpo"]
    assert {spent["rows"] for spent in result["objectives"].values()} == {2 * 128}
    assert result["verdict"] and (home / "trials.csv").read_text().count("\n") == 5


def test_the_best_is_ready_to_use(home: Path) -> None:
    result = json.loads((home / "sweep.json").read_text())
    best = result["best"]["trial"]
    assert (home / "best").resolve() == home / "trials" / best / "model" and (home / "best/model.safetensors").is_file()
    config = load_config(home / "best.yaml")
    trained = load_config(home / "trials" / best / "config.yaml")
    assert config.objective == trained.objective and config.run.seed == trained.run.seed
    assert config.run_dir == str(home.parent / "config-best")


def test_a_trial_of_a_sweep_is_an_ordinary_run(home: Path, world: Path, tmp_path: Path) -> None:
    """The same config by `caldpo train` takes the same path to the last bit."""
    trial = home / "trials" / "dpo-beta-0.5-seed-7"
    run = caldpo_ray.train(trial / "config.yaml", [f"run.output_dir={tmp_path}", "data.eval=null"])
    ours, theirs = (
        [line["loss"] for line in read_metrics(path / "metrics.jsonl") if line["split"] == "train"]
        for path in (run.path, trial)
    )
    assert ours == theirs


def test_a_sweep_that_is_done_is_not_run_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = outcomes(home)
    caldpo_ray.sweep(home / "sweep.yaml")
    assert outcomes(home) == before and "this sweep is complete" in capsys.readouterr().out


def test_a_directory_of_another_sweep_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match=r"train\.batch_size: 32 -> 16"):
        caldpo_ray.sweep(home / "sweep.yaml", ["train.batch_size=16"])


@pytest.mark.long
def test_a_metric_that_no_trial_reports(home: Path) -> None:
    """Told by the first trial; the rows and the reference are those of the other sweep."""
    with pytest.raises(InputError, match=r"rewards/accuracy: not among the evaluation metrics: .*rewards/accuracies"):
        caldpo_ray.sweep(home / "sweep.yaml", ["run.name=mistyped", "sweep.metric=rewards/accuracy"])
    assert not list(home.parent.glob("mistyped/trials/*/outcome.json"))


def test_more_trials_at_once_than_the_cluster_has_room_for(home: Path) -> None:
    with pytest.raises(InputError, match=r"sweep\.max_concurrent = 9: the cluster has room for 4 trials"):
        caldpo_ray.sweep(
            home / "sweep.yaml", ["run.name=crowd", "sweep.max_concurrent=9", "train.placement_timeout_seconds=1"]
        )
    assert not status(home.parent / "crowd")["inputs"], "a larger cluster is worth another attempt"


def test_wrong_input_that_nobody_touched_is_told_again_at_once(home: Path, tmp_path: Path) -> None:
    """As a job controller would have it, which starts a failed command again and again."""
    assert status(home)["state"] == "complete"
    again = ["run.name=wrong", f"data.train={tmp_path}/nowhere.jsonl"]
    with pytest.raises(InputError, match=r"nowhere\.jsonl") as first:
        caldpo_ray.sweep(home / "sweep.yaml", again)
    assert (status(home.parent / "wrong")["state"], status(home.parent / "wrong")["exit_code"]) == ("failed", 2)
    with pytest.raises(InputError, match="the last attempt stopped with this") as second:
        caldpo_ray.sweep(home / "sweep.yaml", again)
    assert str(first.value) in str(second.value)


def test_trials_that_fail_or_stop_do_not_end_the_sweep(
    world: Path, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker of one dies at every attempt, one loss is not finite, one policy leaves the reference too far; one is well."""
    objectives = [
        {"name": "tests.ray.objectives:dies", "label": "dies", "at_once": True},
        {"name": "tests.ray.objectives:explodes", "label": "explodes", "beta": 1.0, "at": 0.1},
        {"name": "tests.ray.objectives:sinks", "label": "drops"},
        {"name": "dpo", "label": "well", "beta": 0.1},
    ]
    space = {each["label"]: {"train.learning_rate": [1e-3]} for each in objectives} | {
        "drops": {"train.learning_rate": [1e-2]}
    }
    sweep = {"objectives": objectives, "space": space, "stop": {"chosen_drop": 10.0}}
    config = sweep_config(tmp_path, world, sweep, max_failures=0, max_steps=12)
    home = caldpo_ray.sweep(config).path
    ended = {line["objective"]: (line["state"], line["reason"]) for line in lines(home)}
    assert {label: state for label, (state, _) in ended.items()} == {
        "dies": "failed", "explodes": "stopped", "drops": "stopped", "well": "completed"
    }  # fmt: skip
    assert "training stopped" in ended["dies"][1] and "the loss is not finite" in ended["explodes"][1]
    assert "sweep.stop.chosen_drop = 10" in ended["drops"][1]
    assert "once more, from its last checkpoint" in capsys.readouterr().out
    wait_until(lambda: free_cpus() == 2.0, "all CPUs", 20)
    assert not [actor for actor in live_actors() if actor["ActorClassName"] in ("Feed", "SweepTrial", "RayTrainWorker")]


@pytest.mark.long
def test_asha_stops_trials_and_the_best_are_repeated(world: Path, tmp_path: Path, cluster: str) -> None:
    sweep = {
        "objectives": [{"name": "dpo", "beta": 0.5}],
        "space": {"dpo": {"train.learning_rate": [3e-3, 3e-4, 1e-7, 1e-8]}},
        "seeds": 2, "scheduler": "asha", "best_points": 1, "metric": "logratios/margins",
    }  # fmt: skip
    config = sweep_config(tmp_path, world, sweep, max_steps=13, epochs=2, eval_every=4, lr_scheduler="constant")
    home = caldpo_ray.sweep(config).path
    by_state: dict[str, list[dict[str, Any]]] = {}
    for line in lines(home):
        by_state.setdefault(line["state"], []).append(line)
    assert all("sweep.scheduler = asha" in line["reason"] for line in by_state["stopped"])
    assert {line["steps"] for line in by_state["completed"]} == {13}
    (repeated,) = [line for line in lines(home) if line["seed"] == 8]
    first = [line for line in by_state["completed"] if line["seed"] == 7]
    assert repeated["point"] == max(first, key=lambda line: line["selection/logratios/margins"])["point"]
