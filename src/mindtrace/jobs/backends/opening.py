"""`Opening`: how a backend on a server is open: once for all who ask, in one loop of one process.

closed ──open──> connecting ──────────> open ──aclose──> closed
                     │                    │
                     ├─fails, is cancelled┴─its loop was closed under it──> closed
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from mindtrace.jobs.backend import Home
from mindtrace.jobs.errors import BackendUnavailable, Closed


class Connected(Protocol):
    """What an open backend has: connections, receivers, a thread."""

    async def aclose(self) -> None:
        """End them all."""

    def abandon(self) -> None:
        """Their loop is closed: end what lives outside of it."""


C = TypeVar("C", bound=Connected)


class Opening(Generic[C]):
    """Opens and closes.

    Args:
        what: is opened; for messages.
        connect: makes what an open backend has; told whether it is known, and was said, that there is no server.
    """

    def __init__(self, what: str, connect: Callable[[bool], Coroutine[Any, Any, C]]) -> None:
        self.home: Home = Home(what)
        """Where it is open."""
        self._what, self._connect = what, connect
        self._is_away = False  # the server, when it was last looked for
        self._connecting: asyncio.Task[None] | None = None
        self._connected: C | None = None
        self._waiting: set[object] = set()  # for it to be open
        self._is_used = False  # somebody was told that it is open

    async def open(self) -> None:
        """Connect, or wait for whoever does; cancelled, it is closed again unless somebody else has it open.

        Raises:
            ForkedProcess: the parent process has it open.
            ConfigError: another loop has.
            Closed: it was closed meanwhile.
        """
        self._leave_a_closed_loop()
        if self.home.move_in():
            self._connected, self._is_used = None, False
            self._connecting = asyncio.create_task(self._make())
        connecting = self._connecting
        if self._connected is not None or connecting is None:
            self._is_used = True
            return
        waiting, me = self._waiting, object()
        waiting.add(me)
        try:
            await asyncio.wait({connecting})
        except asyncio.CancelledError:
            if waiting == {me} and not self._is_used:
                await self.aclose()
            raise
        finally:
            waiting.discard(me)
        if connecting.cancelled():
            raise Closed(f"the {self._what} was closed while it was opened")
        connecting.result()
        self._is_used = True

    def connected(self) -> C:
        """What it has while it is open.

        Raises:
            Closed: it is not.
            ForkedProcess: the parent process has it open.
            ConfigError: another loop has.
        """
        self.home.check()
        if self._connected is None:
            raise Closed(f"the {self._what} is not open yet: await its open()")
        return self._connected

    async def aclose(self) -> None:
        """Close it. Closing twice does nothing."""
        self._leave_a_closed_loop()
        connecting = self._connecting
        if connecting is not None and not connecting.done():
            self.home.check()
            connecting.cancel()
            await asyncio.wait({connecting})
            if connecting.cancelled() or connecting.exception() is not None:
                return  # it is closed, unless it is being opened anew
        if self.home.move_out():
            connected, self._connected = self._connected, None
            if connected is not None:
                await connected.aclose()

    async def _make(self) -> None:
        try:
            self._connected = await self._connect(self._is_away)
        except BaseException as error:
            self._is_away = isinstance(error, BackendUnavailable)
            self.home.move_out()
            raise
        self._is_away = False

    def _leave_a_closed_loop(self) -> None:
        """A script may call `asyncio.run` twice and close nothing in between."""
        if self.home.is_left():
            connected, self._connected, self._connecting = self._connected, None, None
            self._waiting = set()
            self.home.move_out()
            if connected is not None:
                connected.abandon()
