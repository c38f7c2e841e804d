"""The command line, `mindtrace-jobs`."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Final, Protocol

from mindtrace.jobs.cli import bench, config, dead, demo, dev, publish, queues, status, version, worker
from mindtrace.jobs.cli.errors import CommandError, Relayed, Stopped, Told, status_of
from mindtrace.jobs.cli.journal import say_record
from mindtrace.jobs.cli.output import say
from mindtrace.jobs.cli.parser import Parser
from mindtrace.jobs.cli.settings import VERBOSE, Settings
from mindtrace.jobs.errors import JobsError

_PROGRAM = "mindtrace-jobs"


class Command(Protocol):
    """A module of this package."""

    def add(self, parser: Parser) -> None:
        """Declare its options and arguments."""
        ...

    def run(self, parsed: argparse.Namespace, settings: Settings) -> int:
        """Do it. Returns the exit status; raises `CommandError`, `JobsError` or `KeyboardInterrupt`."""
        ...


COMMANDS: Final[Mapping[str, tuple[Command, str]]] = {
    "demo": (demo, "publish a first job, see it fail once, be retried and succeed"),
    "worker": (worker, "run an application's consumers until told to stop"),
    "publish": (publish, "hand in one job, or one for each line of stdin"),
    "status": (status, "count the jobs of each queue"),
    "queues": (queues, "list queues, clean or delete one"),
    "dead": (dead, "look at dead letters, put them back or forget them"),
    "bench": (bench, "measure how fast jobs go through a backend"),
    "dev": (dev, "run a private Redis and a private RabbitMQ until Ctrl-C"),
    "config": (config, "print each setting, and where it comes from"),
    "version": (version, "print the versions of this and of what it stands on"),
}


def main(arguments: Sequence[str] | None = None, *, no_worker: Callable[[], None] = lambda: None) -> int:
    """Run one command.

    Args:
        arguments: the words; those of this process, if none are given.
        no_worker: called before any command but `worker`.

    Returns:
        its exit status: 0 fine; 1 it ran, and found or caused failures; 2 wrong usage or configuration; 3 the
        application does not import, or an extra is missing; 4 no broker, or it refuses the login; 130 Ctrl-C, 143
        SIGTERM.
    """
    _open_what_is_closed()
    settings: Settings | None = None
    is_worker = False
    try:
        parser = _parser()
        parsed = parser.parse(arguments)
        is_worker = parsed.command == "worker"
        settings = Settings.of_here(vars(parsed), parser.options())
        if getattr(parsed, "supervised", None) is None:  # else it has been said for all
            _warn(settings.unknown_variables(), in_json=is_worker and _is_json(settings))
        settings.check(parsed.parser.options())
        if not is_worker:
            no_worker()
        command, _ = COMMANDS[parsed.command]
        status = command.run(parsed, settings)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its exit
        return 141
    except OSError as error:  # a full disk under our output, say
        say(f"{_PROGRAM}: {error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as left:  # --help and --version
        return left.code if isinstance(left.code, int) else 0
    except KeyboardInterrupt:
        with suppress(OSError, ValueError):
            _explain(Stopped(2), settings, in_json=is_worker and _is_json(settings))
        return 130
    except (CommandError, JobsError) as error:
        with suppress(OSError, ValueError):  # nobody reads stderr: the status tells it
            _explain(error, settings, in_json=is_worker and _is_json(settings))
        return status_of(error)
    else:
        return status


def _open_what_is_closed() -> None:
    """Whoever started us may have closed some: what is not said to stderr would be said to stdout."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (for as long as we are)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _parser() -> Parser:
    parser = Parser(prog=_PROGRAM, description="An asyncio-native job queue.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {metadata.version(_PROGRAM)}")
    for name, (command, help) in COMMANDS.items():
        command.add(parser.command(name, help, dest="command"))
    return parser


def _warn(text: str, *, in_json: bool) -> None:
    with suppress(OSError, ValueError):  # nobody reads stderr: no reason not to do it
        if text and in_json:
            say_record(text, logging.WARNING)
        elif text:
            say(f"{_PROGRAM}: warning: {text}")


def _explain(error: CommandError | JobsError, settings: Settings | None, *, in_json: bool) -> None:
    try:
        is_verbose = settings is not None and settings[VERBOSE] >= 2
    except CommandError:  # it is what is wrong
        is_verbose = False
    is_verbose = is_verbose and not isinstance(error, Stopped | Relayed)
    if isinstance(error, Told):
        if is_verbose and error.__cause__ is not None:
            say("".join(traceback.format_exception(error.__cause__)).rstrip())
    elif in_json:
        say_record(str(error), logging.ERROR, error if is_verbose else None)
    elif is_verbose:
        say("".join(traceback.format_exception(error)).rstrip())
    elif isinstance(error, Stopped):
        say(str(error))
    else:
        text = str(error)
        say(text if text.startswith(_PROGRAM) else f"{_PROGRAM}: {text}")


def _is_json(settings: Settings | None) -> bool:
    """Whether all that a worker says is JSON, and so has to be why it does not run."""
    try:
        return settings is not None and settings[worker.LOG_FORMAT] == "json"
    except CommandError:  # it is what is wrong
        return False
