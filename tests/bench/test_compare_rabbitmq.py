"""The comparison on RabbitMQ: that it runs and judges. And the hand-written loops: that they are at least once."""

import asyncio
import re
import runpy
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiormq
import pytest

HERE = Path(__file__).parent
COMPARE = [sys.executable, str(HERE / "compare_rabbitmq.py")]

pytestmark = pytest.mark.rabbitmq
reference: Any = SimpleNamespace(**runpy.run_path(str(HERE / "rabbitmq_reference.py")))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def queue(rabbitmq_url: str) -> AsyncIterator[str]:
    name = f"bench-{secrets.token_hex(6)}"
    yield name
    await reference.delete(rabbitmq_url, name)


def test_the_comparison_judges_every_target_and_only_strict_makes_a_miss_a_failure(rabbitmq_url: str) -> None:
    command = [*COMPARE, "--url", rabbitmq_url, "-n", "100", "--rounds", "1", "--strict"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50)
    lines = run.stdout.splitlines()
    judged = [line.split()[0] for line in lines if re.search(r"  (met|missed)$", line)]
    assert sorted(set(judged)) == ["P14", "P16", "P7", "P8"], run.stderr
    assert not run.stderr
    assert run.returncode == any(line.endswith("missed") and line.startswith("P") for line in lines)


@pytest.mark.anyio
async def test_each_job_of_the_hand_written_loops_is_run_and_acknowledged_once(rabbitmq_url: str, queue: str) -> None:
    seen, gate = list[int](), asyncio.Event()

    async def run(job: Any) -> None:
        seen.append(job["input"]["number"])
        if job["input"]["number"] == 0:
            await gate.wait()  # the others end before it: their tags are not contiguous
        if len(seen) == 10:
            gate.set()

    async with asyncio.timeout(30):
        async with reference.opened(rabbitmq_url, queue) as channel:
            await asyncio.gather(*(reference.publish(channel, queue, {"number": number}) for number in range(200)))
            await reference.Worker(channel, queue).work(run, 200, 10)
        assert sorted(seen) == list(range(200))
        assert await waiting(rabbitmq_url, queue) == 0


@pytest.mark.anyio
async def test_a_failed_job_of_the_hand_written_loop_comes_again(rabbitmq_url: str, queue: str) -> None:
    async def run(job: Any) -> None:
        if job["input"]["number"] == 1:
            raise ValueError

    async with asyncio.timeout(30):
        async with reference.opened(rabbitmq_url, queue) as channel:
            for number in range(3):
                await reference.publish(channel, queue, {"number": number})
            await reference.Worker(channel, queue).work(run, 2, 10)
        assert await waiting(rabbitmq_url, queue) == 1


@pytest.mark.anyio
async def test_a_publish_of_the_hand_written_loop_to_no_queue_raises(rabbitmq_url: str, queue: str) -> None:
    async with asyncio.timeout(30), reference.opened(rabbitmq_url, queue) as channel:
        with pytest.raises(aiormq.exceptions.PublishError):
            await reference.publish(channel, f"{queue}-none", {})


async def waiting(url: str, queue: str) -> int:
    """Jobs in the queue, once the server has seen the end of the connections before."""
    async with reference.opened(url, queue) as channel:
        declared = await channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
        return declared.message_count
