"""Rolling deploys: a job that a worker does not know is left to one that does, and keeps nothing else waiting."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncOrchestrator,
    Depth,
    Event,
    JobSchema,
    JobSettled,
    QueueSpec,
    Release,
    SchemaMismatch,
    Worker,
)

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]


class Nothing(BaseModel):
    pass


@pytest.mark.parametrize("strict", [False, True], ids=["in fair turns", "strict"])
@pytest.mark.parametrize("concurrency", [1, 4])
async def test_jobs_that_nobody_here_knows_hold_up_none_of_the_others(
    orchestrator: AsyncOrchestrator, publish: Publish, consumer: Make, strict: bool, concurrency: int
) -> None:
    """Three queues, two of them shared with a release to come, whose jobs are in front; more of them than slots."""
    ran: list[str] = []

    async def act(job: dict[str, Any]) -> None:
        ran.append(job["schema_name"])

    for schema in ("mail", "chat"):
        await orchestrator.register(JobSchema(schema, Nothing, queue="talk"))
    await orchestrator.register(JobSchema("resize", Nothing, queue="pictures"))
    await orchestrator.declare(QueueSpec("anything"))
    unknown = await publish(6, "talk", schema="video") + await publish(6, "pictures", schema="crop")
    for queue, schema in (("talk", "mail"), ("talk", "chat"), ("pictures", "resize"), ("anything", "crop")):
        await publish(2, queue, schema=schema)
    told: list[Event] = []
    worker = Worker(
        orchestrator,
        [consumer(act, "mail"), consumer(act, "resize"), consumer(act, "chat"), consumer(act, "anything")],
        concurrency=concurrency,
        strict=strict,
        until_idle=True,
        listeners=[told.append],
    )
    assert await worker.run() == 0
    # A consumer without a schema takes whatever is in its own queue, and nothing of another one.
    assert sorted(ran) == ["chat", "chat", "crop", "crop", "mail", "mail", "resize", "resize"]
    assert worker.handled == 8
    assert await orchestrator.depth("talk") == Depth(ready=0, scheduled=6, leased=0, dead=0)
    assert await orchestrator.depth("pictures") == Depth(ready=0, scheduled=6, leased=0, dead=0)
    assert sorted(event.job_id for event in told if isinstance(event, SchemaMismatch)) == sorted(unknown)
    assert all(
        event.settlement == Release(1.0) for event in told if isinstance(event, JobSettled) and event.job_id in unknown
    )
