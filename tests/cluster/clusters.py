"""A manifest of `cluster/kuberay` as a cluster on this machine: local raylets where pods would be, and jobs sent to them.

Head and token come from `single-node/start.sh`, groups with their labels and logical GPUs from the manifest, as Ray reads it, and
Ray's own autoscaler starts their nodes.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from tests.conftest import wait_until
from tests.unit.test_cluster_files import CLUSTER, KUBERAY, REPOSITORY, cluster_of, documents, written


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class LocalCluster:
    folder: Path
    """Of its processes, which have it as home and as temporary folder, and of nothing that lasts."""
    environment: dict[str, str]
    url: str
    """Of the dashboard."""

    def ask(self, path: str, method: str = "GET") -> Any:
        token = (self.folder / ".ray" / "auth_token").read_text()
        headers = {"X-Ray-Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{self.url}{path}", headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def state(self, kind: str) -> list[dict[str, Any]]:
        return list(self.ask(f"/api/v0/{kind}?limit=1000&detail=true")["data"]["result"]["result"])

    def ray(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ray", *arguments], env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def submit(self, *command: str, by_file: bool = False) -> subprocess.Popen[str]:
        """Sent with the folder of configs, as a user sends it from a laptop; the runtime environment in a YAML file or not."""
        how = ["--working-dir", str(self.project)]
        if by_file:
            settings = {"working_dir": str(self.project), "env_vars": {"HF_HUB_OFFLINE": "1"}}
            (self.folder / "env.yaml").write_text(yaml.safe_dump(settings))
            how = ["--runtime-env", str(self.folder / "env.yaml")]
        return self.ray("job", "submit", *how, "--", *command)

    def running_job(self) -> str:
        (job,) = [each["submission_id"] for each in self.state("jobs") if each["status"] == "RUNNING"]
        return str(job)

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def session(self) -> Path:
        return self.folder / "ray" / "session_latest"

    def roles(self) -> dict[str, str | None]:
        """{node: what its label says, "unlabelled" without one, None for the head, which takes no work}."""
        return {
            each["node_id"]: each["labels"].get("caldpo.io/role", "unlabelled")
            if each["resources_total"].get("CPU")
            else None
            for each in self.state("nodes")
        }

    def places(self) -> dict[str, set[str | None]]:
        """{class of actors: roles of the nodes on which they live or lived}."""
        roles, found = self.roles(), dict[str, set[str | None]]()
        for actor in self.state("actors"):
            if actor["node_id"] in roles:  # else it was never placed
                found.setdefault(actor["class_name"], set()).add(roles[actor["node_id"]])
        return found

    def metrics(self) -> dict[str, set[str]]:
        """{name of a series: its label sets} on all metrics ports that Prometheus would find."""
        found: dict[str, set[str]] = {}
        for target in json.loads(self.discovery.read_text())[0]["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                for name, labels in re.findall(r"^(\w+)\{(.*)\} ", answer.read().decode(), re.M):
                    found.setdefault(name, set()).add(labels)
        return found

    @property
    def discovery(self) -> Path:
        return self.session / "prom_metrics_service_discovery.json"

    def events(self) -> list[dict[str, Any]]:
        """What policy workers logged as JSON lines."""
        lines = [
            line for file in (self.session / "logs").glob("worker-*.out") for line in file.read_text().splitlines()
        ]
        return [json.loads(line) for line in lines if line.startswith('{"time"')]

    def die(self) -> None:
        """All at once, as when the node of the head is lost; also the clients that wait for their jobs."""
        for each in psutil.process_iter(["environ"]):
            if (each.info["environ"] or {}).get("RAY_TMPDIR") == str(self.folder):
                each.kill()


def autoscaling_config(folder: Path, gcs_port: int, what: str, with_sweeps: bool) -> dict[str, Any]:
    """What KubeRay's autoscaler works from, but with raylets on this machine where pods would be."""
    from ray.autoscaler._private.fake_multi_node import node_provider

    # As written: storage and Volcano change nothing of what is read here, the overlays of Kueue and autoscaling do.
    config = read_by_ray(cluster_of(written(what)))
    types = config["available_node_types"]
    types[node_provider.FAKE_HEAD_NODE_TYPE] = types.pop(config["head_node_type"])
    if with_sweeps:
        types["sweep"] = group_of_sweeps()
        config["max_workers"] += types["sweep"]["max_workers"]
    for each in types.values():
        each["resources"].pop("memory", None)  # of the real node
        each["resources"]["object_store_memory"] = 100_000_000
    config["head_node_type"] = node_provider.FAKE_HEAD_NODE_TYPE
    config["provider"] |= {
        "type": "external",
        "module": "tests.cluster.raylets.RayletProvider",
        "head_node_id": node_provider.FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "gcs_address": f"{ray.util.get_node_ip_address()}:{gcs_port}",
    }
    return config


