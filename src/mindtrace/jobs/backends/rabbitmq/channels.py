"""`Channel`: calls, publishes with confirms, and deliveries on one AMQP channel, without a task of its own.

A call that nobody waits for any more is answered all the same, in its turn, so a cancelled caller costs nothing. Each
number the server confirms or returns finds the one it is for by its tag; an error closes the channel, and everybody who
waited is told.
"""

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from pamqp import commands
from pamqp.base import Frame
from pamqp.frame import marshal, unmarshal
from pamqp.header import ContentHeader

from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, JobsError

_log = logging.getLogger(__name__)

REPLY_WITHIN = 5.0
"""Seconds that the server may take for a call."""
_FRAME_HEAD = struct.Struct(">BHI")
_BODY_SIZE = struct.Struct(">IQ")
_HEADER_FRAME, _BODY_FRAME = 2, 3
_FRAME_END = b"\xce"
_FRAME_EXTRA = 8


@dataclass(slots=True)
class Content:
    """A message as it came."""

    frame: Any  # Basic.Deliver, Basic.GetOk or Basic.Return
    properties: commands.Basic.Properties
    body: bytes


class ChannelClosed(BackendUnavailable):
    """The server closed the channel, because of what was asked on it.

    Attributes:
        code: of AMQP 0-9-1: 403 not allowed, 404 not found, 406 it is different.
    """

    def __init__(self, code: int, text: str) -> None:
        self.code: int = code
        super().__init__(f"RabbitMQ refuses: {' '.join(text.split())[:400]}")


