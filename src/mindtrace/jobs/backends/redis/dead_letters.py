"""The dead letters of a queue on Redis."""

import asyncio
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast, get_args

from mindtrace.jobs.backend import BATCH, DeadLetters, Progress
from mindtrace.jobs.backends.redis.failures import errors_of
from mindtrace.jobs.backends.redis.keys import QueueKeys
from mindtrace.jobs.backends.redis.scripts import Letters, Scripts, text_of
from mindtrace.jobs.delivery import DeadFilter, DeadPage, DeadReason, DeadRecord
from mindtrace.jobs.errors import ConfigError, JobNotFound
from mindtrace.jobs.job import JobId
from mindtrace.jobs.retry import is_seconds, is_whole
from mindtrace.jobs.wire import Message

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBERS = re.compile(rb"(-?\d{1,19} ){7}-?\d{1,19}")
_ODD = "odd:"  # before the order of an entry that somebody else wrote, and that is no whole number
_ORDER = re.compile(r"\d+|odd:[+-]?(\d+(\.\d+)?(e[+-]?\d+)?|inf)")
_DIED = re.compile(r"\d{1,14}")
_PAGE = 100  # records with their bodies in one reply


class RedisDeadLetters(DeadLetters):
    """See `DeadLetters`.

    Args:
        opened: gives the scripts, if the backend is open and in this loop.
        keys: of the queue.
    """

    def __init__(self, opened: Callable[[], Scripts], keys: QueueKeys) -> None:
        self._opened, self._keys, self._queue = opened, keys, keys.queue

    async def list(self, where: DeadFilter, *, limit: int = 100, cursor: str | None = None) -> DeadPage:
        """A page, newest first."""
        if not is_whole(limit) or limit < 1:
            raise ConfigError(f"limit={limit!r}: a whole number from 1 on")
        if cursor is not None and not _ORDER.fullmatch(cursor):
            raise ConfigError(f"cursor={cursor!r}: the cursor of an earlier page")
        found: Letters = []
        before = "all" if cursor is None else cursor.removeprefix(_ODD)
        while before and len(found) <= limit:  # one more than asked for tells whether there are more
            before, some = await self._look(before, min(_PAGE, limit + 1 - len(found)), where)
            found += some
        records = [self._record(values) for values in found[:limit]]
        return DeadPage(records, _cursor(found[limit - 1][0].decode()) if len(found) > limit else None)

    async def get(self, job_id: JobId) -> DeadRecord:
        """One record."""
        values = await self._opened().dead_get(self._keys, self._queue, job_id)
        if values is None:
            raise JobNotFound(job_id)
        return self._record(values)

    async def count(self) -> int:
        """How many there are."""
        return (await self._opened().depth(self._keys, self._queue))[3]

    async def replay(
        self,
        which: Sequence[JobId] | DeadFilter,
        *,
        rate: float | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Put jobs back under their ids; up to 500 in one step, and one at a time with a `rate`."""
        if rate is not None and not (is_seconds(rate) and rate > 0):
            raise ConfigError(f"rate={rate!r}: jobs a second, above 0")
        job_ids = (await self._chosen(which))[:limit]
        together = BATCH if rate is None else 1
        count = 0
        for start in range(0, len(job_ids), together):
            if rate is not None and start:
                await asyncio.sleep(1 / rate)
            count += await self._opened().replay(self._keys, self._queue, job_ids[start : start + together])
            if progress is not None:
                progress(min(start + together, len(job_ids)), len(job_ids))
        return count

    async def purge(
        self, which: Sequence[JobId] | DeadFilter, *, limit: int | None = None, progress: Progress | None = None
    ) -> int:
        """Forget them."""
        job_ids = (await self._chosen(which))[:limit]
        count = 0
        for start in range(0, len(job_ids), BATCH):
            count += await self._opened().purge(self._keys, self._queue, job_ids[start : start + BATCH])
            if progress is not None:
                progress(min(start + BATCH, len(job_ids)), len(job_ids))
        return count

    async def _chosen(self, which: Sequence[JobId] | DeadFilter) -> Sequence[JobId]:
        """The ids, oldest first for a filter. Raises JobNotFound for one that is not dead."""
        if isinstance(which, DeadFilter):
            job_ids: Sequence[JobId] = ()
            before = "all"
            while before:
                before, found = await self._look(before, BATCH, which)
                job_ids = (*job_ids, *(text_of(values[1]) for values in found))
            return job_ids[::-1]
        wanted = tuple(dict.fromkeys(which))
        missing = await self._opened().dead_missing(self._keys, self._queue, wanted)
        if missing is not None:
            raise JobNotFound(missing)
        return wanted

    async def _look(self, before: str, limit: int, where: DeadFilter) -> tuple[str, Letters]:
        since = -1
        if where.since is not None:
            since = max(0, -((_EPOCH - where.since) // timedelta(milliseconds=1)))
        return await self._opened().dead_list(self._keys, self._queue, before, limit, where.reason or "", since)

    def _record(self, values: Sequence[bytes]) -> DeadRecord:
        _, job_id, death, numbers, body, errors = values
        died, _, reason = death.decode("ascii", "replace").partition(" ")
        counts = [int(number) for number in numbers.split()] if _NUMBERS.fullmatch(numbers) else [0] * 7 + [-1]
        attempts, crashes, releases, number, replays, priority, _, crash_limit = counts
        message = Message(text_of(job_id), body, priority, 0.0, None, None if crash_limit < 0 else crash_limit)
        return DeadRecord(
            self._queue,
            message,
            _reason(reason),
            attempts,
            crashes,
            releases,
            number,
            _EPOCH + timedelta(milliseconds=int(died) if _DIED.fullmatch(died) else 0),
            errors_of(errors),
            replays,
        )


def _reason(word: str) -> DeadReason:
    known: Any = get_args(DeadReason)
    return cast("DeadReason", word) if word in known else "malformed"


def _cursor(order: str) -> str:
    return order if order.isdigit() else _ODD + order
