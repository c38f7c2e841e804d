"""Which job a log record belongs to, and records as JSON; that neither shows what nobody may read."""

import asyncio
import io
import json
import logging
import logging.handlers
import queue
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from redis import Redis

from mindtrace.jobs import AsyncOrchestrator, Event, Job, QueueSpec, RedisBackend, RetryPolicy, Worker, current_job
from mindtrace.jobs.logs import FIELDS, JobFilter, JsonFormatter

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]

user_log = logging.getLogger("app.of.the.user")


class Output:
    """What a handler on the root logger has written."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def objects(self, logger: str = "") -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.text.splitlines()]
        return [one for one in found if one["logger"].startswith(logger)]


@pytest.fixture
def output() -> Iterator[Output]:
    """Everything at every level, as JSON unless a test sets another format."""
    output, root = Output(), logging.getLogger()
    output.handler.setFormatter(JsonFormatter())
    level = root.level
    root.addHandler(output.handler)
    root.setLevel(logging.DEBUG)
    yield output
    root.setLevel(level)
    root.removeHandler(output.handler)


def test_a_record_is_one_line_whatever_is_in_it(output: Output) -> None:
    before = time.time()
    user_log.warning("a\nb\r\x1b[31m\x7f\x85\u2028é%s", "!", extra={"secret": "left out"})
    [line] = output.text.splitlines()
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    assert list(found) == ["time", "level", "logger", "message"]
    assert (found["level"], found["logger"]) == ("WARNING", "app.of.the.user")
    assert found["message"] == "a\nb\r\x1b[31m\x7f\x85\u2028é!"
    assert before - 0.001 <= datetime.fromisoformat(found["time"]).timestamp() <= time.time() + 0.001
    assert found["time"].endswith("+00:00")


def test_an_exception_and_a_stack_are_text(output: Output) -> None:
    try:
        raise ValueError("what went wrong")
    except ValueError:
        user_log.exception("failed", stack_info=True)
    [found] = output.objects()
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("ValueError: what went wrong")
    assert "in test_an_exception_and_a_stack_are_text" in found["stack"]


async def test_what_user_code_logs_inside_a_run_says_which_job_it_was(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, output: Output
) -> None:
    """Two coroutines at once, a task that one starts, a thread; and nothing once they are over."""
    both = asyncio.Barrier(2)

    async def act(job: dict[str, Any]) -> None:
        await both.wait()
        user_log.info("coroutine %d", job["input_data"]["n"])
        await asyncio.create_task(later(job["input_data"]["n"]))

    async def later(n: int) -> None:
        await both.wait()
        user_log.info("task %d", n, extra={"queue": "of the user"})

    def blocks(_: Any) -> None:
        user_log.info("thread")

    await orchestrator.declare(QueueSpec("threads"))
    first, second = await publish(2)
    [third] = await publish(1, "threads", schema="heavy")
    worker = Worker(orchestrator, [consumer(act), consumer(blocks, "threads")], until_idle=True)
    await worker.run()
    user_log.info("outside")
    found = {one["message"]: {name: one.get(name) for name in FIELDS} for one in output.objects("app")}
    a_job = {"queue": "jobs", "schema": "jobs", "attempt": 1, "worker": worker.name}
    assert found == {
        "coroutine 1": {"job_id": first, **a_job},
        "coroutine 2": {"job_id": second, **a_job},
        "task 1": {"job_id": first, **a_job, "queue": "of the user"},
        "task 2": {"job_id": second, **a_job, "queue": "of the user"},
        "thread": {"job_id": third, **a_job, "queue": "threads", "schema": "heavy"},
        "outside": dict.fromkeys(FIELDS),
    }


async def test_what_the_library_logs_about_a_job_carries_the_same_fields(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, output: Output
) -> None:
    async def act(_: Any) -> None:
        raise OSError

    [job_id] = await publish(1)
    worker = Worker(orchestrator, [consumer(act)], retry=False, until_idle=True)
    await worker.run()
    [dead] = [one for one in output.objects("mindtrace.jobs") if one["level"] == "ERROR"]
    assert {name: dead[name] for name in FIELDS} == {
        "job_id": job_id, "queue": "jobs", "schema": "jobs", "attempt": 1, "worker": worker.name,
    }  # fmt: skip
    about_worker = [one for one in output.objects("mindtrace.jobs") if worker.name in one["message"]]
    assert about_worker
    assert {one["worker"] for one in about_worker} == {worker.name}


async def test_a_filter_adds_the_fields_for_any_format_and_for_a_handler_that_formats_elsewhere(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, output: Output
) -> None:
    output.handler.addFilter(JobFilter())
    output.handler.setFormatter(logging.Formatter("%(job_id)s/%(queue)s/%(attempt)s/%(message)s"))
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    in_front = logging.handlers.QueueHandler(records)
    in_front.addFilter(JobFilter())
    user_log.addHandler(in_front)

    async def act(_: Any) -> None:
        user_log.info("inside")
        user_log.info("of another", extra={"job_id": "other"})

    [job_id] = await publish(1)
    try:
        await Worker(orchestrator, [consumer(act)], max_jobs=1).run()
        user_log.info("outside")
    finally:
        user_log.removeHandler(in_front)
    lines = output.text.splitlines()
    assert f"{job_id}/jobs/1/inside" in lines
    assert "other//None/of another" in lines
    assert "//None/outside" in lines
    assert json.loads(JsonFormatter().format(records.get_nowait()))["job_id"] == job_id


async def test_current_job_says_where_it_comes_from_and_who_runs_it(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    seen: list[tuple[str, str, str]] = []

    def act(_: Any) -> None:
        seen.append((current_job().queue, current_job().schema_name, current_job().worker))

    await publish(1, schema="heavy")
    worker = Worker(orchestrator, [consumer(act)], max_jobs=1)
    await worker.run()
    assert seen == [("jobs", "heavy", worker.name)]


@pytest.mark.redis
async def test_neither_a_payload_nor_a_password_gets_into_any_line(
    consumer: Make, output: Output, redis_url: str
) -> None:
    """At every level, with asyncio's debug mode: jobs that end in all ways, a loop that stands still, a wrong login."""
    canary, password = "the-customers-canary", "the-servers-canary"
    released = asyncio.Event()

    async def ends(job: dict[str, Any]) -> dict[str, Any]:
        order = job["input_data"]["order"]
        match job["input_data"]["how"]:
            case "raises":
                raise ValueError(order)
            case "blocks":
                time.sleep(1.3)  # noqa: ASYNC251 (that is what it is to do)
            case "hangs":
                await asyncio.Event().wait()
            case "waits":
                released.set()
                await asyncio.Event().wait()
        return {"order": order}

    def in_thread(job: dict[str, Any]) -> None:
        raise OSError(job["input_data"]["order"])

    told: list[Event] = []
    asyncio.get_running_loop().set_debug(True)
    address, name = redis_url.rpartition("@")[2].removeprefix("redis://"), "canary"
    with Redis.from_url(redis_url) as server:
        server.execute_command("ACL", "SETUSER", name, "on", f">{password}", "~*", "&*", "+@all")
    try:
        backend = RedisBackend.from_url(f"redis://{name}:{password}@{address}", namespace="canary")
        async with AsyncOrchestrator(backend) as orchestrator:
            for queue_name in ("jobs", "threads"):
                await orchestrator.declare(QueueSpec(queue_name))
            for how in ("returns", "raises", "blocks", "hangs", "waits"):
                job = Job(name="jobs", schema_name="jobs", input_data={"how": how, "order": canary})
                await orchestrator.publish("jobs", job, timeout=0.2 if how == "hangs" else None)
            await orchestrator.publish("threads", Job(name="t", schema_name="t", input_data={"order": canary}))
            worker = Worker(
                orchestrator,
                [consumer(ends), consumer(in_thread, "threads")],
                retry=RetryPolicy(max_attempts=1),
                listeners=[told.append],
            )
            async with worker:
                await released.wait()
                stacks = repr(worker.running())
                while sum(type(event).__name__ == "JobSettled" for event in told) < 5:  # noqa: ASYNC110 (nothing tells)
                    await asyncio.sleep(0.01)
                worker.stop(now=True)
            for queue_name in ("jobs", "threads"):
                await orchestrator.delete(queue_name, force=True)
        wrong = RedisBackend.from_url(f"redis://{name}:{password}-too@{address}")
        with pytest.raises(Exception, match="refuses the login") as refused:
            await wrong.open()
    finally:
        with Redis.from_url(redis_url) as server:
            server.execute_command("ACL", "DELUSER", name)
    lines = f"{output.text}{stacks}{refused.value}{backend!r}"
    assert "stands still" in lines
    assert "in ends" in stacks
    assert canary not in lines
    assert password not in lines
