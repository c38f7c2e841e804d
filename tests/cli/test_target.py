"""TARGET: what is found, and what is said where it is not."""

import asyncio
from pathlib import Path

import pytest

from mindtrace.jobs import AsyncOrchestrator, Orchestrator, Worker
from mindtrace.jobs.cli.target import load

from .conftest import CANARY, Cli

pytestmark = pytest.mark.local

GOOD = """
from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, LocalBackend, LocalClient, Orchestrator, Worker

class Tea(AsyncConsumer):
    async def run(self, job_dict):
        return {}

jobs = AsyncOrchestrator(LocalBackend())
blocking = Orchestrator(LocalClient())
worker = Worker(jobs, [Tea("tea")])

def plain():
    return worker

async def in_a_loop():
    await jobs.open()
    return jobs

def gives_a_coroutine():
    return in_a_loop()

class Holder:
    inside = worker
"""


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("good:jobs", AsyncOrchestrator),
        ("good:blocking", Orchestrator),
        ("good:worker", Worker),
        ("good:plain", Worker),
        ("good:in_a_loop", AsyncOrchestrator),
        ("good:gives_a_coroutine", AsyncOrchestrator),
        ("good:Holder.inside", Worker),
        ("pack.age.good:worker", Worker),
    ],
)
def test_a_target_is_an_object_or_a_function_that_gives_one(folder: Path, target: str, kind: type) -> None:
    (folder / "pack" / "age").mkdir(parents=True)
    for place in (folder, folder / "pack" / "age"):
        (place / "good.py").write_text(GOOD, "utf-8")
    loaded = load(target)
    assert isinstance(asyncio.run(loaded.app()), kind)
    assert loaded.target == target


BAD = """
import sys
from mindtrace.jobs import AsyncConsumer, BackendUnavailable, LocalBackend

backend = LocalBackend()

class Tea(AsyncConsumer):
    pass

def with_arguments(name):
    pass

def raises():
    raise OSError("the disk\\nis \\x1b[31mfull")

def leaves():
    sys.exit(5)

def gives_text():
    return "text"

async def raises_in_a_loop():
    {}["missing"]

async def gives_text_in_a_loop():
    return "text"

async def finds_no_broker():
    raise BackendUnavailable("no broker here")
"""


@pytest.mark.parametrize(
    ("target", "status", "said"),
    [
        ("bad", 2, ["MODULE:OBJECT"]),
        ("bad:", 2, ["MODULE:OBJECT"]),
        ("bad.py:backend", 3, ["no module", "'bad.py'"]),
        ("bad:x y", 2, ["MODULE:OBJECT"]),
        ("no.such.module:worker", 3, ["no module 'no'"]),
        ("bad:bakend", 2, ["'bakend'", "did you mean 'backend'?"]),
        ("bad:backend", 2, ["LocalBackend", "a Worker, an AsyncOrchestrator"]),
        ("bad:Tea", 2, ["the class Tea", "a Worker"]),
        ("bad:with_arguments", 2, ["with_arguments()", "arguments"]),
        ("bad:raises", 3, ["OSError: the disk is \\x1b[31mfull", "bad.py:14"]),
        ("bad:leaves", 3, ["SystemExit: 5", "bad.py:17"]),
        ("bad:gives_text", 2, ["str", "a Worker"]),
        ("bad:raises_in_a_loop", 3, ["KeyError", "bad.py:23"]),
        ("bad:gives_text_in_a_loop", 2, ["str"]),
        ("bad:finds_no_broker", 4, ["no broker here"]),
        ("syntax:worker", 3, ["SyntaxError", "syntax.py:2"]),
        ("imports:worker", 3, ["ModuleNotFoundError: No module named 'no_such_thing'", "deeper.py:1"]),
        ("config:worker", 2, ["ConfigError", "at least one consumer", "config.py:2"]),
        ("shows:worker", 3, ["RuntimeError: redis://***@host"]),
    ],
)
def test_what_is_wrong_with_a_target_is_one_line_and_a_status(
    cli: Cli, folder: Path, target: str, status: int, said: list[str]
) -> None:
    for name, text in {
        "bad": BAD,
        "syntax": "\ndef f(:",
        "imports": "import deeper",
        "deeper": "import no_such_thing",
        "config": "from mindtrace.jobs import *\nWorker(AsyncOrchestrator(LocalBackend()), [])",
        "shows": f"raise RuntimeError('redis://user:{CANARY}@host')",
    }.items():
        (folder / f"{name}.py").write_text(text, "utf-8")
    ended = cli("status", "--app", target, "--url", "redis://localhost:1")
    assert (ended.status, ended.out) == (status, "")
    [line] = ended.err.splitlines()
    for text in said:
        assert text in line


def test_twice_verbose_shows_the_traceback(cli: Cli, folder: Path) -> None:
    (folder / "imports.py").write_text("import no_such_thing", "utf-8")
    ended = cli("status", "--app", "imports:worker", "-vv")
    assert ended.status == 3
    assert "Traceback" in ended.err
    assert "no_such_thing" in ended.err
