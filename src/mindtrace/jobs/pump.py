"""`Pump`: settles what finished, takes what there is room for, starts it; until told to stop."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random

from mindtrace.jobs.accounts import Accounts
from mindtrace.jobs.ahead import LONG, Ahead
from mindtrace.jobs.backend import NO_OUTAGES, Receiver
from mindtrace.jobs.delivery import Delivery, Done, Exchanged, Release, Settled
from mindtrace.jobs.errors import (
    AuthenticationFailed,
    BackendUnavailable,
    Closed,
    QueueNotFound,
    Refused,
    UnknownSchema,
)
from mindtrace.jobs.health import Pulse
from mindtrace.jobs.memory import resident
from mindtrace.jobs.options import WorkerOptions
from mindtrace.jobs.processes import Processes
from mindtrace.jobs.routes import Routes
from mindtrace.jobs.runs import Finished, Run, Runs
from mindtrace.jobs.threads import BlockingRuns

_log = logging.getLogger(__name__)

SUSPECT_CRASHES = 2
"""Crashes from which on a job is suspected of killing its worker, and is run with no other suspect beside it."""
LONGEST_PAUSE = 1.0
"""Seconds between two tries where the broker is away."""
_WEIGH_EVERY = 0.1  # seconds; a look costs as much as a short job
_SETTLE_TIMEOUT = 2.0
_OVERLAPS = 32  # free slots, of which more are filled in two halves


class Pump:
    """The receive loop of one worker.

    Args:
        worker: its name.
        backend: the name of the one it receives from.
        options: what it is told.
        routes: who runs what.
        threads: where blocking runs are executed.
        processes: where those run whose class says so.
        ahead: what waits for a slot.
        random: the source of the jitter.
        stop_for: called with a `KeyboardInterrupt`, a `SystemExit` and the like that a run raised.
        ending: whether the loop is ending everything, the worker included.
    """

    def __init__(
        self,
        worker: str,
        backend: str,
        options: WorkerOptions,
        routes: Routes,
        *,
        threads: BlockingRuns,
        processes: Processes,
        ahead: Ahead,
        random: Random,
        stop_for: Callable[[BaseException], None],
        ending: Callable[[], bool],
    ) -> None:
        self.pulse: Pulse = Pulse(options.lease)
        self.accounts: Accounts = Accounts(worker, options.listeners)
        self.runs: Runs = Runs(
            worker=worker,
            threads=threads,
            processes=processes,
            grace=options.cancel_grace,
            policy=options.policy,
            random=random,
            listeners=options.listeners,
            nudge=self._on_change,
            ended=self._on_end,
            stop_for=stop_for,
            ending=ending,
        )
        self.stopping: float | None = None
        """When the drain is over, on the monotonic clock; None while it takes jobs."""
        self._worker, self._options, self._random = worker, options, random
        self._routes, self._ahead = routes, ahead
        self.receiver: Receiver | None = None
        """While it runs."""
        self._bound: asyncio.Timeout | None = None  # of the exchange under way
        self._patience: asyncio.TimerHandle | None = None
        self._extra = {"worker": worker}
        self._taken = 0
        self._backend, self._outages = backend, NO_OUTAGES
        self._failing_since: float | None = None  # on the monotonic clock
        self._began = self._weighed = time.monotonic()

    async def run(self, receiver: Receiver) -> None:
        """Until told to stop; then end what runs and settle it."""
        self.receiver, self._began = receiver, time.monotonic()
        self._outages = receiver.outages()
        try:
            try:
                await self._turn(receiver)
            finally:
                await self._wind_up(receiver)
        finally:
            self.receiver = None
            self.pulse.ended()

    def stop(self, drain: float) -> None:
        """Take no more, and let what runs end within so many seconds."""
        self.stopping = time.monotonic() + drain
        self._bound_by(self.stopping)
        self._hand_back_waiting()
        self.nudge()

    def lose(self, delivery: Delivery) -> None:
        """Its lease is gone."""
        run = self.runs.lose(delivery)
        if run is not None:
            self.accounts.lost(run)
            self.nudge()

    def nudge(self) -> None:
        """There is something to settle, or a slot is free: have the wait for jobs end."""
        if self.receiver is not None:
            self.receiver.nudge()

    # --- one turn after the other

    async def _turn(self, receiver: Receiver) -> None:
        failures = 0
        options = self._options
        while True:
            if self.accounts.news:
                await self.accounts.tell()
            finished, self.runs.finished = self.runs.finished, []
            if self.stopping is None and self._is_spent():
                self._drain()
            stopping = self.stopping
            if stopping is not None and not finished and (self.runs.all_given_up() or time.monotonic() >= stopping):
                return
            wait = options.poll_timeout
            if stopping is not None:
                wait = max(0.001, min(wait, stopping - time.monotonic()))
            room = self._room()
            if options.until_idle and (room or not self.runs) and self.runs.all_given_up():
                wait = 0.0
            self.pulse.asks(bool(finished), wait)
            try:
                exchanged = await self._exchange(receiver, finished, room, wait)
                outage = _outage_of(exchanged)
            except AuthenticationFailed:
                raise  # it would be refused again
            except BackendUnavailable as error:
                exchanged, outage = Exchanged([], []), error
            if outage is not None:
                failures += 1
                self.pulse.failed()
                self._note_failure(outage)
                await self._account(finished, exchanged.settled)
                await asyncio.sleep(self._random.uniform(0.1, min(LONGEST_PAUSE, 0.2 * 2 ** min(failures, 6))))
                continue
            failures = 0
            self.pulse.answered()
            self._note_answer(receiver)
            refused = 0
            if exchanged.deliveries:
                refused = await self._begin(receiver, exchanged.deliveries)
            if finished:
                await self._account(finished, exchanged.settled)
            if exchanged.missing:
                raise QueueNotFound(exchanged.missing[0])
            if exchanged.deliveries:
                if refused:
                    await asyncio.sleep(0)  # what is refused unrun would keep the loop for as long as there is more
                continue
            looked = room > 0 and not (stopping or finished or self.runs.finished)
            if options.until_idle and looked and self.runs.all_given_up():
                self._drain()  # there was room for a job, and there was none

    async def _exchange(self, receiver: Receiver, finished: list[Finished], room: int, wait: float) -> Exchanged:
        """Settle and take. Who stops waits for the answer until the drain is over, and 2 s at least."""
        pairs = [(end.delivery, end.settlement) for end in finished]
        try:
            async with asyncio.timeout(None) as self._bound:
                if self.stopping is not None:
                    self._bound_by(self.stopping)
                return await receiver.exchange(pairs, room, wait=wait)
        except TimeoutError:
            unknown = BackendUnavailable("no answer from the broker until the worker had to end")
            return Exchanged([unknown for _ in pairs], [])
        finally:
            self._bound = None

    def _bound_by(self, stopping: float) -> None:
        if self._bound is not None and not self._bound.expired():
            left = max(stopping - time.monotonic(), _SETTLE_TIMEOUT)
            self._bound.reschedule(asyncio.get_running_loop().time() + left)

    async def _account(self, finished: Sequence[Finished], answers: Sequence[Settled]) -> None:
        """Of what is not settled as the worker stops nobody knows: it comes back when its lease ends."""
        if self.stopping is not None:
            self.runs.released += sum(
                isinstance(answer, BackendUnavailable) and not isinstance(end.settlement, Release)
                for end, answer in zip(finished, answers, strict=False)
            )
        await self.accounts.settled(finished[: len(answers)], answers)

    def _note_failure(self, error: BackendUnavailable) -> None:
        """Once for all tries until there is an answer: an outage may last for days."""
        level = logging.WARNING if self._failing_since is None else logging.DEBUG
        _log.log(level, "worker %s: %s", self._worker, error, extra=self._extra)
        self._failing_since = self._failing_since or time.monotonic()

    def _note_answer(self, receiver: Receiver) -> None:
        before, self._outages = self._outages, receiver.outages()
        since, self._failing_since = self._failing_since, None
        if self._outages is not before:
            self.accounts.reconnected(self._backend, self._outages.seconds - before.seconds)
        elif since is not None:  # a connection that had never been up
            self.accounts.reconnected(self._backend, time.monotonic() - since)

    def _is_spent(self) -> bool:
        """Whether it has done what a worker is to do in its life, so that it is time for a new one."""
        options, now = self._options, time.monotonic()
        if options.max_jobs is not None and self._taken >= options.max_jobs:
            return self.runs.all_given_up()
        if options.max_age is not None and now - self._began >= options.max_age:
            _log.info("worker %s: %.0f s old, draining (max_age)", self._worker, now - self._began, extra=self._extra)
            return True
        if options.max_memory is not None and now - self._weighed >= _WEIGH_EVERY:
            self._weighed = now
            if (mib := resident()) > options.max_memory:
                _log.info("worker %s: %.0f MiB resident, draining (max_memory)", self._worker, mib, extra=self._extra)
                return True
        return False

    def _drain(self) -> None:
        if self.stopping is None:
            self.stop(self._options.drain)

    def _room(self) -> int:
        """How many more deliveries there is room for."""
        if self.stopping is not None:
            return 0
        concurrency, max_jobs = self._options.concurrency, self._options.max_jobs
        room = self._ahead.room(concurrency - len(self.runs))
        if room > _OVERLAPS:
            # While one half runs the other is on its way: a fifth more jobs with 100 slots. Of smaller batches the
            # round trips cost more than that.
            room = min(room, max(_OVERLAPS, (concurrency + 1) // 2))
        return room if max_jobs is None else min(room, max_jobs - self._taken)

    async def _begin(self, receiver: Receiver, deliveries: list[Delivery]) -> int:
        """Start them; but first settle what must not be in flight beside them. Returns how many are not run."""
        refused = 0
        first: list[Finished] = []
        runs: list[Run] = []
        suspect = self.runs.any(_is_suspect)
        self._taken += len(deliveries)
        for delivery in deliveries:
            if _is_suspect(delivery):
                if suspect:
                    # A poison job returns beside the jobs it took down: run together again, they would die with it.
                    first.append(Finished(delivery, Release(1.0)))
                    self._taken -= 1
                    continue
                suspect = True
            if len(self.runs) + len(runs) >= self._options.concurrency:
                self._ahead.add(delivery)
            elif (run := self._run_of(delivery)) is None:
                refused += 1
            else:
                runs.append(run)
                if run.route.consumer.ack == "early":
                    first.append(Finished(delivery, Done(), run.envelope.schema_name))
        gone = await self._settle_first(receiver, first) if first else frozenset[Delivery]()
        for run in runs:
            if run.delivery not in gone and not run.delivery.lost:
                run.settled = run.route.consumer.ack == "early"
                self._ahead.started()
                self.runs.start(run)
        if len(self._ahead) and self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(LONG, self._on_patience)
        return refused

    def _run_of(self, delivery: Delivery) -> Run | None:
        """What is to be run; None where it cannot be, and is settled at once."""
        try:
            route, envelope = self._routes.find(delivery)
        except (Refused, UnknownSchema) as error:
            if isinstance(error, UnknownSchema):
                self.accounts.unknown(delivery, error)
            self.runs.refuse(delivery, error)
            return None
        return Run(delivery, route, envelope, self._worker)

    async def _settle_first(self, receiver: Receiver, first: list[Finished]) -> frozenset[Delivery]:
        """Settle before anything is run. Returns those for which that failed: they are not to be run."""
        settled = (await receiver.exchange([(f.delivery, f.settlement) for f in first], 0)).settled
        await self.accounts.settled(first, settled)
        return frozenset(f.delivery for f, answer in zip(first, settled, strict=True) if answer is not None)

    # --- what waits for a slot

    def _on_change(self) -> None:
        """There is something to settle, or a slot is free: give it to who waits for it, if anyone does."""
        if self._ahead.most:
            self._start_waiting()
        self.nudge()

    def _on_end(self, run: Run) -> None:
        if self._ahead.most:
            self._ahead.ended(time.monotonic() - run.started)

    def _start_waiting(self) -> None:
        while len(self.runs) < self._options.concurrency and (delivery := self._ahead.next()) is not None:
            run = self._run_of(delivery)
            if run is not None:
                self._ahead.started()
                self.runs.start(run)

    def _on_patience(self) -> None:
        """While deliveries wait behind a run: hand them back if it takes long."""
        self._patience = None
        if len(self._ahead):
            held_up_for = self._ahead.held_up_for()
            if held_up_for >= LONG:
                self._hand_back_waiting()
                self.nudge()
            else:
                self._patience = asyncio.get_running_loop().call_later(LONG - held_up_for, self._on_patience)

    def _hand_back_waiting(self) -> None:
        given_up = self._ahead.give_up()
        self._taken -= len(given_up)
        self.runs.finished += [Finished(delivery, Release()) for delivery in given_up]

    # --- the end

    async def _wind_up(self, receiver: Receiver) -> None:
        """End what runs and settle what ended: the one duty that a shutdown may not interrupt, so it has a bound."""
        self.pulse.waits(self._options.cancel_grace + _SETTLE_TIMEOUT)
        try:
            await self.runs.wind_up()
        finally:
            last = asyncio.get_running_loop().create_task(self._settle_last(receiver))
            cancelled: asyncio.CancelledError | None = None
            while not last.done():
                try:
                    await asyncio.wait({last})
                except asyncio.CancelledError as error:
                    cancelled = error
            if cancelled is not None:
                raise cancelled
            last.result()

    async def _settle_last(self, receiver: Receiver) -> None:
        finished, self.runs.finished = self.runs.finished, []
        if finished:
            answers: Sequence[Settled] = [BackendUnavailable("no answer from the broker in time") for _ in finished]
            with suppress(TimeoutError, BackendUnavailable, Closed):
                async with asyncio.timeout(_SETTLE_TIMEOUT):
                    answers = (await receiver.exchange([(f.delivery, f.settlement) for f in finished], 0)).settled
            await self._account(finished, answers)
        await self.accounts.tell()


def _is_suspect(delivery: Delivery) -> bool:
    return delivery.crashes >= SUSPECT_CRASHES


def _outage_of(exchanged: Exchanged) -> BackendUnavailable | None:
    """Why nothing of it reached the broker, if nothing did."""
    if exchanged.deliveries or exchanged.missing or not exchanged.settled:
        return None
    errors = [answer for answer in exchanged.settled if isinstance(answer, BackendUnavailable)]
    return errors[0] if len(errors) == len(exchanged.settled) else None
