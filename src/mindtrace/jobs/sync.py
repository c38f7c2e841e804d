"""The blocking face: the same calls, run on one background loop per process and waited for."""

import asyncio
import atexit
import logging
import os
import threading
import warnings
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from enum import StrEnum
from functools import wraps
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from mindtrace.jobs.backend import Backend, QueueSpec
from mindtrace.jobs.consumer import AnyConsumer
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.errors import ConfigError, WouldDeadlock
from mindtrace.jobs.job import In, JobSchema, Out
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.threads import CallerThread
from mindtrace.jobs.worker import Worker

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Face = TypeVar("Face", bound="_Face")
Twin = TypeVar("Twin")

_EXIT_TIMEOUT = 2.0


class BackendType(StrEnum):
    """Which backend a client speaks to."""

    LOCAL = "local"


class _Background:
    """The background loop of this process: started when first needed, anew in a forked child, closed at exit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._exit = ExitStack()
        self._thread: int | None = None
        self._backends: list[Backend] = []
        self._warned = False

    def portal(self) -> BlockingPortal:
        """The portal to the loop."""
        portal = self._portal
        if portal is None:
            with self._lock:
                portal = self._portal
                if portal is None:
                    portal = self._exit.enter_context(start_blocking_portal(name="mindtrace-jobs"))
                    self._thread = portal.call(threading.get_ident)
                    self._portal = portal
        return portal

    def call(self, function: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Run a coroutine on the loop and wait for it.

        Raises:
            WouldDeadlock: called from the loop itself.
        """
        portal = self.portal()
        if threading.get_ident() == self._thread:
            raise WouldDeadlock(
                "a blocking call on the background loop would wait for itself: await the async API there"
            )
        self._warn_of_a_running_loop()
        result: R = portal.call(function)
        return result

    def start(self, function: Callable[[], Coroutine[Any, Any, R]]) -> "Future[R]":
        """Run a coroutine on the loop."""
        return self.portal().start_task_soon(function)

    def remember(self, backend: Backend) -> None:
        """Close it at exit."""
        self._backends.append(backend)

    def close(self) -> None:
        """Close what is open, within 2 s; what is unsettled by then is for the leases."""
        if self._portal is None or threading.get_ident() == self._thread:
            return
        portal, self._portal = self._portal, None
        try:
            portal.call(self._close_all)
            self._exit.close()
        except RuntimeError as error:
            _log.warning("the background loop was not closed in order: %s", error)

    def forget(self) -> None:
        """In a forked child: the parent's loop may say that it runs and never does."""
        self._lock, self._exit = threading.Lock(), ExitStack()
        self._portal = self._thread = None
        self._backends = []

    async def _close_all(self) -> None:
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT):
                for backend in self._backends:
                    await backend.aclose()
        except TimeoutError:
            _log.warning("closing at exit took longer than %g s; what is unsettled is for the leases", _EXIT_TIMEOUT)

    def _warn_of_a_running_loop(self) -> None:
        if self._warned or asyncio._get_running_loop() is None:
            return
        self._warned = True
        warnings.warn(
            "a blocking call inside a running event loop, which stands still meanwhile: await AsyncOrchestrator there",
            RuntimeWarning,
            stacklevel=5,
        )


_background = _Background()
atexit.register(lambda: _background.close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _background.forget())


class _Face:
    """What blocking classes share: `twin` is their async counterpart, `portal` runs its coroutines."""

    @property
    def twin(self) -> Any:
        """The async counterpart."""
        raise AttributeError

    @property
    def portal(self) -> _Background:
        """Runs coroutines on the background loop."""
        return _background


def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], R]:
    """`method`, run on the background loop and waited for."""

    @wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        twin = self.twin
        result: R = self.portal.call(lambda: method(twin, *args, **kwargs))
        return result

    return call


class LocalClient:
    """The backend in this process, for the blocking API; in a forked child anew, with its queues and no jobs."""

    backend_type: Final = BackendType.LOCAL

    def __init__(self) -> None:
        self._pid = -1
        self._backend: Backend | None = None
        self._specs: dict[str, QueueSpec] = {}
        self._lock = threading.Lock()

    @property
    def backend(self) -> Backend:
        """The async backend, opened on the background loop."""
        if self._backend is None or self._pid != os.getpid():
            with self._lock:
                if self._backend is None or self._pid != os.getpid():
                    self._open()
        assert self._backend is not None  # noqa: S101 (opened above)
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
        _background.call(lambda: backend.declare(spec))
        self._specs[queue_name] = spec

    def close(self) -> None:
        """Close the backend; the next call opens it again."""
        if self._backend is not None and self._pid == os.getpid():
            backend, self._backend = self._backend, None
            _background.call(backend.aclose)

    def _open(self) -> None:
        from mindtrace.jobs.backends.local import LocalBackend

        backend = LocalBackend()

        async def begin() -> None:
            await backend.open()
            for spec in self._specs.values():
                await backend.declare(spec)

        _background.call(begin)
        _background.remember(backend)
        self._backend, self._pid = backend, os.getpid()


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
    """

    def __init__(self, backend: LocalClient) -> None:
        self.backend = backend
        self._twin: AsyncOrchestrator | None = None

    @property
    def twin(self) -> AsyncOrchestrator:
        """The async counterpart, on the background loop of this process."""
        backend = self.backend.backend
        twin = self._twin
        if twin is None or twin.backend is not backend:
            fresh = AsyncOrchestrator(backend)
            if twin is not None:
                schemas = list(twin.schemas.values())
                _background.call(lambda: _register_all(fresh, schemas))
            self._twin = twin = fresh
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


async def _register_all(orchestrator: AsyncOrchestrator, schemas: Sequence[JobSchema[Any, Any]]) -> None:
    for schema in schemas:
        await orchestrator.register(schema)


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
        twin, consumer, caller = self.orchestrator.twin, self.consumer, CallerThread()
        worker: Worker | None = None

        async def drive() -> tuple[int, BaseException | None]:
            nonlocal worker
            worker = Worker(twin, [consumer], concurrency=1, timeout=None, max_jobs=num_messages, threads=caller)
            try:
                await worker.work()
            except BaseException as error:  # told to the calling thread: raised here it would stop the loop
                return worker.handled, error
            finally:
                caller.close()
            return worker.handled, None

        async def stop() -> None:
            if worker is not None:
                worker.stop(now=True)

        _background.portal()
        running = _background.start(drive)
        try:
            caller.serve()
        except KeyboardInterrupt:
            caller.interrupt()
            _background.start(stop)
            caller.serve()
            running.result()
            raise
        handled, error = running.result()
        if error is not None:
            raise error
        return handled


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
        if self.calls.method is None:
            raise ConfigError(f"{type(self).__name__} has neither run nor handle: write one of them")
        if schema is None:
            own = self.schema()
            if own is not None:
                orchestrator.register(own)
                schema = own
        if schema is not None:
            self.consumer_backend = orchestrator.create_consumer_backend_for_schema(schema)
        else:
            _background.call(lambda: twin.backend.declare(QueueSpec(self.job_type_name), attach=True))
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
