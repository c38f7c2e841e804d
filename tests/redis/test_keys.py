"""What lies in Redis: which keys, for how long, in which slot, how large; and who gets at them."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import ResponseError

from mindtrace.jobs import (
    ConfigError,
    Dead,
    Delivery,
    Done,
    JobNotFound,
    QueueInUse,
    QueueNotFound,
    QueueSpec,
    RedisBackend,
    Release,
    Retry,
)
from mindtrace.jobs.backends.redis.keys import QueueKeys, registry
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import checked_namespace, new_job_id
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.audit import audit
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

ALL = DeadFilter()
LONGEST = {"known": 180_000, "call": 300_000, "bell": 60_000, "watch": 1_500}


def messages(count: int, **options: Any) -> list[Message]:
    return [Message(new_job_id(), b"{}", **options) for _ in range(count)]


async def every_verb(backend: RedisBackend, queue: str) -> None:
    """A priority queue on which everything is done that a backend can do, and that is empty afterwards."""
    await backend.declare(QueueSpec(queue, "priority"))
    await backend.publish(queue, messages(1))
    await backend.publish(queue, [*messages(8), *messages(2, priority=3, delay=0.01), *messages(2, delay=1000.0)])
    await backend.publish(queue, messages(1, priority=2, crash_limit=1))
    letters = backend.dead_letters(queue)
    async with backend.receiver([queue], slots=8, keep=False) as receiver:
        one, two, three, four, five, six = await receiver.receive(6, wait=1.0)
        assert await receiver.extend([one, two]) == [None, None]
        pairs = [(one, Done()), (two, Retry(0.0)), (three, Dead("rejected")), (four, Release()), (five, Retry(1000.0))]
        assert await receiver.settle([*pairs, (six, Dead("rejected"))]) == [None] * 6
        await receiver.receive(2)  # given back by the end of the receiver
    async with backend.receiver([queue], lease=0.05, keep=False, crash_limit=1) as stalled:
        [held] = await stalled.receive(1)
        async with backend.receiver([queue], crash_limit=1) as other:
            while held.message.id not in [record.message.id for record in (await letters.list(ALL)).records]:
                await other.exchange([(delivery, Release()) for delivery in await other.receive(1, wait=0.1)], 0)
    await backend.depth(queue)
    await backend.queues()
    assert await letters.count() == 3
    assert (await letters.get(three.message.id)).reason == "rejected"
    assert await letters.replay([three.message.id]) == 1
    assert await letters.purge(ALL) == 2
    await drain(backend, queue)
    assert await backend.clean(queue) == 3
    async with backend.receiver([queue]) as idle:
        assert await idle.receive(1, wait=0.05) == []


async def drain(backend: RedisBackend, queue: str) -> int:
    count = 0
    async with backend.receiver([queue], slots=500) as receiver:
        pairs: list[tuple[Delivery, Done]] = []
        while (exchanged := await receiver.exchange(pairs, 500)).deliveries or pairs:
            pairs = [(delivery, Done()) for delivery in exchanged.deliveries]
            count += len(pairs)
    return count


async def keys_of(server: Redis, namespace: str) -> dict[str, int]:
    """Name -> ms left, -1 for ever."""
    names = [name.decode() async for name in server.scan_iter(f"{namespace}*", count=1000)]
    return {name: await server.pttl(name) for name in names}


# --- how long


async def test_an_empty_queue_keeps_its_declaration_and_else_only_what_goes_away_by_itself(
    redis_url: str, server: Redis, backend: RedisBackend, namespace: str
) -> None:
    await every_verb(backend, "jobs")
    found = await keys_of(server, namespace)
    forever = {name for name, left in found.items() if left == -1}
    assert forever == {f"{namespace}:queues", f"{namespace}:{{jobs}}:spec"}
    parts = {name: name.removeprefix(f"{namespace}:{{jobs}}:").partition(":")[0] for name in found.keys() - forever}
    assert {"known", "call"} <= {*parts.values()}
    assert [name for name, part in parts.items() if not 0 < found[name] <= LONGEST[part]] == []
    assert (await audit(redis_url, namespace)).violations == []


async def test_a_deleted_queue_keeps_nothing_but_what_goes_away_by_itself(
    redis_url: str, server: Redis, backend: RedisBackend, namespace: str
) -> None:
    await every_verb(backend, "jobs")
    await backend.publish("jobs", [*messages(5), *messages(1, delay=1000.0)])
    async with backend.receiver(["jobs"], slots=3) as receiver:
        _, dead, again = await receiver.receive(3)
        await receiver.settle([(dead, Dead("rejected")), (again, Retry(1000.0))])
        with pytest.raises(QueueInUse):
            await backend.delete("jobs")
        await backend.delete("jobs", force=True)
    left = await keys_of(server, namespace)
    assert {name: ms for name, ms in left.items() if not 0 < ms <= 300_000} == {}
    assert {name.removeprefix(f"{namespace}:{{jobs}}:").partition(":")[0] for name in left} == {"call"}
    assert (await audit(redis_url, namespace)).states == {}


async def test_a_thousand_receivers_in_turn_leave_the_memory_of_one_call(
    server: Redis, backend: RedisBackend, namespace: str, queue: str
) -> None:
    for message in messages(30):
        await backend.publish(queue, [message])
        async with backend.receiver([queue]) as receiver:
            [delivery] = await receiver.receive(1)
            await receiver.settle([(delivery, Done())])
    assert len([name for name in await keys_of(server, namespace) if ":call:" in name]) == 1


# --- which


@dataclass
class Sent:
    """One command that the server was sent, and what a script then called."""

    words: list[str]
    called: list[list[str]]


@asynccontextmanager
async def watched(redis_url: str, server: Redis) -> AsyncIterator[Callable[[], Awaitable[list[Sent]]]]:
    """What the server does meanwhile. The function gives all of it so far."""
    client: Redis = Redis.from_url(redis_url, protocol=2)
    sent: list[Sent] = []

    async with client.monitor() as monitor:

        async def so_far() -> list[Sent]:
            await server.echo("so far")
            async for line in monitor.listen():
                words = line["command"].split(" ")
                if words[:2] == ["ECHO", "so"]:
                    return sent
                if line["client_type"] == "lua":
                    sent[-1].called.append(words)
                else:
                    sent.append(Sent(words, []))
            raise AssertionError("the server ended it")

        yield so_far
    await client.aclose()


async def touched(server: Redis, words: list[str]) -> list[str]:
    """The keys that the server finds in a command."""
    try:
        keys: Any = await server.execute_command("COMMAND GETKEYS", *words)
        return keys
    except ResponseError as error:
        if "no key arguments" not in str(error) and words != ["TIME"]:
            raise
        return []


async def test_a_script_gets_one_key_and_touches_its_own_queue_and_a_plain_command_touches_one_key(
    redis_url: str, server: Redis, backend: RedisBackend, namespace: str
) -> None:
    await every_verb(backend, "warm-up")  # whole scripts are no reading
    await backend.delete("warm-up")
    async with watched(redis_url, server) as so_far:
        await every_verb(backend, "jobs")
        await backend.delete("jobs")
        sent = await so_far()
    prefixes = {f"{namespace}:{{jobs}}:"}
    scripts = [one for one in sent if one.words[0] == "EVALSHA"]
    assert {(one.words[2], one.words[3]) for one in scripts} <= {("1", prefix) for prefix in prefixes}
    assert len({one.words[1] for one in scripts}) == 12, "each script was used"
    for one in scripts:
        for words in one.called:
            keys = await touched(server, words)
            assert [key for key in keys if not key.startswith(one.words[3])] == [], words
            assert words[0] == "TIME" or keys, words
    plain = {one.words[0]: await touched(server, one.words) for one in sent if one.words[0] != "EVALSHA"}
    assert plain.keys() <= {"SADD", "SREM", "SISMEMBER", "SSCAN", "HMGET", "BLPOP", "CLIENT", "SELECT"}
    assert {name: keys for name, keys in plain.items() if keys} == {
        **{name: [registry(namespace)] for name in ("SADD", "SREM", "SISMEMBER", "SSCAN")},
        "HMGET": [f"{namespace}:{{jobs}}:spec"],
        "BLPOP": [f"{namespace}:{{jobs}}:bell"],
    }


async def test_what_a_receiver_of_several_queues_sends_for_all_of_them_at_once_touches_their_bells_alone(
    redis_url: str, server: Redis, backend: RedisBackend, namespace: str
) -> None:
    for name in ("one", "two"):
        await backend.declare(QueueSpec(name))
    async with watched(redis_url, server) as so_far:
        async with backend.receiver(["one", "two"]) as receiver:
            assert await receiver.receive(1, wait=0.05) == []
        sent = await so_far()
    of_several = [(one.words[0], keys) for one in sent if len(keys := await touched(server, one.words)) > 1]
    bells = {f"{namespace}:{{one}}:bell", f"{namespace}:{{two}}:bell"}
    assert of_several
    assert [(name, keys) for name, keys in of_several if name != "BLPOP" or {*keys} != bells] == []


async def test_all_keys_of_a_queue_lie_in_one_slot(server: Redis, backend: RedisBackend, namespace: str) -> None:
    names = ["jobs", "a", "A.b-c_9", "x" * 128]
    for name in names:
        await every_verb(backend, name)
        await backend.publish(name, [*messages(4), *messages(1, delay=1000.0, priority=1)])
        async with backend.receiver([name], slots=3) as receiver:
            _, dead, again = await receiver.receive(3)
            await receiver.settle([(dead, Dead("rejected")), (again, Retry(0.0))])
    found = await keys_of(server, namespace)
    for name in names:
        mine = [key for key in found if f"{{{name}}}" in key]
        assert len({key.removeprefix(f"{namespace}:{{{name}}}:").partition(":")[0] for key in mine}) >= 9
        assert {key_slot(key.encode()) for key in mine} == {key_slot(name.encode())}


# --- whose

HOSTILE = [
    "", "*", "?", "{", "}", "{}", "a}", "{a", "a}:jobs:{b", "jobs}:ready", "jobs}:{jobs", ":", "a:b", "jobs:", "jobs\n",
    "jobs ", " jobs", "jobs\0", "jobs\r\nFLUSHALL\r\n", "-jobs", ".", "..", "../jobs", "é", "jobs\u200b", "x" * 129,
    "amq.jobs", "jobs.dead", "jobs.hold", "jobs.bell", "\ud800", "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
async def test_a_name_outside_the_grammar_cannot_be_declared_and_is_a_queue_that_is_not_there(
    redis_url: str, server: Redis, backend: RedisBackend, namespace: str, queue: str, name: str
) -> None:
    await backend.publish(queue, [Message("a", b"{}")])
    before = await contents(server, namespace)
    with pytest.raises(ConfigError):
        QueueSpec(name)
    async with watched(redis_url, server) as so_far:
        [outcome] = await backend.publish(name, messages(1))
        assert isinstance(outcome, QueueNotFound)
        for call in (backend.depth, backend.clean, backend.delete):
            with pytest.raises(QueueNotFound):
                await call(name)
        letters = backend.dead_letters(name)
        for call in (letters.list, letters.replay, letters.purge):
            with pytest.raises(QueueNotFound):
                await call(ALL)
        async with backend.receiver([name]) as receiver:
            assert (await receiver.exchange([], 1)).missing == (name,)
        sent = await so_far()
    assert [one for one in sent if one.words[0] == "FLUSHALL"] == []
    assert await contents(server, namespace) == before


async def contents(server: Redis, namespace: str) -> dict[bytes, bytes | None]:
    """Everything that stays."""
    found = {name: await server.dump(name) async for name in server.scan_iter(f"{namespace}*")}
    return {name: dumped for name, dumped in found.items() if b":call:" not in name and not name.endswith(b":bell")}


@pytest.mark.parametrize("name", [*HOSTILE[:-6], "x" * 65], ids=ascii)
def test_a_namespace_outside_the_grammar_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        RedisBackend(namespace=name)


@given(st.text(max_size=140), st.text(max_size=70))
@example("jobs", "mtj")
@example("a}:jobs:{b", "mtj")
@example("jobs", "mtj:{jobs}")
@example("x" * 128, "x" * 64)
def test_whatever_text_is_a_name_has_keys_that_are_its_own(queue: str, namespace: str) -> None:
    try:
        spec, namespace = QueueSpec(queue), checked_namespace(namespace)
    except ConfigError:
        return
    keys = QueueKeys(namespace, spec.name)
    # What is in front of the brace is the namespace, and what is in the braces the queue: it cannot be read otherwise.
    assert re.fullmatch(r"([^{}:]+):\{([^{}:]+)\}:", keys.prefix, re.DOTALL).groups() == (namespace, queue)  # type: ignore[union-attr] (it matches)
    assert {key_slot(key.encode()) for key in (keys.prefix, keys.spec, keys.bell)} == {key_slot(queue.encode())}
    assert not registry(namespace).startswith(keys.prefix)


@pytest.mark.parametrize("job_id", ["\udcff", "a\nb", "", "*", pytest.param("\ud800", id="surrogate")])
async def test_an_id_outside_the_grammar_is_a_job_that_is_not_there(
    backend: RedisBackend, queue: str, job_id: str
) -> None:
    letters = backend.dead_letters(queue)
    with pytest.raises(JobNotFound):
        await letters.get(job_id)
    for call in (letters.replay, letters.purge):
        with pytest.raises(JobNotFound):
            await call([job_id])


async def test_two_namespaces_do_not_see_each_other(
    redis_url: str, backend: RedisBackend, namespace: str, queue: str
) -> None:
    """Not even where the name of one begins with that of the other."""
    other = RedisBackend.from_url(redis_url, namespace=f"{namespace}.x")
    await other.open()
    try:
        await backend.publish(queue, [Message("same", b"mine"), Message("dead", b"mine")])
        assert await other.queues() == []
        with pytest.raises(QueueNotFound):
            await other.depth(queue)
        await other.declare(QueueSpec(queue, "stack"))
        assert await backend.queues() == [QueueSpec(queue)]
        assert await other.publish(queue, [Message("same", b"theirs")]) == ["stored"]
        async with backend.receiver([queue], slots=9) as mine, other.receiver([queue], slots=9) as theirs:
            one, two = await mine.receive(9)
            [three] = await theirs.receive(9)
            assert [d.message.body for d in (one, two, three)] == [b"mine", b"mine", b"theirs"]
            assert await mine.settle([(one, Done()), (two, Dead("rejected"))]) == [None, None]
            assert await theirs.settle([(three, Retry(0.0))]) == [None]
        assert await other.dead_letters(queue).count() == 0
        assert await other.clean(queue) == 1
        await other.delete(queue)
        assert (await backend.depth(queue)).dead == 1
        assert await backend.publish(queue, [Message("same", b"mine")]) == ["duplicate"]
        assert await other.queues() == []
    finally:
        await other.aclose()


# --- how large

COUNT = 20_000


async def test_a_job_takes_as_much_memory_as_the_page_says() -> None:
    """570 bytes while it waits with a body of 260, 100 once it has ended."""
    with brokers.redis(private=True) as broker, BlockingRedis.from_url(broker.url, protocol=2) as client:

        async def used(do: Callable[[RedisBackend], Awaitable[object]]) -> int:
            """Once that is done, and its connections are closed, which take memory of their own."""
            backend = RedisBackend.from_url(broker.url)
            await backend.open()
            await do(backend)
            await backend.aclose()
            while client.info("clients")["connected_clients"] > 1:
                pass
            return int(client.info("memory")["used_memory"])

        async def begin(backend: RedisBackend) -> None:
            await backend.declare(QueueSpec("jobs"))
            await backend.publish("jobs", messages(1))
            await drain(backend, "jobs")

        async def publish(backend: RedisBackend) -> None:
            for _ in range(COUNT // 500):
                await backend.publish("jobs", [Message(new_job_id(), b"x" * 260) for _ in range(500)])

        async def run(backend: RedisBackend) -> None:
            assert await drain(backend, "jobs") == COUNT

        empty = await used(begin)
        waiting = await used(publish) - empty
        ended = await used(run) - empty
    assert waiting / COUNT == pytest.approx(570, rel=0.1)
    assert ended / COUNT == pytest.approx(100, rel=0.1)
