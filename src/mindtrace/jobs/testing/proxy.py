"""A line that breaks on purpose: `FaultProxy` stands between a client and a broker. Standard library only.

    async with FaultProxy("127.0.0.1", 6379) as proxy:
        client = a_client(proxy.url("redis://127.0.0.1:6379/0"))
        trap = proxy.cut_reply(1)                  # the server does it, and the client never hears of it
        ...                                        # what has to hold all the same
        assert trap.struck

How many requests there are to break, a clean run tells: `proxy.count()` afterwards. Then for k = 1, 2, 3 and so on.

The proxy works as long as its loop turns. A blocking client belongs in a thread, or the proxy on a loop of its own:
`with portal.wrap_async_context_manager(FaultProxy(...)) as proxy`, and `portal.call(proxy.reset)`, with anyio's portal.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Collection, Generator, Hashable
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from mindtrace.jobs.testing.wires import Amqp, Opaque, Reply, Request, Resp, Wire

__all__ = ["Amqp", "FaultProxy", "Opaque", "Reply", "Request", "Resp", "Trap", "Way", "Wire", "every"]

_CHUNK = 2**16  # bytes read at once
_TICK = 0.01  # seconds between two writes on a throttled way


def every(name: bytes) -> bool:
    """For `of`: every request counts, the handshake too."""
    return True


class Trap:
    """What is to happen at one request, once. Laid by `cut_reply`, `cut_at` and `before`.

    Attributes:
        k: at which request, from 1, of those that pass from then on.
        seen: how many passed so far.
        struck: the command at which it happened; None: not yet. A run that leaves it None had fewer requests.
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k={k}: requests are counted from 1")
        self.k: int = k
        self.seen: int = 0
        self.struck: bytes | None = None
        self._has_struck = asyncio.Event()

    def __repr__(self) -> str:
        struck = "not struck" if self.struck is None else f"struck at {self.struck.decode('utf-8', 'replace')}"
        return f"<Trap at request {self.k}, {self.seen} seen, {struck}>"

    async def wait(self) -> None:
        """Return once it has struck: the reply is cut, or what was to be done before the request is done."""
        await self._has_struck.wait()


class Way:
    """One direction, on all connections, those there are and those to come. Each call replaces the one before."""

    def __init__(self) -> None:
        self._pipes: set[_Pipe] = set()
        self._flows = asyncio.Event()
        self._set()

    def flow(self) -> None:
        """Bytes pass as they come, held ones too: as at the start."""
        self._set()

    def delay(self, seconds: float) -> None:
        """What comes is passed on this much later; what comes meanwhile waits, too, for up to twice as long."""
        self._set(delay=seconds)

    def throttle(self, rate: float) -> None:
        """At most `rate` bytes a second pass, on each connection."""
        self._set(rate=rate)

    def black_hole(self) -> None:
        """Nothing passes, nor the news that an end has closed. Connections stay open, and new ones can be made.

        As with a cable that was pulled, what is under way is not lost: it comes once the way flows again.
        """
        self._set()
        self._flows.clear()

    def cut_after(self, count: int) -> None:
        """Pass `count` bytes, of all connections together, then close the connection that carried the last of them.

        With 0, the one that brings the next byte. Both ends see it closed; afterwards the way flows again.
        """
        self._set(left=count)

    def half_close(self) -> None:
        """Say on each connection there is that no more will come this way, and let none come. The other way goes on.

        With `down`, the client sees an end, and the server still does what it is asked.
        """
        self._set()
        for pipe in self._pipes:
            pipe.end()

    def _set(self, *, delay: float = 0.0, rate: float | None = None, left: int | None = None) -> None:
        self._delay: float = delay
        self._rate: float | None = rate
        self._left: int | None = left
        self._flows.set()


