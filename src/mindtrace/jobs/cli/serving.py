"""One worker in this process: its signals, its life signs, what it says, and its end.

Signals are taken by plain handlers and not by the loop's, and the life signs come from a thread: a job that blocks the
loop must keep nobody from ending the process, or from seeing why.
"""

import asyncio
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from types import FrameType
from typing import Any

from mindtrace.jobs.cli import leaving, target
from mindtrace.jobs.cli.errors import CommandError, UsageError
from mindtrace.jobs.cli.output import without_login
from mindtrace.jobs.cli.plan import Plan
from mindtrace.jobs.cli.report import Report, Upward
from mindtrace.jobs.delivery import Dead, Done, Release, Retry
from mindtrace.jobs.errors import BackendUnavailable, Closed, JobsError, NotSupported, QueueMismatch, UnsafeBackend
from mindtrace.jobs.events import Event, JobSettled, JobStarted
from mindtrace.jobs.health import Health
from mindtrace.jobs.notify import Notifier
from mindtrace.jobs.probes import Probes, State
from mindtrace.jobs.worker import Worker
from mindtrace.jobs_command import Terminal

_log = logging.getLogger(__name__)

_GRACE = 20.0  # seconds after the drain: cancel, settle, close, leave
_LOOK_EVERY = 0.1  # seconds; until it is ready, and while it drains
_SAY_EVERY = 5.0  # seconds between two lines of a countdown


