"""Storage that is full, read-only, slow, or away for a while: asked again, then one message, and nothing half done is believed."""

import contextlib
import errno
import http.client
import os
import re
import resource
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.fs
import pytest

from caldpo_ray import storage
from caldpo_ray.config import load_config
from caldpo_ray.errors import InputError, NotReady, RunError
from caldpo_ray.reading.sources import iterate, list_sources
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.run_dir import append_metrics, finish_metrics, read_metrics, require_writable, truncate_metrics
from caldpo_ray.storage import (
    Unreachable,
    file_facts,
    full_disk_told,
    is_complete,
    local_copy,
    open_path,
    publishing,
    ray_train_storage,
    reaching,
    read_bytes,
    remove_tree,
    write_atomically,
)
from caldpo_ray.store import ReferenceStore, list_references
from tests.unit.test_sources import as_nobody
from tests.unit.test_sources_remote import LINES, RECORDS, Server, no_pauses, read, s3, serve
from tests.unit.tiny_models import random_rows

__all__ = ["no_pauses", "s3"]  # the fixtures


class Faulty(BaseHTTPRequestHandler):
    """Stands before the S3 server. `fault` says what happens to a request: None lets it pass."""

    protocol_version = "HTTP/1.1"
    behind: ClassVar[tuple[str, int]]
    fault: ClassVar[Callable[[int], str | None]]
    num_requests: ClassVar[int] = 0
    lock: ClassVar[Any] = threading.Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.lock:
            type(self).num_requests += 1
            fault = type(self).fault(self.num_requests)
        with contextlib.suppress(ConnectionError):
            if fault in ("503", "500"):
                self.answer(
                    int(fault),
                    [],
                    f"<Error><Code>{'SlowDown' if fault == '503' else 'InternalError'}</Code></Error>".encode(),
                )
            elif fault == "reset":
                self.close_connection = True
            elif fault == "silence":
                self.rfile.read(1)  # until who asked has had enough
                self.close_connection = True
            else:
                self.pass_on(body, cut=fault == "cut")

    def pass_on(self, body: bytes, cut: bool) -> None:
        connection = http.client.HTTPConnection(*self.behind)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.answer(answer.status, answer.getheaders(), content, cut and self.command == "GET")

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        length = dict(headers).get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any


@pytest.fixture
def faulty(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], str | None]], None]]:
    """Sets what happens to the requests to S3 from now on. Pauses between tries take no time."""
    import s3fs

    address = re.sub("^http://", "", os.environ["AWS_ENDPOINT_URL"]).split(":")
    Faulty.behind, Faulty.fault, Faulty.num_requests = (address[0], int(address[1])), lambda number: None, 0
    monkeypatch.setattr("random.random", lambda: 0.0)  # botocore's pauses are random parts of the longest
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    s3fs.S3FileSystem.clear_instance_cache()

    def behave(fault: Callable[[int], str | None]) -> None:
        Faulty.fault, Faulty.num_requests = staticmethod(fault), 0

    yield behave
    server.shutdown()
    server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


def whole_cycle(root: Path) -> None:
    """Everything that a run does with its storage."""
    write_atomically(root / "config.yaml", "a: 1")
    assert read_bytes(root / "config.yaml") == b"a: 1"
    for step in range(1, 4):
        append_metrics(root / "metrics.jsonl", {"step": step, "split": "train"})
    truncate_metrics(root / "metrics.jsonl", 2)
    finish_metrics(root / "metrics.jsonl")
    assert [line["step"] for line in read_metrics(root / "metrics.jsonl")] == [1, 2]
    with publishing(root / "model") as scratch:
        scratch.mkdir()
        (scratch / "weights").write_bytes(b"w" * 100_000)
    assert is_complete(root / "model") and (local_copy(root / "model") / "weights").read_bytes() == b"w" * 100_000
    rows = random_rows(*[(3, 2, 4)] * 7)
    write_manifest(root / "rows", [write_part(root / "rows", rows, (0, 0))], {})
    assert len(RowCache([str(root / "rows")])) == 7
    store = ReferenceStore.create(str(root / "store"), "key", {"model": "m", "dtype": "float32"})
    store.append(np.frombuffer(bytes(range(32)), "V16"), np.arange(2, dtype=np.float32), np.ones(2, np.int32))
    assert store.load()[1].tolist() == [0, 1]
    assert list_references(str(root / "store"))[0]["entries"] == 2
    remove_tree(root / "model")
    assert file_facts(root / "model") == []
    with tempfile.TemporaryDirectory() as node:  # as Ray Train moves checkpoints
        (Path(node) / "state").write_bytes(b"s" * 100_000)
        there = ray_train_storage(root / "checkpoints")
        filesystem, name = there["storage_filesystem"], f"{there['storage_path']}/step-00000001"
        filesystem.create_dir(name)
        pyarrow.fs.copy_files(node, name, destination_filesystem=filesystem)
        (Path(node) / "back").mkdir()
        pyarrow.fs.copy_files(name, f"{node}/back", source_filesystem=filesystem)
        assert (Path(node) / "back" / "state").read_bytes() == b"s" * 100_000


