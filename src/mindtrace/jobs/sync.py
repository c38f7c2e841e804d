"""The blocking face: the same calls, run on one background loop per process and waited for."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from enum import StrEnum
from functools import wraps
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar

from mindtrace.jobs.backend import QueueSpec
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.background import background
from mindtrace.jobs.consumer import AnyConsumer
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.events import Listener
from mindtrace.jobs.job import In, JobSchema, Out
from mindtrace.jobs.orchestrator import AsyncOrchestrator, check_options
from mindtrace.jobs.threads import CallerThread
from mindtrace.jobs.wire import PAYLOAD_LIMIT
from mindtrace.jobs.worker import Worker

P = ParamSpec("P")
R = TypeVar("R")


class BackendType(StrEnum):
    """Which backend a client speaks to."""

    LOCAL = "local"


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


class LocalClient:
    """The backend in this process, for the blocking API; in a forked child anew, with its queues and no jobs."""

    backend_type: Final = BackendType.LOCAL

    def __init__(self) -> None:
        self._backend = LocalBackend()
        self._pid = os.getpid()
        self._is_open = False

    @property
    def backend(self) -> LocalBackend:
        """The async backend, opened on the background loop."""
        if not self._is_open or self._pid != os.getpid():
            background.call(self._open)
        return self._backend

    def declare_queue(
        self,
        queue_name: str,
        *,
        queue_type: Literal["fifo", "priority", "stack"] | None = None,
        max_priority: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Make a queue if there is none.

        Args:
            queue_name: its name.
            queue_type: `fifo` unless given; `max_priority` alone means `priority`.
            max_priority: allows the priorities 0 to this one.
            max_length: the most ready and scheduled jobs.

        Raises:
            QueueMismatch: it exists with other properties.
        """
        kind = queue_type or ("fifo" if max_priority is None else "priority")
        spec = QueueSpec(queue_name, kind, max_priority, max_length)
        backend = self.backend
        background.call(lambda: backend.declare(spec))

    def close(self) -> None:
        """Close the backend; the next call opens it again, with the jobs it has."""
        if self._is_open and self._pid == os.getpid():
            background.call(self._close)

    async def _close(self) -> None:
        self._is_open = False
        background.not_at_exit(self._backend.aclose)
        await self._backend.aclose()

    async def _open(self) -> None:
        # On the background loop, and so never twice at once, without a lock that a fork could leave locked.
        if self._pid != os.getpid():
            self._backend, self._pid, self._is_open = self._backend.without_jobs(), os.getpid(), False
        if not self._is_open:
            await self._backend.open()
            background.at_exit(self._backend.aclose)
            self._is_open = True


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
        backend: LocalClient,
        *,
        require: Iterable[str] = (),
        payload_limit: int = PAYLOAD_LIMIT,
        listeners: Sequence[Listener] = (),
    ) -> None:
        if not isinstance(backend, LocalClient):  # pyright: ignore[reportUnnecessaryIsInstance] (an async backend, say)
            raise ConfigError(f"backend={backend!r}: a client, such as LocalClient()")
        self.backend: LocalClient = backend
        self._require = frozenset([require] if isinstance(require, str) else require)
        self._payload_limit, self._listeners = payload_limit, tuple(listeners)
        check_options(self._require, payload_limit)
        self._twin: AsyncOrchestrator | None = None

    @property
    def twin(self) -> AsyncOrchestrator:
        """The async counterpart, on the background loop of this process."""
        backend, twin = self.backend.backend, self._twin
        if twin is None or twin.backend is not backend:  # the first call, or the first in a forked child
            return background.call(lambda: self._begin(backend))
        return twin

    async def _begin(self, backend: LocalBackend) -> AsyncOrchestrator:
        # On the loop, where several first calls at once come one after the other; and what they register is kept.
        old = self._twin
        if old is not None and old.backend is backend:
            return old
        twin = AsyncOrchestrator(
            backend, require=self._require, payload_limit=self._payload_limit, listeners=self._listeners
        )
        twin.check_traits()
        self._twin = twin
        if old is not None:
            for schema in list(old.schemas.values()):
                await twin.register(schema)
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
        return LocalConsumerBackend(schema.queue, self)


class ConsumerBackendBase:
    """Drives one consumer: receives its jobs, runs them in the calling thread, settles them.

    Args:
        queue_name: where the jobs come from.
        orchestrator: whose queues.
    """

    def __init__(self, queue_name: str, orchestrator: Orchestrator) -> None:
        self.queue_name = queue_name
        self.orchestrator = orchestrator
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
        consuming = _Consuming(self.orchestrator.twin, self.consumer, num_messages)
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

    def __init__(self, twin: AsyncOrchestrator, consumer: AnyConsumer[Any, Any], num_messages: int | None) -> None:
        self.caller = CallerThread()
        self._twin, self._consumer, self._num_messages = twin, consumer, num_messages
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
                max_jobs=self._num_messages,
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
            self.consumer_backend = LocalConsumerBackend(self.job_type_name, orchestrator)
        self.consumer_backend.consumer = self

    def consume(self, num_messages: int | None = None) -> int:
        """Run jobs in this thread until interrupted, or until `num_messages` deliveries are settled.

        Returns:
            how many it handled.
        """
        if self.consumer_backend is None:
            raise ConfigError(f"{type(self).__name__} is not connected: call connect(orchestrator) first")
        return self.consumer_backend.consume(num_messages)
