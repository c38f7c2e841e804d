"""`LoopGuard`: sees from a thread whether an event loop turns, and says who keeps it from turning.

turning --no turn for 1 s--> standing: logged, with the stack --20 s--> logged again: the worker is unhealthy
^                            |                                          |
+-----------turns: for how long it stood is logged----------------------+
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from mindtrace.jobs.health import LONGEST_LAG
from mindtrace.jobs.runs import Run, about
from mindtrace.jobs.stacks import stack_of_thread

_log = logging.getLogger(__name__)

SAMPLE = 0.25
"""Seconds between two looks."""
LAGS = 1.0
"""Seconds; a loop that stands still for longer is worth a warning."""
_JOIN_WITHIN = 1.0
_NAMED = 10  # jobs, in one line


class LoopGuard:
    """Watches the loop that makes it, from `start` to `stop`.

    Args:
        worker: its name.
        in_flight: gives what the worker runs; called from the thread.
        longest: seconds after which the worker counts as dead.
    """

    def __init__(self, worker: str, in_flight: Callable[[], list[Run]], longest: float = LONGEST_LAG) -> None:
        self._worker, self._in_flight, self._longest = worker, in_flight, longest
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.loop_thread: int = threading.get_ident()
        self._extra: dict[str, Any] = {"worker": worker}
        self._asked: float | None = None  # since when a turn is waited for; set by the thread, taken back by the loop
        self._last = 0.0
        self._said = 0  # of this incident: 1 that it stands, 2 that it is dead
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mindtrace-jobs guard", daemon=True)

    @property
    def lag(self) -> float:
        """Seconds for which the loop stands still, or did when it last turned. From any thread."""
        asked = self._asked
        return self._last if asked is None else time.monotonic() - asked

    def start(self) -> None:
        """Begin to watch."""
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads: work goes on, unwatched
            _log.warning("worker %s: nobody watches its loop: %s", self._worker, error, extra=self._extra)

    def stop(self) -> None:
        """End the thread. From the loop."""
        self._over.set()
        if self._thread.ident is not None:
            # It may be logging into something that waits for this loop: then it ends later, by itself.
            self._thread.join(_JOIN_WITHIN)

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE):
            asked = self._asked
            if asked is None:
                self._asked = time.monotonic()
                try:
                    self.loop.call_soon_threadsafe(self._turned)
                except RuntimeError:  # it is closed
                    return
            else:
                self._look(time.monotonic() - asked)

    def _look(self, lag: float) -> None:
        if lag > LAGS and self._said == 0:
            self._said = 1
            self._say_who(lag)
        if lag > self._longest and self._said == 1:
            self._said = 2
            _log.error(
                "worker %s: the event loop stands still for %.0f s: it counts as dead",
                self._worker,
                lag,
                extra=self._extra,
            )

    def _turned(self) -> None:
        """From the loop."""
        asked = self._asked
        if asked is None:
            return
        self._last = lag = time.monotonic() - asked
        said, self._said, self._asked = self._said, 0, None
        if lag > LAGS and not self._over.is_set():
            level = logging.WARNING if said != 1 else logging.INFO  # 0: it was over before anyone could look
            _log.log(level, "worker %s: the event loop turns again, after %.1f s", self._worker, lag, extra=self._extra)

    def _say_who(self, lag: float) -> None:
        runs = self._in_flight()
        turning = asyncio.current_task(self.loop)
        stack = "\n  ".join(stack_of_thread(self.loop_thread))
        for run in runs:
            if run.task is not None and run.task is turning:
                who = f"job {run.job.id} of queue {run.job.queue}, attempt {run.job.attempt}, blocks it"
                extra = about(run.delivery, self._worker, run.job.schema_name)
                break
        else:
            ids = [str(run.job.id) for run in runs]
            more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
            who = f"jobs {', '.join(ids[:_NAMED])}{more} run" if ids else "no job runs"
            extra = self._extra
        _log.warning(
            "worker %s: the event loop stands still for %.1f s; %s:\n  %s", self._worker, lag, who, stack, extra=extra
        )
