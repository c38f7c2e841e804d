"""What a child process of a worker does: it makes one consumer, and runs its jobs one after another.

`processes` starts it, and talks to it over a socket that nothing else uses: what user code prints goes where the
worker's own output goes. A frame is its length in 4 bytes, then a JSON object. Nothing else crosses: no pickle.

    worker ──> child    what to make             job                job                 (end: there are no more)
    child ──> worker                 ready           log, done          log, failed                             (end)

Over a second one it is asked where in its code it is: `inquiry`.

The class to import stands in the first frame, which the application's own worker writes; no job names one.
"""

import contextvars
import importlib
import inspect
import io
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, from_json, to_json

from mindtrace.jobs.consumer import AnyConsumer, CurrentJob, enter_job
from mindtrace.jobs.delivery import RunError
from mindtrace.jobs.errors import Discard, JobSignal, Refused, Reject, RetryLater, RunAborted, Snooze, qualified
from mindtrace.jobs.inquiry import answer
from mindtrace.jobs.job import as_sent
from mindtrace.jobs.retry import is_seconds

LARGEST: Final = 16 * 1024 * 1024
"""Bytes of one frame from a child: what a run returns may be as large as an input, at most."""
LEAVE_WITHIN: Final = 2.0
"""Seconds that a child without a job has to end in good order."""
SIGNALS: Final[Mapping[str, type[JobSignal]]] = {kind.__name__: kind for kind in (RetryLater, Snooze, Discard, Reject)}

_MAIN = "__mindtrace_jobs_main__"
_LOOK = 1.0  # seconds between looks whether the worker is still there
_LOG_LONGEST = 64 * 1024
_serving = threading.Event()


@dataclass(frozen=True, slots=True)
class Unwritable:
    """In place of what a run returned, and why it could not be told to another process."""

    why: str


def is_child() -> bool:
    """Whether this process is one that a worker has started for its jobs."""
    return _serving.is_set()


def packed(frame: Mapping[str, Any]) -> bytes:
    """A frame as it travels.

    Raises:
        ValueError: it holds what JSON cannot carry.
    """
    return _framed(to_json(frame))


def main(jobs: int, asks: int) -> None:
    """Serve the worker at the other end of these sockets, until it sends no more."""
    _serving.set()
    line = _Line(jobs, asks)
    _take_no_signals(line)
    out: Any = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(line_buffering=True)  # or a child that is killed would take with it what it printed
    wanted = line.receive()
    if wanted is None:
        return
    worker: int = wanted["worker"]
    threading.Thread(target=line.watch, args=(worker,), name="mindtrace-jobs-watcher", daemon=True).start()
    _forward_logs(line, wanted["levels"])
    try:
        runner = _Runner(wanted)
    except BaseException as error:  # user code: a module and a constructor
        told = RunError.of(error)
        line.answer(packed({"unfit": f"{told.type}: {told.message}", "traceback": told.traceback}))
        return
    line.answer(packed({"ready": True}))
    leaves = False
    while not leaves and (job := line.next()) is not None:
        answer, leaves = runner.perform(job)
        for name in ("stdout", "stderr"):
            with suppress(Exception):  # the user may have put anything in their place
                getattr(sys, name).flush()
        line.answer(answer)


