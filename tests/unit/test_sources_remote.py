"""Sources behind a network, against servers in this process: S3 (moto), a small dataset hub, plain HTTP."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caldpo_ray.errors import InputError, RunError
from caldpo_ray.reading import sources
from caldpo_ray.reading.sources import SourceFile, iterate, list_sources
from caldpo_ray.schema import BadRow

RECORDS = [{"prompt": f"p{i} 好", "chosen": "a" * i, "rejected": "b"} for i in range(50)]
SECRET = "a-secret-that-nobody-tells"
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def parquet(records: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer, row_group_size=20)
    return buffer.getvalue()


def read(spec: str) -> list[Any]:
    return [record for source in list_sources(spec) for batch in iterate(source, 7) for _, record in batch]


class Server(BaseHTTPRequestHandler):
    """Serves ``files`` by path, in ranges unless told otherwise."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]]
    ranges = True
    cut = False  # ends every body half way

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):  # the reader may have had enough
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        self.close_connection = self.cut

    def reply_file(self, body: bytes, **headers: str) -> None:
        headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not self.ranges or wanted is None:
            return self.reply(200, body, **headers, **({"Accept_Ranges": "bytes"} if self.ranges else {}))
        first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
        return self.reply(206, body[first : last + 1], **headers, Content_Range=f"bytes {first}-{last}/{len(body)}")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in self.files:
            self.reply_file(self.files[path])
        else:
            self.reply(404)

    do_HEAD = do_GET


@contextlib.contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- S3 ---


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A bucket ``data`` on a server of its own, through the environment a user would set."""
    import moto.server as moto
    import s3fs

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        filesystem = s3fs.S3FileSystem()
        if not filesystem.exists("data"):  # all servers of one process share their buckets
            filesystem.mkdir("data")
        filesystem.pipe_file("data/train/a.jsonl.gz", gzip.compress(LINES))
        filesystem.pipe_file("data/train/deep/b.parquet", parquet(RECORDS[:10]))
        filesystem.pipe_file("data/train/_SUCCESS", b"")
        filesystem.pipe_file("data/train/_tmp/c.jsonl", b"{}")
        yield filesystem
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_folder_file_and_glob(s3: Any) -> None:
    folder = list_sources("s3://data/train")
    assert [(source.path, source.kind, source.compression) for source in folder] == [
        ("s3://data/train/a.jsonl.gz", "jsonl", "gzip"),
        ("s3://data/train/deep/b.parquet", "parquet", None),
    ]
    assert folder[0].size_bytes == len(gzip.compress(LINES))
    assert list_sources("s3://data/train/") == folder
    assert list_sources("s3://data/train/a.jsonl.gz") == folder[:1]
    assert list_sources("s3://data/train/*.gz") == folder[:1]
    assert list_sources("s3://data/train/**/*.parquet") == folder[1:]
    assert read("s3://data/train") == RECORDS + RECORDS[:10]


def test_s3_fingerprint_follows_the_content(s3: Any) -> None:
    prints = []
    for content in (b'{"a":1}\n', b'{"a":2}\n', b'{"a":1}\n'):
        s3.pipe_file("data/changing.jsonl", content)
        [source] = list_sources("s3://data/changing.jsonl")
        prints.append(source.fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_s3_broken_object_and_bad_line(s3: Any) -> None:
    s3.pipe_file("data/broken.jsonl.gz", gzip.compress(LINES)[:-5])
    with pytest.raises(InputError, match=r"s3://data/broken\.jsonl\.gz: broken after line \d+ "):
        read("s3://data/broken.jsonl.gz")
    s3.pipe_file("data/bad.jsonl", b'{"a":1}\nno\n')
    assert read("s3://data/bad.jsonl")[1] == BadRow(
        "s3://data/bad.jsonl", 2, "not JSON: Expecting value at character 1"
    )


def test_s3_object_that_vanished_after_listing(s3: Any) -> None:
    s3.pipe_file("data/gone.jsonl", LINES)
    [source] = list_sources("s3://data/gone.jsonl")
    s3.rm_file("data/gone.jsonl")
    s3.invalidate_cache()
    with pytest.raises(InputError, match=r"s3://data/gone\.jsonl: nothing there"):
        list(iterate(source, 1))


@pytest.mark.parametrize("spec", ["s3://data/nothing.jsonl", "s3://data/none/*.jsonl", "s3://no-such-bucket/a.jsonl"])
def test_s3_nothing_there(s3: Any, spec: str) -> None:
    with pytest.raises(InputError, match=re.escape(spec)):
        list_sources(spec)


# --- HTTP ---


class Plain(Server):
    files: ClassVar = {
        "/a.jsonl.gz": gzip.compress(LINES),
        "/b.parquet": parquet(RECORDS),
        "/c.csv": b"a,b\n1,2\n",
        "/large/b.parquet": parquet([{"a": os.urandom(60_000)} for _ in range(100)]),
        "/large.jsonl": (json.dumps({"a": "x" * 100_000}) + "\n").encode() * 80,  # more than a block of fsspec
    }


class WithoutRanges(Plain):
    ranges = False


class Interrupted(Plain):
    cut = True


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    with serve(Plain) as url:
        yield url


@pytest.fixture(scope="module")
def without_ranges() -> Iterator[str]:
    with serve(WithoutRanges) as url:
        yield url


@pytest.fixture(scope="module")
def interrupted() -> Iterator[str]:
    with serve(Interrupted) as url:
        yield url


def test_http(plain: str) -> None:
    assert read(f"{plain}/a.jsonl.gz") == RECORDS
    assert read(f"{plain}/b.parquet?download=true") == RECORDS
    assert read(f"{plain}/c.csv") == [{"a": "1", "b": "2"}]
    with pytest.raises(InputError, match="nothing there"):
        list_sources(f"{plain}/d.csv")


def test_http_fingerprint_follows_the_content(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [before] = list_sources(f"{plain}/c.csv")
    monkeypatch.setitem(Plain.files, "/c.csv", b"a,b\n1,3\n")
    [after] = list_sources(f"{plain}/c.csv")
    assert (before.size_bytes, before.fingerprint) != (after.size_bytes, after.fingerprint)
    assert before.size_bytes == after.size_bytes


def test_http_server_without_ranges(without_ranges: str) -> None:
    assert read(f"{without_ranges}/a.jsonl.gz") == RECORDS
    assert read(f"{without_ranges}/large.jsonl") == [{"a": "x" * 100_000}] * 80
    with pytest.raises(InputError, match=r"b\.parquet: only readable as a whole .*; download it first"):
        read(f"{without_ranges}/large/b.parquet")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the tries to read a file."""
    monkeypatch.setattr(sources, "PAUSES", (0.0,) * 3)


