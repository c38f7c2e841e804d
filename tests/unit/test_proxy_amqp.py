"""The proxy understands AMQP: frames, by name, however they were cut before, and cut where it was asked to."""

import asyncio
import struct
from contextlib import suppress

import pytest

from mindtrace.jobs.testing.proxy import Amqp, FaultProxy

pytestmark = pytest.mark.anyio

START = b"AMQP\x00\x00\x09\x01"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


def method(group: int, number: int, rest: bytes = b"") -> bytes:
    return frame(1, struct.pack(">HH", group, number) + rest)


PUBLISH = [method(60, 40, b"..."), frame(2, b"header"), frame(3, b"body")]
HEARTBEAT = frame(8, b"")


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_frames_are_told_apart_however_they_come(step: int) -> None:
    sent = [START, *PUBLISH, HEARTBEAT, method(50, 51), method(60, 71), method(99, 7)]
    data, wire = b"".join(sent), Amqp()
    got = [one for at in range(0, len(data), step) for one in wire.requests(data[at : at + step])]
    assert [one.data for one in got] == sent
    names = [b"", b"BASIC.PUBLISH", b"HEADER", b"BODY", b"", b"QUEUE.UNBIND-OK", b"BASIC.GET-OK", b"99.7"]
    assert [one.name for one in got] == names


def test_half_a_frame_is_passed_on_at_the_end() -> None:
    wire = Amqp()
    assert list(wire.replies(PUBLISH[0][:5])) == []
    assert [one.data for one in wire.replies(b"")] == [PUBLISH[0][:5]]


def test_what_is_no_amqp_is_refused() -> None:
    with pytest.raises(ValueError, match="this is no AMQP"):
        list(Amqp().replies(b"HTTP/1.1 400 Bad Request\r\n"))


@pytest.mark.parametrize(("share", "arrives"), [(0.0, 0), (0.5, len(PUBLISH[2]) // 2), (1.0, len(PUBLISH[2]))])
@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_line_is_cut_at_a_frame_after_as_much_of_it_as_was_asked_for(
    way: str, share: float, arrives: int
) -> None:
    sent = b"".join([*PUBLISH[:1], HEARTBEAT, *PUBLISH[1:], method(60, 80)])
    before = len(PUBLISH[0] + HEARTBEAT + PUBLISH[1])
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if way == "down":
            await reader.readexactly(len(START))
            writer.write(sent)
        data = b""
        with suppress(ConnectionResetError):  # what it wrote was not all read
            data = await reader.read()
        if way == "up":
            received.set_result(data[len(START) :])
        writer.close()

    server = await asyncio.start_server(conversation, "127.0.0.1", 0)
    async with asyncio.timeout(5), server, FaultProxy(*server.sockets[0].getsockname(), wire=Amqp) as proxy:
        trap = proxy.cut_at(3, getattr(proxy, way), share=share)
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        writer.write(START + (sent if way == "up" else b""))
        data = await reader.read()
        if way == "down":
            received.set_result(data)
        assert await received == sent[: before + arrives]
        assert trap.struck == b"BODY"
        writer.close()


async def test_a_reply_of_several_frames_is_passed_on_at_once() -> None:
    """Where the second frame waits until the system has acknowledged the first, each reply takes 40 ms."""
    question, answer = method(60, 70), b"".join([method(60, 71), frame(2, b"header"), frame(3, b"body")])

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(START))
        with suppress(ConnectionResetError):  # the end of the block
            while await reader.read(len(question)):
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(conversation, "127.0.0.1", 0)
    async with server, FaultProxy(*server.sockets[0].getsockname(), wire=Amqp) as proxy:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        writer.write(START)
        async with asyncio.timeout(4):
            for _ in range(200):
                writer.write(question)
                assert await reader.readexactly(len(answer)) == answer
        writer.close()


async def test_a_cut_needs_a_way_of_the_proxy_and_a_share() -> None:
    proxy, other = FaultProxy("127.0.0.1", 1), FaultProxy("127.0.0.1", 1)
    with pytest.raises(ValueError, match="way is up or down"):
        proxy.cut_at(1, other.up)
    with pytest.raises(ValueError, match="from 0 to 1"):
        proxy.cut_at(1, proxy.up, share=1.5)
