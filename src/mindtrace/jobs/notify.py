"""What systemd wants to hear of a service: that it is ready, that it stops, that it is alive.

The protocol of sd_notify(3): one datagram of `NAME=value` lines to the socket that `$NOTIFY_SOCKET` names, a path or,
after an @, a name in the abstract namespace. sd_watchdog_enabled(3) says who has to send `WATCHDOG=1`, and how often.
"""

import logging
import os
import socket
import time
from collections.abc import MutableMapping

_log = logging.getLogger(__name__)

_SEND_WITHIN = 1.0  # seconds; a manager that reads nothing for so long is told the next time
_STARTING = 30.0  # seconds more that a service asks for while it is not ready


class Notifier:
    """Tells the service manager. Does nothing where there is none, and never raises: it is not worth a worker.

    Takes its variables out of the environment, so that no process started later speaks in this one's name.

    Args:
        environ: where to look.

    Attributes:
        interval: seconds between two signs of life, half of what the manager allows; None where it expects none.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        patience, whose = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        self._address: str | None = None
        self._failed = self._was_ready = self._is_stopping = False
        self._next_plea = self._next_sign = 0.0
        self._status = ""  # as last told
        self.interval: float | None = None
        if not address:
            return
        if address[0] not in "/@":
            _log.warning("the service manager is not told anything: NOTIFY_SOCKET is no path and no @name")
            return
        self._address = address if address[0] == "/" else "\0" + address[1:]
        if patience.isascii() and patience.isdigit() and int(patience) > 0 and whose in ("", str(os.getpid())):
            self.interval = int(patience) / 2e6

    @property
    def every(self) -> float:
        """Seconds after which `beat` is to be called again, at the latest."""
        return 1.0 if self.interval is None else min(1.0, self.interval / 2)

    def beat(self, *, alive: bool, ready: bool, status: str) -> None:
        """Say how it is; of that, what the manager has to know now.

        Args:
            alive: gives the sign of life, when it is time for one.
            ready: it does what it is there for; said when it is first so. Until then: not yet, and not stuck.
            status: a line for `systemctl status`; once it was ready, told whenever it is another one.
        """
        now = time.monotonic()
        if ready and not self._was_ready:
            self._was_ready = True
            self._tell("READY=1", status)
        elif not self._was_ready and now >= self._next_plea:
            self._next_plea = now + _STARTING / 3
            self._tell(f"EXTEND_TIMEOUT_USEC={_STARTING * 1e6:.0f}", status)
        elif self._was_ready and not self._is_stopping and status != self._status:
            self._tell("", status)
        if self.interval is not None and alive and now >= self._next_sign:
            self._next_sign = now + self.interval
            self._send("WATCHDOG=1")

    def stopping(self, status: str) -> None:
        """It has begun to end. Said once."""
        if not self._is_stopping:
            self._is_stopping = True
            self._tell("STOPPING=1", status)

    def _tell(self, line: str, status: str) -> None:
        self._status = status
        self._send(*([line] if line else []), f"STATUS={status}")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.settimeout(_SEND_WITHIN)
                out.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            if not self._failed:
                _log.warning("the service manager could not be told %s: %s", lines[0], error)
            self._failed = True
        else:
            self._failed = False
