"""Every command that the backend sends, broken: nothing is lost or done twice, and no caller notices."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis

from mindtrace.jobs import (
    Backend,
    Dead,
    Delivery,
    Depth,
    Done,
    JobNotFound,
    QueueNotFound,
    QueueSpec,
    Receiver,
    RedisBackend,
    Release,
    Retry,
    Settlement,
)
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.audit import audit
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.faults import CancelAt, every_suspension
from mindtrace.jobs.testing.proxy import FaultProxy, Trap
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.redis, pytest.mark.chaos]

ALL = DeadFilter()


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    """One that may be restarted, and that remembers."""
    with brokers.redis(private=True) as broker:
        yield broker


@pytest.fixture(autouse=True)
def quiet_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Hundreds of lines that break on purpose would bury what a failing test has to say."""
    caplog.set_level("CRITICAL", logger="mindtrace.jobs")


def messages(*ids: str, **options: Any) -> list[Message]:
    return [Message(job_id, b"{}", **options) for job_id in ids]


def told(deliveries: list[Delivery]) -> list[tuple[str, int, int, int, int]]:
    """What of a delivery has to be the same however often it was asked for."""
    return [(d.message.id, d.attempt, d.crashes, d.releases, d.number) for d in deliveries]


async def every_verb(backend: Backend) -> list[Any]:
    """Does everything that a backend can do, once, and tells what came of it."""
    said: list[Any] = []
    queue, letters = "jobs", backend.dead_letters("jobs")
    await backend.declare(QueueSpec(queue, "priority"))
    await backend.declare(QueueSpec("other"))
    said.append(await backend.publish(queue, messages("a")))
    said.append(await backend.publish(queue, messages("b", "c", "d", "e", "f", "g", "h", "i")))
    said.append(await backend.publish(queue, messages("later", delay=1000.0)))
    said.append(await backend.publish(queue, messages("urgent", priority=5, crash_limit=1)))
    assert [*await backend.publish(queue, messages("a"))] in (["duplicate"], ["stored"])  # the latter: sent twice
    said.append(await backend.depth(queue))
    async with backend.receiver([queue], slots=20) as receiver:
        taken = await receiver.receive(8)
        said.append(told(taken))
        said.append(await receiver.extend(taken))
        done, again, later, dead, also_dead, released, snoozed, held = taken
        pairs: list[tuple[Delivery, Settlement]] = [
            (done, Done()), (again, Retry(0.0)), (later, Retry(1000.0)), (dead, Dead("rejected")),
            (also_dead, Dead("attempts")), (released, Release()), (snoozed, Release(1000.0)),
        ]  # fmt: skip
        exchanged = await receiver.exchange(pairs, 2)
        said.append((exchanged.settled, told(exchanged.deliveries)))
        said.append([type(answer) for answer in (await receiver.exchange(pairs, 0)).settled])
        said.append(await receiver.settle([(delivery, Done()) for delivery in exchanged.deliveries]))
        said.append((await backend.depth(queue), held.lost))
    page = await letters.list(ALL)
    said.append([(record.message, record.reason, record.attempts) for record in page.records])
    said.append((await letters.get(dead.message.id)).reason)
    said.append(await letters.replay([dead.message.id]))
    said.append(await letters.count())
    said.append(await letters.purge(ALL))
    said.append(await backend.depth(queue))
    async with backend.receiver([queue], slots=3) as receiver:
        taken = await receiver.receive(3)
        said.append(told(taken))
        said.append(await receiver.settle([(delivery, Done()) for delivery in taken]))
    said.append(await backend.clean(queue))
    said.append(await backend.queues())
    async with backend.receiver([queue, "other"]) as receiver:
        said.append(await receiver.receive(1, wait=0.02))
        said.append(await backend.publish("other", messages("x")))
        said.append(told(await receiver.receive(1, wait=5.0)))
    await backend.delete("other")
    said.append(await backend.queues())
    said.append(await backend.publish(queue, messages("kept")))
    return said


