"""`Worker`: receive, run, settle, until told to stop."""

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, Self

from mindtrace.jobs.ahead import LONG, Ahead
from mindtrace.jobs.backend import Receiver
from mindtrace.jobs.consumer import AnyConsumer
from mindtrace.jobs.delivery import Dead, Delivery, Done, Release, Settled, Settlement
from mindtrace.jobs.errors import (
    AuthenticationFailed,
    BackendUnavailable,
    Closed,
    ConfigError,
    QueueNotFound,
    Refused,
    RunAborted,
    UnknownSchema,
)
from mindtrace.jobs.events import JobSettled, Listener, told
from mindtrace.jobs.job import ExecutionStatus
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.processes import Processes
from mindtrace.jobs.retry import RetryPolicy, is_seconds, is_whole
from mindtrace.jobs.routes import Routes
from mindtrace.jobs.runs import Finished, Run, Runs, about
from mindtrace.jobs.threads import BlockingRuns, ThreadPool

_log = logging.getLogger(__name__)

SUSPECT_CRASHES = 2
"""Crashes from which on a job is suspected of killing its worker, and is run with no other suspect beside it."""
_SETTLE_TIMEOUT = 2.0
_OVERLAPS = 32  # free slots, of which more are filled in two halves
_ANSWER_WITHIN = 5.0  # seconds; a broker that takes longer is not there
_LONGEST_PAUSE = 1.0  # seconds between two tries where the broker is away


