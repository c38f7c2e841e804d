"""The dead letters of a queue on RabbitMQ: a queue of their own, read by taking all and giving back what stays.

While somebody reads, what is read is not in the queue: another process that counts at that moment counts fewer.
"""

import asyncio
import heapq
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

from pamqp import commands

from mindtrace.jobs.backend import DeadLetters, Progress
from mindtrace.jobs.backends.rabbitmq.admin import Admin
from mindtrace.jobs.backends.rabbitmq.channels import Channel, Content
from mindtrace.jobs.backends.rabbitmq.counts import counts_of, death_of, dicts_of, errors_of, headers_of, id_of
from mindtrace.jobs.backends.rabbitmq.lane import Lane
from mindtrace.jobs.backends.rabbitmq.outbox import REFUSED, Outbox, Posting
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS, Topology
from mindtrace.jobs.delivery import DeadFilter, DeadPage, DeadReason, DeadRecord
from mindtrace.jobs.errors import (
    AuthenticationFailed,
    BackendUnavailable,
    ConfigError,
    JobNotFound,
    JobsError,
    QueueNotFound,
)
from mindtrace.jobs.job import JobId, is_job_id
from mindtrace.jobs.retry import is_seconds, is_whole
from mindtrace.jobs.wire import Message

_Letters: TypeAlias = "list[_Letter]"
_TOGETHER = 100
_STORE_WITHIN = 10.0
_BACK_WITHIN = 1.0
_A_MOMENT = 0.002
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(slots=True)
class _Letter:
    tag: int
    record: DeadRecord
    headers: Any

    @property
    def order(self) -> tuple[int, JobId]:
        """By death."""
        return (self.record.died_at - _EPOCH) // _MICROSECOND, self.record.message.id


@dataclass(slots=True)
class _Reading:
    lane: Lane
    taken: int = 0  # and not acknowledged


@dataclass(slots=True)
class Opened:
    """What an open backend lends: who looks, who stores, and whose turn it is to read."""

    admin: Admin
    outbox: Outbox
    reading: asyncio.Lock


