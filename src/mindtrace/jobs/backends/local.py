"""`LocalBackend`: queues in this process, nothing to install or to start; jobs live as long as the object does.

Where a job is, and what moves it (numbers as in the contract suite):

    publish ──> scheduled ──due──> ready ──receive──> leased ──Done──> (id remembered for a minute)
            └──────────────────────^  ^                │ ├──Retry──> scheduled
                                      │                │ ├──Dead───> dead ──replay──> ready
                                      └──lapse, Release┘ └──lapse at crash_limit──> dead

`jobs` holds every job that is scheduled, ready or leased. The heaps beside it hold keys only; an entry whose job has
moved on since is skipped when it comes up. Every change is one stretch of code without an await.
"""

import asyncio
import heapq
import math
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Literal, Protocol

from mindtrace.jobs.backend import BATCH, Backend, DeadLetters, Depth, Home, QueueSpec, Receiver, Traits
from mindtrace.jobs.delivery import (
    Dead,
    DeadFilter,
    DeadPage,
    DeadReason,
    DeadRecord,
    Delivery,
    Done,
    Exchanged,
    Published,
    Release,
    Retry,
    RunError,
    Settled,
    Settlement,
    with_error,
)
from mindtrace.jobs.errors import (
    Closed,
    ConfigError,
    JobNotFound,
    JobsError,
    LeaseLost,
    NotSupported,
    QueueFull,
    QueueInUse,
    QueueMismatch,
    QueueNotFound,
)
from mindtrace.jobs.job import PRIORITY_RANGE, JobId
from mindtrace.jobs.retry import is_whole
from mindtrace.jobs.wire import Message

_TRAITS = Traits(
    name="local",
    durability="memory",
    priorities=PRIORITY_RANGE,
    stack=True,
    lease_clock=True,
    deduplicates=True,
    fences=True,
    keeps_place=True,
    atomic_batch=True,
    lookup=False,
)
_REMEMBERED = 60.0  # seconds that a finished job's bare id stays known, at least


class Clock(Protocol):
    """Where the local backend has its time from."""

    def now(self) -> float:
        """Seconds, never going back."""
        ...

    def wall(self) -> datetime:
        """The time of day, aware."""
        ...

    async def until(self, when: float) -> None:
        """Return once `now()` is `when` or later."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """Seconds, never going back."""
        return time.monotonic()

    def wall(self) -> datetime:
        """The time of day, in UTC."""
        return datetime.now(UTC)

    async def until(self, when: float) -> None:
        """Return once `now()` is `when` or later."""
        while (left := when - time.monotonic()) > 0:  # noqa: ASYNC110 (it is the passing of time that is waited for)
            await asyncio.sleep(min(left, 86400.0))


class _Job:
    """A job's message and the state beside it."""

    __slots__ = (
        "attempts", "crashes", "due", "errors", "holder",
        "lapses", "message", "number", "place", "releases", "replays", "state",
    )  # fmt: skip

    def __init__(self, message: Message, place: int) -> None:
        self.message = message
        self.place = place
        self.state: Literal["scheduled", "ready", "leased"] = "ready"
        self.attempts = self.crashes = self.releases = self.number = self.replays = 0
        self.due = 0.0
        self.errors: tuple[RunError, ...] = ()
        self.holder: tuple[_LocalReceiver, Delivery] | None = None
        self.lapses = math.inf


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


