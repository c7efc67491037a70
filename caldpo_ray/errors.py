"""What the command line turns into exit codes 2 and 3.

Both take one message, so that they pickle and cross Ray unharmed; passwords and tokens do not.
"""

from caldpo_ray.redaction import without_secrets

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """Control characters spelled out: names and text of a foreign file are shown, and must not steer the terminal."""
    return text.translate(_CONTROL)


class InputError(ValueError):
    """The user's input is wrong: config, data, model folder or resources. Exit code 2.

    The message says what, where, the rule, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(without_secrets(message)))


class NotReady(InputError):
    """The cluster, a package, the network or a store lacks what the run asks for.

    Unlike other wrong input it may be cured without touching the config or a file that it names: a retry is not refused.
    """


class RunError(RuntimeError):
    """The run failed on its way; what it saved is kept and the same command resumes it. Exit code 3."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(without_secrets(message)))


class Diverged(RunError):
    """The run went where going on is no use: a loss that is not finite, or a rule of `sweep.stop`. The message names it."""


class DamagedCheckpoint(RunError):
    """The checkpoint to go on from is not as it was written. The run takes the one before, where there is one."""


class OutOfMemory(RuntimeError):
    """A micro-batch did not fit into memory. The next group of workers cuts smaller ones, and no restart is counted for it."""


class Left(RuntimeError):
    """A group of workers saved a checkpoint and ended, for the next group to go on from it. No restart is counted for it."""


KINDS = (NotReady, InputError, Diverged, DamagedCheckpoint, RunError)  # the more special first


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


def last_line(error: BaseException) -> str:
    """The line of a foreign error that says what happened; its name where it says nothing."""
    return visible(without_secrets((str(error).strip().splitlines() or [type(error).__name__])[-1]))


def tell(error: InputError | RunError) -> str:
    """Our error as text, for places where Ray Data would bury the exception (a task that raises loses its cause)."""
    return f"{next(kind.__name__ for kind in KINDS if isinstance(error, kind))}: {error}"


def raise_told(told: str) -> None:
    """Raise what `tell` wrote; an empty text is no error."""
    name, _, message = told.partition(": ")
    if name:
        raise {kind.__name__: kind for kind in KINDS}[name](message)
