"""What a settlement does to a job and to its four numbers: attempts, crashes, releases and the number of deliveries."""

from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import (
    Backend,
    Closed,
    Dead,
    Delivery,
    Depth,
    Done,
    LeaseLost,
    QueueSpec,
    Receiver,
    Release,
    Retry,
    RunError,
    Settlement,
)
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
Known = Callable[[int, int, int, int], Depth]

SETTLEMENTS: list[Settlement] = [Done(), Retry(0.0), Retry(300.0), Dead("rejected"), Release(), Release(300.0)]


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def take(receiver: Receiver) -> Delivery:
    [delivery] = await receiver.receive(1, wait=5)
    return delivery


def numbers(delivery: Delivery) -> tuple[int, int, int, int]:
    return delivery.attempt, delivery.crashes, delivery.releases, delivery.number


async def depth_is(backend: Backend, queue: str, expected: Depth) -> bool:
    """As far as the broker can count."""
    depth = await backend.depth(queue)
    return (
        (depth.ready, depth.dead) == (expected.ready, expected.dead)
        and depth.scheduled in (expected.scheduled, None)
        and depth.leased in (expected.leased, None)
    )


@pytest.mark.parametrize(
    ("settlement", "afterwards"),
    [
        (Done(), Depth(0, 0, 0, 0)),
        (Done(b"1", 60.0), Depth(0, 0, 0, 0)),
        (Done(discarded="no need"), Depth(0, 0, 0, 0)),
        (Retry(0.0), Depth(1, 0, 0, 0)),
        (Retry(300.0), Depth(0, 1, 0, 0)),
        (Release(), Depth(1, 0, 0, 0)),
        (Release(300.0), Depth(0, 1, 0, 0)),
        (Dead("rejected"), Depth(0, 0, 0, 1)),
    ],
)
async def test_a_settled_job_is_in_exactly_one_place(
    backend: Backend, queue: str, settlement: Settlement, afterwards: Depth
) -> None:
    await backend.publish(queue, [a_message()])
    assert await depth_is(backend, queue, Depth(1, 0, 0, 0))
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        assert await depth_is(backend, queue, Depth(0, 0, 1, 0))
        assert await receiver.settle([(delivery, settlement)]) == [None]
        assert await depth_is(backend, queue, afterwards)
    assert await depth_is(backend, queue, afterwards)


# --- the four numbers -------------------------------------------------------------------------------------------------


async def test_a_first_delivery_is_attempt_one_and_number_one(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        assert numbers(await take(receiver)) == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("settlement", "next_one"),
    [
        (Retry(0.0), (2, 0, 0, 2)),
        (Retry(0.01), (2, 0, 0, 2)),
        (Retry(0.0, crash=True), (2, 1, 0, 2)),
        (Retry(0.01, crash=True), (2, 1, 0, 2)),
        (Release(), (1, 0, 1, 2)),
        (Release(0.01), (1, 0, 1, 2)),
        (None, (2, 1, 0, 2)),
    ],
)
async def test_each_end_of_a_delivery_counts_in_its_own_number(
    backend: Backend, queue: str, settlement: Settlement | None, next_one: tuple[int, int, int, int]
) -> None:
    """None: its lease lapses."""
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue], lease=30 if settlement else 0.05, keep=False) as receiver:
        delivery = await take(receiver)
        if settlement is not None:
            await receiver.settle([(delivery, settlement)])
        async with backend.receiver([queue]) as other:
            again = await take(other)
    assert again.message == message
    assert numbers(again) == next_one


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ends=st.lists(st.sampled_from(["retry", "release", "replay"]), max_size=12))
async def test_the_numbers_add_up_over_any_life_of_a_job(
    backend: Backend, new_queue: NewQueue, ends: Sequence[str]
) -> None:
    """`attempt` counts this start and those that counted, `number` never goes back: replay lowers the others only."""
    queue = await new_queue()
    letters = backend.dead_letters(queue)
    await backend.publish(queue, [message := a_message()])
    retries = releases = 0
    async with backend.receiver([queue]) as receiver:
        for started, end in enumerate(ends):
            delivery = await take(receiver)
            assert numbers(delivery) == (retries + 1, 0, releases, started + 1)
            if end == "retry":
                retries += 1
                await receiver.settle([(delivery, Retry(0.0))])
            elif end == "release":
                releases += 1
                await receiver.settle([(delivery, Release())])
            else:
                retries = releases = 0
                await receiver.settle([(delivery, Dead("rejected"))])
                assert await letters.replay([message.id]) == 1
        assert numbers(await take(receiver)) == (retries + 1, 0, releases, len(ends) + 1)


