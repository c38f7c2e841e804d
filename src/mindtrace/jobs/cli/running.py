"""`run`: a command's coroutine under a loop of its own, ended in order by the first SIGINT or SIGTERM."""

import asyncio
import signal
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from mindtrace.jobs.cli.errors import Stopped

R = TypeVar("R")


def run(main: Coroutine[Any, Any, R]) -> R:
    """What the coroutine returns. The first signal cancels it, so that it can say how far it came; the second kills.

    Raises:
        Stopped: a signal came.
    """
    came: list[int] = []
    try:
        return asyncio.run(_guarded(main, came))
    except asyncio.CancelledError:
        if came:
            raise Stopped(came[0]) from None
        raise


async def _guarded(main: Coroutine[Any, Any, R], came: list[int]) -> R:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    before: dict[signal.Signals, Any] = {}

    def give_back() -> None:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            if handler is not None:  # else it is none of Python's, which cannot put it back
                signal.signal(number, handler)
        before.clear()

    def stop(number: signal.Signals) -> None:
        came.append(number)
        give_back()
        if task is not None:
            task.cancel()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            with suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(number, stop, number)
                before[number] = handler
    try:
        return await main
    finally:
        give_back()
