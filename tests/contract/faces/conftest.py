"""One `jobs` for every test here: both faces of the library on every backend, behind the same awaited calls."""

import asyncio
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Backend,
    Consumer,
    Depth,
    JobSchema,
    LocalClient,
    Orchestrator,
    RabbitMQBackend,
    RabbitMQClient,
    RedisBackend,
    RedisClient,
    Traits,
    Worker,
)
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.background import background
from mindtrace.jobs.clients import Client
from mindtrace.jobs.delivery import DeadRecord, Published
from mindtrace.jobs.wire import Message


class Order(BaseModel):
    item: str = "tea"
    amount: int = 1


class Receipt(BaseModel):
    total: int


SHAPES = ("run", "async run", "handle", "async handle")


class Jobs:
    """An orchestrator of either face; every method of it awaited."""

    orchestrator: Any

    @property
    def traits(self) -> Traits:
        raise NotImplementedError

    async def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """`register`, `publish`, `depth`, ...: the orchestrator's own."""
        return self.awaited(self.orchestrator, name)

    def awaited(self, target: Any, name: str) -> Callable[..., Awaitable[Any]]:
        async def method(*args: Any, **options: Any) -> Any:
            return await self.call(getattr(target, name), *args, **options)

        return method

    def dead_letters(self, queue: str) -> "Letters":
        return Letters(self, queue)

    async def dead(self, queue: str) -> list[DeadRecord]:
        return (await self.dead_letters(queue).list()).records

    async def until_dead(self, queue: str) -> None:
        """Wait for the first dead letter."""
        while not await self.dead(queue):  # noqa: ASYNC110 (no face tells of it)
            await asyncio.sleep(0)

    async def put(self, queue: str, *messages: Message) -> list[Published]:
        """Store bytes that no orchestrator would write."""
        raise NotImplementedError

    async def consume(self, consumer: Any, n: int) -> int:
        """Run n deliveries, one at a time; how many were handled."""
        raise NotImplementedError

    @asynccontextmanager
    async def consuming(self, consumer: Any, n: int) -> AsyncIterator[None]:
        """The same beside the block, which it outlives."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.consume(consumer, n))
            yield

    def consumer(self, shape: str, act: Callable[[Any], Any], name: str = "orders", **options: Any) -> Any:
        """A consumer of this face that does `act`, by one of the four methods a user may write."""
        is_async, method = shape.startswith("async"), shape.removeprefix("async ")

        def call(self: Any, job: Any) -> Any:
            return act(job)

        async def async_call(self: Any, job: Any) -> Any:
            answer = act(job)
            return await answer if isinstance(answer, Awaitable) else answer

        kind = self.consumer_class(is_async)
        base = kind[Order, Receipt] if method == "handle" else kind
        body = {method: async_call if is_async else call, **options}
        return types.new_class("Acting", (base,), exec_body=lambda names: names.update(body))(name)

    def consumer_class(self, is_async: bool) -> Any:
        raise NotImplementedError


class Letters:
    """The dead letters of a queue; every method of them awaited."""

    def __init__(self, jobs: Jobs, queue: str) -> None:
        self._jobs, self._letters = jobs, jobs.orchestrator.dead_letters(queue)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return self._jobs.awaited(self._letters, name)


class Awaited(Jobs):
    def __init__(self, where: "Where", options: dict[str, Any]) -> None:
        self.orchestrator = AsyncOrchestrator(where.backend(), **options)

    @property
    def traits(self) -> Traits:
        return self.orchestrator.backend.traits

    async def __aenter__(self) -> "Awaited":
        await self.orchestrator.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.orchestrator.aclose()

    async def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return await method(*args, **options)

    async def put(self, queue: str, *messages: Message) -> list[Published]:
        return await self.orchestrator.backend.publish(queue, messages)

    async def consume(self, consumer: Any, n: int) -> int:
        worker = Worker(self.orchestrator, [consumer], concurrency=1, max_jobs=n)
        await worker.run()
        return worker.handled

    def consumer_class(self, is_async: bool) -> Any:
        return AsyncConsumer if is_async else Consumer


class Blocking(Jobs):
    def __init__(self, where: "Where", options: dict[str, Any]) -> None:
        self.client = where.client()
        self.orchestrator = Orchestrator(self.client, **options)

    @property
    def traits(self) -> Traits:
        return self.client.backend.traits

    async def __aenter__(self) -> "Blocking":
        await self.queues()  # the first call opens it
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.client.close)

    async def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(method, *args, **options)

    async def put(self, queue: str, *messages: Message) -> list[Published]:
        backend = self.client.backend
        return await asyncio.to_thread(background.call, lambda: backend.publish(queue, messages))

    async def consume(self, consumer: Any, n: int) -> int:
        await asyncio.to_thread(consumer.connect, self.orchestrator)
        return await asyncio.to_thread(consumer.consume, n)

    def consumer_class(self, is_async: bool) -> Any:
        return Consumer


FACES = {"awaited": Awaited, "blocking": Blocking}


KINDS: dict[str, tuple[Any, Any]] = {
    "local": (LocalBackend, LocalClient),
    "redis": (RedisBackend, RedisClient),
    "rabbitmq": (RabbitMQBackend, RabbitMQClient),
}


@dataclass
class Where:
    """A backend for one test: on a server in a namespace that no other uses."""

    kind: str
    on_server: Callable[[], tuple[str, str]] | None

    def backend(self) -> Backend:
        return self._made(KINDS[self.kind][0])

    def client(self) -> Client[Any]:
        return self._made(KINDS[self.kind][1])

    def _made(self, kind: Any) -> Any:
        if self.on_server is None:
            return kind()
        url, namespace = self.on_server()
        return kind.from_url(url, namespace=namespace)


BROKERS = {"local": [], **{name: [pytest.mark.uses_broker(name)] for name in ("redis", "rabbitmq")}}


@pytest.fixture(
    params=[
        pytest.param((face, backend), id=f"{face}-{backend}", marks=[getattr(pytest.mark, backend), *marks])
        for face in FACES
        for backend, marks in BROKERS.items()
    ]
)
def face(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], Any]:
    face, backend = request.param
    where = Where(backend, None if backend == "local" else request.getfixturevalue(f"on_{backend}"))
    return partial(FACES[face], where)


@pytest.fixture
async def open_jobs(face: Callable[[dict[str, Any]], Any]) -> AsyncIterator[Callable[..., Awaitable[Jobs]]]:
    """Another orchestrator of the face under test, with options, on a backend of its own."""
    async with AsyncExitStack() as stack:

        async def opened(**options: Any) -> Jobs:
            return await stack.enter_async_context(face(options))

        yield opened


@pytest.fixture
async def jobs(open_jobs: Callable[..., Awaitable[Jobs]]) -> Jobs:
    return await open_jobs()


@pytest.fixture
def known(jobs: Jobs) -> Callable[[int, int, int, int], Depth]:
    """A depth as the backend under test can know it."""

    def depth(ready: int, scheduled: int, leased: int, dead: int) -> Depth:
        exact = jobs.traits.exact_depth
        return Depth(ready, scheduled if exact else None, leased if exact else None, dead)

    return depth


@pytest.fixture
async def orders(jobs: Jobs) -> JobSchema[Order, Receipt]:
    """A registered schema, `Order` to `Receipt`, in the queue `orders`."""
    schema = JobSchema("orders", Order, Receipt)
    await jobs.register(schema)
    return schema


class Gate:
    """Where a run in a thread waits until the test lets it go."""

    def __init__(self) -> None:
        self._entered, self._opened = threading.Event(), threading.Event()

    def enter(self) -> None:
        """Called by the run."""
        self._entered.set()
        assert self._opened.wait(10), "nobody opened the gate"

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 10), "no run came to the gate"

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def envelope(input_data: str = '{"item":"tea"}', **fields: str) -> bytes:
    """The bytes of an order, its JSON field by field."""
    known = {"v": "1", "id": '"an-id"', "name": '"orders"', "created_at": "1700000000000", "input": input_data}
    return ("{" + ",".join(f'"{key}":{value}' for key, value in (known | fields).items()) + "}").encode()


def _without(name: str) -> bytes:
    return envelope(**{name: "1"}).replace(b'"%b":1,' % name.encode(), b"").replace(b',"%b":1' % name.encode(), b"")


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"tea, please",
    "truncated": envelope()[:-2],
    "something behind it": envelope() + b"x",
    "not UTF-8": envelope().replace(b"tea", b"\xff\xfe"),
    "a BOM": b"\xef\xbb\xbf" + envelope(),
    "UTF-16": envelope().decode().encode("utf-16"),
    "NUL": b"\0" + envelope(),
    "NUL in a text": envelope().replace(b"tea", b"t\0a"),
    "a lone surrogate": envelope().replace(b"tea", rb"\ud800"),
    "NaN": envelope('{"amount":NaN}'),
    "an infinity": envelope('{"amount":-Infinity}'),
    "a number that is read as one": envelope('{"amount":1e999}'),
    "5,000 digits": envelope('{"amount":%s}' % ("9" * 5000)),
    "depth 65": envelope('{"item":%s}' % ("[" * 64 + "]" * 64)),
    "depth 100,000": envelope('{"item":%s}' % ("[" * 100_000 + "]" * 100_000)),
    "a list": b"[]",
    "null": b"null",
    **{f"no {name}": _without(name) for name in ("v", "id", "name", "created_at", "input")},
    "v as text": envelope(v='"1"'),
    "v as a boolean": envelope(v="true"),
    "id as a number": envelope(id="1"),
    "created_at as a fraction": envelope(created_at="1.5"),
    "due_at as text": envelope(due_at='"soon"'),
    "schema as a number": envelope(schema="1"),
    "input as a list": envelope("[]"),
    "headers of numbers": envelope(headers='{"trace":1}'),
    "headers as a list": envelope(headers="[]"),
    "priority as text": envelope(priority='"high"'),
    "timeout 0": envelope(timeout="0"),
    "timeout as text": envelope(timeout='"long"'),
    "retry as a number": envelope(retry="3"),
    "retry out of range": envelope(retry='{"max_attempts":0}'),
}


@pytest.fixture(params=[pytest.param(body, id=name) for name, body in MALFORMED.items()])
def malformed(request: pytest.FixtureRequest) -> bytes:
    """Bytes that no worker can read, each kind in turn."""
    return request.param


@pytest.fixture
def an_envelope() -> Callable[..., bytes]:
    return envelope


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    """The four methods that a consumer may be written with, each in turn."""
    return request.param


@pytest.fixture
def receive_all(jobs: Jobs) -> Callable[[str], Awaitable[list[dict[str, Any]]]]:
    """Takes everything that is ready off a queue."""

    async def taken(queue: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while (job := await jobs.receive_message(queue)) is not None:
            found.append(job)
        return found

    return taken
