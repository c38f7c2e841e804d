"""The proxy breaks a line where it was asked to, and passes everything else on as it came."""

import asyncio
import gc
import socket
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from anyio.from_thread import start_blocking_portal
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import NoScriptError

from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.proxy import FaultProxy, Opaque, Reply, Request, Resp, Way, Wire, every

pytestmark = pytest.mark.anyio

Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def key() -> str:
    return f"proxy:{uuid4()}"


@pytest.fixture
async def direct(redis_url: str) -> AsyncIterator[Redis]:
    """A client that does not go through the proxy."""
    async with Redis.from_url(redis_url, protocol=2, decode_responses=True) as client:
        yield client


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy.to(redis_url) as proxy:
        yield proxy


@pytest.fixture
def own_redis() -> Generator[Broker]:
    with brokers.redis(private=True) as broker:
        yield broker


@asynccontextmanager
async def connected(proxy: FaultProxy) -> AsyncGenerator[Line, None]:
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def proxied(conversation: Conversation, *, wire: Callable[[], Wire] = Opaque) -> AsyncGenerator[FaultProxy, None]:
    """A proxy to a server of the test's own, which has this conversation with each client."""
    over: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await conversation(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        over.append(asyncio.get_running_loop().create_task(serve(reader, writer)))

    server = await asyncio.start_server(arrived, "127.0.0.1", 0)
    async with server, FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1], wire=wire) as proxy:
        yield proxy
    for task in over:
        task.cancel()
        await asyncio.wait({task})


def a_client(proxy: FaultProxy, url: str, **options: Any) -> Redis:
    """One that never tries again by itself."""
    options = {"protocol": 2, "decode_responses": True, "retry": Retry(NoBackoff(), 0)} | options
    client: Redis = Redis.from_url(proxy.url(url), **options)
    return client


def command(*words: str) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


async def ask(line: Line, *words: str) -> bytes:
    line[1].write(command(*words))
    return await line[0].readline()


async def all_of(reader: asyncio.StreamReader) -> bytes:
    """What still comes before the end, however abrupt."""
    got = b""
    with suppress(ConnectionResetError):
        while data := await reader.read(1000):
            got += data
    return got


async def until(condition: Callable[[], bool]) -> None:
    """The test's own time limit ends it."""
    while not condition():  # noqa: ASYNC110 - what it waits for belongs to others
        await asyncio.sleep(0.001)


async def until_it_is(direct: Redis, key: str, value: str) -> None:
    """A value in Redis, the same."""
    while await direct.get(key) != value:  # noqa: ASYNC110 - a broker tells nobody
        await asyncio.sleep(0.001)


