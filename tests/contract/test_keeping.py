"""Whoever holds leases can tell whether what keeps them turns, and how often its broker was away."""

import asyncio
import ctypes
import threading
from collections.abc import Callable

import pytest

from mindtrace.jobs import Backend
from mindtrace.jobs.backend import Outages

pytestmark = [pytest.mark.anyio]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0.01)


# A thread that ends so is complained of, which is what this test wants.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_keeper_turns_also_while_nothing_is_held_and_one_that_does_not_is_seen(
    backend: Backend, queue: str
) -> None:
    """It is ended as nothing of ours would end it: by an exception at any of its lines."""
    before = set(threading.enumerate())
    async with backend.receiver([queue]) as receiver:
        keepers = [thread for thread in threading.enumerate() if thread not in before and "keeper" in thread.name]
        assert len(keepers) == (backend.traits.name != "local")
        assert receiver.keeper_idle_for() < 2
        for keeper in keepers:
            await until(lambda: receiver.keeper_idle_for() > 0.5)
            await until(lambda: receiver.keeper_idle_for() < 0.5)
            assert keeper.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(keeper.ident), ctypes.py_object(SystemExit))
            await until(lambda: receiver.keeper_idle_for() > 2)
        assert receiver.outages() == Outages(0, 0.0)
