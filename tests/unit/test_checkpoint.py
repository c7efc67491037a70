"""What can be said of a checkpoint without an engine; `test_resharding` and the Ray tests load whole ones."""

import json
from pathlib import Path

import pytest
import torch

from caldpo_ray import checkpoint
from caldpo_ray.errors import RunError


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_file_that_is_cut_off_is_named_before_deepspeed_reads_it(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "checkpoints" / "step-00000002"
    (folder / checkpoint.TAG).mkdir(parents=True)
    facts = {"step": 2, "epoch": 0, "rows": 8, "identity": "", "reference_key": None, "rows_digest": ""}
    facts |= {"world_size": 1, "zero_stage": 1, "best_metric": None}
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(facts))
    torch.save({"weights": torch.ones(99)}, folder / checkpoint.TAG / "mp_rank_00_model_states.pt")
    file = folder / checkpoint.TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"weights": torch.ones(99)}, file)
    file.write_bytes(file.read_bytes()[:-50] if content is None else content)
    with pytest.raises(
        RunError, match=rf"checkpoint {folder}: {file.name} is damaged .*remove the folder {folder.parent} to"
    ):
        checkpoint.load(None, folder)
