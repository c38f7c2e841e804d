"""Receivers on RabbitMQ: what they hold, what they hand back, and what other queues and other processes do to that."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from mindtrace.jobs import (
    BackendUnavailable,
    Closed,
    Delivery,
    Done,
    QueueMismatch,
    QueueNotFound,
    QueueSpec,
    Receiver,
    Retry,
)
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.faults import CancelAt
from mindtrace.jobs.testing.proxy import Amqp, FaultProxy
from mindtrace.jobs.wire import Message

if TYPE_CHECKING:
    from tests.rabbitmq.conftest import World

pytestmark = [pytest.mark.anyio, pytest.mark.rabbitmq]

BOUND = 10.0


def messages(count: int) -> list[Message]:
    return [Message(new_job_id(), b"{}") for _ in range(count)]


async def test_what_one_call_is_refused_answers_no_call_beside_it(world: "World") -> None:
    queue, other = await world.queue(), await world.queue("other", "priority")
    for _ in range(5):
        missing, depth, differs, fits, cleaned = await asyncio.gather(
            world.backend.depth("nowhere"),
            world.backend.depth(queue),
            world.backend.declare(QueueSpec(other)),
            world.backend.declare(QueueSpec(queue)),
            world.backend.clean(queue),
            return_exceptions=True,
        )
        assert isinstance(missing, QueueNotFound)
        assert isinstance(differs, QueueMismatch)
        assert missing.queue == "nowhere"
        assert differs.queue == other
        assert (depth, fits, cleaned) == (await world.backend.depth(queue), None, 0)


async def test_a_receiver_of_a_queue_that_is_missing_costs_another_receiver_no_lease(world: "World") -> None:
    """Though both ask at the same moment, whichever is the first, of a server that has answered before."""
    queue = await world.queue()
    await world.backend.publish(queue, messages(1))
    async with world.backend.receiver([queue], slots=2) as receiver, world.backend.receiver(["nowhere"]) as lost:
        [delivery] = await receiver.receive(1, wait=BOUND)
        for _ in range(10):
            for pair in ((lost, receiver), (receiver, lost)):
                assert (await receiver.exchange([], 1)).missing == ()
                exchanged = await asyncio.gather(*(one.exchange([], 1) for one in pair))
                missing = dict(zip(pair, (one.missing for one in exchanged), strict=True))
                assert missing == {receiver: (), lost: ("nowhere",)}
        assert not delivery.lost
        assert await receiver.settle([(delivery, Done())]) == [None]


async def test_what_was_done_is_not_run_again_where_another_queue_of_the_receiver_is_deleted(
    own_broker: Broker, new_world: "type[World]"
) -> None:
    """More of it than the channel passes on at once, and the server hears of it only when the receiver is left."""
    world = await new_world(own_broker.url)  # type: ignore[misc] (a fixture that makes them)
    for _ in range(5):  # the server may be quick enough all the same, once
        one, other = await world.queue("one"), await world.queue("other")
        await world.backend.publish(other, messages(40))
        async with world.backend.receiver([one, other], slots=40) as receiver, asyncio.timeout(BOUND):
            deliveries = await receiver.receive(40, wait=BOUND)
            while len(deliveries) < 40:
                deliveries += await receiver.receive(40, wait=BOUND)
            await (await world.another()).delete(one, force=True)
            own_broker.stop()
            asyncio.get_running_loop().call_later(0.1, own_broker.cont)
            assert await receiver.settle([(delivery, Done()) for delivery in deliveries]) == [None] * 40
        await world.backend.publish(other, last := messages(1))  # behind whatever has come back
        async with world.backend.receiver([other], slots=41) as receiver:
            taken = await receiver.receive(41, wait=BOUND)
            assert [delivery.message for delivery in taken] == last
            assert await receiver.settle([(taken[0], Done())]) == [None]


async def test_what_was_on_its_way_to_who_leaves_is_no_crash_of_the_next(world: "World") -> None:
    """The server hears that it is to push no more in the midst of a burst, and returns what the channel had not yet."""
    queue, publishing = await world.queue(), list[asyncio.Task[object]]()
    async with FaultProxy.to(world.url, wire=Amqp) as proxy, asyncio.timeout(2 * BOUND):
        backend = await world.another(proxy.url(world.url))

        async def begin_to_publish() -> None:
            publishing.append(asyncio.create_task(world.backend.publish(queue, messages(300))))
            arrived = proxy.replies.count(b"BASIC.DELIVER")
            while proxy.replies.count(b"BASIC.DELIVER") == arrived:  # noqa: ASYNC110 (a list tells nobody)
                await asyncio.sleep(0)

        for _ in range(4):  # now and then all of it has arrived by then
            async with backend.receiver([queue], slots=500) as receiver:
                assert await receiver.receive(1, wait=0.01) == []
                trap = proxy.before(1, begin_to_publish, of=lambda name: name == b"BASIC.CANCEL")
            assert trap.struck
            assert await publishing.pop() == ["stored"] * 300
            async with world.backend.receiver([queue], slots=300) as receiver:
                taken = await receiver.receive(300, wait=BOUND)
                while len(taken) < 300:
                    taken += await receiver.receive(300, wait=BOUND)
                assert Counter(delivery.crashes for delivery in taken) == {0: 300}
                assert await receiver.settle([(delivery, Done()) for delivery in taken]) == [None] * 300
        await backend.aclose()


async def test_no_crash_is_counted_where_nobody_crashed_however_many_take_and_stop(world: "World") -> None:
    """Two processes take and settle, each stops now and then, and a third publishes meanwhile."""
    queue, random = await world.queue(), Random(5)
    seen, crashed, over = Counter[str](), set[str](), asyncio.Event()

    async def work() -> None:
        backend = await world.another()
        while not over.is_set() or (await backend.depth(queue)).ready:
            async with backend.receiver([queue], slots=4) as receiver:
                for _ in range(random.randint(1, 20)):
                    taken = await receiver.receive(2, wait=0.1)
                    for delivery in taken:
                        seen[delivery.message.id] += 1
                        crashed.update([delivery.message.id] * delivery.crashes)
                    await asyncio.sleep(random.uniform(0.0, 0.01))
                    assert await receiver.settle([(one, Done()) for one in taken]) == [None] * len(taken)

    sent = dict[str, int]()  # by which publish
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(work())
        for number in range(150):
            some = messages(random.randint(1, 3))
            sent.update((message.id, number) for message in some)
            await world.backend.publish(queue, some)
            await asyncio.sleep(random.uniform(0.0, 0.02))
        over.set()
    assert seen == Counter(sent.keys())
    assert len({sent[job_id] for job_id in crashed}) <= 1  # what meets a consumer in the instant of its cancellation


async def test_a_receiver_with_one_slot_holds_one_job_and_leaves_the_next_to_who_is_free(world: "World") -> None:
    queue = await world.queue()
    idle_backend = await world.another()
    async with world.backend.receiver([queue]) as busy, idle_backend.receiver([queue]) as idle:
        await world.backend.publish(queue, messages(2))
        [first] = await busy.receive(1, wait=BOUND)
        exchanged = await busy.exchange([(first, Done())], 1, wait=BOUND)
        while not exchanged.deliveries:
            exchanged = await busy.exchange([], 1, wait=BOUND)
        full = asyncio.create_task(busy.exchange([], 0, wait=BOUND))
        [message] = messages(1)
        await world.backend.publish(queue, [message])
        started = time.monotonic()
        [delivery] = await idle.receive(1, wait=BOUND)
        assert delivery.message == message
        assert time.monotonic() - started < BOUND / 2  # else it lay with the busy one
        busy.nudge()
        await full


async def test_what_was_got_and_what_is_pushed_are_together_no_more_than_the_slots(world: "World") -> None:
    queue = await world.queue()
    await world.backend.publish(queue, messages(1))
    async with world.backend.receiver([queue], slots=2) as busy, world.backend.receiver([queue]) as idle:
        assert len(await busy.receive(1)) == 1
        waiting = asyncio.create_task(busy.receive(1, wait=BOUND))
        await world.somebody.until_consumed(queue, by=2)  # it counts what was got as one
        await world.backend.publish(queue, messages(2))
        assert len(await waiting) == 1
        [third] = await idle.receive(1, wait=BOUND)
        assert third.releases == 0  # it lay with nobody before


async def test_what_was_pushed_ahead_is_lost_with_the_line_and_nobody_is_told(world: "World") -> None:
    """But of what somebody has; and all of it comes again."""
    queue, lost = await world.queue(), asyncio.Queue[Delivery]()
    async with FaultProxy.to(world.url, wire=Amqp) as proxy, asyncio.timeout(BOUND):
        backend = await world.another(proxy.url(world.url))
        async with backend.receiver([queue], slots=5, lost=lost.put_nowait) as receiver:
            waiting = asyncio.create_task(receiver.receive(1, wait=BOUND))
            await world.somebody.until_consumed(queue)
            await world.backend.publish(queue, sent := messages(5))
            [first] = await waiting
            while proxy.replies.count(b"BASIC.DELIVER") < 5:  # noqa: ASYNC110 (a list tells nobody)
                await asyncio.sleep(0.01)
            proxy.reset()
            assert await lost.get() is first
            again = list[Delivery]()
            while len(again) < 5:
                again += await receiver.receive(5, wait=BOUND)
            assert lost.empty()
            assert {delivery.message.id for delivery in again} == {message.id for message in sent}
            assert await receiver.settle([(delivery, Done()) for delivery in again]) == [None] * 5
        await backend.aclose()


async def test_the_lease_of_what_was_put_back_begins_when_the_next_call_has_it(world: "World") -> None:
    """It was to be a cancelled call's, and lies there for longer than a lease."""
    queue, other, lapsed = await world.queue(), await world.queue("other"), asyncio.Event()
    for name in (queue, other):
        await world.backend.publish(name, messages(1))
    async with (
        world.backend.receiver([queue], lease=0.2, keep=False) as receiver,
        world.backend.receiver([other], lease=0.3, keep=False, lost=lambda _: lapsed.set()) as clock,
        asyncio.timeout(BOUND),
    ):
        assert (await CancelAt(1, "finished").run(receiver.receive(1))).cancelled
        assert len(await clock.receive(1)) == 1
        await lapsed.wait()
        [delivery] = await receiver.receive(1)
        assert (delivery.crashes, delivery.lost) == (0, False)
        assert delivery.deadline - time.monotonic() > 0.1
        assert await receiver.settle([(delivery, Done())]) == [None]


