"""How a worker comes to its end, and what becomes of the jobs it has then."""

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from mindtrace.jobs import (
    AsyncOrchestrator,
    ConfigError,
    Depth,
    Job,
    QueueNotFound,
    QueueSpec,
    Snooze,
    Worker,
    current_job,
)
from mindtrace.jobs.backends.local import LocalBackend

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]
Start = Callable[[Worker], "asyncio.Task[int]"]


async def depth(orchestrator: AsyncOrchestrator) -> tuple[int, int | None, int | None, int]:
    found = await orchestrator.depth("jobs")
    return found.ready, found.scheduled, found.leased, found.dead


# --- it drains


async def test_a_stopped_worker_takes_no_more_and_lets_its_runs_finish(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any, settle_down: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(5)
    worker = Worker(orchestrator, [consumer(act)], concurrency=2)
    running = start(worker)
    await gate.holds(2)
    assert not worker.health().draining
    worker.stop()
    await settle_down()
    assert (worker.health().draining, running.done(), gate.waiting) == (True, False, 2)
    gate.open()
    assert await running == 0
    assert (worker.handled, gate.cancelled) == (2, 0)
    assert await depth(orchestrator) == (3, 0, 0, 0)


async def test_an_idle_worker_stops_without_waiting_for_anything(
    orchestrator: AsyncOrchestrator, clock: Any, consumer: Make, start: Start, settle_down: Any
) -> None:
    """The clock stands still here: a worker that waited for its next look would never see the stop."""

    async def act(_: Any) -> None:
        pass

    worker = Worker(orchestrator, [consumer(act)])
    running = start(worker)
    await settle_down()
    assert not running.done()
    worker.stop()
    assert await asyncio.wait_for(running, 10) == 0


async def test_once_the_drain_is_over_what_still_runs_is_cancelled_and_released_uncounted(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    attempts: list[tuple[int, int]] = []

    async def act(_: Any) -> None:
        attempts.append((current_job().attempt, current_job().number))
        await gate.enter()

    await publish(1)
    worker = Worker(orchestrator, [consumer(act)], drain=0.01)
    running = start(worker)
    await gate.holds(1)
    worker.stop()
    assert await asyncio.wait_for(running, 10) == 1
    assert (worker.handled, gate.cancelled) == (0, 1)
    assert await depth(orchestrator) == (1, 0, 0, 0)
    gate.open()
    await Worker(orchestrator, [consumer(act)], max_jobs=1).run()
    assert attempts == [(1, 1), (1, 2)]


@pytest.mark.parametrize("first", [True, False], ids=["at once", "after a first stop"])
async def test_stopping_now_cancels_without_waiting_for_the_drain(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any, first: bool
) -> None:
    cancelled: list[bool] = []

    async def act(_: Any) -> None:
        try:
            await gate.enter()
        finally:
            cancelled.append(current_job().cancelled)

    await publish(3)
    worker = Worker(orchestrator, [consumer(act)], concurrency=2, drain=3600)
    running = start(worker)
    await gate.holds(2)
    if not first:
        worker.stop()
    worker.stop(now=True)
    assert await asyncio.wait_for(running, 10) == 1
    assert (worker.handled, cancelled) == (0, [True, True])
    assert await depth(orchestrator) == (3, 0, 0, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_the_first_signal_drains_and_the_second_cancels(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    consumer: Make,
    start: Start,
    gate: Any,
    settle_down: Any,
    number: signal.Signals,
    until: Any,
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(2)
    worker = Worker(orchestrator, [consumer(act)], concurrency=1, drain=3600)
    running = start(worker)
    await gate.holds(1)
    signal.raise_signal(number)
    await until(lambda: worker.health().draining)
    await settle_down()
    assert not running.done()
    signal.raise_signal(number)
    assert await asyncio.wait_for(running, 10) == 1
    assert (worker.handled, gate.cancelled) == (0, 1)
    assert await depth(orchestrator) == (2, 0, 0, 0)


async def test_a_run_that_cleans_up_within_its_grace_keeps_its_outcome(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    async def act(job: dict[str, Any]) -> None:
        try:
            await gate.enter()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            if job["input_data"]["n"] == 1:
                return  # it is finished all the same
            raise

    await publish(2)
    worker = Worker(orchestrator, [consumer(act)])
    running = start(worker)
    await gate.holds(2)
    worker.stop(now=True)
    assert await asyncio.wait_for(running, 10) == 1
    assert worker.handled == 1
    assert await depth(orchestrator) == (1, 0, 0, 0)


async def test_a_run_that_outlasts_its_grace_is_released_and_its_late_return_refused(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any, settle_down: Any
) -> None:
    late, ended = asyncio.Event(), asyncio.Event()

    async def act(_: Any) -> None:
        await swallow(gate, late)
        ended.set()

    await publish(1)
    worker = Worker(orchestrator, [consumer(act)], cancel_grace=0.01)
    running = start(worker)
    await gate.holds(1)
    worker.stop(now=True)
    assert await asyncio.wait_for(running, 10) == 1
    assert await depth(orchestrator) == (1, 0, 0, 0)
    late.set()
    await asyncio.wait_for(ended.wait(), 10)
    await settle_down()
    assert await depth(orchestrator) == (1, 0, 0, 0)
    assert worker.handled == 0


async def test_a_thread_cannot_be_ended_but_is_told_and_its_job_is_released(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, settle_down: Any, until: Any
) -> None:
    entered, leave, flags = threading.Event(), threading.Event(), list[bool]()

    def act(_: Any) -> None:
        entered.set()
        assert leave.wait(10)
        flags.append(current_job().cancelled)

    await publish(1)
    worker = Worker(orchestrator, [consumer(act)], cancel_grace=0.01)
    running = start(worker)
    assert await asyncio.to_thread(entered.wait, 10)
    worker.stop(now=True)
    assert await asyncio.wait_for(running, 10) == 1
    assert worker.handled == 0
    assert await depth(orchestrator) == (1, 0, 0, 0)
    leave.set()
    await until(lambda: flags)
    await settle_down()
    assert flags == [True]
    assert await depth(orchestrator) == (1, 0, 0, 0)


async def test_a_worker_whose_task_is_cancelled_releases_what_it_runs(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, gate: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    await publish(3)
    worker = Worker(orchestrator, [consumer(act)], concurrency=2, retry=False)
    running = start(worker)
    await gate.holds(2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 10)
    assert worker.handled == 0
    assert await depth(orchestrator) == (3, 0, 0, 0)


def test_a_loop_that_is_shut_down_under_a_worker_releases_its_jobs_uncounted(consumer: Make) -> None:
    backend = LocalBackend()

    async def cut_short() -> None:
        running, all_running = 0, asyncio.Event()

        async def act(_: Any) -> None:
            nonlocal running
            running += 1
            if running == 10:
                all_running.set()
            await asyncio.Event().wait()

        orchestrator = AsyncOrchestrator(backend)
        await orchestrator.open()
        await orchestrator.declare(QueueSpec("jobs"))
        await orchestrator.publish_many("jobs", [Job(name="jobs", schema_name="jobs") for _ in range(10)])
        worker = asyncio.create_task(Worker(orchestrator, [consumer(act)], retry=False).run())
        await all_running.wait()
        assert not worker.done()  # asyncio.run now cancels every task at once, in any order

    async def afterwards() -> Depth:
        async with AsyncOrchestrator(backend) as orchestrator:
            return await orchestrator.depth("jobs")

    asyncio.run(cut_short())
    assert asyncio.run(afterwards()) == Depth(ready=10, scheduled=0, leased=0, dead=0)


async def test_a_snooze_is_no_release_of_the_worker(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    async def act(_: Any) -> None:
        raise Snooze(3600)

    await publish(1)
    worker = Worker(orchestrator, [consumer(act)], max_jobs=1)
    assert await worker.run() == 0
    assert worker.handled == 0
    assert await depth(orchestrator) == (0, 1, 0, 0)


async def test_what_failed_or_died_was_handled_too(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    async def act(job: dict[str, Any]) -> None:
        if job["input_data"]["n"] > 1:
            raise OSError

    await publish(2)
    worker = Worker(orchestrator, [consumer(act)], max_jobs=2, retry=False)
    assert await worker.run() == 0
    assert worker.handled == 2


# --- it knows when to stop


@pytest.mark.parametrize("concurrency", [1, 2, 10])
async def test_a_worker_stops_after_so_many_jobs(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, concurrency: int
) -> None:
    started: list[int] = []

    async def act(job: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        started.append(job["input_data"]["n"])

    await publish(10)
    worker = Worker(orchestrator, [consumer(act)], concurrency=concurrency, max_jobs=3)
    assert await worker.run() == 0
    assert (worker.handled, started) == (3, [1, 2, 3])
    assert await depth(orchestrator) == (7, 0, 0, 0)


async def test_a_worker_may_stop_once_nothing_is_ready_also_what_its_jobs_publish(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    started = 0

    async def act(_: Any) -> None:
        nonlocal started
        started += 1
        if started == 4:
            await publish(3)

    await publish(4)
    await publish(1, delay=3600)
    worker = Worker(orchestrator, [consumer(act)], concurrency=2, until_idle=True)
    assert await asyncio.wait_for(worker.run(), 10) == 0
    assert (worker.handled, started) == (7, 7)
    assert await depth(orchestrator) == (0, 1, 0, 0)


async def test_a_worker_that_was_too_busy_to_look_does_not_take_its_queue_for_empty(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make
) -> None:
    """Early acks leave nothing to settle when a run ends, so the look that a busy worker then takes brings nothing."""

    async def act(_: Any) -> None:
        await asyncio.sleep(0)

    await publish(3)
    worker = Worker(orchestrator, [consumer(act, ack="early")], concurrency=1, until_idle=True)
    await asyncio.wait_for(worker.run(), 10)
    assert (worker.handled, await depth(orchestrator)) == (3, (0, 0, 0, 0))


async def test_a_worker_of_an_empty_queue_may_stop_at_once(orchestrator: AsyncOrchestrator, consumer: Make) -> None:
    async def act(_: Any) -> None:
        pass

    worker = Worker(orchestrator, [consumer(act)], until_idle=True)
    assert await asyncio.wait_for(worker.run(), 10) == 0
    assert worker.handled == 0


# --- runs that do not end


async def swallow(gate: Any, late: asyncio.Event) -> None:
    try:
        await gate.enter()
    except asyncio.CancelledError:
        while not late.is_set():
            with suppress(asyncio.CancelledError):
                await late.wait()


async def test_a_run_that_swallows_its_cancellation_keeps_its_slot_and_is_reported_stuck(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    consumer: Make,
    start: Start,
    gate: Any,
    settle_down: Any,
    until: Any,
) -> None:
    late = asyncio.Event()
    second = asyncio.Event()

    async def act(job: dict[str, Any]) -> None:
        if job["input_data"]["n"] == 2:
            second.set()
        else:
            await swallow(gate, late)

    async def dead() -> bool:
        return (await orchestrator.depth("jobs")).dead == 1  # settled, though it has not ended

    [job_id, _] = await publish(2, retry=False)
    worker = Worker(orchestrator, [consumer(act)], concurrency=1, timeout=0.01, cancel_grace=0.01, max_jobs=2)
    running = start(worker)
    await until(dead)
    assert (await orchestrator.dead_letters("jobs").get(job_id)).reason == "timeout"
    await settle_down()
    assert (worker.health().stuck, worker.health().running, worker.health().healthy) == (1, 1, False)
    assert (second.is_set(), await depth(orchestrator)) == (False, (1, 0, 0, 1))
    late.set()
    await asyncio.wait_for(second.wait(), 10)
    assert await asyncio.wait_for(running, 10) == 0
    assert (worker.health().stuck, worker.health().healthy, worker.handled) == (0, True, 2)


async def test_a_thread_whose_time_is_over_keeps_its_slot_until_it_returns(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, settle_down: Any, until: Any
) -> None:
    entered, leave = [threading.Event() for _ in range(2)], threading.Event()

    def act(job: dict[str, Any]) -> None:
        entered[job["input_data"]["n"] - 1].set()
        assert leave.wait(10)

    await publish(2, retry=False)
    worker = Worker(orchestrator, [consumer(act)], concurrency=1, timeout=0.01, max_jobs=2)
    running = start(worker)
    await until(lambda: worker.handled)
    await settle_down()
    assert (worker.health().stuck, worker.health().running, entered[1].is_set()) == (1, 1, False)
    assert await depth(orchestrator) == (1, 0, 0, 1)
    leave.set()
    assert await asyncio.wait_for(running, 10) == 0
    assert (worker.health().stuck, worker.handled, entered[1].is_set()) == (0, 2, True)


@pytest.mark.parametrize("ack", ["late", "early"])
async def test_a_drain_does_not_wait_for_a_run_that_is_stuck_but_for_the_one_beside_it(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    consumer: Make,
    start: Start,
    gate: Any,
    settle_down: Any,
    until: Any,
    ack: str,
) -> None:
    late = asyncio.Event()

    async def swallows(_: Any) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        while not late.is_set():
            with suppress(asyncio.CancelledError):
                await late.wait()

    async def polite(_: Any) -> None:
        await gate.enter()

    await orchestrator.declare(QueueSpec("polite"))
    await publish(1, retry=False)
    await publish(1, "polite", retry=False)
    consumers = [consumer(swallows, ack=ack, timeout=0.01), consumer(polite, "polite", timeout=None)]
    worker = Worker(orchestrator, consumers, cancel_grace=0.01, drain=3600)
    running = start(worker)
    await gate.holds(1)
    await until(lambda: worker.health().stuck)
    worker.stop()
    await settle_down()
    assert (running.done(), worker.health().running) == (False, 2)
    gate.open()
    done, _ = await asyncio.wait({running}, timeout=10)
    late.set()
    assert done
    assert running.result() == 0
    assert (worker.handled, worker.released, gate.cancelled) == (2, 0, 0)
    assert await depth(orchestrator) == (0, 0, 0, int(ack == "late"))


@pytest.mark.parametrize("ack", ["late", "early"])
async def test_a_drain_ends_once_the_last_run_is_given_up(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, start: Start, until: Any, ack: str
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def act(_: Any) -> None:
        entered.set()
        assert leave.wait(10)

    await publish(1, retry=False)
    worker = Worker(orchestrator, [consumer(act, ack=ack)], timeout=0.2, drain=3600, poll_timeout=3600)
    running = start(worker)
    await until(entered.is_set)
    worker.stop()
    try:
        assert await asyncio.wait_for(running, 5) == 0
    finally:
        leave.set()
    assert (worker.handled, worker.released) == (1, 0)


@pytest.mark.parametrize("option", [{"max_jobs": 1}, {"until_idle": True}], ids=["max_jobs", "until_idle"])
async def test_a_worker_that_ends_by_itself_does_not_wait_for_a_run_that_is_stuck(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    consumer: Make,
    start: Start,
    gate: Any,
    option: dict[str, Any],
) -> None:
    late = asyncio.Event()

    async def act(_: Any) -> None:
        await swallow(gate, late)

    await publish(1, retry=False)
    worker = Worker(orchestrator, [consumer(act)], timeout=0.01, cancel_grace=0.01, **option)
    running = start(worker)
    done, _ = await asyncio.wait({running}, timeout=10)
    late.set()
    assert done
    assert running.result() == 0
    assert await depth(orchestrator) == (0, 0, 0, 1)


async def test_a_run_that_ends_in_time_does_not_hide_one_that_is_stuck(
    orchestrator: AsyncOrchestrator,
    publish: Publish,
    consumer: Make,
    start: Start,
    gate: Any,
    settle_down: Any,
    until: Any,
) -> None:
    late, leave = asyncio.Event(), asyncio.Event()

    async def act(job: dict[str, Any]) -> None:
        if job["input_data"]["n"] == 1:
            await swallow(gate, late)
        else:
            await leave.wait()  # cancelled at its time, and ends at once

    async def all_dead() -> bool:
        return (await orchestrator.depth("jobs")).dead == 3

    await publish(1, retry=False)
    worker = Worker(orchestrator, [consumer(act)], timeout=0.01, cancel_grace=0.01)
    running = start(worker)
    await until(lambda: worker.health().stuck)
    polite = [Job(name="jobs", schema_name="jobs", input_data={"n": n}) for n in (2, 3)]
    await orchestrator.publish_many("jobs", polite, retry=False)
    await until(all_dead)
    await settle_down()
    assert (worker.health().stuck, worker.health().running) == (1, 1)
    late.set()
    worker.stop()
    await asyncio.wait_for(running, 10)


# --- it is embedded


async def test_an_embedded_worker_runs_beside_the_block_and_drains_on_exit(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, gate: Any
) -> None:
    ended: list[int] = []

    async def act(job: dict[str, Any]) -> None:
        await gate.enter()
        await asyncio.sleep(0)
        ended.append(job["input_data"]["n"])

    async with Worker(orchestrator, [consumer(act)]) as worker:
        await publish(2)
        await gate.holds(2)
        gate.open()
    assert (sorted(ended), worker.handled) == ([1, 2], 2)
    await publish(1)
    assert await depth(orchestrator) == (1, 0, 0, 0)


async def test_an_embedded_worker_takes_no_signals_and_one_that_runs_does(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, until: Any
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen: list[list[Any]] = []

    async def act(_: Any) -> None:
        seen.append([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)])

    await publish(1)
    async with Worker(orchestrator, [consumer(act)]) as worker:
        await until(lambda: worker.handled)
    assert seen == [before]
    await publish(1)
    await Worker(orchestrator, [consumer(act)], max_jobs=1).run()
    assert all(there != was for there, was in zip(seen[1], before, strict=True))


async def test_a_worker_ends_well_where_the_signals_are_taken_by_no_handler_of_pythons(
    orchestrator: AsyncOrchestrator, consumer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a program that embeds Python and had handlers before: Python gives None for them."""

    async def act(_: Any) -> None:
        pass

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        patched.setattr(signal, "getsignal", lambda number: None)
        worker = Worker(orchestrator, [consumer(act)], until_idle=True)
        assert await asyncio.wait_for(worker.run(), 10) == 0
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


async def test_an_error_of_an_embedded_worker_cancels_the_block(
    orchestrator: AsyncOrchestrator, consumer: Make
) -> None:
    cancelled: list[bool] = []

    async def act(_: Any) -> None:
        pass

    async def block() -> None:
        async with Worker(orchestrator, [consumer(act)]):
            await orchestrator.delete("jobs")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(block(), 10)
    assert ended.group_contains(QueueNotFound)
    assert cancelled == [True]


async def test_an_embedded_worker_that_cannot_start_says_why(orchestrator: AsyncOrchestrator, consumer: Make) -> None:
    async def act(_: Any) -> None:
        pass

    async def block() -> None:
        async with Worker(orchestrator, [consumer(act), consumer(act)]):
            raise AssertionError("the block was entered all the same")

    try:
        await asyncio.wait_for(block(), 10)
    except BaseException as error:
        leaves = list(error.exceptions) if isinstance(error, BaseExceptionGroup) else [error]
    else:
        leaves = []
    assert [type(leaf) for leaf in leaves] == [ConfigError]


async def test_an_error_of_the_block_ends_the_worker_and_is_raised(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, gate: Any
) -> None:
    async def act(_: Any) -> None:
        gate.open()

    async def block() -> None:
        async with Worker(orchestrator, [consumer(act)]):
            await publish(1)
            await gate.enter()
            raise OSError("of the block")

    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(block(), 10)
    assert ended.group_contains(OSError, match="of the block")
    assert await depth(orchestrator) == (0, 0, 0, 0)


async def test_a_block_that_is_cancelled_drains_all_the_same(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, gate: Any, settle_down: Any
) -> None:
    async def act(_: Any) -> None:
        await gate.enter()

    worker = Worker(orchestrator, [consumer(act)])

    async def block() -> None:
        async with worker:
            await publish(1)
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await gate.holds(1)
    task.cancel()
    await settle_down()
    assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert worker.handled == 1


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
async def test_a_job_that_would_end_the_process_ends_the_block_and_is_raised_from_it(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, error: BaseException
) -> None:
    async def act(_: Any) -> None:
        raise error

    async def block() -> None:
        async with Worker(orchestrator, [consumer(act)], retry=False):
            await publish(1)
            await asyncio.Event().wait()

    with pytest.raises(type(error)) as ended:
        await block()
    assert ended.value is error
    released = isinstance(error, KeyboardInterrupt)
    assert await orchestrator.depth("jobs") == Depth(int(released), 0, 0, int(not released))
