"""Losses on the first response of each row alone; conventions as in `pairwise.py`."""

from torch import Tensor


def sft(p_w: Tensor, n_w: Tensor) -> dict[str, Tensor]:
    """-p_w/n_w: the mean token NLL of each row's first response. Supervised fine-tuning with every row weighing 1."""
    return {"nll": -p_w / n_w}
