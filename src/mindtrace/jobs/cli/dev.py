"""`mindtrace-jobs dev`: a private Redis and a private RabbitMQ, for as long as it runs."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import FrameType
from typing import Final

from mindtrace.jobs.cli.errors import NO_BROKER, CommandError, Stopped
from mindtrace.jobs.cli.output import json_line, say
from mindtrace.jobs.cli.parser import Parser, argument
from mindtrace.jobs.cli.settings import JSON, Settings, word
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import Broker, BrokerUnavailable, Machine

_START: Final[Mapping[str, tuple[str, Callable[..., Broker]]]] = {
    "redis": ("REDIS_URL", brokers.redis),
    "rabbitmq": ("AMQP_URL", brokers.rabbitmq),
}
_OTHERS = ("REDIS_URL", "AMQP_URL", "RABBITMQ_URL")  # name a server of somebody else's


class NoBroker(CommandError):
    """None could be had."""

    status = NO_BROKER


def add(parser: Parser) -> None:
    """Declare the arguments."""
    parser.take(JSON)
    kind = argument(word(*_START))
    parser.add_argument(
        "brokers", nargs="*", type=kind, metavar="redis|rabbitmq", help="which (both, unless one is named)"
    )


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Start them, print how to export their URLs, and stop them at Ctrl-C or SIGTERM."""
    kinds = list(dict.fromkeys(parsed.brokers)) or list(_START)
    machine = Machine(environ={name: value for name, value in os.environ.items() if name not in _OTHERS})
    # Both, since a shell has what it starts behind itself ignore SIGINT.
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminated}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    is_up = False
    try:
        with ExitStack() as stack:
            urls: dict[str, str] = {}
            for kind in kinds:
                variable, start = _START[kind]
                urls[variable] = stack.enter_context(start(machine=machine, say=say)).url
            if len(kinds) == 1:  # what connect() looks at, if there is only one to choose
                urls["MINDTRACE_JOBS_URL"] = next(iter(urls.values()))
            is_up = True
            say("running until Ctrl-C; nothing of it is kept")
            if settings[JSON]:
                json_line(urls)
            else:
                for variable, url in urls.items():
                    print(f"export {variable}={url}")
            sys.stdout.flush()
            while True:  # one that came just before a wait without end would be seen after it
                time.sleep(1.0)
    except (KeyboardInterrupt, Stopped):
        if not is_up:
            raise
        return 0  # how one ends it
    except BrokerUnavailable as error:
        raise NoBroker(str(error)) from error
    finally:
        for number, handler in before.items():
            if handler is not None:  # else it is none of Python's, which cannot put it back
                signal.signal(number, handler)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
