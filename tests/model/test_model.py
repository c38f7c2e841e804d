"""A backend against a dict: whatever is done to a queue, in whatever order, both say the same afterwards.

The dict knows one queue, three receivers and the rules by which jobs move, written down a second time and as plainly as
can be. Time is a number that only `time_passes` changes, so that leases and delays end exactly when the dict says.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

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
SETTLEMENTS: st.SearchStrategy[Settlement] = st.sampled_from(
    [Done(), Retry(0.0), Retry(3.0), Release(), Release(3.0), Dead("rejected"), Dead("timeout")]
)


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

    ids: Bundle[JobId] = Bundle("ids")
    deliveries: Bundle[Delivery] = Bundle("deliveries")

    def __init__(self) -> None:
        super().__init__()
        self.clock = StandingClock()
        self.loop = asyncio.new_event_loop()
        self.opened = local_backend(self.clock)
        self.backend = self.do(self.opened.__aenter__())
        self.receivers: list[tuple[Callable[[], Coroutine[Any, Any, object]], Receiver]] = []
        self.jobs: dict[JobId, ModelJob] = {}
        self.ended: dict[JobId, float] = {}  # ids of jobs that are done or were cleaned, and when
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

    # the rules

    @initialize(kind=st.sampled_from(["fifo", "priority", "stack"]), max_length=st.sampled_from([None, None, 5]))
    def declare(self, kind: Literal["fifo", "priority", "stack"], max_length: int | None) -> None:
        self.spec = QueueSpec(QUEUE, kind, max_length=max_length)
        self.do(self.backend.declare(self.spec))
        self.receivers = [self.enter(terms) for terms in RECEIVERS]

    @rule(
        target=ids,
        jobs=st.lists(
            st.tuples(
                st.integers(-2, 2), st.sampled_from([0.0, 0.0, 0.0, 2.0, 20.0]), st.sampled_from([None, None, 1, 2])
            ),
            min_size=1,
            max_size=4,
        ),
        twice=st.booleans(),
    )
    def publish(self, jobs: list[tuple[int, float, int | None]], twice: bool) -> Any:
        messages = [
            Message(
                f"job-{self.next_number()}",
                b"{}",
                priority=priority if self.spec.kind == "priority" else 0,
                delay=delay,
                crash_limit=crash_limit,
            )
            for priority, delay, crash_limit in jobs
        ]
        waiting = len(self.those("ready")) + len(self.those("scheduled"))
        full = self.spec.max_length is not None and waiting + len(messages) > self.spec.max_length
        outcomes = self.do(self.backend.publish(QUEUE, messages))
        assert [type(outcome) if full else outcome for outcome in outcomes] == [
            QueueFull if full else "stored" for _ in messages
        ]
        if not full:
            for message in messages:
                job = self.jobs[message.id] = ModelJob(message)
                if message.delay:
                    self.schedule(job, message.delay)
                else:
                    self.to_the_back(job)
        return multiple(*(message.id for message in messages))

    @rule(job_id=ids)
    def publish_again(self, job_id: JobId) -> None:
        """Another body under an id of before: stored only if the id is no longer known."""
        waiting = len(self.those("ready")) + len(self.those("scheduled"))
        message = Message(job_id, b'"another"')
        [outcome] = self.do(self.backend.publish(QUEUE, [message]))
        ended = self.clock.time - self.ended.get(job_id, -FORGOTTEN)
        if job_id in self.jobs or ended < KNOWN:
            assert outcome == "duplicate"
        elif outcome == "duplicate":
            assert ended < FORGOTTEN
        elif self.spec.max_length is not None and waiting >= self.spec.max_length:
            assert isinstance(outcome, QueueFull)
        else:
            assert outcome == "stored"
            self.ended.pop(job_id, None)
            self.to_the_back(self.jobs.setdefault(job_id, ModelJob(message)))

    @rule(target=deliveries, which=st.integers(0, 2), limit=st.integers(1, 4))
    def receive(self, which: int, limit: int) -> Any:
        return self.exchange(which, [], limit)

    @rule(
        target=deliveries,
        pairs=st.lists(st.tuples(deliveries, SETTLEMENTS), min_size=1, max_size=4),
        which=st.integers(0, 2),
        limit=st.integers(0, 2),
    )
    def settle_and_receive(self, pairs: list[tuple[Delivery, Settlement]], which: int, limit: int) -> Any:
        """Also what was settled before, what has lapsed, and what is another's."""
        return self.exchange(which, pairs, limit)

    def exchange(self, which: int, chosen: Sequence[tuple[Delivery, Settlement]], limit: int) -> Any:
        pairs: list[tuple[Delivery, Settlement]] = []
        for delivery, settlement in chosen:
            if isinstance(settlement, Retry | Dead):
                error = RunError("ValueError", str(self.next_number()))
                if isinstance(settlement, Retry):
                    settlement = Retry(settlement.delay, error=error)
                else:
                    settlement = Dead(settlement.reason, error)
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
        return multiple(*exchanged.deliveries)

    @rule(delivery=deliveries, which=st.integers(0, 2))
    def extend(self, delivery: Delivery, which: int) -> None:
        [outcome] = self.do(self.receivers[which][1].extend([delivery]))
        job = self.held(delivery)
        if job is not None and job.holder == which:
            assert outcome is None
            job.lapses = max(job.lapses, self.clock.time + RECEIVERS[which].lease)
        else:
            assert isinstance(outcome, LeaseLost)

    @rule(seconds=st.sampled_from([0.5, 2.0, 3.0, 10.0, 10.5, 30.0, 61.0, 130.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.time += seconds

    @rule(which=st.integers(0, 2))
    def leave_and_come_again(self, which: int) -> None:
        leave, _ = self.receivers[which]
        self.do(leave())
        for job in self.those("leased"):
            if job.holder == which:
                self.settle(job, Release())
        self.receivers[which] = self.enter(RECEIVERS[which])

    @precondition(lambda self: len(self.those("leased")) > 1)
    @rule()
    def close_and_open(self) -> None:
        self.do(self.backend.aclose())
        for job in self.those("leased"):
            self.settle(job, Release())
        self.do(self.backend.open())
        for leave, _ in self.receivers:
            self.do(leave())
        self.receivers = [self.enter(terms) for terms in RECEIVERS]

    @precondition(lambda self: len(self.those("ready")) + len(self.those("scheduled")) > 2)
    @rule()
    def clean(self) -> None:
        waiting = [*self.those("ready"), *self.those("scheduled")]
        assert self.do(self.backend.clean(QUEUE)) == len(waiting)
        for job in waiting:
            self.end(job)

    @rule(force=st.sampled_from([False, False, False, True]))
    def delete_and_declare_anew(self, force: bool) -> None:
        lapsed = self.lapsed()
        in_use = [job for job in self.jobs.values() if job.state in ("leased", "dead") and job not in lapsed]
        if in_use and not force:
            with pytest.raises(QueueInUse):
                self.do(self.backend.delete(QUEUE))
            return
        self.do(self.backend.delete(QUEUE, force=force))
        self.do(self.backend.declare(self.spec))
        self.jobs.clear()
        self.ended.clear()

    @precondition(lambda self: self.those("dead"))
    @rule(data=st.data(), by_filter=st.booleans(), replay=st.booleans())
    def replay_or_purge(self, data: st.DataObject, by_filter: bool, replay: bool) -> None:
        letters = self.backend.dead_letters(QUEUE)
        dead = sorted(self.those("dead"), key=lambda job: job.since)
        if by_filter:
            chosen = [job for job in dead if job.reason == "rejected"]
            which: DeadFilter | list[JobId] = DeadFilter("rejected")
        else:
            chosen = data.draw(st.lists(st.sampled_from(dead), unique_by=lambda job: job.message.id))
            which = [job.message.id for job in chosen]
        done = self.do(letters.replay(which) if replay else letters.purge(which))
        assert done == len(chosen)
        for job in chosen:
            if replay:
                job.attempts = job.crashes = job.releases = 0
                job.replays += 1
                self.to_the_back(job)
            else:
                del self.jobs[job.message.id]

    @rule(job_id=ids)
    def look_for(self, job_id: JobId) -> None:
        job = self.jobs.get(job_id)
        looking = self.backend.dead_letters(QUEUE).get(job_id)
        if job is None or job.state != "dead":
            with pytest.raises(JobNotFound):
                self.do(looking)
            return
        record = self.do(looking)
        assert (record.message, record.reason, record.replays) == (job.message, job.reason, job.replays)
        assert (record.attempts, record.crashes, record.releases, record.number) == (
            job.attempts,
            job.crashes,
            job.releases,
            job.number,
        )
        assert [error.message for error in record.errors] == job.errors[-10:]

    # what always holds

    @invariant()
    def the_depth_is_that_of_the_dict(self) -> None:
        if not self.receivers:
            return  # not yet declared
        due = sum(job.due <= self.clock.time for job in self.those("scheduled"))
        lapsed = len(self.lapsed())
        depth = self.do(self.backend.depth(QUEUE))
        assert depth == Depth(
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
        assert sorted(record.message.id for record in records) == sorted(job.message.id for job in self.those("dead"))

    @invariant()
    def a_delivery_is_marked_as_lost_only_where_it_is(self) -> None:
        for job in self.those("leased"):
            assert job.delivery is not None
            assert not job.delivery.lost


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, print_blob=True)
