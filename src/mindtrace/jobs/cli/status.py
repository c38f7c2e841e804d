"""`mindtrace-jobs status`: how many jobs each queue holds."""

import argparse
import asyncio

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
        names = await reach.queues(parsed.queue)
        depths = await asyncio.gather(*(reach.jobs.depth(name) for name in names))
        rows = [(name, d.ready, d.scheduled, d.leased, d.dead) for name, d in zip(names, depths, strict=True)]
        if settings[JSON]:
            columns = ("queue", "ready", "scheduled", "leased", "dead")
            document([dict(zip(columns, row, strict=True)) for row in rows])
        else:
            table(("queue", "ready", "scheduled", "leased", "dead"), rows)
        return 0

    return on_broker(settings, count)