class FaultProxy:
    """A TCP proxy on loopback, between clients and one broker, that breaks the line when it is told to.

    For each client that connects it connects to the broker, so that it outlives the broker's restarts; a client that
    comes while there is no broker is reset. Leaving the block resets all connections. An error of what a trap does, or
    bytes that are not of the protocol, end the block, as they would an `asyncio.TaskGroup`.

    Requests are counted when they pass, whole, in the order in which they do, over all connections; those of the
    handshake only where `of` says so.

    Args:
        host: where the broker listens.
        port: and its port.
        wire: makes the protocol of one connection: `Resp`, `Amqp`, or `Opaque` where only bytes matter.

    Attributes:
        host, port: where clients connect to; the port is there inside the block, and stays the same.
        up: the way from the clients to the broker.
        down: the way from the broker to the clients.
        requests: the commands that passed, in order, the handshake's too.
        replies: the names of what passed the other way, where the protocol gives them any.
        accepted: connections of clients, all in all.
    """

    host: Final = "127.0.0.1"

    def __init__(self, host: str, port: int, *, wire: Callable[[], Wire] = Resp) -> None:
        self._server, self._wire = (host, port), wire
        self._lines: set[_Line] = set()
        self._traps: list[_Trap] = []
        self._doing: set[asyncio.Task[None]] = set()
        self._group = asyncio.TaskGroup()
        self._listener: socket.socket | None = None
        self._place: socket.socket | None = None
        self.port: int = 0
        self._up, self._down = _Way(), _Way()
        self.up: Final[Way] = self._up
        self.down: Final[Way] = self._down
        self._cuts: dict[Way, list[_Trap]] = {self._up: [], self._down: []}
        self.requests: Final[list[bytes]] = []
        self.replies: Final[list[bytes]] = []
        self.accepted: int = 0

    @classmethod
    def to(cls, url: str, *, wire: Callable[[], Wire] = Resp) -> Self:
        """A proxy to the broker of this URL, which has to name its port."""
        parts = urlsplit(url)
        if not parts.hostname or not parts.port:
            raise ValueError("a URL with a host and a port, or there is nothing to connect to")
        return cls(parts.hostname, parts.port, wire=wire)

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        # Bound and never listening, it keeps the port for us while we refuse connections.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._place.bind((self.host, 0))
        self.port = int(self._place.getsockname()[1])
        self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        if self._place:
            self._place.close()
        for task in self._doing:
            task.cancel()
        await self._group.__aexit__(None, None, None)  # not told of the error, it leaves that as it is

    @property
    def connections(self) -> int:
        """How many are open now. In a black hole an end that has closed is not noticed."""
        return sum(not line.over for line in self._lines)

    def url(self, url: str) -> str:
        """This URL, with our host and port in the place of its own. User, password, path and query stay."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{self.host}:{self.port}").geturl()

    def count(self, of: Callable[[bytes], bool] | None = None) -> int:
        """How many requests passed: without `of` all but the handshake's, else those of whose command it is true."""
        handshake = self._wire().handshake
        return sum(of(name) if of else name not in handshake for name in self.requests)

    def cut_reply(self, k: int, *, of: Callable[[bytes], bool] | None = None, reset: bool = False) -> Trap:
        """Close a connection when the reply to the `k`-th request from now arrives: it was done, and nobody heard.

        The replies to what that connection had asked before pass; what it asks afterwards is never passed on.

        Args:
            k: which request, from 1.
            of: counts only the requests of whose command this is true, `lambda name: name.startswith(b"EVAL")`, and
                those all; without it all count but the handshake's.
            reset: with a RST, as a firewall would; else as if the server had closed it.
        """
        return self._laid(_Trap(k, of, reset=reset))

    def cut_at(
        self,
        k: int,
        way: Way,
        *,
        of: Callable[[bytes], bool] | None = None,
        share: float = 0.0,
        reset: bool = False,
    ) -> Trap:
        """Close a connection at the `k`-th request, or reply, from now: it does not arrive, or not all of it.

        Args:
            k: which, from 1, of what has a name.
            way: `up` for requests, `down` for replies.
            of: counts only those of whose name this is true; without it all count, the handshake's too.
            share: how much of it arrives: 0.5 is half of its bytes, 1.0 all of them and then nothing more.
            reset: as in `cut_reply`.
        """
        if way not in (self.up, self.down):
            raise ValueError("way is up or down, of this proxy")
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share={share}: from 0 to 1")
        trap = _Trap(k, of or every, reset=reset, share=share)
        self._cuts[way].append(trap)
        return trap

    def before(self, k: int, do: Callable[[], Awaitable[object]], *, of: Callable[[bytes], bool] | None = None) -> Trap:
        """Call `do`, and wait for it, between the `k`-th request from now and the one before it.

        That request has arrived, and no byte of it has been passed on. Other connections go on. Its connection may be
        gone by then, as after a restart of the broker or a `reset()`: `do` is finished all the same.

        Args:
            k: which request, from 1.
            do: runs in the loop of the proxy: `lambda: asyncio.to_thread(broker.restart)`.
            of: as in `cut_reply`.
        """
        return self._laid(_Trap(k, of, do=do))

    def reset(self) -> None:
        """End all connections with a RST, at both ends. New ones can be made at once."""
        for line in self._lines:
            line.end(reset=True)

    def refuse(self) -> None:
        """Refuse new connections, as if nobody listened here, and `reset()` those there are."""
        if self._listener:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self.reset()

    def accept(self) -> None:
        """Take connections again, after `refuse()`."""
        if not self._listener:
            # No asyncio.Server: one that is closed as somebody connects leaves that connection open, and nobody's.
            self._listener = listener = socket.create_server((self.host, self.port), reuse_port=True)
            listener.setblocking(False)
            asyncio.get_running_loop().add_reader(listener, self._take, listener)

    def calm(self) -> None:
        """Undo all: both ways flow, connections are accepted, traps that have not struck never will."""
        self.up.flow()
        self.down.flow()
        self._traps.clear()
        for cuts in self._cuts.values():
            cuts.clear()
        self.accept()

    def _laid(self, trap: "_Trap") -> Trap:
        self._traps.append(trap)
        return trap

    def _take(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # gone again
            return
        client.setblocking(False)
        # asyncio sets this only on sockets that say which protocol they are of. Without, a reply of several small parts
        # waits 40 ms for the client's system to acknowledge the first of them.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = _Line(client, self._wire())
        serving = self._serve(line)
        try:
            line.task = self._group.create_task(serving)
        except RuntimeError:  # the block is about to end by an error
            serving.close()
            client.close()
            return
        line.task.add_done_callback(lambda _: self._forget(line))
        self._lines.add(line)
        self.accepted += 1

    def _forget(self, line: "_Line") -> None:
        self._lines.discard(line)
        line.forget()

    async def _serve(self, line: "_Line") -> None:
        try:
            up, down = await line.connect(*self._server)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(self._up, line, up, self._carry_requests))
                both.create_task(self._carry(self._down, line, down, self._carry_replies))
        except OSError:  # no broker, or ended meanwhile
            line.end(reset=True)
        finally:
            await line.close()

    async def _carry(
        self, way: "_Way", line: "_Line", pipe: "_Pipe", carry: "Callable[[_Line, _Pipe, bytes], Awaitable[bool]]"
    ) -> None:
        try:
            with way.leads_through(pipe):
                data = b"something"
                while data:
                    data = await pipe.reader.read(_CHUNK)
                    await way.arrive()
                    if not await carry(line, pipe, data):
                        return
                pipe.end()
        except _Cut as cut:
            line.end(reset=cut.reset)
        except OSError:  # one end was reset; the other one is told, unless nothing passes
            await way.arrive()
            line.end(reset=True)

    async def _carry_requests(self, line: "_Line", pipe: "_Pipe", data: bytes) -> bool:
        for request in line.wire.requests(data):
            if request.name:
                await self._spring(line, request)
            await self._carry_named(self._up, pipe, request.name, request.data)
            if request.key in line.cuts:
                return False  # the last one of this connection that the broker is to see
        return True

    async def _carry_replies(self, line: "_Line", pipe: "_Pipe", data: bytes) -> bool:
        for reply in line.wire.replies(data):
            for key in line.cuts.keys() & set(reply.answers):
                trap, name = line.cuts[key]
                trap.strike(name)
                raise _Cut(reset=trap.reset)
            if reply.name:
                self.replies.append(reply.name)
            await self._carry_named(self._down, pipe, reply.name, reply.data)
        return True

    async def _carry_named(self, way: "_Way", pipe: "_Pipe", name: bytes, data: bytes) -> None:
        for trap in [trap for trap in self._cuts[way] if name and trap.reached(name, ())]:
            self._cuts[way].remove(trap)
            await way.carry(data[: int(len(data) * trap.share)], pipe)
            trap.strike(name)
            raise _Cut(reset=trap.reset)
        await way.carry(data, pipe)

    async def _spring(self, line: "_Line", request: Request) -> None:
        """Count the request, and do what is to be done before it."""
        self.requests.append(request.name)
        for trap in [trap for trap in self._traps if trap.reached(request.name, line.wire.handshake)]:
            self._traps.remove(trap)
            if trap.do is None:
                line.cuts[request.key] = trap, request.name
            else:
                # A child of the proxy, not of the connection, whose end must not interrupt it.
                task = self._group.create_task(_done(trap, trap.do(), request.name))
                self._doing.add(task)
                task.add_done_callback(self._doing.discard)
                await asyncio.wait({task})


