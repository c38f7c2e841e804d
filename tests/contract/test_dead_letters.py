"""Dead letters: what is kept of a dead job, finding it again, putting it back, and forgetting it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest

from mindtrace.jobs import (
    Backend,
    ConfigError,
    Dead,
    Delivery,
    Depth,
    Done,
    JobNotFound,
    JobsError,
    QueueNotFound,
    Receiver,
    Release,
    Retry,
    RunError,
)
from mindtrace.jobs.backend import DeadLetters
from mindtrace.jobs.delivery import DeadFilter, DeadReason
from mindtrace.jobs.job import JobId, new_job_id
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
Known = Callable[[int, int, int, int], Depth]

ALL = DeadFilter()


def a_message(body: bytes = b"{}", **options: object) -> Message:
    return Message(new_job_id(), body, **options)  # type: ignore[arg-type] (a test names what it needs)


async def take(receiver: Receiver) -> Delivery:
    [delivery] = await receiver.receive(1, wait=5)
    return delivery


async def dead_jobs(backend: Backend, queue: str, reasons: Sequence[DeadReason] | int) -> list[JobId]:
    """Jobs that died one after the other, for these reasons, or so many that were rejected; oldest first."""
    if isinstance(reasons, int):
        reasons = list[DeadReason](["rejected" for _ in range(reasons)])
    messages = [a_message() for _ in reasons]
    await backend.publish(queue, messages)
    async with backend.receiver([queue], slots=len(messages)) as receiver:
        deliveries = await receiver.receive(len(messages))
        await receiver.settle([(delivery, Dead(reason)) for delivery, reason in zip(deliveries, reasons, strict=True)])
    return [message.id for message in messages]


async def listed(letters: DeadLetters, where: DeadFilter = ALL, limit: int = 100) -> list[JobId]:
    """The ids of all pages."""
    ids: list[JobId] = []
    cursor: str | None = None
    while True:
        page = await letters.list(where, limit=limit, cursor=cursor)
        assert len(page.records) <= limit
        ids += [record.message.id for record in page.records]
        cursor = page.cursor
        if cursor is None:
            return ids
        assert page.records


# --- the record -------------------------------------------------------------------------------------------------------


async def test_the_record_says_what_happened_to_the_job(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue("priority")
    message = a_message(b"\x00\xff not JSON", priority=3)
    before = datetime.now(UTC)
    await backend.publish(queue, [message])
    failures = [RunError("ValueError", "first"), RunError("KeyError", "last", "a frame", before, before, "w@host:1")]
    async with backend.receiver([queue]) as receiver:
        await receiver.settle([(await take(receiver), Release())])
        await receiver.settle([(await take(receiver), Retry(0.0, error=failures[0]))])
        await receiver.settle([(await take(receiver), Dead("attempts", failures[1]))])
    record = await backend.dead_letters(queue).get(message.id)
    assert (record.queue, record.message, record.reason) == (queue, message, "attempts")
    assert (record.attempts, record.crashes, record.releases, record.number) == (2, 0, 1, 3)
    assert record.errors == tuple(failures)
    assert record.replays == 0
    slack = timedelta(seconds=5)  # the broker's clock
    assert before - slack <= record.died_at <= datetime.now(UTC) + slack


@pytest.mark.parametrize("reason", get_args(DeadReason))
async def test_each_reason_is_kept_as_it_is(backend: Backend, queue: str, reason: DeadReason) -> None:
    [job_id] = await dead_jobs(backend, queue, [reason])
    assert (await backend.dead_letters(queue).get(job_id)).reason == reason


async def test_get_list_and_count_agree(backend: Backend, queue: str) -> None:
    letters = backend.dead_letters(queue)
    assert (await letters.count(), (await letters.list(ALL)).records) == (0, [])
    ids = await dead_jobs(backend, queue, ["rejected", "timeout"])
    records = (await letters.list(ALL)).records
    assert [await letters.get(job_id) for job_id in reversed(ids)] == records
    assert await letters.count() == len(records) == (await backend.depth(queue)).dead


async def test_a_job_that_lives_is_no_dead_letter(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message(), a_message(delay=300)])
    letters = backend.dead_letters(queue)
    async with backend.receiver([queue]) as receiver:
        with pytest.raises(JobNotFound):
            await letters.get(message.id)
        await take(receiver)
        with pytest.raises(JobNotFound):
            await letters.get(message.id)
    assert await letters.count() == 0


async def test_each_queue_has_dead_letters_of_its_own(backend: Backend, new_queue: NewQueue) -> None:
    one, two = await new_queue(), await new_queue()
    [first], [second] = await dead_jobs(backend, one, ["rejected"]), await dead_jobs(backend, two, ["rejected"])
    assert await listed(backend.dead_letters(one)) == [first]
    assert await listed(backend.dead_letters(two)) == [second]
    assert await backend.dead_letters(one).purge(ALL) == 1
    assert await backend.dead_letters(two).count() == 1


async def test_looking_changes_nothing(backend: Backend, queue: str) -> None:
    [job_id] = await dead_jobs(backend, queue, ["rejected"])
    letters = backend.dead_letters(queue)
    record, depth = await letters.get(job_id), await backend.depth(queue)
    for _ in range(3):
        await listed(letters)
        await letters.count()
    assert (await letters.get(job_id), await backend.depth(queue)) == (record, depth)


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 100])
async def test_pages_hold_each_record_once_newest_first(backend: Backend, queue: str, limit: int) -> None:
    ids = await dead_jobs(backend, queue, 6)
    assert await listed(backend.dead_letters(queue), limit=limit) == ids[::-1]


@pytest.mark.parametrize(("limit", "pages"), [(6, 1), (3, 2), (4, 2)])
async def test_the_last_page_says_that_it_is(backend: Backend, queue: str, limit: int, pages: int) -> None:
    await dead_jobs(backend, queue, 6)
    letters = backend.dead_letters(queue)
    page = await letters.list(ALL, limit=limit)
    for _ in range(pages - 1):
        assert page.cursor is not None
        page = await letters.list(ALL, limit=limit, cursor=page.cursor)
    assert page.cursor is None


async def test_a_replayed_job_that_dies_again_is_the_newest(backend: Backend, queue: str) -> None:
    ids = await dead_jobs(backend, queue, 3)
    letters = backend.dead_letters(queue)
    await letters.replay(ids[:1])
    async with backend.receiver([queue]) as receiver:
        await receiver.settle([(await take(receiver), Dead("rejected"))])
    assert await listed(letters) == [ids[0], ids[2], ids[1]]


async def test_a_filter_by_reason_holds_over_pages(backend: Backend, queue: str) -> None:
    ids = await dead_jobs(backend, queue, ["rejected", "timeout", "rejected", "attempts", "rejected"])
    letters = backend.dead_letters(queue)
    assert await listed(letters, DeadFilter("rejected"), limit=2) == [ids[4], ids[2], ids[0]]
    assert await listed(letters, DeadFilter("timeout")) == [ids[1]]
    assert await listed(letters, DeadFilter("malformed")) == []


async def test_a_filter_by_time_includes_its_instant(backend: Backend, queue: str) -> None:
    letters = backend.dead_letters(queue)
    ids = [job_id for _ in range(3) for job_id in await dead_jobs(backend, queue, ["rejected"])]
    died = [(await letters.get(job_id)).died_at for job_id in ids]
    assert died == sorted(died)
    for at in died:
        expected = [job_id for job_id, died_at in zip(ids, died, strict=True) if died_at >= at]
        assert await listed(letters, DeadFilter(since=at)) == expected[::-1]
    assert await listed(letters, DeadFilter(since=died[-1] + timedelta(seconds=1))) == []
    assert await listed(letters, DeadFilter("timeout", died[0])) == []


@pytest.mark.parametrize("forgotten_by", ["purge", "replay"])
async def test_a_cursor_goes_on_after_its_page_also_when_that_page_is_gone(
    backend: Backend, queue: str, forgotten_by: str
) -> None:
    """Page by page, deal with what it shows: that reaches every record."""
    ids = await dead_jobs(backend, queue, 6)
    letters = backend.dead_letters(queue)
    first = await letters.list(ALL, limit=2)
    shown = [record.message.id for record in first.records]
    assert await (letters.purge(shown) if forgotten_by == "purge" else letters.replay(shown)) == 2
    second = await letters.list(ALL, limit=2, cursor=first.cursor)
    assert shown + [record.message.id for record in second.records] == ids[:1:-1]


async def test_a_cursor_goes_on_after_its_page_also_when_more_jobs_die(backend: Backend, queue: str) -> None:
    ids = await dead_jobs(backend, queue, 4)
    letters = backend.dead_letters(queue)
    first = await letters.list(ALL, limit=2)
    await dead_jobs(backend, queue, ["rejected"])
    second = await letters.list(ALL, limit=2, cursor=first.cursor)
    assert [record.message.id for record in second.records] == ids[1::-1]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
async def test_a_page_of_no_whole_size_is_refused(backend: Backend, queue: str, limit: int) -> None:
    with pytest.raises(ConfigError, match="limit"):
        await backend.dead_letters(queue).list(ALL, limit=limit)


@pytest.mark.parametrize("cursor", ["nonsense", "-1", " "])
async def test_a_cursor_of_no_earlier_page_is_refused(backend: Backend, queue: str, cursor: str) -> None:
    await dead_jobs(backend, queue, ["rejected"])
    with pytest.raises(ConfigError, match="cursor"):
        await backend.dead_letters(queue).list(ALL, cursor=cursor)


# --- replay -----------------------------------------------------------------------------------------------------------


async def test_a_replayed_job_starts_anew_under_its_id(backend: Backend, queue: str, known: Known) -> None:
    """Its counters are 0, its number goes on, and what happened before is not forgotten."""
    await backend.publish(queue, [message := a_message(b'"kept"')])
    letters = backend.dead_letters(queue)
    async with backend.receiver([queue]) as receiver:
        await receiver.settle([(await take(receiver), Release())])
        await receiver.settle([(await take(receiver), Retry(0.0, error=RunError("ValueError", "one")))])
        await receiver.settle([(await take(receiver), Dead("attempts", RunError("ValueError", "two")))])
        assert await letters.replay([message.id]) == 1
        assert await backend.depth(queue) == known(1, 0, 0, 0)
        again = await take(receiver)
        assert again.message == message
        assert (again.attempt, again.crashes, again.releases, again.number) == (1, 0, 0, 4)
        await receiver.settle([(again, Dead("rejected", RunError("KeyError", "three")))])
    record = await letters.get(message.id)
    assert (record.reason, record.replays, record.attempts, record.number) == ("rejected", 1, 1, 4)
    assert [error.message for error in record.errors] == ["one", "two", "three"]


async def test_crashes_are_counted_anew_after_a_replay(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [message := a_message(crash_limit=2)])
    letters = backend.dead_letters(queue)
    for replays in range(2):
        starts = 0
        async with (
            backend.receiver([queue], slots=9, lease=0.03, keep=False) as receiver,
            asyncio.timeout(10),
        ):
            while not await letters.count():
                starts += len(await receiver.receive(1, wait=0.02))
        record = await letters.get(message.id)
        assert (starts, record.crashes, record.replays, record.number) == (2, 2, replays, 2 * (replays + 1))
        await letters.replay([message.id])


async def test_replays_add_up(backend: Backend, queue: str) -> None:
    [job_id] = await dead_jobs(backend, queue, ["rejected"])
    letters = backend.dead_letters(queue)
    async with backend.receiver([queue]) as receiver:
        for replays in range(1, 4):
            await letters.replay([job_id])
            await receiver.settle([(await take(receiver), Dead("rejected"))])
            assert (await letters.get(job_id)).replays == replays


async def test_a_replayed_job_can_end_well(backend: Backend, queue: str, known: Known) -> None:
    [job_id] = await dead_jobs(backend, queue, ["rejected"])
    await backend.dead_letters(queue).replay([job_id])
    async with backend.receiver([queue]) as receiver:
        assert await receiver.settle([(await take(receiver), Done())]) == [None]
    assert await backend.depth(queue) == known(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("where", "expected"),
    [(ALL, [0, 1, 2]), (DeadFilter("rejected"), [0, 2]), (DeadFilter("malformed"), [])],
)
async def test_a_filter_replays_what_it_finds_oldest_first(
    backend: Backend, queue: str, where: DeadFilter, expected: list[int]
) -> None:
    ids = await dead_jobs(backend, queue, ["rejected", "timeout", "rejected"])
    letters = backend.dead_letters(queue)
    assert await letters.replay(where) == len(expected)
    assert await letters.count() == 3 - len(expected)
    async with backend.receiver([queue], slots=3) as receiver:
        deliveries = await receiver.receive(3)
    assert [delivery.message.id for delivery in deliveries] == [ids[index] for index in expected]


async def test_replaying_an_id_twice_in_one_call_makes_one_job(backend: Backend, queue: str, known: Known) -> None:
    [job_id] = await dead_jobs(backend, queue, ["rejected"])
    assert await backend.dead_letters(queue).replay([job_id, job_id]) == 1
    assert await backend.depth(queue) == known(1, 0, 0, 0)


@pytest.mark.parametrize("by_filter", [True, False])
async def test_two_replays_at_once_make_one_job(backend: Backend, queue: str, by_filter: bool, known: Known) -> None:
    ids = await dead_jobs(backend, queue, 5)
    letters = backend.dead_letters(queue)
    answers = await asyncio.gather(
        *(letters.replay(ALL if by_filter else ids) for _ in range(2)), return_exceptions=True
    )
    assert all(isinstance(answer, int | JobNotFound) for answer in answers)
    if backend.traits.deduplicates:
        assert sum(answer for answer in answers if isinstance(answer, int)) == 5
        assert await backend.depth(queue) == known(5, 0, 0, 0)


async def test_a_replay_wakes_who_waits(backend: Backend, queue: str) -> None:
    [job_id] = await dead_jobs(backend, queue, ["rejected"])
    async with backend.receiver([queue]) as receiver:
        waiting = asyncio.create_task(receiver.receive(1, wait=300))
        await asyncio.sleep(0)
        await backend.dead_letters(queue).replay([job_id])
        async with asyncio.timeout(10):
            [delivery] = await waiting
    assert delivery.message.id == job_id


async def test_a_replay_at_a_rate_takes_its_time(backend: Backend, queue: str) -> None:
    await dead_jobs(backend, queue, 4)
    started = time.monotonic()
    assert await backend.dead_letters(queue).replay(ALL, rate=20) == 4
    assert time.monotonic() - started >= 3 / 20
    assert (await backend.depth(queue)).ready == 4


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
async def test_a_rate_that_is_none_is_refused(backend: Backend, queue: str, rate: float) -> None:
    await dead_jobs(backend, queue, ["rejected"])
    with pytest.raises(ConfigError, match="rate"):
        await backend.dead_letters(queue).replay(ALL, rate=rate)
    assert (await backend.depth(queue)).dead == 1


# --- purge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "left"), [(ALL, []), (DeadFilter("rejected"), [1]), (DeadFilter("malformed"), [2, 1, 0])]
)
async def test_a_filter_purges_what_it_finds(
    backend: Backend, queue: str, where: DeadFilter, left: list[int], known: Known
) -> None:
    ids = await dead_jobs(backend, queue, ["rejected", "timeout", "rejected"])
    letters = backend.dead_letters(queue)
    assert await letters.purge(where) == 3 - len(left)
    assert await listed(letters) == [ids[index] for index in left]
    assert await backend.depth(queue) == known(0, 0, 0, len(left))


async def test_a_purged_job_is_gone_for_good(backend: Backend, queue: str) -> None:
    ids = await dead_jobs(backend, queue, ["rejected", "rejected"])
    letters = backend.dead_letters(queue)
    assert await letters.purge([ids[0], ids[0]]) == 1
    with pytest.raises(JobNotFound):
        await letters.get(ids[0])
    assert await letters.replay(ALL) == 1
    async with backend.receiver([queue], slots=2) as receiver:
        assert [delivery.message.id for delivery in await receiver.receive(2)] == [ids[1]]


# --- what is not there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["replay", "purge"])
async def test_an_id_that_is_not_there_changes_nothing(backend: Backend, queue: str, verb: str, known: Known) -> None:
    ids = await dead_jobs(backend, queue, ["rejected", "rejected"])
    await backend.publish(queue, [living := a_message()])
    letters = backend.dead_letters(queue)
    call = letters.replay if verb == "replay" else letters.purge
    for missing in ("no-such-job", living.id):
        with pytest.raises(JobNotFound) as raised:
            await call([ids[0], missing, ids[1]])
        assert raised.value.job_id == missing
    assert await backend.depth(queue) == known(1, 0, 0, 2)
    assert await call([]) == 0


CALLS: dict[str, Callable[[DeadLetters], Awaitable[object]]] = {
    "list": lambda letters: letters.list(ALL),
    "get": lambda letters: letters.get("some-job"),
    "count": lambda letters: letters.count(),
    "replay": lambda letters: letters.replay(ALL),
    "replay ids": lambda letters: letters.replay(["some-job"]),
    "purge": lambda letters: letters.purge(ALL),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("deleted", [True, False])
async def test_the_dead_letters_of_a_queue_that_is_not_there(
    backend: Backend, queue: str, call: Callable[[DeadLetters], Awaitable[object]], deleted: bool
) -> None:
    letters = backend.dead_letters(queue if deleted else "nowhere")
    if deleted:
        await backend.delete(queue)
    with pytest.raises(QueueNotFound):
        await call(letters)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_the_dead_letters_of_a_closed_backend(
    backend: Backend, queue: str, call: Callable[[DeadLetters], Awaitable[object]]
) -> None:
    letters = backend.dead_letters(queue)
    await backend.aclose()
    with pytest.raises(JobsError, match="not open"):
        await call(letters)
