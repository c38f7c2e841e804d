"""`worker` whose broker is away for a while: a few lines on stderr, however long it takes, and one when it is back."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from mindtrace.jobs.testing import brokers

pytestmark = [pytest.mark.chaos, pytest.mark.fault, pytest.mark.timeout(180)]

AWAY = 25.0  # seconds: three tries of each kind and more

OWN_LOG = """
import logging
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
from app import *
worker = Worker(an_orchestrator(), [Works("jobs")], lease=6.0)
"""


@pytest.mark.parametrize(
    "kind",
    [pytest.param("redis", marks=pytest.mark.redis), pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)],
)
def test_an_outage_is_a_few_lines_and_none_for_each_try(kind: str, site_on: Callable[[str], Any]) -> None:
    """Of one that runs a job, of one that has nothing to do, of two under a supervisor, and of one that starts in it.

    The application's own log has all that the library says, the command's leaves out what is said twice.
    """
    with getattr(brokers, kind)(private=True) as server:
        site = site_on(server.url)
        site.write(OWN_LOG, "own.py")
        site.publish(gate=str(site.gate()))
        runs = site.start("own:worker", "-c", "1")
        runs.out.until("begins")
        idle, several = site.start("own:worker"), site.start("app:worker", "--processes", "2")
        for command, count in ((idle, 1), (several, 2)):
            for _ in range(count):
                command.err.until("queues jobs, concurrency")
        server.kill()
        late = site.start("own:worker")
        before = {command: len(command.err.so_far()) for command in (runs, idle, several, late)}
        time.sleep(AWAY)
        meanwhile = {command: command.err.so_far()[count:] for command, count in before.items()}
        server.restart()
        back = rf"INFO .*worker \S+: {kind} is there again, after \d\d\.\d s$"
        # On Redis it keeps its lease, and has nothing else to ask the server for.
        runs.err.until("INFO .*leases are extended again" if kind == "redis" else back, within=60.0)
        for command, count in ((idle, 1), (several, 2)):
            for _ in range(count):
                command.err.until(back, within=60.0)
        late.err.until("INFO .*queues jobs, concurrency")
    for command, most in ((runs, 7), (idle, 4), (several, 8), (late, 2)):
        lines = [line for line in meanwhile[command] if not re.match(r"\S+  +\S", line)]  # without the banner
        assert 1 <= len(lines) <= most, "\n".join(lines)
        assert all("WARNING" in line for line in lines)
