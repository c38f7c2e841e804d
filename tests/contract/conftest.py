"""One `backend` for every test of the contract: all there are, each in turn."""

import asyncio
import itertools
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiormq
import pytest
from redis import Redis

from mindtrace.jobs import Backend, Depth, QueueSpec, RabbitMQBackend, RedisBackend
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


README = Path(__file__).parents[2] / "README.md"
BACKENDS = [
    pytest.param("local", marks=pytest.mark.local),
    pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.uses_broker("redis")]),
    pytest.param("rabbitmq", marks=[pytest.mark.rabbitmq, pytest.mark.uses_broker("rabbitmq")]),
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


class Recorded:
    """The queues that a test declares on RabbitMQ, which lists none: deleted after it, or the server fills up."""

    def __init__(self) -> None:
        self.namespaces: list[str] = []
        self.queues: set[str] = {"gone"}


@pytest.fixture
def on_rabbitmq(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], tuple[str, str]]]:
    """Gives a URL and a namespace that no other test uses; what is declared in it is deleted afterwards."""
    url = request.getfixturevalue("rabbitmq_url")
    recorded = Recorded()
    declare = RabbitMQBackend.declare

    async def recording(self: RabbitMQBackend, spec: QueueSpec, *, attach: bool = False) -> None:
        recorded.queues.add(spec.name)
        await declare(self, spec, attach=attach)

    monkeypatch.setattr(RabbitMQBackend, "declare", recording)

    def made() -> tuple[str, str]:
        recorded.namespaces.append(f"t{secrets.token_hex(6)}")
        return url, recorded.namespaces[-1]

    yield made
    asyncio.run(_deleted(url, recorded))


async def _deleted(url: str, recorded: Recorded) -> None:
    async with aiormq.connect(url) as connection:
        channel = await connection.channel()
        for ns in recorded.namespaces:
            for name in recorded.queues:
                await channel.queue_delete(f"{ns}:{name}")
                await channel.queue_delete(f"{ns}:{name}.dead")
            for level in range(LEVELS):
                await channel.queue_delete(f"{ns}:{level}.hold")
                await channel.exchange_delete(f"{ns}:{level}.hold")
            for name in ("priority", "due", "gone"):
                await channel.exchange_delete(f"{ns}:{name}")


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Each in turn."""
    if request.param == "local":
        backend: Backend = LocalBackend()
    else:
        url, namespace = request.getfixturevalue(f"on_{request.param}")()
        kind = {"redis": RedisBackend, "rabbitmq": RabbitMQBackend}[request.param]
        backend = kind.from_url(url, namespace=namespace)
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
def known(backend: Backend) -> Callable[[int, int, int, int], Depth]:
    """A depth as this backend can know it."""

    def depth(ready: int, scheduled: int, leased: int, dead: int) -> Depth:
        exact = backend.traits.exact_depth
        return Depth(ready, scheduled if exact else None, leased if exact else None, dead)

    return depth


@pytest.fixture
def until_ready(backend: Backend) -> Callable[[str, int], Awaitable[None]]:
    """Waits until so many jobs count as ready: by looking only, which collects and promotes nothing."""

    async def waited(queue: str, count: int) -> None:
        async with asyncio.timeout(10):
            while (await backend.depth(queue)).ready != count:  # noqa: ASYNC110 (a depth rings no bell)
                await asyncio.sleep(0)

    return waited