async def test_a_crash_that_was_settled_is_in_the_dead_letter(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue]) as receiver:
        await receiver.settle([(await take(receiver), Retry(0.0, error=RunError("ValueError", "failed")))])
        await receiver.settle([(await take(receiver), Retry(0.0, error=RunError("Crash", "one"), crash=True))])
        await receiver.settle([(await take(receiver), Dead("crash_limit", RunError("Crash", "two"), crash=True))])
    record = await backend.dead_letters(queue).get(message.id)
    assert (record.reason, record.attempts, record.crashes, record.number) == ("crash_limit", 3, 2, 3)
    assert [error.message for error in record.errors] == ["failed", "one", "two"]


async def test_receipts_are_never_given_twice(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message(), a_message()])
    receipts: list[str] = []
    async with backend.receiver([queue], slots=2) as receiver:
        for _ in range(5):
            deliveries = await receiver.receive(2)
            receipts += [delivery.receipt for delivery in deliveries]
            await receiver.settle([(delivery, Release()) for delivery in deliveries])
    assert len(set(receipts)) == len(receipts) == 10


# --- errors travel with the job ---------------------------------------------------------------------------------------


async def test_the_errors_of_failed_runs_travel_with_the_job_oldest_first(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue]) as receiver:
        await receiver.settle([(await take(receiver), Retry(0.0, error=RunError("ValueError", "first", "a frame")))])
        await receiver.settle([(await take(receiver), Release())])  # says nothing, and forgets nothing
        await receiver.settle([(await take(receiver), Retry(0.01, error=RunError("KeyError", "second", "a frame")))])
        last = RunError("OSError", "third", "a frame", worker="w@host:1")
        await receiver.settle([(await take(receiver), Dead("attempts", last))])
    record = await backend.dead_letters(queue).get(message.id)
    assert [(error.type, error.message) for error in record.errors] == [
        ("ValueError", "first"),
        ("KeyError", "second"),
        ("OSError", "third"),
    ]
    assert record.errors[-1] == last
    assert [error.traceback for error in record.errors] == ["", "", "a frame"]  # only the newest in full


async def test_ten_errors_are_kept(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue]) as receiver:
        for run in range(11):
            await receiver.settle([(await take(receiver), Retry(0.0, error=RunError("ValueError", str(run))))])
        await receiver.settle([(await take(receiver), Dead("attempts", RunError("ValueError", "11")))])
    record = await backend.dead_letters(queue).get(message.id)
    assert [error.message for error in record.errors] == [str(run) for run in range(2, 12)]


# --- one outcome for each pair ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", SETTLEMENTS)
@pytest.mark.parametrize("first", SETTLEMENTS)
@pytest.mark.parametrize("together", [True, False])
async def test_a_receipt_is_good_for_one_settlement(
    backend: Backend, queue: str, first: Settlement, second: Settlement, together: bool
) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        if together:
            accepted, refused = await receiver.settle([(delivery, first), (delivery, second)])
            after_both = await backend.depth(queue)
        else:
            [accepted] = await receiver.settle([(delivery, first)])
            after_one = await backend.depth(queue)
            [refused] = await receiver.settle([(delivery, second)])
            after_both = await backend.depth(queue)
            assert after_both == after_one
    assert accepted is None
    assert isinstance(refused, LeaseLost)
    assert (refused.job_id, refused.outcome) == (message.id, "not_done")
    assert after_both.ready == (isinstance(first, Retry | Release) and not first.delay)
    assert after_both.dead == isinstance(first, Dead)


async def test_outcomes_stand_in_the_order_of_the_pairs(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message() for _ in range(4)])
    async with backend.receiver([queue], slots=4) as receiver:
        a, b, c, d = await receiver.receive(4)
        await receiver.settle([(b, Done()), (d, Done())])
        outcomes = await receiver.settle([(a, Done()), (b, Done()), (c, Dead("rejected")), (d, Retry(0.0))])
    assert [type(outcome) for outcome in outcomes] == [type(None), LeaseLost, type(None), LeaseLost]
    assert await depth_is(backend, queue, Depth(0, 0, 0, 1))


