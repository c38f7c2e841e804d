"""Where blocking code runs: a bounded pool of daemon threads, or the thread that called `consume()`."""

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from mindtrace.jobs.errors import ForkedProcess


@dataclass(slots=True)
class Outcome:
    """What a call ended with: `error` if it raised, else `value`."""

    value: Any = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class _Call:
    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Outcome]"
    pid: int = field(default_factory=os.getpid)

    def execute(self) -> Outcome:
        try:
            outcome = Outcome(self.function())
        except BaseException as error:  # user code; it becomes a settlement in the worker
            outcome = Outcome(error=error)
        if os.getpid() == self.pid:
            self.answer(outcome)
        return outcome

    def answer(self, outcome: Outcome) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._set, outcome)

    def _set(self, outcome: Outcome) -> None:
        if not self.future.done():
            self.future.set_result(outcome)


class BlockingRuns(Protocol):
    """Runs functions elsewhere than on the loop."""

    def start(self, function: Callable[[], Any]) -> "asyncio.Future[Outcome]":
        """Have it run; cancelling the future does not stop it."""
        ...

    def close(self) -> None:
        """Take no more calls. Does not wait for those that run: a thread cannot be stopped."""
        ...


class ThreadPool:
    """Up to `size` threads, started when needed; daemons, so that one that never returns cannot keep the process."""

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name = size, name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads = self._busy = 0

    def start(self, function: Callable[[], Any]) -> "asyncio.Future[Outcome]":
        """Have it run in a thread of the pool."""
        loop = asyncio.get_running_loop()
        call = _Call(function, loop, loop.create_future())
        if self._threads < min(self._busy + 1, self._size):
            # Counted once it runs: if there are no more threads to be had, this one call fails and the next one tries.
            threading.Thread(target=self._serve, name=f"{self._name}-{self._threads + 1}", daemon=True).start()
            self._threads += 1
        self._busy += 1
        call.future.add_done_callback(self._one_less)
        self._calls.put(call)
        return call.future

    def close(self) -> None:
        """End the threads, each when its call returns."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _one_less(self, _: object) -> None:
        self._busy -= 1

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call.execute()


class CallerThread:
    """The thread that calls `serve()`, until `close()`. Ctrl-C may hit it at any line: no call is left unanswered."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._open: set[_Call] = set()
        self._interrupted = False

    def start(self, function: Callable[[], Any]) -> "asyncio.Future[Outcome]":
        """Have it run in the serving thread."""
        loop = asyncio.get_running_loop()
        call = _Call(function, loop, loop.create_future())
        self._open.add(call)
        call.future.add_done_callback(lambda _: self._open.discard(call))
        if self._interrupted:  # looked at after the call is entered: `interrupt` does it the other way round
            call.answer(Outcome(error=KeyboardInterrupt()))
        else:
            self._calls.put(call)
        return call.future

    def close(self) -> None:
        """Let `serve` return. From any thread."""
        self._calls.put(None)

    def serve(self) -> None:
        """Run calls, one at a time, until closed.

        Raises:
            KeyboardInterrupt: Ctrl-C, whether it met a run or the wait for one.
            ForkedProcess: a run has forked, and this is the child.
        """
        while (call := self._calls.get()) is not None:
            outcome = call.execute()
            if os.getpid() != call.pid:  # the run forked, and this is the child: the jobs are the parent's
                raise outcome.error or ForkedProcess("the run returned in a forked process: end that by os._exit()")
            if isinstance(outcome.error, KeyboardInterrupt):
                raise KeyboardInterrupt

    def interrupt(self) -> None:
        """From now on nothing is run: all calls, those that were taken included, end with a `KeyboardInterrupt`."""
        self._interrupted = True
        for call in list(self._open):
            call.answer(Outcome(error=KeyboardInterrupt()))
