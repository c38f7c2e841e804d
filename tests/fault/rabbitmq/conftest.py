"""Workers in processes of their own on a RabbitMQ that may be killed, and a ledger of what they did."""

import asyncio
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any, Literal

import aiormq
import pytest

from mindtrace.jobs import AsyncOrchestrator, Job, QueueSpec, RabbitMQBackend, RetryPolicy
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS, Topology
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.ledger import Entry, Ledger, Step, Where, violations

PROGRAM = Path(__file__).parent.with_name("worker_process.py")
PATIENCE = 30.0  # seconds that anything may take before the test gives up on it


class Process:
    """A worker process that runs, or has ended."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.pid: int = process.pid
        self.runs = 0
        self._process, self._log = process, log
        self._began = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def next_run(self) -> None:
        """Wait until another of its runs begins."""
        self._began.clear()
        async with asyncio.timeout(PATIENCE):
            await self._began.wait()
        assert not self.has_ended(), self.log()

    def has_ended(self) -> bool:
        return self._reader.done()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def status(self, within: float = 2 * PATIENCE) -> int:
        """Its exit status, once it has ended."""
        async with asyncio.timeout(within):
            await asyncio.wait({self._reader})  # whoever waits may be cancelled, and not the reader with it
            return await self._process.wait()

    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    async def says(self, words: str) -> None:
        """Wait until they are in its log."""
        async with asyncio.timeout(PATIENCE):
            while words not in self.log():  # noqa: ASYNC110 (a file tells nobody)
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        """End it, also where it is stopped."""
        if self._process.returncode is None:
            self._process.kill()
        await self.status()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while await self._process.stdout.readline():
            self.runs += 1
            self._began.set()
        self._began.set()


class Scene:
    """A namespace with a queue `jobs`, a ledger, and worker processes that come and go."""

    def __init__(self, server: Broker, folder: Path, kind: Literal["fifo", "priority"]) -> None:
        folder.mkdir()
        self.server, self.kind = server, kind
        self.ledger = Ledger(folder / "ledger")
        self.topology = Topology(f"t{secrets.token_hex(6)}")
        self.orchestrator = AsyncOrchestrator(self.backend())
        self.processes: list[Process] = []
        self._folder = folder

    def backend(self) -> RabbitMQBackend:
        """Another one on its namespace."""
        return RabbitMQBackend.from_url(self.server.url, namespace=self.topology.namespace)

    async def start(self, *, heartbeat: int = 10, **options: Any) -> Process:
        """Start another worker, with these options."""
        log = self._folder / f"worker-{len(self.processes)}.log"
        backend = {"namespace": self.topology.namespace, "heartbeat": heartbeat}
        with log.open("w") as stderr:
            words = [self.server.url, str(self.ledger.path), json.dumps(backend), json.dumps(options)]
            running = await asyncio.create_subprocess_exec(
                sys.executable, str(PROGRAM), *words, stdout=asyncio.subprocess.PIPE, stderr=stderr
            )
        self.processes.append(Process(running, log))
        return self.processes[-1]

    async def at_work(self, processes: list[Process], count: int) -> list[Process]:
        """Those of these that have begun a run, once they are so many."""
        async with asyncio.timeout(PATIENCE):
            while len(some := [process for process in processes if process.runs]) < count:
                assert not any(process.has_ended() for process in processes), [one.log() for one in processes]
                await asyncio.sleep(0.005)
        return some

    async def publish(
        self,
        *,
        through: AsyncOrchestrator | None = None,
        delay: float | None = None,
        retry: RetryPolicy | None = None,
        **data: Any,
    ) -> str:
        """Publish a job with this input, and write down what became of that. Gives its id."""
        job = Job(name="jobs", schema_name="jobs", input_data=data)
        priority = secrets.randbelow(4) if self.kind == "priority" else None
        with self.ledger.publishing(job.id):
            publisher = through or self.orchestrator
            await publisher.publish("jobs", job, delay=delay, retry=retry, priority=priority)
        return job.id

    def of(self, step: Step, job_id: str | None = None) -> list[Entry]:
        """What the ledger says of this kind of step; of one job, or of all."""
        return [entry for entry in self.ledger.entries() if entry.step == step and job_id in (None, entry.id)]

    async def told(self, step: Step, job_id: str, times: int = 1) -> list[Entry]:
        """Wait until the ledger says this so many times of a job."""
        async with asyncio.timeout(PATIENCE):
            while len(entries := self.of(step, job_id)) < times:  # noqa: ASYNC110 (a file tells nobody)
                await asyncio.sleep(0.02)
        assert len(entries) == times
        return entries

    async def dead(self) -> set[str]:
        """Of the dead letters, the ids."""
        return {record.message.id for record in (await self.orchestrator.dead_letters("jobs").list()).records}

    async def until_done(self) -> None:
        """Wait until what was confirmed was run or is dead, and nothing waits."""
        async with asyncio.timeout(PATIENCE):
            while self._left(await self.dead()) or (await self.orchestrator.depth("jobs")).ready:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    def _left(self, dead: set[str]) -> set[str]:
        entries = self.ledger.entries()
        over = dead | {entry.id for entry in entries if entry.step == "effect"}
        return {entry.id for entry in entries if entry.step == "confirmed"} - over

    async def waiting(self) -> set[str]:
        """The ids of what is in the queue or held back, which counts as a crash of each: for when all is over."""
        found: set[str] = set()
        connection = await aiormq.connect(self.server.url)
        try:
            for name in [self.topology.queue("jobs"), *self._holds(8)]:
                channel = await connection.channel()
                try:
                    count = (await channel.queue_declare(name, passive=True)).message_count
                    for _ in range(count or 0):
                        got = await channel.basic_get(name)
                        if got.header is not None:
                            found.add(str((got.header.properties.headers or {})["mtj-id"]))
                except aiormq.exceptions.ChannelNotFoundEntity:
                    continue
        finally:
            await connection.close()
        return found

    async def wrong(self, *, copies: int = 0) -> list[str]:
        """All invariants that do not hold; once every worker has ended, so that nothing is leased.

        Args:
            copies: so many jobs may be there twice: the copy of one was stored, and then nobody could acknowledge the
                original. Of that the ledger knows nothing. Both copies have the same number.
        """
        assert all(process.has_ended() for process in self.processes)
        waiting, dead = await self.waiting(), await self.dead()
        where: dict[str, Where | tuple[Where, ...]] = {
            one: "dead" if one in dead else "ready" for one in waiting | dead
        }
        found = violations(self.ledger.entries(), where, fenced=False)
        twice = [line for line in found if line.startswith("L6") and self._has_copies(line.split()[1])]
        return found if len(twice) > copies else [line for line in found if line not in twice]

    def _has_copies(self, job_id: str) -> bool:
        numbers = [start.number for start in self.of("start", job_id)]
        return len(set(numbers)) < len(numbers)

    async def aclose(self) -> None:
        """End the processes, and delete the queues."""
        await asyncio.gather(*(process.close() for process in self.processes))
        await self.orchestrator.aclose()
        connection = await aiormq.connect(self.server.url)
        channel = await connection.channel()
        queue, dead, gone = self.topology.queue("jobs"), self.topology.dead("jobs"), self.topology.gone_queue
        for name in [queue, dead, gone, *self._holds(LEVELS)]:
            await channel.queue_delete(name)
        await connection.close()

    def _holds(self, levels: int) -> list[str]:
        return [f"{self.topology.namespace}:{level}.hold" for level in range(levels)]


@pytest.fixture(scope="session")
def server() -> Iterator[Broker]:
    """A RabbitMQ of these tests' own. They leave it running and empty."""
    with brokers.rabbitmq(private=True) as server:
        yield server


@pytest.fixture
async def new_scene(server: Broker, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes scenes, by the kind of their queue."""
    async with AsyncExitStack() as stack:
        count = 0

        async def new(kind: Literal["fifo", "priority"] = "fifo") -> Scene:
            nonlocal count
            count += 1
            scene = Scene(server, tmp_path / f"scene-{count}", kind)
            await scene.orchestrator.open()
            stack.push_async_callback(scene.aclose)
            await scene.orchestrator.declare(QueueSpec("jobs", kind))
            return scene

        yield new


@pytest.fixture
def random() -> Random:
    """Chance that can be had again: $MTJ_TEST_SEED is the seed, which a test that fails has in its output."""
    seed = int(os.environ.get("MTJ_TEST_SEED") or secrets.randbelow(2**32))
    print(f"MTJ_TEST_SEED={seed}")  # noqa: T201 (pytest shows it where a test fails)
    return Random(seed)
