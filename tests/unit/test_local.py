"""The local backend on a clock that a test moves: what happens at which instant, and who is woken for it."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mindtrace.jobs import (
    Backend,
    Closed,
    ConfigError,
    Dead,
    Delivery,
    Depth,
    Done,
    QueueNotFound,
    QueueSpec,
    Receiver,
    Release,
    Retry,
)
from mindtrace.jobs.backends.local import LocalBackend, SystemClock
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.local]

QUEUE = "jobs"
YEAR = 366 * 86400.0


class VirtualClock:
    """Time that passes when a test says so. Counts how often somebody began to wait for it."""

    def __init__(self) -> None:
        self.time = 0.0
        self.day = datetime(2030, 1, 1, tzinfo=UTC)
        self.waits = 0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self.time

    def wall(self) -> datetime:
        return self.day + timedelta(seconds=self.time)

    async def until(self, when: float) -> None:
        self.waits += 1
        while self.time < when:
            sleeper = asyncio.get_running_loop().create_future()
            self._sleepers.append((when, sleeper))
            await sleeper

    async def advance(self, seconds: float) -> None:
        """Let time pass, from one instant that somebody waits for to the next."""
        end = self.time + seconds
        while True:
            await settled()
            self._sleepers = [(when, sleeper) for when, sleeper in self._sleepers if not sleeper.done()]
            self.time = min([end, *(max(when, self.time) for when, _ in self._sleepers)])
            due = [sleeper for when, sleeper in self._sleepers if when <= self.time]
            for sleeper in due:
                sleeper.set_result(None)
            if not due:
                return


async def settled() -> None:
    """Every task has come as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def backend(clock: VirtualClock) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(clock=clock)
    await backend.open()
    await backend.declare(QueueSpec(QUEUE))
    yield backend
    await backend.aclose()


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def one(receiver: Receiver) -> Delivery:
    [delivery] = await receiver.receive(1)
    return delivery


# --- the instant of things --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["delay", "at", "retry", "release"])
@pytest.mark.parametrize("delay", [0.001, 1.0, YEAR])
async def test_a_delayed_job_is_ready_at_its_instant_and_not_before(
    backend: LocalBackend, clock: VirtualClock, by: str, delay: float
) -> None:
    async with backend.receiver([QUEUE]) as receiver:
        if by in ("delay", "at"):
            when = {"delay": delay} if by == "delay" else {"at": clock.wall() + timedelta(seconds=delay)}
            await backend.publish(QUEUE, [a_message(**when)])
        else:
            await backend.publish(QUEUE, [a_message()])
            settlement = Retry(delay) if by == "retry" else Release(delay)
            await receiver.settle([(await one(receiver), settlement)])
        clock.time = math.nextafter(delay, 0)
        assert await receiver.receive(1) == []
        assert await backend.depth(QUEUE) == Depth(0, 1, 0, 0)
        assert backend.next_due(QUEUE) == delay
        clock.time = delay
        assert await backend.depth(QUEUE) == Depth(1, 0, 0, 0)
        assert await one(receiver)


async def test_a_lease_lapses_after_its_last_instant(backend: LocalBackend, clock: VirtualClock) -> None:
    await backend.publish(QUEUE, [a_message()])
    async with backend.receiver([QUEUE], lease=5, keep=False) as holder, backend.receiver([QUEUE]) as other:
        assert (await one(holder)).deadline == 5
        clock.time = 5.0
        assert await other.receive(1) == []
        assert await backend.depth(QUEUE) == Depth(0, 0, 1, 0)
        clock.time = math.nextafter(5.0, 6)
        assert await backend.depth(QUEUE) == Depth(1, 0, 0, 0)
        assert (await one(other)).crashes == 1


