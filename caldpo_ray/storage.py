"""Folders on disk and on object storage: `pathlib` for both, and here the few things that differ.

On a disk files and folders appear by a rename. Object storage has neither folders nor renames: a file appears with the end of its
upload, and a folder that we publish is complete once its last file, `_SUCCESS`, is there (the convention of Hadoop and Spark).
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from caldpo_ray.errors import InputError, NotReady, RunError, last_line
from caldpo_ray.redaction import require_no_secret

COMPLETE = "_SUCCESS"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
EXTRAS = {"s3": "caldpo-ray[s3]", "s3a": "caldpo-ray[s3]", "gs": "caldpo-ray[gcs]", "gcs": "caldpo-ray[gcs]"}
SILENCE_SECONDS = 60  # of a web server, which may be busy
S3_SILENCE_SECONDS = 15  # each time it is asked for something
# Of a file in one piece: for a server that takes nothing and refuses nothing, clients wait without an end.
WRITE_SECONDS = 900
DOWNLOAD_SECONDS = 600  # without a byte more, of another process for which this one waits
LOCK_POLL_SECONDS = 0.1
# Of S3: what it refuses because it is busy or away is asked for again for about a minute, each time after twice as long.
PATIENCE: dict[str, dict[str, Any]] = {
    "config_kwargs": {"retries": {"max_attempts": 7}, "read_timeout": S3_SILENCE_SECONDS}
}
# What file systems call that which changes with a file's content, the surest first.
CONTENT_FACTS = ("ETag", "etag", "md5Hash", "mtime", "created", "LastModified")


class Unreachable(RunError):
    """Object storage failed, again and again, after it had served."""


def is_remote(name: str | Path) -> bool:
    """Whether this is a URL of object storage, not a folder that the operating system knows."""
    return "://" in str(name) and not str(name).startswith("file://")


def open_path(name: str | Path) -> Path:
    """A path of pathlib; for a URL one that behaves like it (`universal_pathlib`). Credentials come from the environment.

    Raises InputError for a URL that holds some.
    """
    if not is_remote(name):
        return Path(str(name).removeprefix("file://"))
    try:
        require_no_secret(str(name))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    from upath import UPath  # local runs need neither this nor fsspec

    # Without a cache of listings: other processes write there at the same time.
    found: Any = UPath(str(name), use_listings_cache=False, **patience(str(name)))
    return found  # type: ignore[no-any-return]


def patience(name: str) -> dict[str, Any]:
    """Options of the file system behind a URL: how long it waits, and how often it asks again, where its own are too small."""
    if name.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        # By default a file must have come after five minutes, however much of it there is.
        return {
            "client_kwargs": {
                "timeout": ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
            }
        }
    return PATIENCE if name.startswith(("s3://", "s3a://")) else {}


def _filesystem(path: Path) -> tuple[Any, str]:
    """(the fsspec file system of a remote path, the path in it)."""
    remote: Any = path
    return remote.fs, remote.path


@contextmanager
def reaching(key: str, name: str | Path) -> Iterator[None]:
    """What remote storage raises in here comes out as one message: `key` says where the user named it. Raises NotReady."""
    try:
        yield
    except Exception as error:  # every store has its own classes for what it refuses and for a server that is away
        ours = isinstance(error, InputError | RunError) and not isinstance(error, Unreachable)
        if ours or not is_remote(name):
            raise
        scheme = str(name).split("://")[0]
        reason = f"{type(error).__name__}: {last_line(error)}"
        if isinstance(error, ImportError):
            what = f"{scheme}:// needs an optional package ({reason}); pip install '{EXTRAS.get(scheme, scheme)}'"
        else:
            what = (
                f"cannot be used ({reason}); the bucket must exist, and every node needs its endpoint and credentials for"
                " reading, writing and deleting in the environment"
            )
        raise NotReady(f"{key} {name}: {what}") from error


@contextmanager
def served(path: Path) -> Iterator[None]:
    """What remote storage fails with in here, although it was asked again, comes out as one message. Raises Unreachable.

    That something is not there, or not allowed, is no such failure.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, InputError, RunError):
        raise
    except Exception as error:
        of_this_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if of_this_disk or not is_remote(path):
            raise
        raise Unreachable(
            f"{path}: the storage does not answer ({type(error).__name__}: {last_line(error)}); what was saved is kept, and the"
            " same command goes on when it does"
        ) from error


