"""On uvloop, which uvicorn takes where it is installed, and whose sockets are others than asyncio's."""

import asyncio
from typing import Any

import pytest
import redis as redis_driver
import uvloop

from mindtrace.jobs import AsyncOrchestrator, Job, QueueSpec, RedisBackend
from mindtrace.jobs.testing import brokers

pytestmark = pytest.mark.redis


def test_a_connection_that_is_lost_is_made_again_and_closing_leaves_no_error_behind() -> None:
    """A socket whose transport has closed has no file descriptor there, and refuses to be set up by a ValueError."""
    complaints: list[dict[str, Any]] = []

    async def lose_it_again_and_again() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        backend = RedisBackend.from_url(broker.url)
        async with asyncio.timeout(30), AsyncOrchestrator(backend) as jobs:
            await jobs.declare(QueueSpec("jobs"))
            for number in range(10):
                for client in await asyncio.to_thread(server.client_list):
                    if client["name"].startswith("mtjobs:"):
                        server.client_kill_filter(_id=client["id"])
                job = Job(id=f"job-{number}", name="jobs", schema_name="jobs", input_data={})
                await jobs.publish("jobs", job)
            assert await jobs.count_queue_messages("jobs") == 10

    with brokers.redis(private=True) as broker, redis_driver.Redis.from_url(broker.url) as server:
        uvloop.run(lose_it_again_and_again())
    assert complaints == []
