"""What a receiver promises whatever becomes of its calls, and what it costs while there is nothing to do."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from mindtrace.jobs import Depth, Done, QueueSpec, RedisBackend
from mindtrace.jobs.testing import FaultProxy
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


def messages(*ids: str) -> list[Message]:
    return [Message(job_id, b"{}") for job_id in ids]


async def scripts_called(server: Redis) -> int:
    stats: dict[str, Any] = await server.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy.to(redis_url) as proxy:
        yield proxy


@pytest.fixture
async def behind(proxy: FaultProxy, redis_url: str, namespace: str, queue: str) -> AsyncIterator[RedisBackend]:
    """Another backend of the same queue, over the proxy."""
    backend = RedisBackend.from_url(proxy.url(redis_url), namespace=namespace)
    await backend.open()
    yield backend
    await backend.aclose()


# --- one call to a queue in flight


async def test_a_claim_and_a_settlement_of_which_both_replies_are_lost_are_each_done_once(
    proxy: FaultProxy, behind: RedisBackend, backend: RedisBackend, queue: str
) -> None:
    """What the claim took is held, and leased to nobody else."""
    await backend.publish(queue, messages("a", "b", "c"))
    async with behind.receiver([queue], slots=10, keep=False) as receiver:
        taken = await receiver.receive(3)
        await backend.publish(queue, messages(*(f"k{n}" for n in range(10))))
        proxy.down.black_hole()
        claim = asyncio.create_task(receiver.receive(5))
        async with asyncio.timeout(5):
            while (await backend.depth(queue)).leased != 8:  # noqa: ASYNC110 (a depth rings no bell)
                await asyncio.sleep(0.01)
        claim.cancel()
        settling = asyncio.create_task(receiver.settle([(delivery, Done()) for delivery in taken]))
        await asyncio.sleep(0.2)  # for the settlement to get there too, if it is sent beside the claim
        proxy.reset()
        proxy.down.flow()
        assert await settling == [None] * 3
        assert len(await receiver.receive(5)) == 5
        assert await backend.depth(queue) == Depth(ready=5, scheduled=0, leased=5, dead=0)


async def test_a_claim_that_arrives_after_a_later_one_takes_nothing(
    backend: RedisBackend, queue: str, server: Redis, namespace: str
) -> None:
    """Bytes of a connection that was given up, minutes old: nobody would hold what they took."""
    async with backend.receiver([queue], slots=10, keep=False) as receiver:
        await backend.publish(queue, messages(*(f"j{n}" for n in range(6))))
        async with server.monitor() as monitor:
            assert len(await receiver.receive(2)) == 2
            while not (said := (await monitor.next_command())["command"]).startswith("EVALSHA"):
                pass
        assert len(await receiver.receive(1)) == 1
        # Its words have no spaces and no quotes, but for what is empty; there was nothing to settle.
        late = [word for word in said.split(" ") if word]
        answer: Any = await server.execute_command(*late)
        assert answer[5:] == []
        assert await backend.depth(queue) == Depth(ready=3, scheduled=0, leased=3, dead=0)


# --- several queues


async def test_strict_takes_from_the_first_queue_while_there_is_anything_in_it(backend: RedisBackend) -> None:
    names = ["first", "second", "third"]
    for name in names:
        await backend.declare(QueueSpec(name))
        await backend.publish(name, messages(*(f"{name}{n}" for n in range(4))))
    async with backend.receiver(names, slots=20, strict=True) as receiver:
        found = [await receiver.receive(3) for _ in range(4)]
    assert [[delivery.queue for delivery in some] for some in found] == [
        ["first"] * 3,
        ["first", "second", "second"],
        ["second", "second", "third"],
        ["third"] * 3,
    ]


async def test_without_it_each_queue_has_its_turn_though_the_first_is_never_empty(backend: RedisBackend) -> None:
    names = ["first", "second", "third"]
    for name in names:
        await backend.declare(QueueSpec(name))
        await backend.publish(name, messages(*(f"{name}{n}" for n in range(9))))
    async with backend.receiver(names, slots=20) as receiver:
        one_by_one = [(await receiver.receive(1))[0].queue for _ in range(6)]
        assert sorted(one_by_one[:3]) == sorted(one_by_one[3:]) == names
        assert sorted(delivery.queue for delivery in await receiver.receive(6)) == sorted(names * 2)


async def test_a_queue_with_little_leaves_its_share_to_the_others(backend: RedisBackend) -> None:
    for name, count in (("much", 9), ("little", 1), ("nothing", 0)):
        await backend.declare(QueueSpec(name))
        await backend.publish(name, messages(*(f"{name}{n}" for n in range(count))))
    async with backend.receiver(["little", "nothing", "much"], slots=20) as receiver:
        found = await receiver.receive(9)
    assert sorted(delivery.queue for delivery in found) == ["little"] + ["much"] * 8


# --- idle


async def test_an_idle_worker_looks_once_a_second(backend: RedisBackend, queue: str, server: Redis) -> None:
    """It waits a second at a time; the look at the end of one wait and at the start of the next are the same."""
    async with backend.receiver([queue], keep=False) as receiver:
        before = await scripts_called(server)
        for _ in range(3):
            assert await receiver.receive(1, wait=1.0) == []
        assert await scripts_called(server) - before <= 4


@pytest.mark.parametrize("after", [0.5, 1.4])
async def test_an_idle_receiver_hears_at_once_however_long_it_has_waited(
    backend: RedisBackend, queue: str, after: float
) -> None:
    """A pop at the bell ends after a second; there is another one then, and not with the next look."""
    async with backend.receiver([queue]) as receiver:
        waiting = asyncio.create_task(receiver.receive(1, wait=10.0))
        await asyncio.sleep(after)
        published = time.monotonic()
        await backend.publish(queue, messages("a"))
        assert len(await waiting) == 1
        assert time.monotonic() - published < 0.3


async def test_a_ring_that_comes_for_one_who_no_longer_waits_wakes_another(backend: RedisBackend, queue: str) -> None:
    """Its pop goes on for a second, and is the first in the line of those that wait at the bell."""
    async with backend.receiver([queue]) as gone, backend.receiver([queue]) as waits:
        assert await gone.receive(1, wait=0.1) == []
        waiting = asyncio.create_task(waits.receive(1, wait=10.0))
        await asyncio.sleep(0.2)
        published = time.monotonic()
        await backend.publish(queue, messages("a"))
        assert len(await waiting) == 1
        assert time.monotonic() - published < 0.3