async def test_a_lease_that_lapses_while_pushes_are_stopped_is_a_crash(world: "World") -> None:
    """What the server returns then it marks alike, whether somebody had it or it was only on its way."""
    queue, lapsed = await world.queue(), asyncio.Event()
    await world.backend.publish(queue, messages(1))
    async with FaultProxy.to(world.url, wire=Amqp) as proxy, asyncio.timeout(BOUND):
        backend = await world.another(proxy.url(world.url))
        options = {"slots": 2, "lease": 0.3, "keep": False}
        async with backend.receiver([queue], **options, lost=lambda _: lapsed.set()) as receiver:
            [first] = await receiver.receive(1)
            trap = proxy.before(1, lapsed.wait, of=lambda name: name == b"BASIC.CANCEL")
            assert await receiver.receive(1, wait=0.01) == []
            assert trap.struck
            [again] = await receiver.receive(1, wait=BOUND)
            assert (again.message, again.crashes, again.number) == (first.message, 1, 2)
        await backend.aclose()


async def test_what_comes_as_a_receiver_is_left_is_released_and_given_to_nobody(world: "World") -> None:
    """It is on its way from the keeper's thread to a call that waits, while the loop stands still."""
    queue = await world.queue()
    receiving = world.backend.receiver([queue])
    receiver = await receiving.__aenter__()
    waiting = asyncio.create_task(receiver.receive(1, wait=BOUND))
    await world.somebody.until_consumed(queue)
    [message] = messages(1)
    await world.backend.publish(queue, [replace(message, delay=0.3)])
    leaving = asyncio.create_task(receiving.__aexit__(None, None, None))
    await asyncio.sleep(0)
    time.sleep(0.6)  # noqa: ASYNC251 (it is to stand still)
    await leaving
    with pytest.raises(Closed):
        await waiting
    async with world.backend.receiver([queue]) as next_one:
        [delivery] = await next_one.receive(1, wait=BOUND)
        assert (delivery.message, delivery.crashes, delivery.releases) == (message, 0, 1)


