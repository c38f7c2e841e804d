"""One `backend` for every test of the contract: all there are, each in turn."""

import asyncio
import contextlib
import itertools
import re
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import aiormq
import pytest
from redis import Redis

from mindtrace.jobs import Backend, Depth, QueueSpec, RabbitMQBackend, RedisBackend
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS

T = TypeVar("T")


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


class Sweeper:
    """Deletes beside the tests, over one connection, what they left on RabbitMQ: or the server fills up."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sweeper", daemon=True)
        self._thread.start()
        self._connection = self._run(aiormq.connect(url))
        self._last: Future[None] | None = None

    def _run(self, work: Awaitable[T]) -> T:
        return self._begin(work).result(30)

    def _begin(self, work: Awaitable[T]) -> "Future[T]":
        async def done() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(done(), self._loop)

    def sweep(self, namespaces: Iterable[str], queues: Iterable[str]) -> None:
        """Begin with it, once the sweep before it is over."""
        if self._last is not None:
            self._last.result(30)
        self._last = self._begin(self._delete(list(namespaces), list(queues)))

    async def _delete(self, namespaces: list[str], queues: list[str]) -> None:
        channel = await self._connection.channel()
        for ns in namespaces:
            for name in queues:
                await channel.queue_delete(f"{ns}:{name}", nowait=True)
                await channel.queue_delete(f"{ns}:{name}.dead", nowait=True)
            for name in [f"{ns}:{level}.hold" for level in range(await self._levels(ns))]:
                await channel.queue_delete(name, nowait=True)
                await channel.exchange_delete(name, nowait=True)
            for name in ("priority", "due", "gone"):
                await channel.exchange_delete(f"{ns}:{name}", nowait=True)
        await channel.close()  # answered when all of it is done

    async def _levels(self, ns: str) -> int:
        """How many holds there are, of which the lowest came first: deleting one that is not there costs as much."""
        channel = await self._connection.channel()
        for level in range(LEVELS):
            try:
                await channel.exchange_declare(f"{ns}:{level}.hold", passive=True)
            except aiormq.exceptions.ChannelNotFoundEntity:
                return level
        await channel.close()
        return LEVELS

    def close(self) -> None:
        """Wait for the last sweep."""
        try:
            if self._last is not None:
                self._last.result(30)
            self._run(self._connection.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@pytest.fixture(scope="session")
def sweeper(request: pytest.FixtureRequest) -> Iterator[Sweeper]:
    with contextlib.closing(Sweeper(request.getfixturevalue("rabbitmq_url"))) as sweeper:
        yield sweeper


@pytest.fixture
def on_rabbitmq(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], tuple[str, str]]]:
    """Gives a URL and a namespace that no other test uses; what is declared in it is deleted afterwards.

    RabbitMQ lists no queues, and a backend only those that are there while it is open: so each declare is noted.
    """
    url, sweeper = request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("sweeper")
    namespaces: list[str] = []
    queues = {"gone"}
    declare = RabbitMQBackend.declare

    async def noting(self: RabbitMQBackend, spec: QueueSpec, *, attach: bool = False) -> None:
        queues.add(spec.name)
        await declare(self, spec, attach=attach)

    monkeypatch.setattr(RabbitMQBackend, "declare", noting)

    def made() -> tuple[str, str]:
        namespaces.append(f"t{secrets.token_hex(6)}")
        return url, namespaces[-1]

    yield made
    sweeper.sweep(namespaces, queues)


@pytest.fixture(params=BACKENDS)
def unopened(request: pytest.FixtureRequest) -> Backend:
    """Each in turn, and not opened yet."""
    if request.param == "local":
        return LocalBackend()
    url, namespace = request.getfixturevalue(f"on_{request.param}")()
    kind = {"redis": RedisBackend, "rabbitmq": RabbitMQBackend}[request.param]
    return kind.from_url(url, namespace=namespace)


@pytest.fixture
async def backend(unopened: Backend) -> AsyncIterator[Backend]:
    """Each in turn."""
    await unopened.open()
    yield unopened
    await unopened.aclose()


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
