"""One local queue: its jobs, their states and the moves between them. No move has an await in it.

    publish ──> scheduled ──due──> ready ──receive──> leased ──Done──> (id remembered for a minute)
            └──────────────────────^  ^                │ ├──Retry──> scheduled
                                      │                │ ├──Dead───> dead ──replay──> ready
                                      └──lapse, Release┘ └──lapse at crash_limit──> dead

`jobs` holds every job that is scheduled, ready or leased. The heaps beside it hold keys only; an entry whose job has
moved on since is skipped when it comes up.
"""

import asyncio
import heapq
import logging
import math
from collections.abc import Sequence
from typing import Literal, Protocol

from mindtrace.jobs.backend import DEAD_LETTERS_MANY, Depth, QueueSpec
from mindtrace.jobs.backends.local.clock import Clock
from mindtrace.jobs.delivery import (
    Dead,
    DeadReason,
    DeadRecord,
    Delivery,
    Done,
    Published,
    Retry,
    RunError,
    Settlement,
    with_error,
)
from mindtrace.jobs.errors import ConfigError, JobsError, NotSupported, QueueFull
from mindtrace.jobs.job import JobId
from mindtrace.jobs.wire import Message

_log = logging.getLogger(__name__)

NAME = "local"
_REMEMBERED = 60.0  # seconds that a finished job's bare id stays known, at least


class Holder(Protocol):
    """What a queue knows of a receiver: it holds deliveries, and can be woken."""

    keep: bool
    lease: float
    held: "dict[Delivery, tuple[Queue, StoredJob]]"

    def lose(self, delivery: Delivery) -> None:
        """This delivery is no longer held."""
        ...

    def wake(self) -> None:
        """There may be something to take."""
        ...

    def nudge(self) -> None:
        """End the wait."""
        ...


class StoredJob:
    """A job's message and the state beside it."""

    __slots__ = (
        "attempts", "crashes", "due", "errors", "holder",
        "lapses", "message", "number", "place", "releases", "replays", "state",
    )  # fmt: skip

    def __init__(self, message: Message, place: int) -> None:
        self.message: Message = message
        self.place: int = place
        self.state: Literal["scheduled", "ready", "leased"] = "ready"
        self.attempts: int = 0
        self.crashes: int = 0
        self.releases: int = 0
        self.number: int = 0
        self.replays: int = 0
        self.due: float = 0.0
        self.errors: tuple[RunError, ...] = ()
        self.holder: tuple[Holder, Delivery] | None = None
        self.lapses: float = math.inf


class _RecentIds:
    """Ids of finished jobs, known for one to two minutes: two sets, the older dropped whole."""

    def __init__(self) -> None:
        self._minute = 0.0
        self._new: set[JobId] = set()
        self._old: set[JobId] = set()

    def add(self, job_id: JobId, now: float) -> None:
        self._turn(now)
        self._new.add(job_id)

    def has(self, job_id: JobId, now: float) -> bool:
        self._turn(now)
        return job_id in self._new or job_id in self._old

    def _turn(self, now: float) -> None:
        minute = now // _REMEMBERED
        if minute != self._minute:
            self._old = self._new if minute == self._minute + 1 else set()
            self._new = set()
            self._minute = minute


