"""What compare_redis.py measures: a publisher, a worker; each here or in a process: `redis_process.py WHAT URL COUNT`.

As a process it says "ready" once it is, starts when it is sent a line, and prints what it found as JSON.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any, NamedTuple

import redis_reference
from compare import DATA, QUEUE, Plain, Typed, nothing, plain_data, plain_job, typed_data
from memory import Chain

from mindtrace.jobs import (
    AsyncOrchestrator,
    Consumer,
    Event,
    Job,
    JobSchema,
    Orchestrator,
    QueueSpec,
    Worker,
    connect,
)
from mindtrace.jobs.cli import bench
from mindtrace.jobs.cli.bench import Payload

LONGEST = 30.0
"""Seconds after which a worker stops with what it has done by then."""
A_CALL = 1000
IN_FLIGHT = 100
SLOTS = 100

Ready = Callable[[], Awaitable[None]]
"""Waits for the start."""


class Span(NamedTuple):
    """So many jobs, from then till then on the clock that all processes of a machine share."""

    jobs: int
    start: float
    end: float

    @property
    def rate(self) -> float:
        return self.jobs / (self.end - self.start)


async def at_once() -> None:
    pass


# the library


@asynccontextmanager
async def opened(url: str, *, typed: bool = False) -> AsyncIterator[AsyncOrchestrator]:
    """With the queue. Typed: with a schema, whose model checks each input."""
    async with AsyncOrchestrator(connect(url)) as jobs:
        if typed:
            await jobs.register(JobSchema(QUEUE, Payload))
        else:
            await jobs.declare(QueueSpec(QUEUE))
        yield jobs


async def library_publish(url: str, count: int, lanes: int = IN_FLIGHT, ready: Ready = at_once) -> Span:
    """`lanes`: how many publishes are awaited at once, 1 or `IN_FLIGHT`."""
    publish = bench.publish_singly if lanes == 1 else bench.publish_in_flight
    async with opened(url) as jobs:
        await jobs.publish(QUEUE, plain_job())  # so that everything is loaded
        gc.collect()
        await ready()
        start = time.monotonic()
        done = await publish(jobs, QUEUE, plain_job, count)
        return Span(done.jobs, start, time.monotonic())


async def library_publish_in_bulk(url: str, count: int) -> Span:
    async with opened(url) as jobs:
        gc.collect()
        start = time.monotonic()
        done = await bench.publish_in_bulk(jobs, QUEUE, plain_job, count)
        return Span(done.jobs, start, time.monotonic())


async def library_fill(url: str, count: int, *, typed: bool = False) -> None:
    async with opened(url, typed=typed) as jobs:
        await fill(jobs, QUEUE, count, typed_data if typed else plain_job)


async def fill(jobs: AsyncOrchestrator, queue: str, count: int, job: Callable[[], Any] = plain_job) -> None:
    for done in range(0, count, A_CALL):
        await jobs.publish_many(queue, [job() for _ in range(min(A_CALL, count - done))])


async def library_work(
    url: str, count: int, slots: int = SLOTS, ready: Ready = at_once, *, typed: bool = False
) -> Span:
    """With all that a worker has: lease, fence, retries, deadline, events."""
    told = 0

    def listener(event: Event) -> None:
        nonlocal told
        told += 1

    async with opened(url, typed=typed) as jobs:
        consumer = Typed(QUEUE) if typed else Plain(QUEUE)
        worker = Worker(jobs, [consumer], concurrency=slots, max_jobs=count, listeners=[listener])
        overdue = asyncio.get_running_loop().call_later(LONGEST, worker.stop)
        gc.collect()
        await ready()
        start = time.monotonic()
        try:
            await worker.work()
        finally:
            overdue.cancel()
        return Span(worker.handled, start, time.monotonic())


async def library_delete(url: str) -> None:
    async with AsyncOrchestrator(connect(url)) as jobs:
        await jobs.delete(QUEUE, force=True)


# the reference, on keys of its own


async def reference_publish(url: str, count: int, lanes: int = IN_FLIGHT, ready: Ready = at_once) -> Span:
    async with redis_reference.connection(url) as redis:
        publisher, left = redis_reference.Publisher(redis, QUEUE), iter(range(count))
        await publisher.open()
        await publisher.publish(plain_data())

        async def lane() -> None:
            for _ in left:
                await publisher.publish(plain_data())

        gc.collect()
        await ready()
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(lanes):
                group.create_task(lane())
        return Span(count, start, time.monotonic())


async def reference_fill(url: str, count: int, *, typed: bool = False) -> Span:
    data = typed_data if typed else plain_data
    async with redis_reference.connection(url) as redis:
        publisher = redis_reference.Publisher(redis, QUEUE)
        await publisher.open()
        gc.collect()
        start = time.monotonic()
        for done in range(0, count, A_CALL):
            await publisher.publish_many([data() for _ in range(min(A_CALL, count - done))])
        return Span(count, start, time.monotonic())


async def reference_work(
    url: str, count: int, slots: int = SLOTS, ready: Ready = at_once, *, typed: bool = False
) -> Span:
    async with redis_reference.connection(url) as redis:
        worker = redis_reference.Worker(redis, QUEUE)
        await worker.open()
        gc.collect()
        await ready()
        start = time.monotonic()
        await worker.work(nothing, slots, count, Payload if typed else None)
        return Span(count, start, time.monotonic())


# the blocking face


async def awaited_publish(url: str, count: int) -> float:
    """Median milliseconds of one call."""
    samples = list[float]()
    async with opened(url) as jobs:
        gc.collect()
        for _ in range(count):
            start = time.perf_counter()
            await jobs.publish(QUEUE, plain_job())
            samples.append(time.perf_counter() - start)
    return median(samples) * 1000


def blocking_publish(url: str, count: int) -> float:
    """The same, from a thread without a loop."""
    jobs, samples = Orchestrator.from_url(url), list[float]()
    jobs.declare(QueueSpec(QUEUE))
    gc.collect()
    for _ in range(count):
        start = time.perf_counter()
        jobs.publish(QUEUE, plain_job())
        samples.append(time.perf_counter() - start)
    jobs.backend.close()
    return median(samples) * 1000


class BlockingPlain(Consumer):
    def run(self, job_dict: Any) -> None:
        pass


def blocking_consume(url: str, count: int) -> float:
    """Jobs a second."""
    asyncio.run(library_fill(url, count))
    jobs, consumer = Orchestrator.from_url(url), BlockingPlain(QUEUE)
    consumer.connect(jobs)
    gc.collect()
    start = time.perf_counter()
    handled = consumer.consume(num_messages=count)
    rate = handled / (time.perf_counter() - start)
    jobs.backend.close()
    return rate


# workers that are looked at from outside, or look at themselves


async def waiting_worker(url: str, milliseconds: int, ready: Ready) -> float:
    """The share of a core that a worker takes which has nothing to do."""
    async with opened(url) as jobs, Worker(jobs, [Plain(QUEUE)], concurrency=SLOTS):
        await asyncio.sleep(1)  # what starting costs is over
        await ready()
        wall, cpu = time.monotonic(), time.process_time()
        await asyncio.sleep(milliseconds / 1000)
        return (time.process_time() - cpu) / (time.monotonic() - wall)


async def growing_worker(url: str, count: int) -> float:
    """Bytes by which the process grows while `count` jobs go through it, after a first tenth as many."""
    async with opened(url) as jobs:

        async def publish() -> None:
            await jobs.publish(QUEUE, plain_job())

        chain = Chain(publish, count)
        for _ in range(2 * SLOTS):
            await publish()
        await Worker(jobs, [chain], concurrency=SLOTS, max_jobs=count // 10 + count).work()
        return chain.after - chain.before


class Punctual(Plain):
    """Notes how many milliseconds after it was due each job begins."""

    def __init__(self, job_type_name: str) -> None:
        super().__init__(job_type_name)
        self.late = list[float]()

    async def run(self, job_dict: Any) -> None:
        self.late.append(time.time() * 1000 - job_dict["input_data"]["due"])


def due_job(due_ms: int) -> Job:
    return Job(name=QUEUE, schema_name=QUEUE, input_data={"data": DATA, "due": due_ms})


async def punctual_worker(url: str, count: int, ready: Ready) -> Sequence[float]:
    """How late the earliest, the middle, the 99th percentile and the last one were, in ms, and how many came."""
    async with opened(url) as jobs:
        consumer = Punctual(QUEUE)
        worker = Worker(jobs, [consumer], concurrency=SLOTS, max_jobs=count)
        await ready()
        await worker.work()
        late = sorted(consumer.late)
        return late[0], late[len(late) // 2], late[int(0.99 * len(late))], late[-1], len(late)


# as a process


async def told_to_start() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


def found(what: str, url: str, count: int) -> Any:
    if what in BLOCKING:
        return BLOCKING[what](url, count)
    return asyncio.run(AWAITED[what](url, count))


BLOCKING: dict[str, Callable[[str, int], Any]] = {
    "blocking-publish": blocking_publish,
    "blocking-consume": blocking_consume,
}
AWAITED: dict[str, Callable[[str, int], Any]] = {
    "awaited-publish": awaited_publish,
    "library-publish": lambda url, count: library_publish(url, count, ready=told_to_start),
    "library-work": lambda url, count: library_work(url, count, ready=told_to_start),
    "reference-publish": lambda url, count: reference_publish(url, count, ready=told_to_start),
    "reference-work": lambda url, count: reference_work(url, count, ready=told_to_start),
    "growing": growing_worker,
    "punctual": lambda url, count: punctual_worker(url, count, told_to_start),
    "waiting": lambda url, count: waiting_worker(url, count, told_to_start),
}

if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(found(sys.argv[1], sys.argv[2], int(sys.argv[3])))}\n")
