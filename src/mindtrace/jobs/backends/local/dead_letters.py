"""The dead letters of a local queue."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice

from mindtrace.jobs.backend import DeadLetters, Home, Progress
from mindtrace.jobs.backends.local.clock import Clock
from mindtrace.jobs.backends.local.queue import Queue
from mindtrace.jobs.delivery import DeadFilter, DeadPage, DeadRecord
from mindtrace.jobs.errors import ConfigError, JobNotFound, QueueNotFound
from mindtrace.jobs.job import JobId
from mindtrace.jobs.retry import is_seconds, is_whole


class LocalDeadLetters(DeadLetters):
    """See `DeadLetters`.

    Args:
        home: the loop that may use it.
        clock: its time.
        queues: all of the backend's, by name.
        name: of the queue.
    """

    def __init__(self, home: Home, clock: Clock, queues: Mapping[str, Queue], name: str) -> None:
        self._home, self._clock, self._queues, self._name = home, clock, queues, name

    async def list(self, where: DeadFilter, *, limit: int = 100, cursor: str | None = None) -> DeadPage:
        """A page, newest first."""
        if not is_whole(limit) or limit < 1:
            raise ConfigError(f"limit={limit!r}: a whole number from 1 on")
        if cursor is not None and not (cursor.isascii() and cursor.isdigit()):
            raise ConfigError(f"cursor={cursor!r}: the cursor of an earlier page")
        queue = self._queue()
        before = math.inf if cursor is None else int(cursor)
        older = (r for r in reversed(queue.dead.values()) if _fits(r, where) and queue.died[r.message.id] < before)
        records = list(islice(older, limit))
        return DeadPage(records, str(queue.died[records[-1].message.id]) if next(older, None) else None)

    async def get(self, job_id: JobId) -> DeadRecord:
        """One record."""
        return self._chosen([job_id])[0]

    async def count(self) -> int:
        """How many there are."""
        return len(self._dead())

    async def replay(
        self,
        which: Sequence[JobId] | DeadFilter,
        *,
        rate: float | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Put jobs back under their ids."""
        if rate is not None and not (is_seconds(rate) and rate > 0):
            raise ConfigError(f"rate={rate!r}: jobs a second, above 0")
        count = 0
        records = self._chosen(which)[:limit]
        for done, record in enumerate(records):
            if rate is not None and count:
                await self._clock.until(self._clock.now() + 1 / rate)
            queue = self._queue()
            if queue.dead.get(record.message.id) is record:  # not replayed or purged by another meanwhile
                queue.replay(record)
                count += 1
            if progress is not None:
                progress(done + 1, len(records))
        return count

    async def purge(
        self, which: Sequence[JobId] | DeadFilter, *, limit: int | None = None, progress: Progress | None = None
    ) -> int:
        """Forget them."""
        records, queue = self._chosen(which)[:limit], self._queue()
        for record in records:
            queue.forget(record)
        if progress is not None:
            progress(len(records), len(records))
        return len(records)

    def _chosen(self, which: Sequence[JobId] | DeadFilter) -> Sequence[DeadRecord]:
        dead = self._dead()
        if isinstance(which, DeadFilter):
            return [record for record in dead.values() if _fits(record, which)]
        for job_id in which:
            if job_id not in dead:
                raise JobNotFound(job_id)
        return [dead[job_id] for job_id in dict.fromkeys(which)]

    def _queue(self) -> Queue:
        self._home.check()
        queue = self._queues.get(self._name)
        if queue is None:
            raise QueueNotFound(self._name)
        return queue

    def _dead(self) -> dict[JobId, DeadRecord]:
        return self._queue().dead


def _fits(record: DeadRecord, where: DeadFilter) -> bool:
    return where.reason in (None, record.reason) and (where.since is None or record.died_at >= where.since)
