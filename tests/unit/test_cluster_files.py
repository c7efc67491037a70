"""`cluster/`: every manifest that a user can build, held against schemas and rules; pins, names and configs that must agree."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from caldpo_ray.cluster.placement import Node, bundles, data_task, unplaced
from caldpo_ray.config import Config, load_config

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
KUBERAY = CLUSTER / "kuberay"
CHECKER = REPOSITORY.parent / "shared" / "kuberay"
JOBS = ["jobs/single-gpu", "jobs/split-reference", "jobs/sweep"]
STORAGES = ["pvc", "s3", "gcs"]
SCHEDULING = ["kueue", "volcano", "autoscaling"]
BUILDS = [
    (what, (storage, *more))
    for what in [*JOBS, "dev"]
    for storage in STORAGES
    for more in ((), *((s,) for s in SCHEDULING))
]


def kubectl() -> str:
    return shutil.which("kubectl") or pytest.skip("kubectl, which has kustomize in it, is not installed")


def built(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def documents(path: str) -> list[dict[str, Any]]:
    """As they lie in the repository, without overlays: that needs no kubectl."""
    return [dict(each) for each in yaml.safe_load_all((KUBERAY / path).read_text())]


def written(what: str) -> list[dict[str, Any]]:
    return documents(f"{what}/{'raycluster' if what == 'dev' else 'rayjob'}.yaml")


@cache
def build(what: str, overlays: tuple[str, ...]) -> list[dict[str, Any]]:
    """The resources that a kustomization.yaml of these lines makes."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(KUBERAY, Path(scratch) / "kuberay")
        chosen = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text())
        chosen |= {"resources": [what], "components": [f"overlays/{name}" for name in overlays]}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(chosen))
        return built(folder)


def of_kind(resources: list[dict[str, Any]], *kinds: str) -> dict[str, Any]:
    (found,) = [each for each in resources if each["kind"] in kinds]
    return dict(found)


def cluster_of(resources: list[dict[str, Any]]) -> dict[str, Any]:
    """The RayCluster's spec, a RayJob's or its own."""
    spec = of_kind(resources, "RayJob", "RayCluster")["spec"]
    return dict(spec.get("rayClusterSpec", spec))


@pytest.fixture(scope="module")
def checker() -> Any:
    """CRD schemas closed against misspelling, the operator's own rules, and a lint of security and reliability."""
    if not CHECKER.exists():
        pytest.skip(f"KubeRay's schemas are not at {CHECKER}")
    sys.path.insert(0, str(CHECKER))
    try:
        import validate
    finally:
        sys.path.remove(str(CHECKER))
    return validate.Validator()


@pytest.mark.parametrize(
    ("what", "overlays"), BUILDS, ids=lambda part: part if isinstance(part, str) else "+".join(part)
)
def test_what_can_be_built_is_what_kuberay_accepts(checker: Any, what: str, overlays: tuple[str, ...]) -> None:
    manifest = of_kind(build(what, overlays), "RayJob", "RayCluster")
    assert manifest["metadata"]["namespace"] == "caldpo"
    assert checker.check(manifest, with_lint=True) == []


@pytest.mark.parametrize("what", [*JOBS, "dev"])
def test_what_is_built_upon_is_what_kuberay_accepts(checker: Any, what: str) -> None:
    """Before overlays, so that it is judged where there is no kubectl, too."""
    (manifest,) = written(what)
    assert checker.check(manifest) == []


def test_the_check_finds_a_misspelt_field(checker: Any) -> None:
    manifest = of_kind(written("jobs/single-gpu"), "RayJob")
    wrong = manifest | {"spec": manifest["spec"] | {"shutdownAfterJobFinish": True}}
    assert "shutdownAfterJobFinish" in checker.check(wrong)[0]
    open_spec = manifest["spec"] | {"rayClusterSpec": manifest["spec"]["rayClusterSpec"] | {"authOptions": {}}}
    assert any("authOptions.mode" in line for line in checker.check(manifest | {"spec": open_spec}, with_lint=True))


def test_the_other_kinds_are_what_kubernetes_accepts() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    resources = [*built(KUBERAY / "base"), *build("jobs/single-gpu", ("gcs",))]
    core = [each for each in resources if each["kind"] not in ("RayJob", "RayCluster")]
    kinds = {each["kind"] for each in core}
    assert kinds == {"Namespace", "ServiceAccount", "PersistentVolumeClaim", "NetworkPolicy", "ConfigMap"}
    for each in (*core, *documents("fetch.yaml")):
        validator.validate(each, "1.33", strict=True)
    misspelt = of_kind(resources, "Namespace") | {"metadatas": {}}
    with pytest.raises(validator.ValidationError, match="metadatas"):
        validator.validate(misspelt, "1.33", strict=True)


