"""`Health`: how a worker is; and `Pulse`, which its receive loop leaves to tell it by."""

import time
from dataclasses import dataclass

LONGEST_LAG = 20.0
"""Seconds; a loop that stands still for longer is dead to whoever looks."""
_LONGEST_IDLE = 15.0
_ANSWER_WITHIN = 5.0  # seconds; a broker that takes longer is not there
_KEEPER_WITHIN = 20.0
_KEEPER_SHORTEST = 3.0  # it turns every second, and a machine has its hiccups


@dataclass(frozen=True, slots=True)
class Health:
    """How a worker is, at one moment.

    Attributes:
        connected: the last exchange reached the broker, and the connection is not lost; False before the first one, and
            after the end.
        idle_for: seconds since the receive loop last turned, without those that it may wait for a job or an answer.
        lag: seconds for which the event loop stands still, or did when it was last looked at.
        running: jobs that are being run.
        stuck: runs whose time is over and that do not end.
        draining: no more jobs are taken.
        keeping: what keeps the leases of its jobs turns.
        slots: jobs that it can run at once.
    """

    connected: bool
    idle_for: float
    lag: float
    running: int
    stuck: int
    draining: bool
    keeping: bool
    slots: int = 1

    @property
    def healthy(self) -> bool:
        """Whether it is alive; where not, a restart helps. A broker that is away does not count.

        False when the event loop stands still for 20 s, the receive loop has not turned for 15 s though the event loop
        did, the leases are not kept, or every slot is stuck.
        """
        turns = self.lag <= LONGEST_LAG and self.idle_for - self.lag <= _LONGEST_IDLE
        return turns and self.keeping and self.stuck < self.slots

    @property
    def ready(self) -> bool:
        """Whether it takes jobs: alive, connected, and not draining."""
        return self.connected and not self.draining and self.healthy


class Pulse:
    """When the receive loop turned, and whether the broker answers. Read from any thread.

    Args:
        lease: seconds that the broker has to answer an exchange that settles.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._connected = False
        self._due = float("inf")  # when it has to turn, at the latest; inf before the start and after the end
        self._asked: float | None = None  # since when an exchange that settles has had no answer

    def waits(self, seconds: float) -> None:
        """It turns, and then not again for up to so many seconds."""
        self._asked, self._due = None, time.monotonic() + seconds

    def looks(self) -> None:
        """It looks for the broker, which may take as long as any answer."""
        self.waits(self._lease)

    def asks(self, settles: bool, wait: float) -> None:
        """An exchange begins."""
        self.waits(self._lease if settles else wait)
        if settles:
            self._asked = time.monotonic()

    def answered(self) -> None:
        """The broker has answered it."""
        self.waits(0.0)
        self._connected = True

    def failed(self) -> None:
        """There is no broker."""
        self.waits(0.0)
        self._connected = False

    def ended(self) -> None:
        """It turns no more."""
        self._connected, self._due = False, float("inf")

    @property
    def connected(self) -> bool:
        """Whether the last exchange reached the broker."""
        asked = self._asked
        return self._connected and (asked is None or time.monotonic() - asked < _ANSWER_WITHIN)

    @property
    def idle_for(self) -> float:
        """Seconds by which it is late with its next turn."""
        return max(0.0, time.monotonic() - self._due)

    def is_kept(self, keeper_idle_for: float) -> bool:
        """Whether leases are kept by a keeper that last turned so many seconds ago: it renews one every third of it."""
        return keeper_idle_for <= min(_KEEPER_WITHIN, max(_KEEPER_SHORTEST, self._lease * 2 / 3))
