"""`mindtrace-jobs worker`: run an application's consumers, in this process or in several, until told to stop."""

import argparse
import asyncio
import logging
import os
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Final, Literal, cast

from mindtrace.jobs.cli import leaving
from mindtrace.jobs.cli.errors import CommandError, MissingExtra, Told, UsageError, status_of
from mindtrace.jobs.cli.journal import Journal
from mindtrace.jobs.cli.parser import Parser
from mindtrace.jobs.cli.plan import Plan
from mindtrace.jobs.cli.settings import (
    APP,
    URL,
    VERBOSE,
    Option,
    Settings,
    broker_for_the_application,
    many,
    one,
    seconds,
    switch,
    whole,
    word,
)
from mindtrace.jobs.errors import JobsError
from mindtrace.jobs.job import checked_queue_name

_LEVELS: Final = ("debug", "info", "warning", "error")
_MOST = 1_000_000_000

QUEUE: Final = many(
    "queue", checked_queue_name, "run only the consumers of this queue; may be given several times", short="-q"
)
CONCURRENCY: Final[Option[int | None]] = one(
    "concurrency", whole(1, 10_000), None, "jobs run at once (the application's)", metavar="N", short="-c"
)
PROCESSES: Final[Option[int | None]] = one(
    "processes",
    whole(1, 1000),
    None,
    "run N worker processes under a supervisor; SIGHUP replaces them one by one",
    metavar="N",
)
BURST: Final = switch("burst", "run what is ready, then end")
MAX_JOBS: Final[Option[int | None]] = one(
    "max-jobs", whole(1, _MOST), None, "end after so many jobs; with --processes, be replaced", metavar="N"
)
MAX_MEMORY: Final[Option[int | None]] = one(
    "max-memory",
    whole(1, _MOST),
    None,
    "drain and end above so much resident memory; with --processes, be replaced",
    metavar="MIB",
)
DRAIN: Final[Option[float | None]] = one(
    "drain",
    seconds(),
    None,
    "what runs has this long to end after a first signal (the application's, 30 s)",
    metavar="SECONDS",
)
RELOAD: Final = switch("reload", "for development: start again when a source file below the current directory changes")
LOOP: Final = one(
    "loop",
    word("auto", "asyncio", "uvloop"),
    "asyncio",
    "auto: uvloop where it is installed",
    metavar="auto|asyncio|uvloop",
)
HEALTH_PORT: Final[Option[int | None]] = one(
    "health-port", whole(0, 65535), None, "serve /livez and /readyz there; 0 picks a free port", metavar="PORT"
)
HEALTH_HOST: Final = one(
    "health-host", str, "127.0.0.1", "the address to serve them on; 0.0.0.0 in a container", metavar="HOST"
)
LOG_FORMAT: Final = one("log-format", word("text", "json"), "text", "of what is said on stderr", metavar="text|json")
LOG_LEVEL: Final = one("log-level", word(*_LEVELS), "info", "the least that is logged", metavar="|".join(_LEVELS))

_PASSED_ON: Final[tuple[Option[Any], ...]] = (
    APP, QUEUE, CONCURRENCY, PROCESSES, BURST, MAX_JOBS, MAX_MEMORY, DRAIN, RELOAD, LOOP, LOG_FORMAT, LOG_LEVEL,
    VERBOSE,
)  # fmt: skip


