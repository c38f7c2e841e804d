"""Delayed jobs: kept in the broker, never early, at most a second late, and behind what was ready before."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest

from mindtrace.jobs import Backend, Dead, Delivery, Receiver, Release, Retry, Settlement
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.retry import MAX_DELAY
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
UntilReady = Callable[[str, int], Awaitable[None]]

LATE = 10.0  # a bound of the test; what is promised is 1 s


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def take(receiver: Receiver) -> Delivery:
    """The next job. Its wait is far longer than the bound: whoever sleeps through a due time fails."""
    async with asyncio.timeout(LATE):
        [delivery] = await receiver.receive(1, wait=300)
    return delivery


async def test_a_delayed_job_is_scheduled_and_not_ready(backend: Backend, queue: str) -> None:
    assert await backend.publish(queue, [a_message(delay=300)]) == ["stored"]
    depth = await backend.depth(queue)
    assert depth.ready == 0
    assert depth.scheduled in (1, None)
    async with backend.receiver([queue]) as receiver:
        assert await receiver.receive(1) == []


@pytest.mark.parametrize("asked_by", ["delay", "at", "at elsewhere"])
async def test_a_delayed_job_is_never_early(backend: Backend, queue: str, asked_by: str) -> None:
    async with backend.receiver([queue]) as receiver:
        started = time.monotonic()
        due = datetime.now(UTC) + timedelta(seconds=0.2)
        if asked_by == "at elsewhere":
            due = due.astimezone(timezone(timedelta(hours=-9, minutes=-30)))
        message = a_message(delay=0.2) if asked_by == "delay" else a_message(at=due)
        await backend.publish(queue, [message])
        delivery = await take(receiver)
        waited = time.monotonic() - started
    assert delivery.message == message
    assert waited >= 0.19 if asked_by.startswith("at") else waited >= 0.2  # `at` is measured on another clock


@pytest.mark.parametrize("settlement", [Retry(0.2), Release(0.2)])
async def test_a_retry_and_a_snooze_are_never_early(backend: Backend, queue: str, settlement: Settlement) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        started = time.monotonic()
        await receiver.settle([(delivery, settlement)])
        assert (await take(receiver)).message == message
        assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize("ago", [timedelta(0), timedelta(seconds=1), timedelta(days=4000)])
async def test_an_instant_in_the_past_means_now(
    backend: Backend, queue: str, ago: timedelta, until_ready: UntilReady
) -> None:
    await backend.publish(queue, [message := a_message(at=datetime.now(UTC) - ago)])
    await until_ready(queue, 1)  # it may be this very millisecond that the broker waits for
    async with backend.receiver([queue]) as receiver:
        assert (await take(receiver)).message == message


async def test_the_longest_delay_is_taken_and_kept(backend: Backend, queue: str) -> None:
    far = datetime.now(UTC) + timedelta(days=365)
    assert await backend.publish(queue, [a_message(delay=MAX_DELAY), a_message(at=far)]) == ["stored"] * 2
    async with backend.receiver([queue], slots=2) as receiver:
        assert await receiver.receive(2) == []
    assert (await backend.depth(queue)).scheduled in (2, None)


async def test_due_jobs_count_as_ready_collected_or_not(backend: Backend, queue: str, until_ready: UntilReady) -> None:
    await backend.publish(queue, [a_message(delay=0.05), a_message(delay=0.06), a_message(delay=300)])
    await until_ready(queue, 2)
    assert (await backend.depth(queue)).scheduled in (1, None)


async def test_an_earlier_job_does_not_wait_for_a_later_one(backend: Backend, queue: str) -> None:
    later, sooner = a_message(delay=300), a_message(delay=0.05)
    await backend.publish(queue, [later, sooner])
    async with backend.receiver([queue]) as receiver:
        assert (await take(receiver)).message == sooner


async def test_jobs_come_at_their_own_times(backend: Backend, queue: str) -> None:
    messages = {delay: a_message(delay=delay) for delay in (0.3, 0.1, 0.2)}
    await backend.publish(queue, list(messages.values()))
    async with backend.receiver([queue], slots=3) as receiver:
        received = [(await take(receiver)).message for _ in messages]
    assert received == [messages[delay] for delay in sorted(messages)]


async def test_a_receiver_that_waits_already_wakes_for_a_job_that_is_due_later(backend: Backend, queue: str) -> None:
    async with backend.receiver([queue]) as receiver:
        waiting = asyncio.create_task(take(receiver))
        await asyncio.sleep(0)
        await backend.publish(queue, [message := a_message(delay=0.05)])
        assert (await waiting).message == message


@pytest.mark.parametrize(("leaves", "leaves_by"), [(0, "cancel"), (1, "cancel"), (0, "nudge")])
async def test_a_due_job_wakes_whoever_is_left_waiting(
    backend: Backend, queue: str, leaves: int, leaves_by: str
) -> None:
    """The one that was told of the due time goes away: the other must not sleep on."""
    async with backend.receiver([queue]) as one, backend.receiver([queue]) as two:
        receivers = [one, two]
        waits = [asyncio.create_task(receiver.receive(1, wait=300)) for receiver in receivers]
        await asyncio.sleep(0)
        await backend.publish(queue, [message := a_message(delay=0.5)])
        for _ in range(3):
            await asyncio.sleep(0)
        if leaves_by == "cancel":
            waits[leaves].cancel()
        else:
            receivers[leaves].nudge()
        async with asyncio.timeout(LATE):
            [delivery] = await waits[1 - leaves]
        await asyncio.gather(*waits, return_exceptions=True)
    assert delivery.message == message


async def test_a_delayed_id_is_known(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message(delay=300)])
    [outcome] = await backend.publish(queue, [Message(message.id, b"{}")])
    assert outcome == ("duplicate" if backend.traits.deduplicates else "stored")
    assert (await backend.depth(queue)).ready == (not backend.traits.deduplicates)


async def test_a_delayed_job_waits_through_a_close(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message(delay=0.1)])
    await backend.aclose()
    await backend.open()
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
    assert (delivery.message, delivery.attempt, delivery.number) == (message, 1, 1)


async def test_a_delay_is_waited_out_once(backend: Backend, queue: str) -> None:
    """Neither a retry, nor a release, nor a replay waits for it again."""
    await backend.publish(queue, [message := a_message(delay=0.2)])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        for settlement in (Retry(0.0), Release(), Dead("rejected")):
            await receiver.settle([(delivery, settlement)])
            if isinstance(settlement, Dead):
                await backend.dead_letters(queue).replay([message.id])
            [delivery] = await receiver.receive(1)


async def test_a_delay_is_no_attempt(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message(delay=0.05)])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        assert (delivery.attempt, delivery.crashes, delivery.releases, delivery.number) == (1, 0, 0, 1)


async def test_the_delay_of_one_queue_holds_up_no_other(backend: Backend, new_queue: NewQueue) -> None:
    delayed, ready = await new_queue(), await new_queue()
    await backend.publish(delayed, [a_message(delay=300)])
    async with backend.receiver([delayed, ready]) as receiver:
        waiting = asyncio.create_task(take(receiver))
        await asyncio.sleep(0)
        await backend.publish(ready, [message := a_message()])
        assert (await waiting).message == message
