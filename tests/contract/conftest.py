"""One `backend` for every test of the contract: all there are, each in turn."""

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from mindtrace.jobs import Backend, QueueSpec, RedisBackend
from mindtrace.jobs.backends.local import LocalBackend


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


BACKENDS = [
    pytest.param("local", marks=pytest.mark.local),
    pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.uses_broker("redis")]),
]


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Each in turn; on a server in a namespace of the test's own."""
    if request.param == "local":
        backend: Backend = LocalBackend()
    else:
        backend = RedisBackend.from_url(request.getfixturevalue("redis_url"), namespace=f"t{secrets.token_hex(6)}")
    await backend.open()
    yield backend
    await backend.aclose()


@pytest.fixture
async def queue(backend: Backend) -> str:
    await backend.declare(QueueSpec("jobs"))
    return "jobs"


@pytest.fixture
def new_queue(backend: Backend) -> Callable[..., Awaitable[str]]:
    """Declares a queue that no test has used, with what `QueueSpec` takes beside the name."""
    numbers = itertools.count(1)

    async def declared(*properties: object, **named: object) -> str:
        spec = QueueSpec(f"jobs-{next(numbers)}", *properties, **named)  # type: ignore[arg-type]
        await backend.declare(spec)
        return spec.name

    return declared


@pytest.fixture
def until_ready(backend: Backend) -> Callable[[str, int], Awaitable[None]]:
    """Waits until so many jobs count as ready: by looking only, which collects and promotes nothing."""

    async def waited(queue: str, count: int) -> None:
        async with asyncio.timeout(10):
            while (await backend.depth(queue)).ready != count:  # noqa: ASYNC110 (a depth rings no bell)
                await asyncio.sleep(0)

    return waited
