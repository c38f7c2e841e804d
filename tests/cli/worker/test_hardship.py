"""`worker` where something around it is in a bad way: processes that die, that never start, that nobody can read."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from redis import Redis

from mindtrace.jobs.testing.brokers import Broker

pytestmark = pytest.mark.redis

SOON = "from mindtrace.jobs.cli import supervisor; supervisor._FIRST_PAUSE = supervisor._LONGEST_PAUSE = 0.02"

FORKS = """
from app import *

class Forks(AsyncConsumer):
    async def run(self, job_dict):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        if job_dict["input_data"].get("dies"):
            os.kill(os.getpid(), 9)
        say("forked")
        return {}

worker = Worker(an_orchestrator(), [Forks("jobs")])
"""


@pytest.mark.chaos
def test_a_process_has_ended_though_one_that_it_forked_lives_on(site: Any) -> None:
    """Which holds all that it had open: it is replaced, and it drains, as if there were no other."""
    site.write(FORKS, "forks.py")
    command = site.start("forks:worker", "--processes", "1", "--max-jobs", "1", python=SOON)
    site.publish(dies=True)
    command.err.until(r"worker 1 has ended.*: SIGKILL; started again in")
    site.publish()
    command.out.until("forked")
    command.err.until("worker 1 has ended by itself: replaced")
    command.err.until("worker 1 started")
    command.send(signal.SIGTERM)
    assert command.status() == 0


@pytest.mark.chaos
def test_so_has_one_that_is_reloaded(site: Any) -> None:
    site.write(FORKS, "forks.py")
    command = site.start("forks:worker", "--reload")
    site.publish(dies=True)
    command.err.until(r"the worker has ended \(SIGKILL\): started again once a file has changed")
    command.send(signal.SIGTERM)
    command.status()


LEAVES = """
from app import *

class Leaves(AsyncConsumer):
    async def run(self, job_dict):
        os._exit(job_dict["input_data"]["status"])

