"""`start(code)`: a Python program of its own, which a test reads line by line, talks to and interrupts."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import pytest

CAP = 10.0  # seconds that anything may take before the test gives up on it

BEGINNING = r"""
import asyncio, faulthandler, os, signal, sys, threading, warnings
from pydantic import BaseModel
from mindtrace.jobs import *

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

def an_orchestrator():
    orchestrator = Orchestrator(LocalClient())
    orchestrator.register(orders)
    return orchestrator

def connected(kind, orchestrator):
    consumer = kind("orders")
    consumer.connect(orchestrator)
    return consumer
"""


class Program:
    """A running program. What it prints is read line by line; what it complains of is kept for the end."""

    def __init__(self, code: str, folder: Path) -> None:
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
                env={**os.environ, "PYTHONWARNINGS": "default"},
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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a program: `first`, the lines that every one begins with, then these."""
    programs: list[Program] = []

    def begin(code: str, first: str = "") -> Program:
        folder = tmp_path / str(len(programs))
        folder.mkdir()
        programs.append(Program(dedent(first) + BEGINNING + dedent(code), folder))
        return programs[-1]

    yield begin
    for program in programs:
        program.close()
