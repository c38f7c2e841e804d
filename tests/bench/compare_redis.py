"""The library on Redis beside the hand-written loops: `python tests/bench/compare_redis.py [P1 P3 ...] [--strict]`.

As in compare.py, library and reference take turns and the median of the pairs' ratios is held against the target. Each
row has a Redis of its own, as `mindtrace.jobs.testing.brokers` starts one (AOF, fsync every second), which is told not
to rewrite its AOF meanwhile. In the library's worker all is on: lease, fence, retries, deadline, a listener.

P4's reference pops the job itself, blocking; P6 compares a full queue with an empty one, P5 two workers with one, both
the library's; P10 the blocking call with the awaited one. P15 and the idle worker of P4 have no reference.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import redis_reference
from compare import HEAD, QUEUE, Line, Measure, one_pair, plain_job, rates, say, typed_data
from redis_process import (
    A_CALL,
    IN_FLIGHT,
    SLOTS,
    Span,
    due_job,
    fill,
    library_delete,
    library_fill,
    library_publish,
    library_publish_in_bulk,
    library_work,
    opened,
    reference_fill,
    reference_publish,
    reference_work,
)

from mindtrace.jobs import AsyncOrchestrator, Delivery, Done, QueueSpec, connect
from mindtrace.jobs.cli import bench
from mindtrace.jobs.cli.bench import Payload, machine_facts
from mindtrace.jobs.testing import brokers

STUCK = 120.0
"""Seconds after which one measurement is given up."""
BEHIND = 30.0
"""Seconds that a worker has after the last job was due."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        url: of the Redis.
        count: jobs of one measurement; slow ones take fewer, those about many jobs more.
        rounds: pairs of which the median counts.
        spread: seconds over which delayed jobs come due.
    """

    url: str
    count: int
    rounds: int
    spread: float


async def bounded(measure: Measure) -> float:
    async with asyncio.timeout(STUCK):
        return await measure()


async def compared(
    target: str, what: str, plan: Plan, least: float | None, library: Measure, reference: Measure
) -> Line:
    return await rates(target, what, plan.rounds, least, lambda: bounded(library), lambda: bounded(reference))


# processes


class Part:
    """A process of redis_process.py; it is killed if it has not ended by itself."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ready(self) -> None:
        await self._line()

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    async def found(self) -> Any:
        return json.loads(await self._line())

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        async with asyncio.timeout(STUCK):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a measuring process ended early; what it said stands above")
        return line


@asynccontextmanager
async def part(what: str, url: str, count: int) -> AsyncIterator[Part]:
    script, pipe = str(Path(__file__).with_name("redis_process.py")), asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, what, url, str(count), stdin=pipe, stdout=pipe
    )
    try:
        yield Part(process)
    finally:
        if process.returncode is None:
            try:
                async with asyncio.timeout(1):
                    await process.wait()
            except TimeoutError:
                process.kill()
        await process.wait()


async def alone(what: str, url: str, count: int) -> Any:
    async with part(what, url, count) as process:
        return await process.found()


async def together(*parts: Part) -> list[Span]:
    """What they find once all of them have started at the same time."""
    for one in parts:
        await one.ready()
    for one in parts:
        one.start()
    return [Span(*await one.found()) for one in parts]


# P1, P2 and P17, processing


async def library_process(plan: Plan, count: int, slots: int, *, typed: bool) -> float:
    await library_fill(plan.url, count, typed=typed)
    span = await library_work(plan.url, count, slots, typed=typed)
    await library_delete(plan.url)
    return span.rate


async def reference_process(plan: Plan, count: int, slots: int, *, typed: bool) -> float:
    await reference_fill(plan.url, count, typed=typed)
    return (await reference_work(plan.url, count, slots, typed=typed)).rate


