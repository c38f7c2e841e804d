"""What publishing promises, through both faces: what is stored, what is refused, and with which error."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    ConfigError,
    Depth,
    InputInvalid,
    Job,
    JobSchema,
    JobsError,
    NotSupported,
    PayloadTooLarge,
    PublishIncomplete,
    QueueFull,
    QueueNotFound,
    QueueSpec,
    RetryPolicy,
    job_from_schema,
)

pytestmark = pytest.mark.anyio

ReceiveAll = Callable[[str], Awaitable[list[dict[str, Any]]]]


Known = Callable[[int, int, int, int], Depth]


class Parcel(BaseModel):
    weight: float


class Anything(BaseModel):
    value: Any = None


def a_job(schema_name: str = "anything", **fields: Any) -> Job:
    return Job(name=schema_name, schema_name=schema_name, **fields)


def a_circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


async def refused_as_a_stack(jobs: Any) -> None:
    """Where there are no stacks, declaring one says so and makes nothing."""
    with pytest.raises(NotSupported, match="stack") as refused:
        await jobs.declare(QueueSpec("pile", "stack"))
    assert (refused.value.feature, refused.value.backend) == ("a stack queue", jobs.traits.name)
    assert refused.value.needs
    with pytest.raises(QueueNotFound):
        await jobs.publish("pile", a_job())


# --- register


async def test_registering_gives_the_queue_and_declares_it(jobs: Any) -> None:
    assert await jobs.register(JobSchema("parcels", Parcel)) == "parcels"
    assert await jobs.register(JobSchema("letters", Parcel, queue="post")) == "post"
    assert await jobs.queues() == [QueueSpec("parcels"), QueueSpec("post")]


async def test_registering_an_equal_schema_again_changes_nothing(jobs: Any) -> None:
    await jobs.register(JobSchema("parcels", Parcel, retry=5, timeout=3.0))
    await jobs.publish("parcels", {"weight": 1})
    assert await jobs.register(JobSchema("parcels", Parcel(weight=2), retry=5, timeout=3.0)) == "parcels"
    assert await jobs.count_queue_messages("parcels") == 1


@pytest.mark.parametrize(
    "other",
    [
        JobSchema("parcels", Anything),
        JobSchema("parcels", Parcel, Parcel),
        JobSchema("parcels", Parcel, queue="post"),
        JobSchema("parcels", Parcel, retry=5),
        JobSchema("parcels", Parcel, timeout=5.0),
        JobSchema("parcels", Parcel, priority=5),
        JobSchema("parcels", Parcel, validate_output="warn"),
    ],
    ids=["input", "output", "queue", "retry", "timeout", "priority", "validate_output"],
)
async def test_registering_a_different_schema_under_a_known_name_is_refused(jobs: Any, other: Any) -> None:
    await jobs.register(JobSchema("parcels", Parcel))
    with pytest.raises(ConfigError, match="parcels"):
        await jobs.register(other)
    await jobs.publish("parcels", {"weight": 1})
    assert await jobs.queues() == [QueueSpec("parcels")]


async def test_registering_attaches_to_the_kind_of_queue_that_is_there(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels", "priority"))
    await jobs.register(JobSchema("parcels", Parcel))
    assert await jobs.queues() == [QueueSpec("parcels", "priority")]


# --- what may be published


@pytest.mark.parametrize(
    "of",
    [lambda schema: job_from_schema(schema, {"weight": 2}), lambda _: Parcel(weight=2), lambda _: {"weight": 2}],
    ids=["a Job", "a model", "a dict"],
)
async def test_a_job_a_model_and_a_dict_are_the_same_input(jobs: Any, of: Callable[[Any], Any]) -> None:
    schema = JobSchema("parcels", Parcel)
    await jobs.register(schema)
    job_id = await jobs.publish("parcels", of(schema))
    taken = await jobs.receive_message("parcels")
    assert (taken["id"], taken["name"], taken["schema_name"]) == (job_id, "parcels", "parcels")
    assert taken["input_data"] == {"weight": 2.0}


async def test_a_job_keeps_its_own_id_priority_and_headers_unless_told_otherwise(jobs: Any) -> None:
    await jobs.declare(QueueSpec("ranked", "priority"))
    job = a_job(id="mine", priority=4, headers={"trace": "1", "kept": "yes"}, input_data={"any": [1, None, "x"]})
    assert await jobs.publish("ranked", job) == "mine"
    assert await jobs.publish("ranked", job, job_id="other", priority=9, headers={"trace": "2"}) == "other"
    second, first = [await jobs.receive_message("ranked") for _ in range(2)]
    assert (first["id"], first["priority"], first["headers"]) == ("mine", 4, {"trace": "1", "kept": "yes"})
    assert (second["id"], second["priority"], second["headers"]) == ("other", 9, {"trace": "2", "kept": "yes"})
    assert first["input_data"] == {"any": [1, None, "x"]}


async def test_a_job_of_an_unregistered_schema_is_published_unvalidated(jobs: Any) -> None:
    await jobs.register(JobSchema("parcels", Parcel))
    job_id = await jobs.publish("parcels", a_job("letters", input_data={"weight": "a feather's"}))
    taken = await jobs.receive_message("parcels")
    assert (taken["id"], taken["schema_name"], taken["input_data"]) == (job_id, "letters", {"weight": "a feather's"})


@pytest.mark.parametrize("job", [{"weight": 1}, Parcel(weight=1)], ids=["a dict", "a model"])
async def test_an_input_without_a_registered_schema_is_refused(jobs: Any, job: Any, known: Known) -> None:
    await jobs.declare(QueueSpec("parcels"))
    with pytest.raises(ConfigError, match="parcels"):
        await jobs.publish("parcels", job)
    assert await jobs.depth("parcels") == known(0, 0, 0, 0)


async def test_of_several_schemas_in_one_queue_the_models_class_says_which(jobs: Any) -> None:
    await jobs.register(JobSchema("parcels", Parcel, queue="post"))
    await jobs.register(JobSchema("letters", Anything, queue="post"))
    await jobs.publish("post", Anything(value=1))
    await jobs.publish("post", Parcel(weight=1))
    assert [(await jobs.receive_message("post"))["schema_name"] for _ in range(2)] == ["letters", "parcels"]
    with pytest.raises(ConfigError, match="post"):
        await jobs.publish("post", {"weight": 1})


INVALID = {"weight": "as-heavy-as-a-secret"}


@pytest.mark.parametrize(
    "bad",
    [INVALID, {}, a_job("parcels", input_data=INVALID), Anything(value="as-heavy-as-a-secret"), "as-heavy-as-a-secret"],
    ids=["a dict", "an empty dict", "a Job", "another model", "no input at all"],
)
async def test_an_input_that_does_not_fit_is_refused_before_anything_is_sent(jobs: Any, bad: Any, known: Known) -> None:
    await jobs.register(JobSchema("parcels", Parcel))
    with pytest.raises(InputInvalid) as refused:
        await jobs.publish("parcels", bad)
    assert (refused.value.schema, refused.value.outcome, refused.value.retryable) == ("parcels", "not_done", False)
    assert refused.value.errors
    assert "secret" not in f"{refused.value} {refused.value.errors}"
    assert await jobs.depth("parcels") == known(0, 0, 0, 0)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, [-math.inf], "\ud800", {"\ud800": 1}, object(), 10**5000, b"\xff", a_circle()],
    ids=["NaN", "inf", "-inf inside", "surrogate", "surrogate key", "object", "5,000 digits", "no text", "a circle"],
)
@pytest.mark.parametrize("as_model", [True, False], ids=["model", "dict"])
async def test_an_input_that_json_cannot_carry_is_refused(jobs: Any, value: Any, as_model: bool, known: Known) -> None:
    await jobs.register(JobSchema("anything", Anything))
    with pytest.raises(InputInvalid):
        await jobs.publish("anything", Anything(value=value) if as_model else {"value": value})
    assert await jobs.depth("anything") == known(0, 0, 0, 0)


async def test_inputs_nest_up_to_64_levels(jobs: Any) -> None:
    def nested(levels: int) -> Any:
        return {"value": nested(levels - 1)} if levels > 1 else {"value": 1}

    await jobs.register(JobSchema("anything", Anything))
    await jobs.publish("anything", nested(64))
    for too_deep in (nested(65), a_job(input_data=nested(65)), nested(900)):
        with pytest.raises(InputInvalid):
            await jobs.publish("anything", too_deep)
    assert (await jobs.receive_message("anything"))["input_data"] == nested(64)


@pytest.mark.parametrize(
    "value",
    [10**400, -(2**63), 0.1, 1e-300, "é\0😀\u2028", "", None, True, [], {}, [{"a": [None]}]],
    ids=repr,
)
async def test_json_values_arrive_as_they_were_published(jobs: Any, value: Any) -> None:
    await jobs.register(JobSchema("anything", Anything))
    await jobs.publish("anything", {"value": value})
    assert (await jobs.receive_message("anything"))["input_data"] == {"value": value}


async def test_a_job_shares_nothing_with_its_publisher(jobs: Any) -> None:
    await jobs.register(JobSchema("anything", Anything))
    published: dict[str, Any] = {"value": [1]}
    await jobs.publish("anything", published)
    published["value"].append(2)
    assert (await jobs.receive_message("anything"))["input_data"] == {"value": [1]}


async def test_publishing_to_a_queue_that_is_not_there_says_so(jobs: Any) -> None:
    await jobs.register(JobSchema("parcels", Parcel))
    with pytest.raises(QueueNotFound) as refused:
        await jobs.publish("nowhere", a_job())
    assert (refused.value.queue, refused.value.outcome) == ("nowhere", "not_done")
    with pytest.raises(QueueNotFound):
        await jobs.publish_many("nowhere", [a_job(), a_job()])


# --- options


@pytest.mark.parametrize(
    "when", [{"delay": 3600}, {"at": datetime.now(UTC) + timedelta(days=365)}], ids=["delay", "at"]
)
async def test_a_delayed_job_is_scheduled_and_not_handed_out(jobs: Any, when: dict[str, Any], known: Known) -> None:
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job(), **when)
    assert await jobs.receive_message("parcels") is None
    assert await jobs.depth("parcels") == known(0, 1, 0, 0)
    assert await jobs.count_queue_messages("parcels") == 0


@pytest.mark.parametrize(
    "when",
    [
        {"delay": 0},
        {"delay": 0.0},
        {"at": datetime.now(UTC) - timedelta(days=1)},
        {"at": datetime(1970, 1, 1, tzinfo=UTC)},
    ],
    ids=["no delay", "0.0", "yesterday", "the epoch"],
)
async def test_a_job_without_a_delay_or_of_the_past_is_ready_at_once(jobs: Any, when: dict[str, Any]) -> None:
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job(), **when)
    assert await jobs.count_queue_messages("parcels") == 1


@pytest.mark.parametrize("when", ["delay", "at"])
async def test_a_delayed_job_is_handed_out_when_it_is_due_and_not_before(jobs: Any, when: str) -> None:
    await jobs.declare(QueueSpec("parcels"))
    started: list[datetime] = []
    due = datetime.now(UTC) + timedelta(seconds=0.1)
    option: dict[str, Any] = {"delay": 0.1} if when == "delay" else {"at": due}
    job_id = await jobs.publish("parcels", a_job(), **option)
    assert await jobs.consume(jobs.consumer("run", lambda _: started.append(datetime.now(UTC)), "parcels"), 1) == 1
    assert started[0] >= due - timedelta(milliseconds=5)  # two clocks: the wall and the monotonic one
    assert await jobs.publish("parcels", a_job(id=job_id)) == job_id


async def test_the_highest_priority_comes_first_and_equal_ones_in_order(jobs: Any, receive_all: ReceiveAll) -> None:
    lowest, highest = jobs.traits.priorities
    await jobs.declare(QueueSpec("ranked", "priority", priority_levels=highest if highest <= 255 else None))
    await jobs.register(JobSchema("middling", Parcel, priority=5, queue="ranked"))
    for name, priority in (("low", lowest), ("b", 0), ("a", highest), ("c", None), ("d", 0)):
        await jobs.publish("ranked", a_job(), priority=priority, job_id=name)
    await jobs.publish("ranked", Parcel(weight=1), job_id="of-its-schema")
    await jobs.publish("ranked", Parcel(weight=1), job_id="of-its-publish", priority=6)
    usual = ["b", "c", "d", "low"] if lowest < 0 else ["low", "b", "c", "d"]
    assert [job["id"] for job in await receive_all("ranked")] == ["a", "of-its-publish", "of-its-schema", *usual]


@pytest.mark.parametrize("kind", ["fifo", "stack"])
async def test_a_priority_on_a_queue_of_another_kind_is_not_supported(jobs: Any, kind: Any) -> None:
    if kind == "stack" and not jobs.traits.stack:
        await refused_as_a_stack(jobs)
        return
    await jobs.declare(QueueSpec("plain", kind))
    with pytest.raises(NotSupported, match="priority") as refused:
        await jobs.publish("plain", a_job(), priority=1)
    assert (refused.value.backend, refused.value.needs) == (jobs.traits.name, "a queue declared with kind='priority'")
    await jobs.publish("plain", a_job(), priority=0)
    assert await jobs.count_queue_messages("plain") == 1


async def test_declared_levels_bound_the_priorities(jobs: Any) -> None:
    await jobs.declare(QueueSpec("ranked", "priority", priority_levels=3))
    lowest, highest = jobs.traits.priorities
    for outside in (4, -1):
        named = "0 to 3" if lowest <= outside <= highest else f"{lowest} to {highest}"
        with pytest.raises(ValueError, match=named):
            await jobs.publish("ranked", a_job(), priority=outside)
    for inside in (0, 3):
        await jobs.publish("ranked", a_job(), priority=inside)
    assert await jobs.count_queue_messages("ranked") == 2


async def test_a_stack_hands_out_the_newest_first(jobs: Any, receive_all: ReceiveAll) -> None:
    if not jobs.traits.stack:
        await refused_as_a_stack(jobs)
        return
    await jobs.declare(QueueSpec("pile", "stack"))
    ids = await jobs.publish_many("pile", [a_job() for _ in range(5)])
    assert [job["id"] for job in await receive_all("pile")] == ids[::-1]


NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001 (naive on purpose)
BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "delay negative": {"delay": -0.1},
    "delay NaN": {"delay": math.nan},
    "delay infinite": {"delay": math.inf},
    "delay over 366 days": {"delay": 366 * 86400 + 1},
    "delay as text": {"delay": "1"},
    "delay as a bool": {"delay": True},
    "at naive": {"at": NAIVE},
    "at over 366 days ahead": {"at": datetime.now(UTC) + timedelta(days=367)},
    "at as text": {"at": "2030-01-01"},
    "at as a number": {"at": 1900000000},
    "delay and at": {"delay": 1, "at": datetime.now(UTC)},
    "priority too high": {"priority": 2**31},
    "priority too low": {"priority": -(2**31) - 1},
    "priority as text": {"priority": "1"},
    "priority as a fraction": {"priority": 1.5},
    "priority as a bool": {"priority": True},
    "timeout 0": {"timeout": 0},
    "timeout negative": {"timeout": -1},
    "timeout NaN": {"timeout": math.nan},
    "timeout as text": {"timeout": "1"},
    "timeout as a bool": {"timeout": True},
    "retry 0": {"retry": 0},
    "retry negative": {"retry": -1},
    "retry True": {"retry": True},
    "retry as text": {"retry": "3"},
    "retry as a fraction": {"retry": 1.5},
    "retry with exceptions": {"retry": RetryPolicy(retry_on=(OSError,))},
    "retry with exceptions left out": {"retry": RetryPolicy(no_retry_on=(OSError,))},
    "retry with a function": {"retry": RetryPolicy(delay=lambda *_: 1.0)},
    "headers of numbers": {"headers": {"trace": 1}},
    "headers under a number": {"headers": {1: "trace"}},
    "headers of no text": {"headers": {"trace": "\ud800"}},
}
BAD_IDS = ["", " a", "a b", "-a", ".a", "a" * 129, "a\n", "é", "a/b", "a{b}", 5, b"a"]


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in BAD_OPTIONS.items()])
async def test_an_option_out_of_its_range_is_a_value_error_and_stores_nothing(
    jobs: Any, options: Any, known: Known
) -> None:
    await jobs.declare(QueueSpec("ranked", "priority"))
    with pytest.raises(ValueError, match=r"delay|at=|priority|timeout|retry|max_attempts|[Hh]eaders"):
        await jobs.publish("ranked", a_job(), **options)
    with pytest.raises(ValueError, match=r"delay|at=|priority|timeout|retry|max_attempts|[Hh]eaders"):
        await jobs.publish_many("ranked", [a_job(), a_job()], **options)
    assert await jobs.depth("ranked") == known(0, 0, 0, 0)


@pytest.mark.parametrize("job_id", BAD_IDS, ids=repr)
async def test_a_job_id_that_is_none_is_a_value_error_and_stores_nothing(jobs: Any, job_id: Any, known: Known) -> None:
    await jobs.declare(QueueSpec("parcels"))
    with pytest.raises(ValueError, match="job id"):
        await jobs.publish("parcels", a_job(), job_id=job_id)
    assert await jobs.depth("parcels") == known(0, 0, 0, 0)


@pytest.mark.parametrize("job_id", ["a", "0", "A.b_c:d-9", "a" * 128])
async def test_a_job_is_stored_under_the_id_it_is_given(jobs: Any, job_id: str) -> None:
    await jobs.register(JobSchema("parcels", Parcel))
    assert await jobs.publish("parcels", {"weight": 1}, job_id=job_id) == job_id
    assert (await jobs.receive_message("parcels"))["id"] == job_id


async def test_priority_is_not_an_error_where_it_is_the_default(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job(), priority=None, delay=None, at=None, timeout=None, retry=None, headers=None)
    assert await jobs.count_queue_messages("parcels") == 1


# --- sizes


async def test_the_payload_limit_is_exact(open_jobs: Callable[..., Awaitable[Any]], known: Known) -> None:
    jobs = await open_jobs(payload_limit=100)
    await jobs.register(JobSchema("anything", Anything))
    fits = {"value": "x" * (100 - len('{"value":""}'))}
    await jobs.publish("anything", fits)
    with pytest.raises(PayloadTooLarge) as refused:
        await jobs.publish("anything", {"value": fits["value"] + "x"})
    assert (refused.value.what, refused.value.size, refused.value.limit) == ("input", 101, 100)
    assert (refused.value.outcome, refused.value.retryable) == ("not_done", False)
    assert (await jobs.receive_message("anything"))["input_data"] == fits
    assert await jobs.depth("anything") == known(0, 0, 0, 0)


async def test_a_payload_is_up_to_one_mebibyte_of_utf8(jobs: Any) -> None:
    await jobs.register(JobSchema("anything", Anything))
    text = "é" * ((2**20 - len('{"value":""}')) // 2)
    await jobs.publish("anything", {"value": text})
    with pytest.raises(PayloadTooLarge):
        await jobs.publish("anything", {"value": text + "é"})
    assert (await jobs.receive_message("anything"))["input_data"] == {"value": text}


@pytest.mark.parametrize("limit", [0, -1, 16 * 2**20 + 1])
async def test_a_payload_limit_out_of_its_range_is_a_config_error(
    open_jobs: Callable[..., Awaitable[Any]], limit: int
) -> None:
    with pytest.raises(ConfigError, match="payload_limit"):
        await open_jobs(payload_limit=limit)


async def test_headers_are_up_to_8_kib(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    fits = {"trace": "x" * (8 * 1024 - len('{"trace":""}'))}
    await jobs.publish("parcels", a_job(), headers=fits)
    with pytest.raises(PayloadTooLarge) as refused:
        await jobs.publish("parcels", a_job(), headers={"trace": fits["trace"] + "x"})
    assert (refused.value.what, refused.value.limit) == ("headers", 8 * 1024)
    assert (await jobs.receive_message("parcels"))["headers"] == fits


# --- what the backend has to have


async def test_a_required_trait_is_no_obstacle_where_it_is_there(open_jobs: Callable[..., Awaitable[Any]]) -> None:
    traits = (await open_jobs()).traits
    missing = [name for name in ("deduplicates", "stack") if not getattr(traits, name)]
    if missing:
        with pytest.raises(NotSupported) as refused:
            await open_jobs(require={"stack", "deduplicates"})
        assert (refused.value.feature, refused.value.backend) == (missing[0], traits.name)
        assert "require=" in refused.value.needs
    else:
        jobs = await open_jobs(require={"stack", "deduplicates"})
        await jobs.declare(QueueSpec("pile", "stack"))


async def test_a_required_trait_that_is_missing_is_said_when_it_is_opened(
    open_jobs: Callable[..., Awaitable[Any]],
) -> None:
    with pytest.raises(NotSupported) as refused:
        await open_jobs(require={"lookup", "stack"})
    assert refused.value.feature == "lookup"


async def test_a_trait_that_nobody_knows_is_a_config_error(open_jobs: Callable[..., Awaitable[Any]]) -> None:
    with pytest.raises(ConfigError, match="teleport"):
        await open_jobs(require={"teleport"})


# --- the id is the idempotency key


async def test_one_job_published_twice_is_one_job_and_the_first_body_stays(jobs: Any, receive_all: ReceiveAll) -> None:
    await jobs.register(JobSchema("parcels", Parcel))
    assert await jobs.publish("parcels", {"weight": 1}, job_id="once") == "once"
    assert await jobs.publish("parcels", {"weight": 2}, job_id="once") == "once"
    assert await jobs.publish("parcels", {"weight": 3}, job_id="once", delay=3600) == "once"
    stored = [{"weight": 1.0}] if jobs.traits.deduplicates else [{"weight": 1.0}, {"weight": 2.0}]
    assert [job["input_data"] for job in await receive_all("parcels")] == stored


async def test_a_different_body_under_a_known_id_is_logged(jobs: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "mindtrace.jobs")
    await jobs.register(JobSchema("anything", Anything))
    await jobs.publish("anything", {"value": 1}, job_id="known-id")
    assert "known-id" not in caplog.text
    await jobs.publish("anything", {"value": "a-secret"}, job_id="known-id")
    assert ("known-id" in caplog.text) is jobs.traits.deduplicates
    assert "a-secret" not in caplog.text


async def test_two_jobs_of_one_input_are_two(jobs: Any) -> None:
    schema = JobSchema("parcels", Parcel)
    await jobs.register(schema)
    first, second = [job_from_schema(schema, Parcel(weight=1)) for _ in range(2)]
    ids = [await jobs.publish("parcels", job) for job in (first, second, first)]
    assert ids == [first.id, second.id, first.id]
    assert await jobs.count_queue_messages("parcels") == (2 if jobs.traits.deduplicates else 3)


async def test_a_hundred_publishes_of_one_id_at_once_make_one_job(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    ids = await asyncio.gather(*(jobs.publish("parcels", a_job(), job_id="once") for _ in range(100)))
    assert set(ids) == {"once"}
    assert await jobs.count_queue_messages("parcels") == (1 if jobs.traits.deduplicates else 100)


async def _received(jobs: Any) -> None:
    await jobs.receive_message("parcels")


async def _done(jobs: Any) -> None:
    await jobs.consume(jobs.consumer("run", lambda _: None, "parcels"), 1)


async def _dead(jobs: Any) -> None:
    await jobs.consume(jobs.consumer("run", lambda _: 1 / 0, "parcels", retry=False), 1)


async def _cleaned(jobs: Any) -> None:
    await jobs.clean("parcels")


@pytest.mark.parametrize("ended", [_received, _done, _dead, _cleaned])
async def test_the_id_of_a_job_that_ended_is_still_known(jobs: Any, ended: Callable[[Any], Awaitable[None]]) -> None:
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job(), job_id="once")
    await ended(jobs)
    assert await jobs.publish("parcels", a_job(), job_id="once") == "once"
    assert await jobs.count_queue_messages("parcels") == (0 if jobs.traits.deduplicates else 1)


async def test_the_id_of_a_purged_job_is_free_again(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    await jobs.publish("parcels", a_job(), job_id="once")
    await _dead(jobs)
    await jobs.dead_letters("parcels").purge(["once"])
    await jobs.publish("parcels", a_job(), job_id="once")
    assert await jobs.count_queue_messages("parcels") == 1


async def test_an_id_is_known_in_its_own_queue_only(jobs: Any) -> None:
    for queue in ("one", "two"):
        await jobs.declare(QueueSpec(queue))
        await jobs.publish(queue, a_job(), job_id="same")
    assert [await jobs.count_queue_messages(queue) for queue in ("one", "two")] == [1, 1]


# --- many


async def test_many_are_published_in_their_order(jobs: Any, receive_all: ReceiveAll) -> None:
    await jobs.register(JobSchema("anything", Anything))
    ids = await jobs.publish_many("anything", ({"value": n} for n in range(1100)), headers={"of": "the batch"})
    assert await jobs.count_queue_messages("anything") == len(set(ids)) == 1100
    started: list[dict[str, Any]] = []
    assert await jobs.consume(jobs.consumer("run", started.append, "anything"), 1100) == 1100
    assert [job["id"] for job in started] == ids
    assert [job["input_data"]["value"] for job in started] == list(range(1100))
    assert {job["headers"]["of"] for job in started} == {"the batch"}


async def test_an_empty_batch_is_no_job(jobs: Any) -> None:
    await jobs.declare(QueueSpec("parcels"))
    assert await jobs.publish_many("parcels", []) == []


async def test_a_batch_may_mix_jobs_models_and_dicts_and_repeat_one(jobs: Any) -> None:
    schema = JobSchema("parcels", Parcel)
    await jobs.register(schema)
    job = job_from_schema(schema, {"weight": 1})
    ids = await jobs.publish_many("parcels", [job, Parcel(weight=2), {"weight": 3}, job])
    assert (ids[0], ids[3], len(set(ids))) == (job.id, job.id, 3)
    assert await jobs.count_queue_messages("parcels") == (3 if jobs.traits.deduplicates else 4)


async def test_one_bad_input_in_a_batch_and_nothing_is_sent(jobs: Any, known: Known) -> None:
    await jobs.register(JobSchema("parcels", Parcel))
    with pytest.raises(InputInvalid):
        await jobs.publish_many("parcels", [*({"weight": n} for n in range(600)), {"weight": "a lot"}])
    assert await jobs.depth("parcels") == known(0, 0, 0, 0)


async def test_a_batch_that_is_refused_in_part_says_what_is_stored_and_why_the_rest_is_not(jobs: Any) -> None:
    await jobs.declare(QueueSpec("ranked", "priority", priority_levels=3))
    below = -1 if jobs.traits.priorities[0] < 0 else 4  # where no queue has one below 0, that is said of the call
    batch = [a_job(priority=priority) for priority in (1, 9, 2, below)]
    with pytest.raises(PublishIncomplete) as raised:
        await jobs.publish_many("ranked", batch)
    assert raised.value.ids == [batch[0].id, batch[2].id]
    assert {index: (isinstance(e, ValueError), e.outcome) for index, e in raised.value.failures.items()} == {
        1: (True, "not_done"),
        3: (True, "not_done"),
    }
    assert (raised.value.outcome, raised.value.retryable) == ("unknown", True)
    assert await jobs.count_queue_messages("ranked") == 2


async def test_a_batch_that_is_refused_as_a_whole_for_one_reason_raises_it(jobs: Any) -> None:
    await jobs.declare(QueueSpec("ranked", "priority", priority_levels=3))
    await jobs.declare(QueueSpec("small", max_length=1))
    with pytest.raises(ValueError, match="0 to 3"):
        await jobs.publish_many("ranked", [a_job(priority=8), a_job(priority=9)])
    for _ in range(0 if jobs.traits.atomic_batch else 1):  # else the first of the batch is stored
        await jobs.publish("small", a_job())
    before = await jobs.count_queue_messages("small")
    with pytest.raises(QueueFull):
        await jobs.publish_many("small", [a_job(), a_job()])
    assert await jobs.count_queue_messages("small") == before


async def test_of_a_long_batch_the_part_before_the_queue_was_full_is_stored(jobs: Any) -> None:
    await jobs.declare(QueueSpec("small", max_length=700))
    batch = [a_job() for _ in range(1000)]
    with pytest.raises(PublishIncomplete) as raised:
        await jobs.publish_many("small", batch)
    stored = 500 if jobs.traits.atomic_batch else 700
    assert raised.value.ids == [job.id for job in batch[:stored]]
    assert set(raised.value.failures) == set(range(stored, 1000))
    assert all(isinstance(error, QueueFull) for error in raised.value.failures.values())
    assert await jobs.count_queue_messages("small") == stored


async def test_a_full_queue_refuses_and_takes_again_once_there_is_room(jobs: Any, known: Known) -> None:
    await jobs.declare(QueueSpec("small", max_length=2))
    await jobs.publish("small", a_job(id="first"))
    await jobs.publish("small", a_job(), delay=3600)
    uncounted = 0 if jobs.traits.exact_depth else 1  # scheduled jobs take up room where they can be counted
    await jobs.publish_many("small", [a_job() for _ in range(uncounted)])
    with pytest.raises(QueueFull) as refused:
        await jobs.publish("small", a_job())
    assert (refused.value.queue, refused.value.limit) == ("small", 2)
    assert (refused.value.outcome, refused.value.retryable) == ("not_done", True)
    if jobs.traits.deduplicates:  # known: nothing to store, so no lack of room
        assert await jobs.publish("small", a_job(id="first")) == "first"
    else:
        with pytest.raises(QueueFull):
            await jobs.publish("small", a_job(id="first"))
    await jobs.receive_message("small")
    await jobs.publish("small", a_job())
    assert await jobs.depth("small") == known(1 + uncounted, 1, 0, 0)


async def test_every_refusal_is_one_of_the_librarys_own_errors(jobs: Any) -> None:
    await jobs.register(JobSchema("parcels", Parcel))
    for publish in (
        jobs.publish("parcels", {"weight": "x"}),
        jobs.publish("parcels", {"weight": 1}, delay=-1),
        jobs.publish("parcels", {"weight": 1}, priority=1),
        jobs.publish("nowhere", a_job()),
    ):
        with pytest.raises(JobsError):
            await publish
