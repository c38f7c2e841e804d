"""`Link`: one connection kept up.

connect --> up --lost, silent--> wait (full jitter) --> connect
   |                                                       ^
   +-- refused, no answer ---------------------------------+
   +-- wrong login --> failed, until somebody asks again a second later
"""

import asyncio
import logging
import time
from collections.abc import Callable
from random import Random

from mindtrace.jobs.backend import NO_OUTAGES, Outages
from mindtrace.jobs.backends.rabbitmq.address import Address
from mindtrace.jobs.backends.rabbitmq.line import Line, said
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, Closed

_log = logging.getLogger(__name__)

_LONGEST_PAUSE = 1.5  # between two tries to connect, so that work goes on within 2 s of the server's return
_KNOCK_AGAIN_AFTER = 1.0
_USEFUL = 1.0  # seconds for which a line has to hold until a failure after it counts as the first


class Link:
    """A connection under supervision; used from the loop that starts it.

    Args:
        address: where to.
        role: what it is for, as the server's list of connections shows it.
        random: the source of the jitter.
        on_up: called with each new line.
        quiet: it is known, and has been said, that there is no server yet.
    """

    def __init__(
        self,
        address: Address,
        role: str,
        random: Random,
        on_up: Callable[[Line], None] | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self.address: Address = address
        self.line: Line | None = None
        """The one that is up."""
        self.why: BackendUnavailable | None = None
        """Of the last failure to connect, or of the last loss."""
        self.outages: Outages = NO_OUTAGES
        """Those that are over."""
        self._lost_at: float | None = None
        self._role, self._random, self._on_up, self._quiet = role, random, on_up, quiet
        self._changed = asyncio.Event()
        self._failed: AuthenticationFailed | None = None
        self._failed_at = 0.0
        self._closing = False
        self._supervisor: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect, from the running loop; where the login was refused, again after a second."""
        if self._failed is not None and time.monotonic() - self._failed_at > _KNOCK_AGAIN_AFTER:
            self._failed = self._supervisor = None
        if self._supervisor is None and not self._closing:
            self._supervisor = asyncio.create_task(self._supervise(), name=f"mindtrace-jobs rabbitmq {self._role}")

    async def connected(self, within: float) -> Line:
        """The line, once there is one.

        Raises:
            BackendUnavailable: there was none within so many seconds.
            AuthenticationFailed: the login is wrong.
            Closed: the link is closed.
        """
        deadline = time.monotonic() + within
        if self._failed is not None:
            self.start()
        while self.line is None and self._failed is None and not self._closing:
            self._changed.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                # The same words at each try, whatever was left of its time: a log can leave out what it has said.
                why = str(self.why or f"no RabbitMQ at {self.address}: no answer yet")
                raise BackendUnavailable(why) from self.why
        if self._failed is not None:
            raise self._failed
        if self.line is None:
            raise Closed("the connection to RabbitMQ is closed")
        return self.line

    @property
    def is_away(self) -> bool:
        """Whether the server was there, and is not now. From any thread."""
        return self._lost_at is not None

    @property
    def failed(self) -> AuthenticationFailed | None:
        """Why nobody tries to connect."""
        return self._failed

    async def aclose(self) -> None:
        """Close the connection."""
        self._closing = True
        self._changed.set()
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait({supervisor})

    async def _supervise(self) -> None:
        failures = 0
        while True:
            try:
                line = await Line.connect(self.address, self._role)
            except AuthenticationFailed as error:
                self._failed, self._failed_at = error, time.monotonic()
                self._changed.set()
                return
            except BackendUnavailable as error:
                if failures == 0 and not self._quiet:
                    _log.warning("%s (%s); trying on", error, self._role)
                self.why = error
            else:
                since = time.monotonic()
                await self._use(line)
                if time.monotonic() - since > _USEFUL:
                    failures = 0
                # One that comes up may take us in and throw us out a few times.
                level = logging.WARNING if failures == 0 else logging.DEBUG
                _log.log(level, "%s (%s); connecting again", self.why, self._role)
            failures += 1
            # All of those who lost the same server come back at different moments.
            await asyncio.sleep(self._random.uniform(0.0, min(_LONGEST_PAUSE, 0.1 * 2 ** min(failures, 10))))

    async def _use(self, line: Line) -> None:
        """Until it is lost."""
        self.line, self.why = line, None
        if self._lost_at is not None:
            away = time.monotonic() - self._lost_at
            self.outages, self._lost_at = Outages(self.outages.count + 1, self.outages.seconds + away), None
        self._changed.set()
        try:
            if self._on_up is not None:
                self._on_up(line)
            await asyncio.wait({line.lost})
            why = line.lost.result()
        finally:
            self.line = None
            await line.aclose()
        self._lost_at = time.monotonic()
        self.why = BackendUnavailable(f"lost RabbitMQ at {self.address}: {said(why)}")