async def test_extending_counts_from_now_and_is_seen_in_the_deadline(
    backend: LocalBackend, clock: VirtualClock
) -> None:
    await backend.publish(QUEUE, [a_message()])
    async with backend.receiver([QUEUE], lease=5, keep=False) as holder, backend.receiver([QUEUE]) as other:
        delivery = await one(holder)
        for instant in (4.0, 4.0, 8.0, 20.0):  # the last one late, before anybody collected it
            clock.time = instant
            assert await holder.extend([delivery]) == [None]
            assert delivery.deadline == instant + 5
        clock.time = 25.0
        assert await other.receive(1) == []
        clock.time = 25.1
        assert (await one(other)).number == 2


async def test_a_clock_that_was_set_back_shortens_no_lease(backend: LocalBackend, clock: VirtualClock) -> None:
    clock.time = 10.0
    await backend.publish(QUEUE, [a_message()])
    async with backend.receiver([QUEUE], lease=5, keep=False) as holder:
        delivery = await one(holder)
        clock.time = 2.0
        assert await holder.extend([delivery]) == [None]
        assert delivery.deadline == 15


async def test_a_kept_lease_ends_only_with_its_receiver(backend: LocalBackend, clock: VirtualClock) -> None:
    await backend.publish(QUEUE, [a_message()])
    async with backend.receiver([QUEUE]) as other:
        async with backend.receiver([QUEUE], lease=1) as keeping:
            delivery = await one(keeping)
            await clock.advance(YEAR)
            assert await other.receive(1) == []
            assert (delivery.deadline, delivery.lost) == (math.inf, False)
            assert await keeping.extend([delivery]) == [None]
        assert (await one(other)).crashes == 0


@pytest.mark.parametrize("ended_by", ["done", "clean"])
async def test_the_id_of_an_ended_job_is_known_for_a_minute_and_forgotten_after_two(
    backend: LocalBackend, clock: VirtualClock, ended_by: str
) -> None:
    for start in (0.0, 59.9, 90.0, 1000.0):  # wherever in a minute it ends
        clock.time += 10_000 + start
        await backend.publish(QUEUE, [message := a_message()])
        if ended_by == "done":
            async with backend.receiver([QUEUE]) as receiver:
                await receiver.settle([(await one(receiver), Done())])
        else:
            await backend.clean(QUEUE)
        clock.time += 60
        assert await backend.publish(QUEUE, [message]) == ["duplicate"]
        clock.time += 60
        assert await backend.publish(QUEUE, [message]) == ["stored"]
        await backend.clean(QUEUE)
        clock.time += 1000  # in which nobody looked
        assert await backend.publish(QUEUE, [message]) == ["stored"]
        await backend.clean(QUEUE)


@pytest.mark.parametrize("state", ["scheduled", "ready", "leased", "dead"])
async def test_the_id_of_a_job_that_has_not_ended_is_known_for_ever(
    backend: LocalBackend, clock: VirtualClock, state: str
) -> None:
    message = a_message(delay=2 * YEAR if state == "scheduled" else 0.0)
    await backend.publish(QUEUE, [message])
    async with backend.receiver([QUEUE]) as receiver:
        if state in ("leased", "dead"):
            delivery = await one(receiver)
            if state == "dead":
                await receiver.settle([(delivery, Dead("rejected"))])
        clock.time = YEAR
        assert await backend.publish(QUEUE, [message]) == ["duplicate"]


@pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1)])
async def test_the_time_of_day_turns_an_instant_into_a_delay_and_decides_nothing_else(
    backend: LocalBackend, clock: VirtualClock, jump: timedelta
) -> None:
    await backend.publish(QUEUE, [a_message(), a_message(at=clock.wall() + timedelta(seconds=10))])
    async with (
        backend.receiver([QUEUE], lease=5, keep=False) as holder,
        backend.receiver([QUEUE], slots=3) as other,
    ):
        await one(holder)
        clock.day += jump
        assert await other.receive(1) == []
        clock.time = 5.1
        assert len(await other.receive(3)) == 1
        assert backend.next_due(QUEUE) == 10
        clock.time = 10
        assert len(await other.receive(3)) == 1


