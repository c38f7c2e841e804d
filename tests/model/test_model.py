"""A backend against a dict: whatever is done to a queue, in whatever order, both say the same afterwards.

The dict knows one queue, three receivers and the rules by which jobs move, written down a second time and as plainly as
can be. Time is a number that only `time_passes` changes, so that leases and delays end exactly when the dict says.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mindtrace.jobs import (
    Backend,
    Dead,
    Delivery,
    Depth,
    Done,
    JobNotFound,
    LeaseLost,
    QueueFull,
    QueueInUse,
    QueueSpec,
    Receiver,
    Release,
    Retry,
    RunError,
    Settlement,
)
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import JobId
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.local

T = TypeVar("T")

QUEUE = "jobs"
KNOWN, FORGOTTEN = 60.0, 120.0  # seconds after its end that an id is known for certain, and that it is not
JOBS = st.tuples(  # priority, delay, crash limit
    st.integers(-2, 2), st.sampled_from([0.0, 0.0, 0.0, 0.0, 2.0, 20.0]), st.sampled_from([None, None, 1, 2])
)
SETTLEMENTS: st.SearchStrategy[Settlement] = st.sampled_from(
    [
        Done(),
        Retry(0.0),
        Retry(3.0),
        Retry(0.0, crash=True),
        Release(),
        Release(3.0),
        Dead("rejected"),
        Dead("timeout"),
        Dead("crash_limit", crash=True),
    ]
)
ENDS = st.lists(st.tuples(st.integers(0, 9), SETTLEMENTS), min_size=1, max_size=3)


@dataclass(frozen=True)
class Terms:
    """Of one receiver."""

    slots: int
    lease: float
    keep: bool
    crash_limit: int


RECEIVERS = (Terms(3, 10.0, False, 2), Terms(2, 30.0, False, 3), Terms(3, 10.0, True, 5))


class StandingClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def wall(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.time)

    async def until(self, when: float) -> None:
        assert when <= self.time, "nothing in the model waits"


@dataclass
class ModelJob:
    """A job that is scheduled, ready, leased or dead."""

    message: Message
    state: Literal["scheduled", "ready", "leased", "dead"] = "ready"
    place: int = 0  # in its queue; while scheduled or leased, among those
    since: int = 0  # which lease or death, of all
    due: float = 0.0
    attempts: int = 0
    crashes: int = 0
    releases: int = 0
    number: int = 0
    replays: int = 0
    errors: list[str] = field(default_factory=list[str])
    reason: str = ""
    holder: int = -1
    delivery: Delivery | None = None
    lapses: float = 0.0


@asynccontextmanager
async def local_backend(clock: StandingClock) -> AsyncIterator[Backend]:
    backend = LocalBackend(clock=clock)
    await backend.open()
    yield backend
    await backend.aclose()


class Jobs(RuleBasedStateMachine):
    """The rules. Each does one thing to both sides and compares the answers; the invariants compare the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = StandingClock()
        self.loop = asyncio.new_event_loop()
        self.opened = local_backend(self.clock)
        self.backend = self.do(self.opened.__aenter__())
        self.receivers: list[tuple[Callable[[], Coroutine[Any, Any, object]], Receiver]] = []
        self.jobs: dict[JobId, ModelJob] = {}
        self.ended: dict[JobId, float] = {}  # ids of jobs that are done or were cleaned, and when
        self.ids: list[JobId] = []  # all there ever were
        self.handed_out: list[Delivery] = []
        self.count = 0

    def do(self, step: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(step, 10))

    def enter(self, terms: Terms) -> "tuple[Callable[[], Coroutine[Any, Any, object]], Receiver]":
        entered = self.backend.receiver(
            [QUEUE], slots=terms.slots, lease=terms.lease, keep=terms.keep, crash_limit=terms.crash_limit
        )
        receiver = self.do(entered.__aenter__())
        return lambda: entered.__aexit__(None, None, None), receiver

    def teardown(self) -> None:
        for leave, _ in self.receivers:
            self.do(leave())
        self.do(self.opened.__aexit__(None, None, None))
        self.loop.close()

    # the dict's side

    def next_number(self) -> int:
        self.count += 1
        return self.count

    def those(self, state: str) -> list[ModelJob]:
        return [job for job in self.jobs.values() if job.state == state]

    def to_the_back(self, job: ModelJob) -> None:
        job.state, job.place = "ready", self.next_number()

    def schedule(self, job: ModelJob, delay: float) -> None:
        job.state, job.due, job.place = "scheduled", self.clock.time + delay, self.next_number()

    def bury(self, job: ModelJob, reason: str) -> None:
        job.state, job.reason, job.since = "dead", reason, self.next_number()

    def end(self, job: ModelJob) -> None:
        del self.jobs[job.message.id]
        self.ended[job.message.id] = self.clock.time

    def promote(self) -> None:
        for job in sorted(self.those("scheduled"), key=lambda job: (job.due, job.place)):
            if job.due <= self.clock.time:
                self.to_the_back(job)

    def lapsed(self) -> list[ModelJob]:
        leased = sorted(self.those("leased"), key=lambda job: job.since)
        return [job for job in leased if not RECEIVERS[job.holder].keep and job.lapses < self.clock.time]

    def collect(self, crash_limit: int) -> None:
        for job in self.lapsed():
            job.crashes += 1
            job.delivery = None
            limit = job.message.crash_limit
            if job.crashes >= (crash_limit if limit is None else limit):
                self.bury(job, "crash_limit")
            else:
                job.state = "ready"  # in the place it had

    def hand_out(self, which: int, limit: int) -> list[ModelJob]:
        terms = RECEIVERS[which]
        free = terms.slots - sum(job.holder == which for job in self.those("leased"))
        newest_first = -1 if self.spec.kind == "stack" else 1
        ready = sorted(self.those("ready"), key=lambda job: (-job.message.priority, newest_first * job.place))
        given = ready[: max(0, min(free, limit))]
        for job in given:
            job.state, job.holder, job.since = "leased", which, self.next_number()
            job.lapses = self.clock.time + terms.lease
            job.attempts += 1
            job.number += 1
        return given

    def settle(self, job: ModelJob, settlement: Settlement) -> None:
        job.delivery = None
        if isinstance(settlement, Retry | Dead):
            job.crashes += settlement.crash
        if isinstance(settlement, Done):
            self.end(job)
        elif isinstance(settlement, Dead):
            if settlement.error is not None:
                job.errors.append(settlement.error.message)
            self.bury(job, settlement.reason)
        elif isinstance(settlement, Retry):
            if settlement.error is not None:
                job.errors.append(settlement.error.message)
            if settlement.delay:
                self.schedule(job, settlement.delay)
            else:
                self.to_the_back(job)
        else:
            job.attempts -= 1
            job.releases += 1
            if settlement.delay:
                self.schedule(job, settlement.delay)
            else:
                job.state = "ready"

    def held(self, delivery: Delivery) -> ModelJob | None:
        job = self.jobs.get(delivery.message.id)
        return job if job is not None and job.state == "leased" and job.delivery is delivery else None

    def some_delivery(self, which: int, index: int) -> Delivery | None:
        """One that this receiver holds; or, now and then, any of the last ten: settled, lapsed or another's."""
        held = [job.delivery for job in self.those("leased") if job.holder == which]
        choice = held if held and index < 8 else self.handed_out[-10:]
        return choice[index % len(choice)] if choice else None

    # the rules

    @initialize(
        kind=st.sampled_from(["fifo", "priority", "stack"]),
        max_length=st.sampled_from([None, None, 6]),
        jobs=st.lists(JOBS, min_size=2, max_size=6),
    )
    def declare(
        self,
        kind: Literal["fifo", "priority", "stack"],
        max_length: int | None,
        jobs: list[tuple[int, float, int | None]],
    ) -> None:
        self.spec = QueueSpec(QUEUE, kind, max_length=max_length)
        self.do(self.backend.declare(self.spec))
        self.receivers = [self.enter(terms) for terms in RECEIVERS]
        self.publish_these(jobs, set())

    @rule(new=st.lists(JOBS, max_size=4), old=st.sets(st.integers(0, 30), max_size=2))
    def publish(self, new: list[tuple[int, float, int | None]], old: set[int]) -> None:
        self.publish_these(new, old)

    def publish_these(self, new: list[tuple[int, float, int | None]], old: set[int]) -> None:
        """Jobs of new ids, then others under ids of before: those are stored only where the id is no longer known."""
        messages = {
            job_id: Message(job_id, b'"another"') for job_id in (self.ids[i % len(self.ids)] for i in old if self.ids)
        }
        for priority, delay, crash_limit in new:
            self.ids.append(f"job-{self.next_number()}")
            if self.spec.kind != "priority":
                priority = 0
            messages[self.ids[-1]] = Message(self.ids[-1], b"{}", priority, delay, crash_limit=crash_limit)
        outcomes = dict(zip(messages, self.do(self.backend.publish(QUEUE, list(messages.values()))), strict=True))
        for job_id, outcome in outcomes.items():
            since = self.clock.time - self.ended.get(job_id, -math.inf)
            if job_id in self.jobs or since < KNOWN:
                assert outcome == "duplicate"
            elif since >= FORGOTTEN:
                assert outcome != "duplicate"
        fresh = [job_id for job_id, outcome in outcomes.items() if outcome != "duplicate"]
        waiting = len(self.those("ready")) + len(self.those("scheduled"))
        if fresh and self.spec.max_length is not None and waiting + len(fresh) > self.spec.max_length:
            assert all(isinstance(outcomes[job_id], QueueFull) for job_id in fresh)
            return
        assert all(outcomes[job_id] == "stored" for job_id in fresh)
        for job_id in fresh:
            self.ended.pop(job_id, None)
            job = self.jobs[job_id] = ModelJob(messages[job_id])
            if job.message.delay:
                self.schedule(job, job.message.delay)
            else:
                self.to_the_back(job)

    @rule(which=st.integers(0, 2), limit=st.integers(1, 4))
    def receive(self, which: int, limit: int) -> None:
        self.exchange(which, [], limit)

    @precondition(lambda self: self.those("leased"))
    @rule(which=st.integers(0, 2), ends=ENDS)
    def settle_some(self, which: int, ends: list[tuple[int, Settlement]]) -> None:
        self.exchange(which, ends, 0)

    @rule(which=st.integers(0, 2), ends=ENDS, limit=st.integers(1, 4))
    def settle_and_receive(self, which: int, ends: list[tuple[int, Settlement]], limit: int) -> None:
        self.exchange(which, ends, limit)

    def exchange(self, which: int, ends: list[tuple[int, Settlement]], limit: int) -> None:
        pairs: list[tuple[Delivery, Settlement]] = []
        for index, settlement in ends:
            if isinstance(settlement, Retry | Dead):
                settlement = replace(settlement, error=RunError("ValueError", str(self.next_number())))
            if delivery := self.some_delivery(which, index):
                pairs.append((delivery, settlement))
        exchanged = self.do(self.receivers[which][1].exchange(pairs, limit))
        for (delivery, settlement), outcome in zip(pairs, exchanged.settled, strict=True):
            job = self.held(delivery)
            if job is not None and job.holder == which:
                assert outcome is None
                self.settle(job, settlement)
            else:
                assert isinstance(outcome, LeaseLost)
        self.promote()
        given: list[ModelJob] = []
        if limit:
            self.collect(RECEIVERS[which].crash_limit)
            given = self.hand_out(which, limit)
        assert [(d.message, d.attempt, d.crashes, d.releases, d.number) for d in exchanged.deliveries] == [
            (job.message, job.attempts, job.crashes, job.releases, job.number) for job in given
        ]
        for job, delivery in zip(given, exchanged.deliveries, strict=True):
            job.delivery = delivery
            self.handed_out.append(delivery)

    @rule(which=st.integers(0, 2), index=st.integers(0, 9))
    def extend(self, which: int, index: int) -> None:
        delivery = self.some_delivery(which, index)
        if delivery is None:
            return
        [outcome] = self.do(self.receivers[which][1].extend([delivery]))
        job = self.held(delivery)
        if job is not None and job.holder == which:
            assert outcome is None
            job.lapses = max(job.lapses, self.clock.time + RECEIVERS[which].lease)
        else:
            assert isinstance(outcome, LeaseLost)

    @rule(seconds=st.sampled_from([0.5, 2.0, 3.0, 10.0, 10.5, 20.0, 30.5, 61.0, 130.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.time += seconds

    @rule(which=st.integers(0, 3))
    def leave_or_close(self, which: int) -> None:
        """One receiver is left and another entered, or the backend is closed with all of them and opened again."""
        left = [0, 1, 2] if which == 3 else [which]
        for job in self.those("leased"):
            if job.holder in left:
                self.settle(job, Release())
        if which == 3:
            self.do(self.backend.aclose())
            self.do(self.backend.open())
            self.the_depth_is_that_of_the_dict()
        for index in left:
            self.do(self.receivers[index][0]())
            self.receivers[index] = self.enter(RECEIVERS[index])

    @rule(how=st.sampled_from(["clean", "clean", "delete", "delete", "force"]))
    def clean_or_delete(self, how: str) -> None:
        waiting = [*self.those("ready"), *self.those("scheduled")]
        if how == "clean":
            assert self.do(self.backend.clean(QUEUE)) == len(waiting)
            for job in waiting:
                self.end(job)
            return
        in_use = len(self.jobs) - len(waiting) - len(self.lapsed())
        if in_use and how == "delete":
            with pytest.raises(QueueInUse):
                self.do(self.backend.delete(QUEUE))
            return
        self.do(self.backend.delete(QUEUE, force=how == "force"))
        self.do(self.backend.declare(self.spec))
        self.jobs.clear()
        self.ended.clear()

    @precondition(lambda self: self.those("dead"))
    @rule(
        chosen=st.none() | st.lists(st.integers(0, 9), max_size=4),
        verb=st.sampled_from(["replay", "replay", "purge", "neither"]),
    )
    def replay_or_purge(self, chosen: list[int] | None, verb: str) -> None:
        """Some, each once however often it is named; or all that were rejected."""
        letters = self.backend.dead_letters(QUEUE)
        dead = sorted(self.those("dead"), key=lambda job: job.since)
        if chosen is None:
            jobs = [job for job in dead if job.reason == "rejected"]
            which: DeadFilter | list[JobId] = DeadFilter("rejected")
        else:
            jobs = [dead[index % len(dead)] for index in dict.fromkeys(index % len(dead) for index in chosen)]
            which = [dead[index % len(dead)].message.id for index in chosen]
        if verb == "neither":  # one of them is not there
            with pytest.raises(JobNotFound):
                self.do(letters.replay([*(job.message.id for job in jobs), "no-such-job"]))
            return
        assert self.do(letters.replay(which) if verb == "replay" else letters.purge(which)) == len(jobs)
        for job in jobs:
            if verb == "replay":
                job.attempts = job.crashes = job.releases = 0
                job.replays += 1
                self.to_the_back(job)
            else:
                del self.jobs[job.message.id]

    # what always holds

    @invariant()
    def the_depth_is_that_of_the_dict(self) -> None:
        if not self.receivers:
            return  # not yet declared
        due = sum(job.due <= self.clock.time for job in self.those("scheduled"))
        lapsed = len(self.lapsed())
        assert self.do(self.backend.depth(QUEUE)) == Depth(
            len(self.those("ready")) + due + lapsed,
            len(self.those("scheduled")) - due,
            len(self.those("leased")) - lapsed,
            len(self.those("dead")),
        )

    @invariant()
    def the_dead_are_those_of_the_dict_newest_first(self) -> None:
        if not self.receivers:
            return
        records = self.do(self.backend.dead_letters(QUEUE).list(DeadFilter(), limit=1000)).records
        died = [record.died_at for record in records]
        assert died == sorted(died, reverse=True)
        assert len(records) == len(self.those("dead"))
        for record in records:
            job = self.jobs[record.message.id]
            assert job.state == "dead"
            assert (record.message, record.reason, record.replays) == (job.message, job.reason, job.replays)
            assert (record.attempts, record.crashes, record.releases, record.number) == (
                job.attempts,
                job.crashes,
                job.releases,
                job.number,
            )
            assert [error.message for error in record.errors] == job.errors[-10:]

    @invariant()
    def no_delivery_is_lost_that_is_held(self) -> None:
        for job in self.those("leased"):
            assert job.delivery is not None
            assert not job.delivery.lost


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=200, stateful_step_count=50, deadline=None, print_blob=True)
