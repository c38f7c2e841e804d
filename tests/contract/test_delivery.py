"""One hand-over of one job: what a delivery says, and a whole life of deliveries from publish to its end."""

import time
from collections.abc import Awaitable, Callable

import pytest

from mindtrace.jobs import Backend, Dead, Delivery, Depth, Done, LeaseLost, Receiver, Release, Retry
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
Known = Callable[[int, int, int, int], Depth]


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def take(receiver: Receiver) -> Delivery:
    [delivery] = await receiver.receive(1, wait=5)
    return delivery


async def test_a_delivery_carries_the_message_as_it_was_published(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue("priority")
    await backend.publish(queue, [message := a_message(priority=7, crash_limit=2)])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
    assert (delivery.queue, delivery.message) == (queue, message)


@pytest.mark.parametrize("keep", [True, False])
async def test_a_delivery_says_until_when_it_is_its_receivers(backend: Backend, queue: str, keep: bool) -> None:
    """On the monotonic clock of this process; no instant at all where nothing but the receiver ends it."""
    await backend.publish(queue, [a_message()])
    before = time.monotonic()
    async with backend.receiver([queue], lease=60, keep=keep) as receiver:
        delivery = await take(receiver)
        after = time.monotonic()
    assert before + 55 <= delivery.deadline
    assert delivery.deadline <= after + 60 or keep or not backend.traits.lease_clock


async def test_deliveries_of_one_job_are_different_things(backend: Backend, queue: str) -> None:
    """And an earlier one keeps saying what it said."""
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        first = await take(receiver)
        said = (first.attempt, first.crashes, first.releases, first.number, first.receipt)
        await receiver.settle([(first, Retry(0.0))])
        second = await take(receiver)
    assert first != second
    assert len({first, second}) == 2
    assert (first.attempt, first.crashes, first.releases, first.number, first.receipt) == said


async def test_a_life(backend: Backend, queue: str, known: Known) -> None:
    """Scheduled, ready, leased and released, lost, retried, dead, replayed, done: and its id known throughout."""
    message = a_message(delay=0.05)
    seen: list[tuple[int, int, int, int]] = []
    letters = backend.dead_letters(queue)

    async def next_of(receiver: Receiver) -> Delivery:
        if backend.traits.deduplicates:
            assert await backend.publish(queue, [message]) == ["duplicate"]
        delivery = await take(receiver)
        assert delivery.message == message
        seen.append((delivery.attempt, delivery.crashes, delivery.releases, delivery.number))
        return delivery

    assert await backend.publish(queue, [message]) == ["stored"]
    async with (
        backend.receiver([queue]) as receiver,
        backend.receiver([queue], lease=0.1, keep=False) as stalled,
    ):
        assert await receiver.settle([(await next_of(receiver), Release())]) == [None]
        lost = await next_of(stalled)
        assert await receiver.settle([(await next_of(receiver), Retry(0.05))]) == [None]
        assert isinstance((await stalled.settle([(lost, Done())]))[0], LeaseLost)
        assert await receiver.settle([(await next_of(receiver), Dead("attempts"))]) == [None]
        assert await letters.replay([message.id]) == 1
        assert await receiver.settle([(await next_of(receiver), Done())]) == [None]
    assert seen == [(1, 0, 0, 1), (1, 0, 1, 2), (2, 1, 1, 3), (3, 1, 1, 4), (1, 0, 0, 5)]
    assert await backend.depth(queue) == known(0, 0, 0, 0)
    if backend.traits.deduplicates:
        assert await backend.publish(queue, [message]) == ["duplicate"]
