"""What a user of the integrations sees in an editor; checked, never run."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, assert_type

from aiohttp import web
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, JobSchema, LocalBackend, QueueSpec, Worker
from mindtrace.jobs.integrations.aiohttp import JOBS, accepted, idempotency_key, jobs_ctx, jobs_errors
from mindtrace.jobs.integrations.fastapi import JOBS_ERRORS, Accepted, IdempotencyKey, Jobs, jobs_lifespan


class Order(BaseModel):
    item: str


class Confirm(AsyncConsumer[Order, None]):
    async def handle(self, data: Order) -> None: ...


ORDERS = JobSchema("orders", Order)


def worker(jobs: AsyncOrchestrator) -> Worker:
    return Worker(jobs, [Confirm("orders")])


async def refuse(request: Request, error: Any) -> Response:
    return Response(status_code=418)


app = FastAPI(lifespan=jobs_lifespan("local://", schemas=[ORDERS], worker=worker), exception_handlers=JOBS_ERRORS)
FastAPI(lifespan=jobs_lifespan(LocalBackend()), exception_handlers={**JOBS_ERRORS, ValueError: refuse})
assert_type(
    jobs_lifespan(AsyncOrchestrator(LocalBackend()), queues=[QueueSpec("orders")]),
    Callable[[FastAPI], AbstractAsyncContextManager[None]],
)
jobs_lifespan(url="local://")  # type: ignore[call-arg]
jobs_lifespan(worker=Confirm("orders"))  # type: ignore[arg-type]


async def endpoint(order: Order, jobs: Jobs, key: IdempotencyKey) -> Accepted:
    assert_type(jobs, AsyncOrchestrator)
    assert_type(key, str | None)
    return Accepted(job_id=await jobs.publish("orders", order, job_id=key))


async def handler(request: web.Request) -> web.Response:
    assert_type(request.app[JOBS], AsyncOrchestrator)
    assert_type(request.config_dict[JOBS], AsyncOrchestrator)
    assert_type(idempotency_key(request), str | None)
    return accepted("an-id")


service = web.Application(middlewares=[jobs_errors])
service.cleanup_ctx.append(jobs_ctx(schemas=[ORDERS], worker=lambda jobs: Worker(jobs, [Confirm("orders")])))
