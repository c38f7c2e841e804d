"""`Job` and `JobSchema`: what can be asked for, in which words, and that a refusal does not quote the input."""

import json
import logging
import math
import re
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal
from uuid import RFC_4122, UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, RootModel, ValidationError, computed_field

from mindtrace.jobs import ConfigError, ExecutionStatus, InputInvalid, Job, JobSchema, RetryPolicy, job_from_schema
from mindtrace.jobs.job import (
    checked_job_id,
    checked_priority,
    checked_queue_name,
    checked_timeout,
    new_job_id,
    parsed,
)
from mindtrace.jobs.wire import Envelope, decode, encode

often = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

SECRET = "hunter2"  # noqa: S105 (what no text of ours may quote)
QUEUE_NAME = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
JOB_ID = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")
RESERVED = re.compile(r"\Aamq\.|\.(dead|hold|bell)\Z")
NAMES = st.text() | st.text("aZ09._:-/ {}\n", max_size=140) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,140}")


class Take(BaseModel):
    a: int
    b: str = "x"


class Give(BaseModel):
    c: float


ORDERS = JobSchema("orders", Take, Give)


def everything_said(error: BaseException) -> str:
    """What a log would show of it, and its attributes."""
    return "".join(traceback.format_exception(error)) + str(error) + repr(error) + repr(vars(error))


def sent(schema: JobSchema[Any, Any], data: Any) -> dict[str, Any]:
    """The input as a worker reads it: made into a job, encoded, decoded."""
    job = job_from_schema(schema, data)
    envelope = decode(encode(Envelope(job.id, job.name, job.schema_name, job.input_data, 0)))
    assert isinstance(envelope, Envelope)
    return envelope.input_data


# --- names


@often
@given(NAMES)
@example("a" * 128)
@example("a" * 129)
@example("a\n")
@example("amq.x")
@example("AMQ.x")
@example("amq")
@example("a.dead")
@example("a.hold")
@example("a.bell")
@example("a.dead.b")
@example("a:b")
@example("a{b}")
@example("\u0661")  # a digit, of another script
@example("")
def test_a_queue_name_is_accepted_if_and_only_if_it_follows_the_grammar(name: str) -> None:
    if QUEUE_NAME.match(name) and not RESERVED.search(name):
        assert checked_queue_name(name) == name
        assert JobSchema(name, Take).queue == name
    else:
        for refuse in (
            checked_queue_name,
            lambda text: JobSchema(text, Take),
            lambda text: JobSchema("a", Take, queue=text),
        ):
            with pytest.raises(ConfigError) as refused:
                refuse(name)
            assert repr(name) in str(refused.value)


@often
@given(NAMES)
@example("a:b")
@example("a" * 128)
@example("a" * 129)
@example("a\n")
@example("amq.x.dead")
def test_a_job_id_is_accepted_if_and_only_if_it_follows_the_grammar(job_id: str) -> None:
    if JOB_ID.match(job_id):
        assert checked_job_id(job_id) == job_id
        assert Job(id=job_id, name="n", schema_name="n").id == job_id
        assert job_from_schema(ORDERS, {"a": 1}, job_id=job_id).id == job_id
    else:
        with pytest.raises(ConfigError) as refused:
            job_from_schema(ORDERS, {"a": 1}, job_id=job_id)
        assert repr(job_id) in str(refused.value)
        with pytest.raises(ValueError, match="no job id"):
            Job(id=job_id, name="n", schema_name="n")


@pytest.mark.parametrize("name", [None, 7, b"orders", ["orders"], True])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError):
        checked_queue_name(name)
    with pytest.raises(ConfigError):
        checked_job_id(name)
    with pytest.raises(ConfigError):
        JobSchema(name, Take)


# --- ids of our own


def test_a_new_id_is_a_uuid_of_version_7() -> None:
    before = time.time_ns() // 1_000_000
    job_id = new_job_id()
    after = time.time_ns() // 1_000_000
    uuid = UUID(job_id)
    assert (str(uuid), uuid.version, uuid.variant) == (job_id, 7, RFC_4122)
    assert before <= uuid.int >> 80 <= after
    assert checked_job_id(job_id) == job_id


def test_ids_sort_by_age() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_job_id())
        made = time.time_ns() // 1_000_000
        while time.time_ns() // 1_000_000 <= made:
            pass
    assert sorted(ids) == ids


def test_no_two_ids_are_the_same_and_each_of_74_bits_is_random() -> None:
    ids = [UUID(new_job_id()).int for _ in range(5_000)]
    assert len(set(ids)) == len(ids)
    random = [bit for bit in range(76) if bit not in (62, 63)]  # these two are the variant; above 76 version and time
    assert [bit for bit in random if len({job_id >> bit & 1 for job_id in ids}) != 2] == []


