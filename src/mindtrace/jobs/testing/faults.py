"""Faults on purpose: a coroutine cancelled at each of its awaits, a backend whose n-th call breaks.

    async def scenario(fault: CancelAt) -> None:           async def scenario(backend: FailingAt) -> None:
        ...                       # a world made anew          ...                      # a world made anew
        ended = await fault.run(the_coroutine())               await the_calls(backend)
        ...                       # what holds all the same    ...                      # what holds all the same

    await every_suspension(scenario)                       await every_call(LocalBackend, scenario)

A scenario is run again and again, with the fault one step later each time. It has to do the same each time.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from mindtrace.jobs.backend import Backend, DeadLetters, Depth, Outages, QueueSpec, Receiver, Traits
from mindtrace.jobs.delivery import (
    DeadFilter,
    DeadPage,
    DeadRecord,
    Delivery,
    Exchanged,
    Published,
    Release,
    Settled,
    Settlement,
)
from mindtrace.jobs.errors import BackendUnavailable
from mindtrace.jobs.job import JobId
from mindtrace.jobs.wire import Message

__all__ = ["CancelAt", "Distant", "Ended", "FailingAt", "Moment", "every_call", "every_suspension"]

T = TypeVar("T")

Moment: TypeAlias = Literal["waiting", "finished", "timeout"]
"""When, around one suspension, a coroutine is cancelled.

`waiting`: as it begins to wait. `finished`: what it waits for has finished, and it is not yet resumed: whatever that
gave it is lost, unless somebody thought of it. `timeout`: an `asyncio.timeout` around it runs out as it begins to wait.
"""
MOMENTS: tuple[Moment, ...] = ("waiting", "finished", "timeout")

_driver: ContextVar["CancelAt | None"] = ContextVar("mindtrace_jobs_cancel_at", default=None)


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """How a coroutine ended: `error` is what it raised, a `CancelledError` too; without one it returned `value`."""

    value: T | None = None
    error: BaseException | None = None

    @property
    def cancelled(self) -> bool:
        """Whether it let the cancellation through."""
        return isinstance(self.error, asyncio.CancelledError)


class CancelAt:
    """Runs one coroutine, as a real task, and cancels it at its `k`-th suspension.

    A suspension is an await that gives the loop a turn. Counted are those of the coroutine and of the tasks that it
    starts, in the order in which they happen; whichever of them suspends, it is the coroutine that is cancelled. One
    that returns without waiting for what it started ends the count.

    Args:
        k: which suspension, from 1; 0 only counts.
        moment: see `Moment`. The second cancellation has the same, but for `timeout`, which runs out once: there it
            comes as the coroutine begins to wait.
        again: cancel a second time, at this suspension after the first cancellation, from 1: as a rule in the clean-up.
        limit: seconds that the coroutine may take.

    Attributes:
        seen: suspensions so far.
        struck: cancellations so far: 0 to 2.
        where: the awaits that were cancelled, each as the functions that were waiting, outermost first.
    """

    def __init__(self, k: int, moment: Moment = "waiting", *, again: int = 0, limit: float = 10.0) -> None:
        self.k: int = k
        self.moment: Moment = moment
        self.again: int = again
        self.limit: float = limit
        self.seen: int = 0
        self.struck: int = 0
        self.where: list[str] = []
        self._first_at = 0
        self._task: asyncio.Task[Any] | None = None
        self._timeout: asyncio.Timeout | None = None

    def __str__(self) -> str:
        if not self.k:
            return "not cancelled"
        second = f", and again {self.again} later" if self.again else ""
        return (
            f"cancelled at suspension {self.k} ({self.moment}){second}: {'; '.join(self.where) or 'never came there'}"
        )

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> Ended[T]:
        """Run it to its end, whatever that is. Once only, and in one loop one at a time.

        Raises:
            AssertionError: it did not end in time; it has been cancelled once more.
        """
        assert self._task is None, "a CancelAt runs one coroutine"  # noqa: S101
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        def factory(loop: asyncio.AbstractEventLoop, made: Any, **options: Any) -> Any:
            context: Context | None = options.get("context")
            driver = _driver.get() if context is None else context.get(_driver)
            steps = _Steps(made, self._suspended) if driver is self else made
            return asyncio.Task(steps, loop=loop, **options) if before is None else before(loop, steps, **options)

        token = _driver.set(self)
        loop.set_task_factory(factory)
        try:
            self._task = task = loop.create_task(self._timed(coroutine) if self.moment == "timeout" else coroutine)
        finally:
            _driver.reset(token)
        try:
            await asyncio.wait({task}, timeout=self.limit)
            in_time = task.done()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=self.limit)
            loop.set_task_factory(before)
        if not in_time:
            raise AssertionError(f"the coroutine did not end in {self.limit:g} s")
        if task.cancelled():
            return Ended(error=asyncio.CancelledError())
        error = task.exception()
        return Ended(task.result()) if error is None else Ended(error=error)

    async def _timed(self, coroutine: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(None) as self._timeout:
            return await coroutine

    def _suspended(self, steps: "_Steps", awaited: Any) -> None:
        """Called in the task that is about to wait: a cancellation from here meets it as soon as it does."""
        if self._task is None or self._task.done():
            return
        self.seen += 1
        first = self.struck == 0 and self.seen == self.k
        second = self.struck == 1 and self.again > 0 and self.seen == self._first_at + self.again
        if not (first or second):
            return
        where = steps.where()
        if self.moment == "finished" and asyncio.isfuture(awaited):
            # The task adds its own callback only after this one, so at that moment it is not resumed yet.
            awaited.add_done_callback(lambda _: self._strike(where))
        else:
            self._strike(where)

    def _strike(self, where: str) -> None:
        if self._task is None or self._task.done():
            return
        self.struck += 1
        self.where.append(where)
        if self.struck == 1:
            self._first_at = self.seen
            if self._timeout is not None:
                self._timeout.reschedule(asyncio.get_running_loop().time())
                return
        self._task.cancel()


class _Steps(Coroutine[Any, Any, Any]):
    """A coroutine that tells of each suspension, and is otherwise the one inside."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], suspended: Callable[["_Steps", Any], None]) -> None:
        self._coroutine, self._suspended = coroutine, suspended

    def send(self, value: Any) -> Any:
        awaited = self._coroutine.send(value)
        self._suspended(self, awaited)
        return awaited

    def throw(self, *error: Any) -> Any:
        awaited = self._coroutine.throw(*error)
        self._suspended(self, awaited)
        return awaited

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def where(self) -> str:
        """The functions that are waiting, outermost first, with their lines."""
        names: list[str] = []
        at: Any = self._coroutine
        while (frame := getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None)) is not None:
            names.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
            at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None)
        return " > ".join(names)


