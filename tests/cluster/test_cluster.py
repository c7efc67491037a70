"""`cluster/` for real: jobs sent to the clusters that its manifests describe (see `clusters.py`).

One run is sent to the manifest with two groups, in a cluster that dies as a whole; it goes on at a second cluster on the same
storage as a RayJob's retry would, is stopped there, and is sent again; then a sweep. The manifests with one group get a short run.
"""

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from caldpo_ray.cluster.access import look
from caldpo_ray.errors import NotReady
from tests.cluster.clusters import LocalCluster, free_port, local_cluster
from tests.conftest import wait_until
from tests.ray.runs import LiveRun, Run
from tests.unit.test_cluster_files import CLUSTER, alert_rules

pytestmark = pytest.mark.ray
SPLIT = "jobs/split-reference"
SAVE_EVERY, NUM_STEPS = 6, 104  # 8 epochs of ceil(400 / 32)
SECONDS = 180.0  # for a job


# -- the run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both clusters see."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def small(storage: Path, world: Path) -> tuple[str, ...]:
    """Overrides that make the jobs' configs small, but for what decides where things run."""
    return (
        f"run.output_dir={storage}/runs", f"model.name_or_path={world}/model", "model.dtype=float32",
        f"data.train={world}/train.jsonl", f"data.eval={world}/eval.jsonl", "train.num_threads_per_worker=1",
        "train.batch_size=32", "train.learning_rate=3e-4", "train.placement_timeout_seconds=90",
    )  # fmt: skip


@pytest.fixture(scope="module")
def command(small: tuple[str, ...]) -> list[str]:
    settings = [
        "run.name=split", "model.gradient_checkpointing=false", "train.num_workers=2", "train.epochs=8",
        f"train.save_every={SAVE_EVERY}", "train.deepspeed.zero_stage=1",
    ]  # fmt: skip
    return ["caldpo", "train", "split-reference.yaml", *small, *settings]


@dataclass
class Seen:
    """Of the first cluster, while the run went on there."""

    places: dict[str, set[str | None]]
    roles: set[str | None]
    metrics: dict[str, set[str]]
    events: list[dict[str, Any]]
    printed: dict[str, tuple[int, str]]
    """{job: (exit code of `ray job submit`, what it printed)} of those that end with an error."""
    access: dict[str, str]
    """What `caldpo cluster check` said."""
    prometheus: dict[str, Any]


@pytest.fixture(scope="module")
def first(storage: Path, command: list[str]) -> Seen:
    """The run up to a checkpoint on a cluster that then dies, and beside it jobs that cannot work."""
    live_path = storage / "runs" / "split"
    with local_cluster(SPLIT) as cluster, prometheus(cluster) as server:
        live = LiveRun(live_path, cluster.submit(*command))
        nowhere = ["run.name=nowhere", "train.label_selector={caldpo.io/role: nowhere}"]
        wrong = {
            "nowhere": cluster.submit(*command, *nowhere, "train.placement_timeout_seconds=2"),
            "relative": cluster.submit("caldpo", "train", "split-reference.yaml", by_file=True),
            "relative sweep": cluster.submit("caldpo", "sweep", "sweep.yaml"),
        }
        access = looked_at(cluster)
        printed = {name: ended(process) for name, process in wrong.items()}
        live.wait_for_checkpoint(SAVE_EVERY)
        newest = "ray_caldpo_wait_checkpoint_seconds_total"  # there from the line after the checkpoint on
        wait_until(lambda: newest in cluster.metrics(), "metrics on a metrics port")
        answers = {} if server is None else server.answers(newest)
        seen = Seen(
            cluster.places(),
            set(cluster.roles().values()),
            cluster.metrics(),
            cluster.events(),
            printed,
            access,
            answers,
        )
        assert live.process.poll() is None, live.process.communicate()[0]
        cluster.die()
        live.process.communicate(timeout=60)
        return seen


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed = process.communicate(timeout=SECONDS)[0]
    return process.returncode, printed


