"""The library beside the hand-written loop, against its targets: `python tests/bench/compare.py [--strict]`.

Machines are noisy, so that what counts is a ratio: library and reference take turns, with equal payloads, in one
process and one minute, and the median of the pairs' ratios is held against the target. What has no reference is
measured as often (memory three times), and its median is held against the target. Where a line names a model, the
library checks the input by its schema at both ends, and the reference makes the same model for each run; in the others
no schema is registered, and the reference takes a plain dict where the library takes a `Job`. The target for publish is
half of what the hand-written worker processes; the line below it, without a target, has the hand-written publish.
"""

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from reference import Reference

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Job,
    JobSchema,
    LocalBackend,
    LocalClient,
    Orchestrator,
    QueueSpec,
    Worker,
)
from mindtrace.jobs.cli import bench
from mindtrace.jobs.cli.bench import Payload, machine_facts

QUEUE = "bench"
DATA = Payload.of_size(100).data

IMPORT = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in ("redis", "aio_pika") if name in sys.modules]]))
"""

Measure = Callable[[], Awaitable[float]]


def plain_job() -> Job:
    return Job(name=QUEUE, schema_name=QUEUE, input_data={"data": DATA})


def plain_data() -> dict[str, str]:
    return {"data": DATA}


def typed_data() -> Payload:
    return Payload(data=DATA)


class Plain(AsyncConsumer):
    async def run(self, job_dict: Any) -> None:
        pass


class Typed(AsyncConsumer[Payload, None]):
    async def handle(self, data: Payload) -> None:
        pass


async def nothing(job: Any) -> None:
    pass


# library and reference, each a rate in jobs a second


async def opened(*, typed: bool) -> AsyncOrchestrator:
    """On a backend of its own. Typed: with a schema, whose model checks each input."""
    jobs = AsyncOrchestrator(LocalBackend())
    await jobs.open()
    if typed:
        await jobs.register(JobSchema(QUEUE, Payload))
    else:
        await jobs.declare(QueueSpec(QUEUE))
    return jobs


async def library_publish(count: int, *, typed: bool) -> float:
    jobs = await opened(typed=typed)
    gc.collect()
    rate = await bench.publish_singly(jobs, QUEUE, typed_data if typed else plain_job, count)
    await jobs.aclose()
    return rate.per_second


async def reference_publish(count: int, *, typed: bool) -> float:
    queue, job = Reference(), typed_data if typed else plain_data
    gc.collect()
    start = time.perf_counter()
    for _ in range(count):
        await queue.publish(job())
    return count / (time.perf_counter() - start)


async def library_both(count: int, slots: int) -> float:
    """Published one at a time, then processed."""
    jobs = await opened(typed=False)
    gc.collect()
    start = time.perf_counter()
    await bench.publish_singly(jobs, QUEUE, plain_job, count)
    await Worker(jobs, [Plain(QUEUE)], concurrency=slots, max_jobs=count).work()
    rate = count / (time.perf_counter() - start)
    await jobs.aclose()
    return rate


async def reference_both(count: int, slots: int) -> float:
    queue = Reference()
    gc.collect()
    start = time.perf_counter()
    for _ in range(count):
        await queue.publish(plain_data())
    await queue.work(nothing, slots, count)
    return count / (time.perf_counter() - start)


async def library_process(count: int, slots: int, *, typed: bool) -> float:
    jobs = await opened(typed=typed)
    consumer = Typed(QUEUE) if typed else Plain(QUEUE)
    gc.collect()
    rate = await bench.process(jobs, QUEUE, typed_data if typed else plain_job, count, consumer, slots)
    await jobs.aclose()
    return rate.per_second


async def reference_process(count: int, slots: int, *, typed: bool) -> float:
    queue, job = Reference(), typed_data if typed else plain_data
    for _ in range(count):
        await queue.publish(job())
    gc.collect()
    start = time.perf_counter()
    await queue.work(nothing, slots, count, Payload if typed else None)
    return count / (time.perf_counter() - start)


# latencies, in milliseconds


async def library_latency(count: int) -> tuple[float, float]:
    jobs = await opened(typed=True)
    latency = await bench.idle_latency(jobs, QUEUE, typed_data, count)
    await jobs.aclose()
    return latency.percentile(0.5), latency.percentile(0.99)


async def reference_latency(count: int) -> tuple[float, float]:
    queue, samples = Reference(), list[float]()
    began: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def run(data: Payload) -> None:
        began.set_result(time.perf_counter())

    worker = asyncio.create_task(queue.work(run, 1, count, Payload))
    for _ in range(count):
        await asyncio.sleep(bench.IDLE)
        began = asyncio.get_running_loop().create_future()
        published = time.perf_counter()
        await queue.publish(typed_data())
        samples.append(await began - published)
    await worker
    latency = bench.Latency("", samples)
    return latency.percentile(0.5), latency.percentile(0.99)


async def awaited_publish(count: int) -> float:
    """Median milliseconds of one call."""
    jobs, samples = await opened(typed=False), list[float]()
    gc.collect()
    for _ in range(count):
        start = time.perf_counter()
        await jobs.publish(QUEUE, plain_job())
        samples.append(time.perf_counter() - start)
    await jobs.aclose()
    return median(samples) * 1000


def blocking_publish(count: int) -> float:
    """The same, from a thread without a loop."""
    client, samples = LocalClient(), list[float]()
    client.declare_queue(QUEUE)
    jobs = Orchestrator(client)
    gc.collect()
    for _ in range(count):
        start = time.perf_counter()
        jobs.publish(QUEUE, plain_job())
        samples.append(time.perf_counter() - start)
    client.close()
    return median(samples) * 1000


# fresh processes


def fresh(*arguments: str) -> Any:
    """What a fresh interpreter prints, read as JSON."""
    return json.loads(subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout)


def imported(module: str) -> tuple[float, list[str]]:
    """Milliseconds of the import in a fresh interpreter, and which broker clients it loaded."""
    seconds, loaded = fresh("-c", IMPORT.format(module=module))
    return seconds * 1000, loaded


def grown(what: str, count: int) -> float:
    """Bytes, by memory.py."""
    return fresh(str(Path(__file__).with_name("memory.py")), what, str(count))


# what is printed


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison; `met` is None where there is no target."""

    target: str
    what: str
    library: str
    reference: str
    found: str
    wanted: str
    met: bool | None

    def text(self) -> str:
        verdict = "" if self.met is None else "met" if self.met else "missed"
        cells = (
            f"{self.target:<5}{self.what:<42}{self.library:>16}{self.reference:>16}{self.found:>11}{self.wanted:>13}"
        )
        return f"{cells}  {verdict}".rstrip()


