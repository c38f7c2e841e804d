# python examples/priorities.py
"""Urgent mail overtakes bulk mail that was published before it. Backend: MINDTRACE_JOBS_URL, or this process."""

import asyncio

from pydantic import BaseModel

from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, JobSchema, NotSupported, QueueSpec, Worker, connect


class Mail(BaseModel):
    to: str


class Send(AsyncConsumer[Mail, None]):
    async def handle(self, mail: Mail) -> None:
        print("sends to  ", mail.to)


async def main() -> None:
    async with AsyncOrchestrator(connect()) as jobs:
        # Higher goes first, equal ones in the order they came. Levels 0 to 9 exist on every backend.
        await jobs.declare(QueueSpec("mail", "priority", 9))
        await jobs.register(JobSchema("mail", Mail))
        await jobs.publish_many("mail", [Mail(to=f"reader {number}") for number in (1, 2, 3)])
        await jobs.publish("mail", Mail(to="the customer who waits"), priority=5)
        await jobs.publish("mail", Mail(to="the engineer on call"), priority=9)
        await Worker(jobs, [Send("mail")], concurrency=1, max_jobs=5).run()

        # A queue that has no priorities refuses one: it is never ignored.
        await jobs.declare(QueueSpec("plain"))
        await jobs.register(JobSchema("plain", Mail))
        try:
            await jobs.publish("plain", Mail(to="somebody"), priority=9)
        except NotSupported as error:
            print(f"refused    {error.feature}: it needs {error.needs}")


if __name__ == "__main__":
    asyncio.run(main())
