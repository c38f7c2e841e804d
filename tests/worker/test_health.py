"""How a worker says that it is alive, and that it takes jobs; and what it says of those that run."""

import asyncio
import ctypes
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from mindtrace.jobs import AsyncOrchestrator, Event, Health, Job, QueueSpec, Reconnected, RedisBackend, Worker, connect
from mindtrace.jobs.guard import LoopGuard
from mindtrace.jobs.health import Pulse
from mindtrace.jobs.testing.proxy import Amqp, FaultProxy, Resp

pytestmark = [pytest.mark.anyio]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]
Start = Callable[[Worker], "asyncio.Task[int]"]


async def nothing(_: Any) -> None:
    pass


async def until(condition: Callable[[], Any], within: float = 10) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 (health tells nobody)
            await asyncio.sleep(0.01)


def fails(_: Any) -> None:
    raise ValueError("of the listener")


def guards() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mindtrace-jobs guard"]


FINE = Health(connected=True, idle_for=0, lag=0, running=3, stuck=0, draining=False, keeping=True, slots=10)


@pytest.mark.local
@pytest.mark.parametrize(
    ("change", "healthy", "ready"),
    [
        ({}, True, True),
        ({"connected": False}, True, False),
        ({"draining": True}, True, False),
        ({"lag": 19.9, "idle_for": 19.9}, True, True),
        ({"lag": 20.1, "idle_for": 20.1}, False, False),
        ({"idle_for": 14.9}, True, True),
        ({"idle_for": 15.1}, False, False),
        ({"keeping": False}, False, False),
        ({"stuck": 3}, True, True),
        ({"running": 10, "stuck": 9}, True, True),
        ({"running": 10, "stuck": 10}, False, False),
    ],
    ids=str,
)
def test_alive_and_ready(change: dict[str, Any], healthy: bool, ready: bool) -> None:
    health = replace(FINE, **change)
    assert (health.healthy, health.ready) == (healthy, ready)


@pytest.mark.local
@pytest.mark.parametrize(
    ("lease", "idle", "kept"),
    [(30, 1, True), (30, 19, True), (30, 21, False), (600, 21, False), (6, 3.9, True), (6, 4.1, False), (0.1, 2, True)],
)
def test_a_keeper_has_most_of_a_lease_to_turn(lease: float, idle: float, kept: bool) -> None:
    assert Pulse(lease).is_kept(idle) is kept


