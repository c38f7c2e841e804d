"""What happens to a job between publish and its end, on every backend."""

import asyncio

import pytest

from mindtrace.jobs import Backend, Dead, Depth, Done, LeaseLost, QueueNotFound, QueueSpec, Release, Retry
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def test_an_unsettled_job_goes_to_the_next_receiver(backend: Backend, queue: str) -> None:
    """A receiver that vanishes loses its job when its lease ends, and cannot settle it afterwards."""
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue], lease=0.1, keep=False) as stalled, backend.receiver([queue]) as healthy:
        [first] = await stalled.receive(1)
        [second] = await healthy.receive(1, wait=5)
        assert (second.message, second.attempt, second.crashes) == (message, 2, 1)
        [lost] = await stalled.settle([(first, Done())])
        assert isinstance(lost, LeaseLost)
        assert lost.job_id == message.id


async def test_a_done_job_is_gone_and_its_id_is_known(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue]) as receiver:
        [delivery] = await receiver.receive(1)
        assert await receiver.settle([(delivery, Done())]) == [None]
    assert await backend.depth(queue) == Depth(0, 0, 0, 0)
    assert await backend.publish(queue, [message]) == ["duplicate"]


async def test_a_receipt_is_good_for_one_settlement(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        [delivery] = await receiver.receive(1)
        first, second = await receiver.settle([(delivery, Release()), (delivery, Done())])
    assert first is None
    assert isinstance(second, LeaseLost)
    assert (await backend.depth(queue)).ready == 1


async def test_a_retried_job_comes_back_as_its_next_attempt(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        [delivery] = await receiver.receive(1)
        await receiver.settle([(delivery, Retry(0.01))])
        [again] = await receiver.receive(1, wait=5)
    assert (again.attempt, again.crashes, again.number) == (2, 0, 2)


async def test_leaving_a_receiver_releases_what_it_holds_in_its_old_place(backend: Backend, queue: str) -> None:
    messages = [a_message() for _ in range(3)]
    await backend.publish(queue, messages)
    async with backend.receiver([queue], slots=2) as receiver:
        await receiver.receive(2)
    async with backend.receiver([queue], slots=3) as receiver:
        deliveries = await receiver.receive(3)
    assert [delivery.message for delivery in deliveries] == messages
    assert [(delivery.attempt, delivery.releases) for delivery in deliveries] == [(1, 1), (1, 1), (1, 0)]


async def test_a_dead_job_is_replayed_under_its_id(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message()])
    letters = backend.dead_letters(queue)
    async with backend.receiver([queue]) as receiver:
        [delivery] = await receiver.receive(1)
        await receiver.settle([(delivery, Dead("rejected"))])
        [record] = (await letters.list(DeadFilter())).records
        assert (record.message, record.reason, record.attempts) == (message, "rejected", 1)
        assert await letters.replay([message.id]) == 1
        [again] = await receiver.receive(1)
    assert (again.message, again.attempt, again.number) == (message, 1, 2)


async def test_the_last_crash_a_job_may_have_sends_it_to_the_dead_letters(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message(crash_limit=2)])
    letters = backend.dead_letters(queue)
    async with (
        backend.receiver([queue], lease=0.05, keep=False) as stalled,
        backend.receiver([queue], lease=0.05, keep=False) as next_one,
        backend.receiver([queue]) as healthy,
    ):
        assert len(await stalled.receive(1)) == 1
        [second] = await next_one.receive(1, wait=5)
        assert second.crashes == 1
        async with asyncio.timeout(5):
            while not await letters.count():
                assert await healthy.receive(1, wait=0.1) == []
    assert (await letters.get(message.id)).reason == "crash_limit"


async def test_higher_priorities_come_first_and_equal_ones_in_order(backend: Backend) -> None:
    await backend.declare(QueueSpec("ranked", "priority"))
    messages = [a_message(priority=priority) for priority in (1, 10, 5, 10)]
    await backend.publish("ranked", messages)
    async with backend.receiver(["ranked"], slots=4) as receiver:
        deliveries = await receiver.receive(4)
    assert [delivery.message for delivery in deliveries] == [messages[1], messages[3], messages[2], messages[0]]


async def test_a_queue_that_is_not_there_is_said_to_be_missing(backend: Backend) -> None:
    [outcome] = await backend.publish("nowhere", [a_message()])
    assert isinstance(outcome, QueueNotFound)
    async with backend.receiver(["nowhere"]) as receiver:
        with pytest.raises(QueueNotFound):
            await receiver.receive(1, wait=5)
