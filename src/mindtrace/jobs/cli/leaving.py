"""How a process of ours ends in bounded time, whatever the application left behind."""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, NoReturn

from mindtrace.jobs.cli.output import counted

_log = logging.getLogger(__name__)

_REST_WITHIN = 1.0  # seconds for tasks that nobody waits for, and again for generators
_EXIT_WITHIN = 2.0  # seconds for threads that the interpreter would wait for


def run(
    main: Coroutine[Any, Any, int],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    broken: Callable[[BaseException], None],
) -> int:
    """As `asyncio.run`, which would wait for ever for a task that swallows its cancellation.

    Args:
        main: what is run.
        new_loop: makes its loop.
        broken: called where the loop has ended before `main`: another task stopped it, or raised what ends a loop.

    Raises:
        RuntimeError: another task stopped the loop.
        BaseException: what `main` raised, or what ended the loop.
    """
    loop = new_loop()
    asyncio.set_event_loop(loop)
    task = loop.create_task(main)
    try:
        try:
            return loop.run_until_complete(task)
        except (RuntimeError, SystemExit, KeyboardInterrupt) as error:
            if not task.done():
                broken(error)
            raise
        finally:
            loop.run_until_complete(_end_the_rest())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


class Exit:
    """The end of the process: waits for the threads that the application left behind, but not for ever."""

    def __init__(self) -> None:
        self._others = set(threading.enumerate())

    def with_status(self, status: int) -> int:
        """To be called last. Returns the status that it was given."""
        if kept_by := [one.name for one in threading.enumerate() if not (one.daemon or one in self._others)]:
            threading.Thread(target=_leave, args=(status, kept_by), name="mtj-exit", daemon=True).start()
        return status


async def _end_the_rest() -> None:
    """Cancel what the application left running, and give it its time."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        _, left = await asyncio.wait(tasks, timeout=_REST_WITHIN)
        if left:
            names = ", ".join(sorted(task.get_name() for task in left))
            _log.warning("%s left, which a cancellation does not end: %s", counted(len(left), "task"), names)
            _keep(left)
    try:
        async with asyncio.timeout(_REST_WITHIN):
            await asyncio.get_running_loop().shutdown_asyncgens()
    except TimeoutError:
        _log.warning("an asynchronous generator does not end though it was closed")


def _keep(tasks: set["asyncio.Task[Any]"]) -> None:
    """Until the process ends, and while it does: what is not destroyed can neither complain of it nor run once more.

    A frame of a daemon thread is what the interpreter never takes apart, not even at its end.
    """

    def hold(tasks: set["asyncio.Task[Any]"]) -> None:
        threading.Event().wait()

    with suppress(RuntimeError):  # no more threads
        threading.Thread(target=hold, args=(tasks,), name="mtj-left", daemon=True).start()


def _leave(status: int, kept_by: list[str]) -> None:
    time.sleep(_EXIT_WITHIN)
    _log.warning("left without waiting for %s", ", ".join(kept_by))
    crash(status)


def crash(status: int) -> NoReturn:
    """End the process with this status at once, and leave all as it is."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed from the start they are None
            stream.flush()
    os._exit(status)


def forget_a_broken_stderr() -> None:
    """At the end, the interpreter would take what it could not write for a failure of the program."""
    try:
        sys.stderr.flush()
    except AttributeError:  # it was closed from the start, and is None
        pass
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def is_ignored(number: signal.Signals) -> bool:
    """Whether whoever started this process had it ignore the signal: `nohup` has, and means it."""
    return signal.getsignal(number) is signal.SIG_IGN