HEAD = Line("", "", "library", "reference", "found", "target", None)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def rates(target: str, what: str, rounds: int, least: float | None, library: Measure, reference: Measure) -> Line:
    pairs = [await one_pair(library, reference, swapped=round_ % 2 == 1) for round_ in range(rounds)]
    ratio = median(ours / theirs for ours, theirs in pairs)
    ours, theirs = (f"{median(column):,.0f} jobs/s" for column in zip(*pairs, strict=True))
    wanted = "" if least is None else f">= {least:.2f}"
    return Line(target, what, ours, theirs, f"x {ratio:.2f}", wanted, None if least is None else ratio >= least)


async def one_pair(library: Measure, reference: Measure, *, swapped: bool) -> tuple[float, float]:
    """Both, in turns first, so that neither always has the warmer machine."""
    if swapped:
        theirs = await reference()
        return await library(), theirs
    return await library(), await reference()


def throughput(rounds: int, count: int) -> Sequence[Line]:
    lines: list[Line] = []

    def compare(target: str, what: str, least: float | None, library: Measure, reference: Measure) -> None:
        line = asyncio.run(rates(target, what, rounds, least, library, reference))
        say(line.text())
        lines.append(line)

    for typed, what in ((False, "publish, each a new Job"), (True, "publish, each a new model")):
        publish = lambda typed=typed: library_publish(count, typed=typed)  # noqa: E731
        compare(
            "P9", f"{what}; the worker", 0.50, publish, lambda typed=typed: reference_process(count, 100, typed=typed)
        )
        compare("", what, None, publish, lambda typed=typed: reference_publish(count, typed=typed))
    compare(
        "",
        "publish, then process, 100 slots",
        None,
        lambda: library_both(count, 100),
        lambda: reference_both(count, 100),
    )
    for slots, typed in ((100, False), (100, True), (10, False), (1, False)):
        also = ", as a model" if typed else ""
        compare(
            "P9" if slots == 100 else "",
            f"process, {slots} slot{'s' if slots > 1 else ''}{also}",
            0.50 if slots == 100 else None,
            lambda slots=slots, typed=typed: library_process(count, slots, typed=typed),
            lambda slots=slots, typed=typed: reference_process(count, slots, typed=typed),
        )
    return lines


