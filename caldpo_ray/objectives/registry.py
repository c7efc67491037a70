"""Objectives by name: `get_objective("cal_dpo", beta=0.1)` gives what the trainer calls."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from caldpo_ray.objectives import pairwise, single
from caldpo_ray.objectives.custom import call_function
from caldpo_ray.objectives.pairs import all_pairs, first_responses
from caldpo_ray.settings.objective_parameters import CustomObjective, parse_objective
from caldpo_ray.settings.user_code import load_objective

# (policy_logps, reference_logps, lengths, columns) → terms [rows]
RowTerms = Callable[[Tensor, Tensor | None, Tensor, Mapping[str, Tensor | None]], dict[str, Tensor]]

FUNCTIONS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "cal_dpo": pairwise.cal_dpo,
    "cal_ipo": pairwise.cal_ipo,
    "cal_slic": pairwise.cal_slic,
    "dpo": pairwise.dpo,
    "ipo": pairwise.ipo,
    "slic": pairwise.slic,
    "f_dpo": pairwise.f_dpo,
    "cpo": pairwise.cpo,
    "dpop": pairwise.dpop,
    "dpo_nll": pairwise.dpo_nll,
    "sft": single.sft,
}


@dataclass(frozen=True)
class Output:
    """`losses` [rows] and the `terms` {name: [rows]} that sum to them."""

    losses: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss with its parameters resolved."""

    name: str
    parameters: dict[str, Any]
    formula: str
    needs_reference: bool
    min_responses: int
    """Responses a row must have: 2 for pairs, 1 for single responses."""
    calibration_target: float | None
    """1/(2 beta) in nats for the calibrated objectives."""
    row_terms: RowTerms = field(repr=False)

    def __call__(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor | None,
        lengths: Tensor,
        *,
        response_scores: Tensor | None = None,
        **columns: Tensor,
    ) -> Output:
        """Per-row losses, in the dtype of `policy_logps`.

        `policy_logps`, `reference_logps` [rows, k] are sums over response tokens in nats, `lengths` [rows, k] scored
        response tokens; response 0 is the best. A response that a row does not have has length 0 and is ignored.
        With k > 2 a pair objective takes the mean over all pairs i < j of a row, without pairs that tie in
        `response_scores` [rows, k] (NaN: unscored). A row without any pair has loss 0 and no gradient; the data stage
        quarantines such rows. `reference_logps` is not read (and may be None) unless `needs_reference`; columns that
        the objective does not ask for are ignored. Raises ValueError if reference or shapes do not fit.
        """
        if self.needs_reference and reference_logps is None:
            raise ValueError(f"{self.name}: reference_logps is None, but this objective compares with the reference")
        reference = reference_logps if self.needs_reference else None
        for tensor in (lengths, reference, response_scores):
            if tensor is not None and (tensor.dim() != 2 or tensor.shape != policy_logps.shape):
                raise ValueError(
                    f"{self.name}: policy_logps has shape {tuple(policy_logps.shape)}, another input"
                    f" {tuple(tensor.shape)}; all must be [rows, k]"
                )
        terms = self.row_terms(policy_logps, reference, lengths, {"response_scores": response_scores, **columns})
        return Output(losses=reduce(torch.add, terms.values()), terms=terms)


def get_objective(name: str, **parameters: Any) -> Objective:
    """The objective of that name (or alias, or `package.module:function`) with these parameters.

    Raises InputError (a ValueError) for an unknown name and for an unknown, unused or invalid parameter.
    """
    schema = parse_objective({"name": name, **parameters})
    if isinstance(schema, CustomObjective):
        resolved = dict(schema.model_extra or {})
        row_terms: RowTerms = partial(call_function, load_objective(name, resolved), name, resolved)
    else:
        resolved = schema.model_dump(exclude={"name"})
        row_terms = partial(_row_terms, FUNCTIONS[schema.name], resolved)
    return Objective(
        name=schema.name,
        parameters=resolved,
        formula=schema.formula,
        needs_reference=schema.needs_reference,
        min_responses=schema.min_responses,
        calibration_target=schema.calibration_target,
        row_terms=row_terms,
    )


def vector_names(function: Callable[..., Any]) -> list[str]:
    """The vectors an objective asks for by its positional arguments: "h_w" is the log-ratio of the chosen response."""
    arguments = inspect.signature(function).parameters.values()
    return [argument.name for argument in arguments if argument.kind is argument.POSITIONAL_OR_KEYWORD]


def _row_terms(
    function: Callable[..., dict[str, Tensor]],
    parameters: Mapping[str, Any],
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    columns: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    names = vector_names(function)
    quantities = {"p": policy_logps, "n": lengths.to(policy_logps.dtype)}
    if reference_logps is not None:
        quantities["h"] = policy_logps - reference_logps.detach().to(policy_logps.dtype)
    paired = any(name.endswith("_l") for name in names)
    pairs = all_pairs(lengths, columns["response_scores"]) if paired else first_responses(lengths)
    take = {"w": pairs.take_chosen, "l": pairs.take_rejected}
    # "h_w" reads as quantity h on side w.
    vectors = {name: take[name[2]](quantities[name[0]]) for name in names}
    return {term: pairs.row_means(values) for term, values in function(**vectors, **parameters).items()}
