# uvicorn examples.fastapi_service.app:app
"""A service that takes an order, answers 202 at once, and leaves the confirmation to a worker.

    curl -i localhost:8000/orders -H 'Content-Type: application/json' -d '{"item": "tea", "email": "ada@example.org"}'

With MINDTRACE_JOBS_URL the worker is a process of its own, see work.py; without, it runs in this one.
"""

from fastapi import FastAPI

from mindtrace.jobs import connect
from mindtrace.jobs.integrations.fastapi import JOBS_ERRORS, Accepted, IdempotencyKey, Jobs, jobs_lifespan

from .work import CONFIRMATIONS, Order, worker

backend = connect()
lifespan = jobs_lifespan(backend, schemas=[CONFIRMATIONS], worker=worker if backend.traits.name == "local" else None)
app = FastAPI(lifespan=lifespan, exception_handlers=JOBS_ERRORS)


@app.post("/orders", status_code=202)
async def order(order: Order, jobs: Jobs, key: IdempotencyKey) -> Accepted:
    return Accepted(job_id=await jobs.publish("confirmations", order, job_id=key))
