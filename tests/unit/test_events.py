"""What a listener is told, and that none of them can stand in the way of another or of the jobs."""

import asyncio
import logging
from dataclasses import FrozenInstanceError

import pytest

from mindtrace.jobs import Done, Event, ExecutionStatus, JobPublished, JobSettled, JobStarted
from mindtrace.jobs.events import told

pytestmark = pytest.mark.anyio

EVENTS: list[Event] = [
    JobPublished("jobs", "an-id", "orders", duplicate=False),
    JobStarted("jobs", "an-id", "orders", attempt=1),
    JobSettled("jobs", "an-id", "orders", 1, Done(), True, ExecutionStatus.COMPLETED, 0.5),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
async def test_every_listener_hears_of_an_event_in_turn(event: Event) -> None:
    heard: list[tuple[str, Event]] = []

    async def awaited(event: Event) -> None:
        await asyncio.sleep(0)
        heard.append(("awaited", event))

    await told(
        [lambda event: heard.append(("called", event)), awaited, lambda event: heard.append(("last", event))], event
    )
    assert heard == [("called", event), ("awaited", event), ("last", event)]


async def test_what_a_listener_raises_is_logged_and_the_others_hear_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its type and its frames: its text may quote the result of a job."""
    heard: list[Event] = []
    secret = "s" + "3cret"

    def broken(event: Event) -> None:
        raise ValueError(secret)

    async def broken_later(event: Event) -> None:
        await asyncio.sleep(0)
        raise KeyError(secret)

    with caplog.at_level(logging.ERROR):
        await told([broken, broken_later, heard.append], EVENTS[1])
    assert heard == [EVENTS[1]]
    said = [record.getMessage().splitlines() for record in caplog.records]
    kinds = [lines[0].removeprefix("a listener failed on JobStarted: ") for lines in said]
    assert kinds == ["ValueError", "KeyError"]
    assert [lines[-2].rpartition(" in ")[2] for lines in said] == ["broken", "broken_later"]
    assert secret not in caplog.text


async def test_a_listener_that_waits_can_be_cancelled() -> None:
    waiting = asyncio.Event()

    async def listener(event: Event) -> None:
        waiting.set()
        await asyncio.Event().wait()

    telling = asyncio.create_task(told([listener], EVENTS[0]))
    async with asyncio.timeout(5):
        await waiting.wait()
        telling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await telling


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
async def test_an_event_does_not_change(event: Event) -> None:
    """All listeners hear of the same one."""
    with pytest.raises(FrozenInstanceError):
        event.job_id = "another"  # type: ignore[misc]
