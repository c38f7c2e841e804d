"""`mindtrace-jobs version`: of what this runs on."""

import argparse
import platform
from importlib.metadata import version

from mindtrace.jobs.cli.output import document
from mindtrace.jobs.cli.parser import Parser
from mindtrace.jobs.cli.settings import JSON, Settings

_PARTS = ("mindtrace-jobs", "pydantic", "redis", "hiredis", "aio-pika", "anyio")


def add(parser: Parser) -> None:
    """Declare the options."""
    parser.take(JSON)


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Print them."""
    versions = {part: version(part) for part in _PARTS}
    versions["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    if settings[JSON]:
        document(versions)
    else:
        for name, number in versions.items():
            print(f"{name:<16}{number}")
    return 0
