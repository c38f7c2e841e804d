# python examples/aiohttp_service.py
"""A service that takes an order, answers 202 at once, and leaves the confirmation to a worker.

    curl -i localhost:8080/orders -d '{"item": "tea", "email": "ada@example.org"}'

With MINDTRACE_JOBS_URL the worker is a process of its own, `mindtrace-jobs worker examples.aiohttp_service:worker`;
without, it runs in this one.
"""

import os

from aiohttp import web
from pydantic import BaseModel, Field

from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, JobSchema, Worker, connect
from mindtrace.jobs.integrations.aiohttp import JOBS, accepted, idempotency_key, jobs_ctx, jobs_errors


class Order(BaseModel):
    item: str = Field(min_length=1)
    email: str


CONFIRMATIONS = JobSchema("confirmations", Order)


class Confirm(AsyncConsumer[Order, None]):
    async def handle(self, order: Order) -> None:
        print("confirms  ", order.item, "to", order.email, flush=True)


def worker(jobs: AsyncOrchestrator | None = None) -> Worker:
    return Worker(jobs or AsyncOrchestrator(connect()), [Confirm("confirmations")])


async def order(request: web.Request) -> web.Response:
    jobs, key = request.app[JOBS], idempotency_key(request)
    try:
        order = await request.json()
    except ValueError:
        raise web.HTTPBadRequest(text="the order is no JSON") from None
    return accepted(await jobs.publish("confirmations", order, job_id=key))


def make_app() -> web.Application:
    backend = connect()
    app = web.Application(middlewares=[jobs_errors], client_max_size=2 * 1024**2)
    app.cleanup_ctx.append(
        jobs_ctx(backend, schemas=[CONFIRMATIONS], worker=worker if backend.traits.name == "local" else None)
    )
    app.add_routes([web.post("/orders", order)])
    return app


if __name__ == "__main__":
    web.run_app(make_app(), host="127.0.0.1", port=int(os.environ.get("PORT", "8080")))
