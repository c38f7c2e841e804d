"""The server is killed, restarted, stopped and late: what was confirmed is run, and everybody goes on by themselves."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mindtrace.jobs import AsyncOrchestrator, BackendUnavailable
from mindtrace.jobs.testing.brokers import Broker

pytestmark = [pytest.mark.anyio, pytest.mark.rabbitmq, pytest.mark.fault, pytest.mark.chaos]

WRITERS = 20
GOES_ON_WITHIN = 2.0
ENOUGH = 20.0
PUBLISHES_WITHIN = 10.0


class Load:
    """Writers on a scene, and workers that do what they write."""

    def __init__(self, scene: Any, random: Random) -> None:
        self.scene, self.random = scene, random
        self.outcomes = Counter[str]()
        self.working: list[Any] = []
        self.over = asyncio.Event()
        self.published = asyncio.Event()

    async def start(self, group: asyncio.TaskGroup) -> None:
        self.working = [await self.scene.start(concurrency=5) for _ in range(2)]
        for _ in range(WRITERS):
            group.create_task(self._publish_on())

    async def is_under_way(self) -> None:
        """Everybody has done something since now."""
        self.published.clear()
        await asyncio.gather(self.published.wait(), *(process.next_run() for process in self.working))

    async def _publish_on(self) -> None:
        while not self.over.is_set():
            try:
                # Now and then its caller loses patience: then nobody knows what became of it.
                async with asyncio.timeout(self.random.choice([0.02, 30.0, 30.0, 30.0])):
                    await self.scene.publish(seconds=self.random.uniform(0.0, 0.01))
                self.outcomes["confirmed"] += 1
                self.published.set()
            except (TimeoutError, BackendUnavailable) as error:
                self.outcomes[type(error).__name__] += 1
            await asyncio.sleep(self.random.uniform(0.0, 0.3))


async def cut_while(scene: Any, kill: asyncio.Barrier) -> None:
    """Publish while the server goes down, and when it is down, and give up: only the former may be anywhere."""
    async with AsyncOrchestrator(scene.backend()) as orchestrator:
        await scene.publish(through=orchestrator)

        async def publish() -> BackendUnavailable | None:
            try:
                await scene.publish(through=orchestrator)
            except BackendUnavailable as error:
                return error
            return None

        at_first = [asyncio.create_task(publish()) for _ in range(50)]
        await asyncio.sleep(0)
        await kill.wait()
        await kill.wait()
        await asyncio.wait(at_first, timeout=0.5)  # by then it has seen that the connection is gone
        later = [asyncio.create_task(publish()) for _ in range(50)]
        await asyncio.sleep(0)
    assert all(error is None or error.maybe_published for error in await asyncio.gather(*at_first))
    cut = await asyncio.gather(*later)
    assert [error is not None and not error.maybe_published for error in cut] == [True] * 50


@pytest.mark.timeout(180)
async def test_kills_and_a_restart_of_the_server_under_load_lose_nothing_that_was_published(
    server: Broker, new_scene: Callable[..., Any], random: Random
) -> None:
    """With both kinds of queue. Twice it is killed, once it ends in order; there are workers who never saw it."""
    loads = [Load(await new_scene("fifo"), random), Load(await new_scene("priority"), random)]
    scenes, outages = [load.scene for load in loads], list[float]()

    async def come_back(how: str) -> None:
        async with asyncio.timeout(ENOUGH):
            await asyncio.gather(*(load.is_under_way() for load in loads))
        with ExitStack() as faults:
            for scene in scenes:
                faults.enter_context(scene.ledger.fault(f"{how} of the server"))
            await asyncio.sleep(random.uniform(0.5, 0.8))  # what was acknowledged before this, it has written down
            late: list[Any] = []
            began = time.monotonic()
            try:
                if how != "end":
                    late = await kill()
            finally:
                await asyncio.to_thread(server.restart)
                outages.append(time.monotonic() - began)
            async with asyncio.timeout(GOES_ON_WITHIN):
                under_way = [load.is_under_way() for load in loads]
                await asyncio.gather(*under_way, *(process.next_run() for process in late))
            for load, process in zip(loads, late, strict=False):
                load.working.append(process)

    async def kill() -> list[Any]:
        """Gives workers that have begun since, and found no server."""
        barrier = asyncio.Barrier(len(scenes) + 1)
        cutting = [asyncio.create_task(cut_while(scene, barrier)) for scene in scenes]
        await barrier.wait()  # each has just begun to publish
        await asyncio.to_thread(server.kill)
        await barrier.wait()
        late = [await scene.start(concurrency=5) for scene in scenes]
        await asyncio.gather(*cutting, *(process.says("trying on") for process in late))
        return late

    async with asyncio.TaskGroup() as group:
        for load in loads:
            await load.start(group)
        for how in ("first kill", "second kill", "end"):
            await come_back(how)
        for load in loads:
            load.over.set()
    for load, scene in zip(loads, scenes, strict=True):
        await scene.until_done()
        for process in load.working:
            process.signal(signal.SIGTERM)
        assert [await process.status() for process in load.working] == [0] * len(load.working)
        assert await scene.wrong(copies=60) == []
        assert {confirmed.id for confirmed in scene.of("confirmed")} <= {effect.id for effect in scene.of("effect")}
        assert load.outcomes["confirmed"] > 100  # else it was no load
        assert load.outcomes["TimeoutError"]
        if max(outages) < PUBLISHES_WITHIN:  # on a busy machine a server may take longer to start
            assert not load.outcomes["BackendUnavailable"]


async def test_a_server_that_stands_still_costs_only_the_leases_of_those_who_tolerate_less(
    server: Broker, new_scene: Callable[..., Any], tmp_path: Path
) -> None:
    """Longer than three heartbeats of one worker, and shorter than those of the other."""
    hasty, patient = await new_scene(), await new_scene()
    first, second = await hasty.start(heartbeat=2), await patient.start()
    gate = tmp_path / "gate"
    jobs = [await scene.publish(gate=str(gate)) for scene in (hasty, patient)]
    await asyncio.gather(*(scene.told("start", job) for scene, job in zip((hasty, patient), jobs, strict=True)))
    with hasty.ledger.fault("SIGSTOP to the server"):
        server.stop()
        try:
            meanwhile = asyncio.create_task(patient.publish())
            await first.says("the leases of 1 jobs are lost")
        finally:
            server.cont()
        again = (await hasty.told("start", jobs[0], 2))[-1]
        assert (again.number, again.attempt) == (2, 2)
    gate.touch()
    await meanwhile
    for scene, process in ((hasty, first), (patient, second)):
        await scene.until_done()
        process.signal(signal.SIGTERM)
        assert await process.status() == 0
        assert await scene.wrong() == []  # the patient one saw no fault
    assert [start.number for start in patient.of("start", jobs[1])] == [1]
    assert "lost" not in second.log()
