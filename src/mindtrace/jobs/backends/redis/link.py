"""`Link`: one connection kept up. What has no answer when it breaks is sent again on the next one, in order.

    connect --> up --lost, silent, read-only, loading--> wait (full jitter) --> connect
       |                                                                          ^
       +-- refused, no answer ----------------------------------------------------+
       +-- wrong login --> failed, until somebody asks again a second later

Everything sent here may be executed twice without harm: that is for the scripts to see to.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from mindtrace.jobs.backend import NO_OUTAGES, Outages
from mindtrace.jobs.backends.redis.address import CONNECT_WITHIN, Address
from mindtrace.jobs.backends.redis.line import Line, Request, Words
from mindtrace.jobs.errors import AuthenticationFailed, BackendFull, BackendUnavailable, Closed, JobsError

_log = logging.getLogger(__name__)

REPLY_WITHIN = 5.0
"""Seconds that the server may be silent while an answer is due."""
_NOT_ALLOWED = ("NOAUTH", "WRONGPASS", "executing the script can't", "ACL failure in script")
_TICK = 0.1
_STOOD_STILL = 1.0  # seconds that the loop is late
_LATER = 0.5
_SLOW = 1024 * 1024  # bytes a second that a connection is given to carry what was sent
_KNOCK_AGAIN_AFTER = 1.0
_LONGEST_PAUSE = 1.5  # between two tries to connect, so that work goes on within 2 s of the server's return
_NOT_NOW = (ReadOnlyError, TryAgainError, ClusterDownError)  # MASTERDOWN is a kind of the last one
_TRY_AGAIN = ("BUSY", "LOADING", "MASTERDOWN", "UNBLOCKED", "NOREPLICAS")


class Link:
    """A connection under supervision.

    Args:
        address: where to.
        role: what it is for, as the server's list of clients shows it.
        random: the source of the jitter.
        first: commands sent on each line before all others; nobody waits for their replies.
        quiet: it is known, and has been said, that there is no server yet.
    """

    def __init__(
        self, address: Address, role: str, random: Random, first: Sequence[Words] = (), *, quiet: bool = False
    ) -> None:
        self.address: Address = address
        self.outages: Outages = NO_OUTAGES
        """Those that are over."""
        self._lost_at: float | None = None
        self._role, self._random, self._first, self._quiet = role, random, first, quiet
        self._line: Line | None = None
        self._backlog: deque[Request] = deque()
        self._redo: list[Request] = []  # told NOSCRIPT; while there are any, what comes later waits behind them
        self._later: list[Request] = []  # refused by a server that cannot write now
        self._later_at = 0.0
        self._full_at = -math.inf  # when it last refused one
        self._failed: JobsError | None = None
        self._failed_at = 0.0
        self._tried = asyncio.Event()
        self._why: BaseException | None = None
        self._silent = self._replies = 0
        self._useful = False  # whether the line that is or was has brought an answer
        self._ticking: asyncio.TimerHandle | None = None
        self._tick_due = 0.0
        self._is_reading = False
        self._closing = False
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a line at this moment."""
        return self._line is not None

    def start(self) -> None:
        """Begin to connect, from the running loop; where the login was refused, again after a second."""
        if self._failed is not None and time.monotonic() - self._failed_at > _KNOCK_AGAIN_AFTER:
            self._failed = self._supervisor = None
        if self._supervisor is None and not self._closing:
            self._supervisor = asyncio.create_task(self._supervise(), name=f"mindtrace-jobs redis {self._role}")

    async def until_connected(self, within: float) -> None:
        """Wait for the line.

        Raises:
            BackendUnavailable: there was none within so many seconds.
            AuthenticationFailed: the login is wrong.
        """
        deadline = time.monotonic() + within
        while not self.connected and self._failed is None:
            self._tried.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._tried.wait()
            except TimeoutError:
                raise BackendUnavailable(
                    f"no Redis at {self.address} within {within:g} s: {_said(self._why)}"
                ) from self._why
        if self._failed is not None:
            raise self._failed

    def request(
        self,
        words: Words,
        answer: Callable[[Any, BaseException | None], None],
        *,
        deadline: float,
        fallback: Words | None = None,
        patience: float = REPLY_WITHIN,
        again: bool = True,
        waits_out: bool = False,
    ) -> Request:
        """Send a command and have the reply given to `answer`; or, after `deadline`, one of our errors.

        Args:
            words: the command.
            answer: called once, from the loop; it must not raise.
            deadline: on the monotonic clock.
            fallback: sent instead where the server knows no such script.
            patience: seconds the server may take for it alone.
            again: send it again on the next line; else it fails with this one.
            waits_out: send it again after a while where the server is full or cannot write its disk; else it fails.

        Returns:
            the request, which knows how often it was sent.
        """
        request = Request(
            words, answer, deadline, patience=patience, again=again, fallback=fallback, waits_out=waits_out
        )
        if self._failed is not None:
            self.start()
        if self._closing or self._supervisor is None:
            answer(None, Closed("the connection to Redis is closed"))
        elif self._failed is not None:
            answer(None, self._failed)
        else:
            if self._line is None or self._redo:
                self._backlog.append(request)
            else:
                self._line.send(request)
            if self._ticking is None:
                self._tick_soon()
        return request

    async def aclose(self) -> None:
        """Close; what waits for an answer is told so."""
        self._closing = True
        unanswered = self._unanswered()
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait({supervisor})
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        for request in unanswered:
            self._fail(request, "it was closed")

    # --- the line

    async def _supervise(self) -> None:
        failures = 0
        while True:
            try:
                line = await self._connect()
            except (AuthenticationError, AuthorizationError) as error:
                self._refused(error)
                return
            except (RedisError, OSError, TimeoutError, RuntimeError) as error:  # the last: no more threads, for DNS
                if failures == 0 and not self._quiet:
                    _log.warning("no Redis at %s (%s): %s; trying on", self.address, self._role, _said(error))
                self._why = error
                self._tried.set()
            else:
                await self._use(line)
                if self._useful:
                    failures = 0
            failures += 1
            # All of those who lost the same server come back at different moments.
            await asyncio.sleep(self._random.uniform(0.0, min(_LONGEST_PAUSE, 0.1 * 2 ** min(failures, 10))))

    async def _use(self, line: Line) -> None:
        """Until it is lost."""
        self._line, self._why, self._useful = line, None, False
        self._silent = self._replies = 0
        self._tried.set()
        try:
            for words in self._first:
                line.send(Request(words, _ignore, math.inf, again=False))
            self._send_backlog()
            self._why = await line.lost()
        finally:
            self._line = None
            self._backlog.extendleft(reversed([*self._redo, *line.waiting]))
            self._redo = []
            await line.aclose()
        level = logging.WARNING if self._lost_at is None else logging.DEBUG
        if self._lost_at is None:  # else it was connected again to a server that had not come up yet
            self._lost_at = time.monotonic()
        _log.log(level, "lost Redis at %s (%s): %s; connecting again", self.address, self._role, _said(self._why))
        for request in [request for request in self._backlog if not request.again]:
            self._backlog.remove(request)
            self._fail(request, "the connection was lost")

    async def _connect(self) -> Line:
        connection: Any = self.address.connection(f"mtjobs:{self._role}")  # the driver's calls are not all typed
        try:
            async with asyncio.timeout(CONNECT_WITHIN):
                await connection.connect()
        except BaseException:
            with suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)
            raise
        return Line(connection, self._on_reply)

    def _send_backlog(self) -> None:
        assert self._line is not None  # noqa: S101 (just connected)
        while self._backlog:
            request = self._backlog.popleft()
            if not request.done:
                self._line.send(request)

    # --- replies

    def _on_reply(self, request: Request, reply: Any) -> None:
        if request.done:
            pass  # given up meanwhile
        elif not isinstance(reply, ResponseError):
            if not self._useful and request.answer is not _ignore:
                self._useful = True
                self._is_back()
            self._answer(request, reply, None)
        elif isinstance(reply, NoScriptError) and request.fallback is not None:
            request.sent -= 1  # nothing was executed
            request.fall_back()
            self._redo.append(request)
        elif isinstance(reply, _NOT_NOW) or str(reply).startswith(_TRY_AGAIN):
            # Nothing was executed, and another server may be the master now: look the address up again.
            request.sent -= 1
            self._redo.append(request)
            if self._line is not None:
                self._line.drop(reply)
            return
        elif request.waits_out and _is_full(reply):
            now = time.monotonic()
            if now - self._full_at > 4 * _LATER:  # else it is what was said
                _log.warning("Redis at %s cannot write: %s; trying on", self.address, _said(reply))
            self._full_at = now
            if not self._later:
                self._later_at = now + _LATER
            request.sent -= 1
            self._later.append(request)
        else:
            self._answer(request, None, self._ours(request, reply))
        if self._redo and self._line is not None and not self._line.waiting:
            redo, self._redo = self._redo, []
            for again in redo:
                self._line.send(again)
            self._send_backlog()

    @property
    def is_away(self) -> bool:
        """Whether the server was there, and no connection is now. From any thread."""
        return self._lost_at is not None and self._line is None

    def _is_back(self) -> None:
        """There is a line, and on it an answer."""
        if self._lost_at is not None:
            away = time.monotonic() - self._lost_at
            self.outages, self._lost_at = Outages(self.outages.count + 1, self.outages.seconds + away), None

    def _ours(self, request: Request, error: ResponseError) -> JobsError:
        """The server's refusal as one of our errors."""
        text = _said(error)
        ours: JobsError
        if isinstance(error, NoPermissionError | AuthenticationError) or any(words in text for words in _NOT_ALLOWED):
            ours = AuthenticationFailed(f"Redis at {self.address} does not allow it: {text}")
        elif _is_full(error):
            if request.sent > 1:  # the sending before this one may have been executed
                ours = BackendUnavailable(f"Redis at {self.address} is full: {text}", maybe_published=True)
            else:
                ours = BackendFull(f"Redis at {self.address} is full, nothing was written: {text}")
        else:
            # Out of the middle of a script, perhaps: what was written before the error stays written.
            ours = BackendUnavailable(f"Redis at {self.address} refused: {text}", maybe_published=True)
        ours.__cause__ = error
        return ours

    def _refused(self, error: BaseException) -> None:
        self._failed = AuthenticationFailed(f"Redis at {self.address} refuses the login: {_said(error)}")
        self._failed.__cause__ = error
        self._failed_at = time.monotonic()
        self._tried.set()
        waiting, self._backlog = self._backlog, deque()
        for request in waiting:
            self._answer(request, None, self._failed)

    def _fail(self, request: Request, why: str) -> None:
        if not request.done:
            text = f"no answer from Redis at {self.address}: {why}"
            error = BackendUnavailable(text, maybe_published=request.sent > 0)
            error.__cause__ = self._why
            self._answer(request, None, error)

    def _answer(self, request: Request, reply: Any, error: BaseException | None) -> None:
        request.done = True
        try:
            request.answer(reply, error)
        except Exception:  # a reply of one that cannot be read must not take the line from the others
            _log.exception("a reply of Redis cannot be read")

    # --- time

    def _tick_soon(self, pause: float = _TICK) -> None:
        loop = asyncio.get_running_loop()
        self._tick_due = loop.time() + pause
        self._ticking = loop.call_at(self._tick_due, self._tick)

    def _tick(self) -> None:
        """While anything waits: give up what is over its time, and a line on which nothing comes any more."""
        self._ticking = None
        waiting = self._unanswered()
        if not waiting:
            return
        if asyncio.get_running_loop().time() - self._tick_due > _STOOD_STILL and not self._is_reading:
            self._is_reading = True  # what came meanwhile, in this turn: then look again
            self._tick_soon(0.0)
            return
        self._is_reading = False
        now = time.monotonic()
        for request in waiting:
            if request.deadline <= now:
                self._fail(request, f"its time is over ({_said(self._why)})" if self._why else "its time is over")
        self._backlog = deque(request for request in self._backlog if not request.done)
        self._watch_line()
        if self._line is not None and self._later and now >= self._later_at:
            later, self._later = self._later, []
            self._backlog.extend(later)
            if not self._redo:
                self._send_backlog()
        self._tick_soon()

    def _watch_line(self) -> None:
        line = self._line
        if line is None:
            return
        # Counted in turns of the loop: a loop that stands still is not the server's silence.
        moved = line.replies != self._replies or not line.waiting
        self._replies = line.replies
        self._silent = 0 if moved else self._silent + 1
        if not moved:
            patience = line.waiting[0].patience + sum(len(request.packed) for request in line.waiting) / _SLOW
            if self._silent * _TICK > patience:
                self._silent = 0
                line.drop(TimeoutError(f"no reply within {patience:.1f} s"))

    def _unanswered(self) -> list[Request]:
        line = () if self._line is None else self._line.waiting
        return [request for request in (*self._redo, *line, *self._backlog, *self._later) if not request.done]


def _ignore(reply: Any, error: BaseException | None) -> None:
    pass


def _is_full(error: ResponseError) -> bool:
    return isinstance(error, OutOfMemoryError) or str(error).startswith(("OOM", "MISCONF"))


def _said(error: BaseException | None) -> str:
    """What a driver or a server says, on one line and not too long; neither knows our passwords."""
    if error is None:
        return "no reason given"
    text = str(error) or type(error).__name__
    return "".join(c if c.isprintable() else " " for c in text)[:200]