@dataclass(frozen=True, slots=True)
class Health:
    """How a worker is.

    Attributes:
        connected: the last exchange reached the broker.
        idle_for: seconds since the receive loop last turned; above 15 something blocks it.
        running: jobs that are being run.
        stuck: runs whose time is over and that do not end.
        draining: no more jobs are taken.
    """

    connected: bool
    idle_for: float
    running: int
    stuck: int
    draining: bool

    @property
    def healthy(self) -> bool:
        """Whether the loop turns, and not every running job is stuck."""
        return self.idle_for <= 15 and not 0 < self.running == self.stuck


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
        until_idle: stop once nothing is ready.
        poll_timeout: the longest single wait for a job, in seconds; a job that comes meanwhile ends it at once.
        unknown_ttl: seconds after which a job whose schema nobody knows is dead.
        listeners: told of each start and settlement.
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
        until_idle: bool = False,
        poll_timeout: float = 1.0,
        unknown_ttl: float = 86400.0,
        listeners: Sequence[Listener] = (),
        name: str = "worker",
        random: Random | None = None,
        threads: BlockingRuns | None = None,
    ) -> None:
        for option, value in (("concurrency", concurrency), ("max_jobs", max_jobs)):
            if value is not None and (not is_whole(value) or value < 1):
                raise ConfigError(f"{option}={value!r}: a whole number from 1 on")
        if not is_whole(prefetch) or prefetch < 1:
            raise ConfigError(f"prefetch={prefetch!r}: a whole number from 1 on")
        if not is_whole(ahead) or ahead < 0:
            raise ConfigError(f"ahead={ahead!r}: a whole number from 0 on")
        for option, seconds in (("drain", drain), ("cancel_grace", cancel_grace), ("unknown_ttl", unknown_ttl)):
            if not is_seconds(seconds) or seconds < 0:
                raise ConfigError(f"{option}={seconds!r}: seconds from 0 on")
        for option, seconds in (("lease", lease), ("poll_timeout", poll_timeout)):
            if not is_seconds(seconds) or seconds <= 0:
                raise ConfigError(f"{option}={seconds!r}: seconds above 0")
        if timeout is not None and not (timeout == math.inf or (is_seconds(timeout) and timeout > 0)):
            raise ConfigError(f"timeout={timeout!r}: seconds above 0, or None for no limit")
        if not consumers:
            raise ConfigError("a worker needs at least one consumer")
        self.orchestrator: AsyncOrchestrator = orchestrator
        self._consumers = tuple(consumers)
        self.concurrency: int = concurrency
        self.name: str = f"{name}@{socket.gethostname()}:{os.getpid()}"
        self.handled: int = 0
        policy = RetryPolicy() if retry is None else RetryPolicy.of(retry)
        self._timeout = math.inf if timeout is None else timeout
        self._routes = Routes(orchestrator, consumers, policy=policy, timeout=self._timeout, unknown_ttl=unknown_ttl)
        self._lease, self._drain, self._strict, self._poll_timeout = lease, drain, strict, poll_timeout
        self._max_jobs, self._until_idle = max_jobs, until_idle
        self._random = random or Random()  # noqa: S311 (jitter, not secrets)
        self._listeners = tuple(listeners)
        self._pool: ThreadPool | None = None
        if threads is None:
            self._pool = threads = ThreadPool(concurrency, f"{name}-run")
        self._processes = Processes()
        self._runs = Runs(
            worker=self.name,
            threads=threads,
            processes=self._processes,
            grace=cancel_grace,
            policy=policy,
            random=self._random,
            listeners=self._listeners,
            nudge=self._on_change,
            ended=self._on_end,
            stop_for=self._stop_for,
            ending=self._is_ending,
        )
        self._receiver: Receiver | None = None
        can_wait = orchestrator.backend.traits.keeps_place and all(consumer.ack != "early" for consumer in consumers)
        self._ahead, self._prefetch = Ahead(ahead if can_wait else 0), prefetch
        self._patience: asyncio.TimerHandle | None = None
        self._taken = 0
        self._stopping: float | None = None  # when the drain is over, on the monotonic clock
        self._cancelling = False
        self._fatal: BaseException | None = None
        self._connected, self._turned = True, time.monotonic()
        self._asked: float | None = None  # since when an exchange that settles has had no answer
        self._ready, self._stop_asked = asyncio.Event(), asyncio.Event()
        self._main: asyncio.Task[Any] | None = None
        self._cancels = 0  # that its task had swallowed before
        self._group: asyncio.TaskGroup | None = None
        self._embedded: asyncio.Task[None] | None = None

    # --- what people call

    @property
    def released(self) -> int:
        """How many deliveries were handed back because the worker stopped."""
        return self._runs.released

    async def run(self) -> int:
        """Run until stopped, by `stop()`, a signal, `max_jobs` or `until_idle`; once.

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
        if self._stopping is None or now:
            self._stopping = time.monotonic() + (0.0 if now else self._drain)
        if now:
            self._cancelling = True
        self._stop_asked.set()
        self._hand_back_waiting()
        self._nudge()

    def health(self) -> Health:
        """How the worker is, at this moment."""
        now = time.monotonic()
        idle_for, connected = now - self._turned, self._connected
        if self._asked is not None:  # the broker has what is to be settled, and as long as the leases to answer
            idle_for = max(0.0, idle_for - self._lease)
            connected = connected and now - self._asked < _ANSWER_WITHIN
        return Health(connected, idle_for, len(self._runs), self._runs.stuck, self._stopping is not None)

    async def work(self) -> None:
        """As `run`, without signals.

        Raises:
            Closed: it has run before: a worker runs once.
        """
        if self._main is not None:
            raise Closed("a worker runs once: make a new one")
        self._main = asyncio.current_task()
        self._cancels = self._main.cancelling() if self._main is not None else 0
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._processes.aclose)
                await self._processes.open(self._consumers, self.concurrency, self._stop_asked)
                receiver = await self._arrive(stack)
                if receiver is None:
                    return
                self._receiver = receiver
                self._log_start()
                self._ready.set()
                try:
                    await self._pump(receiver)
                finally:
                    await self._wind_up(receiver)
        finally:
            self._receiver = None
            if self._pool is not None:
                self._pool.close()
        if self._fatal is not None:
            raise self._fatal

    async def _arrive(self, stack: AsyncExitStack) -> Receiver | None:
        """Find or declare the queues, and receive from them; waits for a broker that is not there. None: stopped."""
        while True:
            try:
                await self._routes.lay()
                return await stack.enter_async_context(
                    self.orchestrator.backend.receiver(
                        self._routes.queues,
                        slots=max(self.concurrency + self._ahead.most, self._prefetch),
                        lease=self._lease,
                        crash_limit=self._routes.crash_limit,
                        strict=self._strict,
                        lost=self._runs.lose,
                    )
                )
            except AuthenticationFailed:
                raise
            except (Closed, BackendUnavailable) as error:
                try:
                    if isinstance(error, Closed):
                        await self.orchestrator.open()
                        stack.push_async_callback(self.orchestrator.aclose)
                        continue
                except AuthenticationFailed:
                    raise
                except BackendUnavailable as still:
                    error = still
                self._connected = False
                _log.warning("worker %s: %s; trying on", self.name, error)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0.1, _LONGEST_PAUSE)):
                    await self._stop_asked.wait()
            if self._stop_asked.is_set():
                return None

    # --- the pump: settle what finished, take what there is room for, start it

    async def _pump(self, receiver: Receiver) -> None:
        failures = 0
        while True:
            finished, self._runs.finished = self._runs.finished, []
            if self._max_jobs is not None and self._taken >= self._max_jobs and not self._runs:
                self.stop()
            stopping = self._stopping
            if stopping is not None and not finished and (not self._runs or time.monotonic() >= stopping):
                return
            wait = self._poll_timeout
            if stopping is not None:
                wait = max(0.001, min(wait, stopping - time.monotonic()))
            if self._until_idle and not self._runs:
                wait = 0.0
            room = self._room()
            self._asked = time.monotonic() if finished else None
            try:
                exchanged = await receiver.exchange([(f.delivery, f.settlement) for f in finished], room, wait=wait)
            except AuthenticationFailed:
                raise  # it would be refused again
            except BackendUnavailable as error:
                failures += 1
                self._connected = False
                _log.warning("worker %s: %s", self.name, error)
                await asyncio.sleep(self._random.uniform(0.1, min(_LONGEST_PAUSE, 0.2 * 2 ** min(failures, 6))))
                continue
            failures, self._asked = 0, None
            self._connected, self._turned = True, time.monotonic()
            refused = 0
            if exchanged.deliveries:
                refused = await self._begin(receiver, exchanged.deliveries)
            if finished:
                await self._account(finished, exchanged.settled)
            if exchanged.missing:
                raise QueueNotFound(exchanged.missing[0])
            if exchanged.deliveries:
                if refused:
                    await asyncio.sleep(0)  # what is refused unrun would keep the loop for as long as there is more
                continue
            if self._until_idle and room > 0 and not (stopping or finished or self._runs or self._runs.finished):
                self.stop()  # there was room for a job, and there was none

    def _room(self) -> int:
        """How many more deliveries there is room for."""
        if self._stopping is not None:
            return 0
        room = self._ahead.room(self.concurrency - len(self._runs))
        if room > _OVERLAPS:
            # While one half runs the other is on its way: a fifth more jobs with 100 slots. Of smaller batches the
            # round trips cost more than that.
            room = min(room, max(_OVERLAPS, (self.concurrency + 1) // 2))
        return room if self._max_jobs is None else min(room, self._max_jobs - self._taken)

    async def _begin(self, receiver: Receiver, deliveries: list[Delivery]) -> int:
        """Start them; but first settle what must not be in flight beside them. Returns how many are not run."""
        refused = 0
        first: list[Finished] = []
        runs: list[Run] = []
        suspect = self._runs.any(_is_suspect)
        self._taken += len(deliveries)
        for delivery in deliveries:
            if _is_suspect(delivery):
                if suspect:
                    # A poison job returns beside the jobs it took down: run together again, they would die with it.
                    first.append(Finished(delivery, Release(1.0)))
                    self._taken -= 1
                    continue
                suspect = True
            if len(self._runs) + len(runs) >= self.concurrency:
                self._ahead.add(delivery)
            elif (run := self._run_of(delivery)) is None:
                refused += 1
            else:
                runs.append(run)
                if run.route.consumer.ack == "early":
                    first.append(Finished(delivery, Done(), run.envelope.schema_name))
        gone = await self._settle_first(receiver, first) if first else frozenset[Delivery]()
        for run in runs:
            if run.delivery not in gone and not run.delivery.lost:
                run.settled = run.route.consumer.ack == "early"
                self._ahead.started()
                self._runs.start(run)
        if len(self._ahead) and self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(LONG, self._on_patience)
        return refused

    def _run_of(self, delivery: Delivery) -> Run | None:
        """What is to be run; None where it cannot be, and is settled at once."""
        try:
            route, envelope = self._routes.find(delivery)
        except (Refused, UnknownSchema) as error:
            self._runs.refuse(delivery, error)
            return None
        return Run(delivery, route, envelope)

    def _on_change(self) -> None:
        """There is something to settle, or a slot is free: give it to who waits for it, if anyone does."""
        if self._ahead.most:
            self._start_waiting()
        self._nudge()

    def _start_waiting(self) -> None:
        while len(self._runs) < self.concurrency and (delivery := self._ahead.next()) is not None:
            run = self._run_of(delivery)
            if run is not None:
                self._ahead.started()
                self._runs.start(run)

    def _on_end(self, run: Run) -> None:
        if self._ahead.most:
            self._ahead.ended(time.monotonic() - run.started)

    def _on_patience(self) -> None:
        """While deliveries wait behind a run: hand them back if it takes long."""
        self._patience = None
        if len(self._ahead):
            held_up_for = self._ahead.held_up_for()
            if held_up_for >= LONG:
                self._hand_back_waiting()
                self._nudge()
            else:
                self._patience = asyncio.get_running_loop().call_later(LONG - held_up_for, self._on_patience)

    def _hand_back_waiting(self) -> None:
        given_up = self._ahead.give_up()
        self._taken -= len(given_up)
        self._runs.finished += [Finished(delivery, Release()) for delivery in given_up]

    async def _settle_first(self, receiver: Receiver, first: list[Finished]) -> frozenset[Delivery]:
        """Settle before anything is run. Returns those for which that failed: they are not to be run."""
        settled = (await receiver.exchange([(f.delivery, f.settlement) for f in first], 0)).settled
        await self._account(first, settled)
        return frozenset(f.delivery for f, answer in zip(first, settled, strict=True) if answer is not None)

    async def _account(self, finished: Sequence[Finished], settled: Sequence[Settled]) -> None:
        """Count, log and tell how deliveries have ended."""
        for end, answer in zip(finished, settled, strict=True):
            delivery, settlement, run = end.delivery, end.settlement, end.run
            if answer is None:
                self.handled += not isinstance(settlement, Release)
            elif run is None or not run.job.lease_lost:  # else it is said already
                _log.warning("job %s: %s", delivery.message.id, answer, extra=about(delivery, self.name))
            if self._listeners:
                event = JobSettled(
                    delivery.queue,
                    delivery.message.id,
                    end.schema_name,
                    delivery.attempt,
                    settlement,
                    answer is None,
                    _status(settlement),
                    0.0 if run is None else time.monotonic() - run.started,
                )
                await told(self._listeners, event)

    # --- the end

    async def _wind_up(self, receiver: Receiver) -> None:
        """End what runs and settle what ended: the one duty that a shutdown may not interrupt, so it has a bound."""
        try:
            await self._runs.wind_up()
        finally:
            last = asyncio.get_running_loop().create_task(self._settle_last(receiver))
            cancelled: asyncio.CancelledError | None = None
            while not last.done():
                try:
                    await asyncio.wait({last})
                except asyncio.CancelledError as error:
                    cancelled = error
            if cancelled is not None:
                raise cancelled
            last.result()

    async def _settle_last(self, receiver: Receiver) -> None:
        finished, self._runs.finished = self._runs.finished, []
        if finished:
            with suppress(TimeoutError, BackendUnavailable, Closed):
                async with asyncio.timeout(_SETTLE_TIMEOUT):
                    exchanged = await receiver.exchange([(f.delivery, f.settlement) for f in finished], 0)
                    await self._account(finished, exchanged.settled)

    async def _embed(self) -> None:
        try:
            await self.work()
        except (KeyboardInterrupt, SystemExit) as error:
            # Raised in a task it would stop the loop under everyone: end the block, and raise it there.
            raise RunAborted(f"a job raised {type(error).__name__}") from error

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping is None:
            _log.info("worker %s: %s, draining", self.name, number.name)
            self.stop()
        elif not self._cancelling:
            _log.info("worker %s: %s again, cancelling", self.name, number.name)
            self.stop(now=True)
        else:
            asyncio.get_running_loop().remove_signal_handler(number)
            os.kill(os.getpid(), number)

    def _nudge(self) -> None:
        if self._receiver is not None:
            self._receiver.nudge()

    def _stop_for(self, error: BaseException) -> None:
        if self._fatal is None:
            self._fatal = error
        self.stop(now=isinstance(error, KeyboardInterrupt))

    def _is_ending(self) -> bool:
        # A loop that is shutting down cancels us all at once, without a word to the worker.
        return self._main is not None and self._main.cancelling() > self._cancels

    def _log_start(self) -> None:
        timeout = "no timeout" if self._timeout == math.inf else f"timeout {self._timeout:g} s"
        queues = ", ".join(self._routes.queues)
        _log.info("worker %s: queues %s, concurrency %d, %s", self.name, queues, self.concurrency, timeout)


def _status(settlement: Settlement) -> ExecutionStatus:
    match settlement:
        case Done():
            return ExecutionStatus.COMPLETED
        case Dead():
            return ExecutionStatus.FAILED
        case _:
            return ExecutionStatus.QUEUED


def _is_suspect(delivery: Delivery) -> bool:
    return delivery.crashes >= SUSPECT_CRASHES