# --- a job


def test_a_job_is_named_dated_and_plain_unless_it_says_otherwise() -> None:
    before = datetime.now(UTC)
    one, other = (Job(name="orders", schema_name="orders") for _ in range(2))
    assert before <= one.created_at <= datetime.now(UTC)
    assert (one.input_data, one.priority, one.headers) == ({}, None, {})
    assert one.id != other.id
    assert UUID(one.id).version == 7


@pytest.mark.parametrize("field", sorted(Job.model_fields))
def test_a_job_does_not_change(field: str) -> None:
    job = job_from_schema(ORDERS, {"a": 1})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(job, field, getattr(job, field))


def test_a_field_a_job_does_not_have_is_refused() -> None:
    with pytest.raises(ValidationError, match="queue"):
        Job(name="a", schema_name="a", queue="q")  # type: ignore[call-arg]


def test_a_naive_date_is_no_instant() -> None:
    with pytest.raises(ValueError, match=r"created_at=.*aware"):
        Job(name="a", schema_name="a", created_at=datetime(2026, 1, 1))  # noqa: DTZ001 (naive is the point)


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=5))])
def test_an_aware_date_is_an_instant_in_any_zone(zone: timezone) -> None:
    when = datetime(2026, 1, 1, tzinfo=zone)
    assert Job(name="a", schema_name="a", created_at=when).created_at == when


@pytest.mark.parametrize("headers", [{"a": 1}, {"a": None}, {1: "a"}, {"a": ["b"]}])
def test_headers_are_text_to_text(headers: Any) -> None:
    with pytest.raises(ValueError, match="headers"):
        Job(name="a", schema_name="a", headers=headers)
    with pytest.raises(ValueError, match="headers"):
        job_from_schema(ORDERS, {"a": 1}, headers=headers)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", date(2026, 1, 1), (1,)])
def test_the_input_of_a_job_is_json(value: Any) -> None:
    with pytest.raises(ValidationError):
        Job(name="a", schema_name="a", input_data={"a": value})


# --- a schema


def test_an_instance_stands_for_its_class() -> None:
    schema = JobSchema(name="orders", input=Take(a=1), output=Give(c=2.0))
    assert (schema.input, schema.output) == (Take, Give)
    assert schema.same_as(ORDERS)


def test_a_schema_says_nothing_that_it_was_not_told() -> None:
    schema = JobSchema("orders", Take)
    assert (schema.name, schema.queue, schema.output) == ("orders", "orders", None)
    assert (schema.retry, schema.timeout, schema.priority, schema.validate_output) == (None, None, None, "error")


def test_a_schema_keeps_its_options() -> None:
    schema = JobSchema("orders", Take, queue="q", retry=7, timeout=2.5, priority=-4, validate_output="warn")
    assert (schema.queue, schema.retry, schema.timeout) == ("q", RetryPolicy(max_attempts=7), 2.5)
    assert (schema.priority, schema.validate_output) == (-4, "warn")


@pytest.mark.parametrize(
    ("retry", "policy"),
    [
        (False, RetryPolicy(max_attempts=1)),
        (4, RetryPolicy(max_attempts=4)),
        (RetryPolicy(base=3), RetryPolicy(base=3)),
    ],
)
def test_retry_may_be_said_in_short(retry: Any, policy: RetryPolicy) -> None:
    assert JobSchema("orders", Take, retry=retry).retry == policy


@pytest.mark.parametrize("which", ["input", "output"])
@pytest.mark.parametrize("model", [int, 7, "Take", {"a": 1}, list[int], BaseModel, object()], ids=repr)
def test_what_is_no_model_is_refused_by_name(which: str, model: Any) -> None:
    with pytest.raises(ConfigError, match=f"{which}="):
        JobSchema("orders", **{"input": Take, which: model})


def test_a_schema_needs_an_input() -> None:
    nothing: Any = None
    with pytest.raises(ConfigError, match="input="):
        JobSchema("orders", nothing)


def test_a_model_whose_input_is_no_object_is_refused_as_any_other() -> None:
    """The input of a job is an object."""
    with pytest.raises((ConfigError, InputInvalid)) as refused:
        job_from_schema(JobSchema("orders", RootModel[list[str]]), RootModel[list[str]]([SECRET]))
    assert SECRET not in everything_said(refused.value)


