"""A receiver on Redis: one script settles and claims; idle, it waits for the bell.

An exchange goes on without its caller: what it settled is settled, and what it took lies ready for the next call or is
released after a second.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence

from mindtrace.jobs.backend import Home, Outages, Receiver
from mindtrace.jobs.backends.redis.bell import Bell
from mindtrace.jobs.backends.redis.keys import QueueKeys
from mindtrace.jobs.backends.redis.link import REPLY_WITHIN, Link
from mindtrace.jobs.backends.redis.rounds import BATCH, CallNumbers, Claims, Round
from mindtrace.jobs.backends.redis.scripts import Scripts
from mindtrace.jobs.backends.redis.turns import Turns, in_turns
from mindtrace.jobs.delivery import Delivery, Exchanged, Release, Settled, Settlement
from mindtrace.jobs.errors import BackendUnavailable, Closed, LeaseLost

LOOK = 1.0
"""Seconds between looks of its own, so that a lost ring costs latency and never a job."""
_LEAVE_WITHIN = 2.0
_TOGETHER = 0.05

_Pairs = Sequence[tuple[Delivery, Settlement]]


class RedisReceiver(Receiver):
    """See `Receiver`.

    Args:
        home: the loop it belongs to.
        scripts: over the link for commands.
        bell: a link for its bell, not started yet.
        calls: its name and numbers.
        keys: of the queues it takes from, in order.
        keeper_idle_for: of the keeper that extends what it holds.
        slots: see `Backend.receiver`, as the rest.
    """

    def __init__(
        self,
        home: Home,
        scripts: Scripts,
        bell: Link,
        calls: CallNumbers,
        keys: Sequence[QueueKeys],
        keeper_idle_for: Callable[[], float],
        *,
        slots: int,
        lease: float,
        crash_limit: int,
        strict: bool,
        lost: Callable[[Delivery], None] | None,
    ) -> None:
        self.lease: float = lease
        self.held: dict[Delivery, None] = {}  # read by the keeper's thread, changed in this loop only
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._asked: float | None = None  # since when the keeper waits for a turn of this loop
        self._home, self._scripts, self._keeper_idle_for = home, scripts, keeper_idle_for
        self._claims = Claims(scripts, calls, lease, crash_limit)
        self._bell = Bell(bell, self._on_ring)
        self._keys = {one.queue: one for one in keys}
        self._turns = Turns(self._keys, strict=strict)
        self._slots, self._lost = slots, lost
        self._under_way: set[Round] = set()
        self._left: list[Delivery] = []  # taken for a caller who did not wait for them
        self._left_timer: asyncio.TimerHandle | None = None
        self._gone: set[str] = set()  # queues that were not there when last heard of
        self._looked, self._look_at = -math.inf, math.inf
        self._waiting: asyncio.Future[None] | None = None
        self._rung = self._nudged = self._ended = False

    async def exchange(self, pairs: _Pairs, limit: int, *, wait: float = 0.0) -> Exchanged:
        """Settle and take, in one round trip for each queue touched; wait where there was nothing of either."""
        if self._ended:
            if not pairs:
                raise Closed("the receiver was left, or its backend closed")
            return Exchanged([LeaseLost(delivery.message.id) for delivery, _ in pairs], [])
        self._home.check()
        if not pairs and self._under_way:
            await self._catch_up()
        deliveries = self._take_left(limit)
        try:
            settled, missing = await self._settle_and_take(pairs, limit, deliveries, wait > 0)
            if not (pairs or deliveries or missing) and wait > 0:
                missing = await self._wait(limit, deliveries, time.monotonic() + wait)
        except BaseException:
            self._keep_for_next(deliveries)
            raise
        self._nudged = False
        if self.has_ended:  # meanwhile: what was taken is released
            deliveries = []
            if not pairs:
                raise Closed("the receiver was left, or its backend closed")
        return Exchanged(settled, deliveries, missing)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """Make the leases of these deliveries last as long as a new one would."""
        if asyncio.get_running_loop() is not self.loop:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.extend(deliveries), self.loop))
        self._home.check()
        gone: set[Delivery] = set()
        answers: dict[Delivery, Settled] = {}
        for keys, some in self.in_calls(delivery for delivery in deliveries if delivery in self.held):
            try:
                gone.update(await self._scripts.extend(keys, self.lease, some, self.lease))
                answers.update(dict.fromkeys(some))
            except BackendUnavailable as error:
                answers.update(dict.fromkeys(some, error))
        for delivery in gone:
            self.lose(delivery)
            del answers[delivery]
        return [answers[delivery] if delivery in answers else LeaseLost(delivery.message.id) for delivery in deliveries]

    def nudge(self) -> None:
        """End the wait of the exchange now in progress, or of the next one."""
        self._nudged = True
        self._wake()

    def keeper_idle_for(self) -> float:
        """Seconds since the loop that keeps its leases last turned."""
        return self._keeper_idle_for()

    def is_away(self) -> bool:
        """Whether the connection is lost."""
        return self._scripts.link.is_away

    def outages(self) -> Outages:
        """How often the server was away."""
        return self._scripts.link.outages

    def ask(self) -> float:
        """Seconds for which this loop has not turned though it was asked to; by the keeper, which asks again now."""
        now = time.monotonic()
        asked, self._asked = self._asked, self._asked or now
        return 0.0 if asked is None else now - asked

    def turn(self) -> None:
        """Show that the loop turns."""
        self._asked = None

    def in_calls(self, deliveries: Iterable[Delivery]) -> list[tuple[QueueKeys, list[Delivery]]]:
        """Deliveries by queue, as many together as one script call takes."""
        by_queue: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            by_queue.setdefault(delivery.queue, []).append(delivery)
        return [
            (self._keys[queue], mine[start : start + BATCH])
            for queue, mine in by_queue.items()
            for start in range(0, len(mine), BATCH)
        ]

    def lose(self, delivery: Delivery) -> None:
        """This delivery is no longer held; says so, once, where nobody here is settling it."""
        if delivery in self.held:
            del self.held[delivery]
            self._tell_lost(delivery)

    def lose_all(self, queue: str) -> None:
        """The queue is gone, and with it every lease on its jobs."""
        if queue in self._keys:
            self._gone.add(queue)
        for delivery in [delivery for delivery in self.held if delivery.queue == queue]:
            self.lose(delivery)

    async def end(self) -> None:
        """Release what is held and be of no more use; within a few seconds, whatever the server does."""
        if self._ended:
            return
        self._ended = True
        self._wake()
        if self._left_timer is not None:
            self._left_timer.cancel()
        until = time.monotonic() + _LEAVE_WITHIN
        await self._until_answered(_LEAVE_WITHIN)
        if held := list(self.held):
            self._begin([(delivery, Release()) for delivery in held], {}, deadline=until + _LEAVE_WITHIN)
            await self._until_answered(_LEAVE_WITHIN)
            for delivery in held:
                self._tell_lost(delivery)
        await self._bell.aclose()

    @property
    def has_ended(self) -> bool:
        """Whether it was left, or its backend closed."""
        return self._ended

    @property
    def is_quiet(self) -> bool:
        """Whether every call has its answer, so that its name and numbers may be lent to another."""
        return not self._under_way

    # --- one exchange, in rounds: in the first everything is settled; further ones where a queue gave less than asked

    async def _settle_and_take(
        self, pairs: _Pairs, limit: int, deliveries: list[Delivery], waits: bool
    ) -> tuple[list[Settled], tuple[str, ...]]:
        """Takes into `deliveries`, up to `limit` in all. Gives what became of the pairs, and the missing queues."""
        first_of: dict[Delivery, Settlement] = {}
        for delivery, settlement in pairs:
            if delivery in self.held:
                first_of.setdefault(delivery, settlement)
        settling = list(first_of.items())
        room = min(limit - len(deliveries), self._slots - len(self.held) + len(settling))
        asked: Sequence[str] = ()
        if room > 0:
            asked = self._turns.take()
            self._looked, self._look_at = time.monotonic(), math.inf
        left: dict[str, int] = {}
        answers: dict[Delivery, Settled] = {}
        first = True
        while (limits := self._turns.limits(asked, left, room)) or (first and settling):
            a_round = self._begin(settling if first else [], limits, waits=waits)
            try:
                await a_round.answered(None if pairs else REPLY_WITHIN)
            except BackendUnavailable:
                if pairs or deliveries:
                    break
                raise
            first = False
            answers.update(a_round.settled)
            taken = in_turns([a_round.deliveries.get(name, []) for name in asked])
            deliveries += taken
            room -= len(taken)
            left.update(a_round.left)
            self._gone.difference_update(a_round.left)
            left.update(dict.fromkeys(a_round.missing, 0))
            self._look_at = min(self._look_at, a_round.look_at)
            if a_round.error is not None:
                break
        settled: list[Settled] = []
        for delivery, _ in pairs:  # a second settlement of the same delivery finds nothing to settle
            settled.append(answers.pop(delivery, LeaseLost(delivery.message.id)))
        return settled, tuple(name for name in self._keys if name in self._gone)

    def _begin(
        self, pairs: _Pairs, limits: dict[str, int], *, waits: bool = False, deadline: float | None = None
    ) -> Round:
        """Send a round; from here on it goes on by itself."""
        queues = {name: (keys, limits.get(name, 0)) for name, keys in self._keys.items() if name in limits}
        for delivery, _ in pairs:
            queues.setdefault(delivery.queue, (self._keys[delivery.queue], 0))
        calls = self._claims.calls(queues, pairs)
        for delivery, _ in pairs:
            self.held.pop(delivery, None)
        a_round = Round(self._on_deliveries, self._on_round_over, self._keep_for_next)
        self._under_way.add(a_round)
        self._claims.send(a_round, calls, waits, deadline)
        return a_round

    def _on_deliveries(self, deliveries: list[Delivery]) -> None:
        self.held.update(dict.fromkeys(deliveries))

    def _on_round_over(self, a_round: Round) -> None:
        self._under_way.discard(a_round)
        for delivery, answer in a_round.settled.items():
            if isinstance(answer, LeaseLost):
                self._tell_lost(delivery)
        for queue in a_round.missing:
            self.lose_all(queue)
        if self._ended:  # nobody is here any more to take what came so late
            late = [delivery for some in a_round.deliveries.values() for delivery in some if delivery in self.held]
            if late:
                self._begin([(delivery, Release()) for delivery in late], {}).abandon()

    async def _catch_up(self) -> None:
        """Wait for the answers to calls whose callers are gone: what they took has a place here."""
        await self._until_answered(REPLY_WITHIN)
        if self._under_way:
            raise BackendUnavailable("no answer yet from Redis to the call before this one")
        if self._ended:
            raise Closed("the receiver was left, or its backend closed")

    async def _until_answered(self, within: float) -> None:
        until = time.monotonic() + within
        while self._under_way and time.monotonic() < until:
            over = [a_round.over for a_round in self._under_way]
            await asyncio.wait(over, timeout=until - time.monotonic())

    # --- what nobody waited for

    def _keep_for_next(self, deliveries: list[Delivery]) -> None:
        self._left += deliveries
        if self._left and self._left_timer is None and not self._ended:
            self._left_timer = self.loop.call_later(LOOK, self._release_left)
            self._wake()

    def _take_left(self, limit: int) -> list[Delivery]:
        taken, self._left = self._left[:limit], self._left[limit:]
        if not self._left and self._left_timer is not None:
            self._left_timer.cancel()
            self._left_timer = None
        return [delivery for delivery in taken if delivery in self.held]

    def _release_left(self) -> None:
        self._left_timer = None
        left, self._left = self._left, []
        if not self._ended and left:
            self._begin([(delivery, Release()) for delivery in left if delivery in self.held], {}).abandon()

    # --- the wait

    async def _wait(self, limit: int, deliveries: list[Delivery], until: float) -> tuple[str, ...]:
        """Until there was something to take, a nudge, or `until`. Takes into `deliveries`; gives the missing queues."""
        missing: tuple[str, ...] = ()
        while not (deliveries or missing or self._nudged) and (now := time.monotonic()) < until:
            has_room = limit > 0 and self._slots > len(self.held)
            look_at = math.inf
            if has_room:
                regular = max(self._looked + LOOK, now)
                # One that falls on the end of the wait is left to the next call, which begins with one.
                look_at = min(regular if regular < until - _TOGETHER else math.inf, self._look_at)
            rung = await self._pause(min(until, look_at), has_room)
            if self._ended:
                raise Closed("the receiver was left, or its backend closed")
            if has_room and (rung or time.monotonic() >= look_at):
                deliveries += self._take_left(limit)
                _, missing = await self._settle_and_take((), limit, deliveries, True)
        return missing

    async def _pause(self, until: float, has_room: bool) -> bool:
        """Until the bell, a nudge or `until`; whether to look again."""
        self._waiting, self._rung = self.loop.create_future(), False
        timer = self.loop.call_later(max(0.0, until - time.monotonic()), self._wake)
        if has_room:
            self._bell.listen([self._keys[name] for name in self._turns.next])
        try:
            await self._waiting
        except asyncio.CancelledError:
            if self._rung:
                self._pass_on(self._turns.next[0])
            raise
        finally:
            self._waiting = None
            self._bell.stop()
            timer.cancel()
        return self._rung

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _on_ring(self, queue: str | None) -> None:
        if self._waiting is not None and self._slots > len(self.held):
            self._rung = True
            if queue is not None and queue not in self._turns.next:  # it was listened at before the look went on
                self._turns.begin_with(queue)
            self._wake()
        elif queue is not None:
            self._pass_on(queue)

    def _pass_on(self, queue: str) -> None:
        """The token was not for us, who have no room or no caller any more: have another woken if there is more."""
        if not self._ended:
            self._begin((), {queue: 0}).abandon()

    def _tell_lost(self, delivery: Delivery) -> None:
        delivery.lost = True
        if self._lost is not None:
            self.loop.call_soon(self._lost, delivery)
