"""Handing jobs in: stored once under their id, refused with a reason, and never refused once they are in."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from mindtrace.jobs import (
    Backend,
    Closed,
    ConfigError,
    Dead,
    Delivery,
    Depth,
    Done,
    NotSupported,
    QueueFull,
    QueueNotFound,
    QueueSpec,
    Receiver,
    Release,
    Retry,
    Settlement,
)
from mindtrace.jobs.backend import BATCH
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
Known = Callable[[int, int, int, int], Depth]
UntilReady = Callable[[str, int], Awaitable[None]]


def a_message(body: bytes = b"{}", **options: object) -> Message:
    return Message(new_job_id(), body, **options)  # type: ignore[arg-type] (a test names what it needs)


async def take(receiver: Receiver) -> Delivery:
    [delivery] = await receiver.receive(1, wait=5)
    return delivery


async def all_ids(backend: Backend, queue: str) -> list[str]:
    """The ids of the jobs that are ready, in the order they are handed out."""
    ready = (await backend.depth(queue)).ready
    ids: list[str] = []
    async with backend.receiver([queue], slots=ready + 1) as receiver:
        while deliveries := await receiver.receive(ready + 1):
            ids += [delivery.message.id for delivery in deliveries]
    return ids


# --- stored -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{}", b"\x00\xff\xfe not utf-8", "ü".encode() * 50_000])
async def test_a_stored_message_is_handed_out_byte_for_byte(backend: Backend, queue: str, body: bytes) -> None:
    assert await backend.publish(queue, [message := a_message(body)]) == ["stored"]
    assert (await backend.depth(queue)).ready == 1
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
    assert (delivery.queue, delivery.message) == (queue, message)


async def test_publishing_nothing_stores_nothing(backend: Backend, queue: str) -> None:
    assert await backend.publish(queue, []) == []
    assert (await backend.depth(queue)).ready == 0


@pytest.mark.parametrize("count", [BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 3])
async def test_a_batch_of_any_length_is_stored_in_its_order(backend: Backend, queue: str, count: int) -> None:
    messages = [a_message() for _ in range(count)]
    assert await backend.publish(queue, messages) == ["stored"] * count
    assert await all_ids(backend, queue) == [message.id for message in messages]


async def test_publishes_in_flight_together_keep_the_order_of_their_calls(backend: Backend, queue: str) -> None:
    messages = [a_message() for _ in range(100)]
    await asyncio.gather(*(backend.publish(queue, [message]) for message in messages))
    assert await all_ids(backend, queue) == [message.id for message in messages]


async def test_jobs_are_still_there_when_a_backend_is_opened_again(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message(), a_message(delay=300)])
    await backend.aclose()
    await backend.open()
    assert await all_ids(backend, queue) == [message.id]
    assert (await backend.depth(queue)).scheduled in (1, None)


async def test_a_backend_that_is_not_open_says_so(backend: Backend, queue: str) -> None:
    await backend.aclose()
    await backend.aclose()
    with pytest.raises(Closed):
        await backend.publish(queue, [a_message()])
    await backend.open()
    await backend.open()
    assert await backend.publish(queue, [a_message()]) == ["stored"]


# --- once under its id ------------------------------------------------------------------------------------------------


async def becomes(backend: Backend, queue: str, receiver: Receiver, state: str) -> Message:
    """A job in this state."""
    message = a_message(b'"first"', delay=300.0 if state == "scheduled" else 0.0)
    await backend.publish(queue, [message])
    if state in ("leased", "done", "dead", "retried"):
        delivery = await take(receiver)
        ends: dict[str, Settlement] = {"done": Done(), "dead": Dead("rejected"), "retried": Retry(300.0)}
        if state in ends:
            assert await receiver.settle([(delivery, ends[state])]) == [None]
    elif state == "cleaned":
        assert await backend.clean(queue) == 1
    return message


@pytest.mark.parametrize("state", ["scheduled", "ready", "leased", "retried", "dead", "done", "cleaned"])
async def test_a_known_id_is_stored_once(backend: Backend, queue: str, state: str) -> None:
    """A publisher that is not sure may publish again, whatever has become of the job meanwhile."""
    async with backend.receiver([queue]) as receiver:
        message = await becomes(backend, queue, receiver, state)
        before = await backend.depth(queue)
        [outcome] = await backend.publish(queue, [Message(message.id, b'"second"')])
        if backend.traits.deduplicates:
            assert outcome == "duplicate"
            assert await backend.depth(queue) == before
            if state == "ready":
                assert (await take(receiver)).message == message  # the first body stays
        else:
            assert outcome == "stored"
            assert (await backend.depth(queue)).ready == before.ready + 1


@pytest.mark.parametrize("state", ["ready", "scheduled", "leased", "dead"])
async def test_another_body_under_a_known_id_is_logged(
    backend: Backend, queue: str, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    async with backend.receiver([queue]) as receiver:
        first = await becomes(backend, queue, receiver, state)
        with caplog.at_level(logging.DEBUG, logger="mindtrace.jobs"):
            await backend.publish(queue, [first])
            assert first.id not in caplog.text  # the same body again is no news
            await backend.publish(queue, [Message(first.id, b'"second"')])
    assert (first.id in caplog.text) is backend.traits.deduplicates
    assert '"second"' not in caplog.text


async def test_another_body_under_one_id_in_one_batch_is_logged(
    backend: Backend, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="mindtrace.jobs"):
        await backend.publish(queue, [first := a_message(), Message(first.id, b'"second"')])
    assert (first.id in caplog.text) is backend.traits.deduplicates


@pytest.mark.parametrize("together", ["in one batch", "in calls of their own"])
async def test_a_thousand_publishes_of_one_id_at_once_make_one_job(backend: Backend, queue: str, together: str) -> None:
    message = a_message()
    if together == "in one batch":
        outcomes = await backend.publish(queue, [message] * 1000)
    else:
        answers = await asyncio.gather(*(backend.publish(queue, [message]) for _ in range(1000)))
        outcomes = [outcome for [outcome] in answers]
    copies = 1 if backend.traits.deduplicates else 1000
    assert outcomes.count("stored") == copies
    assert outcomes.count("duplicate") == 1000 - copies
    assert (await backend.depth(queue)).ready == copies


async def test_outcomes_stand_in_the_order_of_the_messages(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [known := a_message()])
    outcomes = await backend.publish(queue, [a_message(), known, a_message(), known])
    again = "duplicate" if backend.traits.deduplicates else "stored"
    assert outcomes == ["stored", again, "stored", again]


async def test_a_cancelled_publish_may_be_repeated(backend: Backend, queue: str) -> None:
    message = a_message()
    publishing = asyncio.create_task(backend.publish(queue, [message]))
    await asyncio.sleep(0)
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)
    await backend.publish(queue, [message])
    ids = await all_ids(backend, queue)
    assert set(ids) == {message.id}
    assert len(ids) == 1 or not backend.traits.deduplicates


@pytest.mark.parametrize("forgotten_by", ["purge", "delete"])
async def test_an_id_may_be_used_again_once_its_job_is_forgotten(
    backend: Backend, queue: str, forgotten_by: str
) -> None:
    async with backend.receiver([queue]) as receiver:
        message = await becomes(backend, queue, receiver, "dead")
    if forgotten_by == "purge":
        assert await backend.dead_letters(queue).purge([message.id]) == 1
    else:
        await backend.delete(queue, force=True)
        await backend.declare(QueueSpec(queue))
    assert await backend.publish(queue, [message]) == ["stored"]
    assert await all_ids(backend, queue) == [message.id]


# --- refused ----------------------------------------------------------------------------------------------------------


async def test_each_message_for_a_queue_that_is_not_there_is_refused(backend: Backend) -> None:
    outcomes = await backend.publish("nowhere", [a_message(), a_message()])
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert isinstance(outcome, QueueNotFound)
        assert (outcome.queue, outcome.outcome) == ("nowhere", "not_done")


@pytest.mark.parametrize("kind", ["fifo", "stack"])
@pytest.mark.parametrize("priority", [-1, 1])
async def test_a_priority_is_never_ignored(backend: Backend, new_queue: NewQueue, kind: str, priority: int) -> None:
    if kind == "stack" and not backend.traits.stack:
        with pytest.raises(NotSupported):
            await new_queue(kind)
        return
    queue = await new_queue(kind)
    [outcome] = await backend.publish(queue, [a_message(priority=priority)])
    assert isinstance(outcome, NotSupported)
    assert (outcome.backend, outcome.outcome) == (backend.traits.name, "not_done")
    assert "priority" in outcome.feature
    assert "kind='priority'" in outcome.needs
    assert (await backend.depth(queue)).ready == 0


@pytest.mark.parametrize("priority", [-1, 4])
async def test_a_priority_beyond_the_declared_levels_is_refused_naming_them(
    backend: Backend, new_queue: NewQueue, priority: int
) -> None:
    queue = await new_queue("priority", priority_levels=3)
    [outcome] = await backend.publish(queue, [a_message(priority=priority)])
    assert isinstance(outcome, ConfigError)
    assert "0 to 3" in str(outcome)
    assert await backend.publish(queue, [a_message(priority=0), a_message(priority=3)]) == ["stored"] * 2


# --- a full queue -----------------------------------------------------------------------------------------------------


async def test_a_publish_beyond_max_length_is_refused_until_there_is_room(
    backend: Backend, new_queue: NewQueue
) -> None:
    queue = await new_queue(max_length=2)
    assert await backend.publish(queue, [a_message(), a_message()]) == ["stored"] * 2
    [outcome] = await backend.publish(queue, [refused := a_message()])
    assert isinstance(outcome, QueueFull)
    assert (outcome.queue, outcome.limit, outcome.retryable, outcome.outcome) == (queue, 2, True, "not_done")
    async with backend.receiver([queue]) as receiver:
        await take(receiver)  # what is leased takes up no room
        assert await backend.publish(queue, [refused]) == ["stored"]


async def test_scheduled_jobs_take_up_room_where_they_can_be_counted(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue(max_length=1)
    await backend.publish(queue, [a_message(delay=300)])
    countable = (await backend.depth(queue)).scheduled is not None
    [outcome] = await backend.publish(queue, [a_message()])
    assert isinstance(outcome, QueueFull) if countable else outcome == "stored"


async def test_a_batch_that_does_not_fit_is_refused_whole(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue(max_length=2)
    outcomes = await backend.publish(queue, [a_message() for _ in range(3)])
    refused = [isinstance(outcome, QueueFull) for outcome in outcomes]
    assert refused == ([True] * 3 if backend.traits.atomic_batch else [False, False, True])
    assert (await backend.depth(queue)).ready == refused.count(False)


async def test_a_long_batch_is_atomic_in_chunks(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue(max_length=2 * BATCH)
    messages = [a_message() for _ in range(2 * BATCH + 1)]
    outcomes = await backend.publish(queue, messages)
    assert outcomes[: 2 * BATCH] == ["stored"] * (2 * BATCH)
    assert isinstance(outcomes[-1], QueueFull)
    assert await all_ids(backend, queue) == [message.id for message in messages[:-1]]


async def test_a_known_id_is_a_duplicate_also_when_the_queue_is_full(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue(max_length=1)
    await backend.publish(queue, [message := a_message()])
    [outcome] = await backend.publish(queue, [message])
    assert outcome == "duplicate" if backend.traits.deduplicates else isinstance(outcome, QueueFull)


async def test_a_job_that_was_refused_is_no_duplicate_of_itself(backend: Backend, new_queue: NewQueue) -> None:
    """`duplicate` tells a publisher that the job is stored: it must not be said of one that nobody stored."""
    queue = await new_queue(max_length=1)
    await backend.publish(queue, [a_message()])
    message = a_message()
    outcomes = await backend.publish(queue, [message, message])
    assert [type(outcome) for outcome in outcomes] == [QueueFull, QueueFull]


@pytest.mark.parametrize("settlement", [Retry(0.0), Retry(0.01), Release(), Release(0.01), None])
async def test_what_was_accepted_comes_back_into_a_full_queue(
    backend: Backend, new_queue: NewQueue, settlement: Settlement | None
) -> None:
    """None: the lease lapses."""
    queue = await new_queue(max_length=1)
    await backend.publish(queue, [first := a_message()])
    async with backend.receiver([queue], lease=30 if settlement else 0.05, keep=False) as receiver:
        delivery = await take(receiver)
        assert await backend.publish(queue, [second := a_message()]) == ["stored"]
        if settlement is not None:
            assert await receiver.settle([(delivery, settlement)]) == [None]
        async with backend.receiver([queue], slots=2) as other:
            both = {(await take(other)).message.id, (await take(other)).message.id}
    assert both == {first.id, second.id}


async def test_a_replay_is_not_refused_by_a_full_queue(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue(max_length=1)
    async with backend.receiver([queue]) as receiver:
        dead = await becomes(backend, queue, receiver, "dead")
    await backend.publish(queue, [waiting := a_message()])
    assert await backend.dead_letters(queue).replay([dead.id]) == 1
    assert await all_ids(backend, queue) == [waiting.id, dead.id]


async def test_due_jobs_are_not_refused_by_a_full_queue(
    backend: Backend, new_queue: NewQueue, until_ready: UntilReady, known: Known
) -> None:
    queue = await new_queue(max_length=2)
    await backend.publish(queue, [delayed := a_message(delay=0.05), now := a_message()])
    await until_ready(queue, 2)
    assert await all_ids(backend, queue) == [now.id, delayed.id]
    assert await backend.depth(queue) == known(2, 0, 0, 0)
