"""Processes that are killed, stopped and ended while jobs run: nothing is lost, and nothing is settled by two."""

import asyncio
import signal
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mindtrace.jobs import BackendUnavailable, RetryPolicy
from mindtrace.jobs.testing.ledger import Entry

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.fault, pytest.mark.chaos]

KILLS = 50
CRASH_LIMIT = 5  # the default


def in_flight(entries: list[Entry], pids: set[int]) -> set[tuple[str, int]]:
    """The runs of these processes, which are dead, that were not settled as far as anybody knows."""
    settled = {(entry.id, entry.number) for entry in entries if entry.step == "answer" and entry.accepted}
    runs = {(entry.id, entry.number or 0) for entry in entries if entry.step == "start" and entry.pid in pids}
    return runs - settled


def asked_again(entries: list[Entry]) -> int:
    """How many runs were settled so that another follows."""
    return sum(bool(entry.accepted) and entry.settled in ("retry", "release") for entry in entries)


async def ends_well(processes: list[Any]) -> bool:
    """Whether these end with status 0 when they are asked to; one that has just been started is let begin first."""
    for process in processes:
        await process.says("concurrency")
        process.signal(signal.SIGTERM)
    ended = [(await process.status(), process.log()) for process in processes]
    assert [status for status, _ in ended] == [0] * len(processes), [log for status, log in ended if status]
    return True


@pytest.mark.timeout(180)  # it starts 54 processes, as fast as it can
async def test_fifty_kills_of_workers_under_load_lose_no_job(scene: Any, random: Random) -> None:
    """Each job has its effect; run again is only what was in flight in a process that was killed."""
    hardy = RetryPolicy(base=0.05, crash_limit=KILLS)  # fate may have one job killed five times
    killed: set[int] = set()
    over = asyncio.Event()
    working = [await scene.start(concurrency=4, lease=1.0) for _ in range(4)]

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
            await asyncio.sleep(random.uniform(0.0, 0.05))  # anywhere in what it does
            with scene.ledger.fault(f"SIGKILL to {victim.pid}"):
                victim.signal(signal.SIGKILL)
                killed.add(victim.pid)
                working.append(await scene.start(concurrency=4, lease=1.0))
                assert await victim.status() == -signal.SIGKILL
        await scene.at_work(working, len(working))
        over.set()
    await scene.until_done()
    assert await ends_well(working)
    assert await scene.wrong() == []

    entries = scene.ledger.entries()
    assert {effect.id for effect in scene.of("effect")} == {confirmed.id for confirmed in scene.of("confirmed")}
    starts = scene.of("start")
    interrupted = in_flight(entries, killed)
    assert len(interrupted) >= KILLS / 2  # else it was no load
    seen, unseen = Counter[str](), Counter[str]()
    for start in sorted(starts, key=lambda entry: entry.number):
        seen[start.id] += 1
        unseen[start.id] = start.attempt - seen[start.id]  # deliveries that were lost before they were run
        assert 0 <= unseen[start.id] <= start.number - seen[start.id]
    assert len(starts) - len(seen) - asked_again(entries) <= len(interrupted)
    assert unseen.total() <= KILLS * 4


