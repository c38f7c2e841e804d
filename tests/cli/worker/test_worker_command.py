"""`mindtrace-jobs worker` in one process: what it says, how it is stopped, and how it ends where something is wrong."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from mindtrace.jobs.testing.brokers import Broker

pytestmark = pytest.mark.redis

LOCAL = "from app import *\nworker = Worker(AsyncOrchestrator(LocalBackend()), [Works('jobs')])"


def test_a_burst_says_what_it_is_runs_what_is_ready_and_ends(site: Any) -> None:
    site.publish(3)
    url = site.url.replace("redis://", "redis://default:canary@")
    worker = site.start("app:worker", "--burst", "-q", "jobs", "-c", "2", BROKER=url)
    assert worker.status() == 0
    lines = worker.err.all()
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[:6])
    assert facts["worker"] == f"app:worker, pid {worker.pid}"
    assert facts["backend"] == f"RedisBackend {site.url} namespace={site.namespace}"
    assert (facts["queues"], facts["schemas"], facts["concurrency"]) == ("jobs", "none", "2")
    assert sum(bool(re.search(r"INFO +from within \(job \S+\)$", line)) for line in lines) == 3
    assert sum(bool(re.search(r"INFO +job \S+ of queue jobs done in 0\.\d{3} s$", line)) for line in lines) == 3
    assert re.search(r"ended after \d+\.\d s: 3 done, 0 to be retried, 0 dead, 0 handed back$", lines[-1])
    assert not any("canary" in line or line.startswith("loop") for line in lines)


def test_as_json_every_line_is_a_record_and_a_job_is_named_in_it(site: Any) -> None:
    [job_id] = site.publish()
    worker = site.start("app:worker", MINDTRACE_JOBS_LOG_FORMAT="json", MINDTRACE_JOBS_BURST="1")
    assert worker.status() == 0
    records = [json.loads(line) for line in worker.err.all()]
    about_it = [record for record in records if record.get("job_id") == job_id]
    assert [record["message"] for record in about_it] == ["from within", about_it[1]["message"]]
    assert re.fullmatch(rf"job {job_id} of queue jobs done in \d+\.\d+ s", about_it[1]["message"])
    assert {(record["queue"], record["attempt"]) for record in about_it} == {("jobs", 1)}


def test_the_application_keeps_the_logging_that_it_has_set_up(site: Any) -> None:
    site.write(
        "from app import *\nimport logging\nlogging.basicConfig(format='mine %(message)s', level='INFO')", "own.py"
    )
    worker = site.start("own:worker", "--burst")
    assert worker.status() == 0
    assert re.match("mine ended after", worker.err.all()[-1])


def test_the_first_signal_lets_runs_end_and_takes_no_more(site: Any) -> None:
    site.publish(2, gate=str(site.gate()))
    worker = site.start("app:worker", "-c", "1")
    worker.out.until("begins 1")
    worker.send(signal.SIGINT)
    worker.err.until(r"SIGINT: draining, 1 running, (30|29) s left")
    site.gate().touch()
    assert worker.status() == 0
    assert [line.split()[1:] for line in worker.out.all()] == [["begins", "1", "1"], ["ends", "1"]]
    assert site.depth().ready == 1


def test_the_second_signal_hands_back_what_runs(site: Any) -> None:
    site.publish(gate=str(site.gate()))
    worker = site.start("app:worker")
    worker.out.until("begins")
    worker.send(signal.SIGTERM)
    worker.err.until("draining")
    worker.send(signal.SIGINT)
    assert worker.status(within=5) == 1
    assert "SIGINT again: cancelling and handing back 1" in "\n".join(worker.err.all())
    site.gate().touch()
    again = site.start("app:worker", "--burst")
    again.out.until("begins 1 1$")  # the same attempt
    assert again.status() == 0


def test_while_it_drains_it_says_again_and_again_how_long_it_will(site: Any) -> None:
    site.publish(gate=str(site.gate()))
    worker = site.start("app:worker", python="from mindtrace.jobs.cli import serving; serving._SAY_EVERY = 0.3")
    worker.out.until("begins")
    worker.send(signal.SIGTERM)
    worker.err.until("SIGTERM: draining, 1 running, 30 s left")
    worker.err.until("SIGTERM: draining, 1 running, 29 s left")
    site.gate().touch()
    assert worker.status() == 0


def test_when_the_drain_is_over_what_runs_is_handed_back(site: Any) -> None:
    site.publish(gate=str(site.gate()))
    worker = site.start("app:worker", "--drain", "0.3")
    worker.out.until("begins")
    worker.send(signal.SIGTERM)
    assert worker.status(within=5) == 1
    assert site.depth().ready == 1


def test_a_blocked_loop_keeps_nobody_from_seeing_why_or_from_ending_it(site: Any) -> None:
    """SIGUSR1 tells who blocks, and the third signal leaves, though the loop hears neither."""
    [job_id] = site.publish(blocks=60)
    worker = site.start("app:worker")
    worker.out.until("begins")
    worker.send(signal.SIGUSR1)
    worker.err.until(f"^pid {worker.pid}:$")
    worker.err.until(f"^job {job_id} of queue jobs, schema jobs, attempt 1, coroutine, ")
    worker.err.until(r"time\.sleep\(data\.get")
    worker.err.until("^1 running$")
    worker.send(signal.SIGTERM)
    worker.err.until("draining, 1 running")
    worker.send(signal.SIGTERM)
    worker.err.until("SIGTERM again")
    worker.send(signal.SIGTERM)
    assert worker.status(within=5) == -signal.SIGTERM


def test_a_job_in_a_process_of_its_own_is_listed_with_its_stack_or_with_why_there_is_none(site: Any) -> None:
    site.write(
        """
