"""A local receiver: hands out what its queues have ready, settles it, and waits for the bell."""

import asyncio
import math
import os
from collections.abc import Callable, Mapping, Sequence

from mindtrace.jobs.backend import Home, Receiver
from mindtrace.jobs.backends.local.clock import Clock
from mindtrace.jobs.backends.local.queue import Queue, StoredJob
from mindtrace.jobs.delivery import Delivery, Exchanged, Release, Settled, Settlement
from mindtrace.jobs.errors import Closed, LeaseLost

_LOOK = 1.0
"""Seconds between looks of its own, so that a lost ring costs latency and never a job."""


class LocalReceiver(Receiver):
    """See `Receiver`. With `keep` its leases do not lapse: it lives and dies with the backend.

    Args:
        home: the loop it belongs to.
        clock: its time.
        queues: all of the backend's, by name.
        names: of those it takes from.
        slots: see `Backend.receiver`, as the rest.
    """

    def __init__(
        self,
        home: Home,
        clock: Clock,
        queues: Mapping[str, Queue],
        names: Sequence[str],
        *,
        slots: int,
        lease: float,
        crash_limit: int,
        keep: bool,
        strict: bool,
        lost: Callable[[Delivery], None] | None,
    ) -> None:
        self.lease: float = lease
        self.keep: bool = keep
        self.held: dict[Delivery, tuple[Queue, StoredJob]] = {}
        self._home, self._clock, self._queues, self._names = home, clock, queues, tuple(dict.fromkeys(names))
        self._slots, self._crash_limit, self._strict, self._lost = slots, crash_limit, strict, lost
        self._loop = asyncio.get_running_loop()
        self._bell: asyncio.Future[None] | None = None
        self._timer: asyncio.Task[None] | None = None
        self._timer_at = math.inf
        self._nudged = self._ended = False
        self._turn = 0

    async def exchange(
        self, pairs: Sequence[tuple[Delivery, Settlement]], limit: int, *, wait: float = 0.0
    ) -> Exchanged:
        """Settle, then take; wait only where there was neither anything to settle nor anything to take."""
        settled: list[Settled] = [self._settle(delivery, settlement) for delivery, settlement in pairs]
        if not pairs:  # with pairs it must not: a cancellation would lose what became of them
            await self._home.breathe()
        if self._ended:
            if pairs:
                return Exchanged(settled, [])
            raise Closed("the receiver was left, or its backend closed")
        self._home.check()
        deliveries, missing = self._take(limit)
        if not (pairs or deliveries or missing) and wait > 0:
            until = self._clock.now() + wait
            while not (deliveries or missing or self._nudged) and self._clock.now() < until:
                await self._wait(limit, until)
                if self._ended:
                    raise Closed("the receiver was left, or its backend closed")
                deliveries, missing = self._take(limit)
        self._nudged = False
        return Exchanged(settled, deliveries, missing)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """Make the leases of these deliveries last as long as a new one would."""
        deadline = self._clock.now() + self.lease
        answers: list[Settled] = []
        for delivery in deliveries:
            held = self.held.get(delivery)
            if held is None:
                answers.append(LeaseLost(delivery.message.id))
            else:
                if not self.keep:
                    delivery.deadline = held[0].extend(held[1], deadline)
                answers.append(None)
        return answers

    def nudge(self) -> None:
        """End the wait of the exchange now in progress, or of the next one."""
        self._nudged = True
        self.wake()

    def wake(self) -> None:
        """Have the wait in progress, if there is one, look again."""
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def lose(self, delivery: Delivery) -> None:
        """This delivery is no longer held; says so where nobody here settled it."""
        if self.held.pop(delivery, None) is not None:
            self._tell_lost(delivery)

    async def end(self) -> None:
        """As `release`, and wait until nothing of it runs any more."""
        self.release()
        timer, self._timer = self._timer, None
        if timer is not None and not self._loop.is_closed():
            await asyncio.wait({timer})

    def release(self) -> None:
        """Release what is held, and be of no more use."""
        self._ended = True
        while self.held:
            delivery, (queue, job) = self.held.popitem()
            queue.settle(job, Release())
            self._tell_lost(delivery)
        if not self._loop.is_closed():
            self.wake()
            if self._timer is not None:
                self._timer.cancel()

    def _tell_lost(self, delivery: Delivery) -> None:
        delivery.lost = True
        if self._lost is not None and not self._loop.is_closed():
            self._loop.call_soon(self._lost, delivery)

    def _settle(self, delivery: Delivery, settlement: Settlement) -> Settled:
        held = self.held.pop(delivery, None)
        if held is None:
            return LeaseLost(delivery.message.id)
        held[0].settle(held[1], settlement)
        return None

    def _take(self, limit: int) -> tuple[list[Delivery], tuple[str, ...]]:
        now = self._clock.now()
        queues = [(name, self._queues.get(name)) for name in self._names]
        missing = tuple(name for name, queue in queues if queue is None)
        present = [queue for _, queue in queues if queue is not None]
        for queue in present:
            queue.promote(now)
        if limit <= 0:
            return [], missing
        for queue in present:
            queue.collect(now, self._crash_limit)
        limit = min(limit, self._slots - len(self.held))
        deliveries = self._fill(present, limit, now)
        for queue in present:
            if queue.n_ready:
                queue.ring()
        return deliveries, missing

    def _fill(self, queues: list[Queue], limit: int, now: float) -> list[Delivery]:
        """Up to `limit`, a queue at a time in fair turns, or as much as there is of each in order if `strict`."""
        random = os.urandom(8).hex() if limit > 0 else ""
        deliveries: list[Delivery] = []
        if not self._strict and len(queues) > 1 and limit > 0:
            self._turn = (self._turn + 1) % len(queues)
            queues = queues[self._turn :] + queues[: self._turn]
        while queues and len(deliveries) < limit:
            for queue in list(queues):
                alone = self._strict or len(queues) == 1
                while len(deliveries) < limit:
                    delivery = queue.hand_out(self, now, random)
                    if delivery is None:
                        queues.remove(queue)
                        break
                    deliveries.append(delivery)
                    if not alone:
                        break
        return deliveries

    async def _wait(self, limit: int, until: float) -> None:
        """Until the bell, a nudge, the next due job or `until`."""
        has_room = limit > 0 and self._slots > len(self.held)  # a full one would pass its rings on for ever
        queues = [queue for name in self._names if has_room and (queue := self._queues.get(name)) is not None]
        until = min([until, self._clock.now() + _LOOK, *(queue.next_change() for queue in queues)])
        self._bell = bell = self._loop.create_future()
        for queue in queues:
            queue.waiting[self] = None
        self._set_timer(until)
        try:
            await bell
        except asyncio.CancelledError:
            # The ring that was ours must not be lost with us: another may be waiting for the same job.
            for queue in queues:
                queue.waiting.pop(self, None)
                if queue.n_ready:
                    queue.ring()
            raise
        finally:
            self._bell = None
            for queue in queues:
                queue.waiting.pop(self, None)

    def _set_timer(self, until: float) -> None:
        """Ring at `until`, or earlier: a timer that is set is kept, since a new one for each wait costs more."""
        if self._timer is not None and not self._timer.done():
            if self._timer_at <= until:
                return
            self._timer.cancel()
        self._timer_at = until
        self._timer = self._loop.create_task(self._ring_at(until))

    async def _ring_at(self, when: float) -> None:
        await self._clock.until(when)
        self._timer = None
        self.wake()
