"""Whatever somebody else writes into the keys: it goes to the dead letters as it is, and the worker goes on."""

import asyncio
import re
import runpy
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from redis.asyncio import Redis

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    BackendUnavailable,
    Dead,
    DeadRecord,
    Job,
    QueueSpec,
    RedisBackend,
    RetryPolicy,
    Worker,
)
from mindtrace.jobs.backends.redis.scripts import text_of
from mindtrace.jobs.delivery import DeadFilter, DeadReason
from mindtrace.jobs.job import is_job_id, new_job_id
from mindtrace.jobs.testing.audit import audit
from mindtrace.jobs.wire import ENVELOPE_EXTRA, PAYLOAD_LIMIT, PAYLOAD_LIMIT_MOST, Message

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

ALL = DeadFilter()
PATIENCE = 20.0
# What no worker can read, and an envelope that every worker can: as everywhere in the contract.
CONTRACT = runpy.run_path(str(Path(__file__).parents[1] / "contract" / "faces" / "conftest.py"))
MALFORMED: dict[str, bytes] = CONTRACT["MALFORMED"]


def envelope(job_id: str = "an-id", **fields: str) -> bytes:
    """The bytes of a job, its JSON field by field."""
    made: bytes = CONTRACT["envelope"]('{"item":"tea"}', **{"id": f'"{job_id}"', "name": '"jobs"'} | fields)
    return made


class Works(AsyncConsumer):
    retry = RetryPolicy(max_attempts=1)

    def __init__(self, queue: str = "jobs") -> None:
        super().__init__(queue)
        self.ran: list[str] = []
        self.runs = asyncio.Event()

    async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        self.ran.append(job_dict["id"])
        self.runs.set()
        if job_dict["input_data"].get("fails"):
            raise LookupError
        return {}


@dataclass
class World:
    """The queue `jobs`, somebody who writes what he likes into its keys, and a worker."""

    url: str
    namespace: str
    server: Redis
    backend: RedisBackend
    ran: list[str] = field(default_factory=list)

    def key(self, part: str) -> str:
        return f"{self.namespace}:{{jobs}}:{part}"

    async def write(self, job_id: bytes, body: bytes, place: int = 1) -> None:
        """A body and its entry, as a publish would have them."""
        await self.server.hset(self.key("jobs"), job_id, body)
        await self.server.zadd(self.key("ready"), {b"%016d%b" % (place, job_id): 0})

    async def goes_on(self) -> list[DeadRecord]:
        """A job that comes now is run, once, and all is in order again. Gives the dead letters."""
        orchestrator = AsyncOrchestrator(self.backend)
        consumer = Works()
        job = Job(id=new_job_id(), name="jobs", schema_name="jobs", input_data={})
        await orchestrator.publish("jobs", job)
        async with asyncio.timeout(PATIENCE):
            await Worker(orchestrator, [consumer], until_idle=True).run()
        assert consumer.ran.count(job.id) == 1
        self.ran = [job_id for job_id in consumer.ran if job_id != job.id]
        found = await audit(self.url, self.namespace)
        assert found.violations == []
        assert {*found.states["jobs"].values()} <= {"dead"}
        return await self.dead()

    async def dead(self) -> list[DeadRecord]:
        """Looked at page by page, one on each."""
        letters = self.backend.dead_letters("jobs")
        page = await letters.list(ALL, limit=1)
        records = page.records
        while page.cursor is not None:
            page = await letters.list(ALL, limit=1, cursor=page.cursor)
            records = [*records, *page.records]
        assert len(records) == await letters.count()
        return records

    async def is_treated_as_any_other(self, record: DeadRecord) -> None:
        """A dead letter that is got, replayed, dead again for the same reason, and purged."""
        letters, job_id = self.backend.dead_letters("jobs"), record.message.id
        assert await letters.get(job_id) == record
        assert await letters.replay([job_id]) == 1
        [again] = [one for one in await self.goes_on() if one.message.id == job_id]
        assert (again.message, again.reason, again.replays) == (record.message, record.reason, record.replays + 1)
        assert await letters.purge([job_id]) == 1
        assert [one for one in await self.goes_on() if one.message.id == job_id] == []


