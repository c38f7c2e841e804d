"""`mindtrace-jobs bench`: how fast jobs go through a backend, on this machine.

It makes a queue of its own and deletes it. Each figure ends after its jobs, or after `SECONDS` with those done by then.
"""

import argparse
import asyncio
import json
import os
import platform
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from pydantic import BaseModel

from mindtrace.jobs.backend import Backend
from mindtrace.jobs.backends import connect, shown
from mindtrace.jobs.cli.errors import CommandError, UsageError
from mindtrace.jobs.cli.parser import Parser, argument
from mindtrace.jobs.cli.settings import JSON, URL, Settings, whole
from mindtrace.jobs.clients import LocalClient
from mindtrace.jobs.consumer import AnyConsumer, AsyncConsumer
from mindtrace.jobs.job import Job, JobSchema
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.sync import Consumer, Orchestrator
from mindtrace.jobs.wire import PAYLOAD_LIMIT
from mindtrace.jobs.worker import Worker

SECONDS = 5.0
"""After which a figure is taken from the jobs done so far."""
_STUCK = 60.0  # seconds after which a figure is given up
_IN_FLIGHT = 100
_A_CALL = 1000
_A_LOOK = 100  # jobs between two looks at the clock
_MOST_SAMPLES = 500
_MOST_BLOCKING = 2000
IDLE = 0.002  # seconds in which a worker goes back to waiting
_MOST_BYTES = 1024**3


class Payload(BaseModel):
    """The input of the measured jobs."""

    data: str

    @classmethod
    def of_size(cls, size: int) -> "Payload":
        """One of `size` bytes as JSON."""
        return cls(data="x" * (size - PAYLOAD_LEAST))


PAYLOAD_LEAST = len(Payload(data="").model_dump_json())

JobOf: TypeAlias = Callable[[], Job | BaseModel]
"""Makes the next job to publish."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many jobs took so long.

    Attributes:
        what: was done to them.
        jobs: how many.
        seconds: for all.
    """

    what: str
    jobs: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Jobs in a second."""
        return self.jobs / self.seconds

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        each = 1e6 / self.per_second
        return self.what, f"{self.jobs:,}", f"{self.per_second:,.0f} jobs/s", f"{each:,.1f} µs a job"

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "per_second": self.per_second}


@dataclass(frozen=True, slots=True)
class Latency:
    """How long single jobs waited.

    Attributes:
        what: they waited for.
        samples: seconds, each.
    """

    what: str
    samples: Sequence[float]

    def percentile(self, share: float) -> float:
        """Milliseconds that this share of the jobs (0 to 1) took at the most."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        p50, p99 = self.percentile(0.5), self.percentile(0.99)
        return self.what, f"{len(self.samples):,}", f"p50 {p50:,.3f} ms", f"p99 {p99:,.3f} ms"

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        p50, p99 = self.percentile(0.5), self.percentile(0.99)
        return {"what": self.what, "jobs": len(self.samples), "p50_ms": p50, "p99_ms": p99}


