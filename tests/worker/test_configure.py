"""`configure()`: options changed before a worker runs; and what ends a worker in time for a new one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Closed,
    ConfigError,
    Event,
    JobSchema,
    JobSettled,
    QueueSpec,
    Worker,
)
from mindtrace.jobs.memory import resident

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]
Start = Callable[[Worker], "asyncio.Task[int]"]


class Order(BaseModel):
    n: int = 0


async def nothing(_: Any) -> None:
    pass


async def test_a_worker_that_is_configured_runs_as_told(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, gate: Any, settle_down: Any, start: Start
) -> None:
    told: list[str] = []

    async def act(_: Any) -> None:
        await gate.enter()

    await publish(5)
    worker = Worker(orchestrator, [consumer(act)], listeners=[lambda event: told.append("made")])
    worker.configure(
        concurrency=2, max_jobs=4, name="cli", drain=3600, listeners=[lambda event: told.append("configured")]
    )
    assert (worker.concurrency, worker.name.partition("@")[0]) == (2, "cli")
    running = start(worker)
    await gate.holds(2)
    await settle_down()
    assert gate.most == 2
    gate.open()
    assert await running == 0
    assert worker.handled == 4
    assert told == ["made", "configured"] * 8
    assert (await orchestrator.depth("jobs")).ready == 1


async def test_a_timeout_of_none_is_no_limit_and_one_left_out_stays(
    orchestrator: AsyncOrchestrator, consumer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"timeout": None}, "no timeout"), ({}, "timeout 7 s"), ({"timeout": 3.0}, "timeout 3 s"),
    ]  # fmt: skip
    for change, said in changes:
        worker = Worker(orchestrator, [consumer(nothing)], timeout=7.0)
        worker.configure(until_idle=True, **change)
        await worker.run()
        assert said in caplog.records[-1].getMessage()


async def test_only_the_consumers_of_the_queues_that_are_named_run(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    ran: list[str] = []

    class Typed(AsyncConsumer[Order, None]):
        async def handle(self, data: Order) -> None:
            ran.append("typed")

    async def act(job: dict[str, Any]) -> None:
        ran.append(job["schema_name"])

    for queue in ("typed", "left"):
        await orchestrator.declare(QueueSpec(queue))
    for name in ("mail", "chat"):
        await orchestrator.register(JobSchema(name, Order, queue="shared"))
        await publish(1, "shared", schema=name)
    await publish(1, "left")
    await publish(1, "typed")
    worker = Worker(orchestrator, [consumer(act, "mail"), consumer(act, "left"), consumer(act, "chat"), Typed("typed")])
    worker.configure(queues=["shared", "typed"], until_idle=True)
    await worker.run()
    assert sorted(ran) == ["chat", "mail", "typed"]
    assert (await orchestrator.depth("left")).ready == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"queues": ["jbos"]}, r"the queue 'jbos': did you mean 'jobs'\? this worker takes from 'jobs'"),
        ({"queues": ["elsewhere"]}, "the queue 'elsewhere': this worker takes from 'jobs'"),
        ({"queues": ["jobs", "more"]}, "'more'"),
        ({"queues": []}, "name at least one; this worker takes from 'jobs'"),
        ({"concurrency": 0}, "concurrency=0: a whole number from 1 on"),
        ({"max_jobs": 1.5}, "max_jobs=1.5: a whole number from 1 on"),
        ({"max_memory": 0}, "max_memory=0: MiB above 0"),
        ({"max_age": -1}, "max_age=-1: seconds above 0"),
        ({"timeout": -3.0}, "timeout=-3.0: seconds above 0, or None"),
        ({"drain": float("nan")}, "drain=nan: seconds from 0 on"),
        ({"name": ""}, "name=''"),
    ],
    ids=str,
)
async def test_what_is_wrong_is_said_and_changes_nothing(
    orchestrator: AsyncOrchestrator, consumer: Make, wrong: dict[str, Any], said: str
) -> None:
    worker = Worker(orchestrator, [consumer(nothing)], concurrency=3, name="as-made")
    with pytest.raises(ConfigError, match=said):
        worker.configure(**{"concurrency": 7, **wrong})
    assert (worker.concurrency, worker.name.partition("@")[0]) == (3, "as-made")


async def test_a_worker_that_has_begun_is_not_configured(orchestrator: AsyncOrchestrator, consumer: Make) -> None:
    async with Worker(orchestrator, [consumer(nothing)]) as worker:
        with pytest.raises(Closed, match="before it runs"):
            worker.configure(concurrency=2)
    with pytest.raises(Closed):
        worker.configure(concurrency=2)


async def test_above_its_memory_a_worker_lets_its_runs_end_and_returns(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    """The runs that are in flight end by themselves; what comes after them is left to the next worker."""
    kept: list[bytes] = []
    settled: list[Event] = []

    async def act(job: dict[str, Any]) -> None:
        if job["input_data"]["n"] == 1:
            kept.append(b"\x01" * 80 * 1024 * 1024)
        else:
            await gate.enter()

    await publish(2)
    worker = Worker(orchestrator, [consumer(act)], listeners=[settled.append], poll_timeout=0.05)
    worker.configure(max_memory=resident() + 40)
    async with asyncio.timeout(10):
        running = start(worker)
        while not worker.health().draining:  # noqa: ASYNC110 (health tells nobody)
            await asyncio.sleep(0)
        await publish(1)
        assert gate.waiting == 1
        gate.open()
        assert await running == 0
    assert sum(isinstance(event, JobSettled) for event in settled) == 2
    assert (await orchestrator.depth("jobs")).ready == 1


async def test_a_worker_that_is_old_enough_returns(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    await publish(3)
    worker = Worker(orchestrator, [consumer(nothing)], max_age=0.05, poll_timeout=0.01)
    async with asyncio.timeout(10):
        assert await worker.run() == 0
    assert worker.handled == 3


async def test_limits_that_are_not_reached_end_nothing(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    await publish(3)
    assert await Worker(orchestrator, [consumer(nothing)], max_age=3600, max_memory=1e6, until_idle=True).run() == 0
    assert (await orchestrator.depth("jobs")).ready == 0
