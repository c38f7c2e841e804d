"""`AsyncOrchestrator`: schemas, publish, receive, and the administration of queues."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, Self

from pydantic import BaseModel, ValidationError

from mindtrace.jobs.backend import BATCH, Backend, Depth, QueueSpec
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.delivery import Dead, Delivery, Done, Published, Release, RunError, Settlement
from mindtrace.jobs.errors import (
    ConfigError,
    InputInvalid,
    JobsError,
    NotSupported,
    PublishIncomplete,
    Refused,
)
from mindtrace.jobs.events import JobPublished, Listener, told
from mindtrace.jobs.job import (
    Job,
    JobId,
    JobSchema,
    checked_job_id,
    checked_priority,
    checked_timeout,
    dumped,
    field_errors,
    new_job_id,
    parsed,
)
from mindtrace.jobs.retry import MAX_DELAY, RetryPolicy, is_seconds, is_whole
from mindtrace.jobs.wire import PAYLOAD_LIMIT, PAYLOAD_LIMIT_MOST, Envelope, Message, decode, encode, job_dict

_log = logging.getLogger(__name__)

_REQUIRABLE = frozenset(("stack", "lease_clock", "deduplicates", "fences", "keeps_place", "atomic_batch", "lookup"))


class AsyncOrchestrator:
    """Publishes jobs and looks after queues, from the event loop that opened it.

    Args:
        backend: where the jobs go. It is opened and closed with this orchestrator.
        require: names of `Traits` that the backend must have, such as `{"stack"}`.
        payload_limit: bytes of JSON that one input may have, up to 16 MiB.
        listeners: told of each published job.

    Raises:
        ConfigError: an unknown trait, or a limit out of its range.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        require: Iterable[str] = (),
        payload_limit: int = PAYLOAD_LIMIT,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.backend: Backend = backend
        self._require = frozenset([require] if isinstance(require, str) else require)
        check_options(self._require, payload_limit)
        self.payload_limit: int = payload_limit
        self.schemas: dict[str, JobSchema[Any, Any]] = {}
        self._by_queue: dict[str, list[JobSchema[Any, Any]]] = {}
        self._listeners = tuple(listeners)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Open the backend.

        Raises:
            NotSupported: it lacks a trait that `require` names.
            BackendUnavailable: no broker.
        """
        await self.backend.open()
        try:
            self.check_traits()
        except NotSupported:
            await self.backend.aclose()
            raise
        traits = self.backend.traits
        _log.info("backend %s open, durability %s", traits.name, traits.durability)

    def check_traits(self) -> None:
        """Nothing, if the opened backend can do all that `require` names.

        Raises:
            NotSupported: it lacks one.
        """
        traits = self.backend.traits
        for name in sorted(self._require):
            if not getattr(traits, name):
                raise NotSupported(name, traits.name, "another backend, or less in require=")

    async def aclose(self) -> None:
        """Close the backend. Closing twice does nothing."""
        await self.backend.aclose()

    async def register(self, schema: JobSchema[Any, Any]) -> str:
        """Make the schema known here, and its queue if there is none (FIFO). Returns the queue's name.

        Raises:
            ConfigError: another schema of that name is registered.
        """
        known = self.schemas.get(schema.name)
        if known is not None and not known.same_as(schema):
            raise ConfigError(f"a different schema {schema.name!r} is registered: give one of them another name")
        await self.backend.declare(QueueSpec(schema.queue), attach=True)
        beside = [other for other in self._by_queue.get(schema.queue, []) if other.name != schema.name]
        self._by_queue[schema.queue] = [*beside, schema]
        self.schemas[schema.name] = schema  # the newest classes count: a cell of a notebook is run twice
        return schema.queue

    async def declare(self, spec: QueueSpec) -> None:
        """Make the queue if there is none.

        Raises:
            QueueMismatch: it exists with other properties; nothing was changed.
            NotSupported: the backend has no such kind.
        """
        await self.backend.declare(spec)

    async def delete(self, queue_name: str, *, force: bool = False) -> None:
        """Delete a queue with its ready and scheduled jobs.

        Args:
            queue_name: the queue.
            force: also with leased and dead jobs; what is leased is lost to its worker.

        Raises:
            QueueInUse: it has leased or dead jobs, and `force` is False.
            QueueNotFound: no such queue.
        """
        await self.backend.delete(queue_name, force=force)

    async def clean(self, queue_name: str) -> int:
        """Cancel all ready and scheduled jobs; leased and dead ones stay. Returns how many went."""
        return await self.backend.clean(queue_name)

    async def depth(self, queue_name: str) -> Depth:
        """How many jobs the queue has, by state."""
        return await self.backend.depth(queue_name)

    async def queues(self) -> list[QueueSpec]:
        """The queues that are declared."""
        return await self.backend.queues()

    async def count_queue_messages(self, queue_name: str) -> int:
        """How many jobs could be received now."""
        return (await self.backend.depth(queue_name)).ready

    def dead_letters(self, queue_name: str) -> AsyncDeadLetters:
        """The queue's dead letters."""
        return AsyncDeadLetters(self.backend.dead_letters(queue_name))

    async def publish(
        self,
        queue_name: str,
        job: Job | BaseModel | Mapping[str, Any],
        *,
        delay: float | None = None,
        at: datetime | None = None,
        priority: int | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | int | Literal[False] | None = None,
        headers: Mapping[str, str] | None = None,
        job_id: JobId | None = None,
    ) -> JobId:
        """Hand in one job. When this returns, it is stored.

        An option left None falls back to the job, then its schema, then the default.

        Args:
            queue_name: where to.
            job: a `Job`; or the input as a model or a mapping, for which the queue needs a registered schema.
            delay: seconds until it is ready, up to 366 days.
            at: an aware instant until it is ready; the past means now. Not together with `delay`.
            priority: higher is handed out first; on a priority queue only.
            timeout: seconds for one run; `float("inf")` for no limit.
            retry: a policy of numbers, a number of runs, or False for one run.
            headers: text to text, up to 8 KiB.
            job_id: names the job; publishing under a known id stores nothing and returns it.

        Returns:
            the job's id.

        Raises:
            InputInvalid: the input does not fit the schema.
            PayloadTooLarge: it is over the limit.
            ConfigError: an option is wrong (it is a `ValueError`), or no schema is registered for the queue.
            NotSupported: the backend, or the queue, cannot do what was asked.
            QueueNotFound: no such queue.
            QueueFull: its `max_length` is reached.
            BackendUnavailable: no broker; `maybe_published` says if it may be stored all the same.
        """
        options = _options(delay, at, priority, timeout, retry, headers)
        message, schema_name = self._message(queue_name, job, options, job_id)
        [outcome] = await self.backend.publish(queue_name, [message])
        if isinstance(outcome, JobsError):
            raise outcome
        if self._listeners:
            await self._tell(queue_name, message.id, schema_name, outcome)
        return message.id

    async def publish_many(
        self,
        queue_name: str,
        jobs: Iterable[Job | BaseModel | Mapping[str, Any]],
        *,
        delay: float | None = None,
        at: datetime | None = None,
        priority: int | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | int | Literal[False] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> list[JobId]:
        """Hand in many jobs, in order; the options hold for each. All are checked before the first is sent.

        Returns:
            their ids, in order.

        Raises:
            PublishIncomplete: some are stored and some are not, or may not be: which, and why.
            JobsError: as `publish`, where none is stored and all have the same reason.
        """
        options = _options(delay, at, priority, timeout, retry, headers)
        messages = [self._message(queue_name, job, options, None) for job in jobs]
        outcomes: list[Published] = []
        for start in range(0, len(messages), BATCH):
            outcomes += await self.backend.publish(queue_name, [m for m, _ in messages[start : start + BATCH]])
            await asyncio.sleep(0)
        failures = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, JobsError)}
        if failures:
            first = next(iter(failures.values()))
            same = len(failures) == len(outcomes) and all(type(error) is type(first) for error in failures.values())
            if same and all(error.outcome == "not_done" for error in failures.values()):
                raise first
            stored = [message.id for index, (message, _) in enumerate(messages) if index not in failures]
            raise PublishIncomplete(stored, failures)
        if self._listeners:
            for (message, schema_name), outcome in zip(messages, outcomes, strict=True):
                await self._tell(queue_name, message.id, schema_name, outcome)
        return [message.id for message, _ in messages]

    async def receive_message(self, queue_name: str) -> dict[str, Any] | None:
        """Take one job off the queue for good, and give its dict; None when nothing is ready.

        The documented at-most-once read: a crash after it loses the job. What cannot be read goes to the dead letters.
        """
        async with self.backend.receiver([queue_name]) as receiver:
            while deliveries := await receiver.receive(1):
                delivery = deliveries[0]
                settlement, taken = self._taken(delivery)
                [settled] = await receiver.settle([(delivery, settlement)])
                if taken is not None and settled is None:
                    return taken
        return None

    def _taken(self, delivery: Delivery) -> tuple[Settlement, dict[str, Any] | None]:
        try:
            envelope = decode(delivery.message.body, self.payload_limit)
            if isinstance(envelope, int):
                return Release(1.0), None
            data = envelope.input_data
            schema = self.schemas.get(envelope.schema_name)
            if schema is not None:
                data = dumped(schema.received(data))
            return Done(), job_dict(envelope, delivery.attempt, data)
        except Refused as refused:
            return Dead(refused.reason, RunError.of(refused)), None

    def _message(
        self, queue: str, job: Job | BaseModel | Mapping[str, Any], options: "_Options", job_id: JobId | None
    ) -> tuple[Message, str]:
        """The checked message, and the name of its schema."""
        now = time.time()
        headers = options.headers
        if isinstance(job, Job):
            schema = self.schemas.get(job.schema_name)
            data = job.input_data if schema is None else _fits(schema, job.input_data)
            name, schema_name, created = job.name, job.schema_name, int(job.created_at.timestamp() * 1000)
            identity = job.id if job_id is None else checked_job_id(job_id)
            priority = job.priority if options.priority is None else options.priority
            headers = {**job.headers, **headers} if headers else job.headers
        else:
            schema = self._schema_for(queue, job)
            data = schema.checked_input(job)
            name = schema_name = schema.name
            created = int(now * 1000)
            identity = new_job_id() if job_id is None else checked_job_id(job_id)
            priority = options.priority
        if priority is None:
            priority = (schema.priority if schema is not None else None) or 0
        if priority:
            checked_priority(priority, *self.backend.traits.priorities)
        due = options.due(now)
        envelope = Envelope(
            identity,
            name,
            schema_name,
            data,
            created,
            None if due is None else int(due * 1000),
            priority,
            headers or {},
            options.timeout,
            options.retry,
        )
        body = encode(envelope, self.payload_limit)
        crash_limit = None if options.retry is None else options.retry.crash_limit
        return Message(identity, body, priority, options.delay, options.at, crash_limit), schema_name

    def _schema_for(self, queue: str, job: BaseModel | Mapping[str, Any]) -> JobSchema[Any, Any]:
        schemas = self._by_queue.get(queue, [])
        if len(schemas) > 1:
            schemas = [schema for schema in schemas if type(job) is schema.input]
        if len(schemas) != 1:
            raise ConfigError(
                f"which schema is this input for? {len(schemas)} registered ones of the queue {queue!r} fit: register "
                "the schema, or publish a Job made by job_from_schema"
            )
        return schemas[0]

    async def _tell(self, queue: str, job_id: JobId, schema_name: str, outcome: Published) -> None:
        await told(self._listeners, JobPublished(queue, job_id, schema_name, outcome == "duplicate"))


