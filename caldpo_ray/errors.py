"""What the command line turns into exit codes 2 and 3.

Both take one message, so that they pickle and cross Ray unharmed.
"""


class InputError(ValueError):
    """The user's input is wrong: config, data, model folder or resources. Exit code 2.

    The message says what, where, the rule, and what to do.
    """


class RunError(RuntimeError):
    """The run failed on its way; what it saved is kept and the same command resumes it. Exit code 3."""


def find_error(error: BaseException | None) -> InputError | RunError | None:
    """Our own error inside whatever Ray wrapped around it on its way from another process."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # RayTaskError keeps the original in `cause`, and its dynamic subclasses would print a remote traceback.
        inner = vars(error).get("cause")
        if isinstance(inner, BaseException):
            error = inner
        elif isinstance(error, (InputError, RunError)):
            return error
        else:
            error = error.__cause__ or error.__context__
    return None