HUGE = 10**400  # an integer that no float can hold


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("timeout", value) for value in [0, 0.0, -1, math.nan, -math.inf, "5", True, HUGE, -HUGE, 1j, [1]]),
        *(("priority", value) for value in [2**31, -(2**31) - 1, 1.0, "1", True, math.inf, HUGE]),
        *(("validate_output", value) for value in ["off", "", None, True, ["warn"]]),
        *(("retry", value) for value in [True, "3", 2.5, ()]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_an_option_out_of_its_range_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option}=") as refused:
        JobSchema("orders", Take, **{option: value})
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize("timeout", [1e-9, 1, 300.0, 1e300, math.inf])
def test_a_timeout_is_any_time_above_nothing(timeout: float) -> None:
    assert checked_timeout(timeout) == timeout
    assert JobSchema("orders", Take, timeout=timeout).timeout == timeout


@often
@given(st.integers() | st.sampled_from([2**31 - 1, 2**31, -(2**31), -(2**31) - 1]))
def test_a_priority_is_any_integer_of_32_bits(priority: int) -> None:
    if -(2**31) <= priority <= 2**31 - 1:
        assert checked_priority(priority) == priority
        assert job_from_schema(ORDERS, {"a": 1}, priority=priority).priority == priority
    else:
        with pytest.raises(ConfigError, match=f"{priority}: from {-(2**31)} to {2**31 - 1}"):
            job_from_schema(ORDERS, {"a": 1}, priority=priority)


@pytest.mark.parametrize("priority", [0, 1, 254, 255])
def test_a_backend_may_take_fewer_priorities(priority: int) -> None:
    assert checked_priority(priority, 0, 255) == priority


@pytest.mark.parametrize("priority", [-1, 256])
def test_a_priority_outside_a_range_is_a_value_error_that_names_it(priority: int) -> None:
    with pytest.raises(ValueError, match=f"priority={priority}: from 0 to 255"):
        checked_priority(priority, 0, 255)


@pytest.mark.parametrize("priority", [1.0, "1", True, None, math.nan])
def test_a_priority_is_a_whole_number(priority: Any) -> None:
    with pytest.raises(ValueError, match="whole number from 0 to 255"):
        checked_priority(priority, 0, 255)


# --- the same schema


def anew(**fields: Any) -> type[BaseModel]:
    """The model `Take`, as another class object that says the same, or with other fields."""
    return type("Take", (BaseModel,), {"__annotations__": {"a": int, "b": str, **fields}, "b": "x"})


def test_schemas_are_the_same_if_they_say_the_same() -> None:
    assert JobSchema("s", anew()).same_as(JobSchema("s", anew()))
    assert JobSchema("s", Take, Give, retry=3).same_as(
        JobSchema("s", Take(a=1), Give(c=1), queue="s", retry=RetryPolicy())
    )


@pytest.mark.parametrize(
    "other",
    [
        JobSchema("other", Take, Give, queue="s"),
        JobSchema("s", anew(d=int), Give),
        JobSchema("s", anew(a=float), Give),
        JobSchema("s", Take),
        JobSchema("s", Take, Take),
        JobSchema("s", Take, Give, queue="q"),
        JobSchema("s", Take, Give, retry=3),
        JobSchema("s", Take, Give, timeout=3),
        JobSchema("s", Take, Give, priority=0),
        JobSchema("s", Take, Give, validate_output="warn"),
    ],
    ids=["name", "field", "type", "no output", "output", "queue", "retry", "timeout", "priority", "validate_output"],
)
def test_schemas_differ_if_anything_does(other: JobSchema[Any, Any]) -> None:
    schema = JobSchema("s", Take, Give)
    assert not schema.same_as(other)
    assert not other.same_as(schema)


def test_a_schema_shows_what_it_takes_and_gives() -> None:
    assert repr(ORDERS) == "JobSchema('orders', Take, Give)"
    assert repr(JobSchema("orders", Take)) == "JobSchema('orders', Take)"


# --- an input as JSON


def test_a_job_is_named_after_its_schema() -> None:
    job = job_from_schema(ORDERS, Take(a=1), headers={"k": "v"})
    assert (job.name, job.schema_name, job.priority, job.headers) == ("orders", "orders", None, {"k": "v"})
    assert job.input_data == {"a": 1, "b": "x"}
    assert job.id != job_from_schema(ORDERS, Take(a=1)).id


@pytest.mark.parametrize(
    "data",
    [Take(a=1), {"a": 1}, {"a": "1"}, {"a": 1.0, "b": "x"}, MappingProxyType({"a": 1})],
    ids=["model", "mapping", "text", "float", "read-only"],
)
def test_a_model_or_a_mapping_becomes_the_whole_input(data: Any) -> None:
    assert sent(ORDERS, data) == {"a": 1, "b": "x"}