@dataclass
class Run:
    """What came of one run: what its callers were told, and where the jobs are afterwards."""

    said: list[Any]
    states: Any
    violations: list[str]
    requests: int
    trap: Trap | None


async def run(url: str, lay: Callable[[FaultProxy], Trap] | None = None) -> Run:
    """All verbs over a line with a trap in it."""
    namespace = f"t{secrets.token_hex(6)}"
    async with asyncio.timeout(30), FaultProxy.to(url) as proxy:
        trap = lay(proxy) if lay else None
        backend = RedisBackend.from_url(proxy.url(url), namespace=namespace)
        await backend.open()
        try:
            said = await every_verb(backend)
        finally:
            await backend.aclose()
    found = await audit(url, namespace)
    return Run(said, found.states, found.violations, proxy.count(), trap)


async def at_every_command(
    url: str, lay: Callable[[FaultProxy, int], Trap], *, step: int = 1, of: Callable[[bytes], bool] | None = None
) -> set[bytes]:
    """With the trap at each command in turn all has to be as it is without. Gives the commands that it struck."""
    undisturbed = await run(url)
    assert (undisturbed.violations, undisturbed.states) == ([], {"jobs": {"kept": "ready"}})
    struck: set[bytes] = set()
    k = 1
    while True:
        disturbed = await run(url, lambda proxy, k=k: lay(proxy, k))
        assert disturbed.trap is not None
        assert disturbed.violations == [], disturbed.trap
        assert disturbed.said == undisturbed.said, disturbed.trap
        assert disturbed.states == undisturbed.states, disturbed.trap
        if disturbed.trap.struck is None:
            break
        struck.add(disturbed.trap.struck)
        k += step
    assert k >= undisturbed.requests * 0.8, "there were fewer of them than without a fault"
    return struck


async def test_nobody_notices_that_a_reply_was_lost_and_nothing_is_done_twice(broker: Broker) -> None:
    struck = await at_every_command(broker.url, lambda proxy, k: proxy.cut_reply(k))
    assert struck >= {b"INFO", b"SADD", b"EVALSHA", b"SSCAN", b"HMGET", b"SREM"}


@pytest.mark.parametrize("ring", [1, 2])
async def test_a_ring_that_is_lost_costs_a_second_and_no_job(broker: Broker, ring: int) -> None:
    """Whether its pop brought nothing or a token."""
    async with asyncio.timeout(30), FaultProxy.to(broker.url) as proxy:
        trap = proxy.cut_reply(ring, of=lambda name: name == b"BLPOP")
        listening = proxy.before(ring, lambda: asyncio.sleep(0), of=lambda name: name == b"BLPOP")
        backend = RedisBackend.from_url(proxy.url(broker.url), namespace=f"t{secrets.token_hex(6)}")
        await backend.open()
        await backend.declare(QueueSpec("jobs"))
        async with backend.receiver(["jobs"]) as receiver:
            waiting = asyncio.create_task(receiver.receive(1, wait=20.0))
            while listening.struck is None:  # noqa: ASYNC110 (no trap tells of it)
                await asyncio.sleep(0.001)
            started = time.monotonic()
            await backend.publish("jobs", messages("a"))
            [delivery] = await waiting
            assert delivery.message.id == "a"
            assert time.monotonic() - started < 3.0
            assert trap.struck == b"BLPOP"
        await backend.aclose()


async def test_nobody_notices_that_a_connection_was_reset_before_the_reply(broker: Broker) -> None:
    await at_every_command(broker.url, lambda proxy, k: proxy.cut_reply(k, reset=True), step=4)


async def test_nobody_notices_that_the_server_forgot_its_scripts(broker: Broker) -> None:
    client: Redis = Redis.from_url(broker.url, protocol=2)
    struck = await at_every_command(broker.url, lambda proxy, k: proxy.before(k, lambda: client.script_flush()))
    assert b"EVALSHA" in struck
    await client.aclose()


async def test_nobody_notices_a_restart(broker: Broker) -> None:
    restarted = lambda: asyncio.to_thread(broker.restart)  # noqa: E731 (a line that is said once)
    await at_every_command(broker.url, lambda proxy, k: proxy.before(k, restarted), step=6)