def abort(writer: asyncio.StreamWriter) -> None:
    """Closed with no time to linger, a socket says RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1000):
        writer.write(data)


def the_way(proxy: FaultProxy, name: str) -> Way:
    return {"up": proxy.up, "down": proxy.down}[name]


async def a_while(direct: Redis) -> None:
    """Longer than anything takes to pass the proxy: round trips to the same server, on a line of their own."""
    for _ in range(20):
        await direct.ping()


def scripted(name: bytes) -> bool:
    return name.startswith(b"EVAL")


# --- Nothing is broken


@pytest.mark.redis
@pytest.mark.parametrize("protocol", [2, 3])
async def test_without_a_fault_every_byte_passes_both_ways(
    proxy: FaultProxy, redis_url: str, key: str, protocol: int
) -> None:
    value = bytes(range(256)) * 4096 + b"\r\n"
    async with a_client(proxy, redis_url, protocol=protocol, decode_responses=False) as client:
        values = await asyncio.gather(*(client.set(f"{key}:{number}", value + b"%d" % number) for number in range(8)))
        assert values == [True] * 8
        assert await client.mget([f"{key}:{number}" for number in range(8)]) == [
            value + b"%d" % number for number in range(8)
        ]
        await client.delete(*(f"{key}:{number}" for number in range(8)))
    assert proxy.count(lambda name: name == b"SET") == 8
    assert proxy.accepted == 8


async def test_a_url_leads_to_the_proxy_and_keeps_all_else(proxy: FaultProxy) -> None:
    here = f"127.0.0.1:{proxy.port}"
    assert proxy.url("redis://localhost:6379/3?protocol=2") == f"redis://{here}/3?protocol=2"
    assert proxy.url("amqp://user:p%40ss@rabbit:5672/%2F") == f"amqp://user:p%40ss@{here}/%2F"
    assert proxy.url("redis://[::1]/") == f"redis://{here}/"


@pytest.mark.parametrize("url", ["redis://localhost/0", "unix:///tmp/redis.sock"])
def test_a_broker_without_a_host_and_a_port_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="a host and a port"):
        FaultProxy.to(url)


async def test_an_end_is_passed_on_with_the_bytes_of_what_was_not_finished() -> None:
    got: list[bytes] = []

    async def half_a_reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())  # to the end
        writer.write(b"*2\r\n$5\r\nhal")

    async with proxied(half_a_reply, wire=Resp) as proxy, connected(proxy) as (reader, writer):
        writer.write(command("PING") + b"*1\r\n$4\r\nPI")
        writer.write_eof()
        assert await reader.read() == b"*2\r\n$5\r\nhal"
        assert got == [command("PING") + b"*1\r\n$4\r\nPI"]
        assert proxy.requests == [b"PING"]


@pytest.mark.parametrize("ends", ["client", "server"])
async def test_a_reset_at_one_end_is_one_at_the_other(ends: str) -> None:
    ended = asyncio.get_running_loop().create_future()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))
        if ends == "server":
            abort(writer)
        try:
            await reader.readexactly(1)
        except OSError as error:
            ended.set_result(error)

    async with proxied(conversation) as proxy, connected(proxy) as (reader, writer):
        writer.write(b"1")
        if ends == "client":
            await reader.readexactly(1)
            abort(writer)
            assert isinstance(await ended, ConnectionResetError)
        else:
            with pytest.raises(ConnectionResetError):
                await reader.read()
        await until(lambda: proxy.connections == 0)


@pytest.mark.redis
async def test_bytes_that_are_not_of_the_protocol_end_the_block_and_say_so(redis_url: str) -> None:
    is_told = pytest.RaisesExc(ValueError, match="AMQP.*see Opaque")
    with pytest.RaisesGroup(is_told, flatten_subgroups=True):
        async with FaultProxy.to(redis_url) as proxy, connected(proxy) as (_, writer):
            writer.write(b"AMQP\x00\x00\x09\x01")
            await asyncio.Event().wait()


async def test_bytes_of_any_protocol_pass_where_nothing_is_known_of_it() -> None:
    async with proxied(echo) as proxy, connected(proxy) as (reader, writer):
        trap = proxy.cut_reply(1, of=every)
        writer.write(b"AMQP\x00\x00\x09\x01")
        assert await reader.readexactly(8) == b"AMQP\x00\x00\x09\x01"
        assert (proxy.requests, proxy.count(every), trap.struck) == ([], 0, None)


@pytest.mark.redis
async def test_what_the_block_raises_is_raised_as_it_is_and_nothing_is_left_open(redis_url: str) -> None:
    async def block(proxy: FaultProxy) -> None:
        line = await stack.enter_async_context(connected(proxy))
        proxy.before(2, asyncio.Event().wait)
        assert await ask(line, "PING") == b"+PONG\r\n"
        line[1].write(command("PING"))
        await until(lambda: proxy.count() == 2)  # and what is to be done before it never ends
        raise LookupError("of the block")

    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        proxy = FaultProxy.to(redis_url)
        with pytest.raises(LookupError, match="of the block"):
            async with proxy:
                await block(proxy)
    assert asyncio.all_tasks() == before
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(proxy.host, proxy.port)


@pytest.mark.redis
def test_a_blocking_client_can_have_a_proxy_on_a_loop_of_its_own(redis_url: str) -> None:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(FaultProxy.to(redis_url)) as proxy,
        BlockingRedis.from_url(proxy.url(redis_url), protocol=2) as client,
    ):
        assert client.ping()
        portal.call(proxy.refuse)
        with pytest.raises(NoConnection):
            client.ping()
        portal.call(proxy.accept)
        assert client.ping()


# --- The reply to one request is cut


@pytest.mark.redis
@pytest.mark.parametrize("reset", [False, True])
async def test_each_request_in_turn_is_done_and_its_client_never_hears_of_it(
    redis_url: str, direct: Redis, key: str, reset: bool
) -> None:
    async def three(client: Redis) -> int:
        heard = 0
        with suppress(NoConnection):
            for _ in range(3):
                heard = await client.incr(key)
        return heard

    async with FaultProxy.to(redis_url) as proxy, a_client(proxy, redis_url) as client:
        assert await three(client) == 3
        assert proxy.count() == 3
    for k in range(1, 5):
        await direct.delete(key)
        async with FaultProxy.to(redis_url) as proxy, a_client(proxy, redis_url) as client:
            trap = proxy.cut_reply(k, reset=reset)
            assert (trap.k, trap.seen, trap.struck) == (k, 0, None)
            heard = await three(client)
            assert (trap.seen, trap.struck) == (min(k, 3), b"INCRBY" if k < 4 else None)
            assert heard == (k - 1 if k < 4 else 3)
            assert await direct.get(key) == str(min(k, 3))  # done, and what would have followed was not
            if trap.struck:
                await trap.wait()
                assert await client.incr(key) == k + 1  # once only
    await direct.delete(key)


@pytest.mark.redis
@pytest.mark.parametrize("piece", [1, 7, 10_000], ids=["each byte by itself", "in pieces", "all at once"])
async def test_of_requests_sent_together_those_up_to_the_cut_are_done_and_those_before_it_answered(
    proxy: FaultProxy, direct: Redis, key: str, piece: int
) -> None:
    sent = command("INCR", key) * 5
    for k in range(1, 6):
        await direct.delete(key)
        async with connected(proxy) as (reader, writer):
            trap = proxy.cut_reply(k)
            for at in range(0, len(sent), piece):
                if writer.is_closing() or reader.at_eof():
                    break
                writer.write(sent[at : at + piece])
                await asyncio.sleep(0)
            assert await all_of(reader) == b"".join(b":%d\r\n" % number for number in range(1, k))
            assert trap.struck == b"INCR"
            assert await direct.get(key) == str(k)
    await direct.delete(key)


@pytest.mark.redis
@pytest.mark.parametrize("protocol", ["2", "3"])
async def test_replies_of_every_kind_are_told_apart(proxy: FaultProxy, direct: Redis, key: str, protocol: str) -> None:
    await direct.hset(key, mapping={"a": "1", "b": "\r\n+OK\r\n:1"})
    nested = "redis.setresp(3); return {{map={a={map={b={1}}}}}, {set={c=true}}, {double=1.5}, {big_number='12'}, true}"
    requests = [
        ("PING",),
        ("STRLEN", "none"),
        ("GET", "none"),
        ("GET", key),  # an error
        ("HGETALL", key),
        ("LPOP", "none", "2"),  # no array
        ("LRANGE", "none", "0", "-1"),  # an empty one
        ("EVAL", "return {1, {2, {}, {{}}, false}, 'text\\r\\n*3\\r\\n', ''}", "0"),
        ("EVAL", nested, "0"),
        ("EVAL", "redis.setresp(3); return {verbatim_string={format='txt', string='text\\r\\n:1'}}", "0"),
        ("ECHO", ""),
    ]
    marker = b"$6\r\nmarker\r\n"

    async def reply(line: Line, *words: str) -> bytes:
        line[1].write(command(*words) + command("ECHO", "marker"))
        return (await line[0].readuntil(marker)).removesuffix(marker)

    async with connected(proxy) as line:
        await reply(line, "HELLO", protocol)  # an array, or a map
        replies = [await reply(line, *words) for words in requests]
    kinds = {each[:1] for each in replies}
    assert kinds == (
        {b"+", b":", b"$", b"-", b"*"} if protocol == "2" else {b"+", b":", b"_", b"-", b"%", b"*", b"=", b"$"}
    )
    for k in range(1, len(requests) + 1):
        async with connected(proxy) as line:
            await reply(line, "HELLO", protocol)
            trap = proxy.cut_reply(k)
            line[1].write(b"".join(command(*words) for words in requests))
            assert await all_of(line[0]) == b"".join(replies[: k - 1])
            assert trap.struck == requests[k - 1][0].encode()
    await direct.delete(key)


@pytest.mark.redis
async def test_the_handshake_counts_only_where_it_is_asked_for(redis_url: str, key: str) -> None:
    parts = "/5?client_name=somebody"
    async with FaultProxy.to(redis_url) as proxy, a_client(proxy, redis_url.removesuffix("/0") + parts) as client:
        assert await client.get(key) is None
        sent = list(proxy.requests)
        assert sent[-1] == b"GET"
        assert set(sent[:-1]) == {b"CLIENT", b"SELECT"}
        assert (proxy.count(), proxy.count(every), proxy.count({b"SELECT"}.__contains__)) == (1, len(sent), 1)
    async with FaultProxy.to(redis_url) as proxy, a_client(proxy, redis_url.removesuffix("/0") + parts) as client:
        everything, without = proxy.cut_reply(len(sent) - 1, of=every), proxy.cut_reply(2)
        with pytest.raises(NoConnection):
            await client.get(key)
        assert (everything.struck, without.struck, without.seen) == (sent[-2], None, 0)


@pytest.mark.redis
async def test_only_the_commands_that_were_asked_for_are_counted(
    proxy: FaultProxy, redis_url: str, direct: Redis, key: str
) -> None:
    async with a_client(proxy, redis_url) as client:
        trap = proxy.cut_reply(2, of=scripted)
        await client.incr(key)
        await client.eval("return 1", 0)
        await client.incr(key)
        with pytest.raises(NoConnection):
            await client.eval("return redis.call('INCR', KEYS[1])", 1, key)
    assert (trap.seen, trap.struck, proxy.count(scripted)) == (2, b"EVAL", 2)
    assert await direct.get(key) == "3"
    await direct.delete(key)


@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_is_cut_at_both_ends_with_an_end_or_a_reset(reset: bool) -> None:
    ended = asyncio.get_running_loop().create_future()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).replace(b"ask", b"done 1"))
        try:
            ended.set_result(await reader.read())
        except OSError as error:
            ended.set_result(error)

    async with proxied(conversation, wire=Lines) as proxy, connected(proxy) as (reader, writer):
        proxy.cut_reply(1, reset=reset)
        writer.write(b"ask\n")
        if reset:
            with pytest.raises(ConnectionResetError):
                await reader.read()
            assert isinstance(await ended, ConnectionResetError)
        else:
            assert await reader.read() == b""
            assert await ended == b""  # though the client has not closed yet


@pytest.mark.redis
async def test_requests_are_counted_over_all_connections_and_only_the_one_that_asked_is_cut(proxy: FaultProxy) -> None:
    async with connected(proxy) as first, connected(proxy) as second, connected(proxy) as third:
        await until(lambda: proxy.connections == 3)
        trap = proxy.cut_reply(3)
        assert await ask(first, "PING") == b"+PONG\r\n"
        assert await ask(second, "PING") == b"+PONG\r\n"
        assert await ask(third, "ECHO", "none") == b""
        assert (trap.seen, trap.struck) == (3, b"ECHO")
        assert await ask(first, "PING") == b"+PONG\r\n"
        assert await ask(second, "PING") == b"+PONG\r\n"
        await until(lambda: proxy.connections == 2)
    assert proxy.requests == [b"PING", b"PING", b"ECHO", b"PING", b"PING"]


@pytest.mark.redis
@pytest.mark.parametrize("protocol", ["2", "3"])
async def test_what_is_published_on_a_channel_answers_no_request(
    proxy: FaultProxy, direct: Redis, key: str, protocol: str
) -> None:
    here, is_here = asyncio.Event(), asyncio.Event()

    async def publish() -> None:
        await direct.publish(key, "three")
        here.set()
        await is_here.wait()

    async with connected(proxy) as (reader, writer):
        writer.write(command("HELLO", protocol) + command("SUBSCRIBE", key, f"{key}:2") + command("PSUBSCRIBE", key))
        await reader.readuntil(b"psubscribe\r\n$%d\r\n%s\r\n:3\r\n" % (len(key), key.encode()))
        trap = proxy.cut_reply(2)
        await direct.publish(key, "one")  # arrives twice
        await reader.readuntil(b"pmessage\r\n")
        await reader.readuntil(b"one\r\n")
        writer.write(command("PING"))
        await reader.readuntil(b"pong\r\n" if protocol == "2" else b"+PONG\r\n")
        await direct.publish(key, "two")
        await reader.readuntil(b"pmessage\r\n")
        await reader.readuntil(b"two\r\n")
        proxy.before(1, publish)  # while that one waits for its reply
        writer.write(command("UNSUBSCRIBE", key, f"{key}:2"))
        await here.wait()
        await reader.readuntil(b"pmessage\r\n")
        await reader.readuntil(b"three\r\n")
        assert trap.struck is None
        is_here.set()
        rest = await all_of(reader)
        assert trap.struck == b"UNSUBSCRIBE"
        assert rest.count(b"unsubscribe") == 1  # the second of its replies is the one that ends it


@pytest.mark.redis
async def test_what_resp3_pushes_answers_no_request(proxy: FaultProxy, direct: Redis, key: str) -> None:
    here, is_here = asyncio.Event(), asyncio.Event()

    async def invalidate() -> None:
        await direct.set(key, "new")
        here.set()
        await is_here.wait()

    async with connected(proxy) as (reader, writer):
        writer.write(command("HELLO", "3") + command("CLIENT", "TRACKING", "ON") + command("GET", key))
        await reader.readuntil(b"+OK\r\n_\r\n")
        proxy.before(1, invalidate)
        trap = proxy.cut_reply(1)
        writer.write(command("GET", key))
        await here.wait()
        assert (await reader.readuntil(key.encode() + b"\r\n")).startswith(b">2\r\n$10\r\ninvalidate\r\n")
        assert trap.struck is None
        is_here.set()
        assert await all_of(reader) == b""
        assert trap.struck == b"GET"
    await direct.delete(key)


def test_a_trap_before_the_first_request_is_refused() -> None:
    proxy = FaultProxy("127.0.0.1", 1)
    with pytest.raises(ValueError, match="k=0: requests are counted from 1"):
        proxy.cut_reply(0)
    with pytest.raises(ValueError, match="k=-1"):
        proxy.before(-1, asyncio.Event().wait)
    assert repr(proxy.cut_reply(3)) == "<Trap at request 3, 0 seen, not struck>"


# --- Something is done before a request


@pytest.mark.redis
async def test_what_is_to_be_done_is_done_between_two_requests(own_redis: Broker) -> None:
    async with FaultProxy.to(own_redis.url) as proxy, Redis.from_url(own_redis.url) as direct:
        for k in (1, 2, 3):
            digest = await direct.script_load("return 'here'")
            async with a_client(proxy, own_redis.url) as client:
                trap = proxy.before(k, direct.script_flush, of=scripted)
                for _ in range(k - 1):
                    assert await client.evalsha(digest, 0) == "here"
                    await client.ping()
                assert trap.struck is None
                with pytest.raises(NoScriptError):
                    await client.evalsha(digest, 0)
                assert (trap.seen, trap.struck) == (k, b"EVALSHA")


@pytest.mark.redis
async def test_a_request_waits_alone_and_none_of_it_has_passed(proxy: FaultProxy, direct: Redis, key: str) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        await go_on.wait()

    async with connected(proxy) as first, connected(proxy) as second:
        trap = proxy.before(2, wait)
        first[1].write(command("INCR", key) * 3)
        await begun.wait()
        assert await first[0].readline() == b":1\r\n"
        assert await ask(second, "PING") == b"+PONG\r\n"
        await a_while(direct)
        assert (await direct.get(key), trap.struck) == ("1", None)
        go_on.set()
        assert await first[0].readline() == b":2\r\n"
        assert trap.struck == b"INCR"
        assert await first[0].readline() == b":3\r\n"
    await direct.delete(key)


@pytest.mark.redis
async def test_the_broker_can_be_restarted_between_two_requests_and_the_proxy_outlives_it(own_redis: Broker) -> None:
    async with FaultProxy.to(own_redis.url) as proxy, a_client(proxy, own_redis.url) as client:
        assert await client.incr("key") == 1
        trap = proxy.before(1, lambda: asyncio.to_thread(own_redis.restart))
        with pytest.raises(NoConnection):
            await client.incr("key")
        await trap.wait()
        assert await client.incr("key") == 2
        own_redis.kill()
        with pytest.raises((NoConnection, ConnectionResetError)):
            await client.incr("key")
        async with connected(proxy) as (reader, _):  # with nobody behind the proxy
            with pytest.raises(ConnectionResetError):
                await reader.read()
        own_redis.restart()
        assert await client.ping()


@pytest.mark.redis
async def test_what_is_to_be_done_is_finished_though_the_connection_has_gone(proxy: FaultProxy) -> None:
    async def reset() -> None:
        proxy.reset()
        for _ in range(10):
            await asyncio.sleep(0)

    async with connected(proxy) as line:
        trap = proxy.before(1, reset)
        with pytest.raises(ConnectionResetError):
            await ask(line, "PING")
        await trap.wait()
        assert trap.struck == b"PING"


@pytest.mark.redis
async def test_an_error_in_what_is_to_be_done_ends_the_block(redis_url: str) -> None:
    async def fail() -> None:
        raise LookupError("of what was to be done")

    with pytest.RaisesGroup(pytest.RaisesExc(LookupError, match="of what was to be done")):
        async with FaultProxy.to(redis_url) as proxy, connected(proxy) as (_, writer):
            proxy.before(1, fail)
            writer.write(command("PING"))
            await asyncio.Event().wait()


@pytest.mark.redis
async def test_who_connects_as_the_block_ends_by_an_error_is_not_left_waiting(redis_url: str) -> None:
    for turns in range(8):  # of the loop, on the way from the kernel to the broker
        clients: list[socket.socket] = []

        async def fail(proxy: FaultProxy, turns: int, clients: list[socket.socket]) -> None:
            clients.append(socket.create_connection((proxy.host, proxy.port)))
            for _ in range(turns):
                await asyncio.sleep(0)
            raise LookupError

        with pytest.RaisesGroup(LookupError):
            async with FaultProxy.to(redis_url) as proxy, connected(proxy) as (_, writer):
                proxy.before(1, partial(fail, proxy, turns, clients))
                writer.write(command("PING"))
                await asyncio.Event().wait()
        with clients[0] as client, suppress(ConnectionResetError):
            client.settimeout(1)
            assert client.recv(1) == b""
    gc.collect()  # what was not closed complains


# --- One way, or both


@pytest.mark.redis
@pytest.mark.parametrize("way", ["up", "down"])
async def test_bytes_come_later_one_way(proxy: FaultProxy, way: str) -> None:
    async with connected(proxy) as line:
        assert await ask(line, "PING") == b"+PONG\r\n"
        the_way(proxy, way).delay(0.1)
        began = time.monotonic()
        assert await ask(line, "PING") == b"+PONG\r\n"
        assert time.monotonic() - began >= 0.1
        the_way(proxy, way).delay(1000)
        the_way(proxy, way).flow()
        assert await ask(line, "PING") == b"+PONG\r\n"


@pytest.mark.parametrize("way", ["up", "down"])
async def test_so_many_bytes_a_second_pass_one_way(way: str) -> None:
    async with proxied(echo) as proxy, connected(proxy) as (reader, writer):
        the_way(proxy, way).throttle(1000)
        began = time.monotonic()
        writer.write(b"x" * 200)
        first = await reader.read(1000)
        assert len(first) < 100
        assert await reader.readexactly(200 - len(first)) == b"x" * (200 - len(first))
        assert time.monotonic() - began >= 0.18  # the last ones need not wait for those after them
        the_way(proxy, way).flow()
        writer.write(b"x" * 50_000)
        assert len(await reader.readexactly(50_000)) == 50_000


@pytest.mark.redis
async def test_in_a_black_hole_on_the_way_up_nothing_is_done_and_nothing_lost(
    proxy: FaultProxy, direct: Redis, key: str
) -> None:
    async with connected(proxy) as line:
        assert await ask(line, "INCR", key) == b":1\r\n"
        proxy.up.black_hole()
        line[1].write(command("INCR", key))
        async with connected(proxy) as other:  # connections can be made
            other[1].write(command("INCR", key))
            await a_while(direct)
            assert await direct.get(key) == "1"
            proxy.up.flow()
            assert {await line[0].readline(), await other[0].readline()} == {b":2\r\n", b":3\r\n"}
    await direct.delete(key)


@pytest.mark.redis
async def test_a_black_hole_begins_between_two_requests_that_came_together(
    proxy: FaultProxy, direct: Redis, key: str
) -> None:
    async def begin() -> None:
        proxy.up.black_hole()

    async with connected(proxy) as (reader, writer):
        trap = proxy.before(2, begin)
        writer.write(command("incr", key) * 2)
        assert await reader.readline() == b":1\r\n"
        await trap.wait()
        assert trap.struck == b"INCR"  # in capitals, however it came
        await a_while(direct)
        assert await direct.get(key) == "1"
        proxy.up.flow()
        assert await reader.readline() == b":2\r\n"
    await direct.delete(key)


@pytest.mark.redis
async def test_in_a_black_hole_on_the_way_down_all_is_done_and_nobody_told(
    proxy: FaultProxy, direct: Redis, key: str
) -> None:
    async with connected(proxy) as line:
        proxy.down.black_hole()
        answer = asyncio.get_running_loop().create_task(ask(line, "INCR", key))
        await until_it_is(direct, key, "1")
        await a_while(direct)
        assert not answer.done()
        proxy.down.flow()
        assert await answer == b":1\r\n"
    await direct.delete(key)


@pytest.mark.parametrize("abrupt", [False, True])
async def test_in_a_black_hole_nobody_hears_that_the_other_end_has_closed(abrupt: bool) -> None:
    ended = asyncio.Event()

    async def until_it_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        await all_of(reader)
        ended.set()

    async with proxied(until_it_ends) as proxy, connected(proxy) as (reader, writer):
        await reader.readexactly(5)
        proxy.up.black_hole()
        if abrupt:
            abort(writer)
        writer.close()
        async with connected(proxy) as (other, _):
            await other.readexactly(5)  # a round trip: the other connection's end has long come to the proxy
        assert proxy.connections == 2
        assert not ended.is_set()
        proxy.up.flow()
        await ended.wait()


@pytest.mark.redis
async def test_a_connection_is_cut_after_any_number_of_bytes_of_a_request(
    proxy: FaultProxy, direct: Redis, key: str
) -> None:
    sent = command("INCR", key)
    for count in range(len(sent) + 1):
        async with connected(proxy) as (reader, writer):
            proxy.up.cut_after(count)
            writer.write(sent)
            assert await all_of(reader) == b""
        async with connected(proxy) as line:
            assert await ask(line, "PING") == b"+PONG\r\n"  # once only
    await until_it_is(direct, key, "1")  # once, when all of it had passed
    await direct.delete(key)


@pytest.mark.redis
async def test_a_connection_is_cut_after_any_number_of_bytes_of_a_reply(
    proxy: FaultProxy, direct: Redis, key: str
) -> None:
    await direct.set(key, "0123456789")
    reply = b"$10\r\n0123456789\r\n"
    for count in range(len(reply) + 1):
        async with connected(proxy) as (reader, writer):
            proxy.down.cut_after(count)
            writer.write(command("GET", key))
            assert await all_of(reader) == reply[:count]
    await direct.delete(key)


async def test_what_comes_down_at_the_moment_of_a_cut_on_the_way_up_breaks_nothing() -> None:
    servers: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        servers.put_nowait(writer)
        await reader.read()

    async with proxied(conversation) as proxy:
        async with connected(proxy) as (reader, writer):
            server = await servers.get()
            proxy.up.cut_after(1)
            writer.write(b"12")
            server.write(b".")  # both are there when the loop looks next
            assert await all_of(reader) in (b"", b".")
        async with asyncio.timeout(10):
            while proxy.connections:  # noqa: ASYNC110 (a number tells nobody)
                await asyncio.sleep(0)
        async with connected(proxy) as (reader, _):
            (await servers.get()).write(b"?")
            assert await reader.read(1) == b"?"


@pytest.mark.redis
async def test_bytes_are_counted_over_all_connections_and_the_last_one_is_cut(proxy: FaultProxy) -> None:
    async with connected(proxy) as first, connected(proxy) as second:
        proxy.down.cut_after(10)
        assert await ask(first, "PING") == b"+PONG\r\n"
        assert await ask(second, "PING") == b"+PO"
        assert await ask(first, "PING") == b"+PONG\r\n"


@pytest.mark.redis
async def test_half_closed_on_the_way_down_the_client_sees_an_end_and_the_server_still_obeys(
    proxy: FaultProxy, direct: Redis, key: str
) -> None:
    async with connected(proxy) as (reader, writer):
        assert await ask((reader, writer), "PING") == b"+PONG\r\n"
        proxy.down.half_close()
        assert await reader.read() == b""
        writer.write(command("INCR", key))
        await until_it_is(direct, key, "1")
        async with connected(proxy) as other:
            assert await ask(other, "PING") == b"+PONG\r\n"  # only those that there were
    await direct.delete(key)


async def test_half_closed_on_the_way_up_the_server_sees_an_end_and_the_client_hears_its_last_words() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d bytes, and " % len(await reader.readexactly(3)))
        writer.write(b"%d more" % len(await reader.read()))

    async with proxied(conversation) as proxy, connected(proxy) as (reader, writer):
        writer.write(b"one")
        assert await reader.readuntil(b"and ") == b"3 bytes, and "
        proxy.up.half_close()
        writer.write(b"lost")
        assert await reader.read() == b"0 more"


# --- All connections


async def test_a_reset_is_one_at_both_ends_of_every_connection() -> None:
    ended: list[BaseException] = []

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        try:
            await reader.read()
        except OSError as error:
            ended.append(error)

    async with proxied(conversation) as proxy, connected(proxy) as (first, _), connected(proxy) as (second, _):
        for reader in (first, second):
            await reader.readexactly(5)
        proxy.up.black_hole()  # which keeps nothing from being reset
        proxy.reset()
        for reader in (first, second):
            with pytest.raises(ConnectionResetError):
                await reader.read()
        await until(lambda: len(ended) == 2)
        assert [type(error) for error in ended] == [ConnectionResetError] * 2
        async with connected(proxy) as (third, _):
            assert await third.readexactly(5) == b"hello"
        assert proxy.accepted == 3


@pytest.mark.redis
async def test_connections_are_refused_until_they_are_accepted_again_on_the_same_port(proxy: FaultProxy) -> None:
    port = proxy.port
    async with connected(proxy) as (reader, writer):
        assert await ask((reader, writer), "PING") == b"+PONG\r\n"
        for _ in range(2):
            proxy.refuse()
            with pytest.raises(ConnectionResetError):
                await reader.read()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(proxy.host, port)
            with socket.socket() as thief, pytest.raises(OSError, match="in use"):
                thief.bind((proxy.host, port))
            proxy.accept()
            async with connected(proxy) as line:
                assert await ask(line, "PING") == b"+PONG\r\n"
    assert proxy.port == port


async def test_who_connects_as_connections_begin_to_be_refused_is_reset() -> None:
    async with proxied(echo) as proxy:
        for turns in range(8):  # of the loop, on the way from the kernel to the proxy
            proxy.accept()
            with socket.create_connection((proxy.host, proxy.port)) as client:
                for _ in range(turns):
                    await asyncio.sleep(0)
                proxy.refuse()
                for _ in range(8):
                    await asyncio.sleep(0)
                assert proxy.connections == 0
                client.settimeout(1)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)


@pytest.mark.redis
async def test_once_it_is_calm_nothing_is_broken_any_more(proxy: FaultProxy) -> None:
    proxy.up.black_hole()
    proxy.down.cut_after(0)
    traps = [proxy.cut_reply(1), proxy.before(1, asyncio.Event().wait)]
    proxy.refuse()
    proxy.calm()
    async with connected(proxy) as line:
        assert await ask(line, "PING") == b"+PONG\r\n"
    assert [trap.struck for trap in traps] == [None, None]


# --- A protocol of one's own


class Lines(Opaque):
    """A request is a line, named by its first word; "done N" answers the first N of those not answered."""

    handshake = (b"HI",)

    def __init__(self) -> None:
        self._sent, self._answered = 0, 0

    def requests(self, data: bytes) -> Iterator[Request]:
        for line in data.splitlines(keepends=True):
            self._sent += 1
            yield Request(line, line.split()[0], self._sent)

    def replies(self, data: bytes) -> Iterator[Reply]:
        for line in data.splitlines(keepends=True):
            before, self._answered = self._answered, self._answered + int(line.split()[1])
            yield Reply(line, range(before + 1, self._answered + 1))


async def test_a_protocol_of_ones_own_says_what_a_request_is_and_what_answers_it() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"one\n")
        writer.write(b"done 2\n")
        await reader.readuntil(b"two\n")
        writer.write(b"done 1\n")

    for of, k, struck, got in [
        (None, 1, b"one", b""),  # answered together with the handshake
        (None, 2, b"two", b"done 2\n"),
        (None, 3, None, b"done 2\ndone 1\n"),
        (every, 3, b"two", b"done 2\n"),
    ]:
        async with proxied(conversation, wire=Lines) as proxy, connected(proxy) as (reader, writer):
            trap = proxy.cut_reply(k, of=of)
            writer.write(b"HI\none\ntwo\n")
            assert (await all_of(reader), trap.struck) == (got, struck)