@pytest.mark.parametrize("data", [None, 7, "a", [("a", 1)], {"b": "x"}, {"a": None}, {"a": "one"}, {"a": 1.5}, {}])
def test_an_input_that_does_not_fit_is_invalid(data: Any) -> None:
    with pytest.raises(InputInvalid) as refused:
        job_from_schema(ORDERS, data)
    assert refused.value.schema == "orders"
    assert refused.value.errors


class Colour(Enum):
    RED = "red"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    when: date
    pair: tuple[int, str]
    colour: Colour
    raw: bytes
    some: frozenset[int]
    lasts: timedelta


STRICT: dict[str, Any] = {
    "when": date(2026, 2, 3),
    "pair": (1, "b"),
    "colour": Colour.RED,
    "raw": b"r",
    "some": frozenset({1}),
    "lasts": timedelta(seconds=90),
}
STRICT_JSON = {"when": "2026-02-03", "pair": [1, "b"], "colour": "red", "raw": "r", "some": [1], "lasts": "PT1M30S"}


@pytest.mark.parametrize(
    "data",
    [
        Strict(**STRICT),
        STRICT,
        STRICT_JSON,
        {**STRICT_JSON, "when": date(2026, 2, 3), "pair": (1, "b")},
        MappingProxyType(STRICT),
        MappingProxyType(STRICT_JSON),
    ],
    ids=["model", "python", "json", "mixed", "python, read-only", "json, read-only"],
)
def test_a_strict_model_takes_what_json_can_only_write_as_text_or_list(data: Any) -> None:
    schema = JobSchema("strict", Strict)
    assert sent(schema, data) == STRICT_JSON
    assert parsed(Strict, sent(schema, data)) == Strict(**STRICT)


@pytest.mark.parametrize("data", [{**STRICT_JSON, "pair": ["1", "b"]}, {**STRICT_JSON, "when": 7}])
def test_a_strict_model_stays_strict(data: Any) -> None:
    with pytest.raises(InputInvalid):
        sent(JobSchema("strict", Strict), data)


class Aliased(BaseModel):
    number: int = Field(alias="no")


class OneWay(BaseModel):
    number: int = Field(validation_alias="no")


class Choices(BaseModel):
    number: int = Field(validation_alias=AliasChoices("no", "num"))


class TwoWays(BaseModel):
    number: int = Field(alias="no", serialization_alias="nr")