@pytest.fixture
async def world(
    redis_url: str, namespace: str, server: Redis, backend: RedisBackend, queue: str
) -> AsyncIterator[World]:
    yield World(redis_url, namespace, server, backend)
    await server.delete(*[key async for key in server.scan_iter(f"{namespace}*")])


# --- bodies


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_body_that_nobody_can_read_is_dead_with_its_bytes(world: World, body: bytes) -> None:
    await world.write(b"foreign", body)
    [record] = await world.goes_on()
    assert (record.message.id, record.message.body, record.reason) == ("foreign", body, "malformed")
    assert world.ran == []
    await world.is_treated_as_any_other(record)


async def test_a_body_of_100_mb_is_dead_without_being_handed_out(world: World) -> None:
    body = b"x" * 100_000_000
    await world.write(b"large", body)
    async with world.backend.receiver(["jobs"], slots=10) as receiver:
        assert await receiver.receive(10) == []
    [record] = await world.goes_on()
    assert (record.message.id, record.reason, record.attempts) == ("large", "too_large", 0)
    assert record.message.body == body
    await world.is_treated_as_any_other(record)


@pytest.mark.parametrize(
    ("size", "attempts"),
    [
        (PAYLOAD_LIMIT + ENVELOPE_EXTRA + 1, 1),  # more than this worker takes, and less than any does
        (PAYLOAD_LIMIT_MOST + ENVELOPE_EXTRA, 1),
        (PAYLOAD_LIMIT_MOST + ENVELOPE_EXTRA + 1, 0),
    ],
)
async def test_a_body_that_is_a_little_too_large_is_dead(world: World, size: int, attempts: int) -> None:
    """Larger than any worker's limit, the server does not even hand it out."""
    await world.write(b"large", b"x" * size)
    [record] = await world.goes_on()
    assert (len(record.message.body), record.reason, record.attempts) == (size, "too_large", attempts)


async def test_an_entry_without_a_body_is_dead_with_none(world: World) -> None:
    await world.server.zadd(world.key("ready"), {f"{1:016}ghost": 0})
    [record] = await world.goes_on()
    assert (record.message.id, record.message.body, record.reason) == ("ghost", b"", "malformed")
    await world.is_treated_as_any_other(record)


# --- entries

PLACE = b"0000000000000001"
ENTRIES = {
    "nothing": b"",
    "a letter": b"x",
    "a place alone": PLACE,
    "a short place": PLACE[1:] + b"a",
    "a short place and an id": PLACE[1:] + b"an-id",
    "an id alone": b"01a20d8c-71ef-7edc-9dea-3e485bb1b3d2",
    "letters in the place": b"000000000000000x" + b"an-id",
    "an id of no UTF-8": PLACE + b"\xff\xfe",
    "no UTF-8 at all": b"\xff\xfe",
    "NUL": PLACE + b"a\0b",
    "a line break": PLACE + b"a\nb",
    "a space": PLACE + b"a b",
    "an escape": PLACE + b"a\x1b[2J",
    "a hyphen first": PLACE + b"-a",
    "129 letters": PLACE + b"a" * 129,
    "a megabyte": PLACE + b"a" * 1_000_000,
}


def id_in(entry: bytes) -> str:
    """What stands behind the place; where there is no place, everything is kept."""
    match = re.fullmatch(rb"\d{16}(.*)", entry, re.DOTALL)
    return text_of(match[1] if match else entry)


@pytest.mark.parametrize("part", ["ready", "scheduled"])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
async def test_an_entry_that_is_none_is_dead_as_it_is(world: World, entry: bytes, part: str) -> None:
    await world.server.zadd(world.key(part), {entry: 1})
    [record] = await world.goes_on()
    assert (record.message.id, record.message.body, record.reason) == (id_in(entry), b"", "malformed")
    # Once it is due, an entry that is an id by itself has a place like any other, and no body.
    assert record.attempts == int(part == "scheduled" and is_job_id(record.message.id))
    await world.is_treated_as_any_other(record)


