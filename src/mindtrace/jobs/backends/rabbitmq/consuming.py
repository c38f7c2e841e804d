"""`Consuming`: what a receiver does in the keeper's loop. It takes deliveries, holds them, and settles them.

    idle ──exchange without a wait──> gets, which tell for certain whether there was anything ──> idle
     │                                                                     ^
     └──exchange with a wait──> consuming: the server pushes up to `slots` ┘ nothing came, or nothing more is wanted

Each on a channel of its own: 3.10.8 ended the whole connection with an internal error when a quorum queue pushed to a
channel that still held what it had got there.

A delivery is a message that is not acknowledged on its channel. The channel gone, all of its are lost at once. What the
server hands over a second time was with somebody who ended without settling: it is not run but published again with its
numbers raised, confirmed, and only then acknowledged; so every server version, and both kinds of queue, count alike.
"""

import asyncio
import itertools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pamqp import commands

from mindtrace.jobs.backends.rabbitmq.channels import Content
from mindtrace.jobs.backends.rabbitmq.counts import Counts, counts_of, errors_of, headers_of, id_of
from mindtrace.jobs.backends.rabbitmq.keeper import Post
from mindtrace.jobs.backends.rabbitmq.lane import Lane
from mindtrace.jobs.backends.rabbitmq.line import Line
from mindtrace.jobs.backends.rabbitmq.outbox import Outcome, Posting
from mindtrace.jobs.delivery import (
    Dead,
    DeadReason,
    Delivery,
    Done,
    Exchanged,
    Release,
    Retry,
    RunError,
    Settled,
    Settlement,
    with_error,
)
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, Closed, JobsError, LeaseLost
from mindtrace.jobs.wire import Message

_log = logging.getLogger(__name__)

Pairs = Sequence[tuple[Delivery, Settlement]]

_CONNECT_WITHIN = 5.0
_COPY_WITHIN = 10.0
_LEFT_WITHIN = 1.0  # seconds that what a cancelled caller was to get lies ready for the next call
_UNFETCHED = 5.0  # seconds after which what was pushed ahead is handed back; a loop may be busy for some of them
_TICK = 0.25
_IDLE = 0.1  # seconds without a call after which the server is told to push no more; whoever works calls at once
_GET_AT_MOST = 100  # queues that are asked one by one
_AGAIN_AFTER = 0.5
_A_MOMENT = 0.05
_MICROSECOND = timedelta(microseconds=1)
_LOOK = 10.0  # seconds between looks whether the user's loop turns


@dataclass(slots=True, eq=False)
class Call:
    """One exchange."""

    pairs: Pairs
    limit: int
    wait: float
    gone: bool = False  # its caller waits no longer


