"""A worker as people run it, in a process of its own, to be killed and stopped: its jobs write down what they do.

worker_process.py URL LEDGER BACKEND OPTIONS: of the server, of the file, and what the backend and `Worker` are given,
as JSON. It writes a line to its stdout whenever a run begins. A job does what its input says; a first run is that of
its delivery number 1.
"""

import asyncio
import json
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final, Literal

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Event,
    JobSettled,
    RabbitMQBackend,
    RedisBackend,
    RetryPolicy,
    Worker,
    current_job,
)
from mindtrace.jobs.testing.ledger import Ledger

SETTLED: Final[dict[str, Literal["done", "retry", "dead", "release"]]] = {
    "Done": "done",
    "Retry": "retry",
    "Dead": "dead",
    "Release": "release",
}


class Works(AsyncConsumer):
    """Does what it is told, and writes down the start, the effect and the end of each run."""

    retry = RetryPolicy(base=0.05)

    def __init__(self, ledger: Ledger) -> None:
        super().__init__("jobs")
        self.ledger = ledger
        self.numbers: dict[tuple[str, int], list[int]] = {}  # of the runs with no answer yet

    async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        job, data = current_job(), job_dict["input_data"]
        self.numbers.setdefault((job.id, job.attempt), []).append(job.number)
        with self.ledger.running(job.id, job.number, attempt=job.attempt):
            os.write(1, b"a run\n")
            await self.act(first=job.number == 1, **data)
            self.ledger.effect(job.id)
        return {}

    async def act(
        self, *, first: bool, seconds: float = 0.0, fails: bool = False, stops: bool = False, poison: bool = False,
        blocks: float = 0.0, gate: str | None = None, until_told: bool = False,
    ) -> None:  # fmt: skip
        """Take `seconds`, and then in a first run stop the process or fail; later wait until there is a file `gate`.

        A first run that was stopped goes on at once, or with `until_told` when it knows that its lease is lost.
        """
        await asyncio.sleep(seconds)
        time.sleep(blocks)  # noqa: ASYNC251 (which nobody should do)
        if poison:
            with self.ledger.fault("a poison job"):
                os.abort()
        if first and stops:
            os.kill(os.getpid(), signal.SIGSTOP)  # whoever continues us finds the run here, and its lease gone
            while until_told and not current_job().lease_lost:  # noqa: ASYNC110 (a flag rings no bell)
                await asyncio.sleep(0.005)
        if first and fails:
            raise LookupError("as it was told to")
        while gate and not (first and stops) and not Path(gate).exists():  # noqa: ASYNC110, ASYNC240 (from elsewhere)
            await asyncio.sleep(0.005)

    def note(self, event: Event) -> None:
        """Write down what became of a settlement; of a delivery that was never run there is nothing to say."""
        if isinstance(event, JobSettled) and (numbers := self.numbers.get((event.job_id, event.attempt))):
            settled = SETTLED[type(event.settlement).__name__]
            self.ledger.answer(event.job_id, numbers.pop(0), event.accepted, settled)


async def main(url: str, ledger: str, backend: str, options: str) -> int:
    consumer = Works(Ledger(ledger))
    kind = RedisBackend if url.startswith("redis") else RabbitMQBackend
    orchestrator = AsyncOrchestrator(kind.from_url(url, **json.loads(backend)))
    # The worker opens it: there need not be a server yet.
    return await Worker(orchestrator, [consumer], listeners=[consumer.note], **json.loads(options)).run()


if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants to look at what a poison job leaves
    sys.exit(asyncio.run(main(*sys.argv[1:])))
