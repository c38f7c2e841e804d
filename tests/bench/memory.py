"""How much memory jobs take, each measured in a process of its own: `python tests/bench/memory.py WHAT JOBS`.

Prints one number of bytes: `waiting` and `waiting-reference` for each job that waits; `worker` for what a worker's
process grows by while JOBS jobs go through it, after a first tenth as many.
"""

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reference import Reference

from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, Job, QueueSpec, Worker
from mindtrace.jobs.backends.local import LocalBackend

SLOTS = 100
DATA = "x" * 89  # {"data":"..."} has 100 bytes


def resident() -> int:
    """Bytes of memory that this process holds, once garbage is collected."""
    gc.collect()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) * 1024


class FastClock:
    """The machine's clock, six hundred times as fast.

    The local backend remembers the id of a finished job for a minute or two, in the process of the worker; so that they
    are forgotten while one looks, a minute has to be short.
    """

    SPEED = 600

    def now(self) -> float:
        return time.monotonic() * self.SPEED

    def wall(self) -> datetime:
        return datetime.now(UTC)

    async def until(self, when: float) -> None:
        await asyncio.sleep(max(0.0, when - self.now()) / self.SPEED)


async def waiting(count: int) -> float:
    async with AsyncOrchestrator(LocalBackend()) as jobs:
        await jobs.declare(QueueSpec("bench"))

        async def publish() -> None:
            await jobs.publish("bench", Job(name="bench", schema_name="bench", input_data={"data": DATA}))

        return await growth(publish, count) / count


async def waiting_reference(count: int) -> float:
    queue = Reference()

    async def publish() -> None:
        await queue.publish({"data": DATA})

    return await growth(publish, count) / count


async def growth(publish: Callable[[], Awaitable[None]], count: int) -> int:
    for _ in range(1000):
        await publish()
    before = resident()
    for _ in range(count):
        await publish()
    return resident() - before


class Chain(AsyncConsumer):
    """Each run publishes the next job, so that the queue neither grows nor runs dry."""

    def __init__(self, publish: Callable[[], Awaitable[Any]], count: int) -> None:
        super().__init__("bench")
        self._publish, self._count, self._ended = publish, count, 0
        self.before = self.after = 0

    async def run(self, job_dict: Any) -> None:
        self._ended += 1
        if self._ended == self._count // 10:
            self.before = resident()
        elif self._ended == self._count // 10 + self._count:
            self.after = resident()
        await self._publish()


async def worker(count: int) -> float:
    async with AsyncOrchestrator(LocalBackend(clock=FastClock())) as jobs:

        async def publish() -> None:
            await jobs.publish("bench", Job(name="bench", schema_name="bench", input_data={"data": DATA}))

        chain = Chain(publish, count)
        await jobs.declare(QueueSpec("bench"))
        for _ in range(2 * SLOTS):
            await publish()
        await Worker(jobs, [chain], concurrency=SLOTS, max_jobs=count // 10 + count).run()
        return chain.after - chain.before


if __name__ == "__main__":
    what = {"waiting": waiting, "waiting-reference": waiting_reference, "worker": worker}[sys.argv[1]]
    sys.stdout.write(f"{asyncio.run(what(int(sys.argv[2]))):.0f}\n")
