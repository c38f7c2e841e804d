"""A world to break: one queue, a clock that stands still until it is pushed, and a ledger of what was asked for."""

import asyncio
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from types import TracebackType
from typing import Any, Self

import pytest

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Backend,
    Consumer,
    Dead,
    DeadRecord,
    Delivery,
    Depth,
    Done,
    Event,
    Job,
    JobSettled,
    QueueSpec,
    Receiver,
    Reject,
    Release,
    RetryPolicy,
    Settlement,
    Worker,
)
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.testing.faults import Distant

A_LONG_TIME = 2 * 366 * 86400.0


class PushedClock:
    """Time passes when a test says so. Nothing that has to happen at once can hide behind a timer."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._pushed = asyncio.Event()

    def now(self) -> float:
        return self._now

    def wall(self) -> datetime:
        return datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=self._now)

    async def until(self, when: float) -> None:
        while self._now < when:
            await self._pushed.wait()

    def push(self, seconds: float) -> None:
        self._now += seconds
        self._pushed.set()
        self._pushed = asyncio.Event()


@dataclass
class Found:
    """Where every job is, once all is quiet and everybody has left."""

    depth: Depth
    waiting: dict[str, Delivery]
    dead: dict[str, DeadRecord]


@dataclass
class Ledger:
    """What was asked for, what was answered, and what the runs did, by job id."""

    intended: set[str] = field(default_factory=set)
    confirmed: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)  # a Done was accepted
    perhaps_done: set[str] = field(default_factory=set)  # a Done got no answer
    accepted: Counter[str] = field(default_factory=Counter)  # settlements, by receipt
    started: Counter[str] = field(default_factory=Counter)
    failed: set[str] = field(default_factory=set)  # a run raised
    effects: Counter[str] = field(default_factory=Counter)


class NoJitter(Random):
    """Waits as short as they may be: none."""

    def uniform(self, a: float, b: float) -> float:
        return 0.0


class Works(AsyncConsumer):
    """Does what the job says, with a turn of the loop before its effect and none after."""

    retry = RetryPolicy(max_attempts=2, base=5.0, jitter="none")

    def __init__(self, world: "World") -> None:
        super().__init__("jobs")
        self.world = world
        self.worker: Worker | None = None
        self.effect = asyncio.Event()

    async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        job_id, does = job_dict["id"], job_dict["input_data"].get("does")
        self.world.ledger.started[job_id] += 1
        await asyncio.sleep(0)
        if does == "stop" and self.worker is not None:
            self.worker.stop()
        if does == "stop now" and self.worker is not None:
            self.worker.stop(now=True)
        if does == "fail":
            self.world.ledger.failed.add(job_id)
            raise LookupError("as it was asked to")
        if does == "reject":
            self.world.ledger.failed.add(job_id)
            raise Reject("as it was asked to")
        try:
            await asyncio.sleep(0)
        finally:
            if does == "clean up":
                await asyncio.sleep(0)
        self.world.ledger.effects[job_id] += 1
        self.effect.set()
        return {}


class WorksEarly(Works):
    """Its jobs are settled before they are run."""

    ack = "early"


class WorksInAThread(Consumer):
    """Blocking code, which ends at once unless `held` is cleared: then once that is set."""

    def __init__(self, world: "World") -> None:
        super().__init__("jobs")
        self.world = world
        self.worker: Worker | None = None
        self.effect = asyncio.Event()
        self.held = threading.Event()
        self.held.set()

    def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        self.world.ledger.started[job_dict["id"]] += 1
        self.held.wait()
        self.world.ledger.effects[job_dict["id"]] += 1
        return {}


class World:
    """A queue `jobs` on a local backend, and what is between it and its users.

    Args:
        backend: what the users get; the local backend is inside it or is it. Opened here, with a queue declared.
    """

    queue = "jobs"

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.inside = backend.backend if isinstance(backend, Distant) else backend
        assert isinstance(self.inside, LocalBackend)
        assert isinstance(self.inside.clock, PushedClock)
        self.clock = self.inside.clock
        self.ledger = Ledger()
        self.orchestrator = AsyncOrchestrator(backend)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._complaints: list[str] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._tasks = asyncio.all_tasks()
        loop.set_exception_handler(lambda _, context: self._complaints.append(str(context)))
        await self.inside.open()
        await self.inside.declare(QueueSpec(self.queue))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.inside.aclose()
        if error is None:
            await self.quiet()
        asyncio.get_running_loop().set_exception_handler(None)

    def job(self, **data: Any) -> Job:
        """A new job, intended."""
        job = Job(id=new_job_id(), name="work", schema_name="work", input_data=data)
        self.ledger.intended.add(job.id)
        return job

    async def published(self, *jobs: Job, **options: Any) -> list[str]:
        """These jobs, or a new one, stored for sure, past whatever may break. Gives their ids."""
        orchestrator = AsyncOrchestrator(self.inside)
        ids = [await orchestrator.publish(self.queue, job, **options) for job in jobs or (self.job(),)]
        self.ledger.confirmed.update(ids)
        return ids

    async def died(self, *jobs: Job) -> list[str]:
        """As `published`, and then dead."""
        ids = await self.published(*jobs)
        async with self.inside.receiver([self.queue], slots=len(ids)) as receiver:
            deliveries = await receiver.receive(len(ids))
            assert await receiver.settle([(delivery, Dead("rejected")) for delivery in deliveries]) == [None] * len(ids)
        return ids

    def worker(self, *, consumer: Any = None, **options: Any) -> tuple[Worker, Any]:
        """A worker of two slots on this queue, whose settlements are written down."""
        consumer = consumer or Works(self)
        options = {"concurrency": 2, "random": NoJitter(), "listeners": [self._note_event], **options}
        consumer.worker = Worker(self.orchestrator, [consumer], **options)
        return consumer.worker, consumer

    def _note_event(self, event: Event) -> None:
        if isinstance(event, JobSettled) and event.accepted and not isinstance(event.settlement, Release):
            self.ledger.accepted[f"{event.job_id}, attempt {event.attempt}"] += 1
            if isinstance(event.settlement, Done):
                self.ledger.done.add(event.job_id)

    async def settle(self, receiver: Receiver, delivery: Delivery, settlement: Settlement) -> object:
        """Settle one, and write down the answer. Gives it."""
        [answer] = (await receiver.exchange([(delivery, settlement)], 0)).settled
        self.note_settled(delivery, settlement, answer)
        return answer

    def note_settled(self, delivery: Delivery, settlement: Settlement, answer: object) -> None:
        """Write down what became of a settlement."""
        job_id = delivery.message.id
        if answer is None:
            self.ledger.accepted[delivery.receipt] += 1
        if isinstance(settlement, Done):
            (self.ledger.done if answer is None else self.ledger.perhaps_done).add(job_id)

    async def quiet(self) -> None:
        """Every task that was started here is over; those that were cancelled get the turns it takes."""
        for _ in range(10):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - self._tasks
        assert not left, f"left behind: {left}"
        assert not self._complaints

    async def audit(self) -> Found:
        """Nothing is left behind, nothing is leased, and each job is in exactly one place: where, is returned."""
        await self.quiet()
        await self.inside.open()
        depth = await self.inside.depth(self.queue)
        assert depth.leased == 0
        records = (await self.inside.dead_letters(self.queue).list(DeadFilter(), limit=10_000)).records
        dead = {record.message.id: record for record in records}
        self.clock.push(A_LONG_TIME)  # whatever is scheduled is due, and no lease can still run
        waiting: dict[str, Delivery] = {}
        async with self.inside.receiver([self.queue], slots=10_000) as receiver:
            deliveries = await receiver.receive(10_000)
            waiting = {delivery.message.id: delivery for delivery in deliveries}
            assert len(waiting) == len(deliveries) == depth.ready + (depth.scheduled or 0)
        assert depth.dead == len(records) == len(dead)
        ledger, there = self.ledger, waiting.keys() | dead.keys()
        assert not waiting.keys() & dead.keys()
        assert there <= ledger.intended
        assert not there & ledger.done
        assert ledger.confirmed <= there | ledger.done | ledger.perhaps_done | ledger.effects.keys()
        assert all(count == 1 for count in ledger.accepted.values())
        await self.quiet()
        return Found(depth, waiting, dead)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def a_world() -> Callable[[Backend], World]:
    """Makes the world around a backend."""
    return World


@pytest.fixture
def early() -> Callable[[World], Works]:
    """Makes a consumer whose jobs are settled before they are run."""
    return WorksEarly


@pytest.fixture
def blocking() -> Callable[[World], WorksInAThread]:
    """Makes a consumer whose jobs run in a thread."""
    return WorksInAThread


@pytest.fixture
def local() -> Callable[[], LocalBackend]:
    """Makes a local backend whose clock stands still."""
    return lambda: LocalBackend(clock=PushedClock())


@pytest.fixture(autouse=True)
def quiet_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Hundreds of runs that fail on purpose would bury what a failing test has to say."""
    caplog.set_level("CRITICAL", logger="mindtrace.jobs")


@pytest.fixture
def random() -> Random:
    """Chance that can be had again: $MTJ_TEST_SEED is the seed, which a test that fails has in its output."""
    seed = int(os.environ.get("MTJ_TEST_SEED") or secrets.randbelow(2**32))
    print(f"MTJ_TEST_SEED={seed}")  # noqa: T201 (pytest shows it where a test fails)
    return Random(seed)