from app import *
from mindtrace.jobs import Consumer

class Works(Consumer):
    executor = "process"
    def run(self, job_dict):
        say("begins")
        time.sleep(60)  # the line where it is

worker = Worker(an_orchestrator(), [Works("jobs")], drain=0, cancel_grace=0)
""",
        "own.py",
    )
    [job_id] = site.publish()
    worker = site.start("own:worker")
    pid = int(worker.out.until(r"^(\d+) begins$")[1])
    worker.send(signal.SIGUSR1)
    worker.err.until(f"^job {job_id} of queue jobs, schema jobs, attempt 1, process, ")
    worker.err.until(r'^  File ".*own.py", line \d+, in run$')
    worker.err.until(r"^    time\.sleep\(60\)  # the line where it is$")
    worker.err.until("^1 running$")
    os.kill(pid, signal.SIGSTOP)
    try:
        worker.send(signal.SIGUSR1)
        worker.err.until(f"^  its process, pid {pid}, does not answer within 1 s")
        worker.err.until("^1 running$")
    finally:
        os.kill(pid, signal.SIGCONT)
    worker.send(signal.SIGTERM)
    assert worker.status() == 1


def test_what_the_application_leaves_behind_does_not_keep_the_process(site: Any) -> None:
    """A task that swallows its cancellation, a thread that never returns."""
    site.write(
        """
from app import *

async def stubborn():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

class Leaves(AsyncConsumer):
    async def run(self, job_dict):
        self.task = asyncio.create_task(stubborn(), name="stubborn")
        threading.Thread(target=time.sleep, args=(60,), name="sleeper").start()
        return {}

worker = Worker(an_orchestrator(), [Leaves("jobs")])
""",
        "own.py",
    )
    site.publish()
    worker = site.start("own:worker", "--burst")
    worker.err.until("ended after")
    assert worker.status(within=10) == 0
    said = "\n".join(worker.err.all())
    assert "1 task left, which a cancellation does not end: stubborn" in said
    assert "left without waiting for sleeper" in said


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_variable_that_means_nothing_is_told_once_for_all_processes(site: Any, form: str) -> None:
    words = ("--processes", "2", "--log-format", form)
    worker = site.start("app:worker", *words, MINDTRACE_JOBS_MAX_JOB="2")
    for _ in range(2):
        worker.err.until("worker . started")
    site.publish()
    worker.out.until("ends 1")
    worker.send(signal.SIGTERM)
    assert worker.status() == 0
    lines = worker.err.all()
    [said] = [line for line in lines if "MINDTRACE_JOBS_MAX_JOB means nothing" in line]
    assert "did you mean 'MINDTRACE_JOBS_MAX_JOBS'?" in said
    assert form == "text" or json.loads(said)["level"] == "WARNING"


@pytest.mark.parametrize("words", [[], ["--processes", "1"]])
def test_a_worker_that_names_no_namespace_is_in_that_of_the_settings(site: Any, words: list[str]) -> None:
    made = "worker = Worker(AsyncOrchestrator(connect()), [Works('jobs')])"
    site.write(f"from app import *\nfrom mindtrace.jobs import connect\n{made}", "plain.py")
    site.publish()
    table = f"[tool.mindtrace-jobs]\nurl = '{site.url}'\nnamespace = '{site.namespace}'\n"
    site.write(table, "pyproject.toml")
    worker = site.start("plain:worker", *words)
    worker.out.until("ends 1")
    worker.send(signal.SIGTERM)
    assert worker.status() == 0


def test_a_job_that_exits_ends_the_worker_and_not_with_a_status_of_its_own(site: Any) -> None:
    site.write(
        """
