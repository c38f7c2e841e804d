"""What `FaultProxy` has to know of a protocol: where requests and replies end, and which of them belong together."""

import struct
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

__all__ = ["Amqp", "Opaque", "Reply", "Request", "Resp", "Wire"]


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes from the client: a whole request, or something that is none.

    Attributes:
        data: as it came.
        name: the command, in capitals; empty: no request, passed on and never counted.
        key: what its reply is known by on this connection.
    """

    data: bytes
    name: bytes = b""
    key: Hashable = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes from the server: a whole reply, or something that answers nothing.

    Attributes:
        data: as it came.
        answers: the keys of the requests that it ends: none, one, or many.
        name: what it is, for `cut_at`, which counts only what has one.
    """

    data: bytes
    answers: Collection[Hashable] = ()
    name: bytes = b""


class Wire(Protocol):
    """The protocol of one connection: where requests and replies end, and which of them belong together.

    Attributes:
        handshake: the names of what a client sends of its own accord when it connects.
    """

    handshake: ClassVar[Collection[bytes]]

    def requests(self, data: bytes) -> Iterator[Request]:
        """What is complete, now that the client has sent `data`; if that is empty, it ended, and the rest comes too."""
        ...

    def replies(self, data: bytes) -> Iterator[Reply]:
        """The same for the server."""
        ...


class Resp(Wire):
    """What Redis speaks: RESP2 and RESP3, pipelines and subscriptions. A request is a command; inline ones are refused.

    An UNSUBSCRIBE has to name its channels: without, the number of its replies cannot be told.
    """

    handshake: ClassVar[Collection[bytes]] = frozenset({b"AUTH", b"CLIENT", b"HELLO", b"SELECT"})

    def __init__(self) -> None:
        self._commands, self._values = _Values(b"*$"), _Values(b"*~>%$=!+-:_,#(")
        self._sent = 0
        self._unanswered: deque[tuple[int, int]] = deque()  # key, replies that are still to come
        self._subscribed = False

    def requests(self, data: bytes) -> Iterator[Request]:
        """One for each command."""
        for command in self._commands.feed(data):
            head, _, name, *_ = command.split(b"\r\n", 3)
            name, replies = name.upper(), 1
            if name.endswith(b"SUBSCRIBE"):  # has one reply for each channel
                self._subscribed, replies = True, max(1, int(head[1:]) - 1)
            self._sent += 1
            self._unanswered.append((self._sent, replies))
            yield Request(command, name, self._sent)
        if not data:
            yield Request(self._commands.rest())

    def replies(self, data: bytes) -> Iterator[Reply]:
        """One for each value; what was published on a channel answers nothing."""
        for value in self._values.feed(data):
            if not self._unanswered or self._pushed(value):
                yield Reply(value)
                continue
            key, left = self._unanswered.popleft()
            if left > 1:
                self._unanswered.appendleft((key, left - 1))
            yield Reply(value, (key,) if left == 1 else ())
        if not data:
            yield Reply(self._values.rest())

    def _pushed(self, value: bytes) -> bool:
        kind = value.split(b"\r\n", 3)[2] if value[:1] in b"*>" and value.count(b"\r\n") > 2 else b""
        if value[:1] == b">":  # in RESP3 the answer to a SUBSCRIBE looks like this, too
            return not kind.endswith(b"subscribe")
        return self._subscribed and kind in (b"message", b"pmessage", b"smessage")


class _Values:
    """Cuts a stream of RESP into whole values, however it was cut before."""

    def __init__(self, kinds: bytes) -> None:
        self._kinds = kinds
        self._buffer = bytearray()
        self._at = 0  # up to here it has been looked at
        self._missing = 1  # values, nested ones too, before the outermost is complete

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while self._step():
            if not self._missing:
                value = bytes(self._buffer[: self._at])
                del self._buffer[: self._at]
                self._at, self._missing = 0, 1
                yield value

    def rest(self) -> bytes:
        return bytes(self._buffer)

    def _step(self) -> bool:
        """Go over one line, and the text that it announces; False where that is not all there."""
        if self._at == len(self._buffer):
            return False
        kind = bytes(self._buffer[self._at : self._at + 1])
        if kind not in self._kinds:
            raise ValueError(f"this is no RESP: {bytes(self._buffer[self._at : self._at + 20])!r}; see Opaque")
        end = self._buffer.find(b"\r\n", self._at)
        if end < 0:
            return False
        count = int(self._buffer[self._at + 1 : end]) if kind in b"$=!*~>%" else 0  # below 0: null
        end += 2
        if kind in b"$=!" and count >= 0:
            end += count + 2
            if end > len(self._buffer):
                return False
        inside = {b"*": 1, b"~": 1, b">": 1, b"%": 2}.get(kind, 0) * max(0, count)
        self._at, self._missing = end, self._missing - 1 + inside
        return True


