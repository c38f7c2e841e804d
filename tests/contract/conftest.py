"""One `backend` for every test of the contract: all there are, each in turn."""

from collections.abc import AsyncIterator

import pytest

from mindtrace.jobs import Backend, QueueSpec
from mindtrace.jobs.backends.local import LocalBackend


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=[pytest.param("local", marks=pytest.mark.local)])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    backend = LocalBackend()
    await backend.open()
    yield backend
    await backend.aclose()


@pytest.fixture
async def queue(backend: Backend) -> str:
    await backend.declare(QueueSpec("jobs"))
    return "jobs"
