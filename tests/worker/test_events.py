"""What listeners are told, in which order, and that what they do changes nothing."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncOrchestrator,
    Dead,
    Depth,
    Discard,
    Done,
    Event,
    ExecutionStatus,
    JobLeaseLost,
    JobPublished,
    JobSchema,
    JobSettled,
    JobStarted,
    QueueSpec,
    Release,
    Retry,
    RetryPolicy,
    SchemaMismatch,
    Snooze,
    Worker,
)
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]
Start = Callable[[Worker], "asyncio.Task[int]"]


class Nothing(BaseModel):
    pass


async def test_a_job_is_published_then_started_then_settled(consumer: Make) -> None:
    told: list[Event] = []

    async def act(_: Any) -> None:
        assert isinstance(told[-1], JobStarted)

    async with AsyncOrchestrator(LocalBackend(), listeners=[told.append]) as orchestrator:
        await orchestrator.register(JobSchema("jobs", Nothing, queue="queue"))
        job_id = await orchestrator.publish("queue", {})
        await orchestrator.publish("queue", {}, job_id=job_id)
        await orchestrator.publish_many("queue", [])
        await Worker(orchestrator, [consumer(act)], max_jobs=1, listeners=[told.append]).run()
    published, again, started, settled = told
    assert published == JobPublished("queue", job_id, "jobs", duplicate=False)
    assert again == JobPublished("queue", job_id, "jobs", duplicate=True)
    assert started == JobStarted("queue", job_id, "jobs", attempt=1)
    assert isinstance(settled, JobSettled)
    assert (settled.queue, settled.job_id, settled.schema_name, settled.attempt) == ("queue", job_id, "jobs", 1)
    assert (settled.settlement, settled.accepted, settled.status) == (Done(), True, ExecutionStatus.COMPLETED)
    assert 0 <= settled.seconds < 60


async def test_a_batch_is_told_job_by_job_in_order() -> None:
    told: list[Event] = []
    async with AsyncOrchestrator(LocalBackend(), listeners=[told.append]) as orchestrator:
        await orchestrator.register(JobSchema("jobs", Nothing))
        ids = await orchestrator.publish_many("jobs", [{}] * 3)
    assert told == [JobPublished("jobs", job_id, "jobs", duplicate=False) for job_id in ids]


async def test_what_is_not_stored_is_not_told() -> None:
    told: list[Event] = []
    async with AsyncOrchestrator(LocalBackend(), listeners=[told.append]) as orchestrator:
        await orchestrator.register(JobSchema("jobs", Nothing))
        with pytest.raises(ValueError, match="delay"):
            await orchestrator.publish("jobs", {}, delay=-1)
    assert told == []


@pytest.mark.parametrize(
    ("end", "settlement", "status"),
    [
        (None, Done, ExecutionStatus.COMPLETED),
        (Discard(), Done, ExecutionStatus.COMPLETED),
        (OSError(), Retry, ExecutionStatus.QUEUED),
        (Snooze(1), Release, ExecutionStatus.QUEUED),
        (ValueError(), Dead, ExecutionStatus.FAILED),
    ],
    ids=["returned", "discarded", "retried", "snoozed", "dead"],
)
async def test_a_settlement_is_told_with_what_it_means_for_the_job(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, end: Any, settlement: type, status: Any
) -> None:
    told: list[Event] = []

    async def act(_: Any) -> None:
        if end is not None:
            raise end

    await publish(1)
    policy = RetryPolicy(no_retry_on=(ValueError,))
    await Worker(orchestrator, [consumer(act)], retry=policy, max_jobs=1, listeners=[told.append]).run()
    assert [type(event) for event in told] == [JobStarted, JobSettled]
    settled = told[-1]
    assert isinstance(settled, JobSettled)
    assert (type(settled.settlement), settled.status, settled.accepted) == (settlement, status, True)


async def test_each_run_is_told_with_its_attempt(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    told: list[Event] = []

    async def act(_: Any) -> None:
        raise OSError

    await publish(1)
    policy = RetryPolicy(max_attempts=2, base=0.0)
    await Worker(orchestrator, [consumer(act)], retry=policy, max_jobs=2, listeners=[told.append]).run()
    assert [(type(e), e.attempt) for e in told if isinstance(e, JobStarted | JobSettled)] == [
        (JobStarted, 1),
        (JobSettled, 1),
        (JobStarted, 2),
        (JobSettled, 2),
    ]


async def test_a_run_took_as_long_as_it_ran_however_late_its_settlement_is_told(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, gate: Any, start: Start
) -> None:
    began, told_at, settled = time.monotonic(), list[float](), list[JobSettled]()

    async def act(_: Any) -> None:
        await gate.enter()

    async def listen(event: Event) -> None:
        if isinstance(event, JobSettled):
            settled.append(event)
            told_at.append(time.monotonic())
            await asyncio.sleep(2 * (told_at[0] - began))  # the other has ended, and waits for longer than it ran

    await publish(2)
    worker = Worker(orchestrator, [consumer(act)], max_jobs=2, listeners=[listen])
    running = start(worker)
    await gate.holds(2)
    gate.open()
    assert await asyncio.wait_for(running, 10) == 0
    assert [0 < one.seconds <= told_at[0] - began for one in settled] == [True, True]


async def test_a_job_that_is_not_run_is_told_as_settled_only(orchestrator: AsyncOrchestrator, consumer: Make) -> None:
    told: list[Event] = []

    async def act(_: Any) -> None:
        pass

    await orchestrator.backend.publish("jobs", [Message("broken", b"no job")])
    await Worker(orchestrator, [consumer(act)], max_jobs=1, listeners=[told.append]).run()
    [settled] = told
    assert isinstance(settled, JobSettled)
    assert (settled.job_id, settled.schema_name, settled.seconds) == ("broken", "", 0.0)
    assert isinstance(settled.settlement, Dead)


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_every_listener_is_told_in_turn_and_awaited(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, kind: str
) -> None:
    told: list[tuple[int, type]] = []

    def listener(n: int) -> Callable[[Event], Any]:
        def plain(event: Event) -> None:
            told.append((n, type(event)))

        async def awaited(event: Event) -> None:
            await asyncio.sleep(0)
            told.append((n, type(event)))

        return plain if kind == "plain" else awaited

    async def act(_: Any) -> None:
        assert told == [(1, JobStarted), (2, JobStarted)]

    await publish(1)
    worker = Worker(orchestrator, [consumer(act)], max_jobs=1, retry=False, listeners=[listener(1), listener(2)])
    await worker.run()
    assert told == [(1, JobStarted), (2, JobStarted), (1, JobSettled), (2, JobSettled)]
    assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_listener_that_fails_is_logged_and_changes_nothing(
    consumer: Make, start: Start, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[type] = []

    def fails(_: Event) -> None:
        raise ValueError("of the listener")

    async def fails_later(_: Event) -> None:
        await asyncio.sleep(0)
        raise ValueError("of the listener")

    async def act(_: Any) -> None:
        pass

    listeners: list[Any] = [fails if kind == "plain" else fails_later, lambda event: told.append(type(event))]
    async with AsyncOrchestrator(LocalBackend(), listeners=listeners) as orchestrator:
        await orchestrator.register(JobSchema("jobs", Nothing))
        for _ in range(2):
            await orchestrator.publish("jobs", {})
        worker = Worker(orchestrator, [consumer(act)], concurrency=1, max_jobs=2, listeners=listeners)
        assert await asyncio.wait_for(start(worker), 10) == 0
        assert worker.handled == 2
        assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)
    assert told == [JobPublished, JobPublished, JobStarted, JobSettled, JobStarted, JobSettled]
    assert sum("listener" in record.getMessage() for record in caplog.records) == 6


async def test_a_worker_stops_though_a_listener_is_slow(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    started: list[Any] = []

    async def slow(event: Event) -> None:
        if isinstance(event, JobStarted):
            await gate.enter()

    async def act(job: Any) -> None:
        started.append(job)

    await publish(1)
    worker = Worker(orchestrator, [consumer(act)], listeners=[slow], cancel_grace=0.1)
    running = start(worker)
    await gate.holds(1)
    worker.stop(now=True)
    assert await asyncio.wait_for(running, 10) == 1
    assert started == []
    assert await orchestrator.depth("jobs") == Depth(ready=1, scheduled=0, leased=0, dead=0)


async def test_a_released_job_is_told_as_queued(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    told: list[Event] = []

    async def act(_: Any) -> None:
        await gate.enter()

    await orchestrator.declare(QueueSpec("more"))
    await publish(1)
    worker = Worker(orchestrator, [consumer(act)], listeners=[told.append])
    running = start(worker)
    await gate.holds(1)
    worker.stop(now=True)
    await asyncio.wait_for(running, 10)
    settled = told[-1]
    assert isinstance(settled, JobSettled)
    assert (settled.settlement, settled.status, settled.accepted) == (Release(), ExecutionStatus.QUEUED, True)


@pytest.mark.parametrize("when", ["while it runs", "as it returns"])
async def test_a_lost_lease_is_told_once_before_its_settlement_and_a_listener_that_fails_changes_nothing(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, gate: Any, when: str
) -> None:
    told: list[Event] = []

    def fails(event: Event) -> None:
        raise ValueError("of the listener")

    async def lose() -> None:
        await orchestrator.delete("jobs", force=True)
        await orchestrator.declare(QueueSpec("jobs"))

    async def act(_: Any) -> None:
        if when == "as it returns":
            await lose()
        else:
            await gate.enter()

    [job_id] = await publish(1)
    worker = Worker(orchestrator, [consumer(act)], listeners=[fails, told.append])
    async with asyncio.timeout(10), worker:
        if when == "while it runs":
            await gate.holds(1)
            await lose()
        while len(told) < 3:  # noqa: ASYNC110 (the listener tells nobody)
            await asyncio.sleep(0)
    assert [type(event) for event in told] == [JobStarted, JobLeaseLost, JobSettled]
    assert told[1] == JobLeaseLost("jobs", job_id, "jobs", 1)
    assert isinstance(told[2], JobSettled)
    assert (told[2].accepted, worker.handled) == (False, 0)


async def test_a_job_that_nobody_here_knows_is_told_as_a_mismatch(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    told: list[Event] = []

    async def act(_: Any) -> None:
        pass

    await orchestrator.register(JobSchema("known", Nothing, queue="jobs"))
    [job_id] = await publish(1, schema="of the next release")
    await Worker(orchestrator, [consumer(act, "known")], max_jobs=1, listeners=[told.append]).run()
    mismatch, settled = told
    assert isinstance(mismatch, SchemaMismatch)
    assert (mismatch.job_id, mismatch.schema_name, mismatch.attempt) == (job_id, "of the next release", 1)
    assert 0 <= mismatch.waited < 60
    assert isinstance(settled, JobSettled)
    assert settled.settlement == Release(1.0)
