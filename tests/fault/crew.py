"""Workers in processes of their own on some broker, as they come and go, and a ledger of what they did."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from mindtrace.jobs import AsyncOrchestrator, Backend, Job, RetryPolicy
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.ledger import Entry, Ledger, Step

PATIENCE = 30.0  # seconds that anything may take before the test gives up on it
PROGRAM = Path(__file__).with_name("worker_process.py")


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


class Crew:
    """A queue `jobs` on a broker, a ledger, and the worker processes on it.

    Args:
        server: the broker.
        backend: another one on it, for the test itself.
        folder: for the ledger and the logs.
    """

    def __init__(self, server: Broker, backend: Backend, folder: Path) -> None:
        self.server = server
        self.ledger = Ledger(folder / "ledger")
        self.orchestrator = AsyncOrchestrator(backend)
        self.processes: list[Process] = []
        self._folder = folder

    async def start_with(self, backend: dict[str, Any], options: dict[str, Any]) -> Process:
        """Start another worker: what its backend and what it is told."""
        log = self._folder / f"worker-{len(self.processes)}.log"
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
        priority: int | None = None,
        **data: Any,
    ) -> str:
        """Publish a job with this input, and write down what became of that. Gives its id."""
        job = Job(name="jobs", schema_name="jobs", input_data=data)
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

    async def end(self) -> None:
        """End the processes."""
        await asyncio.gather(*(process.close() for process in self.processes))
