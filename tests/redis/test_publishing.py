"""Publishes that share a call: each caller has its own outcome and its own place."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from mindtrace.jobs import BackendUnavailable, ConfigError, Done, QueueFull, QueueSpec, RedisBackend
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

MIB = 2**20


def messages(*ids: str, body: bytes = b"{}") -> list[Message]:
    return [Message(job_id, body) for job_id in ids]


async def scripts_called(server: Redis) -> int:
    stats: dict[str, Any] = await server.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


async def ids_of(backend: RedisBackend, queue: str) -> list[str]:
    """All there are, in the order in which they are handed out."""
    found: list[str] = []
    async with backend.receiver([queue], slots=1000) as receiver:
        while some := await receiver.receive(500):
            found += [delivery.message.id for delivery in some]
            await receiver.settle([(delivery, Done()) for delivery in some])
    return found


# --- full


async def test_what_is_published_after_a_refusal_comes_behind_what_shared_a_call_with_it(backend: RedisBackend) -> None:
    """Together they did not fit, and each is tried by itself; `second` comes while that is not known yet."""
    await backend.declare(QueueSpec("small", max_length=10))
    first = asyncio.create_task(backend.publish("small", messages("first")))
    many = asyncio.create_task(backend.publish("small", messages(*(f"x{n}" for n in range(20)))))
    await asyncio.sleep(0)  # both have been handed in
    await asyncio.sleep(0)  # and sent
    second = asyncio.create_task(backend.publish("small", messages("second")))
    assert await first == await second == ["stored"]
    assert [type(outcome) for outcome in await many] == [QueueFull] * 20
    assert await ids_of(backend, "small") == ["first", "second"]


async def test_a_full_queue_is_filled_to_the_last_place_by_callers_of_one_tick(backend: RedisBackend) -> None:
    """Each as a whole or not at all."""
    await backend.declare(QueueSpec("small", max_length=10))
    sizes = [4, 4, 4, 2, 1]
    outcomes = await asyncio.gather(
        *(backend.publish("small", messages(*(f"{at}-{n}" for n in range(size)))) for at, size in enumerate(sizes))
    )
    assert [["stored"] * len(of) == of for of in outcomes] == [True, True, False, True, False]
    assert (await backend.depth("small")).ready == 10


# --- what cannot be stored


@pytest.mark.parametrize("ids", [["\ud800"], ["fits", "\ud800"]])
async def test_a_batch_that_cannot_be_packed_is_its_callers_error_and_the_next_publish_works(
    backend: RedisBackend, queue: str, ids: list[str]
) -> None:
    async with asyncio.timeout(5):
        outcomes = await backend.publish(queue, messages(*ids))
        assert [type(outcome) for outcome in outcomes] == [ConfigError] * len(ids)
        assert await backend.publish(queue, messages("next")) == ["stored"]
    assert await ids_of(backend, queue) == ["next"]


async def test_an_error_out_of_the_middle_of_the_script_leaves_it_open_whether_the_job_is_there(
    backend: RedisBackend, queue: str, server: Redis, namespace: str
) -> None:
    """Somebody else wrote to the bell: the job is stored, and ringing for it fails."""
    bell = f"{namespace}:{{{queue}}}:bell"
    await server.set(bell, "text")
    [outcome] = await backend.publish(queue, messages("a"))
    assert isinstance(outcome, BackendUnavailable)
    assert outcome.maybe_published
    await server.delete(bell)
    assert await ids_of(backend, queue) == ["a"]


# --- how many calls


@pytest.mark.parametrize(
    ("callers", "each", "size", "calls"),
    [
        pytest.param(1, 500, 2, 1, id="as many as one call takes"),
        pytest.param(1, 1001, 2, 3, id="more than that"),
        pytest.param(1, 16, MIB, 1, id="16 MiB"),
        pytest.param(1, 33, MIB, 3, id="more than that in bytes"),
        pytest.param(500, 1, 2, 1, id="500 callers of one tick"),
        pytest.param(501, 1, 2, 2, id="one more"),
        pytest.param(3, 1, 700_000, 3, id="callers with much to carry wait for nobody else's"),
    ],
)
async def test_what_is_handed_in_at_once_takes_as_few_calls_as_there_may_be_and_keeps_its_order(
    backend: RedisBackend, queue: str, server: Redis, callers: int, each: int, size: int, calls: int
) -> None:
    batches = [[f"{caller:03}-{n:04}" for n in range(each)] for caller in range(callers)]
    before = await scripts_called(server)
    outcomes = await asyncio.gather(*(backend.publish(queue, messages(*ids, body=b"x" * size)) for ids in batches))
    assert await scripts_called(server) - before == calls
    assert outcomes == [["stored"] * each] * callers
    assert await ids_of(backend, queue) == [job_id for ids in batches for job_id in ids]


async def test_another_publish_goes_between_the_parts_of_a_large_one(
    backend: RedisBackend, queue: str, server: Redis
) -> None:
    """To another queue: there is a call of each queue under way, and none is longer than 16 MiB."""
    await backend.declare(QueueSpec("small"))
    large = asyncio.create_task(backend.publish(queue, messages(*(f"j{n}" for n in range(64)), body=b"x" * MIB)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await backend.publish("small", messages("a")) == ["stored"]
    assert not large.done()
    assert await large == ["stored"] * 64
    await backend.clean(queue)
