"""Whatever somebody else publishes: it runs if it is a job, else it is dead with its bytes, and the worker goes on."""

import asyncio
import json
import runpy
import struct
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiormq.exceptions import AMQPError
from pamqp import commands

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    DeadRecord,
    Done,
    Job,
    Release,
    Retry,
    RetryPolicy,
    RunError,
    Worker,
)
from mindtrace.jobs.delivery import Dead, DeadFilter, Delivery, Settlement
from mindtrace.jobs.job import is_job_id, new_job_id
from mindtrace.jobs.wire import ENVELOPE_EXTRA, PAYLOAD_LIMIT, Message

if TYPE_CHECKING:
    from tests.rabbitmq.conftest import World

pytestmark = [pytest.mark.anyio, pytest.mark.rabbitmq]

ALL = DeadFilter()
PATIENCE = 20.0
# What no worker can read, and an envelope that every worker can: as everywhere in the contract.
FACES = Path(__file__).parents[1] / "contract" / "faces" / "conftest.py"
CONTRACT = runpy.run_path(str(FACES))
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

    async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        self.ran.append(job_dict["id"])
        if job_dict["input_data"].get("fails"):
            raise LookupError
        return {}


async def work(world: "World", queue: str = "jobs") -> list[str]:
    """A worker runs all there is, and a job that comes last. Gives the ids of what it ran, without that one."""
    orchestrator, consumer = AsyncOrchestrator(world.backend), Works(queue)
    last = Job(id=new_job_id(), name=queue, schema_name=queue, input_data={})
    await orchestrator.publish(queue, last)
    async with asyncio.timeout(PATIENCE):
        await Worker(orchestrator, [consumer], until_idle=True).run()
    assert consumer.ran.count(last.id) == 1
    assert await world.somebody.count(queue) == 0
    return [job_id for job_id in consumer.ran if job_id != last.id]


async def dead(world: "World", queue: str = "jobs") -> list[DeadRecord]:
    """Oldest first."""
    letters = world.backend.dead_letters(queue)
    page = await letters.list(ALL, limit=1000)
    assert page.cursor is None
    assert await letters.count() == len(page.records)
    return page.records[::-1]


@pytest.fixture(params=["fifo", "priority"])
async def kind(world: "World", request: pytest.FixtureRequest) -> str:
    await world.queue("jobs", request.param)
    return request.param


# --- bodies


async def test_bodies_that_nobody_can_read_are_dead_with_their_bytes(world: "World", kind: str) -> None:
    """Each of the kinds, from somebody who gives neither headers nor an id; replayed, they die again."""
    for body in MALFORMED.values():
        await world.somebody.put(body)
    assert await work(world) == []
    for replays in (0, 1):
        records = await dead(world)
        assert sorted(record.message.body for record in records) == sorted(MALFORMED.values())
        assert {(record.reason, record.attempts, record.replays) for record in records} == {("malformed", 1, replays)}
        assert len({record.message.id for record in records}) == len(MALFORMED)
        if not replays:
            assert await world.backend.dead_letters("jobs").replay(ALL) == len(MALFORMED)
            assert await work(world) == []
    assert await world.backend.dead_letters("jobs").purge(ALL) == len(MALFORMED)
    assert await dead(world) == []


async def test_a_body_of_100_mb_is_dead_and_can_be_purged(world: "World") -> None:
    await world.queue()
    body = b"x" * 100_000_000
    await world.somebody.put(body)
    assert await work(world) == []
    [record] = await dead(world)
    assert (record.reason, record.attempts) == ("too_large", 1)
    assert record.message.body == body
    assert await world.backend.dead_letters("jobs").purge([record.message.id]) == 1


@pytest.mark.parametrize("size", [131_064, 131_065, PAYLOAD_LIMIT + ENVELOPE_EXTRA + 1])
async def test_a_body_that_just_fills_a_frame_or_is_just_too_large_comes_whole(world: "World", size: int) -> None:
    await world.queue()
    await world.somebody.put(body := b"x" * size)
    assert await work(world) == []
    [record] = await dead(world)
    assert record.message.body == body
    assert record.reason == ("malformed" if size < PAYLOAD_LIMIT else "too_large")


# --- envelopes, and what stands around them


