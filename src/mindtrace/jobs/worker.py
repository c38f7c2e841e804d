"""`Worker`: receive, run, settle, until told to stop."""

import asyncio
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from random import Random
from types import EllipsisType
from typing import Any, Literal, Self

from mindtrace.jobs.ahead import Ahead
from mindtrace.jobs.arrival import arrive
from mindtrace.jobs.backend import Receiver
from mindtrace.jobs.consumer import AnyConsumer
from mindtrace.jobs.errors import Closed, ConfigError, RunAborted
from mindtrace.jobs.events import Listener
from mindtrace.jobs.guard import LoopGuard
from mindtrace.jobs.health import Health
from mindtrace.jobs.options import WorkerOptions
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.processes import Processes
from mindtrace.jobs.pump import Pump
from mindtrace.jobs.retry import RetryPolicy
from mindtrace.jobs.routes import Routes, queue_of, taking_from
from mindtrace.jobs.running import RunningJob, running_jobs
from mindtrace.jobs.threads import BlockingRuns, ThreadPool

_log = logging.getLogger(__name__)

_NEAR = 300.0  # seconds below the limit of a broker, which does not look at every moment, and a run may need its grace


class Worker:
    """Runs the jobs of its consumers, several at once, until told to stop.

    `await worker.run()` owns the process: it drains on SIGTERM and SIGINT. `async with worker:` runs beside an
    application, in its loop, takes no signals and drains on exit.

    Args:
        orchestrator: whose queues. One that nobody opened is opened, and closed again, by the worker; where its broker
            is not there yet, the worker keeps trying.
        consumers: one for each kind of job, of either class. A blocking one runs in a thread, or in a process if its
            class says so.
        concurrency: jobs run at once, and the most that are held.
        timeout: seconds for one run, where neither publish nor schema nor class says; None for no limit.
        retry: the policy, where neither of them says.
        lease: seconds after which a job of a worker that died is another's; renewed while it runs.
        drain: seconds that runs have to end by themselves once the worker stops.
        cancel_grace: seconds that a cancelled run has to clean up.
        strict: take from the queues in the order of the consumers, in place of fair turns.
        prefetch: the most that a backend which pushes hands over ahead of what runs, together with it; RabbitMQ does.
        ahead: deliveries to hold beyond `concurrency` while runs take under 10 ms; handed back once one takes 100 ms.
            None are with `ack="early"`, or on a backend that could not put them back in their place.
        max_jobs: stop after so many deliveries.
        max_memory: MiB of this process that may be resident; above it, drain: for work that leaks.
        max_age: seconds, after which to drain.
        until_idle: stop once nothing is ready.
        poll_timeout: the longest single wait for a job, in seconds; a job that comes meanwhile ends it at once.
        unknown_ttl: seconds after which a job whose schema nobody knows is dead.
        listeners: told of each start and settlement, and of lost leases, unknown schemas and reconnections.
        name: of this worker, in records and logs.
        random: the source of the jitter.
        threads: where blocking runs are executed; daemon threads of its own, `concurrency` of them, unless given.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        orchestrator: AsyncOrchestrator,
        consumers: Sequence[AnyConsumer[Any, Any]],
        *,
        concurrency: int = 10,
        timeout: float | None = 300.0,
        retry: RetryPolicy | int | Literal[False] | None = None,
        lease: float = 30.0,
        drain: float = 30.0,
        cancel_grace: float = 5.0,
        strict: bool = False,
        prefetch: int = 1,
        ahead: int = 0,
        max_jobs: int | None = None,
        max_memory: float | None = None,
        max_age: float | None = None,
        until_idle: bool = False,
        poll_timeout: float = 1.0,
        unknown_ttl: float = 86400.0,
        listeners: Sequence[Listener] = (),
        name: str = "worker",
        random: Random | None = None,
        threads: BlockingRuns | None = None,
    ) -> None:
        if not consumers:
            raise ConfigError("a worker needs at least one consumer")
        self.orchestrator: AsyncOrchestrator = orchestrator
        self._options = WorkerOptions(
            concurrency=concurrency,
            timeout=timeout,
            retry=retry,
            lease=lease,
            drain=drain,
            cancel_grace=cancel_grace,
            strict=strict,
            prefetch=prefetch,
            ahead=ahead,
            max_jobs=max_jobs,
            max_memory=max_memory,
            max_age=max_age,
            until_idle=until_idle,
            poll_timeout=poll_timeout,
            unknown_ttl=unknown_ttl,
            listeners=tuple(listeners),
            name=name,
        )
        self._consumers, self._threads = tuple(consumers), threads
        self._random = random or Random()  # noqa: S311 (jitter, not secrets)
        self._processes = Processes()
        self._cancelling = False
        self._fatal: BaseException | None = None
        self._ready, self._stop_asked = asyncio.Event(), asyncio.Event()
        self._main: asyncio.Task[Any] | None = None
        self._cancels = 0  # that its task had swallowed before
        self._guard: LoopGuard | None = None
        self._group: asyncio.TaskGroup | None = None
        self._embedded: asyncio.Task[None] | None = None
        self._assemble()

    def _assemble(self) -> None:
        """Make its parts, as the options have it."""
        options, orchestrator = self._options, self.orchestrator
        self.name: str = f"{options.name}@{socket.gethostname()}:{os.getpid()}"
        self._routes = Routes(
            orchestrator,
            self._consumers,
            policy=options.policy,
            timeout=options.longest,
            unknown_ttl=options.unknown_ttl,
        )
        self._runs_in = self._threads or ThreadPool(options.concurrency, f"{options.name}-run")
        can_wait = orchestrator.backend.traits.keeps_place and all(one.ack != "early" for one in self._consumers)
        self._ahead = Ahead(options.ahead if can_wait else 0)
        self._pump = Pump(
            self.name,
            orchestrator.backend.traits.name,
            options,
            self._routes,
            threads=self._runs_in,
            processes=self._processes,
            ahead=self._ahead,
            random=self._random,
            stop_for=self._stop_for,
            ending=self._is_ending,
        )

    # --- what people call

    @property
    def consumers(self) -> tuple[AnyConsumer[Any, Any], ...]:
        """What it was made with."""
        return self._consumers

    @property
    def concurrency(self) -> int:
        """How many jobs are run at once."""
        return self._options.concurrency

    @property
    def drain(self) -> float:
        """Seconds that runs have to end by themselves once it stops."""
        return self._options.drain

    @property
    def queues(self) -> list[str]:
        """Where its jobs come from, in the order of its consumers."""
        return list(dict.fromkeys(queue_of(self.orchestrator, one) for one in self._consumers))

    @property
    def schemas(self) -> list[str]:
        """What its jobs are checked against; a consumer without a schema takes whatever is in its queue."""
        known = (self.orchestrator.schemas.get(one.job_type_name) or one.schema() for one in self._consumers)
        return list(dict.fromkeys(schema.name for schema in known if schema is not None))

    @property
    def handled(self) -> int:
        """How many deliveries were settled, and not handed back."""
        return self._pump.accounts.handled

    @property
    def released(self) -> int:
        """How many deliveries were handed back because the worker stopped."""
        return self._pump.runs.released

    def configure(
        self,
        *,
        queues: Sequence[str] | None = None,
        concurrency: int | None = None,
        max_jobs: int | None = None,
        max_memory: float | None = None,
        max_age: float | None = None,
        until_idle: bool | None = None,
        timeout: float | EllipsisType | None = ...,
        drain: float | None = None,
        name: str | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        """Change options before it runs: for whoever starts a worker that somebody else has made.

        None leaves an option as it is; `timeout` is left by `...`, since None means no limit there.

        Args:
            queues: only the consumers that take from these.
            concurrency: see `Worker`, as the rest.
            max_jobs: the same.
            max_memory: the same.
            max_age: the same.
            until_idle: the same.
            timeout: the same.
            drain: the same.
            name: the same.
            listeners: told as well as those there are.

        Raises:
            ConfigError: a value is out of its range, or no consumer takes from one of the queues; nothing has changed.
            Closed: it runs, or has run.
        """
        if self._main is not None:
            raise Closed("a worker is configured before it runs: this one has begun")
        consumers = self._consumers if queues is None else taking_from(queues, self._consumers, self.orchestrator)
        given: dict[str, Any] = {
            "concurrency": concurrency,
            "max_jobs": max_jobs,
            "max_memory": max_memory,
            "max_age": max_age,
            "until_idle": until_idle,
            "drain": drain,
            "name": name,
        }
        changed = {option: value for option, value in given.items() if value is not None}
        if not isinstance(timeout, EllipsisType):
            changed["timeout"] = timeout
        self._options = replace(self._options, listeners=(*self._options.listeners, *listeners), **changed)
        self._consumers = consumers
        self._assemble()

    async def run(self) -> int:
        """Run until stopped, by `stop()`, a signal, `until_idle` or one of the `max_` options; once.

        In the main thread SIGTERM and SIGINT are taken meanwhile: the first drains, the second cancels what runs, the
        third ends the process at once.

        Returns:
            0 if every run ended by itself, 1 if some had to be cancelled and released: an exit status.

        Raises:
            ConfigError: two consumers run the same kind, or one cannot be called.
            QueueNotFound: a queue was deleted under the worker.
            SystemExit: a job raised it; it counts as failed, and the worker has drained.
        """
        loop = asyncio.get_running_loop()
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                with suppress(NotImplementedError):  # Windows
                    handler = signal.getsignal(number)
                    loop.add_signal_handler(number, self._on_signal, number)
                    before[number] = handler
        try:
            await self.work()
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                if handler is not None:  # else it is none of Python's, which cannot put it back
                    signal.signal(number, handler)
        return 1 if self.released else 0

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._embedded = self._group.create_task(self._embed())
        ready = self._group.create_task(self._ready.wait())
        try:
            await asyncio.wait({self._embedded, ready}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError as cancelled:  # by the caller, or by the group since the start failed
            try:
                await self._group.__aexit__(type(cancelled), cancelled, cancelled.__traceback__)
            except BaseExceptionGroup as group:
                raise self._embedded.exception() or group from None
            raise
        ready.cancel()
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        assert self._group is not None  # noqa: S101 (entered)
        assert self._embedded is not None  # noqa: S101 (entered)
        self.stop()
        try:
            if not self._embedded.done():
                await asyncio.wait({self._embedded})
        finally:
            try:
                await self._group.__aexit__(kind, error, trace)
            finally:
                if self._fatal is not None:
                    raise self._fatal

    def stop(self, *, now: bool = False) -> None:
        """Take no more jobs, and return once those that run have ended; `now` cancels them. From the worker's loop."""
        if self._pump.stopping is None or now:
            self._pump.stop(0.0 if now else self._options.drain)
        self._cancelling = self._cancelling or now
        self._stop_asked.set()

    def health(self) -> Health:
        """How the worker is, at this moment. From any thread, also while its event loop stands still."""
        pump, guard = self._pump, self._guard
        receiver = pump.receiver
        return Health(
            connected=pump.pulse.connected and not (receiver is not None and receiver.is_away()),
            idle_for=pump.pulse.idle_for,
            lag=0.0 if guard is None else guard.lag,
            running=len(pump.runs),
            stuck=pump.runs.stuck,
            draining=pump.stopping is not None,
            keeping=receiver is None or pump.pulse.is_kept(receiver.keeper_idle_for()),
            slots=self._options.concurrency,
        )

    def running(self) -> list[RunningJob]:
        """What it runs at this moment and where in the code that is, the oldest first. From any thread.

        For whoever looks into a worker that is alive and does not get on; also from a signal handler. Processes that do
        not answer are waited for, a second in all.
        """
        guard = self._guard
        return [] if guard is None else running_jobs(self._pump.runs.in_flight(), guard.loop, guard.loop_thread)

    async def work(self) -> None:
        """As `run`, without signals.

        Raises:
            Closed: it has run before: a worker runs once.
        """
        if self._main is not None:
            raise Closed("a worker runs once: make a new one")
        self._main = asyncio.current_task()
        self._cancels = self._main.cancelling() if self._main is not None else 0
        self._guard = guard = LoopGuard(self.name, self._pump.runs.in_flight)
        guard.start()
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._processes.aclose)
                await self._processes.open(self._consumers, self.concurrency, self._stop_asked)
                receiver = await arrive(
                    lambda: self._receive(stack),
                    lambda: self._connect(stack),
                    worker=self.name,
                    pulse=self._pump.pulse,
                    random=self._random,
                    stopped=self._stop_asked,
                )
                if receiver is None:
                    return
                self._log_start()
                self._ready.set()
                await self._pump.run(receiver)
        finally:
            guard.stop()
            self._guard = None
            self._pump.pulse.ended()
            if self._threads is None:
                self._runs_in.close()
        if self._fatal is not None:
            raise self._fatal

    async def _receive(self, stack: AsyncExitStack) -> Receiver:
        options = self._options
        await self._routes.lay()
        return await stack.enter_async_context(
            self.orchestrator.backend.receiver(
                self._routes.queues,
                slots=max(options.concurrency + self._ahead.most, options.prefetch),
                lease=options.lease,
                crash_limit=self._routes.crash_limit,
                strict=options.strict,
                lost=self._pump.lose,
            )
        )

    async def _connect(self, stack: AsyncExitStack) -> None:
        await self.orchestrator.open()
        stack.push_async_callback(self.orchestrator.aclose)

    # --- the end

    async def _embed(self) -> None:
        try:
            await self.work()
        except (KeyboardInterrupt, SystemExit) as error:
            # Raised in a task it would stop the loop under everyone: end the block, and raise it there.
            raise RunAborted(f"a job raised {type(error).__name__}") from error

    def _on_signal(self, number: signal.Signals) -> None:
        if self._pump.stopping is None:
            _log.info("worker %s: %s, draining", self.name, number.name, extra={"worker": self.name})
            self.stop()
        elif not self._cancelling:
            _log.info("worker %s: %s again, cancelling", self.name, number.name, extra={"worker": self.name})
            self.stop(now=True)
        else:
            asyncio.get_running_loop().remove_signal_handler(number)
            os.kill(os.getpid(), number)

    def _stop_for(self, error: BaseException) -> None:
        if self._fatal is None:
            self._fatal = error
        self.stop(now=isinstance(error, KeyboardInterrupt))

    def _is_ending(self) -> bool:
        # A loop that is shutting down cancels us all at once, without a word to the worker.
        return self._main is not None and self._main.cancelling() > self._cancels

    def _log_start(self) -> None:
        longest = self._options.longest
        timeout = "no timeout" if longest == math.inf else f"timeout {longest:g} s"
        queues = ", ".join(self._routes.queues)
        extra = {"worker": self.name}
        _log.info("worker %s: queues %s, concurrency %d, %s", self.name, queues, self.concurrency, timeout, extra=extra)
        traits = self.orchestrator.backend.traits
        if traits.run_limit is not None and self._routes.longest > traits.run_limit - _NEAR:
            _log.warning(
                "worker %s: unless set up otherwise, %s takes a job away from a run that lasts longer than %g min "
                "and gives it to another: raise that limit there, or give the runs a shorter timeout",
                self.name,
                traits.name,
                traits.run_limit / 60,
                extra=extra,
            )
