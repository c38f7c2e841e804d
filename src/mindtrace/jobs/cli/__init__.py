"""The command line, `mindtrace-jobs`."""

import argparse
import asyncio
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 fine, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="mindtrace-jobs", description="An asyncio-native job queue.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="publish a first job, see it fail once, be retried and succeed")
    parser.parse_args(arguments)
    return demo()


def demo() -> int:
    """Run the README's program, and say what to try next."""
    from mindtrace.jobs.cli import quickstart

    print("backend    local: in this process, nothing to install or to start")
    asyncio.run(quickstart.main())
    print("next       python3 noxfile.py    # run all tests, against a real Redis and a real RabbitMQ of their own")
    return 0