async def process(target: str, plan: Plan, count: int, slots: int, least: float, *, typed: bool = False) -> Line:
    what = f"process, {slots} slot{'s' if slots > 1 else ''}{', as a model' if typed else ''}"
    return await compared(
        target,
        what if target != "P17" else f"{what}, all on one core",
        plan,
        least,
        lambda: library_process(plan, count, slots, typed=typed),
        lambda: reference_process(plan, count, slots, typed=typed),
    )


async def p1(plan: Plan) -> AsyncIterator[Line]:
    yield await process("P1", plan, plan.count, 100, 0.70)
    yield await process("P1", plan, plan.count, 100, 0.70, typed=True)


async def p2(plan: Plan) -> AsyncIterator[Line]:
    yield await process("P2", plan, less(plan.count, 2), 10, 0.70)
    yield await process("P2", plan, less(plan.count, 10), 1, 0.70)


async def p17(plan: Plan) -> AsyncIterator[Line]:
    yield await process("P17", plan, plan.count, 100, 0.60)


# P3, publishing


async def library_published(plan: Plan, span: Awaitable[Span]) -> float:
    rate = (await span).rate
    await library_delete(plan.url)
    return rate


async def reference_published(plan: Plan, span: Awaitable[Span]) -> float:
    rate = (await span).rate
    async with redis_reference.connection(plan.url) as redis:
        await redis.unlink(*(f"{QUEUE}:{part}" for part in ("ready", "jobs", "place")))
    return rate


async def p3(plan: Plan) -> AsyncIterator[Line]:
    url, some = plan.url, less(plan.count, 10)
    for what, least, library, reference in (
        (
            f"publish, {IN_FLIGHT} in flight",
            0.70,
            lambda: library_publish(url, plan.count),
            lambda: reference_publish(url, plan.count),
        ),
        (
            f"publish, {A_CALL:,} a call",
            0.70,
            lambda: library_publish_in_bulk(url, plan.count),
            lambda: reference_fill(url, plan.count),
        ),
        (
            "publish, one at a time",
            0.85,
            lambda: library_publish(url, some, 1),
            lambda: reference_publish(url, some, 1),
        ),
    ):
        yield await compared(
            "P3",
            what,
            plan,
            least,
            lambda library=library: library_published(plan, library()),
            lambda reference=reference: reference_published(plan, reference()),
        )


# P4, a worker that waits


async def library_latency(plan: Plan, count: int) -> tuple[float, float]:
    async with asyncio.timeout(STUCK), opened(plan.url, typed=True) as jobs:
        latency = await bench.idle_latency(jobs, QUEUE, typed_data, count)
    return latency.percentile(0.5), latency.percentile(0.99)


async def reference_latency(plan: Plan, count: int) -> tuple[float, float]:
    datas = [typed_data() for _ in range(count)]
    async with asyncio.timeout(STUCK):
        samples = await redis_reference.idle_latency(plan.url, f"{QUEUE}:idle", datas, bench.IDLE, Payload)
    latency = bench.Latency("", samples)
    return latency.percentile(0.5), latency.percentile(0.99)


async def p4(plan: Plan) -> AsyncIterator[Line]:
    count = min(plan.count, 500)
    pairs = [(await library_latency(plan, count), await reference_latency(plan, count)) for _ in range(plan.rounds)]
    library, reference = zip(*pairs, strict=True)
    ours, ours99 = (median(each) for each in zip(*library, strict=True))
    theirs, theirs99 = (median(each) for each in zip(*reference, strict=True))
    most = 2 * theirs + 0.3
    what = "publish to run, when idle"
    for name, ms, reference_ms, limit in (("p50", ours, theirs, most), ("p99", ours99, theirs99, 5.0)):
        found = f"{ms:.3f} ms"
        met = ms <= limit
        yield Line("P4", f"{what}, {name}", found, f"{reference_ms:.3f} ms", found, f"<= {limit:.2f} ms", met)
    milliseconds = round(1000 * plan.spread / 15)
    share = median([await waited("waiting", plan.url, milliseconds) for _ in range(plan.rounds)])
    found = f"{share:.2%}"
    yield Line("P4", "CPU of a worker that waits", found, "", found, "< 1 %", share < 0.01)


