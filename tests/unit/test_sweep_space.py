"""What a sweep tries: objectives, their spaces and points, and what is refused before anything starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from caldpo_ray.cluster.placement import OWN_CLUSTER, Bundle, Node
from caldpo_ray.config import Config, load_config
from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.run_dir import open_run_dir
from caldpo_ray.sweeps import _describe_contestant
from caldpo_ray.tuning.search_space import contestants, listed_points, point_name, seeds
from caldpo_ray.tuning.sweep_dir import SweepDir, Trial, open_sweep_dir
from caldpo_ray.tuning.sweep_plan import Plan, make_plan, num_at_once, num_threads, require_room
from caldpo_ray.tuning.sweep_trial import trial_config


def config(tmp_path: Path, sweep: dict[str, Any], **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "run": {"name": "s", "output_dir": str(tmp_path / "runs"), "seed": 7},
        "model": {"name_or_path": "m"},
        "data": {"train": "t.jsonl", "eval": 0.2},
        "sweep": sweep,
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(values | sections))
    return load_config(file)


def plan(tmp_path: Path, sweep: dict[str, Any], **sections: dict[str, Any]) -> Plan:
    read = config(tmp_path, sweep, **sections)
    return make_plan(read, SweepDir(Path(read.run_dir)))


TWO = {"objectives": ["cal_dpo", "dpo"], "space": {"cal_dpo": {"beta": [0.01, 0.1]}, "dpo": {"beta": [0.1, 1.0]}}}


def test_a_grid_is_every_combination_and_every_seed(tmp_path: Path) -> None:
    space = {
        "all": {"train.learning_rate": [1e-4, 1e-3]},
        "dpo": {"beta": [0.1, 1.0]},
        "cal_dpo": {"beta": [0.01, 0.2]},
    }
    made = plan(tmp_path, {**TWO, "space": space, "seeds": 3})
    trials = made.first_trials()
    assert made.num_trials == 2 * 2 * 2 * 3 and {len(each) for each in trials.values()} == {12}
    assert made.points["dpo"][1] == {"objective.beta": 0.1, "train.learning_rate": 1e-3}
    assert [trial.seed for trial in trials["dpo"]] == [7] * 4 + [8] * 4 + [9] * 4
    assert len({trial.name for each in trials.values() for trial in each}) == 24


def test_each_objective_has_a_default_range_of_its_own(tmp_path: Path) -> None:
    read = config(
        tmp_path, {"objectives": ["cal_dpo", "ipo", {"name": "ipo", "label": "mean", "length_normalize": True}]}
    )
    grids = [[point["objective.beta"] for point in listed_points(each, read)] for each in contestants(read)]
    assert grids == [[1e-5, 3.16e-3, 1.0], [5e-4, 0.01, 0.2], [0.01, 0.141, 2.0]]


def test_an_objective_given_a_beta_keeps_it(tmp_path: Path) -> None:
    made = plan(
        tmp_path, {"objectives": [{"name": "dpo", "beta": 0.3}], "space": {"all": {"train.learning_rate": [1e-4]}}}
    )
    read = trial_config(made.config, made.contestants["dpo"], made.first_trials()["dpo"][0], SweepDir(tmp_path), None)
    assert read.objective.model_dump() == {"name": "dpo", "beta": 0.3, "label_smoothing": 0.0}


def test_a_random_search_is_reproducible_and_inside_its_range(tmp_path: Path) -> None:
    sweep = {**TWO, "searcher": "random", "num_samples": 40, "space": {"all": {"beta": {"low": 1e-3, "high": 10.0}}}}
    first, again = plan(tmp_path, sweep).points, plan(tmp_path, sweep).points
    assert first == again and first["dpo"] != first["cal_dpo"]
    betas = np.array([point["objective.beta"] for point in first["dpo"]])
    assert len(set(betas)) == 40 and betas.min() >= 1e-3 and betas.max() <= 10
    assert 0.02 < np.median(betas) < 0.5  # log-uniform: a uniform one would have it near 5


def test_what_is_searched_is_said_in_words(tmp_path: Path) -> None:
    space = {"dpo": {"beta": [0.1, 0.5], "train.learning_rate": {"low": 1e-5, "high": 1e-3}}}
    made = plan(tmp_path, {"objectives": ["dpo"], "space": space})
    assert _describe_contestant(made, "dpo") == (
        "dpo: beta 0.1, 0.5; learning_rate 1e-05 to 0.001 (loss at the first point: -log σ(0.1·Δ))"
    )


def test_a_linear_range(tmp_path: Path) -> None:
    ranged = {"train.warmup_ratio": {"low": 0.0, "high": 0.2, "log": False}}
    made = plan(tmp_path, {"objectives": [{"name": "dpo", "beta": 0.1}], "space": {"dpo": ranged}})
    assert [point["train.warmup_ratio"] for point in made.points["dpo"]] == [0.0, 0.1, 0.2]


def test_point_names_are_folders_and_tell_points_apart() -> None:
    assert point_name({"objective.beta": 0.1, "train.learning_rate": 1e-6}) == "beta-0.1-learning_rate-1e-06"
    strange = [point_name({"train.optimizer": value}) for value in ("a/b", "a:b", "x" * 200, "x" * 201)]
    assert len(set(strange)) == 4 and all("/" not in name and len(name) < 90 for name in strange)


def test_seeds_by_number_or_by_name(tmp_path: Path) -> None:
    assert seeds(config(tmp_path, {"seeds": 3}, objective={"name": "dpo"})) == [7, 8, 9]
    assert seeds(config(tmp_path, {"seeds": [5, 1]}, objective={"name": "dpo"})) == [5, 1]


def test_a_search_repeats_its_best_points_alone(tmp_path: Path) -> None:
    sweep = {**TWO, "space": {}, "searcher": "random", "num_samples": 10, "seeds": 3, "best_points": 2}
    made = plan(tmp_path, sweep)
    assert made.num_trials == 2 * (10 + 2 * 2)
    assert {trial.seed for trials in made.first_trials().values() for trial in trials} == {7}


def test_a_trial_is_a_run_of_the_same_config(tmp_path: Path) -> None:
    space = {
        "dpo": {"beta": [0.25], "train.learning_rate": [3e-5]},
        "cal_dpo": {"beta": [0.1], "train.learning_rate": [3e-5]},
    }
    made = plan(tmp_path, {**TWO, "space": space}, train={"batch_size": 16})
    trial = made.first_trials()["dpo"][0]
    read = trial_config(made.config, made.contestants["dpo"], trial, SweepDir(tmp_path / "runs/s"), 1)
    assert (read.objective.name, read.train.learning_rate, read.train.batch_size, read.run.seed) == ("dpo", 3e-5, 16, 7)
    assert read.run_dir == str(tmp_path / "runs/s/trials" / trial.name) and read.train.num_threads_per_worker == 1
    assert read.reference.store == made.config.reference.store


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"objectives": ["cal_dop"], "space": {}}, "did you mean cal_dpo"),
        ({"objectives": ["sft"], "space": {}}, "sweep.space.sft: empty"),
        ({**TWO, "space": {"dpo": {}}}, "sweep.space.dpo: empty"),
        ({**TWO, "space": {"dop": {"beta": [1.0]}}}, "did you mean dpo"),
        ({**TWO, "space": {"dpo": {"beat": [0.1, 0.2]}, "cal_dpo": {"beta": [0.1, 0.2]}}}, "did you mean beta"),
        ({**TWO, "space": {"all": {"train.epochs": [1, 2]}}}, "train.epochs (for cal_dpo) cannot be searched"),
        ({**TWO, "space": {"all": {"train.learning_rat": [1e-4]}}}, "did you mean train.learning_rate"),
        ({**TWO, "space": {"all": {"beta": []}}}, "at least one value"),
        ({**TWO, "space": {"all": {"beta": [0.1, 0.1]}}}, "different plain values"),
        ({**TWO, "space": {"all": {"beta": {"low": 1.0, "high": 0.1}}}}, "low must be smaller"),
        ({**TWO, "space": {"all": {"beta": {"low": 0.0, "high": 0.1}}}}, "above 0 where log is true"),
        ({**TWO, "space": {"all": {"beta": {"min": 0.0, "high": 0.1}}}}, "a range is"),
        ({**TWO, "space": {"all": {"beta": [-0.1]}}}, "beta = -0.1"),
        ({**TWO, "space": {"all": {"model.lora.r": [8]}}}, "without model.lora"),
        ({**TWO, "space": {"cal_dpo": {"beta": [0.1]}, "dpo": {"beta": [0.1, 1.0]}}}, "cal_dpo 1, dpo 2"),
        ({**TWO, "objectives": ["dpo", "dpo"]}, "dpo is there twice"),
        ({**TWO, "objectives": ["dpo", {"name": "cal_dpo", "label": "a/b"}]}, "label 'a/b'"),
        ({**TWO, "metric": "loss"}, "sweep.metric = loss"),
        ({"objectives": ["dpo"], "space": {"dpo": {"beta": [0.1, 1.0]}}, "metric": "loss"}, "sweep.metric = loss"),
        ({**TWO, "scheduler": "asha"}, "train.eval_every is not"),
        ({**TWO, "searcher": "random"}, "sweep.num_samples: required"),
        ({**TWO, "searcher": "random", "num_samples": 3, "space": {"all": {"beta": [0.1, 0.2]}}}, "only 2 different points"),
        ({**TWO, "seeds": [1, 1]}, "sweep.seeds"),
        ({**TWO, "seeds": 0}, "sweep.seeds"),
        ({**TWO, "objectives": ["dpo", "cpo"], "space": {}, "stop": {"kl": 3.0}}, "cpo has no reference"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(tmp_path: Path, sweep: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as refused:
        plan(tmp_path, sweep)
    assert told in str(refused.value)


def test_a_loss_chooses_between_learning_rates(tmp_path: Path) -> None:
    """Of one objective it has one scale."""
    made = plan(tmp_path, {"objectives": ["sft"], "space": {"sft": {"train.learning_rate": [1e-4, 1e-3]}}})
    assert made.metric == "loss" and made.smallest


def test_without_held_out_rows_nothing_can_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.eval: required for a sweep"):
        plan(tmp_path, TWO, data={"train": "t.jsonl"})


def test_a_trial_has_a_fixed_number_of_workers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.num_workers = \[1, 2\]: trials of a sweep have a fixed number"):
        plan(tmp_path, TWO, train={"num_workers": [1, 2]})


NODES = [Node("a", {"CPU": 8.0, "GPU": 2.0}, {}), Node("b", {"CPU": 2.0}, {})]


@pytest.mark.parametrize(
    ("train", "at_once", "threads"),
    [
        ({"num_workers": 1}, 10, 1),  # a core for each
        ({"num_workers": 2}, 5, 1),
        ({"num_workers": 8}, 1, None),  # alone, it may take what it finds
        ({"num_workers": 1, "num_cpus_per_worker": 4}, 2, 5),  # the cores of both nodes, shared by two
        ({"num_workers": 1, "use_gpu": True}, 2, None),
        ({"num_workers": 1, "use_gpu": True, "num_gpus_per_worker": 0.25}, 8, None),
        ({"num_workers": 1, "use_gpu": True, "num_gpus_per_worker": 0.25, "num_cpus_per_worker": 4}, 2, None),
    ],
)
def test_as_many_trials_as_have_room(tmp_path: Path, train: dict[str, Any], at_once: int, threads: int | None) -> None:
    read = config(tmp_path, {**TWO, "seeds": 5}, train=train)
    assert num_at_once(read, NODES, 20) == at_once and num_threads(read, NODES, at_once) == threads
    assert num_at_once(read, NODES, 1) == 1


OWN = Node("b", {"CPU": 2.0}, OWN_CLUSTER)


def test_a_number_of_trials_is_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, half a core per worker will do. Nobody waits for nodes of a cluster that cannot grow."""
    read = config(tmp_path, {**TWO, "max_concurrent": 20}, train={"num_workers": 1})
    monkeypatch.setattr("caldpo_ray.tuning.sweep_plan.live_nodes", lambda: NODES)
    require_room(read)
    assert num_at_once(read, NODES, 3) == 20
    monkeypatch.setattr("caldpo_ray.tuning.sweep_plan.live_nodes", lambda: [OWN])
    with pytest.raises(NotReady, match=r"sweep\.max_concurrent = 20: the cluster has room for 4 trials of 1 workers"):
        require_room(read)


