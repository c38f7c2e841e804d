"""The library on RabbitMQ beside the hand-written loops: `python tests/bench/compare_rabbitmq.py [P7 ...] [--strict]`.

As in compare.py, library and reference take turns and the median of the pairs' ratios is held against the target. All
rows share one RabbitMQ, as `mindtrace.jobs.testing.brokers` starts one; the queues are quorum queues. In the library's
worker all is on: counts, retries, deadline, a listener. The server pushes 200 jobs ahead to the reference, and to a
worker as many as it has slots, unless `prefetch` says more; the lines below P7 have both sides with 200, and with 100.

P16 is held against twice the best peer, which did 3,900 jobs/s end to end where the targets were set: an absolute
figure, which a busy machine misses. The blocking calls have no target on RabbitMQ.
"""

import argparse
import asyncio
import shlex
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import rabbitmq_reference
from compare import HEAD, Line, Measure, rates, say
from compare_redis import Part, bounded, less, printed, together
from rabbitmq_process import IN_FLIGHT, THEIRS, library_work_ahead, reference_publish, reference_work
from rabbitmq_reference import PREFETCH
from redis_process import library_delete, library_fill, library_publish, library_work

from mindtrace.jobs.cli.bench import machine_facts
from mindtrace.jobs.testing import brokers

BEST_PEER = 3900
"""Jobs a second, end to end."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        url: of the RabbitMQ.
        count: jobs of one measurement; slow ones take fewer.
        rounds: pairs of which the median counts.
    """

    url: str
    count: int
    rounds: int


async def compared(
    target: str, what: str, plan: Plan, least: float | None, library: Measure, reference: Measure
) -> Line:
    return await rates(target, what, plan.rounds, least, lambda: bounded(library), lambda: bounded(reference))


@asynccontextmanager
async def part(what: str, url: str, count: int) -> AsyncIterator[Part]:
    """A process of rabbitmq_process.py; it is killed if it has not ended by itself."""
    script, pipe = str(Path(__file__).with_name("rabbitmq_process.py")), asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, what, url, str(count), stdin=pipe, stdout=pipe
    )
    try:
        yield Part(process)
    finally:
        if process.returncode is None:
            try:
                async with asyncio.timeout(2):
                    await process.wait()
            except TimeoutError:
                process.kill()
        await process.wait()


async def alone(what: str, url: str, count: int) -> Any:
    async with part(what, url, count) as process:
        return await process.found()


# P7, processing


async def library_process(plan: Plan, count: int, slots: int) -> float:
    await library_fill(plan.url, count)
    span = await library_work(plan.url, count, slots)
    await library_delete(plan.url)
    return span.rate


async def reference_process(plan: Plan, count: int, prefetch: int) -> float:
    await reference_publish(plan.url, count)
    rate = (await reference_work(plan.url, count, prefetch)).rate
    await rabbitmq_reference.delete(plan.url, THEIRS)
    return rate


async def library_process_ahead(plan: Plan, count: int, prefetch: int) -> float:
    await library_fill(plan.url, count)
    span = await library_work_ahead(plan.url, count, prefetch)
    await library_delete(plan.url)
    return span.rate


async def p7(plan: Plan) -> AsyncIterator[Line]:
    many, ten, one = (less(plan.count, by) for by in (1, 2, 10))
    for target, what, library, reference in (
        (
            "P7",
            "process, 100 slots",
            lambda: library_process(plan, many, 100),
            lambda: reference_process(plan, many, PREFETCH),
        ),
        (
            "",
            f"process, 100 slots, prefetch={PREFETCH}",
            lambda: library_process_ahead(plan, many, PREFETCH),
            lambda: reference_process(plan, many, PREFETCH),
        ),
        (
            "",
            "process, 100 slots; reference as well",
            lambda: library_process(plan, many, 100),
            lambda: reference_process(plan, many, 100),
        ),
        ("", "process, 10 slots", lambda: library_process(plan, ten, 10), lambda: reference_process(plan, ten, 10)),
        ("", "process, 1 slot", lambda: library_process(plan, one, 1), lambda: reference_process(plan, one, 1)),
    ):
        yield await compared(target, what, plan, 0.75 if target else None, library, reference)


# P8, publishing


async def library_published(plan: Plan, count: int, lanes: int) -> float:
    rate = (await library_publish(plan.url, count, lanes)).rate
    await library_delete(plan.url)
    return rate


async def reference_published(plan: Plan, count: int, lanes: int) -> float:
    rate = (await reference_publish(plan.url, count, lanes)).rate
    await rabbitmq_reference.delete(plan.url, THEIRS)
    return rate