class Channel:
    """A channel. Made by a line, which opens it.

    Args:
        number: of the channel.
        frame_max: bytes of the longest frame.
        write: puts bytes on the wire.
        forget: called once it is closed on both sides.
    """

    def __init__(
        self, number: int, frame_max: int, write: Callable[[bytes], None], forget: Callable[["Channel"], None]
    ) -> None:
        self.number: int = number
        self.frame_max: int = frame_max
        self.gone: asyncio.Future[JobsError] = asyncio.get_running_loop().create_future()
        self.on_content: Callable[[Content], None] = _ignore
        self.on_cancel: Callable[[str], None] = _ignore
        self.on_confirm: Callable[[int, bool, bool], None] = _ignore
        """Told of a tag, whether all below it are meant too, and whether it was taken."""
        self.on_return: Callable[[Content], None] = _ignore
        self._write, self._forget = write, forget
        self._calls: deque[asyncio.Future[Any]] = deque()
        self._frame: Any = None
        self._header: ContentHeader | None = None
        self._missing = 0
        self._parts: list[bytes] = []
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_closed(self) -> bool:
        """Whether it is of no more use."""
        return self.gone.done()

    def begin(self, frame: Frame) -> "asyncio.Future[Any]":
        """Send a call. The future has its reply; a `Content` for a message that was got."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.gone.done():
            future.set_exception(self.gone.result())
            future.add_done_callback(_seen)
        else:
            self._calls.append(future)
            self._write(marshal(frame, self.number))
        return future

    async def call(self, frame: Frame, within: float = REPLY_WITHIN) -> Any:
        """Send a call and wait for its reply.

        Raises:
            ChannelClosed: it was refused.
            AuthenticationFailed: this user may not do it.
            BackendUnavailable: the connection is gone, or there was no answer in time.
        """
        return await self.reply(self.begin(frame), within)

    async def reply(self, future: "asyncio.Future[Any]", within: float = REPLY_WITHIN) -> Any:
        """Wait for the reply to a call that was begun; raises as `call`."""
        done, _ = await asyncio.wait({future}, timeout=within)
        if not done:
            future.add_done_callback(_seen)
            raise BackendUnavailable(f"no answer from RabbitMQ within {within:g} s")
        return future.result()

    def send(self, *frames: Any) -> None:
        """Send what has no reply."""
        if not self.gone.done():
            self._write(b"".join(marshal(frame, self.number) for frame in frames))

    def write(self, data: bytes) -> None:
        """Send frames that are encoded already."""
        if not self.gone.done():
            self._write(data)

    def message(self, head: bytes, properties: commands.Basic.Properties, body: bytes) -> bytes:
        """A publish as frames.

        Args:
            head: the frame of the method, encoded.
            properties: of the message.
            body: of it.
        """
        frames = [head, marshal(ContentHeader(0, len(body), properties), self.number)]
        most = self.frame_max - _FRAME_EXTRA
        for start in range(0, len(body), most):
            part = body[start : start + most]
            frames += (_FRAME_HEAD.pack(_BODY_FRAME, self.number, len(part)), part, _FRAME_END)
        return b"".join(frames)

    def begin_close(self) -> "asyncio.Future[None]":
        """Close it; the server gives back what was unacknowledged on it. The future is done once it has."""
        if not self.gone.done():
            self._write(marshal(commands.Channel.Close(200, "", 0, 0), self.number))
            self._end(BackendUnavailable("the channel was closed"))
        return self._over

    def closed(self, why: JobsError) -> None:
        """It is gone with its connection."""
        self._end(why)
        self._is_over()

    def _is_over(self) -> None:
        self._forget(self)
        if not self._over.done():
            self._over.set_result(None)

    def _end(self, why: JobsError) -> None:
        if self.gone.done():
            return
        self.gone.set_result(why)
        calls, self._calls = self._calls, deque()
        for call in calls:
            if not call.done():
                call.set_exception(why)
                call.add_done_callback(_seen)

    # --- what comes in

    def receive(self, kind: int, data: bytes) -> None:
        """A frame, whole."""
        if kind == _BODY_FRAME:
            if self._missing:
                self._on_body(data[_FRAME_HEAD.size : -1])
        elif kind == _HEADER_FRAME:
            self._header = header = _header_of(data)
            self._missing = header.body_size
            if not self._missing:
                self._on_whole(b"")
        else:
            self._on_method(unmarshal(data)[2])

    def _on_method(self, frame: Any) -> None:
        kind = cast("type[object]", type(frame))
        if kind is commands.Basic.Ack:
            self.on_confirm(frame.delivery_tag, frame.multiple, True)
        elif kind is commands.Basic.Nack:
            self.on_confirm(frame.delivery_tag, frame.multiple, False)
        elif kind is commands.Basic.Deliver or kind is commands.Basic.GetOk or kind is commands.Basic.Return:
            self._frame = frame
        elif kind is commands.Basic.Cancel:
            self.on_cancel(frame.consumer_tag)
        elif kind is commands.Channel.Close:
            self._write(marshal(commands.Channel.CloseOk(), self.number))
            self._end(_refusal(frame.reply_code or 0, frame.reply_text or ""))
            self._is_over()
        elif kind is commands.Channel.CloseOk:
            self._is_over()
        elif kind is commands.Channel.Flow:
            self.send(commands.Channel.FlowOk(active=frame.active))
        elif self._calls:
            self._answer(frame)

    def _on_body(self, value: bytes) -> None:
        self._missing -= len(value)
        if self._missing > 0 or self._parts:
            self._parts.append(value)
        if self._missing <= 0:
            parts, self._parts, self._missing = self._parts, [], 0
            self._on_whole(b"".join(parts) if parts else value)

    def _on_whole(self, body: bytes) -> None:
        frame, header = self._frame, self._header
        self._frame = self._header = None
        if frame is None or header is None or self.gone.done():
            return
        content = Content(frame, header.properties, body)
        if type(frame) is commands.Basic.Deliver:
            self.on_content(content)
        elif type(frame) is commands.Basic.Return:
            self.on_return(content)
        elif self._calls:
            self._answer(content)

    def _answer(self, reply: Any) -> None:
        call = self._calls.popleft()
        if not call.done():
            call.set_result(reply)


def _header_of(data: bytes) -> ContentHeader:
    """What stands before a body. Of one that cannot be decoded the properties are left out: anybody may send that."""
    try:
        header = unmarshal(data)[2]
        if isinstance(header, ContentHeader):
            return header
    except (
        Exception
    ) as error:  # text that is none, times out of range, tables without a bottom: the codec says many things
        _log.warning("the properties of a message cannot be read: %s", type(error).__name__)
    _, body_size = _BODY_SIZE.unpack_from(data, _FRAME_HEAD.size)
    return ContentHeader(0, body_size, commands.Basic.Properties())


def _refusal(code: int, text: str) -> JobsError:
    if code == 403:
        return AuthenticationFailed(f"RabbitMQ does not allow it: {' '.join(text.split())[:400]}")
    return ChannelClosed(code, text)


def _seen(future: "asyncio.Future[Any]") -> None:
    """Nobody waits for it any more: that it failed is no news."""
    if not future.cancelled():
        future.exception()


def _ignore(*_: Any) -> None:
    pass