@pytest.mark.parametrize("fault", ["503", "500", "reset", "cut"])
def test_every_second_request_may_fail(
    fault: str, faulty: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    faulty(lambda number: fault if number % 2 else None)
    whole_cycle(open_path(f"s3://data/faults-{fault}"))
    assert Faulty.num_requests > 40


def test_a_server_that_says_nothing_is_asked_again(
    faulty: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(storage.PATIENCE["config_kwargs"], "read_timeout", 0.3)
    faulty(lambda number: "silence" if number % 16 == 0 else None)
    whole_cycle(open_path("s3://data/silence"))
    assert Faulty.num_requests > 40


def test_a_server_that_takes_nothing_is_not_waited_for_without_an_end(
    faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not even said that it would take the body, for which botocore waits before it counts the seconds."""
    import s3fs

    monkeypatch.setattr(storage, "WRITE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(Unreachable, match="the storage does not answer"):
            write_atomically(open_path("s3://data/mute"), "1")


def test_an_outage_is_one_message_and_the_same_goes_on_afterwards(
    faulty: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = open_path("s3://data/outage")
    write_atomically(root / "old", "1")
    faulty(lambda number: "500")
    store = ReferenceStore(root / "store")

    def publish() -> None:
        with publishing(root / "model") as scratch:
            scratch.mkdir()
            (scratch / "weights").touch()

    uses: list[Callable[[], Any]] = [
        lambda: write_atomically(root / "new", "1"),
        lambda: read_bytes(root / "old"),
        lambda: append_metrics(root / "metrics.jsonl", {"step": 1}),
        lambda: remove_tree(root / "old"),
        lambda: file_facts(root / "old"),
        lambda: local_copy(root / "old"),
        lambda: store.append(np.frombuffer(bytes(16), "V16"), np.zeros(1, np.float32), np.ones(1, np.int32)),
        publish,
    ]
    for use in uses:
        with pytest.raises(
            Unreachable, match=r"s3://data/outage/.*: the storage does not answer \(.*; what was saved is kept, and"
        ):
            use()
    assert Faulty.num_requests >= 8 * len(uses), "asked again and again"
    with (
        pytest.raises(NotReady, match=r"run\.output_dir s3://data/outage: cannot be used"),
        reaching("run.output_dir", root),
    ):
        write_atomically(root / "new", "1")
    faulty(lambda number: None)
    assert read_bytes(root / "old") == b"1" and not (root / "new").exists() and not is_complete(root / "model")
    whole_cycle(root)


def test_an_upload_that_stops_half_way_is_not_complete(faulty: Any) -> None:
    target = open_path("s3://data/half/model")

    def publish(text: str) -> None:
        with publishing(target) as scratch:
            scratch.mkdir()
            for number in range(5):
                (scratch / f"part-{number}").write_text(text)

    publish("old")
    puts = 0

    def third_put_fails(number: int) -> str | None:
        nonlocal puts
        return "500" if (puts := puts + 1) > 6 else None

    faulty(third_put_fails)
    with pytest.raises(Unreachable):
        publish("new")
    faulty(lambda number: None)
    assert not is_complete(target)
    publish("new")
    assert is_complete(target) and (target / "part-4").read_text() == "new"


# --- Rows ---


class CutOnce(Server):
    """Ends the first bodies half way."""

    files: ClassVar = {"/a.jsonl": LINES * 50}
    cuts: ClassVar[list[bool]] = []

    def do_GET(self) -> None:
        self.cut = bool(self.cuts) and self.cuts.pop()
        super().do_GET()


class CutOnceWithoutRanges(CutOnce):
    ranges = False


@pytest.mark.parametrize("server", [CutOnce, CutOnceWithoutRanges])
def test_a_connection_that_is_lost_is_taken_up_where_it_was(server: type[CutOnce], no_pauses: None) -> None:
    with serve(server) as url:
        server.cuts[:] = [True] * 3
        assert read(f"{url}/a.jsonl") == RECORDS * 50
        assert not server.cuts
        server.cuts[:] = [True] * 9
        with pytest.raises(RunError, match=r"reading stopped \(.*run the same command again"):
            read(f"{url}/a.jsonl")


class Changing(CutOnce):
    """Has another file from the moment it cuts a body."""

    files: ClassVar = {"/a.jsonl": LINES * 50}

    def reply_file(self, content: bytes, **headers: str) -> None:
        if self.cut:
            self.files["/a.jsonl"] = LINES[:-1] + b" " + LINES * 49
        super().reply_file(content, **headers)


def test_a_file_that_changes_while_it_is_read_is_not_mixed(no_pauses: None) -> None:
    with serve(Changing) as url:
        [source] = list_sources(f"{url}/a.jsonl")
        Changing.cuts[:] = [True]
        with pytest.raises(InputError, match=r"changed while it was read; leave it alone"):
            list(iterate(source, 10))


def test_rows_are_read_although_the_server_fails_now_and_then(faulty: Any, no_pauses: None) -> None:
    open_path("s3://data/rows/a.jsonl").write_bytes(LINES * 50)
    for fault in ("503", "reset", "cut"):
        faulty(lambda number, fault=fault: fault if number % 2 else None)
        assert read("s3://data/rows/a.jsonl") == RECORDS * 50


# --- Disks ---

ONE = np.zeros(1, np.float32), np.ones(1, np.int32)


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """As on a disk that is full: no file grows beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, "old")
    with pytest.raises(RunError, match=r": cannot be written \(File too large\); make room there"):  # noqa: SIM117
        with small_files(1000), full_disk_told(tmp_path):
            write_atomically(path, "new" * 9999)
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["manifest.json"]


def test_a_metrics_line_that_did_not_fit_is_gone_after_the_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1, "split": "train"})
    with small_files(path.stat().st_size + 9), pytest.raises(OSError) as caught:
        append_metrics(path, {"step": 2, "split": "train"})
    assert caught.value.errno == errno.EFBIG
    truncate_metrics(path, 1)
    append_metrics(path, {"step": 2, "split": "train"})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_store_on_a_full_disk_keeps_its_entries(tmp_path: Path) -> None:
    store = ReferenceStore.create(tmp_path, "key", {"model": "m", "dtype": "float32"})
    digests = np.frombuffer(np.random.default_rng(0).bytes(16 * 500), "V16")
    store.append(digests[:10], np.zeros(10, np.float32), np.ones(10, np.int32))
    with pytest.raises(RunError, match=r"cannot be written \(File too large\); make room there"), small_files(3000):
        store.append(digests[10:], np.zeros(490, np.float32), np.ones(490, np.int32))
    assert len(store.load()[0]) == 10