async def p8(plan: Plan) -> AsyncIterator[Line]:
    for what, lanes, by in ((f"{IN_FLIGHT} in flight", IN_FLIGHT, 1), ("one at a time", 1, 10)):
        count = less(plan.count, by)
        yield await compared(
            "P8",
            f"publish, {what}",
            plan,
            0.85,
            lambda lanes=lanes, count=count: library_published(plan, count, lanes),
            lambda lanes=lanes, count=count: reference_published(plan, count, lanes),
        )


# The blocking face


async def blocking(plan: Plan) -> AsyncIterator[Line]:
    count = less(plan.count, 20)
    pairs: list[tuple[float, float]] = []
    for _ in range(plan.rounds):
        called = await alone("blocking-publish", plan.url, count)
        pairs.append((called, await alone("awaited-publish", plan.url, count)))
        await library_delete(plan.url)
    above = median(called - awaited for called, awaited in pairs) * 1000
    called, awaited = (f"{median(column) * 1000:,.0f} µs" for column in zip(*pairs, strict=True))
    yield Line("", "blocking publish, above the awaited one", called, awaited, f"+{above:,.0f} µs", "", None)
    some = less(plan.count, 5)
    rate = median([await alone("blocking-consume", plan.url, some) for _ in range(plan.rounds)])
    await library_delete(plan.url)
    yield Line("", "blocking consume", f"{rate:,.0f} jobs/s", "", f"{rate:,.0f} jobs/s", "", None)


# P14, a worker's memory


async def p14(plan: Plan) -> AsyncIterator[Line]:
    """The worker's own publishes, one for each run, are a part of it."""
    count = 5 * plan.count
    by = median([await alone("growing", plan.url, count) for _ in range(min(plan.rounds, 3))]) / 2**20
    await library_delete(plan.url)
    found = f"{by:.2f} MiB"
    yield Line("P14", f"a worker's growth by {count:,} jobs", found, "", found, "< 2 MiB", by < 2)


# P16, end to end


async def end_to_end(side: str, plan: Plan) -> float:
    async with (
        part(f"{side}-work", plan.url, plan.count) as worker,
        part(f"{side}-publish", plan.url, plan.count) as publisher,
    ):
        done, published = await together(worker, publisher)
    if side == "library":
        await library_delete(plan.url)
    else:
        await rabbitmq_reference.delete(plan.url, THEIRS)
    return done.jobs / (done.end - published.start)


async def p16(plan: Plan) -> AsyncIterator[Line]:
    ours = list[float]()

    async def library() -> float:
        ours.append(await end_to_end("library", plan))
        return ours[-1]

    what = "end to end, a publisher and a worker"
    line = await compared("P16", what, plan, None, library, lambda: end_to_end("reference", plan))
    least = 2 * BEST_PEER
    yield replace(line, wanted=f">= {least:,}/s", met=median(ours) >= least)


# what is printed


ROWS: dict[str, Callable[[Plan], AsyncIterator[Line]]] = {
    "P7": p7,
    "P8": p8,
    "P14": p14,
    "P16": p16,
    "blocking": blocking,
}


def measured(row: str, plan: Plan) -> Sequence[Line]:
    try:
        return asyncio.run(printed(ROWS[row](plan)))
    except Exception:  # the other rows are worth having
        traceback.print_exc()
        line = Line(row, "failed, see above", "", "", "", "", False)
        say(line.text())
        return [line]


def main() -> int:
    parser = argparse.ArgumentParser(description="The library on RabbitMQ beside the hand-written loops.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all of them unless given")
    parser.add_argument("-n", type=int, default=20_000, help="jobs a run (20000); slow rows take fewer, P14 five times")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs, of which the median counts (5)")
    parser.add_argument("--url", help="a RabbitMQ that runs already; one is started unless given")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    if options.n < 1 or options.rounds < 1:
        parser.error("-n and --rounds: whole numbers from 1 on")
    if unknown := [row for row in options.rows if row not in ROWS]:
        parser.error(f"no such row: {shlex.join(unknown)}; there are {', '.join(ROWS)}")

    say(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()))
    say(f"{options.rounds} rounds of {options.n:,} jobs, 100 bytes of payload\n")
    say(HEAD.text())
    lines: list[Line] = []

    def measure(url: str) -> None:
        for row in options.rows or ROWS:
            lines.extend(measured(row, Plan(url, options.n, options.rounds)))

    if options.url:
        measure(options.url)
    else:
        with brokers.rabbitmq(private=True) as server:
            measure(server.url)
    missed = sum(line.met is False for line in lines)
    say(f"\n{sum(line.met is True for line in lines)} met, {missed} missed")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
