"""`mindtrace-jobs queues`: list them, take out what waits, delete one."""

import argparse
from typing import Any

from mindtrace.jobs.backend import Depth, QueueSpec
from mindtrace.jobs.cli.errors import CommandError
from mindtrace.jobs.cli.output import confirm, counted, document, say, table
from mindtrace.jobs.cli.parser import Parser
from mindtrace.jobs.cli.reach import Reach, on_broker, take_broker
from mindtrace.jobs.cli.settings import JSON, Settings
from mindtrace.jobs.errors import QueueInUse


def add(parser: Parser) -> None:
    """Declare the commands below."""
    lists = parser.command("list", "list the queues, with what they are")
    cleans = parser.command("clean", "cancel all ready and scheduled jobs of a queue; leased and dead ones stay")
    deletes = parser.command("delete", "delete a queue with its ready and scheduled jobs")
    for below in (lists, cleans, deletes):
        take_broker(below)
        below.take(JSON)
    lists.add_argument("-q", "--queue", action="append", default=[], metavar="QUEUE", help="this one; may be repeated")
    for below in (cleans, deletes):
        below.add_argument("name", metavar="QUEUE", help="its name")
        below.add_argument("--yes", action="store_true", help="ask nobody")
    deletes.add_argument("--force", action="store_true", help="also with leased and dead jobs, which are lost then")


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Do one of them."""
    work = {"list": _list, "clean": _clean, "delete": _delete}[parsed.action]
    return on_broker(settings, lambda reach: work(reach, parsed, settings))


async def _list(reach: Reach, parsed: argparse.Namespace, settings: Settings) -> int:
    names = await reach.queues(parsed.queue)
    specs = {spec.name: spec for spec in await reach.jobs.queues()}
    for name in names:
        if name not in specs:
            await reach.jobs.depth(name)  # which says that there is none
    rows = [_row(name, specs.get(name)) for name in names]
    if settings[JSON]:
        document(rows)
    else:
        table(("queue", "kind", "priorities", "max length"), [tuple(row.values()) for row in rows])
    return 0


def _row(name: str, spec: QueueSpec | None) -> dict[str, Any]:
    if spec is None:  # there, but this process has not declared it, and the broker does not tell
        return {"queue": name, "kind": None, "priority_levels": None, "max_length": None}
    return {
        "queue": name,
        "kind": spec.kind,
        "priority_levels": spec.priority_levels,
        "max_length": spec.max_length,
    }


async def _clean(reach: Reach, parsed: argparse.Namespace, settings: Settings) -> int:
    depth = await reach.jobs.depth(parsed.name)
    waiting = f"{depth.ready:,} ready" + ("" if depth.scheduled is None else f" and {depth.scheduled:,} scheduled")
    await confirm(f"The {waiting} jobs of {parsed.name} will be gone for good.", parsed.name, is_sure=parsed.yes)
    count = await reach.jobs.clean(parsed.name)
    if depth.scheduled is None:
        say(f"{reach.jobs.backend.traits.name} does not reach delayed jobs: they come at their time")
    _done(settings, {"queue": parsed.name, "cancelled": count}, f"{counted(count, 'job')} of {parsed.name} cancelled")
    return 0


async def _delete(reach: Reach, parsed: argparse.Namespace, settings: Settings) -> int:
    depth = await reach.jobs.depth(parsed.name)
    await confirm(
        f"The queue {parsed.name} will be gone for good, with {_counted(depth, parsed.force)}.",
        parsed.name,
        is_sure=parsed.yes,
    )
    try:
        await reach.jobs.delete(parsed.name, force=parsed.force)
    except QueueInUse as error:
        raise CommandError(str(error).replace("force=True", "--force")) from error
    _done(settings, {"queue": parsed.name, "deleted": True}, f"queue {parsed.name} deleted")
    return 0


def _counted(depth: Depth, force: bool) -> str:
    counts = {"ready": depth.ready, "scheduled": depth.scheduled}
    if force:
        counts |= {"leased": depth.leased, "dead": depth.dead}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count is not None) + " jobs"


def _done(settings: Settings, values: dict[str, Any], text: str) -> None:
    if settings[JSON]:
        document(values)
    else:
        print(text)