def test_trials_for_which_nodes_must_come_ask_for_them_and_then_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"num_workers": 2, "use_gpu": True, "num_gpus_per_worker": 1, "label_selector": {"zone": "x"}}
    read = config(tmp_path, {**TWO, "max_concurrent": 3}, train=train)
    head, pod = Node("head", {"CPU": 2.0}, {}), Node("pod", {"CPU": 8.0, "GPU": 2.0}, {"zone": "x"})
    found, asked = iter([[head, *[pod] * count] for count in range(4)]), list[list[Bundle]]()
    monkeypatch.setattr("caldpo_ray.tuning.sweep_plan.live_nodes", lambda: next(found))
    monkeypatch.setattr("caldpo_ray.tuning.sweep_plan.ask_autoscaler", lambda wanted: asked.append(list(wanted)))
    monkeypatch.setattr("caldpo_ray.tuning.sweep_plan.POLL_SECONDS", 0.001)
    require_room(read)
    *waiting, nothing = asked
    assert len(waiting) == 3 and nothing == []
    for wanted in waiting:
        assert [(each.resources["GPU"], each.labels) for each in wanted] == [(1.0, {"zone": "x"})] * 6
    monkeypatch.setattr("caldpo_ray.tuning.sweep_plan.live_nodes", lambda: [head, pod])
    in_vain = config(tmp_path, {**TWO, "max_concurrent": 3}, train={**train, "placement_timeout_seconds": 0.01})
    with pytest.raises(NotReady, match="the cluster has room for 1 trials of 2 workers"):
        require_room(in_vain)