async def every_suspension(
    scenario: Callable[[CancelAt], Awaitable[None]], *, moments: Sequence[Moment] = MOMENTS, twice: bool = True
) -> int:
    """Run the scenario undisturbed; then for each suspension of what it drives, cancelled there, at each moment.

    Args:
        scenario: makes its world, awaits `run` of what it is given once, and checks what has to hold in any case.
        moments: when to cancel.
        twice: also run it with a second cancellation, at each suspension that follows the first.

    Returns:
        in how many of the runs something was cancelled.

    Raises:
        AssertionError: the undisturbed run had suspensions that a later one did not come to.
        Exception: of the scenario, with a note that says what was cancelled.
    """
    clean = CancelAt(0)
    await _noted(scenario(clean), clean)
    runs = 0
    for moment in moments:
        for k in range(1, clean.seen + 1):
            again = 0
            while True:
                fault = CancelAt(k, moment, again=again)
                await _noted(scenario(fault), fault)
                if fault.seen < k:
                    raise AssertionError(
                        f"{clean.seen} suspensions at first, then {fault.seen}: no repeatable scenario"
                    )
                runs += fault.struck > 0 and (not again or fault.struck == 2)
                if not twice or fault.struck <= (again > 0):
                    break
                again += 1
    return runs


class Distant(Backend):
    """A backend as if it were across a network: each call takes a turn of the loop on its way there, and one back.

    As with a broker, a caller that is cancelled on the way back has had its call done; what a cancelled `exchange` was
    to settle is settled; and what it received is given to the receiver's next call.

    Args:
        backend: where the calls go.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend: Backend = backend

    @property
    def traits(self) -> Traits:
        """Those of the backend inside."""
        return self.backend.traits

    async def open(self) -> None:
        """Open it; a call that breaks leaves it closed."""
        try:
            await self.call("open", self.backend.open)
        except BackendUnavailable:
            await self.backend.aclose()
            raise

    async def aclose(self) -> None:
        """Close it, also if cancelled. Never breaks: there is no answer to wait for."""
        try:
            await asyncio.sleep(0)
        finally:
            await self.backend.aclose()

    async def declare(self, spec: QueueSpec, *, attach: bool = False) -> None:
        """Make the queue if there is none."""
        await self.call("declare", lambda: self.backend.declare(spec, attach=attach))

    async def delete(self, queue: str, *, force: bool = False) -> None:
        """Delete a queue and its waiting jobs."""
        await self.call("delete", lambda: self.backend.delete(queue, force=force))

    async def clean(self, queue: str) -> int:
        """Cancel all ready and scheduled jobs."""
        return await self.call("clean", lambda: self.backend.clean(queue))

    async def depth(self, queue: str) -> Depth:
        """How many jobs there are, by state."""
        return await self.call("depth", lambda: self.backend.depth(queue))

    async def queues(self) -> list[QueueSpec]:
        """Those that are declared."""
        return await self.call("queues", self.backend.queues)

    async def publish(self, queue: str, messages: Sequence[Message]) -> list[Published]:
        """A call that breaks gives every message a `BackendUnavailable`, which says whether it may be stored."""
        fault = self.fault("publish")
        await asyncio.sleep(0)
        outcomes = [] if fault == "before" else await self.backend.publish(queue, messages)
        await asyncio.sleep(0)
        if fault is None:
            return outcomes
        return [
            BackendUnavailable("broken on purpose", maybe_published=fault == "after", job_ids=[message.id])
            for message in messages
        ]

    @asynccontextmanager
    async def receiver(
        self,
        queues: Sequence[str],
        *,
        slots: int = 1,
        lease: float = 30.0,
        crash_limit: int = 5,
        keep: bool = True,
        strict: bool = False,
        lost: Callable[[Delivery], None] | None = None,
    ) -> AsyncGenerator[Receiver, None]:
        """Entering it is a call; leaving it never breaks."""
        fault = self.fault("receiver")
        await asyncio.sleep(0)
        if fault == "before":
            raise _broken()
        async with self.backend.receiver(
            queues, slots=slots, lease=lease, crash_limit=crash_limit, keep=keep, strict=strict, lost=lost
        ) as receiver:
            await asyncio.sleep(0)
            if fault == "after":
                raise _broken()
            try:
                yield _DistantReceiver(self, receiver)
            finally:
                await asyncio.sleep(0)

    def dead_letters(self, queue: str) -> DeadLetters:
        """The queue's dead letters; each of their verbs is a call."""
        return _DistantDeadLetters(self, self.backend.dead_letters(queue))

    def fault(self, verb: str) -> Literal["before", "after"] | None:
        """A call begins: whether it breaks before it is done, or after, or not at all."""
        return None

    async def call(self, verb: str, done: Callable[[], Awaitable[T]]) -> T:
        """There, `done`, and back."""
        fault = self.fault(verb)
        await asyncio.sleep(0)
        if fault == "before":
            raise _broken()
        answer = await done()
        await asyncio.sleep(0)
        if fault == "after":
            raise _broken()
        return answer