class RabbitMQDeadLetters(DeadLetters):
    """See `DeadLetters`.

    Args:
        opened: gives what is open, if the backend is and in this loop.
        topology: the names.
        queue: whose they are.
    """

    def __init__(self, opened: Callable[[], Opened], topology: Topology, queue: str) -> None:
        self._opened, self._topology, self._queue = opened, topology, queue
        self._dead = topology.dead(queue)

    async def list(self, where: DeadFilter, *, limit: int = 100, cursor: str | None = None) -> DeadPage:
        """A page, newest first."""
        if not is_whole(limit) or limit < 1:
            raise ConfigError(f"limit={limit!r}: a whole number from 1 on")
        before = None if cursor is None else _order_of(cursor)
        newest: list[tuple[tuple[int, JobId], int, _Letter]] = []
        async with self._reading() as reading:
            async for letter in self._letters(reading):
                if _fits(letter.record, where) and (before is None or letter.order < before):
                    heapq.heappush(newest, (letter.order, letter.tag, letter))
                    if len(newest) > limit + 1:
                        heapq.heappop(newest)
        found = [letter for *_, letter in sorted(newest, reverse=True)]
        more = len(found) > limit
        return DeadPage([letter.record for letter in found[:limit]], _cursor(found[limit - 1]) if more else None)

    async def get(self, job_id: JobId) -> DeadRecord:
        """One record."""
        async with self._reading() as reading:
            found = [letter.record async for letter in self._letters(reading) if letter.record.message.id == job_id]
        if not found:
            raise JobNotFound(job_id)
        return found[-1]

    async def count(self) -> int:
        """How many there are."""
        opened = self._opened()
        async with opened.reading:
            kept = await opened.admin.look(self._dead)
        if kept is None:
            raise QueueNotFound(self._queue)
        return kept.messages

    async def replay(
        self,
        which: Sequence[JobId] | DeadFilter,
        *,
        rate: float | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Put jobs back: stored and confirmed, then taken from the dead letters. A crash between doubles some."""
        if rate is not None and not (is_seconds(rate) and rate > 0):
            raise ConfigError(f"rate={rate!r}: jobs a second, above 0")
        count = 0
        async with self._reading() as reading:
            chosen = (await self._chosen(reading, which))[:limit]
            together = _TOGETHER if rate is None else 1
            for start in range(0, len(chosen), together):
                if rate is not None and start:
                    await asyncio.sleep(1 / rate)
                some = chosen[start : start + together]
                await self._store(some)
                await self._acknowledge(reading, some)
                count += len(some)
                if progress is not None:
                    progress(count, len(chosen))
        return count

    async def purge(
        self, which: Sequence[JobId] | DeadFilter, *, limit: int | None = None, progress: Progress | None = None
    ) -> int:
        """Forget them."""
        async with self._reading() as reading:
            chosen = (await self._chosen(reading, which))[:limit]
            await self._acknowledge(reading, chosen)
            if progress is not None:
                progress(len(chosen), len(chosen))
        return len(chosen)

    async def _chosen(self, reading: "_Reading", which: Sequence[JobId] | DeadFilter) -> _Letters:
        """Oldest first for a filter. Raises JobNotFound for an id that is not dead."""
        if isinstance(which, DeadFilter):
            found = [letter async for letter in self._letters(reading) if _fits(letter.record, which)]
            return sorted(found, key=lambda letter: letter.order)
        wanted: dict[JobId, _Letters] = {job_id: [] for job_id in which}
        async for letter in self._letters(reading):
            if letter.record.message.id in wanted:
                wanted[letter.record.message.id].append(letter)
        for job_id, letters in wanted.items():
            if not letters:
                raise JobNotFound(job_id)
        return [letter for letters in wanted.values() for letter in letters]

    async def _store(self, letters: Sequence[_Letter]) -> None:
        opened = self._opened()
        deadline = time.monotonic() + _STORE_WITHIN
        postings = [self._posting(letter) for letter in letters]
        outcomes = await opened.outbox.put(postings, deadline)
        for letter, outcome in zip(letters, outcomes, strict=True):
            if outcome == "unroutable":
                raise QueueNotFound(letter.record.queue)
            if outcome == "refused":
                raise BackendUnavailable(f"RabbitMQ did not take the job: {REFUSED}")
            if isinstance(outcome, JobsError):
                raise outcome

    def _posting(self, letter: _Letter) -> Posting:
        record = letter.record
        headers = headers_of(record.message.id, counts_of(letter.headers).replayed(), record.errors)
        return Posting("", self._topology.queue(record.queue), headers, record.message.body, record.message.priority)

    @asynccontextmanager
    async def _reading(self) -> AsyncGenerator["_Reading", None]:
        """A channel to read on; closed, everything on it that was not acknowledged is back."""
        opened = self._opened()
        async with opened.reading:
            if await opened.admin.look(self._dead) is None:
                raise QueueNotFound(self._queue)
            mark = await self._mark(opened.admin)
            try:
                async with self._on_a_channel(opened) as reading:
                    yield reading
            finally:
                if mark is not None:
                    await opened.admin.end_reading(mark)

    async def _mark(self, admin: Admin) -> Channel | None:
        """What is read is in no queue: whoever would delete it has to know."""
        try:
            return await admin.begin_to_read(self._queue)
        except AuthenticationFailed:  # this user may read, and declare nothing
            return None

    @asynccontextmanager
    async def _on_a_channel(self, opened: Opened) -> AsyncGenerator["_Reading", None]:
        reading = _Reading(Lane(await opened.admin.channel()))
        try:
            yield reading
        finally:
            await asyncio.wait({reading.lane.channel.begin_close()}, timeout=_BACK_WITHIN)
            # The queue has them back a moment later: who counts next would count too few.
            until = time.monotonic() + _BACK_WITHIN
            while reading.taken and time.monotonic() < until:
                kept = await opened.admin.look(self._dead)
                if kept is None or kept.messages >= reading.taken:
                    break
                await asyncio.sleep(_A_MOMENT)

    async def _letters(self, reading: "_Reading") -> AsyncIterator[_Letter]:
        """All there are."""
        frame = commands.Basic.Get(queue=self._dead)
        while True:
            replies = [reading.lane.channel.begin(frame) for _ in range(_TOGETHER)]
            last = False
            for reply in replies:
                content = await reading.lane.channel.reply(reply)
                if isinstance(content, Content):
                    reading.taken += 1
                    reading.lane.add(content.frame.delivery_tag)
                    yield self._letter(content)
                else:
                    last = True
            if last:
                return

    async def _acknowledge(self, reading: "_Reading", letters: Sequence[_Letter]) -> None:
        """They are gone from the queue when this returns."""
        for start in range(0, len(letters), _TOGETHER):
            reading.lane.acknowledge(letter.tag for letter in letters[start : start + _TOGETHER])
            if await reading.lane.flush(self._dead) is not None:
                reading.taken += 1
        reading.taken -= len(letters)

    def _letter(self, content: Content) -> _Letter:
        properties = content.properties
        headers, job_id = properties.headers, id_of(properties, content.body)
        counts, priority = counts_of(headers), properties.priority or 0
        died_at, reason = death_of(headers) or _broker_said(headers)
        message = Message(job_id, content.body, priority, 0.0, None, counts.crash_limit)
        queue = self._queue
        digits = (content.frame.routing_key or "").split(".", LEVELS)
        if len(digits) == LEVELS + 1 and set(digits[:LEVELS]) <= {"0", "1"}:  # due for a queue that is gone
            queue = digits[LEVELS]
        record = DeadRecord(
            queue,
            message,
            reason,
            counts.attempts,
            counts.crashes,
            counts.releases,
            counts.number,
            died_at,
            errors_of(headers),
            counts.replays,
        )
        return _Letter(content.frame.delivery_tag, record, headers)


def _broker_said(headers: Any) -> tuple[datetime, DeadReason]:
    """Of what no worker of ours put here."""
    deaths: Any = None if headers is None else headers.get("x-death")
    listed = dicts_of(deaths)
    if not listed:
        return _EPOCH, "malformed"
    newest = listed[0]
    died: Any = newest.get("time")
    died_at = died.astimezone(UTC) if isinstance(died, datetime) else _EPOCH
    return died_at, "delivery_limit" if newest.get("reason") == "delivery_limit" else "queue_gone"


def _fits(record: DeadRecord, where: DeadFilter) -> bool:
    return where.reason in (None, record.reason) and (where.since is None or record.died_at >= where.since)


def _cursor(letter: _Letter) -> str:
    died, job_id = letter.order
    return f"{died}/{job_id}"


def _order_of(cursor: str) -> tuple[int, JobId]:
    died, _, job_id = cursor.partition("/")
    if not (died.isascii() and died.isdigit() and len(died) <= 18 and is_job_id(job_id)):
        raise ConfigError(f"cursor={cursor!r}: the cursor of an earlier page")
    return int(died), job_id