class _Queue:
    """One queue: what is in it, and who waits for it."""

    def __init__(self, spec: QueueSpec, clock: Clock) -> None:
        self.spec = spec
        self.clock = clock
        self.jobs: dict[JobId, _Job] = {}
        self.dead: dict[JobId, DeadRecord] = {}  # oldest first
        self.n_ready = self.n_scheduled = 0
        self.waiting: dict[_LocalReceiver, None] = {}
        self._ready: asyncio.PriorityQueue[tuple[int, int, JobId]] = asyncio.PriorityQueue()
        self._scheduled: list[tuple[float, int, JobId]] = []
        self._clocked: dict[JobId, _Job] = {}  # leased, and the lease ends by the clock
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
                _TRAITS.name,
                "a queue declared with kind='priority'",
            )
        levels = self.spec.priority_levels
        if levels is not None and not 0 <= message.priority <= levels:
            return ConfigError(
                f"priority={message.priority}: the queue {self.spec.name!r} has the levels 0 to {levels}"
            )
        return None

    def publish(self, messages: Sequence[Message]) -> list[Published]:
        now = self.clock.now()
        outcomes: list[Published] = []
        new: dict[JobId, Message] = {}
        for message in messages:
            refusal = self.refusal(message)
            if refusal is not None:
                outcomes.append(refusal)
            elif message.id in new or self.knows(message.id, now):
                outcomes.append("duplicate")
            else:
                new[message.id] = message
                outcomes.append("stored")
        limit = self.spec.max_length
        if limit is not None and new and self.n_ready + self.n_scheduled + len(new) > limit:
            full = QueueFull(self.spec.name, limit)
            return [full if outcome == "stored" else outcome for outcome in outcomes]
        for message in new.values():
            job = _Job(message, 0)
            self.jobs[message.id] = job
            delay = message.delay
            if message.at is not None:
                delay = (message.at - self.clock.wall()).total_seconds()
            if delay > 0:
                self._schedule(job, now + delay)
            else:
                self._enter(job)
        if new:
            self.ring(now)
        return outcomes

    def knows(self, job_id: JobId, now: float) -> bool:
        return job_id in self.jobs or job_id in self.dead or self._recent.has(job_id, now)

    # receive

    def promote(self, now: float) -> None:
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

    def hand_out(self, receiver: "_LocalReceiver", now: float, random: str) -> Delivery | None:
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

    def _next(self) -> _Job | None:
        while True:
            try:
                _, place, job_id = self._ready.get_nowait()
            except asyncio.QueueEmpty:
                return None
            job = self.jobs.get(job_id)
            if job is not None and job.state == "ready" and abs(place) == job.place:
                return job

    # settle

    def settle(self, job: _Job, settlement: Settlement) -> None:
        now = self.clock.now()
        if isinstance(settlement, Done):
            job.holder = None
            self._clocked.pop(job.message.id, None)
            del self.jobs[job.message.id]
            self._recent.add(job.message.id, now)
            return
        self._leave(job)
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
        self.ring(now)

    def extend(self, job: _Job, deadline: float) -> float:
        job.lapses = max(job.lapses, deadline)
        return job.lapses

    # what a person orders

    def depth(self, now: float) -> Depth:
        due = self._due(now)
        lapsed = sum(job.lapses < now for job in self._clocked.values())
        leased = len(self.jobs) - self.n_ready - self.n_scheduled - lapsed
        return Depth(self.n_ready + due + lapsed, self.n_scheduled - due, leased, len(self.dead))

    def clean(self, now: float) -> int:
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

    def replay(self, record: DeadRecord) -> None:
        del self.dead[record.message.id]
        job = _Job(record.message, 0)
        job.number, job.errors, job.replays = record.number, record.errors, record.replays + 1
        self.jobs[record.message.id] = job
        self._enter(job)
        self.ring(self.clock.now())

    # the bell

    def next_change(self) -> float:
        """When a job is due or a lease lapses."""
        due = self._scheduled[0][0] if self._scheduled else math.inf
        if self._clocked:
            due = min(due, math.nextafter(min(job.lapses for job in self._clocked.values()), math.inf))
        return due

    def ring(self, now: float) -> None:
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

    def _enter(self, job: _Job) -> None:
        """Ready, at the back of its priority."""
        self._place += 1
        job.place = self._place
        self._put_back(job)

    def _put_back(self, job: _Job) -> None:
        """Ready, in the place it had."""
        job.state = "ready"
        self.n_ready += 1
        place = -job.place if self._stack else job.place
        self._ready.put_nowait((-job.message.priority, place, job.message.id))

    def _schedule(self, job: _Job, due: float) -> None:
        job.state = "scheduled"
        job.due = due
        self.n_scheduled += 1
        self._place += 1
        heapq.heappush(self._scheduled, (due, self._place, job.message.id))

    def _leave(self, job: _Job) -> None:
        """No longer leased. Its holder is told, unless it was the one who settled."""
        self._clocked.pop(job.message.id, None)
        job.lapses = math.inf
        if job.holder is not None:
            receiver, delivery = job.holder
            job.holder = None
            receiver.lose(delivery)

    def _bury(self, job: _Job, reason: DeadReason, error: RunError | None) -> None:
        del self.jobs[job.message.id]
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