class FailingAt(Distant):
    """A backend whose `n`-th call breaks, and no other.

    It raises `BackendUnavailable`, or gives it where the verb has one answer for each job or delivery. Calls are all
    verbs of the backend, its receivers and dead letters, counted together; `aclose`, `nudge` and leaving a receiver
    wait for no answer, and do not break. The deliveries of a settlement that broke before it was done are released at
    once: by the time a backend says `BackendUnavailable` of one, its lease has ended.

    Args:
        n: which call, from 1; 0 breaks none.
        backend: where the calls go.
        done: break after the call was done, so that only its answer is lost; False: before.

    Attributes:
        calls: verbs called so far, in order.
        struck: the verb that broke.
    """

    def __init__(self, n: int, backend: Backend, *, done: bool = False) -> None:
        super().__init__(backend)
        self.n: int = n
        self.done: bool = done
        self.calls: list[str] = []
        self.struck: str | None = None

    def __str__(self) -> str:
        when = "after" if self.done else "before"
        return f"call {self.n} ({self.struck or 'never came there'}) broken {when} it was done; calls: {self.calls}"

    def fault(self, verb: str) -> Literal["before", "after"] | None:
        """Counts the call."""
        self.calls.append(verb)
        if len(self.calls) != self.n:
            return None
        self.struck = verb
        return "after" if self.done else "before"


