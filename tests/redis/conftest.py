"""A backend in a namespace of the test's own, and the server as somebody else sees it."""

import secrets
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from mindtrace.jobs import QueueSpec, RedisBackend


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def namespace() -> str:
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
async def backend(redis_url: str, namespace: str) -> AsyncIterator[RedisBackend]:
    backend = RedisBackend.from_url(redis_url, namespace=namespace)
    await backend.open()
    yield backend
    await backend.aclose()


@pytest.fixture
async def queue(backend: RedisBackend) -> str:
    await backend.declare(QueueSpec("jobs"))
    return "jobs"


@pytest.fixture
async def server(redis_url: str) -> AsyncIterator[Redis]:
    """A client of the driver's own, which writes what it likes."""
    client: Redis = Redis.from_url(redis_url, protocol=2)
    yield client
    await client.aclose()
