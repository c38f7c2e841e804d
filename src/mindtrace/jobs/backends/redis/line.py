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
    """A connection in use. Its replies are read by a task of its own: nobody who waits for one can cut it in two.

    Args:
        connection: of the driver, connected.
        on_reply: called with each request and its reply or the server's error.
    """

    def __init__(self, connection: Connection, on_reply: Callable[[Request, Any], None]) -> None:
        self.waiting: deque[Request] = deque()
        self.replies: int = 0
        self._connection: Any = connection
        # Not by the driver's own coroutine, which needs a task, and so goes out behind all runs of this tick: a
        # request that is on its way while they run is answered when they have ended.
        self._writer: Any = self._connection._writer
        self._on_reply = on_reply
        self._lost: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    def send(self, request: Request) -> None:
        """Send it, after those before it."""
        self.waiting.append(request)  # before the first byte: from here on it may have been executed
        request.sent += 1
        try:
            self._writer.write(request.packed)
        except (OSError, RuntimeError) as error:
            self.drop(error)

    async def lost(self) -> BaseException:
        """Wait until the line is no more, and why."""
        return await asyncio.shield(self._lost)

    def drop(self, error: BaseException) -> None:
        """Give the line up."""
        if not self._lost.done():
            self._lost.set_result(error)

    async def aclose(self) -> None:
        """Close it, without a word to the server."""
        self.drop(ConnectionError("closed"))
        self._reader.cancel()
        await asyncio.wait({self._reader})
        # What was not sent is thrown away, by us and by the kernel: minutes later it would be executed once more.
        with suppress(OSError, AttributeError, ValueError):  # it is closed already; the last as uvloop says it
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()
        with suppress(RedisError, OSError):
            await self._connection.disconnect(nowait=True)

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
