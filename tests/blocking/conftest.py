"""`start(code)`: a Python program of its own, which a test reads line by line, talks to and interrupts.

Each on every backend in turn; with `start_locally` where no broker matters.
"""

import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from textwrap import dedent

import pytest

CAP = 10.0  # seconds that anything may take before the test gives up on it

BEGINNING = r"""
import asyncio, faulthandler, gc, os, signal, sys, threading, warnings
from pydantic import BaseModel
from mindtrace.jobs import (  # a star would load the drivers of the servers
    AsyncOrchestrator, ConfigError, Consumer, Depth, JobSchema, JobsError, LocalClient, Orchestrator, QueueSpec,
    RabbitMQClient, RedisClient, Reject, RetryPolicy, WouldDeadlock, connect, current_job,
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background of a shell passes on "ignored"
faulthandler.enable()  # a program that hangs is told by SIGABRT to say where

def print(*words):  # a whole line at once, also where several threads print
    os.write(1, (" ".join(map(str, words)) + "\n").encode())

class Order(BaseModel):
    item: str = "tea"

orders = JobSchema("orders", Order, retry=RetryPolicy(base=0.0))

class Prints(Consumer):
    def run(self, job_dict):
        print("runs", job_dict["input_data"]["item"], job_dict["attempt"])

def a_client(namespace=""):
    url = os.environ["BACKEND"]
    if url == "local://":
        return LocalClient()
    kind = RedisClient if url.startswith("redis") else RabbitMQClient
    return kind.from_url(url, namespace=os.environ["MINE"] + namespace)

def an_orchestrator(namespace=""):
    orchestrator = Orchestrator(a_client(namespace))
    orchestrator.register(orders)
    return orchestrator

def depth_of(orchestrator):  # what the backend cannot count is 0 here
    depth = orchestrator.depth("orders")
    return Depth(depth.ready, depth.scheduled or 0, depth.leased or 0, depth.dead)

def connected(kind, orchestrator):
    consumer = kind("orders")
    consumer.connect(orchestrator)
    return consumer
"""


class Program:
    """A running program. What it prints is read line by line; what it complains of is kept for the end."""

    def __init__(self, code: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.source = folder / "program.py"
        self.source.write_text(code)
        self._complaints = folder / "stderr"
        with self._complaints.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(self.source)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "PYTHONWARNINGS": "default", **environment},
                start_new_session=True,  # so that what it forked can be ended with it
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def line(self) -> str:
        """The next line it prints."""
        line = self._next()
        assert line is not None, f"it printed nothing more:\n{self.errors()}"
        return line

    def say(self, text: str = "") -> None:
        """A line for its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def rest(self) -> list[str]:
        """All further lines, until it has closed its stdout."""
        lines: list[str] = []
        while (line := self._next()) is not None:
            lines.append(line)
        return lines

    def status(self, within: float = CAP) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {within:g} s:\n{self._where()}") from None

    def ends_well(self) -> bool:
        """Whether it ends by itself, with status 0 and no complaint."""
        assert self.status() == 0, self.errors()
        assert self.errors() == ""
        return True

    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return self._complaints.read_text()

    def close(self) -> None:
        """Nothing of it is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def _next(self) -> str | None:
        try:
            return self._lines.get(timeout=CAP)
        except queue.Empty:
            raise AssertionError(f"it printed nothing for {CAP:g} s:\n{self._where()}") from None

    def _where(self) -> str:
        """What each of its threads is doing."""
        self.process.send_signal(signal.SIGABRT)
        self.process.wait()
        return self.errors()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)


@contextmanager
def programs(folder: Path, url: str) -> Iterator[Callable[..., Program]]:
    """Start a program: `first`, the lines that every one begins with, then these. All share one namespace."""
    started: list[Program] = []
    environment = {"BACKEND": url, "MINE": f"t{secrets.token_hex(6)}"}

    def start(code: str, first: str = "") -> Program:
        own = folder / str(len(started))
        own.mkdir()
        started.append(Program(dedent(first) + BEGINNING + dedent(code), own, environment))
        return started[-1]

    yield start
    for program in started:
        program.close()


LOCAL = pytest.param("local", marks=pytest.mark.local)
REDIS = pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.uses_broker("redis")])
RABBITMQ = pytest.param("rabbitmq", marks=[pytest.mark.rabbitmq, pytest.mark.uses_broker("rabbitmq")])


@pytest.fixture(params=[LOCAL, REDIS, RABBITMQ])
def backend(request: pytest.FixtureRequest) -> str:
    """Each in turn."""
    return request.param


@pytest.fixture
def start(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Program]]:
    """Start a program; on a server all of a test's have one namespace."""
    url = "local://" if backend == "local" else request.getfixturevalue(f"{backend}_url")
    with programs(tmp_path, url) as start:
        yield start


@pytest.fixture(params=[LOCAL, REDIS])
def start_local_or_redis(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Program]]:
    """For a program that needs to know how many jobs are leased, or that declares hundreds of queues."""
    url = "local://" if request.param == "local" else request.getfixturevalue("redis_url")
    with programs(tmp_path, url) as start:
        yield start


@pytest.fixture(params=[LOCAL])
def start_locally(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a program on the local backend."""
    with programs(tmp_path, "local://") as start:
        yield start


@pytest.fixture(params=[REDIS])
def start_on_redis(tmp_path: Path, redis_url: str) -> Iterator[Callable[..., Program]]:
    """Start a program on Redis."""
    with programs(tmp_path, redis_url) as start:
        yield start


@pytest.fixture
def start_on(tmp_path: Path) -> Iterator[Callable[[str], Callable[..., Program]]]:
    """`start_on(url)` starts programs on a server of the test's own."""
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(programs(tmp_path, url))