async def test_jobs_that_come_due_between_two_looks_keep_the_order_of_their_times(
    backend: LocalBackend, clock: VirtualClock
) -> None:
    messages = {delay: a_message(delay=delay) for delay in (3.0, 1.0, 2.0)}
    await backend.publish(QUEUE, list(messages.values()))
    clock.time = 60.0
    async with backend.receiver([QUEUE], slots=3) as receiver:
        received = [delivery.message for delivery in await receiver.receive(3)]
    assert received == [messages[delay] for delay in (1.0, 2.0, 3.0)]


async def test_the_next_due_time_is_that_of_whatever_changes_first(backend: LocalBackend, clock: VirtualClock) -> None:
    assert backend.next_due(QUEUE) is None
    await backend.publish(QUEUE, [a_message(), a_message(delay=7)])
    assert backend.next_due(QUEUE) == 7
    async with backend.receiver([QUEUE], lease=5, keep=False) as receiver:
        delivery = await one(receiver)
        assert backend.next_due(QUEUE) == pytest.approx(5)
        await receiver.settle([(delivery, Retry(3))])
        assert backend.next_due(QUEUE) == 3
    await backend.clean(QUEUE)
    assert backend.next_due(QUEUE) is None


async def test_dead_letters_say_when_by_the_time_of_day(backend: LocalBackend, clock: VirtualClock) -> None:
    letters = backend.dead_letters(QUEUE)
    died: list[datetime] = []
    async with backend.receiver([QUEUE]) as receiver:
        for _ in range(3):
            clock.time += 60
            await backend.publish(QUEUE, [a_message()])
            await receiver.settle([(await one(receiver), Dead("rejected"))])
            died.append(clock.wall())
    assert [record.died_at for record in (await letters.list(DeadFilter())).records] == died[::-1]
    for count, since in ((3, died[0]), (2, died[0] + timedelta(microseconds=1)), (1, died[2])):
        assert len((await letters.list(DeadFilter(since=since))).records) == count


async def test_a_replay_at_a_rate_puts_back_one_at_a_time(backend: LocalBackend, clock: VirtualClock) -> None:
    await backend.publish(QUEUE, [a_message() for _ in range(3)])
    async with backend.receiver([QUEUE], slots=3) as receiver:
        await receiver.settle([(delivery, Dead("rejected")) for delivery in await receiver.receive(3)])
    replaying = asyncio.create_task(backend.dead_letters(QUEUE).replay(DeadFilter(), rate=0.1))
    for ready in (1, 2, 3):
        await settled()
        assert (await backend.depth(QUEUE)).ready == ready
        await clock.advance(9.9)
        assert (await backend.depth(QUEUE)).ready == ready
        await clock.advance(0.1)
    assert await replaying == 3


async def test_a_replay_at_a_rate_lets_others_take_and_purge_meanwhile(
    backend: LocalBackend, clock: VirtualClock
) -> None:
    letters = backend.dead_letters(QUEUE)
    messages = [a_message() for _ in range(3)]
    await backend.publish(QUEUE, messages)
    async with backend.receiver([QUEUE], slots=3) as receiver:
        await receiver.settle([(delivery, Dead("rejected")) for delivery in await receiver.receive(3)])
        replaying = asyncio.create_task(letters.replay(DeadFilter(), rate=1))
        await settled()
        first = await one(receiver)
        await receiver.settle([(first, Dead("timeout"))])  # dead again, and not for this replay to put back
        assert await letters.purge([messages[1].id]) == 1
        await clock.advance(2)
        assert await replaying == 2
        second = await one(receiver)
    assert [first.message, second.message] == [messages[0], messages[2]]
    assert await letters.count() == 1


# --- the bell ---------------------------------------------------------------------------------------------------------
# The clock stands still: whoever waits has no timer to look by, only the bell.


async def waiting(receiver: Receiver, limit: int = 1) -> "asyncio.Task[list[Delivery]]":
    task = asyncio.create_task(receiver.receive(limit, wait=100))
    await settled()
    assert not task.done()
    return task


