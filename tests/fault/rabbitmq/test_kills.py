"""Processes that are killed, stopped, blocked and ended while jobs run: nothing is lost, nothing is counted wrongly."""

import asyncio
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mindtrace.jobs import RetryPolicy

pytestmark = [pytest.mark.anyio, pytest.mark.rabbitmq, pytest.mark.fault, pytest.mark.chaos]

KILLS = 50
CRASH_LIMIT = 5  # the default
BLOCKED = 15.0


async def ends_well(processes: list[Any]) -> bool:
    """Whether these end with status 0 when they are asked to; one that has just been started is let begin first."""
    for process in processes:
        await process.says("concurrency")
        process.signal(signal.SIGTERM)
    ended = [(await process.status(), process.log()) for process in processes]
    assert [status for status, _ in ended] == [0] * len(processes), [log for status, log in ended if status]
    return True


@pytest.mark.timeout(180)  # it starts 54 processes, as fast as it can
async def test_fifty_kills_of_workers_under_load_lose_no_job(new_scene: Callable[..., Any], random: Random) -> None:
    """Each job has its effect; run again is only what was in flight at a kill, and that counted as a crash."""
    scene = await new_scene()
    hardy = RetryPolicy(base=0.05, crash_limit=KILLS)  # fate may have one job killed five times
    killed: set[int] = set()
    over = asyncio.Event()
    working = [await scene.start(concurrency=4) for _ in range(4)]

    async def publish_on() -> None:
        while not over.is_set():
            if (await scene.orchestrator.depth("jobs")).ready > 100:  # as fast as they are run, on any machine
                await asyncio.sleep(0.02)
                continue
            kind = random.choice([{}, {}, {}, {}, {"delay": 0.2}, {"fails": True}])
            await scene.publish(seconds=random.uniform(0.01, 0.06), retry=hardy, **kind)
            await asyncio.sleep(0.015)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(publish_on())
        while len(killed) < KILLS:
            victim = random.choice(await scene.at_work(working, 2))
            working.remove(victim)
            # From a little before: an acknowledgement has no answer, and what is on its way may not arrive.
            with scene.ledger.fault(f"SIGKILL to {victim.pid}"):
                await asyncio.sleep(random.uniform(0.0, 0.05))  # anywhere in what it does
                victim.signal(signal.SIGKILL)
                killed.add(victim.pid)
                working.append(await scene.start(concurrency=4))
                assert await victim.status() == -signal.SIGKILL
        await scene.at_work(working, len(working))
        over.set()
    await scene.until_done()
    assert await ends_well(working)
    assert await scene.wrong(copies=KILLS) == []

    assert {effect.id for effect in scene.of("effect")} == {confirmed.id for confirmed in scene.of("confirmed")}
    assert not scene.of("unknown")
    assert not scene.of("refused")
    settled = {(answer.id, answer.number) for answer in scene.of("answer") if answer.accepted}
    starts, effects = scene.of("start"), {(effect.id, effect.pid) for effect in scene.of("effect")}
    cut = [s for s in starts if s.pid in killed and (s.id, s.number) not in settled]
    assert len(cut) >= KILLS / 2  # else it was no load
    again = {(start.id, start.number) for start in starts if start.number > 1}
    by_id = defaultdict[str, list[Any]](list)
    for start in starts:
        by_id[start.id].append(start)
    for start in cut:  # the next run has higher numbers, or it was done all the same and only we were not told
        later = [(s.number, s.attempt) for s in by_id[start.id] if s.number > start.number]
        done = (start.id, start.pid) in effects
        assert done or (later and all(attempt > start.attempt for _, attempt in later))
    assert again


async def test_whoever_stands_still_blocks_ends_or_dies_takes_no_job_with_it(
    new_scene: Callable[..., Any], tmp_path: Path
) -> None:
    """Five stories beside one another, since some have to wait for a heartbeat."""
    async with asyncio.TaskGroup() as group:
        group.create_task(a_zombie_settles_nothing(await new_scene(), tmp_path / "gate", until_told=True))
        group.create_task(a_zombie_settles_nothing(await new_scene(), tmp_path / "other", until_told=False))
        group.create_task(sigterm_drains(await new_scene()))
        group.create_task(poison_ends_alone(await new_scene()))
        group.create_task(a_loop_that_is_blocked_keeps_its_jobs(await new_scene()))


