"""The hand-written loops that the library is measured against on Redis: the least an at-least-once queue there can do.

FIFO only; no options, no checks, no queue administration; a job that fails becomes ready when its lease ends, and a
lease is not made longer. What is kept of the promise: a publish that is sent again stores nothing, a job is leased in
the step that takes it off the queue, only its owner settles it, and what nobody settled in time is handed out again.

| key      | type | what lies in it                             |
|----------|------|---------------------------------------------|
| `ready`  | zset | member: id; score: place                    |
| `leased` | zset | member: owner + id; score: deadline, ms     |
| `jobs`   | hash | id -> body; waiting or leased               |
| `place`  | str  | the last place given                        |
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json, to_json
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

DEADLINE = 300.0  # seconds, the worker's own default
LEASE = 30_000  # ms
EMPTY = 0.001  # seconds until a worker looks again at a queue that was empty
Run = Callable[[Any], Awaitable[None]]

current: ContextVar[str] = ContextVar("current")

# KEYS: ready, jobs, place. ARGV: id and body of each.
PUBLISH = """
local place = redis.call('INCRBY', KEYS[3], #ARGV / 2)
local entries = {}
for i = 1, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) == 1 then
    entries[#entries + 1] = place - (#ARGV - i - 1) / 2
    entries[#entries + 1] = ARGV[i]
  end
end
if #entries > 0 then
  redis.call('ZADD', KEYS[1], unpack(entries))
end
"""

# KEYS: ready, jobs, leased. ARGV: owner, lease in ms, how many to claim, and the ids that are settled.
# Returns ids and bodies.
EXCHANGE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local owner, limit = ARGV[1], tonumber(ARGV[3])
if #ARGV > 3 then
  local ids = {unpack(ARGV, 4)}
  local receipts = {}
  for i, id in ipairs(ids) do
    receipts[i] = owner .. id
  end
  local still = redis.call('ZMSCORE', KEYS[3], unpack(receipts))
  local held = {}
  for i, id in ipairs(ids) do
    if still[i] then
      held[#held + 1] = id
    end
  end
  redis.call('ZREM', KEYS[3], unpack(receipts))
  if #held > 0 then
    redis.call('HDEL', KEYS[2], unpack(held))
  end
end
for _, receipt in ipairs(redis.call('ZRANGE', KEYS[3], 0, now, 'BYSCORE', 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[3], receipt)
  redis.call('ZADD', KEYS[1], 0, string.sub(receipt, #owner + 1))
end
if limit == 0 then
  return {{}, {}}
end
local heads = redis.call('ZPOPMIN', KEYS[1], limit)
if #heads == 0 then
  return {{}, {}}
end
local ids, leases = {}, {}
for i = 1, #heads, 2 do
  ids[#ids + 1] = heads[i]
  leases[i], leases[i + 1] = now + ARGV[2], owner .. heads[i]
end
redis.call('ZADD', KEYS[3], unpack(leases))
return {ids, redis.call('HMGET', KEYS[2], unpack(ids))}
"""


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Any]:
    """One long-lived connection, not a pool."""
    async with Redis.from_url(url, protocol=2, single_connection_client=True, retry=Retry(NoBackoff(), 0)) as redis:
        yield redis


def encoded(data: Any) -> tuple[str, bytes]:
    """The id and the bytes of a new job; `data`: a dict or a model, the same bytes come of both."""
    job_id = str(uuid.uuid4())
    job = {"v": 1, "id": job_id, "name": "bench", "created_at": time.time_ns() // 1_000_000, "input": data}
    return job_id, to_json(job)


async def handle(body: bytes, job_id: str, run: Run, model: type[BaseModel] | None) -> None:
    job = from_json(body)
    current.set(job_id)  # a task has a context of its own
    async with asyncio.timeout(DEADLINE):
        await run(job if model is None else model.model_validate(job["input"]))


class Publisher:
    """Publishes; calls that are awaited at once share a script call."""

    def __init__(self, redis: Any, queue: str) -> None:
        self._redis = redis
        self._keys = [f"{queue}:ready", f"{queue}:jobs", f"{queue}:place"]
        self._sha = ""
        self._waiting = list[asyncio.Future[None]]()
        self._words = list[str | bytes]()  # an id and a body for each of them
        self._sending: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._sha = await self._redis.script_load(PUBLISH)

    async def publish(self, data: Any) -> str:
        job_id, body = encoded(data)
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()
        self._waiting.append(stored)
        self._words += job_id, body
        if self._sending is None:
            self._sending = loop.create_task(self._send())
        await stored
        return job_id

    async def publish_many(self, all_data: Sequence[Any]) -> list[str]:
        """In one call of the script, which takes a few thousand at the most."""
        jobs = [encoded(data) for data in all_data]
        await self._store([word for job in jobs for word in job])
        return [job_id for job_id, _ in jobs]

    async def _send(self) -> None:
        while self._waiting:
            waiting, words, self._waiting, self._words = self._waiting, self._words, [], []
            await self._store(words)
            for stored in waiting:
                stored.set_result(None)
            await asyncio.sleep(0)  # those who were answered publish the next
        self._sending = None

    async def _store(self, words: Sequence[Any]) -> None:
        await self._redis.evalsha(self._sha, len(self._keys), *self._keys, *words)


class Worker:
    """One round trip settles what has ended and claims as many as there are slots free; `lease` in ms."""

    def __init__(self, redis: Any, queue: str, lease: int = LEASE) -> None:
        self._redis, self._lease = redis, lease
        self._keys = [f"{queue}:ready", f"{queue}:jobs", f"{queue}:leased"]
        self._sha = ""
        self._owner = secrets.token_hex(8)
        self._running = dict[str, asyncio.Task[None]]()
        self._ended = list[str]()
        self._bell: asyncio.Future[None] | None = None

    async def open(self) -> None:
        self._sha = await self._redis.script_load(EXCHANGE)

    async def work(self, run: Run, slots: int, count: int, model: type[BaseModel] | None = None) -> None:
        """Handle `count` jobs, up to `slots` at once; `run` gets the decoded job, or its input as a `model`."""
        loop = asyncio.get_running_loop()
        left = count
        while left or self._running or self._ended:
            settled, self._ended = self._ended, []
            limit = min(left, slots - len(self._running))
            ids, bodies = await self._redis.evalsha(
                self._sha, len(self._keys), *self._keys, self._owner, self._lease, limit, *settled
            )
            left -= len(ids)
            self._bell = loop.create_future()
            for raw, body in zip(ids, bodies, strict=True):
                job_id = raw.decode()
                self._running[job_id] = loop.create_task(self._handle(job_id, body, run, model))
            if self._running and not self._ended:
                await self._bell
            elif left and not ids:
                await asyncio.sleep(EMPTY)

    async def _handle(self, job_id: str, body: bytes, run: Run, model: type[BaseModel] | None) -> None:
        try:
            await handle(body, job_id, run, model)
        except Exception:  # noqa: S110 - at least once: its lease ends
            pass
        else:
            self._ended.append(job_id)
        finally:
            del self._running[job_id]
            if self._bell is not None and not self._bell.done():
                self._bell.set_result(None)


async def idle_latency(
    url: str, queue: str, datas: Sequence[Any], pause: float, model: type[BaseModel] | None = None
) -> list[float]:
    """Seconds from before each publish to the run's first line, in a worker that waits in a blocking pop of the job.

    Nothing is faster, but it is not at least once: a worker that dies behind the pop takes the job with it.
    """
    samples, loop = list[float](), asyncio.get_running_loop()
    began: asyncio.Future[float] = loop.create_future()

    async def run(job: Any) -> None:
        began.set_result(time.perf_counter())

    async def work(redis: Any) -> None:
        for _ in datas:
            _, body = await redis.blpop([queue], timeout=10)
            await handle(body, "", run, model)

    async with connection(url) as listening, connection(url) as redis, asyncio.TaskGroup() as group:
        group.create_task(work(listening))
        for data in datas:
            await asyncio.sleep(pause)
            began = loop.create_future()
            published = time.perf_counter()
            await redis.rpush(queue, encoded(data)[1])
            samples.append(await began - published)
    return samples
