"""The background loop of the blocking face: one per process, started when first needed, closed at exit."""

import asyncio
import atexit
import inspect
import logging
import os
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from mindtrace.jobs.errors import WouldDeadlock

_log = logging.getLogger(__name__)

R = TypeVar("R")

_EXIT_TIMEOUT = 2.0


class Background:
    """A loop in a daemon thread, and what has to be closed with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self._warned = False
        self._of_parents: list[tuple[asyncio.AbstractEventLoop, set[asyncio.Task[Any]]]] = []

    def call(self, function: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Run a coroutine on the loop and wait for it.

        Raises:
            WouldDeadlock: called from the loop itself.
        """
        return self.start(function).result()

    def start(self, function: Callable[[], Coroutine[Any, Any, R]]) -> "Future[R]":
        """Run a coroutine on the loop; the caller is going to wait for it. Raises as `call`."""
        loop = self._loop_for_caller()
        future: Future[R] = Future()

        def begin() -> None:  # the coroutine is made on the loop: Ctrl-C cannot come between its making and its task
            loop.create_task(_answered(function, future)).add_done_callback(lambda _: future.cancel())

        # A third of the time of a call through the portal, which is there for the loop's start and end.
        loop.call_soon_threadsafe(begin)
        return future

    def at_exit(self, close: Callable[[], Awaitable[None]]) -> None:
        """Have `close` called on the loop before the process ends; the last one first."""
        self._closing.append(close)

    def not_at_exit(self, close: Callable[[], Awaitable[None]]) -> None:
        """It is closed already."""
        if close in self._closing:  # not in a forked child
            self._closing.remove(close)

    def close(self) -> None:
        """Close what is open and end the loop, within 2 s; what is unsettled by then is for the leases."""
        portal, thread = self._portal, self._thread
        self._portal = self._loop = None
        if portal is None or thread is None or threading.current_thread() is thread:
            return
        until = time.monotonic() + _EXIT_TIMEOUT
        with suppress(RuntimeError):  # the loop has ended already
            closing = portal.start_task_soon(self._close_all)
            try:
                closing.result(_EXIT_TIMEOUT)
            except TimeoutError:
                _log.warning(
                    "closing at exit took longer than %g s: what is unsettled is for the leases", _EXIT_TIMEOUT
                )
            portal.start_task_soon(partial(portal.stop, cancel_remaining=True))
        thread.join(max(0.0, until - time.monotonic()))

    def forget(self) -> None:
        """In a forked child: the parent's loop may say that it runs, and never does.

        Its tasks are kept as they are: collected, each would complain that it has not come to its end.
        """
        if self._loop is not None:
            self._of_parents.append((self._loop, asyncio.all_tasks(self._loop)))
        self._lock, self._portal, self._loop, self._thread = threading.Lock(), None, None, None
        self._closing, self._warned = [], False

    def _loop_for_caller(self) -> asyncio.AbstractEventLoop:
        loop = self._loop or self._started()
        if threading.current_thread() is self._thread:
            raise WouldDeadlock("a blocking call on the background loop would wait for itself: await the async API")
        if not self._warned and asyncio._get_running_loop() is not None:
            self._warned = True
            warnings.warn(
                "a blocking call in a running event loop, which stands still meanwhile: await AsyncOrchestrator there",
                RuntimeWarning,
                stacklevel=_frames_of_ours(),
            )
        return loop

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                found: Future[tuple[BlockingPortal, asyncio.AbstractEventLoop]] = Future()
                self._thread = threading.Thread(target=_run, args=(found,), name="mindtrace-jobs", daemon=True)
                self._thread.start()
                self._portal, self._loop = found.result()
            return self._loop

    async def _close_all(self) -> None:
        for close in self._closing[::-1]:
            try:
                await close()
            except Exception:  # one that fails must not keep the others open
                _log.exception("closing at exit")


async def _answered(function: Callable[[], Coroutine[Any, Any, R]], future: "Future[R]") -> None:
    try:
        future.set_result(await function())
    except asyncio.CancelledError:  # the loop ends
        future.cancel()
        raise
    except BaseException as error:  # a SystemExit, of a listener say, must not stop the loop under everyone
        future.set_exception(error)


def _frames_of_ours() -> int:
    """How far up the stack the user's own line is."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("mindtrace.jobs."):
        frame, level = frame.f_back, level + 1
    return level


def _run(found: "Future[tuple[BlockingPortal, asyncio.AbstractEventLoop]]") -> None:
    try:
        anyio.run(_serve, found)
    except BaseException as error:  # told to who waits for the loop, who would wait for ever
        if found.done():
            raise
        found.set_exception(error)


async def _serve(found: "Future[tuple[BlockingPortal, asyncio.AbstractEventLoop]]") -> None:
    async with BlockingPortal() as portal:
        found.set_result((portal, asyncio.get_running_loop()))
        await portal.sleep_until_stopped()


background: Final = Background()
atexit.register(background.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=background.forget)