from app import *

class Exits(AsyncConsumer):
    async def run(self, job_dict):
        sys.exit(3)

worker = Worker(an_orchestrator(), [Exits("jobs")])
""",
        "own.py",
    )
    site.publish()
    worker = site.start("own:worker")
    assert worker.status() == 1
    assert "a job raised SystemExit" in worker.err.all()[-1]


@pytest.mark.parametrize("words", [[], ["--reload"]], ids=["alone", "reload"])
def test_a_hangup_ends_it_only_where_its_terminal_has_gone(site: Any, words: list[str]) -> None:
    ours, its = os.openpty()
    name = os.ttyname(its)  # the first that a process without a terminal opens is its own from then on
    worker = site.start("app:worker", *words, python=f"import os; os.open({name!r}, os.O_RDWR)")
    worker.err.until("queues jobs, concurrency")
    worker.send(signal.SIGHUP)
    worker.err.until("SIGHUP: nothing is replaced without --processes")
    os.close(its)
    os.close(ours)
    assert worker.status() == 0


def test_it_ends_after_so_many_jobs(site: Any) -> None:
    site.publish(3)
    worker = site.start("app:worker", "--max-jobs", "2", "-c", "1")
    assert worker.status() == 0
    assert site.depth().ready == 1


def test_a_signal_that_comes_as_it_leaves_changes_nothing(site: Any) -> None:
    late = "from mindtrace.jobs.cli import leaving; leaving.Exit.with_status = lambda *_: signal.raise_signal(15)"
    assert site.start("app:worker", "--burst", python=f"import signal; {late}").status() == 0


def test_it_ends_above_so_much_memory(site: Any) -> None:
    worker = site.start("app:worker", "--max-memory", "1")
    worker.err.until(r"MiB resident, draining \(max_memory\)")
    assert worker.status() == 0


@pytest.mark.parametrize("words", [["--reload"], ["--processes", "1"]], ids=["reload", "one process"])
def test_the_local_backend_is_enough_for_one_process(site: Any, words: list[str]) -> None:
    site.write(LOCAL, "local.py")
    worker = site.start("local:worker", *words)
    worker.err.until("queues jobs, concurrency")
    worker.send(signal.SIGINT)
    assert worker.status() == 0


BROKEN = {
    "no worker": (["app:an_orchestrator"], 2, "is an AsyncOrchestrator, which knows no consumers"),
    "does not import": (["broken:worker"], 3, "ZeroDivisionError"),
    "no application": ([], 2, "no application is named"),
    "no such queue": (["app:worker", "-q", "job"], 2, "did you mean 'jobs'"),
    "local, several": (["local:worker", "--processes", "2"], 2, "--processes is not supported on local"),
    "import, several": (["broken:worker", "--processes", "2"], 3, "broken:worker: ZeroDivisionError"),
    "no such module, several": (["ap:worker", "--processes", "2"], 3, "ap:worker: there is no module 'ap' in"),
    "no such object, several": (["app:work", "--processes", "2"], 2, "there is no 'work': did you mean 'worker'"),
    "reload, several": (["app:worker", "--processes", "2", "--reload"], 2, "--reload"),
}


@pytest.mark.parametrize(("words", "status", "said"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_one_line_and_a_status(site: Any, words: list[str], status: int, said: str) -> None:
    site.write("1 / 0", "broken.py")
    site.write(LOCAL, "local.py")
    worker = site.start(*words)
    assert worker.status() == status
    [*before, last] = worker.err.all()
    assert re.match("mindtrace-jobs( worker)?: ", last)
    assert said in last
    assert [line for line in before if not re.match(r"\S+  +\S|\S+ \[\d+\] INFO ", line)] == []  # the banner


@pytest.mark.parametrize(
    ("words", "module", "extra"),
    [
        (["--loop", "uvloop"], "uvloop", "uvloop"),
        (["--loop", "uvloop", "--processes", "2"], "uvloop", "uvloop"),
        (["--reload"], "watchfiles", "reload"),
    ],
    ids=["uvloop", "uvloop, several", "reload"],
)
def test_a_missing_extra_is_named_with_the_command_that_brings_it(
    site: Any, words: list[str], module: str, extra: str
) -> None:
    worker = site.start("app:worker", *words, python=f"sys.modules[{module!r}] = None")
    assert worker.status() == 3
    [line] = worker.err.all()
    assert f'pip install "mindtrace-jobs[{extra}]"' in line


def test_another_loop_is_taken_only_where_it_is_asked_for_and_said(site: Any) -> None:
    site.publish()
    worker = site.start("app:worker", "--burst", "--loop", "auto")
    assert worker.status() == 0
    assert "loop            uvloop" in worker.err.all()


def test_a_port_in_use_is_said_before_anything_is_imported(site: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        worker = site.start("broken:worker", "--health-port", str(taken.getsockname()[1]))
        assert worker.status() == 2
        [line] = worker.err.all()
        assert "the health port cannot listen on 127.0.0.1:" in line


def test_a_refused_login_is_said_and_not_tried_again(server: Broker, site_on: Callable[[str], Any]) -> None:
    with Redis.from_url(server.url) as redis:
        redis.config_set("requirepass", "right")
    worker = site_on(server.url.replace("//", "//:canary@")).start("app:worker")
    assert worker.status() == 4
    said = "\n".join(worker.err.all())
    assert "canary" not in said
    assert "Traceback" not in said


def test_an_absent_broker_is_waited_for_and_a_lost_one_too_and_the_probes_tell_it(
    server: Broker, site_on: Callable[[str], Any], probe: Callable[[int, str], Any], until: Callable[..., None]
) -> None:
    """Alive all the time, ready only while there is a broker. A burst has nothing to wait for."""
    site = site_on(server.url)
    site.publish()
    server.kill()
    burst = site.start("app:worker", "--burst", BROKER="redis://127.0.0.1:1/0")
    worker = site.start("app:worker", "--health-port", "0")
    port = worker.port()
    worker.err.until("no Redis at .*trying on")
    assert (probe(port, "/livez")[0], probe(port, "/readyz")[0]) == (200, 503)
    server.restart()
    worker.out.until("ends 1", within=3)
    until(lambda: probe(port, "/readyz")[0] == 200, within=2)
    server.kill()
    until(lambda: probe(port, "/readyz")[0] == 503)
    assert probe(port, "/livez")[0] == 200
    server.restart()
    site.publish()
    worker.out.until("ends 1", within=5)
    worker.err.until(r"redis is there again, after \d+\.\d s")
    until(lambda: probe(port, "/readyz")[0] == 200, within=2)
    worker.send(signal.SIGTERM)
    assert (worker.status(), burst.status()) == (0, 4)
    assert burst.err.all()[-1].startswith("mindtrace-jobs: no Redis at redis://127.0.0.1:1/0 within 5 s")
    warnings = [line.split("WARNING")[1] for line in worker.err.all() if "WARNING" in line]
    assert len(warnings) == len(set(warnings))  # nothing is said twice


def test_a_job_that_is_put_off_is_not_handed_back(site: Any) -> None:
    site.write(
        """