class _Line:
    """The sockets to the worker. Once `watch` runs, it is the only one who reads."""

    def __init__(self, jobs: int, asks: int) -> None:
        for fd in (jobs, asks):
            os.set_inheritable(fd, False)  # what user code starts must not hold it open
        self._socket, self._asks = socket.socket(fileno=jobs), socket.socket(fileno=asks)
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._sending, self._turning = threading.Lock(), threading.Lock()
        self._busy = True  # with the imports
        self._over = False

    def close(self) -> None:
        self._socket.close()
        self._asks.close()

    def send(self, frame: bytes) -> None:
        with self._sending, suppress(OSError):  # the worker is gone: `watch` knows what to do
            self._socket.sendall(frame)

    def next(self) -> dict[str, Any] | None:
        """The next job, waited for; None if there are no more."""
        job = self._jobs.get()
        with self._turning:
            if self._over:  # also if there was one more: nobody waits for it
                return None
            self._busy = job is not None
        return job

    def answer(self, frame: bytes) -> None:
        with self._turning:
            self._busy = False  # before the answer: once that is read, the worker may end the line
        self.send(frame)

    def receive(self) -> dict[str, Any] | None:
        """The next frame; None at the end."""
        head = self._read(4)
        body = None if head is None else self._read(int.from_bytes(head, "big"))
        return None if body is None else from_json(body)

    def watch(self, worker: int) -> None:
        """Read jobs until the worker sends no more, or is gone: then this process must not outlive it.

        In the middle of a job it ends at once, with all that the job has started. Without one it has a moment to end in
        good order. Whoever asks meanwhile is told where the main thread is, which runs the user's code.
        """
        poll, jobs, asks = select.poll(), self._socket.fileno(), self._asks.fileno()
        poll.register(jobs, select.POLLIN)
        poll.register(asks, select.POLLIN)
        main = threading.main_thread().ident or 0
        while True:
            ready = {fd for fd, _ in poll.poll(_LOOK * 1000)}
            if asks in ready and not answer(self._asks, main):
                poll.unregister(asks)
            if jobs not in ready:
                # A process that the worker forked may hold the other end open: so the parent is looked at as well.
                # (Linux could kill this one when the parent dies, but that would leave what a job has started.)
                if os.getppid() != worker:
                    break
                continue
            frame = self.receive()
            if frame is None:
                break
            self._jobs.put(frame)
        with self._turning:
            if self._busy:
                _end_group()
            self._over = True
        self._jobs.put(None)
        time.sleep(LEAVE_WITHIN)
        _end_group()

    def _read(self, size: int) -> bytes | None:
        parts: list[bytes] = []
        while size:
            try:
                part = self._socket.recv(min(size, 1024 * 1024))
            except OSError:
                return None
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class _Runner:
    """The consumer, and what it takes. Raises whatever the import and the constructor raise."""

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        sys.argv[:] = wanted["argv"]
        self._main_name = ""
        if wanted["module"] == "__main__":
            module = _load_main(wanted)
            self._main_name = module.__name__
        else:
            module = importlib.import_module(wanted["module"])
        found: Any = module
        for name in wanted["qualname"].split("."):
            found = getattr(found, name)
        if not _is_consumer_class(found):
            raise TypeError(f"{wanted['module']}:{wanted['qualname']} is no consumer class")
        consumer: AnyConsumer[Any, Any] = found(wanted["name"])
        consumer.job_type_name = wanted["name"]  # should its constructor not have kept it
        self._method = getattr(consumer, consumer.calls.method or "")
        self._schema = consumer.schema() if consumer.calls.method == "handle" else None

    def perform(self, frame: Mapping[str, Any]) -> tuple[bytes, bool]:
        """Run a job. Gives the answer, and whether this process is to end."""
        deadline = time.monotonic() + frame["left"] if frame["left"] is not None else float("inf")
        job = CurrentJob(**frame["job"], deadline=deadline)
        try:
            data = frame["input"] if self._schema is None else self._schema.received(frame["input"])
        except Refused as refused:  # a validator that thinks otherwise here
            return packed({"refused": str(refused)}), False
        try:
            returned = contextvars.copy_context().run(self._call, job, data)
        except BaseException as error:  # user code; it becomes a settlement in the worker
            if isinstance(error, MemoryError):
                traceback.clear_frames(error.__traceback__)  # memory is full of what they hold: nothing could be told
            leaves = isinstance(error, SystemExit | KeyboardInterrupt | MemoryError)
            return self._told(error, leaves), leaves
        return _written(returned), False

    def _call(self, job: CurrentJob, data: Any) -> Any:
        enter_job(job)
        returned = self._method(data)
        if inspect.iscoroutine(returned):
            returned.close()
            raise TypeError(f"{self._method.__qualname__} gave a coroutine: executor='process' needs a plain def")
        return returned

    def _told(self, error: BaseException, leaves: bool) -> bytes:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # ours
        told = RunError.of(error.with_traceback(trace))
        last = traceback.extract_tb(trace, limit=-1)
        # To a policy what is no Exception is what it is in a worker's own process.
        above = (type(error) if isinstance(error, Exception) else RunAborted).__mro__
        failure: dict[str, Any] = {
            "type": self._named_as_in_worker(told.type, "."),
            "message": told.message,
            "traceback": told.traceback,
            "place": f"{last[0].name}, {last[0].filename}:{last[0].lineno}" if last else "",
            "kinds": [self._named_as_in_worker(qualified(kind), ":") for kind in above],
        }
        frame: dict[str, Any] = {"failed": failure, "leaves": leaves}
        for name, kind in SIGNALS.items():
            if isinstance(error, kind):
                delay, reason = getattr(error, "delay", None), getattr(error, "reason", "")
                frame["signal"] = {
                    "kind": name,
                    "delay": delay if is_seconds(delay) else None,
                    "reason": reason.encode("utf-8", "replace").decode() if isinstance(reason, str) else "",
                }
        return packed(frame)

    def _named_as_in_worker(self, name: str, separator: str) -> str:
        """What is in the program itself has another module here."""
        prefix = self._main_name + separator
        return f"__main__{separator}{name[len(prefix) :]}" if self._main_name and name.startswith(prefix) else name


