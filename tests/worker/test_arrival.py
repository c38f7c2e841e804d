"""A worker whose orchestrator nobody opened, or whose broker is not there yet."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mindtrace.jobs import AsyncOrchestrator, Closed, ConfigError, Job, QueueSpec, RedisBackend, Worker
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.testing import brokers

pytestmark = pytest.mark.anyio


@pytest.mark.local
async def test_a_worker_opens_an_orchestrator_that_nobody_opened_and_closes_it_again(
    consumer: Callable[..., Any],
) -> None:
    backend = LocalBackend()
    await backend.open()
    await backend.declare(QueueSpec("jobs"))
    orchestrator = AsyncOrchestrator(backend)
    await orchestrator.publish("jobs", Job(name="jobs", schema_name="jobs", input_data={"n": 1}))
    await orchestrator.aclose()
    ran: list[int] = []

    async def run(job: dict[str, Any]) -> None:
        ran.append(job["input_data"]["n"])

    await Worker(orchestrator, [consumer(run)], until_idle=True).run()
    assert ran == [1]
    with pytest.raises(Closed):
        await orchestrator.depth("jobs")


@pytest.mark.local
async def test_an_open_orchestrator_stays_open(
    orchestrator: AsyncOrchestrator, publish: Callable[..., Awaitable[list[str]]], consumer: Callable[..., Any]
) -> None:
    async def run(job: dict[str, Any]) -> None: ...

    await publish(1)
    await Worker(orchestrator, [consumer(run)], until_idle=True).run()
    assert (await orchestrator.depth("jobs")).ready == 0


@pytest.mark.redis
async def test_a_worker_keeps_trying_until_its_broker_is_there(
    consumer: Callable[..., Any], start: Callable[[Worker], "asyncio.Task[int]"]
) -> None:
    with brokers.redis() as broker:
        async with AsyncOrchestrator(RedisBackend.from_url(broker.url)) as publisher:
            await publisher.declare(QueueSpec("jobs"))
            await publisher.publish("jobs", Job(name="jobs", schema_name="jobs", input_data={}))
        broker.kill()
        ran = asyncio.Event()

        async def run(job: dict[str, Any]) -> None:
            ran.set()

        worker = Worker(AsyncOrchestrator(RedisBackend.from_url(broker.url)), [consumer(run)])
        running = start(worker)
        async with asyncio.timeout(10):
            while worker.health().connected:  # noqa: ASYNC110 (health tells nobody)
                await asyncio.sleep(0.01)
        await asyncio.to_thread(broker.restart)
        async with asyncio.timeout(10):
            await ran.wait()
        assert worker.health().connected
        worker.stop()
        assert await running == 0


@pytest.mark.redis
async def test_a_worker_that_waits_for_its_broker_can_be_stopped(
    consumer: Callable[..., Any], start: Callable[[Worker], "asyncio.Task[int]"]
) -> None:
    async def run(job: dict[str, Any]) -> None: ...

    with socket.socket() as nobody:  # bound and not listening: every connection is refused
        nobody.bind(("127.0.0.1", 0))
        backend = RedisBackend(port=nobody.getsockname()[1])
        worker = Worker(AsyncOrchestrator(backend), [consumer(run)])
        running = start(worker)
        async with asyncio.timeout(20):
            while worker.health().connected:  # noqa: ASYNC110 (health tells nobody)
                await asyncio.sleep(0.01)
            worker.stop()
            assert await running == 0


@pytest.mark.local
async def test_what_is_wrong_with_the_program_is_said_at_once(
    orchestrator: AsyncOrchestrator, consumer: Callable[..., Any]
) -> None:
    async def run(job: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigError, match="two consumers"):
        await Worker(orchestrator, [consumer(run), consumer(run)]).run()
