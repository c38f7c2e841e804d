"""`Consuming`: what a receiver does in the keeper's loop. It takes deliveries, holds them, and settles them.

    idle ──exchange without a wait──> gets, which tell for certain whether there was anything ──> idle
     │                                                                     ^
     └──exchange with a wait──> consuming: the server pushes up to `slots` ┘ nothing came, or nothing more is wanted

A delivery is a message that is not acknowledged on its channel. What the server hands over a second time was with
somebody who ended without settling: it is not run but published again with its numbers raised, confirmed, and only then
acknowledged; so every server version, and both kinds of queue, count alike.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mindtrace.jobs.backends.rabbitmq.holdings import Held, Holdings
from mindtrace.jobs.backends.rabbitmq.intake import Intake
from mindtrace.jobs.backends.rabbitmq.keeper import Post
from mindtrace.jobs.backends.rabbitmq.settling import Pairs, Settling
from mindtrace.jobs.delivery import Delivery, Exchanged, Release, Settled
from mindtrace.jobs.errors import Closed, JobsError

_log = logging.getLogger(__name__)

_CONNECT_WITHIN = 5.0
_LEFT_WITHIN = 1.0  # seconds that what a cancelled caller was to get lies ready for the next call
_UNFETCHED = 5.0  # seconds after which what was pushed ahead is handed back; a loop may be busy for some of them
_TICK = 0.25
_IDLE = 0.1  # seconds without a call after which the server is told to push no more; whoever works calls at once
_GET_AT_MOST = 100  # queues that are asked one by one
_LOOK = 10.0  # seconds at most between looks whether the user's loop turns


@dataclass(slots=True, eq=False)
class Call:
    """One exchange."""

    pairs: Pairs
    limit: int
    wait: float
    gone: bool = False  # its caller waits no longer, and says so from another thread
    number: int = 0  # which call this is


class Consuming:
    """One receiver's deliveries.

    Args:
        post: connections and administration.
        queues: in order.
        slots: the most it holds of each queue.
        lease: seconds after which a delivery that is not extended goes back; None: never by itself.
        crash_limit: for messages that bring none.
        strict: takes in the order of `queues` rather than in turns.
        max_stall: seconds that the user's loop may stand still until everything goes back; None: for ever.
        on_lost: told of each delivery that is gone.
        ask: has a function called by the user's loop.
    """

    def __init__(
        self,
        post: Post,
        queues: Sequence[str],
        *,
        slots: int,
        lease: float | None,
        crash_limit: int,
        strict: bool,
        max_stall: float | None,
        on_lost: Callable[[Delivery], None],
        ask: Callable[[Callable[[], None]], None],
    ) -> None:
        self.nudged: bool = False
        self.is_waiting: bool = False
        self._holdings = Holdings(
            queues, slots=slots, lease=lease, strict=strict, on_lost=on_lost, given_back=post.remember
        )
        self._settling = Settling(post, self._holdings, crash_limit=crash_limit, changed=self.wake)
        self._intake = Intake(
            post,
            self._holdings,
            self._settling,
            slots=slots,
            lease=lease,
            strict=strict,
            came=self._on_came,
            changed=self.wake,
            given_up=lambda: self.nudged or self._ended or (self._call is not None and self._call.gone),
        )
        self._names = self._holdings.names
        self._lease, self._max_stall, self._ask = lease, max_stall, ask
        self._changed: asyncio.Event | None = None
        self._turn: asyncio.Lock | None = None
        self._left = False
        self._ahead_timer: asyncio.TimerHandle | None = None
        self._fetched_at = 0.0
        self._releasing: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._calls = 0
        self._call: Call | None = None  # the one whose turn it is
        self._watch: asyncio.TimerHandle | None = None
        self._asked = 0.0
        self._ended = False

    @property
    def held(self) -> Mapping[Delivery, Held]:
        """What came and is not settled; changed in the keeper's loop only."""
        return self._holdings.held

    def consumers(self, queue: str) -> int:
        """How many the server counts for it."""
        return self._intake.consumers(queue)

    def call(self, pairs: Pairs, limit: int, wait: float) -> Call:
        """For `exchange`."""
        return Call(pairs, limit, wait)

    async def exchange(self, call: Call) -> Exchanged:
        """Settle, then take; waits if there was nothing of either. Raises only if there was nothing to settle."""
        if self._turn is None:
            self._turn, self._changed = asyncio.Lock(), asyncio.Event()
        if self._idle is not None:
            self._idle.cancel()
        self._calls += 1
        call.number = self._calls
        try:
            async with self._turn:
                self._call = call
                settled = await self._settled(call) if call.pairs else []
                if self._ended:
                    if call.pairs:
                        return Exchanged(settled, [])
                    raise Closed("the receiver was left, or its backend closed")
                try:
                    deliveries = await self._take(call)
                except JobsError:
                    if not call.pairs:
                        raise
                    deliveries = []
                missing = self._intake.missing
                return Exchanged(settled, deliveries, tuple(name for name in self._names if name in missing))
        finally:
            if not call.gone:  # else the nudge is for the next one
                self.nudged = False
            self._watch_soon()

    def put_back(self, deliveries: list[Delivery]) -> None:
        """Their caller was cancelled: the next call has them, or they are handed back within a second."""
        if not self._ended:
            self._holdings.put_back(deliveries)
        self._left = True
        self._fetched_at = time.monotonic()
        self._look_ahead_soon()
        self.wake()

    def abandon(self) -> None:
        """The user's loop is gone: so is all that it held."""
        self._intake.abandon()

    def wake(self) -> None:
        """There may be something to see."""
        if self._changed is not None:
            self._changed.set()

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """Whether they are held; where leases end by time, they begin anew."""
        return self._holdings.extend(deliveries)

    def lose_all(self, queue: str) -> None:
        """The queue is gone: its deliveries are nobody's any more."""
        self._intake.lose_queue(queue)

    async def end(self, until: float) -> None:
        """Hand back all that is held, and close the channels."""
        self._ended = True
        self.wake()
        for timer in (self._watch, self._ahead_timer, self._idle):
            if timer is not None:
                timer.cancel()
        released: list[Delivery] = []
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                if self._turn is not None:
                    await self._turn.acquire()  # for good: an exchange under way may still wait for its copies
                await self._intake.pause()
                released = list(self.held)
                self._holdings.take_ahead()
                await self._settling.settle([(delivery, Release()) for delivery in released], until)
                await self._settling.finish(until)
                await self._intake.flush(until)
        except (TimeoutError, JobsError) as error:
            _log.debug("a receiver was not left in order: %s", error)
        finally:
            self._holdings.lose_all(released)
            await self._settling.finish(0.0)
            await self._intake.aclose()

    # --- taking

    async def _settled(self, call: Call) -> list[Settled]:
        if call.limit == 0 and self._intake.is_pushed_to:
            # Before the acknowledgements, which would have the server push more; what is released would come back here.
            await self._intake.pause()
            self._left = True
        return await self._settling.settle(call.pairs)

    async def _take(self, call: Call) -> list[Delivery]:
        until = time.monotonic() + call.wait
        if min(call.limit, self._holdings.room) > 0:
            await self._fetch(call, until)
        deliveries = self._handed_over(call)
        if not deliveries and not call.pairs and call.wait > 0 and not self.nudged and not self._lacks(call):
            await self._wait(call, until)
            deliveries = self._handed_over(call)
        if self._lease is not None:
            await self._intake.pause()
        elif not deliveries and self._intake.is_pushed_to and not call.pairs:
            self._idle = asyncio.get_running_loop().call_later(_IDLE, self._begin_release, call.number)
        return deliveries

    def _lacks(self, call: Call) -> bool:
        """Whether a queue is not there that it would take from."""
        return call.limit > 0 and bool(self._intake.missing) and self._holdings.room > 0

    async def _fetch(self, call: Call, until: float) -> None:
        """Have what there is come, and with a wait have the server push what comes later."""
        holdings, intake = self._holdings, self._intake
        # Whoever works has something to do meanwhile. Of several queues the server would push ahead as many from each.
        may_come_later = bool(call.pairs) and len(self._names) == 1 and call.wait > 0
        if intake.is_pushed_to and call.wait <= 0 and not call.pairs and not holdings.any_ahead:
            await intake.pause()  # that nothing was pushed yet is no proof that there is nothing
        if not (intake.is_pushed_to or holdings.any_ahead or may_come_later) and len(self._names) <= _GET_AT_MOST:
            limit = min(call.limit, holdings.room)
            await intake.get(limit, 0.0 if call.pairs else max(_CONNECT_WITHIN, call.wait))
        if call.wait > 0 and (may_come_later or not holdings.any_ahead):
            await self._consume(call, until)

    async def _consume(self, call: Call, until: float) -> None:
        await self._intake.consume(until, lambda: not (self._ended or call.gone))

    def _handed_over(self, call: Call) -> list[Delivery]:
        """What came ahead. A caller who has left gets nothing: the next one has it."""
        limit = min(call.limit, self._holdings.room)
        if call.gone:
            self._left = True
        if call.gone or limit <= 0:
            return []
        self._left = False
        self._fetched_at = time.monotonic()
        return self._holdings.hand_over(limit)

    async def _wait(self, call: Call, until: float) -> None:
        """Until something came for it, a nudge, the end of the call's time, or the receiver's.

        There is room again when a lease is lost, and something ahead when a caller left who was to get it.
        """
        assert self._changed is not None  # noqa: S101 (made by the exchange that waits)
        holdings, takes = self._holdings, call.limit > 0
        try:
            while True:
                self.is_waiting = True
                self._changed.clear()
                if self.nudged or call.gone or self._ended:
                    break
                if takes and (holdings.any_ahead or self._lacks(call)):
                    break
                left = until - time.monotonic()
                if left <= 0:
                    break
                try:
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                except TimeoutError:
                    continue
                if takes and not self._intake.is_pushed_to and not holdings.any_ahead and holdings.room > 0:
                    self.is_waiting = False  # the line was lost, or the queue is gone, or there was no room before
                    await self._consume(call, until)
        finally:
            self.is_waiting = False
        if self._ended and not call.pairs:
            raise Closed("the receiver was left, or its backend closed")

    # --- what nobody fetches

    def _on_came(self) -> None:
        if self._ahead_timer is None:
            self._fetched_at = time.monotonic()
            self._look_ahead_soon()

    def _look_ahead_soon(self) -> None:
        if self._ahead_timer is None:
            self._ahead_timer = asyncio.get_running_loop().call_later(_TICK, self._look_ahead)

    def _look_ahead(self) -> None:
        """Hand back, uncounted, what was pushed ahead and nobody fetches."""
        self._ahead_timer = None
        if self._ended or not self._holdings.any_ahead:
            return
        patience = _LEFT_WITHIN if self._left or len(self._names) > 1 else _UNFETCHED
        if time.monotonic() - self._fetched_at < patience:
            self._look_ahead_soon()
        else:
            self._begin_release()

    def _begin_release(self, calls: int | None = None) -> None:
        self._releasing = asyncio.get_running_loop().create_task(  # the loop has no hold of it
            self._release_ahead(calls)
        )

    async def _release_ahead(self, calls: int | None) -> None:
        """Not if there was another call since that many."""
        assert self._turn is not None  # noqa: S101 (made by the exchange that had it pushed)
        async with self._turn:
            if self._ended or calls not in (None, self._calls):
                return
            await self._intake.pause()
            self._left = False
            await self._settling.settle([(delivery, Release()) for delivery in self._holdings.take_ahead()])

    # --- a loop that stands still

    def _watch_soon(self) -> None:
        if self._watch is None and not self._ended and self.held and self._max_stall is not None:
            pause = min(_LOOK, self._max_stall / 2)
            self._watch = asyncio.get_running_loop().call_later(pause, self._look_after)

    def _look_after(self) -> None:
        """Let go of everything when the user's loop is dead."""
        self._watch = None
        if self._ended or not self.held or self._max_stall is None:
            return
        now = time.monotonic()
        if self._asked and now - self._asked > self._max_stall:
            _log.error("a loop stands still for %.0f s: its %d jobs go back", now - self._asked, len(self.held))
            self.abandon()
            return
        self._asked = self._asked or now
        self._ask(self._turned)
        self._watch_soon()

    def _turned(self) -> None:
        self._asked = 0.0