@pytest.mark.usefixtures("no_pauses")
def test_a_lost_connection_can_be_tried_again(interrupted: str) -> None:
    message = r"a\.jsonl\.gz: reading stopped \(ClientPayloadError.*run the same command again"
    with pytest.raises(RunError, match=message):
        read(f"{interrupted}/a.jsonl.gz")


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_server_that_does_not_answer_can_be_tried_again(kind: Literal["csv", "parquet"]) -> None:
    url = f"http://127.0.0.1:1/a.{kind}"
    with pytest.raises(RunError, match=r"no access .*check network"):
        list_sources(url)
    with pytest.raises(RunError, match=r"no access .*check network"):
        list(iterate(SourceFile(url, kind, None, None, fingerprint=""), 1))


# --- Hub ---

COMMIT = hashlib.sha1(b"the commit").hexdigest()
CARD = (
    b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_prefs\n    path: prefs/*.jsonl.gz\n---\n"
)
CARD_TWO = b"---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n---\n"
REPOS = {
    "org/rows": {
        "README.md": b"# Rows\n",
        "data/train-00000-of-00002.parquet": parquet(RECORDS[:30]),
        "data/train-00001-of-00002.parquet": parquet(RECORDS[30:]),
        "data/test-00000-of-00001.parquet": parquet(RECORDS[:3]),
    },
    "org/prefs": {
        "README.md": CARD,
        "prefs/a.jsonl.gz": gzip.compress(b'{"a":1}\nno\n'),
        "other.jsonl": b"{}\n",
    },
    "org/two": {"README.md": CARD_TWO, "a.jsonl": LINES, "b.jsonl": LINES},
    "org/text": {"train.txt": b"words\n"},
    "org/empty": {"README.md": b"# Nothing\n"},
}


class Hub(Server):
    """The endpoints of the hub that huggingface_hub and datasets call to list and read a dataset."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        called = re.fullmatch(
            r"(?:/api)?/datasets/(org/\w+)(?:/(revision|tree|resolve)/(main|[0-9a-f]{40})(?:/(.*))?)?", path
        )
        if called is None or called[1] not in REPOS:
            return self.reply(404, X_Error_Code="RepoNotFound")
        files, action, name = REPOS[called[1]], called[2], called[4] or ""
        if action == "resolve":
            if name in files:
                return self.reply_file(files[name], X_Repo_Commit=COMMIT)
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        if action == "tree":
            recursive = "recursive=true" in self.path.lower()
            return self.reply_json(self.tree(files, f"{name}/" if name else "", recursive))
        return self.reply_json({"id": called[1], "sha": COMMIT, "siblings": [], "tags": [], "private": False})

    do_HEAD = do_GET

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for name, content in files.items():
            if not name.startswith(folder):
                continue
            inner = name.removeprefix(folder).split("/")
            for depth in range(1, len(inner)):
                path = folder + "/".join(inner[:depth])
                entries[path] = {"type": "directory", "path": path, "oid": COMMIT, "size": 0}
            oid = hashlib.sha1(content).hexdigest()
            entries[name] = {"type": "file", "path": name, "oid": oid, "size": len(content)}
        return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(folder)]


# The libraries read HF_ENDPOINT when they are imported, so the questions are asked in a process of their own.
ASK = """
import json, sys
from caldpo_ray.errors import InputError, RunError
from caldpo_ray.schema import BadRow
from caldpo_ray.reading.sources import SourceFile, iterate, list_sources

def answer(spec):
    try:
        sources = list_sources(spec)
        items = [item for source in sources for batch in iterate(source, 7) for item in batch]
        rows = [(line, str(record) if isinstance(record, BadRow) else record) for line, record in items]
    except (InputError, RunError) as error:
        return type(error).__name__, str(error)
    return [source.path for source in sources], [source.fingerprint for source in sources], rows

json.dump({spec: answer(spec) for spec in sys.argv[1:]}, sys.stdout)
"""


def ask(endpoint: str, home: pathlib.Path, *specs: str, **more: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | more
    done = subprocess.run([sys.executable, "-c", ASK, *specs], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    specs = [
        "hub:org/rows", "hub:org/rows:test", "hub:org/rows:dev", "hub:org/prefs", "hub:org/prefs:train_prefs",
        "hub:org/two", "hub:org/text", "hub:org/empty", "hub:org/missing",
        "hf://datasets/org/rows/data/test*.parquet", "hf://datasets/org/rows", "hf://datasets/org/missing/a.jsonl",
    ]  # fmt: skip
    with serve(Hub) as endpoint:
        return ask(endpoint, tmp_path_factory.mktemp("hub"), *specs)


def test_hub_dataset_is_read_by_split_at_a_commit(hub: dict[str, Any]) -> None:
    paths, prints, rows = hub["hub:org/rows"]
    root = f"hf://datasets/org/rows@{COMMIT}/data"
    assert paths == [f"{root}/train-00000-of-00002.parquet", f"{root}/train-00001-of-00002.parquet"]
    assert len(set(prints)) == 2
    assert rows == [[n, record] for n, record in zip([*range(1, 31), *range(1, 21)], RECORDS, strict=True)]
    paths, _, rows = hub["hub:org/rows:test"]
    assert paths == [f"{root}/test-00000-of-00001.parquet"]
    assert [record for _, record in rows] == RECORDS[:3]


def test_hub_dataset_with_splits_of_its_own(hub: dict[str, Any]) -> None:
    [path], _, rows = hub["hub:org/prefs:train_prefs"]
    assert path == f"hf://datasets/org/prefs@{COMMIT}/prefs/a.jsonl.gz"
    assert rows[0] == [1, {"a": 1}]
    assert rows[1] == [2, str(BadRow(path, 2, "not JSON: Expecting value at character 1"))]


def test_hub_urls(hub: dict[str, Any]) -> None:
    paths, _, rows = hub["hf://datasets/org/rows/data/test*.parquet"]
    assert paths == ["hf://datasets/org/rows/data/test-00000-of-00001.parquet"]
    assert [record for _, record in rows] == RECORDS[:3]
    assert len(hub["hf://datasets/org/rows"][2]) == 53


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:org/rows:dev", "no split 'dev'; it has train, test"),
        ("hub:org/prefs", "no split 'train'; it has train_prefs"),
        ("hub:org/two", "hf://datasets/org/two/FOLDER/*.parquet"),
        ("hub:org/text", "unknown extension; known are .jsonl"),
        ("hub:org/empty", "doesn't contain any data files"),
        ("hub:org/missing", "doesn't exist on the Hub or cannot be accessed"),
        ("hf://datasets/org/missing/a.jsonl", "nothing there"),
    ],
)
def test_hub_datasets_that_cannot_be_used(hub: dict[str, Any], spec: str, message: str) -> None:
    kind, text = hub[spec]
    assert kind == "InputError"
    assert message in text
    assert "\n" not in text


def test_hub_that_cannot_be_reached(tmp_path: pathlib.Path) -> None:
    refused = ask("http://127.0.0.1:1", tmp_path, "hf://datasets/org/rows/a.jsonl")
    offline = ask("http://127.0.0.1:1", tmp_path, "hub:org/rows", HF_HUB_OFFLINE="1")
    for kind, text in (refused | offline).values():
        assert kind == "RunError"
        assert "check network and" in text
