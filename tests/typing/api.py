"""What a user's editor and type checker see; checked, never run."""

from typing import assert_type

from pydantic import BaseModel

from mindtrace.jobs import AsyncOrchestrator, Job, JobSchema, LocalClient, Orchestrator, job_from_schema


class Take(BaseModel):
    a: int = 0


class Give(BaseModel):
    b: int = 0


assert_type(JobSchema("both", Take, Give), JobSchema[Take, Give])
assert_type(JobSchema(name="instances", input=Take(), output=Give()), JobSchema[Take, Give])
assert_type(JobSchema("no_output", Take), JobSchema[Take, None])
assert_type(job_from_schema(JobSchema("both", Take, Give), Take(a=1)), Job)
assert_type(Orchestrator(LocalClient()).publish("queue", Take(), priority=3), str)
assert_type(Orchestrator(LocalClient()).count_queue_messages("queue"), int)


async def awaited(orchestrator: AsyncOrchestrator) -> None:
    assert_type(await orchestrator.publish("queue", Take(), delay=1.5), str)
    assert_type(await orchestrator.publish_many("queue", [Take()]), list[str])
