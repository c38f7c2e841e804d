"""What a worker process tells the supervisor that started it: lines of JSON over a socket that the two share.

The socket says a second thing by being there: it ends when either process does, however that came about.
"""

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mindtrace.jobs.probes import State

_LAST_WITHIN = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Report:
    """How a worker process is.

    Attributes:
        phase: `starting` until the application is imported and its options are known to be good.
        alive: as the probe would say.
        ready: as the probe would say.
        has_worked: it was ready once, if only for so long that no report could say so.
        leave_within: seconds that it may need to end after a first signal.
        facts: what the probe tells besides.
        about: what it is, for the banner; told once.
        failure: why it cannot go on, told last; empty where it can.
        has_ended: in order, with nothing handed back, told last. A job that ends the process tells nothing.
        has_left_some: a burst has met one of its limits, and more is ready.
    """

    phase: Literal["starting", "running"] = "starting"
    alive: bool = True
    ready: bool = False
    has_worked: bool = False
    leave_within: float = 50.0
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    failure: str = ""
    has_ended: bool = False
    has_left_some: bool = False

    def encode(self) -> bytes:
        """As a line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> "Report":
        """Of a line."""
        return cls(**json.loads(line))

    @property
    def state(self) -> State:
        """For a probe."""
        return State(self.alive, self.ready, self.facts)


class Upward:
    """The worker's end of the socket.

    Args:
        number: of the open file that the supervisor handed over.
        orphaned: called, from a thread, once there is no supervisor any more.
    """

    def __init__(self, number: int, orphaned: Callable[[], None]) -> None:
        self._socket = socket.socket(fileno=number)
        self._socket.set_inheritable(False)  # or a process that a job started would keep it open for us
        self._orphaned = orphaned
        self._unsent = b""
        self._introduced = False
        threading.Thread(target=self._listen, name="mtj-supervisor", daemon=True).start()

    def tell(self, report: Report) -> None:
        """Send it; a supervisor that reads nothing misses some reports, and never half of one."""
        if not self._unsent:
            self._unsent = (replace(report, about={}) if self._introduced else report).encode()
            self._introduced = self._introduced or bool(report.about)
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            pass
        except OSError:  # it is gone: `_listen` says so
            self._unsent = b""

    def tell_last(self, report: Report) -> bool:
        """Send it, after all that was told before. False where nobody takes it within a second."""
        poll, deadline = select.poll(), time.monotonic() + _LAST_WITHIN
        poll.register(self._socket, select.POLLOUT)
        self._unsent += report.encode()
        try:
            while self._unsent:
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return False
                self._unsent = self._unsent[self._socket.send(self._unsent, socket.MSG_DONTWAIT) :]
        except OSError:
            return False
        return True

    def _listen(self) -> None:
        try:
            while self._socket.recv(1):
                pass
        except OSError:  # reset
            pass
        self._orphaned()
