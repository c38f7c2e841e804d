"""Deliveries received ahead: while runs are short, never in another order, handed back when a run takes long."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mindtrace.jobs import AsyncOrchestrator, ConfigError, Worker

pytestmark = [pytest.mark.anyio, pytest.mark.local]


async def test_short_runs_have_a_few_received_ahead_of_them(
    orchestrator: AsyncOrchestrator, publish: Callable[..., Awaitable[list[str]]], consumer: Callable[..., Any]
) -> None:
    held: list[int] = []

    async def look(job: dict[str, Any]) -> None:
        held.append((await orchestrator.depth("jobs")).leased or 0)

    await publish(30)
    worker = Worker(orchestrator, [consumer(look)], concurrency=1, ahead=8, until_idle=True)
    await worker.run()
    assert len(held) == worker.handled == 30
    assert held[0] == 1  # nothing is known of how long runs take
    assert 2 < max(held) <= 9


async def test_without_it_no_more_is_held_than_is_run(
    orchestrator: AsyncOrchestrator, publish: Callable[..., Awaitable[list[str]]], consumer: Callable[..., Any]
) -> None:
    held: set[int | None] = set()

    async def look(job: dict[str, Any]) -> None:
        held.add((await orchestrator.depth("jobs")).leased)

    await publish(30)
    await Worker(orchestrator, [consumer(look)], concurrency=1, until_idle=True).run()
    assert held == {1}


async def test_what_waits_is_run_one_at_a_time_and_in_its_order(
    orchestrator: AsyncOrchestrator, publish: Callable[..., Awaitable[list[str]]], consumer: Callable[..., Any]
) -> None:
    at_once = 0
    most = 0
    seen: list[int] = []

    async def run(job: dict[str, Any]) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        seen.append(job["input_data"]["n"])
        at_once -= 1

    await publish(100)
    await Worker(orchestrator, [consumer(run)], concurrency=1, ahead=8, until_idle=True).run()
    assert (seen, most) == (list(range(1, 101)), 1)


async def test_what_waits_behind_a_long_run_is_another_workers(
    orchestrator: AsyncOrchestrator,
    publish: Callable[..., Awaitable[list[str]]],
    consumer: Callable[..., Any],
    start: Callable[[Worker], "asyncio.Task[int]"],
) -> None:
    """The second worker runs them all, uncounted, while the first is still in its third run."""
    go_on = threading.Event()
    third_began = threading.Event()

    def run_long(job: dict[str, Any]) -> None:
        if job["input_data"]["n"] == 3:
            third_began.set()
            assert go_on.wait(20)

    ran: list[tuple[int, int]] = []

    async def run(job: dict[str, Any]) -> None:
        ran.append((job["input_data"]["n"], job["attempt"]))

    await publish(12)
    slow = Worker(orchestrator, [consumer(run_long)], concurrency=1, ahead=8, max_jobs=12)
    slow_run = start(slow)
    try:
        assert await asyncio.to_thread(third_began.wait, 10)
        other = Worker(orchestrator, [consumer(run)], concurrency=1, max_jobs=9)
        async with asyncio.timeout(10):
            await other.run()
    finally:
        go_on.set()
    assert sorted(ran) == [(n, 1) for n in range(4, 13)]
    slow.stop()
    async with asyncio.timeout(10):
        await slow_run
    assert slow.handled == 3


async def test_never_more_are_taken_than_max_jobs_and_every_one_is_run(
    orchestrator: AsyncOrchestrator, publish: Callable[..., Awaitable[list[str]]], consumer: Callable[..., Any]
) -> None:
    seen: list[int] = []

    async def run(job: dict[str, Any]) -> None:
        seen.append(job["input_data"]["n"])
        if len(seen) == 5:
            time.sleep(0.15)  # noqa: ASYNC251 (a run that takes long, as blocking ones do)

    await publish(30)
    worker = Worker(orchestrator, [consumer(run)], concurrency=1, ahead=8, max_jobs=20)
    await worker.run()
    assert (seen, worker.handled) == (list(range(1, 21)), 20)
    depth = await orchestrator.depth("jobs")
    assert (depth.ready, depth.leased) == (10, 0)


async def test_a_worker_that_stops_hands_back_what_waits(
    orchestrator: AsyncOrchestrator, publish: Callable[..., Awaitable[list[str]]], consumer: Callable[..., Any]
) -> None:
    seen: list[int] = []

    async def run(job: dict[str, Any]) -> None:
        seen.append(job["input_data"]["n"])
        if len(seen) == 6:
            worker.stop()

    await publish(30)
    worker = Worker(orchestrator, [consumer(run)], concurrency=1, ahead=8)
    await worker.run()
    assert seen == [1, 2, 3, 4, 5, 6]
    depth = await orchestrator.depth("jobs")
    assert (depth.ready, depth.leased) == (24, 0)
    job = await orchestrator.receive_message("jobs")
    assert job is not None
    assert (job["input_data"]["n"], job["attempt"]) == (7, 1)


async def test_early_settled_jobs_are_never_held_ahead(
    orchestrator: AsyncOrchestrator, publish: Callable[..., Awaitable[list[str]]], consumer: Callable[..., Any]
) -> None:
    """What is settled before it runs is lost by a crash: no more than the one that runs."""
    left: list[int] = []

    async def look(job: dict[str, Any]) -> None:
        depth = await orchestrator.depth("jobs")
        left.append(depth.ready + (depth.leased or 0))

    await publish(10)
    await Worker(orchestrator, [consumer(look, ack="early")], concurrency=1, ahead=8, until_idle=True).run()
    assert left == list(range(9, -1, -1))


@pytest.mark.parametrize("ahead", [-1, 1.5, True])
async def test_a_number_that_cannot_be_is_a_config_error(
    orchestrator: AsyncOrchestrator, consumer: Callable[..., Any], ahead: Any
) -> None:
    async def run(job: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigError, match="ahead="):
        Worker(orchestrator, [consumer(run)], ahead=ahead)
