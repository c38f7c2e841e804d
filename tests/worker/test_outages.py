"""A worker whose broker is away: what it logs, and how it ends."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Literal

import pytest

from mindtrace.jobs import AsyncOrchestrator, Event, Job, JobSettled, QueueSpec, Worker, connect
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.testing.faults import Distant
from mindtrace.jobs.testing.proxy import Amqp, FaultProxy, Resp

pytestmark = [pytest.mark.anyio]

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


@pytest.mark.local
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


@pytest.mark.chaos
@pytest.mark.parametrize("again", [False, True], ids=["one signal", "two"])
@pytest.mark.parametrize(
    ("kind", "wire", "unsettled"),
    [
        pytest.param("redis", Resp, 1, marks=pytest.mark.redis),
        pytest.param("rabbitmq", Amqp, 0, marks=pytest.mark.rabbitmq),  # there its lease is lost with the connection
    ],
)
async def test_a_worker_that_stops_in_an_outage_ends_when_it_is_to_and_says_what_it_could_not_settle(
    consumer: Callable[..., Any],
    start: Callable[[Worker], Any],
    gate: Any,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    kind: str,
    wire: Any,
    unsettled: int,
    again: bool,
) -> None:
    """Whatever the lease. A job whose result nobody has is run again, which a status of 1 says."""
    caplog.set_level(logging.INFO, "mindtrace.jobs")
    told: list[Event] = []

    async def held(_: Any) -> None:
        await gate.enter()

    url = request.getfixturevalue(f"{kind}_url")
    async with FaultProxy.to(url, wire=wire) as proxy, AsyncOrchestrator(connect(url)) as publisher:
        orchestrator = AsyncOrchestrator(connect(proxy.url(url)))
        drain = 60.0 if again else 0.5
        worker = Worker(orchestrator, [consumer(held, "outage")], lease=120.0, drain=drain, listeners=[told.append])
        running = start(worker)
        async with asyncio.timeout(10):
            while not worker.health().ready:  # noqa: ASYNC110 (nothing tells of it)
                await asyncio.sleep(0.01)
        await publisher.publish("outage", Job(name="outage", schema_name="outage", input_data={}))
        await gate.holds(1)
        proxy.refuse()
        proxy.reset()
        gate.open()
        worker.stop()
        if again:
            await asyncio.sleep(0)
            worker.stop(now=True)
        async with asyncio.timeout(20):
            assert await running == unsettled
        assert worker.released == unsettled
        await publisher.delete("outage", force=True)
    [settled] = [event for event in told if isinstance(event, JobSettled)]
    assert not settled.accepted
    said = [record.getMessage() for record in caplog.records]
    assert not any("there again" in line for line in said)
