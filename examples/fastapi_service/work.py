# mindtrace-jobs worker examples.fastapi_service.work:worker
"""What the service hands in, and who runs it: in a process of its own, or in the service's."""

from pydantic import BaseModel, Field

from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, JobSchema, Worker, connect


class Order(BaseModel):
    item: str = Field(min_length=1)
    email: str


CONFIRMATIONS = JobSchema("confirmations", Order)


class Confirm(AsyncConsumer[Order, None]):
    async def handle(self, order: Order) -> None:
        print("confirms  ", order.item, "to", order.email, flush=True)


def worker(jobs: AsyncOrchestrator | None = None) -> Worker:
    return Worker(jobs or AsyncOrchestrator(connect()), [Confirm("confirmations")])
