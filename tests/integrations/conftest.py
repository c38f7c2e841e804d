"""One small service, written for each framework, and a way to start it in this process and call it over HTTP."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from aiohttp import ClientSession, web
from fastapi import FastAPI
from pydantic import BaseModel

from mindtrace.jobs import AsyncOrchestrator, JobSchema, QueueSpec, Worker
from mindtrace.jobs.integrations import aiohttp as for_aiohttp
from mindtrace.jobs.integrations import fastapi as for_fastapi
from mindtrace.jobs.integrations.service import Source


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Order(BaseModel):
    item: str


OPTIONS: dict[str, Any] = {"schemas": [JobSchema("orders", Order)], "queues": [QueueSpec("orders", max_length=2)]}
MakeWorker = Callable[[AsyncOrchestrator], Worker] | None


def with_fastapi(source: Source, worker: MakeWorker) -> FastAPI:
    app = FastAPI(
        lifespan=for_fastapi.jobs_lifespan(source, **OPTIONS, worker=worker), exception_handlers=for_fastapi.JOBS_ERRORS
    )

    @app.post("/{queue}", status_code=202)
    async def publish(
        queue: str, order: dict[str, Any], jobs: for_fastapi.Jobs, key: for_fastapi.IdempotencyKey
    ) -> for_fastapi.Accepted:
        return for_fastapi.Accepted(job_id=await jobs.publish(queue, order, job_id=key))

    return app


def with_aiohttp(source: Source, worker: MakeWorker) -> web.Application:
    async def publish(request: web.Request) -> web.Response:
        jobs, key = request.app[for_aiohttp.JOBS], for_aiohttp.idempotency_key(request)
        job_id = await jobs.publish(request.match_info["queue"], await request.json(), job_id=key)
        return for_aiohttp.accepted(job_id)

    app = web.Application(middlewares=[for_aiohttp.jobs_errors], client_max_size=2 * 1024**2)
    app.cleanup_ctx.append(for_aiohttp.jobs_ctx(source, **OPTIONS, worker=worker))
    app.add_routes([web.post("/{queue}", publish)])
    return app


@dataclass
class Answered:
    status: int
    body: Any
    headers: Mapping[str, str]


class Client:
    def __init__(self, session: ClientSession, port: int) -> None:
        self._session, self._port = session, port

    async def post(self, queue: str, order: object, **headers: str) -> Answered:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.post(f"http://127.0.0.1:{self._port}/{queue}", json=order, headers=named) as answer:
            is_json = answer.content_type == "application/json"
            body = await answer.json() if is_json else await answer.text()
            return Answered(answer.status, body, dict(answer.headers))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.up.set()


@asynccontextmanager
async def _uvicorn(app: FastAPI) -> AsyncGenerator[int, None]:
    server = _Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    serving = asyncio.create_task(server.serve())
    await server.up.wait()
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def _runner(app: web.Application) -> AsyncGenerator[int, None]:
    runner = web.AppRunner(app)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


Serve = Callable[..., AbstractAsyncContextManager[Client]]
Live = Callable[..., AbstractAsyncContextManager[None]]


@pytest.fixture(params=["fastapi", "aiohttp"])
def framework(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def serve(framework: str) -> Serve:
    """`async with serve(source, worker) as client:`: the service answers over HTTP, within 20 s in all."""

    @asynccontextmanager
    async def served(source: Source, worker: MakeWorker = None) -> AsyncGenerator[Client, None]:
        up = _uvicorn(with_fastapi(source, worker)) if framework == "fastapi" else _runner(with_aiohttp(source, worker))
        async with asyncio.timeout(20), up as port, ClientSession() as session:
            yield Client(session, port)

    return served


@pytest.fixture
def live(framework: str) -> Live:
    """`async with live(source, worker):`: what a server does at start and stop, with the errors it would be given."""

    @asynccontextmanager
    async def lived(source: Source, worker: MakeWorker = None) -> AsyncGenerator[None, None]:
        if framework == "fastapi":
            app = with_fastapi(source, worker)
            async with asyncio.timeout(20), app.router.lifespan_context(app):
                yield
        else:
            runner = web.AppRunner(with_aiohttp(source, worker))
            async with asyncio.timeout(20):
                try:
                    await runner.setup()
                    yield
                finally:
                    await runner.cleanup()

    return lived
