"""A lease is kept while its receiver is there, and whoever cannot keep it says so."""

import asyncio
import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from redis.asyncio import Redis

from mindtrace.jobs import Done, QueueSpec, RedisBackend
from mindtrace.jobs.delivery import Delivery
from mindtrace.jobs.testing import FaultProxy
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


def messages(*ids: str) -> list[Message]:
    return [Message(job_id, b"{}") for job_id in ids]


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Whoever opens a file, a socket or a loop is told that there are too many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# A loop that could not be made is complained of when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_keeper_that_cannot_start_is_an_error_at_once_and_the_next_receiver_is_kept(
    backend: RedisBackend, queue: str
) -> None:
    await backend.publish(queue, messages("a"))
    with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
        async with backend.receiver([queue]):
            pass
    gc.collect()  # here, or another test would be blamed
    async with backend.receiver([queue], lease=0.6) as kept, backend.receiver([queue]) as hungry:
        [delivery] = await kept.receive(1)
        assert await hungry.receive(1, wait=1.5) == []
        assert await kept.settle([(delivery, Done())]) == [None]


async def test_all_that_is_held_is_kept_however_much_and_of_however_many_queues(backend: RedisBackend) -> None:
    """More of one queue than one call extends."""
    names = ["many", "few"]
    for name, count in zip(names, (600, 5), strict=True):
        await backend.declare(QueueSpec(name))
        await backend.publish(name, messages(*(f"{name}{n}" for n in range(count))))
    lost: list[Delivery] = []
    async with (
        backend.receiver(names, slots=700, lease=1.2, lost=lost.append) as kept,
        backend.receiver(names, slots=700) as hungry,
    ):
        held: list[Delivery] = []
        async with asyncio.timeout(5):
            while len(held) < 605:
                held += await kept.receive(605 - len(held))
        assert await hungry.receive(700, wait=2.5) == []
        assert await kept.settle([(delivery, Done()) for delivery in held]) == [None] * 605
    assert lost == []


async def test_the_keeper_whose_connection_breaks_takes_another(redis_url: str, namespace: str, server: Redis) -> None:
    """Twice within one lease."""
    async with FaultProxy.to(redis_url) as proxy:
        backend = RedisBackend.from_url(proxy.url(redis_url), namespace=namespace)
        await backend.open()
        await backend.declare(QueueSpec("jobs"))
        await backend.publish("jobs", messages("a"))
        async with backend.receiver(["jobs"], lease=1.5) as kept, backend.receiver(["jobs"]) as hungry:
            [delivery] = await kept.receive(1)
            first = delivery.deadline
            proxy.cut_reply(1, of=lambda name: name == b"EVALSHA")
            for _ in range(2):
                before = delivery.deadline
                async with asyncio.timeout(5):
                    while delivery.deadline == before:  # noqa: ASYNC110 (the keeper tells nobody)
                        await asyncio.sleep(0.01)
                listed: list[dict[str, str]] = await server.client_list()
                [keeper] = [one["id"] for one in listed if one["name"] == "mtjobs:keeper"]
                await server.client_kill_filter(_id=keeper)
            assert await hungry.receive(1, wait=1.5) == []
            assert delivery.deadline > first
            assert await kept.settle([(delivery, Done())]) == [None]
        await backend.aclose()