@contextmanager
def full_disk_told(where: str | Path) -> Iterator[None]:
    """A disk that takes no more comes out as one message, naming the error's file or else `where`. Raises RunError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        way_out = "make it writable" if error.errno == errno.EROFS else "make room there"
        raise RunError(
            f"{error.filename or where}: cannot be written ({error.strerror}); {way_out}, and the same command goes on"
        ) from error


def make_folder(folder: Path) -> None:
    """Object storage has no folders to make: there it does nothing, where s3fs would even make a bucket."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def probe_write(folder: Path) -> None:
    """Make a folder, write a file there and delete it. Raises OSError, or what its remote storage raises."""
    make_folder(folder)
    probe = folder / f".write-{uuid.uuid4().hex[:8]}"
    write_atomically(probe, b"")
    probe.unlink()


def write_atomically(path: Path, data: bytes | pa.Buffer | str) -> None:
    """A reader sees the whole file or none."""
    content = data.encode() if isinstance(data, str) else memoryview(data)
    if is_remote(path):
        filesystem, name = _filesystem(path)
        bound = {"timeout": WRITE_SECONDS} if filesystem.async_impl else {}
        with served(path):
            filesystem.pipe_file(name, bytes(content), **bound)
        return
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError:  # a full disk: leave nothing behind
        scratch.unlink(missing_ok=True)
        raise


def read_bytes(path: Path) -> bytes:
    """The file as it was at one moment. pathlib on object storage asks twice, and fails where another process writes meanwhile."""
    if not is_remote(path):
        return path.read_bytes()
    filesystem, name = _filesystem(path)
    with served(path):
        content: bytes = filesystem.cat_file(name)
    return content


def read_json(path: Path, way_out: str, *keys: str) -> dict[str, Any]:
    """The object in a small file of ours. Raises NotReady naming a file that is none or lacks one of `keys`."""
    try:
        found = json.loads(read_bytes(path))
        lacking = set(keys) if not isinstance(found, dict) else set(keys) - found.keys()
        if lacking or not isinstance(found, dict):
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}" if lacking else "it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else last_line(error)
        raise NotReady(f"{path}: cannot be read ({reason}); {way_out}") from None
    return found


def remove_tree(folder: Path) -> None:
    """Delete a folder and all in it. Raises FileNotFoundError where there is none."""
    if not is_remote(folder):
        shutil.rmtree(folder)
        return
    filesystem, name = _filesystem(folder)
    with served(folder):
        (folder / COMPLETE).unlink(missing_ok=True)  # first: what is half deleted is not complete
        filesystem.rm(name, recursive=True)


@contextmanager
def publishing(target: Path, require_held: Callable[[], Any] = lambda: None) -> Iterator[Path]:
    """A local folder for the body to make and fill, which then replaces `target` as a whole; not at all if the body raises.

    `require_held` is asked before each change of `target`, and raises where somebody else may write there by now.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory(prefix="caldpo-publish-") as parent:
            scratch = Path(parent) / target.name
            yield scratch
            _upload(scratch, target, require_held)
        return
    for left in _unfinished(target):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch, old = _aside(target), _aside(target)
    yield scratch
    _give_usual_modes(scratch)
    require_held()
    if target.is_dir() and not any(target.iterdir()):  # it may be the current folder, or one that is mounted: it stays
        for path in scratch.iterdir():
            shutil.move(path, target)
        scratch.rmdir()
        return
    with suppress(FileNotFoundError):
        target.rename(old)  # and deleted only then: that takes time, in which there would be neither
    scratch.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _aside(target: Path) -> Path:
    """A folder beside this one, of a name that nobody else has."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.unfinished")


