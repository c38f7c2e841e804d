"""`Delivery`, one hand-over of one job; the four settlements that end it; and what the dead letters keep."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from mindtrace.jobs.errors import BackendUnavailable, JobsError, JobSignal, LeaseLost, RunAborted, RunFailed
from mindtrace.jobs.wire import Message

DeadReason = Literal[
    "attempts",
    "timeout",
    "crash_limit",
    "rejected",
    "input_invalid",
    "output_invalid",
    "unknown_schema",
    "malformed",
    "too_large",
    "delivery_limit",
    "queue_gone",
]

NAME_LIMIT = 512
MESSAGE_LIMIT = 4 * 1024
TRACEBACK_LIMIT = 16 * 1024
_ERRORS_KEPT = 10
_OLD_MESSAGE_LIMIT = 200
_ERRORS_LIMIT = 32 * 1024


@dataclass(eq=False, slots=True)
class Delivery:
    """One hand-over of one message; compared by identity, changed only by the receiver that gave it.

    Attributes:
        queue: where it came from.
        message: what was published.
        attempt: which counted start this is, from 1, crashes included. Failed runs so far = attempt - 1 - crashes.
        crashes: deliveries of it that ended without a settlement, or with the process that ran them.
        releases: deliveries of it that were handed back.
        number: which delivery of this id, ever; never repeats, so it can fence writes to other systems.
        receipt: good for one settlement.
        deadline: when the lease ends, on this process's monotonic clock; inf where nothing ends it but the receiver.
        lost: the lease is gone; whatever is settled now is refused.
    """

    queue: str
    message: Message
    attempt: int
    crashes: int
    releases: int
    number: int
    receipt: str
    deadline: float
    lost: bool = False


@dataclass(frozen=True, slots=True)
class RunError:
    """One failed run, as it travels with the job. Texts are escaped and cut; there are no locals in a traceback.

    Attributes:
        type: the exception's class, with its module unless that is `builtins`.
        message: up to 4 KiB of its text.
        traceback: up to 16 KiB, the innermost frames.
        started_at: when the run began, aware; None if it never did.
        ended_at: when it ended.
        worker: who ran it: `name@host:pid`.
    """

    type: str
    message: str
    traceback: str = ""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    worker: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "RunError":
        """What there is to say about an exception."""
        if isinstance(error, JobSignal) and isinstance(error.__cause__, RunFailed):  # raised in another process
            error = error.__cause__
        if isinstance(error, RunFailed):
            return cls(
                _cut(escaped(error.type), NAME_LIMIT),
                _cut(escaped(error.message), MESSAGE_LIMIT),
                _last(escaped(error.traceback, "\n"), TRACEBACK_LIMIT),
            )
        if isinstance(error, RunAborted) and error.__cause__ is not None:
            error = error.__cause__
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        try:
            text = str(error)
        except Exception as broken:  # the user's __str__: its failure must not hide the error itself
            text = f"<its text could not be read: {type(broken).__name__}>"
        frames = "".join(traceback.format_tb(error.__traceback__))
        return cls(
            _cut(escaped(name), NAME_LIMIT),
            _cut(escaped(text), MESSAGE_LIMIT),
            _last(escaped(frames, "\n"), TRACEBACK_LIMIT),
        )


@dataclass(frozen=True, slots=True)
class Done:
    """The run is over and the job with it.

    Attributes:
        result: what it returned, encoded and checked by the worker.
        keep: seconds to keep the result; 0 leaves the bare id.
        discarded: why there is no result, if the job ended itself quietly.
    """

    result: bytes | None = None
    keep: float = 0.0
    discarded: str | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """The run failed and another is due after `delay` seconds. The backend appends `error` to those of earlier runs.

    Attributes:
        delay: seconds.
        reason: of the wait, in a word.
        error: what the run ended with.
        crash: the process that ran it died: the backend adds one to `crashes`, so that no attempt is used up.
    """

    delay: float
    reason: str = ""
    error: RunError | None = None
    crash: bool = False


@dataclass(frozen=True, slots=True)
class Dead:
    """No further run: the job goes to the dead letters. `crash`: as in `Retry`, its last crash among them."""

    reason: DeadReason
    error: RunError | None = None
    crash: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Handed back, nobody's fault: it uses up no attempt. Without a delay the job returns to its old place."""

    delay: float = 0.0


