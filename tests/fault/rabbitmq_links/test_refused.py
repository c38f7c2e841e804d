"""Who may not come in is told so clearly, and no password is to be read anywhere."""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal
from urllib.parse import quote

import pytest

from mindtrace.jobs import (
    AuthenticationFailed,
    BackendUnavailable,
    ConfigError,
    Dead,
    Delivery,
    Done,
    JobsError,
    QueueSpec,
    RabbitMQBackend,
)
from mindtrace.jobs.backends.rabbitmq.address import Address
from mindtrace.jobs.backends.rabbitmq.line import Line
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.proxy import FaultProxy
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.rabbitmq]

Ctl = Callable[[str], Awaitable[str]]
Opened = Callable[..., Awaitable[RabbitMQBackend]]
USER = '<<"user">>, <<"/">>'
CLOSE_ALL = '[rabbit_networking:close_connection(P, "test") || P <- rabbit_networking:connections()]'
CANARY = "c4n4ry/p@ss:w%rd"  # has to be quoted in a URL
QUOTED = quote(CANARY, safe="")


def check(text: str) -> None:
    """The canary is not in it, however it is spelt."""
    assert "c4n4ry" not in text.lower(), text


def check_shown(thing: object) -> None:
    for text in (repr(thing), str(thing), f"{thing}", repr(getattr(thing, "__dict__", None)), repr([thing])):
        check(text)


def check_error(error: BaseException) -> None:
    """Its text, its facts, those of its causes, and the traceback of all of them."""
    check("".join(traceback.format_exception(error)))
    one: BaseException | None = error
    while one is not None:
        check_shown(one)
        check(repr(one.args))
        one = one.__cause__ or one.__context__


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """All that we and the driver log, down to DEBUG."""
    caplog.set_level(logging.DEBUG)
    for name in ("mindtrace.jobs", "aiormq", "aiormq.connection", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)

    def text() -> str:
        formatter = logging.Formatter()
        return "\n".join(f"{formatter.format(record)} {record.args!r}" for record in caplog.records)

    return text


@pytest.mark.parametrize(
    ("login", "path", "says"),
    [
        (f"user:{QUOTED}", "/", "refuses the login"),
        (f"nobody:{QUOTED}", "/", "refuses the login"),
        ("user:password", "/nowhere", "refuses the virtual host 'nowhere'"),
    ],
    ids=["wrong password", "unknown user", "unknown virtual host"],
)
async def test_who_is_not_let_in_is_told_why(
    broker: Broker, login: str, path: str, says: str, logged: Callable[[], str]
) -> None:
    url = broker.url.replace("user:password", login).rstrip("/") + path
    backend = RabbitMQBackend.from_url(url)
    check_shown(backend)
    with pytest.raises(AuthenticationFailed, match=says) as failed:
        await backend.open()
    check_error(failed.value)
    await backend.aclose()
    check_shown(backend)
    check(logged())
    assert "password" not in str(failed.value).replace(says, "")


async def test_no_server_and_no_url_show_no_password(logged: Callable[[], str]) -> None:
    backend = RabbitMQBackend.from_url(f"amqp://user:{QUOTED}@127.0.0.1:1/")
    with pytest.raises(BackendUnavailable) as gone:
        await backend.open()
    check_error(gone.value)
    for url in (f"amqp://user:{CANARY}@", f"http://user:{QUOTED}@host/", f"amqp://user:{QUOTED}@host/?x={QUOTED}"):
        with pytest.raises(ConfigError) as wrong:
            RabbitMQBackend.from_url(url)
        check_error(wrong.value)
    check(logged())


async def test_what_is_refused_by_name_is_a_matter_of_permission(broker: Broker, namespace: str) -> None:
    """The server keeps names that begin with amq. for itself: 403."""
    backend = RabbitMQBackend.from_url(broker.url, namespace="amq.mine")
    await backend.open()
    try:
        with pytest.raises(AuthenticationFailed, match="RabbitMQ does not allow it"):
            await backend.declare(QueueSpec("jobs"))
        [outcome] = await backend.publish("jobs", [Message("a", b"{}")])
        assert isinstance(outcome, JobsError)
    finally:
        await backend.aclose()


@asynccontextmanager
async def kept_out(ctl: Ctl, how: str) -> AsyncIterator[None]:
    """Nobody is let in, and all who are in are thrown out; until the end."""
    no, yes = {
        "connection limit": (
            'rabbit_vhost_limit:parse_set(<<"/">>, <<"{\\"max-connections\\": 0}">>, <<"test">>)',
            'rabbit_vhost_limit:clear(<<"/">>, <<"test">>)',
        ),
        "permissions": (
            f'rabbit_auth_backend_internal:clear_permissions({USER}, <<"test">>)',
            f'rabbit_auth_backend_internal:set_permissions({USER}, <<".*">>, <<".*">>, <<".*">>, <<"test">>)',
        ),
    }[how]
    await ctl(no)
    try:
        await ctl(CLOSE_ALL)
        yield
    finally:
        await ctl(yes)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        pytest.param("connection limit", BackendUnavailable, marks=pytest.mark.chaos),  # a publish waits for 10 s
        ("permissions", AuthenticationFailed),
    ],
)
async def test_who_was_in_and_is_kept_out_for_a_while_is_in_again_when_that_is_over(
    opened: Opened, ctl: Ctl, how: str, told: type[BackendUnavailable]
) -> None:
    """A limit is an outage, for which a receiver waits; that this user may not is told to every call."""
    backend = await opened()
    assert await backend.publish("jobs", [Message("before", b"{}")]) == ["stored"]
    async with backend.receiver(["jobs"], slots=3) as receiver:
        async with kept_out(ctl, how):
            async with asyncio.timeout(15):
                [outcome] = await backend.publish("jobs", [Message("kept-out", b"{}")])
            assert isinstance(outcome, told)
            assert type(outcome) is told
            assert "NOT_ALLOWED - access to vhost" in str(outcome)
            assert outcome.outcome == "not_done"
        async with asyncio.timeout(10):
            while await backend.publish("jobs", [Message("after", b"{}")]) != ["stored"]:  # noqa: ASYNC110 (no bell)
                await asyncio.sleep(0.05)
            found: list[str] = []
            while len(found) < 2:
                try:
                    found += [delivery.message.id for delivery in await receiver.receive(3, wait=1.0)]
                except BackendUnavailable:
                    await asyncio.sleep(0.05)
        assert sorted(found) == ["after", "before"]


