"""`Ahead`: deliveries received before there is a slot for them; where runs are short it saves round trips."""

import time
from collections import deque

from mindtrace.jobs.delivery import Delivery

SHORT = 0.010
"""Seconds: while the last run took less, deliveries are received ahead."""
LONG = 0.100
"""Seconds: when a run takes more, those that wait behind it are handed back, to whoever has a slot."""


class Ahead:
    """Those that wait for a slot, oldest first.

    Args:
        most: how many may wait; 0 for none.
    """

    def __init__(self, most: int) -> None:
        self.most: int = most
        self._waiting: deque[Delivery] = deque()
        self._runs_are_short = False
        self._changed = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def room(self, free: int) -> int:
        """How many more to receive where so many slots are free."""
        return max(0, free + (self.most if self._runs_are_short else 0) - len(self._waiting))

    def add(self, delivery: Delivery) -> None:
        """Have it wait."""
        self._waiting.append(delivery)

    def next(self) -> Delivery | None:
        """The next to run; what was lost while it waited is left out."""
        while self._waiting:
            delivery = self._waiting.popleft()
            if not delivery.lost:
                return delivery
        return None

    def started(self) -> None:
        """A run has begun now."""
        self._changed = time.monotonic()

    def ended(self, seconds: float) -> None:
        """A run has ended that took so long."""
        self._runs_are_short = self.most > 0 and seconds < SHORT
        self._changed = time.monotonic()

    def held_up_for(self) -> float:
        """Seconds since anything began or ended."""
        return time.monotonic() - self._changed

    def give_up(self) -> list[Delivery]:
        """Nothing waits any more: these are to be handed back."""
        given_up = [delivery for delivery in self._waiting if not delivery.lost]
        self._waiting.clear()
        self._runs_are_short = False
        return given_up