Settlement: TypeAlias = Done | Retry | Dead | Release
Settled: TypeAlias = LeaseLost | BackendUnavailable | None
"""What became of a settlement. None: done; `BackendUnavailable`: unknown, the lease decides."""
Published: TypeAlias = Literal["stored", "duplicate"] | JobsError
"""What became of one published message."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """The answer to one exchange.

    Attributes:
        settled: one per pair, in order.
        deliveries: what was received.
        missing: queues of the receiver that are gone.
    """

    settled: list[Settled]
    deliveries: list[Delivery]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeadRecord:
    """A dead job, and why.

    Attributes:
        queue: the queue it died in.
        message: the original bytes, with their id and priority.
        reason: one word.
        attempts: counted starts since it was published or last replayed, crashes included.
        crashes: of these, the ones that ended without a settlement, or with the process that ran them.
        releases: hand-backs.
        number: deliveries of this id, ever.
        died_at: by the broker's clock.
        errors: of its failed runs, oldest first, up to 10; only the newest in full.
        replays: how often it has been put back.
    """

    queue: str
    message: Message
    reason: DeadReason
    attempts: int
    crashes: int
    releases: int
    number: int
    died_at: datetime
    errors: tuple[RunError, ...] = ()
    replays: int = 0


@dataclass(frozen=True, slots=True)
class DeadPage:
    """Dead letters, newest first; `cursor` asks for those after them, None if there are no more."""

    records: list[DeadRecord]
    cursor: str | None = None


@dataclass(frozen=True, slots=True)
class DeadFilter:
    """Which dead letters: all conditions that are not None hold.

    Attributes:
        reason: the word in the record.
        since: died then or later; aware.
    """

    reason: DeadReason | None = None
    since: datetime | None = None


def with_error(errors: Sequence[RunError], newest: RunError | None) -> tuple[RunError, ...]:
    """`errors` and the newest, kept small: ten, 32 KiB in all, and only the newest with its traceback."""
    if newest is None:
        return tuple(errors)
    older = [shortened(error) for error in errors[1 - _ERRORS_KEPT :]]
    while older and sum(_size(error) for error in (*older, newest)) > _ERRORS_LIMIT:
        del older[0]
    return (*older, newest)


def shortened(error: RunError) -> RunError:
    """As it is kept once it is not the newest any more: without its traceback, and 200 characters of its text."""
    return RunError(error.type, _short(error.message), "", error.started_at, error.ended_at, error.worker)


def escaped(text: str, allowed: str = "") -> str:
    """Control characters and lone surrogates as escapes, so that no error's text can forge a line of a log."""
    if text.isprintable():
        return text
    # Not by the codec `unicode_escape`, which writes the same: as the interpreter ends there is none any more.
    return "".join(c if c.isprintable() or c in allowed else ascii(c)[1:-1] for c in text)


def _cut(text: str, limit: int) -> str:
    return text if len(text.encode()) <= limit else text.encode()[: limit - 3].decode(errors="ignore") + "…"


def _short(text: str) -> str:
    return text if len(text) <= _OLD_MESSAGE_LIMIT else text[: _OLD_MESSAGE_LIMIT - 1] + "…"


def _last(text: str, limit: int) -> str:
    """The end of it: the innermost frames."""
    if len(text.encode()) <= limit:
        return text
    return "…" + text.encode()[3 - limit :].decode(errors="ignore")


def _size(error: RunError) -> int:
    return sum(len(text.encode()) for text in (error.type, error.message, error.traceback, error.worker))