def test_storage_overlays_say_where_runs_go() -> None:
    """Each job's own URL or claim; with a claim, head and all groups mount it."""
    for what in JOBS:
        name = what.removeprefix("jobs/")
        verb = "sweep" if name == "sweep" else "train"
        for storage, folder in (
            ("pvc", "/mnt/caldpo/runs"),
            ("s3", "s3://my-bucket/caldpo/runs"),
            ("gcs", "gs://my-bucket/caldpo/runs"),
        ):
            resources = build(what, (storage,))
            words = of_kind(resources, "RayJob")["spec"]["entrypoint"].split()
            assert words == ["caldpo", verb, "/etc/caldpo/config.yaml", f"run.output_dir={folder}", f"run.name={name}"]
            cluster = cluster_of(resources)
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                pod = group["template"]["spec"]
                volumes = [each.get("persistentVolumeClaim", {}) for each in pod["volumes"]]
                claims = [each["claimName"] for each in volumes if each]
                mounts = [each["mountPath"] for each in pod["containers"][0]["volumeMounts"]]
                assert claims == ["caldpo-runs"] * (storage == "pvc")
                assert ("/mnt/caldpo" in mounts) == (storage == "pvc")


def nodes_of(cluster: dict[str, Any], grown: bool) -> list[Node]:
    """The Ray nodes that Ray's own autoscaler makes of a manifest, at the size the run starts with, or grown to the full."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    manifest = {"kind": "RayCluster", "metadata": {"name": "x", "namespace": "x"}, "spec": cluster}
    types = _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    counts = {
        group["groupName"]: group["maxReplicas"] if grown else group["replicas"]
        for group in cluster["workerGroupSpecs"]
    }
    return [
        Node(name, node_type["resources"], node_type["labels"])
        for name, node_type in types.items()
        for _ in range(counts.get(name, 1))
    ]


def config_of(what: str) -> Config:
    return load_config(KUBERAY / what / "config.yaml", ["run.output_dir=s3://bucket/runs"])


@pytest.mark.parametrize("what", JOBS)
def test_the_config_of_a_job_fits_its_groups(what: str) -> None:
    """By the labels and resources that Ray reads from the manifest: the head takes no work."""
    config, cluster = config_of(what), cluster_of(written(what))
    nodes = nodes_of(cluster, grown=bool(cluster.get("enableInTreeAutoscaling")))
    assert nodes[0].resources["CPU"] == 0, "the head"
    workers, actors = bundles(config, needs_reference=True)
    for wanted in ([data_task(config)], workers, actors):
        assert unplaced(wanted, nodes) is None
    if what == "jobs/split-reference":
        assert unplaced([*workers, *actors], nodes) is None
        assert unplaced(actors, nodes_of(cluster, grown=False)) is not None, "its group starts from zero"


def test_in_a_queue_the_reference_group_starts_with_a_pod() -> None:
    what = "jobs/split-reference"
    _, actors = bundles(config_of(what), needs_reference=True)
    assert unplaced(actors, nodes_of(cluster_of(build(what, ("pvc", "kueue"))), grown=False)) is None


def test_names_are_resolved_where_a_cache_of_the_node_answers() -> None:
    """No selector of pods matches NodeLocal DNSCache or GKE's Cloud DNS, and whoever may ask for names may ask them."""
    caches = {"169.254.20.10/32", "169.254.169.254/32"}
    for name in ("ray", "submitter"):
        rules = [rule for rule in policy(name)["egress"] if caches & {block(peer) for peer in rule["to"]}]
        (rule,) = rules
        assert {block(peer) for peer in rule["to"]} == {*caches, None}, "and the pods of kube-dns"
        ports = {(port["port"], port["protocol"]) for port in rule["ports"]}
        assert ports == {(53, "UDP"), (53, "TCP")}, "port 80 of the metadata server hands out keys"


