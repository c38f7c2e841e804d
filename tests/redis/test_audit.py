"""The audit finds whatever is not as `keys.py` says, and nothing where all is well."""

from collections.abc import Sequence
from typing import Any

import pytest
from redis.asyncio import Redis

from mindtrace.jobs import BackendUnavailable, ConfigError, Dead, Done, QueueSpec, RedisBackend, Retry
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.testing.audit import audit
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

READY, SCHEDULED, LEASED, DEAD, ENDED = "r", "s", "l", "d", "e"


@pytest.fixture
async def one_in_each_state(backend: RedisBackend, queue: str) -> Any:
    """The jobs r, s, l and d are in the state that they are named for, and e is done."""
    await backend.publish(queue, [Message(job_id, b"{}") for job_id in (LEASED, DEAD, ENDED, READY)])
    await backend.publish(queue, [Message(SCHEDULED, b"{}", delay=1000.0)])
    async with backend.receiver([queue], slots=4) as receiver:
        leased, dead, ended = await receiver.receive(3)
        assert await receiver.settle([(dead, Dead("rejected")), (ended, Done())]) == [None, None]
        yield leased.receipt


async def test_all_is_well_after_whatever_the_backend_does(
    redis_url: str, namespace: str, backend: RedisBackend, queue: str
) -> None:
    ids = [new_job_id() for _ in range(8)]
    await backend.declare(QueueSpec("urgent", "priority", priority_levels=3, max_length=100))
    for name in (queue, "urgent"):
        level = int(name == "urgent")
        await backend.publish(name, [Message(job_id, b"{}", priority=level) for job_id in ids])
        await backend.publish(name, [Message("later", b"{}", priority=level, delay=1000.0, crash_limit=1)])
    async with backend.receiver([queue], slots=8) as receiver:
        done, dead, again, later, *held = await receiver.receive(7)
        pairs = [(done, Done()), (dead, Dead("rejected")), (again, Retry(0.0)), (later, Retry(1000.0))]
        assert await receiver.settle(pairs) == [None] * 4
        found = await audit(redis_url, namespace)
        assert found.violations == []
        expected = {d.message.id: "leased" for d in held} | {dead.message.id: "dead", later.message.id: "scheduled"}
        expected |= {again.message.id: "ready", ids[7]: "ready", "later": "scheduled"}
        assert found.states == {queue: expected, "urgent": {**dict.fromkeys(ids, "ready"), "later": "scheduled"}}
    await backend.delete("urgent")
    found = await audit(redis_url, namespace)
    assert (found.violations, found.states.keys()) == ([], {queue})


TAMPERED: dict[str, tuple[Sequence[str], str]] = {
    "no body": (("HDEL", "jobs", READY), "'r' is ready, and has no body"),
    "no body of a dead one": (("HDEL", "jobs", DEAD), "'d' is dead, and has no body"),
    "in two places": (("ZADD", "dead", "9", READY), "'r' is ready, and dead"),
    "twice in one": (("ZADD", "ready", "1", "0" * 16 + READY), "'r' is ready, and ready"),
    "in none": (("ZREM", "ready", "0000000000000004r"), "jobs: 'r' is nowhere else"),
    "a body alone": (("HSET", "jobs", "x", ""), "jobs: 'x' is nowhere else"),
    "numbers alone": (("HSET", "states", "x", "0 0 0 0 0 0 0 -1"), "states: 'x' is nowhere else"),
    "errors alone": (("HSET", "errors", "x", ""), "errors: 'x' is nowhere else"),
    "a death alone": (("HSET", "deaths", "x", "1 rejected"), "deaths: 'x' is not dead"),
    "a death of one that lives": (("HSET", "deaths", READY, "1 rejected"), "deaths: 'r' is not dead"),
    "a death of nothing": (("HDEL", "deaths", DEAD), "'d' is dead, and nobody knows of what"),
    "a death that is none": (("HSET", "deaths", DEAD, "soon"), "the death of 'd' is none: 'soon'"),
    "numbers that are none": (("HSET", "states", READY, "1 2"), "the numbers of 'r' are none: '1 2'"),
    "no numbers": (("HDEL", "states", DEAD), "'d' is dead, and has no numbers"),
    "another delivery": (
        ("HSET", "states", LEASED, "1 0 0 7 0 0 1 -1"),
        "leased as delivery 1, and its last one was 7",
    ),
    "a member without a place": (("ZADD", "ready", "0", "x"), "ready: 'x' is not well formed"),
    "a receipt without a number": (("ZADD", "leased", "9e14", "x"), "leased: 'x' is not well formed"),
    "a place not given": (("HSET", "spec", "place", "3"), "'r' has a place that was never given: 0000000000000004"),
    "one place for two": (("ZADD", "scheduled", "9e14", "0000000000000004x"), "2 jobs have the place 0000000000000004"),
    "a spec that is none": (("HSET", "spec", "kind", "heap"), "its spec is none"),
    "a live one that ended": (("HSET", "jobs", ENDED, ""), "jobs: 'e' is nowhere else"),
    "no spec": (("DEL", "spec"), "not declared, and yet it has dead, deaths, jobs, leased, ready, scheduled, states"),
    "jobs that go away": (("PEXPIRE", "jobs", "100000"), "goes away in "),
    "a bell for ever": (("PERSIST", "bell"), "stays for ever"),
    "a watch for long": (("SET", "watch", "x", "PX", "9000"), "stays for "),
    "a bell that is none": (("SET", "bell", "1", "PX", "100"), "a string in place of a list"),
    "a call of nobody": (("SET", "call:x", "1", "PX", "100"), "a queue has no such key"),
    "an unknown part": (("SET", "notes", "1"), "a queue has no such key"),
}


