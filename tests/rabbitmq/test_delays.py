"""Delays on RabbitMQ: each held for its time in the broker, whatever happens to broker and queue meanwhile."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from pamqp import encode
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncOrchestrator,
    Backend,
    BackendUnavailable,
    ConfigError,
    Dead,
    Delivery,
    Done,
    JobSchema,
    QueueFull,
    QueueNotFound,
    Receiver,
    Release,
    Retry,
)
from mindtrace.jobs.backends.rabbitmq.counts import Counts, headers_of
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS, Topology
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.retry import MAX_DELAY
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.wire import Message

if TYPE_CHECKING:
    from tests.rabbitmq.conftest import World

NewWorld = Callable[..., Awaitable["World"]]

pytestmark = [pytest.mark.anyio, pytest.mark.rabbitmq]

ALL = DeadFilter()
PATIENCE = 20.0
LATE = 1.0  # what is promised while a receiver has a free slot


def a_message(body: bytes = b"{}", **options: object) -> Message:
    return Message(new_job_id(), body, **options)  # type: ignore[arg-type] (a test names what it needs)


class Nothing(BaseModel):
    """The input of no job."""


@dataclass
class Due:
    """When a job may come at the earliest, and has to at the latest."""

    earliest: float
    latest: float


async def published(backend: Backend, queue: str, delays: Sequence[float]) -> dict[str, Due]:
    messages = [a_message(delay=delay) for delay in delays]
    begun = time.monotonic()
    assert await backend.publish(queue, messages) == ["stored"] * len(messages)
    stored = time.monotonic()
    return {message.id: Due(begun + message.delay, stored + message.delay + LATE) for message in messages}


async def all_come(
    backend: Backend, queue: str, due: Mapping[str, Due], within: float = PATIENCE, *, killed: bool = False
) -> dict[str, float]:
    """When each job came: all of them, once, unless the broker is killed meanwhile. None of them came early."""
    came: dict[str, float] = {}
    async with asyncio.timeout(within), backend.receiver([queue], slots=100) as receiver:
        while len(came) < len(due):
            try:
                deliveries = await receiver.receive(100, wait=5)
            except BackendUnavailable:
                continue  # the broker is away, which the test knows
            now = time.monotonic()
            for delivery in deliveries:
                if not killed:
                    assert delivery.message.id not in came
                    assert (delivery.attempt, delivery.crashes) == (1, 0)
                came.setdefault(delivery.message.id, now)
            settled = await receiver.settle([(delivery, Done()) for delivery in deliveries])
            assert killed or settled == [None] * len(deliveries)
        assert await receiver.receive(1) == []
    assert came.keys() == due.keys()
    assert min(came[job_id] - one.earliest for job_id, one in due.items()) >= 0
    return came


def lateness(due: Mapping[str, Due], came: Mapping[str, float]) -> float:
    """Seconds after the last instant at which a job had to have come; below 0 for none late."""
    return max(came[job_id] - one.latest for job_id, one in due.items())


async def take(receiver: Receiver) -> Delivery:
    async with asyncio.timeout(PATIENCE):
        [delivery] = await receiver.receive(1, wait=PATIENCE)
    return delivery


# --- in time


async def test_a_thousand_delays_at_once_are_never_early_and_at_most_a_second_late(world: "World") -> None:
    """0.2, 1.5 and 7 s among them, asked for in one call."""
    queue, random = await world.queue(), Random(1)
    due = await published(world.backend, queue, [0.2, 1.5, 7.0, *(random.uniform(0.01, 7.0) for _ in range(997))])
    came = await all_come(world.backend, queue, due)
    assert lateness(due, came) <= 0


async def test_a_delay_of_an_hour_passes_all_its_levels_in_time(
    world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    """61 and 3,700 s and others between, where a second is a millisecond: the same digits, so the same way."""
    monkeypatch.setattr(Topology, "unit", Topology.unit / 1000)
    queue, random = await world.queue(), Random(2)
    seconds = [0.2, 1.5, 7, 61, 3700, *(random.uniform(0.1, 3700) for _ in range(195))]
    due = await published(world.backend, queue, [each / 1000 for each in seconds])
    came = await all_come(world.backend, queue, due)
    assert lateness(due, came) <= 0
    highest = (3700 * 10).bit_length() - 1
    assert await world.somebody.count(f"{highest}.hold") == 0
    assert await world.somebody.count(f"{highest + 1}.hold") is None


@pytest.mark.chaos
async def test_a_thousand_delays_over_the_death_of_the_broker_are_never_early_and_at_most_a_second_late(
    own_broker: brokers.Broker, new_world: NewWorld
) -> None:
    """Many would go to the next hold meanwhile. What is due until a worker has looked comes when it has."""
    world = await new_world(own_broker.url)
    queue, random = await world.queue(), Random(3)
    delays = [0.2, 1.5, 7.0, *(random.uniform(0.1, 25.0) for _ in range(997))]
    due = await published(world.backend, queue, [*delays, 61, 3700])
    near = dict(list(due.items())[: len(delays)])
    coming = asyncio.create_task(all_come(world.backend, queue, near, 60, killed=True))
    await asyncio.sleep(2)
    await asyncio.to_thread(own_broker.kill)
    await asyncio.to_thread(own_broker.restart)
    await world.somebody.until_exchange("up.hold")
    back = time.monotonic()
    came = await coming
    assert min(one.latest for one in near.values()) < back < max(one.earliest for one in near.values())
    assert max(came[job_id] - max(one.latest, back + LATE) for job_id, one in near.items()) <= 0
    await world.somebody.until("15.hold", 1)


@pytest.fixture
async def late(world: "World") -> Callable[..., Awaitable[Message]]:
    """Publishes a job that a restart has made late: it is due in `seconds`, and would come in 100."""
    await world.queue()
    await world.backend.publish("jobs", [a_message(delay=100)])  # which makes the levels
    await (await world.somebody.channel()).exchange_delete(f"{world.namespace}:up.hold")  # as a restart does

    async def publish(seconds: float, queue: str = "jobs") -> Message:
        exchange, key = Topology(world.namespace).delayed(queue, 1000)
        message = a_message(b"late")
        headers = headers_of(message.id, Counts(2, 1, 0, 3), due=time.time() + seconds)
        await world.somebody.publish(exchange, key, b"late", headers)
        return message

    return publish


async def test_the_first_worker_after_a_restart_puts_late_jobs_where_they_belong(
    world: "World", late: Callable[..., Awaitable[Message]], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else of them changes. Of several who come at once, one does it."""
    caplog.set_level("INFO", "mindtrace.jobs")
    begun = time.monotonic()
    first, _ = await late(2.0), await late(-5.0)
    workers = [await world.another() for _ in range(3)]
    taken, numbers = dict[str, float](), set[tuple[int, int, int]]()

    async def work(backend: Backend) -> None:
        async with backend.receiver(["jobs"]) as receiver:
            while len(taken) < 2:
                for delivery in await receiver.receive(1, wait=0.5):
                    assert delivery.message.id not in taken
                    taken[delivery.message.id] = time.monotonic()
                    numbers.add((delivery.attempt, delivery.crashes, delivery.number))
                    await receiver.settle([(delivery, Done())])

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*map(work, workers))
    await world.somebody.until_exchange("up.hold")
    assert numbers == {(3, 1, 4)}
    assert caplog.text.count("looked through 3 delayed jobs") == 1
    assert taken[first.id] - begun >= 2.0
    await world.somebody.until("9.hold", 1)  # the one that was not late
    assert await world.somebody.count("jobs") == 0


