"""`Intake`: the two channels by which deliveries come to a receiver, and what is done with each that comes.

    gets     asked one by one: the answer tells for certain whether there was anything
    pushes   consumers: the server hands over by itself, together with what was got up to `slots` of each queue

Each on a channel of its own: 3.10.8 ended the whole connection with an internal error when a quorum queue pushed to a
channel that still held what it had got there. The channel gone, all that is out on it is lost at once.
"""

import asyncio
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from pamqp import commands

from mindtrace.jobs.backends.rabbitmq.channels import Content
from mindtrace.jobs.backends.rabbitmq.counts import counts_of, id_of
from mindtrace.jobs.backends.rabbitmq.holdings import Held, Holdings
from mindtrace.jobs.backends.rabbitmq.keeper import Post
from mindtrace.jobs.backends.rabbitmq.lane import Lane
from mindtrace.jobs.backends.rabbitmq.line import Line
from mindtrace.jobs.backends.rabbitmq.settling import Settling
from mindtrace.jobs.delivery import Delivery, Release
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, Closed, JobsError
from mindtrace.jobs.wire import Message

_log = logging.getLogger(__name__)

_CONNECT_WITHIN = 5.0
_LOOK = 0.25  # seconds between looks whether somebody still waits for a connection
_COUNTED_WITHIN = 1.0
_A_MOMENT = 0.05
_QUIET = 0.03  # seconds without a delivery, after which none is thought to be on its way
_QUIET_WITHIN = 0.5


