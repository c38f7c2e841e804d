"""What a web service needs, whatever its framework: an orchestrator, a worker beside it, errors as answers.

    the server starts      connect, make queues known, start the worker; no broker within 5 s: the start fails
    it serves              requests publish; the worker, if there is one, runs jobs in the same loop
    it stops               requests end first, then the worker drains, then the connections close

What it raises while it serves becomes an answer of HTTP in `answer_to`.
"""

import asyncio
import logging
import re
import signal
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

from mindtrace.jobs import (
    AsyncOrchestrator,
    Backend,
    BackendFull,
    BackendUnavailable,
    InputInvalid,
    JobId,
    JobSchema,
    JobsError,
    PayloadTooLarge,
    PublishIncomplete,
    QueueFull,
    QueueSpec,
    RunError,
    Worker,
    connect,
)

_log = logging.getLogger(__name__)

Source: TypeAlias = str | Backend | AsyncOrchestrator | None
"""Where jobs go: a URL, a backend, or an orchestrator with options of its own; None: as `connect()` without a URL."""

RETRY_AFTER: Final = 5
"""Seconds after which a client may try again. A publish has tried for 10 s itself before it gives up."""

_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")  # as a job's id


@asynccontextmanager
async def serving(
    source: Source,
    *,
    schemas: Sequence[JobSchema[Any, Any]],
    queues: Sequence[QueueSpec],
    worker: Callable[[AsyncOrchestrator], Worker] | None,
) -> AsyncGenerator[AsyncOrchestrator, None]:
    """The orchestrator, open and with its queues declared; with `worker`, jobs are run beside the block.

    Args:
        source: where to; what it makes or is given is opened here, and closed at the end.
        schemas: made known here, each with a queue if there is none.
        queues: declared before, for those that are not plain first-in-first-out.
        worker: makes the one that runs beside.

    Raises:
        BackendUnavailable: no broker within 5 s; `AuthenticationFailed`: it refuses the login.
        ConfigError: wrong URL, schema or consumer.
        QueueMismatch: a queue exists with other properties.
    """
    jobs = source if isinstance(source, AsyncOrchestrator) else AsyncOrchestrator(_backend(source))
    async with jobs:
        for spec in queues:
            await jobs.declare(spec)
        for schema in schemas:
            await jobs.register(schema)
        if worker is None:
            yield jobs
        else:
            async with _beside(worker(jobs)):
                yield jobs


def _backend(source: str | Backend | None) -> Backend:
    return connect(source) if source is None or isinstance(source, str) else source


def _say_why(error: BaseException | None) -> None:
    """With the texts of our own errors only: that of what a job raised may hold payload."""
    lines = ["the worker in this process has ended"]
    for one in _leaves(error):
        end = RunError.of(one)
        lines += [f"{end.type}: {one}" if isinstance(one, JobsError) else end.type, end.traceback.rstrip()]
    _log.critical("%s", "\n".join(lines))


def _leaves(error: BaseException | None) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return [leaf for one in group.exceptions for leaf in _leaves(one)]
    return [] if error is None else [error]


@asynccontextmanager
async def _beside(worker: Worker) -> AsyncGenerator[None, None]:
    """The worker runs until the block ends, then drains.

    It is entered in a task of its own: a server may leave the block in another task than it entered it, and one whose
    task is cancelled by a failed worker would go on serving without having noticed.
    """
    started, stop = asyncio.Event(), asyncio.Event()

    async def keep() -> BaseException | None:
        try:
            async with worker:
                started.set()
                await stop.wait()
        except (KeyboardInterrupt, SystemExit) as error:  # of a job; raised in a task it would stop the loop at once
            return error
        return None

    def ended(task: "asyncio.Task[BaseException | None]") -> None:
        if started.is_set() and not stop.is_set() and not task.cancelled():
            _say_why(task.exception() or task.result())
            _stop_the_server()

    task = asyncio.create_task(keep())
    task.add_done_callback(ended)
    waiter = asyncio.create_task(started.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if started.is_set():
            yield
    finally:
        waiter.cancel()
        stop.set()
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # the server leaves at once
            worker.stop(now=True)
            await asyncio.wait({task})  # what it runs is cancelled, and released, within its grace
            raise
        if not task.cancelled() and (error := task.exception() or task.result()) is not None:
            raise error


def _stop_the_server() -> None:
    """As SIGTERM would, where a server takes it: one that goes on without its worker would never be started again."""
    if callable(signal.getsignal(signal.SIGTERM)):  # nobody's handler: the process would be killed, and is not ours
        signal.raise_signal(signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client is told of a job that was not handed in.

    Attributes:
        status: of HTTP.
        body: JSON: `error`, one word; `detail`, a sentence, or pydantic's errors field by field; and the facts.
        headers: of HTTP.
    """

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict[str, str])


def answer_to(error: JobsError) -> Answer | None:
    """The answer to a request whose publish raised this; None where it is the service's own mistake, a 500.

    No text of the error itself, which names queues and hosts: that goes to the log.
    """
    match error:
        case InputInvalid():
            return Answer(422, {"error": "input_invalid", "detail": error.errors})
        case PayloadTooLarge():
            detail = f"{error.what} of {error.size} bytes, {error.limit} allowed"
            return Answer(413, {"error": "payload_too_large", "detail": detail})
        case QueueFull():
            return _later(error, {"error": "queue_full", "detail": "too many jobs wait already"})
        case BackendFull():
            return _later(error, {"error": "backend_full", "detail": "no room for another job"})
        case BackendUnavailable():
            detail = "no answer from where jobs are kept"
            if error.maybe_published:
                detail += ": the job may be there; to repeat the request safely, send its id as Idempotency-Key"
            body = {"error": "backend_unavailable", "detail": detail, "maybe_published": error.maybe_published}
            return _later(error, {**body, "job_ids": list(error.job_ids)})
        case PublishIncomplete():
            body = {"error": "publish_incomplete", "detail": "some of the jobs were not handed in"}
            failures = {
                str(index): {"outcome": failure.outcome, "retryable": failure.retryable}
                for index, failure in error.failures.items()
            }
            return _later(error, {**body, "job_ids": error.ids, "failures": failures})
        case _:
            return None


def _later(error: JobsError, body: dict[str, Any]) -> Answer:
    _log.warning("answered 503: %s", error)
    return Answer(503, body, {"Retry-After": str(RETRY_AFTER)} if error.retryable else {})


BAD_KEY: Final = Answer(
    400,
    {
        "error": "idempotency_key_invalid",
        "detail": "Idempotency-Key: 1 to 128 of A-Z a-z 0-9 . _ : -, the first a letter or a digit",
    },
)


def job_id_of(key: str | None) -> JobId | None:
    """The id for the job of a request with this `Idempotency-Key`; None without one.

    The same request sent again then stores no second job, where the backend deduplicates. A key is the id as it is, or
    in double quotes as the header's draft standard has it.

    Raises:
        ValueError: it cannot be an id.
    """
    if key is None:
        return None
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not _KEY.fullmatch(key):
        raise ValueError(BAD_KEY.body["detail"])
    return key
