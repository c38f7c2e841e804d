"""Which consumer runs a delivery, with what input, policy and time, and what its result has to be."""

import difflib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from mindtrace.jobs.backend import QueueSpec
from mindtrace.jobs.child import Unwritable
from mindtrace.jobs.consumer import AnyConsumer
from mindtrace.jobs.delivery import Delivery
from mindtrace.jobs.errors import ConfigError, Refused, UnknownSchema, described
from mindtrace.jobs.job import JobSchema, as_read, dumped, field_errors, parsed
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.retry import RetryPolicy
from mindtrace.jobs.wire import Envelope, decode, job_dict

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """From a queue and a schema to the method that runs such jobs.

    Attributes:
        consumer: whose method.
        queue: where its jobs come from.
        schema: what they have to be; None takes whatever no other route of the queue takes, unchecked.
        call: the method, `run` or `handle`.
        policy: where the job brings none.
        timeout: seconds for one run, where the job brings none; inf for no limit.
    """

    consumer: AnyConsumer[Any, Any]
    queue: str
    schema: JobSchema[Any, Any] | None
    call: Callable[[Any], Any]
    policy: RetryPolicy
    timeout: float

    def policy_for(self, envelope: Envelope) -> RetryPolicy:
        """The job's own numbers, else the route's. What code decides is the route's: the publisher has none of it."""
        own, policy = envelope.retry, self.policy
        if own is None:
            return policy
        return replace(own, retry_on=policy.retry_on, no_retry_on=policy.no_retry_on, delay=policy.delay)

    def timeout_for(self, envelope: Envelope) -> float:
        """Seconds for one run; inf for no limit."""
        return self.timeout if envelope.timeout is None else envelope.timeout

    def input_for(self, envelope: Envelope, attempt: int) -> Any:
        """What the method takes: the model for `handle`, the job's dict for `run`.

        Raises:
            Refused: the input does not fit the schema.
        """
        data = envelope.input_data
        if self.schema is not None:
            model = self.schema.received(data)
            if self.consumer.calls.method == "handle":
                return model
            data = dumped(model)
        return job_dict(envelope, attempt, data)

    def input_sent(self, envelope: Envelope, attempt: int) -> Any:
        """`input_for` as JSON values, for another process: checked here, and made a model there.

        Raises:
            Refused: the input does not fit the schema.
        """
        data = self.input_for(envelope, attempt)
        return envelope.input_data if self.consumer.calls.method == "handle" else data

    def check_output(self, envelope: Envelope, returned: object, *, sent: bool = False) -> None:
        """Nothing, if the result fits. `sent`: it came from another process, as JSON values or `Unwritable`.

        Raises:
            Refused: it does not, and the schema says that this is an error.
        """
        schema = self.schema
        model: type[BaseModel] | None = None if schema is None else schema.output
        if schema is None or model is None:
            return
        if (found := _misfit(model, returned, sent)) is not None:
            text = f"the result does not fit the schema {schema.name!r}: {found}"
            if schema.validate_output == "error":
                raise Refused("output_invalid", text)
            _log.warning("job %s: %s", envelope.id, text)


def _misfit(model: type[BaseModel], returned: object, sent: bool) -> str | None:
    """Why it does not fit, without the values."""
    if isinstance(returned, Unwritable):
        return returned.why
    try:
        if sent:
            parsed(model, returned)
        else:
            if isinstance(returned, model):
                returned = as_read(returned)  # checked anew: what is set on a model later is not validated
            model.model_validate(returned)
    except Exception as error:  # a validator is the user's code, and the run is over: it must not run again
        return described(field_errors(error)) if isinstance(error, ValidationError) else type(error).__name__
    return None


def queue_of(orchestrator: AsyncOrchestrator, consumer: AnyConsumer[Any, Any]) -> str:
    """Where its jobs come from: its schema's queue, or that of its name."""
    schema = orchestrator.schemas.get(consumer.job_type_name) or consumer.schema()
    return consumer.job_type_name if schema is None else schema.queue


