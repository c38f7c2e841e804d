"""The command as a process of its own: how it ends by signal, without a reader, without a broker."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NoRedis

from mindtrace.jobs import QueueSpec

from .conftest import CANARY, Server

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command; the test ends it."""
    with ExitStack() as stack:

        def started(*words: str) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-m", "mindtrace.jobs", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": ""},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield started


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Its status, and what it printed; never the password, and never a traceback."""
    out, err = process.communicate(timeout=30)
    assert CANARY not in out + err
    assert "Traceback" not in err
    return process.returncode, out, err


TRAPPED = """
import atexit, os, signal, sys

at, number = sys.argv[1], signal.Signals[sys.argv[2]]
sys.argv[:] = ["mindtrace-jobs", *(sys.argv[3:] or ["version"])]

class Trap:
    def find_spec(self, name, path=None, target=None):
        if name == at:
            os.kill(os.getpid(), number)
        elif f"{name}, where an exception is lost" == at:
            Last()

class Last:
    def __del__(self):
        os.kill(os.getpid(), number)

sys.meta_path.insert(0, Trap())
if at == "the end":
    atexit.register(os.kill, os.getpid(), number)
from mindtrace.jobs_command import main
sys.exit(main())
"""
MOMENTS = (
    "mindtrace.jobs", "pydantic", "pydantic, where an exception is lost", "mindtrace.jobs.cli",
    "email.parser", "the end",
)  # fmt: skip


@pytest.mark.parametrize(
    ("at", "number", "status"),
    [
        *((at, "SIGINT", 130) for at in MOMENTS),
        *((at, "SIGTERM", -signal.SIGTERM) for at in ("pydantic", "email.parser")),
    ],
)
def test_a_signal_ends_it_quietly_whenever_it_comes(at: str, number: str, status: int) -> None:
    """While the library is imported, what it stands on, or the command line; when that looks around; and at the end."""
    command = [sys.executable, "-c", TRAPPED, at, number]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30)
    said = "interrupted\n" if (at, number) == ("email.parser", "SIGINT") else ""
    assert (process.returncode, process.stderr) == (status, said)
    assert bool(process.stdout) == (at == "the end")


@pytest.mark.parametrize("number", ["SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("at", ["mindtrace.jobs", "pydantic", "mindtrace.jobs.cli", "email.parser"])
def test_a_worker_is_not_ended_by_what_means_something_else_to_it_however_early_it_comes(at: str, number: str) -> None:
    command = [sys.executable, "-c", TRAPPED, at, number, "worker", "nowhere:worker"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (process.returncode, "no module 'nowhere'" in process.stderr) == (3, True)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("at", ["pydantic", "the end"])
def test_any_other_command_is_ended_by_it_as_ever(at: str, number: signal.Signals) -> None:
    process = subprocess.run([sys.executable, "-c", TRAPPED, at, number.name], capture_output=True, timeout=30)
    assert (process.returncode, bool(process.stdout), process.stderr) == (-number, at == "the end", b"")


def test_a_worker_whose_terminal_is_closed_while_it_is_imported_ends_with_it() -> None:
    ours, its = os.openpty()
    waits = TRAPPED.replace("os.kill(os.getpid(), number)", "print(flush=True) or __import__('time').sleep(60)")
    own = f"import os; os.open({os.ttyname(its)!r}, os.O_RDWR)\n{waits}"  # the first that one without opens is its own
    command = [sys.executable, "-c", own, "pydantic", "SIGHUP", "worker", "nowhere:worker"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.close(its)
        os.close(ours)
        assert process.wait(30) == -signal.SIGHUP


@pytest.mark.parametrize("number", ["SIGINT", "SIGHUP"])
def test_a_signal_that_is_ignored_by_whoever_starts_it_stays_ignored(number: str) -> None:
    ignoring = f"import signal; signal.signal(signal.{number}, signal.SIG_IGN)\n" + TRAPPED
    command = [sys.executable, "-c", ignoring, "pydantic", number]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (process.returncode, process.stderr) == (0, "")


def test_the_installed_command_is_the_one_that_imports_nothing_before_it_can_be_interrupted() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"mindtrace-jobs": "mindtrace.jobs_command:main"}
    look = "import sys, mindtrace.jobs_command; print('mindtrace.jobs' in sys.modules, 'asyncio' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=30, check=True)
    assert process.stdout == "False False\n"


def test_without_a_broker_it_is_exit_4_and_without_the_application_3(start: Start) -> None:
    cases = [
        *((4, f"{name}://127.0.0.1:1/", f"{name}://user:{CANARY}@127.0.0.1:1") for name in ("redis", "amqp")),
        (3, "no module 'shpo'", "redis://localhost"),
    ]
    started = [
        start("status", "--url", url, *(("--app", "shpo:worker") if status == 3 else ())) for status, _, url in cases
    ]
    for (status, said, _), process in zip(cases, started, strict=True):
        code, out, err = ended(process)
        assert (code, out) == (status, ""), err
        assert said in err.splitlines()[-1]


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(start: Start) -> None:
    process = start("config")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, "")


@pytest.mark.redis
def test_what_is_closed_is_as_empty_as_a_null_device(on_redis: Server) -> None:
    on_redis.declare(QueueSpec("orders"))

    def run(words: str) -> tuple[int, str, str]:
        command = f"{sys.executable} -m mindtrace.jobs {words}"
        where = {"MINDTRACE_JOBS_URL": on_redis.url, "MINDTRACE_JOBS_NAMESPACE": on_redis.namespace}
        ended = subprocess.run(
            ["sh", "-c", command], env={**os.environ, **where}, capture_output=True, text=True, timeout=30
        )
        return ended.returncode, ended.stdout, ended.stderr.splitlines()[-1] if ended.stderr else ""

    assert run("publish orders - <&-") == (0, "", "0 jobs published")
    assert run("publish orders '{}' --id one 2>&-") == (0, "one\n", "")  # and not what would be said on stderr
    status, out, said = run("queues clean orders <&-")
    assert (status, out, "Nobody can be asked here: say --yes" in said) == (2, "", True)
    assert run("queues clean orders --yes >&-") == (0, "", "")
    assert on_redis.count("orders") == 0


@pytest.mark.redis
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stream_that_is_interrupted_goes_on_where_it_stopped(
    start: Start, on_redis: Server, number: signal.Signals, status: int
) -> None:
    on_redis.declare(QueueSpec("orders"))
    words = ("publish", "orders", "-", "--url", on_redis.url, "--namespace", on_redis.namespace, "--json")
    first = start(*words)
    assert first.stdin is not None
    assert first.stdout is not None
    lines = [json.dumps({"n": n}) + "\n" for n in range(5)]
    first.stdin.write("".join(lines[:3]))
    first.stdin.flush()
    assert [json.loads(first.stdout.readline())["line"] for _ in range(3)] == [1, 2, 3]
    first.send_signal(number)
    assert first.wait(30) == status  # before stdin ends, which would end the stream as well
    code, _, err = ended(first)
    assert code == status
    assert "3 jobs published" in err
    assert "--skip 3" in err
    second = start(*words, "--skip", "3")
    out, _ = second.communicate("".join(lines), timeout=30)
    assert [json.loads(line)["line"] for line in out.splitlines()] == [4, 5]
    assert len(on_redis.ready("orders")) == 5


def test_a_replay_that_is_interrupted_goes_on_with_the_rest(start: Start, server: Server) -> None:
    ids = [f"j{n:02}" for n in range(30)]
    server.bury("orders", *((job_id, "rejected", "") for job_id in ids))
    first = start("dead", "replay", "--all", "-q", "orders", "--rate", "20")
    deadline = time.monotonic() + 20
    while server.count("orders") < 3:
        assert time.monotonic() < deadline
    first.send_signal(signal.SIGTERM)
    code, out, err = ended(first)
    assert (code, out) == (143, "")
    assert "jobs put back" in err
    assert "the same command again" in err
    left = server.dead("orders")
    assert 0 < len(left) <= 27
    code, out, err = ended(start("dead", "replay", "--all", "-q", "orders"))
    assert (code, out) == (0, f"{len(left)} jobs put back\n"), err
    assert sorted(set(server.ready("orders"))) == ids


def test_dev_runs_private_brokers_until_ctrl_c_and_leaves_nothing_behind(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")  # of somebody else, and not asked
    dev = start("dev", "redis")
    assert dev.stdout is not None
    exports = dict(dev.stdout.readline().removeprefix("export ").strip().split("=", 1) for _ in range(2))
    assert exports["REDIS_URL"] == exports["MINDTRACE_JOBS_URL"]
    with Redis.from_url(exports["REDIS_URL"]) as server:
        folder = str(server.config_get("dir")["dir"])
        dev.send_signal(signal.SIGINT)
        code, _, err = ended(dev)
        assert (code, "Ctrl-C" in err) == (0, True)
        with pytest.raises(NoRedis):
            server.ping()
    assert not Path(folder).exists()