async def test_an_envelope_runs_whatever_id_its_message_has(world: "World", kind: str) -> None:
    """Only our own header, or a message id that is a job's, is taken for one; what runs is told the envelope's own."""
    ids: dict[str, dict[str, Any]] = {
        "none": {},
        "valid": {"message_id": "theirs-1"},
        "a-uuid": {"message_id": "0b5ea1b5-4a3c-4a0e-8b0e-4b4a8d6f8a55"},
        "invalid": {"message_id": "-not one"},
        "too-long": {"message_id": "a" * 129},
        "ours": {"message_id": "x", "headers": {"mtj-id": "ours-1"}},
        "broken": {"message_id": "theirs-2", "headers": {"mtj-id": "-"}},
    }
    for name, properties in ids.items():
        await world.somebody.put(envelope(name), **properties)
    async with world.backend.receiver(["jobs"], slots=10) as receiver:
        deliveries = await receiver.receive(10, wait=5)
        found = {json.loads(delivery.message.body)["id"]: delivery.message.id for delivery in deliveries}
    assert all(is_job_id(job_id) for job_id in found.values())
    assert {name: found[name] for name in ("valid", "a-uuid", "ours", "broken")} == {
        "valid": "theirs-1",
        "a-uuid": "0b5ea1b5-4a3c-4a0e-8b0e-4b4a8d6f8a55",
        "ours": "ours-1",
        "broken": "theirs-2",
    }
    assert len(set(found.values())) == len(ids)
    assert sorted(await work(world)) == sorted(ids)
    assert await dead(world) == []


async def test_a_priority_of_somebody_else_is_nothing_on_a_fifo_queue(world: "World") -> None:
    await world.queue()
    for number, priority in enumerate((0, 9, 255, 1)):
        await world.somebody.put(envelope(f"job-{number}"), priority=priority)
    assert await work(world) == [f"job-{number}" for number in range(4)]


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
VALUES: list[Any] = [
    None, True, 0, -1, 2**31, -(2**63), 1.5, Decimal("1.5"), "", "text", "é\0\n", bytearray(b"\xff\x00"), NOW, [],
    [None], [{"count": 1, "reason": "rejected", "time": NOW, "queue": "x", "exchange": "", "routing-keys": ["x"]}], {},
    {"a": {}},
]  # fmt: skip
OURS = ["mtj-id", "mtj-counts", "mtj-errors", "mtj-died"]
THEIRS = ["x-death", "x-delivery-count", "x-first-death-queue", "x-match", "x-delay", "an", ""]
BROKEN: list[dict[str, Any]] = [
    {"mtj-counts": "999999999 0 999999999 999999999 999999999 -1"},
    {"mtj-counts": "1234567890 1 1 1 1 1"},
    {"mtj-counts": "0 0 0 0 0 0"},
    {"mtj-counts": "1 2 3 4 5 -2"},
    {"mtj-counts": "-1 -1 -1 -1 -1 -1"},
    {"mtj-counts": "٣ 0 0 ٣ 0 -1"},
    {"mtj-counts": "1 " * 60_000},
    {"mtj-id": "a" * 100_000},
    {"mtj-id": "a:b{c}"},
    {"mtj-died": "99999999999999999 queue_gone"},
    {"mtj-died": "0 attempts"},
    {"mtj-died": "x" * 100_000},
    {"mtj-errors": "[" * 100_000},
    {"mtj-errors": '[{"started_at":1e999,"type":[],"worker":{}}]'},
    {"mtj-errors": r'[{"type":"\ud800","message":"\udfff","traceback":"\udc80"}]'},
    {"mtj-errors": json.dumps([{"type": "t" * 130_000}])},
    {"mtj-errors": json.dumps([{"type": "t" * 60_000, "worker": "w" * 60_000}])},
    {"mtj-errors": json.dumps([{"message": "\0" * 20_000}])},
    {"mtj-errors": json.dumps([{"type": "t"}] * 8_000)},
    {"x-death": "text", "x-delivery-count": 1000},
    {"x-death": [1, "x"], "x-delivery-count": "x"},
    {f"header-{number}": number for number in range(5000)},
]


def hostile() -> list[dict[str, Any]]:
    return [*({name: value} for name in (*OURS, *THEIRS) for value in VALUES), *BROKEN]


ERROR = RunError("KeyError", "m" * 4096, "t" * 16_384)
SETTLED_BY: dict[str, Settlement | None] = {
    "done": Done(),
    "retry": Retry(0.0, error=ERROR),
    "delayed retry": Retry(0.1, error=ERROR),
    "release": Release(),
    "dead": Dead("rejected", ERROR),
    "a crash": None,
}


