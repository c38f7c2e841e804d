"""`site`: a folder with an application, a namespace on a broker, and `mindtrace-jobs worker` as people run it."""

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any

import pytest

from mindtrace.jobs import AsyncOrchestrator, Depth, Job, QueueSpec, RabbitMQBackend, RedisBackend
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import Broker

CAP = 20.0  # seconds that anything may take before the test gives up on it

APP = '''
import asyncio, logging, os, sys, threading, time
from pathlib import Path
from mindtrace.jobs import AsyncConsumer, AsyncOrchestrator, LocalBackend, RabbitMQBackend, RedisBackend, Worker

def say(*words):  # a whole line at once, also where several processes print
    os.write(1, (" ".join(map(str, (os.getpid(), *words))) + "\\n").encode())

kind = RabbitMQBackend if os.environ["BROKER"].startswith("amqp") else RedisBackend

def an_orchestrator():
    return AsyncOrchestrator(kind.from_url(os.environ["BROKER"], namespace=os.environ["MINE"]))

class Works(AsyncConsumer):
    """Waits until there is a file, or does what else its input says."""
    async def run(self, job_dict):
        data = job_dict["input_data"]
        say("begins", data["n"], job_dict["attempt"])
        logging.getLogger("shop").info("from within")
        time.sleep(data.get("blocks", 0.0))
        while "gate" in data and not Path(data["gate"]).exists():
            await asyncio.sleep(0.01)
        say("ends", data["n"])
        return {}

worker = Worker(an_orchestrator(), [Works("jobs")])
'''


class Lines:
    """What comes out of a stream, as it comes."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: list[str] = []
        self._at, self._open = 0, True
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def until(self, pattern: str, within: float = CAP) -> re.Match[str]:
        """Wait for a line in which this is found; what was before it is not looked at again."""
        deadline = time.monotonic() + within
        with self._news:
            while True:
                while self._at < len(self._lines):
                    self._at += 1
                    if found := re.search(pattern, self._lines[self._at - 1]):
                        return found
                left = deadline - time.monotonic()
                assert self._open, f"it has ended, and no {pattern!r} in:\n{self._text()}"
                assert left > 0, f"no {pattern!r} in:\n{self._text()}"
                self._news.wait(left)

    def all(self) -> list[str]:
        """All lines, once the stream has ended."""
        self._thread.join(CAP)
        assert not self._open, f"there may be more of it:\n{self._text()}"
        return self._lines

    def so_far(self) -> list[str]:
        """All lines until now."""
        with self._news:
            return list(self._lines)

    def _text(self) -> str:
        return "\n".join(self._lines)

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._news:
                    self._lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._open = False
            self._news.notify_all()


class Command:
    """`mindtrace-jobs worker`, running or ended."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self.pid: int = self._process.pid
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.out, self.err = Lines(self._process.stdout), Lines(self._process.stderr)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ctrl_c(self) -> None:
        """As a terminal has it: all processes of the foreground get the signal."""
        os.killpg(self.pid, signal.SIGINT)

    def status(self, within: float = CAP) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {within:g} s:\n" + "\n".join(self.err.so_far())) from None

    def children(self) -> list[int]:
        """The processes that it has started, as it tells."""
        return [int(found[1]) for line in self.err.so_far() if (found := re.search(r"started, pid (\d+)", line))]

    def port(self) -> int:
        """Where its probes are."""
        return int(self.err.until(r"^health +http://127\.0\.0\.1:(\d+)")[1])

    def close(self) -> None:
        """Nothing of it is left."""
        for pid in (self.pid, *self.children()):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._process.wait()


class Site:
    """An application in a folder, and its namespace on a broker."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url, self.namespace = folder, url, f"t{secrets.token_hex(6)}"
        self._commands: list[Command] = []
        self.write(APP)
        self.write(APP, "good.py")

    def write(self, code: str, name: str = "app.py") -> None:
        """A module of the application."""
        (self.folder / name).write_text(code)

    def start(self, *words: str, python: str = "", **environment: str) -> Command:
        """Start `mindtrace-jobs worker` with these words; `python` is run before it, in its process."""
        command = [sys.executable, "-m", "mindtrace.jobs", "worker", *words]
        if python:
            main = f"import sys; {python}; from mindtrace.jobs.cli import main; sys.exit(main(sys.argv[1:]))"
            command = [sys.executable, "-c", main, "worker", *words]
        given = {"BROKER": self.url, "MINE": self.namespace, "PYTHONWARNINGS": "default", **environment}
        self._commands.append(Command(command, self.folder, given))
        return self._commands[-1]

    def gate(self, name: str = "gate") -> Path:
        """A file that is not there yet."""
        return self.folder / name

    def publish(self, count: int = 1, queue: str = "jobs", **data: Any) -> list[str]:
        """Publish so many jobs; the input's `n` counts them from 1."""

        async def publish(orchestrator: AsyncOrchestrator) -> list[str]:
            await orchestrator.declare(QueueSpec(queue))
            inputs = [{"n": n + 1, **data} for n in range(count)]
            return await orchestrator.publish_many(
                queue, [Job(name=queue, schema_name=queue, input_data=one) for one in inputs]
            )

        return self.ask(publish)

    def depth(self, queue: str = "jobs") -> Depth:
        return self.ask(lambda orchestrator: orchestrator.depth(queue))

    def ask(self, question: Callable[[AsyncOrchestrator], Awaitable[Any]]) -> Any:
        """What the orchestrator says."""

        async def asked() -> Any:
            kind = RabbitMQBackend if self.url.startswith("amqp") else RedisBackend
            async with AsyncOrchestrator(kind.from_url(self.url, namespace=self.namespace)) as orchestrator:
                return await question(orchestrator)

        return asyncio.run(asked())

    def close(self) -> None:
        for command in self._commands:
            command.close()


@pytest.fixture
def site(tmp_path: Path, redis_url: str) -> Iterator[Site]:
    """On the Redis of all tests."""
    site = Site(tmp_path, redis_url)
    yield site
    site.close()


@pytest.fixture
def site_on(tmp_path: Path) -> Iterator[Callable[[str], Site]]:
    """`site_on(url)` is on a broker of the test's own."""
    sites: list[Site] = []

    def made(url: str) -> Site:
        sites.append(Site(tmp_path, url))
        return sites[-1]

    yield made
    for site in sites:
        site.close()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A Redis of the test's own, with the settings of an indirect parameter."""
    with brokers.redis(private=True, settings=getattr(request, "param", None)) as server:
        yield server


@pytest.fixture
def probe() -> Callable[[int, str], tuple[int, Any]]:
    """`probe(port, path)`: status and body."""

    def ask(port: int, path: str) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    return ask


@pytest.fixture
def until() -> Callable[..., None]:
    """Waits for a condition that nobody tells of."""

    def wait(condition: Callable[[], Any], within: float = CAP) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return wait