async def test_of_what_was_sent_and_not_confirmed_nobody_knows_whoever_is_kept_out_then(
    proxy: FaultProxy, opened: Opened, ctl: Ctl
) -> None:
    backend, straight = await opened(proxy), await opened()
    assert await backend.publish("jobs", [Message("before", b"{}")]) == ["stored"]
    proxy.down.black_hole()
    publishing = asyncio.create_task(backend.publish("jobs", [Message("sent", b"{}")]))
    async with asyncio.timeout(10):
        while (await straight.depth("jobs")).ready < 2:  # noqa: ASYNC110 (a depth rings no bell)
            await asyncio.sleep(0.02)
        async with kept_out(ctl, "permissions"):
            proxy.reset()
            proxy.calm()
            [outcome] = await publishing
    assert isinstance(outcome, AuthenticationFailed)
    assert (outcome.outcome, outcome.job_ids) == ("unknown", ("sent",))


@asynccontextmanager
async def limited(ctl: Ctl, namespace: str) -> AsyncIterator[None]:
    """An operator has all queues hold three messages."""
    three = f'<<"^{namespace}:">>, <<"{{\\"max-length\\": 3}}">>, <<"0">>, <<"queues">>, <<"test">>'
    await ctl(f'rabbit_policy:parse_set(<<"/">>, <<"test">>, {three})')
    try:
        yield
    finally:
        await ctl('rabbit_policy:delete(<<"/">>, <<"test">>, <<"test">>)')


@pytest.mark.parametrize("kind", ["fifo", "priority"])
async def test_where_a_policy_limits_all_queues_nothing_that_is_stored_is_dropped_for_what_comes(
    opened: Opened, ctl: Ctl, namespace: str, kind: Literal["fifo", "priority"]
) -> None:
    """Neither of the jobs nor of the dead letters: who has no room for it is told, and the job comes again."""
    backend = await opened()
    await backend.declare(QueueSpec("other", kind))
    ids = [f"j{number}" for number in range(20)]
    assert await backend.publish("other", [Message(one, b"{}") for one in ids]) == ["stored"] * 20
    unsettled: set[str] = set()
    async with backend.receiver(["other"], slots=20, crash_limit=50) as receiver:
        deliveries: list[Delivery] = []
        while len(deliveries) < 20:
            deliveries += await receiver.receive(20, wait=5.0)
        async with limited(ctl, namespace):
            for delivery in deliveries:
                [answer] = (await receiver.exchange([(delivery, Dead("rejected"))], 0)).settled
                if answer is not None:
                    assert "full, by a policy" in str(answer)
                    unsettled.add(delivery.message.id)
            died = {one.message.id for one in (await backend.dead_letters("other").list(DeadFilter())).records}
    assert unsettled
    assert died
    assert (died | unsettled, died & unsettled) == ({*ids}, set())
    async with backend.receiver(["other"], slots=20) as receiver, asyncio.timeout(20):
        again: list[str] = []
        while len(again) < len(unsettled):
            again += [delivery.message.id for delivery in await receiver.receive(20, wait=5.0)]
    assert sorted(again) == sorted(unsettled)


async def test_a_server_older_than_3_10_is_refused_by_name(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = Line.connect

    async def to_an_old_one(address: Address, role: str) -> Line:
        line = await connect(address, role)
        line.version = "3.9.29"
        return line

    monkeypatch.setattr(Line, "connect", to_an_old_one)
    backend = RabbitMQBackend.from_url(broker.url)
    with pytest.raises(ConfigError, match=r"RabbitMQ 3\.9\.29: version 3\.10 or later is needed"):
        await backend.open()
    await backend.aclose()


async def test_who_needs_more_channels_than_the_server_allows_is_told_and_costs_nobody_a_lease(
    opened: Opened, ctl: Ctl
) -> None:
    """The server would end the connection for one too many, and with it all leases."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(ctl, "application:set_env(rabbit, channel_max, 2047)")
        await ctl("application:set_env(rabbit, channel_max, 8)")
        backend = await opened()
        await backend.publish("jobs", [Message("a", b"{}")])
        first = await stack.enter_async_context(backend.receiver(["jobs"]))
        [delivery] = await first.receive(1, wait=5.0)
        told: list[str] = []
        for _ in range(12):
            receiver = await stack.enter_async_context(backend.receiver(["jobs"]))
            try:
                assert await receiver.receive(1) == []
            except BackendUnavailable as error:
                told.append(str(error))
        assert told
        assert all("8 channels are open" in one for one in told)
        assert await first.settle([(delivery, Done())]) == [None]