@pytest.mark.parametrize("what", JOBS)
def test_the_policies_know_the_pod_that_submits(what: str) -> None:
    """By a label of the pod itself: the operator may label its Job alone, and then the pod could reach nothing."""
    labels = of_kind(written(what), "RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    (to_the_head,) = [rule for rule in policy("submitter")["egress"] if "namespaceSelector" not in rule["to"][0]]
    assert selects(policy("submitter")["podSelector"], labels) and not selects(policy("ray")["podSelector"], labels)
    let_in = [
        rule["ports"]
        for rule in policy("ray")["ingress"]
        for peer in rule["from"]
        if "namespaceSelector" not in peer and selects(peer["podSelector"], labels)
    ]
    assert let_in == [to_the_head["ports"]] == [[{"port": 8265, "protocol": "TCP"}]]


def policy(name: str) -> dict[str, Any]:
    (spec,) = [each["spec"] for each in documents("base/networkpolicy.yaml") if each["metadata"]["name"] == name]
    return dict(spec)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Of pods, by the operators that our policies use."""
    found = selector.get("matchLabels", {}).items() <= labels.items()
    for each in selector.get("matchExpressions", []):
        if each["operator"] == "In":
            found = found and labels.get(each["key"]) in each["values"]
        else:
            assert each["operator"] == "DoesNotExist"
            found = found and each["key"] not in labels
    return bool(found)


def block(peer: dict[str, Any]) -> str | None:
    """Addresses that a policy lets in or out, where it names any."""
    return peer.get("ipBlock", {}).get("cidr")


def test_the_pod_that_fetches_models_is_one_that_the_namespace_admits() -> None:
    (pod,), (job,) = documents("fetch.yaml"), written("jobs/single-gpu")
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    assert pod["spec"]["securityContext"].items() <= submitter["securityContext"].items()
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"] == submitter["containers"][0]["securityContext"]
    (claim,) = [each for each in documents("base/storage.yaml") if each["kind"] == "PersistentVolumeClaim"]
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert pod["metadata"]["namespace"] == documents("base/namespace.yaml")[0]["metadata"]["name"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
    return {re.sub(r"[-_.]+", "-", each.name).lower(): each for each in found}


def test_the_image_pins_what_pyproject_asks_for() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    of_the_image = [line for name in ("s3", "gcs", "tensorboard", "wandb", "optuna") for line in extras[name]]
    asked = requirements([*project["dependencies"], *of_the_image])
    pinned = requirements((CLUSTER / "requirements.txt").read_text().splitlines())
    assert not asked.keys() - pinned.keys()
    for name, pin in pinned.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{name} is not pinned"
        if name in asked:
            assert asked[name].specifier.contains(specifier.version), f"{pin} is not {asked[name]}"
            assert asked[name].extras == pin.extras


def ray_pin() -> str:
    (specifier,) = requirements((CLUSTER / "requirements.txt").read_text().splitlines())["ray"].specifier
    return str(Version(specifier.version))


def test_one_ray_everywhere() -> None:
    """Image, its tag, and what the operator is told."""
    version = ray_pin()
    for what in [*JOBS, "dev"]:
        resources = build(what, ("pvc",))
        cluster = cluster_of(resources)
        assert cluster["rayVersion"] == version
        images = set(re.findall(r"'image': '([^']+)'", str(resources)))
        assert len(images) == 1 and f"-ray{version}-" in images.pop()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_does_not_run_as_root(target: str) -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", text, re.M | re.S))
    users = re.findall(r"^USER (\S+)", stages[target], re.M)
    assert users[-1:] == ["1000:1000"], "a number: `runAsNonRoot` cannot judge a name"


def test_what_the_hub_gives_goes_to_the_volume_that_is_there_for_it() -> None:
    (home,) = re.findall(r"^ENV HF_HOME=(\S+)$", (CLUSTER / "Dockerfile").read_text(), re.M)
    for what in [*JOBS, "dev"]:
        cluster = cluster_of(written(what))
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
            (scratch,) = [each["mountPath"] for each in mounts if each["name"] == "scratch"]
            assert Path(home).is_relative_to(scratch)


def test_the_dockerfile_passes_hadolint() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_secrets_and_data_stay_out_of_the_image() -> None:
    first, *lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert first == "*", "everything but what is named"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert let_in == {"caldpo_ray", "cluster/requirements.txt", "pyproject.toml", "README.md", "LICENSE"}


def alert_rules() -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "monitoring" / "rules.yaml").read_text())["spec"])


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """A run that goes well and one where everything goes wrong, by Prometheus' own test runner."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    (tmp_path / "rules.spec.yaml").write_text(yaml.safe_dump(alert_rules()))
    tests = Path(shutil.copy(CLUSTER / "monitoring" / "rules_test.yaml", tmp_path))
    done = subprocess.run(["promtool", "test", "rules", str(tests)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {each["alertname"] for each in yaml.safe_load(tests.read_text())["tests"][0]["alert_rule_test"]}
    assert tested == {rule["alert"] for group in alert_rules()["groups"] for rule in group["rules"]}


def test_the_ports_that_are_scraped_are_ports_of_the_head() -> None:
    monitor = yaml.safe_load((CLUSTER / "monitoring" / "podmonitor.yaml").read_text())
    head = cluster_of(written("jobs/single-gpu"))["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {each["name"]: each["containerPort"] for each in head["ports"]}
    scraped = {ports[each["port"]] for each in monitor["spec"]["podMetricsEndpoints"]}
    policies = documents("base/networkpolicy.yaml")
    let_in = {
        port["port"] for each in policies for rule in each["spec"].get("ingress", []) for port in rule.get("ports", [])
    }
    assert scraped == {8080, 44217, 44227} and scraped < let_in


def test_the_dashboard_is_one() -> None:
    board = json.loads((CLUSTER / "monitoring" / "dashboard.json").read_text())
    assert [each["name"] for each in board["templating"]["list"]] == ["datasource", "run", "split"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and all(panel["targets"] for panel in board["panels"])


def test_nothing_in_the_folder_is_left_over() -> None:
    """Every overlay and job is named in the README and in the kustomization that is edited."""
    readme, chosen = (CLUSTER / "README.md").read_text(), (KUBERAY / "kustomization.yaml").read_text()
    for folder in sorted([*KUBERAY.glob("jobs/*"), *KUBERAY.glob("overlays/*")]):
        assert folder.name in readme and f"{folder.parent.name}/{folder.name}" in chosen
