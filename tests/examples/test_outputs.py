"""Every example is started as its first line says, on each backend; it ends by itself, and prints what stands here."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindtrace.jobs.testing import brokers

ROOT = Path(__file__).parents[2]
SERVICES = {"aiohttp_service"}  # they end when they are told to: see test_services.py
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in SERVICES]

OUTPUTS = {
    "quickstart": """
published  <id>
run 1      fails, and is retried in up to a second
run 2      sells tea for 4.50
""",
    "script_sync": """
published  <id>
refused    the fields ['width']
waiting    3
shrinks    cat.jpg to 800 pixels
shrinks    dog.jpg to 200 pixels
handled    2
by hand    cow.jpg
then       None
""",
    "priorities": """
sends to   the engineer on call
sends to   the customer who waits
sends to   reader 1
sends to   reader 2
sends to   reader 3
refused    priority 9 on the fifo queue 'plain': it needs a queue declared with kind='priority'
""",
    "retries_and_dead_letters": """
failed     run 1; the next in 0.1 s
failed     run 2; the next in 0.2 s
dead       attempts: ConnectionError: the printer is off
dead       rejected: Reject: no invoice has a number below 0
replayed   1
printed    invoice 17
purged     1
left       0 ready, 0 dead
""",
}


BACKENDS = [
    pytest.param("local", marks=pytest.mark.local),
    pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.uses_broker("redis")]),
    pytest.param("rabbitmq", marks=[pytest.mark.rabbitmq, pytest.mark.uses_broker("rabbitmq")]),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What the environment says of it; a server that nobody else uses, since no example has a namespace of its own."""
    if request.param == "local":
        yield {}
    elif request.param == "redis":
        with brokers.redis(private=True) as server:
            yield {"MINDTRACE_JOBS_URL": server.url}
    else:
        yield {"MINDTRACE_JOBS_URL": request.getfixturevalue("own_rabbitmq").url}


def run(example: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    first = example.read_text("utf-8").splitlines()[0]
    assert first == f"# python examples/{example.name}"
    command = [sys.executable, *shlex.split(first)[2:]]
    kept = {name: value for name, value in os.environ.items() if name != "MINDTRACE_JOBS_URL"}
    return subprocess.run(
        command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_should_and_ends_by_itself_and_so_it_does_when_started_again(
    example: Path, backend: dict[str, str]
) -> None:
    for _ in range(2 if backend else 1):  # on a server the second one meets the queues of the first, and no job
        ended = run(example, **backend)
        assert (ended.returncode, ended.stderr) == (0, "")
        printed = re.sub(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "<id>", ended.stdout)
        assert printed == OUTPUTS[example.stem].lstrip("\n")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_takes_its_backend_from_the_environment(example: Path) -> None:
    ended = run(example, MINDTRACE_JOBS_URL="nowhere://here")
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("mindtrace.jobs.errors.ConfigError:")
    assert "nowhere" in last
