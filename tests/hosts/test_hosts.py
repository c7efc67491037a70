"""Several hosts on one machine: network namespaces with an address each, joined by a bridge, and a raylet in each.

Nothing of this machine's own network is touched: bridge and cables lie in namespaces, too. Needs root and `ip` (Debian: iproute2),
and is skipped elsewhere. `make hosts`, some minutes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.ray.runs import LiveRun, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
HEAD, PORT = "10.77.0.1", 6379
START_SECONDS = 120  # on a machine that others keep busy


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass
class Network:
    """Hosts by their number, which is the end of their address; the first one is the head."""

    prefix: str
    folder: Path
    """In it Ray's sessions, a folder per host, and what `ray start` printed."""
    hosts: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def switch(self) -> str:
        return f"{self.prefix}-sw"

    def name(self, number: int) -> str:
        return f"{self.prefix}-{number}"

    def build(self) -> None:
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")

    def plug_in(self, number: int) -> None:
        name, port = self.name(number), f"port{number}"
        ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", self.switch)
        ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
        ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        # There is no way out; but Ray asks for the address that would be taken.
        ip("-n", name, "route", "add", "default", "dev", "eth0")

    def cut_off(self, number: int) -> None:
        """Nothing is closed or told: packets are lost, as when a cable is pulled."""
        ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_TMPDIR": str(self.folder),
            "RAY_raylet_start_wait_time_s": str(START_SECONDS),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "GLOO_SOCKET_IFNAME": "eth0",  # by itself gloo asks for the address of the host's name, which all hosts share
        }

    def start(self, number: int, *options: str, hidden: Iterable[Path] = ()) -> None:
        """A host with its raylet. `hidden` are folders of this machine that are empty on that host.

        Returns when the raylet is up: of several that start at once on a busy machine, each dies when its agent takes 15 s.
        """
        self.plug_in(number)
        role = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"] if number == 1 else [f"--address={HEAD}:{PORT}"]
        )
        command = [
            "ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address=10.77.0.{number}", "--num-gpus=0",
            "--object-store-memory=100000000", *role, *options,
        ]  # fmt: skip
        with self.log(number).open("w") as log:
            self.hosts[number] = subprocess.Popen(
                self.on_host(number, *command, hidden=hidden), env=self.environment(), stdout=log, stderr=log
            )

        def started() -> bool:
            printed = self.log(number).read_text()
            assert self.hosts[number].poll() is None, printed
            return "Ray runtime started" in printed

        wait_until(started, f"host {number}", START_SECONDS)

    def log(self, number: int) -> Path:
        return self.folder / f"{number}.log"

    def on_host(self, number: int, *command: str, hidden: Iterable[Path] = ()) -> list[str]:
        """The command there. Mounts of `ip netns exec` are its own and end with it: each host has its own folder for Ray."""
        own, rays = self.folder / str(number), self.folder / "ray"
        for folder in (own, rays):
            folder.mkdir(exist_ok=True)
        mounts = [f"mount --bind {own} {rays}", *(f"mount -t tmpfs none {each}" for each in hidden), 'exec "$@"']
        return ["ip", "netns", "exec", self.name(number), "sh", "-c", " && ".join(mounts), "sh", *command]

    def on_head(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.on_host(1, *command), env=self.environment() | {"RAY_ADDRESS": f"{HEAD}:{PORT}"}, cwd=self.folder,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ask(self, *arguments: str) -> dict[str, str]:
        """What `tests.hosts.ask` prints: a word, and what it says of it."""
        process = self.on_head(sys.executable, "-m", "tests.hosts.ask", *arguments)
        printed = process.communicate(timeout=200)[0]
        assert process.returncode == 0, printed
        return dict(line.split(" ", 1) for line in printed.splitlines() if " " in line)

    def tear_down(self) -> None:
        names = [line.split()[0] for line in ip("netns", "list").splitlines()]
        for name in [name for name in names if name.startswith(f"{self.prefix}-")]:
            for pid in map(int, ip("netns", "pids", name).split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ip("netns", "del", name)
        for process in self.hosts.values():
            process.wait(30)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A head without CPUs, two hosts for the policy with room for one worker each, one for the reference."""
    if shutil.which("ip") is None:
        pytest.skip("no command `ip`, which makes network namespaces (Debian: apt-get install iproute2)")
    found = Network(f"cal{os.getpid()}", Path(tempfile.mkdtemp(prefix="h")))
    try:
        try:
            found.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"no network namespaces here, for which root must have its rights: `{' '.join(error.cmd)}`: {error.stderr.strip()}"
            )
        found.start(1, "--num-cpus=0")
        for number, role in ((2, "policy"), (3, "policy"), (4, "reference")):
            found.start(number, "--num-cpus=1", "--labels", f"caldpo.io/role={role}")
        yield found
    finally:
        found.tear_down()
        shutil.rmtree(found.folder, ignore_errors=True)


def test_a_run_outlives_a_host_that_is_cut_off(network: Network, world: Path, tmp_path: Path) -> None:
    """Policy on two hosts, reference on a third; the second is cut off in mid-run, and a new host takes its place."""
    policy, reference = ({"label_selector": {"caldpo.io/role": role}} for role in ("policy", "reference"))
    config = write_config(
        tmp_path, world, data=policy, reference={**reference, "num_cpus_per_actor": 1},
        train={
            **policy, "num_cpus_per_worker": 1, "epochs": 8, "save_every": 8, "max_failures": 3,
            "placement_timeout_seconds": START_SECONDS,
        },
    )  # fmt: skip
    live = LiveRun(tmp_path / "runs" / "hosts", network.on_head(
        sys.executable, "-m", "caldpo_ray", "train", str(config), "run.name=hosts"
    ))  # fmt: skip
    live.wait_for_checkpoint(8)
    network.cut_off(3)
    started, step = time.monotonic(), live.lines()[-1]["step"]
    network.start(5, "--num-cpus=1", "--labels", "caldpo.io/role=policy")
    live.wait_for_step(step + 3)  # those after it that were computed already are no more than two
    print(f"\na host that is cut off: {time.monotonic() - started:.1f} s until the run went on", flush=True)
    printed = live.finish(seconds=300)
    steps = [line["step"] for line in live.lines() if line["split"] == "train"]
    assert steps == list(range(1, 8 * 13 + 1)), "each once"
    for address in ("10.77.0.2", "10.77.0.3"):
        assert f"1 policy worker on {address}" in printed, printed
    places = {place["node"]: place["role"] for place in json.loads((live.path / "manifest.json").read_text())["places"]}
    assert places["10.77.0.5"] == "policy worker" and places.get("10.77.0.4") == "reference actor", places


def package_folders() -> set[Path]:
    """Where a node would find the package: in this checkout, and in the one that was installed, if that is another."""
    # A checkout that was installed from is found as a distribution of its own, which does not say where it lies.
    told = [each.read_text("direct_url.json") for each in distributions(name="caldpo-ray")]
    installed = [Path(json.loads(text)["url"].removeprefix("file://")) for text in told if text]
    return {folder / "caldpo_ray" for folder in (REPOSITORY, *installed)}


def test_a_host_with_other_storage_or_without_the_package_is_named(network: Network, tmp_path: Path) -> None:
    network.start(6, "--num-cpus=1", "--labels", "caldpo.io/role=apart", hidden=[tmp_path])
    network.start(7, "--num-cpus=1", "--labels", "caldpo.io/role=bare", hidden=package_folders())
    told = network.ask("lacks", str(tmp_path), "reference", "apart", "bare")
    assert told["reference"] == "nothing"
    assert told["apart"].startswith("node 10.77.0.6, labels {'caldpo.io/role': 'apart'}: run.output_dir"), told
    assert "is another folder there than for the driver" in told["apart"]
    assert told["bare"].startswith("node 10.77.0.7") and "cannot run caldpo_ray" in told["bare"], told
    assert "No module named 'caldpo_ray" in told["bare"] and "the same image" in told["bare"]
    assert not list(tmp_path.iterdir()), "nothing is left"
    going = network.ask("lacks-while-draining", str(tmp_path), "apart", "reference")
    assert going == {"apart": "nothing", "reference": "nothing"}, "a node that is about to go is not asked"