@pytest.mark.parametrize("part", ["ready", "scheduled"])
async def test_entries_that_are_none_are_kept_apart_each_with_its_body(world: World, part: str) -> None:
    entries = [b"a", b"b", PLACE + b"-", b"\xff", b"\xfe", PLACE + b"a b"]
    for entry in entries:
        job_id = id_in(entry).encode("utf-8", "surrogateescape")
        await world.server.hset(world.key("jobs"), job_id, b"of " + entry)
        await world.server.zadd(world.key(part), {entry: 1})
    found = {record.message.id: record.message.body for record in await world.goes_on()}
    assert found == {id_in(entry): b"of " + entry for entry in entries}


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), 1.5, 1e300, -(2.0**53)], ids=str)
async def test_a_job_with_a_priority_that_is_none_runs(world: World, score: float) -> None:
    await world.server.hset(world.key("jobs"), "an-id", envelope())
    await world.server.zadd(world.key("ready"), {f"{1:016}an-id": score})
    assert await world.goes_on() == []
    assert world.ran == ["an-id"]


@pytest.mark.parametrize("kind", ["fifo", "priority", "stack"])
async def test_more_foreign_entries_than_a_receiver_has_slots_do_not_hide_a_job(world: World, kind: Any) -> None:
    await world.backend.delete("jobs")
    await world.backend.declare(QueueSpec("jobs", kind))
    await world.server.zadd(world.key("ready"), {f"entry {n:03}": 0 for n in range(200)})
    await world.server.zadd(world.key("ready"), {f"9{n:015} none": 0 for n in range(200)})
    assert len(await world.goes_on()) == 201  # of the last 200 all have one id


RECEIPTS = {
    "nothing": (b"", ""),
    "a letter": (b"x", "x"),
    "colons": (b"::", "::"),
    "no number": (b"0123456789abcdef:x:an-id", "0123456789abcdef:x:an-id"),
    "no id": (b"0123456789abcdef:1:", ""),
    "an id that is none": (b"0123456789abcdef:1:-x", "-x"),
    "an id of no UTF-8": (b"0123456789abcdef:1:\xff", "\udcff"),
    "no UTF-8 at all": (b"\xff", "\udcff"),
    "a job that is not there": (b"0123456789abcdef:1:ghost", "ghost"),
    "no job's, and a number that is none": (b"0123456789abcdef:99999999999999999999999999:ghost", "ghost"),
}


@pytest.mark.parametrize(("receipt", "job_id"), RECEIPTS.values(), ids=RECEIPTS.keys())
async def test_a_lease_that_is_none_is_dead_once_it_lapses(world: World, receipt: bytes, job_id: str) -> None:
    await world.server.zadd(world.key("leased"), {receipt: 1})
    [record] = await world.goes_on()
    assert (record.message.id, record.message.body, record.reason) == (job_id, b"", "malformed")
    await world.is_treated_as_any_other(record)


async def test_leases_that_are_none_are_kept_apart(world: World) -> None:
    await world.server.zadd(world.key("leased"), {"one": 1, "two": 2, "x:three": 3})
    assert {record.message.id for record in await world.goes_on()} == {"one", "two", "x:three"}


# --- what lies beside a body

