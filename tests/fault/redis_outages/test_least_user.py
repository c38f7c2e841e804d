"""The least that a user on the server has to be allowed, and that it is enough, and no more than enough.

Whoever sets the server up copies it:

    ACL SETUSER worker on >PASSWORD resetkeys ~mtj:* resetchannels &mtj:* nocommands +evalsha +eval ...
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    AuthenticationFailed,
    Dead,
    Done,
    Job,
    QueueSpec,
    RedisBackend,
    Release,
    Retry,
    Worker,
)
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

if TYPE_CHECKING:
    from tests.fault.redis_outages.conftest import Server

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.redis]

SENT = ("evalsha", "eval", "client|setname", "blpop", "hmget", "sadd", "sismember", "srem", "sscan")
"""What the library sends. With these alone it works."""
SCRIPTED = (
    *("time", "exists", "get", "set", "del", "unlink", "pexpire"),
    *("hset", "hsetnx", "hget", "hmget", "hdel", "hexists", "hincrby", "hstrlen"),
    *("zadd", "zrem", "zcard", "zcount", "zscore", "zmscore", "zrange", "zrevrange", "zremrangebyrank", "zpopmin"),
    *("sadd", "smismember", "llen", "rpush"),
)
"""What the scripts call: the server asks whether the user may, here too."""
OPTIONAL = ("info", "config|get", "script|load", "select")
"""Without the first two the durability is unknown, and eviction is not noticed; without the third the first call of a
kind on a connection takes a round trip more; the fourth is for databases but 0.

