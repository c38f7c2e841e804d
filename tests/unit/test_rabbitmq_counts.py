"""The headers beside a job on RabbitMQ: read back as written, and of what others write nothing is believed."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pamqp import commands
from pamqp.frame import marshal
from pamqp.header import ContentHeader

from mindtrace.jobs import RunError
from mindtrace.jobs.backends.rabbitmq.counts import (
    NEW,
    Counts,
    counts_of,
    death_of,
    due_of,
    errors_of,
    headers_of,
    id_of,
)
from mindtrace.jobs.delivery import DeadReason, with_error
from mindtrace.jobs.job import is_job_id

often = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

FRAME = 131_072  # bytes of a frame, unless a server is told otherwise
NUMBERS = st.integers(0, 10**9 - 2)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
WHEN = st.none() | st.integers(0, 2**40).map(lambda us: datetime(2020, 1, 1, tzinfo=UTC) + timedelta(microseconds=us))
ERRORS = st.builds(RunError, TEXT, TEXT, TEXT, WHEN, WHEN, TEXT)
VALUES: list[Any] = [
    None, True, 0, -1, 2**63 - 1, 1.5, float("inf"), Decimal("1.5"), "", "x", "é", b"x", bytearray(b"1 0 0 1 0 -1"),
    datetime(2020, 1, 1, tzinfo=UTC), [], ["1 0 0 1 0 -1"], {}, {"mtj-id": "an-id"}, [[[]]],
]  # fmt: skip


def died(ms: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)


# --- when it is due


@often
@given(st.floats(0, 2**33))
def test_when_a_job_is_due_is_read_back_to_the_microsecond(due: float) -> None:
    found = due_of(headers_of("an-id", NEW, due=due))
    assert found is not None
    assert abs(found - due) < 2e-6


@pytest.mark.parametrize("value", [*VALUES, "-1", "1" * 18, "1.5", "\u0661"])
def test_of_what_is_no_time_of_ours_nothing_is_due(value: Any) -> None:
    assert due_of({"mtj-due": value}) is None
    assert due_of({}) is due_of(None) is None


# --- the numbers


@often
@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.none() | st.integers(1, 10**9 - 1))
def test_numbers_are_read_back_as_they_were_written(
    attempts: int, crashes: int, releases: int, number: int, replays: int, limit: int | None
) -> None:
    counts = Counts(max(attempts, crashes), crashes, releases, number, replays, limit)
    assert counts_of(headers_of("an-id", counts)) == counts


def test_a_job_that_nothing_happened_to_carries_no_numbers() -> None:
    assert headers_of("an-id", NEW) == {"mtj-id": "an-id"}
    assert counts_of({"mtj-id": "an-id"}) == counts_of({}) == counts_of(None) == NEW


def test_each_event_counts_what_it_is() -> None:
    start = Counts(3, 1, 2, 6, 4, 7)
    assert start.started() == Counts(4, 1, 2, 7, 4, 7)
    assert start.crashed() == Counts(4, 2, 2, 7, 4, 7)
    assert start.started().released() == Counts(3, 1, 3, 7, 4, 7)
    assert start.replayed() == Counts(0, 0, 0, 6, 5, 7)


BROKEN = [
    "1",
    "1 2 3",
    "1 0 0 1 0",
    "1 0 0 1 0 -2",
    "1 0 0 1 0 -1 ",
    " 1 0 0 1 0 -1",
    "-1 0 0 1 0 -1",
    "1 0 0 1 0 -1\n",
]
BROKEN += ["1234567890 0 0 1 0 -1", "1.0 0 0 1 0 -1", "a b c d e f", "1,0,0,1,0,-1", "9" * 100_000]


@pytest.mark.parametrize("value", [*VALUES, *BROKEN], ids=lambda value: f"{value!r:.30}")
def test_numbers_that_are_none_count_as_nothing(value: Any) -> None:
    assert counts_of({"mtj-counts": value}) == NEW


def test_more_crashes_than_attempts_are_not_believed() -> None:
    assert counts_of({"mtj-counts": "2 5 0 2 0 -1"}) == Counts(2, 2, 0, 2)


# --- the id


@pytest.mark.parametrize(
    "value", [*VALUES, "-a", "a b", "a\n", "a" * 129, "\ud800"], ids=lambda value: f"{value!r:.30}"
)
def test_an_id_that_is_none_is_made_of_the_body_and_stays_the_same(value: Any) -> None:
    if value == "x":
        value = "not one"
    body = b"a body"
    properties = [commands.Basic.Properties(headers={"mtj-id": value})]
    if type(value) is str:
        properties.append(commands.Basic.Properties(message_id=value))
    for one in properties:
        made = id_of(one, body)
        assert made == id_of(commands.Basic.Properties(), body)
        assert is_job_id(made)
        assert made != id_of(one, b"another")


def test_the_header_counts_before_the_property_of_the_broker() -> None:
    both = commands.Basic.Properties(headers={"mtj-id": "ours"}, message_id="theirs")
    broken = commands.Basic.Properties(headers={"mtj-id": 7}, message_id="theirs")
    assert [id_of(properties, b"") for properties in (both, broken)] == ["ours", "theirs"]


# --- the death


@often
@given(st.integers(0, 10**14 - 1), st.sampled_from(get_args(DeadReason)))
def test_a_death_is_read_back_as_it_was_written(ms: int, reason: DeadReason) -> None:
    assert death_of(headers_of("an-id", NEW, died=(died(ms), reason))) == (died(ms), reason)


@pytest.mark.parametrize(
    "value",
    [*VALUES, "attempts", "1", "1 ", "1 nonsense", "-1 attempts", "x attempts", "9" * 18 + " attempts", "1  attempts"],
    ids=lambda value: f"{value!r:.30}",
)
def test_a_death_that_is_none_is_not_believed(value: Any) -> None:
    assert death_of({"mtj-died": value}) is None


# --- the errors


@often
@given(st.lists(ERRORS, max_size=10))
def test_errors_are_read_back_as_they_were_written(errors: list[RunError]) -> None:
    kept: tuple[RunError, ...] = ()
    for error in errors:
        kept = with_error(kept, error)
    assert errors_of(headers_of("an-id", NEW, kept)) == kept


def frame_of(headers: dict[str, Any]) -> int:
    """Bytes of the frame that carries them, with all else that we send and the longest id."""
    properties = commands.Basic.Properties(
        content_type="application/json", headers=headers, delivery_mode=2, priority=255, message_id="x" * 40
    )
    return len(marshal(ContentHeader(0, 2**30, properties), 65535))


# Four texts of an error: type, message, traceback, worker. Each as what is repeated, and how often.
LENGTHS = st.tuples(*[st.tuples(TEXT, st.sampled_from([1, 1000, 100_000])) for _ in range(4)])
Lengths = tuple[tuple[str, int], ...]


@settings(often, max_examples=20)
@given(st.lists(LENGTHS, min_size=1, max_size=12), WHEN)
@example([(("T", 200_000), ("m", 1), ("t", 1), ("w", 1))], None)
@example([(("T", 1), ("m", 200_000), ("t", 1), ("w", 1))], None)
@example([(("T", 1), ("m", 1), ("t", 200_000), ("w", 1))], None)
@example([(("T", 1), ("m", 1), ("t", 1), ("w", 200_000))], None)
@example([(("T", 500), ("\0", 4096), ("\0", 16_384), ("w", 1))], None)
@example([(("T", 500), ("\0", 200), ("", 1), ("w", 500))] * 10, None)
def test_whatever_the_errors_are_they_fit_into_a_frame_and_the_newest_is_there(
    lengths: list[Lengths], when: datetime | None
) -> None:
    errors: list[RunError] = []
    for one in lengths:
        kind, message, traceback, worker = (text * times for text, times in one)
        errors.append(RunError(kind, message, traceback, when, when, worker))
    headers = headers_of("i" * 128, Counts(*[10**9 - 1] * 6), tuple(errors), (died(10**14 - 1), "output_invalid"))
    size = frame_of(headers)
    assert size <= FRAME
    [*_, newest] = errors_of(headers)
    begins = [errors[-1].type.startswith(newest.type.removesuffix("…"))]
    begins.append(errors[-1].message.startswith(newest.message.removesuffix("…")))
    assert begins == [True, True]
    assert newest.ended_at == when


def test_the_newest_errors_are_kept_where_there_is_no_room_for_all() -> None:
    errors = tuple(RunError(f"E{number}", "m" * 1000) for number in range(10))
    kept = errors_of(headers_of("an-id", NEW, errors, room=3500))
    assert [error.type for error in kept] == ["E7", "E8", "E9"]
    [one] = errors_of(headers_of("an-id", NEW, errors, room=500))
    assert one.type == "E9"
    assert len(one.message) == 200


HOSTILE = [
    "[", "{}", "null", "1", '"x"', "[1, null, []]", "[" * 60_000, "NaN", "[NaN]", '[{"started_at": NaN}]', "[{}]",
    '[{"started_at": 1e999, "ended_at": "x"}]', '[{"started_at": 99999999999999}]', '[{"type": {"a": [1]}}]',
    '[{"type": "\\ud800", "message": "\\udfff", "traceback": "\\ud83d", "worker": "\\udc80"}]',
    '[{"message": "\\u0000"}]', '[{"type": %s}]' % ("9" * 5000), json.dumps([{"type": "x" * 120_000}]),
    json.dumps([{"worker": "x" * 120_000}]), json.dumps([{"type": "x"}] * 8000), '[{"started_at": true}]',
]  # fmt: skip


@pytest.mark.parametrize("value", [*VALUES, *HOSTILE], ids=lambda value: f"{value!r:.30}")
def test_errors_of_somebody_else_can_always_be_carried_on(value: Any) -> None:
    errors = errors_of({"mtj-errors": value})
    assert len(errors) <= 10
    headers = headers_of("an-id", NEW, with_error(errors, RunError("KeyError", "last")))
    assert frame_of(headers) <= FRAME
    assert errors_of(headers)[-1] == RunError("KeyError", "last")
    assert frame_of(headers_of("an-id", NEW, errors)) <= FRAME
