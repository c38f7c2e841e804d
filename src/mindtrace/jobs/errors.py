"""Every exception we raise, one tree under `JobsError`; and the signals a job raises to steer itself.

Errors are grouped by what the caller can do. Each says so in two facts: `retryable` (the same call may succeed later)
and `outcome`, what became of the call: certainly `not_done`, or `unknown`. Further facts are
attributes named like the constructor's arguments. No text and no attribute holds a payload, a password or a full URL.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

Outcome = Literal["not_done", "unknown"]


class JobsError(Exception):
    """Whatever this library raises. Catch it to catch them all; the signals below are not among them."""

    retryable: ClassVar[bool] = False

    @property
    def outcome(self) -> Outcome:
        """What became of the call that raised this."""
        return "not_done"


# --- fix the call -----------------------------------------------------------------------------------------------------


class ConfigError(JobsError, ValueError):
    """A declaration, an option or a value is wrong: nothing was sent. It is a `ValueError` too."""


class InputInvalid(JobsError):
    """The input does not fit the schema's input model. Nothing was sent.

    Attributes:
        schema: the schema's name.
        errors: one mapping per field, as pydantic gives them (`type`, `loc`, `msg`), without the values.
    """

    def __init__(self, schema: str, errors: Sequence[Mapping[str, Any]]) -> None:
        self.schema = schema
        self.errors: list[Mapping[str, Any]] = list(errors)
        super().__init__(f"the input does not fit the schema {schema!r}: {described(self.errors)}")


class PayloadTooLarge(JobsError):
    """What was to be sent is larger than the limit. Nothing was sent.

    Attributes:
        what: `input`, `headers` or `envelope`.
        size: bytes of its JSON.
        limit: bytes allowed.
    """

    def __init__(self, what: str, size: int, limit: int) -> None:
        self.what: str = what
        self.size: int = size
        self.limit: int = limit
        super().__init__(f"{what} of {size} bytes, {limit} allowed: store large data elsewhere and send its address")


class NotSupported(JobsError):
    """This backend, or this queue, cannot do what was asked; said when it is declared or published, never later.

    Attributes:
        feature: what was asked for.
        backend: the backend's name.
        needs: what would make it possible.
    """

    def __init__(self, feature: str, backend: str, needs: str) -> None:
        self.feature: str = feature
        self.backend: str = backend
        self.needs: str = needs
        super().__init__(f"{feature} is not supported on {backend}: it needs {needs}")


class QueueNotFound(JobsError):
    """No queue of that name: never declared, or deleted since."""

    def __init__(self, queue: str) -> None:
        self.queue = queue
        super().__init__(f"no queue {queue!r}: declare it, or register a schema of that name")


class QueueMismatch(JobsError):
    """The queue exists with other properties. Nothing was changed.

    Attributes:
        queue: its name.
        differences: property -> (what it is, what was asked for).
    """

    def __init__(self, queue: str, differences: Mapping[str, tuple[object, object]]) -> None:
        self.queue: str = queue
        self.differences: dict[str, tuple[object, object]] = dict(differences)
        text = ", ".join(f"{name} is {there!r}, not {asked!r}" for name, (there, asked) in self.differences.items())
        super().__init__(f"the queue {queue!r} exists and differs: {text}; declare it as it is, or delete it first")


class QueueInUse(JobsError):
    """A queue that still has leased or dead jobs is not deleted without `force`.

    Attributes:
        queue: its name.
        counts: `leased` and `dead`, as far as the broker knows them.
    """

    def __init__(self, queue: str, counts: Mapping[str, int]) -> None:
        self.queue: str = queue
        self.counts: dict[str, int] = dict(counts)
        text = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        super().__init__(
            f"the queue {queue!r} still has jobs ({text}): settle or purge them, or delete with force=True"
        )


class UnsafeBackend(JobsError):
    """The broker is set up so that it may lose jobs in silence: the text says which setting, and what to do."""


class JobNotFound(JobsError):
    """No such job where it was looked for."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"no job {job_id!r} here")


