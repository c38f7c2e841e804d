"""How many jobs a worker runs at once, where it runs them, and what they know of themselves."""

import asyncio
import contextvars
import math
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncOrchestrator,
    CurrentJob,
    Depth,
    Job,
    JobSchema,
    QueueSpec,
    RetryLater,
    RetryPolicy,
    Snooze,
    Worker,
    current_job,
)

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]
Start = Callable[[Worker], "asyncio.Task[int]"]

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


async def test_so_many_jobs_run_and_are_held_at_once_and_never_more(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any, settle_down: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(10)
    worker = Worker(orchestrator, [consumer(act)], concurrency=3, until_idle=True)
    running = start(worker)
    await gate.holds(3)
    await settle_down()
    assert (worker.health().running, gate.waiting) == (3, 3)
    assert await orchestrator.depth("jobs") == Depth(ready=7, scheduled=0, leased=3, dead=0)
    gate.open()
    assert await running == 0
    assert (worker.handled, gate.most) == (10, 3)


async def test_ten_at_once_unless_told_otherwise(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any, settle_down: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(15)
    start(Worker(orchestrator, [consumer(act)]))
    await gate.holds(10)
    await settle_down()
    assert gate.most == 10


async def test_a_slot_that_comes_free_is_used_while_the_others_run(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any, until: Any
) -> None:
    done: list[int] = []

    async def act(job: dict[str, Any]) -> None:
        if job["input_data"]["n"] == 1:
            await gate.enter()
        done.append(job["input_data"]["n"])

    await publish(5)
    running = start(Worker(orchestrator, [consumer(act)], concurrency=2, max_jobs=5))
    await gate.holds(1)
    await until(lambda: len(done) == 4)
    gate.open()
    await running
    assert done == [2, 3, 4, 5, 1]


async def test_jobs_come_in_order_to_a_worker_of_one_slot(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    started: list[int] = []

    async def act(job: dict[str, Any]) -> None:
        started.append(job["input_data"]["n"])
        await asyncio.sleep(0)

    await publish(20)
    await Worker(orchestrator, [consumer(act)], concurrency=1, until_idle=True).run()
    assert started == list(range(1, 21))


async def test_a_plain_function_runs_in_threads_so_many_at_once_and_never_more(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    together, lock = threading.Barrier(3), threading.Lock()
    running, most, threads = 0, 0, set[int]()

    def act(_: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            threads.add(threading.get_ident())
        together.wait(10)  # passed by three at once, or by none
        with lock:
            running -= 1

    await publish(12)
    worker = Worker(orchestrator, [consumer(act)], concurrency=3, max_jobs=12)
    await worker.run()
    assert (worker.handled, most, len(threads)) == (12, 3, 3)
    assert threading.get_ident() not in threads


async def test_a_thread_that_blocks_keeps_nobody_else_from_running(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, until: Any
) -> None:
    entered, leave = threading.Event(), threading.Event()
    done: list[int] = []

    def act(job: dict[str, Any]) -> None:
        if job["input_data"]["n"] == 1:
            entered.set()
            assert leave.wait(10)
        done.append(job["input_data"]["n"])

    await publish(4)
    running = start(Worker(orchestrator, [consumer(act)], concurrency=2, max_jobs=4))
    await until(lambda: len(done) == 3)
    assert entered.is_set()
    leave.set()
    await running
    assert done == [2, 3, 4, 1]


async def test_one_worker_takes_both_kinds_of_consumer(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    where: dict[str, bool] = {}

    async def coroutine(_: Any) -> None:
        where["coroutine"] = threading.current_thread() is threading.main_thread()

    def thread(_: Any) -> None:
        where["thread"] = threading.current_thread() is threading.main_thread()

    await orchestrator.declare(QueueSpec("more"))
    await publish(1)
    await publish(1, "more")
    await Worker(orchestrator, [consumer(coroutine), consumer(thread, "more")], max_jobs=2).run()
    assert where == {"coroutine": True, "thread": False}


@pytest.mark.parametrize(("strict", "order"), [(False, "aabbab"), (True, "aaabbb")])
async def test_several_queues_take_fair_turns_or_are_taken_in_order(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, strict: bool, order: str
) -> None:
    started: list[str] = []

    async def act(job: dict[str, Any]) -> None:
        started.append(job["name"])

    for queue in ("a", "b"):
        await orchestrator.declare(QueueSpec(queue))
        await publish(3, queue)
    consumers = [consumer(act, "a"), consumer(act, "b")]
    await Worker(orchestrator, consumers, concurrency=1, strict=strict, until_idle=True).run()
    assert sorted(started) == sorted(order)
    if strict:
        assert started == list(order)
    else:
        assert set(started[:2]) == set(started[2:4]) == {"a", "b"}


# --- what a run knows of itself


@pytest.mark.parametrize("concurrency", [1, 5])
async def test_context_variables_reach_the_run_and_stay_in_it(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, concurrency: int
) -> None:
    seen: list[str] = []

    async def coroutine(_: Any) -> None:
        seen.append(tenant.get())
        tenant.set("changed")

    def thread(_: Any) -> None:
        seen.append(tenant.get())
        tenant.set("changed")

    await orchestrator.declare(QueueSpec("more"))
    await publish(3)
    await publish(3, "more")
    tenant.set("somebody")
    consumers = [consumer(coroutine), consumer(thread, "more")]
    await Worker(orchestrator, consumers, concurrency=concurrency, max_jobs=6).run()
    assert seen == ["somebody"] * 6
    assert tenant.get() == "somebody"


async def test_the_current_job_is_known_in_coroutines_their_tasks_and_threads(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    seen: list[CurrentJob] = []
    in_thread: list[CurrentJob] = []

    async def look() -> None:
        seen.append(current_job())

    async def coroutine(_: Any) -> None:
        await look()
        await asyncio.create_task(look())
        seen.append(await asyncio.to_thread(current_job))

    def thread(_: Any) -> None:
        in_thread.append(current_job())

    await orchestrator.declare(QueueSpec("more"))
    [first] = await publish(1, headers={"trace": "1"})
    [second] = await publish(1, "more")
    await Worker(orchestrator, [consumer(coroutine), consumer(thread, "more")], concurrency=1, max_jobs=2).run()
    assert [job.id for job in seen] == [first] * 3
    assert [job.id for job in in_thread] == [second]
    assert len({id(job) for job in seen}) == 1
    job = seen[0]
    assert (job.attempt, job.number, dict(job.headers)) == (1, 1, {"trace": "1"})
    assert (job.cancelled, job.lease_lost) == (False, False)


async def test_there_is_no_current_job_outside_of_one(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    async def act(_: Any) -> None:
        current_job()

    with pytest.raises(LookupError, match="outside a job"):
        current_job()
    await publish(1)
    await Worker(orchestrator, [consumer(act)], max_jobs=1).run()
    assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)
    with pytest.raises(LookupError, match="outside a job"):
        current_job()
    with pytest.raises(LookupError, match="outside a job"):
        await asyncio.to_thread(current_job)


async def test_jobs_that_run_at_once_know_themselves_apart(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    pairs: list[tuple[str, str]] = []

    async def act(job: dict[str, Any]) -> None:
        await gate.enter()
        pairs.append((job["id"], current_job().id))

    ids = await publish(5)
    running = start(Worker(orchestrator, [consumer(act)], max_jobs=5))
    await gate.holds(5)
    gate.open()
    await running
    assert sorted(pairs) == sorted((job_id, job_id) for job_id in ids)


async def test_the_number_of_a_delivery_rises_with_each_and_the_attempt_with_each_that_counts(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    seen: list[tuple[int, int]] = []

    async def act(_: Any) -> None:
        job = current_job()
        seen.append((job.attempt, job.number))
        if len(seen) == 1:
            raise Snooze(0)
        if len(seen) == 2:
            raise OSError

    await publish(1)
    await Worker(orchestrator, [consumer(act)], retry=RetryPolicy(base=0.0), max_jobs=3).run()
    assert seen == [(1, 1), (1, 2), (2, 3)]


# --- what the worker gives a run that nobody else does


@pytest.mark.parametrize(
    ("worker", "own", "expected"),
    [
        ({}, {}, 300.0),
        ({"timeout": 50.0}, {}, 50.0),
        ({"timeout": None}, {}, math.inf),
        ({"timeout": math.inf}, {}, math.inf),
        ({"timeout": 50.0}, {"timeout": None}, math.inf),
        ({"timeout": None}, {"timeout": 70.0}, 70.0),
    ],
)
async def test_the_workers_timeout_holds_where_nobody_else_says(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, worker: Any, own: Any, expected: float
) -> None:
    left: list[float] = []

    async def act(_: Any) -> None:
        left.append(current_job().deadline - time.monotonic())

    await publish(1)
    await Worker(orchestrator, [consumer(act, **own)], max_jobs=1, **worker).run()
    assert left == [pytest.approx(expected, abs=9)]


@pytest.mark.parametrize(
    ("worker", "schema", "own", "expected"),
    [(None, None, {}, 3), (2, None, {}, 2), (False, None, {}, 1), (2, None, {"retry": 4}, 4), (2, 5, {"retry": 4}, 5)],
)
async def test_the_workers_retry_policy_holds_where_nobody_else_says(
    orchestrator: AsyncOrchestrator, consumer: Make, worker: Any, schema: Any, own: Any, expected: int
) -> None:
    class Nothing(BaseModel):
        pass

    async def act(_: Any) -> None:
        raise RetryLater(0)

    await orchestrator.register(JobSchema("jobs", Nothing, retry=schema))
    await orchestrator.publish("jobs", Job(name="jobs", schema_name="jobs"))
    await Worker(orchestrator, [consumer(act, **own)], retry=worker, until_idle=True).run()
    [record] = (await orchestrator.dead_letters("jobs").list()).records
    assert record.attempts == expected
