"""`Keeper`: extends the leases of what is held, from a thread, a loop and a connection of its own.

A consumer that blocks the event loop for minutes costs no lease.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from random import Random

from mindtrace.jobs.backends.redis.address import Address
from mindtrace.jobs.backends.redis.link import Link
from mindtrace.jobs.backends.redis.receiver import RedisReceiver
from mindtrace.jobs.backends.redis.scripts import Scripts
from mindtrace.jobs.errors import BackendUnavailable

_log = logging.getLogger(__name__)

_CLOSE_WITHIN = 2.0
_AFTER_A_FAILURE = 0.5
_BEAT = 1.0


class Keeper:
    """Extends every third of their lease all deliveries of the receivers it keeps.

    Args:
        address: of the server.
        random: the source of the jitter.
        max_stall: seconds that a receiver's loop may stand still until its leases are left to lapse; None: for ever.
    """

    def __init__(self, address: Address, random: Random, max_stall: float | None) -> None:
        self._address, self._random = address, random
        self._max_stall = math.inf if max_stall is None else max_stall
        self._lock = threading.Lock()
        self._receivers: dict[RedisReceiver, float] = {}  # when it is extended next, by the loop's clock
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event | None = None
        self._main: asyncio.Task[None] | None = None
        self._ended: Future[None] = Future()
        self._stopped = False
        self._turned = 0.0  # its loop, on the monotonic clock
        self._is_failing = False  # to extend, since the last time that it could

    def idle_for(self) -> float:
        """Seconds since its loop turned, which it does every second; 0.0 where it does not run. From any thread."""
        return 0.0 if self._thread is None else time.monotonic() - self._turned

    def keep(self, receiver: RedisReceiver) -> None:
        """Extend what this receiver holds, from now on."""
        if self._thread is None:
            started: Future[None] = Future()
            thread = threading.Thread(target=self._serve, args=(started,), name="mindtrace-jobs keeper", daemon=True)
            thread.start()
            started.result()
            self._thread = thread
        with self._lock:
            self._receivers[receiver] = 0.0
        self._tell()

    def let_go(self, receiver: RedisReceiver) -> None:
        """It holds nothing any more."""
        with self._lock:
            self._receivers.pop(receiver, None)

    async def aclose(self) -> None:
        """End the thread."""
        if self.stop():
            # Without an executor to join it in: at the interpreter's exit there is none any more.
            await asyncio.wait({asyncio.wrap_future(self._ended)}, timeout=_CLOSE_WITHIN)

    def stop(self) -> bool:
        """Have the thread end. Returns whether it ran."""
        thread, self._thread = self._thread, None
        self._stopped = True
        if thread is not None and self._loop is not None and self._main is not None:
            _call(self._loop, self._main.cancel)
        return thread is not None

    def _tell(self) -> None:
        loop, changed = self._loop, self._changed
        if loop is not None and changed is not None and not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)

    def _serve(self, started: "Future[None]") -> None:
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(self._run(started))
        except BaseException as error:  # told to who waits for the start, who would wait for ever
            if started.done():
                raise
            started.set_exception(error)
        finally:
            if started.exception() is None:  # else there may be another try
                self._ended.set_result(None)

    async def _run(self, started: "Future[None]") -> None:
        self._loop, self._changed, self._main = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()
        self._beat()
        started.set_result(None)
        link = Link(self._address, "keeper", self._random)
        scripts = Scripts(link)
        try:
            while not self._stopped:
                self._changed.clear()
                now = self._loop.time()
                with self._lock:
                    for receiver in [one for one in self._receivers if one.loop.is_closed()]:
                        del self._receivers[receiver]  # its loop is dead: its leases are to end
                    for receiver, due in self._receivers.items():
                        if due == 0.0:  # new: what it holds it took just now
                            self._receivers[receiver] = now + receiver.lease / 3
                    due_now = [receiver for receiver, due in self._receivers.items() if 0.0 < due <= now]
                await asyncio.gather(*(self._extend(link, scripts, receiver) for receiver in due_now))
                with self._lock:
                    next_due = min(self._receivers.values(), default=None)
                if next_due is not None and next_due <= self._loop.time():
                    continue
                wait = None if next_due is None else next_due - self._loop.time()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
        finally:
            await link.aclose()

    def _beat(self) -> None:
        assert self._loop is not None  # noqa: S101 (it runs this)
        self._turned = time.monotonic()
        self._loop.call_later(_BEAT, self._beat)

    async def _extend(self, link: Link, scripts: Scripts, receiver: RedisReceiver) -> None:
        assert self._loop is not None  # noqa: S101 (it runs this)
        next_due = self._loop.time() + receiver.lease / 3
        with self._lock:
            if receiver in self._receivers:
                self._receivers[receiver] = next_due
        stalled = receiver.ask()
        _call(receiver.loop, receiver.turn)
        if receiver.held and stalled > self._max_stall:
            _log.error("a loop stands still for %.0f s: the leases of its %d jobs end", stalled, len(receiver.held))
            return
        held = list(receiver.held)  # one step of the interpreter: the other thread cannot change it meanwhile
        for keys, some in receiver.in_calls(held):
            link.start()
            try:
                gone = await scripts.extend(keys, receiver.lease, some, receiver.lease / 3)
            except BackendUnavailable as error:
                level = logging.DEBUG if self._is_failing else logging.WARNING  # once, and not at each try
                self._is_failing = True
                _log.log(level, "leases of %d jobs of queue %s not extended: %s", len(some), keys.queue, error)
                with self._lock:
                    if receiver in self._receivers:
                        self._receivers[receiver] = self._loop.time() + _AFTER_A_FAILURE
                continue
            if self._is_failing:  # who waits for his runs to end has no other sign that the server is back
                self._is_failing = False
                _log.info("leases are extended again: %d of queue %s", len(some) - len(gone), keys.queue)
            for delivery in gone:
                _call(receiver.loop, partial(receiver.lose, delivery))


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(function)