async def waited(what: str, url: str, milliseconds: int) -> float:
    async with part(what, url, milliseconds) as worker:
        await worker.ready()
        worker.start()
        return await worker.found()


# P5, two workers


async def worked(side: str, plan: Plan, processes: int) -> float:
    each = less(plan.count, 2)
    count = processes * each
    await (library_fill if side == "library" else reference_fill)(plan.url, count)
    async with part(f"{side}-work", plan.url, each) as first:
        if processes == 1:
            spans = await together(first)
        else:
            async with part(f"{side}-work", plan.url, each) as second:
                spans = await together(first, second)
    if side == "library":
        await library_delete(plan.url)
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    return sum(span.jobs for span in spans) / (end - start)


async def p5(plan: Plan) -> AsyncIterator[Line]:
    for side, what, least in (
        ("library", "two worker processes beside one", 1.6),
        ("reference", "the hand-written ones, likewise", None),
    ):
        line = await compared(
            "P5" if least else "",
            what,
            plan,
            least,
            lambda side=side: worked(side, plan, 2),
            lambda side=side: worked(side, plan, 1),
        )
        # With two cores for two workers and the server there is no such gain to be had.
        yield line if (os.cpu_count() or 1) > 2 else replace(line, met=None)


# P6, a full queue


FULL, EMPTY = "full", "empty"


async def publish_some(jobs: AsyncOrchestrator, queue: str, count: int) -> float:
    start = time.perf_counter()
    await fill(jobs, queue, count)
    return time.perf_counter() - start


async def receive_some(jobs: AsyncOrchestrator, queue: str, count: int) -> float:
    async with jobs.backend.receiver([queue], slots=SLOTS) as receiver:
        start, held, left = time.perf_counter(), list[Delivery](), count
        while left or held:
            exchanged = await receiver.exchange([(delivery, Done()) for delivery in held], min(left, SLOTS))
            held = exchanged.deliveries
            left -= len(held)
        return time.perf_counter() - start


async def used_memory(plan: Plan) -> int:
    async with redis_reference.connection(plan.url) as redis:
        return (await redis.info("memory"))["used_memory"]


async def reference_memory(plan: Plan, count: int) -> float:
    """Bytes of a job that waits; nothing is left of them."""
    before = await used_memory(plan)
    async with asyncio.timeout(STUCK):
        await reference_fill(plan.url, count)
    taken = await used_memory(plan) - before
    async with redis_reference.connection(plan.url) as redis:
        await redis.delete(f"{QUEUE}:ready", f"{QUEUE}:jobs")  # not unlink, which frees them later
    return taken / count


async def p6(plan: Plan) -> AsyncIterator[Line]:
    many, some = 20 * plan.count, less(plan.count, 25)
    theirs = await reference_memory(plan, many)
    async with AsyncOrchestrator(connect(plan.url)) as jobs:
        for queue in (FULL, EMPTY):
            await jobs.declare(QueueSpec(queue))
        async with asyncio.timeout(STUCK):
            await fill(jobs, EMPTY, 1000)
            before = await used_memory(plan)
            await fill(jobs, FULL, many)
            ours = (await used_memory(plan) - before) / many
        found = f"{ours:,.0f} B"
        yield Line("P6", "server memory of a waiting job", found, f"{theirs:,.0f} B", found, "<= 600 B", ours <= 600)
        spent: dict[str, list[tuple[float, float]]] = {"publish": [], "receive": []}
        for number in range(4 * plan.rounds):
            for what, cost in (("publish", publish_some), ("receive", receive_some)):
                spent[what].append(
                    await one_pair(
                        lambda cost=cost: bounded(lambda: cost(jobs, FULL, some)),
                        lambda cost=cost: bounded(lambda: cost(jobs, EMPTY, some)),
                        swapped=number % 2 == 1,
                    )
                )
    for what, pairs in spent.items():
        full, empty = (f"{1e6 * median(each) / some:,.1f} µs" for each in zip(*pairs, strict=True))
        ratio = median(full / empty for full, empty in pairs)
        yield Line("P6", f"{what}, {many:,} waiting, 1,000", full, empty, f"x {ratio:.2f}", "<= 1.50", ratio <= 1.5)