class PublishIncomplete(JobsError):
    """A batch of which some jobs were not stored, or may not have been.

    Attributes:
        ids: the ids of the jobs that are stored, in order.
        failures: index in the batch -> the error of that job, each with an `outcome` of its own. Publish those again
            with the same ids.
    """

    retryable = True

    def __init__(self, ids: Sequence[str], failures: Mapping[int, JobsError]) -> None:
        self.ids: list[str] = list(ids)
        self.failures: dict[int, JobsError] = dict(failures)
        first = min(self.failures)
        super().__init__(
            f"{len(self.failures)} of {len(self.ids) + len(self.failures)} jobs were not stored, or may not have been; "
            f"the first, at index {first}: {self.failures[first]}"
        )

    @property
    def outcome(self) -> Outcome:
        """`unknown` if some are stored, or may be; else `not_done`."""
        unknown = any(error.outcome == "unknown" for error in self.failures.values())
        return "unknown" if unknown or self.ids else "not_done"


# --- wait, then the same call again -----------------------------------------------------------------------------------


class QueueFull(JobsError):
    """The queue holds as many ready and scheduled jobs as its `max_length` allows. Nothing was stored."""

    retryable = True

    def __init__(self, queue: str, limit: int) -> None:
        self.queue: str = queue
        self.limit: int = limit
        super().__init__(f"the queue {queue!r} is full: {limit} jobs wait; try again when workers have caught up")


class BackendUnavailable(JobsError):
    """The broker could not be reached, or gave no answer in time.

    Attributes:
        maybe_published: whether the jobs may have been stored all the same.
        job_ids: the ids to publish again with, which is safe.
    """

    retryable = True

    def __init__(self, text: str, *, maybe_published: bool = False, job_ids: Sequence[str] = ()) -> None:
        self.maybe_published: bool = maybe_published
        self.job_ids: tuple[str, ...] = tuple(job_ids)
        super().__init__(text)

    @property
    def outcome(self) -> Outcome:
        """`unknown` if the jobs may have been published."""
        return "unknown" if self.maybe_published else "not_done"


class AuthenticationFailed(BackendUnavailable):
    """The broker refuses the login, or does not allow this user what was asked. Nobody knocks again by itself."""

    retryable = False


class BackendFull(JobsError):
    """The broker is out of memory or disk. Nothing was stored; settling still works."""

    retryable = True


# --- give up: the job is another's, or the program is wrong -----------------------------------------------------------


class LeaseLost(JobsError):
    """The delivery is no longer ours: its lease ended, it was settled before, or its queue is gone. Drop the result."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"the lease of job {job_id!r} is lost: nothing was changed, the job is another's now")


class Closed(JobsError, RuntimeError):
    """Used before it was opened, or after it was closed."""


class WouldDeadlock(JobsError, RuntimeError):
    """A blocking call made on the loop that would have to serve it."""


class ForkedProcess(JobsError, RuntimeError):
    """Opened in the parent process and used in a forked child: open one of its own there."""


# --- how a run ends when it is not by an exception of the user's ------------------------------------------------------


class RunTimeout(JobsError, TimeoutError):
    """What a run ends with when its time is over; seen in dead letters and events, never raised to a caller."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        super().__init__(f"the run took longer than its {timeout:g} s")


class RunAborted(JobsError):
    """What the run of a job ends with when it raised no `Exception` but a `SystemExit`, or cancelled itself.

    `__cause__` is what it raised.
    """


class RunCrashed(JobsError):
    """What a run in a process of its own ended with when that process died; seen in dead letters and events.

    It uses up no attempt, but counts as a crash: after `crash_limit` of them the job is dead.
    """


