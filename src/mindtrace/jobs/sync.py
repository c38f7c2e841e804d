"""The blocking face: the same calls, run on one background loop per process and waited for."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

from mindtrace.jobs.backend import Backend, QueueSpec
from mindtrace.jobs.background import background
from mindtrace.jobs.clients import BackendType, Client, client_of
from mindtrace.jobs.consumer import AnyConsumer
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.events import Listener
from mindtrace.jobs.job import In, JobSchema, Out
from mindtrace.jobs.orchestrator import AsyncOrchestrator, check_options
from mindtrace.jobs.retry import is_seconds, is_whole
from mindtrace.jobs.threads import CallerThread
from mindtrace.jobs.wire import PAYLOAD_LIMIT
from mindtrace.jobs.worker import Worker

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


_AHEAD = 8  # deliveries that `consume` holds beyond the one it runs, while runs are short


class _Face:
    """What blocking classes share: `twin` is their async counterpart."""

    @property
    def twin(self) -> Any:
        """The async counterpart."""
        raise AttributeError


def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], R]:
    """`method`, run on the background loop and waited for."""

    @wraps(method)
    def call(self: _Face, /, *args: P.args, **kwargs: P.kwargs) -> R:
        twin = self.twin
        return background.call(lambda: method(twin, *args, **kwargs))

    return call


class DeadLetters(_Face):
    """The dead letters of one queue: `AsyncDeadLetters`, blocking."""

    def __init__(self, twin: AsyncDeadLetters) -> None:
        self._twin = twin

    @property
    def twin(self) -> AsyncDeadLetters:
        """The async counterpart."""
        return self._twin

    list: Final = blocking(AsyncDeadLetters.list)
    get: Final = blocking(AsyncDeadLetters.get)
    count: Final = blocking(AsyncDeadLetters.count)
    replay: Final = blocking(AsyncDeadLetters.replay)
    purge: Final = blocking(AsyncDeadLetters.purge)


class Orchestrator(_Face):
    """`AsyncOrchestrator`, blocking: the same names, arguments and errors, from any thread.

    Args:
        backend: a client, such as `LocalClient()`.
        require: names of `Traits` that the backend must have; checked when it is opened, by the first call.
        payload_limit: bytes of JSON that one input may have, up to 16 MiB.
        listeners: told of each published job, on the background loop.

    Raises:
        ConfigError: an unknown trait, or a limit out of its range.
    """

    def __init__(
        self,
        backend: Client[Any],
        *,
        require: Iterable[str] = (),
        payload_limit: int = PAYLOAD_LIMIT,
        listeners: Sequence[Listener] = (),
    ) -> None:
        if not isinstance(backend, Client):  # pyright: ignore[reportUnnecessaryIsInstance] (an async backend, say)
            raise ConfigError(f"backend={backend!r}: a client, such as LocalClient()")
        self.backend: Client[Any] = backend
        self._require = frozenset([require] if isinstance(require, str) else require)
        self._payload_limit, self._listeners = payload_limit, tuple(listeners)
        check_options(self._require, payload_limit)
        self._twin: AsyncOrchestrator | None = None

    @classmethod
    def from_url(
        cls,
        url: str | None = None,
        *,
        require: Iterable[str] = (),
        payload_limit: int = PAYLOAD_LIMIT,
        listeners: Sequence[Listener] = (),
    ) -> Self:
        """As the constructor, with a client that the URL names.

        Args:
            url: `local://`, `redis://` or `rediss://`, `amqp://` or `amqps://`; None takes `MINDTRACE_JOBS_URL`, else `local://`.
                The namespace is that of `MINDTRACE_JOBS_NAMESPACE`, else `mtj`.
            require: see the class.
            payload_limit: see the class.
            listeners: see the class.

        Raises:
            ConfigError: no backend of that scheme.
        """
        return cls(client_of(url), require=require, payload_limit=payload_limit, listeners=listeners)

    @property
    def twin(self) -> AsyncOrchestrator:
        """The async counterpart, on the background loop of this process."""
        backend, twin = self.backend.backend, self._twin
        if twin is None or twin.backend is not backend:  # the first call, or the first in a forked child
            return background.call(lambda: self._begin(backend))
        return twin

    async def _begin(self, backend: Backend) -> AsyncOrchestrator:
        old = self._twin
        if old is not None and old.backend is backend:
            return old
        twin = AsyncOrchestrator(
            backend, require=self._require, payload_limit=self._payload_limit, listeners=self._listeners
        )
        twin.check_traits()
        if old is not None:  # in a forked child
            for schema in list(old.schemas.values()):
                await twin.register(schema)
        if self._twin is not None and self._twin is not old:
            return self._twin  # of another thread's first call, which may have registered more by now
        _log.info("backend %s open, durability %s", backend.traits.name, backend.traits.durability)
        self._twin = twin
        return twin

    register: Final = blocking(AsyncOrchestrator.register)
    publish: Final = blocking(AsyncOrchestrator.publish)
    publish_many: Final = blocking(AsyncOrchestrator.publish_many)
    receive_message: Final = blocking(AsyncOrchestrator.receive_message)
    count_queue_messages: Final = blocking(AsyncOrchestrator.count_queue_messages)
    declare: Final = blocking(AsyncOrchestrator.declare)
    delete: Final = blocking(AsyncOrchestrator.delete)
    clean: Final = blocking(AsyncOrchestrator.clean)
    depth: Final = blocking(AsyncOrchestrator.depth)
    queues: Final = blocking(AsyncOrchestrator.queues)

    def dead_letters(self, queue_name: str) -> DeadLetters:
        """The queue's dead letters."""
        return DeadLetters(self.twin.dead_letters(queue_name))

    def create_consumer_backend_for_schema(self, schema: JobSchema[Any, Any]) -> "ConsumerBackendBase":
        """What drives a consumer of this schema on this orchestrator's backend."""
        return _consumer_backend(schema.queue, self)


