"""`start(command)`: a program that the test reads line by line and ends by a signal."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from mindtrace.jobs.testing import brokers

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0  # seconds for anything that a test waits for


class Program:
    """One that runs in a process group of its own, from the root of the repository."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("MINDTRACE_JOBS_URL", "PORT")}
        self.said: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**kept, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def says(self, pattern: str) -> "re.Match[str]":
        """The next line that has it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"it never said {pattern!r}, but:\n{''.join(self.said)}")
            if found := re.search(pattern, line):
                return found

    def ends(self) -> int:
        """Its exit status, once nothing of its process group is left."""
        status = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)  # whatever it had started, and has its output, is gone as well
        assert not self._reader.is_alive()
        with pytest.raises(ProcessLookupError):
            os.killpg(self._process.pid, 0)
        return status

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self.ends()

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)
            self._lines.put(line)
        self._lines.put(None)


Start = Callable[..., Program]


@pytest.fixture(scope="session")
def own_rabbitmq() -> Iterator[brokers.Broker]:
    """For all examples: each has queues of its own, and takes seconds less than a server."""
    with brokers.rabbitmq(private=True) as server:
        yield server


@pytest.fixture
def start() -> Iterator[Start]:
    """`start("uvicorn", ..., NAME="value")`: with the interpreter's own scripts first on its path."""
    with ExitStack() as stack:

        def started(*command: str, **environment: str) -> Program:
            beside = Path(sys.executable).parent / command[0]
            program = Program([str(beside), *command[1:]], environment)
            stack.callback(program.close)
            return program

        yield started
