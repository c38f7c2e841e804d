"""The command line, `mindtrace-jobs`."""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from mindtrace.jobs.cli.bench import add_bench, run_bench
from mindtrace.jobs.errors import BackendUnavailable, ConfigError, JobsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        its exit status: 0 fine, 1 it ran and failed, 2 wrong usage, 4 no broker, 130 Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="mindtrace-jobs", description="An asyncio-native job queue.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="publish a first job, see it fail once, be retried and succeed")
    measures = commands.add_parser("bench", help="measure how fast jobs go through a backend")
    add_bench(measures)
    chosen = parser.parse_args(arguments)
    try:
        return demo() if chosen.command == "demo" else run_bench(measures, chosen)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except JobsError as error:
        print(f"{parser.prog} {chosen.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 4 if isinstance(error, BackendUnavailable) else 1


def demo() -> int:
    """Run the README's program, and say what to try next."""
    from mindtrace.jobs.cli import quickstart

    print("backend    local: in this process, nothing to install or to start")
    asyncio.run(quickstart.main())
    print("next       python3 noxfile.py    # run all tests, against a real Redis and a real RabbitMQ of their own")
    return 0
