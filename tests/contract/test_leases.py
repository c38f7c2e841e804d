"""Leases: how long a delivery is its receiver's, how one is kept, and what becomes of a job whose lease ends."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import astuple

import pytest

from mindtrace.jobs import (
    Backend,
    Closed,
    Dead,
    Delivery,
    Depth,
    Done,
    LeaseLost,
    Receiver,
    Release,
    Retry,
    Settlement,
)
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
Known = Callable[[int, int, int, int], Depth]
UntilReady = Callable[[str, int], Awaitable[None]]

AFTERWARDS: list[tuple[Settlement, Depth]] = [
    (Done(), Depth(0, 0, 0, 0)),
    (Retry(0.0), Depth(1, 0, 0, 0)),
    (Retry(300.0), Depth(0, 1, 0, 0)),
    (Dead("rejected"), Depth(0, 0, 0, 1)),
    (Release(), Depth(1, 0, 0, 0)),
    (Release(300.0), Depth(0, 1, 0, 0)),
]
SHORT = 0.1  # a lease that is meant to lapse


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def take(receiver: Receiver) -> Delivery:
    [delivery] = await receiver.receive(1, wait=10)
    return delivery


# --- a lease that ends ------------------------------------------------------------------------------------------------


async def test_an_unsettled_job_goes_to_the_next_receiver(backend: Backend, queue: str) -> None:
    """A receiver that vanishes loses its job when its lease ends, and cannot settle it afterwards."""
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue], lease=SHORT, keep=False) as stalled, backend.receiver([queue]) as healthy:
        first = await take(stalled)
        second = await take(healthy)
        assert second.message == message
        assert (second.attempt, second.crashes, second.releases, second.number) == (2, 1, 0, 2)
        assert second.receipt != first.receipt
        [lost] = await stalled.settle([(first, Done())])
        assert isinstance(lost, LeaseLost)
        assert lost.job_id == message.id


async def test_a_job_is_nobody_elses_while_its_lease_runs(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=60, keep=False) as holder, backend.receiver([queue], slots=5) as other:
        delivery = await take(holder)
        assert await other.receive(5, wait=SHORT) == []
        assert await holder.settle([(delivery, Done())]) == [None]


async def test_a_receiver_that_waits_already_gets_the_job_of_a_lapsed_lease(backend: Backend, queue: str) -> None:
    """Within a second of the lease's end, although nobody was there to tell it; and not at the end of its wait."""
    async with backend.receiver([queue], lease=SHORT, keep=False) as stalled, backend.receiver([queue]) as waiting:
        await backend.publish(queue, [message := a_message()])
        await take(stalled)
        async with asyncio.timeout(10):
            [delivery] = await waiting.receive(1, wait=300)
    assert (delivery.message, delivery.crashes) == (message, 1)


async def test_a_receiver_whose_neighbour_was_woken_first_gets_the_job_when_that_one_stalls(
    backend: Backend, queue: str
) -> None:
    async with (
        backend.receiver([queue], lease=SHORT, keep=False) as one,
        backend.receiver([queue], lease=SHORT, keep=False) as two,
    ):
        waits = {asyncio.create_task(receiver.receive(1, wait=300)) for receiver in (one, two)}
        await asyncio.sleep(0)
        await backend.publish(queue, [message := a_message()])
        async with asyncio.timeout(10):
            deliveries = [delivery for [delivery] in await asyncio.gather(*waits)]
    assert sorted(delivery.number for delivery in deliveries) == [1, 2]
    assert {delivery.message for delivery in deliveries} == {message}


async def test_a_receiver_may_get_the_job_of_its_own_lapsed_lease(backend: Backend, queue: str, known: Known) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue], slots=2, lease=SHORT, keep=False) as receiver:
        first = await take(receiver)
        second = await take(receiver)
        assert (second.message, second.number) == (message, 2)
        lost, done = await receiver.settle([(first, Dead("rejected")), (second, Done())])
    assert isinstance(lost, LeaseLost)
    assert done is None
    assert await backend.depth(queue) == known(0, 0, 0, 0)


@pytest.mark.parametrize("settlement", [settlement for settlement, _ in AFTERWARDS])
async def test_a_settlement_after_the_job_was_collected_changes_nothing(
    backend: Backend, queue: str, settlement: Settlement, known: Known
) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=SHORT, keep=False) as stalled, backend.receiver([queue]) as healthy:
        first, second = await take(stalled), await take(healthy)
        before = await backend.depth(queue)
        [lost] = await stalled.settle([(first, settlement)])
        assert isinstance(lost, LeaseLost)
        assert await backend.depth(queue) == before
        assert await healthy.settle([(second, Done())]) == [None]
    assert await backend.depth(queue) == known(0, 0, 0, 0)