def taking_from(
    queues: Sequence[str], consumers: Sequence[AnyConsumer[Any, Any]], orchestrator: AsyncOrchestrator
) -> tuple[AnyConsumer[Any, Any], ...]:
    """Those of the consumers that take from these queues.

    Raises:
        ConfigError: none takes from one of them; the text says which was probably meant.
    """
    wanted = [queues] if isinstance(queues, str) else list(queues)
    by_queue = [(queue_of(orchestrator, one), one) for one in consumers]
    known = sorted({queue for queue, _ in by_queue})
    said = f"this worker takes from {', '.join(map(repr, known))}"
    if not wanted:
        raise ConfigError(f"queues={queues!r}: name at least one; {said}")
    for queue in wanted:
        if queue not in known:
            near = difflib.get_close_matches(queue, known, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"no consumer takes from the queue {queue!r}: {meant}{said}")
    return tuple(one for queue, one in by_queue if queue in wanted)


class Routes:
    """All routes of one worker.

    Args:
        orchestrator: whose schemas and queues.
        consumers: one for each kind of job.
        policy: where neither schema nor consumer has one.
        timeout: the same; inf for no limit.
        unknown_ttl: seconds after which a job that nobody knows is dead.
    """

    def __init__(
        self,
        orchestrator: AsyncOrchestrator,
        consumers: Sequence[AnyConsumer[Any, Any]],
        *,
        policy: RetryPolicy,
        timeout: float,
        unknown_ttl: float,
    ) -> None:
        self._orchestrator, self._consumers = orchestrator, tuple(consumers)
        self._policy, self._timeout, self._unknown_ttl = policy, timeout, unknown_ttl
        self._by_queue: dict[str, list[Route]] = {}

    @property
    def queues(self) -> list[str]:
        """In the order of the consumers."""
        return list(self._by_queue)

    @property
    def crash_limit(self) -> int:
        """Of a job that brings none; of several routes the most patient."""
        return max(route.policy.crash_limit for routes in self._by_queue.values() for route in routes)

    @property
    def longest(self) -> float:
        """Seconds that a run may take whose job brings no timeout; inf for no limit."""
        return max(route.timeout for routes in self._by_queue.values() for route in routes)

    async def lay(self) -> None:
        """Find or declare each consumer's queue.

        Raises:
            ConfigError: a consumer cannot be called, or two claim the same jobs.
        """
        self._by_queue = {}
        taken: set[str] = set()
        for consumer in self._consumers:
            route = await self._route(consumer)
            kind = consumer.job_type_name
            if kind in taken:
                raise ConfigError(f"two consumers for {kind!r} in one worker")
            taken.add(kind)
            self._by_queue.setdefault(route.queue, []).append(route)
        for queue, routes in self._by_queue.items():
            routes.sort(key=lambda route: route.schema is None)  # one without a schema takes what the others leave
            if sum(route.schema is None for route in routes) > 1:
                raise ConfigError(f"two consumers without a schema for the queue {queue!r}")

    def find(self, delivery: Delivery) -> tuple[Route, Envelope]:
        """Who runs this, and what it says.

        Raises:
            Refused: the bytes cannot be read.
            UnknownSchema: no consumer here knows its schema or its format.
        """
        envelope = decode(delivery.message.body, self._orchestrator.payload_limit)
        if isinstance(envelope, int):
            raise UnknownSchema("", time.time() - envelope / 1000, self._unknown_ttl)
        for route in self._by_queue[delivery.queue]:
            if route.schema is None or route.schema.name == envelope.schema_name:
                return route, envelope
        due = envelope.created_ms if envelope.due_ms is None else envelope.due_ms
        raise UnknownSchema(envelope.schema_name, time.time() - due / 1000, self._unknown_ttl)

    async def _route(self, consumer: AnyConsumer[Any, Any]) -> Route:
        consumer.check()
        kind, method = type(consumer).__name__, consumer.calls.method or ""
        schema = self._orchestrator.schemas.get(consumer.job_type_name)
        own = consumer.schema()
        if schema is None and own is not None:
            await self._orchestrator.register(own)
            schema = own
        if schema is not None and own is not None and own.input is not schema.input:
            raise ConfigError(f"{kind} takes {own.input.__name__}, the schema {schema.name!r} {schema.input.__name__}")
        queue = queue_of(self._orchestrator, consumer)
        await self._orchestrator.backend.declare(QueueSpec(queue), attach=True)
        retry = schema.retry if schema is not None and schema.retry is not None else type(consumer).retry
        policy = self._policy if retry is None else RetryPolicy.of(retry)
        timeout = schema.timeout if schema is not None and schema.timeout is not None else consumer.class_timeout()
        return Route(
            consumer, queue, schema, getattr(consumer, method), policy, self._timeout if timeout is None else timeout
        )
