"""`executor="process"`: what runs there, how it ends, and that nothing of it outlives its worker."""

import asyncio
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mindtrace.jobs import (
    AsyncOrchestrator,
    ConfigError,
    Consumer,
    DeadRecord,
    Depth,
    Done,
    Event,
    Job,
    JobSchema,
    JobSettled,
    LocalClient,
    Orchestrator,
    QueueSpec,
    Retry,
    RetryPolicy,
    Worker,
)
from mindtrace.jobs.testing.leaks import LeakGuard

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Start = Callable[[Worker], "asyncio.Task[int]"]
HERE = Path(__file__).parent


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the consumers."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("in_processes")


class Board:
    """Where runs tell what they do, from whatever process; one that waits goes on once it is let go."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._waiting: list[asyncio.StreamWriter] = []

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if line := await reader.readline():
            self._told.put_nowait(json.loads(line))
        self._waiting.append(writer)

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(20):
            return await self._told.get()

    def all(self) -> list[dict[str, Any]]:
        """What was told and not looked at yet."""
        return [self._told.get_nowait() for _ in range(self._told.qsize())]

    def let_go(self) -> None:
        while self._waiting:
            self._waiting.pop().close()


@pytest.fixture
async def board(tmp_path: Path) -> AsyncIterator[Board]:
    board = Board(str(tmp_path / "board"))
    server = await asyncio.start_unix_server(board.take, board.path)
    yield board
    board.let_go()
    server.close()


@pytest.fixture
def publish(orchestrator: AsyncOrchestrator, board: Board) -> Callable[..., Awaitable[str]]:
    async def published(act: str, *, queue: str = "jobs", options: Any = None, **data: Any) -> str:
        job = Job(name=queue, schema_name=queue, input_data={"act": act, "board": board.path, **data})
        return await orchestrator.publish(queue, job, **(options or {}))

    return published


Publish = Callable[..., Awaitable[str]]


class Ends:
    """How deliveries were settled, by job."""

    def __init__(self) -> None:
        self.by_job: dict[str, list[JobSettled]] = {}
        self._told = asyncio.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, JobSettled):
            self.by_job.setdefault(event.job_id, []).append(event)
            self._told.set()
            self._told = asyncio.Event()

    async def times(self, job_id: str, n: int) -> None:
        """Wait until it was settled so often."""
        async with asyncio.timeout(20):
            while len(self.by_job.get(job_id, [])) < n:
                await self._told.wait()

    def of(self, job_id: str) -> list[str]:
        return [type(event.settlement).__name__ for event in self.by_job[job_id]]


async def gone(pid: int) -> None:
    """Wait until it has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, over.set)
    try:
        async with asyncio.timeout(10):
            await over.wait()
    finally:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)


def children() -> set[int]:
    """Of this process, those too that have ended and were not waited for."""
    found = set[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(folder.name))
    return found


BEFORE = set[int]()


@pytest.fixture(autouse=True)
def other_children() -> None:
    """What other tests have started, brokers for example."""
    BEFORE.clear()
    BEFORE.update(children())


def no_child_is_left() -> bool:
    return children() <= BEFORE


async def dead_letters(orchestrator: AsyncOrchestrator, queue: str = "jobs") -> dict[str, DeadRecord]:
    page = await orchestrator.dead_letters(queue).list()
    return {record.message.id: record for record in page.records}


def last_error(record: DeadRecord) -> tuple[str, str]:
    return record.errors[-1].type, record.errors[-1].message


# --- what runs there


