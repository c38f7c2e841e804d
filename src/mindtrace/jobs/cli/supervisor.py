"""`worker --processes N`: a parent that imports no application, and N fresh interpreters that each run a worker.

Each place among the N is kept by a task of its own:

    start --> reports --> ready --+--> ends by itself: max_jobs, max_memory        --> start, at once
                 |                +--> crashes                                     --> start, after a back-off
                 |                +--> SIGHUP: a successor is ready, so this drains --> the successor has the place
                 |                +--> SIGTERM: drains                             --> the place is given up
                 +--> never ready: a back-off; or, where none ever was and it tells why, with 2, 3 or 4: all stop
"""

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from mindtrace.jobs.cli.children import Child
from mindtrace.jobs.cli.errors import Relayed
from mindtrace.jobs.cli.leaving import is_ignored
from mindtrace.jobs.notify import Notifier
from mindtrace.jobs.probes import State
from mindtrace.jobs_command import Terminal

_log = logging.getLogger(__name__)

READY_WITHIN = 60.0
"""Seconds that a successor has to become ready, before a rolling restart is given up."""
_HOPELESS = frozenset((2, 3, 4))  # configuration, import, login: trying again does not mend them
_LASTED = 60.0  # seconds after which a crash is not one of starting
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_FIRST_ALONE = 5.0  # seconds that the first one, its application imported, has to be ready before the others start


@dataclass(slots=True, eq=False)
class _Place:
    """One of the N."""

    number: int
    current: Child | None = None
    successor: Child | None = None
    crashes: int = 0  # in a row

    def has_successor(self) -> bool:
        return self.successor is not None