class ConsumerBackendBase:
    """Drives one consumer: receives its jobs, runs them in the calling thread, settles them.

    Args:
        queue_name: where the jobs come from.
        orchestrator: whose queues.
    """

    def __init__(self, queue_name: str, orchestrator: Orchestrator) -> None:
        self.queue_name = queue_name
        self.orchestrator = orchestrator
        self.poll_timeout: float = 1.0
        self.prefetch_count: int = 1
        self.consumer: AnyConsumer[Any, Any] | None = None

    def consume(self, num_messages: int | None = None) -> int:
        """Run jobs in this thread until interrupted, or until `num_messages` deliveries are settled.

        Returns:
            how many it handled.

        Raises:
            KeyboardInterrupt: Ctrl-C; the job it met is released, and everything is closed.
            ConfigError: no consumer is connected.
        """
        if self.consumer is None:
            raise ConfigError("no consumer: use consumer.connect(orchestrator)")
        if num_messages is not None and num_messages < 1:
            return 0
        consuming = _Consuming(
            self.orchestrator.twin, self.consumer, num_messages, self.poll_timeout, self.prefetch_count
        )
        try:
            running = background.start(consuming.drive)
            consuming.caller.serve()
            handled, error = running.result()
        except KeyboardInterrupt:
            consuming.caller.interrupt()
            background.start(consuming.stop).result()
            raise
        if error is not None:
            raise error
        return handled


class _Consuming:
    """One call of `consume`: a worker on the background loop, whose runs happen in the thread that called."""

    def __init__(
        self,
        twin: AsyncOrchestrator,
        consumer: AnyConsumer[Any, Any],
        num_messages: int | None,
        poll_timeout: float,
        prefetch_count: int,
    ) -> None:
        self.caller = CallerThread()
        self._twin, self._consumer, self._num_messages = twin, consumer, num_messages
        self._poll_timeout, self._prefetch_count = poll_timeout, prefetch_count
        self._worker: Worker | None = None
        self._ended: asyncio.Event | None = None

    async def drive(self) -> tuple[int, BaseException | None]:
        """Work until there is nothing more to do. Gives what is to be returned, and what is to be raised instead."""
        self._ended = asyncio.Event()
        background.at_exit(self.stop)
        try:
            self._worker = Worker(
                self._twin,
                [self._consumer],
                concurrency=1,
                timeout=None,
                ahead=_AHEAD,
                max_jobs=self._num_messages,
                poll_timeout=self._poll_timeout,
                prefetch=self._prefetch_count,
                threads=self.caller,
            )
            await self._worker.work()
        except asyncio.CancelledError:  # the process ends, and has no more time for us
            return self._worker.handled if self._worker else 0, None
        except BaseException as error:  # told to the calling thread: raised here it would stop the loop
            return self._worker.handled if self._worker else 0, error
        else:
            return self._worker.handled, None
        finally:
            background.not_at_exit(self.stop)
            self._ended.set()
            self.caller.close()

    async def stop(self) -> None:
        """Release what runs and end; at once, if `drive` was interrupted before it began."""
        if self._ended is not None:
            if self._worker is not None:
                self._worker.stop(now=True)
            await self._ended.wait()


