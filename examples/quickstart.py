# python examples/quickstart.py
import asyncio

from pydantic import BaseModel

from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, JobSchema, Worker, connect, current_job


class Order(BaseModel):
    item: str
    price: float


class Checkout(AsyncConsumer[Order, Order]):
    async def handle(self, order: Order) -> Order:
        if current_job().attempt == 1:
            print("run 1      fails, and is retried in up to a second")
            raise ConnectionError("the till did not answer")
        print(f"run {current_job().attempt}      sells {order.item} for {order.price:.2f}")
        return order


async def main() -> None:
    async with AsyncOrchestrator(connect()) as jobs:
        await jobs.register(JobSchema("checkout", Order, Order))
        print("published ", await jobs.publish("checkout", Order(item="tea", price=4.5)))
        await Worker(jobs, [Checkout("checkout")], max_jobs=2).run()


if __name__ == "__main__":
    asyncio.run(main())