@dataclass(slots=True)
class _Held:
    queue: str
    consumer: str  # its tag; of what was got one of its own
    lane: Lane
    tag: int
    counts: Counts
    headers: Any


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
        self.held: dict[Delivery, _Held] = {}
        """What was handed over and not settled; changed in the keeper's loop only."""
        self.nudged: bool = False
        self.is_waiting: bool = False
        self._post, self._topology = post, post.topology
        self._names = tuple(dict.fromkeys(queues))
        self._slots, self._lease, self._crash_limit, self._strict = slots, lease, crash_limit, strict
        self._max_stall, self._on_lost, self._ask = max_stall, on_lost, ask
        self._gets: Lane | None = None
        self._pushes: Lane | None = None
        self._consumers: dict[str, str] = {}  # tag -> queue, of all that the channel for pushes ever had
        self._active: set[str] = set()  # tags of those that are not cancelled
        self._numbers = itertools.count(1)
        self._ahead: dict[str, deque[Delivery]] = {name: deque() for name in self._names}
        self._missing: set[str] = set()
        self._changed: asyncio.Event | None = None
        self._turn: asyncio.Lock | None = None
        self._next = 0
        self._left = False
        self._ahead_timer: asyncio.TimerHandle | None = None
        self._fetched_at = 0.0
        self._releasing: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._calls = 0
        self._watch: asyncio.TimerHandle | None = None
        self._asked = 0.0
        self._ended = False
        self._died = datetime.fromtimestamp(0, UTC)

    def consumers(self, queue: str) -> int:
        """How many the server counts for it: those that it pushes to, those that hold something, and each get."""
        tags = {held.consumer for held in list(self.held.values()) if held.queue == queue}
        return len(tags | {tag for tag in list(self._active) if self._consumers.get(tag) == queue})

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
        try:
            async with self._turn:
                settled = await self._settle(call.pairs, call.limit) if call.pairs else []
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
                return Exchanged(settled, deliveries, tuple(name for name in self._names if name in self._missing))
        finally:
            self.nudged = False
            self._watch_soon()

    def end_wait(self, call: Call) -> None:
        """Its caller waits no longer."""
        call.gone = True
        self.wake()

    def put_back(self, deliveries: list[Delivery]) -> None:
        """Their caller was cancelled: the next call has them, or they are handed back within a second."""
        for delivery in reversed(deliveries):
            if delivery in self.held and not self._ended:
                self._ahead[delivery.queue].appendleft(delivery)
        self._left = True
        self._fetched_at = time.monotonic()
        if self._ahead_timer is None:
            self._ahead_timer = asyncio.get_running_loop().call_later(_TICK, self._look_ahead)
        self.wake()

    def abandon(self) -> None:
        """The user's loop is gone: so is all that it held."""
        for lane in (self._gets, self._pushes):
            if lane is not None:
                lane.channel.begin_close()

    def wake(self) -> None:
        """There may be something to see."""
        if self._changed is not None:
            self._changed.set()

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """Whether they are held; where leases end by time, they begin anew."""
        answers: list[Settled] = []
        for delivery in deliveries:
            if delivery not in self.held:
                answers.append(LeaseLost(delivery.message.id))
                continue
            if self._lease is not None:
                delivery.deadline = max(delivery.deadline, time.monotonic() + self._lease)
            answers.append(None)
        return answers

    def lose_all(self, queue: str) -> None:
        """The queue is gone: its deliveries are nobody's any more."""
        if queue in self._ahead:
            self._missing.add(queue)
            self._drop_ahead(queue)
        for delivery in [delivery for delivery in self.held if delivery.queue == queue]:
            self._lose(delivery)
        self.wake()

    async def end(self, until: float) -> None:
        """Hand back all that is held, and close the channel."""
        self._ended = True
        self.wake()
        for timer in (self._watch, self._ahead_timer, self._idle):
            if timer is not None:
                timer.cancel()
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                if self._turn is not None:
                    await self._turn.acquire()  # for good: an exchange under way may still wait for its copies
                await self._pause()
                held = list(self.held)
                for ahead in self._ahead.values():
                    ahead.clear()
                await self._settle([(delivery, Release()) for delivery in held], 0, until)
                await self._flush(until)
        except TimeoutError:
            held = []
        for delivery in [*held, *self.held]:
            if not delivery.lost:
                delivery.lost = True
                self._on_lost(delivery)
        self.held.clear()
        self.abandon()

    async def _flush(self, until: float) -> None:
        """Have the queues know of all acknowledgements, before the channels are closed."""
        for lane in (self._gets, self._pushes):
            if lane is None or not lane.is_dirty:
                continue
            for name in self._names:
                content = await lane.flush(self._topology.queue(name))
                if content is not None:  # that was the price
                    self._came(lane, name, content)
                    [delivery] = self._ahead[name]
                    self._ahead[name].clear()
                    await self._settle([(delivery, Release())], 0, until)

    # --- settling

    async def _settle(self, pairs: Pairs, limit: int, until: float | None = None) -> list[Settled]:
        if limit == 0 and self._active:  # before the acknowledgements, which would have the server push more
            await self._pause()
            self._left = True
        answers: list[Settled] = []
        acks: list[_Held] = []
        copies: list[tuple[int, Delivery, _Held, Posting]] = []
        for delivery, settlement in pairs:
            held = self.held.get(delivery)
            if held is None or held.lane.channel.is_closed:
                answers.append(LeaseLost(delivery.message.id))
                continue
            answers.append(None)
            if isinstance(settlement, Done):
                acks.append(held)
            else:
                copies.append((len(answers) - 1, delivery, held, self._copy(delivery, held, settlement)))
            del self.held[delivery]
        self._acknowledge(acks)
        if copies:
            deadline = time.monotonic() + _COPY_WITHIN if until is None else until
            outcomes = await self._store([posting for *_, posting in copies], deadline)
            stored: list[_Held] = []
            for (index, delivery, held, _), outcome in zip(copies, outcomes, strict=True):
                if outcome == "stored":
                    stored.append(held)
                    continue
                if outcome == "unroutable":
                    answers[index] = LeaseLost(delivery.message.id)
                elif isinstance(outcome, BackendUnavailable):
                    answers[index] = outcome
                else:
                    answers[index] = BackendUnavailable(f"RabbitMQ did not take the copy: {outcome}")
                self._give_back(delivery.message, held)
            self._acknowledge(stored)
        return answers

    def _copy(self, delivery: Delivery, held: _Held, settlement: Settlement) -> Posting:
        match settlement:
            case Retry(delay=delay, error=error, crash=crash):
                counts = held.counts.ended_by_crash() if crash else held.counts
                return self._posting(delivery, held, counts, delay, error)
            case Release(delay=delay):
                return self._posting(delivery, held, held.counts.released(), delay)
            case Dead(reason=reason, error=error, crash=crash):
                counts = held.counts.ended_by_crash() if crash else held.counts
                return self._dead(delivery.queue, delivery.message, counts, held.headers, reason, error)
            case Done():
                raise AssertionError("a Done has no copy")

    def _posting(
        self, delivery: Delivery, held: _Held, counts: Counts, delay: float, error: RunError | None = None
    ) -> Posting:
        message, queue = delivery.message, delivery.queue
        errors = with_error(errors_of(held.headers), error)
        units = self._topology.units(delay)
        exchange, key = self._topology.delayed(queue, units) if units > 0 else ("", self._topology.queue(queue))
        return Posting(exchange, key, headers_of(message.id, counts, errors), message.body, message.priority)

    def _dead(
        self,
        queue: str,
        message: Message,
        counts: Counts,
        headers: Any,
        reason: DeadReason,
        error: RunError | None = None,
    ) -> Posting:
        errors = with_error(errors_of(headers), error)
        self._died = max(datetime.now(UTC), self._died + _MICROSECOND)  # so that those of one moment keep their order
        died = (self._died, reason)
        return Posting(
            "", self._topology.dead(queue), headers_of(message.id, counts, errors, died), message.body, message.priority
        )

    async def _store(self, postings: Sequence[Posting], deadline: float) -> list[Outcome]:
        """Have copies stored; once more those that found a level of the ladder missing."""
        try:
            await self._make_holds(postings)
            outcomes = await self._post.copies.put(postings, deadline)
            again = [at for at, outcome in enumerate(outcomes) if outcome == "unroutable" and postings[at].exchange]
            if again:
                self._post.admin.forget_holds()
                await self._make_holds([postings[at] for at in again])
                once_more = await self._post.copies.put([postings[at] for at in again], deadline)
                for at, outcome in zip(again, once_more, strict=True):
                    outcomes[at] = outcome
        except BackendUnavailable as error:
            return [error for _ in postings]
        return outcomes

    async def _make_holds(self, postings: Sequence[Posting]) -> None:
        await self._post.admin.make_holds(
            max((self._topology.units_of(posting.key) for posting in postings), default=0)
        )

    def _give_back(self, message: Message, held: _Held) -> None:
        self._post.remember(message.id, held.counts.number)
        held.lane.give_back(held.tag)

    def _acknowledge(self, acks: Sequence[_Held]) -> None:
        by_lane: dict[Lane, list[int]] = {}
        for held in acks:
            by_lane.setdefault(held.lane, []).append(held.tag)
        for lane, tags in by_lane.items():
            lane.acknowledge(tags)

    # --- taking

    async def _take(self, call: Call) -> list[Delivery]:
        until = time.monotonic() + call.wait
        if min(call.limit, self._room()) > 0:
            await self._fetch(call, until)
        deliveries = self._handed_over(call)
        if not deliveries and not call.pairs:
            if call.wait > 0 and not self.nudged and not (call.limit > 0 and self._missing):
                await self._wait(call, until)
                deliveries = self._handed_over(call)
            if not deliveries and self._active:
                self._idle = asyncio.get_running_loop().call_later(_IDLE, self._begin_release, self._calls)
        if self._lease is not None:
            await self._pause()
        return deliveries

    async def _fetch(self, call: Call, until: float) -> None:
        """Have what there is come, and with a wait have the server push what comes later."""
        if self._active and call.wait <= 0 and not call.pairs and not self._any_ahead():
            await self._pause()  # that nothing was pushed yet is no proof that there is nothing
        if not self._active and len(self._names) <= _GET_AT_MOST and not self._any_ahead():
            limit = min(call.limit, self._room())
            await self._get(limit, 0.0 if call.pairs else max(_CONNECT_WITHIN, call.wait))
        # Of several queues the server would push ahead as many from each: only while there is nothing to get.
        if call.wait > 0 and not call.gone and (not self._any_ahead() or (call.pairs and len(self._names) == 1)):
            await self._consume(call, until)

    def _room(self) -> int:
        return self._slots - len(self.held) + sum(len(ahead) for ahead in self._ahead.values())

    def _any_ahead(self) -> bool:
        return any(self._ahead.values())

    def _handed_over(self, call: Call) -> list[Delivery]:
        """What came ahead: in order of the queues if strict, else in turns. Who has left gets nothing, but the next."""
        taken: list[Delivery] = []
        names, limit = self._names, min(call.limit, self._room())
        if call.gone:
            self._left = True
        if call.gone or limit <= 0:
            return taken
        if self._strict or len(names) == 1:
            for name in names:
                ahead = self._ahead[name]
                while ahead and len(taken) < limit:
                    taken.append(ahead.popleft())
        else:
            idle = 0
            while len(taken) < limit and idle < len(names):
                ahead = self._ahead[names[self._next]]
                self._next = (self._next + 1) % len(names)
                idle = 0 if ahead else idle + 1
                if ahead:
                    taken.append(ahead.popleft())
        self._left = False
        self._fetched_at = time.monotonic()
        return taken

    async def _wait(self, call: Call, until: float) -> None:
        """Until something came for it, a nudge, the end of the call's time, or the receiver's.

        There is room again when a lease is lost, and something ahead when a caller left who was to get it.
        """
        assert self._changed is not None  # noqa: S101 (made by the exchange that waits)
        takes = call.limit > 0
        try:
            while True:
                self.is_waiting = True
                self._changed.clear()
                if self.nudged or call.gone or self._ended or (takes and (self._any_ahead() or self._missing)):
                    break
                left = until - time.monotonic()
                if left <= 0:
                    break
                try:
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                except TimeoutError:
                    continue
                if takes and not self._active and not self._ended and not self._any_ahead() and self._room() > 0:
                    self.is_waiting = False  # the line was lost, or the queue is gone, or there was no room before
                    await self._consume(call, until)
        finally:
            self.is_waiting = False
        if self._ended and not call.pairs:
            raise Closed("the receiver was left, or its backend closed")

    async def _get(self, limit: int, within: float) -> None:
        """Ask each queue for what it has, in turns; what had been with somebody before is counted and asked again."""
        lane = await self._gets_lane(within)
        left = dict.fromkeys(self._names, 1)
        asked_again = 0
        while (room := limit - sum(len(ahead) for ahead in self._ahead.values())) > 0 and asked_again < 100:
            open_ = [name for name in self._names if left[name] > 0]
            if not open_:
                return
            if self._strict:
                shares = {open_[0]: room}
            else:
                each, more = divmod(room, len(open_))
                turned = open_[self._next % len(open_) :] + open_[: self._next % len(open_)]
                shares = {name: each + (at < more) for at, name in enumerate(turned) if each + (at < more)}
            crashed: list[asyncio.Future[None]] = []
            for name, share in shares.items():
                kept = await self._post.admin.look(self._topology.queue(name))
                if kept is None:
                    self.lose_all(name)
                    left[name] = 0
                    continue
                self._missing.discard(name)
                left[name] = max(0, kept.messages - share)
                frame = commands.Basic.Get(queue=self._topology.queue(name))
                replies = [lane.channel.begin(frame) for _ in range(min(share, kept.messages))]
                for reply in replies:
                    content = await lane.channel.reply(reply)
                    if not isinstance(content, Content):
                        left[name] = 0
                    elif content.frame.redelivered:
                        crashed.append(self._count_crash(lane, name, content))
                        left[name] += 1
                    else:
                        self._came(lane, name, content)
            if crashed:
                asked_again += 1
                await asyncio.wait(crashed)

    async def _lane(self, within: float) -> Lane:
        """A channel.

        Raises:
            BackendUnavailable: no connection within so many seconds.
        """
        channel = await (await self._line(time.monotonic() + within)).channel()
        if self._ended:
            channel.begin_close()
            raise Closed("the receiver was left, or its backend closed")
        lane = Lane(channel)
        channel.gone.add_done_callback(lambda gone: self._on_gone(lane, gone.result()))
        return lane

    async def _line(self, until: float) -> Line:
        """In small steps: a nudge ends this wait, too."""
        while True:
            try:
                return await self._post.link.connected(min(_TICK, max(0.0, until - time.monotonic())))
            except AuthenticationFailed:
                raise
            except BackendUnavailable:
                if time.monotonic() >= until or self.nudged or self._ended:
                    raise

    async def _gets_lane(self, within: float) -> Lane:
        if self._gets is None:
            self._gets = await self._lane(within)
        return self._gets

    async def _consume(self, call: Call, until: float) -> None:
        """Have the server push, from all queues that are there."""
        while not self._ended and not call.gone:
            if self._pushes is None:
                lane = self._pushes = await self._lane(max(0.0, until - time.monotonic()))
                lane.channel.on_content, lane.channel.on_cancel = self._on_content, self._on_cancel
                self._consumers, self._active = {}, set()
            channel = self._pushes.channel
            consumed = {self._consumers[tag] for tag in self._active}
            wanted = [name for name in self._names if name not in consumed]
            if not wanted:
                return
            try:
                for name in wanted:
                    # Consuming from a queue that is not there would close the channel, with all that is held on it.
                    if await self._post.admin.look(self._topology.queue(name)) is None:
                        self.lose_all(name)
                        continue
                    self._missing.discard(name)
                    tag = f"{next(self._numbers)}"
                    self._consumers[tag] = name
                    self._active.add(tag)
                    qos = channel.begin(commands.Basic.Qos(prefetch_count=self._slots))
                    consume = channel.begin(commands.Basic.Consume(queue=self._topology.queue(name), consumer_tag=tag))
                    await channel.reply(qos)
                    await channel.reply(consume)
                return
            except AuthenticationFailed:
                raise
            except BackendUnavailable:
                if not channel.is_closed:
                    channel.begin_close()
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(_A_MOMENT)

    async def _pause(self) -> None:
        """Have the server push no more; what it had pushed is here when this returns.

        A quorum queue returns what was on its way to a cancelled consumer, and marks it as handed over before, though
        nobody has seen it: after a cancel with room for more it is fetched, or it would count as a crash. Another
        consumer may be quicker; so nothing is cancelled while there is work to do.
        """
        lane, active, self._active = self._pushes, self._active, set()
        if lane is None or not active:
            return
        held = Counter(held.queue for held in self.held.values() if held.lane is lane)
        with_room = [self._consumers[tag] for tag in active if held[self._consumers[tag]] < self._slots]
        try:
            for reply in [lane.channel.begin(commands.Basic.Cancel(consumer_tag=tag)) for tag in active]:
                await lane.channel.reply(reply)
            if with_room:  # asked behind the answer, when what was on its way has reached the channel and been returned
                await lane.channel.call(commands.Basic.Qos(prefetch_count=self._slots))
            for name in with_room:
                await self._fetch_returned(name)
        except BackendUnavailable as error:
            _log.debug("a consumer was not cancelled in order: %s", error)

    async def _fetch_returned(self, name: str) -> None:
        if await self._post.admin.look(self._topology.queue(name)) is None:
            self.lose_all(name)
            return
        lane = await self._gets_lane(_CONNECT_WITHIN)
        while True:
            content = await lane.channel.call(commands.Basic.Get(queue=self._topology.queue(name)))
            if not isinstance(content, Content):
                return
            if not content.frame.redelivered:
                self._came(lane, name, content)
                return
            number = counts_of(content.properties.headers).started().number
            if (id_of(content.properties, content.body), number) in self._post.given_back:
                self._count_crash(lane, name, content)
            else:
                self._came(lane, name, content)

    # --- what comes from the server

    def _on_content(self, content: Content) -> None:
        lane, queue = self._pushes, self._consumers.get(content.frame.consumer_tag or "")
        if lane is None or queue is None:
            return
        if content.frame.redelivered:
            self._count_crash(lane, queue, content)
        else:
            self._came(lane, queue, content)
            self.wake()

    def _came(self, lane: Lane, queue: str, content: Content) -> None:
        properties, tag = content.properties, content.frame.delivery_tag
        counts = counts_of(properties.headers).started()
        message = Message(
            id_of(properties, content.body),
            content.body,
            properties.priority or 0,
            0.0,
            None,
            counts.crash_limit,
        )
        consumer: str = getattr(content.frame, "consumer_tag", f"got {tag}")
        deadline = math.inf if self._lease is None else time.monotonic() + self._lease
        receipt = f"{lane.receipts}:{tag}"
        delivery = Delivery(
            queue, message, counts.attempts, counts.crashes, counts.releases, counts.number, receipt, deadline
        )
        lane.add(tag)
        self.held[delivery] = _Held(queue, consumer, lane, tag, counts, properties.headers)
        self._ahead[queue].append(delivery)
        if self._ahead_timer is None:
            self._fetched_at = time.monotonic()
            self._ahead_timer = asyncio.get_running_loop().call_later(_TICK, self._look_ahead)
        if self._lease is not None:
            asyncio.get_running_loop().call_later(self._lease, self._lapse, delivery)

    def _lapse(self, delivery: Delivery) -> None:
        """Its time may be over."""
        held = self.held.get(delivery)
        if held is None:
            return
        left = delivery.deadline - time.monotonic()
        if left > 0:
            asyncio.get_running_loop().call_later(left, self._lapse, delivery)
            return
        self._give_back(delivery.message, held)
        if delivery in self._ahead[delivery.queue]:
            self._ahead[delivery.queue].remove(delivery)
            del self.held[delivery]
        else:
            self._lose(delivery)

    def _count_crash(self, lane: Lane, queue: str, content: Content) -> "asyncio.Future[None]":
        """A message that somebody had and did not settle: published again, or dead; done when it is acknowledged."""
        headers = content.properties.headers
        counts = counts_of(headers).crashed()
        message = Message(id_of(content.properties, content.body), content.body, content.properties.priority or 0)
        limit = self._crash_limit if counts.crash_limit is None else counts.crash_limit
        if counts.crashes >= limit:
            _log.error("job %s of queue %s is dead: its runs end without a settlement", message.id, queue)
            posting = self._dead(queue, message, counts, headers, "crash_limit")
        else:
            errors = errors_of(headers)
            fresh = headers_of(message.id, counts, errors)
            posting = Posting("", self._topology.queue(queue), fresh, message.body, message.priority)
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        tag = content.frame.delivery_tag
        lane.add(tag)
        sending = self._post.copies.put([posting], time.monotonic() + _COPY_WITHIN)

        def sent(sending: "asyncio.Future[list[Outcome]]") -> None:
            [outcome] = sending.result()
            if outcome == "stored":
                lane.acknowledge([tag])
                finish()
            else:
                _log.warning("job %s of queue %s could not be counted: %s", message.id, queue, outcome)
                loop.call_later(_AGAIN_AFTER, give_up)

        def give_up() -> None:
            self._post.remember(message.id, counts.number)
            lane.give_back(tag)  # it comes again
            finish()

        def finish() -> None:
            if not over.done():
                over.set_result(None)
            self.wake()

        sending.add_done_callback(sent)
        return over

    def _on_cancel(self, tag: str) -> None:
        """The server ended a consumer: its queue was deleted, or has moved, or a run took too long for it."""
        queue = self._consumers.get(tag)
        self._active.discard(tag)
        if queue is None:
            return
        _log.warning("RabbitMQ ended the consumer of queue %s: the leases on its jobs are lost", queue)
        for delivery in [delivery for delivery in self.held if delivery.queue == queue]:
            self._give_back(delivery.message, self.held[delivery])  # where the queue is there still
        self._drop_ahead(queue)
        for delivery in [delivery for delivery in self.held if delivery.queue == queue]:
            self._lose(delivery)
        self.wake()

    def _on_gone(self, lane: Lane, why: JobsError) -> None:
        if lane is self._gets:
            self._gets = None
        elif lane is self._pushes:
            self._pushes, self._active = None, set()
        for ahead in self._ahead.values():  # nobody ever saw these, so nobody is told
            for delivery in [one for one in ahead if one in self.held and self.held[one].lane is lane]:
                ahead.remove(delivery)
                delivery.lost = True
                del self.held[delivery]
        lost = [delivery for delivery, held in self.held.items() if held.lane is lane]
        if lost:
            _log.warning("the leases of %d jobs are lost: %s", len(lost), why)
        for delivery in lost:
            self._lose(delivery)
        self.wake()

    def _drop_ahead(self, queue: str) -> None:
        """Nobody ever saw them, so nobody is told."""
        ahead = self._ahead[queue]
        while ahead:
            delivery = ahead.popleft()
            delivery.lost = True
            self.held.pop(delivery, None)

    def _lose(self, delivery: Delivery) -> None:
        if self.held.pop(delivery, None) is not None:
            delivery.lost = True
            self._on_lost(delivery)

    # --- time

    def _watch_soon(self) -> None:
        if self._watch is None and not self._ended and self.held and self._max_stall is not None:
            self._watch = asyncio.get_running_loop().call_later(_LOOK, self._look_after)

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

    def _look_ahead(self) -> None:
        """Hand back, uncounted, what was pushed ahead and nobody fetches."""
        self._ahead_timer = None
        if self._ended or not self._any_ahead():
            return
        patience = _LEFT_WITHIN if self._left or len(self._names) > 1 else _UNFETCHED
        if time.monotonic() - self._fetched_at < patience:
            self._ahead_timer = asyncio.get_running_loop().call_later(_TICK, self._look_ahead)
            return
        self._begin_release()

    def _begin_release(self, calls: int | None = None) -> None:
        self._releasing = asyncio.get_running_loop().create_task(
            self._release_ahead(calls)
        )  # the loop has no hold of it

    async def _release_ahead(self, calls: int | None) -> None:
        """Not if there was another call since that many."""
        assert self._turn is not None  # noqa: S101 (made by the exchange that had it pushed)
        async with self._turn:
            if self._ended or calls not in (None, self._calls):
                return
            await self._pause()
            pairs: list[tuple[Delivery, Settlement]] = []
            for ahead in self._ahead.values():
                pairs += [(delivery, Release()) for delivery in ahead]
                ahead.clear()
            self._left = False
            await self._settle(pairs, 0)