worker = Worker(an_orchestrator(), [Leaves("jobs")])
"""


def test_a_job_that_ends_the_first_process_as_if_it_could_not_start_does_not_stop_all(site: Any) -> None:
    """It is taken before the first report that anything is: only what the process tells says that it cannot start."""
    site.write(LEAVES, "leaves.py")
    site.publish(status=3)
    command = site.start("leaves:worker", "--processes", "2")
    command.err.until(r"worker 1 has ended.*: exit status 3; started again in")
    for _ in range(2):
        command.err.until(r"worker \d started")
    command.send(signal.SIGTERM)
    assert command.status() == 0


def test_a_job_that_exits_as_if_all_were_well_has_crashed_its_process(site: Any) -> None:
    """Which is started again after a pause; a burst has failed, and what is reloaded waits for better code."""
    site.write(LEAVES, "leaves.py")
    site.publish(status=0)
    burst = site.start("leaves:worker", "--processes", "1", "--burst")
    burst.err.until(r"worker 1 has ended.*: exit status 0; started again in")
    assert burst.status() == 1
    site.publish(status=0)
    reloaded = site.start("leaves:worker", "--reload")
    reloaded.err.until(r"the worker has ended \(exit status 0\): started again once a file has changed")
    reloaded.send(signal.SIGTERM)
    reloaded.status()


def test_a_place_that_cannot_start_takes_nobody_with_it_once_one_has_worked(site: Any) -> None:
    site.write("import os\nos.close(os.open('taken', os.O_CREAT | os.O_EXCL))\nfrom app import *", "first.py")
    command = site.start("first:worker", "--processes", "2", python=SOON)
    why = r"first:worker: FileExistsError: .* \(first.py:2\)"
    command.err.until(
        f"WARNING worker 2 has ended before it was ready: exit status 3: {why}; started again in 0\\.0 s$"
    )
    for _ in range(2):
        command.err.until("worker 2 started")
    site.publish()
    command.out.until("ends 1")
    command.send(signal.SIGTERM)
    assert command.status() in (0, 1)
    assert not any("all stop" in line or line.startswith("mindtrace-jobs: ") for line in command.err.all())


def test_a_process_that_ends_well_and_never_was_ready_is_not_hurried(site: Any) -> None:
    site.write("import os\nos._exit(0)", "ends.py")
    command = site.start("ends:worker", "--processes", "1")
    pauses = [float(command.err.until(r"exit status 0; started again in (\d+\.\d) s")[1]) for _ in range(2)]
    assert 0.2 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0
    command.send(signal.SIGTERM)
    assert command.status() == 0


def test_a_process_that_is_starting_does_not_die_of_being_asked_what_it_runs(
    site: Any, until: Callable[..., None]
) -> None:
    command = site.start("app:worker", "--processes", "1")
    command.err.until("worker 1 started")

    def is_asked_once_it_runs() -> bool:
        command.send(signal.SIGUSR1)
        return "0 running" in command.err.so_far()

    until(is_asked_once_it_runs)
    command.send(signal.SIGTERM)
    assert command.status() == 0
    assert len(command.children()) == 1


ALONE_AND_SUPERVISED: list[list[str]] = [[], ["--processes", "1"]]


def test_a_hangup_that_is_ignored_from_the_start_stays_ignored(site: Any) -> None:
    """As under `nohup`."""
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    kinds = [*ALONE_AND_SUPERVISED, ["--reload"]]
    for command in [site.start("app:worker", *words, python=ignored) for words in kinds]:
        command.err.until("queues jobs, concurrency")
        for pid in (command.pid, *command.children()):
            os.kill(pid, signal.SIGHUP)
        command.send(signal.SIGUSR1)
        command.err.until("^0 running$")
        command.send(signal.SIGTERM)
        assert command.status() == 0
        assert not any("nothing is replaced" in line or "rolling" in line for line in command.err.all())


def test_a_stderr_that_nobody_reads_stops_neither_the_work_nor_the_signs_of_life(site: Any) -> None:
    broken = "import os; r, w = os.pipe(); os.dup2(w, 2); os.close(r); os.close(w)"
    with ExitStack() as stack:
        commands: list[tuple[Any, socket.socket]] = []
        for number, words in enumerate(ALONE_AND_SUPERVISED):
            inbox = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            inbox.settimeout(20)
            inbox.bind(at := str(site.folder / f"notify-{number}"))
            watched = {"NOTIFY_SOCKET": at, "WATCHDOG_USEC": "200000"}
            commands.append((site.start("app:worker", "-c", "1", *words, python=broken, **watched), inbox))
        for command, inbox in commands:
            hear(inbox, "READY=1")
            command.send(signal.SIGUSR1)
            for _ in range(4):
                hear(inbox, "WATCHDOG=1")
        site.publish(2, gate=str(site.gate()))
        for command, _ in commands:
            command.out.until("begins")
        site.gate().touch()
        for command, _ in commands:
            command.out.until("ends")
            command.send(signal.SIGTERM)
            assert command.status() == 0


def hear(inbox: socket.socket, what: str) -> None:
    while what not in inbox.recv(4096).decode().split("\n"):
        pass


def test_a_process_may_have_a_lot_to_tell_of_itself(site: Any) -> None:
    site.write(
        "from app import *\nworker = Worker(an_orchestrator(), [Works('q' * 100 + str(n)) for n in range(700)])",
        "long.py",
    )
    command = site.start("long:worker", "--processes", "1")
    command.err.until("^queues +qqq.*699$")
    command.err.until(" queues qqq.*699, concurrency")
    command.send(signal.SIGTERM)
    assert command.status() == 0


BREAKS = """
from app import *

async def exits():
    sys.exit("token S3CRET")

class Breaks(AsyncConsumer):
    async def run(self, job_dict):
        match job_dict["input_data"]["how"]:
            case "group":
                raise BaseExceptionGroup("token S3CRET", [KeyboardInterrupt(), SystemExit(1)])
            case "stop":
                asyncio.get_running_loop().stop()
            case "task":
                self.task = asyncio.create_task(exits())
        await asyncio.sleep(60)

worker = Worker(an_orchestrator(), [Breaks("jobs")], cancel_grace=0.5)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("group", r"mindtrace-jobs: the worker has ended: BaseExceptionGroup \(breaks.py:\d+\)$"),
        ("stop", "ERROR +a task of a job stopped the event loop: the worker leaves as if it had crashed$"),
        ("task", r"ERROR +a task of a job raised SystemExit \(breaks.py:\d+\): the worker leaves as if"),
    ],
)
def test_whatever_a_job_does_to_the_worker_is_said_in_one_line(site: Any, how: str, said: str) -> None:
    """Without the text of what it raised, which may hold payload."""
    site.write(BREAKS, "breaks.py")
    site.publish(how=how)
    worker = site.start("breaks:worker")
    assert worker.status() == 1
    lines = worker.err.all()
    assert re.search(said, lines[-1])
    assert not re.search("Traceback|S3CRET", "\n".join(lines))


