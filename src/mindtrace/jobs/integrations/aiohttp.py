"""For services with aiohttp's web server: `jobs_ctx` opens an orchestrator for the application, `app[JOBS]` is it.

    async def order(request: web.Request) -> web.Response:
        job_id = await request.app[JOBS].publish("confirmations", await request.json(), job_id=idempotency_key(request))
        return accepted(job_id)

    app = web.Application(middlewares=[jobs_errors])
    app.cleanup_ctx.append(jobs_ctx(schemas=[CONFIRMATIONS]))
    app.add_routes([web.post("/orders", order)])

This is the web framework of that name: nothing here is about its client.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

from mindtrace.jobs import AsyncOrchestrator, JobId, JobSchema, JobsError, QueueSpec, Worker
from mindtrace.jobs.integrations.service import BAD_KEY, Source, answer_to, job_id_of, serving

try:
    from aiohttp import web
except ModuleNotFoundError as _missing:
    raise ImportError('aiohttp is not installed: pip install "mindtrace-jobs[aiohttp]"') from _missing

__all__ = ["JOBS", "accepted", "idempotency_key", "jobs_ctx", "jobs_errors"]

JOBS: Final = web.AppKey("JOBS", AsyncOrchestrator)
"""The application's orchestrator: `request.app[JOBS]`; in a sub-application `request.config_dict[JOBS]`."""


def jobs_ctx(
    source: Source = None,
    *,
    schemas: Sequence[JobSchema[Any, Any]] = (),
    queues: Sequence[QueueSpec] = (),
    worker: Callable[[AsyncOrchestrator], Worker] | None = None,
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Make a cleanup context, for `app.cleanup_ctx.append()`.

    It keeps an `AsyncOrchestrator` in `app[JOBS]`. The application does not start without its broker: after 5 s the
    start fails with `BackendUnavailable`, and whoever started the server may do so again.

    Args:
        source: a URL, a backend, or an orchestrator with options of its own, that is opened and closed here. None takes
            `MINDTRACE_JOBS_URL`, else the local backend.
        schemas: of the jobs that are published, each registered.
        queues: declared before, where a plain queue is not what is wanted.
        worker: makes a worker that runs jobs in this process, in its loop. At shutdown it drains after the last request
            has ended. If it ends by an error, that is logged and the server is stopped as by SIGTERM.
    """

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with serving(source, schemas=schemas, queues=queues, worker=worker) as jobs:
            app[JOBS] = jobs
            yield

    return context


@web.middleware
async def jobs_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """A middleware: a publish that fails is answered 422, 413 or 503; what is the service's own mistake stays a 500."""
    try:
        return await handler(request)
    except JobsError as error:
        answer = answer_to(error)
        if answer is None:
            raise
        return web.json_response(answer.body, status=answer.status, headers=answer.headers)


def idempotency_key(request: web.Request) -> JobId | None:
    """The request's `Idempotency-Key`, to publish with as `job_id`; None without one.

    Where clients must not name each other's jobs, put theirs in front of it.

    Raises:
        HTTPBadRequest: it cannot be an id.
    """
    try:
        return job_id_of(request.headers.get("Idempotency-Key"))
    except ValueError:
        raise web.HTTPBadRequest(text=json.dumps(BAD_KEY.body), content_type="application/json") from None


def accepted(job_id: JobId) -> web.Response:
    """A 202 with the job's id: it is stored, and will be run."""
    return web.json_response({"job_id": job_id}, status=202)
