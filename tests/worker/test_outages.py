"""What a worker logs while its broker is away: that it is, once; and when it is there again."""

import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Literal

import pytest

from mindtrace.jobs import AsyncOrchestrator, Job, QueueSpec, Worker
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.testing.faults import Distant

pytestmark = [pytest.mark.anyio, pytest.mark.local]

TRIES = 4


class ThereOrAway(Distant):
    """A backend that a test takes away, and brings back."""

    def __init__(self) -> None:
        super().__init__(LocalBackend())
        self.away, self.tries = False, 0

    def fault(self, verb: str) -> Literal["before", "after"] | None:
        self.tries += self.away
        return "before" if self.away else None


class Impatient(Random):
    def uniform(self, a: float, b: float) -> float:
        return a


@pytest.mark.parametrize("since", ["its start", "some time"])
async def test_that_a_broker_is_away_is_said_once_however_often_it_is_tried_and_that_it_is_back(
    consumer: Callable[..., Any],
    start: Callable[[Worker], Any],
    until: Callable[[Callable[[], Any]], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
    since: str,
) -> None:
    caplog.set_level(logging.DEBUG, "mindtrace.jobs")

    async def act(job: dict[str, Any]) -> None: ...

    backend = ThereOrAway()
    async with AsyncOrchestrator(backend) as orchestrator:
        await orchestrator.declare(QueueSpec("jobs"))
        await orchestrator.publish("jobs", Job(name="jobs", schema_name="jobs"))
        backend.away = since == "its start"
        start(worker := Worker(orchestrator, [consumer(act)], poll_timeout=0.01, random=Impatient()))
        if since == "some time":
            await until(lambda: worker.handled == 1)
            caplog.clear()
            backend.away = True
        await until(lambda: backend.tries > TRIES)
        backend.away = False
        await orchestrator.publish("jobs", Job(name="jobs", schema_name="jobs"))
        await until(lambda: worker.handled == 2)
    levels = [record.levelno for record in caplog.records if "worker" in record.getMessage()]
    assert levels.count(logging.WARNING) == 1
    assert levels.count(logging.DEBUG) >= TRIES - 1
    back = "local is there again, after" if since == "some time" else "queues jobs, concurrency"
    assert [back in record.getMessage() for record in caplog.records if record.levelno == logging.INFO][-1:] == [True]