# With everysec a server answers before it writes while an fsync of its own is under way, for as long as the disk takes
# and at most two seconds: a kill in that time costs what it has just confirmed. That is its promise, not ours.
@pytest.mark.parametrize("server", [{"appendfsync": "always"}], indirect=True, ids=["always"])
async def test_five_kills_of_the_server_under_load_lose_nothing_that_was_published(scene: Any, random: Random) -> None:
    """What was confirmed is run; what is unknown is there whole or not at all; and everybody goes on by themselves."""
    outcomes = Counter[str]()
    over = asyncio.Event()
    published = asyncio.Event()

    async def publish_on() -> None:
        while not over.is_set():
            try:
                # Now and then its caller loses patience: then nobody knows what became of it.
                async with asyncio.timeout(random.choice([0.02, 10.0, 10.0, 10.0])):
                    await scene.publish(seconds=random.uniform(0.0, 0.01))
                outcomes["confirmed"] += 1
                published.set()
            except (TimeoutError, BackendUnavailable) as error:
                outcomes[type(error).__name__] += 1
            await asyncio.sleep(random.uniform(0.0, 0.1))

    working = [await scene.start(concurrency=5, lease=2.0) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(publish_on())
        for kill in range(5):
            await asyncio.gather(*(process.next_run() for process in working))
            await asyncio.sleep(random.uniform(0.0, 0.2))
            with scene.ledger.fault(f"SIGKILL to the server, {kill}"):
                await asyncio.to_thread(scene.server.kill)
                await asyncio.sleep(random.uniform(0.0, 0.3))
                await asyncio.to_thread(scene.server.restart)
            published.clear()
            async with asyncio.timeout(10):
                await asyncio.gather(published.wait(), *(process.next_run() for process in working))
        over.set()
    await scene.until_done()
    assert await ends_well(working)
    assert await scene.wrong() == []

    assert {confirmed.id for confirmed in scene.of("confirmed")} <= {effect.id for effect in scene.of("effect")}
    assert outcomes["confirmed"] > 100  # else it was no load
    assert outcomes["TimeoutError"]


@pytest.mark.parametrize("comes_back", ["after the other has ended", "while the other runs"])
@pytest.mark.parametrize("fails", [False, True], ids=["and returns", "and fails"])
async def test_a_zombie_settles_nothing(scene: Any, tmp_path: Path, comes_back: str, fails: bool) -> None:
    """It stands still in the middle of a run past its lease; the job is another's when it goes on."""
    working = [await scene.start(concurrency=1, lease=0.3) for _ in range(2)]
    by_pid = {process.pid: process for process in working}
    for stop in range(3):
        gate = tmp_path / f"gate-{stop}"
        with scene.ledger.fault(f"SIGSTOP, {stop}"):
            job_id = await scene.publish(stops=True, fails=fails, gate=str(gate))
            zombie, other = (by_pid[start.pid] for start in await scene.told("start", job_id, 2))
            assert zombie is not other
            if comes_back == "after the other has ended":
                gate.touch()
                await scene.told("answer", job_id)
            zombie.signal(signal.SIGCONT)
            answers = await scene.told("answer", job_id, 2 if gate.exists() else 1)
            assert answers[-1].pid == zombie.pid
        gate.touch()
        answers = await scene.told("answer", job_id, 2)
        told = {answer.pid: (answer.number, answer.accepted, answer.settled) for answer in answers}
        assert told == {zombie.pid: (1, False, "retry" if fails else "done"), other.pid: (2, True, "done")}
        assert sum(job_id in line and "lease" in line for line in zombie.log().splitlines()) == 1
        assert other.pid in [effect.pid for effect in scene.of("effect", job_id)]
        await scene.until_done()
        assert await scene.wrong() == []
    assert await ends_well(working)


async def test_sigterm_lets_runs_end_and_hands_back_uncounted_what_does_not(scene: Any, tmp_path: Path) -> None:
    """No lease ends in this time: what the next worker gets was released."""
    gates = {name: tmp_path / name for name in ("slow", "quick", "last")}
    slow, quick, last = [await scene.publish(gate=str(gate)) for gate in gates.values()]

    first = await scene.start(concurrency=2, lease=60.0, drain=0.5, cancel_grace=30.0)
    await asyncio.gather(scene.told("start", slow), scene.told("start", quick))
    first.signal(signal.SIGTERM)
    await first.says("draining")
    gates["quick"].touch()
    assert await first.status(0.5 + 2.0) == 1
    depth = await scene.orchestrator.depth("jobs")
    assert (depth.ready, depth.scheduled, depth.leased, depth.dead) == (2, 0, 0, 0)
    assert not scene.of("start", last)

    second = await scene.start(concurrency=2, lease=60.0, drain=10.0)
    await scene.told("start", last)
    gates["slow"].touch()
    await scene.told("answer", slow, 2)
    second.signal(signal.SIGTERM)
    await second.says("draining")
    gates["last"].touch()
    assert await second.status(2.0) == 0

    runs = [(entry.pid, entry.number, entry.attempt) for entry in scene.of("start", slow)]
    assert runs == [(first.pid, 1, 1), (second.pid, 2, 1)]
    assert [(answer.id, answer.settled) for answer in scene.of("answer") if answer.accepted] == [
        (quick, "done"),
        (slow, "release"),
        (slow, "done"),
        (last, "done"),
    ]
    assert await scene.wrong() == []


async def test_a_poison_job_is_started_as_often_as_it_may_crash_and_takes_no_other_with_it(scene: Any) -> None:
    over = asyncio.Event()

    async def keep_one_running() -> int:
        """Start it again whenever it has died. Gives how often it did."""
        died = 0
        while True:
            process = await scene.start(concurrency=4, lease=0.5)
            ended, quiet = asyncio.create_task(process.status()), asyncio.create_task(over.wait())
            await asyncio.wait([ended, quiet], return_when=asyncio.FIRST_COMPLETED)
            if quiet.done():
                ended.cancel()
                return died
            quiet.cancel()
            assert await ended == -signal.SIGABRT
            died += 1

    good = [await scene.publish(seconds=0.01) for _ in range(100)]
    poison = await scene.publish(seconds=0.01, poison=True)
    good += [await scene.publish(seconds=0.01) for _ in range(900)]
    async with asyncio.TaskGroup() as group:
        keeping = [group.create_task(keep_one_running()) for _ in range(4)]
        await scene.until_done()
        over.set()
    assert sum(task.result() for task in keeping) == CRASH_LIMIT
    assert await scene.wrong() == []

    runs = [(entry.number, entry.attempt) for entry in scene.of("start", poison)]
    assert runs == [(number, number) for number in range(1, CRASH_LIMIT + 1)]
    assert {entry.id for entry in scene.of("effect")} == set(good)
    [record] = (await scene.orchestrator.dead_letters("jobs").list()).records
    assert (record.message.id, record.reason) == (poison, "crash_limit")
    assert (record.attempts, record.crashes, record.number) == (CRASH_LIMIT, CRASH_LIMIT, CRASH_LIMIT)
