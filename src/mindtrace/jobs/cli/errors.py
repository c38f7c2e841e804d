"""How a command ends where it does not end well: one line to stderr, and a status that scripts can tell apart."""

import difflib
from collections.abc import Iterable

from mindtrace.jobs.errors import BackendUnavailable, ConfigError, JobsError

FINE, FAILED, USAGE, NO_APP, NO_BROKER = 0, 1, 2, 3, 4
"""The statuses: fine; it ran, and found or caused failures; wrong usage or configuration; the app does not import, or
an extra is missing; no broker, or it refuses the login. By signal: 128 and its number."""


class CommandError(Exception):
    """A command cannot go on. Its text is for the person at the terminal: one line, no password, no payload."""

    status: int = FAILED


class UsageError(CommandError):
    """A word on the command line, a variable or a line of pyproject.toml is wrong."""

    status = USAGE


class AppError(CommandError):
    """The application does not import, or its factory fails."""

    status = NO_APP


class MissingExtra(CommandError):
    """A part that the core installation leaves out.

    Args:
        what: needs it, such as `--reload`.
        extra: brings it.
    """

    status = NO_APP

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs more packages: pip install "mindtrace-jobs[{extra}]"')


class Stopped(CommandError):
    """A signal ended the command, after it had left things in order.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.status: int = 128 + number
        super().__init__("interrupted" if number == 2 else "terminated")


class Relayed(CommandError):
    """A process of ours could not go on.

    Args:
        why: as it told.
        status: its exit status.
    """

    def __init__(self, why: str, status: int) -> None:
        self.status: int = status
        super().__init__(why)


class Told(CommandError):
    """This process cannot go on, and whoever keeps it has been told why, and says so.

    Args:
        status: to exit with.
    """

    def __init__(self, status: int) -> None:
        self.status: int = status
        super().__init__("the supervisor has been told why")


def status_of(error: CommandError | JobsError) -> int:
    """The exit status that this error stands for."""
    if isinstance(error, CommandError):
        return error.status
    if isinstance(error, ConfigError):
        return USAGE
    return NO_BROKER if isinstance(error, BackendUnavailable) else FAILED


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`: did you mean '...'?` where one of the known words is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {near[0]!r}?" if near else ""
