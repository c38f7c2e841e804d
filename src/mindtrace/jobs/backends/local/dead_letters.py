"""The dead letters of a local queue."""

from collections.abc import Iterable, Mapping, Sequence

from mindtrace.jobs.backend import DeadLetters, Home
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
        try:
            skip = int(cursor or 0)
        except ValueError as error:
            raise ConfigError(f"cursor={cursor!r}: the cursor of an earlier page") from error
        dead = self._dead()
        newest_first = list(reversed(_matching(dead.values(), where)))
        end = skip + limit
        return DeadPage(newest_first[skip:end], str(end) if end < len(newest_first) else None)

    async def get(self, job_id: JobId) -> DeadRecord:
        """One record."""
        return self._chosen([job_id])[0]

    async def count(self) -> int:
        """How many there are."""
        return len(self._dead())

    async def replay(self, which: Sequence[JobId] | DeadFilter, *, rate: float | None = None) -> int:
        """Put jobs back under their ids."""
        if rate is not None and not (is_seconds(rate) and rate > 0):
            raise ConfigError(f"rate={rate!r}: jobs a second, above 0")
        count = 0
        for record in self._chosen(which):
            if rate is not None and count:
                await self._clock.until(self._clock.now() + 1 / rate)
            queue = self._queue()
            if queue.dead.get(record.message.id) is record:  # not replayed or purged by another meanwhile
                queue.replay(record)
                count += 1
        return count

    async def purge(self, which: Sequence[JobId] | DeadFilter) -> int:
        """Forget them."""
        records = self._chosen(which)
        dead = self._dead()
        for record in records:
            del dead[record.message.id]
        return len(records)

    def _chosen(self, which: Sequence[JobId] | DeadFilter) -> Sequence[DeadRecord]:
        dead = self._dead()
        if isinstance(which, DeadFilter):
            return _matching(dead.values(), which)
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


def _matching(records: Iterable[DeadRecord], where: DeadFilter) -> list[DeadRecord]:
    return [
        record
        for record in records
        if (where.reason is None or record.reason == where.reason)
        and (where.since is None or record.died_at >= where.since)
    ]
