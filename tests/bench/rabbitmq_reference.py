"""The hand-written loops that the library is measured against on RabbitMQ: the least that at least once takes there.

One quorum queue through aiormq; no options, no checks, no settling but the acknowledgement. What is kept of the
promise: a publish is persistent, mandatory and confirmed; a job is acknowledged once its run has ended well, and what
was not acknowledged comes again when its connection ends.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import aiormq
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pydantic_core import from_json, to_json

DEADLINE = 300.0  # seconds, the worker's own default
PREFETCH = 200
Run = Callable[[Any], Awaitable[None]]

current: ContextVar[str] = ContextVar("current")


@asynccontextmanager
async def opened(url: str, queue: str) -> AsyncIterator[aiormq.Channel]:
    """A connection of its own with one channel, on which the queue is declared."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel(publisher_confirms=True)
        assert isinstance(channel, aiormq.Channel)
        await channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
        yield channel
    finally:
        await connection.close()


async def delete(url: str, queue: str) -> None:
    async with opened(url, queue) as channel:
        await channel.queue_delete(queue)


def encoded(data: Any) -> tuple[str, bytes]:
    """The id and the bytes of a new job."""
    job_id = str(uuid.uuid4())
    job = {"v": 1, "id": job_id, "name": "bench", "created_at": time.time_ns() // 1_000_000, "input": data}
    return job_id, to_json(job)


async def publish(channel: aiormq.Channel, queue: str, data: Any) -> str:
    """Returns once the server has confirmed it; raises if there is no such queue."""
    job_id, body = encoded(data)
    properties = Basic.Properties(content_type="application/json", delivery_mode=2, message_id=job_id)
    confirmed = await channel.basic_publish(
        body,
        routing_key=queue,
        properties=properties,
        mandatory=True,
        wait=False,  # for the socket: it is waited for the confirmation, and waiting for both is slower
    )
    if not isinstance(confirmed, Basic.Ack):
        raise RuntimeError(f"the job {job_id} was not stored: {confirmed}")
    return job_id


class Worker:
    """Runs each delivery in the task that the driver makes of it; acknowledges together what ended in one tick."""

    def __init__(self, channel: aiormq.Channel, queue: str) -> None:
        self._channel, self._queue = channel, queue
        self._unsettled = dict[int, None]()  # the tags, in order
        self._ended = list[int]()
        self._sending: asyncio.Task[None] | None = None
        self._left = 0
        self._over = asyncio.Event()

    async def work(self, run: Run, count: int, prefetch: int = PREFETCH) -> None:
        """Handle `count` jobs, up to `prefetch` at once."""
        self._left = count

        async def handle(message: DeliveredMessage) -> None:
            tag = message.delivery_tag
            assert tag is not None
            self._unsettled[tag] = None
            job = from_json(message.body)
            current.set(job["id"])  # a task has a context of its own
            try:
                async with asyncio.timeout(DEADLINE):
                    await run(job)
            except Exception:  # at least once: it comes again when the connection ends
                return
            self._ended.append(tag)
            if self._sending is None:
                self._sending = asyncio.get_running_loop().create_task(self._acknowledge())

        await self._channel.basic_qos(prefetch_count=prefetch)
        consumer = await self._channel.basic_consume(self._queue, handle)
        await self._over.wait()
        if consumer.consumer_tag is not None:
            await self._channel.basic_cancel(consumer.consumer_tag)

    async def _acknowledge(self) -> None:
        """One frame for all up to the first that still runs, one for each other."""
        ended, self._ended, self._sending = sorted(self._ended), [], None
        done, prefix = set(ended), 0
        for tag in self._unsettled:
            if tag not in done:
                break
            prefix = tag
        for tag in ended:
            del self._unsettled[tag]
        if prefix:
            await self._channel.basic_ack(prefix, multiple=True, wait=False)
        for tag in ended:
            if tag > prefix:
                await self._channel.basic_ack(tag, wait=False)
        self._left -= len(ended)
        if self._left <= 0:
            self._over.set()
