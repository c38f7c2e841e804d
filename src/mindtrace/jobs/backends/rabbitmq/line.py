"""`Line`: one AMQP connection of the driver, whose channels are ours.

The driver does handshake, login and heartbeats, which is all that travels on channel 0. Its own channels are left
aside: there each call is a task, a cancelled call closes the channel with all that is unacknowledged on it, a delivery
starts a task of its own, and a header that cannot be decoded, which anybody may send, ends the connection. Frames of
other channels go to ours as they come, and what those write goes to the socket at once, frame by whole frame.
"""

import asyncio
import logging
import ssl
import struct
from contextlib import suppress
from typing import Any

from aiormq import Connection
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPError, AuthenticationError, InvalidFrameError, ProbableAuthenticationError
from pamqp import commands
from pamqp.exceptions import PAMQPException
from pamqp.frame import unmarshal
from yarl import URL

from mindtrace.jobs.backends.rabbitmq.address import CONNECT_WITHIN, Address
from mindtrace.jobs.backends.rabbitmq.channels import Channel
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable

_CLOSE_WITHIN = 1.0
_READ_AHEAD = 1 << 18
_FRAME_HEAD = struct.Struct(">BHI")
_PAYLOAD = _FRAME_HEAD.size
_FRAME_END = 0xCE
_METHOD = 1
_HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
_CLOSE, _BLOCKED, _UNBLOCKED = b"\x00\x0a\x00\x32", b"\x00\x0a\x00\x3c", b"\x00\x0a\x00\x3d"  # class 10: 50, 60, 61
_SILENT = 3  # heartbeats
_CHANNELS = 2000  # below the limit of 2047 that a server has unless it is set up otherwise
_NOT_ALLOWED = 530


class Line:
    """A connection that is open. Made by `connect`.

    Attributes:
        lost: done once the connection is gone, with why.
        version: of the server; empty if it does not say.
    """

    def __init__(self, connection: Connection, transport: "_Transport") -> None:
        self._connection, self._transport = connection, transport
        self.lost: asyncio.Future[BaseException | None] = transport.lost
        self.lost.add_done_callback(self._on_lost)
        self._channels: dict[int, Channel] = transport.channels
        self._last = 0
        self._most = min(connection.connection_tune.channel_max or _CHANNELS, _CHANNELS)
        self._frame_max: int = connection.connection_tune.frame_max or 131072
        version = connection.server_properties.get("version", "")
        self.version: str = version if isinstance(version, str) else ""
        observed: Any = connection
        observed.closing.add_done_callback(self._on_closing)

    @classmethod
    async def connect(cls, address: Address, role: str) -> "Line":
        """Within 5 s.

        Raises:
            AuthenticationFailed: the login is refused, or the virtual host is.
            BackendUnavailable: there is no server, or none that answers.
        """
        _quiet_the_driver()
        try:
            transport = _Transport(address.context())
        except OSError as error:
            raise BackendUnavailable(f"no TLS to RabbitMQ at {address}: {said(error)}") from error
        connection: Any = Connection(  # the driver's calls are not all typed
            address.login(), transport_factory=transport, client_properties={"connection_name": f"mtjobs:{role}"}
        )
        connection.vhost = address.virtual_host
        try:
            async with asyncio.timeout(CONNECT_WITHIN):
                await connection.connect()
        except BaseException as error:
            transport.abort()
            connection.closing.cancel()
            ours = _ours(error, address, transport.refusal)
            if ours is None:
                raise
            raise ours from error
        transport.watch(address.heartbeat)
        return cls(connection, transport)

    @property
    def blocked(self) -> bool:
        """Whether the server has stopped reading what is published here, for want of memory or disk."""
        return self._transport.blocked

    async def channel(self) -> Channel:
        """Another channel, open.

        Raises:
            BackendUnavailable: the connection is gone.
        """
        if self.lost.done():
            raise BackendUnavailable("the connection to RabbitMQ is lost")
        if len(self._channels) >= self._most:
            raise BackendUnavailable(f"{self._most} channels are open on one connection to RabbitMQ, which is the most")
        self._last = self._last % self._most + 1
        while self._last in self._channels:
            self._last = self._last % self._most + 1
        channel = Channel(self._last, self._frame_max, self._transport.write, self._forget)
        self._channels[self._last] = channel
        try:
            await channel.call(commands.Channel.Open())
        except BaseException:  # who waited for it may have been cancelled: nobody else would close it
            channel.begin_close()
            raise
        return channel

    async def aclose(self) -> None:
        """Say good-bye, within a second, and close."""
        try:
            with suppress(TimeoutError, AMQPError, OSError, RuntimeError):
                async with asyncio.timeout(_CLOSE_WITHIN):
                    await self._connection.close(None)
        finally:
            self._transport.abort()

    def _forget(self, channel: Channel) -> None:
        """It is closed on both sides: its number is free."""
        if self._channels.get(channel.number) is channel:
            del self._channels[channel.number]

    def _on_lost(self, lost: "asyncio.Future[BaseException | None]") -> None:
        why = BackendUnavailable(f"the connection to RabbitMQ was lost: {said(lost.result())}")
        for channel in list(self._channels.values()):
            channel.closed(why)

    def _on_closing(self, closing: "asyncio.Future[Any]") -> None:
        """The server closed it, or fell silent; the transport may not know yet."""
        error = None if closing.cancelled() else closing.exception()
        self._transport.end(error)


