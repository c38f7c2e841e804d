"""A deploy under load: workers are replaced while others publish without pause, and no job notices."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mindtrace.jobs import AsyncOrchestrator, Job, QueueSpec, RabbitMQBackend, RedisBackend
from mindtrace.jobs.testing.ledger import Ledger, violations

pytestmark = [pytest.mark.anyio, pytest.mark.chaos, pytest.mark.timeout(180)]

DRAIN = 2.0
PROCESSES = 4
PATIENCE = 60.0

APP = """
from app import *
from mindtrace.jobs import JobSettled, current_job
from mindtrace.jobs.testing.ledger import Ledger

ledger = Ledger(os.environ["LEDGER"])
words = {"Done": "done", "Retry": "retry", "Dead": "dead", "Release": "release"}
numbers = {}

class Works(AsyncConsumer):
    async def run(self, job_dict):
        job = current_job()
        numbers.setdefault((job.id, job.attempt), []).append(job.number)
        with ledger.running(job.id, job.number, attempt=job.attempt):
            say("begins")
            await asyncio.sleep(job_dict["input_data"]["seconds"])
            ledger.effect(job.id)
        return {}

def note(event):
    if isinstance(event, JobSettled) and (mine := numbers.get((event.job_id, event.attempt))):
        ledger.answer(event.job_id, mine.pop(0), event.accepted, words[type(event.settlement).__name__])

worker = Worker(an_orchestrator(), [Works("jobs")], listeners=[note])
"""


class Load:
    """Publishers, and the ledger of what became of what they published."""

    def __init__(self, site: Any) -> None:
        self.site, self.ledger = site, Ledger(site.folder / "ledger")
        kind = RabbitMQBackend if site.url.startswith("amqp") else RedisBackend
        self.orchestrator = AsyncOrchestrator(kind.from_url(site.url, namespace=site.namespace))
        self._over = asyncio.Event()
        site.write(APP, "deployed.py")

    def start(self, *words: str) -> Any:
        options = ("deployed:worker", "-c", "5", "--drain", str(DRAIN), *words)
        return self.site.start(*options, LEDGER=str(self.ledger.path))

    @asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        """Inside the block three publish without pause; after it all that they published is waited for."""
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(self._publish_on())
            try:
                yield
            finally:
                self._over.set()
        async with asyncio.timeout(PATIENCE):
            while self._left() or (await self.orchestrator.depth("jobs")).ready:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.1)

    async def _publish_on(self) -> None:
        for count in range(1_000_000):
            if self._over.is_set():
                return
            # Most are short, and some outlast the drain: those are handed back.
            job = Job(name="jobs", schema_name="jobs", input_data={"seconds": 2 * DRAIN if count % 50 == 20 else 0.02})
            with self.ledger.publishing(job.id):
                await self.orchestrator.publish("jobs", job)
            await asyncio.sleep(0.01)

    def _left(self) -> set[str]:
        entries = self.ledger.entries()
        done = {entry.id for entry in entries if entry.step == "answer" and entry.accepted and entry.settled == "done"}
        return {entry.id for entry in entries if entry.step == "confirmed"} - done

    async def check(self) -> None:
        """No job is lost, none has its effect twice, and none was charged an attempt."""
        entries = self.ledger.entries()
        effects = Counter(entry.id for entry in entries if entry.step == "effect")
        assert set(effects) == {entry.id for entry in entries if entry.step == "confirmed"}
        assert set(effects.values()) == {1}
        assert {entry.attempt for entry in entries if entry.step == "start"} == {1}
        assert (await self.orchestrator.depth("jobs")).dead == 0
        assert violations(entries, {}, fenced=self.orchestrator.backend.traits.fences) == []
        assert any(entry.settled == "release" for entry in entries)  # else nothing outlasted a drain


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("redis", "rabbitmq")])
async def load(request: pytest.FixtureRequest, site_on: Callable[[str], Any]) -> AsyncIterator[Load]:
    load = Load(site_on(request.getfixturevalue(f"{request.param}_url")))
    async with load.orchestrator:
        await load.orchestrator.declare(QueueSpec("jobs"))
        yield load


async def test_workers_that_are_replaced_one_after_another_lose_and_repeat_nothing(load: Load) -> None:
    working = [load.start() for _ in range(PROCESSES)]
    async with load.publishing():
        for worker in working:
            await asyncio.to_thread(worker.out.until, "begins")
        for worker in list(working):
            new = load.start()
            working.append(new)
            await asyncio.to_thread(new.out.until, "begins")
            asked = time.monotonic()
            worker.send(signal.SIGTERM)
            assert await asyncio.to_thread(worker.status) in (0, 1)
            assert time.monotonic() - asked < DRAIN + 2.0
            working.remove(worker)
    for worker in working:
        worker.send(signal.SIGTERM)
    assert [worker.status() for worker in working] == [0] * PROCESSES
    await load.check()


async def test_a_rolling_restart_of_a_supervisor_loses_and_repeats_nothing(load: Load) -> None:
    command = load.start("--processes", str(PROCESSES))
    async with load.publishing():
        seen: set[str] = set()
        while len(seen) < PROCESSES:
            seen.add((await asyncio.to_thread(command.out.until, r"^(\d+) begins"))[1])
        command.send(signal.SIGHUP)
        for _ in range(PROCESSES):
            left = await asyncio.to_thread(command.err.until, r"has left within (\d+\.\d) s, pid \d+ goes on", PATIENCE)
            assert float(left[1]) < DRAIN + 2.0
        await asyncio.to_thread(command.err.until, "rolling restart: done")
        while len(seen) < 2 * PROCESSES:
            seen.add((await asyncio.to_thread(command.out.until, r"^(\d+) begins"))[1])
    command.send(signal.SIGTERM)
    assert await asyncio.to_thread(command.status) == 0
    await load.check()
