"""From k responses per row to the pairs an objective compares, and back to one value per row."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Which responses of which rows are compared.

    `chosen` and `rejected` [P] are the columns of the P position pairs of a row, `valid` [rows, P] says which of them a
    row really has. A vector over pairs [pairs] lists the valid ones row by row.
    """

    chosen: Tensor
    rejected: Tensor
    valid: Tensor

    def take_chosen(self, values: Tensor) -> Tensor:
        """[rows, k] → [pairs]: the value of each pair's chosen response."""
        return values[:, self.chosen][self.valid]

    def take_rejected(self, values: Tensor) -> Tensor:
        """[rows, k] → [pairs]: the value of each pair's rejected response."""
        return values[:, self.rejected][self.valid]

    def row_means(self, values: Tensor) -> Tensor:
        """[pairs] → [rows]: the mean over each row's pairs; 0 for a row without any."""
        per_row = values.new_zeros(self.valid.shape).masked_scatter(self.valid, values)
        return per_row.sum(dim=1) / self.valid.sum(dim=1).clamp(min=1)

    def weights(self, row_weights: Tensor) -> Tensor:
        """[rows] → [pairs]: each row's weight shared equally by its pairs, in float64."""
        shares = row_weights.double() / self.valid.sum(dim=1).clamp(min=1)
        return shares[:, None].expand(self.valid.shape)[self.valid]


def all_pairs(lengths: Tensor, response_scores: Tensor | None) -> Pairs:
    """All position pairs i < j of responses that exist (length > 0), best first; ties in `response_scores` are skipped.

    Scores are NaN where the source has none: NaN equals nothing, so position alone then decides.
    """
    num_responses = lengths.shape[1]
    chosen, rejected = torch.triu_indices(num_responses, num_responses, offset=1, device=lengths.device)
    exists = lengths > 0
    valid = exists[:, chosen] & exists[:, rejected]
    if response_scores is not None:
        valid &= response_scores[:, chosen] != response_scores[:, rejected]
    return Pairs(chosen, rejected, valid)


def first_responses(lengths: Tensor) -> Pairs:
    """The first response of each row, on its own: what objectives on single responses see."""
    first = torch.zeros(1, dtype=torch.long, device=lengths.device)
    return Pairs(chosen=first, rejected=first, valid=lengths[:, :1] > 0)
