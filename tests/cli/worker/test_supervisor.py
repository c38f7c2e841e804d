"""`worker --processes N`: what the supervisor does when its processes end, and what they do when it does."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindtrace.jobs.testing.brokers import Broker

pytestmark = pytest.mark.redis


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def begun_by(command: Any, count: int) -> list[int]:
    """The processes that begin the next so many runs."""
    return [int(command.out.until(r"^(\d+) begins")[1]) for _ in range(count)]


def test_a_killed_process_is_replaced_and_all_drain_together(
    site: Any, probe: Callable[[int, str], Any], until: Callable[..., None]
) -> None:
    site.publish(2, gate=str(site.gate()))
    command = site.start("app:worker", "--processes", "2", "-c", "1", "--health-port", "0")
    port = command.port()
    one, other = begun_by(command, 2)
    assert one != other
    status, told = probe(port, "/readyz")
    assert (status, {process["pid"] for process in told["processes"]}) == (200, {one, other})

    os.kill(one, signal.SIGKILL)
    command.err.until(r"worker \d has ended: SIGKILL; started again in 0\.\d s")
    new = int(command.err.until(r"worker \d started, pid (\d+)")[1])
    until(lambda: [child["ready"] for child in probe(port, "/livez")[1]["processes"]] == [True, True])
    assert probe(port, "/livez")[0] == 200

    command.ctrl_c()  # a terminal gives it to all of its foreground, of which only the supervisor is one
    command.err.until("supervisor: SIGINT, all drain")
    command.err.until(r"draining, 1 running")
    site.gate().touch()
    assert command.status() == 0
    assert not any(map(is_there, (one, other, new)))
    assert sum("ends" in line for line in command.out.all()) == 1


def test_ctrl_c_while_they_import_the_application_ends_them_without_a_word(site: Any) -> None:
    site.write("from app import *\nsay('imports')\ntime.sleep(60)", "slow.py")
    command = site.start("slow:worker", "--processes", "1")
    command.out.until("imports")
    command.ctrl_c()
    assert command.status(within=5) == 0
    assert "supervisor: SIGINT, all drain" in command.err.all()[-1]


def test_the_second_and_the_third_signal_reach_all(site: Any, until: Callable[..., None]) -> None:
    site.publish(1, gate=str(site.gate()))
    site.publish(1, blocks=60)
    command = site.start("app:worker", "--processes", "2", "-c", "1")
    begun_by(command, 2)
    for said in ("SIGTERM: draining, 1 running", "SIGTERM again: cancelling"):
        command.send(signal.SIGTERM)
        for _ in range(2):
            command.err.until(said)
    until(lambda: sum(map(is_there, command.children())) == 1)
    command.send(signal.SIGTERM)
    assert command.status() == -signal.SIGTERM
    assert not any(map(is_there, command.children()))
    assert site.depth().ready == 1


def test_processes_end_with_a_supervisor_that_is_killed(site: Any, until: Callable[..., None]) -> None:
    """And they drain: what runs is finished."""
    site.publish(gate=str(site.gate()))
    command = site.start("app:worker", "--processes", "1")
    [pid] = begun_by(command, 1)
    command.send(signal.SIGKILL)
    command.err.until("draining, 1 running")
    site.gate().touch()
    until(lambda: not is_there(pid))
    assert (site.depth().ready, site.depth().leased) == (0, 0)


@pytest.mark.chaos
def test_a_login_that_is_refused_to_all_is_one_line(server: Broker, site_on: Callable[[str], Any]) -> None:
    """Also where all have been started, since the broker was not there: the first that is refused says it for all."""
    server.kill()
    site = site_on(server.url.replace("//", "//:canary@"))
    at_once = "from mindtrace.jobs.cli import supervisor; supervisor._FIRST_ALONE = 0.1"
    command = site.start("app:worker", "--processes", "2", python=at_once)
    for _ in range(2):
        command.err.until("WARNING no Redis at .*; trying on")
    server.restart()
    assert command.status() == 4
    *before, last = command.err.all()
    assert re.match(r"mindtrace-jobs: Redis at redis://127\.0\.0\.1:\d+/0 refuses the login: ", last)
    assert not any(re.search("canary|refuses|ERROR|cannot start|mindtrace-jobs: ", line) for line in before)


@pytest.mark.chaos
def test_a_process_that_says_nothing_is_not_alive(
    site: Any, probe: Callable[[int, str], Any], until: Callable[..., None]
) -> None:
    """As far as anybody knows; its neighbour goes on, so that there is still somebody who is ready."""
    command = site.start("app:worker", "--processes", "2", "--health-port", "0")
    port = command.port()
    until(lambda: [child["ready"] for child in probe(port, "/livez")[1]["processes"]] == [True, True])
    stopped = command.children()[0]
    os.kill(stopped, signal.SIGSTOP)
    until(lambda: probe(port, "/livez")[0] == 503, within=20)
    assert probe(port, "/readyz")[0] == 200
    os.kill(stopped, signal.SIGCONT)
    until(lambda: probe(port, "/livez")[0] == 200)
    command.send(signal.SIGTERM)
    assert command.status() == 0


def test_hangup_replaces_a_process_once_the_new_one_is_ready_and_not_by_one_that_does_not_start(site: Any) -> None:
    site.publish(gate=str(site.gate()))
    command = site.start("app:worker", "--processes", "1")
    [old] = begun_by(command, 1)
    site.write("1 / 0")
    command.send(signal.SIGHUP)
    command.err.until("given up, the successor of worker 1: exit status 3")
    assert is_there(old)

    site.write((site.folder / "good.py").read_text())
    command.send(signal.SIGHUP)
    new = int(command.err.until(r"worker 1 started, pid (\d+)")[1])
    command.err.until("draining, 1 running")
    site.publish()
    assert begun_by(command, 1) == [new]  # while the old one drains
    assert is_there(old)
    site.gate().touch()
    command.err.until(rf"pid {old} has left within \d+\.\d s, pid {new} goes on")
    command.err.until("rolling restart: done")
    assert not is_there(old)
    command.send(signal.SIGTERM)
    assert command.status() == 0


@pytest.mark.chaos
def test_a_first_signal_in_a_rolling_restart_cancels_nothing(site: Any) -> None:
    """The one that is replaced drains already, and has the time for it that it was given."""
    site.publish(gate=str(site.gate()))
    command = site.start("app:worker", "--processes", "1")
    command.err.until("^supervisor +1 process, pid")
    begun_by(command, 1)
    command.send(signal.SIGHUP)
    command.err.until("SIGTERM: draining, 1 running")
    command.send(signal.SIGINT)
    command.err.until("SIGINT: draining, 0 running")  # the new one
    site.gate().touch()
    command.out.until("ends 1")
    assert command.status() == 0
    assert not any("again" in line for line in command.err.all())


def test_a_process_that_has_run_its_jobs_is_replaced_and_one_that_crashes_is_not_hurried(site: Any) -> None:
    site.publish(2)
    command = site.start("app:worker", "--processes", "1", "--max-jobs", "1", "-c", "1")
    assert len(set(begun_by(command, 2))) == 2
    command.send(signal.SIGTERM)
    assert command.status() == 0
    assert "started again in" not in "\n".join(command.err.all())

    site.write("import os\nos._exit(1)", "crashes.py")
    command = site.start("crashes:worker", "--processes", "1")
    for _ in range(2):
        command.err.until(r"exit status 1; started again in \d+\.\d s")
    command.send(signal.SIGTERM)
    assert command.status() == 0


def test_each_process_is_told_what_its_supervisor_was_but_where_the_probes_are(site: Any) -> None:
    values = ["--concurrency=3", "--max-jobs=9", "--max-memory=900", "--drain=7.5", "--loop=asyncio"]
    how = ["--queue=jobs", "--processes=1", "--no-burst", "--log-format=text", "--log-level=debug"]
    command = site.start("app:worker", *values, *how, "-v", "--health-port=0", "--health-host=127.0.0.1")
    pid = command.err.until(r"worker 1 started, pid (\d+)")[1]
    words = Path(f"/proc/{pid}/cmdline").read_text("utf-8").split("\0")
    at = words.index("app:worker")
    assert sorted(words[at + 1 : words.index("--supervised")]) == sorted([*values, *how, "--verbose"])
    command.send(signal.SIGTERM)
    assert command.status() == 0


def test_in_a_burst_they_are_replaced_after_so_many_jobs_until_nothing_is_ready(site: Any) -> None:
    site.publish(7)
    burst = site.start("app:worker", "--processes", "2", "--burst", "--max-jobs", "2", "-c", "1")
    assert burst.status() == 0
    assert site.depth().ready == 0
    assert len(set(begun_by(burst, 7))) >= 4