@pytest.mark.parametrize(("command", "violation"), TAMPERED.values(), ids=TAMPERED.keys())
async def test_what_is_not_as_it_has_to_be_is_found(
    redis_url: str, namespace: str, server: Redis, one_in_each_state: str, command: Sequence[str], violation: str
) -> None:
    assert (await audit(redis_url, namespace)).violations == []
    name, part, *rest = command
    await server.execute_command(name, f"{namespace}:{{jobs}}:{part}", *rest)
    found = (await audit(redis_url, namespace)).violations
    assert any(violation in one for one in found), found


@pytest.mark.parametrize(("reason", "is_well"), [("malformed", True), ("too_large", True), ("rejected", False)])
async def test_a_dead_letter_may_have_any_id_where_nobody_could_read_it(
    redis_url: str, namespace: str, server: Redis, backend: RedisBackend, queue: str, reason: str, is_well: bool
) -> None:
    for part, value in (("jobs", "x"), ("states", "0 0 0 0 0 0 0 -1"), ("deaths", f"1 {reason}")):
        await server.hset(f"{namespace}:{{jobs}}:{part}", "-x\n", value)
    await server.zadd(f"{namespace}:{{jobs}}:dead", {"-x\n": 1})
    found = (await audit(redis_url, namespace)).violations
    assert found == ([] if is_well else [r"jobs: dead: '-x\n' is not well formed"])


async def test_a_job_that_comes_back_from_its_end_is_found(
    redis_url: str, namespace: str, server: Redis, one_in_each_state: str
) -> None:
    await server.hset(f"{namespace}:{{jobs}}:jobs", ENDED, "{}")
    await server.zadd(f"{namespace}:{{jobs}}:ready", {f"{4:016}{ENDED}": 0})
    assert "jobs: 'e' is ready, and known to have ended" in (await audit(redis_url, namespace)).violations


async def test_a_queue_that_nobody_lists_is_found_and_a_name_without_a_queue_is_not(
    redis_url: str, namespace: str, server: Redis, backend: RedisBackend, queue: str
) -> None:
    await server.sadd(f"{namespace}:queues", "declared-by-one-who-died-meanwhile")
    assert (await audit(redis_url, namespace)).violations == []
    await server.srem(f"{namespace}:queues", queue)
    assert (await audit(redis_url, namespace)).violations == ["jobs: declared, and not registered"]


async def test_a_key_of_no_queue_is_found_and_another_namespace_is_none_of_its_business(
    redis_url: str, namespace: str, server: Redis
) -> None:
    await server.set(f"{namespace}.x:stray", "1", px=5000)
    assert (await audit(redis_url, namespace)).violations == []
    await server.set(f"{namespace}:stray", "1", px=5000)
    assert (await audit(redis_url, namespace)).violations == [f"'{namespace}:stray': a key of no queue"]


async def test_it_says_so_where_it_cannot_look() -> None:
    with pytest.raises(ConfigError):
        await audit("redis://localhost", "*")
    with pytest.raises(BackendUnavailable):
        await audit("redis://127.0.0.1:1", "mtj")