async def test_who_has_waited_in_vain_leaves_what_comes_later_to_who_asks(world: "World") -> None:
    """The server pushes on to it for a moment only."""
    queue = await world.queue()
    async with world.backend.receiver([queue]) as idle, world.backend.receiver([queue]) as other:
        assert await idle.receive(1, wait=0.01) == []
        await world.somebody.until_consumed(queue, by=0)
        await world.backend.publish(queue, messages(1))
        [delivery] = await other.receive(1)
        assert delivery.releases == 0


async def test_a_nudge_ends_the_wait_of_the_call_after_one_that_was_cancelled(world: "World") -> None:
    """Whichever of the two the keeper's thread is at: it hears of the nudge before it has heard of the cancellation."""
    queue = await world.queue()
    async with world.backend.receiver([queue]) as receiver, asyncio.timeout(2 * BOUND):
        for turns in [*range(0, 100, 5)] * 200:
            gone = asyncio.create_task(receiver.receive(1, wait=60))
            for _ in range(turns):
                await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait({gone})
            following = asyncio.create_task(receiver.receive(1, wait=60))
            await asyncio.sleep(0)
            receiver.nudge()
            assert await following == []


async def test_what_nobody_was_handed_does_not_lapse_as_a_crash(world: "World") -> None:
    """All of it came with the first; each is handed over when the lease of the one before it is over."""
    queue, lost = await world.queue(), asyncio.Queue[Delivery]()
    async with world.backend.receiver([queue], slots=5, lease=0.2, keep=False, lost=lost.put_nowait) as receiver:
        waiting = asyncio.create_task(receiver.receive(1, wait=BOUND))
        await world.somebody.until_consumed(queue)
        await world.backend.publish(queue, sent := messages(5))
        async with asyncio.timeout(BOUND):
            for message in sent:
                [delivery] = await waiting
                assert (delivery.message, delivery.crashes) == (message, 0)
                assert await lost.get() is delivery
                waiting = asyncio.create_task(receiver.receive(1, wait=BOUND))
            [again] = await waiting
    assert (again.message, again.crashes) == (sent[0], 1)