class Queue:
    """One queue: what is in it, and who waits for it."""

    def __init__(self, spec: QueueSpec, clock: Clock) -> None:
        self.spec: QueueSpec = spec
        self.clock: Clock = clock
        self.jobs: dict[JobId, StoredJob] = {}
        self.dead: dict[JobId, DeadRecord] = {}  # oldest first
        self.died: dict[JobId, int] = {}  # their order, which a page can go on from
        self.n_ready: int = 0
        self.n_scheduled: int = 0
        self.waiting: dict[Holder, None] = {}
        self._ready: asyncio.PriorityQueue[tuple[int, int, JobId]] = asyncio.PriorityQueue()
        self._scheduled: list[tuple[float, int, JobId]] = []
        self._clocked: dict[JobId, StoredJob] = {}  # leased, and the lease ends by the clock
        self._recent = _RecentIds()
        self._place = 0
        self._stack = spec.kind == "stack"

    # publish

    def refusal(self, message: Message) -> JobsError | None:
        """Why this message cannot be in this queue."""
        if message.priority == 0:
            return None
        if self.spec.kind != "priority":
            return NotSupported(
                f"priority {message.priority} on the {self.spec.kind} queue {self.spec.name!r}",
                NAME,
                "a queue declared with kind='priority'",
            )
        levels = self.spec.priority_levels
        if levels is not None and not 0 <= message.priority <= levels:
            return ConfigError(
                f"priority={message.priority}: the queue {self.spec.name!r} has the levels 0 to {levels}"
            )
        return None

    def publish(self, messages: Sequence[Message]) -> list[Published]:
        """Store all that can be stored; or, of those that are new, none if they do not all fit."""
        now = self.clock.now()
        if len(messages) == 1:
            return [self._publish_one(messages[0], now)]
        outcomes: list[Published] = []
        new: dict[JobId, Message] = {}
        for message in messages:
            refusal = self.refusal(message)
            if refusal is not None:
                outcomes.append(refusal)
            elif message.id in new or self.knows(message.id, now):
                self._note_another_body(message, new.get(message.id))
                outcomes.append("duplicate")
            else:
                new[message.id] = message
                outcomes.append("stored")
        if new and (full := self._is_full_for(len(new))):
            return [
                full if m.id in new and not isinstance(o, JobsError) else o
                for m, o in zip(messages, outcomes, strict=True)
            ]
        for message in new.values():
            self._store(message, now)
        if new:
            self.ring()
        return outcomes

    def _publish_one(self, message: Message, now: float) -> Published:
        """As `publish`, for what nearly all calls are."""
        if message.priority and (refusal := self.refusal(message)):
            return refusal
        if self.knows(message.id, now):
            self._note_another_body(message)
            return "duplicate"
        if full := self._is_full_for(1):
            return full
        self._store(message, now)
        self.ring()
        return "stored"

    def _is_full_for(self, count: int) -> QueueFull | None:
        limit = self.spec.max_length
        if limit is None or self.n_ready + self.n_scheduled + count <= limit:
            return None
        return QueueFull(self.spec.name, limit)

    def _store(self, message: Message, now: float) -> None:
        self.jobs[message.id] = job = StoredJob(message, 0)
        delay = message.delay if message.at is None else (message.at - self.clock.wall()).total_seconds()
        if delay > 0:
            self._schedule(job, now + delay)
        else:
            self._enter(job)

    def knows(self, job_id: JobId, now: float) -> bool:
        """Whether a job of this id is here, dead, or ended lately."""
        return job_id in self.jobs or job_id in self.dead or self._recent.has(job_id, now)

    def _note_another_body(self, message: Message, first: Message | None = None) -> None:
        known = self.jobs.get(message.id) or self.dead.get(message.id)
        first = first or (known.message if known else None)
        if first is not None and first.body != message.body:
            _log.info("job %s of queue %s is published already: its first content stays", message.id, self.spec.name)

    # receive

    def promote(self, now: float) -> None:
        """What is due becomes ready."""
        while self._scheduled and self._scheduled[0][0] <= now:
            due, _, job_id = heapq.heappop(self._scheduled)
            job = self.jobs.get(job_id)
            if job is not None and job.state == "scheduled" and job.due == due:
                self.n_scheduled -= 1
                self._enter(job)

    def collect(self, now: float, crash_limit: int) -> None:
        """Take lapsed leases back: a crash each, and the last one a job may have sends it to the dead letters."""
        for job in [job for job in self._clocked.values() if job.lapses < now]:
            self._leave(job)
            job.crashes += 1
            limit = job.message.crash_limit
            if job.crashes >= (crash_limit if limit is None else limit):
                self._bury(job, "crash_limit", None)
            else:
                self._put_back(job)

    def hand_out(self, receiver: Holder, now: float, random: str) -> Delivery | None:
        """Lease the first job that is ready; None if there is none. `random` goes into its receipt."""
        job = self._next()
        if job is None:
            return None
        self.n_ready -= 1
        job.state = "leased"
        job.attempts += 1  # on receive, not on settle, or a job that kills its worker would never run out
        job.number += 1
        deadline = math.inf if receiver.keep else now + receiver.lease
        message = job.message
        delivery = Delivery(
            self.spec.name,
            message,
            job.attempts,
            job.crashes,
            job.releases,
            job.number,
            f"{message.id}:{job.number}:{random}",
            deadline,
        )
        job.holder = (receiver, delivery)
        if not receiver.keep:
            job.lapses = deadline
            self._clocked[message.id] = job
        receiver.held[delivery] = (self, job)
        return delivery

    def _next(self) -> StoredJob | None:
        while True:
            try:
                _, place, job_id = self._ready.get_nowait()
            except asyncio.QueueEmpty:
                return None
            job = self.jobs.get(job_id)
            if job is not None and job.state == "ready" and abs(place) == job.place:
                return job

    # settle

    def settle(self, job: StoredJob, settlement: Settlement) -> None:
        """End the lease of a job that the caller holds."""
        now = self.clock.now()
        if isinstance(settlement, Done):
            job.holder = None
            self._clocked.pop(job.message.id, None)
            del self.jobs[job.message.id]
            self._recent.add(job.message.id, now)
            return
        self._leave(job)
        if isinstance(settlement, Retry | Dead) and settlement.crash:
            job.crashes += 1
        if isinstance(settlement, Retry):
            job.errors = with_error(job.errors, settlement.error)
            if settlement.delay > 0:
                self._schedule(job, now + settlement.delay)
            else:
                self._enter(job)
        elif isinstance(settlement, Dead):
            self._bury(job, settlement.reason, settlement.error)
            return
        else:
            job.attempts -= 1  # a hand-back is no attempt
            job.releases += 1
            if settlement.delay > 0:
                self._schedule(job, now + settlement.delay)
            else:
                self._put_back(job)
        self.ring()

    def extend(self, job: StoredJob, deadline: float) -> float:
        """Make its lease last until then, if that is longer. Returns when it lapses."""
        job.lapses = max(job.lapses, deadline)
        return job.lapses

    # what a person orders

    def depth(self, now: float) -> Depth:
        """What is due or collectable counts as ready, without being moved."""
        due = self._due(now)
        lapsed = sum(job.lapses < now for job in self._clocked.values())
        leased = len(self.jobs) - self.n_ready - self.n_scheduled - lapsed
        return Depth(self.n_ready + due + lapsed, self.n_scheduled - due, leased, len(self.dead))

    def clean(self, now: float) -> int:
        """Cancel what is ready or scheduled."""
        gone = [job_id for job_id, job in self.jobs.items() if job.state != "leased"]
        for job_id in gone:
            del self.jobs[job_id]
            self._recent.add(job_id, now)
        self.n_ready = self.n_scheduled = 0
        self._ready = asyncio.PriorityQueue()
        self._scheduled = []
        return len(gone)

    def end(self) -> None:
        """The queue is deleted: what is leased is lost, and whoever waits is told."""
        for job in self.jobs.values():
            if job.holder is not None:
                receiver, delivery = job.holder
                receiver.lose(delivery)
        for receiver in list(self.waiting):
            receiver.nudge()

    def forget(self, record: DeadRecord) -> None:
        """A dead job is no more."""
        del self.dead[record.message.id], self.died[record.message.id]

    def replay(self, record: DeadRecord) -> None:
        """Put a dead job back, as new but for its number and its past."""
        self.forget(record)
        job = StoredJob(record.message, 0)
        job.number, job.errors, job.replays = record.number, record.errors, record.replays + 1
        self.jobs[record.message.id] = job
        self._enter(job)
        self.ring()

    # the bell

    def next_change(self) -> float:
        """When a job is due or a lease lapses."""
        due = self._scheduled[0][0] if self._scheduled else math.inf
        if self._clocked:
            due = min(due, math.nextafter(min(job.lapses for job in self._clocked.values()), math.inf))
        return due

    def ring(self) -> None:
        """Wake one who waits; it wakes the next while there is more. Whoever is woken sets its timer anew."""
        if self.waiting:
            receiver = next(iter(self.waiting))
            del self.waiting[receiver]
            receiver.wake()

    def _due(self, now: float) -> int:
        """How many scheduled jobs are due, by walking only the due part of the heap."""
        count, open_ = 0, [0]
        while open_:
            index = open_.pop()
            if index < len(self._scheduled) and self._scheduled[index][0] <= now:
                due, _, job_id = self._scheduled[index]
                job = self.jobs.get(job_id)
                count += job is not None and job.state == "scheduled" and job.due == due
                open_ += (2 * index + 1, 2 * index + 2)
        return count

    # moves

    def _enter(self, job: StoredJob) -> None:
        """Ready, at the back of its priority."""
        self._place += 1
        job.place = self._place
        self._put_back(job)

    def _put_back(self, job: StoredJob) -> None:
        """Ready, in the place it had."""
        job.state = "ready"
        self.n_ready += 1
        place = -job.place if self._stack else job.place
        self._ready.put_nowait((-job.message.priority, place, job.message.id))

    def _schedule(self, job: StoredJob, due: float) -> None:
        job.state = "scheduled"
        job.due = due
        self.n_scheduled += 1
        self._place += 1
        heapq.heappush(self._scheduled, (due, self._place, job.message.id))

    def _leave(self, job: StoredJob) -> None:
        """No longer leased. Its holder is told, unless it was the one who settled."""
        self._clocked.pop(job.message.id, None)
        job.lapses = math.inf
        if job.holder is not None:
            receiver, delivery = job.holder
            job.holder = None
            receiver.lose(delivery)

    def _bury(self, job: StoredJob, reason: DeadReason, error: RunError | None) -> None:
        del self.jobs[job.message.id]
        self._place += 1
        self.died[job.message.id] = self._place
        self.dead[job.message.id] = DeadRecord(
            self.spec.name,
            job.message,
            reason,
            job.attempts,
            job.crashes,
            job.releases,
            job.number,
            self.clock.wall(),
            with_error(job.errors, error),
            job.replays,
        )
        if len(self.dead) == DEAD_LETTERS_MANY:
            _log.warning("the queue %s has %d dead letters: look, replay or purge", self.spec.name, len(self.dead))