class RunFailed(JobsError):
    """What a run in a process of its own raised. The exception itself stays there: this is what there is to say of it.

    `RetryPolicy.delay` is called with it; `retry_on` and `no_retry_on` are compared by name, module and all, with the
    exception's classes.

    Attributes:
        type: the exception's class, with its module unless that is `builtins`.
        message: up to 4 KiB of its text.
        traceback: up to 16 KiB, the innermost frames.
        place: where it was raised, as `function, file:line`; empty if there is no saying.
        kinds: `module:qualified name` of its class and of those above it.
    """

    def __init__(self, type: str, message: str, traceback: str, place: str, kinds: Sequence[str]) -> None:
        self.type: str = type
        self.message: str = message
        self.traceback: str = traceback
        self.place: str = place
        self.kinds: frozenset[str] = frozenset(kinds)
        super().__init__(f"{type}: {message}")

    def is_a(self, kind: type[BaseException]) -> bool:
        """Whether the exception was of this class."""
        return qualified(kind) in self.kinds


class Refused(JobsError):
    """A job that may not be run, or whose result may not be kept: it goes to the dead letters at once.

    Attributes:
        reason: the word the dead letter gets: `malformed`, `too_large`, `input_invalid` or `output_invalid`.
    """

    def __init__(self, reason: Literal["malformed", "too_large", "input_invalid", "output_invalid"], text: str) -> None:
        self.reason: Literal["malformed", "too_large", "input_invalid", "output_invalid"] = reason
        super().__init__(text)


class UnknownSchema(JobsError):
    """A job of a schema, or of a wire format, that this worker does not know: left to a worker that does.

    Attributes:
        schema_name: the schema it is for; empty where the format is what is not known.
        waited: seconds since the job was first due.
        patience: seconds after which no such worker is expected any more.
    """

    def __init__(self, schema_name: str, waited: float, patience: float) -> None:
        self.schema_name: str = schema_name
        self.waited: float = waited
        self.patience: float = patience
        what = f"the schema {schema_name!r}" if schema_name else "its wire format"
        super().__init__(f"{what} is not known to this worker; the job has waited {waited:.0f} s for one that knows it")


# --- signals ----------------------------------------------------------------------------------------------------------


class JobSignal(Exception):
    """What a job raises to steer itself. No `JobsError`, so that `except JobsError` never swallows one."""

    reason: str


class RetryLater(JobSignal):
    """Run this job again later. It counts as a failed attempt.

    Args:
        delay: seconds, exactly; None leaves it to the job's retry policy.
        reason: kept with the job.
    """

    def __init__(self, delay: float | None = None, reason: str = "") -> None:
        self.delay: float | None = delay
        self.reason: str = reason
        super().__init__(reason or "asked to be run again")


class Snooze(JobSignal):
    """Put this job off for `delay` seconds, under the same attempt number: it counts as no attempt."""

    def __init__(self, delay: float, reason: str = "") -> None:
        self.delay: float = delay
        self.reason: str = reason
        super().__init__(reason or f"put off for {delay:g} s")


class Discard(JobSignal):
    """End this job quietly: done, without a result and without a dead letter."""

    def __init__(self, reason: str = "") -> None:
        self.reason: str = reason
        super().__init__(reason or "discarded")


class Reject(JobSignal):
    """Send this job to the dead letters at once, with `reason` as the error's text."""

    def __init__(self, reason: str) -> None:
        self.reason: str = reason
        super().__init__(reason)


def qualified(kind: type[Any]) -> str:
    """A class by its full name, `module:qualified name`."""
    return f"{kind.__module__}:{kind.__qualname__}"


def described(errors: Sequence[Mapping[str, Any]]) -> str:
    """Field errors of pydantic in one line, without the values that were refused."""
    shown = [f"{'.'.join(str(part) for part in error['loc']) or 'input'}: {error['msg']}" for error in errors[:5]]
    return "; ".join(shown) + (f"; and {len(errors) - 5} more" if len(errors) > 5 else "")