def check_options(require: frozenset[str], payload_limit: int) -> None:
    """What an orchestrator is made with.

    Raises:
        ConfigError: an unknown trait, or a limit out of its range.
    """
    if unknown := require - _REQUIRABLE:
        raise ConfigError(f"require={sorted(unknown)}: {', '.join(sorted(_REQUIRABLE))} are the traits to ask for")
    if not is_whole(payload_limit) or not 1 <= payload_limit <= PAYLOAD_LIMIT_MOST:
        raise ConfigError(f"payload_limit={payload_limit!r}: bytes, from 1 to {PAYLOAD_LIMIT_MOST}")


class _Options:
    """The options of one publish, checked."""

    __slots__ = ("at", "delay", "headers", "priority", "retry", "timeout")

    def __init__(
        self,
        delay: float | None,
        at: datetime | None,
        priority: int | None,
        timeout: float | None,
        retry: RetryPolicy | int | Literal[False] | None,
        headers: Mapping[str, str] | None,
    ) -> None:
        if delay is not None and at is not None:
            raise ConfigError("delay and at both say when: give one of them")
        if delay is not None and not (is_seconds(delay) and 0 <= delay <= MAX_DELAY):
            raise ConfigError(f"delay={delay!r}: seconds from 0 to {MAX_DELAY:.0f} (366 days)")
        if at is not None:
            if not _is_aware(at):
                raise ConfigError(f"at={at!r}: an aware datetime, such as datetime.now(UTC) + timedelta(minutes=5)")
            if at - datetime.now(at.tzinfo) > timedelta(seconds=MAX_DELAY):
                raise ConfigError(f"at={at.isoformat()}: at most 366 days ahead")
        self.delay, self.at = delay or 0.0, at
        self.priority = None if priority is None else checked_priority(priority)
        self.timeout = checked_timeout(timeout)
        self.retry = None if retry is None else RetryPolicy.of(retry)
        self.headers = headers

    def due(self, now: float) -> float | None:
        """When the job is first due, as seconds since the epoch; None for at once."""
        if self.at is not None:
            return self.at.timestamp()
        return now + self.delay if self.delay else None


_NOTHING_GIVEN = (None,) * 6
_NO_OPTIONS = _Options(None, None, None, None, None, None)


def _options(
    delay: float | None,
    at: datetime | None,
    priority: int | None,
    timeout: float | None,
    retry: RetryPolicy | int | Literal[False] | None,
    headers: Mapping[str, str] | None,
) -> _Options:
    given = (delay, at, priority, timeout, retry, headers)
    return _NO_OPTIONS if given == _NOTHING_GIVEN else _Options(*given)  # nearly all calls give none


def _is_aware(at: object) -> bool:
    return isinstance(at, datetime) and at.tzinfo is not None


def _fits(schema: JobSchema[Any, Any], data: dict[str, Any]) -> dict[str, Any]:
    try:
        parsed(schema.input, data)
    except ValidationError as error:
        raise InputInvalid(schema.name, field_errors(error)) from None  # the cause would show the values
    return data