async def test_a_coroutine_a_thread_and_a_process_share_a_worker_and_each_knows_its_job(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    """`current_job()` says the same in all three; and in a process a run finds no context that another has left."""
    kinds = {"on_loop": shop.OnLoop, "in_thread": shop.InThread, "in_process": shop.Acts}
    for queue in kinds:
        await orchestrator.declare(QueueSpec(queue))
    ids = [
        await publish("tell", queue=queue, n=n, options={"headers": {"who": queue}, "timeout": 60.0})
        for n in range(2)
        for queue in kinds
    ]
    worker = Worker(orchestrator, [kind(name) for name, kind in kinds.items()], concurrency=3, until_idle=True)
    assert (await worker.run(), worker.handled) == (0, 6)
    told = {facts["job"]["id"]: facts for facts in board.all()}
    assert set(told) == set(ids)
    assert len({tuple(facts["job"]) for facts in told.values()}) == 1  # the same fields everywhere
    for job_id, facts in told.items():
        job = facts["job"]
        said = {"id": job_id, "attempt": 1, "number": 1, "cancelled": False, "lease_lost": False}
        assert said == {name: job[name] for name in said}
        assert 0 < job["deadline"] <= 60
        assert (facts["pid"] != os.getpid()) == (job["headers"]["who"] == "in_process")
        assert facts["before"] == ""


async def test_an_input_is_a_model_there_and_a_result_is_checked_here(
    orchestrator: AsyncOrchestrator, shop: Any
) -> None:
    """By aliases, too; and what cannot be told to the worker is no result."""
    pack = shop.Pack("pack")
    await orchestrator.register(pack.schema())
    articles = ("a book", "dict", "wrong", "set", "huge")
    ids = {article: await orchestrator.publish("pack", {"what": article, "count": 2}) for article in articles}
    worker = Worker(orchestrator, [pack], concurrency=1, until_idle=True)
    assert await worker.run() == 0
    dead = await dead_letters(orchestrator, "pack")
    assert {record.reason for record in dead.values()} == {"output_invalid"}
    assert set(dead) == {ids["wrong"], ids["set"], ids["huge"]}
    assert "weight: Input should be a valid integer" in last_error(dead[ids["wrong"]])[1]
    assert "cannot be written as JSON" in last_error(dead[ids["set"]])[1]
    assert "bytes of JSON, 16777216 allowed" in last_error(dead[ids["huge"]])[1]


async def test_no_payload_is_logged_when_a_serializer_of_the_users_quotes_it(
    orchestrator: AsyncOrchestrator, shop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    schema = JobSchema("take", shop.Order, shop.Parcel, validate_output="warn")
    await orchestrator.register(schema)
    await orchestrator.publish("take", {"what": "s3cret"})
    with caplog.at_level(logging.DEBUG):
        assert await Worker(orchestrator, [shop.Take("take")], concurrency=1, until_idle=True).run() == 0
    assert "does not fit the schema 'take': it cannot be written as JSON: PydanticSerializationError" in caplog.text
    assert "s3cret" not in caplog.text


async def test_without_an_output_model_a_result_may_be_anything(
    orchestrator: AsyncOrchestrator, publish: Publish, shop: Any
) -> None:
    for act, value in (("return", {"a": [1]}), ("return", "text"), ("set", None)):
        await publish(act, value=value)
    worker = Worker(orchestrator, [shop.Acts("jobs")], concurrency=1, until_idle=True)
    assert (await worker.run(), worker.handled) == (0, 3)
    assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)


async def test_what_a_run_prints_and_logs_comes_out_of_its_worker(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    shop: Any,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The levels that are set in the worker's process hold in the children."""
    caplog.set_level(logging.WARNING, "shop.quiet")
    caplog.set_level(logging.INFO, "shop")
    await publish("print")
    assert await Worker(orchestrator, [shop.Acts("jobs")], concurrency=1, until_idle=True).run() == 0
    assert capfd.readouterr().out == "printed by a run\n"
    [record] = [record for record in caplog.records if record.name.startswith("shop")]
    facts = vars(record)
    assert (record.getMessage(), record.levelname, facts["basket"]) == ("said by a run", "INFO", 7)
    assert record.process != os.getpid()


# --- how it ends


async def test_an_error_there_is_told_and_judged_as_one_here(
    orchestrator: AsyncOrchestrator, publish: Publish, shop: Any
) -> None:
    ids = {kind: await publish("raise", kind=kind) for kind in ("Sold", "OutOfStock", "KeyError")}
    assert await Worker(orchestrator, [shop.Stocked("jobs")], concurrency=1, until_idle=True).run() == 0
    dead = await dead_letters(orchestrator)
    assert {kind: (dead[job_id].reason, dead[job_id].attempts) for kind, job_id in ids.items()} == {
        "Sold": ("rejected", 1),  # no_retry_on
        "OutOfStock": ("attempts", 2),
        "KeyError": ("rejected", 1),  # not in retry_on
    }
    record = dead[ids["OutOfStock"]]
    assert last_error(record) == ("in_processes.OutOfStock", "no more of it")
    frames = record.errors[-1].traceback
    assert "in act" in frames
    assert 'raise {"Sold"' in frames
    assert "child.py" not in frames  # ours is left out


async def test_the_signals_steer_from_there(orchestrator: AsyncOrchestrator, publish: Publish, shop: Any) -> None:
    ends = Ends()
    ids = {act: await publish(act) for act in ("snooze", "retry", "discard", "reject", "coroutine")}
    await Worker(orchestrator, [shop.Acts("jobs")], concurrency=1, max_jobs=7 + 2, listeners=[ends]).run()
    assert ends.of(ids["snooze"]) == ["Release", "Done"]
    assert ends.of(ids["retry"]) == ["Retry", "Done"]
    assert ends.of(ids["coroutine"]) == ["Retry", "Retry", "Dead"]
    [discarded] = ends.by_job[ids["discard"]]
    assert discarded.settlement == Done(discarded="old")
    dead = await dead_letters(orchestrator)
    assert dead[ids["reject"]].reason == "rejected"
    assert last_error(dead[ids["reject"]]) == ("mindtrace.jobs.errors.Reject", "no such customer")
    assert "in act" in dead[ids["reject"]].errors[-1].traceback
    assert "executor='process' needs a plain def" in last_error(dead[ids["coroutine"]])[1]
    retry = ends.by_job[ids["retry"]][0].settlement
    assert isinstance(retry, Retry)
    assert (retry.delay, retry.reason, retry.crash) == (0.01, "busy", False)


async def test_a_run_that_exits_has_failed_and_only_its_child_leaves(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    await publish("tell")
    exited = await publish("exit")
    await publish("tell")
    assert await Worker(orchestrator, [shop.Once("jobs")], concurrency=1, until_idle=True).run() == 0
    before, after = board.all()
    assert before["pid"] != after["pid"]
    record = (await dead_letters(orchestrator))[exited]
    assert (record.reason, record.crashes, last_error(record)) == ("attempts", 0, ("SystemExit", "enough"))


async def test_a_run_that_finds_no_more_memory_has_failed_and_its_child_is_replaced(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Though nothing is left to tell it with; and what the run has broken up goes with the process."""
    await publish("tell")
    fills = await publish("fill")
    await publish("tell")
    full = await publish("overfill")
    assert await Worker(orchestrator, [shop.Once("jobs")], concurrency=1, until_idle=True).run() == 0
    before, after = board.all()
    assert before["pid"] != after["pid"]
    dead = await dead_letters(orchestrator)
    assert {(record.reason, record.crashes) for record in dead.values()} == {("attempts", 0)}
    assert last_error(dead[fills])[0] == "MemoryError"
    assert last_error(dead[full]) == ("in_processes.Full", "let go")
    assert capfd.readouterr().err == ""


async def test_a_run_whose_process_dies_crashes_alone_and_is_dead_at_its_crash_limit(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    """No attempt is used up: with one attempt only it is started five times, without waiting for a lease."""
    poison = await publish("abort")
    once = {"retry": RetryPolicy(crash_limit=1)}
    others = {act: await publish(act, options=once) for act in ("kill", "leave", "garbage")}
    neighbours = [await publish("tell", n=n) for n in range(20)]
    ends = Ends()
    worker = Worker(orchestrator, [shop.Once("jobs")], concurrency=2, until_idle=True, listeners=[ends])
    assert await worker.run() == 0
    told = board.all()
    assert sum("job" not in facts for facts in told) == 5
    assert {facts["job"]["id"] for facts in told if "job" in facts} == set(neighbours)
    assert all(ends.of(job_id) == ["Done"] for job_id in neighbours)
    dead = await dead_letters(orchestrator)
    for job_id, n, text in (
        (poison, 5, "SIGABRT"), (others["kill"], 1, "SIGKILL"), (others["leave"], 1, "exit status 3"),
        (others["garbage"], 1, "wrote into the socket"),
    ):  # fmt: skip
        record = dead[job_id]
        assert (record.reason, record.attempts, record.crashes) == ("crash_limit", n, n)
        assert text in last_error(record)[1]
        assert ends.of(job_id) == ["Retry"] * (n - 1) + ["Dead"]


async def test_a_run_that_fills_memory_is_killed_and_its_neighbour_lives(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any, start: Start
) -> None:
    await orchestrator.declare(QueueSpec("others"))
    await publish("wait", queue="others")
    ends = Ends()
    consumers = [shop.Small("jobs"), shop.Acts("others")]
    worker = Worker(orchestrator, consumers, concurrency=2, max_jobs=3, listeners=[ends])
    running = start(worker)
    await board.next()
    greedy = await publish("grow")
    await ends.times(greedy, 2)
    assert worker.health().running == 1
    board.let_go()
    assert await running == 0
    record = (await dead_letters(orchestrator))[greedy]
    assert (record.reason, record.crashes) == ("crash_limit", 2)
    assert "max_memory=200" in last_error(record)[1]


async def test_a_timeout_kills_the_process_with_what_it_started_and_frees_the_slot(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any, start: Start
) -> None:
    late = await publish("start", options={"timeout": 0.3})
    worker = Worker(orchestrator, [shop.Once("jobs")], concurrency=1, cancel_grace=60.0, max_jobs=2)
    running = start(worker)
    facts = await board.next()
    await publish("tell")
    assert (await board.next())["pid"] != facts["pid"]
    await asyncio.gather(gone(facts["pid"]), gone(facts["started"]))
    assert await running == 0
    assert (await dead_letters(orchestrator))[late].reason == "timeout"
    assert (worker.health().stuck, worker.health().running) == (0, 0)


@pytest.mark.parametrize("how", ["stop", "queue deleted"])
async def test_a_stop_and_a_lost_lease_kill_the_process(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any, start: Start, how: str
) -> None:
    await publish("start")
    worker = Worker(orchestrator, [shop.Acts("jobs")], concurrency=1, cancel_grace=60.0)
    running = start(worker)
    facts = await board.next()
    if how == "stop":
        worker.stop(now=True)
    else:
        await orchestrator.delete("jobs", force=True)
    await asyncio.gather(gone(facts["pid"]), gone(facts["started"]))
    [ended] = await asyncio.gather(running, return_exceptions=True)
    if how == "stop":
        assert (ended, worker.released) == (1, 1)
        assert await orchestrator.depth("jobs") == Depth(1, 0, 0, 0)


async def test_a_drain_lets_a_run_end_and_signals_to_everyone_mean_the_worker(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any, start: Start
) -> None:
    await publish("wait")
    running = start(worker := Worker(orchestrator, [shop.Acts("jobs")], concurrency=1))
    facts = await board.next()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(facts["pid"], number)
    worker.stop()
    board.let_go()
    assert (await running, worker.handled) == (0, 1)


# --- where it is


async def are_at(worker: Worker, *marks: str) -> None:
    """Until the stack of each job, the oldest first, shows its mark: a job tells the board a moment before."""
    async with asyncio.timeout(20):
        while not all(
            mark in "\n".join([*job.stack, job.unseen])
            for job, mark in zip(await asyncio.to_thread(worker.running), marks, strict=True)
        ):
            pass


async def test_a_run_in_a_process_tells_the_line_it_is_at_to_whoever_asks_also_when_it_never_pauses(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    """To the loop, to a thread while the loop stands still, and to several at once."""
    await publish("turn")
    await publish("wait")
    async with Worker(orchestrator, [shop.Acts("jobs")], concurrency=2, drain=0) as worker:
        await board.next()
        await board.next()
        await are_at(worker, "in turns_without_end", "line.recv(1)")
        with ThreadPoolExecutor() as threads:
            asked = [threads.submit(worker.running) for _ in range(4)]
            answers = [worker.running(), *(one.result() for one in asked)]  # which holds the loop
        for turns, waits in answers:
            assert (turns.kind, turns.unseen, waits.unseen) == ("process", "", "")
            assert ["in run" in turns.stack[0], "in act" in turns.stack[2]] == [True, True]
            assert "in turns_without_end" in turns.stack[-2]
            assert "in run" in waits.stack[0]
            assert waits.stack[-1] == "  line.recv(1)"


async def test_of_endless_calls_the_innermost_are_told(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    await publish("turn", deep=500)
    async with Worker(orchestrator, [shop.Acts("jobs")], concurrency=1, drain=0) as worker:
        await board.next()
        async with asyncio.timeout(20):
            while True:
                [job] = await asyncio.to_thread(worker.running)
                if "in act" not in "".join(job.stack):  # else it calls on
                    break
    assert sum("in turns_without_end" in line for line in job.stack) == 100
    assert len(job.stack) == 200


async def test_of_a_process_that_lets_no_python_run_it_is_said_that_it_does_not_answer(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    """Beside one that does, and in bounded time."""
    await publish("hang")
    await publish("wait")
    async with Worker(orchestrator, [shop.Acts("jobs")], concurrency=2, drain=0, cancel_grace=0) as worker:
        pids = {(await board.next())["pid"], (await board.next())["pid"]}
        await are_at(worker, "does not answer", "line.recv(1)")
        before = time.monotonic()
        hangs, waits = worker.running()
        assert time.monotonic() - before < 5
        assert (hangs.kind, hangs.stack, waits.unseen) == ("process", [], "")
        assert waits.stack[-1] == "  line.recv(1)"
        found = re.match(r"its process, pid (\d+), does not answer within 1 s: .*C code", hangs.unseen)
        assert found is not None
        assert int(found[1]) in pids


async def test_a_process_that_stood_still_answers_again(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    await publish("wait")
    async with Worker(orchestrator, [shop.Acts("jobs")], concurrency=1, drain=0) as worker:
        pid = (await board.next())["pid"]
        await are_at(worker, "line.recv(1)")
        os.kill(pid, signal.SIGSTOP)
        assert "does not answer" in worker.running()[0].unseen
        os.kill(pid, signal.SIGCONT)
        assert worker.running()[0].stack[-1] == "  line.recv(1)"


async def test_a_run_whose_process_is_being_started_says_so(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish("wait")
    async with Worker(orchestrator, [shop.Waiting("jobs")], concurrency=2, drain=0) as worker:
        await board.next()
        monkeypatch.setenv("BOARD", board.path)
        second = await publish("wait")
        await board.next()
        told = [(job.job_id, job.unseen) for job in worker.running() if job.unseen]
        assert told == [(second, "its process is being started")]


# --- children


async def test_a_child_is_used_again_until_it_has_done_its_jobs_and_none_is_left_at_the_end(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    for n in range(5):
        await publish("tell", n=n)
    worker = Worker(orchestrator, [shop.OneEach("jobs")], concurrency=1, until_idle=True)
    async with LeakGuard():
        assert await worker.run() == 0
        assert no_child_is_left()
        board.let_go()
    pids = [facts["pid"] for facts in board.all()]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


async def test_consumers_take_turns_where_there_are_fewer_slots_than_kinds(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any
) -> None:
    """A child belongs to one consumer: an idle one of another makes room for it."""
    await orchestrator.declare(QueueSpec("others"))
    await publish("tell", queue="jobs")
    await publish("tell", queue="others")
    consumers = [shop.Acts("jobs"), shop.Once("others")]
    worker = Worker(orchestrator, consumers, concurrency=1, until_idle=True)
    assert (await worker.run(), worker.handled) == (0, 2)
    one, other = board.all()
    assert one["pid"] != other["pid"]
    assert no_child_is_left()


async def test_an_idle_child_that_was_killed_is_replaced(
    orchestrator: AsyncOrchestrator, publish: Publish, board: Board, shop: Any, start: Start
) -> None:
    start(Worker(orchestrator, [shop.Acts("jobs")], concurrency=1))
    await publish("tell")
    facts = await board.next()
    os.kill(facts["pid"], signal.SIGKILL)
    await gone(facts["pid"])
    await publish("tell")
    assert (await board.next())["pid"] != facts["pid"]


async def test_where_no_child_can_be_had_for_now_the_job_is_put_off(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    board: Board,
    shop: Any,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody's fault: it uses up no attempt, and the worker goes on."""
    ends = Ends()
    start(Worker(orchestrator, [shop.OneEach("jobs")], concurrency=1, listeners=[ends]))
    for _ in range(2):
        await publish("tell")
        await board.next()
    with monkeypatch.context() as gone_for_now:
        gone_for_now.setattr(sys, "executable", "/no/such/python")
        third = await publish("tell")
        await ends.times(third, 1)
    await ends.times(third, 2)
    assert ends.of(third) == ["Release", "Done"]
    assert (await board.next())["job"]["attempt"] == 1


async def test_a_consumer_that_cannot_be_made_there_stops_the_worker_and_says_why(
    orchestrator: AsyncOrchestrator, publish: Publish, shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish("tell")
    monkeypatch.setenv("DATABASE_OF", str(os.getpid()))
    with pytest.raises(ConfigError, match=r"in_processes:Demanding cannot make it: ConnectionError: no database"):
        await Worker(orchestrator, [shop.Demanding("jobs")]).run()
    with pytest.raises(ConfigError, match=r"TooSmall holds \d+ MiB before its first job, max_memory=1: give it more"):
        await Worker(orchestrator, [shop.TooSmall("jobs")]).run()
    assert await orchestrator.depth("jobs") == Depth(1, 0, 0, 0)
    assert no_child_is_left()


async def test_a_child_that_can_no_longer_be_made_later_stops_the_worker_and_the_job_waits(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    board: Board,
    shop: Any,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = start(worker := Worker(orchestrator, [shop.Demanding("jobs")], concurrency=1))
    await publish("tell")
    await board.next()
    await publish("leave")
    monkeypatch.setenv("DATABASE_OF", str(os.getpid()))
    with pytest.raises(ConfigError, match="no database"):
        await running
    assert worker.released == 1
    assert (await orchestrator.depth("jobs")).dead == 0


async def test_a_worker_that_is_stopped_while_its_first_children_start_ends(
    orchestrator: AsyncOrchestrator, shop: Any, start: Start
) -> None:
    worker = Worker(orchestrator, [shop.Acts("jobs")])
    running = start(worker)
    await asyncio.sleep(0)
    worker.stop()
    async with asyncio.timeout(10):
        assert await running == 0
    assert no_child_is_left()


# --- declarations


def made(**options: Any) -> Any:
    return type("Local", (Consumer,), {"run": lambda self, job: None, "__module__": __name__, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"executor": "fork"}, "executor='fork': 'thread' or 'process'"),
        ({"executor": True}, "'thread' or 'process'"),
        ({"executor": "process", "max_memory": 0}, "max_memory=0: MiB"),
        ({"executor": "process", "max_memory": "1G"}, "max_memory='1G'"),
        ({"executor": "process", "max_jobs": 0}, "max_jobs=0: a whole number"),
        ({"max_memory": 100}, "max_memory is of the process .* needs executor='process'"),
        ({"executor": "thread", "max_jobs": 100}, "max_jobs is of the process"),
        ({"execution": "process"}, "no option 'execution': did you mean 'executor'"),
        (
            {"executor": "process", "__qualname__": "f.<locals>.Local"},
            "made inside a function: move it to the top level",
        ),
        ({"executor": "process", "__module__": "__main__"}, "has no file"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_when_the_class_is_made(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(ConfigError, match=words):
        made(**options)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_coroutine_function_has_no_executor(executor: str) -> None:
    async def run(self: Any, job_dict: Any) -> None: ...

    with pytest.raises(ConfigError, match=f"executor='{executor}' is for a plain def, and run is a coroutine function"):
        made(run=run, executor=executor)


async def test_what_nobody_could_import_or_make_is_refused_when_the_worker_starts(
    orchestrator: AsyncOrchestrator, shop: Any
) -> None:
    with pytest.raises(ConfigError, match=r"no such class at .*:Local: give it that name there"):
        await Worker(orchestrator, [made(executor="process")("jobs")]).run()
    with pytest.raises(ConfigError, match=r"NeedsMore\('jobs'\), which its constructor does not take.*'database'"):
        await Worker(orchestrator, [shop.NeedsMore("jobs", database="a")]).run()


# --- a whole program


PROGRAM = """
import asyncio, os, subprocess, sys, time
from mindtrace.jobs import *

class Mine(Exception):
    pass

class Work(Consumer):
    executor = "process"
    retry = RetryPolicy(base=0, max_attempts=2, retry_on=(Mine,))
    def run(self, job_dict):
        what = job_dict["input_data"]["what"]
        if what == "raise":
            raise Mine("mine")
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        print(os.getpid(), started.pid, __name__)
        time.sleep(100)

async def main(what):
    async with AsyncOrchestrator(connect("local://")) as orchestrator:
        await orchestrator.declare(QueueSpec("work"))
        await orchestrator.publish("work", Job(name="work", schema_name="work", input_data={"what": what}))
        await Worker(orchestrator, [Work("work")], until_idle=True).run()
        for record in (await orchestrator.dead_letters("work").list()).records:
            print(record.reason, record.attempts, record.errors[-1].type)
"""
GUARD = 'if __name__ == "__main__":\n    '
RUN = "asyncio.run(main(sys.argv[1]))\n"


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    def started(text: str, *words: str, module: bool = False) -> "subprocess.Popen[str]":
        file = tmp_path / ("program.py" if module else "program")  # whatever it is called
        file.write_text(PROGRAM + text, "utf-8")
        command = [sys.executable, "-m", "program"] if module else [sys.executable, file.name]
        return subprocess.Popen(
            [*command, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return started


@pytest.mark.parametrize("module", [False, True], ids=["as a file", "as a module"])
def test_a_consumer_may_stand_in_the_program_itself(
    program: Callable[..., "subprocess.Popen[str]"], module: bool
) -> None:
    out, errors = program(GUARD + RUN, "raise", module=module).communicate(timeout=30)
    assert (out, errors) == ("attempts 2 __main__.Mine\n", "")


def test_a_program_that_starts_its_worker_unguarded_is_told_so(
    program: Callable[..., "subprocess.Popen[str]"],
) -> None:
    """Loaded once more for a child, it would start the next worker, and so on."""
    ended = program(RUN, "raise")
    _, errors = ended.communicate(timeout=30)
    assert ended.returncode == 1
    assert "start workers under `if __name__ == '__main__':`" in errors


async def test_nothing_outlives_a_worker_that_is_killed(program: Callable[..., "subprocess.Popen[str]"]) -> None:
    worker = program(GUARD + RUN, "stay")
    assert worker.stdout is not None
    line = await asyncio.to_thread(worker.stdout.readline)
    child, started, name = line.split()
    assert name != "__main__"
    worker.kill()
    await asyncio.gather(gone(int(child)), gone(int(started)))
    worker.communicate()


def test_consume_runs_in_a_process_too(shop: Any, tmp_path: Path) -> None:
    orchestrator = Orchestrator(LocalClient())
    consumer = shop.Acts("jobs")
    consumer.connect(orchestrator)
    job = Job(name="jobs", schema_name="jobs", input_data={"act": "return", "value": 1})
    orchestrator.publish("jobs", job)
    assert consumer.consume(num_messages=1) == 1
    assert no_child_is_left()
