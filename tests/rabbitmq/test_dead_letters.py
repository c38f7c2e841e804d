"""Many dead letters on RabbitMQ, from two places at once: list, count, replay and purge agree."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from mindtrace.jobs import Dead, Done, JobNotFound, QueueInUse, QueueNotFound, Retry, RunError
from mindtrace.jobs.backend import DeadLetters
from mindtrace.jobs.delivery import DeadFilter, DeadRecord
from mindtrace.jobs.job import JobId, new_job_id
from mindtrace.jobs.wire import Message

if TYPE_CHECKING:
    from tests.rabbitmq.conftest import World

NewWorld = Callable[..., Awaitable["World"]]

pytestmark = [pytest.mark.anyio, pytest.mark.rabbitmq]

ALL = DeadFilter()
PATIENCE = 30.0


async def died(world: "World", count: int, queue: str = "jobs") -> list[JobId]:
    """So many jobs that died one after the other, half of them of another reason; oldest first."""
    messages = [Message(new_job_id(), b"%d" % number) for number in range(count)]
    assert await world.backend.publish(queue, messages) == ["stored"] * count
    left = count
    async with asyncio.timeout(PATIENCE), world.backend.receiver([queue], slots=count) as receiver:
        while left:
            deliveries = await receiver.receive(count, wait=PATIENCE)
            numbers = {delivery: int(delivery.message.body) for delivery in deliveries}
            settlements = [(each, Dead("timeout" if numbers[each] % 2 else "rejected")) for each in deliveries]
            assert await receiver.settle(settlements) == [None] * len(deliveries)
            left -= len(deliveries)
    return [message.id for message in messages]


async def pages(letters: DeadLetters, limit: int, where: DeadFilter = ALL) -> list[DeadRecord]:
    records, cursor = list[DeadRecord](), None
    while True:
        page = await letters.list(where, limit=limit, cursor=cursor)
        records += page.records
        if page.cursor is None:
            return records
        assert len(page.records) == limit
        cursor = page.cursor


async def ran(world: "World", queue: str, count: int) -> list[JobId]:
    """The ids of so many jobs, and that there are no more."""
    ids = list[JobId]()
    async with asyncio.timeout(PATIENCE), world.backend.receiver([queue], slots=1000) as receiver:
        while len(ids) < count:
            deliveries = await receiver.receive(1000, wait=PATIENCE)
            ids += [delivery.message.id for delivery in deliveries]
            await receiver.settle([(delivery, Done()) for delivery in deliveries])
        assert await receiver.receive(1) == []
    return ids


@pytest.mark.chaos
async def test_two_thousand_dead_letters_are_listed_replayed_and_purged_as_they_are_counted(world: "World") -> None:
    queue, letters = await world.queue(), world.backend.dead_letters("jobs")
    ids = await died(world, 2000)
    assert await letters.count() == 2000
    assert (await world.backend.depth(queue)).dead == 2000
    records = await pages(letters, 1500)
    assert [record.message.id for record in records] == ids[::-1]
    assert [int(record.message.body) for record in records] == [*range(1999, -1, -1)]
    rejected = (await letters.list(DeadFilter(reason="rejected"), limit=300)).records
    assert [record.message.id for record in rejected] == ids[1998:1398:-2]
    since = records[99].died_at
    assert len(await pages(letters, 1000, DeadFilter(since=since))) == 100
    assert (await letters.get(ids[1000])).message.body == b"1000"

    assert await letters.replay(DeadFilter(reason="rejected")) == 1000
    assert await letters.count() == 1000
    assert await ran(world, queue, 1000) == ids[::2]
    assert await letters.replay(ids[1:101:2]) == 50
    assert await ran(world, queue, 50) == ids[1:101:2]
    assert await letters.purge(ids[101:201:2]) == 50
    assert await letters.count() == 900
    with pytest.raises(JobNotFound):
        await letters.purge([ids[-1], ids[0]])
    assert [record.message.id for record in await pages(letters, 1000)] == ids[201::2][::-1]
    assert await letters.purge(ALL) == 900
    assert (await letters.count(), await letters.purge(ALL), await letters.replay(ALL)) == (0, 0, 0)


async def test_two_replays_at_once_yield_one_job(world: "World") -> None:
    """Of one process and of two; who came second finds none, and none is lost."""
    queue = await world.queue()
    other = await world.another()
    here, there = world.backend.dead_letters(queue), other.dead_letters(queue)
    for pair in ((here, here), (here, there)):
        ids = await died(world, 200)
        counts = await asyncio.gather(*(letters.replay(ALL) for letters in pair))
        assert sum(counts) == 200
        assert sorted(await ran(world, queue, 200)) == sorted(ids)
        assert await here.count() == 0
        [job_id] = await died(world, 1)
        outcomes = await asyncio.gather(*(letters.replay([job_id]) for letters in pair), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes if outcome != 1] == [JobNotFound]
        assert await ran(world, queue, 1) == [job_id]


async def test_dead_letters_that_another_process_reads_keep_the_queue_from_being_deleted(world: "World") -> None:
    """Then they are in no queue, and nothing to be counted. With the last of who read that is over."""
    queue = await world.queue()
    other = await world.another()
    await died(world, 5)
    begun = asyncio.Event()
    replaying = asyncio.create_task(
        other.dead_letters(queue).replay(ALL, rate=4, progress=lambda done, _: begun.set() if done else None)
    )
    await begun.wait()
    with pytest.raises(QueueInUse, match="reading its dead letters"):
        await world.backend.delete(queue)
    assert await replaying == 5
    assert len(await ran(world, queue, 5)) == 5
    await world.somebody.until_consumed(queue, by=0)  # a busy server counts who has just left for a moment
    await world.backend.delete(queue)
    await world.somebody.until(f"{queue}.reading.hold", None)


async def test_who_is_cancelled_while_reading_is_no_reader_any_more_wherever_it_was(world: "World") -> None:
    """Else the queue could not be deleted as long as its connection lasts."""
    queue = await world.queue()
    await died(world, 3)
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert len((await world.backend.dead_letters(queue).list(ALL)).records) == 3
    whole = loop.time() - began
    for step in range(200):
        reading = asyncio.create_task(world.backend.dead_letters(queue).list(ALL))
        await asyncio.sleep(whole * step / 160)
        reading.cancel()
        await asyncio.wait({reading})
    await world.somebody.until(f"{queue}.reading.hold", None)
    await world.somebody.until(f"{queue}.dead", 3)


@pytest.mark.parametrize("ends", ["by a settlement", "by a crash"])
async def test_a_queue_of_dead_letters_that_somebody_deleted_is_made_again_when_a_job_dies(
    world: "World", ends: str
) -> None:
    queue = await world.queue()
    await world.somebody.delete([f"{queue}.dead"])
    await world.backend.publish(queue, [Message("a", b"{}", crash_limit=1)])
    async with world.backend.receiver([queue], lease=0.1, keep=False) as receiver:
        [delivery] = await receiver.receive(1, wait=PATIENCE)
        if ends == "by a settlement":
            assert await receiver.settle([(delivery, Dead("rejected"))]) == [None]
        else:  # its lease lapses, and it is not run again
            async with asyncio.timeout(PATIENCE):
                while await world.somebody.count(f"{queue}.dead") != 1:
                    assert await receiver.receive(1, wait=0.2) == []
    await world.somebody.until(f"{queue}.dead", 1)
    [record] = (await world.backend.dead_letters(queue).list(ALL)).records
    assert (record.message.id, record.reason) == ("a", "rejected" if ends == "by a settlement" else "crash_limit")


@pytest.mark.chaos
async def test_two_who_look_at_once_lose_nothing_and_each_finds_all_afterwards(world: "World") -> None:
    """What the one reads the other does not see meanwhile; here in one process each waits for its turn."""
    queue = await world.queue()
    ids, other = await died(world, 500), await world.another()
    here, there = world.backend.dead_letters(queue), other.dead_letters(queue)
    *lists, how_many, one = await asyncio.gather(
        *(here.list(ALL, limit=1000) for _ in range(3)), here.count(), here.get(ids[7])
    )
    looks: list[Any] = lists
    assert [[record.message.id for record in page.records] for page in looks] == [ids[::-1]] * 3
    assert (how_many, one) == (500, await here.get(ids[7]))
    for _ in range(2):
        found = await asyncio.gather(here.list(ALL, limit=1000), there.list(ALL, limit=1000))
        assert all({record.message.id for record in page.records} <= set(ids) for page in found)
    await world.somebody.until("jobs.dead", 500)
    for letters in (here, there):
        assert [record.message.id for record in await pages(letters, 1000)] == ids[::-1]


async def test_a_look_that_is_cut_short_leaves_all_where_it_is(world: "World") -> None:
    queue, other = await world.queue(), await world.another()
    ids = await died(world, 500)
    replaying = asyncio.create_task(other.dead_letters(queue).replay(ids, rate=0.01))
    await world.somebody.until(queue, 1)
    replaying.cancel()
    await asyncio.wait({replaying})
    await world.somebody.until("jobs.dead", 499)
    assert [record.message.id for record in await pages(world.backend.dead_letters(queue), 1000)] == ids[:0:-1]
    assert await ran(world, queue, 1) == ids[:1]


LONG = [RunError("T" * 200_000, "m"), RunError("T", "m" * 200_000), RunError("T", "m", worker="w" * 200_000)]


@pytest.mark.parametrize("error", LONG, ids=["type", "message", "worker"])
async def test_an_error_that_is_longer_than_a_frame_is_kept_as_far_as_there_is_room(
    world: "World", error: RunError
) -> None:
    queue = await world.queue()
    await world.backend.publish(queue, [message := Message(new_job_id(), b"{}")])
    for settlement in (Retry(0.0, error=error), Dead("rejected", error)):
        async with world.backend.receiver([queue]) as receiver:
            [delivery] = await receiver.receive(1, wait=5)
            assert await receiver.settle([(delivery, settlement)]) == [None]
    [*_, kept] = (await world.backend.dead_letters(queue).get(message.id)).errors
    assert (kept.type[:1], kept.message[:1]) == ("T", "m")


async def test_a_queue_without_dead_letters_is_not_found(world: "World") -> None:
    letters = world.backend.dead_letters("nowhere")
    for call in (letters.list(ALL), letters.get("an-id"), letters.count(), letters.replay(ALL), letters.purge(ALL)):
        with pytest.raises(QueueNotFound, match="nowhere"):
            await call