class LocalBackend(Backend):
    """The backend in this process.

    Args:
        clock: where it has its time from; the machine's unless a test brings one.
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.clock = clock or SystemClock()
        self.home = Home("local backend")
        self._queues: dict[str, _Queue] = {}
        self._receivers: set[_LocalReceiver] = set()

    @property
    def traits(self) -> Traits:
        """What it can do."""
        return _TRAITS

    async def open(self) -> None:
        """Be used from this loop."""
        if not self.home.is_current:
            self.home.move_in()

    async def aclose(self) -> None:
        """End the receivers, which releases what they hold. The jobs stay with the object."""
        for receiver in list(self._receivers):
            receiver.end()
        self.home.move_out()

    async def declare(self, spec: QueueSpec, *, attach: bool = False) -> None:
        """Make the queue if there is none."""
        self.home.check()
        queue = self._queues.get(spec.name)
        if queue is None:
            self._queues[spec.name] = _Queue(spec, self.clock)
        elif not attach and queue.spec != spec:
            there = queue.spec
            raise QueueMismatch(
                spec.name,
                {
                    name: (getattr(there, name), getattr(spec, name))
                    for name in ("kind", "priority_levels", "max_length")
                    if getattr(there, name) != getattr(spec, name)
                },
            )

    async def delete(self, queue: str, *, force: bool = False) -> None:
        """Delete a queue and its waiting jobs."""
        found = self._queue(queue)
        depth = found.depth(self.clock.now())
        if not force and (depth.leased or depth.dead):
            raise QueueInUse(queue, {"leased": depth.leased or 0, "dead": depth.dead})
        del self._queues[queue]
        found.end()

    async def clean(self, queue: str) -> int:
        """Cancel all ready and scheduled jobs."""
        return self._queue(queue).clean(self.clock.now())

    async def depth(self, queue: str) -> Depth:
        """How many jobs there are, by state; exact."""
        return self._queue(queue).depth(self.clock.now())

    async def queues(self) -> list[QueueSpec]:
        """All that are declared."""
        self.home.check()
        return [queue.spec for queue in self._queues.values()]

    async def publish(self, queue: str, messages: Sequence[Message]) -> list[Published]:
        """Store the messages; up to 500 at a time are stored whole or, if the queue is full, not at all."""
        self.home.check()
        found = self._queues.get(queue)
        if found is None:
            return [QueueNotFound(queue) for _ in messages]
        if len(messages) <= BATCH:
            return found.publish(messages)
        return [
            outcome
            for start in range(0, len(messages), BATCH)
            for outcome in found.publish(messages[start : start + BATCH])
        ]

    @asynccontextmanager
    async def receiver(
        self,
        queues: Sequence[str],
        *,
        slots: int = 1,
        lease: float = 30.0,
        crash_limit: int = 5,
        keep: bool = True,
        strict: bool = False,
        lost: Callable[[Delivery], None] | None = None,
    ) -> AsyncGenerator[Receiver, None]:
        """A receiver of these queues. With `keep` its leases end only with it: it lives and dies with the backend."""
        self.home.check()
        receiver = _LocalReceiver(self, queues, slots, lease, crash_limit, keep, strict, lost)
        self._receivers.add(receiver)
        try:
            yield receiver
        finally:
            self._receivers.discard(receiver)
            receiver.end()

    def dead_letters(self, queue: str) -> DeadLetters:
        """The queue's dead letters."""
        return _LocalDeadLetters(self, queue)

    def next_due(self, queue: str) -> float | None:
        """When, on its clock, the next scheduled job is due; for a test that moves the clock."""
        due = self._queue(queue).next_change()
        return None if due == math.inf else due

    def found(self, queue: str) -> _Queue | None:
        """The queue, for the receivers and dead letters of this module."""
        return self._queues.get(queue)

    def _queue(self, queue: str) -> _Queue:
        self.home.check()
        found = self._queues.get(queue)
        if found is None:
            raise QueueNotFound(queue)
        return found


