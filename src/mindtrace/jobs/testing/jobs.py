"""`JobsTest`: an orchestrator for tests, whose jobs run when the test says so and whose clock the test moves."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import wraps
from random import Random
from typing import Any, Final, TypeVar, cast

from mindtrace.jobs.backend import DeadLetters, QueueSpec
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.consumer import AnyConsumer
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.delivery import Dead, Release, Retry
from mindtrace.jobs.errors import Closed, ConfigError, JobSignal, RetryLater
from mindtrace.jobs.events import Event, JobSettled, JobStarted
from mindtrace.jobs.job import JobSchema
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.retry import is_seconds, is_whole
from mindtrace.jobs.worker import Worker

__all__ = ["JobsTest", "VirtualClock"]

Method = TypeVar("Method", bound=Callable[..., Coroutine[Any, Any, Any]])

_TICK = 2.0**-24  # seconds; a fraction that sums of floats carry exactly


class VirtualClock:
    """A clock that stands still until it is told to advance. Its time of day is the machine's, plus all advances."""

    def __init__(self) -> None:
        self._now = 0.0
        self._waiting: dict[asyncio.Future[None], float] = {}

    def now(self) -> float:
        """Seconds by which it was advanced so far."""
        return self._now

    def wall(self) -> datetime:
        """The time of day, in UTC; what the `at` of a publish is compared with."""
        # Not frozen: a test takes its `at` from the running one, and an hour from then must be due an hour on.
        return datetime.now(UTC) + timedelta(seconds=self._now)

    async def until(self, when: float) -> None:
        """Return once `now()` is `when` or later."""
        if self._now < when:
            self._waiting[future := asyncio.get_running_loop().create_future()] = when
            try:
                await future
            finally:
                del self._waiting[future]

    def advance(self, seconds: float) -> None:
        """Move it on; what was waiting for a time that has now come is woken, the earliest first.

        Args:
            seconds: 0 or more.

        Raises:
            ConfigError: no such number.
        """
        if not is_seconds(seconds) or seconds < 0:
            raise ConfigError(f"advance({seconds!r}): finite seconds from 0 on, since a clock never goes back")
        # Rounded up to a tick, or what is due in 0.8 s would not be due after 0.7 and 0.1.
        self._now = math.ceil((self._now + seconds) / _TICK) * _TICK
        for future, when in sorted(self._waiting.items(), key=lambda waiting: waiting[1]):
            if when <= self._now:
                with suppress(RuntimeError):  # its loop is closed
                    future.get_loop().call_soon_threadsafe(_wake, future)


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class _NoJitter(Random):
    """Draws the upper end: a retry waits as long as its policy may ask, in every run of the test."""

    def random(self) -> float:
        """One, always."""
        return 1.0


def _begun(method: Method) -> Method:
    """`method`, in whichever loop it is awaited, with the queues of all that is connected."""

    @wraps(method)
    async def call(self: Any, /, *args: Any, **options: Any) -> Any:
        await self._begin()
        return await method(self, *args, **options)

    return cast(Method, call)


class _TestDeadLetters(AsyncDeadLetters):
    def __init__(self, letters: DeadLetters, begin: Callable[[], Awaitable[None]]) -> None:
        super().__init__(letters)
        self._begin = begin

    list: Final = _begun(AsyncDeadLetters.list)
    get: Final = _begun(AsyncDeadLetters.get)
    count: Final = _begun(AsyncDeadLetters.count)
    replay: Final = _begun(AsyncDeadLetters.replay)
    purge: Final = _begun(AsyncDeadLetters.purge)


