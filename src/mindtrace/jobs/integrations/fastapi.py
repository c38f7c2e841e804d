"""For FastAPI: `jobs_lifespan` opens an orchestrator for the application, `Jobs` gives it to an endpoint.

    app = FastAPI(lifespan=jobs_lifespan(schemas=[CONFIRMATIONS]), exception_handlers=JOBS_ERRORS)

    @app.post("/orders", status_code=202)
    async def order(order: Order, jobs: Jobs, key: IdempotencyKey) -> Accepted:
        return Accepted(job_id=await jobs.publish("confirmations", order, job_id=key))

A plain `def` endpoint publishes by `anyio.from_thread.run(jobs.publish, "confirmations", order)`.
"""

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, Final, TypeAlias

from pydantic import BaseModel

from mindtrace.jobs import AsyncOrchestrator, ConfigError, JobId, JobSchema, JobsError, QueueSpec, Worker
from mindtrace.jobs.integrations.service import BAD_KEY, Source, answer_to, job_id_of, serving

try:
    from fastapi import Depends, FastAPI, Header, HTTPException, Request
    from fastapi.requests import HTTPConnection
    from fastapi.responses import JSONResponse, Response
except ModuleNotFoundError as _missing:
    raise ImportError('FastAPI is not installed: pip install "mindtrace-jobs[fastapi]"') from _missing

__all__ = ["JOBS_ERRORS", "Accepted", "IdempotencyKey", "Jobs", "get_jobs", "jobs_lifespan"]


def jobs_lifespan(
    source: Source = None,
    *,
    schemas: Sequence[JobSchema[Any, Any]] = (),
    queues: Sequence[QueueSpec] = (),
    worker: Callable[[AsyncOrchestrator], Worker] | None = None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Make a lifespan for `FastAPI(lifespan=)`, or to be entered inside one of your own.

    It keeps an `AsyncOrchestrator` in `app.state.jobs`; yours enters it by `async with jobs_lifespan(...)(app):`. The
    application does not start without its broker: after 5 s the start fails with `BackendUnavailable`, and whoever
    started the server may do so again.

    Args:
        source: a URL, a backend, or an orchestrator with options of its own, that is opened and closed here. None takes
            `MINDTRACE_JOBS_URL`, else the local backend.
        schemas: of the jobs that are published, each registered.
        queues: declared before, where a plain queue is not what is wanted.
        worker: makes a worker that runs jobs in this process, in its loop. At shutdown it drains after the last request
            has ended. If it ends by an error, that is logged and the server is stopped as by SIGTERM.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async with serving(source, schemas=schemas, queues=queues, worker=worker) as jobs:
            app.state.jobs = jobs
            try:
                yield
            finally:
                del app.state.jobs

    return lifespan


def get_jobs(connection: HTTPConnection) -> AsyncOrchestrator:
    """The application's orchestrator: what `Jobs` depends on, and what a test overrides.

    Raises:
        ConfigError: the application has no `jobs_lifespan`, or has not started.
    """
    jobs = getattr(connection.app.state, "jobs", None)
    if not isinstance(jobs, AsyncOrchestrator):
        raise ConfigError(
            "no orchestrator in app.state.jobs: FastAPI(lifespan=jobs_lifespan(...)); an application that is mounted in"
            " another one has no lifespan, enter jobs_lifespan(...)(mounted) in that of the outer one"
        )
    return jobs


Jobs: TypeAlias = Annotated[AsyncOrchestrator, Depends(get_jobs)]
"""For a parameter of an endpoint: the application's orchestrator."""


def _idempotency_key(
    key: Annotated[
        str | None,
        Header(alias="Idempotency-Key", description="Names the job: the same request sent again makes no second one."),
    ] = None,
) -> JobId | None:
    try:
        return job_id_of(key)
    except ValueError:
        raise HTTPException(BAD_KEY.status, BAD_KEY.body["detail"]) from None


IdempotencyKey: TypeAlias = Annotated[JobId | None, Depends(_idempotency_key)]
"""For a parameter of an endpoint, to publish with as `job_id`: the request's `Idempotency-Key`, None without one.

One that cannot be an id is answered 400. Where clients must not name each other's jobs, put theirs in front of it.
"""


class Accepted(BaseModel):
    """The body of a 202: the job is stored, and will be run."""

    job_id: JobId


async def _answer(request: Request, error: JobsError) -> Response:
    answer = answer_to(error)
    if answer is None:
        raise error  # a 500, with its traceback in the log
    return JSONResponse(answer.body, answer.status, answer.headers)


JOBS_ERRORS: Final[dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]] = {
    JobsError: _answer
}
"""For `FastAPI(exception_handlers=)`, as it is or among your own: a publish that fails is answered 422, 413 or 503."""