async def test_dead_letters_that_two_replay_at_once_are_replayed_and_counted_once(
    new_world: "Callable[[], World]", redis_url: str
) -> None:
    """Both have looked whether it is dead, before either puts it back; and the same with one who purges it."""
    for others in ("replay", "purge"):
        world = new_world()
        await world.begin()
        letters = world.backend.dead_letters(world.queue)
        counts = await asyncio.gather(letters.replay(["d"]), getattr(letters, others)(["d"]))
        assert sorted(counts) == [0, 1]
        assert await world.depth() == Depth(3, 1, 0, 0)
        await is_in_order(redis_url, world)


# --- cancelled


@dataclass
class World:
    """A queue with the jobs a and b ready, s scheduled, d dead; and who is about to be cancelled."""

    backend: RedisBackend
    queue: str

    async def begin(self) -> None:
        await self.backend.declare(QueueSpec(self.queue))
        await self.backend.publish(self.queue, messages("d", "a", "b"))
        await self.backend.publish(self.queue, messages("s", delay=1000.0))
        async with self.backend.receiver([self.queue]) as receiver:
            [delivery] = await receiver.receive(1)
            await receiver.settle([(delivery, Dead("rejected"))])

    async def depth(self) -> Depth | None:
        """Once nothing is leased: a receiver whose end is cancelled, too, ends without its caller."""
        try:
            async with asyncio.timeout(5):
                while (depth := await self.backend.depth(self.queue)).leased:  # noqa: ASYNC110 (a depth rings no bell)
                    await asyncio.sleep(0)
                return depth
        except QueueNotFound:
            return None


BEFORE = Depth(2, 1, 0, 1)
Verb = Callable[[World], Awaitable[object]]
VERBS: dict[str, tuple[Verb, Depth | None]] = {
    "declare": (lambda w: w.backend.declare(QueueSpec(w.queue)), BEFORE),
    "publish one": (lambda w: w.backend.publish(w.queue, messages("x")), Depth(3, 1, 0, 1)),
    "publish some": (lambda w: w.backend.publish(w.queue, messages("x", "y", "z")), Depth(5, 1, 0, 1)),
    "publish for later": (lambda w: w.backend.publish(w.queue, messages("x", delay=1000.0)), Depth(2, 2, 0, 1)),
    "depth": (lambda w: w.backend.depth(w.queue), BEFORE),
    "queues": (lambda w: w.backend.queues(), BEFORE),
    "clean": (lambda w: w.backend.clean(w.queue), Depth(0, 0, 0, 1)),
    "delete": (lambda w: w.backend.delete(w.queue, force=True), None),
    "list": (lambda w: w.backend.dead_letters(w.queue).list(ALL), BEFORE),
    "get": (lambda w: w.backend.dead_letters(w.queue).get("d"), BEFORE),
    "count": (lambda w: w.backend.dead_letters(w.queue).count(), BEFORE),
    "replay": (lambda w: w.backend.dead_letters(w.queue).replay(ALL), Depth(3, 1, 0, 0)),
    "purge": (lambda w: w.backend.dead_letters(w.queue).purge(["d"]), Depth(2, 1, 0, 0)),
    "receiver": (lambda w: left_at_once(w), BEFORE),
}


async def left_at_once(world: World) -> None:
    async with world.backend.receiver([world.queue], slots=2) as receiver:
        assert len(await receiver.receive(2)) == 2


@pytest.fixture
async def new_world(redis_url: str) -> AsyncIterator[Callable[[], World]]:
    """Makes a queue that no other has, on one backend whose line stays up."""
    backend = RedisBackend.from_url(redis_url, namespace=f"t{secrets.token_hex(6)}")
    await backend.open()
    yield lambda: World(backend, f"q{secrets.token_hex(4)}")
    await backend.aclose()


