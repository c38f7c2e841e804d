"""`AsyncDeadLetters`: the dead letters of one queue as people ask for them, by id, reason, schema and time."""

from collections.abc import Sequence
from datetime import datetime

from mindtrace.jobs.backend import DeadLetters, Progress
from mindtrace.jobs.delivery import DeadFilter, DeadPage, DeadReason, DeadRecord
from mindtrace.jobs.errors import ConfigError, Refused
from mindtrace.jobs.job import JobId
from mindtrace.jobs.retry import is_whole
from mindtrace.jobs.wire import PAYLOAD_LIMIT_MOST, Envelope, decode


class AsyncDeadLetters:
    """The dead letters of one queue. They are kept until replayed or purged; looking changes nothing.

    In every call `schema`, `reason` and `since` (an aware datetime) narrow down which; all that are given hold.
    """

    def __init__(self, letters: DeadLetters) -> None:
        self._letters = letters

    async def list(
        self,
        *,
        limit: int = 100,
        cursor: str | None = None,
        schema: str | None = None,
        reason: DeadReason | None = None,
        since: datetime | None = None,
    ) -> DeadPage:
        """A page, newest first. With `schema` a page may hold fewer than `limit` and still have a `cursor`."""
        page = await self._letters.list(_where(reason, since), limit=limit, cursor=cursor)
        if schema is None:
            return page
        return DeadPage([record for record in page.records if schema_of(record) == schema], page.cursor)

    async def get(self, job_id: JobId) -> DeadRecord:
        """One record. Raises `JobNotFound`."""
        return await self._letters.get(job_id)

    async def count(self) -> int:
        """How many there are."""
        return await self._letters.count()

    async def replay(
        self,
        ids: Sequence[JobId] | None = None,
        *,
        schema: str | None = None,
        reason: DeadReason | None = None,
        since: datetime | None = None,
        rate: float | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Put jobs back under their ids, at the back of their priority, with their counters at 0.

        Args:
            ids: these; None for all that the filter leaves.
            schema: see the class.
            reason: see the class.
            since: see the class.
            rate: at most so many jobs a second.
            limit: the oldest so many of what the filter leaves; of `ids` the first.
            progress: told how many are done, and of how many, after each step; on the loop of the call.

        Returns:
            how many were put back.

        Raises:
            JobNotFound: an id that is not there; nothing was put back.
        """
        which = await self._which(ids, schema, reason, since)
        return await self._letters.replay(which, rate=rate, limit=_limit(limit), progress=progress)

    async def purge(
        self,
        ids: Sequence[JobId] | None = None,
        *,
        schema: str | None = None,
        reason: DeadReason | None = None,
        since: datetime | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Forget them, for good. Arguments, result and errors as `replay`."""
        which = await self._which(ids, schema, reason, since)
        return await self._letters.purge(which, limit=_limit(limit), progress=progress)

    async def _which(
        self, ids: Sequence[JobId] | None, schema: str | None, reason: DeadReason | None, since: datetime | None
    ) -> Sequence[JobId] | DeadFilter:
        where = _where(reason, since)
        if ids is not None:
            if schema is not None or where != DeadFilter():
                raise ConfigError("ids and a filter both say which: give one of them")
            return [ids] if isinstance(ids, str) else ids
        if schema is None:
            return where
        chosen: list[JobId] = []
        cursor: str | None = None
        while True:
            page = await self._letters.list(where, limit=500, cursor=cursor)
            chosen += [record.message.id for record in page.records if schema_of(record) == schema]
            if page.cursor is None:
                return chosen[::-1]  # oldest first, as a filter of the backend's gives them
            cursor = page.cursor


def schema_of(record: DeadRecord) -> str | None:
    """The name of the job's schema; None where its bytes cannot be read."""
    try:
        envelope = decode(record.message.body, PAYLOAD_LIMIT_MOST)
    except Refused:
        return None
    return envelope.schema_name if isinstance(envelope, Envelope) else None


def _limit(limit: int | None) -> int | None:
    if limit is not None and (not is_whole(limit) or limit < 1):
        raise ConfigError(f"limit={limit!r}: a whole number from 1 on")
    return limit


def _where(reason: DeadReason | None, since: datetime | None) -> DeadFilter:
    if since is not None and since.tzinfo is None:
        raise ConfigError(f"since={since!r}: an aware datetime")
    return DeadFilter(reason, since)
