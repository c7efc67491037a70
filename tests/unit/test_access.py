"""What keeps a process from a cluster is told in one message that names it, and what to do."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from caldpo_ray.cli import main
from caldpo_ray.cluster.access import look, lost_cluster, refusal
from caldpo_ray.errors import NotReady

TOKEN = "a" * 40
NODE = {
    "node_ip": "10.0.0.2",
    "state": "ALIVE",
    "resources_total": {"CPU": 16.0, "GPU": 4.0},
    "labels": {"ray.io/node-id": "x", "caldpo.io/role": "policy"},
}


class Dashboard(BaseHTTPRequestHandler):
    """The answers of Ray's dashboard with token authentication, as its source has them."""

    ray_version = version("ray")

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        if given is None:
            return self._answer(401, b"Unauthorized: Missing authentication token")
        if given != f"Bearer {TOKEN}":
            return self._answer(403, b"Forbidden: Invalid authentication token")
        nodes = {"data": {"result": {"result": [NODE]}}}
        found = {"ray_version": self.ray_version} if self.path == "/api/version" else nodes
        return self._answer(200, json.dumps(found).encode())

    def _answer(self, code: int, text: bytes) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


class OlderDashboard(Dashboard):
    ray_version = "2.10.0"


class OtherServer(Dashboard):
    def do_GET(self) -> None:
        self._answer(200, b"<html>")


@contextmanager
def serving(handler: type[Dashboard]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def speaking_grpc() -> Iterator[str]:
    """A server that greets whoever asks as gRPC does, by settings of HTTP/2."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            client, _ = server.accept()
            with client:
                client.recv(4096)
                client.sendall(bytes.fromhex("00001e040000000000000300ffffffff00040040000000060000ffff"))

        thread = threading.Thread(target=greet)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No token of the person who runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_cluster_that_takes_jobs_tells_its_nodes_and_labels(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    with serving(Dashboard) as address, pytest.raises(SystemExit) as stopped:
        main(["cluster", "check", "--address", address])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{address}: Ray {version('ray')}, 1 node",
        "  10.0.0.2 (alive): 16 CPU, 4 GPU, labels {'caldpo.io/role': 'policy'}",
    ]


def test_a_token_is_missing_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Dashboard) as address:
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)  # without the mode Ray does not send it
        with pytest.raises(NotReady, match="asks for a token and got none; export RAY_AUTH_MODE=token"):
            look(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        assert len(look(address)) == 2
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN[:-1])
        with pytest.raises(NotReady, match=r"refuses the token of RAY_AUTH_TOKEN; .*cluster/README\.md") as error:
            look(address)
        assert TOKEN[:-1] not in str(error.value)


def test_nobody_or_somebody_else_is_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotReady, match=r"127.0.0.1:9: no answer .*refused.*port-forward.*RAY_API_SERVER_ADDRESS"):
        look("http://127.0.0.1:9")
    for other in (serving(OtherServer), speaking_grpc()):
        with other as address, pytest.raises(NotReady, match=f"{address}: is something else than Ray's dashboard"):
            look(address)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"two\nlines"])
def test_a_file_that_holds_no_token_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    (home / "token").write_bytes(content)
    with serving(Dashboard) as address, pytest.raises(NotReady, match="/token: holds no token, which is one") as error:
        look(address)
    assert "lines" not in str(error.value)


def test_another_version_is_named_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serving(OlderDashboard) as address, pytest.raises(NotReady, match=r"runs Ray 2\.10\.0.*ray==2\.10\.0"):
        look(address)


def test_what_ray_says_to_a_driver_is_told_in_one_line() -> None:
    from ray._private.utils import check_version_info  # whose words they are

    theirs = {"ray_version": "2.10.0", "python_version": "3.9.1"}
    with pytest.raises(RuntimeError) as mismatch:
        check_version_info(theirs, "node 10.0.0.3")
    told = refusal(mismatch.value, "10.0.0.1:6379")
    assert "10.0.0.1:6379 runs Ray 2.10.0 on Python 3.9.1, and this is Ray" in told and "\n" not in told
    wrong = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    wrong.__cause__ = RuntimeError(
        'Failed to connect to GCS. Last connection error: Traceback (most recent call last):\n  File "node.py", line 996\n'
        "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing or incorrect."
        " Ensure that the token is in a file.\n"
    )
    told = refusal(wrong, "10.0.0.1:6379")
    assert told.startswith(
        "Ray: 10.0.0.1:6379 refuses this process (ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken:"
        " Authentication token is missing or incorrect); export RAY_AUTH_MODE=token"
    )
    gone = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    gone.__cause__ = RuntimeError("Last connection error: Timed out while waiting for GCS to become available.")
    assert "check RAY_ADDRESS" in refusal(gone, "10.0.0.1:6379")


def test_a_cluster_that_is_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert lost_cluster() is None, "no cluster was ever made"
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert lost_cluster() is None
    assert lost_cluster() == address
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert lost_cluster() is None, "who names a cluster means it"