Figure: TypeAlias = Rate | Latency


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        url: names the backend.
        jobs: for each figure; latency and the blocking calls take fewer.
        payload: bytes of each input, as JSON.
        slots: concurrencies of the worker, one figure each.
    """

    url: str
    jobs: int
    payload: int
    slots: tuple[int, ...]


class Report:
    """Facts and figures; printed as they come, unless they are wanted as one document."""

    def __init__(self, *, prints: bool) -> None:
        self._prints = prints
        self._facts: dict[str, dict[str, Any]] = {}
        self._figures: list[Figure] = []

    def begin(self, plan: Plan, backend: Backend) -> None:
        """Take down where this runs; the backend is open, and so knows its traits."""
        self._facts = {"machine": machine_facts(), "backend": _backend_facts(plan, backend), "plan": _plan_facts(plan)}
        if self._prints:
            for name, facts in self._facts.items():
                print(f"{name:<10}{', '.join(f'{what} {value}' for what, value in facts.items())}")
            print(flush=True)

    def add(self, figure: Figure) -> None:
        """Take down a figure."""
        self._figures.append(figure)
        if self._prints:
            what, jobs, first, second = figure.cells()
            print(f"{what:<28}{jobs:>9}{first:>18}{second:>18}", flush=True)

    def document(self) -> str:
        """All of it as JSON."""
        figures = [figure.document() for figure in self._figures]
        return json.dumps({**self._facts, "figures": figures}, indent=2)


# the command


def add(parser: Parser) -> None:
    """Declare the options."""
    parser.take(URL, JSON)
    jobs, slots = argument(whole(1, 1_000_000)), argument(whole(1, 10_000))
    payload = argument(whole(PAYLOAD_LEAST, PAYLOAD_LIMIT))
    parser.add_argument("-n", type=jobs, default=10_000, metavar="N", dest="jobs", help="jobs for each figure (10000)")
    parser.add_argument("-c", type=slots, metavar="CONCURRENCY", dest="slots", help="slots of the worker (1, 10, 100)")
    parser.add_argument("--payload", type=payload, default=100, metavar="BYTES", help="size of an input as JSON (100)")
    parser.add_argument(
        "--out", type=argument(_writable), metavar="FILE", help="write facts and figures there, as JSON"
    )


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Measure and print."""
    slots = (1, 10, 100) if parsed.slots is None else (parsed.slots,)
    plan = Plan(settings[URL], parsed.jobs, parsed.payload, slots)
    if plan.jobs * plan.payload > _MOST_BYTES:
        raise UsageError(f"-n {plan.jobs} --payload {plan.payload}: 1 GiB in all at the most")
    report = Report(prints=not settings[JSON])
    try:
        asyncio.run(_measure(connect(plan.url), plan, report))
        _measure_blocking(plan, report)
    except TimeoutError as error:
        raise CommandError(f"the next figure took over {_STUCK:.0f} s and was given up") from error
    if settings[JSON]:
        print(report.document())
    if parsed.out is not None:
        try:
            parsed.out.write_text(f"{report.document()}\n", "utf-8")
        except OSError as error:
            raise CommandError(f"--out {parsed.out}: {error.strerror}") from error
    return 0