@pytest.mark.local
async def test_a_worker_is_ready_from_its_first_exchange_until_it_drains(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(1)
    worker = Worker(orchestrator, [consumer(act)])
    assert (worker.health().healthy, worker.health().ready) == (True, False)
    running = start(worker)
    await gate.holds(1)
    assert (worker.health().healthy, worker.health().ready) == (True, True)
    worker.stop()
    assert (worker.health().healthy, worker.health().ready) == (True, False)
    gate.open()
    assert await running == 0
    assert (worker.health().healthy, worker.health().ready) == (True, False)


@pytest.mark.local
async def test_a_wait_that_is_asked_for_is_no_standstill(
    orchestrator: AsyncOrchestrator, consumer: Make, start: Start, clock: Any, settle_down: Any
) -> None:
    worker = Worker(orchestrator, [consumer(nothing)], poll_timeout=3600)
    start(worker)
    await settle_down()
    await asyncio.sleep(0.1)
    assert worker.health().idle_for == 0


@pytest.mark.local
async def test_a_listener_that_holds_the_receive_loop_shows(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    async def listener(_: Any) -> None:
        await gate.enter()

    await publish(1)
    worker = Worker(orchestrator, [consumer(nothing, ack="early")], listeners=[listener])
    start(worker)
    await gate.holds(1)
    await until(lambda: worker.health().idle_for > 0.05)
    gate.open()
    await until(lambda: worker.health().idle_for == 0)


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        pytest.param("redis", Resp, marks=pytest.mark.redis),
        pytest.param("rabbitmq", Amqp, marks=pytest.mark.rabbitmq),
    ],
)
async def test_through_an_outage_a_worker_is_alive_and_not_ready_and_tells_when_it_is_over(
    consumer: Make, start: Start, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest, kind: str, wire: Any
) -> None:
    caplog.set_level(logging.INFO)
    url = request.getfixturevalue(f"{kind}_url")
    told: list[Event] = []
    async with FaultProxy.to(url, wire=wire) as proxy:
        backend = connect(proxy.url(url))
        async with AsyncOrchestrator(backend) as orchestrator:
            worker = Worker(
                orchestrator, [consumer(nothing, "outage")], poll_timeout=0.1, listeners=[fails, told.append]
            )
            running = start(worker)
            await until(lambda: worker.health().ready)
            proxy.refuse()
            proxy.reset()
            await until(lambda: not worker.health().ready, 15)
            assert worker.health().healthy
            assert worker.health().idle_for < 2  # it turns, though nobody answers
            proxy.accept()
            await until(lambda: worker.health().ready and told, 15)
            worker.stop()
            assert await running == 0
            await orchestrator.delete("outage")
    [back] = told
    assert isinstance(back, Reconnected)
    assert (back.backend, 0 < back.seconds < 30) == (kind, True)
    said = [record.getMessage() for record in caplog.records]
    assert any(f"{kind} is there again, after" in line for line in said)
    assert any("a listener failed on Reconnected" in line for line in said)


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        pytest.param("redis", Resp, marks=pytest.mark.redis),
        pytest.param("rabbitmq", Amqp, marks=pytest.mark.rabbitmq),
    ],
)
async def test_a_worker_that_has_no_slot_free_and_asks_for_nothing_is_not_ready_either_in_an_outage(
    consumer: Make, start: Start, gate: Any, request: pytest.FixtureRequest, kind: str, wire: Any
) -> None:
    async def held(_: Any) -> None:
        await gate.enter()

    url = request.getfixturevalue(f"{kind}_url")
    async with FaultProxy.to(url, wire=wire) as proxy, AsyncOrchestrator(connect(proxy.url(url))) as orchestrator:
        worker = Worker(orchestrator, [consumer(held, "busy")], concurrency=1, drain=0)
        running = start(worker)
        await until(lambda: worker.health().ready)
        await orchestrator.publish("busy", Job(name="busy", schema_name="busy", input_data={}))
        await gate.holds(1)
        assert worker.health().ready
        proxy.refuse()
        proxy.reset()
        await until(lambda: not worker.health().ready, 5)
        assert worker.health().healthy
        proxy.accept()
        await until(lambda: worker.health().ready, 15)
        gate.open()
        worker.stop()
        await running
        await orchestrator.delete("busy", force=True)


# A thread that ends so is complained of, which is what this test wants.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.redis
async def test_a_worker_whose_leases_nobody_keeps_is_not_alive(consumer: Make, start: Start, redis_url: str) -> None:
    async with AsyncOrchestrator(RedisBackend.from_url(redis_url, namespace="unkept")) as orchestrator:
        worker, before = Worker(orchestrator, [consumer(nothing)], lease=1.0), threading.enumerate()
        start(worker)
        await until(lambda: worker.health().ready)
        started = [thread for thread in threading.enumerate() if thread not in before]
        [keeper] = [thread for thread in started if thread.name == "mindtrace-jobs keeper"]
        assert keeper.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(keeper.ident), ctypes.py_object(SystemExit))
        await until(lambda: not worker.health().keeping)
        assert not worker.health().healthy
        worker.stop()
        await orchestrator.delete("jobs", force=True)


# --- the loop


class Beside:
    """Looks from a thread at what a loop that stands still cannot show, and lets it go on."""

    def __init__(self, look: Callable[[], Any], wanted: Callable[[Any], bool], within: float = 10) -> None:
        self.seen: Any = None
        self.released = threading.Event()
        self._look, self._wanted, self._within = look, wanted, within
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Beside":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        end = time.monotonic() + self._within
        while time.monotonic() < end:
            self.seen = self._look()
            if self._wanted(self.seen):
                break
            time.sleep(0.01)
        self.released.set()