@pytest.mark.parametrize("event", ["publish", "retry", "release", "leave", "replay"])
async def test_whatever_makes_a_job_ready_rings_for_who_waits(backend: LocalBackend, event: str) -> None:
    await backend.publish(QUEUE, [message := a_message()])
    async with backend.receiver([QUEUE]) as waits_for_it:
        async with backend.receiver([QUEUE]) as holder:
            delivery = await one(holder)
            if event == "replay":
                await holder.settle([(delivery, Dead("rejected"))])
            task = await waiting(waits_for_it)
            if event == "publish":
                await backend.publish(QUEUE, [message := a_message()])
            elif event == "replay":
                await backend.dead_letters(QUEUE).replay([message.id])
            elif event != "leave":
                await holder.settle([(delivery, Retry(0.0) if event == "retry" else Release())])
            await settled()
            assert task.done() is (event != "leave")
        await settled()
        assert [delivery.message for delivery in task.result()] == [message]


@pytest.mark.parametrize("how_many", [1, 2, 7])
async def test_a_batch_rings_for_as_many_as_there_is_work_for(backend: LocalBackend, how_many: int) -> None:
    async with AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(backend.receiver([QUEUE])) for _ in range(9)]
        tasks = [await waiting(receiver) for receiver in receivers]
        await backend.publish(QUEUE, [a_message() for _ in range(how_many)])
        await settled()
        assert sum(task.done() for task in tasks) == how_many
        for receiver in receivers:
            receiver.nudge()
        await asyncio.gather(*tasks)


async def test_the_ring_of_one_who_is_cancelled_goes_to_the_next(backend: LocalBackend) -> None:
    async with backend.receiver([QUEUE]) as first, backend.receiver([QUEUE]) as second:
        tasks = [await waiting(first), await waiting(second)]
        await backend.publish(QUEUE, [a_message()])
        tasks[0].cancel()
        await settled()
        assert tasks[0].cancelled()
        assert len(tasks[1].result()) == 1


@pytest.mark.parametrize("strict", [True, False])
async def test_one_who_has_no_use_for_a_ring_passes_it_on(backend: LocalBackend, strict: bool) -> None:
    """No free slot, or two queues that ring for one."""
    await backend.declare(QueueSpec("other"))
    await backend.publish(QUEUE, [a_message()])
    both = [QUEUE, "other"]
    async with (
        backend.receiver(both, strict=strict) as full,
        backend.receiver(both, strict=strict) as first,
        backend.receiver(both, strict=strict) as second,
    ):
        await one(full)
        stays = await waiting(full)
        tasks = [await waiting(first), await waiting(second)]
        await backend.publish("other", [a_message()])
        await backend.publish(QUEUE, [a_message()])
        await settled()
        assert sorted(task.result()[0].queue for task in tasks) == sorted(both)
        assert not stays.done()
        full.nudge()
        assert await stays == []


async def test_all_who_wait_for_a_queue_hear_of_its_end(backend: LocalBackend) -> None:
    async with backend.receiver([QUEUE]) as first, backend.receiver([QUEUE]) as second:
        tasks = [await waiting(first), await waiting(second)]
        await backend.delete(QUEUE)
        await settled()
        assert [type(task.exception()) for task in tasks] == [QueueNotFound, QueueNotFound]


@pytest.mark.parametrize("closing", [False, True])
async def test_one_who_waits_while_its_receiver_ends_hears_of_it(backend: LocalBackend, closing: bool) -> None:
    async with AsyncExitStack() as stack:
        task = await waiting(await stack.enter_async_context(backend.receiver([QUEUE])))
        await (backend.aclose() if closing else stack.aclose())
        await settled()
        assert isinstance(task.exception(), Closed)


# --- waiting ----------------------------------------------------------------------------------------------------------