class Populated(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    number: int = Field(alias="no")


class Excluded(BaseModel):
    no: int = Field(exclude=True)

    @property
    def number(self) -> int:
        return self.no


@pytest.mark.parametrize("model", [Aliased, OneWay, Choices, TwoWays, Populated, Excluded])
@pytest.mark.parametrize("as_model", [True, False], ids=["model", "mapping"])
def test_what_a_schema_accepts_its_worker_can_read(model: type[Any], as_model: bool) -> None:
    """Said at publish, or else fit to be run: never accepted here and refused there."""
    schema = JobSchema("aliased", model)
    try:
        data = sent(schema, model(no=5) if as_model else {"no": 5})
    except InputInvalid:
        assert model in (OneWay, Choices, TwoWays, Excluded)  # what a model writes, and could not read again
        return
    assert parsed(model, data).number == 5


@pytest.mark.parametrize("model", [Aliased, Populated])
@pytest.mark.parametrize("as_model", [True, False], ids=["model", "mapping"])
def test_an_alias_is_what_travels(model: type[Any], as_model: bool) -> None:
    assert sent(JobSchema("aliased", model), model(no=5) if as_model else {"no": 5}) == {"no": 5}


class Computed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int

    @computed_field
    def double(self) -> int:
        return 2 * self.a


@pytest.mark.parametrize("data", [Computed(a=2), {"a": 2}], ids=["model", "mapping"])
def test_a_computed_field_is_no_input(data: Any) -> None:
    assert sent(JobSchema("computed", Computed), data) == {"a": 2}


def test_a_model_that_was_never_validated_is_checked() -> None:
    """And without a warning that would quote it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(InputInvalid) as refused:
            job_from_schema(ORDERS, Take.model_construct(a=SECRET))
    assert SECRET not in str(refused.value)
    assert [str(warning.message) for warning in said] == []


def test_another_model_is_taken_for_what_it_holds() -> None:
    class Other(BaseModel):
        a: str

    assert sent(ORDERS, Other(a="5")) == {"a": "5"}
    with pytest.raises(InputInvalid):
        sent(ORDERS, Other(a="five"))


class Anything(BaseModel):
    a: Any = None


ANYTHING = JobSchema("anything", Anything)


class Number(BaseModel):
    a: float | None = None


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


NO_JSON: list[tuple[str, Callable[[], Any]]] = [
    ("an object", object),
    ("a lone surrogate", lambda: f"{SECRET}\ud800"),
    ("bytes that are no text", lambda: b"\xff" + SECRET.encode()),
    ("NaN", lambda: math.nan),
    ("an infinity", lambda: -math.inf),
    ("NaN in a list", lambda: [{"a": [math.nan]}]),
    ("65 levels", lambda: deep(64)),
    ("300 levels", lambda: deep(300)),
    ("2,000 levels", lambda: deep(2000)),
    ("4,301 digits", lambda: 10**4300),
    ("a set of objects", lambda: {object()}),
]


@pytest.mark.parametrize("value", [value for _, value in NO_JSON], ids=[name for name, _ in NO_JSON])
@pytest.mark.parametrize("as_model", [True, False], ids=["model", "mapping"])
def test_an_input_that_json_cannot_carry_is_invalid_and_never_sent_as_something_else(
    value: Callable[[], Any], as_model: bool
) -> None:
    with pytest.raises(InputInvalid) as refused:
        sent(ANYTHING, Anything(a=value()) if as_model else {"a": value()})
    assert SECRET not in everything_said(refused.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("as_model", [True, False], ids=["model", "mapping"])
def test_a_number_that_is_not_finite_is_invalid_where_none_would_fit(value: float, as_model: bool) -> None:
    with pytest.raises(InputInvalid):
        sent(JobSchema("number", Number), Number(a=value) if as_model else {"a": value})


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=15,
)


@often
@given(VALUES)
def test_an_input_of_any_json_is_sent_as_it_is(value: Any) -> None:
    for data in (Anything(a=value), {"a": value}):
        assert json.dumps(sent(ANYTHING, data)) == json.dumps({"a": value})


def test_a_job_shares_nothing_with_its_publisher() -> None:
    data = {"a": [1]}
    jobs = [job_from_schema(ANYTHING, data), job_from_schema(ANYTHING, Anything(a=data["a"]))]
    data["a"].append(2)
    assert [job.input_data for job in jobs] == [{"a": [1]}] * 2


# --- what a refusal says


class Payment(BaseModel):
    model_config = ConfigDict(extra="forbid")
    amount: int
    currency: Literal["EUR", "USD"] = "EUR"
    when: date = date(2026, 1, 1)
    tags: list[int] = []


@pytest.mark.parametrize(
    ("data", "place", "kind"),
    [
        ({"amount": SECRET}, ("amount",), "int_parsing"),
        ({"amount": [SECRET]}, ("amount",), "int_type"),
        ({"amount": 1, "currency": SECRET}, ("currency",), "literal_error"),
        ({"amount": 1, "when": SECRET}, ("when",), "date_from_datetime_parsing"),
        ({"amount": 1, "tags": [1, SECRET]}, ("tags", 1), "int_parsing"),
        ({"amount": 1, "surplus": SECRET}, ("surplus",), "extra_forbidden"),
        ({"currency": "EUR"}, ("amount",), "missing"),
        (SECRET, (), "model_type"),
    ],
)
def test_a_refusal_names_the_field_and_not_its_value(data: Any, place: tuple[Any, ...], kind: str) -> None:
    with pytest.raises(InputInvalid) as refused:
        job_from_schema(JobSchema("payments", Payment), data)
    [error] = refused.value.errors
    assert (error["loc"], error["type"]) == (place, kind)
    assert set(error) == {"type", "loc", "msg"}
    assert ".".join(str(part) for part in place) in str(refused.value)
    assert SECRET not in str(refused.value) + repr(refused.value) + repr(vars(refused.value))


@pytest.mark.parametrize(
    "data", [{"amount": SECRET}, Payment.model_construct(amount=[SECRET])], ids=["mapping", "model"]
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_refusal_that_is_logged_with_its_traceback_does_not_show_the_value(
    data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """`__cause__` included: a log prints it."""
    try:
        job_from_schema(JobSchema("payments", Payment), data)
    except InputInvalid:
        logging.getLogger("an application").exception("not published")
    assert "InputInvalid" in caplog.text
    assert SECRET not in caplog.text


def test_the_states_a_caller_sees_are_words() -> None:
    assert [str(status) for status in ExecutionStatus] == ["queued", "running", "completed", "failed", "cancelled"]