def looked_at(cluster: LocalCluster) -> dict[str, str]:
    """The cluster as `caldpo cluster check` sees it, with its token, with another one, and with none; and as a command does
    that would join it with another one.
    """
    joining = {
        "RAY_ADDRESS": (cluster.folder / "ray" / "ray_current_cluster").read_text(),
        "RAY_AUTH_TOKEN": "a" * 40,
        "RAY_NUM_REDIS_GET_RETRIES": "1",  # Ray would try for half a minute
    }
    command = [
        "caldpo",
        "train",
        str(cluster.project / "split-reference.yaml"),
        f"run.output_dir={cluster.folder}/refused",
    ]
    driver = subprocess.Popen(command, env=cluster.environment | joining, text=True, stderr=subprocess.PIPE)

    def told() -> str:
        try:
            return "\n".join(look(cluster.url))
        except NotReady as error:
            return str(error)

    token, found = (cluster.folder / ".ray" / "auth_token").read_text(), {}
    for name, variables in (
        ("right", {"RAY_AUTH_TOKEN": token}),
        ("wrong", {"RAY_AUTH_TOKEN": "a" * 40}),
        ("none", {}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
                patch.delenv(variable, raising=False)
            patch.setenv("HOME", "/nowhere")
            for variable, value in {"RAY_AUTH_MODE": "token", **variables}.items():
                patch.setenv(variable, value)
            found[name] = told()
    found["driver"] = driver.communicate(timeout=SECONDS)[1]
    assert driver.returncode == 2, found["driver"]
    return found


@pytest.fixture(scope="module")
def second(first: Seen) -> Iterator[LocalCluster]:
    with local_cluster(SPLIT, with_sweeps=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def finished(first: Seen, second: LocalCluster, storage: Path, command: list[str]) -> tuple[Run, str, str]:
    """(the run, log of the second submission, output of the third): stopped, and once more by a YAML file."""
    before = json.loads((storage / "runs" / "split" / "status.json").read_text())
    assert before["state"] == "running", "nobody could write that it ended"
    live = LiveRun(storage / "runs" / "split", second.submit(*command))
    live.wait_for_checkpoint(live.newest_checkpoint() + SAVE_EVERY)
    job = second.running_job()
    second.ask(f"/api/jobs/{job}/stop", "POST")  # as `ray job stop`, which takes longer to start than the run to end
    live.process.communicate(timeout=60)  # the client may leave before the last lines
    stopped = second.ask(f"/api/jobs/{job}/logs")["logs"]
    assert json.loads((live.path / "status.json").read_text())["state"] == "interrupted", stopped
    live = LiveRun(live.path, second.submit(*command, by_file=True))
    return live, stopped, live.finish(seconds=SECONDS)


@dataclass
class Swept:
    home: Path
    printed: list[str]
    """Logs of the submission that was stopped after the first trial, and of the one that went on."""
    before: dict[Path, int]
    """{outcome of a trial: its time} when it was stopped."""
    status: dict[str, Any]
    """What it left then."""
    published: set[str]
    """Label sets of a series of the process that drives a trial."""
    places: dict[str, set[str | None]]


@pytest.fixture(scope="module")
def swept(finished: tuple[Run, str, str], second: LocalCluster, storage: Path, small: tuple[str, ...]) -> Swept:
    """Two trials, one after the other, on the group of sweeps; stopped after the first one, and sent again by a YAML file."""
    settings = [
        "run.name=sweep", "train.max_steps=4", "train.save_every=4", "train.eval_every=4", "sweep.objectives=[dpo]",
        "sweep.space={dpo: {beta: [0.1]}}", "sweep.seeds=2", "sweep.max_concurrent=1",
        "train.label_selector={caldpo.io/role: sweep}",
    ]  # fmt: skip
    command, home = ["caldpo", "sweep", "sweep.yaml", *small, *settings], storage / "runs" / "sweep"
    job = second.submit(*command)

    def published() -> set[str]:
        assert job.poll() is None, job.communicate()[0]
        with suppress(OSError):  # a node that is about to come
            return {each for each in second.metrics().get("ray_caldpo_worker_group_starts", ()) if "trial=" in each}
        return set()

    seen = wait_until(published, "metrics of a trial", SECONDS)
    before = wait_until(lambda: outcomes(home), "a trial", SECONDS)
    sent = second.running_job()
    second.ask(f"/api/jobs/{sent}/stop", "POST")
    job.communicate(timeout=SECONDS)
    stopped, status = second.ask(f"/api/jobs/{sent}/logs")["logs"], json.loads((home / "status.json").read_text())
    job = second.submit(*command, by_file=True)
    printed = job.communicate(timeout=SECONDS)[0]
    assert job.returncode == 0, printed
    return Swept(home, [stopped, printed], before, status, seen, second.places())


def outcomes(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in home.glob("trials/*/outcome.json")}


# -- Prometheus ----------------------------------------------------------------------------------------------------------


@dataclass
class Prometheus:
    url: str

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=30) as answer:
            return json.load(answer)["data"]

    def series(self, query: str) -> list[dict[str, Any]]:
        return list(self.ask(f"query?{urllib.parse.urlencode({'query': query})}")["result"])

    def answers(self, newest: str) -> dict[str, Any]:
        """Once it has scraped `newest` and judged all rules."""
        wait_until(lambda: self.series(newest), f"Prometheus to have {newest}", 60)

        def judged() -> list[dict[str, Any]]:
            groups = self.ask("rules")["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            return rules if all(rule["health"] != "unknown" for rule in rules) else []

        return {
            "rules": wait_until(judged, "Prometheus to judge the rules", 60),
            "step": self.series("ray_caldpo_step"),
            "names": self.ask("label/__name__/values"),
        }


@contextmanager
def prometheus(cluster: LocalCluster) -> Iterator[Prometheus | None]:
    """A server that finds the metrics ports as Ray lists them, with our rules; None where it is not installed."""
    if shutil.which("prometheus") is None:
        yield None
        return
    folder, port = cluster.folder / "prometheus", free_port()
    folder.mkdir()
    (folder / "rules.yaml").write_text(yaml.safe_dump(alert_rules()))
    ports = [{"files": [str(cluster.discovery)], "refresh_interval": "1s"}]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": ports}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    options = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "data"}
    command = ["prometheus", *(f"--{name}={path}" for name, path in options.items())]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


# -- what must hold ------------------------------------------------------------------------------------------------------


def test_the_reference_group_grows_from_zero_and_each_role_is_where_its_label_says(first: Seen) -> None:
    assert first.places["RayTrainWorker"] == {"policy"} and first.places["Feed"] == {None}
    (scorer,) = [name for name in first.places if "ReferenceScorer" in name]
    assert first.places[scorer] == {"reference"}
    assert first.roles == {None, "policy", "reference"}, "a head, and nodes of both groups"


def test_a_label_that_no_node_has_is_told_within_the_deadline(first: Seen, storage: Path) -> None:
    """Submit itself ends with 1; our code is in the last line and in `status.json`."""
    code, printed = first.printed["nowhere"]
    assert code == 1 and "caldpo: exit code 2" in printed
    status = json.loads((storage / "runs" / "nowhere" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert (
        "a policy worker (2 wanted) needs 2 CPU, 1 GPU on a node labelled {'caldpo.io/role': 'nowhere'}"
        in status["reason"]
    )
    assert "16 CPU, 4 GPU, labels {'caldpo.io/role': 'policy'}" in status["reason"], "what there is"


@pytest.mark.parametrize("job", ["relative", "relative sweep"])
def test_a_folder_that_would_go_with_the_job_is_refused(first: Seen, job: str) -> None:
    code, printed = first.printed[job]
    assert code == 1
    refused = r"run\.output_dir runs: relative to the packaged working directory.*\n.*exit code 2"
    assert re.search(refused, printed), printed


def test_who_has_no_token_or_a_wrong_one_is_told(first: Seen) -> None:
    assert "labels {'caldpo.io/role': 'policy'}" in first.access["right"], "the nodes"
    assert "refuses the token of RAY_AUTH_TOKEN" in first.access["wrong"]
    assert "asks for a token and got none" in first.access["none"]
    refused = r"refuses this process \(.*token is missing or incorrect\); export RAY_AUTH_MODE=token"
    assert re.search(refused, first.access["driver"]), first.access["driver"]


def test_rules_and_dashboard_are_about_metrics_that_exist(first: Seen) -> None:
    texts = [(CLUSTER / "monitoring" / name).read_text() for name in ("rules.yaml", "dashboard.json")]
    wanted = {name for text in texts for name in re.findall(r"ray_caldpo_\w+", text)}
    absent = wanted - first.metrics.keys()
    waits = {f"ray_caldpo_wait_{what}_seconds_total" for what in ("feed", "reference")}  # where nothing waited
    assert absent <= {"ray_caldpo_mfu", *waits}, absent
    seen = first.metrics["ray_caldpo_logratios_chosen"]
    assert any('run="split"' in labels and 'split="train"' in labels for labels in seen), seen


def test_prometheus_scrapes_them_and_judges_the_rules(first: Seen) -> None:
    if not first.prometheus:
        pytest.skip("prometheus is not installed")
    assert {rule["health"] for rule in first.prometheus["rules"]} == {"ok"}
    assert "firing" not in {rule["state"] for rule in first.prometheus["rules"]}, "the run goes well"
    (step,) = [each for each in first.prometheus["step"] if each["metric"]["split"] == "train"]
    assert step["metric"]["run"] == "split" and float(step["value"][1]) >= SAVE_EVERY
    assert "ray_caldpo_reference_scored" in first.prometheus["names"]


def test_workers_log_what_they_do_with_run_rank_and_step(first: Seen) -> None:
    of_the_run = [event for event in first.events if event["run"] == "split"]
    assert {event["rank"] for event in of_the_run} == {0, 1} and {event["trial"] for event in of_the_run} == {None}
    started = [event for event in of_the_run if event["event"] == "training"]
    assert [(event["step"], event["world_size"], event["num_steps"]) for event in started] == [(0, 2, NUM_STEPS)] * 2
    assert {event["rank"] for event in of_the_run if event["event"] == "checkpoint"} == {0, 1}
    assert [event["step"] for event in of_the_run if event["event"] == "train"][:3] == [1, 2, 3], "rank 0 alone"


def test_a_run_goes_on_at_a_second_cluster_and_after_a_stop(finished: tuple[Run, str, str]) -> None:
    run, stopped, printed = finished
    steps = [line["step"] for line in run.lines() if line["split"] == "train"]
    assert steps == list(range(1, NUM_STEPS + 1)), "each once"
    assert "interrupted; the same command resumes the run\ncaldpo: exit code 130" in stopped
    assert "done: model in" in printed and (run.path / "model" / "config.json").exists()


def test_a_sweep_is_sent_like_a_run(swept: Swept) -> None:
    assert re.search(r"reference: (\d+) rows, \1 of them known", swept.printed[0]), "by the run before"
    results = json.loads((swept.home / "sweep.json").read_text())
    assert results["objectives"]["dpo"]["completed"] == 2, results


def test_a_sweep_that_is_stopped_goes_on_and_keeps_its_trials(swept: Swept) -> None:
    assert (swept.status["state"], swept.status["exit_code"]) == ("interrupted", 130)
    assert "interrupted; the same command resumes the run\ncaldpo: exit code 130" in swept.printed[0]
    after = outcomes(swept.home)
    assert len(swept.before) == 1 and len(after) == 2 and swept.before.items() <= after.items(), "not run again"
    assert json.loads((swept.home / "status.json").read_text())["state"] == "complete"


def test_the_group_of_sweeps_grows_from_zero_for_as_many_trials_as_were_asked_for(swept: Swept) -> None:
    assert "for the cluster to have room for 1 trials at once" in swept.printed[0]
    assert swept.places["RayTrainWorker"] == {"policy", "sweep"}, "the run before, and the trials"


def test_trials_are_told_by_the_name_of_their_sweep_and_their_own(swept: Swept, second: LocalCluster) -> None:
    (labels,) = swept.published
    assert 'run="sweep"' in labels and 'trial="dpo-beta-0.1-seed-' in labels
    trials = {event["trial"] for event in second.events() if event["run"] == "sweep"}
    assert trials == {path.parent.name for path in outcomes(swept.home)}


@pytest.mark.parametrize("what", ["jobs/single-gpu", "dev"])
def test_on_one_gpu_the_reference_scores_and_then_the_policy_trains(
    what: str, small: tuple[str, ...], storage: Path
) -> None:
    """By the manifests that have one group without a label; the head takes no work there either."""
    name = what.replace("/", "-")
    command = ["caldpo", "train", "single-gpu.yaml", *small, f"run.name={name}", "train.max_steps=2"]
    command.append(f"reference.store={storage}/{name}")  # empty: the reference is needed
    with local_cluster(what) as cluster:
        code, printed = ended(cluster.submit(*command))
        places, roles = cluster.places(), cluster.roles()
    assert code == 0 and "done: model in" in printed, printed
    assert sorted(map(str, roles.values())) == ["None", "unlabelled"], "a head and one node"
    (scorer,) = [name for name in places if "ReferenceScorer" in name]
    assert places["RayTrainWorker"] == places[scorer] == {"unlabelled"} and places["Feed"] == {None}
    found = json.loads((storage / "runs" / name / "manifest.json").read_text())["places"]
    on_gpus = {(place["role"], *place["gpus"]) for place in found}
    assert on_gpus == {("reference actor", "0"), ("policy worker", "0")}