async def test_a_wait_ends_at_its_instant(backend: LocalBackend, clock: VirtualClock) -> None:
    async with backend.receiver([QUEUE]) as receiver:
        waiting = asyncio.create_task(receiver.receive(1, wait=100))
        await clock.advance(99.9)
        assert not waiting.done()
        await clock.advance(0.1)
        assert await waiting == []


@pytest.mark.parametrize("delay", [0.25, 5.0, 99.0])
async def test_who_waits_gets_a_delayed_job_at_its_instant(
    backend: LocalBackend, clock: VirtualClock, delay: float
) -> None:
    async with backend.receiver([QUEUE]) as receiver:
        waiting = asyncio.create_task(receiver.receive(1, wait=100))
        await settled()
        await backend.publish(QUEUE, [a_message(delay=delay)])
        await clock.advance(delay - 0.01)
        assert not waiting.done()
        await clock.advance(0.01)
        assert len(await waiting) == 1


@pytest.mark.parametrize("goes", [0, 1])
async def test_a_due_job_is_at_most_a_second_late_when_the_one_who_was_told_has_gone(
    backend: LocalBackend, clock: VirtualClock, goes: int
) -> None:
    async with backend.receiver([QUEUE]) as first, backend.receiver([QUEUE]) as second:
        waits = [asyncio.create_task(receiver.receive(1, wait=100)) for receiver in (first, second)]
        await settled()
        await backend.publish(QUEUE, [a_message(delay=10)])
        await clock.advance(5)
        waits[goes].cancel()
        await clock.advance(6)
        assert waits[1 - goes].done()
        assert len(waits[1 - goes].result()) == 1
        await asyncio.gather(*waits, return_exceptions=True)


async def test_one_publish_wakes_a_handful_of_many_who_wait(backend: LocalBackend, clock: VirtualClock) -> None:
    """Whoever is woken in vain goes back to waiting, which the clock sees; with a herd it would see 199."""
    async with AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(backend.receiver([QUEUE])) for _ in range(200)]
        waits = [asyncio.create_task(receiver.receive(1, wait=100)) for receiver in receivers]
        await settled()
        before = clock.waits
        await backend.publish(QUEUE, [a_message()])
        await settled()
        assert sum(task.done() for task in waits) == 1
        assert clock.waits - before <= 5
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def test_a_publish_is_answered_by_who_has_waited_longest(backend: LocalBackend) -> None:
    async with AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(backend.receiver([QUEUE])) for _ in range(5)]
        waits: list[asyncio.Task[list[Delivery]]] = []
        for receiver in receivers:
            waits.append(asyncio.create_task(receiver.receive(1, wait=100)))
            await settled()
        for served in range(1, 6):
            await backend.publish(QUEUE, [a_message()])
            await settled()
            assert [task.done() for task in waits] == [True] * served + [False] * (5 - served)


async def test_a_receiver_leaves_no_task_behind(backend: LocalBackend) -> None:
    before = asyncio.all_tasks()
    async with backend.receiver([QUEUE]) as receiver:
        waits = [asyncio.create_task(receiver.receive(1, wait=100))]
        await settled()
        waits[0].cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        waiting = asyncio.create_task(receiver.receive(1, wait=100))
        await settled()
        receiver.nudge()
        await waiting
    assert asyncio.all_tasks() == before


# --- whose it is ------------------------------------------------------------------------------------------------------