STUBBORN = """
from app import *

class Swallows(AsyncConsumer):
    async def run(self, job_dict):
        say("begins")
        while True:
            try:
                await asyncio.sleep(60)
            except BaseException:
                pass

worker = Worker(an_orchestrator(), [Swallows("jobs")], drain=0.0, cancel_grace=0.05)
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_runs_that_swallow_their_cancellation_are_told_once_and_nothing_of_them_after_that(
    site: Any, form: str
) -> None:
    """Neither asyncio nor the interpreter has more to say of them as it ends."""
    site.write(STUBBORN, "stubborn.py")
    site.publish(2)
    worker = site.start("stubborn:worker", "--log-format", form)
    for _ in range(2):
        worker.out.until("begins")
    worker.send(signal.SIGTERM)
    assert worker.status() == 1
    last = worker.err.all()[-1]
    text = json.loads(last)["message"] if form == "json" else last
    assert re.search(r"2 tasks left, which a cancellation does not end: Task-\d+, Task-\d+$", text)


def test_an_application_that_exits_while_it_is_made_is_no_success(site: Any) -> None:
    site.write("import sys\nasync def made():\n    sys.exit('no DATABASE_URL is set')", "exits.py")
    worker = site.start("exits:made")
    assert worker.status() == 3
    assert worker.err.all() == ["mindtrace-jobs: exits:made: SystemExit: no DATABASE_URL is set (exits.py:3)"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_refused_login_is_the_last_line_and_said_once(
    server: Broker, site_on: Callable[[str], Any], form: str
) -> None:
    with Redis.from_url(server.url) as redis:
        redis.config_set("requirepass", "right")
    worker = site_on(server.url.replace("//", "//:canary@")).start("app:worker", "--log-format", form)
    assert worker.status() == 4
    lines = worker.err.all()
    assert ["refuses the login" in line for line in lines] == [False] * (len(lines) - 1) + [True]
    if form == "json":
        last = [json.loads(line) for line in lines][-1]
        assert (last["level"], last["message"][:8]) == ("ERROR", "Redis at")


HASTY = """
from app import *
from mindtrace.jobs.backends import rabbitmq, redis
redis.backend.CONNECT_WITHIN = rabbitmq.backend.CONNECT_WITHIN = 0.5
"""


def test_a_burst_without_a_broker_says_so_in_one_line(site: Any) -> None:
    """After 5 s; here after less, since nobody comes."""
    site.write(HASTY, "hasty.py")
    for_redis = site.start("hasty:worker", "--burst", BROKER="redis://127.0.0.1:1/0")
    for_rabbitmq = site.start("hasty:worker", "--burst", BROKER="amqp://127.0.0.1:1/")
    several = site.start("hasty:worker", "--burst", "--processes", "2", BROKER="redis://127.0.0.1:1/0")
    for worker in (for_redis, for_rabbitmq, several):
        assert worker.status() == 4
        said = [line for line in worker.err.all() if not re.match(r"\S+  +\S|.* INFO ", line)]  # the banner
        assert len(said) == 1
        assert re.match(r"mindtrace-jobs: no (Redis|RabbitMQ) at \S+( within 0.5 s)?: [^:]+", said[0])
        assert said[0].count(" at ") == 1


def test_what_is_wrong_is_json_where_the_rest_is(site: Any) -> None:
    site.write("1 / 0", "broken.py")
    site.write("from app import *\nsay('waits')\ntime.sleep(60)", "waits.py")
    broken, worker = (site.start(f"{name}:worker", "--log-format", "json") for name in ("broken", "waits"))
    assert broken.status() == 3
    [line] = broken.err.all()
    assert "ZeroDivisionError" in json.loads(line)["message"]

    worker.out.until("waits")
    worker.send(signal.SIGINT)
    assert worker.status() == 130
    [line] = worker.err.all()
    assert json.loads(line)["message"] == "interrupted"
