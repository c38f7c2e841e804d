# python examples/retries_and_dead_letters.py
"""A job fails until its runs are used up, lies in the dead letters, and is replayed once the cause is mended.

Backend: MINDTRACE_JOBS_URL, or this process.
"""

import asyncio

from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Event,
    JobSchema,
    JobSettled,
    Reject,
    Retry,
    RetryPolicy,
    Worker,
    connect,
)


class Invoice(BaseModel):
    number: int


class Print(AsyncConsumer[Invoice, None]):
    # Three runs, 0.1 and 0.2 s apart. The default is up to 1 and 2 s, drawn at random so that jobs which failed
    # together do not come back together.
    retry = RetryPolicy(max_attempts=3, base=0.1, jitter="none")
    printer_works = False

    async def handle(self, invoice: Invoice) -> None:
        if invoice.number < 0:
            raise Reject("no invoice has a number below 0")  # no further run would help
        if not self.printer_works:
            raise ConnectionError("the printer is off")
        print(f"printed    invoice {invoice.number}")


def tell(event: Event) -> None:
    if isinstance(event, JobSettled) and isinstance(event.settlement, Retry):
        print(f"failed     run {event.attempt}; the next in {event.settlement.delay:g} s")


async def main() -> None:
    async with AsyncOrchestrator(connect()) as jobs:
        await jobs.register(JobSchema("invoices", Invoice))
        consumer = Print("invoices")

        await jobs.publish("invoices", Invoice(number=17))
        await Worker(jobs, [consumer], max_jobs=3, listeners=[tell]).run()
        await jobs.publish("invoices", Invoice(number=-1))
        await Worker(jobs, [consumer], max_jobs=1, listeners=[tell]).run()

        dead = jobs.dead_letters("invoices")
        for record in reversed((await dead.list()).records):
            last = record.errors[-1]
            print(f"dead       {record.reason}: {last.type.rpartition('.')[2]}: {last.message}")

        consumer.printer_works = True
        print("replayed  ", await dead.replay(reason="attempts"))
        await Worker(jobs, [consumer], max_jobs=1, listeners=[tell]).run()
        print("purged    ", await dead.purge())
        depth = await jobs.depth("invoices")
        print(f"left       {depth.ready} ready, {depth.dead} dead")


if __name__ == "__main__":
    asyncio.run(main())