@pytest.mark.parametrize(("settlement", "afterwards"), AFTERWARDS)
async def test_a_late_settlement_counts_while_nobody_has_collected_the_job(
    backend: Backend, queue: str, until_ready: UntilReady, settlement: Settlement, afterwards: Depth, known: Known
) -> None:
    """The receipt is still the last one given: accepting it is safe, and saves a duplicate."""
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=SHORT, keep=False) as late:
        delivery = await take(late)
        await until_ready(queue, 1)  # collectable, and counted so
        [outcome] = await late.settle([(delivery, settlement)])
        if backend.traits.lease_clock:
            assert outcome is None
            assert await backend.depth(queue) == known(*astuple(afterwards))
        else:  # the lease is the connection, and with it the job has gone at once
            assert isinstance(outcome, LeaseLost)


async def test_an_exchange_that_brings_a_late_settlement_applies_it_before_it_collects(
    backend: Backend, queue: str, until_ready: UntilReady
) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=SHORT, keep=False) as late:
        delivery = await take(late)
        await until_ready(queue, 1)
        exchanged = await late.exchange([(delivery, Done())], 1)
        if backend.traits.lease_clock:
            assert (exchanged.settled, exchanged.deliveries) == ([None], [])


async def test_counting_collects_nothing(backend: Backend, queue: str, until_ready: UntilReady) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=SHORT, keep=False) as late:
        delivery = await take(late)
        await until_ready(queue, 1)
        for _ in range(3):
            assert (await backend.depth(queue)).ready == 1
        exchanged = await late.exchange([], 0)  # and neither does an exchange that brings no crash limit
        assert exchanged.deliveries == []
        [outcome] = await late.extend([delivery])
        assert outcome is None or not backend.traits.lease_clock


# --- a lease that is kept ---------------------------------------------------------------------------------------------


async def test_a_kept_lease_outlasts_its_seconds(backend: Backend, queue: str) -> None:
    """The second lease is taken later and lasts as long: when it has lapsed, so would the first, were it not kept."""
    await backend.publish(queue, [kept := a_message(), stalled_on := a_message()])
    async with (
        backend.receiver([queue], lease=0.3) as keeping,
        backend.receiver([queue], lease=0.3, keep=False) as stalled,
        backend.receiver([queue], slots=5) as healthy,
    ):
        delivery = await take(keeping)
        assert delivery.message == kept
        assert (await take(stalled)).message == stalled_on
        [lapsed] = await healthy.receive(5, wait=10)
        assert lapsed.message == stalled_on
        assert not delivery.lost
        assert await keeping.settle([(delivery, Done())]) == [None]


async def test_an_extended_lease_outlasts_its_seconds(backend: Backend, queue: str, until_ready: UntilReady) -> None:
    await backend.publish(queue, [extended := a_message(), left_alone := a_message()])
    async with (
        backend.receiver([queue], slots=2, lease=0.5, keep=False) as receiver,
        backend.receiver([queue], slots=5) as healthy,
    ):
        first, second = await receiver.receive(2)
        assert (first.message, second.message) == (extended, left_alone)
        deadline = first.deadline
        async with asyncio.timeout(10):
            while not (await backend.depth(queue)).ready:
                assert await receiver.extend([first]) == [None]
                assert first.deadline >= deadline  # never shorter
                deadline = first.deadline
                await asyncio.sleep(0)
        [lapsed] = await healthy.receive(5)
        assert lapsed.message == left_alone
        assert await receiver.settle([(first, Done())]) == [None]


async def test_a_lapsed_lease_that_nobody_collected_can_be_extended(
    backend: Backend, queue: str, until_ready: UntilReady
) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=0.5, keep=False) as receiver:
        delivery = await take(receiver)
        await until_ready(queue, 1)
        [outcome] = await receiver.extend([delivery])
        if backend.traits.lease_clock:
            assert outcome is None
            await until_ready(queue, 0)  # leased again
            assert await receiver.settle([(delivery, Done())]) == [None]


@pytest.mark.parametrize("gone_by", ["settled", "collected", "another's", "deleted", "left"])
async def test_what_is_not_held_is_not_extended(backend: Backend, queue: str, gone_by: str) -> None:
    await backend.publish(queue, [message := a_message(), a_message()])
    async with backend.receiver([queue], slots=2) as other:
        async with backend.receiver([queue], lease=SHORT, keep=gone_by != "collected") as receiver:
            delivery = await take(receiver)
            asked = receiver
            if gone_by == "settled":
                await receiver.settle([(delivery, Retry(300.0))])
            elif gone_by == "collected":
                while delivery.message not in [d.message for d in await other.receive(1, wait=10)]:
                    pass
            elif gone_by == "another's":
                asked = other
            elif gone_by == "deleted":
                await backend.delete(queue, force=True)
            if gone_by != "left":
                [outcome] = await asked.extend([delivery])
        if gone_by == "left":
            [outcome] = await receiver.extend([delivery])
    assert isinstance(outcome, LeaseLost)
    assert outcome.job_id == message.id


