"""What a connection promises: each call its own answer, whatever the server forgets, refuses or garbles."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from random import Random
from typing import Any

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from mindtrace.jobs import BackendFull, BackendUnavailable, Closed, Depth, Done, QueueSpec, RedisBackend
from mindtrace.jobs.backends.redis.address import Address
from mindtrace.jobs.backends.redis.link import Link
from mindtrace.jobs.testing import FaultProxy, LeakGuard, brokers
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.proxy import Reply, Resp
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


def messages(*ids: str, body: bytes = b"{}") -> list[Message]:
    return [Message(job_id, body) for job_id in ids]


@pytest.fixture
def broker() -> Iterator[Broker]:
    """One whose settings may be changed."""
    with brokers.redis(private=True) as broker:
        yield broker


@pytest.fixture
async def alone(broker: Broker) -> AsyncIterator[RedisBackend]:
    backend = RedisBackend.from_url(broker.url)
    await backend.open()
    await backend.declare(QueueSpec("jobs"))
    yield backend
    await backend.aclose()


# --- forgotten, full, refused


async def test_a_full_server_that_forgot_the_scripts_has_stored_nothing_and_says_so(
    broker: Broker, alone: RedisBackend
) -> None:
    """Again and again: a script that is refused is not learnt."""
    with BlockingRedis.from_url(broker.url) as server:
        server.script_flush()
        server.config_set("maxmemory", 1)
        for _ in range(2):
            [outcome] = await alone.publish("jobs", messages("a"))
            assert isinstance(outcome, BackendFull)
        server.config_set("maxmemory", 0)
    assert await alone.publish("jobs", messages("a")) == ["stored"]


async def test_a_bell_that_is_refused_the_login_costs_a_look_a_second_and_no_job(
    broker: Broker, alone: RedisBackend
) -> None:
    """The password was changed since: the connection for commands is still logged in."""
    with BlockingRedis.from_url(broker.url) as server:
        server.config_set("requirepass", "another")
        async with alone.receiver(["jobs"], keep=False) as receiver:
            began = server.info("commandstats")["cmdstat_evalsha"]["calls"]
            assert await receiver.receive(1, wait=1.5) == []
            assert server.info("commandstats")["cmdstat_evalsha"]["calls"] - began <= 4
            waiting = asyncio.create_task(receiver.receive(1, wait=10.0))
            await asyncio.sleep(0.1)
            await alone.publish("jobs", messages("a"))
            async with asyncio.timeout(2):
                assert len(await waiting) == 1


# --- slow, silent


async def test_a_large_publish_over_a_slow_line_is_not_taken_for_silence(
    redis_url: str, namespace: str, backend: RedisBackend, queue: str
) -> None:
    """For longer than a server may be silent nothing is answered, and all the time bytes flow."""
    async with FaultProxy.to(redis_url) as proxy:
        slow = RedisBackend.from_url(proxy.url(redis_url), namespace=namespace)
        await slow.open()
        proxy.up.throttle(2**20)
        began = time.monotonic()
        large = messages(*(f"j{n}" for n in range(6)), body=b"x" * 2**20)
        assert await slow.publish(queue, large) == ["stored"] * 6
        assert time.monotonic() - began > 5.0
        assert proxy.accepted == 1
        proxy.calm()
        await slow.aclose()


# --- what cannot be read


class Garbles(Resp):
    """In what is said of a job that is handed out for the first time there is a number that is none, once."""

    left = 1

    def replies(self, data: bytes) -> Iterator[Reply]:
        for reply in super().replies(data):
            garbled = reply.data
            if Garbles.left and b"1 0 0 0 -1" in garbled:
                Garbles.left -= 1
                garbled = garbled.replace(b"1 0 0 0 -1", b"1 0 0 ? -1", 1)
            yield Reply(garbled, reply.answers)


async def test_an_answer_that_cannot_be_read_is_an_error_and_the_receiver_goes_on(
    redis_url: str, namespace: str, backend: RedisBackend, queue: str
) -> None:
    Garbles.left = 1
    await backend.publish(queue, messages("a"))
    async with FaultProxy.to(redis_url, wire=Garbles) as proxy:
        garbled = RedisBackend.from_url(proxy.url(redis_url), namespace=namespace)
        await garbled.open()
        async with garbled.receiver([queue], slots=2) as receiver, asyncio.timeout(4):
            with pytest.raises(BackendUnavailable, match="cannot be read"):
                await receiver.receive(1)
            await backend.publish(queue, messages("b"))
            [delivery] = await receiver.receive(1)
            assert delivery.message.id == "b"
            assert await receiver.settle([(delivery, Done())]) == [None]
        await garbled.aclose()


async def test_a_reply_of_one_caller_that_cannot_be_read_leaves_the_line_to_the_others(redis_url: str) -> None:
    link = Link(Address.of_url(redis_url), "test", Random(1))
    link.start()
    await link.until_connected(5.0)
    answers: list[Any] = []
    heard = asyncio.Event()

    def reads(reply: Any, error: BaseException | None) -> None:
        answers.append(error or reply)
        if len(answers) == 2:
            heard.set()

    def cannot_read(reply: Any, error: BaseException | None) -> None:
        raise LookupError

    deadline = time.monotonic() + 10.0
    link.request(("CLIENT", "ID"), reads, deadline=deadline)
    link.request(("PING",), cannot_read, deadline=deadline)
    link.request(("CLIENT", "ID"), reads, deadline=deadline)
    async with asyncio.timeout(10):
        await heard.wait()
    assert isinstance(answers[0], int)
    assert answers[0] == answers[1]
    await link.aclose()


# --- opening, closing


async def test_whatever_the_moment_at_which_it_is_closed_a_backend_leaves_nothing_behind(
    redis_url: str, server: Redis, namespace: str
) -> None:
    """While it connects, while it asks, and when it is open, with a receiver or without; and it can be opened again."""

    async def clients() -> int:
        listed: list[dict[str, str]] = await server.client_list()
        return sum(one["name"].startswith("mtjobs:") for one in listed)

    backend = RedisBackend.from_url(redis_url, namespace=namespace)
    await clients()
    async with LeakGuard(counters={"clients": clients}):
        for steps in (0, 1, 2, 5, 10, 20, 40, 80):
            opening = asyncio.create_task(backend.open())
            for _ in range(steps):
                await asyncio.sleep(0)
            await backend.aclose()
            [outcome] = await asyncio.gather(opening, return_exceptions=True)
            assert outcome is None or isinstance(outcome, Closed)
        await backend.open()
        await backend.declare(QueueSpec("jobs"))
        await backend.publish("jobs", messages("a"))
        async with backend.receiver(["jobs"]) as receiver:
            assert len(await receiver.receive(1, wait=1.0)) == 1
            assert await receiver.receive(1, wait=0.1) == []
        assert await backend.depth("jobs") == Depth(ready=1, scheduled=0, leased=0, dead=0)
        await backend.aclose()
