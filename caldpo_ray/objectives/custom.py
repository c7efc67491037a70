"""The user's own objective, named `package.module:function` in the config."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import OutOfMemoryError, Tensor

from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.settings.user_code import what_happened


def call_function(
    function: Callable[..., Any],
    name: str,
    parameters: Mapping[str, Any],
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    columns: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    """Call it with the columns its signature asks for. Returns its terms [rows]; raises InputError if they are not.

    What the function raises becomes NotReady, with its name: starting the workers again would not cure it, and what does may be
    in any file that it uses.
    """
    signature = inspect.signature(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    wanted = {column: value for column, value in columns.items() if takes_all or column in signature.parameters}
    try:
        call = signature.bind(policy_logps, reference_logps, lengths, **{**wanted, **parameters})
    except TypeError as error:
        raise InputError(
            f"objective.name = {name}: {error}; the rows have the columns {', '.join(columns)}:"
            " add the column to the data, the parameter to the config, or a default to the function"
        ) from error
    try:
        result = function(*call.args, **call.kwargs)
    except (InputError, OutOfMemoryError):  # memory may be there next time
        raise
    except (Exception, SystemExit) as error:
        raise NotReady(f"objective.name = {name}: the function raised {what_happened(error)}; mend it") from error
    terms = result if isinstance(result, dict) else {"loss": result}
    shape = policy_logps.shape[:1]
    wrong = [f"{term}: {_describe(value)}" for term, value in terms.items() if _shape(value) != shape]
    if wrong or not terms:
        raise InputError(
            f"objective.name = {name}: returned {', '.join(wrong) or 'an empty dict'}; return one loss per row, a tensor of shape"
            f" {tuple(shape)}, or a dict of such terms; the mean over rows is taken by the trainer"
        )
    return terms


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