class JobsTest(AsyncOrchestrator):
    """An orchestrator on a local backend of its own, whose clock stands still; nothing runs until `drain()`.

    Everything is as in production: inputs are checked, jobs go through the wire format, a `Worker` runs them. `async
    with` opens and closes it; without, it opens itself in the loop that first uses it, and again in a later loop once
    that one is closed, so that a test may call `asyncio.run` several times.

    Attributes:
        clock: delays, retries and leases go by it, and only the test moves it. Timeouts and the timers of the jobs
            themselves keep the machine's time.
    """

    def __init__(self) -> None:
        self.clock: VirtualClock = VirtualClock()
        self._local = LocalBackend(clock=self.clock)
        super().__init__(self._local)
        self._consumers: dict[str, AnyConsumer[Any, Any]] = {}
        self._unattached: list[AnyConsumer[Any, Any]] = []
        self._last_retry = 0.0  # when it is due, or was
        self._closed = self._draining = False

    async def open(self) -> None:
        """Open it, also after it was closed; the jobs are still there."""
        self._closed = False
        await super().open()

    async def aclose(self) -> None:
        """Close it. Closing twice does nothing."""
        self.close()
        await super().aclose()

    def close(self) -> None:
        """Be of no more use; for where there is no loop. It holds nothing that has to be given back."""
        self._closed = True

    async def _begin(self) -> None:
        """What each call does first: open the backend in this loop, make the queues of what was connected.

        Raises:
            Closed: it was closed, as the fixture's is when its test is over.
            ConfigError: it is in use in another loop.
        """
        await self._open_here()
        while self._unattached:
            consumer = self._unattached[0]
            own = consumer.schema()
            if consumer.job_type_name not in self.schemas:
                if own is not None:
                    await super().register(own)
                else:
                    await self.backend.declare(QueueSpec(consumer.job_type_name), attach=True)
            del self._unattached[0]

    async def register(self, schema: JobSchema[Any, Any]) -> str:
        """Make the schema known here, and its queue if there is none (FIFO). Returns the queue's name."""
        await self._open_here()  # and no more: a consumer that was connected before its schema waits for it
        return await super().register(schema)

    async def declare(self, spec: QueueSpec) -> None:
        """Make the queue if there is none."""
        await self._open_here()  # as above
        await super().declare(spec)

    delete: Final = _begun(AsyncOrchestrator.delete)
    clean: Final = _begun(AsyncOrchestrator.clean)
    depth: Final = _begun(AsyncOrchestrator.depth)
    queues: Final = _begun(AsyncOrchestrator.queues)
    count_queue_messages: Final = _begun(AsyncOrchestrator.count_queue_messages)
    publish: Final = _begun(AsyncOrchestrator.publish)
    publish_many: Final = _begun(AsyncOrchestrator.publish_many)
    receive_message: Final = _begun(AsyncOrchestrator.receive_message)

    def dead_letters(self, queue_name: str) -> AsyncDeadLetters:
        """The queue's dead letters."""
        return _TestDeadLetters(self._local.dead_letters(queue_name), self._begin)

    def connect(self, consumer: AnyConsumer[Any, Any]) -> None:
        """Have `drain` run the jobs of this consumer, an `AsyncConsumer` or a blocking one.

        Its queue is there from the next call on: that of its schema, or of its own name if there is no such schema.
        No loop is needed, so a plain fixture may connect what an application has.

        Raises:
            ConfigError: it has neither `run` nor `handle`, or no name, or another consumer runs that kind.
        """
        if not isinstance(consumer, AnyConsumer):  # pyright: ignore[reportUnnecessaryIsInstance] (a class, as a rule)
            raise ConfigError(f"connect({consumer!r}): an instance of an AsyncConsumer or Consumer class")
        consumer.check()
        if consumer.job_type_name in self._consumers:
            raise ConfigError(f"two consumers for {consumer.job_type_name!r} in one test")
        self._consumers[consumer.job_type_name] = consumer
        self._unattached.append(consumer)

    async def drain(self, *, with_scheduled: bool = False, with_retries: bool = True, max_jobs: int = 1000) -> int:
        """Run what is ready, and what that publishes, one job at a time, until nothing is.

        Each queue is drained in its own order, the queues in that of their consumers. Jobs of a queue without a
        consumer stay where they are. A job that fails for good ends the drain and fails the test; the dead letter is
        there all the same, and the next drain goes on with the other jobs.

        Args:
            with_scheduled: also move the clock on, from one due time to the next, until no job is delayed or snoozed.
            with_retries: move the clock on until the jobs that failed have been run again. The waits are the longest
                that the policies allow, without jitter. False: the first failure of a job fails the test. A job that
                raises `RetryLater` has not failed; it waits.
            max_jobs: runs, after which whatever is left is taken for a job that publishes itself without end.

        Returns:
            how many runs there were.

        Raises:
            AssertionError: a job died, or could not be run, or there were more than `max_jobs`. Where the run raised,
                `__cause__` is what it raised.
            ConfigError: nothing is connected, or a drain is running.
        """
        __tracebackhide__ = True  # what failed is the job
        if not is_whole(max_jobs) or max_jobs < 1:
            raise ConfigError(f"max_jobs={max_jobs!r}: a whole number from 1 on")
        if not self._consumers:
            raise ConfigError("no consumer to run the jobs with: connect(consumer) first")
        if self._draining:
            raise ConfigError("a drain is running, and jobs run one at a time: wait for it")
        await self._begin()
        self._draining = True
        runs = 0
        try:
            while True:
                if await self._is_anything_ready():
                    if runs == max_jobs:
                        raise AssertionError(
                            f"after {max_jobs} runs there are more: does a job publish itself without end? "
                            "If not, drain(max_jobs=...)"
                        )
                    runs += await self._run_one(with_retries)
                elif (due := self._next_due(with_scheduled, with_retries)) is not None:
                    self.clock.advance(due - self.clock.now())
                else:
                    return runs
        finally:
            self._draining = False

    async def _open_here(self) -> None:
        if self._closed:
            raise Closed("this JobsTest is closed: its `async with`, or the test whose fixture it was, is over")
        await self.backend.open()

    def _queues(self) -> Iterator[str]:
        for name in self._consumers:
            yield self.schemas[name].queue if name in self.schemas else name

    async def _is_anything_ready(self) -> bool:
        for queue in self._queues():
            if (await self.backend.depth(queue)).ready:
                return True
        return False

    def _next_due(self, with_scheduled: bool, with_retries: bool) -> float | None:
        """When to go on, if at all; on the way to a retry, delayed jobs become due like in any other hour."""
        dues = [due for queue in self._queues() if (due := self._local.next_due(queue)) is not None]
        wanted = math.inf if with_scheduled else self._last_retry if with_retries else 0.0
        due = min(dues, default=math.inf)
        return due if due <= wanted and due < math.inf else None

    async def _run_one(self, with_retries: bool) -> int:
        """How many runs there were: 1, or 0 where a job that had crashed too often died instead."""
        __tracebackhide__ = True
        watch = _Watch(with_retries)
        consumers = list(self._consumers.values())
        # One job each: a worker of more takes the next with the same call that settles a failure.
        worker = Worker(
            self, consumers, concurrency=1, strict=True, max_jobs=1, until_idle=True, cancel_grace=1.0,
            random=_NoJitter(), listeners=[watch.on_event], name="drain",
        )  # fmt: skip
        watch.settled = lambda: worker.stop(now=True)  # or a thread that outlives its time would be waited for
        with ExitStack() as stack:
            for consumer in consumers:
                stack.enter_context(_watched(consumer, watch))
            try:
                await worker.work()
            except SystemExit as error:
                watch.fail("raised SystemExit, which stops its worker", error)
        if watch.retry_after is not None:
            self._last_retry = max(self._last_retry, self.clock.now() + watch.retry_after)
        if watch.failure is not None:
            raise AssertionError(watch.failure) from watch.cause
        return watch.runs


