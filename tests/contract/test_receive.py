"""Receiving: how many, from where, and the bell that wakes who waits: one of them, and never none."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from mindtrace.jobs import Backend, Delivery, Depth, Done, Receiver, Release, Retry, Settlement
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.testing.faults import CancelAt
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
Known = Callable[[int, int, int, int], Depth]

LONG = 300.0  # a wait that a test does not sit through: it ends by what is tested, within BOUND
BOUND = 10.0


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def take(receiver: Receiver) -> Delivery:
    async with asyncio.timeout(BOUND):
        [delivery] = await receiver.receive(1, wait=LONG)
    return delivery


async def waiting(receiver: Receiver, limit: int = 1) -> "asyncio.Task[list[Delivery]]":
    """A receive that has begun to wait."""
    task = asyncio.create_task(receiver.receive(limit, wait=LONG))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()
    return task


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "limit", "slots", "given"), [(5, 3, 5, 3), (2, 3, 5, 2), (5, 5, 2, 2), (0, 1, 1, 0)])
async def test_a_receive_gives_up_to_its_limit_of_what_there_is_and_fits(
    backend: Backend, queue: str, there: int, limit: int, slots: int, given: int
) -> None:
    await backend.publish(queue, [a_message() for _ in range(there)])
    async with backend.receiver([queue], slots=slots) as receiver:
        assert len(await receiver.receive(limit)) == given
        depth = await backend.depth(queue)
        assert (depth.ready, depth.leased in (given, None)) == (there - given, True)


async def test_a_receiver_never_holds_more_than_its_slots(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message() for _ in range(10)])
    async with backend.receiver([queue], slots=3) as receiver:
        held = await receiver.receive(2)
        held += await receiver.receive(2)
        assert len(held) == 3
        assert await receiver.receive(2) == []
        for settlement in (Done(), Retry(LONG), Release(LONG)):  # each frees a slot
            exchanged = await receiver.exchange([(held.pop(), settlement)], 5)
            assert len(exchanged.deliveries) == 1
            held += exchanged.deliveries
        assert (await backend.depth(queue)).leased in (3, None)


async def test_a_receiver_without_a_free_slot_leaves_the_job_to_another(backend: Backend, queue: str) -> None:
    """Also when it was the first to wait, and was told first."""
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as full, backend.receiver([queue]) as free:
        await take(full)
        first, second = await waiting(full), await waiting(free)
        await backend.publish(queue, [message := a_message()])
        async with asyncio.timeout(BOUND):
            [delivery] = await second
        assert delivery.message == message
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_receive_with_a_wait_takes_what_is_there_at_once(backend: Backend, queue: str) -> None:
    """It waits for a first job, not for a full batch."""
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], slots=5) as receiver, asyncio.timeout(BOUND):
        assert len(await receiver.receive(5, wait=LONG)) == 1
        more = await waiting(receiver, 4)
        await backend.publish(queue, [a_message(), a_message()])
        assert len(await more) == 2


@pytest.mark.parametrize("wait", [0.0, 0.05])
async def test_a_receive_of_nothing_ends_with_its_wait(backend: Backend, queue: str, wait: float) -> None:
    async with backend.receiver([queue]) as receiver, asyncio.timeout(BOUND):
        assert await receiver.receive(1, wait=wait) == []


async def test_two_receivers_share_the_jobs_and_none_is_given_twice(backend: Backend, queue: str, known: Known) -> None:
    messages = [a_message() for _ in range(60)]
    await backend.publish(queue, messages)
    seen: list[Message] = []

    async def work() -> None:
        async with backend.receiver([queue], slots=3) as receiver:
            pairs: list[tuple[Delivery, Settlement]] = []
            while deliveries := (await receiver.exchange(pairs, 3)).deliveries:
                seen.extend(delivery.message for delivery in deliveries)
                pairs = [(delivery, Done()) for delivery in deliveries]
                await asyncio.sleep(0)

    await asyncio.gather(*(work() for _ in range(4)))
    assert Counter(seen) == Counter(messages)
    assert await backend.depth(queue) == known(0, 0, 0, 0)


# --- the bell ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how_many", [1, 2, 10])
async def test_each_of_those_who_wait_gets_one_of_as_many_jobs(backend: Backend, queue: str, how_many: int) -> None:
    """One publish of several wakes as many as there is work for."""
    messages = [a_message() for _ in range(how_many)]

    async def one() -> Message:
        async with backend.receiver([queue]) as receiver:
            delivery = await take(receiver)
            await receiver.settle([(delivery, Done())])
            return delivery.message

    tasks = [asyncio.create_task(one()) for _ in range(how_many)]
    for _ in range(3):
        await asyncio.sleep(0)
    await backend.publish(queue, messages)
    assert Counter(await asyncio.gather(*tasks)) == Counter(messages)


async def test_one_job_goes_to_one_of_those_who_wait(backend: Backend, queue: str) -> None:
    async with backend.receiver([queue]) as one, backend.receiver([queue]) as two, backend.receiver([queue]) as three:
        waits = [await waiting(receiver) for receiver in (one, two, three)]
        await backend.publish(queue, [first := a_message()])
        async with asyncio.timeout(BOUND):
            done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        assert [delivery.message for task in done for delivery in task.result()] == [first]
        assert len(pending) == 2
        await backend.publish(queue, [second := a_message()])
        async with asyncio.timeout(BOUND):
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        assert [delivery.message for task in done for delivery in task.result()] == [second]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


@pytest.mark.parametrize("victims", [[0], [1], [2], [0, 1], [1, 2], [0, 2]])
@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_job_is_not_lost_with_the_one_who_was_woken_for_it(
    backend: Backend, queue: str, victims: list[int], turns: int
) -> None:
    """Whoever is cancelled, and however far it had come: another gets the job, or its own receiver does."""
    async with backend.receiver([queue]) as one, backend.receiver([queue]) as two, backend.receiver([queue]) as three:
        waits = [await waiting(receiver) for receiver in (one, two, three)]
        await backend.publish(queue, [message := a_message()])
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = [waits[victim] for victim in victims]
        for task in cancelled:
            task.cancel()
        async with asyncio.timeout(BOUND):
            done, pending = set[asyncio.Task[list[Delivery]]](), set(waits)
            while not [task for task in done if not task.cancelled()]:
                more, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                done |= more
        delivered = [delivery.message for task in done if not task.cancelled() for delivery in task.result()]
        assert delivered == [message]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def test_a_receiver_that_was_cancelled_may_receive_again(backend: Backend, queue: str) -> None:
    async with backend.receiver([queue]) as receiver:
        task = await waiting(receiver)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await backend.publish(queue, [message := a_message()])
        assert (await take(receiver)).message == message


async def test_what_a_cancelled_call_was_to_get_is_the_next_ones(backend: Backend, queue: str) -> None:
    """However far it had come, and though the only slot is taken until it is known that nobody has the job."""
    async with backend.receiver([queue]) as receiver:
        for turns in range(0, 1000, 25):
            await backend.publish(queue, [message := a_message()])
            task = asyncio.create_task(receiver.receive(1, wait=LONG))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            delivery = await take(receiver) if task.cancelled() else task.result()[0]
            assert delivery.message == message
            assert await receiver.settle([(delivery, Done())]) == [None]


async def test_what_a_cancelled_call_had_been_given_is_the_next_ones(backend: Backend, queue: str) -> None:
    """At each of its awaits, with what it waits for at hand: then the only slot is taken by what nobody has."""
    async with backend.receiver([queue]) as receiver:
        for k in itertools.count(1):
            fault = CancelAt(k, "finished")
            calling = asyncio.create_task(fault.run(receiver.receive(1, wait=LONG)))
            await asyncio.sleep(0)
            await backend.publish(queue, [message := a_message()])
            [delivery] = (await calling).value or [await take(receiver)]
            assert (delivery.message, delivery.crashes) == (message, 0)
            assert await receiver.settle([(delivery, Done())]) == [None]
            if not fault.struck:
                break


async def test_what_came_while_the_loop_stood_still_is_not_lost_with_the_call_that_is_cancelled_then(
    backend: Backend, queue: str
) -> None:
    async with backend.receiver([queue]) as receiver:
        task = await waiting(receiver)
        await backend.publish(queue, [message := a_message(delay=0.05)])
        time.sleep(0.3)  # noqa: ASYNC251 (it is to stand still, while threads may bring the job)
        task.cancel()
        await asyncio.wait({task})
        delivery = await take(receiver) if task.cancelled() else task.result()[0]
        assert (delivery.message, delivery.crashes) == (message, 0)


@pytest.mark.parametrize("settlement", [Release(), Release(0.05), Retry(0.0), Retry(0.05)])
async def test_a_job_that_comes_back_wakes_who_waits(backend: Backend, queue: str, settlement: Settlement) -> None:
    await backend.publish(queue, [message := a_message()])
    async with backend.receiver([queue]) as holder, backend.receiver([queue]) as other:
        delivery = await take(holder)
        wait = await waiting(other)
        await holder.settle([(delivery, settlement)])
        async with asyncio.timeout(BOUND):
            [again] = await wait
    assert again.message == message


async def test_what_is_released_does_not_come_back_to_who_asks_for_nothing(backend: Backend, queue: str) -> None:
    """Though that one has waited before, and has a slot again: the next who asks has it."""
    async with backend.receiver([queue]) as holder, backend.receiver([queue]) as other:
        for _ in range(5):
            receiving = await waiting(holder)
            await backend.publish(queue, [message := a_message()])
            [delivery] = await receiving
            assert await holder.settle([(delivery, Release())]) == [None]
            again = await take(other)
            assert (again.message, again.releases) == (message, 1)
            assert await other.settle([(again, Done())]) == [None]


async def test_a_receive_that_does_not_wait_finds_what_was_stored_before(backend: Backend, queue: str) -> None:
    """Though the call before it waited, so that the broker may be bringing it."""
    async with backend.receiver([queue]) as receiver:
        for _ in range(20):
            assert await receiver.receive(1, wait=0.01) == []
            await backend.publish(queue, [message := a_message()])
            [delivery] = await receiver.receive(1)
            assert (delivery.message, delivery.crashes) == (message, 0)
            assert await receiver.settle([(delivery, Done())]) == [None]


async def test_a_queue_of_many_idle_receivers_hands_each_job_out_once(backend: Backend, queue: str) -> None:
    taken: list[Message] = []
    messages = [a_message() for _ in range(50)]
    all_taken = asyncio.Event()

    async def idle() -> None:
        async with backend.receiver([queue]) as receiver:
            while True:
                [delivery] = await receiver.receive(1, wait=LONG)
                await receiver.settle([(delivery, Done())])
                taken.append(delivery.message)
                if len(taken) == len(messages):
                    all_taken.set()

    tasks = [asyncio.create_task(idle()) for _ in range(50)]
    await asyncio.sleep(0)
    for message in messages:
        await backend.publish(queue, [message])
        await asyncio.sleep(0)
    async with asyncio.timeout(BOUND):
        await all_taken.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert Counter(taken) == Counter(messages)


# --- nudge ------------------------------------------------------------------------------------------------------------


async def test_a_nudge_ends_the_wait_in_progress(backend: Backend, queue: str) -> None:
    async with backend.receiver([queue]) as receiver:
        wait = await waiting(receiver)
        receiver.nudge()
        async with asyncio.timeout(BOUND):
            assert await wait == []


async def test_a_nudge_ends_the_next_wait_and_only_that(backend: Backend, queue: str) -> None:
    async with backend.receiver([queue]) as receiver:
        receiver.nudge()
        receiver.nudge()
        async with asyncio.timeout(BOUND):
            assert await receiver.receive(1, wait=LONG) == []
        wait = await waiting(receiver)
        await backend.publish(queue, [message := a_message()])
        async with asyncio.timeout(BOUND):
            [delivery] = await wait
    assert delivery.message == message


async def test_a_nudge_hides_no_job(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue], slots=2) as receiver:
        receiver.nudge()
        assert len(await receiver.receive(1, wait=LONG)) == 1
        wait = await waiting(receiver)
        await backend.publish(queue, [message := a_message()])
        receiver.nudge()
        async with asyncio.timeout(BOUND):
            deliveries = await wait or await receiver.receive(1, wait=LONG)
    assert [delivery.message for delivery in deliveries] == [message]


async def test_a_nudge_is_for_its_own_receiver(backend: Backend, queue: str) -> None:
    async with backend.receiver([queue]) as one, backend.receiver([queue]) as two:
        first, second = await waiting(one), await waiting(two)
        one.nudge()
        async with asyncio.timeout(BOUND):
            assert await first == []
        assert not second.done()
        await backend.publish(queue, [message := a_message()])
        async with asyncio.timeout(BOUND):
            [delivery] = await second
    assert delivery.message == message


async def test_a_nudge_ends_a_wait_for_nothing(backend: Backend, queue: str) -> None:
    """A worker whose slots are all taken waits for its runs only, and takes nothing meanwhile."""
    async with backend.receiver([queue]) as receiver:
        wait = asyncio.create_task(receiver.exchange([], 0, wait=LONG))
        await asyncio.sleep(0)
        await backend.publish(queue, [a_message()])
        receiver.nudge()
        async with asyncio.timeout(BOUND):
            assert (await wait).deliveries == []
    assert (await backend.depth(queue)).ready == 1


# --- many queues ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
@pytest.mark.parametrize("how_many", [2, 3])
async def test_queues_are_served_in_fair_turns(
    backend: Backend, new_queue: NewQueue, how_many: int, limit: int
) -> None:
    """Whatever the limit: no queue falls behind another by more than a turn, and each keeps its order."""
    queues = [await new_queue() for _ in range(how_many)]
    published = {queue: [a_message() for _ in range(30)] for queue in queues}
    for queue, messages in published.items():
        await backend.publish(queue, messages)
    received: dict[str, list[Message]] = {queue: [] for queue in queues}
    async with backend.receiver(queues, slots=limit) as receiver:
        for _ in range(60 // limit):
            deliveries = await receiver.receive(limit)
            assert len(deliveries) == limit
            for delivery in deliveries:
                received[delivery.queue].append(delivery.message)
            await receiver.settle([(delivery, Done()) for delivery in deliveries])
            counts = [len(messages) for messages in received.values()]
            assert max(counts) - min(counts) <= limit
    for queue, messages in received.items():
        assert messages == published[queue][: len(messages)]


async def test_a_look_that_takes_nothing_uses_up_no_turn(backend: Backend, new_queue: NewQueue) -> None:
    queues = [await new_queue(), await new_queue()]
    for queue in queues:
        await backend.publish(queue, [a_message() for _ in range(10)])
    received: Counter[str] = Counter()
    async with backend.receiver(queues) as receiver:
        for _ in range(10):
            [delivery] = await receiver.receive(1)
            received[delivery.queue] += 1
            assert await receiver.receive(1) == []  # its slot is taken
            await receiver.settle([(delivery, Done())])
    assert received == dict.fromkeys(queues, 5)


async def test_a_busy_queue_does_not_starve_a_quiet_one(backend: Backend, new_queue: NewQueue) -> None:
    busy, quiet = await new_queue(), await new_queue()
    await backend.publish(busy, [a_message() for _ in range(100)])
    async with backend.receiver([busy, quiet], slots=4) as receiver:
        await receiver.settle([(delivery, Done()) for delivery in await receiver.receive(4)])
        await backend.publish(quiet, [a_message()])
        deliveries = await receiver.receive(4)
    assert Counter(delivery.queue for delivery in deliveries) == {busy: 3, quiet: 1}


async def test_strict_takes_from_the_first_queue_while_there_is_something(
    backend: Backend, new_queue: NewQueue
) -> None:
    first, second = await new_queue(), await new_queue()
    await backend.publish(second, [a_message() for _ in range(4)])
    await backend.publish(first, [a_message() for _ in range(4)])
    order: list[str] = []
    async with backend.receiver([first, second], slots=3, strict=True) as receiver:
        while deliveries := await receiver.receive(3):
            order += [delivery.queue for delivery in deliveries]
            await receiver.settle([(delivery, Done()) for delivery in deliveries])
    assert order == [first] * 4 + [second] * 4


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_receiver_of_several_queues_waits_for_all_of_them(
    backend: Backend, new_queue: NewQueue, which: int, strict: bool
) -> None:
    queues = [await new_queue() for _ in range(3)]
    async with backend.receiver(queues, strict=strict) as receiver:
        wait = await waiting(receiver)
        await backend.publish(queues[which], [message := a_message()])
        async with asyncio.timeout(BOUND):
            [delivery] = await wait
    assert (delivery.queue, delivery.message) == (queues[which], message)


async def test_two_bells_for_one_who_waits_leave_a_job_for_another(backend: Backend, new_queue: NewQueue) -> None:
    """One slot, two queues that ring at once: what it cannot take, another of those who wait gets."""
    queues = [await new_queue(), await new_queue()]
    async with backend.receiver(queues) as one, backend.receiver(queues) as two:
        waits = [await waiting(one), await waiting(two)]
        messages = [a_message(), a_message()]
        for queue, message in zip(queues, messages, strict=True):
            await backend.publish(queue, [message])
        async with asyncio.timeout(BOUND):
            received = [delivery.message for [delivery] in await asyncio.gather(*waits)]
    assert Counter(received) == Counter(messages)


async def test_a_queue_named_twice_gets_one_turn(backend: Backend, new_queue: NewQueue) -> None:
    twice, once = await new_queue(), await new_queue()
    for queue in (twice, once):
        await backend.publish(queue, [a_message() for _ in range(6)])
    async with backend.receiver([twice, twice, once], slots=6) as receiver:
        deliveries = await receiver.receive(6)
    assert Counter(delivery.queue for delivery in deliveries) == {twice: 3, once: 3}
