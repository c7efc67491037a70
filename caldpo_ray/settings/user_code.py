"""Functions of the user, named `package.module:function` in the config: imported and checked, with one message where that fails.

No torch here: the user's module imports what it needs, and this one is for whoever wants to know whether it can be used.
"""

import inspect
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.settings.objective_parameters import CustomObjective, ObjectiveParameters

OBJECTIVE_CALL = "(policy_logps, reference_logps, lengths, **parameters, **columns)"


def import_function(option: str, name: str) -> Callable[..., Any]:
    """The function `package.module:function` that the config names under `option`.

    Raises NotReady where it cannot be imported (the reason may lie in what it imports), InputError where it has no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise NotReady(
            f"{option} = {name}: cannot import {module_name} ({error}); install it on every node or add its folder to PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # a module that is imported runs, and may do anything
        raise NotReady(f"{option} = {name}: cannot import {module_name} ({what_happened(error)}); mend it") from error
    function = vars(module).get(function_name)
    if not callable(function):
        raise InputError(
            f"{option} = {name}: {module_name} has no function {function_name!r}; define it or name another"
        )
    return function  # type: ignore[no-any-return]


def load_objective(name: str, parameters: Mapping[str, Any]) -> Callable[..., Any]:
    """The user's objective, which accepts the parameters. Raises as `import_function` does, and InputError if it does not."""
    function = import_function("objective.name", name)
    try:
        inspect.signature(function).bind_partial(None, None, None, **parameters)
    except TypeError as error:
        raise InputError(
            f"objective.name = {name}: cannot be called as {name.partition(':')[2]}{OBJECTIVE_CALL} with the parameters"
            f" {', '.join(parameters) or 'none'} ({error}); change its signature or the config"
        ) from error
    return function


def require_objective(objective: ObjectiveParameters) -> None:
    """Find out before anything starts whether the user's own objective can be used; a built-in one can.

    Its module is imported here, with all that it imports. Raises as `load_objective` does.
    """
    if isinstance(objective, CustomObjective):
        load_objective(objective.name, objective.model_extra or {})


def what_happened(error: BaseException) -> str:
    """The error with its type, and the innermost line of code that is no installed package's: where to look."""
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_installed(frame.filename)]
    if isinstance(error, SyntaxError) or not frames:  # says itself where it is
        return told
    return f"{told}, {frames[-1].filename} line {frames[-1].lineno}"


def _is_installed(file: str) -> bool:
    return "site-packages" in file or file.startswith("<frozen")
