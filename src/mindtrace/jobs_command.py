"""`mindtrace-jobs`, from its first instruction on: what signals do while the rest is still imported.

It stands beside the package, for which all of that is imported before anything in it runs. Ctrl-C ends it without a
traceback, SIGTERM needs no more than the system does, and what means something else to a worker does not end it.
"""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line that this process was given. Returns its exit status, 130 for Ctrl-C whenever it comes."""
    early = _Early()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored by whoever started us, who means it
        from mindtrace.jobs.cli import main

        return main(no_worker=early.give_back)
    try:
        signal.signal(signal.SIGINT, _leave)
        from mindtrace.jobs.cli import main

        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(no_worker=early.give_back)
        signal.signal(signal.SIGINT, _leave)  # the interpreter takes its time to end
        return status
    except KeyboardInterrupt:  # just before or just after the command, which makes a status of its own
        return 128 + signal.SIGINT


def _leave(*_: object) -> None:
    os._exit(128 + signal.SIGINT)


class Terminal:
    """The one that this process was started from, if it was: SIGHUP also says that it has gone."""

    def __init__(self) -> None:
        self._was_there = self._is_there()

    def is_gone(self) -> bool:
        """Whether there was one, and is no more."""
        return self._was_there and not self._is_there()

    def _is_there(self) -> bool:
        try:
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
        except OSError:
            return False
        return True


class _Early:
    """SIGHUP and SIGUSR1 do not end what may become a worker. One that is ignored from the start stays ignored."""

    def __init__(self) -> None:
        self._terminal, self._came = Terminal(), list[int]()
        numbers = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)]
        self._numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
        for number in self._numbers:
            signal.signal(number, self._on_signal)

    def give_back(self) -> None:
        """It is no worker: they end it from now on, and one that has come does so now."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)
        for number in self._came:
            os.kill(os.getpid(), number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
        if number == signal.SIGHUP and self._terminal.is_gone():  # nobody is there any more, whatever it becomes
            self.give_back()


if __name__ == "__main__":  # as a supervisor starts it: `-m mindtrace.jobs` would import all of that first
    sys.exit(main())