@pytest.mark.local
async def test_a_job_that_blocks_the_loop_is_named_once_with_its_line(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen from a thread while the loop stands: the lag, and that the worker is alive still."""

    async def act(_: Any) -> None:
        beside.released.wait(10)  # the line that is blamed

    caplog.set_level(logging.INFO)
    [job_id] = await publish(1)
    worker = Worker(orchestrator, [consumer(act)], max_jobs=1)
    with Beside(worker.health, lambda health: health.lag > 1.6) as beside:
        assert await worker.run() == 0
    assert beside.seen.healthy
    assert beside.seen.running == 1
    [said] = [record for record in caplog.records if "stands still" in record.getMessage()]
    assert f"job {job_id} of queue jobs, attempt 1, blocks it" in said.getMessage()
    assert "# the line that is blamed" in said.getMessage()
    assert "asyncio" not in said.getMessage()
    assert (said.levelname, vars(said)["job_id"], vars(said)["queue"]) == ("WARNING", job_id, "jobs")
    assert sum("turns again" in record.getMessage() for record in caplog.records) <= 1  # it ends with the worker
    assert not guards()


@pytest.mark.local
async def test_code_beside_the_worker_that_blocks_the_loop_is_named_and_no_job_is_blamed(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, gate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    caplog.set_level(logging.INFO)
    [job_id] = await publish(1)
    async with Worker(orchestrator, [consumer(act)]) as worker:
        await gate.holds(1)
        with Beside(worker.health, lambda health: health.lag > 1.3) as beside:
            beside.released.wait(10)  # not of a job
        await until(lambda: worker.health().lag < 0.2)
        gate.open()
    [said, again] = [record.getMessage() for record in caplog.records if "event loop" in record.getMessage()]
    assert f"jobs {job_id} run:" in said
    assert "# not of a job" in said
    assert "turns again, after 1." in again


@pytest.mark.local
async def test_a_loop_that_stands_for_too_long_counts_as_dead_and_says_when_it_turns_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    guard = LoopGuard("w", list, longest=1.5)
    guard.start()
    with Beside(lambda: len(caplog.records), lambda said: said == 2) as beside:
        beside.released.wait(10)
    await until(lambda: len(caplog.records) == 3)
    guard.stop()
    levels = [(record.levelname, record.getMessage().partition(";")[0]) for record in caplog.records]
    assert [level for level, _ in levels] == ["WARNING", "ERROR", "WARNING"]
    assert "counts as dead" in levels[1][1]
    assert "turns again" in levels[2][1]
    assert not guards()


@pytest.mark.chaos
@pytest.mark.local
async def test_a_worker_whose_loop_stands_for_twenty_seconds_is_dead_until_it_turns_again(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[float, bool, bool]] = []

    def look() -> bool:
        health = worker.health()
        seen.append((health.lag, health.healthy, health.ready))
        return health.lag > 20.5

    async def act(_: Any) -> None:
        with Beside(look, bool, within=30) as beside:
            beside.released.wait(30)

    await publish(1)
    worker = Worker(orchestrator, [consumer(act)])
    async with worker:
        await until(lambda: worker.handled)
        await until(lambda: worker.health().ready)
    assert all(healthy is ready is (lag <= 20) for lag, healthy, ready in seen)
    assert {healthy for _, healthy, _ in seen} == {True, False}
    said = [record.levelname for record in caplog.records if "stands still" in record.getMessage()]
    assert said == ["WARNING", "ERROR"]


@pytest.mark.local
async def test_a_guard_ends_with_its_worker_however_that_ends(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(1)
    running = start(worker := Worker(orchestrator, [consumer(act)]))
    await gate.holds(1)
    assert len(guards()) == 1
    running.cancel()
    await asyncio.wait({running})
    assert not guards()
    assert worker.running() == []


# --- what runs


async def waits_below(gate: Any) -> None:
    await gate.enter()  # the line where it waits


@pytest.mark.local
async def test_running_jobs_are_listed_with_the_line_they_are_at(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, gate: Any
) -> None:
    entered, leave = threading.Event(), threading.Event()

    async def act(_: Any) -> None:
        await waits_below(gate)

    def blocks(_: Any) -> None:
        entered.set()
        leave.wait(10)  # the line where it blocks

    await orchestrator.declare(QueueSpec("threads"))
    [one] = await publish(1)
    async with Worker(orchestrator, [consumer(act), consumer(blocks, "threads")]) as worker:
        await gate.holds(1)
        [other] = await publish(1, "threads")
        await until(entered.is_set)
        for first, second in (worker.running(), await asyncio.to_thread(worker.running)):
            assert (first.job_id, first.queue, first.schema_name, first.attempt) == (one, "jobs", "jobs", 1)
            assert (first.kind, second.kind, second.job_id) == ("coroutine", "thread", other)
            assert 0 <= second.seconds <= first.seconds < 60
            assert "# the line where it waits" in "".join(first.stack)
            assert "in act" in first.stack[0]
            assert "# the line where it blocks" in "".join(second.stack)
            assert "in blocks" in second.stack[0]
        leave.set()
        gate.open()
        await until(lambda: not worker.running())
