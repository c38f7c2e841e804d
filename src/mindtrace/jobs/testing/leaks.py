"""What a test leaves behind: tasks, threads, open descriptors, connections at a server. Standard library only.

    async with LeakGuard(counters={"clients of Redis": clients}):      # clients: async, gives a number
        ...                                                            # an AssertionError names what is left after it

In code without a loop it is `with LeakGuard():`, for threads and descriptors.
"""

import asyncio
import os
import socket
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

__all__ = ["POOLS", "LeakGuard"]

POOLS: Final = ("asyncio_", "AnyIO worker thread")
"""How the names of threads begin that are kept to be used again: those of `asyncio.to_thread` and of anyio's."""

_POLL = 0.01  # seconds between two looks


class LeakGuard:
    """A block after which there is nothing that was not there before it.

    What is closed takes its time to be gone, so it is waited for, up to `within` seconds. A block that raises is not
    asked: its error is the news. What a program makes once and keeps, such as the thread behind the blocking face or a
    broker for all tests, has to be there before.

    Args:
        within: seconds that things may take to settle after the block.
        counters: what else may not grow, by name: asked before and after, in the `async with` form only. A connection
            that one of them makes for itself is no leak if it is kept.
        pools: a thread whose name begins with one of these is none, see `POOLS`.
    """

    def __init__(
        self,
        *,
        within: float = 2.0,
        counters: Mapping[str, Callable[[], Awaitable[int]]] | None = None,
        pools: Sequence[str] = POOLS,
    ) -> None:
        self._within, self._counters, self._pools = within, counters or {}, tuple(pools)
        self._before = _Seen()

    def __enter__(self) -> Self:
        if self._counters:
            raise RuntimeError("counters are asked in a loop: async with LeakGuard(...)")
        self._before = _seen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + self._within
        while error is None and (leaked := self._leaked(_seen())):
            if time.monotonic() >= deadline:
                raise AssertionError(_told(leaked))
            time.sleep(_POLL)

    async def __aenter__(self) -> Self:
        self._before = await self._seen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + self._within
        while error is None and (leaked := self._leaked(await self._seen())):
            if time.monotonic() >= deadline:
                raise AssertionError(_told(leaked))
            await asyncio.sleep(_POLL)

    async def _seen(self) -> "_Seen":
        # Counted first: what the counters open for themselves is there when descriptors are looked at.
        counts = {name: await count() for name, count in self._counters.items()}
        seen = _seen()
        seen.tasks = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        seen.counts = counts
        return seen

    def _leaked(self, now: "_Seen") -> list[str]:
        before = self._before
        tasks = [f"task {_task(task)}" for task in now.tasks - before.tasks]
        threads = [
            f"thread {thread.name}"
            for thread in now.threads - before.threads
            if not thread.name.startswith(self._pools)
        ]
        files = [f"descriptor {fd}: {_file(fd, now.files[fd])}" for fd, _ in now.files.items() - before.files.items()]
        counts = [
            f"{name}: {count} instead of {before.counts[name]}"
            for name, count in now.counts.items()
            if count > before.counts[name]
        ]
        return [*sorted(tasks), *sorted(threads), *sorted(files), *counts]


@dataclass
class _Seen:
    """What there is at one moment."""

    threads: set[threading.Thread] = field(default_factory=set[threading.Thread])
    files: dict[int, str] = field(default_factory=dict[int, str])  # by descriptor: what it is open on
    tasks: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])
    counts: dict[str, int] = field(default_factory=dict[str, int])


def _seen() -> _Seen:
    files: dict[int, str] = {}
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the one that was open for this listing
            files[int(name)] = _target(int(name))
    return _Seen(set(threading.enumerate()), files)


def _target(fd: int) -> str:
    """What it is open on: the same text as long as it is the same thing."""
    with suppress(OSError):  # only Linux tells the path
        return os.readlink(f"/proc/self/fd/{fd}")
    told = os.fstat(fd)
    return f"{stat.filemode(told.st_mode)[0]} {told.st_dev}:{told.st_ino}"


def _file(fd: int, target: str) -> str:
    """The target, and of a socket its addresses: its own, and that of the other end."""
    addresses: list[str] = []
    with suppress(OSError):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as same:
                addresses.append(str(same.getsockname()))
                addresses.append(str(same.getpeername()))  # not where it only listens
    return " ".join([target, *addresses])


def _task(task: asyncio.Task[Any]) -> str:
    coroutine = task.get_coro()
    return f"{task.get_name()} ({getattr(coroutine, '__qualname__', coroutine)})"


def _told(leaked: Sequence[str]) -> str:
    return "\n".join([f"{len(leaked)} left behind:", *leaked])
