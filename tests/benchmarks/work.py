"""FLOPs per pair that each system's own algorithm executes, in the terms of `caldpo_ray.compute.flops`; padding does not count."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from caldpo_ray.compute.flops import ForwardCost
from caldpo_ray.logprobs import concatenated_batch, packed_batch
from caldpo_ray.schema import Row

TWICE = 2  # any number of chunks above one: backward computes the head's products once more


def our_flops(cost: ForwardCost, rows: Sequence[Row], with_reference: bool) -> float:
    """The prompt once, the head on response tokens; `with_reference`: and once more forward, by the reference.

    Without what a head in several chunks computes again: it depends on how rows meet in micro-batches.
    """
    batch = packed_batch(rows, pad_id=0)
    return (cost.executed(batch, 1, True) + with_reference * cost.executed(batch, 1, False)) / len(rows)


def trl_flops(cost: ForwardCost, rows: Sequence[Row], with_reference: bool, every_position: bool) -> float:
    """Two whole sequences per pair, and a head whose backward always computes its logits again.

    `every_position`: the head runs on prompts too, as TRL's does where there is no Triton (on CPUs).
    """
    batch = concatenated_batch(rows, pad_id=0)
    if every_position:
        num_positions = batch.num_tokens - sum(len(row.response_ids) for row in rows)  # the last token predicts nothing
        batch = replace(batch, target=torch.empty(num_positions))
    return (cost.executed(batch, TWICE, True) + with_reference * cost.executed(batch, 1, False)) / len(rows)
