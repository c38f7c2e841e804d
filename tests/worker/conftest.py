"""What the tests of the worker share: an orchestrator, consumers made of functions, a clock moved by hand."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, Consumer, Job, QueueSpec, Worker
from mindtrace.jobs.backends.local import LocalBackend


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class HandClock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._moved = asyncio.Event()

    def now(self) -> float:
        return self._now

    def wall(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self._now)

    async def until(self, when: float) -> None:
        while self._now < when:
            await self._moved.wait()

    def advance(self, seconds: float) -> None:
        self._now += seconds
        self._moved.set()
        self._moved = asyncio.Event()


@pytest.fixture
def clock() -> HandClock:
    """For a test that names it, the time of `orchestrator`'s backend."""
    return HandClock()


@pytest.fixture
async def orchestrator(request: pytest.FixtureRequest) -> AsyncIterator[AsyncOrchestrator]:
    """Has the queue `jobs`, and no schema."""
    clock: Any = request.getfixturevalue("clock") if "clock" in request.fixturenames else None
    async with AsyncOrchestrator(LocalBackend(clock=clock)) as orchestrator:
        await orchestrator.declare(QueueSpec("jobs"))
        yield orchestrator


@pytest.fixture
def publish(orchestrator: AsyncOrchestrator) -> Callable[..., Awaitable[list[str]]]:
    """Publishes n jobs of the schema that is named, else of the queue's name; `input_data["n"]` counts them from 1."""

    async def published(n: int = 1, queue: str = "jobs", *, schema: str = "", **options: Any) -> list[str]:
        jobs = [Job(name=queue, schema_name=schema or queue, input_data={"n": i + 1}) for i in range(n)]
        return await orchestrator.publish_many(queue, jobs, **options)

    return published


@pytest.fixture
def consumer() -> Callable[..., Any]:
    """A consumer whose `run` is the given function: in a thread if it is a plain one."""

    def made(act: Callable[[dict[str, Any]], Any], name: str = "jobs", **options: Any) -> Any:
        base: type[Any] = AsyncConsumer if inspect.iscoroutinefunction(act) else Consumer
        return type("Acting", (base,), {"run": staticmethod(act), **options})(name)

    return made


@pytest.fixture
async def start() -> AsyncIterator[Callable[[Worker], "asyncio.Task[int]"]]:
    """Runs a worker beside the test, and ends it with it."""
    tasks: list[asyncio.Task[int]] = []

    def started(worker: Worker) -> "asyncio.Task[int]":
        tasks.append(asyncio.create_task(worker.run()))
        return tasks[-1]

    yield started
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Gate:
    """Where coroutines wait until the test lets them go."""

    def __init__(self) -> None:
        self.waiting = self.most = self.cancelled = 0
        self._opened, self._changed = asyncio.Event(), asyncio.Event()

    async def enter(self) -> None:
        """Called by a run."""
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        self._tell()
        try:
            await self._opened.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
            self._tell()

    async def holds(self, n: int) -> None:
        """Wait until n are waiting here."""
        async with asyncio.timeout(10):
            while self.waiting != n:
                await self._changed.wait()

    def open(self) -> None:
        self._opened.set()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


async def _until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while True:
            answer = condition()
            if await answer if inspect.isawaitable(answer) else answer:
                return
            await asyncio.sleep(0)


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Awaitable[None]]:
    """Waits for a condition, plain or awaitable, that nobody tells of."""
    return _until


async def _turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture
def settle_down() -> Callable[[], Awaitable[None]]:
    """Gives the loop so many turns that whatever needs no time has happened."""
    return _turns
