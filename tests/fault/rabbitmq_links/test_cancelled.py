"""Every call cancelled at each of its awaits: it is done or not, can be repeated, and leaves no channel behind."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mindtrace.jobs import (
    Dead,
    Delivery,
    Done,
    QueueSpec,
    RabbitMQBackend,
    Receiver,
    Release,
    Retry,
    Settlement,
)
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.faults import MOMENTS, CancelAt, every_suspension
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.rabbitmq, pytest.mark.chaos]

ALL = DeadFilter()
Opened = Callable[..., Awaitable[RabbitMQBackend]]
Ctl = Callable[[str], Awaitable[str]]
Verb = Callable[[RabbitMQBackend], Awaitable[object]]
VERBS: dict[str, tuple[Verb, tuple[int, int]]] = {  # and how many are ready and dead once it is done
    "declare": (lambda b: b.declare(QueueSpec("jobs")), (2, 1)),
    "publish one": (lambda b: b.publish("jobs", messages("x")), (3, 1)),
    "publish some": (lambda b: b.publish("jobs", messages("x", "y", "z")), (5, 1)),
    "depth": (lambda b: b.depth("jobs"), (2, 1)),
    "clean": (lambda b: b.clean("jobs"), (0, 1)),
    "list": (lambda b: b.dead_letters("jobs").list(ALL), (2, 1)),
    "get": (lambda b: b.dead_letters("jobs").get("d"), (2, 1)),
    "replay": (lambda b: b.dead_letters("jobs").replay(ALL), (3, 0)),
    "purge": (lambda b: b.dead_letters("jobs").purge(["d"]), (2, 0)),
}
SETTLEMENTS: dict[str, tuple[Settlement, tuple[int, int]]] = {
    "done": (Done(), (1, 0)),
    "retried": (Retry(0.0), (2, 0)),
    "dead": (Dead("rejected"), (1, 1)),
    "released": (Release(), (2, 0)),
}


def messages(*ids: str) -> list[Message]:
    return [Message(job_id, b"{}") for job_id in ids]


async def awaited(call: Awaitable[Any]) -> Any:
    return await call


async def counts(backend: RabbitMQBackend, *wanted: tuple[int, int]) -> None:
    """Waits until so many are ready and dead: what was given back is there a moment later."""
    seen = (-1, -1)
    try:
        async with asyncio.timeout(5):
            while seen not in wanted:
                depth = await backend.depth("jobs")
                seen = depth.ready, depth.dead
    except TimeoutError:
        raise AssertionError(f"{seen} instead of one of {wanted}") from None


async def channels(ctl: Ctl) -> int:
    """How many the server has."""
    return int(await ctl("length(rabbit_channel:list())"))


async def at_most(count: int, ctl: Ctl) -> None:
    """Waits until there are no more than so many channels."""
    deadline = time.monotonic() + 15
    while (there := await channels(ctl)) > count:
        assert time.monotonic() < deadline, there


async def emptied(backend: RabbitMQBackend) -> None:
    await backend.clean("jobs")
    await backend.dead_letters("jobs").purge(ALL)


@pytest.mark.parametrize(("verb", "after"), VERBS.values(), ids=VERBS.keys())
async def test_a_call_that_is_cancelled_is_done_or_not_and_can_be_repeated(
    opened: Opened, verb: Verb, after: tuple[int, int]
) -> None:
    backend = await opened()

    async def scenario(fault: CancelAt) -> None:
        await emptied(backend)
        await backend.publish("jobs", messages("d", "a", "b"))
        async with backend.receiver(["jobs"]) as receiver:
            [delivery] = await receiver.receive(1, wait=5.0)
            await receiver.settle([(delivery, Dead("rejected"))])
        await counts(backend, (2, 1))
        ended = await fault.run(awaited(verb(backend)))
        assert ended.cancelled or isinstance(ended.error, TimeoutError) or ended.error is None
        # Put back and not yet taken from the dead letters: there twice rather than not at all.
        await counts(backend, *([(2, 1), after, (3, 1)] if ended.error else [after]))

    clean = CancelAt(0)
    await scenario(clean)
    # To read dead letters is a hundred gets, each with an await like that of the one before it.
    for k in (k for k in range(1, clean.seen + 1) if k <= 8 or k % 50 == 0 or k > clean.seen - 4):
        for moment in MOMENTS[:2]:
            fault = CancelAt(k, moment)
            await scenario(fault)
            assert fault.struck == 1 or k > 8, fault  # how often it looks whether all is back varies


@pytest.mark.parametrize(("settlement", "after"), SETTLEMENTS.values(), ids=SETTLEMENTS.keys())
async def test_an_exchange_that_is_cancelled_loses_nothing_and_counts_no_crash(
    opened: Opened, settlement: Settlement, after: tuple[int, int]
) -> None:
    """It settles one job and takes another, which the next call has."""
    backend = await opened()

    async def scenario(fault: CancelAt) -> None:
        await emptied(backend)
        await backend.publish("jobs", messages("a", "b"))
        async with backend.receiver(["jobs"], slots=2) as receiver:
            [first] = await receiver.receive(1, wait=5.0)
            ended = await fault.run(awaited(receiver.exchange([(first, settlement)], 1, wait=0.0)))
            if ended.error:
                assert len(await receiver.receive(1, wait=5.0)) == 1, "what the exchange took is nobody's"
            assert len(await receiver.extend([first])) == 1
        await counts(backend, after)
        async with backend.receiver(["jobs"], slots=3) as receiver:
            taken = await receiver.receive(3)
            assert len(taken) == after[0]
            assert [one.crashes for one in taken] == [0] * len(taken)
            assert await receiver.settle([(one, Done()) for one in taken]) == [None] * len(taken)

    assert await every_suspension(scenario, twice=False) > 0


@pytest.mark.parametrize("by_whom", ["the next call", "the next receiver"])
async def test_a_receive_that_is_cancelled_while_a_job_arrives_leaves_it_to_the_next(
    opened: Opened, ctl: Ctl, by_whom: str
) -> None:
    """At each turn of the loop from long before until the job is there; it counts neither a crash nor a second run."""
    backend = await opened()

    async def scenario(fault: CancelAt) -> None:
        publishing = list[asyncio.Task[object]]()

        async def publish() -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            assert await backend.publish("jobs", messages("a")) == ["stored"]

        async def receive(receiver: Receiver) -> list[Delivery]:
            publishing.append(asyncio.create_task(publish()))
            return await receiver.receive(1, wait=5.0)

        async with backend.receiver(["jobs"]) as receiver:
            ended = await fault.run(receive(receiver))
            await asyncio.wait(publishing)
            assert ended.cancelled or isinstance(ended.error, TimeoutError) or ended.value
            if by_whom == "the next call" or ended.value:
                taken = ended.value or await receiver.receive(1, wait=5.0)
                assert await receiver.settle([(one, Done()) for one in taken]) == [None]
        if by_whom == "the next receiver" and not ended.value:
            async with backend.receiver(["jobs"]) as receiver:
                taken = await receiver.receive(1, wait=5.0)
                assert await receiver.settle([(one, Done()) for one in taken]) == [None]
        assert [(one.message.id, one.attempt, one.crashes) for one in taken] == [("a", 1, 0)]
        assert (await backend.depth("jobs")).ready == 0

    await scenario(CancelAt(0))
    before = await channels(ctl)
    for moment in MOMENTS:
        k = 0
        while True:
            fault = CancelAt(k := k + 1, moment)
            await scenario(fault)
            if not fault.struck:
                break
        assert k > 20
    await at_most(before + 4, ctl)


async def test_hundreds_of_calls_that_are_cancelled_or_made_at_once_leave_few_channels_behind(
    opened: Opened, ctl: Ctl
) -> None:
    """Four, which the next calls use."""
    backend = await opened()
    before = await channels(ctl)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: backend.depth("jobs"),
        lambda: backend.declare(QueueSpec("other")),
        lambda: backend.delete("other", force=True),
        lambda: backend.clean("jobs"),
        backend.queues,
    ]

    async with asyncio.timeout(30):
        for turns in [*range(1, 21)] * 4:
            cancelled = [asyncio.create_task(awaited(call())) for call in calls]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in cancelled:
                task.cancel()
            await asyncio.wait(cancelled)
    await at_most(before + 4, ctl)
    await asyncio.gather(*(call() for call in calls * 40), return_exceptions=True)
    await at_most(before + 4, ctl)
    assert await backend.depth("jobs")


async def test_what_is_cancelled_while_it_opens_or_closes_leaves_no_connection_and_no_channel(
    broker: Broker, namespace: str, opened: Opened, ctl: Ctl
) -> None:
    there = "{length(rabbit_channel:list()), length(rabbit_networking:connections())}"
    await opened()
    before = await ctl(there)

    async def struck(fault: CancelAt) -> bool:
        backend = RabbitMQBackend.from_url(broker.url, namespace=namespace)

        async def lived() -> None:
            try:
                await backend.open()
                async with backend.receiver(["jobs"]) as receiver:
                    await receiver.receive(1)
            finally:
                await backend.aclose()

        await fault.run(lived())
        await backend.aclose()
        return fault.struck > 0

    for moment in MOMENTS:
        k = 1
        while await struck(CancelAt(k, moment)):
            k += 1
        assert k > 10
    async with asyncio.timeout(15):
        while await ctl(there) != before:
            pass
