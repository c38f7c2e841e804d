"""Redis servers to break, each of one test's own, and places where there is none."""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis

from mindtrace.jobs import QueueSpec, RedisBackend
from mindtrace.jobs.testing import brokers


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Server:
    """A Redis of one test's own.

    Attributes:
        broker: to kill, stop and restart it.
        url: where it is.
        port: the same.
    """

    def __init__(self, broker: brokers.Broker) -> None:
        self.broker = broker
        self.url = broker.url
        self.port = int(broker.url.rpartition(":")[2].split("/")[0])

    def say(self, *words: str | int) -> Any:
        """One command, on a connection of its own, as the administrator."""
        with redis.Redis(port=self.port, protocol=2, decode_responses=True, socket_timeout=10) as client:
            return client.execute_command(*words)

    def info(self, section: str) -> dict[str, Any]:
        return self.say("INFO", section)

    def clients(self) -> list[dict[str, str]]:
        """Our connections, as the server lists them."""
        with redis.Redis(port=self.port, protocol=2) as client:
            listed: Any = client.client_list()
            return [one for one in listed if one["name"].startswith("mtjobs")]

    def keys(self) -> dict[str, bytes | None]:
        """All that lies there, by key."""
        with redis.Redis(port=self.port, protocol=2) as client:
            return {key.decode(): client.dump(key) for key in client.scan_iter()}


@pytest.fixture
def new_server() -> Iterator[Callable[..., Server]]:
    """Starts a server with these settings, an underscore for each dash."""
    started: list[brokers.Broker] = []

    def new(**settings: str) -> Server:
        named = {name.replace("_", "-"): value for name, value in settings.items()}
        started.append(brokers.redis(private=True, settings=named))
        return Server(started[-1])

    yield new
    for broker in started:
        broker.kill()  # one that cannot write its data would take its time to end in order
        broker.close()


@pytest.fixture
def server(new_server: Callable[..., Server]) -> Server:
    return new_server()


@pytest.fixture
async def new_backend() -> AsyncIterator[Callable[..., Awaitable[RedisBackend]]]:
    """Opens a backend on a server, with the queue `jobs`."""
    async with AsyncExitStack() as stack:

        async def new(server: Server, **options: Any) -> RedisBackend:
            backend = RedisBackend(port=server.port, **options)
            await backend.open()
            stack.push_async_callback(backend.aclose)
            await backend.declare(QueueSpec("jobs"), attach=True)
            return backend

        yield new


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are taken and nobody ever says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.fixture
def no_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