def read_by_ray(spec: dict[str, Any]) -> dict[str, Any]:
    """A RayCluster's spec as Ray's autoscaler reads it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    manifest = {"kind": "RayCluster", "metadata": {"name": "x", "namespace": "x"}, "spec": spec}
    return dict(_derive_autoscaling_config_from_ray_cr(manifest))


def group_of_sweeps() -> dict[str, Any]:
    """As many as the autoscaling overlay says, from zero; the label is that of this test, to tell its nodes from the others."""
    spec = cluster_of(written("jobs/sweep"))
    (group,) = spec["workerGroupSpecs"]
    group |= {"labels": {"caldpo.io/role": "sweep"}, **autoscaled_sizes()}
    return dict(read_by_ray(spec)["available_node_types"][group["groupName"]])


def autoscaled_sizes() -> dict[str, int]:
    """{"replicas": 0, ...}: what the autoscaling overlay writes into a job's first group; its patch is read without kubectl."""
    (overlay,) = documents("overlays/autoscaling/kustomization.yaml")
    (patch,) = [each["patch"] for each in overlay["patches"] if each["target"] == {"kind": "RayJob"}]
    first = "/spec/rayClusterSpec/workerGroupSpecs/0/"
    changes = {each["path"]: each["value"] for each in yaml.safe_load(patch)}
    return {path.removeprefix(first): value for path, value in changes.items() if path.startswith(first)}


def environments(folder: Path, ports: list[int]) -> tuple[dict[str, str], dict[str, str]]:
    """(of everything that is started here, what the cluster has besides)."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    gcs, dashboard, metrics = ports
    common = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_TMPDIR": str(folder),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_AUTH_MODE": "token",
    }
    return common, {
        "RAY_GCS_PORT": str(gcs), "RAY_DASHBOARD_PORT": str(dashboard), "RAY_METRICS_PORT": str(metrics),
        "RAY_metrics_report_interval_ms": "500", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip


@contextmanager
def local_cluster(what: str, with_sweeps: bool = False) -> Iterator[LocalCluster]:
    """The cluster of a manifest, from when the nodes are there with which it begins; killed as a whole in the end."""
    folder = Path(tempfile.mkdtemp(prefix="k"))  # short: sockets lie in it
    ports = [free_port() for _ in range(3)]
    common, of_the_cluster = environments(folder, ports)
    (folder / "project").mkdir()
    for config in KUBERAY.glob("jobs/*/config.yaml"):
        shutil.copy(config, folder / "project" / f"{config.parent.name}.yaml")
    autoscaling = autoscaling_config(folder, ports[0], what, with_sweeps)
    (folder / "autoscaling.yaml").write_text(yaml.safe_dump(autoscaling))
    options = ["--num-cpus=0", f"--autoscaling-config={folder}/autoscaling.yaml"]
    options += [f"--dashboard-agent-listen-port={free_port()}"]
    with (folder / "start.log").open("w") as log:
        command = [str(CLUSTER / "single-node" / "start.sh"), *options]
        process = subprocess.Popen(command, env=common | of_the_cluster, stdout=log, stderr=log)
    found = LocalCluster(folder, common, f"http://127.0.0.1:{ports[1]}")
    first_nodes = sum(each.get("min_workers", 0) for each in autoscaling["available_node_types"].values())

    def all_there() -> bool:
        assert process.poll() is None, (folder / "start.log").read_text()
        try:
            return len(found.roles()) == 1 + first_nodes
        except (OSError, KeyError, ValueError):
            return False

    try:
        wait_until(all_there, f"the head and {first_nodes} nodes of {what}")
        yield found
    finally:
        found.die()  # also the raylets that the autoscaler started, which outlive it
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