class Intake:
    """Where one receiver's deliveries come from.

    Args:
        post: connections and administration.
        holdings: where they go.
        settling: counts the crashes of those that somebody had before.
        slots: the most that the server pushes of each queue.
        lease: seconds until a delivery goes back by itself; None: never.
        strict: asks the queues in order rather than in turns.
        came: called for each delivery that is ahead now.
        changed: called when there may be something else to see.
        given_up: whether nobody waits for a connection any more.
    """

    def __init__(
        self,
        post: Post,
        holdings: Holdings,
        settling: Settling,
        *,
        slots: int,
        lease: float | None,
        strict: bool,
        came: Callable[[], None],
        changed: Callable[[], None],
        given_up: Callable[[], bool],
    ) -> None:
        self.missing: set[str] = set()
        """The queues that were not there when last looked for."""
        self._post, self._topology, self._holdings, self._settling = post, post.topology, holdings, settling
        self._names = holdings.names
        self._slots, self._lease, self._strict = slots, lease, strict
        self._on_came, self._changed, self._given_up = came, changed, given_up
        self._gets: Lane | None = None
        self._pushes: Lane | None = None
        self._consumers: dict[str, str] = {}  # tag -> queue, of all that the channel for pushes ever had
        self._active: dict[str, int] = {}  # tag -> prefetch, of those that are not cancelled
        self._numbers = itertools.count(1)
        self._closed = False

    @property
    def is_pushed_to(self) -> bool:
        """Whether the server hands over by itself."""
        return bool(self._active)

    def consumers(self, queue: str) -> int:
        """How many the server counts for it: those that it pushes to, those that hold something, and each get."""
        tags = {held.consumer for held in list(self._holdings.held.values()) if held.queue == queue}
        return len(tags | {tag for tag in list(self._active) if self._consumers.get(tag) == queue})

    def lose_queue(self, queue: str) -> None:
        """It is gone: its deliveries are nobody's any more."""
        if queue in self._names:
            self.missing.add(queue)
        self._holdings.lose_queue(queue)
        self._changed()

    async def aclose(self) -> None:
        """Close the channels, for good; within a second the server has done so, and counts no consumer any more."""
        self._closed = True
        closing = [lane.channel.begin_close() for lane in (self._gets, self._pushes) if lane is not None]
        if closing:
            await asyncio.wait(closing, timeout=1.0)

    def abandon(self) -> None:
        """Close the channels: what is out on them goes back."""
        for lane in (self._gets, self._pushes):
            if lane is not None:
                lane.channel.begin_close()

    async def flush(self, until: float) -> None:
        """Have the queues know of all acknowledgements, before the channels are closed."""
        for lane in (self._gets, self._pushes):
            if lane is not None and lane.is_dirty:
                try:
                    await self._flush(lane, until)
                except BackendUnavailable as error:
                    _log.warning("what was acknowledged last may be run again: %s", error)

    async def _flush(self, lane: Lane, until: float) -> None:
        for name in self._names:
            if await self._post.admin.look(self._topology.queue(name)) is None:
                continue  # a get from it would close the channel, with what waits in it
            content = await lane.flush(self._topology.queue(name))
            if content is not None:  # that was the price
                self._came(lane, name, content)
                returned = [(delivery, Release()) for delivery in self._holdings.take_ahead()]
                await self._settling.settle(returned, until)

    # --- gets

    async def get(self, limit: int, within: float) -> None:
        """Ask each queue for what it has, in turns; what had been with somebody before is counted and asked again.

        Raises:
            BackendUnavailable: no connection within so many seconds, or it was lost.
        """
        lane = await self._gets_lane(within)
        left = dict.fromkeys(self._names, 1)
        asked_again = 0
        while (room := limit - self._holdings.count_ahead) > 0 and asked_again < 100:
            shares = self._shares([name for name in self._names if left[name] > 0], room)
            if not shares:
                return
            crashed: list[asyncio.Future[None]] = []
            for name, share in shares.items():
                kept = await self._post.admin.look(self._topology.queue(name))
                if kept is None:
                    self.lose_queue(name)
                    left[name] = 0
                    continue
                self.missing.discard(name)
                left[name] = max(0, kept.messages - share)
                frame = commands.Basic.Get(queue=self._topology.queue(name))
                for reply in [lane.channel.begin(frame) for _ in range(min(share, kept.messages))]:
                    content = await self._got(lane, reply)
                    if not isinstance(content, Content):
                        left[name] = 0
                    elif content.frame.redelivered:
                        crashed.append(self._settling.count_crash(lane, name, content))
                        left[name] += 1
                    else:
                        self._came(lane, name, content)
            if crashed:
                asked_again += 1
                await asyncio.wait(crashed, timeout=_COUNTED_WITHIN)  # longer where the server blocks who publishes

    async def _got(self, lane: Lane, reply: "asyncio.Future[Any]") -> object:
        """The answer to a get. One that comes too late would be nobody's: the channel gives it back."""
        try:
            return await lane.channel.reply(reply)
        except BackendUnavailable:
            lane.channel.begin_close()
            raise

    def _shares(self, names: list[str], room: int) -> dict[str, int]:
        """How many to ask each of these queues for."""
        if not names:
            return {}
        if self._strict:
            return {names[0]: room}
        each, more = divmod(room, len(names))
        first = self._holdings.next % len(names)
        turned = names[first:] + names[:first]
        return {name: each + (at < more) for at, name in enumerate(turned) if each + (at < more)}

    async def _gets_lane(self, within: float) -> Lane:
        if self._gets is None:
            self._gets = await self._lane(within)
        return self._gets

    async def _lane(self, within: float) -> Lane:
        """A channel.

        Raises:
            BackendUnavailable: no connection within so many seconds.
        """
        channel = await (await self._line(time.monotonic() + within)).channel()
        if self._closed:
            channel.begin_close()
            raise Closed("the receiver was left, or its backend closed")
        lane = Lane(channel)
        channel.gone.add_done_callback(lambda gone: self._on_gone(lane, gone.result()))
        return lane

    async def _line(self, until: float) -> Line:
        """In small steps: a nudge ends this wait, too."""
        while True:
            try:
                return await self._post.link.connected(min(_LOOK, max(0.0, until - time.monotonic())))
            except AuthenticationFailed:
                raise
            except BackendUnavailable:
                if time.monotonic() >= until or self._given_up():
                    raise

    # --- pushes

    async def consume(self, until: float, is_wanted: Callable[[], bool]) -> None:
        """Have the server push, from all queues that are there, as long as that is wanted.

        Raises:
            BackendUnavailable: not by `until`.
        """
        while is_wanted():
            if self._pushes is None:
                lane = self._pushes = await self._lane(max(0.0, until - time.monotonic()))
                lane.channel.on_content, lane.channel.on_cancel = self._on_content, self._on_cancel
                self._consumers, self._active = {}, {}
            lane = self._pushes
            wanted = {name: more for name in self._names if (more := self._more_for(name)) > 0}
            if not wanted:
                return
            try:
                # Consuming from a queue that is not there would close the channel, with all that is held on it.
                missing = [name for name in wanted if await self._post.admin.look(self._topology.queue(name)) is None]
            except AuthenticationFailed:
                raise
            except BackendUnavailable:
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(_A_MOMENT)
                continue
            for name in missing:
                self.lose_queue(name)
            try:
                for name in wanted.keys() - set(missing):
                    self.missing.discard(name)
                    await self._begin_to_push(lane, name, wanted[name])
                return
            except AuthenticationFailed:
                raise
            except BackendUnavailable:
                lane.channel.begin_close()
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(_A_MOMENT)

    def _more_for(self, name: str) -> int:
        """How many more the server may push of a queue: a prefetch does not count what was got, and never changes.

        So there is another consumer when what was got is settled; not for each single one of many.
        """
        pushed = sum(prefetch for tag, prefetch in self._active.items() if self._consumers[tag] == name)
        got = 0 if self._gets is None else self._holdings.on(self._gets)[name]
        more = self._slots - pushed - got
        return more if not (pushed and got) or more >= self._slots / 4 else 0

    async def _begin_to_push(self, lane: Lane, name: str, prefetch: int) -> None:
        tag = f"{next(self._numbers)}"
        self._consumers[tag] = name
        self._active[tag] = prefetch
        qos = lane.channel.begin(commands.Basic.Qos(prefetch_count=prefetch))
        consume = lane.channel.begin(commands.Basic.Consume(queue=self._topology.queue(name), consumer_tag=tag))
        await lane.channel.reply(qos)
        await lane.channel.reply(consume)

    async def pause(self) -> None:
        """Have the server push no more; what it had pushed is here when this returns.

        A quorum queue returns what was on its way to a cancelled consumer, and marks it as handed over before, though
        nobody has seen it: whoever gets it counts a crash. So a consumer is cancelled when it is full, or when nothing
        has come for a moment, as nothing is acknowledged meanwhile; and after a cancel with room for more what came
        between the two is fetched.
        """
        lane, active, self._active = self._pushes, self._active, {}
        if lane is None or not active:
            return
        room = Counter[str]()
        for tag, prefetch in active.items():
            room[self._consumers[tag]] += prefetch
        await self._until_full_or_quiet(lane, room)
        out = self._holdings.on(lane)
        try:
            for reply in [lane.channel.begin(commands.Basic.Cancel(consumer_tag=tag)) for tag in active]:
                await lane.channel.reply(reply)
            with_room = [name for name, most in room.items() if out[name] < most]
            if with_room:  # asked behind the answer, when what was on its way has reached the channel and been returned
                await lane.channel.call(commands.Basic.Qos(prefetch_count=self._slots))
            for name in with_room:
                await self._fetch_returned(name)
        except BackendUnavailable as error:
            _log.debug("a consumer was not cancelled in order: %s", error)

    async def _until_full_or_quiet(self, lane: Lane, most: Counter[str]) -> None:
        deadline, seen = time.monotonic() + _QUIET_WITHIN, -1
        while not lane.channel.is_closed and time.monotonic() < deadline:
            out = self._holdings.on(lane)
            if out.total() == seen or all(out[name] >= count for name, count in most.items()):
                return
            seen = out.total()
            await asyncio.sleep(_QUIET)

    async def _fetch_returned(self, name: str) -> None:
        if await self._post.admin.look(self._topology.queue(name)) is None:
            self.lose_queue(name)
            return
        lane = await self._gets_lane(_CONNECT_WITHIN)
        while True:
            content = await self._got(lane, lane.channel.begin(commands.Basic.Get(queue=self._topology.queue(name))))
            if not isinstance(content, Content):
                return
            if not content.frame.redelivered:
                self._came(lane, name, content)
                return
            number = counts_of(content.properties.headers).started().number
            if (id_of(content.properties, content.body), number) in self._post.given_back:
                self._settling.count_crash(lane, name, content)
            else:
                self._came(lane, name, content)

    # --- what comes

    def _on_content(self, content: Content) -> None:
        lane, queue = self._pushes, self._consumers.get(content.frame.consumer_tag or "")
        if lane is None or queue is None:
            return
        if content.frame.redelivered:
            self._settling.count_crash(lane, queue, content)
        else:
            self._came(lane, queue, content)
            self._changed()

    def _came(self, lane: Lane, queue: str, content: Content) -> None:
        properties, tag = content.properties, content.frame.delivery_tag
        counts = counts_of(properties.headers).started()
        message = Message(
            id_of(properties, content.body), content.body, properties.priority or 0, 0.0, None, counts.crash_limit
        )
        consumer: str = getattr(content.frame, "consumer_tag", f"got {tag}")
        deadline = math.inf if self._lease is None else time.monotonic() + self._lease
        receipt = f"{lane.receipts}:{tag}"
        delivery = Delivery(
            queue, message, counts.attempts, counts.crashes, counts.releases, counts.number, receipt, deadline
        )
        lane.add(tag)
        self._holdings.add(delivery, Held(queue, consumer, lane, tag, counts, properties.headers))
        self._on_came()

    def _on_cancel(self, tag: str) -> None:
        """The server ended a consumer: its queue was deleted, or has moved, or a run took too long for it."""
        queue = self._consumers.get(tag)
        self._active.pop(tag, None)
        if queue is None:
            return
        _log.warning("RabbitMQ ended the consumer of queue %s: the leases on its jobs are lost", queue)
        self._holdings.lose_queue(queue, gives_back=True)
        self._changed()

    def _on_gone(self, lane: Lane, why: JobsError) -> None:
        if lane is self._gets:
            self._gets = None
        elif lane is self._pushes:
            self._pushes, self._active = None, {}
        if lost := self._holdings.lose_lane(lane):
            _log.warning("the leases of %d jobs are lost: %s", lost, why)
        self._changed()
