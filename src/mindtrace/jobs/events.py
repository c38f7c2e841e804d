"""What a listener is told, and how."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mindtrace.jobs.delivery import RunError, Settlement
from mindtrace.jobs.job import ExecutionStatus, JobId

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobPublished:
    """A job is stored, or was before (`duplicate`)."""

    queue: str
    job_id: JobId
    schema_name: str
    duplicate: bool


@dataclass(frozen=True, slots=True)
class JobStarted:
    """A run begins. `attempt` counts starts, from 1."""

    queue: str
    job_id: JobId
    schema_name: str
    attempt: int


@dataclass(frozen=True, slots=True)
class JobSettled:
    """A delivery has ended, and how.

    Attributes:
        settlement: as decided.
        accepted: False where the lease was lost, so that nothing was changed, or where the broker gave no answer.
        status: where the job stands now, if it was accepted.
        seconds: how long the run took, or lasted until it was given up; 0 if it never began. What the settlement
            waited for the broker is not in it.
    """

    queue: str
    job_id: JobId
    schema_name: str
    attempt: int
    settlement: Settlement
    accepted: bool
    status: ExecutionStatus
    seconds: float


@dataclass(frozen=True, slots=True)
class JobLeaseLost:
    """A job that was received here is another worker's now; nothing that its run does or returns here counts.

    Told once, as soon as it is known: while it runs, or when its settlement is refused. Its `JobSettled` follows.
    """

    queue: str
    job_id: JobId
    schema_name: str
    attempt: int


@dataclass(frozen=True, slots=True)
class SchemaMismatch:
    """A job is left to workers that know it: no consumer here knows its schema. Its `JobSettled` follows.

    Attributes:
        schema_name: what it names; empty where not even its format is known here.
        waited: seconds since it was first due.
    """

    queue: str
    job_id: JobId
    schema_name: str
    attempt: int
    waited: float


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The broker is there again.

    Attributes:
        backend: its kind: `redis`, `rabbitmq`.
        seconds: how long it was away.
    """

    backend: str
    seconds: float


Event: TypeAlias = JobPublished | JobStarted | JobSettled | JobLeaseLost | SchemaMismatch | Reconnected
Listener: TypeAlias = Callable[[Event], Awaitable[None] | None]
"""Called with each event, in order; awaited if it gives something to await. What it raises is logged, nothing else."""


async def told(listeners: Sequence[Listener], event: Event) -> None:
    """Tell each in turn; what one raises is logged, and nothing else comes of it."""
    for listener in listeners:
        task, asked = None, 0
        try:
            answer = listener(event)
            if answer is None or not inspect.isawaitable(answer):
                continue
            task = asyncio.current_task()
            asked = task.cancelling() if task is not None else 0
            await answer
        except asyncio.CancelledError:
            if task is not None and task.cancelling() > asked:
                raise  # it is we who are cancelled
            _log.warning("a listener cancelled itself on %s", type(event).__name__)
        except Exception as error:  # the listener's own failure, whose text may quote what the event holds
            failed = RunError.of(error)
            _log.error("a listener failed on %s: %s\n%s", type(event).__name__, failed.type, failed.traceback.rstrip())