@pytest.mark.parametrize("settlement", SETTLED_BY.values(), ids=SETTLED_BY)
async def test_a_message_with_any_headers_can_be_settled_in_any_way(
    world: "World", kind: str, settlement: Settlement | None
) -> None:
    """And comes again, or lies dead, with the same body, under an id that stays."""
    bodies = dict[bytes, dict[str, Any]]()
    for number, headers in enumerate(hostile()):
        bodies[envelope(f"job-{number}")] = headers
        await world.somebody.put(envelope(f"job-{number}"), headers=headers)
    first, again = dict[bytes, str](), dict[bytes, str]()
    async with asyncio.timeout(PATIENCE), world.backend.receiver(["jobs"], slots=1000, crash_limit=9) as receiver:
        if settlement is None:
            assert {body for _, body in await world.somebody.all_of("jobs")} == bodies.keys()
        while settlement is not None and len(first) < len(bodies):
            deliveries = await receiver.receive(1000, wait=PATIENCE)
            first |= {delivery.message.body: delivery.message.id for delivery in deliveries}
            settled = await receiver.settle([(delivery, settlement) for delivery in deliveries])
            assert settled == [None] * len(deliveries)
        while not isinstance(settlement, Done | Dead) and len(again) < len(bodies):
            deliveries = await receiver.receive(1000, wait=0.2)
            again |= {delivery.message.body: delivery.message.id for delivery in deliveries}
            await receiver.settle([(delivery, Done()) for delivery in deliveries])
            if not deliveries:
                again |= {record.message.body: record.message.id for record in await dead(world)}
    assert await work(world) == []
    records = {record.message.body: record.message.id for record in await dead(world)}
    match settlement:
        case Done():
            assert (first.keys(), records) == (bodies.keys(), {})
        case Dead():
            assert first.keys() == bodies.keys()
            assert records == first
        case None:  # some say that they may not crash at all
            assert again.keys() == bodies.keys()
            assert {bodies[body].get("mtj-counts") for body in records} <= {"0 0 0 0 0 0"}
        case _:
            assert first.keys() == bodies.keys()
            assert (again, records) == (first, {})
    assert all(is_job_id(job_id) for job_id in (first | again).values())


# --- bytes that the driver does not read


def table(entries: bytes) -> bytes:
    return struct.pack(">I", len(entries)) + entries


def nested(kind: bytes, depth: int) -> bytes:
    """Arrays in arrays, or tables in tables."""
    value = b"V"
    for _ in range(depth):
        inner = value if kind == b"A" else b"\x01a" + value
        value = kind + table(inner)
    return table(b"\x01a" + value)


UNREADABLE: dict[str, tuple[str, bytes]] = {
    "a message id of no UTF-8": ("message_id", b"\x02\xff\xfe"),
    "a content type of no UTF-8": ("content_type", b"\x02\xff\xfe"),
    "a timestamp of the far future": ("timestamp", b"\xff" * 8),
    "a header whose name is no UTF-8": ("headers", table(b"\x02\xff\xfeV")),
    "a header whose text is no UTF-8": ("headers", table(b"\x01aS\0\0\0\x02\xff\xfe")),
    "our id in no UTF-8": ("headers", table(b"\x06mtj-idS\0\0\0\x02\xff\xfe")),
    "our numbers in no UTF-8": ("headers", table(b"\x0amtj-countsS\0\0\0\x02\xff\xfe")),
    "a header with a time in the far future": ("headers", table(b"\x01aT" + b"\xff" * 8)),
    "arrays in arrays": ("headers", nested(b"A", 900)),
    "far more of them": ("headers", nested(b"A", 10_000)),
    "tables in tables": ("headers", nested(b"F", 10_000)),
    "a name twice": ("headers", table(b"\x06mtj-idS\0\0\0\x01a" * 2)),
    "a header without a name": ("headers", table(b"\0V")),
    "a decimal of 255 places": ("headers", table(b"\x01aD\xff\xff\xff\xff\xff")),
    "an infinity": ("headers", table(b"\x01ad\x7f\xf0\0\0\0\0\0\0")),
    "a byte array": ("headers", table(b"\x01ax\0\0\0\x01\xff")),
    **{f"a number of the type {kind}": ("headers", table(b"\x01a%b%b" % (kind.encode(), b"\xff" * size)))
       for kind, size in (("b", 1), ("B", 1), ("s", 2), ("u", 2), ("I", 4), ("i", 4), ("l", 8), ("L", 8), ("f", 4))},
}  # fmt: skip


