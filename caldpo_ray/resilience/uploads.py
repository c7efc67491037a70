"""What leaves a policy worker while it trains on: checkpoints for Ray Train's storage, models for the run directory.

Training stands still while a checkpoint is written to this node's temporary folder and while weights are copied in memory; threads
do the rest. A checkpoint is committed only when the models given before it are in their place, so that a run which resumes from it
never finds a `best/` older than the checkpoint says.
"""

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from safetensors import SafetensorError

from caldpo_ray import checkpoint
from caldpo_ray.checkpoint import TrainerState
from caldpo_ray.errors import RunError, last_line
from caldpo_ray.resilience.checkpoint_list import folder_name
from caldpo_ray.resilience.waiting import overdue
from caldpo_ray.run_dir import RunDir
from caldpo_ray.storage import full_disk_told, is_remote, publishing, remove_tree, served

# What torch and safetensors say of a file that they could not write to its end; they keep no error number.
UNWRITTEN = ("inline_container", "PytorchStreamWriter", "I/O error")


def scratch_prefix(run_dir: Path, rank: int) -> str:
    """Of the names of temporary folders in which a rank of this run writes its checkpoints."""
    return f"caldpo-checkpoint-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}-{rank}-"


class Cadence:
    """When the clock wants a checkpoint: so many seconds after the start, or after the last one was in its place.

    Not while one is on its way, which the next would have to wait for: slow storage makes checkpoints rarer, not training slower.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self.stored()

    def on_its_way(self) -> None:
        """A checkpoint is."""
        self._next = math.inf

    def stored(self) -> None:
        """It is in its place."""
        self._next = self._clock() + self._seconds

    def due(self) -> bool:
        """Whether the next one is to be made."""
        return self._clock() >= self._next


class Uploads:
    """The checkpoint and the model of one rank that are on their way. At most one of each, so that they need bounded room."""

    def __init__(
        self, run: RunDir, rank: int, wait_seconds: float, tell: Callable[[Exception], Any], cadence: Cadence
    ) -> None:
        """`tell` gets what an upload fails with, in its thread; Ray Train then stops the group, whatever the loop does.

        What is on its way for longer than `wait_seconds` raises RunError in whoever waits for it. `cadence` is told of checkpoints.
        """
        self._run, self._checkpoints, self._rank, self._tell = run, run.checkpoints, rank, tell
        self._wait_seconds, self._cadence = wait_seconds, cadence
        self._scratch = scratch_prefix(run.path, rank)
        for left in Path(tempfile.gettempdir()).glob(f"{self._scratch}*"):  # by a worker of this rank that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._thread = ThreadPoolExecutor(1, "model")
        self._model: Future[None] | None = None

    def checkpoint(self, engine: Any, state: TrainerState, scores: dict[str, float]) -> None:
        """Write a checkpoint and return; it is committed later. Every rank calls this. Waits for the one before it.

        `scores` rank it among others. An upload that fails ends the attempt, at the latest in the next call.
        """
        self._run.require_held()
        self.finish_checkpoint()
        name = folder_name(state.step)
        with writing(tempfile.gettempdir()):
            folder = Path(tempfile.mkdtemp(prefix=self._scratch))
            checkpoint.save(engine, state, folder)
        if self._rank == 0:
            # A kill may have left a part of it there, written by another number of workers.
            with suppress(FileNotFoundError):
                remove_tree(self._checkpoints / name)
        self._cadence.on_its_way()
        dist.barrier()  # this wait for the others has an end; that in Ray Train's report has none
        ray.train.report(
            {"step": state.step, **scores},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,  # which deletes `folder` afterwards
            checkpoint_upload_fn=self._upload,
        )

    def finish_checkpoint(self) -> None:
        """Return when the checkpoint given last is committed."""
        started = time.monotonic()
        ray.train.get_all_reported_checkpoints(
            consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=self._wait_seconds
        )
        if time.monotonic() - started >= self._wait_seconds:  # it does not say that it gave up
            raise overdue(f"the last checkpoint on its way to {self._checkpoints}", self._wait_seconds)

    def _upload(self, written: Checkpoint, name: str) -> Checkpoint:
        """In Ray Train's thread: the files of this rank beside those of the others."""
        try:
            checkpoint.seal(Path(written.path), self._rank)
            self.finish_model()
            self._run.require_held()
            storage = ray.train.get_context().get_storage()
            target = Path(storage.build_checkpoint_path_from_name(name))
            with writing(self._checkpoints / name), served(self._checkpoints):
                if is_remote(self._checkpoints) or not on_one_file_system(Path(written.path), target.parent):
                    stored = storage.persist_current_checkpoint(written, name)
                else:
                    move_files(Path(written.path), target, self._run.require_held)
                    stored = Checkpoint(str(target), storage.storage_filesystem)
            self._run.require_held()  # or it would be committed
            self._cadence.stored()
            return stored
        except Exception as error:
            self._tell(error)
            raise

    def model(self, target: Path, write: Callable[[Path], None]) -> None:
        """Publish what `write` puts into a folder as `target`, in a thread. Raises what the model before failed with."""
        self.finish_model()
        self._model = self._thread.submit(self._publish, target, write)

    def finish_model(self) -> None:
        """Return when the model given last is in its place. Raises what it failed with."""
        if self._model is not None:
            done, _ = wait([self._model], self._wait_seconds)
            if not done:
                raise overdue(f"the model on its way to {self._run.path}", self._wait_seconds)
            self._model.result()

    def _publish(self, target: Path, write: Callable[[Path], None]) -> None:
        with writing(target), publishing(target, self._run.require_held) as scratch:
            write(scratch)


@contextmanager
def writing(where: str | Path) -> Iterator[None]:
    """A disk that takes no more is one message, whichever library met it. Raises RunError."""
    with full_disk_told(where):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            if not any(word in str(error) for word in UNWRITTEN):
                raise
            reason = last_line(error)
            raise RunError(
                f"{where}: cannot be written ({reason}); make room there, and the same command goes on"
            ) from error


def on_one_file_system(folder: Path, other: Path) -> bool:
    """Whether a file can go from one to the other by a rename; False where one of them is not on this node."""
    try:
        return folder.stat().st_dev == other.stat().st_dev
    except FileNotFoundError:
        return False


def move_files(folder: Path, target: Path, require_held: Callable[[], Any]) -> None:
    """Rename all files below `folder` into `target`, which may hold those of other ranks; called again, it goes on.

    `require_held` is asked before each, and raises where this attempt may write there no more.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = target / file.relative_to(folder)
        require_held()
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(file, place)
