"""What compare_rabbitmq.py measures: a publisher, a worker; here or in a process: `rabbitmq_process.py WHAT URL COUNT`.

The library's side is the one measured on Redis. As a process it says "ready" once it is, starts when it is sent a line,
and prints what it found as JSON.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import rabbitmq_reference
from compare import QUEUE, Plain, nothing, plain_data
from redis_process import (
    IN_FLIGHT,
    SLOTS,
    Ready,
    Span,
    at_once,
    awaited_publish,
    blocking_consume,
    blocking_publish,
    growing_worker,
    library_publish,
    library_work,
    opened,
    told_to_start,
)

from mindtrace.jobs import Event, Worker

THEIRS = f"{QUEUE}-reference"


async def library_work_ahead(url: str, count: int, prefetch: int) -> Span:
    """A worker that lets the server hand over more than it has slots for."""
    told = 0

    def listener(event: Event) -> None:
        nonlocal told
        told += 1

    async with opened(url) as jobs:
        worker = Worker(
            jobs, [Plain(QUEUE)], concurrency=SLOTS, prefetch=prefetch, max_jobs=count, listeners=[listener]
        )
        gc.collect()
        start = time.monotonic()
        await worker.work()
        return Span(worker.handled, start, time.monotonic())


async def reference_publish(url: str, count: int, lanes: int = IN_FLIGHT, ready: Ready = at_once) -> Span:
    """`lanes`: how many publishes are awaited at once."""
    async with rabbitmq_reference.opened(url, THEIRS) as channel:
        left = iter(range(count))

        async def lane() -> None:
            for _ in left:
                await rabbitmq_reference.publish(channel, THEIRS, plain_data())

        gc.collect()
        await ready()
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(lanes):
                group.create_task(lane())
        return Span(count, start, time.monotonic())


async def reference_work(
    url: str, count: int, prefetch: int = rabbitmq_reference.PREFETCH, ready: Ready = at_once
) -> Span:
    async with rabbitmq_reference.opened(url, THEIRS) as channel:
        worker = rabbitmq_reference.Worker(channel, THEIRS)
        gc.collect()
        await ready()
        start = time.monotonic()
        await worker.work(nothing, count, prefetch)
        return Span(count, start, time.monotonic())


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
}

if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(found(sys.argv[1], sys.argv[2], int(sys.argv[3])))}\n")