class LocalConsumerBackend(ConsumerBackendBase):
    """Drives a consumer on the local backend."""


class RedisConsumerBackend(ConsumerBackendBase):
    """Drives a consumer on Redis.

    Args:
        queue_name: where the jobs come from.
        orchestrator: whose queues.
        poll_timeout: the longest single wait for a job, in seconds. A job that comes meanwhile ends it at once.

    Raises:
        ConfigError: `poll_timeout` is not above 0.
    """

    def __init__(self, queue_name: str, orchestrator: Orchestrator, poll_timeout: float = 5) -> None:
        if not is_seconds(poll_timeout) or poll_timeout <= 0:
            raise ConfigError(f"poll_timeout={poll_timeout!r}: seconds above 0")
        super().__init__(queue_name, orchestrator)
        self.poll_timeout: float = poll_timeout


class RabbitMQConsumerBackend(ConsumerBackendBase):
    """Drives a consumer on RabbitMQ.

    Args:
        queue_name: where the jobs come from.
        orchestrator: whose queues.
        prefetch_count: jobs that the server hands over before they are settled: the one that runs, and those that wait
            behind it. What waits for 5 s is handed back, to the end of the queue.

    Raises:
        ConfigError: `prefetch_count` is not a whole number from 1 on.
    """

    def __init__(self, queue_name: str, orchestrator: Orchestrator, prefetch_count: int = 1) -> None:
        if not is_whole(prefetch_count) or not 1 <= prefetch_count <= 65535:
            raise ConfigError(f"prefetch_count={prefetch_count!r}: a whole number from 1 to 65535")
        super().__init__(queue_name, orchestrator)
        self.prefetch_count: int = prefetch_count


_CONSUMER_BACKENDS: Mapping[BackendType, type[ConsumerBackendBase]] = MappingProxyType(
    {
        BackendType.LOCAL: LocalConsumerBackend,
        BackendType.REDIS: RedisConsumerBackend,
        BackendType.RABBITMQ: RabbitMQConsumerBackend,
    }
)


def _consumer_backend(queue_name: str, orchestrator: Orchestrator) -> ConsumerBackendBase:
    return _CONSUMER_BACKENDS[orchestrator.backend.backend_type](queue_name, orchestrator)


class Consumer(AnyConsumer[In, Out]):
    """Runs jobs of one kind, blocking. Write `run(self, job_dict: dict) -> dict`, or `handle(self, data: In) -> Out`.

    Args:
        job_type_name: the schema it runs, and the queue where no schema of that name is registered.
    """

    consumer_backend: ConsumerBackendBase | None = None

    def connect(self, orchestrator: Orchestrator) -> None:
        """Attach to the queue of its schema; or, where no schema of its name is registered, to the queue of that name.

        Raises:
            ConfigError: it has neither `run` nor `handle`, or no name.
        """
        twin = orchestrator.twin
        schema, own = twin.schemas.get(self.job_type_name), None
        self.check()
        if schema is None:
            own = self.schema()
            if own is not None:
                orchestrator.register(own)
                schema = own
        if schema is not None:
            self.consumer_backend = orchestrator.create_consumer_backend_for_schema(schema)
        else:
            background.call(lambda: twin.backend.declare(QueueSpec(self.job_type_name), attach=True))
            self.consumer_backend = _consumer_backend(self.job_type_name, orchestrator)
        self.consumer_backend.consumer = self

    def consume(self, num_messages: int | None = None) -> int:
        """Run jobs in this thread until interrupted, or until `num_messages` deliveries are settled.

        Returns:
            how many it handled.
        """
        if self.consumer_backend is None:
            raise ConfigError(f"{type(self).__name__} is not connected: call connect(orchestrator) first")
        return self.consumer_backend.consume(num_messages)
