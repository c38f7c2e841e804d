"""A password is nowhere to be read: not in what is shown of our objects, not in an error, a traceback or a log."""

import asyncio
import logging
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    AuthenticationFailed,
    BackendUnavailable,
    ConfigError,
    Done,
    Job,
    JobsError,
    Orchestrator,
    QueueSpec,
    RedisBackend,
    RedisClient,
    Worker,
    connect,
)
from mindtrace.jobs.backends.redis.address import Address
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

if TYPE_CHECKING:
    from tests.fault.redis_outages.conftest import Server

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.redis]

CANARY = "c4n4ry/p@ss:w%rd"  # has to be quoted in a URL
QUOTED = quote(CANARY, safe="")


def check(text: str) -> None:
    """The canary is not in it, however it is spelt."""
    assert "c4n4ry" not in text.lower(), text


def check_shown(thing: object) -> None:
    for text in (repr(thing), str(thing), f"{thing}", format(thing), repr(getattr(thing, "__dict__", None))):
        check(text)
    check(repr([thing]))


def check_error(error: BaseException) -> None:
    """Its text, its facts, those of its causes, and the traceback of all of them."""
    check("".join(traceback.format_exception(error)))
    one: BaseException | None = error
    while one is not None:
        check_shown(one)
        check(repr(one.args))
        one = one.__cause__ or one.__context__


@pytest.fixture
def with_password(server: "Server") -> "Server":
    """A server with a user `worker` whose password is the canary."""
    server.say("ACL", "SETUSER", "worker", "on", f">{CANARY}", "~*", "&*", "+@all")
    return server


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """All that is logged, by whomever, with tracebacks."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "mindtrace.jobs")
    for name in ("redis", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    form = logging.Formatter("%(name)s %(message)s %(args)s")
    return lambda: [form.format(record) for record in caplog.records]


async def test_nothing_that_is_shown_of_our_objects_holds_the_password(with_password: "Server") -> None:
    port = with_password.port
    url = f"redis://worker:{QUOTED}@localhost:{port}/0"
    backend = RedisBackend.from_url(url)
    orchestrator = AsyncOrchestrator(backend)
    things: list[object] = [
        backend,
        orchestrator,
        connect(url),
        RedisBackend(port=port, username="worker", password=CANARY),
        RedisClient(port=port, username="worker", password=CANARY),
        Orchestrator(RedisClient(port=port, username="worker", password=CANARY)),
        Address.of_url(url),
        Address.of_url(f"redis://:{QUOTED}@localhost:{port}/0"),
        Address.of_url(f"redis://:{QUOTED}@one,:{QUOTED}@two/0"),
        Address(password=CANARY),
    ]
    async with orchestrator:
        await orchestrator.declare(QueueSpec("jobs"))
        await orchestrator.publish("jobs", Job(name="jobs", schema_name="jobs", input_data={}))
        async with backend.receiver(["jobs"]) as receiver:
            [delivery] = await receiver.receive(1, wait=5)
            things += [receiver, delivery, backend.dead_letters("jobs"), backend.traits]
            for thing in things:
                check_shown(thing)
            await receiver.settle([(delivery, Done())])


async def test_a_password_where_the_user_belongs_is_not_shown(with_password: "Server") -> None:
    """`redis://PASSWORD@host`: nobody can tell it from a user's name."""
    backend = RedisBackend.from_url(f"redis://{QUOTED}@localhost:{with_password.port}/0")
    check_shown(backend)
    check_shown(Address.of_url(f"redis://{QUOTED}@localhost:{with_password.port}/0"))


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{QUOTED}@localhost:port/0",
        f"redis://:{QUOTED}@localhost:99999/0",
        f"redis://:{QUOTED}@[localhost/0",
        f"redis://:{QUOTED}@localhost/zero",
        f"redis://:{CANARY}@localhost/0",  # not quoted: a slash ends the host
        f"redis://localhost/{QUOTED}",
        f"redis://localhost/0?password={QUOTED}",
        f"redis://localhost/0?db={QUOTED}",
        f"rediss://localhost/0?ssl_password={QUOTED}",
        "redis://worker:12?c4n4ry@localhost/0",  # a query, unless it is quoted
        f"redus://:{QUOTED}@localhost/0",
        f"{QUOTED}",
        f"worker:{QUOTED}@localhost:6379",
    ],
)
async def test_an_address_that_is_wrong_is_refused_without_being_repeated(url: str) -> None:
    for read in (RedisBackend.from_url, connect, RedisClient.from_url, Address.of_url):
        with pytest.raises(ConfigError) as caught:
            read(url)
        check(str(caught.value))
        check("".join(traceback.format_exception(caught.value)))


