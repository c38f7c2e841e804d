"""`Health`: how a worker is; and `Pulse`, which its receive loop leaves to tell it by."""

import time
from dataclasses import dataclass

_ANSWER_WITHIN = 5.0  # seconds; a broker that takes longer is not there


@dataclass(frozen=True, slots=True)
class Health:
    """How a worker is.

    Attributes:
        connected: the last exchange reached the broker.
        idle_for: seconds since the receive loop last turned; above 15 something blocks it.
        running: jobs that are being run.
        stuck: runs whose time is over and that do not end.
        draining: no more jobs are taken.
    """

    connected: bool
    idle_for: float
    running: int
    stuck: int
    draining: bool

    @property
    def healthy(self) -> bool:
        """Whether the loop turns, and not every running job is stuck."""
        return self.idle_for <= 15 and not 0 < self.running == self.stuck


class Pulse:
    """When the receive loop turned, and whether the broker answers.

    Args:
        lease: seconds that the broker has to answer an exchange that settles.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._connected, self._turned = True, time.monotonic()
        self._asked: float | None = None  # since when an exchange that settles has had no answer

    def asks(self, settles: bool) -> None:
        """An exchange begins."""
        self._asked = time.monotonic() if settles else None

    def answered(self) -> None:
        """The broker has answered it."""
        self._asked = None
        self._connected, self._turned = True, time.monotonic()

    def failed(self) -> None:
        """There is no broker."""
        self._connected = False

    @property
    def connected(self) -> bool:
        """Whether the last exchange reached the broker."""
        asked = self._asked
        return self._connected and (asked is None or time.monotonic() - asked < _ANSWER_WITHIN)

    @property
    def idle_for(self) -> float:
        """Seconds since the receive loop last turned."""
        idle_for = time.monotonic() - self._turned
        # The broker has what is to be settled, and as long as the leases to answer.
        return idle_for if self._asked is None else max(0.0, idle_for - self._lease)