# P10 and P11, the blocking face


async def p10(plan: Plan) -> AsyncIterator[Line]:
    count = min(plan.count, 2000)
    pairs: list[tuple[float, float]] = []
    for _ in range(plan.rounds):
        blocking = await alone("blocking-publish", plan.url, count)
        pairs.append((blocking, await alone("awaited-publish", plan.url, count)))
    above = median(blocking - awaited for blocking, awaited in pairs) * 1000
    blocking, awaited = (f"{median(column) * 1000:,.0f} µs" for column in zip(*pairs, strict=True))
    what = "blocking publish, above the awaited one"
    yield Line("P10", what, blocking, awaited, f"+{above:,.0f} µs", "<= 150 µs", above <= 150)


async def p11(plan: Plan) -> AsyncIterator[Line]:
    count = less(plan.count, 5)
    rate = median([await alone("blocking-consume", plan.url, count) for _ in range(plan.rounds)])
    found = f"{rate:,.0f} jobs/s"
    yield Line("P11", "blocking consume", found, "", found, ">= 4,000/s", rate >= 4000)


# P14, a worker's memory


async def p14(plan: Plan) -> AsyncIterator[Line]:
    count = 2 * plan.count
    by = median([await alone("growing", plan.url, count) for _ in range(min(plan.rounds, 3))]) / 2**20
    found = f"{by:.2f} MiB"
    yield Line("P14", f"a worker's growth by {count:,} jobs", found, "", found, "< 2 MiB", by < 2)


# P15, delayed jobs


async def p15(plan: Plan) -> AsyncIterator[Line]:
    """Once: it takes its minute."""
    count = 2 * plan.count
    lead = max(2.0, count / 8000)  # all are published by then
    async with opened(plan.url) as jobs, part("punctual", plan.url, count) as worker:
        await worker.ready()
        worker.start()
        first = round((time.time() + lead) * 1000)
        dues = [first + round(1000 * plan.spread * number / count) for number in range(count)]
        Random(15).shuffle(dues)
        left = iter(dues)

        async def lane() -> None:
            for due in left:
                await jobs.publish(QUEUE, due_job(due), at=datetime.fromtimestamp(due / 1000, UTC))

        async with asyncio.timeout(STUCK), asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(lane())
        early = first / 1000 - time.time()
        async with asyncio.timeout(lead + plan.spread + BEHIND):
            *late, came = await worker.found()
    least, middle, p99, most = late
    what = f"{count:,} jobs due over {plan.spread:g} s"
    yield Line("P15", f"{what}, lateness p50", f"{middle:.1f} ms", "", "", "", None)
    yield Line("P15", f"{what}, lateness p99", f"{p99:.1f} ms", "", "", "", None)
    on_time = least >= 0 and most <= 1000 and came == count and early > 0
    yield Line("P15", f"{what}, the last", f"{most:.1f} ms", "", f"{most:.0f} ms", "<= 1,000 ms", on_time)
    yield Line("P15", f"{what}, the first", f"{least:.1f} ms", "", f"{least:.1f} ms", ">= 0 ms", least >= 0)
    yield await looks(plan)


