"""`Line`: one AMQP connection of the driver, whose channels are ours.

The driver does name, TLS, login, heartbeats and the codec. Its own channels are left aside: there each call is a task,
a cancelled call closes the channel with all that is unacknowledged on it, and a delivery starts a task of its own. What
it reads goes to our channels as it comes, and what they write goes to the socket at once, frame by whole frame.
"""

import asyncio
import logging
import ssl
from contextlib import suppress
from typing import Any

from aiormq import Connection
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPError, AuthenticationError, InvalidFrameError, ProbableAuthenticationError
from pamqp import commands
from yarl import URL

from mindtrace.jobs.backends.rabbitmq.address import CONNECT_WITHIN, Address
from mindtrace.jobs.backends.rabbitmq.channels import Channel
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable

_CLOSE_WITHIN = 1.0
_READ_AHEAD = 1 << 18


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
        self._channels: dict[int, Channel] = {}
        self._last = 0
        self._frame_max: int = connection.connection_tune.frame_max or 131072
        version = connection.server_properties.get("version", "")
        self.version: str = version if isinstance(version, str) else ""
        connection.closing.add_done_callback(self._on_closing)

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
        connection = Connection(
            address.login(), transport_factory=transport, client_properties={"connection_name": f"mtjobs:{role}"}
        )
        connection.vhost = address.virtual_host
        try:
            async with asyncio.timeout(CONNECT_WITHIN):
                await connection.connect()
        except BaseException as error:
            transport.abort()
            connection.closing.cancel()
            ours = _ours(error, address)
            if ours is None:
                raise
            raise ours from error
        return cls(connection, transport)

    @property
    def blocked(self) -> bool:
        """Whether the server has stopped reading what is published here, for want of memory or disk."""
        ready: Any = self._connection.ready()
        try:
            ready.send(None)
        except StopIteration:
            return False
        ready.close()
        return True

    async def channel(self) -> Channel:
        """Another channel, open.

        Raises:
            BackendUnavailable: the connection is gone.
        """
        if self.lost.done():
            raise BackendUnavailable("the connection to RabbitMQ is lost")
        while True:
            self._last = self._last % 2000 + 1  # below the server's limit of 2047
            if self._last not in self._channels:
                break
        channel = Channel(self._last, self._frame_max, self._transport.write, self._forget)
        self._channels[self._last] = channel
        known: dict[int, Any] = self._connection.channels
        known[self._last] = channel
        await channel.call(commands.Channel.Open())
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
            self._connection.channels.pop(channel.number, None)

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
        self._context = context
        self._transport: asyncio.Transport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_READ_AHEAD, loop=loop)
        protocol = _Protocol(reader, loop=loop)
        protocol.on_lost = self.end
        transport, _ = await loop.create_connection(lambda: protocol, url.host, url.port, ssl=self._context)
        self._transport = transport
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self.end(None)

    def end(self, why: BaseException | None) -> None:
        if not self.lost.done():
            self.lost.set_result(why)
            if self._transport is not None:
                self._transport.abort()


class _Protocol(asyncio.StreamReaderProtocol):
    on_lost: Any = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost(exc)


def _ours(error: BaseException, address: Address) -> BackendUnavailable | None:
    """What to raise for it; None for what is not about the connection."""
    if isinstance(error, ProbableAuthenticationError | AuthenticationError):
        return AuthenticationFailed(f"RabbitMQ at {address} refuses the login: {said(error)}")
    if isinstance(error, InvalidFrameError) and "Connection.OpenOk" in str(error):
        return AuthenticationFailed(
            f"RabbitMQ at {address} refuses the virtual host {address.virtual_host!r}: there is none of that name, or "
            "this user may not use it"
        )
    # A handshake that ends too early can raise StopAsyncIteration.
    if isinstance(error, AMQPError | OSError | EOFError | TimeoutError | StopAsyncIteration | RuntimeError):
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
