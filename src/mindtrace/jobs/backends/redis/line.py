"""`Line`: one connection, on which requests go out together and their replies come back in order."""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import hiredis
from redis.asyncio.connection import Connection
from redis.exceptions import RedisError, ResponseError

Words = Sequence[str | bytes | int | float]


# Its stub knows commands of one word only.
_pack: Any = hiredis.pack_command  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class Request:
    """One command and who waits for its reply.

    Args:
        words: the command.
        answer: called once with the reply and None, or with None and the error.
        deadline: on the monotonic clock; then it is given up.
        patience: seconds that the server may be silent while this is the next to be answered.
        again: whether it is sent again on the next line when this one is lost.
        fallback: sent instead where the server knows no such script.
        waits_out: sent again after a while where the server cannot write now; else that is the answer.
    """

    __slots__ = ("again", "answer", "deadline", "done", "fallback", "packed", "patience", "sent", "waits_out")

    def __init__(
        self,
        words: Words,
        answer: Callable[[Any, BaseException | None], None],
        deadline: float,
        *,
        patience: float = 5.0,
        again: bool = True,
        fallback: Words | None = None,
        waits_out: bool = False,
    ) -> None:
        self.packed: bytes = _packed(words)  # now: what cannot be packed is its caller's error
        self.answer: Callable[[Any, BaseException | None], None] = answer
        self.deadline: float = deadline
        self.patience: float = patience
        self.again: bool = again
        self.fallback: Words | None = fallback
        self.sent: int = 0
        self.waits_out: bool = waits_out
        self.done: bool = False

    def fall_back(self) -> None:
        """Send the other words from now on."""
        if self.fallback is not None:
            self.packed, self.fallback = _packed(self.fallback), None


def _packed(words: Words) -> bytes:
    packed: bytes = _pack(tuple(words))
    return packed


class Line:
    """A connection in use. Its tasks belong to it: nobody who waits for a reply can cut a request or a reply in two.

    Args:
        connection: of the driver, connected.
        on_reply: called with each request and its reply or the server's error.
    """

    def __init__(self, connection: Connection, on_reply: Callable[[Request, Any], None]) -> None:
        self.waiting: deque[Request] = deque()
        self.replies: int = 0
        self._connection: Any = connection
        self._on_reply = on_reply
        self._outbox: list[Request] = []
        self._filled = asyncio.Event()
        self._lost: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def send(self, request: Request) -> None:
        """Have it sent, after those before it."""
        self._outbox.append(request)
        self._filled.set()

    async def lost(self) -> BaseException:
        """Wait until the line is no more, and why."""
        return await asyncio.shield(self._lost)

    def drop(self, error: BaseException) -> None:
        """Give the line up."""
        if not self._lost.done():
            self._lost.set_result(error)

    def unanswered(self) -> list[Request]:
        """What was handed to it and got no reply, in order."""
        return [*self.waiting, *self._outbox]

    async def aclose(self) -> None:
        """Close it, without a word to the server."""
        self.drop(ConnectionError("closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        writer: asyncio.StreamWriter | None = getattr(self._connection, "_writer", None)
        if writer is not None:
            # What was not sent is thrown away, by us and by the kernel: minutes later it would be executed once more.
            with suppress(OSError, AttributeError):
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        with suppress(RedisError, OSError):
            await self._connection.disconnect(nowait=True)

    async def _write(self) -> None:
        try:
            while True:
                await self._filled.wait()
                self._filled.clear()
                requests, self._outbox = self._outbox, []
                self.waiting.extend(requests)  # before the first byte: from here on it may have been executed
                packed: list[bytes] = []
                for request in requests:
                    request.sent += 1
                    packed.append(request.packed)
                await self._connection.send_packed_command(packed, check_health=False)
        except Exception as error:
            self.drop(error)

    async def _read(self) -> None:
        try:
            while True:
                try:
                    reply = await self._connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    reply = error
                self.replies += 1
                self._on_reply(self.waiting.popleft(), reply)
        except Exception as error:
            self.drop(error)