def _unfinished(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{glob.escape(target.name)}.*.unfinished"))


def _give_usual_modes(folder: Path) -> None:
    """Files as readable as the umask lets any new file be; safetensors makes its own for the owner alone."""
    probe = folder / f".mode-{uuid.uuid4().hex[:8]}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _upload(folder: Path, target: Path, require_held: Callable[[], Any]) -> None:
    """One file after the other, each in parts that go at once: in between it is asked whether this process still may."""
    require_held()
    with suppress(FileNotFoundError):
        remove_tree(target)
    filesystem, name = _filesystem(target)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        require_held()
        with served(target):
            filesystem.put_file(str(file), f"{name}/{file.relative_to(folder).as_posix()}")
    require_held()
    write_atomically(target / COMPLETE, b"")


def is_complete(folder: Path) -> bool:
    """Whether `publishing` has put this folder there, whole."""
    return (folder / COMPLETE).exists() if is_remote(folder) else folder.exists()


def file_facts(path: Path) -> list[tuple[str, int, str | int]]:
    """(name, bytes, what changes with its content) of a file, or of the files directly in a folder; nothing where none is."""
    if not is_remote(path):
        files = sorted(path.glob("*")) if path.is_dir() else [path]
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    filesystem, name = _filesystem(path)
    try:
        with served(path):
            found = [info for info in filesystem.ls(name, detail=True) if info["type"] == "file"]
    except FileNotFoundError:
        return []
    return sorted(
        (info["name"].rsplit("/", 1)[-1], info["size"], next(str(info[fact]) for fact in CONTENT_FACTS if fact in info))
        for info in found
        if not info["name"].endswith(("/", f"/{COMPLETE}"))
    )


def local_copy(folder: Path) -> Path:
    """The files of a folder on this node: the folder itself; of a remote one a copy that all processes of the node share.

    The copy lies in the temporary folder under a name that follows the content, so that it is made once. Files in folders
    below are left out: models and row caches have none. Raises FileNotFoundError where nothing is there.
    """
    if not is_remote(folder):
        return folder
    facts = file_facts(folder)
    if not facts:
        raise FileNotFoundError(f"{folder}: nothing there")
    home = Path(tempfile.gettempdir()) / f"caldpo-copies-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != os.getuid():  # whoever can write there decides what model is trained
        raise NotReady(f"{home}: belongs to somebody else; delete it, or set TMPDIR to another folder on this node")
    copy = home / hashlib.sha256(json.dumps([str(folder), facts]).encode()).hexdigest()[:16]
    with copy.with_suffix(".lock").open("w") as lock:
        _lock(lock, folder, copy)  # one process downloads, the others wait
        if not copy.exists():
            filesystem, name = _filesystem(folder)
            with served(folder), publishing(copy) as scratch:
                scratch.mkdir()
                files = [file for file, _, _ in facts]
                filesystem.get([f"{name}/{file}" for file in files], [str(scratch / file) for file in files])
    return copy


def _lock(lock: TextIO, folder: Path, copy: Path) -> None:
    """Wait for the process that has the lock as long as its download to `copy` grows. Raises NotReady when it stands still."""
    size, since = -1, time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            now = sum(file.stat().st_size for download in _unfinished(copy) for file in download.glob("*"))
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > DOWNLOAD_SECONDS:
            raise NotReady(
                f"{folder}: another process of this node has {lock.name} and downloads nothing for {DOWNLOAD_SECONDS} s; end it"
                " (`fuser` names it), and start again"
            )
        time.sleep(LOCK_POLL_SECONDS)


def local_name(name: str) -> str:
    """A model's name as `from_pretrained` understands it: a URL becomes its copy on this node, all else stays."""
    return str(local_copy(open_path(name))) if is_remote(name) else name


def ray_train_storage(folder: Path) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints, as arguments of its RunConfig; by the same file system as everything else."""
    if not is_remote(folder):
        return {"storage_path": str(folder)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, name = _filesystem(folder)
    return {"storage_path": name, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}
