"""`Worker`: receive, run, settle, until told to stop."""

import asyncio
import contextvars
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from random import Random
from typing import Any, Literal, Self

from pydantic import BaseModel, ValidationError

from mindtrace.jobs.backend import QueueSpec, Receiver
from mindtrace.jobs.consumer import AnyConsumer, CurrentJob, enter_job
from mindtrace.jobs.delivery import Dead, Delivery, Done, Release, Retry, Settled, Settlement
from mindtrace.jobs.errors import (
    BackendUnavailable,
    ConfigError,
    InputInvalid,
    QueueNotFound,
    Refused,
    RunAborted,
    RunTimeout,
    UnknownSchema,
    described,
)
from mindtrace.jobs.events import JobSettled, JobStarted, Listener
from mindtrace.jobs.job import ExecutionStatus, JobSchema, dumped, field_errors, parsed
from mindtrace.jobs.orchestrator import AsyncOrchestrator, told
from mindtrace.jobs.policy import settlement_for
from mindtrace.jobs.retry import RetryPolicy, is_seconds, is_whole
from mindtrace.jobs.threads import BlockingRuns, Outcome, ThreadPool
from mindtrace.jobs.wire import Envelope, decode, job_dict

logger = logging.getLogger(__name__)

SUSPECT_CRASHES = 2
"""Crashes from which on a job is suspected of killing its worker, and is run with no other suspect beside it."""
_TURN = 1.0  # seconds that one exchange waits at the most
_SETTLE_TIMEOUT = 2.0


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


@dataclass(slots=True)
class _Post:
    """One consumer at work: where from, what for, and how its runs are bounded."""

    consumer: AnyConsumer[Any, Any]
    queue: str
    schema: JobSchema[Any, Any] | None
    policy: RetryPolicy
    timeout: float | None


class _Run:
    """One delivery being run."""

    __slots__ = (
        "cause", "delivery", "ended", "envelope", "job", "post",
        "settled", "started", "task", "thread", "timer",
    )  # fmt: skip

    def __init__(self, delivery: Delivery, post: _Post, envelope: Envelope) -> None:
        self.delivery, self.post, self.envelope = delivery, post, envelope
        self.job = CurrentJob(envelope.id, delivery.attempt, delivery.number, envelope.headers)
        self.started = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self.thread: asyncio.Future[Outcome] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.cause: Literal["timeout", "stop", "lost"] | None = None
        self.settled = self.ended = False


