"""`mindtrace-jobs config`: each setting, its value, and where that comes from; of this very call."""

import argparse
from typing import Any, cast

from mindtrace.jobs.cli.errors import UsageError
from mindtrace.jobs.cli.output import document, say, table
from mindtrace.jobs.cli.parser import Parser
from mindtrace.jobs.cli.settings import JSON, Option, Settings


def add(parser: Parser) -> None:
    """Declare the options."""
    parser.take(JSON)


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Print them; all that are wrong are said, not only the first. Returns 2 if one is."""
    settings.check_project()
    rows: list[tuple[str, object, str]] = []
    status = 0
    for option in sorted(settings.known, key=lambda option: option.name):
        try:
            rows.append((option.name, _shown(option, settings), settings.source(option)))
        except UsageError as error:
            say(f"mindtrace-jobs: {error}")
            status = error.status
    if settings[JSON]:
        document([dict(zip(("setting", "value", "from"), row, strict=True)) for row in rows])
    else:
        table(("setting", "value", "from"), [(name, _text(value), source) for name, value, source in rows])
    return status


def _shown(option: Option[Any], settings: Settings) -> object:
    value = settings[option]
    return None if value is None else option.show(value)


def _text(value: object) -> str:
    if value is None or value == ():
        return "-"
    return ", ".join(map(str, cast(tuple[object, ...], value))) if isinstance(value, tuple) else str(value)