def latency(rounds: int, count: int) -> Line:
    pairs = [(asyncio.run(library_latency(count)), asyncio.run(reference_latency(count))) for _ in range(rounds)]
    ours, theirs = (
        f"{median(p50 for p50, _ in side):.3f}/{median(p99 for _, p99 in side):.3f} ms"
        for side in zip(*pairs, strict=True)
    )
    ratio = median(library[0] / reference[0] for library, reference in pairs)
    return Line("", "publish to run, when idle, p50/p99", ours, theirs, f"x {ratio:.2f}", "", None)


def blocking(rounds: int, count: int) -> Line:
    pairs = [(blocking_publish(count), asyncio.run(awaited_publish(count))) for _ in range(rounds)]
    above = median(ours - awaited for ours, awaited in pairs) * 1000
    ours, awaited = (f"{median(column) * 1000:,.0f} µs" for column in zip(*pairs, strict=True))
    return Line(
        "P10", "blocking publish, above the awaited one", ours, awaited, f"+{above:,.0f} µs", "<= 150 µs", above <= 150
    )


def imports(rounds: int) -> Sequence[Line]:
    imported("mindtrace.jobs")  # writes the bytecode
    pairs = [(imported("mindtrace.jobs"), imported("pydantic")) for _ in range(rounds)]
    ours, pydantic = (median(ms for ms, _ in side) for side in zip(*pairs, strict=True))
    loaded = sorted({name for (_, names), _ in pairs for name in names})
    found = f"{ours:,.0f} ms"
    return [
        Line("P12", "import; reference: pydantic alone", found, f"{pydantic:,.0f} ms", found, "<= 250 ms", ours <= 250),
        Line("P12", "broker clients imported", ", ".join(loaded) or "none", "", str(len(loaded)), "0", not loaded),
    ]


def memory(rounds: int, count: int) -> Sequence[Line]:
    ours = median(grown("waiting", count) for _ in range(rounds))
    theirs = median(grown("waiting-reference", count) for _ in range(rounds))
    by = median(grown("worker", count) for _ in range(rounds)) / 2**20
    found = f"{ours:,.0f} B"
    return [
        Line("P9", "memory of a waiting job", found, f"{theirs:,.0f} B", found, "<= 1,500 B", ours <= 1500),
        Line("P14", f"a worker's growth by {count:,} jobs", f"{by:.2f} MiB", "", f"{by:.2f} MiB", "< 2 MiB", by < 2),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="The library beside the hand-written loop, against its targets.")
    parser.add_argument("-n", type=int, default=20_000, help="jobs a run (20000); memory takes five times as many")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs, of which the median counts (5)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    if options.n < 1 or options.rounds < 1:
        parser.error("-n and --rounds: whole numbers from 1 on")

    say(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()))
    say(f"{options.rounds} rounds of {options.n:,} jobs, 100 bytes of payload\n")
    say(HEAD.text())
    rounds, count = options.rounds, options.n
    lines = [*throughput(rounds, count)]
    for part in (
        lambda: [latency(rounds, min(count, 300))],
        lambda: [blocking(rounds, min(count, 2000))],
        lambda: imports(rounds),
        lambda: memory(min(rounds, 3), 5 * count),
    ):
        for line in part():
            say(line.text())
            lines.append(line)
    missed = sum(line.met is False for line in lines)
    say(f"\n{sum(line.met is True for line in lines)} met, {missed} missed")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
