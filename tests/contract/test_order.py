"""The order in which jobs are handed out, for each kind of queue and each way back into it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import Backend, Dead, Delivery, NotSupported, QueueSpec, Receiver, Release, Retry, Settlement
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
UntilReady = Callable[[str, int], Awaitable[None]]

# A fresh queue for each example, so that the fixtures may be shared.
examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BATCHES = st.lists(st.lists(st.integers(0, 10), max_size=7), max_size=6)
LIMITS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def receive_all(receiver: Receiver, limits: Sequence[int] = (100,)) -> list[Message]:
    """All that is ready, with these limits in turn."""
    messages: list[Message] = []
    taken = 0
    while deliveries := await receiver.receive(limits[taken % len(limits)]):
        taken += 1
        messages += [delivery.message for delivery in deliveries]
    return messages


async def publish_batches(backend: Backend, queue: str, batches: Sequence[Sequence[Message]]) -> list[Message]:
    for batch in batches:
        assert await backend.publish(queue, batch) == ["stored"] * len(batch)
    return [message for batch in batches for message in batch]


@examples
@given(batches=BATCHES, limits=LIMITS)
async def test_fifo_hands_out_in_the_order_of_publishing(
    backend: Backend, new_queue: NewQueue, batches: list[list[int]], limits: list[int]
) -> None:
    queue = await new_queue("fifo")
    published = await publish_batches(backend, queue, [[a_message() for _ in batch] for batch in batches])
    async with backend.receiver([queue], slots=100) as receiver:
        assert await receive_all(receiver, limits) == published


@examples
@given(batches=BATCHES, limits=LIMITS)
async def test_priority_hands_out_the_highest_first_and_equals_in_order(
    backend: Backend, new_queue: NewQueue, batches: list[list[int]], limits: list[int]
) -> None:
    queue = await new_queue("priority")
    messages = [[a_message(priority=priority) for priority in batch] for batch in batches]
    published = await publish_batches(backend, queue, messages)
    async with backend.receiver([queue], slots=100) as receiver:
        received = await receive_all(receiver, limits)
    assert received == sorted(published, key=lambda message: -message.priority)  # a stable sort


@examples
@given(batches=BATCHES, limits=LIMITS)
async def test_a_stack_hands_out_the_newest_first(
    backend: Backend, new_queue: NewQueue, batches: list[list[int]], limits: list[int]
) -> None:
    if not backend.traits.stack:
        with pytest.raises(NotSupported):
            await new_queue("stack")
        return
    queue = await new_queue("stack")
    published = await publish_batches(backend, queue, [[a_message() for _ in batch] for batch in batches])
    async with backend.receiver([queue], slots=100) as receiver:
        assert await receive_all(receiver, limits) == published[::-1]


async def test_a_priority_queue_takes_the_whole_range_of_its_backend(backend: Backend, new_queue: NewQueue) -> None:
    lowest, highest = backend.traits.priorities
    queue = await new_queue("priority", priority_levels=highest if highest <= 255 else None)
    ranked = [a_message(priority=priority) for priority in (highest, highest - 1, 1, 0, *([-1, lowest] * (lowest < 0)))]
    assert await backend.publish(queue, ranked[::-1]) == ["stored"] * len(ranked)
    async with backend.receiver([queue], slots=10) as receiver:
        assert await receive_all(receiver) == ranked


async def test_priority_is_decided_when_a_job_is_handed_out(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue("priority")
    low, high = a_message(priority=1), a_message(priority=9)
    await backend.publish(queue, [low, a_message(), a_message()])
    async with backend.receiver([queue], slots=2) as receiver:
        [first] = await receiver.receive(1)
        await backend.publish(queue, [high])
        [second] = await receiver.receive(1)
    assert (first.message, second.message) == (low, high)


# --- the ways back ----------------------------------------------------------------------------------------------------
# One job of priority 5 is taken; behind it wait one of 5 and one of 1, and then one of 9 and one of 5 are published.


async def order_after(
    backend: Backend, queue: str, back: Callable[[Receiver, Delivery], Awaitable[None]], **options: float | bool
) -> list[str]:
    """The order of the five, after the first has come `back`."""
    names = {a_message(priority=priority): name for name, priority in (("first", 5), ("second", 5), ("low", 1))}
    later = {a_message(priority=priority): name for name, priority in (("high", 9), ("third", 5))}
    await backend.publish(queue, list(names))
    async with backend.receiver([queue], **options) as receiver:  # type: ignore[arg-type]
        [taken] = await receiver.receive(1)
        assert names[taken.message] == "first"
        await backend.publish(queue, list(later))
        await back(receiver, taken)
        async with backend.receiver([queue], slots=5) as other:
            return [(names | later)[message] for message in await receive_all(other)]


BACK = ["high", "second", "third", "first", "low"]
OLD_PLACE = ["high", "first", "second", "third", "low"]


@pytest.mark.parametrize("settlement", [Retry(0.0), Retry(0.02), Release(0.02)])
async def test_a_retry_or_a_snooze_joins_the_back_of_its_priority(
    backend: Backend, new_queue: NewQueue, until_ready: UntilReady, settlement: Settlement
) -> None:
    queue = await new_queue("priority")

    async def settled(receiver: Receiver, delivery: Delivery) -> None:
        assert await receiver.settle([(delivery, settlement)]) == [None]
        await until_ready(queue, 5)

    assert await order_after(backend, queue, settled) == BACK


async def test_a_release_returns_to_its_old_place(backend: Backend, new_queue: NewQueue) -> None:
    async def released(receiver: Receiver, delivery: Delivery) -> None:
        assert await receiver.settle([(delivery, Release())]) == [None]

    order = await order_after(backend, await new_queue("priority"), released)
    assert order == (OLD_PLACE if backend.traits.keeps_place else BACK)


async def test_a_lapsed_lease_returns_its_job_to_its_old_place(
    backend: Backend, new_queue: NewQueue, until_ready: UntilReady
) -> None:
    queue = await new_queue("priority")

    async def lapsed(receiver: Receiver, delivery: Delivery) -> None:
        await until_ready(queue, 5)

    order = await order_after(backend, queue, lapsed, lease=0.05, keep=False)
    if backend.traits.keeps_place:
        assert order == OLD_PLACE
    else:  # it is put back by the receiver that finds it, behind what that took with it
        assert [name for name in order if name != "first"] == ["high", "second", "third", "low"]
        assert order.index("first") > order.index("third")


async def test_a_replay_joins_the_back_of_its_priority(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue("priority")

    async def replayed(receiver: Receiver, delivery: Delivery) -> None:
        assert await receiver.settle([(delivery, Dead("rejected"))]) == [None]
        assert await backend.dead_letters(queue).replay([delivery.message.id]) == 1

    assert await order_after(backend, queue, replayed) == BACK


async def test_a_due_job_queues_behind_what_is_ready(
    backend: Backend, new_queue: NewQueue, until_ready: UntilReady
) -> None:
    queue = await new_queue("priority")
    delayed, ready = a_message(priority=5, delay=0.05), a_message(priority=5)
    low, high = a_message(priority=1), a_message(priority=9)
    await backend.publish(queue, [delayed, low, ready, high])
    await until_ready(queue, 4)
    async with backend.receiver([queue], slots=4) as receiver:
        assert await receive_all(receiver) == [high, ready, delayed, low]


@pytest.mark.parametrize(
    ("settlement", "expected"),
    [(Retry(0.0), ["second", "third", "first"]), (Release(), ["third", "second", "first"])],
)
async def test_on_a_stack_a_retry_is_the_newest_and_a_release_keeps_its_place(
    backend: Backend, new_queue: NewQueue, settlement: Settlement, expected: list[str]
) -> None:
    if not backend.traits.stack:
        with pytest.raises(NotSupported):
            await new_queue("stack")
        return
    queue = await new_queue("stack")
    names = {a_message(): name for name in ("first", "second")}
    await backend.publish(queue, list(names))
    async with backend.receiver([queue]) as receiver:
        [second] = await receiver.receive(1)
        names[third := a_message()] = "third"
        await backend.publish(queue, [third])
        await receiver.settle([(second, settlement)])
        async with backend.receiver([queue], slots=3) as other:
            assert [names[message] for message in await receive_all(other)] == expected


async def test_released_together_jobs_keep_their_order(backend: Backend, queue: str) -> None:
    messages = [a_message() for _ in range(6)]
    await backend.publish(queue, messages)
    async with backend.receiver([queue], slots=4) as receiver:
        taken = await receiver.receive(4)
        await receiver.settle([(delivery, Release()) for delivery in (taken[2], taken[0], taken[3], taken[1])])
        async with backend.receiver([queue], slots=6) as other:
            order = await receive_all(other)
    assert order == messages if backend.traits.keeps_place else set(order) == set(messages)


async def test_two_publishers_each_keep_their_own_order(backend: Backend, queue: str) -> None:
    publishers = [[a_message() for _ in range(20)] for _ in range(2)]

    async def publish(messages: list[Message]) -> None:
        for message in messages:
            await backend.publish(queue, [message])
            await asyncio.sleep(0)

    await asyncio.gather(*(publish(messages) for messages in publishers))
    async with backend.receiver([queue], slots=100) as receiver:
        received = await receive_all(receiver)
    assert len(received) == 40
    for messages in publishers:
        assert [message for message in received if message in set(messages)] == messages


async def test_queues_have_orders_of_their_own(backend: Backend) -> None:
    await backend.declare(QueueSpec("ranked", "priority"))
    await backend.declare(QueueSpec("plain"))
    ranked, plain = [a_message(priority=p) for p in (1, 2)], [a_message() for _ in range(2)]
    for low_or_high, message in zip(ranked, plain, strict=True):
        await backend.publish("ranked", [low_or_high])
        await backend.publish("plain", [message])
    async with backend.receiver(["ranked"], slots=4) as first, backend.receiver(["plain"], slots=4) as second:
        assert await receive_all(first) == ranked[::-1]
        assert await receive_all(second) == plain
