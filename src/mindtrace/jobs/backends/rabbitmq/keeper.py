"""`Keeper`: the thread, loop and connections in which receivers live, so that the user's loop may stand still.

Heartbeats of the connection that holds the leases come from here: a consumer that blocks its loop for minutes loses no
job by it.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from random import Random
from typing import Any

from mindtrace.jobs.backends.rabbitmq.address import Address
from mindtrace.jobs.backends.rabbitmq.admin import Admin
from mindtrace.jobs.backends.rabbitmq.line import Line
from mindtrace.jobs.backends.rabbitmq.link import Link
from mindtrace.jobs.backends.rabbitmq.outbox import Outbox
from mindtrace.jobs.backends.rabbitmq.retiming import Retiming
from mindtrace.jobs.backends.rabbitmq.topology import Topology

_log = logging.getLogger(__name__)

_CLOSE_WITHIN = 5.0
_BEAT = 1.0
_REMEMBERED = 10_000


class Post:
    """What receivers share in the keeper's loop: a connection for deliveries, and one for the copies they publish.

    The second is apart because the server stops reading a connection that publishes when it is out of memory or disk,
    and acknowledgements have to get through.
    """

    def __init__(self, address: Address, random: Random, topology: Topology) -> None:
        self.topology: Topology = topology
        self.link: Link = Link(address, "consume", random, self._on_up)
        self.admin: Admin = Admin(self.link, topology)
        self.copies: Outbox = Outbox(address, "copies", random, patient=True)
        self._retiming = Retiming(self.admin, self.copies, topology)
        self.given_back: dict[tuple[str, int], None] = {}
        """Ids and numbers of deliveries that a receiver here gave back without settling them, the last thousands."""
        self.link.start()

    def remember(self, job_id: str, number: int) -> None:
        """A delivery is given back: whoever gets the job next counts a crash."""
        self.given_back[job_id, number] = None
        if len(self.given_back) > _REMEMBERED:
            del self.given_back[next(iter(self.given_back))]

    def _on_up(self, line: Line) -> None:
        self._retiming.on_up(line)

    async def aclose(self) -> None:
        """Close both connections."""
        await self._retiming.aclose()
        await asyncio.gather(self.link.aclose(), self.copies.aclose())


class Keeper:
    """The thread. It starts with the first receiver.

    Args:
        address: of the server.
        random: the source of the jitter.
        topology: the names.
    """

    def __init__(self, address: Address, random: Random, topology: Topology) -> None:
        self._address, self._random, self._topology = address, random, topology
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._post: Post | None = None
        self._stop: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: Future[None] = Future()
        self._turned = 0.0  # its loop, on the monotonic clock

    def idle_for(self) -> float:
        """Seconds since its loop turned, which it does every second; 0.0 where it does not run. From any thread."""
        return 0.0 if self._thread is None else time.monotonic() - self._turned

    @property
    def post(self) -> Post:
        """For what runs in the keeper's loop."""
        assert self._post is not None  # noqa: S101 (it was started)
        return self._post

    def start(self) -> None:
        """Have the thread run.

        Raises:
            RuntimeError: the system has no more threads.
        """
        if self._thread is None:
            started: Future[None] = Future()
            thread = threading.Thread(target=self._serve, args=(started,), name="mindtrace-jobs keeper", daemon=True)
            thread.start()
            started.result()
            self._thread = thread

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Have a function called in the keeper's loop; nothing happens once that has ended."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(function, *args)

    def begin(self, coroutine: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have a coroutine run in the keeper's loop."""
        self.call(self._begin, coroutine)

    def _begin(self, coroutine: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self, coroutine: Callable[[], Coroutine[Any, Any, None]], within: float) -> None:
        """Have it run, and wait for its end, or so many seconds."""
        over: Future[None] = Future()

        async def ran() -> None:
            try:
                await coroutine()
            finally:
                over.set_result(None)

        if self._ended.done():  # nothing runs there any more
            return
        self.begin(ran)
        await asyncio.wait({asyncio.wrap_future(over)}, timeout=within)

    async def aclose(self) -> None:
        """End the thread."""
        if self.stop():
            # Without an executor to join it in: at the interpreter's exit there is none any more.
            await asyncio.wait({asyncio.wrap_future(self._ended)}, timeout=_CLOSE_WITHIN)

    def stop(self) -> bool:
        """Have the thread end. Returns whether it ran."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self.call(self._set_stop)
        return thread is not None

    def _set_stop(self) -> None:
        if self._stop is not None:
            self._stop.set()

    def _serve(self, started: "Future[None]") -> None:
        main = self._run(started)
        try:
            asyncio.run(main)
        except BaseException as error:  # told to who waits for the start, who would wait for ever
            main.close()
            if started.done():
                raise
            started.set_exception(error)
        finally:
            if started.exception() is None:  # else there may be another try
                self._ended.set_result(None)

    def _beat(self) -> None:
        assert self._loop is not None  # noqa: S101 (it runs this)
        self._turned = time.monotonic()
        self._loop.call_later(_BEAT, self._beat)

    async def _run(self, started: "Future[None]") -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._post = Post(self._address, self._random, self._topology)
        self._beat()
        started.set_result(None)
        try:
            await self._stop.wait()
        finally:
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=1.0)
            await self._post.aclose()
