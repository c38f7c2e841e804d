"""Workers in processes of their own on a RabbitMQ that may be killed, and a ledger of what they did."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import aiormq
import pytest

from mindtrace.jobs import QueueSpec, RabbitMQBackend
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS, Topology
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.ledger import Where, violations

from ..crew import PATIENCE, Crew, Process


class Scene(Crew):
    """On a namespace of its own, with a queue `jobs` of this kind."""

    def __init__(self, server: Broker, folder: Path, kind: Literal["fifo", "priority"]) -> None:
        folder.mkdir()
        self.kind = kind
        self.topology = Topology(f"t{secrets.token_hex(6)}")
        self._url = server.url
        super().__init__(server, self.backend(), folder)

    def backend(self) -> RabbitMQBackend:
        """Another one on its namespace."""
        return RabbitMQBackend.from_url(self._url, namespace=self.topology.namespace)

    async def start(self, *, heartbeat: int = 10, **options: Any) -> Process:
        """Start another worker, with these options."""
        return await self.start_with({"namespace": self.topology.namespace, "heartbeat": heartbeat}, options)

    async def publish(self, **told: Any) -> str:
        """See `Crew`; where there are levels, at any of them."""
        priority = secrets.randbelow(4) if self.kind == "priority" else None
        return await super().publish(**told, priority=priority)

    async def dead(self) -> set[str]:
        """Of the dead letters, the ids."""
        return {record.message.id for record in (await self.orchestrator.dead_letters("jobs").list()).records}

    async def until_done(self) -> None:
        """Wait until what was confirmed was run or is dead, and nothing waits."""
        async with asyncio.timeout(PATIENCE):
            while self._left(await self.dead()) or (await self.orchestrator.depth("jobs")).ready:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    def _left(self, dead: set[str]) -> set[str]:
        entries = self.ledger.entries()
        over = dead | {entry.id for entry in entries if entry.step == "effect"}
        return {entry.id for entry in entries if entry.step == "confirmed"} - over

    async def waiting(self) -> set[str]:
        """The ids of what is in the queue or held back, which counts as a crash of each: for when all is over."""
        found: set[str] = set()
        connection = await aiormq.connect(self.server.url)
        try:
            for name in [self.topology.queue("jobs"), *self._holds(8)]:
                channel = await connection.channel()
                try:
                    count = (await channel.queue_declare(name, passive=True)).message_count
                    for _ in range(count or 0):
                        got = await channel.basic_get(name)
                        if got.header is not None:
                            found.add(str((got.header.properties.headers or {})["mtj-id"]))
                except aiormq.exceptions.ChannelNotFoundEntity:
                    continue
        finally:
            await connection.close()
        return found

    async def wrong(self, *, copies: int = 0) -> list[str]:
        """All invariants that do not hold; once every worker has ended, so that nothing is leased.

        Args:
            copies: so many jobs may be there twice: the copy of one was stored, and then nobody could acknowledge the
                original. Of that the ledger knows nothing. Both copies have the same number.
        """
        assert all(process.has_ended() for process in self.processes)
        waiting, dead = await self.waiting(), await self.dead()
        where: dict[str, Where | tuple[Where, ...]] = {
            one: "dead" if one in dead else "ready" for one in waiting | dead
        }
        found = violations(self.ledger.entries(), where, fenced=False)
        twice = [line for line in found if line.startswith("L6") and self._has_copies(line.split()[1])]
        return found if len(twice) > copies else [line for line in found if line not in twice]

    def _has_copies(self, job_id: str) -> bool:
        numbers = [start.number for start in self.of("start", job_id)]
        return len(set(numbers)) < len(numbers)

    async def aclose(self) -> None:
        """End the processes, and delete the queues."""
        await self.end()
        await self.orchestrator.aclose()
        connection = await aiormq.connect(self.server.url)
        channel = await connection.channel()
        queue, dead, gone = self.topology.queue("jobs"), self.topology.dead("jobs"), self.topology.gone_queue
        for name in [queue, dead, gone, *self._holds(LEVELS)]:
            await channel.queue_delete(name)
        await connection.close()

    def _holds(self, levels: int) -> list[str]:
        return [f"{self.topology.namespace}:{level}.hold" for level in range(levels)]


@pytest.fixture(scope="session")
def server() -> Iterator[Broker]:
    """A RabbitMQ of these tests' own. They leave it running and empty."""
    with brokers.rabbitmq(private=True) as server:
        yield server


@pytest.fixture
async def new_scene(server: Broker, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes scenes, by the kind of their queue."""
    async with AsyncExitStack() as stack:
        count = 0

        async def new(kind: Literal["fifo", "priority"] = "fifo") -> Scene:
            nonlocal count
            count += 1
            scene = Scene(server, tmp_path / f"scene-{count}", kind)
            await scene.orchestrator.open()
            stack.push_async_callback(scene.aclose)
            await scene.orchestrator.declare(QueueSpec("jobs", kind))
            return scene

        yield new
