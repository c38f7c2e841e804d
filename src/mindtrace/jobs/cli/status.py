"""`mindtrace-jobs status`: how many jobs each queue holds."""

import argparse
import asyncio

from mindtrace.jobs.backend import Depth
from mindtrace.jobs.cli.output import document, table
from mindtrace.jobs.cli.parser import Parser
from mindtrace.jobs.cli.reach import Reach, on_broker, take_broker
from mindtrace.jobs.cli.settings import JSON, Settings


def add(parser: Parser) -> None:
    """Declare the options."""
    take_broker(parser)
    parser.take(JSON)
    parser.add_argument("-q", "--queue", action="append", default=[], metavar="QUEUE", help="this one; may be repeated")


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Count and print."""

    async def count(reach: Reach) -> int:
        known = await reach.known(parsed.queue)
        names = [name for name, is_declared in known.items() if is_declared]
        depths = dict(zip(names, await asyncio.gather(*map(reach.jobs.depth, names)), strict=True))
        rows = [(name, *_counts(depths.get(name))) for name in known]
        if settings[JSON]:
            columns = ("queue", "ready", "scheduled", "leased", "dead")
            document([dict(zip(columns, row, strict=True)) for row in rows])
        else:
            table(("queue", "ready", "scheduled", "leased", "dead"), rows)
        return 0

    return on_broker(settings, count)


def _counts(depth: Depth | None) -> tuple[int | None, ...]:
    """None for each where there is no such queue yet."""
    return (None,) * 4 if depth is None else (depth.ready, depth.scheduled, depth.leased, depth.dead)