async def test_extending_answers_in_order(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message() for _ in range(3)])
    async with backend.receiver([queue], slots=3, keep=False) as receiver:
        a, b, c = await receiver.receive(3)
        await receiver.settle([(b, Done())])
        answers = await receiver.extend([a, b, c])
        assert [type(answer) for answer in answers] == [type(None), LeaseLost, type(None)]
        assert await receiver.extend([]) == []


# --- being told -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost_by", ["lapse", "delete"])
async def test_a_lost_lease_is_told_once(backend: Backend, queue: str, lost_by: str) -> None:
    """In the loop that entered the receiver, with the delivery marked."""
    await backend.publish(queue, [a_message()])
    told: asyncio.Queue[tuple[Delivery, asyncio.AbstractEventLoop]] = asyncio.Queue()

    def lost(delivery: Delivery) -> None:
        told.put_nowait((delivery, asyncio.get_running_loop()))

    async with (
        backend.receiver([queue], lease=SHORT, keep=lost_by == "delete", lost=lost) as stalled,
        backend.receiver([queue]) as healthy,
    ):
        delivery = await take(stalled)
        assert not delivery.lost
        if lost_by == "lapse":
            again = await take(healthy)
            assert not again.lost
            await stalled.extend([delivery])  # at the latest the broker's answer tells
        else:
            await backend.delete(queue, force=True)
        async with asyncio.timeout(5):
            assert await told.get() == (delivery, asyncio.get_running_loop())
        assert delivery.lost
        [refused] = await stalled.settle([(delivery, Done())])
        assert isinstance(refused, LeaseLost)
    assert told.empty()


async def test_what_was_settled_is_not_told_as_lost(backend: Backend, queue: str) -> None:
    told: list[Delivery] = []
    await backend.publish(queue, [a_message() for _ in range(4)])
    async with backend.receiver([queue], slots=4, lost=told.append) as receiver:
        a, b, c, d = await receiver.receive(4)
        await receiver.settle([(a, Done()), (b, Retry(0.0)), (c, Dead("rejected")), (d, Release(300.0))])
        await backend.delete(queue, force=True)
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told == []
    assert not any(delivery.lost for delivery in (a, b, c, d))


# --- crashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_the_message", "of_the_receiver", "limit"), [(None, 1, 1), (None, 3, 3), (2, 5, 2), (3, 1, 3)]
)
async def test_the_last_crash_a_job_may_have_sends_it_to_the_dead_letters(
    backend: Backend, queue: str, of_the_message: int | None, of_the_receiver: int, limit: int, known: Known
) -> None:
    """Its own limit counts, and where it brought none, that of whoever receives. It is not run once more."""
    await backend.publish(queue, [message := a_message(crash_limit=of_the_message)])
    letters = backend.dead_letters(queue)
    starts: list[Delivery] = []
    async with backend.receiver([queue], slots=9, lease=0.03, keep=False, crash_limit=of_the_receiver) as receiver:
        async with asyncio.timeout(10):
            while not await letters.count():
                starts += await receiver.receive(1, wait=0.02)
    assert [(d.attempt, d.crashes, d.number) for d in starts] == [(n + 1, n, n + 1) for n in range(limit)]
    record = await letters.get(message.id)
    assert (record.reason, record.attempts, record.crashes, record.number) == ("crash_limit", limit, limit, limit)
    assert await backend.depth(queue) == known(0, 0, 0, 1)


async def test_five_crashes_are_the_limit_unless_told_otherwise(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    starts = 0
    async with backend.receiver([queue], slots=9, lease=0.02, keep=False) as receiver, asyncio.timeout(10):
        while not await backend.dead_letters(queue).count():
            starts += len(await receiver.receive(1, wait=0.02))
    assert starts == 5


async def test_a_crash_uses_up_no_failed_run(backend: Backend, queue: str) -> None:
    """Failed runs so far are `attempt - 1 - crashes`: that is what a retry policy compares."""
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=SHORT, keep=False) as stalled, backend.receiver([queue]) as healthy:
        await take(stalled)
        delivery = await take(healthy)
        assert delivery.attempt - 1 - delivery.crashes == 0
        await healthy.settle([(delivery, Retry(0.0))])
        again = await take(healthy)
        assert again.attempt - 1 - again.crashes == 1
        assert (again.attempt, again.crashes) == (3, 1)


@pytest.mark.parametrize("settlement", [Release(), Release(0.01), Retry(0.0)])
async def test_what_is_handed_back_is_no_crash(backend: Backend, queue: str, settlement: Settlement) -> None:
    await backend.publish(queue, [a_message(crash_limit=1)])
    async with backend.receiver([queue], crash_limit=1) as receiver:
        for _ in range(6):
            delivery = await take(receiver)
            assert delivery.crashes == 0
            await receiver.settle([(delivery, settlement)])