async def test_settling_nothing_changes_nothing(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        assert await receiver.settle([]) == []
        assert (await backend.depth(queue)).ready == 1


@pytest.mark.parametrize("settlement", SETTLEMENTS)
async def test_a_delivery_is_settled_only_by_the_receiver_that_got_it(
    backend: Backend, queue: str, settlement: Settlement
) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as holder, backend.receiver([queue]) as other:
        delivery = await take(holder)
        [refused] = await other.settle([(delivery, settlement)])
        assert isinstance(refused, LeaseLost)
        assert await depth_is(backend, queue, Depth(0, 0, 1, 0))
        assert await holder.settle([(delivery, Done())]) == [None]


async def test_one_call_settles_deliveries_of_several_queues(
    backend: Backend, new_queue: NewQueue, known: Known
) -> None:
    queues = [await new_queue() for _ in range(3)]
    for queue in queues:
        await backend.publish(queue, [a_message()])
    async with backend.receiver(queues, slots=3) as receiver:
        deliveries = await receiver.receive(3)
        assert {delivery.queue for delivery in deliveries} == set(queues)
        assert await receiver.settle([(delivery, Done()) for delivery in deliveries]) == [None] * 3
    for queue in queues:
        assert await backend.depth(queue) == known(0, 0, 0, 0)


# --- settle and receive in one exchange -------------------------------------------------------------------------------


async def test_an_exchange_settles_before_it_takes(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message(), a_message()])
    async with backend.receiver([queue]) as receiver:
        first = await take(receiver)
        exchanged = await receiver.exchange([(first, Release())], 1)
        assert exchanged.settled == [None]
        [again] = exchanged.deliveries
        if backend.traits.keeps_place:
            assert again.message == first.message
        exchanged = await receiver.exchange([(again, Done())], 1)  # and that is what makes room in its one slot
        assert exchanged.settled == [None]
        assert len(exchanged.deliveries) == 1


async def test_an_exchange_of_limit_zero_only_settles(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message(), a_message()])
    async with backend.receiver([queue], slots=2) as receiver:
        delivery = await take(receiver)
        exchanged = await receiver.exchange([(delivery, Done())], 0)
        assert (exchanged.settled, exchanged.deliveries) == ([None], [])
        assert (await receiver.exchange([], 0)).deliveries == []
        assert (await backend.depth(queue)).ready == 1


async def test_an_exchange_with_something_to_settle_does_not_wait(backend: Backend, queue: str) -> None:
    """Its answer would come too late: the caller has slots to free. Were it to wait, this test would time out."""
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        exchanged = await receiver.exchange([(delivery, Done())], 1, wait=300)
        assert (exchanged.settled, exchanged.deliveries) == ([None], [])


async def test_the_answer_to_a_settlement_is_not_lost_to_a_missing_queue(backend: Backend, new_queue: NewQueue) -> None:
    stays, goes = await new_queue(), await new_queue()
    await backend.publish(stays, [a_message()])
    async with backend.receiver([stays, goes], slots=2) as receiver:
        delivery = await take(receiver)
        await backend.delete(goes)
        exchanged = await receiver.exchange([(delivery, Done())], 1, wait=5)
    assert (exchanged.settled, exchanged.missing) == ([None], (goes,))


# --- settled too late -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared_anew", [False, True])
@pytest.mark.parametrize("settlement", SETTLEMENTS)
async def test_a_settlement_brings_nothing_back_to_a_deleted_queue(
    backend: Backend, queue: str, settlement: Settlement, declared_anew: bool, known: Known
) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        await backend.delete(queue, force=True)
        if declared_anew:
            await backend.declare(QueueSpec(queue))
        [lost] = await receiver.settle([(delivery, settlement)])
    assert isinstance(lost, LeaseLost)
    assert [spec.name for spec in await backend.queues()] == [queue] * declared_anew
    if declared_anew:
        assert await backend.depth(queue) == known(0, 0, 0, 0)


@pytest.mark.parametrize("settlement", SETTLEMENTS)
@pytest.mark.parametrize("left_by", ["leaving", "closing"])
async def test_a_settlement_after_the_receiver_was_left_is_refused(
    backend: Backend, queue: str, settlement: Settlement, left_by: str
) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        if left_by == "closing":
            await backend.aclose()
    [lost] = await receiver.settle([(delivery, settlement)])
    assert isinstance(lost, LeaseLost)
    with pytest.raises(Closed):
        await receiver.receive(1)
    await backend.open()
    assert await depth_is(backend, queue, Depth(1, 0, 0, 0))
