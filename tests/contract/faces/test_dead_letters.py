"""The dead letters of a queue, through both faces: look, replay, purge."""

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mindtrace.jobs import (
    ConfigError,
    Depth,
    Job,
    JobNotFound,
    QueueNotFound,
    QueueSpec,
    Reject,
    RetryPolicy,
)
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio


Known = Callable[[int, int, int, int], Depth]


def a_job(job_id: str, schema_name: str = "parcels", **fields: Any) -> Job:
    return Job(id=job_id, name=schema_name, schema_name=schema_name, **fields)


def fail(job: dict[str, Any]) -> None:
    if job["input_data"].get("rejected"):
        raise Reject("not ours")
    raise OSError("the door is shut")


@pytest.fixture
async def letters(jobs: Any) -> Any:
    """Those of `parcels`: a and b used up their one run, c was rejected, d is of another schema, e is no job at all."""
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job("a", headers={"trace": "1"}, input_data={"weight": 3}))
    await jobs.publish("parcels", a_job("b"))
    await jobs.publish("parcels", a_job("c", input_data={"rejected": True}))
    await jobs.publish("parcels", a_job("d", "letters"))
    await jobs.put("parcels", Message("e", b"no job"))
    assert await jobs.consume(jobs.consumer("run", fail, "parcels", retry=False), 5) == 5
    return jobs.dead_letters("parcels")


def ids(page: Any) -> str:
    return "".join(record.message.id for record in page.records)


async def ready(jobs: Any) -> str:
    """The ids that are ready, which takes them off."""
    count = await jobs.count_queue_messages("parcels")
    return "".join([(await jobs.receive_message("parcels"))["id"] for _ in range(count)])


async def test_they_are_listed_newest_first_and_looking_changes_nothing(letters: Any) -> None:
    for _ in range(2):
        page = await letters.list()
        assert (ids(page), page.cursor) == ("edcba", None)
        assert await letters.count() == 5


async def test_a_record_says_what_died_and_why(letters: Any) -> None:
    record = await letters.get("a")
    [error] = record.errors
    assert (record.queue, record.message.id, record.reason, record.replays) == ("parcels", "a", "attempts", 0)
    assert (record.attempts, record.crashes, record.releases, record.number) == (1, 0, 0, 1)
    assert (error.type, error.message) == ("OSError", "the door is shut")
    assert "in fail" in error.traceback
    assert "weight" not in error.traceback
    assert error.worker
    assert error.started_at <= error.ended_at
    assert abs(datetime.now(UTC) - record.died_at) < timedelta(seconds=30)


async def test_a_page_continues_where_the_one_before_it_ended(letters: Any) -> None:
    pages, cursor = [], None
    for _ in range(3):
        page = await letters.list(limit=2, cursor=cursor)
        pages.append(ids(page))
        cursor = page.cursor
    assert (pages, cursor) == (["ed", "cb", "a"], None)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({"reason": "attempts"}, "dba"),
        ({"reason": "rejected"}, "c"),
        ({"reason": "malformed"}, "e"),
        ({"reason": "timeout"}, ""),
        ({"schema": "parcels"}, "cba"),
        ({"schema": "letters"}, "d"),
        ({"schema": "parcels", "reason": "attempts"}, "ba"),
        ({"since": datetime.now(UTC) - timedelta(hours=1)}, "edcba"),
        ({"since": datetime.now(UTC) + timedelta(hours=1)}, ""),
    ],
    ids=str,
)
async def test_a_filter_says_which_are_listed_replayed_and_purged(
    jobs: Any, letters: Any, where: dict[str, Any], found: str
) -> None:
    assert ids(await letters.list(**where)) == found
    assert await letters.replay(**where) == len(found)
    assert ids(await letters.list(**where)) == ""
    assert await letters.count() == 5 - len(found)
    assert await letters.purge(**where) == 0
    assert await letters.purge() == 5 - len(found)
    assert await letters.count() == 0
    assert await jobs.count_queue_messages("parcels") == len(found)


@pytest.mark.parametrize("verb", ["replay", "purge"])
async def test_a_limit_takes_the_oldest_and_the_progress_of_a_call_is_told(jobs: Any, letters: Any, verb: str) -> None:
    told: list[tuple[int, int]] = []
    call = getattr(letters, verb)
    assert await call(schema="parcels", limit=2, progress=lambda *counts: told.append(counts)) == 2
    assert ids(await letters.list()) == "edc"
    assert await call(["e", "c", "d"], limit=1) == 1
    assert ids(await letters.list()) == "dc"
    assert told[-1] == (2, 2)
    assert told == sorted(set(told))
    assert await jobs.count_queue_messages("parcels") == (3 if verb == "replay" else 0)


async def test_a_replay_at_a_rate_tells_of_each_job(letters: Any) -> None:
    told: list[tuple[int, int]] = []
    await letters.replay(rate=1000.0, progress=lambda *counts: told.append(counts))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
