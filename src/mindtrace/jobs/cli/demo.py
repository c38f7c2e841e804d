"""`mindtrace-jobs demo`: the README's program."""

import argparse
import asyncio

from mindtrace.jobs.cli.parser import Parser
from mindtrace.jobs.cli.settings import Settings, broker_is


def add(parser: Parser) -> None:
    """It has no options of its own."""


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Run it, and say what to try next."""
    from mindtrace.jobs.cli import quickstart

    print("backend    local: in this process, nothing to install or to start")
    with broker_is("local://"):  # a first job, and no job of somebody's real queue
        asyncio.run(quickstart.main())
    print("next       python3 noxfile.py    # run all tests, against a real Redis and a real RabbitMQ of their own")
    return 0
