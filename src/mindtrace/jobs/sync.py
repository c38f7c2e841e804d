"""The blocking face: the same calls, run on one background loop per process and waited for."""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from enum import StrEnum
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Final, Generic, Literal, ParamSpec, Self, TypeVar

from mindtrace.jobs.backend import Backend, QueueSpec
from mindtrace.jobs.backends import LOCAL, address
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.background import background
from mindtrace.jobs.consumer import AnyConsumer
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.events import Listener
from mindtrace.jobs.job import In, JobSchema, Out
from mindtrace.jobs.orchestrator import AsyncOrchestrator, check_options
from mindtrace.jobs.retry import is_seconds
from mindtrace.jobs.threads import CallerThread
from mindtrace.jobs.wire import PAYLOAD_LIMIT
from mindtrace.jobs.worker import Worker

if TYPE_CHECKING:
    from mindtrace.jobs.backends.redis import RedisBackend

_log = logging.getLogger(__name__)

B = TypeVar("B", bound=Backend)
P = ParamSpec("P")
R = TypeVar("R")


_AHEAD = 8  # deliveries that `consume` holds beyond the one it runs, while runs are short


class BackendType(StrEnum):
    """Which backend a client speaks to."""

    LOCAL = "local"
    REDIS = "redis"


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


class Client(Generic[B]):
    """A backend for the blocking API: opened on the background loop when it is first used; in a forked child anew."""

    backend_type: ClassVar[BackendType]

    def __init__(self) -> None:
        self._backend = self._new(None)
        self._pid = os.getpid()
        self._is_open = False

    @property
    def backend(self) -> B:
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

    def consumer_backend(self, queue_name: str, orchestrator: "Orchestrator") -> "ConsumerBackendBase":
        """What drives a consumer on this backend."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the backend; the next call opens it again."""
        if self._is_open and self._pid == os.getpid():
            background.call(self._close)

    def _new(self, old: B | None) -> B:
        """A backend; in a forked child in place of the parent's."""
        raise NotImplementedError

    async def _close(self) -> None:
        self._is_open = False
        background.not_at_exit(self._backend.aclose)
        await self._backend.aclose()

    async def _open(self) -> None:
        if self._pid != os.getpid():
            self._backend, self._pid, self._is_open = self._new(self._backend), os.getpid(), False
        if not self._is_open:
            await self._backend.open()  # which several first calls at once share
        if not self._is_open:
            background.at_exit(self._backend.aclose)
            self._is_open = True


class LocalClient(Client[LocalBackend]):
    """The backend in this process, for the blocking API; in a forked child anew, with its queues and no jobs."""

    backend_type: ClassVar[BackendType] = BackendType.LOCAL

    def consumer_backend(self, queue_name: str, orchestrator: "Orchestrator") -> "LocalConsumerBackend":
        """What drives a consumer on this backend."""
        return LocalConsumerBackend(queue_name, orchestrator)

    def _new(self, old: LocalBackend | None) -> LocalBackend:
        return LocalBackend() if old is None else old.without_jobs()


class RedisClient(Client["RedisBackend"]):
    """The backend on a Redis server, for the blocking API. It connects with the first call.

    Args:
        host: name or address.
        port: its port.
        db: number of the database.
        username: of an ACL user; None for the default one.
        password: its password.
        tls: encrypt the connection, and verify the server's certificate.
        ca_certs: a file of certificates to verify against, in place of the system's.
        certfile: a client certificate.
        keyfile: its key.
        allow_insecure: with TLS, take any certificate; a warning at every start.
        namespace: what tells applications on one server apart.
        allow_eviction: use a server that deletes keys when it is full; it may delete jobs.
        require_durable: refuse a server without an append-only file; else that is a warning.
        max_stall: seconds that a run on the background loop, one with `async`, may block it until the leases there are
            left to end, and others run the jobs; None: never.

    Raises:
        ConfigError: a value is out of its range.
    """

    backend_type: ClassVar[BackendType] = BackendType.REDIS

    def __init__(
        self,
        host: str = "localhost",
        port: int = 6379,
        db: int = 0,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: bool = False,
        ca_certs: str | None = None,
        certfile: str | None = None,
        keyfile: str | None = None,
        allow_insecure: bool = False,
        namespace: str = "mtj",
        allow_eviction: bool = False,
        require_durable: bool = False,
        max_stall: float | None = 600.0,
    ) -> None:
        from mindtrace.jobs.backends.redis import RedisBackend  # with its driver, which nobody else has to load

        self._set_up(
            lambda: RedisBackend(
                host,
                port,
                db,
                username=username,
                password=password,
                tls=tls,
                ca_certs=ca_certs,
                certfile=certfile,
                keyfile=keyfile,
                allow_insecure=allow_insecure,
                namespace=namespace,
                allow_eviction=allow_eviction,
                require_durable=require_durable,
                max_stall=max_stall,
            )
        )

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = "mtj",
        allow_insecure: bool = False,
        allow_eviction: bool = False,
        require_durable: bool = False,
        max_stall: float | None = 600.0,
    ) -> Self:
        """As the constructor, with `redis://[[user]:password@]host[:port][/db]`; `rediss://` for TLS.

        Raises:
            ConfigError: it is no such URL.
        """
        from mindtrace.jobs.backends.redis import RedisBackend

        client = cls.__new__(cls)
        client._set_up(
            lambda: RedisBackend.from_url(
                url,
                namespace=namespace,
                allow_insecure=allow_insecure,
                allow_eviction=allow_eviction,
                require_durable=require_durable,
                max_stall=max_stall,
            )
        )
        return client

    def consumer_backend(self, queue_name: str, orchestrator: "Orchestrator") -> "RedisConsumerBackend":
        """What drives a consumer on this backend."""
        return RedisConsumerBackend(queue_name, orchestrator)

    def _set_up(self, make: Callable[[], "RedisBackend"]) -> None:
        self._make = make
        super().__init__()

    def _new(self, old: "RedisBackend | None") -> "RedisBackend":
        return self._make()


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
            url: `local://`, or `redis://` or `rediss://`; None takes `MINDTRACE_JOBS_URL`, else `local://`.
            require: see the class.
            payload_limit: see the class.
            listeners: see the class.

        Raises:
            ConfigError: no backend of that scheme.
        """
        url = address(url)
        client: Client[Any] = LocalClient() if url == LOCAL else RedisClient.from_url(url)
        return cls(client, require=require, payload_limit=payload_limit, listeners=listeners)

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
        return self.backend.consumer_backend(schema.queue, self)


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
        consuming = _Consuming(self.orchestrator.twin, self.consumer, num_messages, self.poll_timeout)
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
        self, twin: AsyncOrchestrator, consumer: AnyConsumer[Any, Any], num_messages: int | None, poll_timeout: float
    ) -> None:
        self.caller = CallerThread()
        self._twin, self._consumer, self._num_messages = twin, consumer, num_messages
        self._poll_timeout = poll_timeout
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
            self.consumer_backend = orchestrator.backend.consumer_backend(self.job_type_name, orchestrator)
        self.consumer_backend.consumer = self

    def consume(self, num_messages: int | None = None) -> int:
        """Run jobs in this thread until interrupted, or until `num_messages` deliveries are settled.

        Returns:
            how many it handled.
        """
        if self.consumer_backend is None:
            raise ConfigError(f"{type(self).__name__} is not connected: call connect(orchestrator) first")
        return self.consumer_backend.consume(num_messages)
