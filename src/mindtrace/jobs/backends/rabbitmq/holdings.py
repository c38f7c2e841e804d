"""`Holdings`: the deliveries that a receiver has and has not settled, and which of them the next call is to have.

came ──> ahead ──handed over──> held ──> settled
           ^  │                   │
           └──┼──── put back ─────┘
              └──> dropped where nobody saw it, else lost and told
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindtrace.jobs.backends.rabbitmq.counts import Counts
from mindtrace.jobs.backends.rabbitmq.lane import Lane
from mindtrace.jobs.delivery import Delivery, Settled
from mindtrace.jobs.errors import LeaseLost
from mindtrace.jobs.wire import Message


@dataclass(slots=True)
class Held:
    """What the server knows a delivery by.

    Attributes:
        queue: where it came from.
        consumer: its tag; of what was got one of its own.
        lane: the channel it came on.
        tag: on that channel.
        counts: with this delivery counted.
        headers: as they came.
    """

    queue: str
    consumer: str
    lane: Lane
    tag: int
    counts: Counts
    headers: Any


class Holdings:
    """What one receiver has; changed in the keeper's loop only.

    Args:
        queues: it takes from, in order.
        slots: the most it holds.
        lease: seconds after which a delivery that is not extended goes back; None: never by itself.
        strict: hands over in the order of `queues` rather than in turns.
        on_lost: told of each delivery that is gone.
        given_back: told of the id and the number of each that goes back unsettled.
    """

    def __init__(
        self,
        queues: Sequence[str],
        *,
        slots: int,
        lease: float | None,
        strict: bool,
        on_lost: Callable[[Delivery], None],
        given_back: Callable[[str, int], None],
    ) -> None:
        self.names: tuple[str, ...] = tuple(dict.fromkeys(queues))
        self.held: dict[Delivery, Held] = {}
        """All of them, those ahead too."""
        self.next: int = 0
        """Whose turn it is, among the queues."""
        self.copying: int = 0
        """Deliveries that are settled once their copy is stored."""
        self._slots, self._lease, self._strict = slots, lease, strict
        self._on_lost, self._given_back = on_lost, given_back
        self._ahead: dict[str, deque[Delivery]] = {name: deque() for name in self.names}

    @property
    def room(self) -> int:
        """How many more may be handed over."""
        return self._slots - len(self.held) - self.copying + self.count_ahead

    @property
    def any_ahead(self) -> bool:
        """Whether there is something for the next call."""
        return any(self._ahead.values())

    @property
    def count_ahead(self) -> int:
        """How many there are for the next call."""
        return sum(len(ahead) for ahead in self._ahead.values())

    def on(self, lane: Lane) -> Counter[str]:
        """How many of each queue are out on a channel."""
        return Counter(held.queue for held in self.held.values() if held.lane is lane)

    def add(self, delivery: Delivery, held: Held) -> None:
        """It has come, and is the next call's."""
        self.held[delivery] = held
        self._ahead[held.queue].append(delivery)

    def hand_over(self, limit: int) -> list[Delivery]:
        """What came ahead, up to so many; where leases end by time, theirs begin now."""
        taken = self._next_ones(limit)
        if self._lease is not None:
            for delivery in taken:
                delivery.deadline = time.monotonic() + self._lease
                asyncio.get_running_loop().call_later(self._lease, self._lapse, delivery)
        return taken

    def _next_ones(self, limit: int) -> list[Delivery]:
        """In order of the queues if strict, else in turns."""
        taken: list[Delivery] = []
        names = self.names
        if self._strict or len(names) == 1:
            for name in names:
                ahead = self._ahead[name]
                while ahead and len(taken) < limit:
                    taken.append(ahead.popleft())
            return taken
        idle = 0
        while len(taken) < limit and idle < len(names):
            ahead = self._ahead[names[self.next]]
            self.next = (self.next + 1) % len(names)
            idle = 0 if ahead else idle + 1
            if ahead:
                taken.append(ahead.popleft())
        return taken

    def put_back(self, deliveries: Sequence[Delivery]) -> None:
        """They were handed over to nobody: the next call has them, first."""
        for delivery in reversed(deliveries):
            if delivery in self.held:
                self._ahead[delivery.queue].appendleft(delivery)

    def take_ahead(self) -> list[Delivery]:
        """All that nobody has: they are no call's any more."""
        taken = [delivery for ahead in self._ahead.values() for delivery in ahead]
        for ahead in self._ahead.values():
            ahead.clear()
        return taken

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

    # --- what goes without a settlement

    def give_back(self, message: Message, held: Held) -> None:
        """To the queue, where whoever gets it next counts a crash."""
        self._given_back(message.id, held.counts.number)
        held.lane.give_back(held.tag)

    def lose(self, delivery: Delivery) -> None:
        """It is gone: its holder is told."""
        if self.held.pop(delivery, None) is not None:
            delivery.lost = True
            self._on_lost(delivery)

    def lose_queue(self, queue: str, *, gives_back: bool = False) -> None:
        """The deliveries of a queue are gone, or given back where it may be there still."""
        of_queue = [delivery for delivery in self.held if delivery.queue == queue]
        if gives_back:
            for delivery in of_queue:
                self.give_back(delivery.message, self.held[delivery])
        if queue in self._ahead:
            for delivery in self._ahead[queue]:
                self._drop(delivery)
            self._ahead[queue].clear()
        for delivery in of_queue:
            self.lose(delivery)

    def lose_lane(self, lane: Lane) -> int:
        """A channel is gone, and what was out on it. How many that anybody had."""
        for ahead in self._ahead.values():
            for delivery in [one for one in ahead if one in self.held and self.held[one].lane is lane]:
                ahead.remove(delivery)
                self._drop(delivery)
        lost = [delivery for delivery, held in self.held.items() if held.lane is lane]
        for delivery in lost:
            self.lose(delivery)
        return len(lost)

    def lose_all(self, others: Sequence[Delivery] = ()) -> None:
        """Everything is gone, these as well, unless they are known to be."""
        for delivery in [*others, *self.held]:
            if not delivery.lost:
                delivery.lost = True
                self._on_lost(delivery)
        self.held.clear()
        self.take_ahead()

    def _drop(self, delivery: Delivery) -> None:
        """Nobody ever saw it, so nobody is told."""
        delivery.lost = True
        self.held.pop(delivery, None)

    def _lapse(self, delivery: Delivery) -> None:
        """Its time may be over; of one that was put back it begins anew when somebody gets it."""
        held = self.held.get(delivery)
        if held is None or delivery in self._ahead[delivery.queue]:
            return
        left = delivery.deadline - time.monotonic()
        if left > 0:
            asyncio.get_running_loop().call_later(left, self._lapse, delivery)
            return
        self.give_back(delivery.message, held)
        self.lose(delivery)
