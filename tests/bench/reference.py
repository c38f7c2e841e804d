"""The hand-written loop that the library is measured against: the least an at-least-once queue in one process can do.

One heap, one dict of bodies, no options, no checks, no retries but the one that at-least-once asks for.
"""

import asyncio
import heapq
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json, to_json

DEADLINE = 300.0  # seconds, the worker's own default
Run = Callable[[Any], Awaitable[None]]

current: ContextVar[str] = ContextVar("current")


class Reference:
    """A queue and its worker."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []
        self._bodies: dict[str, bytes] = {}  # waiting or leased
        self._leased: dict[str, asyncio.Task[None]] = {}
        self._done: set[str] = set()
        self._place = 0
        self._ended = 0
        self._bell: asyncio.Future[None] | None = None

    async def publish(self, data: Any, priority: int = 0) -> str:
        """`data`: a dict or a model; the same bytes come of both."""
        job_id = str(uuid.uuid4())
        job = {"v": 1, "id": job_id, "name": "bench", "created_at": time.time_ns() // 1_000_000, "input": data}
        body = to_json(job)
        if job_id not in self._bodies and job_id not in self._done:
            self._bodies[job_id] = body
            self._enter(job_id, priority)
        return job_id

    async def work(self, run: Run, slots: int, count: int, model: type[BaseModel] | None = None) -> None:
        """Handle `count` jobs, up to `slots` at once; `run` gets the decoded job, or its input as a `model`."""
        loop = asyncio.get_running_loop()
        left = count
        self._ended = 0
        while self._ended < count:
            while left and self._heap and len(self._leased) < slots:
                left -= 1
                _, _, job_id = heapq.heappop(self._heap)
                self._leased[job_id] = loop.create_task(self._handle(job_id, run, model))
            self._bell = loop.create_future()
            await self._bell

    async def _handle(self, job_id: str, run: Run, model: type[BaseModel] | None) -> None:
        job = from_json(self._bodies[job_id])
        current.set(job_id)  # a task has a context of its own
        try:
            async with asyncio.timeout(DEADLINE):
                await run(job if model is None else model.model_validate(job["input"]))
        except Exception:  # at least once
            self._enter(job_id, 0)
        else:
            del self._bodies[job_id]
            self._done.add(job_id)
            self._ended += 1
        finally:
            del self._leased[job_id]
            self._ring()

    def _enter(self, job_id: str, priority: int) -> None:
        self._place += 1
        heapq.heappush(self._heap, (-priority, self._place, job_id))
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)