class _Watch:
    """What a drain sees of one run: that it began, what it raised, how it was settled."""

    def __init__(self, with_retries: bool) -> None:
        self.settled: Callable[[], None] | None = None
        self.runs = 0
        self.retry_after: float | None = None
        self.failure: str | None = None
        self.cause: BaseException | None = None
        self._with_retries = with_retries
        self._who = ""

    def raised(self, error: BaseException, ack: str) -> None:
        self.cause = error
        if ack == "early" and not isinstance(error, JobSignal):
            # Settled before it ran: nothing is retried and nothing gets into the dead letters.
            self.fail(f"failed and is lost (ack='early'): {type(error).__name__}: {error}", error)

    def fail(self, what: str, cause: BaseException | None) -> None:
        self.failure, self.cause = f"{self._who} {what}", cause

    def on_event(self, event: Event) -> None:
        if not isinstance(event, JobStarted | JobSettled):
            return
        schema = f"schema {event.schema_name!r}, " if event.schema_name else ""
        self._who = f"job {event.job_id} ({schema}queue {event.queue!r}, attempt {event.attempt})"
        if isinstance(event, JobStarted):
            self.runs += 1
            return
        self._judge(event)
        if self.runs and self.settled is not None:
            self.settled()  # with ack='early' that is before the run, which is still to come

    def _judge(self, event: JobSettled) -> None:
        settlement = event.settlement
        error = settlement.error if isinstance(settlement, Dead | Retry) else None
        text = "" if error is None else f": {error.type}: {error.message}"
        if isinstance(settlement, Dead):
            self.fail(f"is dead, {settlement.reason!r}{text}", self.cause)
        elif isinstance(settlement, Retry):
            self.retry_after = settlement.delay
            if not self._with_retries and not isinstance(self.cause, RetryLater):
                self.fail(f"failed, with_retries=False{text}", self.cause)
        elif isinstance(settlement, Release) and not self.runs:
            self.fail("was not run: no connected consumer knows its schema, or its wire format", None)


@contextmanager
def _watched(consumer: AnyConsumer[Any, Any], watch: _Watch) -> Generator[None]:
    """Tell `watch` what the consumer raises: a settlement carries its text, and a test wants the exception itself."""
    name: str = consumer.calls.method or ""
    method: Callable[[Any], Any] = getattr(consumer, name)
    own = vars(consumer)
    before = own.get(name)

    @wraps(method)
    def call(data: Any) -> Any:
        __tracebackhide__ = True
        try:
            return method(data)
        except BaseException as error:
            watch.raised(error, consumer.ack)
            raise

    @wraps(method)
    async def call_async(data: Any) -> Any:
        __tracebackhide__ = True
        try:
            return await method(data)
        except BaseException as error:
            watch.raised(error, consumer.ack)
            raise

    own[name] = call_async if consumer.calls.is_async else call
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before
