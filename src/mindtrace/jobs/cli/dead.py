"""`mindtrace-jobs dead`: look at dead letters, put them back, or forget them."""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mindtrace.jobs.cli.errors import FAILED, FINE, CommandError, UsageError
from mindtrace.jobs.cli.output import Progress, confirm, counted, document, say, table
from mindtrace.jobs.cli.parser import Parser, argument
from mindtrace.jobs.cli.reach import Reach, on_broker, take_broker
from mindtrace.jobs.cli.records import GROUP_HEADER, HEADER, Group, Letter
from mindtrace.jobs.cli.selection import Selection, take_filter, those_of
from mindtrace.jobs.cli.settings import JSON, Settings, whole
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.errors import BackendUnavailable, JobNotFound
from mindtrace.jobs.job import JobId

_MOST = 1_000_000


def add(parser: Parser) -> None:
    """Declare the commands below."""
    lists = parser.command("list", "list dead letters: queue by queue, newest first")
    shows = parser.command("show", "show one dead letter in full")
    replays = parser.command("replay", "put jobs back, under their ids and with their counters at 0")
    purges = parser.command("purge", "forget dead letters, for good")
    count = argument(whole(1, _MOST))
    for below in (lists, shows, replays, purges):
        take_broker(below)
        below.take(JSON)
    for below in (lists, replays, purges):
        take_filter(below)
    lists.add_argument("--group", action="store_true", help="count those that died of the same")
    lists.add_argument("--limit", type=count, default=100, metavar="N", help="so many at the most (100)")
    lists.add_argument("--cursor", help="where the page before this one ended, as it said")
    shows.add_argument("id", metavar="ID", help="of the job")
    shows.add_argument("-q", "--queue", action="append", default=[], metavar="QUEUE", help="where to look (all)")
    shows.add_argument("--payload", action="store_true", help="its input, too")
    for below, verb in ((replays, "put back"), (purges, "forget")):
        below.add_argument("ids", nargs="*", metavar="ID", help=f"{verb} these")
        below.add_argument("--all", action="store_true", help=f"{verb} all there are")
        below.add_argument(
            "--limit", type=count, metavar="N", help="so many at the most, the oldest of each queue first"
        )
    replays.add_argument("--rate", type=argument(_rate), metavar="N", help="so many a second at the most: 50, or 50/s")
    purges.add_argument("--yes", action="store_true", help="ask nobody")


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Do one of them."""
    if parsed.action == "show":
        return on_broker(settings, lambda reach: _show(reach, parsed, settings))
    selection = Selection.of(parsed)
    if parsed.action == "list":
        work = _groups if parsed.group else _list
        return on_broker(settings, lambda reach: work(reach, selection, parsed, settings))
    if parsed.all and (selection.ids or selection.where):
        raise UsageError("--all leaves nothing to choose: leave it out, or the rest")
    if not (parsed.all or selection.ids or selection.where):
        raise UsageError("which? Give ids, --all, or a filter: --reason, --schema, --since")
    if selection.ids and parsed.limit is not None:
        raise UsageError("--limit is for --all and for filters: of ids, give as many as are meant")
    return on_broker(settings, lambda reach: _Moving(parsed.action, selection, parsed, settings).go(reach))


async def _list(reach: Reach, selection: Selection, parsed: argparse.Namespace, settings: Settings) -> int:
    letters: list[Letter] = []
    queues, cursor = _from_cursor(await reach.queues(selection.queues), parsed.cursor)
    following: str | None = None
    for number, queue in enumerate(queues):
        while len(letters) < parsed.limit:
            left = parsed.limit - len(letters)
            page = await reach.jobs.dead_letters(queue).list(limit=left, cursor=cursor, **selection.where)
            letters += [Letter.of(record) for record in page.records]
            cursor = page.cursor
            if cursor is None:
                break
        if len(letters) >= parsed.limit:
            if cursor is not None:
                following = f"{queue}:{cursor}"
            elif number + 1 < len(queues):
                following = f"{queues[number + 1]}:"
            break
    if settings[JSON]:
        records = [letter.values(payload=False, errors=False) for letter in letters]
        document({"records": records, "cursor": following})
        return FINE
    table(HEADER, [letter.row() for letter in letters])
    if following is not None:
        say(f"there may be more: --cursor {following}")
    return FINE


def _from_cursor(queues: list[str], cursor: str | None) -> tuple[list[str], str | None]:
    """The queues from there on, and where to begin in the first of them."""
    if cursor is None:
        return queues, None
    queue, separator, rest = cursor.partition(":")
    if not separator or queue not in queues:
        raise UsageError(f"--cursor {cursor!r}: as the page before it said, and for the same queues")
    return queues[queues.index(queue) :], rest or None


async def _groups(reach: Reach, selection: Selection, parsed: argparse.Namespace, settings: Settings) -> int:
    if parsed.cursor is not None:
        raise UsageError("--cursor is for pages: --group counts all there are")
    groups: dict[tuple[object, ...], Group] = {}
    with Progress("read", unit="dead letters") as progress:
        async for record in selection.records(reach):
            letter = Letter.of(record)
            groups.setdefault(Group.key(letter), Group(letter)).add(letter)
            progress.add()
    ordered = sorted(groups.values(), key=lambda group: group.order, reverse=True)
    shown = ordered[: parsed.limit]
    if settings[JSON]:
        document([group.values() for group in shown])
    else:
        table(GROUP_HEADER, [group.row() for group in shown])
    if len(shown) < len(ordered):
        say(f"{counted(len(ordered) - len(shown), 'more group')}: --limit {len(ordered)}")
    return FINE


async def _show(reach: Reach, parsed: argparse.Namespace, settings: Settings) -> int:
    for queue in await reach.queues(parsed.queue):
        try:
            letter = Letter.of(await reach.jobs.dead_letters(queue).get(parsed.id))
        except JobNotFound:
            continue
        if settings[JSON]:
            document(letter.values(payload=parsed.payload, errors=True))
        else:
            letter.print(payload=parsed.payload)
        return FINE
    raise CommandError(f"no job {parsed.id!r} is dead here")


@dataclass(slots=True)
class _Moving:
    """One replay or purge, over several queues; interrupted, it says how far it came."""

    verb: Literal["replay", "purge"]
    selection: Selection
    parsed: argparse.Namespace
    settings: Settings
    done: int = 0
    missing: list[JobId] = field(default_factory=list[JobId])
    _progress: Progress | None = None

    @property
    def _past(self) -> str:
        return "put back" if self.verb == "replay" else "forgotten"

    async def go(self, reach: Reach) -> int:
        """Returns 1 if an id is not there."""
        queues = await reach.queues(self.selection.queues)
        await self._confirm(queues)
        self.missing = list(self.selection.ids)
        try:
            for queue in queues:
                if self.parsed.limit is None or self.done < self.parsed.limit:
                    await self._move(queue, reach.jobs.dead_letters(queue))
        except (asyncio.CancelledError, BackendUnavailable):
            done = self.done + (0 if self._progress is None else self._progress.done)
            rest = "" if self.parsed.limit is None else f", with --limit {max(1, self.parsed.limit - done)}"
            say(f"{counted(done, 'job')} {self._past}, or a few more. To go on: the same command again{rest}")
            raise
        for job_id in self.missing:
            say(f"no job {job_id!r} is dead here")
        if self.settings[JSON]:
            document({"jobs": self.done, "missing": self.missing})
        else:
            print(f"{counted(self.done, 'job')} {self._past}")
        return FAILED if self.missing else FINE

    async def _move(self, queue: str, letters: AsyncDeadLetters) -> None:
        options: dict[str, Any] = {"limit": None if self.parsed.limit is None else self.parsed.limit - self.done}
        if self.verb == "replay":
            options["rate"] = self.parsed.rate
        call = letters.replay if self.verb == "replay" else letters.purge
        with Progress(f"{self.verb} {queue}") as self._progress:
            while True:
                ids = await those_of(letters, self.missing) if self.selection.ids else None
                if ids == []:
                    break
                try:
                    self.done += await call(ids, **self.selection.where, **options, progress=self._progress.reached)
                except JobNotFound:  # somebody else has moved one meanwhile
                    continue
                self.missing = [job_id for job_id in self.missing if job_id not in (ids or ())]
                break
        self._progress = None

    async def _confirm(self, queues: Sequence[str]) -> None:
        if self.verb != "purge" or not queues:
            return
        which = "All dead letters" if self.parsed.all else "These dead letters"
        name = queues[0] if len(queues) == 1 else "purge"
        await confirm(f"{which} of {', '.join(queues)} will be gone for good.", name, is_sure=self.parsed.yes)


def _rate(text: str) -> float:
    try:
        rate = float(text.removesuffix("/s"))
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError("jobs a second, above 0, such as 50 or 50/s")
    return rate
