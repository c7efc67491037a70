"""The user's own objective, named `package.module:function` in the config."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from caldpo_ray.errors import InputError, NotReady

_CALL = "(policy_logps, reference_logps, lengths, **parameters, **columns)"


def load_function(name: str, parameters: Mapping[str, Any]) -> Callable[..., Any]:
    """Import `package.module:function` and check that it accepts the parameters. Raises InputError (NotReady: not installed)."""
    module_name, function_name = name.split(":")
    try:
        module = import_module(module_name)
    except (ImportError, SyntaxError) as error:
        kind = InputError if isinstance(error, SyntaxError) else NotReady
        raise kind(
            f"{name}: cannot import {module_name} ({error}); install it on every node or add its folder to PYTHONPATH"
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{name}: {module_name} has no function {function_name}; define {function_name}{_CALL}")
    try:
        inspect.signature(function).bind_partial(None, None, None, **parameters)
    except TypeError as error:
        raise InputError(
            f"{name}: cannot be called as {function_name}{_CALL} with the parameters"
            f" {', '.join(parameters) or 'none'} ({error}); change its signature or the config"
        ) from error
    return function


def call_function(
    function: Callable[..., Any],
    name: str,
    parameters: Mapping[str, Any],
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    columns: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    """Call it with the columns its signature asks for. Returns its terms [rows]; raises InputError if they are not."""
    signature = inspect.signature(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    wanted = {column: value for column, value in columns.items() if takes_all or column in signature.parameters}
    try:
        call = signature.bind(policy_logps, reference_logps, lengths, **{**wanted, **parameters})
    except TypeError as error:
        raise InputError(
            f"{name}: {error}; the rows have the columns {', '.join(columns)}:"
            " add the column to the data, the parameter to the config, or a default to the function"
        ) from error
    result = function(*call.args, **call.kwargs)
    terms = result if isinstance(result, dict) else {"loss": result}
    shape = policy_logps.shape[:1]
    wrong = [f"{term}: {_describe(value)}" for term, value in terms.items() if _shape(value) != shape]
    if wrong or not terms:
        raise InputError(
            f"{name}: returned {', '.join(wrong) or 'an empty dict'}; return one loss per row, a tensor of shape"
            f" {tuple(shape)}, or a dict of such terms; the mean over rows is taken by the trainer"
        )
    return terms


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