async def is_in_order(redis_url: str, world: World) -> None:
    """Each job is in one place, none is leased; and whatever is ready comes once, and ends."""
    namespace = repr(world.backend).partition("namespace=")[2].rstrip(">")
    before = await audit(redis_url, namespace)
    assert before.violations == []
    states = before.states.get(world.queue, {})
    assert "leased" not in states.values()
    if world.queue in before.states:
        async with world.backend.receiver([world.queue], slots=10) as receiver:
            taken = await receiver.receive(10)
            assert sorted(d.message.id for d in taken) == sorted(
                one for one, state in states.items() if state == "ready"
            )
            assert [delivery.crashes for delivery in taken] == [0] * len(taken)
            assert await receiver.settle([(delivery, Done()) for delivery in taken]) == [None] * len(taken)
        await world.backend.delete(world.queue, force=True)


@pytest.mark.parametrize(("verb", "after"), VERBS.values(), ids=VERBS.keys())
async def test_a_call_that_is_cancelled_is_done_or_not_and_can_be_repeated(
    redis_url: str, new_world: Callable[[], World], verb: Verb, after: Depth | None
) -> None:
    async def scenario(fault: CancelAt) -> None:
        world = new_world()
        await world.begin()
        ended = await fault.run(awaited(verb(world)))
        assert ended.cancelled or isinstance(ended.error, TimeoutError) or ended.error is None
        assert await world.depth() in ((BEFORE, after) if ended.error else (after,))
        if ended.error and await world.depth() is not None:
            with suppress(JobNotFound):  # the dead letter was purged
                await verb(world)
            assert await world.depth() == after
        await is_in_order(redis_url, world)

    assert await every_suspension(scenario) > 0


async def awaited(call: Awaitable[Any]) -> Any:
    return await call


SETTLEMENTS: list[tuple[Settlement, Depth]] = [
    (Done(), Depth(1, 1, 0, 1)),
    (Retry(0.0), BEFORE),
    (Retry(1000.0), Depth(1, 2, 0, 1)),
    (Dead("rejected"), Depth(1, 1, 0, 2)),
    (Release(), BEFORE),
    (Release(1000.0), Depth(1, 2, 0, 1)),
]


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize(("settlement", "after"), SETTLEMENTS, ids=[repr(one[0]) for one in SETTLEMENTS])
async def test_a_settlement_that_is_cancelled_is_done_once_or_not_at_all(
    redis_url: str, new_world: Callable[[], World], settlement: Settlement, after: Depth, limit: int
) -> None:
    """And what the same call received is handed back."""

    async def scenario(fault: CancelAt) -> None:
        world = new_world()
        await world.begin()
        async with world.backend.receiver([world.queue], slots=2) as receiver:
            [delivery] = await receiver.receive(1)
            ended = await fault.run(receiver.exchange([(delivery, settlement)], limit))
            assert ended.cancelled or isinstance(ended.error, TimeoutError) or ended.error is None
            if ended.value is not None:
                assert ended.value.settled == [None]
        assert await world.depth() in ((BEFORE, after) if ended.error else (after,))
        await is_in_order(redis_url, world)

    assert await every_suspension(scenario) > 0


@pytest.mark.parametrize("what", ["receive", "extend"])
async def test_a_receive_that_is_cancelled_loses_no_job_and_an_extend_no_lease(
    redis_url: str, new_world: Callable[[], World], what: str
) -> None:
    async def scenario(fault: CancelAt) -> None:
        world = new_world()
        await world.begin()
        async with world.backend.receiver([world.queue], slots=2) as receiver:
            taken = await receiver.receive(2) if what == "extend" else []
            ended = await fault.run(call(receiver, taken))
            if what == "receive":
                taken = ended.value if ended.value is not None else await receiver.receive(2, wait=5.0)
            assert told(taken) == [("a", 1, 0, 0, 1), ("b", 1, 0, 0, 1)]
            assert await receiver.settle([(delivery, Done()) for delivery in taken]) == [None, None]
        assert await world.depth() == Depth(0, 1, 0, 1)
        await is_in_order(redis_url, world)

    async def call(receiver: Receiver, taken: list[Delivery]) -> Any:
        return await (receiver.receive(2) if what == "receive" else receiver.extend(taken))

    assert await every_suspension(scenario) > 0