async def test_without_a_restart_nobody_looks_through_delayed_jobs(
    world: "World", late: Callable[..., Awaitable[Message]]
) -> None:
    async with world.backend.receiver(["jobs"]) as receiver:
        await late(-5.0)
        await take(receiver)
        await world.somebody.until_exchange("up.hold")
        await late(-5.0)
        async with (await world.another()).receiver(["jobs"]) as other:
            assert await other.receive(1, wait=2) == []
    await world.somebody.until("9.hold", 2)


async def test_a_late_job_of_a_queue_that_is_gone_is_kept(
    world: "World", late: Callable[..., Awaitable[Message]]
) -> None:
    message = await late(-5.0, "nowhere")
    async with world.backend.receiver(["jobs"]):
        await world.somebody.until("gone.dead", 1)
    record = await world.backend.dead_letters("gone").get(message.id)
    assert (record.queue, record.reason, record.attempts, record.crashes) == ("nowhere", "queue_gone", 2, 1)


async def test_what_somebody_else_put_into_a_hold_stays_there_and_is_in_nobodys_way(
    world: "World", late: Callable[..., Awaitable[Message]]
) -> None:
    """More of it than is taken out together, before what is late."""
    hold, key = Topology(world.namespace).delayed("jobs", 1000)
    for headers in ({}, {"mtj-due": "soon"}, {"mtj-due": 5}):
        for _ in range(75):
            await world.somebody.publish(hold, key, b"{}", headers)
    await world.somebody.publish("", hold, b"no key of a delay", {"mtj-due": "0"})
    message = await late(-5.0)
    async with world.backend.receiver(["jobs"]) as receiver:
        assert (await take(receiver)).message.id == message.id
        await world.somebody.until_exchange("up.hold")
    await world.somebody.until("9.hold", 227)


