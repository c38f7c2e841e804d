"""Deliveries that are out of the ordinary: suspects, early acks, lost leases, deleted queues, unknown schemas."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncOrchestrator,
    CurrentJob,
    Depth,
    Done,
    Event,
    Job,
    JobSchema,
    JobSettled,
    QueueNotFound,
    QueueSpec,
    Release,
    RetryPolicy,
    Worker,
    current_job,
)
from mindtrace.jobs.backends.local import LocalBackend

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]
Start = Callable[[Worker], "asyncio.Task[int]"]


class Nothing(BaseModel):
    pass


@asynccontextmanager
async def crashed(orchestrator: AsyncOrchestrator, clock: Any, times: int, jobs: int = 10) -> AsyncIterator[None]:
    """All that is ready has ended with its worker so many times; the last one lingers, its leases over."""
    async with orchestrator.backend.receiver(["jobs"], slots=jobs, lease=30, keep=False) as receiver:
        for _ in range(times):
            await receiver.receive(jobs)
            clock.advance(31)
        yield


# --- suspects


async def test_jobs_that_have_crashed_twice_are_run_one_at_a_time(
    orchestrator: AsyncOrchestrator, clock: Any, publish: Publish, consumer: Make, start: Start, gate: Any, until: Any
) -> None:
    """The others are put off before the first is started, so that no poison job takes them down."""
    seen: list[tuple[int, Depth]] = []

    async def act(_: Any) -> None:
        seen.append((current_job().attempt, await orchestrator.depth("jobs")))
        await gate.enter()

    ids = await publish(3)
    async with crashed(orchestrator, clock, 2):
        worker = Worker(orchestrator, [consumer(act)], max_jobs=3)
        running = start(worker)
        await gate.holds(1)
        assert seen == [(3, Depth(ready=0, scheduled=2, leased=1, dead=0))]
        gate.open()
        for ended in (1, 2, 3):
            await until(lambda so_far=ended: worker.handled == so_far)
            clock.advance(1.001)
        assert await asyncio.wait_for(running, 10) == 0
    assert [attempt for attempt, _ in seen] == [3, 3, 3]
    assert (gate.most, len(ids)) == (1, 3)


async def test_a_suspect_is_put_off_while_another_runs_that_came_before(
    orchestrator: AsyncOrchestrator, clock: Any, publish: Publish, consumer: Make, start: Start, gate: Any,
    settle_down: Any,
) -> None:  # fmt: skip
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(2)
    async with crashed(orchestrator, clock, 2):
        start(Worker(orchestrator, [consumer(act)]))
        await gate.holds(1)
        for _ in range(3):
            clock.advance(1.001)
            await settle_down()
            assert gate.waiting == 1
        assert await orchestrator.depth("jobs") == Depth(ready=0, scheduled=1, leased=1, dead=0)


@pytest.mark.parametrize("crashes", [0, 1])
async def test_jobs_that_have_crashed_once_at_most_run_together(
    orchestrator: AsyncOrchestrator, clock: Any, publish: Publish, consumer: Make, start: Start, gate: Any, crashes: int
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(3)
    async with crashed(orchestrator, clock, crashes):
        start(Worker(orchestrator, [consumer(act)]))
        await gate.holds(3)


async def test_healthy_jobs_run_beside_a_suspect(
    orchestrator: AsyncOrchestrator, clock: Any, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(1)
    async with crashed(orchestrator, clock, 2):
        await publish(4)
        start(Worker(orchestrator, [consumer(act)]))
        await gate.holds(5)


async def test_a_crash_uses_up_no_attempt(
    orchestrator: AsyncOrchestrator, clock: Any, publish: Publish, consumer: Make
) -> None:
    attempts: list[int] = []

    async def act(_: Any) -> None:
        attempts.append(current_job().attempt)
        raise OSError

    await publish(1)
    async with crashed(orchestrator, clock, 4):
        await Worker(orchestrator, [consumer(act)], retry=RetryPolicy(base=0.0), max_jobs=3).run()
    [record] = (await orchestrator.dead_letters("jobs").list()).records
    assert attempts == [5, 6, 7]
    assert (record.reason, record.attempts, record.crashes) == ("attempts", 7, 4)


@pytest.mark.parametrize("where", ["default", "worker", "class", "publish"])
async def test_a_job_at_its_crash_limit_is_dead_and_not_run(
    orchestrator: AsyncOrchestrator, clock: Any, publish: Publish, consumer: Make, where: str
) -> None:
    started: list[Any] = []

    async def act(job: Any) -> None:
        started.append(job)

    policy = RetryPolicy(crash_limit=2)
    own: dict[str, Any] = {"retry": policy} if where == "class" else {}
    await publish(1, retry=policy if where == "publish" else None)
    async with crashed(orchestrator, clock, 5 if where == "default" else 2):
        worker = Worker(
            orchestrator, [consumer(act, **own)], retry=policy if where == "worker" else None, until_idle=True
        )
        await worker.run()
    assert started == []
    assert [r.reason for r in (await orchestrator.dead_letters("jobs").list()).records] == ["crash_limit"]


# --- early


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "returns"])
async def test_a_job_that_is_settled_early_is_gone_before_it_runs_and_never_comes_back(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, fails: bool
) -> None:
    seen: list[Depth] = []

    async def act(_: Any) -> None:
        seen.append(await orchestrator.depth("jobs"))
        if fails:
            raise OSError

    await publish(3)
    worker = Worker(orchestrator, [consumer(act, ack="early")], concurrency=1, max_jobs=3)
    assert await worker.run() == 0
    assert seen == [Depth(ready, 0, 0, 0) for ready in (2, 1, 0)]
    assert worker.handled == 3
    assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)


async def test_a_job_that_is_settled_early_is_not_released_when_the_worker_stops(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(1)
    worker = Worker(orchestrator, [consumer(act, ack="early")])
    running = start(worker)
    await gate.holds(1)
    worker.stop(now=True)
    await asyncio.wait_for(running, 10)
    assert gate.cancelled == 1
    assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)


# --- lost leases and deleted queues


async def test_a_lost_lease_cancels_the_run_and_drops_what_it_would_have_settled(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    consumer: Make,
    start: Start,
    gate: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[CurrentJob] = []

    async def act(_: Any) -> None:
        seen.append(current_job())
        await gate.enter()

    [job_id] = await publish(1)
    worker = Worker(orchestrator, [consumer(act)])
    running = start(worker)
    await gate.holds(1)
    await orchestrator.delete("jobs", force=True)
    with pytest.raises(QueueNotFound) as ended:
        await asyncio.wait_for(running, 10)
    assert ended.value.queue == "jobs"
    assert (gate.cancelled, worker.handled) == (1, 0)
    assert (seen[0].lease_lost, seen[0].cancelled) == (True, True)
    assert await orchestrator.queues() == []
    said = [r for r in caplog.records if r.levelno == logging.WARNING and job_id in r.getMessage()]
    assert len(said) == 1  # once, and no dead letter


class Lapsing(LocalBackend):
    """A local backend without a keeper: leases end by the clock, as those of a worker that has stalled."""

    def receiver(self, queues: Any, **options: Any) -> Any:
        options["keep"] = False
        return super().receiver(queues, **options)


@pytest.mark.parametrize("swallows", [False, True], ids=["is cancelled", "returns all the same"])
async def test_a_worker_that_lost_a_lease_gives_the_job_up_and_goes_on(
    clock: Any, consumer: Make, start: Start, gate: Any, until: Any, swallows: bool
) -> None:
    ended: list[str] = []

    async def act(job: dict[str, Any]) -> None:
        if job["id"] == "lost":
            try:
                await gate.enter()
            except asyncio.CancelledError:
                assert current_job().lease_lost
                if not swallows:
                    raise
        ended.append(job["id"])

    async with AsyncOrchestrator(backend := Lapsing(clock=clock)) as orchestrator:
        await orchestrator.declare(QueueSpec("jobs"))
        await orchestrator.publish("jobs", Job(id="lost", name="jobs", schema_name="jobs"))
        worker = Worker(orchestrator, [consumer(act)], concurrency=1, lease=30)
        running = start(worker)
        await gate.holds(1)
        clock.advance(31)
        async with LocalBackend.receiver(backend, ["jobs"]) as another:
            [delivery] = await another.receive(1)
            await until(lambda: gate.cancelled)
            await orchestrator.publish("jobs", Job(id="next", name="jobs", schema_name="jobs"))
            await until(lambda: worker.handled)
            assert (delivery.crashes, await another.settle([(delivery, Done())])) == (1, [None])
        worker.stop()
        assert await asyncio.wait_for(running, 10) == 0  # a job that another has is none that was released
        assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)
    assert worker.handled == 1
    assert ended == (["lost", "next"] if swallows else ["next"])


async def test_a_thread_whose_lease_is_lost_is_told_and_its_late_return_is_refused(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, until: Any
) -> None:
    entered, leave = threading.Event(), threading.Event()
    seen: list[tuple[bool, bool]] = []

    def act(_: Any) -> None:
        job = current_job()
        seen.append((job.lease_lost, job.cancelled))
        entered.set()
        assert leave.wait(10)
        seen.append((job.lease_lost, job.cancelled))

    await publish(1)
    running = start(worker := Worker(orchestrator, [consumer(act)], cancel_grace=0.01))
    assert await asyncio.to_thread(entered.wait, 10)
    await orchestrator.delete("jobs", force=True)
    with pytest.raises(QueueNotFound):
        await asyncio.wait_for(running, 10)
    await orchestrator.declare(QueueSpec("jobs"))
    leave.set()
    await until(lambda: len(seen) == 2)
    assert seen == [(False, False), (True, True)]
    assert worker.handled == 0
    assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)


async def test_what_a_lost_run_leaves_behind_is_told_as_refused(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    """`accepted` says that nothing was changed."""
    told: list[Event] = []

    async def act(_: Any) -> None:
        await gate.enter()

    [job_id] = await publish(1)
    running = start(Worker(orchestrator, [consumer(act)], listeners=[told.append]))
    await gate.holds(1)
    await orchestrator.delete("jobs", force=True)
    with pytest.raises(QueueNotFound):
        await asyncio.wait_for(running, 10)
    settled = [event for event in told if isinstance(event, JobSettled)]
    assert [(event.job_id, event.accepted) for event in settled] == [(job_id, False)]


async def test_an_idle_worker_hears_that_its_queue_is_gone(
    orchestrator: AsyncOrchestrator, clock: Any, consumer: Make, start: Start, settle_down: Any
) -> None:
    """The clock stands still here: it is told, and does not find out by looking."""

    async def act(_: Any) -> None:
        pass

    running = start(Worker(orchestrator, [consumer(act)]))
    await settle_down()
    await orchestrator.delete("jobs")
    with pytest.raises(QueueNotFound) as ended:
        await asyncio.wait_for(running, 10)
    assert ended.value.queue == "jobs"
    assert await orchestrator.queues() == []


async def test_a_deleted_queue_ends_a_worker_of_several_and_releases_what_it_runs_of_the_others(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await orchestrator.declare(QueueSpec("more"))
    await publish(1)
    running = start(Worker(orchestrator, [consumer(act), consumer(act, "more")], retry=False))
    await gate.holds(1)
    await orchestrator.delete("more")
    with pytest.raises(QueueNotFound):
        await asyncio.wait_for(running, 10)
    assert gate.cancelled == 1
    assert await orchestrator.depth("jobs") == Depth(ready=1, scheduled=0, leased=0, dead=0)


# --- a schema that nobody here knows


async def test_a_job_of_an_unknown_schema_is_put_off_longer_each_time_and_runs_once_it_is_known(
    orchestrator: AsyncOrchestrator, clock: Any, consumer: Make, start: Start, until: Any
) -> None:
    told: list[JobSettled] = []

    def listener(event: Event) -> None:
        if isinstance(event, JobSettled):
            told.append(event)

    async def act(_: Any) -> None:
        started.append(current_job().attempt)

    started: list[int] = []
    await orchestrator.register(JobSchema("jobs", Nothing))
    await orchestrator.publish("jobs", Job(name="newer", schema_name="newer"))
    worker = Worker(orchestrator, [consumer(act)], listeners=[listener])
    running = start(worker)
    for n in range(1, 9):
        await until(lambda so_far=n: len(told) == so_far)
        clock.advance(60.001)
    worker.stop()
    await asyncio.wait_for(running, 10)
    assert [event.settlement for event in told[:8]] == [Release(delay) for delay in (1, 2, 4, 8, 16, 32, 60, 60)]
    assert (started, worker.handled) == ([], 0)
    await orchestrator.register(JobSchema("newer", Nothing, queue="jobs"))
    clock.advance(60.001)
    await Worker(orchestrator, [consumer(act, "newer")], max_jobs=1).run()
    assert started == [1]


async def test_the_patience_with_an_unknown_schema_is_the_workers(
    orchestrator: AsyncOrchestrator, consumer: Make
) -> None:
    async def act(_: Any) -> None:
        pass

    await orchestrator.register(JobSchema("jobs", Nothing))
    await orchestrator.publish("jobs", Job(name="newer", schema_name="newer"))
    worker = Worker(orchestrator, [consumer(act)], unknown_ttl=0, max_jobs=1)
    await worker.run()
    assert worker.handled == 1
    assert [r.reason for r in (await orchestrator.dead_letters("jobs").list()).records] == ["unknown_schema"]