class _ToWorker(logging.Handler):
    """Has the worker's process log it, where logging is set up."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.exc_info and not record.exc_text:
                record.exc_text = logging.Formatter().formatException(record.exc_info)
            facts = {**vars(record), "msg": record.getMessage(), "args": None, "exc_info": None}
            plain = {
                name: value[:_LOG_LONGEST].encode("utf-8", "replace").decode() if isinstance(value, str) else value
                for name, value in facts.items()
                if isinstance(value, str | int | float) or value is None
            }
            self._line.send(packed({"log": plain}))
        except Exception:  # what is logged is the user's
            self.handleError(record)


def _is_consumer_class(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, AnyConsumer)


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def _written(returned: object) -> bytes:
    """The answer that carries a result."""
    try:
        body = to_json({"done": as_sent(returned) if isinstance(returned, BaseModel) else returned})
    except Exception as error:  # serializers are the user's code
        text = str(error)  # else it may quote what a serializer raised, and with that payload
        is_plain = isinstance(error, PydanticSerializationError) and text.startswith("Unable to serialize unknown type")
        why = f" ({text[:200]})" if is_plain else ""
        return packed({"unwritable": f"it cannot be written as JSON: {type(error).__name__}{why}"})
    if len(body) > LARGEST:
        return packed({"unwritable": f"{len(body)} bytes of JSON, {LARGEST} allowed"})
    return _framed(body)


def _load_main(wanted: Mapping[str, Any]) -> ModuleType:
    """The worker's program, under a name of its own: what stands under `if __name__ == "__main__"` is not run."""
    if wanted["main_name"] is not None:  # python -m
        return importlib.import_module(wanted["main_name"])
    loader = SourceFileLoader(_MAIN, wanted["main_file"])
    spec = spec_from_loader(_MAIN, loader)
    assert spec is not None  # noqa: S101 (a loader was given)
    module = sys.modules[_MAIN] = module_from_spec(spec)
    loader.exec_module(module)
    return module


def _take_no_signals(line: _Line) -> None:
    """Whoever signals a whole group, a terminal or a service manager, means the worker, which decides.

    By a handler that does nothing: to ignore a signal is inherited by whatever user code starts.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        signal.signal(number, _leave_it)

    def in_fork() -> None:
        line.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=in_fork)


def _leave_it(number: int, frame: object) -> None:
    pass


def _end_group() -> None:
    """This process, and what it has started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _forward_logs(line: _Line, levels: Mapping[str, int]) -> None:
    """Log what the worker's process would, by the levels that are set there; the empty name is the root's."""
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)
    logging.getLogger().addHandler(_ToWorker(line))