class Opaque(Wire):
    """Any protocol: bytes, of which nothing is known. No request is counted, so no trap ever strikes."""

    handshake: ClassVar[Collection[bytes]] = frozenset()

    def requests(self, data: bytes) -> Iterator[Request]:
        """What came."""
        yield Request(data)

    def replies(self, data: bytes) -> Iterator[Reply]:
        """What came."""
        yield Reply(data)


class Amqp(Wire):
    """What RabbitMQ speaks: AMQP 0-9-1. Each frame counts; heartbeats and the eight bytes at the start do not.

    Its name is that of its method, `QUEUE.DECLARE-OK`, or `HEADER` or `BODY`. Which frame answers which is not told, so
    `cut_at` is for it, and `cut_reply` never strikes.
    """

    handshake: ClassVar[Collection[bytes]] = frozenset(
        {b"CONNECTION.START-OK", b"CONNECTION.TUNE-OK", b"CONNECTION.OPEN"}
    )

    def __init__(self) -> None:
        self._sent, self._came = _Frames(_AMQP_START), _Frames(0)

    def requests(self, data: bytes) -> Iterator[Request]:
        """One for each frame."""
        for frame in self._sent.feed(data):
            yield Request(frame, _frame_name(frame))
        if not data:
            yield Request(self._sent.rest())

    def replies(self, data: bytes) -> Iterator[Reply]:
        """One for each frame."""
        for frame in self._came.feed(data):
            yield Reply(frame, name=_frame_name(frame))
        if not data:
            yield Reply(self._came.rest())


class _Frames:
    """Cuts a stream of AMQP into frames, after so many bytes that are none."""

    def __init__(self, start: int) -> None:
        self._buffer, self._start = bytearray(), start

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while size := self._complete():
            part = bytes(self._buffer[:size])
            del self._buffer[:size]
            yield part

    def rest(self) -> bytes:
        return bytes(self._buffer)

    def _complete(self) -> int:
        """Bytes of the first frame; 0 where it is not all there."""
        if self._start:
            if len(self._buffer) < self._start:
                return 0
            size, self._start = self._start, 0
            return size
        if len(self._buffer) < _FRAME_HEAD.size:
            return 0
        kind, _, length = _FRAME_HEAD.unpack_from(self._buffer)
        if kind not in _FRAME_KINDS:
            raise ValueError(f"this is no AMQP: {bytes(self._buffer[:20])!r}; see Opaque")
        size = _FRAME_HEAD.size + length + 1
        return size if len(self._buffer) >= size else 0


_AMQP_START = len(b"AMQP\x00\x00\x09\x01")
_FRAME_HEAD = struct.Struct(">BHI")
_METHOD_HEAD = struct.Struct(">HH")
_FRAME_KINDS: Final[Mapping[int, bytes]] = {1: b"", 2: b"HEADER", 3: b"BODY", 8: b""}
_CLASSES: Final[Mapping[int, tuple[str, Mapping[int, str]]]] = {
    10: (
        "CONNECTION",
        {10: "START", 20: "SECURE", 30: "TUNE", 40: "OPEN", 50: "CLOSE", 60: "BLOCKED", 61: "UNBLOCKED"},
    ),
    20: ("CHANNEL", {10: "OPEN", 20: "FLOW", 40: "CLOSE"}),
    40: ("EXCHANGE", {10: "DECLARE", 20: "DELETE", 30: "BIND", 40: "UNBIND", 51: "UNBIND-OK"}),
    50: ("QUEUE", {10: "DECLARE", 20: "BIND", 30: "PURGE", 40: "DELETE", 50: "UNBIND"}),
    60: (
        "BASIC",
        {
            10: "QOS", 20: "CONSUME", 30: "CANCEL", 40: "PUBLISH", 50: "RETURN", 60: "DELIVER", 70: "GET",
            71: "GET-OK", 72: "GET-EMPTY", 80: "ACK", 90: "REJECT", 110: "RECOVER", 120: "NACK",
        },
    ),
    85: ("CONFIRM", {10: "SELECT"}),
}  # fmt: skip


def _frame_name(frame: bytes) -> bytes:
    """Of a method `CLASS.METHOD`; the odd ones are the answers to those before them."""
    if frame[0] != 1:
        return _FRAME_KINDS.get(frame[0], b"")
    group, number = _METHOD_HEAD.unpack_from(frame, _FRAME_HEAD.size)
    title, methods = _CLASSES.get(group, (str(group), dict[int, str]()))
    method = methods.get(number) or (f"{methods[number - 1]}-OK" if number - 1 in methods else str(number))
    return f"{title}.{method}".encode()
