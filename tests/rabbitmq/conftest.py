"""A backend in a namespace of the test's own, and the server as somebody else sees it."""

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

import aiormq
import pytest
from aiormq.abc import AbstractChannel, AbstractConnection
from pamqp import commands

from mindtrace.jobs import QueueSpec, RabbitMQBackend
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS
from mindtrace.jobs.testing import brokers

ANSWERS = 20.0  # seconds that anything here may take
TYPE_OF = {"message_id": 0x80, "content_type": 0x8000, "headers": 0x2000, "timestamp": 0x40}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class AsTheyAre(commands.Basic.Properties):
    """Properties of which somebody wrote the bytes by hand."""

    def __init__(self, kind: str, value: bytes) -> None:
        super().__init__()
        self._bytes = struct.pack(">H", TYPE_OF[kind]) + value

    def marshal(self) -> bytes:
        return self._bytes


class Somebody:
    """A client of the driver's own, which does what it likes."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url, self.namespace = url, namespace
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None

    async def channel(self) -> AbstractChannel:
        """Opened again where the server closed it."""
        if self._connection is None or self._connection.is_closed:
            self._connection = await aiormq.connect(self.url)
            self._channel = None
        if self._channel is None or self._channel.is_closed:
            self._channel = await self._connection.channel()
        return self._channel

    async def put(
        self,
        body: bytes,
        queue: str = "jobs",
        *,
        raw: tuple[str, bytes] | None = None,
        **properties: Any,
    ) -> None:
        """A message for a queue of the namespace, confirmed. `raw`: a property and the bytes of its value."""
        made = commands.Basic.Properties(**properties) if raw is None else AsTheyAre(*raw)
        channel = await self.channel()
        await channel.basic_publish(body, routing_key=f"{self.namespace}:{queue}", properties=made)

    async def publish(self, exchange: str, key: str, body: bytes, headers: Mapping[str, Any] | bytes) -> None:
        """A message for an exchange, by its name on the server, confirmed. Headers in bytes are all that it has."""
        made = (
            AsTheyAre("headers", headers)
            if isinstance(headers, bytes)
            else commands.Basic.Properties(headers=dict(headers), delivery_mode=2)
        )
        await (await self.channel()).basic_publish(body, exchange=exchange, routing_key=key, properties=made)

    async def until_exchange(self, exchange: str) -> None:
        """Waits until there is one of this name in the namespace."""
        async with asyncio.timeout(ANSWERS):
            while True:
                with suppress(aiormq.exceptions.ChannelNotFoundEntity):
                    await (await self.channel()).exchange_declare(f"{self.namespace}:{exchange}", passive=True)
                    return
                await asyncio.sleep(0.05)

    async def count(self, queue: str) -> int | None:
        """How many messages are ready in a queue by its name in the namespace; None if there is none."""
        try:
            found = await (await self.channel()).queue_declare(f"{self.namespace}:{queue}", passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return None
        return found.message_count

    async def until(self, queue: str, count: int | None) -> None:
        """Waits until so many are ready in it; None: until it is gone."""
        async with asyncio.timeout(ANSWERS):
            while await self.count(queue) != count:  # noqa: ASYNC110 (a count rings no bell)
                await asyncio.sleep(0.01)

    async def until_consumed(self, queue: str, *, by: int = 1) -> None:
        """Waits until the server pushes from it to so many."""
        channel, name = await self.channel(), f"{self.namespace}:{queue}"
        async with asyncio.timeout(ANSWERS):
            while (await channel.queue_declare(name, passive=True)).consumer_count != by:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def all_of(self, queue: str) -> list[tuple[Mapping[str, Any], bytes]]:
        """Headers and bodies of all that is ready in a queue. It stays there, as what was with somebody who is gone."""
        channel, found = await self.channel(), list[tuple[Mapping[str, Any], bytes]]()
        while True:
            got = await channel.basic_get(f"{self.namespace}:{queue}")
            if isinstance(got.delivery, commands.Basic.GetEmpty):
                break
            found.append((got.header.properties.headers or {}, got.body))
        await channel.close()
        return found

    async def delete(self, queues: Sequence[str]) -> None:
        """Queues by their names in the namespace, and every exchange of ours."""
        channel = await self.channel()
        for name in queues:
            await channel.queue_delete(f"{self.namespace}:{name}")
        for name in [*(f"{level}.hold" for level in range(LEVELS)), "priority", "due", "gone", "up.hold"]:
            await channel.exchange_delete(f"{self.namespace}:{name}")

    async def aclose(self) -> None:
        if self._connection is not None:
            await self._connection.close()


class World:
    """One namespace on a server.

    Attributes:
        url: of the server.
        namespace: of this test.
        somebody: another client.
        backend: an open one; `another` gives more.
    """

    def __init__(self, url: str, namespace: str | None = None) -> None:
        self.url, self.namespace = url, namespace or f"t{secrets.token_hex(6)}"
        self.somebody = Somebody(url, self.namespace)
        self._backends: list[RabbitMQBackend] = []
        self._queues = {"gone"}

    @property
    def backend(self) -> RabbitMQBackend:
        return self._backends[0]

    async def another(self, url: str | None = None, **options: Any) -> RabbitMQBackend:
        """As another process would have it; by way of a proxy where its URL is given."""
        backend = RabbitMQBackend.from_url(url or self.url, namespace=self.namespace, **options)
        await backend.open()
        self._backends.append(backend)
        return backend

    async def queue(self, name: str = "jobs", *properties: Any, **named: Any) -> str:
        """Declared by the first backend, and deleted after the test."""
        self._queues.add(name)
        await self.backend.declare(QueueSpec(name, *properties, **named))
        return name

    async def aclose(self) -> None:
        for backend in self._backends:
            await backend.aclose()
        names = [name for queue in self._queues for name in (queue, f"{queue}.dead")]
        await self.somebody.delete([*names, *(f"{level}.hold" for level in range(LEVELS))])
        await self.somebody.aclose()


@pytest.fixture
async def new_world() -> AsyncIterator[Callable[..., Awaitable[World]]]:
    """By the URL of a server, and a namespace if it matters."""
    async with AsyncExitStack() as stack:

        async def new(url: str, namespace: str | None = None) -> World:
            world = World(url, namespace)
            await world.another()
            stack.push_async_callback(world.aclose)
            return world

        yield new


@pytest.fixture
async def world(rabbitmq_url: str, new_world: Callable[..., Awaitable[World]]) -> World:
    return await new_world(rabbitmq_url)


@pytest.fixture(scope="session")
def own_broker() -> Iterator[brokers.Broker]:
    """A server that may be killed."""
    with brokers.rabbitmq(private=True) as broker:
        yield broker