async def every_call(make: Callable[[], Backend], scenario: Callable[[FailingAt], Awaitable[None]]) -> int:
    """Run the scenario with its first call broken, its second, and so on, until a run passes untouched; in both ways.

    Args:
        make: a new backend.
        scenario: makes its world on the backend inside what it is given, calls what it tests through it, and checks
            what has to hold in any case.

    Returns:
        how many runs had a broken call.

    Raises:
        Exception: of the scenario, with a note that says which call was broken.
    """
    runs = 0
    for done in (False, True):
        n = 0
        while True:
            n += 1
            backend = FailingAt(n, make(), done=done)
            await _noted(scenario(backend), backend)
            if backend.struck is None:
                break
            runs += 1
    return runs


class _DistantReceiver(Receiver):
    def __init__(self, backend: Distant, receiver: Receiver) -> None:
        self._backend, self._receiver = backend, receiver
        self._undelivered: list[Delivery] = []  # received, and the answer did not arrive

    async def exchange(
        self, pairs: Sequence[tuple[Delivery, Settlement]], limit: int, *, wait: float = 0.0
    ) -> Exchanged:
        fault = self._backend.fault("exchange")
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            if pairs and fault != "before":
                await self._receiver.exchange(pairs, 0)
            raise
        if fault == "before":
            if not pairs:
                raise _broken()
            await self._receiver.exchange([(delivery, Release()) for delivery, _ in pairs], 0)
            return Exchanged([_broken() for _ in pairs], [])
        self._undelivered = [delivery for delivery in self._undelivered if not delivery.lost]
        late = min(limit, len(self._undelivered))
        exchanged = await self._receiver.exchange(pairs, limit - late, wait=0.0 if late else wait)
        self._undelivered[late:late] = exchanged.deliveries
        late += len(exchanged.deliveries)
        await asyncio.sleep(0)
        if fault == "after":
            if not pairs:
                raise _broken()
            return Exchanged([_broken() for _ in pairs], [])
        deliveries, self._undelivered = self._undelivered[:late], self._undelivered[late:]
        return Exchanged(exchanged.settled, deliveries, exchanged.missing)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        try:
            return await self._backend.call("extend", lambda: self._receiver.extend(deliveries))
        except BackendUnavailable:
            return [_broken() for _ in deliveries]

    def nudge(self) -> None:
        self._receiver.nudge()

    def keeper_idle_for(self) -> float:
        return self._receiver.keeper_idle_for()

    def outages(self) -> Outages:
        return self._receiver.outages()


class _DistantDeadLetters(DeadLetters):
    def __init__(self, backend: Distant, letters: DeadLetters) -> None:
        self._backend, self._letters = backend, letters

    async def list(self, where: DeadFilter, *, limit: int = 100, cursor: str | None = None) -> DeadPage:
        return await self._backend.call("list", lambda: self._letters.list(where, limit=limit, cursor=cursor))

    async def get(self, job_id: JobId) -> DeadRecord:
        return await self._backend.call("get", lambda: self._letters.get(job_id))

    async def count(self) -> int:
        return await self._backend.call("count", self._letters.count)

    async def replay(self, which: Sequence[JobId] | DeadFilter, *, rate: float | None = None) -> int:
        return await self._backend.call("replay", lambda: self._letters.replay(which, rate=rate))

    async def purge(self, which: Sequence[JobId] | DeadFilter) -> int:
        return await self._backend.call("purge", lambda: self._letters.purge(which))


def _broken() -> BackendUnavailable:
    return BackendUnavailable("broken on purpose")


async def _noted(scenario: Awaitable[None], fault: CancelAt | FailingAt) -> None:
    try:
        await scenario
    except BaseException as error:
        error.add_note(str(fault))
        raise