class Supervisor:
    """Keeps N worker processes, and hands them our signals.

    Args:
        words: the command line of one of them, from the target on.
        processes: how many.
        burst: one that ends in order, and leaves nothing that is ready, has done what it was started for.
        notifier: of systemd.
        introduce: called once, with what the first process says that it is.
    """

    def __init__(
        self,
        words: Sequence[str],
        processes: int,
        *,
        burst: bool,
        notifier: Notifier,
        introduce: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._words, self._burst, self._notifier = list(words), burst, notifier
        self._introduce, self._introduced = introduce, False
        self._places = [_Place(number + 1) for number in range(processes)]
        self._children: set[Child] = set()
        self._terminal = Terminal()
        self._stop_asked, self._roll_asked = asyncio.Event(), asyncio.Event()
        self._signals: list[signal.Signals] = []  # that asked us to stop
        self._sent: list[signal.Signals] = []  # to all, since
        self._status = 0  # of the worst that ended since we were told to stop, or in a burst
        self._fatal: Relayed | None = None
        self._has_worked = False  # one of them was ready once

    async def run(self) -> int:
        """Until told to stop, or until there is nothing left to keep.

        Returns:
            0 if all drained, 1 if one gave jobs back or was killed, or crashed in a burst.

        Raises:
            Relayed: none could start, and why; its status is 2, 3 or 4.
        """
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], Any]] = {
            signal.SIGHUP: self._on_hangup,
            signal.SIGUSR1: self._on_usr1,
            signal.SIGTERM: partial(self._on_stop, signal.SIGTERM),
            signal.SIGINT: partial(self._on_stop, signal.SIGINT),
        }
        if is_ignored(signal.SIGHUP):
            del handlers[signal.SIGHUP]
            _log.info("SIGHUP is ignored, as under nohup: it replaces nothing")
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        first, *others = self._places
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(self._beat()), group.create_task(self._roll_when_asked())]
                keeping = [group.create_task(self._keep(first))]
                await self._until_it_works(first, keeping[0])
                keeping += [group.create_task(self._keep(place)) for place in others]
                await asyncio.wait(keeping)
                while self._children:
                    await asyncio.wait({child.ended for child in self._children})
                for helper in helpers:
                    helper.cancel()
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)
        if len(self._signals) > 2:  # they have left at once, and so do we
            signal.signal(self._signals[-1], signal.SIG_DFL)
            os.kill(os.getpid(), self._signals[-1])
        if self._fatal is not None:
            raise self._fatal
        return self._status

    def state(self) -> State:
        """For the probes, from any thread: alive if all that run are, ready if one is."""
        children = list(self._children)
        told = [
            {"pid": child.pid, "alive": child.alive, "ready": child.ready, **child.report.facts} for child in children
        ]
        return State(
            all(child.alive for child in children), any(child.ready for child in children), {"processes": told}
        )

    # --- one place

    async def _keep(self, place: _Place) -> None:
        while not self._stop_asked.is_set():
            try:
                child = place.successor or await self._start(place)
            except OSError as error:
                await self._back_off(place, f"worker {place.number} could not be started: {error.strerror}")
                continue
            place.current, place.successor = child, None
            status = await child.ended
            self._has_worked = self._has_worked or child.was_ready
            lasted = time.monotonic() - child.began > _LASTED
            if lasted or (child.has_ended_well and child.was_ready) or child.was_told_to_end:
                place.crashes = 0
            if self._stop_asked.is_set():
                return
            if child.was_told_to_end or place.has_successor():
                continue
            if self._burst and child.has_ended_well and not child.report.has_left_some:
                return
            if child.has_ended_well and child.was_ready:
                _log.info("%s has ended by itself: replaced", child.name)
            elif child.report.failure and status in _HOPELESS and not child.was_ready and not self._can_work():
                # By what it told: with such a status of its own making, a job that it had taken may have ended it.
                self._fatal = Relayed(child.report.failure, status)
                self._stop(signal.SIGTERM)
                return
            else:
                if self._burst:
                    self._status = 1  # what it ran is still leased, and nobody waits for it
                how = "has ended" if child.was_ready else "has ended before it was ready"
                await self._back_off(place, f"{child.name} {how}: {child.how_it_ended()}")

    def _can_work(self) -> bool:
        """Whether one ever did: else what keeps one from starting keeps all, and trying again does not mend it."""
        return self._has_worked or any(child.was_ready for child in self._children)

    async def _start(self, place: _Place) -> Child:
        child = await Child.start(f"worker {place.number}", self._words)
        _log.info("%s started, pid %d", child.name, child.pid)
        self._children.add(child)
        child.ended.add_done_callback(lambda _: self._on_end(child))
        for number in self._sent:  # while it was being started
            child.end(number)
        return child

    def _on_end(self, child: Child) -> None:
        self._children.discard(child)
        status = child.ended.result()
        if child.report.failure and self._fatal is None and (self._stop_asked.is_set() or child.was_told_to_end):
            _log.error("%s has ended: %s", child.name, child.how_it_ended())
        # A signal that met it before it had anything to drain is no failure.
        if self._stop_asked.is_set() and not (child.has_ended_well or (status < 0 and not child.was_ready)):
            self._status = 1

    async def _back_off(self, place: _Place, why: str) -> None:
        place.crashes += 1
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(place.crashes - 1, 10))
        pause = random.uniform(longest / 2, longest)  # noqa: S311 (jitter, not secrets)
        _log.warning("%s; started again in %.1f s", why, pause)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stop_asked.wait()

    async def _until_it_works(self, place: _Place, keeping: "asyncio.Task[None]") -> None:
        """Let the first process find out whether all can start: N of them would all say the same."""
        patience: float | None = None
        while not (keeping.done() or self._stop_asked.is_set() or place.crashes):
            child = place.current
            if child is None or child.ended.done():  # another is just being started
                await asyncio.wait({keeping}, timeout=0.01)
                continue
            if child.was_ready or (patience is not None and time.monotonic() >= patience):
                return
            if patience is None and child.report.phase == "running":
                patience = time.monotonic() + _FIRST_ALONE
            await _changed(child, None if patience is None else patience - time.monotonic())

    # --- the rolling restart

    async def _roll_when_asked(self) -> None:
        while True:
            await self._roll_asked.wait()
            self._roll_asked.clear()
            _log.info("rolling restart: one process after another")
            for place in self._places:
                if self._stop_asked.is_set() or not await self._replace(place):
                    break
            else:
                _log.info("rolling restart: done")

    async def _replace(self, place: _Place) -> bool:
        """Start a successor, and once it is ready have the old one drain. False: it was not, and the old one stays."""
        old = place.current
        if old is None or old.ended.done():
            return True  # it is being started anew as it is
        try:
            new = place.successor = await self._start(place)
        except OSError as error:
            _log.error("rolling restart: given up, no process could be started: %s", error.strerror)
            return False
        patience = time.monotonic() + READY_WITHIN
        while not (new.was_ready or new.ended.done() or self._stop_asked.is_set() or time.monotonic() >= patience):
            await _changed(new, patience - time.monotonic())
        if self._stop_asked.is_set():
            return False
        if not new.was_ready:
            how = new.how_it_ended() if new.ended.done() else f"not ready within {READY_WITHIN:.0f} s"
            _log.error("rolling restart: given up, the successor of %s: %s", old.name, how)
            if place.successor is new:  # else the old one has ended meanwhile, and the place is its own
                place.successor = None
                new.end()
            return False
        asked = time.monotonic()
        old.end()
        await asyncio.wait({old.ended})
        _log.info(
            "%s: pid %d has left within %.1f s, pid %d goes on", old.name, old.pid, time.monotonic() - asked, new.pid
        )
        return True

    # --- signals

    def _on_stop(self, number: signal.Signals) -> None:
        self._signals.append(number)
        words = ("all drain", "all give their jobs back", "all leave")[min(len(self._signals), 3) - 1]
        _log.info("supervisor: %s, %s", number.name, words)
        self._stop(number)

    def _stop(self, number: signal.Signals) -> None:
        self._sent.append(number)
        if not self._stop_asked.is_set():
            self._stop_asked.set()
            self._notifier.stopping("draining")
        for child in self._children:
            # One that a rolling restart has told to drain drains already: a second signal would cancel what it runs.
            if len(self._sent) > 1 or not child.was_told_to_end:
                child.end(number)
            child.changed.set()

    def _on_usr1(self) -> None:
        for child in self._children:
            child.ask_what_runs()

    def _on_hangup(self) -> None:
        if self._terminal.is_gone():
            self._on_stop(signal.SIGTERM)
        else:
            self._roll_asked.set()

    # --- systemd

    async def _beat(self) -> None:
        """Tell systemd how we are, and once whoever looks what we are."""
        while True:
            state = self.state()
            if not self._introduced and (about := [one.about for one in self._children if one.about]):
                self._introduced = True
                self._introduce(about[0])
            ready = sum(child.ready for child in list(self._children))
            self._notifier.beat(
                alive=state.alive, ready=state.ready, status=f"{ready} of {len(self._places)} processes are ready"
            )
            await asyncio.sleep(0.1 if not self._has_worked else self._notifier.every)
            self._has_worked = self._has_worked or state.ready


async def _changed(child: Child, within: float | None) -> None:
    """Wait until it has told something or ended, but no longer than that."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            await child.changed.wait()
    child.changed.clear()