class Worker:
    """Runs the jobs of its consumers, several at once, until told to stop.

    `await worker.run()` owns the process: it drains on SIGTERM and SIGINT. `async with worker:` runs beside an
    application, in its loop, takes no signals and drains on exit.

    Args:
        orchestrator: whose queues; it is opened already.
        consumers: one for each kind of job, of either class. A blocking one runs in a thread.
        concurrency: jobs run at once, and the most that are held.
        timeout: seconds for one run, where neither publish nor schema nor class says; None for no limit.
        retry: the policy, where neither of them says.
        lease: seconds after which a job of a worker that died is another's; renewed while it runs.
        drain: seconds that runs have to end by themselves once the worker stops.
        cancel_grace: seconds that a cancelled run has to clean up.
        strict: take from the queues in the order of the consumers, in place of fair turns.
        max_jobs: stop after so many deliveries.
        until_idle: stop once nothing is ready.
        unknown_ttl: seconds after which a job whose schema nobody knows is dead.
        listeners: told of each start and settlement.
        name: of this worker, in records and logs.
        random: the source of the jitter.

    Raises:
        ConfigError: a value is out of its range, or two consumers run the same kind.
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
        max_jobs: int | None = None,
        until_idle: bool = False,
        unknown_ttl: float = 86400.0,
        listeners: Sequence[Listener] = (),
        name: str = "worker",
        random: Random | None = None,
        threads: BlockingRuns | None = None,
    ) -> None:
        for option, value in (("concurrency", concurrency), ("max_jobs", max_jobs)):
            if value is not None and (not is_whole(value) or value < 1):
                raise ConfigError(f"{option}={value!r}: a whole number from 1 on")
        for option, seconds in (("drain", drain), ("cancel_grace", cancel_grace), ("unknown_ttl", unknown_ttl)):
            if not is_seconds(seconds) or seconds < 0:
                raise ConfigError(f"{option}={seconds!r}: seconds from 0 on")
        if not is_seconds(lease) or lease <= 0:
            raise ConfigError(f"lease={lease!r}: seconds above 0")
        if timeout is not None and not (timeout == math.inf or (is_seconds(timeout) and timeout > 0)):
            raise ConfigError(f"timeout={timeout!r}: seconds above 0, or None for no limit")
        if not consumers:
            raise ConfigError("a worker needs at least one consumer")
        self.orchestrator = orchestrator
        self.concurrency = concurrency
        self.name = f"{name}@{socket.gethostname()}:{os.getpid()}"
        self.handled = 0
        self.released = 0
        self._consumers = list(consumers)
        self._timeout, self._lease, self._drain, self._grace = timeout, lease, drain, cancel_grace
        self._policy = RetryPolicy() if retry is None else RetryPolicy.of(retry)
        self._strict, self._max_jobs, self._until_idle = strict, max_jobs, until_idle
        self._unknown_ttl, self._listeners = unknown_ttl, tuple(listeners)
        self._random = random or Random()  # noqa: S311 (jitter, not secrets)
        self._own_threads = threads is None
        self._threads = threads or ThreadPool(concurrency, f"{name}-run")
        self._posts: dict[str, list[_Post]] = {}
        self._runs: dict[Delivery, _Run] = {}
        self._finished: list[tuple[Delivery, Settlement, _Run | None]] = []
        self._receiver: Receiver | None = None
        self._busy = self._taken = self._stuck = 0
        self._stopping: float | None = None  # when the drain is over, on the monotonic clock
        self._cancelling = False
        self._fatal: BaseException | None = None
        self._connected, self._turned = True, time.monotonic()
        self._ready = asyncio.Event()
        self._main: asyncio.Task[Any] | None = None
        self._group: asyncio.TaskGroup | None = None
        self._embedded: asyncio.Task[None] | None = None
        self._owner: asyncio.Task[Any] | None = None

    # --- what people call

    async def run(self) -> int:
        """Run until stopped, by `stop()`, a signal, `max_jobs` or `until_idle`.

        In the main thread SIGTERM and SIGINT are taken meanwhile: the first drains, the second cancels what runs, the
        third ends the process at once.

        Returns:
            0 if every run ended by itself, 1 if some had to be cancelled and released: an exit status.

        Raises:
            QueueNotFound: a queue was deleted under the worker.
            SystemExit: a job raised it; it counts as failed, and the worker has drained.
        """
        loop = asyncio.get_running_loop()
        signals: list[signal.Signals] = []
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                with suppress(NotImplementedError):  # Windows
                    loop.add_signal_handler(number, self._on_signal, number)
                    signals.append(number)
        try:
            await self.work()
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
        return 1 if self.released else 0

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._embedded = self._group.create_task(self._embed())
        await asyncio.wait(
            {self._embedded, ready := self._group.create_task(self._ready.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
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
        if self._receiver is not None:
            self._receiver.nudge()

    def health(self) -> Health:
        """How the worker is, at this moment."""
        return Health(
            self._connected, time.monotonic() - self._turned, self._busy, self._stuck, self._stopping is not None
        )

    async def work(self) -> None:
        """As `run`, without signals."""
        self._main = asyncio.current_task()
        await self._take_posts()
        crash_limit = max(post.policy.crash_limit for posts in self._posts.values() for post in posts)
        try:
            async with self.orchestrator.backend.receiver(
                list(self._posts),
                slots=self.concurrency,
                lease=self._lease,
                crash_limit=crash_limit,
                strict=self._strict,
                lost=self._on_lost,
            ) as receiver:
                self._receiver = receiver
                self._log_start()
                self._ready.set()
                try:
                    await self._pump(receiver)
                finally:
                    await self._wind_up(receiver)
        finally:
            self._receiver = None
            if self._own_threads:
                self._threads.close()
        if self._fatal is not None:
            raise self._fatal

    # --- the pump: settle what finished, take what there is room for, start it

    async def _pump(self, receiver: Receiver) -> None:
        failures = 0
        while True:
            finished, self._finished = self._finished, []
            room = self._room()
            stopping = self._stopping
            if stopping is not None and not finished and (not self._runs or time.monotonic() >= stopping):
                return
            wait = _TURN if stopping is None else max(0.001, min(_TURN, stopping - time.monotonic()))
            if self._until_idle and not self._runs:
                wait = 0.0
            try:
                exchanged = await receiver.exchange([(d, s) for d, s, _ in finished], room, wait=wait)
            except BackendUnavailable as error:
                failures += 1
                self._connected = False
                logger.warning("worker %s: %s", self.name, error)
                await asyncio.sleep(self._random.uniform(0.1, min(10.0, 0.2 * 2 ** min(failures, 6))))
                continue
            failures = 0
            self._connected, self._turned = True, time.monotonic()
            if finished:
                await self._account(finished, exchanged.settled)
            if exchanged.missing:
                raise QueueNotFound(exchanged.missing[0])
            if exchanged.deliveries:
                await self._begin(receiver, exchanged.deliveries)
            elif self._until_idle and not finished and not self._runs and not self._finished and stopping is None:
                self.stop()

    def _room(self) -> int:
        if self._stopping is not None:
            return 0
        room = self.concurrency - self._busy
        if self._max_jobs is not None:
            room = min(room, self._max_jobs - self._taken)
            if self._taken >= self._max_jobs and self._busy == 0 and not self._finished:
                self.stop()
        return max(0, room)

    async def _begin(self, receiver: Receiver, deliveries: list[Delivery]) -> None:
        """Start them; but first settle what must not be in flight beside them."""
        first: list[tuple[Delivery, Settlement]] = []
        runs: list[_Run] = []
        suspect = any(run.delivery.crashes >= SUSPECT_CRASHES for run in self._runs.values())
        self._taken += len(deliveries)
        for delivery in deliveries:
            run = self._prepared(delivery)
            if run is None:
                continue
            if delivery.crashes >= SUSPECT_CRASHES:
                if suspect:
                    # A poison job returns beside the jobs it took down: run together again, they would die with it.
                    first.append((delivery, Release(1.0)))
                    self._taken -= 1
                    continue
                suspect = True
            if run.post.consumer.ack == "early":
                first.append((delivery, Done()))
            runs.append(run)
        if first:
            settled = await receiver.exchange(first, 0)
            gone = {
                delivery
                for (delivery, settlement), answer in zip(first, settled.settled, strict=True)
                if answer is not None and isinstance(settlement, Done)
            }
            runs = [run for run in runs if run.delivery not in gone]
            for run in runs:
                run.settled = run.post.consumer.ack == "early"
        loop = asyncio.get_running_loop()
        for run in runs:
            self._runs[run.delivery] = run
            self._busy += 1
            run.task = loop.create_task(self._handle(run))

    def _prepared(self, delivery: Delivery) -> _Run | None:
        """The run of a delivery, or None where it is settled without one."""
        try:
            envelope = decode(delivery.message.body, self.orchestrator.payload_limit)
            if isinstance(envelope, int):
                raise UnknownSchema("its wire format", time.time() - envelope / 1000, self._unknown_ttl)
            post = self._post_for(delivery.queue, envelope)
        except (Refused, UnknownSchema) as error:
            settlement = settlement_for(delivery, error, self._policy, self._random)
            logger.warning("job %s of queue %s is not run: %s", delivery.message.id, delivery.queue, error)
            self._finish(delivery, self._stamped(settlement, None), None)
            return None
        return _Run(delivery, post, envelope)

    def _post_for(self, queue: str, envelope: Envelope) -> _Post:
        for post in self._posts[queue]:
            if post.schema is None or post.schema.name == envelope.schema_name:
                return post
        due = envelope.created_ms if envelope.due_ms is None else envelope.due_ms
        raise UnknownSchema(f"the schema {envelope.schema_name!r}", time.time() - due / 1000, self._unknown_ttl)

    # --- one run

    async def _handle(self, run: _Run) -> None:
        if self._listeners:
            event = JobStarted(run.delivery.queue, run.envelope.id, run.envelope.schema_name, run.delivery.attempt)
            await told(self._listeners, event)
        end: Done | Exception | None = None
        try:
            end = await self._run(run)
        except asyncio.CancelledError as error:
            end = self._cancelled(run, error)
        except KeyboardInterrupt as error:
            self._stop_for(error)
        except Exception as error:  # user code
            end = error
        except BaseException as error:  # user code: SystemExit must not stop the loop under everyone
            end = RunAborted(f"the run raised {type(error).__name__}")
            end.__cause__ = error
            self._stop_for(error)
        finally:
            run.ended = True
            if run.timer is not None:
                run.timer.cancel()
            if run.thread is None or run.thread.done():
                self._free(run)
            else:
                run.thread.add_done_callback(lambda _: self._free(run))  # a thread keeps its slot until it returns
            if not run.settled:
                self._settle(run, end)

    async def _run(self, run: _Run) -> Done | Exception:
        timeout = self._timeout_of(run)
        data = self._input(run)
        enter_job(run.job)
        if timeout is not None:
            loop = asyncio.get_running_loop()
            run.job.deadline = run.started + timeout
            run.timer = loop.call_later(timeout, self._on_timeout, run, timeout)
        consumer = run.post.consumer
        method = getattr(consumer, consumer.calls.method or "")
        try:
            if consumer.calls.is_async:
                returned = await method(data)
            else:
                context = contextvars.copy_context()
                run.thread = self._threads.start(lambda: context.run(method, data))
                outcome = await asyncio.shield(run.thread)
                if outcome.error is not None:
                    raise outcome.error
                returned = outcome.value
        except Exception:
            if run.cause == "timeout" and timeout is not None:
                raise RunTimeout(timeout) from None
            raise
        self._check_output(run, returned)
        return Done()

    def _input(self, run: _Run) -> Any:
        data, schema = run.envelope.input_data, run.post.schema
        typed = run.post.consumer.calls.method == "handle"
        if schema is not None:
            try:
                model = parsed(schema.input, data)
            except ValidationError as error:
                raise Refused("input_invalid", str(InputInvalid(schema.name, field_errors(error)))) from None
            if typed:
                return model
            data = dumped(model)
        return job_dict(run.envelope, run.delivery.attempt, data)

    def _check_output(self, run: _Run, returned: object) -> None:
        schema = run.post.schema
        model: type[BaseModel] | None = None if schema is None else schema.output
        if schema is None or model is None:
            return
        try:
            if isinstance(returned, model):
                returned = vars(returned)  # a model is checked anew: what is set on it later is not validated
            model.model_validate(returned)
        except ValidationError as error:
            text = f"the result does not fit the schema {schema.name!r}: {described(field_errors(error))}"
            if schema.validate_output == "error":
                raise Refused("output_invalid", text) from None
            logger.warning("job %s: %s", run.envelope.id, text)

    def _timeout_of(self, run: _Run) -> float | None:
        for timeout in (run.envelope.timeout, run.post.timeout):
            if timeout is not None:
                return None if timeout == math.inf else timeout
        return None if self._timeout == math.inf else self._timeout

    # --- how a run is ended from outside, and what it then settles

    def _on_timeout(self, run: _Run, timeout: float) -> None:
        run.cause, run.job.cancelled = "timeout", True
        if run.thread is not None:
            self._abandon(run, RunTimeout(timeout))
        elif run.task is not None:
            run.task.cancel()
            loop = asyncio.get_running_loop()
            run.timer = loop.call_later(self._grace, self._abandon, run, RunTimeout(timeout))

    def _abandon(self, run: _Run, end: Exception) -> None:
        """Settle a run that has not ended: its slot stays taken until it does."""
        if run.ended or run.settled:
            return
        logger.error("job %s of queue %s does not end; its slot stays taken", run.envelope.id, run.delivery.queue)
        self._stuck += 1
        self._settle(run, end)

    def _on_lost(self, delivery: Delivery) -> None:
        run = self._runs.get(delivery)
        if run is None or run.settled:
            return
        logger.warning("job %s of queue %s: lease lost, result dropped", delivery.message.id, delivery.queue)
        run.job.lease_lost = run.job.cancelled = True
        self._cancel(run, "lost")

    def _cancel(self, run: _Run, cause: Literal["stop", "lost"]) -> None:
        run.cause, run.job.cancelled = cause, True
        if run.task is not None and not run.ended:
            run.task.cancel()

    def _cancelled(self, run: _Run, error: asyncio.CancelledError) -> Exception | None:
        """What a cancelled run ended with; None where it was we who asked, so that it counts as no attempt."""
        if run.cause == "timeout":
            return RunTimeout(self._timeout_of(run) or 0.0)
        # A loop that is shutting down cancels us all at once, without a word to the worker.
        if run.cause is not None or (self._main is not None and self._main.cancelling()):
            return None
        end = RunAborted("the run cancelled itself")
        end.__cause__ = error
        return end

    def _stop_for(self, error: BaseException) -> None:
        if self._fatal is None:
            self._fatal = error
        self.stop(now=isinstance(error, KeyboardInterrupt))

    def _settle(self, run: _Run, end: Done | Exception | None) -> None:
        """Decide, once; the pump writes it with its next exchange."""
        run.settled = True
        if end is None:
            settlement: Settlement = Release()
            self.released += 1
        else:
            if isinstance(end, Exception) and not isinstance(end, Refused):
                logger.info("job %s, attempt %d: %s", run.envelope.id, run.delivery.attempt, type(end).__name__)
            policy = run.envelope.retry or run.post.policy
            if run.envelope.retry is not None:
                policy = replace(
                    policy,
                    retry_on=run.post.policy.retry_on,
                    no_retry_on=run.post.policy.no_retry_on,
                )
            settlement = settlement_for(run.delivery, end, policy, self._random)
        self._finish(run.delivery, self._stamped(settlement, run), run)

    def _finish(self, delivery: Delivery, settlement: Settlement, run: _Run | None) -> None:
        self._finished.append((delivery, settlement, run))
        if self._receiver is not None:
            self._receiver.nudge()

    def _free(self, run: _Run) -> None:
        if self._runs.pop(run.delivery, None) is not None:
            self._busy -= 1
            if self._stuck and run.cause == "timeout":
                self._stuck -= 1
            if self._receiver is not None:
                self._receiver.nudge()

    def _stamped(self, settlement: Settlement, run: _Run | None) -> Settlement:
        if not isinstance(settlement, Retry | Dead) or settlement.error is None:
            return settlement
        now = datetime.now(UTC)
        started = None if run is None else datetime.fromtimestamp(now.timestamp() - time.monotonic() + run.started, UTC)
        return replace(settlement, error=replace(settlement.error, started_at=started, ended_at=now, worker=self.name))

    async def _account(self, finished: list[tuple[Delivery, Settlement, _Run | None]], settled: list[Settled]) -> None:
        for (delivery, settlement, run), answer in zip(finished, settled, strict=True):
            if answer is None and not isinstance(settlement, Release):
                self.handled += 1
            elif answer is not None and not delivery.lost:
                logger.warning("job %s of queue %s: %s", delivery.message.id, delivery.queue, answer)
            if isinstance(settlement, Dead) and answer is None:
                logger.error("job %s of queue %s is dead: %s", delivery.message.id, delivery.queue, settlement.reason)
            if self._listeners:
                seconds = 0.0 if run is None else time.monotonic() - run.started
                name = "" if run is None else run.envelope.schema_name
                event = JobSettled(
                    delivery.queue,
                    delivery.message.id,
                    name,
                    delivery.attempt,
                    settlement,
                    answer is None,
                    _status(settlement),
                    seconds,
                )
                await told(self._listeners, event)

    # --- the end

    async def _wind_up(self, receiver: Receiver) -> None:
        """Cancel what still runs, give it its grace, release what does not end, settle all: the shutdown's one duty."""
        tasks = {run.task for run in self._runs.values() if run.task is not None and not run.ended}
        for run in list(self._runs.values()):
            if not run.ended:
                self._cancel(run, "stop")
        if tasks:
            await asyncio.wait(tasks, timeout=self._grace)
        for run in list(self._runs.values()):
            if not run.settled:
                self._settle(run, None)
        if self._finished:
            finished, self._finished = self._finished, []
            with suppress(TimeoutError, BackendUnavailable):
                async with asyncio.timeout(_SETTLE_TIMEOUT):
                    exchanged = await receiver.exchange([(d, s) for d, s, _ in finished], 0)
                    await self._account(finished, exchanged.settled)

    async def _embed(self) -> None:
        try:
            await self.work()
        except (KeyboardInterrupt, SystemExit) as error:
            # Raised in a task it would stop the loop under everyone: end the block, and raise it there.
            raise RunAborted(f"a job raised {type(error).__name__}") from error

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping is None:
            logger.info("worker %s: %s, draining", self.name, number.name)
            self.stop()
        elif not self._cancelling:
            logger.info("worker %s: %s again, cancelling", self.name, number.name)
            self.stop(now=True)
        else:
            asyncio.get_running_loop().remove_signal_handler(number)
            os.kill(os.getpid(), number)

    # --- the start

    async def _take_posts(self) -> None:
        self._posts = {}
        taken: set[str] = set()
        for consumer in self._consumers:
            post = await self._post_of(consumer)
            kind = consumer.job_type_name
            if kind in taken:
                raise ConfigError(f"two consumers for {kind!r} in one worker")
            taken.add(kind)
            self._posts.setdefault(post.queue, []).append(post)
        for queue, posts in self._posts.items():
            posts.sort(key=lambda post: post.schema is None)  # one without a schema takes what the others do not know
            if sum(post.schema is None for post in posts) > 1:
                raise ConfigError(f"two consumers without a schema for the queue {queue!r}")

    async def _post_of(self, consumer: AnyConsumer[Any, Any]) -> _Post:
        kind = type(consumer).__name__
        if consumer.calls.method is None:
            raise ConfigError(f"{kind} has neither run nor handle: write one of them")
        if not consumer.job_type_name:
            raise ConfigError(f"{kind} has no name: {kind}('name of the schema or queue')")
        schema = self.orchestrator.schemas.get(consumer.job_type_name)
        own = consumer.schema()
        if schema is None and own is not None:
            await self.orchestrator.register(own)
            schema = own
        if schema is not None and own is not None and own.input is not schema.input:
            raise ConfigError(f"{kind} takes {own.input.__name__}, the schema {schema.name!r} {schema.input.__name__}")
        queue = consumer.job_type_name if schema is None else schema.queue
        await self.orchestrator.backend.declare(QueueSpec(queue), attach=True)
        retry = schema.retry if schema is not None and schema.retry is not None else type(consumer).retry
        policy = self._policy if retry is None else RetryPolicy.of(retry)
        timeout = schema.timeout if schema is not None and schema.timeout is not None else consumer.class_timeout()
        return _Post(consumer, queue, schema, policy, timeout)

    def _log_start(self) -> None:
        timeout = "no timeout" if self._timeout is None else f"timeout {self._timeout:g} s"
        queues = ", ".join(self._posts)
        logger.info("worker %s: queues %s, concurrency %d, %s", self.name, queues, self.concurrency, timeout)


def _status(settlement: Settlement) -> ExecutionStatus:
    match settlement:
        case Done():
            return ExecutionStatus.COMPLETED
        case Dead():
            return ExecutionStatus.FAILED
        case _:
            return ExecutionStatus.QUEUED
