"""Workers in processes of their own on a Redis of the test's own, and a ledger of what they did."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mindtrace.jobs import QueueSpec, RedisBackend
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.audit import audit
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.ledger import violations

from ..crew import PATIENCE, Crew, Process


class Scene(Crew):
    """On a server of its own."""

    def __init__(self, server: Broker, folder: Path) -> None:
        super().__init__(server, RedisBackend.from_url(server.url), folder)

    async def start(self, **options: Any) -> Process:
        """Start another worker, with these options."""
        return await self.start_with({}, {"name": "scene", **options})

    async def until_done(self) -> None:
        """Wait until all jobs have ended."""
        async with asyncio.timeout(PATIENCE):
            while await self._going_on():  # noqa: ASYNC110 (a depth rings no bell)
                await asyncio.sleep(0.02)

    async def wrong(self) -> list[str]:
        """All that does not hold: of the invariants, and of the server's keys."""
        found = await audit(self.server.url, "mtj")
        return [*violations(self.ledger.entries(), found.states["jobs"]), *found.violations]

    async def _going_on(self) -> bool:
        depth = await self.orchestrator.depth("jobs")
        return (depth.ready, depth.scheduled, depth.leased) != (0, 0, 0)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A Redis of the test's own, set up as the library asks for it, but for what an indirect parameter says."""
    with brokers.redis(private=True, settings=getattr(request, "param", None)) as server:
        yield server


@pytest.fixture
async def scene(server: Broker, tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(server, tmp_path)
    async with scene.orchestrator:
        await scene.orchestrator.declare(QueueSpec("jobs"))
        yield scene
        await scene.end()
