"""The comparison on Redis: that it runs and judges. And the hand-written loops: that they are at least once."""

import asyncio
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
COMPARE = [sys.executable, str(HERE / "compare_redis.py")]
JUDGED = ["P1", "P10", "P11", "P14", "P15", "P16", "P17", "P2", "P3", "P4", "P6"]  # P5 needs a third core

pytestmark = pytest.mark.redis
reference: Any = SimpleNamespace(**runpy.run_path(str(HERE / "redis_reference.py")))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.chaos
@pytest.mark.timeout(180)  # it starts twenty processes, one after the other
def test_the_comparison_judges_every_target_and_only_strict_makes_a_miss_a_failure() -> None:
    command = [*COMPARE, "-n", "100", "--rounds", "1", "--spread", "1.5", "--strict"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170)
    lines = run.stdout.splitlines()
    judged = [line.split()[0] for line in lines if re.search(r"  (met|missed)$", line)]
    assert sorted(set(judged) - {"P5"}) == JUDGED, run.stderr
    assert any(line.startswith("P5") for line in lines)
    assert not run.stderr
    assert run.returncode == any(line.endswith("missed") and line.startswith("P") for line in lines)


def test_rows_are_picked_by_name_and_a_name_that_is_none_is_refused() -> None:
    few = ["-n", "100", "--rounds", "1"]
    picked = subprocess.run([*COMPARE, "P2", *few], capture_output=True, text=True, timeout=30)
    assert set(re.findall(r"^P\d+", picked.stdout, re.MULTILINE)) == {"P2"}, picked.stderr
    refused = subprocess.run([*COMPARE, "P99", *few], capture_output=True, text=True, timeout=30)
    assert refused.returncode == 2
    assert "no such row: P99" in refused.stderr


@pytest.mark.anyio
async def test_each_job_of_the_hand_written_loops_is_run_once_and_nothing_is_left(redis_url: str) -> None:
    seen = list[int]()

    async def run(job: Any) -> None:
        seen.append(job["input"]["number"])

    async with asyncio.timeout(30), reference.connection(redis_url) as redis:
        publisher, worker = await opened(redis, "once")
        await asyncio.gather(*(publisher.publish({"number": number}) for number in range(500)))
        await publisher.publish_many([{"number": number} for number in range(500, 1000)])
        await worker.work(run, 10, 1000)
        assert seen == list(range(1000))
        assert await redis.keys("once:*") == [b"once:place"]
        await redis.delete("once:place")


@pytest.mark.anyio
async def test_a_repeated_publish_of_the_hand_written_loop_stores_nothing(redis_url: str) -> None:
    async with asyncio.timeout(30), reference.connection(redis_url) as redis:
        sha = await redis.script_load(reference.PUBLISH)
        for body in ("first", "second"):
            await redis.evalsha(sha, 3, "again:ready", "again:jobs", "again:place", "some-id", body)
        assert await redis.zcard("again:ready") == 1
        assert await redis.hgetall("again:jobs") == {b"some-id": b"first"}
        await redis.delete("again:ready", "again:jobs", "again:place")


@pytest.mark.anyio
async def test_a_job_whose_lease_ended_goes_to_another_worker_and_only_its_owner_settles_it(redis_url: str) -> None:
    begun, settled = asyncio.Event(), asyncio.Event()

    async def healthy_run(job: Any) -> None:
        begun.set()
        await settled.wait()
        assert await redis.hkeys("lapsed:jobs") == [job["id"].encode()]  # the other's settlement changed nothing

    async def stalled_run(job: Any) -> None:
        other = await opened_worker(second, "lapsed")
        tasks.append(asyncio.create_task(other.work(healthy_run, 1, 1)))
        await begun.wait()

    tasks = list[asyncio.Task[None]]()
    async with (
        asyncio.timeout(30),
        reference.connection(redis_url) as redis,
        reference.connection(redis_url) as second,
    ):
        publisher, _ = await opened(redis, "lapsed")
        stalled = await opened_worker(redis, "lapsed", lease=1)
        await publisher.publish({})
        await stalled.work(stalled_run, 1, 1)
        settled.set()
        await tasks[0]
        assert await redis.keys("lapsed:*") == [b"lapsed:place"]
        await redis.delete("lapsed:place")


async def opened(redis: Any, queue: str) -> tuple[Any, Any]:
    publisher = reference.Publisher(redis, queue)
    await publisher.open()
    return publisher, await opened_worker(redis, queue)


async def opened_worker(redis: Any, queue: str, **options: int) -> Any:
    worker = reference.Worker(redis, queue, **options)
    await worker.open()
    return worker
