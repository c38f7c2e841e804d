"""Which dead letters a command means: of which queues, and by id, reason, schema and time."""

import argparse
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

from mindtrace.jobs.cli.errors import UsageError
from mindtrace.jobs.cli.parser import Parser, argument
from mindtrace.jobs.cli.reach import Reach
from mindtrace.jobs.cli.settings import seconds, word
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.delivery import DeadReason, DeadRecord
from mindtrace.jobs.errors import JobNotFound
from mindtrace.jobs.job import JobId

PAGE = 500
_FEW = 3
"""So many ids are looked up one by one; more are looked for among all."""


def instant(text: str) -> datetime:
    """Reads an ISO 8601 time with its offset."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ValueError("a time with its offset, such as 2030-01-31T08:00:00+01:00 or 2030-01-31T07:00Z")
    return at


def since(text: str) -> datetime:
    """Reads a time, or how long ago it was: `30m`."""
    try:
        return datetime.now(UTC) - timedelta(seconds=seconds()(text))
    except ValueError:
        pass
    except OverflowError:
        raise ValueError("no such time") from None
    try:
        return instant(text)
    except ValueError as error:
        raise ValueError(f"{error}; or how long ago, such as 30m, 2h or 7d") from None


def take_filter(parser: Parser) -> None:
    """Have the arguments that narrow down which."""
    parser.add_argument(
        "-q", "--queue", action="append", default=[], metavar="QUEUE", help="of this one; may be repeated"
    )
    parser.add_argument(
        "--reason", type=argument(word(*get_args(DeadReason))), metavar="REASON", help="dead for this reason"
    )
    parser.add_argument("--schema", metavar="SCHEMA", help="of this kind")
    parser.add_argument(
        "--since", type=argument(since), metavar="TIME", help="dead since then, or for so long: 30m, 2h"
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """Which, whatever the queue.

    Attributes:
        queues: those that are asked for; empty for all.
        ids: these; empty for all that the filter leaves.
        where: the filter, as `AsyncDeadLetters` takes it.
    """

    queues: tuple[str, ...]
    ids: tuple[JobId, ...]
    where: dict[str, Any]

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> "Selection":
        """What the arguments say.

        Raises:
            UsageError: ids and a filter both say which.
        """
        where = {name: value for name in ("reason", "schema", "since") if (value := getattr(parsed, name)) is not None}
        ids = tuple(dict.fromkeys(getattr(parsed, "ids", ())))
        if ids and where:
            raise UsageError(f"ids and --{next(iter(where))} both say which: give one of them")
        return cls(tuple(parsed.queue), ids, where)

    async def records(self, reach: Reach) -> AsyncGenerator[DeadRecord]:
        """All of them, queue by queue, newest first."""
        for queue in await reach.queues(self.queues):
            async for record in _all(reach.jobs.dead_letters(queue), self.where):
                yield record


async def _all(letters: AsyncDeadLetters, where: dict[str, Any]) -> AsyncGenerator[DeadRecord]:
    cursor: str | None = None
    while True:
        page = await letters.list(limit=PAGE, cursor=cursor, **where)
        for record in page.records:
            yield record
        cursor = page.cursor
        if cursor is None:
            return


async def those_of(letters: AsyncDeadLetters, ids: Sequence[JobId]) -> list[JobId]:
    """The ids that are dead in this queue, in their order."""
    found: set[JobId] = set()
    if len(ids) > _FEW:
        wanted = set(ids)
        async for record in _all(letters, {}):
            if record.message.id in wanted:
                found.add(record.message.id)
    else:
        for job_id in ids:
            with suppress(JobNotFound):
                found.add((await letters.get(job_id)).message.id)
    return [job_id for job_id in ids if job_id in found]