# --- leaving ----------------------------------------------------------------------------------------------------------


class _Trouble(Exception):
    pass


@pytest.mark.parametrize("left_by", ["return", "exception", "cancellation", "close"])
async def test_leaving_a_receiver_releases_what_it_holds_in_its_old_place(
    backend: Backend, queue: str, left_by: str
) -> None:
    messages = [a_message() for _ in range(3)]
    await backend.publish(queue, messages)
    held = asyncio.Event()

    async def hold() -> None:
        async with backend.receiver([queue], slots=2, lease=60) as receiver:
            assert len(await receiver.receive(2)) == 2
            held.set()
            if left_by == "exception":
                raise _Trouble
            if left_by == "cancellation":
                await asyncio.Event().wait()
            if left_by == "close":
                await backend.aclose()

    holding = asyncio.create_task(hold())
    await held.wait()
    if left_by == "cancellation":
        holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    await backend.open()
    async with backend.receiver([queue], slots=3) as receiver:
        deliveries = await receiver.receive(3)
        if backend.traits.keeps_place:
            assert [delivery.message for delivery in deliveries] == messages
        counts = {d.message: (d.attempt, d.crashes, d.releases) for d in deliveries}
    assert counts == {messages[0]: (1, 0, 1), messages[1]: (1, 0, 1), messages[2]: (1, 0, 0)}


@pytest.mark.parametrize(("settlement", "afterwards"), AFTERWARDS)
async def test_a_settlement_under_way_when_its_receiver_is_left_is_carried_out_once(
    backend: Backend, queue: str, settlement: Settlement, afterwards: Depth, known: Known
) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=60) as receiver:
        delivery = await take(receiver)
        settling = asyncio.create_task(receiver.settle([(delivery, settlement)]))
        await asyncio.sleep(0)
    assert await settling == [None]
    async with asyncio.timeout(10):
        while (depth := await backend.depth(queue)) != known(*astuple(afterwards)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    async with backend.receiver([queue], slots=5) as receiver:
        taken = await receiver.receive(5, wait=SHORT)
        assert [(one.message, one.crashes) for one in taken] == [(delivery.message, 0)] * depth.ready


async def test_what_comes_to_a_receiver_as_it_is_left_is_no_crash(backend: Backend, queue: str) -> None:
    """There is more than it has slots for, of which each that is handed back is one free."""
    messages = [a_message() for _ in range(60)]
    async with backend.receiver([queue], slots=20) as receiver:
        assert await receiver.receive(1, wait=SHORT) == []
        receiving = asyncio.create_task(receiver.receive(1, wait=10))
        await backend.publish(queue, messages)
        assert len(await receiving) == 1
    async with backend.receiver([queue], slots=60) as receiver, asyncio.timeout(10):
        deliveries = await receiver.receive(60, wait=10)
        while len(deliveries) < 60:
            deliveries += await receiver.receive(60, wait=10)
        assert Counter(delivery.crashes for delivery in deliveries) == {0: 60}
    assert {delivery.message for delivery in deliveries} == set(messages)


async def test_closing_a_backend_ends_the_receivers_that_are_still_entered(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], lease=60) as receiver:
        delivery = await take(receiver)
        await backend.aclose()
        await backend.open()
        assert (await backend.depth(queue)).ready == 1
        with pytest.raises(Closed):
            await receiver.receive(1, wait=5)
        [lost] = await receiver.settle([(delivery, Done())])
        assert isinstance(lost, LeaseLost)
    assert (await backend.depth(queue)).ready == 1


async def test_released_by_leaving_a_job_goes_to_a_receiver_that_waits(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue]) as waiting:
        async with backend.receiver([queue]) as leaving:
            await take(leaving)
            receiving = asyncio.create_task(waiting.receive(1, wait=300))
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            [delivery] = await receiving
    assert (delivery.message, delivery.releases) == (message, 1)


@pytest.mark.parametrize("left_by", ["leaving", "closing"])
async def test_a_receiver_that_is_left_while_it_waits_takes_nothing_with_it(
    backend: Backend, queue: str, left_by: str
) -> None:
    """What it holds is released as it is left: the wait that ends with it must not take that again."""
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue], slots=2) as receiver:
        await take(receiver)
        waiting = asyncio.create_task(receiver.receive(1, wait=300))
        await asyncio.sleep(0)
        if left_by == "closing":
            await backend.aclose()
    async with asyncio.timeout(10):
        [ended] = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(ended, Closed)
    await backend.open()
    assert (await backend.depth(queue)).ready == 1
    async with backend.receiver([queue]) as other:
        delivery = await take(other)
    assert (delivery.message, delivery.releases) == (message, 1)
