"""`Lane`: what is acknowledged is what was named, in whatever order the server's frames were seen."""

import asyncio

import pytest
from pamqp import commands
from pamqp.base import Frame
from pamqp.frame import marshal
from pamqp.header import ContentHeader

from mindtrace.jobs.backends.rabbitmq.channels import Channel
from mindtrace.jobs.backends.rabbitmq.lane import Lane

pytestmark = pytest.mark.anyio

METHOD, HEADER = 1, 2


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_message_that_was_got_is_not_acknowledged_with_those_that_were_pushed_right_behind_it() -> None:
    written = bytearray()
    channel = Channel(1, 131072, written.extend, lambda _: None)
    lane = Lane(channel)
    channel.on_content = lambda content: lane.add(content.frame.delivery_tag)

    def comes(frame: Frame, *, whole: bool = True) -> None:
        channel.receive(METHOD, marshal(frame, 1))
        if whole:
            channel.receive(HEADER, marshal(ContentHeader(0, 0, commands.Basic.Properties()), 1))

    flushing = asyncio.create_task(lane.flush("a queue"))
    await asyncio.sleep(0)  # it has asked
    comes(commands.Basic.GetOk(1, False, "", "a queue", 0))
    comes(commands.Basic.Deliver("a consumer", 2, False, "", "a queue"))
    while b"\x00\x3c\x00\x0a" not in written:  # noqa: ASYNC110 (basic.qos; bytes ring no bell)
        await asyncio.sleep(0)
    comes(commands.Basic.QosOk(), whole=False)
    assert await flushing is not None
    written.clear()
    lane.acknowledge([2])
    assert written == marshal(commands.Basic.Ack(2, False), 1)
