"""A backend is open once for all who ask, in one loop, and closed whole."""

import asyncio
import gc
import threading

import pytest

from mindtrace.jobs import Backend, Closed, Done, QueueSpec
from mindtrace.jobs.wire import Message


def keepers() -> int:
    return sum("keeper" in thread.name for thread in threading.enumerate())


@pytest.mark.anyio
async def test_two_may_open_a_backend_at_once_and_both_have_it_open(unopened: Backend) -> None:
    async def use() -> None:
        await unopened.open()
        await unopened.declare(QueueSpec("jobs"))

    await asyncio.gather(use(), use())
    await unopened.open()
    assert [spec.name for spec in await unopened.queues()] == ["jobs"]
    await unopened.aclose()
    await unopened.aclose()
    with pytest.raises(Closed):
        await unopened.queues()


@pytest.mark.anyio
@pytest.mark.parametrize("turns", range(6))
async def test_who_is_cancelled_as_it_opens_takes_it_from_nobody_else_and_leaves_nothing_open(
    unopened: Backend, turns: int
) -> None:
    before = asyncio.all_tasks()
    one, other = asyncio.create_task(unopened.open()), asyncio.create_task(unopened.open())
    for _ in range(turns):
        await asyncio.sleep(0)
    one.cancel()
    await other
    await unopened.declare(QueueSpec("jobs"))
    await unopened.aclose()

    alone = asyncio.create_task(unopened.open())
    for _ in range(turns):
        await asyncio.sleep(0)
    alone.cancel()
    await asyncio.wait({alone})
    if alone.cancelled():
        with pytest.raises(Closed):
            await unopened.declare(QueueSpec("jobs"))
    else:  # it was open by then
        await unopened.aclose()
    assert asyncio.all_tasks() == before


@pytest.mark.anyio
@pytest.mark.parametrize("turns", range(8))
async def test_who_waits_for_it_to_open_as_it_is_closed_is_told_and_it_can_be_opened_again(
    unopened: Backend, turns: int
) -> None:
    opening = asyncio.create_task(unopened.open())
    await asyncio.sleep(0)
    closing = asyncio.create_task(unopened.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    late = asyncio.create_task(unopened.open())
    await asyncio.wait({opening, closing, late})
    assert closing.exception() is None
    if unopened.traits.name != "local":  # which is open at once
        assert isinstance(opening.exception(), Closed)
    if late.exception() is not None:  # it came while the first was ending
        assert isinstance(late.exception(), Closed)
        await unopened.open()
    await unopened.declare(QueueSpec("jobs"))
    await unopened.aclose()


# What a loop leaves open when it is closed are sockets, too.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_one_loop_has_left_open_can_be_opened_or_closed_in_the_next(unopened: Backend) -> None:
    """As in a script that calls `asyncio.run` more than once and closes nothing."""
    before = keepers()

    async def begin(job_id: str) -> None:
        await unopened.open()
        await unopened.declare(QueueSpec("jobs"), attach=True)
        async with unopened.receiver(["jobs"]) as receiver:
            if job_id == "b":
                [delivery] = await receiver.receive(1, wait=5.0)
                assert (delivery.message.id, delivery.crashes) == ("a", 0)
                assert await receiver.settle([(delivery, Done())]) == [None]
        assert await unopened.publish("jobs", [Message(job_id, b"{}")]) == ["stored"]

    async def close() -> None:
        await unopened.aclose()
        with pytest.raises(Closed):
            await unopened.depth("jobs")

    for job_id in ("a", "b"):
        asyncio.run(begin(job_id))
    asyncio.run(close())
    until_gone = threading.Event()
    for _ in range(500):
        if keepers() == before:
            break
        until_gone.wait(0.01)
    assert keepers() == before
    gc.collect()  # here, where the warnings are expected