def on_another_loop(step: Callable[[], Coroutine[Any, Any, object]]) -> BaseException | None:
    """What awaiting it on a loop of its own, in a thread of its own, raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(step())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return raised[0] if raised else None


async def _receive(backend: Backend) -> None:
    async with backend.receiver([QUEUE]) as receiver:
        await receiver.receive(1, wait=300)


@pytest.mark.parametrize(
    "step",
    [
        lambda backend: backend.publish(QUEUE, [a_message()]),
        lambda backend: backend.depth(QUEUE),
        lambda backend: backend.declare(QueueSpec("other")),
        lambda backend: backend.queues(),
        lambda backend: backend.clean(QUEUE),
        lambda backend: backend.delete(QUEUE),
        lambda backend: backend.dead_letters(QUEUE).count(),
        lambda backend: backend.open(),
        _receive,
    ],
    ids=["publish", "depth", "declare", "queues", "clean", "delete", "dead letters", "open", "receive"],
)
async def test_a_second_loop_gets_an_error_and_not_a_hang(
    backend: LocalBackend, step: Callable[[Backend], Coroutine[Any, Any, object]]
) -> None:
    await backend.publish(QUEUE, [a_message()])
    error = on_another_loop(lambda: step(backend))
    assert isinstance(error, ConfigError)
    assert "loop" in str(error)
    assert await backend.depth(QUEUE) == Depth(1, 0, 0, 0)


async def test_jobs_stay_with_the_object_from_loop_to_loop(clock: VirtualClock) -> None:
    backend = LocalBackend(clock=clock)
    message = a_message()

    async def publish() -> None:
        await backend.open()
        await backend.declare(QueueSpec(QUEUE))
        await backend.publish(QUEUE, [message])
        await backend.aclose()

    assert on_another_loop(publish) is None
    await backend.open()
    async with backend.receiver([QUEUE]) as receiver:
        assert (await one(receiver)).message == message
    await backend.aclose()


async def test_a_loop_that_ended_without_closing_does_not_keep_its_leases(clock: VirtualClock) -> None:
    backend = LocalBackend(clock=clock)
    entered = backend.receiver([QUEUE])
    message = a_message()

    async def hold() -> None:
        await backend.open()
        await backend.declare(QueueSpec(QUEUE))
        await backend.publish(QUEUE, [message])
        assert await one(await entered.__aenter__())

    def vanish() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(hold())
        loop.close()

    await asyncio.to_thread(vanish)
    await backend.open()
    async with backend.receiver([QUEUE]) as receiver:
        assert (await one(receiver)).message == message
    await entered.__aexit__(None, None, None)
    await backend.aclose()


async def test_a_receiver_is_used_from_the_loop_that_entered_it(backend: LocalBackend) -> None:
    await backend.publish(QUEUE, [a_message()])
    async with backend.receiver([QUEUE]) as receiver:
        assert isinstance(on_another_loop(lambda: receiver.receive(1, wait=300)), ConfigError)
        assert await one(receiver)


def test_what_it_can_do_is_known_before_it_is_open() -> None:
    traits = LocalBackend().traits
    assert (traits.name, traits.durability) == ("local", "memory")
    assert all((traits.stack, traits.lease_clock, traits.deduplicates, traits.fences))
    assert all((traits.keeps_place, traits.atomic_batch))
    assert traits.priorities == (-(2**31), 2**31 - 1)


async def test_the_machines_clock_waits_as_long_as_it_is_asked_to() -> None:
    clock = SystemClock()
    when = clock.now() + 0.05
    async with asyncio.timeout(10):
        await clock.until(when)
        assert clock.now() >= when
        await clock.until(when)  # the past is over at once
    assert clock.wall().tzinfo is not None


async def test_a_close_in_the_middle_of_any_receive_leaves_nothing_leased() -> None:
    """A receive lets the loop turn now and then: whichever turn it is, a closed receiver takes nothing any more."""
    for turns in range(64):
        backend = LocalBackend()
        await backend.open()
        await backend.declare(QueueSpec("jobs"))
        async with backend.receiver(["jobs"]) as receiver:
            for _ in range(turns):
                assert await receiver.receive(1) == []
            await backend.publish("jobs", [Message(new_job_id(), b"{}")])
            receiving = asyncio.create_task(receiver.receive(1))
            await asyncio.sleep(0)
            in_the_middle = not receiving.done()
            await backend.aclose()
            await asyncio.wait({receiving})
            assert isinstance(receiving.exception(), Closed) is in_the_middle
            await backend.open()
            assert await backend.depth("jobs") == Depth(1, 0, 0, 0)
        await backend.aclose()