def machine_facts() -> dict[str, Any]:
    """What this runs on."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "mindtrace-jobs": version("mindtrace-jobs"),
        "at": f"{datetime.now(UTC):%FT%TZ}",
    }


def _backend_facts(plan: Plan, backend: Backend) -> dict[str, Any]:
    return {"name": backend.traits.name, "url": shown(plan.url), "durability": backend.traits.durability}


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {"jobs": plan.jobs, "payload": plan.payload, "slots": list(plan.slots)}


def _writable(text: str) -> Path:
    path = Path(text)
    try:
        fits = path.parent.is_dir() and not path.is_dir()
    except OSError:  # too long a name
        fits = False
    if not fits:
        raise ValueError("a file in a folder that exists")
    return path


# the figures


class _Nothing(AsyncConsumer[Payload, None]):
    async def handle(self, data: Payload) -> None:
        pass


class _BlockingNothing(Consumer[Payload, None]):
    def handle(self, data: Payload) -> None:
        pass


class _Stopwatch(AsyncConsumer[Payload, None]):
    """Notes when a run begins."""

    def __init__(self, job_type_name: str) -> None:
        super().__init__(job_type_name)
        self.began: asyncio.Future[float] | None = None

    async def handle(self, data: Payload) -> None:
        now = time.perf_counter()
        if self.began is not None:
            self.began.set_result(now)


async def _measure(backend: Backend, plan: Plan, report: Report) -> None:
    name, data = _new_name(), Payload.of_size(plan.payload).data
    schema = JobSchema(name, Payload)

    def job() -> Payload:
        return Payload(data=data)

    async with AsyncOrchestrator(backend) as jobs:
        report.begin(plan, backend)
        figures: list[Callable[[], Awaitable[Figure]]] = [
            lambda: publish_singly(jobs, name, job, plan.jobs),
            lambda: publish_in_flight(jobs, name, job, plan.jobs),
            lambda: publish_in_bulk(jobs, name, job, plan.jobs),
            *(partial(process, jobs, name, job, plan.jobs, _Nothing(name), slots) for slots in plan.slots),
            lambda: idle_latency(jobs, name, job, plan.jobs),
        ]
        for figure in figures:
            await jobs.register(schema)
            try:
                async with asyncio.timeout(_STUCK):
                    report.add(await figure())
            finally:
                await jobs.delete(name, force=True)


async def publish_singly(jobs: AsyncOrchestrator, queue: str, job: JobOf, count: int) -> Rate:
    """Each publish is awaited before the next."""
    start = time.perf_counter()
    done = await _publish(jobs, queue, job, iter(range(count)), start + SECONDS)
    return Rate("publish, one at a time", done, time.perf_counter() - start)


async def publish_in_flight(jobs: AsyncOrchestrator, queue: str, job: JobOf, count: int) -> Rate:
    """A hundred publishes are awaited at once, from as many tasks."""
    start, left = time.perf_counter(), iter(range(count))
    async with asyncio.TaskGroup() as group:
        lanes = [group.create_task(_publish(jobs, queue, job, left, start + SECONDS)) for _ in range(_IN_FLIGHT)]
    return Rate(f"publish, {_IN_FLIGHT} in flight", sum(lane.result() for lane in lanes), time.perf_counter() - start)


async def publish_in_bulk(jobs: AsyncOrchestrator, queue: str, job: JobOf, count: int) -> Rate:
    """A thousand jobs in a call."""
    start, done = time.perf_counter(), 0
    while done < count and time.perf_counter() < start + SECONDS:
        batch = min(_A_CALL, count - done)
        await jobs.publish_many(queue, [job() for _ in range(batch)])
        await asyncio.sleep(0)
        done += batch
    return Rate(f"publish, {_A_CALL:,} a call", done, time.perf_counter() - start)


async def process(
    jobs: AsyncOrchestrator, queue: str, job: JobOf, count: int, consumer: AnyConsumer[Any, Any], slots: int
) -> Rate:
    """A worker takes them off a queue that holds them all."""
    filled = await publish_in_bulk(jobs, queue, job, count)
    worker = Worker(jobs, [consumer], concurrency=slots, max_jobs=filled.jobs)
    overdue = asyncio.get_running_loop().call_later(SECONDS, worker.stop)
    start = time.perf_counter()
    try:
        await worker.work()
    finally:
        overdue.cancel()
    what = f"process, {slots} slot{'s' if slots > 1 else ''}"
    return Rate(what, worker.handled, time.perf_counter() - start)


async def idle_latency(jobs: AsyncOrchestrator, queue: str, job: JobOf, count: int) -> Latency:
    """From before the publish to the first line of the run, in a worker that has nothing else to do."""
    stopwatch, samples = _Stopwatch(queue), list[float]()
    async with Worker(jobs, [stopwatch], concurrency=1):
        end = time.perf_counter() + SECONDS
        while len(samples) < min(count, _MOST_SAMPLES) and time.perf_counter() < end:
            await asyncio.sleep(IDLE)
            stopwatch.began = asyncio.get_running_loop().create_future()
            published = time.perf_counter()
            await jobs.publish(queue, job())
            samples.append(await stopwatch.began - published)
    return Latency("publish to run, when idle", samples)


def _measure_blocking(plan: Plan, report: Report) -> None:
    if urlsplit(plan.url).scheme != "local":
        return
    client, name, data = LocalClient(), _new_name(), Payload.of_size(plan.payload).data
    jobs, consumer = Orchestrator(client), _BlockingNothing(name)
    consumer.connect(jobs)
    try:
        start, done = time.perf_counter(), 0
        while done < min(plan.jobs, _MOST_BLOCKING) and time.perf_counter() < start + SECONDS:
            jobs.publish(name, Payload(data=data))
            done += 1
        report.add(Rate("publish, blocking", done, time.perf_counter() - start))
        start = time.perf_counter()
        done = consumer.consume(num_messages=done)
        report.add(Rate("consume, blocking", done, time.perf_counter() - start))
    finally:
        jobs.delete(name, force=True)
        client.close()


async def _publish(jobs: AsyncOrchestrator, queue: str, job: JobOf, left: Iterator[int], end: float) -> int:
    """Publish for as long as there are jobs `left` and time. Returns how many."""
    done = 0
    while time.perf_counter() < end:
        before = done
        for _ in islice(left, _A_LOOK):
            await jobs.publish(queue, job())
            done += 1
        if done == before:
            break
        await asyncio.sleep(0)  # a publish that need not wait gives no turn to a Ctrl-C
    return done


def _new_name() -> str:
    return f"bench-{secrets.token_hex(4)}"
