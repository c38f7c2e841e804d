"""One `backend` for every test of the contract: all there are, each in turn."""

import asyncio
import itertools
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from mindtrace.jobs import Backend, QueueSpec, RedisBackend
from mindtrace.jobs.backends.local import LocalBackend


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


README = Path(__file__).parents[2] / "README.md"
BACKENDS = [
    pytest.param("local", marks=pytest.mark.local),
    pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.uses_broker("redis")]),
]


@pytest.fixture
def on_redis(request: pytest.FixtureRequest) -> Iterator[Callable[[], tuple[str, str]]]:
    """Gives a URL and a namespace that no other test uses, of a user who may do what the README says, and no more."""
    [recipe] = re.findall(r"ACL SETUSER jobs on '>a-password' '~mtj:\*' ([^`]*)```", README.read_text("utf-8"))
    rights = recipe.replace("\\", "").replace("'", "").split()
    url = request.getfixturevalue("redis_url")
    users: list[str] = []
    with Redis.from_url(url) as server:

        def made() -> tuple[str, str]:
            name = f"t{secrets.token_hex(6)}"
            server.execute_command("ACL", "SETUSER", name, "on", ">secret", f"~{name}:*", *rights)
            users.append(name)
            return url.replace("://", f"://{name}:secret@"), name

        yield made
        if users:
            server.execute_command("ACL", "DELUSER", *users)


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Each in turn."""
    if request.param == "local":
        backend: Backend = LocalBackend()
    else:
        url, namespace = request.getfixturevalue("on_redis")()
        backend = RedisBackend.from_url(url, namespace=namespace)
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
