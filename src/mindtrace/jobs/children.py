"""One child process of a worker, as the worker sees it: how it is started, asked to run a job, looked at and killed."""

import asyncio
import contextvars
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import fields
from math import inf
from typing import Any, cast

from pydantic_core import from_json

from mindtrace.jobs.child import LARGEST, SIGNALS, Unwritable, packed
from mindtrace.jobs.consumer import AnyConsumer, CurrentJob, enter_job, main_file
from mindtrace.jobs.errors import Refused, RetryLater, RunFailed, Snooze
from mindtrace.jobs.inquiry import Asked
from mindtrace.jobs.memory import resident

_BOOT = "import sys; sys.path[:] = sys.argv[3:]; from mindtrace.jobs.child import main; main(*map(int, sys.argv[1:3]))"


class Child(asyncio.Protocol):
    """A process that runs the jobs of one consumer, one at a time.

    A fresh interpreter, and the leader of a session of its own: what user code starts in it is killed with it, and no
    Ctrl-C at a terminal reaches it.

    Args:
        consumer: whose jobs.

    Raises:
        OSError: the system has no process to give.

    Attributes:
        consumer: whose jobs.
        process: which runs them.
        asked: where in its code it is.
        jobs: how many it was given.
        why: it was killed, or broken off; empty for no reason of ours.
        ended: done once its socket is closed.
    """

    def __init__(self, consumer: AnyConsumer[Any, Any]) -> None:
        loop = asyncio.get_running_loop()
        self.consumer: AnyConsumer[Any, Any] = consumer
        with ExitStack() as ours, ExitStack() as theirs:
            self._socket, jobs = _pair(ours, theirs)
            asking, asks = _pair(ours, theirs)
            self.process: subprocess.Popen[bytes] = _spawned(jobs.fileno(), asks.fileno())
            ours.pop_all()
        self.asked: Asked = Asked(asking)
        self.jobs: int = 0
        self.why: str = ""
        self.ended: asyncio.Future[None] = loop.create_future()  # its socket is
        self._answer: asyncio.Future[dict[str, Any] | None] = loop.create_future()  # None: it ended without one
        self._job: CurrentJob | None = None
        self._transport: asyncio.Transport | None = None  # which has the socket from then on
        self._buffer = bytearray()

    async def greet(self) -> dict[str, Any] | None:
        """Tell it what to make. Gives what it says to that; None if it ended without a word."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._socket)
        return await self._begin(_first_frame(self.consumer))

    def _begin(self, frame: bytes) -> "asyncio.Future[dict[str, Any] | None]":
        """Send it. The future has the answer, or None once there will be none."""
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is None or self.ended.done():
            self._answer.set_result(None)
        else:
            self._transport.write(frame)
        return self._answer

    async def perform(self, job: CurrentJob, data: Any) -> dict[str, Any] | None:
        """Have it run a job; `data` is what the method takes. Gives its answer; None if it ended without one."""
        self._job = job
        self.jobs += 1
        try:
            return await self._begin(_job_frame(job, data))
        finally:
            self._job = None

    def retire(self) -> None:
        """Tell it that there are no more jobs."""
        if self._transport is not None and not self.ended.done():
            self._transport.write_eof()

    def kill(self) -> None:
        """End it and what it has started; only as long as nobody has asked how it ended, or the id may be another's."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.asked.close()
        if self._transport is None:
            self._socket.close()
        else:
            self._transport.abort()

    def is_dead(self) -> bool:
        """Whether it is a zombie; it stays one."""
        if sys.platform == "darwin":  # where Python has no waitid
            return self.process.poll() is not None
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # the application takes in what its children leave
            return True

    def holds(self) -> int:
        """MiB of memory; 0 if it is gone."""
        with suppress(OSError, IndexError):
            return int(resident(self.process.pid))
        return 0

    def is_too_large(self) -> bool:
        """Whether it holds more than its consumer allows."""
        limit = self.consumer.max_memory
        return limit is not None and self.holds() > limit

    def how_it_ended(self) -> str:
        """In words; once it is known."""
        status = self.process.returncode
        if self.why:
            return self.why
        if status is None:
            return "the process that ran it no longer answers"
        if status >= 0:
            return f"the process that ran it ended with exit status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"the process that ran it was ended by {name}{hint}"

    # --- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It has its end of the socket."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take the frames that are complete."""
        self._buffer += data
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if size > LARGEST:
                return self._break()
            if len(self._buffer) < 4 + size:
                return None
            body = bytes(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]
            try:
                self._take(dict(from_json(body)))
            except (ValueError, LookupError, TypeError, AttributeError):
                return self._break()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over, or will be."""
        if not self.ended.done():
            self.ended.set_result(None)
        if not self._answer.done():
            self._answer.set_result(None)

    def _take(self, frame: dict[str, Any]) -> None:
        if "log" in frame:
            record = logging.makeLogRecord(frame["log"])
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                context = contextvars.copy_context()
                if self._job is not None:
                    context.run(enter_job, self._job)
                context.run(logger.handle, record)
        elif not self._answer.done():
            self._answer.set_result(frame)

    def _break(self) -> None:
        self.why = "the process that ran it wrote into the socket to its worker"
        self.kill()


def _pair(ours: ExitStack, theirs: ExitStack) -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    return ours.enter_context(one), theirs.enter_context(other)


def _spawned(*fds: int) -> "subprocess.Popen[bytes]":
    flags = {
        "O": sys.flags.optimize, "B": sys.flags.dont_write_bytecode, "I": sys.flags.isolated,
        "E": sys.flags.ignore_environment, "s": sys.flags.no_user_site,
    }  # fmt: skip
    options = [f"-{letter * count}" for letter, count in flags.items() if count]
    options += [f"-W{option}" for option in sys.warnoptions]
    paths = [str(path) for path in sys.path]
    return subprocess.Popen(  # noqa: S603 (this very interpreter)
        [sys.executable, *options, "-c", _BOOT, *map(str, fds), *paths],
        stdin=subprocess.DEVNULL,
        pass_fds=fds,
        start_new_session=True,
    )


def _first_frame(consumer: AnyConsumer[Any, Any]) -> bytes:
    spec: Any = getattr(sys.modules.get("__main__"), "__spec__", None)
    name: str | None = None if spec is None else spec.name
    root = logging.getLogger()
    levels = {"": root.level}
    for logger in list(root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET:
            levels[logger.name] = logger.level
    cls = type(consumer)
    return packed(
        {
            "worker": os.getpid(),
            "argv": list(sys.argv),
            "levels": levels,
            "main_name": None if name == "__main__" else name,  # of a folder or an archive, which has a file
            "main_file": main_file(),
            "module": cls.__module__,
            "qualname": cls.__qualname__,
            "name": consumer.job_type_name,
        }
    )


def _job_frame(job: CurrentJob, data: Any) -> bytes:
    facts = {field.name: getattr(job, field.name) for field in fields(job) if field.name != "deadline"}
    facts["headers"] = dict(job.headers)
    left = None if job.deadline == inf else job.deadline - time.monotonic()
    return packed({"job": facts, "left": left, "input": data})


def result_of(answer: dict[str, Any]) -> object:
    """What a run returned; or raise what it raised."""
    if "failed" in answer:
        failed = RunFailed(**answer["failed"])
        if "signal" not in answer:
            raise failed
        kind, delay, reason = (answer["signal"][name] for name in ("kind", "delay", "reason"))
        asked = SIGNALS[kind]
        raise (asked(delay, reason) if asked in (RetryLater, Snooze) else asked(reason)) from failed
    if "refused" in answer:
        raise Refused("input_invalid", answer["refused"])
    if "unwritable" in answer:
        return Unwritable(answer["unwritable"])
    return answer["done"]
