"""`worker --reload`, for development: a worker process that is started again when a source file has changed."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from watchfiles import PythonFilter, awatch  # pyright: ignore[reportUnknownVariableType] (it names trio, if it is there)

from mindtrace.jobs.cli.children import Child
from mindtrace.jobs.cli.errors import CommandError, Relayed
from mindtrace.jobs.cli.leaving import is_ignored
from mindtrace.jobs.probes import State
from mindtrace.jobs_command import Terminal

_log = logging.getLogger(__name__)


class Reloader:
    """Keeps one worker process.

    Args:
        words: its command line, from the target on.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._here = words, Path.cwd()
        self._child: Child | None = None
        self._terminal = Terminal()
        self._signals: list[signal.Signals] = []
        self._why: str | None = None
        self._changed, self._over = asyncio.Event(), asyncio.Event()

    async def run(self) -> int:
        """Until told to stop, or until the process has done what it was started for. Returns its status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, number)
        loop.add_signal_handler(signal.SIGUSR1, self._on_usr1)
        if not is_ignored(signal.SIGHUP):
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            try:
                status = await self._keep()
            finally:
                self._over.set()
        if self._why is not None:
            raise CommandError(self._why)
        if len(self._signals) > 2:  # it has left at once, and so do we
            signal.signal(self._signals[-1], signal.SIG_DFL)
            os.kill(os.getpid(), self._signals[-1])
        return status if status >= 0 else 1

    def state(self) -> State:
        """For the probes, from any thread."""
        child = self._child
        if child is None or child.ended.done():
            return State(True, False, {"phase": "waiting for a change"})
        return State(child.alive, child.ready, child.report.facts)

    async def _keep(self) -> int:
        while True:
            child = self._child = await Child.start("the worker", self._words)
            for number in self._signals:  # that came while it was being started
                child.end(number)
            await self._change_or(child.ended)
            if child.ended.done():
                status = child.ended.result()
                if self._signals or child.has_ended_well or status == 1:
                    if child.report.failure:
                        raise Relayed(child.report.failure, status)
                    return 0 if status < 0 and not child.was_ready else status
                how = child.how_it_ended()
                _log.warning("the worker has ended (%s): started again once a file has changed", how)
                over = asyncio.create_task(self._over.wait())
                await self._change_or(over)
                if over.done():
                    return status if status > 0 else 1
                over.cancel()
            else:
                # Two different ones: of two that are alike, sent at once, the second may be lost.
                child.end(signal.SIGTERM)
                child.end(signal.SIGINT)
                await asyncio.wait({child.ended})
            self._changed.clear()

    async def _change_or(self, other: "asyncio.Task[object]") -> None:
        """Wait until a file changes or the other is done."""
        change = asyncio.create_task(self._changed.wait())
        await asyncio.wait({change, other}, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()

    async def _watch(self) -> None:
        _log.info("watching %s", self._here)
        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts the changes that we name
        try:
            async for changes in awatch(self._here, watch_filter=PythonFilter(), stop_event=self._over, debounce=400):
                names = sorted({path.removeprefix(f"{self._here}{os.sep}") for _, path in changes})
                _log.info("changed: %s%s", ", ".join(names[:3]), f" and {len(names) - 3} more" if names[3:] else "")
                self._changed.set()
        except OSError as error:  # the system watches only so many files
            self._why = f"--reload cannot watch {self._here}: {error}"
            self._on_stop(signal.SIGTERM)

    def _on_usr1(self) -> None:
        if self._child is not None:
            self._child.ask_what_runs()

    def _on_hangup(self) -> None:
        if self._terminal.is_gone():
            self._on_stop(signal.SIGTERM)
        else:
            _log.info("SIGHUP: nothing is replaced without --processes")

    def _on_stop(self, number: signal.Signals) -> None:
        self._signals.append(number)
        if self._child is None or self._child.ended.done():
            self._over.set()
        else:
            self._child.end(number)