from app import *
from mindtrace.jobs import Snooze

class Sleepy(AsyncConsumer):
    async def run(self, job_dict):
        raise Snooze(3600)

worker = Worker(an_orchestrator(), [Sleepy("jobs")])
""",
        "own.py",
    )
    site.publish()
    worker = site.start("own:worker", "--burst")
    assert worker.status() == 0
    assert worker.err.all()[-1].endswith(": 0 done, 0 to be retried, 0 dead, 1 put off, 0 handed back")


def test_what_is_handed_back_in_an_outage_is_counted_as_the_status_has_it(
    server: Broker, site_on: Callable[[str], Any]
) -> None:
    site = site_on(server.url)
    site.publish(gate=str(site.gate()))
    worker = site.start("app:worker", "--drain", "0")
    worker.out.until("begins 1")
    server.kill()
    worker.send(signal.SIGTERM)
    assert worker.status() == 1
    assert worker.err.all()[-1].endswith(": 0 done, 0 to be retried, 0 dead, 1 handed back")


@pytest.mark.chaos
def test_a_loop_that_is_blocked_turns_the_first_probe_red_and_hides_no_job(
    site: Any, probe: Callable[[int, str], Any], until: Callable[..., None]
) -> None:
    site.publish(blocks=25.0)
    worker = site.start("app:worker", "--health-port", "0")
    port = worker.port()
    worker.out.until("begins")
    assert probe(port, "/livez")[0] == 200
    until(lambda: probe(port, "/livez")[0] == 503, within=24)
    assert probe(port, "/readyz")[0] == 503
    worker.out.until("ends", within=10)
    until(lambda: (probe(port, "/livez")[0], probe(port, "/readyz")[0]) == (200, 200))


def test_systemd_hears_that_it_receives_lives_and_stops(site: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.settimeout(20)
        inbox.bind(str(site.folder / "notify"))

        def hear(what: str) -> None:
            while what not in inbox.recv(4096).decode().split("\n"):
                pass

        worker = site.start("app:worker", NOTIFY_SOCKET=str(site.folder / "notify"), WATCHDOG_USEC="200000")
        hear("READY=1")
        for _ in range(3):
            hear("WATCHDOG=1")
        worker.send(signal.SIGTERM)
        hear("STOPPING=1")
        assert worker.status() == 0


def test_systemd_hears_how_many_of_several_are_ready_until_they_drain(site: Any) -> None:
    site.publish(gate=str(site.gate()))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.settimeout(20)
        inbox.bind(str(site.folder / "notify"))

        def hear(what: str) -> None:
            while what not in inbox.recv(4096).decode().split("\n"):
                pass

        command = site.start("app:worker", "--processes", "2", NOTIFY_SOCKET=str(site.folder / "notify"))
        hear("STATUS=1 of 2 processes are ready")
        hear("STATUS=2 of 2 processes are ready")
        command.send(signal.SIGTERM)
        hear("STATUS=draining")
        command.err.until("draining, 1 running")
        inbox.settimeout(1.2)  # longer than the time between two looks
        with pytest.raises(TimeoutError):
            inbox.recv(4096)
        site.gate().touch()
        assert command.status() == 0


def test_a_changed_source_file_starts_it_again_and_nobody_waits_for_what_runs(
    site: Any, probe: Callable[[int, str], Any], until: Callable[..., None]
) -> None:
    [job_id] = site.publish(gate=str(site.gate()))
    worker = site.start("app:worker", "--reload", "--health-port", "0")
    port = worker.port()
    first = worker.out.until(r"^(\d+) begins 1 1$")[1]
    until(lambda: probe(port, "/readyz")[0] == 200)
    changed = time.monotonic()
    site.write("1 / 0", "app.py")
    worker.err.until("INFO +changed: app.py$")
    why = r"exit status 3: app:worker: ZeroDivisionError: division by zero \(app.py:1\)"
    worker.err.until(rf"WARNING the worker has ended \({why}\): started again once a file has changed$")
    assert (probe(port, "/livez")[0], probe(port, "/readyz")[0]) == (200, 503)
    assert time.monotonic() - changed < 15
    site.gate().touch()
    site.write((site.folder / "good.py").read_text(), "app.py")
    assert worker.out.until(r"^(\d+) begins 1 1$")[1] != first
    worker.out.until("ends 1")
    worker.send(signal.SIGINT)
    assert worker.status() == 0
    assert job_id in "\n".join(worker.err.all())
    assert "detected" not in "\n".join(worker.err.all())  # by whom it is told of changes