From Redis 7.2 on the driver gives its name by CLIENT SETINFO, and does not mind being refused. The audit is for an
administrator.
"""
NEVER = (
    *("KEYS *", "FLUSHALL", "FLUSHDB", "DEBUG RELOAD", "CONFIG SET maxmemory 1", "ACL SETUSER x", "REPLICAOF NO ONE"),
    *("MODULE LOAD x", "SCRIPT FLUSH", "FUNCTION LIST", "CLIENT LIST", "CLIENT KILL ID 1", "MONITOR", "SHUTDOWN"),
)

PASSWORD = "least-4711"  # noqa: S105 (of servers that live for a test)
NewUser = Callable[..., RedisBackend]


def rules(namespace: str, *commands: str) -> list[str]:
    """Of a user who may call these in one namespace and do nothing else."""
    allowed = [f"+{command}" for command in dict.fromkeys(commands)]
    return ["reset", "on", f">{PASSWORD}", f"~{namespace}:*", f"&{namespace}:*", "nocommands", *allowed]


@pytest.fixture
async def new_user(server: "Server") -> AsyncIterator[NewUser]:
    """Makes a user, and gives the backend that logs in as that."""
    made: list[RedisBackend] = []

    def new(*commands: str, namespace: str = "mtj") -> RedisBackend:
        name = f"user{len(made)}"
        server.say("ACL", "SETUSER", name, *rules(namespace, *commands))
        made.append(RedisBackend(port=server.port, username=name, password=PASSWORD, namespace=namespace))
        return made[-1]

    yield new
    for backend in made:
        await backend.aclose()


async def everything(backend: RedisBackend) -> None:
    """Each call there is, and each path of the scripts, once."""
    await backend.open()
    await backend.declare(QueueSpec("jobs", "priority", max_length=100))
    await backend.declare(QueueSpec("stack", "stack"))
    assert len(await backend.queues()) == 2
    plain = [Message(new_job_id(), b"{}") for _ in range(8)]
    odd = [Message(new_job_id(), b"{}", 5, crash_limit=1), Message(new_job_id(), b"{}", 0, 0.05)]
    assert set(await backend.publish("jobs", [*plain, *odd])) == {"stored"}
    assert await backend.publish("jobs", plain) == ["duplicate"] * 8
    assert await backend.publish("stack", [Message(new_job_id(), b"{}")]) == ["stored"]
    async with backend.receiver(["jobs"], slots=10, lease=0.05, keep=False) as stalled:
        assert len(await stalled.receive(3, wait=5)) == 3
    async with backend.receiver(["jobs"], slots=10, lease=0.05, keep=False) as stalled:
        [first] = await stalled.receive(1, wait=5)
        async with backend.receiver(["jobs", "stack"], slots=20, lease=0.6) as receiver:
            deliveries = []
            async with asyncio.timeout(10):
                while len(deliveries) < 10:  # all but the one whose first crash is its last
                    deliveries += await receiver.receive(20, wait=5)
            assert first.message.id not in {delivery.message.id for delivery in deliveries}
            assert await receiver.extend(deliveries) == [None] * 10
            settlements = [Done(), Retry(0.0), Retry(60.0), Dead("rejected"), Release(), Release(60.0)]
            pairs = list(zip(deliveries, settlements, strict=False))
            assert await receiver.settle(pairs) == [None] * 6
            again = await receiver.receive(20)
            assert await receiver.settle([(delivery, Done()) for delivery in again]) == [None] * len(again)
            assert await receiver.receive(1, wait=1.2) == []  # the keeper's turn, and the bell's
            ringing = asyncio.create_task(receiver.receive(1, wait=10))
            await asyncio.sleep(0)
            await backend.publish("jobs", [Message(new_job_id(), b"{}")])
            assert len(await ringing) == 1
    letters = backend.dead_letters("jobs")
    assert await letters.count() == 2
    page = await letters.list(DeadFilter())
    assert (await letters.get(page.records[0].message.id)).reason == page.records[0].reason
    assert await letters.replay([page.records[0].message.id]) == 1
    assert await letters.purge([page.records[1].message.id]) == 1
    assert await backend.clean("jobs") > 0
    await backend.depth("jobs")
    await backend.delete("jobs", force=True)
    await backend.delete("stack")
    assert await backend.queues() == []


async def test_the_least_user_can_do_everything_with_jobs(new_user: NewUser) -> None:
    """Also without what is optional; then it is only not known what the server does with its data."""
    with_facts, without = new_user(*SENT, *SCRIPTED, *OPTIONAL), new_user(*SENT, *SCRIPTED, namespace="other")
    await asyncio.gather(everything(with_facts), everything(without))
    assert with_facts.traits.durability == "everysec"
    assert without.traits.durability == "unknown"


async def test_a_worker_runs_jobs_as_the_least_user(new_user: NewUser) -> None:
    ran: list[int] = []

    class Adds(AsyncConsumer):
        async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
            ran.append(job_dict["input_data"]["n"])
            return {}

    async with AsyncOrchestrator(new_user(*SENT, *SCRIPTED)) as orchestrator:
        worker = Worker(orchestrator, [Adds("jobs")], until_idle=True)
        await orchestrator.declare(QueueSpec("jobs"))
        await orchestrator.publish_many("jobs", [Job(name="jobs", schema_name="jobs", input_data={"n": 1})])
        assert await worker.run() == 0
    assert ran == [1]


async def test_the_scripts_call_what_is_listed_and_nothing_else() -> None:
    folder = files("mindtrace.jobs.backends.redis").joinpath("lua")
    sources = {file.name: file.read_text("utf-8") for file in folder.iterdir() if not file.name.startswith("audit")}
    called = {name.lower() for text in sources.values() for name in re.findall(r"redis\.p?call\('([A-Z]+)'", text)}
    assert sum(text.count("call(") for text in sources.values()) == sum(
        len(re.findall(r"redis\.p?call\('[A-Z]+'", text)) for text in sources.values()
    )
    assert called == set(SCRIPTED)


async def test_what_the_server_is_asked_is_what_is_listed_and_nothing_else(server: "Server", new_user: NewUser) -> None:
    server.say("CONFIG", "RESETSTAT")
    await everything(backend := new_user(*SENT, *SCRIPTED, *OPTIONAL))
    await backend.declare(QueueSpec("jobs"))
    server.say("ZADD", "mtj:{jobs}:ready", 0, "nothing of ours")
    async with backend.receiver(["jobs"]) as receiver:
        assert await receiver.receive(1) == []
    assert (await backend.depth("jobs")).dead == 1
    asked = {name.removeprefix("cmdstat_") for name in server.info("commandstats")}
    besides = {*OPTIONAL, "auth", "client|setinfo", "config|resetstat", "acl|setuser"}
    assert asked - besides == {*SENT, *SCRIPTED}


async def test_a_call_that_is_not_allowed_fails_at_once_and_is_not_to_be_repeated(new_user: NewUser) -> None:
    """Whether the command itself is not, or one that the script calls."""
    for missing in ("evalsha", "hincrby"):
        allowed = dict.fromkeys((*SENT, *SCRIPTED))
        backend = new_user(*allowed)
        await backend.open()
        await backend.declare(QueueSpec("jobs"))
        del allowed[missing]
        forbidden = new_user(*allowed)
        await forbidden.open()
        async with asyncio.timeout(1):
            [outcome] = await forbidden.publish("jobs", [Message(new_job_id(), b"{}")])
        assert isinstance(outcome, AuthenticationFailed), missing
        assert not outcome.retryable
        assert outcome.outcome == "not_done"


async def test_the_least_user_reaches_no_other_namespace_and_no_administration(
    server: "Server", new_user: NewUser
) -> None:
    backend = new_user(*SENT, *SCRIPTED, *OPTIONAL)
    await backend.open()
    foreign = RedisBackend(port=server.port, username="user0", password=PASSWORD, namespace="mtjx")
    await foreign.open()
    with pytest.raises(AuthenticationFailed):
        await foreign.declare(QueueSpec("jobs"))
    await foreign.aclose()
    for command in NEVER:
        assert "no permissions" in server.say("ACL", "DRYRUN", "user0", *command.split()), command
    assert server.say("ACL", "DRYRUN", "user0", "HMGET", "mtj:{jobs}:spec", "kind") == "OK"
    for key in ("mtjx:{jobs}:spec", "other:{jobs}:spec", "mtj"):
        assert "no permissions" in server.say("ACL", "DRYRUN", "user0", "HMGET", key, "kind")
