"""The runs of a worker: each begins with a delivery and ends in one settlement, whatever the user's code does."""

import asyncio
import contextvars
import inspect
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from random import Random
from typing import Any, Literal

from mindtrace.jobs.children import Child
from mindtrace.jobs.consumer import CurrentJob, enter_job
from mindtrace.jobs.delivery import Dead, Delivery, Done, Release, Retry, Settlement
from mindtrace.jobs.errors import JobSignal, Refused, RunAborted, RunCrashed, RunFailed, RunTimeout, UnknownSchema
from mindtrace.jobs.events import JobStarted, Listener, told
from mindtrace.jobs.policy import settlement_for
from mindtrace.jobs.processes import ChildUnfit, Processes
from mindtrace.jobs.retry import RetryPolicy
from mindtrace.jobs.routes import Route
from mindtrace.jobs.threads import BlockingRuns, Outcome
from mindtrace.jobs.wire import Envelope

_log = logging.getLogger(__name__)

_DONE = Done()


class Run:
    """One delivery being run.

    Attributes:
        delivery: what is run.
        route: by whom.
        envelope: what the delivery says.
        job: what `current_job()` gives.
        started: on the monotonic clock.
        ended_at: on the same, when its settlement was decided; 0 before that.
        begun: its task has had its first step.
        settled: its settlement is decided; what the run does from now on changes nothing.
        ended: the user's code has returned, or is a thread that nobody waits for any more.
        thread_id: of the thread in which the user's code is at this moment.
        child: the process in which it is.
    """

    __slots__ = (
        "begun", "cause", "child", "delivery", "ended", "ended_at", "envelope", "job", "route",
        "settled", "started", "stuck", "task", "thread", "thread_id", "timeout",
    )  # fmt: skip

    def __init__(self, delivery: Delivery, route: Route, envelope: Envelope, worker: str) -> None:
        self.delivery: Delivery = delivery
        self.route: Route = route
        self.envelope: Envelope = envelope
        self.job: CurrentJob = CurrentJob(
            delivery.message.id,
            delivery.attempt,
            delivery.number,
            envelope.headers,
            queue=delivery.queue,
            schema_name=envelope.schema_name,
            worker=worker,
        )
        self.started: float = time.monotonic()
        self.ended_at: float = 0.0
        self.timeout: float = route.timeout_for(envelope)
        self.task: asyncio.Task[None] | None = None
        self.thread_id: int | None = None
        self.child: Child | None = None
        self.thread: asyncio.Future[Outcome] | None = None
        self.cause: Literal["timeout", "stop", "lost"] | None = None
        self.begun: bool = False
        self.settled: bool = False
        self.ended: bool = False
        self.stuck: bool = False

    async def perform(self, threads: BlockingRuns, processes: Processes, begun: "Callable[[Run], None]") -> Done:
        """Call the user's method with a checked input, and check what it returns. Raises whatever went wrong.

        Args:
            threads: where a plain function runs.
            processes: where it runs if its class says so.
            begun: called when the time of the run begins.
        """
        route = self.route
        if route.consumer.executor == "process":
            sent = route.input_sent(self.envelope, self.delivery.attempt)
            result = await self._in_process(processes, sent, begun)
            route.check_output(self.envelope, result, sent=True)
            return _DONE
        begun(self)
        data = route.input_for(self.envelope, self.delivery.attempt)
        enter_job(self.job)
        if route.consumer.calls.is_async:
            returned = await route.call(data)
        else:
            context = contextvars.copy_context()
            self.thread = threads.start(lambda: context.run(self._in_thread, data))
            outcome = await asyncio.shield(self.thread)  # a thread cannot be cancelled: the slot waits for it
            if outcome.error is not None:
                raise outcome.error
            returned = outcome.value
            if inspect.isawaitable(returned):  # a coroutine function in disguise: not awaited, it would never run
                self.thread = None  # from here on it is cancelled as any coroutine is
                returned = await returned
        route.check_output(self.envelope, returned)
        return _DONE

    async def _in_process(self, processes: Processes, sent: Any, begun: "Callable[[Run], None]") -> object:
        def has_begun(child: Child) -> None:
            self.child = child
            begun(self)

        try:
            return await processes.run(self.route.consumer, self.job, sent, has_begun)
        finally:
            self.child = None

    def _in_thread(self, data: Any) -> Any:
        self.thread_id = threading.get_ident()
        try:
            return self.route.call(data)
        finally:
            self.thread_id = None


