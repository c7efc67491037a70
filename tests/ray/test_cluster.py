"""`cluster/` for real: the manifest with two groups as local raylets under Ray's own autoscaler, and runs sent to them.

Head and token come from `single-node/start.sh`, groups with their labels and logical GPUs from the RayJob, as Ray reads it.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from tests.conftest import wait_until
from tests.ray.runs import LiveRun
from tests.unit.test_cluster_files import CLUSTER, KUBERAY, REPOSITORY, build, cluster_of

pytestmark = pytest.mark.ray
JOB = "jobs/split-reference"
ROLES = {"policy", "reference"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class LocalCluster:
    folder: Path
    environment: dict[str, str]
    url: str
    """Of the dashboard."""

    def ask(self, path: str) -> Any:
        token = (self.folder / ".ray" / "auth_token").read_text()
        request = urllib.request.Request(f"{self.url}{path}", headers={"X-Ray-Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def state(self, kind: str) -> list[dict[str, Any]]:
        return list(self.ask(f"/api/v0/{kind}?limit=1000&detail=true")["data"]["result"]["result"])

    def ray(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ray", *arguments], env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def submit(self, run: Path, *overrides: str) -> LiveRun:
        """The job's config on the world, sent with its folder as a user sends it from a laptop."""
        command = ("caldpo", "train", "config.yaml", f"run.name={run.name}", *overrides)
        return LiveRun(run, self.ray("job", "submit", "--working-dir", str(self.folder / "project"), "--", *command))

    def metrics(self) -> dict[str, set[str]]:
        """{name of a series: its label sets} on all metrics ports that Prometheus would find."""
        found: dict[str, set[str]] = {}
        discovery = self.folder / "ray" / "session_latest" / "prom_metrics_service_discovery.json"
        for target in json.loads(discovery.read_text())[0]["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                for name, labels in re.findall(r"^(\w+)\{(.*)\} ", answer.read().decode(), re.M):
                    found.setdefault(name, set()).add(labels)
        return found


def autoscaling_config(folder: Path, gcs_port: int) -> Path:
    """What KubeRay's autoscaler works from, but with raylets on this machine where pods would be."""
    from ray.autoscaler._private.fake_multi_node import node_provider
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = cluster_of(build(JOB, ("pvc",)))
    manifest = {"kind": "RayCluster", "metadata": {"name": "x", "namespace": "x"}, "spec": spec}
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    types = config["available_node_types"]
    types[node_provider.FAKE_HEAD_NODE_TYPE] = types.pop(config["head_node_type"])
    for each in types.values():
        each["resources"].pop("memory", None)  # of the real node
        each["resources"]["object_store_memory"] = 100_000_000
    config["head_node_type"] = node_provider.FAKE_HEAD_NODE_TYPE
    config["provider"] |= {
        "type": "external",
        "module": f"{node_provider.__name__}.FakeMultiNodeProvider",
        "head_node_id": node_provider.FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "gcs_address": f"{ray.util.get_node_ip_address()}:{gcs_port}",
    }
    path = folder / "autoscaling.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCluster]:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    folder = Path(tempfile.mkdtemp(prefix="k"))  # short: sockets lie in it
    gcs, dashboard, metrics, agent = (free_port() for _ in range(4))
    config = autoscaling_config(folder, gcs)
    project = folder / "project"
    shutil.copytree(KUBERAY / JOB, project)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_TMPDIR": str(folder),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_AUTH_MODE": "token",
    }
    of_the_cluster = {
        "RAY_GCS_PORT": str(gcs), "RAY_DASHBOARD_PORT": str(dashboard), "RAY_METRICS_PORT": str(metrics),
        "RAY_metrics_report_interval_ms": "500", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    options = ["--num-cpus=0", f"--autoscaling-config={config}", f"--dashboard-agent-listen-port={agent}"]
    log = (folder / "start.log").open("w")
    process = subprocess.Popen(
        [str(CLUSTER / "single-node" / "start.sh"), *options], env=environment | of_the_cluster, stdout=log, stderr=log
    )
    found = LocalCluster(folder, environment, f"http://127.0.0.1:{dashboard}")
    try:

        def policy_is_there() -> bool:
            assert process.poll() is None, (folder / "start.log").read_text()
            try:
                nodes = found.state("nodes")
            except (OSError, KeyError, ValueError):
                return False
            return {each["labels"].get("caldpo.io/role") for each in nodes} == {None, "policy"}

        wait_until(policy_is_there, "head and policy node")
        yield found
    finally:
        process.terminate()
        process.wait(60)
        for each in psutil.process_iter(["environ"]):  # raylets that the autoscaler started outlive it
            if (each.info["environ"] or {}).get("RAY_TMPDIR") == str(folder):
                each.kill()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Seen:
    first: str
    """What `ray job submit` of the stopped job printed."""
    metrics: dict[str, set[str]]
    second: str


@pytest.fixture(scope="module")
def run(local: LocalCluster, world: Path) -> tuple[LiveRun, Seen]:
    """Sent, stopped at its first checkpoint, and sent again."""
    small = (
        f"run.output_dir={local.folder}/runs", f"model.name_or_path={world}/model", "model.dtype=float32",
        "model.gradient_checkpointing=false", f"data.train={world}/train.jsonl", f"data.eval={world}/eval.jsonl",
        "train.num_workers=2", "train.num_threads_per_worker=1", "train.batch_size=32", "train.learning_rate=3e-4",
        "train.save_every=4", "train.epochs=3", "train.deepspeed.zero_stage=1",
    )  # fmt: skip
    path = local.folder / "runs" / "split"
    live = local.submit(path, *small)
    live.wait_for_checkpoint(4)
    newest = "ray_caldpo_wait_checkpoint_seconds_total"  # there from the line after the checkpoint on
    wait_until(lambda: newest in local.metrics(), "metrics on a metrics port")
    metrics = local.metrics()
    (job,) = [each["submission_id"] for each in local.state("jobs") if each["status"] == "RUNNING"]
    assert local.ray("job", "stop", job).wait(120) == 0
    first = live.process.communicate(timeout=120)[0]
    assert json.loads((path / "status.json").read_text())["state"] == "interrupted", first
    live = local.submit(path, *small)
    return live, Seen(first, metrics, live.finish())


def test_the_reference_group_grows_from_zero_and_each_role_is_where_its_label_says(
    local: LocalCluster, run: tuple[LiveRun, Seen]
) -> None:
    assert "waiting up to 1800 s for the cluster to have room for a reference actor" in run[1].first
    roles = {each["node_id"]: each["labels"].get("caldpo.io/role") for each in local.state("nodes")}
    places: dict[str, set[str | None]] = {}
    for actor in local.state("actors"):
        places.setdefault(actor["class_name"], set()).add(roles[actor["node_id"]])
    assert places["RayTrainWorker"] == {"policy"} and places["Feed"] == {None}
    (scorer,) = [name for name in places if "ReferenceScorer" in name]
    assert places[scorer] == {"reference"}
    assert set(roles.values()) == {None, *ROLES}, "a head, and nodes of both groups"


def test_a_second_submission_goes_on_where_the_first_was_stopped(run: tuple[LiveRun, Seen]) -> None:
    live, seen = run
    steps = [line["step"] for line in live.lines() if line["split"] == "train"]
    assert steps == list(range(1, 40)), "3 epochs of ceil(400 / 32) steps, each once"
    assert "881 scored of 881" in seen.first and "actors idle" not in seen.second, "the store knew them"
    assert "done: model in" in seen.second and (live.path / "model" / "config.json").exists()


def test_rules_and_dashboard_are_about_metrics_that_exist(run: tuple[LiveRun, Seen]) -> None:
    texts = [(CLUSTER / "monitoring" / name).read_text() for name in ("rules.yaml", "dashboard.json")]
    wanted = {name for text in texts for name in re.findall(r"ray_caldpo_\w+", text)}
    absent = wanted - run[1].metrics.keys()
    waits = {f"ray_caldpo_wait_{what}_seconds_total" for what in ("feed", "reference")}  # where nothing waited
    assert absent <= {"ray_caldpo_mfu", *waits}, absent
    seen = run[1].metrics["ray_caldpo_logratios_chosen"]
    assert any('run="split"' in labels and 'split="train"' in labels for labels in seen), seen


def test_what_cannot_work_is_refused(local: LocalCluster, run: tuple[LiveRun, Seen]) -> None:
    """A folder that would go with the job, and a client without the token. Submit itself ends with 1."""
    refused = local.ray(
        "job", "submit", "--working-dir", str(local.folder / "project"), "--", "caldpo", "train", "config.yaml"
    )
    stranger = subprocess.run(
        ["ray", "job", "list"],
        env=local.environment | {"HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert stranger.returncode == 1 and "token" in (stranger.stdout + stranger.stderr).lower()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{local.url}/api/jobs/", timeout=30)
    said = refused.communicate(timeout=120)[0]
    assert refused.returncode == 1
    assert re.search(r"run\.output_dir runs: relative to the packaged working directory.*\n.*exit code 2", said), said
