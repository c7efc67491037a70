"""The spine, for real: world, data, reference actors, feed, two DeepSpeed workers, kill -9 of one, identical resume."""

import json
import random
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from caldpo_ray.resilience.uploads import scratch_prefix
from tests.chaos.kills import Blow, disturb
from tests.conftest import wait_until
from tests.ray.runs import Run, kill, pids, start, train, write_config

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    return write_config(
        tmp_path_factory.mktemp("spine"),
        world,
        train={"epochs": 2, "save_every": 5},
        data={"eval": str(world / "eval.jsonl")},
    )


@pytest.fixture(scope="module")
def undisturbed(config: Path, cluster: str) -> Run:
    return train(config, "undisturbed", "reference.store=null")


def test_seeded_kills_change_nothing(config: Path, undisturbed: Run) -> None:
    """The short form of `make chaos`: one of each, in the middle of what they do. The first two while rows are scored."""
    blows = [
        Blow("reference actor", "any", 0, 0.5, None),
        Blow("driver", "any", 0, 1.0, None),
        Blow("feed", "step", 3, 0.0, None),
        Blow("policy worker", "checkpoint", 0, 0.0, None),
    ]
    done, wrong = disturb(config, "chaos", "empty", blows, undisturbed, random.Random(1))
    assert not wrong, "\n".join(wrong)
    assert [each.kind for each in done] == [blow.kind for blow in blows]
    steps = [line["step"] for line in undisturbed.lines() if line["split"] == "train"]
    assert steps == list(range(1, 27)), "2 epochs of ceil(400 / 32) steps, each once"


def on_the_way(run: Run) -> list[Path]:
    """Checkpoints in the temporary folder, one of each of two ranks."""
    return [path for rank in (0, 1) for path in Path(tempfile.gettempdir()).glob(f"{scratch_prefix(run.path, rank)}*")]


@pytest.mark.long
def test_training_goes_on_while_a_checkpoint_is_on_its_way(config: Path, undisturbed: Run, tmp_path: Path) -> None:
    """Until then a kill resumes from the one before; and a disk that takes no more is one message, not a lost checkpoint."""
    config = Path(shutil.copy(config, tmp_path))
    config.write_text(config.read_text().replace("name: cal_dpo", "name: tests.ray.objectives:with_a_gate"))
    overrides = (f"objective.folder={tmp_path}", "train.save_every=5", "train.eval_every=null")
    run = start(config, "gated", *overrides)
    run.wait_for_step(14)
    assert run.newest_checkpoint() == 5 and len(on_the_way(run)) == 2, "that of step 10 is held up"
    workers = pids("RayTrainWorker")
    kill(workers[1])
    wait_until(lambda: len(set(pids("RayTrainWorker")) - set(workers)) == 2, "a new group of workers")
    before = run.lines()
    (tmp_path / "full").touch()
    said = run.finish(3)
    assert re.search(r"step-00000010/\S+: cannot be written \(No space left on device\); make room there", said), said
    # The peer of the killed worker says so where it computes; one that waits for the checkpoint ends without a word.
    assert said.count("starts again from the last checkpoint") <= 1, "not for a full disk"
    assert run.last_step_kept(before) == 5

    (tmp_path / "full").unlink()
    (tmp_path / "open").touch()
    run = start(config, "gated", *overrides)
    run.finish()
    steps = [line["step"] for line in run.lines() if line["split"] == "train"]
    assert steps == list(range(1, 27)), "each once"
    assert run.newest_checkpoint() == 26, "the last one is committed before the run is complete"
    for folder in ("model", "best"):
        ours, theirs = run.weights(folder), undisturbed.weights(folder)
        assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert not on_the_way(run), "what killed workers left is cleared away"


def test_the_best_model_and_its_checkpoint_are_kept_beside_the_last(undisturbed: Run) -> None:
    """By `rewards/accuracies` on the held-out rows, evaluated at every save; two checkpoints are kept."""
    evaluations = [line for line in undisturbed.lines() if line["split"] == "eval"]
    assert [line["step"] for line in evaluations] == [5, 10, 15, 20, 25, 26]
    accuracy = {line["step"]: line["rewards/accuracies"] for line in evaluations}
    kept_steps = sorted(int(path.name.removeprefix("step-")) for path in undisturbed.path.glob("checkpoints/step-*"))
    assert len(kept_steps) == 2 and kept_steps[-1] == 26
    assert max(accuracy[step] for step in kept_steps) == max(accuracy.values()) > min(accuracy.values())
    first_best = min(step for step, value in accuracy.items() if value == max(accuracy.values()))
    state = json.loads((undisturbed.path / "checkpoints" / "step-00000026" / "trainer_state.json").read_text())
    assert (state["step"], state["best_metric"]) == (26, accuracy[first_best])
    kept, last = load_file(undisturbed.path / "best" / "model.safetensors"), undisturbed.weights()
    same = all((kept[name] == last[name]).all() for name in last)
    assert same == (first_best == 26)