@dataclass(slots=True, eq=False)
class Finished:
    """A settlement that is decided and not yet written. `run` is None where the delivery was not run."""

    delivery: Delivery
    settlement: Settlement
    schema_name: str = ""
    run: Run | None = None


class Runs:
    """Those in flight, and the settlements of those that ended.

    Args:
        worker: its name, for the records of errors.
        threads: where blocking code runs.
        processes: where it runs if its class says so.
        grace: seconds that a cancelled run has to clean up.
        policy: of a delivery that cannot be read.
        random: the source of the jitter.
        listeners: told of each start.
        nudge: called when there is something to settle or a slot is free.
        ended: called when a run has ended, before its slot is free.
        stop_for: called with a `KeyboardInterrupt`, a `SystemExit` and the like that a run raised.
        ending: whether the loop is ending everything, the worker included.
    """

    def __init__(
        self,
        *,
        worker: str,
        threads: BlockingRuns,
        processes: Processes,
        grace: float,
        policy: RetryPolicy,
        random: Random,
        listeners: Sequence[Listener],
        nudge: Callable[[], None],
        ended: Callable[[Run], None],
        stop_for: Callable[[BaseException], None],
        ending: Callable[[], bool],
    ) -> None:
        self.finished: list[Finished] = []
        self.released: int = 0
        self.stuck: int = 0
        self._worker, self._threads, self._processes, self._grace = worker, threads, processes, grace
        self._policy, self._random, self._listeners = policy, random, listeners
        self._nudge, self._ended, self._stop_for, self._ending = nudge, ended, stop_for, ending
        self._runs: dict[Delivery, Run] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf

    def __len__(self) -> int:
        """How many slots are taken."""
        return len(self._runs)

    def in_flight(self) -> list[Run]:
        """Those that have a slot; from any thread."""
        return list(self._runs.values())  # one step of the interpreter: its own thread cannot change it meanwhile

    def any(self, condition: Callable[[Delivery], bool]) -> bool:
        """Whether one in flight is such a delivery."""
        return any(condition(delivery) for delivery in self._runs)

    def all_given_up(self) -> bool:
        """Whether nothing more can come of those in flight: each is settled, and has only not returned yet."""
        return all(run.stuck or run.ended for run in self._runs.values())

    def start(self, run: Run) -> None:
        """Run it, in a task of its own."""
        self._runs[run.delivery] = run
        run.task = asyncio.get_running_loop().create_task(self._handle(run))

    def refuse(self, delivery: Delivery, error: Exception) -> None:
        """Settle a delivery that is not run."""
        schema_name = error.schema_name if isinstance(error, UnknownSchema) else ""
        extra = about(delivery, self._worker, schema_name)
        _log.warning("job %s is not run: %s", delivery.message.id, error, extra=extra)
        settlement = settlement_for(delivery, error, self._policy, self._random)
        self._finish(Finished(delivery, self._stamped(settlement, None), schema_name))

    def lose(self, delivery: Delivery) -> Run | None:
        """Its lease is gone: cancel the run, drop its result. Returns the run, if there is one that has not settled."""
        run = self._runs.get(delivery)
        if run is None or run.settled:
            return None
        extra = about(delivery, self._worker, run.envelope.schema_name)
        _log.warning("job %s: lease lost, result dropped", delivery.message.id, extra=extra)
        run.job.lease_lost = True
        self._cancel(run, "lost")  # what it ends with is refused by the receiver, and listeners are told so
        return run

    async def wind_up(self) -> None:
        """Cancel what still runs, give it its grace, and hand back what has not ended by then."""
        for run in list(self._runs.values()):
            self._cancel(run, "stop")
        tasks = [run.task for run in self._runs.values() if run.task is not None and not (run.ended or run.stuck)]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=self._grace)
        finally:
            for run in list(self._runs.values()):
                if not run.settled:
                    self._settle(run, None)
                if run.task is not None:
                    run.task.cancel()  # one that waits for a thread ends here; the thread cannot be stopped
            if self._alarm is not None:
                self._alarm.cancel()

    # --- one run

    async def _handle(self, run: Run) -> None:
        run.begun = True
        end: Done | Exception | None = None
        try:
            if self._listeners:
                delivery, envelope = run.delivery, run.envelope
                event = JobStarted(delivery.queue, delivery.message.id, envelope.schema_name, delivery.attempt)
                await told(self._listeners, event)
            if not run.delivery.lost:  # while the listeners were told, say
                end = await run.perform(self._threads, self._processes, self._begin_time)
        except asyncio.CancelledError as error:
            end = self._cancelled(run, error)
        except (KeyboardInterrupt, ChildUnfit) as error:  # nothing that the job could help
            self._stop_for(error)
        except (Refused, JobSignal) as error:
            end = error
        except Exception as error:  # user code
            if run.cause is None:
                end = error
            elif run.cause == "timeout":
                end = RunTimeout(run.timeout)
        except BaseException as error:  # user code: SystemExit must not stop the loop under everyone
            end = RunAborted(f"the run raised {type(error).__name__}")
            end.__cause__ = error
            self._stop_for(error)
        finally:
            run.ended = True
            self._ended(run)
            if not run.settled:  # before the slot is free, or what is refused in it would be settled first
                self._settle(run, end)
            elif run.route.consumer.ack == "early" and isinstance(end, Exception):
                self._log_end(run, end, Done())
            if run.thread is None or run.thread.done():
                self._free(run)
            else:
                run.thread.add_done_callback(lambda _: self._free(run))  # a thread keeps its slot until it returns

    def _begin_time(self, run: Run) -> None:
        if run.timeout != math.inf:
            run.job.deadline = time.monotonic() + run.timeout
            if run.job.deadline < self._alarm_at:
                self._set_alarm(run.job.deadline)

    def _set_alarm(self, when: float) -> None:
        """One alarm for all runs, at the earliest deadline: a timer for each costs a tenth of what a job costs."""
        if self._alarm is not None:
            self._alarm.cancel()
        loop = asyncio.get_running_loop()
        self._alarm_at = when
        self._alarm = loop.call_later(when - time.monotonic(), self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm, self._alarm_at = None, math.inf
        now = time.monotonic()
        timed = [run for run in self._runs.values() if run.cause is None and not run.ended]
        for run in timed:
            if run.job.deadline <= now:
                self._time_is_over(run)
        if (soonest := min((run.job.deadline for run in timed if run.cause is None), default=math.inf)) != math.inf:
            self._set_alarm(soonest)

    def _time_is_over(self, run: Run) -> None:
        run.cause, run.job.cancelled = "timeout", True
        if run.thread is not None:
            self._abandon(run)
        elif run.task is not None:
            run.task.cancel()
            asyncio.get_running_loop().call_later(self._grace, self._abandon, run)

    def _abandon(self, run: Run) -> None:
        """Settle a run that has not ended: its slot stays taken until it does."""
        if run.ended or run.stuck:
            return
        job_id, extra = run.envelope.id, about(run.delivery, self._worker, run.envelope.schema_name)
        _log.error("job %s does not end though it should; its slot stays taken", job_id, extra=extra)
        run.stuck = True
        self.stuck += 1
        if not run.settled:
            self._settle(run, None if run.job.lease_lost else RunTimeout(run.timeout))
        self._nudge()  # also where it was settled before: a drain waits for it no longer

    def _cancel(self, run: Run, cause: Literal["stop", "lost"]) -> None:
        if run.ended:
            return
        run.cause, run.job.cancelled = run.cause or cause, True
        if cause == "lost":
            asyncio.get_running_loop().call_later(self._grace, self._abandon, run)
        if run.thread is not None or run.task is None:
            return  # a thread has been told by the flag, and keeps its slot until it returns
        run.task.cancel()
        if not run.begun:  # then its coroutine never will, and nobody else gives its slot back
            run.ended = True
            if not run.settled:
                self._settle(run, None)
            self._free(run)

    def _cancelled(self, run: Run, error: asyncio.CancelledError) -> Exception | None:
        """What a cancelled run ended with; None where it was we who asked, so that it counts as no attempt."""
        if run.cause == "timeout":
            return RunTimeout(run.timeout)
        if run.cause is not None or self._ending():
            return None
        end = RunAborted("the run cancelled itself")
        end.__cause__ = error
        return end

    # --- how it ends

    def _settle(self, run: Run, end: Done | Exception | None) -> None:
        """Decide, once. None hands the job back."""
        run.settled, run.ended_at = True, time.monotonic()
        if end is None:
            self.released += not run.delivery.lost
            settlement: Settlement = Release()
        else:
            settlement = settlement_for(run.delivery, end, run.route.policy_for(run.envelope), self._random)
            if isinstance(end, Exception):
                self._log_end(run, end, settlement)
        self._finish(Finished(run.delivery, self._stamped(settlement, run), run.envelope.schema_name, run))

    def _log_end(self, run: Run, end: Exception, settlement: Settlement) -> None:
        """Type and place of a failure; never its text, which may hold payload."""
        level, then = _outlook(settlement)
        if _log.isEnabledFor(level):
            kind, place = _origin(end)
            job_id, attempt = run.envelope.id, run.delivery.attempt
            extra = about(run.delivery, self._worker, run.envelope.schema_name)
            _log.log(level, "job %s, attempt %d: %s%s; %s", job_id, attempt, kind, place, then, extra=extra)

    def _finish(self, finished: Finished) -> None:
        self.finished.append(finished)
        self._nudge()

    def _free(self, run: Run) -> None:
        if self._runs.pop(run.delivery, None) is not None:
            self.stuck -= run.stuck
            self._nudge()

    def _stamped(self, settlement: Settlement, run: Run | None) -> Settlement:
        """With the time and the worker written into its error."""
        if not isinstance(settlement, Retry | Dead) or settlement.error is None:
            return settlement
        now = datetime.now(UTC)
        started = None if run is None else datetime.fromtimestamp(now.timestamp() - time.monotonic() + run.started, UTC)
        return replace(
            settlement, error=replace(settlement.error, started_at=started, ended_at=now, worker=self._worker)
        )


def _origin(end: Exception) -> tuple[str, str]:
    """The class of a failure, and where it was raised."""
    there = end.__cause__ if isinstance(end, JobSignal) else end
    if isinstance(there, RunFailed):  # in another process
        return there.type.rpartition(".")[2], f" in {there.place}" if there.place else ""
    if isinstance(end, RunCrashed):
        return f"RunCrashed ({end})", ""
    frames = traceback.extract_tb(end.__traceback__, limit=-1)
    return type(end).__name__, f" in {frames[0].name}, {frames[0].filename}:{frames[0].lineno}" if frames else ""


def _outlook(settlement: Settlement) -> tuple[int, str]:
    """How loud to say that a run failed, and what becomes of the job."""
    match settlement:
        case Dead():
            return logging.ERROR, f"dead ({settlement.reason})"
        case Retry():
            return logging.WARNING, f"runs again in {settlement.delay:.1f} s"
        case Release():
            return logging.INFO, f"put off for {settlement.delay:.1f} s"
        case Done(discarded=None):
            return logging.ERROR, "lost, as ack='early' has it"
        case Done():
            return logging.INFO, "discarded"


def about(delivery: Delivery, worker: str, schema: str = "") -> dict[str, Any]:
    """The fields that a log record about a job carries."""
    return {
        "job_id": delivery.message.id,
        "queue": delivery.queue,
        "schema": schema,
        "attempt": delivery.attempt,
        "worker": worker,
    }
