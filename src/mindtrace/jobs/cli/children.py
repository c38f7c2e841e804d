"""`Child`: a worker process that this one started, in a session of its own."""

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mindtrace.jobs.cli.report import Report

_log = logging.getLogger(__name__)

_SILENT = 15.0  # seconds without a report, after which nobody can say that a process is alive
_HURRY = 15.0  # seconds that a process may need to end after a second signal
_LAST_WORDS = 0.5  # seconds for what a process that has ended told before; what it forked may keep the socket open
_LONGEST_REPORT = 1 << 24  # bytes; it names all queues


class Child:
    """One process. Signals that a terminal sends to its foreground do not reach it: we forward them, once.

    Attributes:
        name: what to call it in a log.
        pid: its id.
        began: when it was started, on the monotonic clock.
        report: the last that it told.
        about: what it is, once it has told so.
        was_ready: whether it ever was.
        changed: set when it has told something, or ended; whoever waits for that clears it.
        ended: its end; the result is its status, negative for a signal.
    """

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.name: str = name
        self.pid: int = process.pid
        self.began: float = time.monotonic()
        self.report: Report = Report()
        self.about: Mapping[str, Any] = {}
        self.was_ready: bool = False
        self._has_told = False
        self.changed: asyncio.Event = asyncio.Event()
        self._process, self._reader, self._writer = process, reader, writer
        self._told = self.began
        self._signals: list[signal.Signals] = []
        self._axe: asyncio.TimerHandle | None = None
        self.ended: asyncio.Task[int] = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, name: str, words: Sequence[str]) -> "Child":
        """Start `mindtrace-jobs worker` with these words, in a fresh interpreter."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "mindtrace.jobs_command", "worker", *words, "--supervised", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(name, process, *await asyncio.open_connection(sock=ours, limit=_LONGEST_REPORT))

    @property
    def alive(self) -> bool:
        """As its own probe would say; False where it says nothing at all."""
        return self.report.alive and time.monotonic() - self._told < _SILENT

    @property
    def ready(self) -> bool:
        """As its own probe would say."""
        return self.report.ready and self.alive and not self.ended.done()

    def how_it_ended(self) -> str:
        """In words, once it has: `SIGKILL`, `exit status 3: shop:worker: no module named ...`."""
        why = self.report.failure
        return f"{described(self.ended.result())}{': ' if why else ''}{why}"

    @property
    def has_ended_well(self) -> bool:
        """Once it has ended: whether it told so. A job may exit with 0 as well, and a signal as it left did no harm."""
        return self.report.has_ended and self.ended.result() <= 0

    @property
    def was_told_to_end(self) -> bool:
        """Whether it ends since we asked it to."""
        return bool(self._signals)

    def send(self, number: signal.Signals) -> None:
        """Send it, if there is still someone to get it."""
        if not self.ended.done():
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def ask_what_runs(self) -> None:
        """Have it say so. One that has told nothing yet may have no handler, and would die of the signal."""
        if self._has_told:
            self.send(signal.SIGUSR1)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end: the first time it drains, the second it gives its jobs back, the third it leaves.

        One that has not ended when its own bounds are over never will: it is killed.
        """
        if self.ended.done():
            return
        self._signals.append(number)
        # SIGTERM ends a process that imports its application without a word; SIGINT would be an exception somewhere.
        self.send(signal.SIGTERM if self.report.phase == "starting" else number)
        if self._axe is not None:
            self._axe.cancel()
        patience = self.report.leave_within if len(self._signals) == 1 else _HURRY
        self._axe = asyncio.get_running_loop().call_later(patience, self._kill, patience)

    def _kill(self, patience: float) -> None:
        _log.error("%s has not ended within %.0f s: killed", self.name, patience)
        self.send(signal.SIGKILL)

    async def _watch(self) -> int:
        reading = asyncio.create_task(self._read())
        status = await self._process.wait()
        await asyncio.wait({reading}, timeout=_LAST_WORDS)
        reading.cancel()
        self._writer.close()
        if self._axe is not None:
            self._axe.cancel()
        self.changed.set()
        return status

    async def _read(self) -> None:
        while True:
            try:
                line = await self._reader.readline()
                report = Report.decode(line) if line else None
            except OSError:
                return
            except (ValueError, TypeError):  # longer than the longest, or no report: the next may be one
                _log.warning("%s has told what cannot be read", self.name)
                continue
            if report is None:
                return
            self._has_told, self._told, self.report = True, time.monotonic(), report
            self.about = report.about or self.about
            self.was_ready = self.was_ready or report.has_worked
            self.changed.set()


def described(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