class _Transport(TransportFactory):
    """Opens the socket, keeps hold of it, and is told at once when it is gone."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.lost: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self.channels: dict[int, Channel] = {}
        self.blocked: bool = False
        self.heard: float = 0.0  # when anything last came, by the loop's clock
        self._context = context
        self._watching: asyncio.TimerHandle | None = None
        self.refusal: commands.Connection.Close | None = None  # what the server said before it closed
        self._transport: asyncio.Transport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_READ_AHEAD, loop=loop)
        protocol = _Protocol(reader, loop, self)
        transport, _ = await loop.create_connection(lambda: protocol, url.host or "", url.port or 0, ssl=self._context)
        self._transport = transport
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self.end(None)

    def watch(self, heartbeat: float) -> None:
        """End it once nothing came for three heartbeats. The driver would allow for 3 s more, and look later."""
        loop = asyncio.get_running_loop()
        self.heard = loop.time()
        pause, due = heartbeat / 4, 0.0

        def look() -> None:
            now = loop.time()
            stood_still = now - due > pause  # what has come is yet to be read
            if not stood_still and now - self.heard > _SILENT * heartbeat:
                self.end(TimeoutError(f"nothing came for {_SILENT * heartbeat:g} s"))
            else:
                look_soon()

        def look_soon() -> None:
            nonlocal due
            due = loop.time() + pause
            self._watching = loop.call_at(due, look)

        if not self.lost.done():
            look_soon()

    def on_control(self, frame: bytes) -> None:
        """A method on channel 0, on its way to the driver."""
        kind = frame[_PAYLOAD : _PAYLOAD + 4]
        if kind == _BLOCKED:
            self.blocked = True
        elif kind == _UNBLOCKED:
            self.blocked = False
        elif kind == _CLOSE:
            with suppress(PAMQPException, ValueError):
                _, _, close = unmarshal(frame)
                if isinstance(close, commands.Connection.Close):
                    self.refusal = close

    def end(self, why: BaseException | None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if not self.lost.done():
            self.lost.set_result(why if self.refusal is None else ConnectionError(self.refusal.reply_text))
            if self._transport is not None:
                self._transport.abort()


class _Protocol(asyncio.StreamReaderProtocol):
    """Cuts what comes into frames. Those of channel 0 go on to the driver."""

    def __init__(self, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop, transport: _Transport) -> None:
        super().__init__(reader, loop=loop)
        self._ours = transport
        self._rest = b""
        self._clock = loop.time
        self._shown = 0.0  # when the driver was last shown that the server lives

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        at, end_of_data = 0, len(data)
        if data.startswith(b"AMQP"):  # no frame: the server speaks another version
            super().data_received(data)
            return
        channels = self._ours.channels
        while end_of_data - at > _PAYLOAD:
            kind, number, size = _FRAME_HEAD.unpack_from(data, at)
            end = at + _PAYLOAD + size + 1
            if end > end_of_data:
                break
            if data[end - 1] != _FRAME_END:
                self._ours.end(ConnectionError("a frame without its end"))
                return
            if number:
                channel = channels.get(number)
                if channel is not None:
                    channel.receive(kind, data[at:end])
            else:
                if kind == _METHOD:
                    self._ours.on_control(data[at:end])
                super().data_received(data[at:end])
            at = end
        self._rest = data[at:]
        self._ours.heard = now = self._clock()
        if channels and now - self._shown > 1.0:  # it counts what it sees; the server sends none while there is traffic
            self._shown = now
            super().data_received(_HEARTBEAT)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._ours.end(exc)


def _ours(
    error: BaseException, address: Address, refusal: commands.Connection.Close | None
) -> BackendUnavailable | None:
    """What to raise for it; None for what is not about the connection."""
    if isinstance(error, ProbableAuthenticationError | AuthenticationError):
        return AuthenticationFailed(f"RabbitMQ at {address} refuses the login: {said(error)}")
    if isinstance(error, InvalidFrameError) and refusal is not None:
        text = " ".join(str(refusal.reply_text).split())[:400]
        # A limit of connections that is reached, and a virtual host that is just starting (541), are for now.
        if refusal.reply_code == _NOT_ALLOWED and not text.endswith("is reached"):
            return AuthenticationFailed(
                f"RabbitMQ at {address} refuses the virtual host {address.virtual_host!r}: there is none of that name, "
                f"or this user may not use it ({text})"
            )
        return BackendUnavailable(f"RabbitMQ at {address} takes no connection now: {text}")
    # A handshake that ends too early can raise StopAsyncIteration, a name that is none of a host ValueError.
    if isinstance(
        error, AMQPError | OSError | EOFError | TimeoutError | StopAsyncIteration | RuntimeError | ValueError
    ):
        return BackendUnavailable(f"no RabbitMQ at {address}: {said(error)}")
    return None


def said(error: BaseException | None) -> str:
    """What a driver or a server says, on one line and not too long; neither knows our passwords."""
    if error is None:
        return "closed"
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _quiet_the_driver() -> None:
    """Its debug log quotes frames with their bodies, its errors come with every try to connect: we say it once.

    Whoever sets a level for `aiormq` has that level.
    """
    log = logging.getLogger("aiormq")
    if log.level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)