NUMBERS = {
    "nothing": b"",
    "words": b"one two",
    "too few": b"1 2 3",
    "too many": b"0 0 0 0 0 0 0 -1 0",
    "no UTF-8": b"\xff 0 0 0 0 0 0 -1",
    "negative": b"-1 -1 -1 -1 -1 -1 -1 -1",
    "fractions": b"0.5 0 0 0 0 0 0 -1",
    "large": b"%d 0 0 %d 0 0 0 -1" % (10**15, 10**15),
    "too large": b"%d %d %d %d %d %d %d %d" % ((10**30,) * 8),
    "in hexadecimal": b"0x10 0 0 0 0 0 0 -1",
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
async def test_a_job_runs_whatever_is_said_of_its_past(world: World, numbers: bytes, fails: bool) -> None:
    await world.write(b"an-id", envelope() if not fails else envelope(input='{"fails":true}'))
    await world.server.hset(world.key("states"), "an-id", numbers)
    records = await world.goes_on()
    assert world.ran == ["an-id"]
    assert [(record.message.id, record.reason) for record in records] == ([("an-id", "attempts")] if fails else [])


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
@pytest.mark.parametrize("part", ["scheduled", "leased"])
async def test_a_job_comes_back_whatever_is_said_of_its_past(world: World, numbers: bytes, part: str) -> None:
    await world.server.hset(world.key("jobs"), "an-id", envelope())
    await world.server.hset(world.key("states"), "an-id", numbers)
    entry = f"{1:016}an-id" if part == "scheduled" else "0123456789abcdef:1:an-id"
    await world.server.zadd(world.key(part), {entry: 1})
    assert await world.goes_on() == []
    assert world.ran == ["an-id"]


ERRORS = {
    "nothing": b"",
    "words": b"it failed",
    "no UTF-8": b"\xff\n\xff",
    "a list": b"[]\n[]",
    "other types": b'{"type":1,"message":[],"traceback":{},"started_at":"x","worker":null}',
    "instants that are none": b'{"type":"E","started_at":1e300,"ended_at":-1e300}',
    "not a number": b'{"type":"E","started_at":NaN}',
    "deep": b"[" * 100_000,
    "many": b'{"type":"E"}\n' * 10_000,
    "5,000 digits": b'{"type":"E","started_at":%b}' % (b"9" * 5000),
}


@pytest.mark.parametrize("errors", ERRORS.values(), ids=ERRORS.keys())
async def test_a_job_dies_of_its_own_error_whatever_is_said_of_earlier_ones(world: World, errors: bytes) -> None:
    await world.write(b"an-id", envelope(input='{"fails":true}'))
    await world.server.hset(world.key("errors"), "an-id", errors)
    [record] = await world.goes_on()
    assert (record.reason, record.errors[-1].type) == ("attempts", "LookupError")
    assert len(record.errors) <= 10


# --- dead letters

BESIDE = {
    **{f"numbers: {name}": ("states", numbers) for name, numbers in NUMBERS.items()},
    **{f"errors: {name}": ("errors", errors) for name, errors in ERRORS.items()},
    "death: nothing": ("deaths", b""),
    "death: words": ("deaths", b"of old age"),
    "death: no UTF-8": ("deaths", b"\xff\xfe"),
    "death: no reason": ("deaths", b"1700000000000"),
    "death: another reason": ("deaths", b"1700000000000 of old age"),
    "death: a time that is none": ("deaths", b"%d rejected" % 10**30),
    "death: a time before all": ("deaths", b"-1 rejected"),
}


@pytest.mark.parametrize(("part", "value"), BESIDE.values(), ids=BESIDE.keys())
async def test_a_dead_letter_can_be_read_replayed_and_purged_whatever_lies_beside_it(
    world: World, part: str, value: bytes
) -> None:
    await a_dead_job(world)
    await world.server.hset(world.key(part), "an-id", value)
    [record] = await world.dead()
    assert (record.message.id, record.message.body) == ("an-id", envelope())
    assert record.reason in get_args(DeadReason)
    letters = world.backend.dead_letters("jobs")
    assert await letters.get("an-id") == record
    assert await letters.replay(ALL) == 1
    assert await world.goes_on() == []
    assert world.ran == ["an-id"]
    await a_dead_job(world, "another-id")
    await world.server.hset(world.key(part), "another-id", value)
    assert await letters.purge(ALL) == 1
    assert await world.goes_on() == []


async def a_dead_job(world: World, job_id: str = "an-id") -> None:
    await world.backend.publish("jobs", [Message(job_id, envelope(job_id))])
    async with world.backend.receiver(["jobs"]) as receiver:
        [delivery] = await receiver.receive(1)
        assert await receiver.settle([(delivery, Dead("rejected"))]) == [None]


@pytest.mark.parametrize("job_id", [b"", b"\xff", b"a\nb", b"x" * 1000, b"ghost"], ids=lambda one: repr(one)[:20])
async def test_a_dead_letter_that_is_an_id_alone_can_be_read_replayed_and_purged(world: World, job_id: bytes) -> None:
    await world.server.zadd(world.key("dead"), {job_id: 1})
    [record] = await world.dead()
    assert (record.message.id, record.message.body, record.reason) == (text_of(job_id), b"", "malformed")
    assert await world.backend.dead_letters("jobs").replay([record.message.id]) == 1
    [record] = await world.goes_on()
    await world.is_treated_as_any_other(record)


async def test_dead_letters_in_an_order_that_is_none_are_all_listed(world: World) -> None:
    scores = {"a": float("inf"), "b": 1e300, "c": 2.0**53, "d": 1.5, "e": 1.25, "f": 0, "g": -3, "h": float("-inf")}
    await world.server.zadd(world.key("dead"), scores)
    assert [record.message.id for record in await world.dead()] == list("abcdefgh")
    assert await world.backend.dead_letters("jobs").purge(ALL) == 8
    assert await world.goes_on() == []


# --- keys

PARTS = ["spec", "ready", "scheduled", "leased", "jobs", "states", "errors", "dead", "deaths", "bell", "watch"]


@pytest.mark.parametrize("part", PARTS)
async def test_a_key_of_another_type_stops_that_queue_alone_and_only_until_it_is_gone(world: World, part: str) -> None:
    await world.backend.declare(QueueSpec("other"))
    orchestrator = AsyncOrchestrator(world.backend)
    ours, other = Works(), Works("other")
    worker = Worker(orchestrator, [ours, other])

    async def has_run(consumer: Works, job_id: str) -> None:
        name = consumer.job_type_name
        await orchestrator.publish(name, Job(id=job_id, name=name, schema_name=name, input_data={}))
        while job_id not in consumer.ran:
            consumer.runs.clear()
            await consumer.runs.wait()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        running = group.create_task(worker.run())
        await has_run(ours, "before")
        spec = await world.server.dump(world.key("spec"))
        async with world.server.pipeline(transaction=True) as at_once:  # a queue may at no time be without its spec
            at_once.delete(world.key(part))
            (at_once.rpush if part == "watch" else at_once.set)(world.key(part), "x")
            await at_once.execute()
        await has_run(other, "meanwhile")
        letters = world.backend.dead_letters("jobs")
        for call in (world.backend.depth("jobs"), world.backend.clean("jobs"), letters.list(ALL), letters.replay(ALL)):
            with suppress(BackendUnavailable):
                await call
        await has_run(other, "still")
        assert not running.done()
        if part == "spec":
            await world.server.execute_command("RESTORE", world.key(part), 0, spec, "REPLACE")
        else:
            await world.server.delete(world.key(part))
        await has_run(ours, "after")
        worker.stop()
    assert (ours.ran, other.ran) == (["before", "after"], ["meanwhile", "still"])


async def test_the_other_queues_are_listed_beside_one_that_nobody_can_read(world: World) -> None:
    registry = f"{world.namespace}:queues"
    await world.server.sadd(registry, b"\xff", b"a:b", b"", b"jobs}:{jobs", b"heap", b"half", b"amq.x")
    for name, kind in ((b"\xff", "fifo"), (b"heap", "heap"), (b"half", "fifo")):
        await world.server.execute_command("HSET", b"%b:{%b}:spec" % (world.namespace.encode(), name), "kind", kind)
    await world.server.hset(f"{world.namespace}:{{a:b}}:spec", items=["kind", "fifo", "levels", "-1", "most", "-1"])
    assert await world.backend.queues() == [QueueSpec("jobs")]