async def a_zombie_settles_nothing(scene: Any, gate: Path, *, until_told: bool) -> None:
    """It stands still in the middle of a run past its heartbeat; the job is another's when it goes on."""
    zombie = await scene.start(concurrency=1, heartbeat=2)
    with scene.ledger.fault("SIGSTOP"):
        job_id = await scene.publish(stops=True, until_told=until_told, gate=str(gate))
        await scene.told("start", job_id)
        other = await scene.start(concurrency=1, heartbeat=2)
        first, second = await scene.told("start", job_id, 2)
        assert (first.pid, first.number, first.attempt) == (zombie.pid, 1, 1)
        assert (second.pid, second.number, second.attempt) == (other.pid, 2, 2)
        zombie.signal(signal.SIGCONT)
        [answer] = await scene.told("answer", job_id)
        assert (answer.pid, answer.number) == (zombie.pid, 1)
        if until_told:  # else its acknowledgement may be on a connection that it does not yet know to be gone
            assert not answer.accepted
            await zombie.says("lease")
    if not until_told:  # had the zombie's acknowledgement met the new delivery, this would now be nobody's job
        with scene.ledger.fault("SIGKILL to the other"):
            other.signal(signal.SIGKILL)
            await other.status()
            third = (await scene.told("start", job_id, 3))[-1]
            assert (third.pid, third.number, third.attempt) == (zombie.pid, 3, 3)
    gate.touch()  # noqa: ASYNC240 (one small file)
    last = (await scene.told("answer", job_id, 2))[-1]
    expected = (other.pid, 2, True) if until_told else (zombie.pid, 3, True)
    assert (last.pid, last.number, last.accepted) == expected
    assert await ends_well([zombie, other] if until_told else [zombie])
    # A zombie whose acknowledgement was for nothing believes that the job is done: only the runs can be held to it.
    assert await scene.wrong() == []
    assert await scene.waiting() == set()


async def sigterm_drains(scene: Any) -> None:
    """Five workers in turn, each ended in the midst of its runs: no attempt is counted for what it hands back."""
    jobs = [await scene.publish(seconds=0.02) for _ in range(400)]
    for _ in range(5):
        process = await scene.start(concurrency=4, prefetch=5, drain=10.0)
        await process.next_run()
        while process.runs < 20:
            await process.next_run()
        assert await ends_well([process])
    last = await scene.start(concurrency=20)
    await scene.until_done()
    assert await ends_well([last])
    assert await scene.wrong() == []  # there was no fault: so each was started once
    assert sorted(start.id for start in scene.of("start")) == sorted(jobs)
    assert {start.attempt for start in scene.of("start")} == {1}
    assert len({start.pid for start in scene.of("start")}) == 6


async def poison_ends_alone(scene: Any) -> None:
    over = asyncio.Event()

    async def keep_one_running() -> int:
        """Start it again whenever it has died. Gives how often it did."""
        died = 0
        while True:
            process = await scene.start(concurrency=4)
            ended, quiet = asyncio.create_task(process.status(60.0)), asyncio.create_task(over.wait())
            await asyncio.wait([ended, quiet], return_when=asyncio.FIRST_COMPLETED)
            if quiet.done():
                ended.cancel()
                return died
            quiet.cancel()
            assert await ended == -signal.SIGABRT, process.log()
            died += 1

    hardy = RetryPolicy(base=0.05, crash_limit=100)  # for those that happen to be beside it
    good = await asyncio.gather(*(scene.publish(retry=hardy) for _ in range(100)))
    poison = await scene.publish(poison=True)
    good += await asyncio.gather(*(scene.publish(retry=hardy) for _ in range(900)))
    async with asyncio.TaskGroup() as group:
        keeping = [group.create_task(keep_one_running()) for _ in range(4)]
        await scene.until_done()
        over.set()
    assert sum(task.result() for task in keeping) == CRASH_LIMIT
    assert await ends_well([process for process in scene.processes if not process.has_ended()])
    assert await scene.wrong(copies=4 * CRASH_LIMIT) == []

    # A worker that has another suspect of a crash hands it back, which is a delivery and no attempt.
    assert [entry.attempt for entry in scene.of("start", poison)] == [*range(1, CRASH_LIMIT + 1)]
    assert {entry.id for entry in scene.of("effect")} == set(good)
    [record] = (await scene.orchestrator.dead_letters("jobs").list()).records
    assert (record.message.id, record.reason) == (poison, "crash_limit")
    assert (record.attempts, record.crashes) == (CRASH_LIMIT, CRASH_LIMIT)


async def a_loop_that_is_blocked_keeps_its_jobs(scene: Any) -> None:
    """For longer than the server tolerates a dead peer: the heartbeats come from elsewhere."""
    blocked = await scene.start(concurrency=2, heartbeat=2)
    job_id = await scene.publish(blocks=BLOCKED)
    await scene.told("start", job_id)
    other = await scene.start(concurrency=2, heartbeat=2)  # who would get it
    meanwhile = [await scene.publish() for _ in range(20)]
    [answer] = await scene.told("answer", job_id)
    assert (answer.pid, answer.number, answer.accepted) == (blocked.pid, 1, True)
    await scene.until_done()
    assert await ends_well([blocked, other])
    assert await scene.wrong() == []  # there was no fault
    assert {entry.id for entry in scene.of("start")} == {job_id, *meanwhile}
    assert "(consume)" not in blocked.log()  # no word of that connection: it was never lost
    assert "leases" not in blocked.log()