def test_a_store_that_may_only_be_read_serves_and_says_why_it_does_not_remember() -> None:
    with tempfile.TemporaryDirectory() as root:  # not pytest's, where nobody else may look
        Path(root).chmod(0o755)
        digests = np.frombuffer(bytes(range(32)), "V16")
        ReferenceStore.create(root, "key", {"model": "m", "dtype": "float32"}).append(digests[:1], *ONE)
        with as_nobody():
            store = ReferenceStore.create(root, "key", {})
            assert len(store.load()[0]) == 1
            with pytest.raises(
                RunError, match=r"reference store .*key: cannot be written \(Permission denied\); give a writable"
            ):
                store.append(digests[1:], *ONE)
            with pytest.raises(NotReady, match=r"reference\.store .*: cannot be written"):
                ReferenceStore.create(root, "other", {})


def test_a_run_directory_that_may_only_be_read_is_refused_at_the_start() -> None:
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        config = Path(root) / "c.yaml"
        config.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\n")
        told = r"run\.output_dir .*: cannot write .*; give a writable folder"
        with as_nobody(), pytest.raises(InputError, match=told):
            require_writable(load_config(config, {"run.output_dir": f"{root}/runs"}))


@pytest.mark.parametrize(("number", "way_out"), [(errno.EROFS, "make it writable"), (errno.ENOSPC, "make room there")])
def test_a_disk_that_takes_no_more_is_one_message(number: int, way_out: str) -> None:
    with (
        pytest.raises(RunError, match=rf"^/d/f: cannot be written \(.*\); {way_out}, and the same"),
        full_disk_told("/d"),
    ):
        raise OSError(number, os.strerror(number), "/d/f")


def test_copies_are_not_taken_from_a_folder_of_somebody_else(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_atomically(open_path("s3://data/theirs/weights"), "w")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"caldpo-copies-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotReady, match=r"belongs to somebody else; delete it, or set TMPDIR"):
        local_copy(open_path("s3://data/theirs"))
    assert not list((tmp_path / "elsewhere").iterdir())