async def _done(trap: "_Trap", doing: Awaitable[object], name: bytes) -> None:
    await doing
    trap.strike(name)


class _Cut(Exception):
    """A connection is to end here."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset


class _Trap(Trap):
    """With `do`, what is to be done before the request; without, its reply is cut, or itself."""

    def __init__(
        self,
        k: int,
        of: Callable[[bytes], bool] | None,
        *,
        do: Callable[[], Awaitable[object]] | None = None,
        reset: bool = False,
        share: float = 0.0,
    ) -> None:
        super().__init__(k)
        self._of, self.do, self.reset, self.share = of, do, reset, share

    def reached(self, name: bytes, handshake: Collection[bytes]) -> bool:
        """Count this one; whether it is the `k`-th."""
        self.seen += self._of(name) if self._of else name not in handshake
        return self.seen == self.k

    def strike(self, name: bytes) -> None:
        self.struck = name
        self._has_struck.set()


class _Way(Way):
    @contextmanager
    def leads_through(self, pipe: "_Pipe") -> Generator[None]:
        self._pipes.add(pipe)
        try:
            yield
        finally:
            self._pipes.discard(pipe)

    async def arrive(self) -> None:
        """What has come, or the end of it, has a long way to go."""
        if self._delay:
            await asyncio.sleep(self._delay)
        await self._flows.wait()

    async def carry(self, data: bytes, pipe: "_Pipe") -> None:
        """Write it, as the way now allows. Raises `_Cut` where the last of the bytes is to be the last."""
        rest = memoryview(data)
        while rest:
            await self._flows.wait()
            size, rate, left = len(rest), self._rate, self._left
            if rate is not None:
                size = min(size, max(1, int(rate * _TICK)))
            if left is not None:
                size = min(size, left)
                self._left = left - size
            if last := self._left == 0:
                self.flow()
            await pipe.write(rest[:size])
            rest = rest[size:]
            if last:
                raise _Cut(reset=False)
            if rate is not None:
                await asyncio.sleep(size / rate)


class _Pipe:
    """One direction of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._ended = False

    async def write(self, data: memoryview) -> None:
        if not self._ended:
            self.writer.write(data)
            await self.writer.drain()

    def end(self) -> None:
        """Say that no more will come."""
        self._ended = True
        if not self.writer.is_closing():
            self.writer.write_eof()