async def looks(plan: Plan) -> Line:
    """How often a worker looks that has one job to wait for, due in an hour; once a second is by its design."""
    seconds = plan.spread / 6
    async with opened(plan.url) as jobs, part("waiting", plan.url, round(1000 * seconds)) as worker:
        await jobs.publish(QUEUE, plain_job(), delay=3600.0)
        await worker.ready()
        before = await scripts_run(plan)
        worker.start()
        await worker.found()
        count = await scripts_run(plan) - before
    found = f"{count} in {seconds:g} s"
    return Line("P15", "looks of a worker, next due in an hour", found, "", found, "<= 1/s", count <= seconds + 1)


async def scripts_run(plan: Plan) -> int:
    async with redis_reference.connection(plan.url) as redis:
        commands = await redis.info("commandstats")
    return sum(commands[name]["calls"] for name in ("cmdstat_evalsha", "cmdstat_eval") if name in commands)


# P16, end to end


async def end_to_end(side: str, plan: Plan) -> float:
    async with (
        part(f"{side}-work", plan.url, plan.count) as worker,
        part(f"{side}-publish", plan.url, plan.count) as publisher,
    ):
        done, published = await together(worker, publisher)
    if side == "library":
        await library_delete(plan.url)
    return done.jobs / (done.end - published.start)


async def p16(plan: Plan) -> AsyncIterator[Line]:
    what = "end to end, a publisher and a worker"
    yield await compared(
        "P16", what, plan, 0.50, lambda: end_to_end("library", plan), lambda: end_to_end("reference", plan)
    )


# what is printed


ROWS: dict[str, Callable[[Plan], AsyncIterator[Line]]] = {
    "P1": p1,
    "P2": p2,
    "P3": p3,
    "P4": p4,
    "P5": p5,
    "P6": p6,
    "P10": p10,
    "P11": p11,
    "P14": p14,
    "P15": p15,
    "P16": p16,
    "P17": p17,
}


def less(count: int, by: int) -> int:
    return max(1, count // by)


@contextmanager
def one_core() -> Iterator[None]:
    """For this process and those it starts meanwhile, a server too."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


async def printed(lines: AsyncIterator[Line]) -> list[Line]:
    kept: list[Line] = []
    async for line in lines:
        say(line.text())
        kept.append(line)
    return kept


def measured(row: str, plan: Callable[[str], Plan]) -> Sequence[Line]:
    with brokers.redis(private=True, settings={"auto-aof-rewrite-percentage": "0"}) as server:
        try:
            return asyncio.run(printed(ROWS[row](plan(server.url))))
        except Exception:  # the other rows are worth having
            traceback.print_exc()
            line = Line(row, "failed, see above", "", "", "", "", False)
            say(line.text())
            return [line]


def main() -> int:
    parser = argparse.ArgumentParser(description="The library on Redis beside the hand-written loops.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all of them unless given")
    parser.add_argument("-n", type=int, default=50_000, help="jobs a run (50000); slow rows take fewer, P6 20 times")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs, of which the median counts (5)")
    parser.add_argument("--spread", type=float, default=60.0, help="seconds over which P15's jobs come due (60)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    if options.n < 1 or options.rounds < 1 or not 0 < options.spread <= 3600:
        parser.error("-n and --rounds: whole numbers from 1 on; --spread: seconds, to 3600")
    if unknown := [row for row in options.rows if row not in ROWS]:
        parser.error(f"no such row: {shlex.join(unknown)}; there are {', '.join(ROWS)}")

    def plan(url: str) -> Plan:
        return Plan(url, options.n, options.rounds, options.spread)

    say(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()))
    say(f"{options.rounds} rounds of {options.n:,} jobs, 100 bytes of payload\n")
    say(HEAD.text())
    lines: list[Line] = []
    for row in options.rows or ROWS:
        if row == "P17" and hasattr(os, "sched_setaffinity"):
            with one_core():
                lines += measured(row, plan)
        elif row != "P17":
            lines += measured(row, plan)
    missed = sum(line.met is False for line in lines)
    say(f"\n{sum(line.met is True for line in lines)} met, {missed} missed")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
