"""`receive_message`, the documented at-most-once read, through both faces."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import Depth, Job, JobSchema, QueueNotFound, QueueSpec, RetryPolicy
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

ReceiveAll = Callable[[str], Awaitable[list[dict[str, Any]]]]


Known = Callable[[int, int, int, int], Depth]


class Visit(BaseModel):
    day: datetime
    guests: int = 2


def a_job(**fields: Any) -> Job:
    return Job(name="anything", schema_name="anything", **fields)


async def test_a_received_job_is_a_dict_of_json_values(jobs: Any) -> None:
    await jobs.register(JobSchema("visits", Visit))
    before = datetime.now(UTC) - timedelta(milliseconds=1)  # it travels in whole ms
    job_id = await jobs.publish("visits", Visit(day=datetime(2030, 1, 2, tzinfo=UTC)), headers={"trace": "1"})
    taken = await jobs.receive_message("visits")
    created_at = datetime.fromisoformat(taken.pop("created_at"))
    assert before <= created_at <= datetime.now(UTC)
    assert taken == {
        "id": job_id,
        "name": "visits",
        "schema_name": "visits",
        "input_data": {"day": "2030-01-02T00:00:00Z", "guests": 2},
        "priority": 0,
        "attempt": 1,
        "headers": {"trace": "1"},
    }
    assert json.loads(json.dumps(taken)) == taken


async def test_a_received_job_tells_when_it_was_made(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job(created_at=datetime(2020, 2, 29, 12, tzinfo=UTC)))
    assert (await jobs.receive_message("parcels"))["created_at"] == "2020-02-29T12:00:00.000+00:00"


async def test_run_and_receive_message_get_the_same_dict(jobs: Any) -> None:
    await jobs.register(JobSchema("visits", Visit))
    job = Job(name="a visit", schema_name="visits", input_data={"day": "2030-01-02T00:00:00Z"}, headers={"a": "b"})
    await jobs.publish("visits", job, job_id="one")
    await jobs.publish("visits", job, job_id="two")
    run: list[dict[str, Any]] = []
    await jobs.consume(jobs.consumer("run", run.append, "visits"), 1)
    received = await jobs.receive_message("visits")
    assert run == [received | {"id": "one"}]


async def test_an_empty_queue_gives_none(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    assert await jobs.receive_message("parcels") is None


async def test_a_queue_that_is_not_there_is_said_to_be_missing(jobs: Any) -> None:
    with pytest.raises(QueueNotFound) as refused:
        await jobs.receive_message("nowhere")
    assert refused.value.queue == "nowhere"


async def test_a_received_job_is_gone(jobs: Any, known: Known) -> None:
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job())
    assert await jobs.receive_message("parcels")
    assert await jobs.receive_message("parcels") is None
    assert await jobs.depth("parcels") == known(0, 0, 0, 0)


async def test_no_job_is_received_twice_by_many_at_once(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    ids = await jobs.publish_many("parcels", [a_job() for _ in range(30)])
    taken = await asyncio.gather(*(jobs.receive_message("parcels") for _ in range(50)))
    assert sorted(job["id"] for job in taken if job) == sorted(ids)
    assert taken.count(None) == 20


async def test_a_job_that_failed_is_received_as_its_next_attempt(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job(), retry=RetryPolicy(base=0.0))
    await jobs.consume(jobs.consumer("run", lambda _: 1 / 0, "parcels"), 1)
    assert (await jobs.receive_message("parcels"))["attempt"] == 2


async def test_what_cannot_be_read_goes_to_the_dead_letters_and_the_next_is_given(
    jobs: Any, malformed: bytes, known: Known
) -> None:
    await jobs.declare(QueueSpec("orders"))
    assert await jobs.put("orders", Message("broken", malformed)) == ["stored"]
    await jobs.publish("orders", a_job(id="good"))
    assert (await jobs.receive_message("orders"))["id"] == "good"
    [record] = await jobs.dead("orders")
    assert (record.message.id, record.message.body, record.reason) == ("broken", malformed, "malformed")
    assert await jobs.depth("orders") == known(0, 0, 0, 1)


async def test_a_body_above_the_limit_is_dead_as_too_large(jobs: Any) -> None:
    await jobs.declare(QueueSpec("orders"))
    await jobs.put("orders", Message("huge", b" " * (2**20 + 64 * 1024 + 1)))
    assert await jobs.receive_message("orders") is None
    assert [record.reason for record in await jobs.dead("orders")] == ["too_large"]


async def test_a_format_from_the_future_is_left_to_others(
    jobs: Any, an_envelope: Callable[..., bytes], known: Known
) -> None:
    await jobs.declare(QueueSpec("orders"))
    await jobs.put("orders", Message("later", an_envelope(v="2", input="[]")))
    await jobs.publish("orders", a_job(id="good"))
    assert (await jobs.receive_message("orders"))["id"] == "good"
    assert await jobs.receive_message("orders") is None
    assert await jobs.depth("orders") == known(0, 1, 0, 0)


async def test_an_input_that_its_schema_refuses_on_arrival_is_dead(jobs: Any) -> None:
    await jobs.declare(QueueSpec("visits"))
    await jobs.publish("visits", Job(id="bad", name="visits", schema_name="visits", input_data={"day": "some-secret"}))
    await jobs.register(JobSchema("visits", Visit))
    assert await jobs.receive_message("visits") is None
    [record] = await jobs.dead("visits")
    assert (record.message.id, record.reason) == ("bad", "input_invalid")
    assert "day" in record.errors[0].message
    assert "secret" not in repr(record.errors)


async def test_fields_that_nobody_knows_are_no_obstacle(jobs: Any, an_envelope: Callable[..., bytes]) -> None:
    await jobs.declare(QueueSpec("orders"))
    await jobs.put("orders", Message("foreign", an_envelope('{"item":"tea","item":"milk"}', colour='"blue"')))
    assert (await jobs.receive_message("orders"))["input_data"] == {"item": "milk"}  # of duplicate keys the last counts