class _Line:
    """A client's connection, and the one to the broker that is made for it."""

    task: asyncio.Task[None]

    def __init__(self, client: socket.socket, wire: Wire) -> None:
        self.wire = wire
        self.cuts: dict[Hashable, tuple[_Trap, bytes]] = {}  # by the key of the request: what waits for its reply
        self.over = False
        self._socket = client
        self._client: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._server: asyncio.StreamWriter | None = None
        self._down: _Pipe | None = None

    async def connect(self, host: str, port: int) -> tuple[_Pipe, _Pipe]:
        """The way up, and the way down."""
        self._client = reader, writer = await asyncio.open_connection(sock=self._socket)
        if self.over:
            raise ConnectionAbortedError
        answers, self._server = await asyncio.open_connection(host, port)
        self._down = _Pipe(answers, writer)
        return _Pipe(reader, self._server), self._down

    def end(self, *, reset: bool) -> None:
        """Close both, and no longer carry anything. Without `reset`, what was passed on still arrives."""
        self.over = True
        if not self._client:
            return  # connect() finds out
        if reset:
            for writer in self._writers():
                _reset(writer)
        elif self._down:
            self._down.end()  # nor does what was read already follow it, before the carrying is cancelled
        self.task.cancel()

    async def close(self) -> None:
        if self._server:
            self._server.close()
        if self._client and self.over:
            # Closed with bytes unread, it would say RST, and asyncio's streams then drop what the client has not read.
            with suppress(OSError):
                while await self._client[0].read(_CHUNK):
                    pass
        for writer in self._writers():
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def forget(self) -> None:
        """Close what `close()` cannot: of a task that was cancelled before it began."""
        if not self._client:
            self._socket.close()

    def _writers(self) -> list[asyncio.StreamWriter]:
        return [*([self._client[1]] if self._client else []), *([self._server] if self._server else [])]


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # closed already
        # Closed with no time to linger, it says RST instead of FIN.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