def add(parser: Parser) -> None:
    """Declare its options."""
    parser.take(
        APP, URL, QUEUE, CONCURRENCY, PROCESSES, BURST, MAX_JOBS, MAX_MEMORY, DRAIN, RELOAD, LOOP,
        HEALTH_PORT, HEALTH_HOST, LOG_FORMAT, LOG_LEVEL,
    )  # fmt: skip
    parser.add_argument(
        "target", nargs="?", metavar="MODULE:OBJECT", help="a Worker, or a function that gives one; else --app"
    )
    parser.add_argument("--supervised", type=int, help=argparse.SUPPRESS)  # what a supervisor tells its processes


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Run it. Returns 0 if all runs ended by themselves, 1 if some were handed back."""
    target = parsed.target or settings[APP]
    if target is None:
        raise UsageError(
            'no application is named: give MODULE:OBJECT, or app = "module:object" in [tool.mindtrace-jobs] of'
            " pyproject.toml"
        )
    port, processes, is_child = settings[HEALTH_PORT], settings[PROCESSES], parsed.supervised is not None
    level = logging.getLevelNamesMapping()[settings[LOG_LEVEL].upper()]
    plan = Plan(
        target,
        processes,
        settings[QUEUE],
        settings[CONCURRENCY],
        settings[BURST],
        settings[MAX_JOBS],
        settings[MAX_MEMORY],
        settings[DRAIN],
        _loop(settings[LOOP]),
        None if port is None or is_child else (settings[HEALTH_HOST], port),
        Journal(settings[LOG_FORMAT], level, several=processes is not None),
        not settings.is_default(LOG_FORMAT),
        parsed.supervised,
    )
    if settings[RELOAD] and processes is not None and not is_child:
        raise UsageError("--reload and --processes: one process is what can be reloaded")
    try:
        with broker_for_the_application(settings):  # which the processes of a supervisor find in their environment
            if is_child:
                return _serve(plan)
            if settings[RELOAD]:
                return _reload(plan, _words(parsed, settings))
            return _serve(plan) if processes is None else _supervise(plan, _words(parsed, settings), processes)
    finally:
        leaving.forget_a_broken_stderr()


def _loop(wanted: str) -> Literal["asyncio", "uvloop"]:
    if wanted == "asyncio":
        return "asyncio"
    if find_spec("uvloop") is not None:
        return "uvloop"
    if wanted == "uvloop":
        raise MissingExtra("--loop uvloop", "uvloop")
    return "asyncio"


def _words(parsed: argparse.Namespace, settings: Settings) -> list[str]:
    """The command line of one process. What stands in the environment, or in pyproject.toml, it reads by itself."""
    words: list[str] = [] if parsed.target is None else [parsed.target]
    for option in _PASSED_ON:
        if (flag := getattr(parsed, option.key, None)) is None:
            continue
        match option.kind:
            case "switch":
                words.append(f"--{option.name}" if flag else f"--no-{option.name}")
            case "count":
                words += [f"--{option.name}"] * flag
            case "many":
                words += [f"--{option.name}={value}" for value in cast(list[str], flag)]
            case "one":
                words.append(f"--{option.name}={flag}")
    return words


def _serve(plan: Plan) -> int:
    from mindtrace.jobs.cli.serving import Serving

    end, serving, status = leaving.Exit(), Serving(plan), 1
    try:
        status = serving.run()
    except (CommandError, JobsError) as error:
        status = status_of(error)
        if serving.has_told(error):
            raise Told(status) from error
        raise
    finally:
        end.with_status(status)
    return status


def _supervise(plan: Plan, words: list[str], processes: int) -> int:
    from mindtrace.jobs.cli.supervisor import StatusNotifier, Supervisor
    from mindtrace.jobs.probes import Probes

    plan.journal.open(insists=True)
    supervisor = Supervisor(
        words, processes, burst=plan.burst, notifier=StatusNotifier(), introduce=plan.journal.banner
    )
    with nullcontext() if plan.health is None else Probes(*plan.health, supervisor.state) as probes:
        plan.journal.banner(
            {
                "mindtrace-jobs": version("mindtrace-jobs"),
                "supervisor": f"{processes} process{'' if processes == 1 else 'es'}, pid {os.getpid()}",
                **({} if probes is None else {"health": probes.url}),
            }
        )
        return asyncio.run(supervisor.run())


def _reload(plan: Plan, words: list[str]) -> int:
    if find_spec("watchfiles") is None:
        raise MissingExtra("--reload", "reload")
    from mindtrace.jobs.cli.reload import Reloader
    from mindtrace.jobs.probes import Probes

    plan.journal.open(insists=True)
    reloader = Reloader(words)
    with nullcontext() if plan.health is None else Probes(*plan.health, reloader.state) as probes:
        if probes is not None:
            plan.journal.banner({"health": probes.url})
        return asyncio.run(reloader.run())