@pytest.mark.parametrize("host", [f"redis://:{CANARY}@localhost:6379/0", f"worker:{CANARY}@localhost", f":{CANARY}@h"])
async def test_a_url_in_the_place_of_the_host_is_refused_without_being_repeated(host: str) -> None:
    for make in (RedisBackend, RedisClient, Address):
        with pytest.raises(ConfigError) as caught:
            make(host)
        check_error(caught.value)


async def test_no_error_and_no_log_holds_the_password(
    with_password: "Server", no_port: int, silent_port: int, logged: Callable[[], list[str]]
) -> None:
    """Of a server that is not there, is silent, refuses the login or a call, is cut off or is gone."""
    server, errors = with_password, list[BaseException]()

    async def fails(backend: RedisBackend) -> None:
        with pytest.raises(JobsError) as caught:
            await backend.open()
        errors.append(caught.value)

    async def loses_it() -> None:
        backend = RedisBackend.from_url(f"redis://worker:{QUOTED}@localhost:{server.port}/0")
        await backend.open()
        await backend.declare(QueueSpec("jobs"))
        async with backend.receiver(["jobs"]) as receiver:
            await receiver.receive(1, wait=0.1)
            server.say("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert await backend.publish("jobs", [Message(new_job_id(), b"{}")]) == ["stored"]
            server.say("ACL", "SETUSER", "worker", "-evalsha")
            errors.extend(o for o in await backend.publish("jobs", [Message(new_job_id(), b"{}")]) if o != "stored")  # type: ignore[misc]
            server.say("ACL", "SETUSER", "worker", "resetpass", ">another")
            await fails(RedisBackend(port=server.port, username="worker", password=CANARY))
            await fails(RedisBackend.from_url(f"redis://:{QUOTED}@localhost:{server.port}/0"))
            await asyncio.to_thread(server.broker.kill)
            publishing = asyncio.create_task(backend.publish("jobs", [Message(new_job_id(), b"{}")]))
            await asyncio.wait({publishing}, timeout=0.5)
        await backend.aclose()
        errors.extend(await publishing)  # type: ignore[arg-type]

    async def works_in_vain() -> None:
        class Nothing(AsyncConsumer):
            async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
                return {}

        orchestrator = AsyncOrchestrator(RedisBackend(port=no_port, username="worker", password=CANARY))
        worker = Worker(orchestrator, [Nothing("jobs")])
        working = asyncio.create_task(worker.run())
        await asyncio.wait({working}, timeout=1.0)
        check_shown(worker)
        worker.stop()
        await working

    await asyncio.gather(
        fails(RedisBackend(port=no_port, username="worker", password=CANARY)),
        fails(RedisBackend.from_url(f"redis://:{QUOTED}@localhost:{silent_port}/0")),
        fails(RedisBackend.from_url(f"rediss://:{QUOTED}@localhost:{server.port}/0")),  # it speaks no TLS
        loses_it(),
        works_in_vain(),
    )
    kinds = [type(error) for error in errors]
    assert kinds.count(AuthenticationFailed) == 3
    assert kinds.count(BackendUnavailable) == 4
    for error in errors:
        check_error(error)
    lines = logged()
    assert any("lost Redis at" in line for line in lines)
    assert any("no Redis at" in line for line in lines)
    for line in lines:
        check(line)