async def test_a_job_behind_many_others_of_one_id_is_put_where_it_belongs_too(
    world: "World", late: Callable[..., Awaitable[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindtrace.jobs.backends.rabbitmq.retiming._AHEAD", 5)
    hold, key = Topology(world.namespace).delayed("jobs", 1000)
    for n in range(200):
        headers = headers_of("nightly", Counts(), due=time.time() + 90 + n / 1000)
        await world.somebody.publish(hold, key, b"{}", headers)
    message = await late(-5.0)
    async with world.backend.receiver(["jobs"]) as receiver:
        assert (await take(receiver)).message.id == message.id
        await world.somebody.until_exchange("up.hold")
    await world.somebody.until("9.hold", 201)


async def test_of_what_somebody_else_delays_with_our_headers_only_what_we_know_is_published_again(
    world: "World", late: Callable[..., Awaitable[Message]]
) -> None:
    """With one more byte in its headers it would be too long, which would end the connection."""
    hold, key = Topology(world.namespace).delayed("jobs", 1000)
    headers: dict[str, Any] = {"mtj-id": "theirs", "mtj-due": "0", "mtj-more": "x" * 131_000}
    await world.somebody.publish(hold, key, b"{}", encode.field_table(headers))
    message = await late(-5.0)
    async with world.backend.receiver(["jobs"], slots=2) as receiver:
        assert {(await take(receiver)).message.id for _ in range(2)} == {"theirs", message.id}
        await world.somebody.until_exchange("up.hold")


@pytest.mark.chaos
async def test_who_looks_through_delayed_jobs_comes_to_an_end_while_more_are_published_than_it_can_take(
    world: "World", late: Callable[..., Awaitable[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them for 12.8 s, which is all of a level: with less left it goes to the next."""
    for name, value in (("_AHEAD", 1), ("_MOST", 1500)):
        monkeypatch.setattr(f"mindtrace.jobs.backends.rabbitmq.retiming.{name}", value)

    async def publish() -> None:
        while True:
            await world.backend.publish("jobs", [a_message(delay=12.8) for _ in range(100)])
            await asyncio.sleep(0.05)

    message = await late(-5.0)
    async with (await world.another()).receiver(["jobs"]) as receiver:
        publishing = asyncio.create_task(publish())
        try:
            assert (await take(receiver)).message.id == message.id
            await world.somebody.until_exchange("up.hold")
        finally:
            publishing.cancel()
            await asyncio.wait({publishing})


async def test_where_there_are_very_many_delayed_jobs_they_are_left_alone_and_the_log_says_so(
    world: "World",
    late: Callable[..., Awaitable[Message]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("mindtrace.jobs.backends.rabbitmq.retiming._MOST", 5)
    for _ in range(5):
        await late(-5.0)
    async with world.backend.receiver(["jobs"]) as receiver:
        await world.somebody.until_exchange("up.hold")
        assert await receiver.receive(1) == []
    assert "of 6 delayed jobs some are late" in caplog.text


async def test_a_backend_that_is_closed_while_it_puts_late_jobs_back_puts_none_twice(
    world: "World", late: Callable[..., Awaitable[Message]]
) -> None:
    random = Random(5)
    ids = {(await late(-5.0)).id for _ in range(1000)}
    came = list[str]()
    async with asyncio.timeout(PATIENCE):
        while len(came) < len(ids):
            backend = await world.another()
            async with backend.receiver(["jobs"], slots=100) as receiver:
                deliveries = await receiver.receive(100, wait=random.uniform(0.0, 0.1))
                came += [delivery.message.id for delivery in deliveries]
                await receiver.settle([(delivery, Done()) for delivery in deliveries])
            await backend.aclose()
    assert sorted(came) == sorted(ids)
    assert await world.somebody.count("jobs") == 0


# --- long


async def test_the_longest_delay_is_taken_with_the_longest_names_and_no_longer_one(
    rabbitmq_url: str, new_world: NewWorld
) -> None:
    world = await new_world(rabbitmq_url, "n" * 64)
    queue = await world.queue("q" * 128)
    messages = [a_message(delay=MAX_DELAY), a_message(at=datetime.now(UTC) + timedelta(seconds=MAX_DELAY))]
    assert await world.backend.publish(queue, messages) == ["stored", "stored"]
    assert await world.somebody.count(f"{LEVELS - 1}.hold") == 2
    async with AsyncOrchestrator(world.backend) as orchestrator:
        await orchestrator.register(JobSchema(queue, Nothing))
        with pytest.raises(ConfigError, match="366"):
            await orchestrator.publish(queue, Nothing(), delay=MAX_DELAY + 1)
        with pytest.raises(ConfigError, match="366"):
            await orchestrator.publish(queue, Nothing(), at=datetime.now(UTC) + timedelta(seconds=MAX_DELAY + 60))


async def test_a_time_of_more_than_32_bits_is_held_as_long_as_it_is(
    world: "World", rabbitmq_url: str, new_world: NewWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With units of 49.7 days and 200 ms, of which the lower half alone would be over at once."""
    other = await new_world(rabbitmq_url)
    queue, quick = await world.queue(), await other.queue("quick")
    unit = (2**32 + 200) / 1000
    with monkeypatch.context() as longer:
        longer.setattr(Topology, "unit", unit)
        assert await world.backend.publish(queue, [a_message(delay=unit), a_message(delay=2 * unit)]) == ["stored"] * 2
    await all_come(other.backend, quick, await published(other.backend, quick, [1.0]))
    assert [await world.somebody.count(name) for name in ("0.hold", "1.hold", queue)] == [1, 1, 0]


async def test_a_namespace_has_29_holds_at_most_and_as_few_as_its_longest_delay_needs(world: "World") -> None:
    async def levels() -> list[int]:
        return [level for level in range(LEVELS + 1) if await world.somebody.count(f"{level}.hold") is not None]

    queue, random = await world.queue(), Random(4)
    assert await levels() == []
    for delay, count in ((0.0, 0), (0.1, 1), (90.0, 10), (60.0, 10)):
        await published(world.backend, queue, [delay])
        assert await levels() == list(range(count))
    await published(world.backend, queue, [random.uniform(600, MAX_DELAY) for _ in range(200)])
    await published(world.backend, queue, [MAX_DELAY])
    assert await levels() == list(range(LEVELS))


# --- where they go


async def test_a_delay_is_for_its_queue_alone_however_others_are_called(world: "World") -> None:
    names = ["b", "a.b", "a.a.b", "a", "b.a", "0.b", "1.0.b", "b.b", "B"]
    for name in names:
        await world.queue(name)
    due = {name: await published(world.backend, name, [0.1, 0.3]) for name in names}
    came = await asyncio.gather(*(all_come(world.backend, name, due[name]) for name in names))
    assert [len(each) for each in came] == [2] * len(names)
    assert await world.somebody.count("gone.dead") == 0


async def test_a_job_that_is_due_for_a_queue_that_is_gone_is_kept_and_can_be_replayed(world: "World") -> None:
    backend, letters = world.backend, world.backend.dead_letters("gone")
    for name in ("jobs", "a.b", "stays"):
        await world.queue(name)
    messages = [a_message(b"of jobs", delay=0.3), a_message(b"of a.b", delay=0.3)]
    before = datetime.now(UTC)
    for name, message in zip(("jobs", "a.b"), messages, strict=True):
        await backend.publish(name, [message])
        await backend.delete(name)
    await all_come(backend, "stays", await published(backend, "stays", [0.5, 0.6]))
    await world.somebody.until("gone.dead", 2)
    assert await letters.count() == 2
    for name, message in zip(("jobs", "a.b"), messages, strict=True):
        record = await letters.get(message.id)
        assert (record.queue, record.message, record.reason) == (name, message, "queue_gone")
        assert (record.attempts, record.number, record.replays) == (0, 0, 0)
        assert before - timedelta(seconds=2) <= record.died_at <= datetime.now(UTC) + timedelta(seconds=2)
        with pytest.raises(QueueNotFound, match=name):
            await letters.replay([message.id])
        await world.queue(name)
        assert await letters.replay([message.id]) == 1
        async with backend.receiver([name]) as receiver:
            delivery = await take(receiver)
            assert (delivery.message, delivery.attempt) == (message, 1)
            await receiver.settle([(delivery, Done())])
    assert await letters.count() == 0


async def test_a_job_that_is_retried_or_snoozed_and_whose_queue_is_gone_then_is_kept_too(world: "World") -> None:
    backend, queue = world.backend, await world.queue()
    await backend.publish(queue, [a_message(), a_message()])
    async with backend.receiver([queue], slots=2) as receiver:
        one, two = await receiver.receive(2)
        assert await receiver.settle([(one, Retry(0.3)), (two, Release(0.3))]) == [None, None]
    await backend.delete(queue, force=True)
    await world.somebody.until("gone.dead", 2)
    page = await backend.dead_letters("gone").list(ALL)
    found = {record.message.id: (record.queue, record.reason, record.attempts) for record in page.records}
    assert found == {one.message.id: (queue, "queue_gone", 1), two.message.id: (queue, "queue_gone", 0)}


@pytest.mark.parametrize("kind", ["fifo", "priority"])
async def test_a_full_queue_keeps_what_comes_back_to_it_and_holds_up_nobody_else(world: "World", kind: str) -> None:
    """More due jobs than the broker hands over at once, a retry, a release and a replay. Only publishes are refused."""
    backend, letters = world.backend, world.backend.dead_letters("full")
    await world.queue("full", kind, max_length=10)
    await world.queue("other")
    back, due = [a_message() for _ in range(3)], [a_message(delay=0.5) for _ in range(100)]
    assert await backend.publish("full", [*back, *due]) == ["stored"] * 103
    async with backend.receiver(["full"], slots=3) as receiver:
        one, two, three = await receiver.receive(3)
        assert await receiver.settle([(one, Dead("rejected"))]) == [None]
        filling = [a_message() for _ in range(11)]
        outcomes = await backend.publish("full", filling)
        assert outcomes[:10] == ["stored"] * 10
        assert isinstance(outcomes[10], QueueFull)
        assert await receiver.settle([(two, Retry(0.0)), (three, Release())]) == [None, None]
    assert await letters.replay(ALL) == 1
    later = await published(backend, "other", [0.1, 0.5, 0.7, 1.5])
    came = await all_come(backend, "other", later)
    assert lateness(later, came) <= 0
    left = {message.id for message in (*back, *due, *filling[:10])}
    await world.somebody.until("full", len(left))
    [refused] = await backend.publish("full", [a_message()])
    assert isinstance(refused, QueueFull)
    async with asyncio.timeout(PATIENCE), backend.receiver(["full"], slots=100) as receiver:
        while left:
            for delivery in (deliveries := await receiver.receive(100, wait=PATIENCE)):
                left.remove(delivery.message.id)
            await receiver.settle([(delivery, Done()) for delivery in deliveries])