async def test_properties_that_the_driver_cannot_read_stop_nobody(world: "World", kind: str) -> None:
    """An envelope runs, anything else is dead with its bytes; the dead letters can be read and replayed."""
    refused = list[str]()
    for number, (name, raw) in enumerate(UNREADABLE.items()):
        try:
            await world.somebody.put(envelope(f"job-{number}"), raw=raw)
            await world.somebody.put(name.encode(), raw=raw)
        except AMQPError:
            refused.append(name)  # the server does not take it, so nobody ever gets it
    assert len(refused) <= 2
    taken = [name for name in UNREADABLE if name not in refused]
    assert sorted(await work(world)) == sorted(f"job-{[*UNREADABLE].index(name)}" for name in taken)
    assert sorted(record.message.body.decode() for record in await dead(world)) == sorted(taken)
    assert await world.backend.dead_letters("jobs").replay(ALL) == len(taken)
    assert await work(world) == []
    assert {(record.reason, record.replays) for record in await dead(world)} == {("malformed", 1)}


async def test_dead_letters_that_the_driver_cannot_read_are_listed_replayed_and_purged(world: "World") -> None:
    """As the broker itself would put them there, after its own limit."""
    await world.queue()
    letters = world.backend.dead_letters("jobs")
    for name in ("a message id of no UTF-8", "far more of them"):
        for body in (envelope("job"), b"x"):
            await world.somebody.put(body, "jobs.dead", raw=UNREADABLE[name])
    assert sorted(record.message.body for record in await dead(world)) == sorted([envelope("job"), b"x"] * 2)
    assert await letters.replay(ALL) == 4
    assert await work(world) == ["job", "job"]
    assert await letters.purge(ALL) == 2


# --- the broker's own headers


async def test_a_copy_has_none_of_the_brokers_headers(world: "World") -> None:
    """A job that came through a hold, and one that somebody gave all of them, as a retry and as a dead letter."""
    queue = await world.queue()
    theirs = {name: [{"count": 5, "reason": "rejected", "time": NOW}] for name in ("x-death", "x-first-death-reason")}
    await world.somebody.put(envelope("a"), headers=theirs | {"x-delivery-count": 50, "mtj-id": "a", "trace": "x"})
    await world.backend.publish(queue, [Message("b", envelope("b"), delay=0.1)])
    await world.somebody.until(queue, 2)
    assert [set(headers) & {"x-death"} for headers, _ in await world.somebody.all_of(queue)] == [{"x-death"}] * 2
    for settlement in (Retry(0.0), Dead("rejected")):
        async with world.backend.receiver([queue], slots=2) as receiver:
            async with asyncio.timeout(PATIENCE):
                deliveries = list[Delivery]()
                while len(deliveries) < 2:
                    deliveries += await receiver.receive(2, wait=PATIENCE)
            await receiver.settle([(delivery, settlement) for delivery in deliveries])
        name = queue if isinstance(settlement, Retry) else f"{queue}.dead"
        copies = await world.somebody.all_of(name)
        kept = {name for headers, _ in copies for name in headers}
        assert kept - {"x-delivery-count"} <= {"mtj-id", "mtj-counts", "mtj-died"}
        assert all(headers.get("x-delivery-count", 0) < 50 for headers, _ in copies)  # the broker's, of the copy itself
        assert sorted(body for _, body in copies) == [envelope("a"), envelope("b")]


async def test_the_brokers_own_limit_ends_in_the_dead_letters(world: "World") -> None:
    """100 times handed over by the broker to somebody who never settles, ours or not."""
    queue = await world.queue()
    hostile = {"x-death": "text", "x-delivery-count": "text"}
    await world.backend.publish(queue, [Message("a", envelope("a")), Message("b", envelope("b"))])
    await world.somebody.put(envelope("c"), headers=hostile)
    await world.somebody.put(b"x")
    before = datetime.now(UTC).replace(microsecond=0)
    channel = await world.somebody.channel()
    async with asyncio.timeout(PATIENCE):
        while isinstance(got := (await channel.basic_get(f"{world.namespace}:{queue}")).delivery, commands.Basic.GetOk):
            await channel.basic_nack(got.delivery_tag or 0, requeue=True)
    await world.somebody.until(f"{queue}.dead", 4)
    records = {record.message.body: record for record in await dead(world)}
    assert records.keys() == {envelope("a"), envelope("b"), envelope("c"), b"x"}
    for record in records.values():
        assert (record.queue, record.reason, record.attempts) == (queue, "delivery_limit", 0)
        assert record.died_at >= before
    assert (records[envelope("a")].message.id, records[envelope("b")].message.id) == ("a", "b")
    assert await world.backend.dead_letters(queue).replay(DeadFilter(reason="delivery_limit")) == 4
    assert sorted(await work(world)) == ["a", "b", "c"]
    assert [(record.message.body, record.reason) for record in await dead(world)] == [(b"x", "malformed")]
