"""The command as a process of its own: how it ends by signal, without a reader, without a broker."""

import json
import os
import signal
import subprocess
import sys
import time
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