class Serving:
    """One worker, from its import to its end.

    Args:
        plan: what it is told.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._worker: Worker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals: list[signal.Signals] = []
        self._drain_over: float | None = None  # on the monotonic clock
        self._notifier = Notifier()
        self._upward: Upward | None = None
        self._is_alone = False  # in telling it something
        self._about: dict[str, Any] = {}
        self._wanted: list[str] = []  # by signals
        self._over, self._saying = threading.Event(), threading.Lock()
        self._heard, self._said = 0, 0.0  # signals that were said, and when
        self._settled = Counter[str]()
        self._has_worked = self._has_ended = self._has_left_some = False

    def run(self) -> int:
        """Load the application and run its worker.

        Returns:
            0 if all runs ended by themselves, 1 if some were handed back, or a job ended the worker.
        """
        plan = self._plan
        signal.signal(signal.SIGUSR1, self._on_usr1)  # before the first report, after which a supervisor may send it
        terminal = Terminal()
        if not leaving.is_ignored(signal.SIGHUP):
            signal.signal(signal.SIGHUP, lambda number, frame: self._on_hangup(terminal))
        with ExitStack() as stack:
            if plan.supervised is not None:
                self._upward = Upward(plan.supervised, self._on_orphaned)
            probes = None if plan.health is None else stack.enter_context(Probes(*plan.health, self._state))
            beat = threading.Thread(target=self._beat, name="mtj-beat", daemon=True)
            beat.start()
            try:
                loaded = target.load(plan.target)
                return self._run(self._serve(loaded, probes))
            finally:
                self._over.set()
                beat.join(2.0)
                self._is_alone = not beat.is_alive()
                if self._upward is not None and self._is_alone:
                    self._upward.tell_last(self._report(self._state()))

    def has_told(self, failure: CommandError | JobsError) -> bool:
        """After `run`: whether there is a supervisor, which now knows why this process cannot go on."""
        report = replace(self._report(self._state()), failure=without_login(str(failure)))
        return self._upward is not None and self._is_alone and self._upward.tell_last(report)

    def _run(self, main: Coroutine[Any, Any, int]) -> int:
        try:
            return leaving.run(main, self._new_loop(), self._on_broken_loop)
        except (CommandError, JobsError):
            raise
        except BaseException as error:  # the user's code: the library lets nothing but its own out
            if self._worker is None:
                raise
            raise CommandError(f"the worker has ended: {target.described(error)}") from error

    def _on_broken_loop(self, error: BaseException) -> None:
        """A job, nobody knows which, has ended the loop under all. Handed back, it would do so again, for ever.

        So this is a crash, and counts as one for each job that runs.
        """
        if self._worker is not None:
            how = "stopped the event loop" if isinstance(error, RuntimeError) else f"raised {target.described(error)}"
            _log.error("a task of a job %s: the worker leaves as if it had crashed", how)
            leaving.crash(1)

    def _new_loop(self) -> Callable[[], asyncio.AbstractEventLoop]:
        if self._plan.loop == "asyncio":
            return asyncio.new_event_loop
        import uvloop

        return uvloop.new_event_loop

    async def _serve(self, loaded: target.Loaded, probes: Probes | None) -> int:
        plan, began = self._plan, time.monotonic()
        worker = await self._made(loaded)
        if (plan.processes or 1) > 1 and worker.orchestrator.backend.traits.name == "local":
            raise UsageError(str(NotSupported("--processes", "local", "a broker that several processes can reach")))
        self._loop, self._worker = asyncio.get_running_loop(), worker
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        plan.journal.open(insists=plan.insists)
        self._about = self._facts(worker, loaded.target, probes)
        if plan.processes is None:  # else the supervisor says it, once for all
            plan.journal.banner({"mindtrace-jobs": version("mindtrace-jobs"), **self._about})
        orchestrator = worker.orchestrator
        if orchestrator.backend.traits.name == "local":
            _log.warning("the local backend: only this process can hand in jobs; MINDTRACE_JOBS_URL names a broker")
        try:
            if plan.burst:
                with plan.journal.held(BackendUnavailable):
                    await orchestrator.open()  # there is nothing to wait for: no broker is an error
            await worker.work()
            self._has_left_some = await self._leaves_some(worker)
        except (SystemExit, KeyboardInterrupt) as error:
            _log.error("a job raised %s: the worker has ended", type(error).__name__)
            return 1
        except (NotSupported, QueueMismatch, UnsafeBackend) as error:  # trying again would not mend it
            raise UsageError(str(error)) from error
        finally:
            self._notifier.stopping("ending")
            if plan.burst:
                with suppress(Closed):
                    await orchestrator.aclose()
        self._has_ended = not worker.released
        self._say_summary(time.monotonic() - began, worker.released)
        return 1 if worker.released else 0

    async def _leaves_some(self, worker: Worker) -> bool:
        """Whether it is worth another process. One that could settle nothing would not be followed by a better one."""
        if not self._plan.burst or self._plan.supervised is None or not self._settled:
            return False
        try:
            return any([(await worker.orchestrator.depth(queue)).ready for queue in worker.queues])
        except JobsError:  # nobody knows: the next one finds out
            return True

    async def _made(self, loaded: target.Loaded) -> Worker:
        plan, worker = self._plan, await loaded.app()
        if not isinstance(worker, Worker):
            raise UsageError(
                f"{loaded.target} is an {type(worker).__name__}, which knows no consumers: make a Worker of it,"
                " worker = Worker(orchestrator, [consumer, ...])"
            )
        worker.configure(
            queues=plan.queues or None,
            concurrency=plan.concurrency,
            max_jobs=plan.max_jobs,
            max_memory=plan.max_memory,
            until_idle=plan.burst or None,
            drain=plan.drain,
            listeners=[self._note],
        )
        return worker

    # --- what it says

    def _facts(self, worker: Worker, name: str, probes: Probes | None) -> dict[str, Any]:
        backend = worker.orchestrator.backend
        where = repr(backend)
        return {
            "worker": name if self._plan.processes is not None else f"{name}, pid {os.getpid()}",
            "backend": backend.traits.name if " object at " in where else where.strip("<>"),
            "queues": ", ".join(worker.queues),
            "schemas": ", ".join(worker.schemas) or "none",
            "concurrency": worker.concurrency,
            **({"loop": self._plan.loop} if self._plan.loop != "asyncio" else {}),
            **({} if probes is None else {"health": probes.url}),
        }

    def _note(self, event: Event) -> None:
        """A line for each job that ended well; of one that did not, the worker has said so."""
        self._has_worked = self._has_worked or isinstance(event, JobStarted)
        if not isinstance(event, JobSettled) or not event.accepted:
            return
        settlement = event.settlement
        if not isinstance(settlement, Release) or settlement.delay > 0.0:  # else the worker counts it, or it never ran
            self._settled[type(settlement).__name__] += 1
        if isinstance(settlement, Done) and settlement.discarded is None and _log.isEnabledFor(logging.INFO):
            _log.info(
                "job %s of queue %s done in %.3f s",
                event.job_id,
                event.queue,
                event.seconds,
                extra={
                    "job_id": event.job_id,
                    "queue": event.queue,
                    "schema": event.schema_name,
                    "attempt": event.attempt,
                    "worker": self._worker.name if self._worker else "",
                },
            )

    def _say_summary(self, seconds: float, released: int) -> None:
        """What the broker took; and what was handed back, also where no broker was there: those come when leases end.

        The last number is what the exit status goes by: a job that a snooze put off is another matter.
        """
        kinds = ((Done, "done"), (Retry, "to be retried"), (Dead, "dead"))
        counts = [f"{self._settled[kind.__name__]} {words}" for kind, words in kinds]
        if put_off := self._settled[Release.__name__]:
            counts.append(f"{put_off} put off")
        _log.info("ended after %.1f s: %s, %d handed back", seconds, ", ".join(counts), released)

    # --- signals, in the main thread, between any two instructions: nothing here may wait for a lock

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(signal.Signals(number))
        worker, loop = self._worker, self._loop
        if len(self._signals) > 2 or worker is None or loop is None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not loop.is_closed():  # else it is just leaving as it is
            if len(self._signals) == 1:
                self._drain_over = time.monotonic() + worker.drain
            loop.call_soon_threadsafe(self._stop, worker, len(self._signals) == 2)

    def _stop(self, worker: Worker, now: bool) -> None:
        """In the loop, if it turns."""
        try:
            self._say_what_was_heard()
        finally:
            worker.stop(now=now)

    def _on_hangup(self, terminal: Terminal) -> None:
        if terminal.is_gone() and not self._signals:
            self._on_stop(signal.SIGTERM, None)
        else:
            self._wanted.append("hangup")

    def _on_usr1(self, number: int, frame: FrameType | None) -> None:
        self._wanted.append("running")

    def _on_orphaned(self) -> None:
        """In a thread. The supervisor is gone: nobody would end us, and another may have taken its place."""
        if not self._signals:
            os.kill(os.getpid(), signal.SIGTERM)

    # --- life signs, in a thread of their own

    def _state(self) -> State:
        worker = self._worker
        if worker is None:
            return State(True, False, {"phase": "starting"})
        health = worker.health()
        return State(health.healthy, health.ready, _facts_of(health))

    def _beat(self) -> None:
        while not self._over.wait(_LOOK_EVERY if not self._has_worked or self._signals else self._every()):
            state = self._state()
            self._has_worked = self._has_worked or state.ready
            if self._upward is not None:
                self._upward.tell(self._report(state))
            words = "not ready" if self._has_worked else "starting, or waiting for the broker"
            self._notifier.beat(alive=state.alive, ready=state.ready, status="receiving" if state.ready else words)
            with suppress(OSError, ValueError):  # nobody reads what it says: no reason to seem dead
                self._say_what_was_heard(again=True)
                while self._wanted:
                    if self._wanted.pop(0) == "running":
                        self._say_what_runs()
                    else:
                        _log.info("SIGHUP: nothing is replaced without --processes")

    def _every(self) -> float:
        return min(0.5, self._notifier.every)

    def _report(self, state: State) -> Report:
        worker = self._worker
        if worker is None:
            return Report()
        return Report(
            "running",
            state.alive,
            state.ready,
            self._has_worked,
            worker.drain + _GRACE,
            state.facts,
            self._about,
            has_ended=self._has_ended,
            has_left_some=self._has_left_some,
        )

    def _say_what_runs(self) -> None:
        """From this thread, so that no frame of ours is among those of the job that blocks the loop."""
        lines = [f"pid {os.getpid()}:"]
        running = [] if self._worker is None else self._worker.running()
        for job in running:
            lines.append(
                f"job {job.job_id} of queue {job.queue}, schema {job.schema_name or 'none'}, attempt {job.attempt}, "
                f"{job.kind}, {job.seconds:.1f} s"
            )
            lines += [f"  {line}" for line in job.stack or [job.unseen] if line]
        lines.append(f"{len(running)} running")
        self._plan.journal.say("\n".join(lines))

    def _say_what_was_heard(self, *, again: bool = False) -> None:
        """A line for each signal, from the loop or, where that is blocked, from the thread; and a countdown."""
        with self._saying:
            now, count = time.monotonic(), len(self._signals)
            if count == self._heard and not (again and count == 1 and now - self._said >= _SAY_EVERY):
                return
            self._heard, self._said = count, now
            running = self._state().facts.get("running", 0)
            if count == 1:
                self._notifier.stopping("draining")
                left = max(0.0, (self._drain_over or now) - now)
                _log.info("%s: draining, %d running, %.0f s left", self._signals[0].name, running, left)
            else:
                _log.info("%s again: cancelling and handing back %d", self._signals[-1].name, running)


def _facts_of(health: Health) -> dict[str, Any]:
    facts = asdict(health)
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in facts.items()}