class _LocalReceiver(Receiver):
    def __init__(
        self,
        backend: LocalBackend,
        queues: Sequence[str],
        slots: int,
        lease: float,
        crash_limit: int,
        keep: bool,
        strict: bool,
        lost: Callable[[Delivery], None] | None,
    ) -> None:
        self.lease, self.keep = lease, keep
        self.held: dict[Delivery, tuple[_Queue, _Job]] = {}
        self._backend, self._names = backend, list(queues)
        self._slots, self._crash_limit, self._strict, self._lost = slots, crash_limit, strict, lost
        self._loop = asyncio.get_running_loop()
        self._bell: asyncio.Future[None] | None = None
        self._nudged = self._ended = False
        self._turn = 0

    async def exchange(
        self, pairs: Sequence[tuple[Delivery, Settlement]], limit: int, *, wait: float = 0.0
    ) -> Exchanged:
        settled: list[Settled] = [self._settle(delivery, settlement) for delivery, settlement in pairs]
        if self._ended:
            if pairs:
                return Exchanged(settled, [])
            raise Closed("the receiver was left, or its backend closed")
        self._backend.home.check()
        deliveries, missing = self._take(limit)
        if not (pairs or deliveries or missing) and wait > 0:
            until = self._backend.clock.now() + wait
            while not (deliveries or missing or self._nudged or self._ended) and self._backend.clock.now() < until:
                await self._wait(limit, until)
                deliveries, missing = self._take(limit)
        self._nudged = False
        return Exchanged(settled, deliveries, missing)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        deadline = self._backend.clock.now() + self.lease
        answers: list[Settled] = []
        for delivery in deliveries:
            held = self.held.get(delivery)
            if held is None:
                answers.append(LeaseLost(delivery.message.id))
            else:
                if not self.keep:
                    delivery.deadline = held[0].extend(held[1], deadline)
                answers.append(None)
        return answers

    def nudge(self) -> None:
        self._nudged = True
        self.wake()

    def wake(self) -> None:
        """End the wait in progress, if there is one."""
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def lose(self, delivery: Delivery) -> None:
        """This delivery is no longer held; says so where nobody here settled it."""
        if self.held.pop(delivery, None) is not None:
            delivery.lost = True
            if self._lost is not None:
                self._loop.call_soon(self._lost, delivery)

    def end(self) -> None:
        """Release what is held, and be of no more use."""
        self._ended = True
        for delivery in list(self.held):
            queue, job = self.held.pop(delivery)
            queue.settle(job, Release())
        self.wake()

    def _settle(self, delivery: Delivery, settlement: Settlement) -> Settled:
        held = self.held.pop(delivery, None)
        if held is None:
            return LeaseLost(delivery.message.id)
        held[0].settle(held[1], settlement)
        return None

    def _take(self, limit: int) -> tuple[list[Delivery], tuple[str, ...]]:
        now = self._backend.clock.now()
        queues = [(name, self._backend.found(name)) for name in self._names]
        missing = tuple(name for name, queue in queues if queue is None)
        present = [queue for _, queue in queues if queue is not None]
        for queue in present:
            queue.promote(now)
        if limit <= 0:
            return [], missing
        for queue in present:
            queue.collect(now, self._crash_limit)
        limit = min(limit, self._slots - len(self.held))
        deliveries = self._fill(present, limit, now)
        for queue in present:
            if queue.n_ready:
                queue.ring(now)
        return deliveries, missing

    def _fill(self, queues: list[_Queue], limit: int, now: float) -> list[Delivery]:
        """Up to `limit`, a queue at a time in fair turns, or as much as there is of each in order if `strict`."""
        random = os.urandom(8).hex() if limit > 0 else ""
        deliveries: list[Delivery] = []
        if not self._strict and len(queues) > 1:
            self._turn = (self._turn + 1) % len(queues)
            queues = queues[self._turn :] + queues[: self._turn]
        while queues and len(deliveries) < limit:
            for queue in list(queues):
                alone = self._strict or len(queues) == 1
                while len(deliveries) < limit:
                    delivery = queue.hand_out(self, now, random)
                    if delivery is None:
                        queues.remove(queue)
                        break
                    deliveries.append(delivery)
                    if not alone:
                        break
        return deliveries

    async def _wait(self, limit: int, until: float) -> None:
        """Until the bell, a nudge, the next due job or `until`."""
        queues = [queue for name in self._names if limit > 0 and (queue := self._backend.found(name)) is not None]
        until = min([until, *(queue.next_change() for queue in queues)])
        self._bell = bell = self._loop.create_future()
        for queue in queues:
            queue.waiting[self] = None
        timer = self._loop.create_task(self._backend.clock.until(until))
        try:
            await asyncio.wait((bell, timer), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # The ring that was ours must not be lost with us: another may be waiting for the same job.
            for queue in queues:
                queue.waiting.pop(self, None)
                if queue.n_ready:
                    queue.ring(self._backend.clock.now())
            raise
        finally:
            timer.cancel()
            self._bell = None
            for queue in queues:
                queue.waiting.pop(self, None)


class _LocalDeadLetters(DeadLetters):
    def __init__(self, backend: LocalBackend, queue: str) -> None:
        self._backend, self._name = backend, queue

    async def list(self, where: DeadFilter, *, limit: int = 100, cursor: str | None = None) -> DeadPage:
        if not is_whole(limit) or limit < 1:
            raise ConfigError(f"limit={limit!r}: a whole number from 1 on")
        try:
            skip = int(cursor or 0)
        except ValueError as error:
            raise ConfigError(f"cursor={cursor!r}: the cursor of an earlier page") from error
        dead = self._dead()
        newest_first = list(reversed(_matching(dead.values(), where)))
        end = skip + limit
        return DeadPage(newest_first[skip:end], str(end) if end < len(newest_first) else None)

    async def get(self, job_id: JobId) -> DeadRecord:
        return self._chosen([job_id])[0]

    async def count(self) -> int:
        return len(self._dead())

    async def replay(self, which: Sequence[JobId] | DeadFilter, *, rate: float | None = None) -> int:
        if rate is not None and not rate > 0:
            raise ConfigError(f"rate={rate!r}: jobs a second, above 0")
        count = 0
        for record in self._chosen(which):
            if rate is not None and count:
                await self._backend.clock.until(self._backend.clock.now() + 1 / rate)
            queue = self._queue()
            if queue.dead.get(record.message.id) is record:  # not replayed or purged by another meanwhile
                queue.replay(record)
                count += 1
        return count

    async def purge(self, which: Sequence[JobId] | DeadFilter) -> int:
        records = self._chosen(which)
        dead = self._dead()
        for record in records:
            del dead[record.message.id]
        return len(records)

    def _chosen(self, which: Sequence[JobId] | DeadFilter) -> Sequence[DeadRecord]:
        dead = self._dead()
        if isinstance(which, DeadFilter):
            return _matching(dead.values(), which)
        for job_id in which:
            if job_id not in dead:
                raise JobNotFound(job_id)
        return [dead[job_id] for job_id in dict.fromkeys(which)]

    def _queue(self) -> _Queue:
        self._backend.home.check()
        queue = self._backend.found(self._name)
        if queue is None:
            raise QueueNotFound(self._name)
        return queue

    def _dead(self) -> dict[JobId, DeadRecord]:
        return self._queue().dead


def _matching(records: Iterable[DeadRecord], where: DeadFilter) -> list[DeadRecord]:
    return [
        record
        for record in records
        if (where.reason is None or record.reason == where.reason)
        and (where.since is None or record.died_at >= where.since)
    ]