async def test_a_limit_that_is_none_is_refused(letters: Any, limit: Any) -> None:
    for call in (letters.replay, letters.purge):
        with pytest.raises(ConfigError, match="limit"):
            await call(limit=limit)
    assert await letters.count() == 5


@pytest.mark.parametrize("where", [{"limit": 0}, {"limit": -1}, {"limit": 1.5}, {"cursor": "nonsense"}], ids=str)
async def test_a_page_that_cannot_be_is_a_value_error(letters: Any, where: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"limit|cursor"):
        await letters.list(**where)


@pytest.mark.parametrize("call", ["list", "replay", "purge"])
async def test_a_naive_since_is_a_value_error(letters: Any, call: str) -> None:
    with pytest.raises(ValueError, match="aware"):
        await getattr(letters, call)(since=datetime(2030, 1, 1))  # noqa: DTZ001 (naive on purpose)
    assert await letters.count() == 5


@pytest.mark.parametrize("call", ["replay", "purge"])
async def test_ids_and_a_filter_together_are_a_config_error(letters: Any, call: str) -> None:
    for where in ({"reason": "attempts"}, {"schema": "parcels"}, {"since": datetime.now(UTC)}):
        with pytest.raises(ConfigError, match="ids"):
            await getattr(letters, call)(["a"], **where)
    assert await letters.count() == 5


@pytest.mark.parametrize("call", ["replay", "purge"])
async def test_an_id_that_is_not_there_is_not_found_and_nothing_happens(jobs: Any, letters: Any, call: str) -> None:
    with pytest.raises(JobNotFound) as refused:
        await getattr(letters, call)(["a", "nobody"])
    assert refused.value.job_id == "nobody"
    assert await letters.count() == 5
    assert await jobs.count_queue_messages("parcels") == 0
    with pytest.raises(JobNotFound):
        await letters.get("nobody")


async def test_chosen_ones_are_replayed_at_the_back_under_their_ids(jobs: Any, letters: Any) -> None:
    await jobs.publish("parcels", a_job("new"))
    assert await letters.replay(["b", "a", "b"]) == 2
    assert ids(await letters.list()) == "edc"
    first, *replayed = [await jobs.receive_message("parcels") for _ in range(3)]
    assert first["id"] == "new"
    assert {job["id"] for job in replayed} == {"a", "b"}
    [a] = [job for job in replayed if job["id"] == "a"]
    assert (a["attempt"], a["headers"], a["input_data"]) == (1, {"trace": "1"}, {"weight": 3})


async def test_a_replayed_job_counts_anew_keeps_its_errors_and_never_repeats_a_number(jobs: Any, letters: Any) -> None:
    for replays in (1, 2):
        await letters.replay(["a"])
        await jobs.consume(jobs.consumer("run", fail, "parcels", retry=RetryPolicy(max_attempts=2, base=0.0)), 2)
        record = await letters.get("a")
        assert (record.attempts, record.replays, record.number) == (2, replays, 1 + 2 * replays)
        assert [error.type for error in record.errors] == ["OSError"] * (1 + 2 * replays)
        assert [bool(error.traceback) for error in record.errors] == [False] * (2 * replays) + [True]


async def test_two_replays_at_once_make_one_job(jobs: Any, letters: Any) -> None:
    await asyncio.gather(*(letters.replay(["a"]) for _ in range(5)), return_exceptions=True)
    assert await ready(jobs) == "a"


async def test_a_replay_may_be_paced(jobs: Any, letters: Any) -> None:
    assert await letters.replay(["a", "b"], rate=1000.0) == 2
    assert sorted(await ready(jobs)) == ["a", "b"]


@pytest.mark.parametrize("rate", [0, -1, math.nan])
async def test_a_pace_that_is_none_is_a_value_error(letters: Any, rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        await letters.replay(["a"], rate=rate)
    assert await letters.count() == 5


async def test_a_single_id_may_stand_for_a_list_of_one(letters: Any) -> None:
    assert await letters.purge("a") == 1
    assert ids(await letters.list()) == "edcb"


async def test_no_ids_are_none_and_not_all(letters: Any) -> None:
    assert await letters.replay([]) == 0
    assert await letters.purge([]) == 0
    assert await letters.count() == 5


async def test_dead_letters_of_a_queue_that_is_not_there_are_not_found(jobs: Any) -> None:
    letters = jobs.dead_letters("nowhere")
    for call in (letters.list(), letters.get("a"), letters.count(), letters.replay(), letters.purge()):
        with pytest.raises(QueueNotFound):
            await call


async def test_replayed_jobs_are_ready_and_dead_ones_are_counted_apart(jobs: Any, letters: Any, known: Known) -> None:
    assert await jobs.depth("parcels") == known(0, 0, 0, 5)
    await letters.replay(reason="attempts")
    assert await jobs.depth("parcels") == known(3, 0, 0, 2)