async def test_who_waits_costs_next_to_nothing_whatever_it_waits_for(world: "World") -> None:
    """Jobs, room for one, a nudge, the server's return: by the frames it sends and the time of the processor."""
    queue, other, lost = await world.queue(), await world.queue("other"), asyncio.Event()
    await world.backend.publish(other, messages(2))
    async with FaultProxy.to(world.url, wire=Amqp) as proxy, AsyncExitStack() as stack:
        backend = await world.another(proxy.url(world.url))

        async def a_receiver(*queues: str, **options: Any) -> Receiver:
            return await stack.enter_async_context(backend.receiver(queues, **options))

        async def idle(limit: int, receivers: Sequence[Receiver]) -> list[str]:
            """What they say after half a second, in which they did next to nothing."""
            worked, sent = time.process_time(), proxy.count()
            waiting = [asyncio.create_task(one.exchange([], limit, wait=300.0)) for one in receivers]
            await asyncio.wait(waiting, timeout=0.5)
            assert time.process_time() - worked < 0.3 * 0.5
            assert proxy.count() - sent < 10 * len(receivers)
            for receiver, call in zip(receivers, waiting, strict=True):
                assert not call.done()
                receiver.nudge()
            async with asyncio.timeout(BOUND):
                return [type(one).__name__ for one in await asyncio.gather(*waiting, return_exceptions=True)]

        full = await a_receiver(other, lost=lambda _: lost.set())
        lacking = await a_receiver("nowhere", other)
        for receiver in (full, lacking):
            assert len((await receiver.exchange([], 1, wait=BOUND)).deliveries) == 1
        taking = [await a_receiver(queue), await a_receiver(queue, keep=False), await a_receiver(queue, other, slots=9)]
        assert await idle(1, [full, lacking, *taking]) == ["Exchanged"] * 5
        assert await idle(0, [full, lacking, *taking]) == ["Exchanged"] * 5
        proxy.refuse()
        await lost.wait()
        assert await idle(1, [full, lacking, *taking]) == ["BackendUnavailable"] * 5
        assert await idle(0, [full, lacking, *taking]) == ["Exchanged"] * 5
        await backend.aclose()


@pytest.mark.parametrize("settles", [True, False])
async def test_a_call_that_is_under_way_when_the_backend_closes_is_answered(
    own_broker: Broker, new_world: "type[World]", settles: bool
) -> None:
    """Over a line on which nothing comes through any more."""
    world = await new_world(own_broker.url)  # type: ignore[misc] (a fixture that makes them)
    queue = await world.queue()
    async with FaultProxy.to(own_broker.url, wire=Amqp) as proxy:
        backend = type(world.backend).from_url(proxy.url(own_broker.url), namespace=world.namespace)
        await backend.open()
        await backend.publish(queue, messages(1))
        receiving = backend.receiver([queue])
        receiver = await receiving.__aenter__()
        [delivery] = await receiver.receive(1, wait=BOUND)
        proxy.up.black_hole()
        pairs = [(delivery, Retry(0.0))] if settles else []
        calling = asyncio.create_task(receiver.exchange(pairs, 0, wait=60))
        await asyncio.sleep(0)
        async with asyncio.timeout(BOUND):
            await backend.aclose()
            await asyncio.wait({calling})
        if settles:
            assert [type(answer) for answer in calling.result().settled] == [BackendUnavailable]
        else:
            assert isinstance(calling.exception(), Closed)
        await receiving.__aexit__(None, None, None)