def test_workers_of_one_run_share_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.num_gpus_per_worker.*needs num_workers 1"):
        config(tmp_path, TWO, train={"num_workers": 2, "use_gpu": True, "num_gpus_per_worker": 0.5})


def test_a_sweep_directory_belongs_to_one_sweep(tmp_path: Path) -> None:
    open_sweep_dir(config(tmp_path, TWO))
    open_sweep_dir(config(tmp_path, {**TWO, "seeds": 5, "max_concurrent": 3}))  # more of the same
    with pytest.raises(InputError, match=r"sweep\.space: .*holds another sweep|holds another sweep .*sweep\.space"):
        open_sweep_dir(config(tmp_path, {**TWO, "space": {}}))
    with pytest.raises(InputError, match=r"train\.batch_size: 64 -> 32"):
        open_sweep_dir(config(tmp_path, TWO, train={"batch_size": 32}))


def test_a_run_and_a_sweep_share_no_directory(tmp_path: Path) -> None:
    home = open_sweep_dir(config(tmp_path, TWO))
    with pytest.raises(InputError, match="holds a sweep"):
        open_run_dir(config(tmp_path, TWO), fresh=False)
    (home.path / "config.yaml").write_text("")
    with pytest.raises(InputError, match="holds a run"):
        open_sweep_dir(config(tmp_path, TWO))


def test_what_a_trial_was_and_how_it_ended_is_read_back(tmp_path: Path) -> None:
    home, trial = SweepDir(tmp_path), Trial("dpo", {"objective.beta": 0.1}, 3)
    home.run(trial).path.mkdir(parents=True)
    home.begin(trial)
    assert home.begun() == [trial] and home.outcome(trial) is None
    home.write_outcome(trial, "stopped", "because")
    home.spend(trial, 2.0)
    home.spend(trial, 1.5)
    assert home.outcome(trial) == {"state": "stopped", "reason": "because"} and home.spent(trial) == 3.5
