"""The envelope: what goes in comes out, what JSON readers do not agree on goes neither way, nothing quotes a job."""

import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import ConfigError, InputInvalid, JobsError, PayloadTooLarge, RetryPolicy
from mindtrace.jobs.errors import Refused
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import (
    DEPTH_LIMIT,
    ENVELOPE_EXTRA,
    HEADERS_LIMIT,
    PAYLOAD_LIMIT,
    PAYLOAD_LIMIT_MOST,
    Envelope,
    Message,
    decode,
    encode,
    instant,
    job_dict,
)

often = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

SECRET = "hunter2"  # noqa: S105 (what no text of ours may quote)
WIDEST = 10**4299 - 1  # the widest integer that travels: one digit below what Python reads from text
UTF8 = st.characters(exclude_categories=["Cs"])
TEXT = st.text(UTF8)
NUMBERS = st.integers() | st.integers(-WIDEST, WIDEST) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)
INPUTS = st.dictionaries(TEXT, VALUES, max_size=6)
JOB_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", fullmatch=True)
POLICIES = st.builds(
    RetryPolicy, max_attempts=st.integers(1, 99), base=st.floats(0, 9), jitter=st.sampled_from(["full", "none"])
)
ENVELOPES = st.builds(
    Envelope,
    JOB_IDS,
    TEXT,
    TEXT,
    INPUTS,
    st.integers(0, 2**50),
    st.none() | st.integers(0, 2**50),
    priority=st.integers(-(2**31), 2**31 - 1),
    headers=st.dictionaries(TEXT, TEXT, max_size=3),
    timeout=st.none() | st.just(math.inf) | st.floats(1e-9, 1e9) | st.integers(1, 10**6),
    retry=st.none() | POLICIES,
)


def an_envelope(input_data: dict[str, Any] | None = None, **options: Any) -> Envelope:
    return Envelope(
        "an-id", "orders", options.pop("schema_name", "orders"), input_data or {}, 1_700_000_000_123, **options
    )


def encoded(input_data: dict[str, Any] | None = None, **options: Any) -> bytes:
    return encode(an_envelope(input_data, **options))


def foreign(**fields: str) -> bytes:
    """An envelope written by hand: `fields` are JSON texts, added to the plain ones or in place of them; "" is none."""
    plain = {"v": "1", "id": '"an-id"', "name": '"orders"', "created_at": "1700000000123", "input": "{}"}
    return ("{" + ",".join(f'"{key}":{value}' for key, value in {**plain, **fields}.items() if value) + "}").encode()


def read(body: bytes, payload_limit: int = PAYLOAD_LIMIT) -> Envelope:
    envelope = decode(body, payload_limit)
    assert isinstance(envelope, Envelope)
    return envelope


def facts(envelope: Envelope) -> dict[str, Any]:
    return {field.name: getattr(envelope, field.name) for field in fields(envelope)}


def exactly(value: Any) -> Any:
    """The value with the type of every number beside it: to `==`, 1 is 1.0 is True, and 0.0 is -0.0."""
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    return [exactly(item) for item in value] if isinstance(value, list) else (type(value), repr_of(value))


def repr_of(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value


def nested(levels: int, kind: str = "object") -> dict[str, Any]:
    """An object of so many levels, itself the first."""
    value: Any = {} if kind == "object" else []
    for _ in range(levels - 2):
        value = {"a": value} if kind == "object" else [value]
    return {"a": value}


def everything_said(error: BaseException) -> str:
    """What a log would show of it, and its attributes."""
    return "".join(traceback.format_exception(error)) + str(error) + repr(error) + repr(vars(error))


# --- what goes in comes out


@often
@given(INPUTS)
@example({"": {"": [[], {}, None, True, False, 0, -0.0, 1.0, 5e-324, 1.7976931348623157e308, 2**63, -(2**64)]}})
@example({"\0": "\0\x1f\x7f\u2028\ufeff\U0010ffff"})
@example({"widest": WIDEST, "lowest": -WIDEST})
@example(nested(DEPTH_LIMIT))
def test_an_input_comes_back_as_it_went(data: dict[str, Any]) -> None:
    assert exactly(read(encoded(data)).input_data) == exactly(data)


@often
@given(ENVELOPES)
def test_an_envelope_comes_back_as_it_went(envelope: Envelope) -> None:
    back = read(encode(envelope))
    assert facts(back) == facts(envelope)


@often
@given(ENVELOPES)
def test_an_envelope_is_json_to_any_reader(envelope: Envelope) -> None:
    frame = json.loads(encode(envelope).decode("utf-8"), parse_constant=pytest.fail)
    assert (frame["v"], frame["id"], frame["input"]) == (1, envelope.id, envelope.input_data)


def test_an_envelope_is_the_documented_object() -> None:
    envelope = Envelope(
        "an-id", "orders", "orders.v2", {"a": [1, "ö"]}, 1_700_000_000_123, 1_700_000_005_000,
        priority=-3, headers={"trace": "é"}, timeout=2.5, retry=RetryPolicy(max_attempts=7, cap=5.0),
    )  # fmt: skip
    assert json.loads(encode(envelope)) == {
        "v": 1,
        "id": "an-id",
        "name": "orders",
        "schema": "orders.v2",
        "created_at": 1_700_000_000_123,
        "due_at": 1_700_000_005_000,
        "priority": -3,
        "headers": {"trace": "é"},
        "timeout": 2.5,
        "retry": {"max_attempts": 7, "cap": 5.0},
        "input": {"a": [1, "ö"]},
    }


def test_what_is_as_it_would_be_anyway_is_left_out() -> None:
    assert encoded() == b'{"v":1,"id":"an-id","name":"orders","created_at":1700000000123,"input":{}}'


@often
@given(st.text("abcdefghijklmnopqrstuvwxyz_.-0123456789", min_size=1, max_size=64), INPUTS)
def test_an_envelope_is_at_most_180_bytes_over_its_payload(name: str, data: dict[str, Any]) -> None:
    job_id, now = new_job_id(), int(time.time() * 1000)
    bare = encode(Envelope(job_id, name, name, {}, now))
    body = encode(Envelope(job_id, name, name, data, now))
    head, payload = body[: len(bare) - len(b"{}}")], body[len(bare) - len(b"{}}") : -1]
    assert bare == head + b"{}}"
    assert exactly(json.loads(payload)) == exactly(data)
    assert len(body) - len(payload) <= 180


@pytest.mark.parametrize(("timeout", "written"), [(math.inf, "null"), (5, "5"), (0.5, "0.5")])
def test_no_limit_is_written_as_null(timeout: float, written: str) -> None:
    body = encoded(timeout=timeout)
    assert f'"timeout":{written}'.encode() in body
    assert read(body).timeout == timeout
    assert read(encoded()).timeout is None


def test_a_policy_that_says_the_defaults_is_still_said() -> None:
    assert b'"retry":{}' in encoded(retry=RetryPolicy())
    assert read(encoded(retry=RetryPolicy())).retry == RetryPolicy()
    assert read(encoded()).retry is None


def test_a_payload_shares_nothing_with_what_was_sent() -> None:
    data = {"list": [1]}
    body = encoded(data)
    data["list"].append(2)
    assert read(body).input_data == {"list": [1]}


# --- from others, and from later versions


@often
@given(st.dictionaries(TEXT.map(lambda key: "x-" + key), VALUES, min_size=1, max_size=4), INPUTS)
def test_fields_we_do_not_know_survive_a_rewrite(unknown: dict[str, Any], data: dict[str, Any]) -> None:
    frame = {"v": 1, "id": "an-id", "name": "orders", "created_at": 1, "input": data, **unknown}
    once = read(json.dumps(frame, allow_nan=False).encode())
    twice = read(encode(once))
    assert exactly(dict(twice.unknown)) == exactly(unknown)
    assert facts(twice) == facts(once)
    assert exactly(json.loads(encode(once))) == exactly(frame)


@often
@given(ENVELOPES)
def test_a_rewrite_changes_nothing(envelope: Envelope) -> None:
    body = encode(envelope)
    assert encode(read(body)) == body


@pytest.mark.parametrize("version", ["0", "2", "-1", "99", str(10**30)])
@pytest.mark.parametrize(
    "rest",
    [{}, {"input": "[]"}, {"input": ""}, {"name": "7", "id": ""}, {"headers": "3", "timeout": '"x"', "retry": "[]"}],
)
def test_of_a_version_we_do_not_know_only_its_age_is_read(version: str, rest: dict[str, str]) -> None:
    assert decode(foreign(v=version, **rest)) == 1_700_000_000_123
    assert decode(foreign(v=version, due_at="1700000009000", **rest)) == 1_700_000_009_000
    assert decode(foreign(v=version, due_at="null", **rest)) == 1_700_000_000_123


def test_of_duplicate_keys_the_last_counts() -> None:
    body = foreign(input='{"a":1,"b":{"c":1,"c":2},"a":3}')
    assert read(body).input_data == {"a": 3, "b": {"c": 2}}
    assert read(body[:-1] + b',"name":"later"}').name == "later"


def test_an_envelope_may_be_written_with_blanks_and_escapes() -> None:
    head = b' {\n"v" : 1, "id":"\\u0061", "name":"\\ud83d\\ude00", "created_at":1,'
    envelope = read(head + b'\t"input":{"a":1e2, "\\u0000":"\\/"} } \r\n')
    assert (envelope.id, envelope.name, envelope.schema_name) == ("a", "😀", "😀")
    assert exactly(envelope.input_data) == exactly({"a": 100.0, "\0": "/"})


def test_the_fields_of_a_foreign_envelope_are_read() -> None:
    envelope = read(
        foreign(
            schema='"orders.v2"',
            due_at="5",
            priority="-7",
            headers='{"a":"b"}',
            timeout="2",
            retry='{"max_attempts":9}',
        )
    )
    assert (envelope.schema_name, envelope.due_ms, envelope.priority) == ("orders.v2", 5, -7)
    assert (envelope.headers, envelope.timeout, envelope.retry) == ({"a": "b"}, 2, RetryPolicy(max_attempts=9))


def test_a_policy_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    """And nothing but its numbers: no name in a message becomes a class or a function."""
    later = '{"max_attempts":9,"later":[1],"retry_on":["ValueError"],"no_retry_on":[],"delay":"os.getpid"}'
    assert read(foreign(retry=later)).retry == RetryPolicy(max_attempts=9)


# --- refused on the way out


NOT_CARRIED: list[tuple[str, Any]] = [
    ("not finite", math.nan),
    ("not finite", math.inf),
    ("not finite", -math.inf),
    ("surrogates", f"{SECRET}\ud800"),
    ("surrogates", f"\udfff{SECRET}"),
    ("surrogates", f"\ude00\ud83d{SECRET}"),
    ("4299 digits", WIDEST + 1),
    ("4299 digits", -WIDEST - 1),
    ("64 levels", nested(DEPTH_LIMIT)),
    ("64 levels", nested(5000)),
    ("64 levels", nested(5000, "list")),
    ("unknown type", object()),
]


@pytest.mark.parametrize(("why", "value"), NOT_CARRIED, ids=[why for why, _ in NOT_CARRIED])
@pytest.mark.parametrize(
    "place",
    [lambda v: {SECRET: v}, lambda v: {SECRET: [1, v]}, lambda v: {SECRET: {"a": {"b": v}}}],
    ids=["field", "list", "object"],
)
def test_what_json_cannot_carry_is_no_valid_input(why: str, value: Any, place: Callable[[Any], dict[str, Any]]) -> None:
    with pytest.raises(InputInvalid) as refused:
        encoded(place(value))
    assert refused.value.schema == "orders"
    [error] = refused.value.errors
    if why != "surrogates":
        assert why in error["msg"]
    assert SECRET not in everything_said(refused.value)
    assert "\\ud" not in str(refused.value).lower()


def test_a_key_is_text_like_any_other() -> None:
    with pytest.raises(InputInvalid):
        encoded({"a": {f"{SECRET}\ud800": 1}})


@pytest.mark.parametrize("kind", ["object", "list"])
def test_the_input_is_the_first_of_64_levels(kind: str) -> None:
    assert read(encoded(nested(DEPTH_LIMIT, kind))).input_data == nested(DEPTH_LIMIT, kind)
    with pytest.raises(InputInvalid, match="64 levels"):
        encoded(nested(DEPTH_LIMIT + 1, kind))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headers": {"a": 1}}, "headers have to be text"),
        ({"headers": {1: "a"}}, "headers have to be text"),
        ({"headers": {"a": None}}, "headers have to be text"),
        ({"headers": {"a": f"{SECRET}\ud800"}}, "headers have to be UTF-8"),
        ({"headers": {f"{SECRET}\ud800": "a"}}, "headers have to be UTF-8"),
        ({"schema_name": "orders\ud800"}, "name is not UTF-8"),
        ({"retry": RetryPolicy(retry_on=(ValueError,))}, "retry_on"),
        ({"retry": RetryPolicy(delay=lambda error, failed: 1.0)}, "delay"),
    ],
)
def test_an_option_that_cannot_travel_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        encoded({SECRET: SECRET}, **options)
    assert SECRET not in everything_said(refused.value)


# --- sizes


def of_size(size: int, filler: str = "x") -> dict[str, Any]:
    """An input of so many bytes of JSON."""
    data = {"a": filler * ((size - len('{"a":""}')) // len(filler.encode()))}
    data["a"] += "x" * (size - len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()))
    return data


@pytest.mark.parametrize("filler", ["x", "é", "😀"])
@pytest.mark.parametrize("limit", [100, PAYLOAD_LIMIT])
def test_an_input_may_have_its_limit_in_bytes_and_not_one_more(limit: int, filler: str) -> None:
    body = encode(an_envelope(of_size(limit, filler)), limit)
    assert read(body, limit).input_data == of_size(limit, filler)
    with pytest.raises(PayloadTooLarge) as refused:
        encode(an_envelope(of_size(limit + 1, filler)), limit)
    assert (refused.value.what, refused.value.size, refused.value.limit) == ("input", limit + 1, limit)


def test_a_payload_is_limited_to_a_megabyte_unless_raised_to_sixteen() -> None:
    assert (PAYLOAD_LIMIT, PAYLOAD_LIMIT_MOST) == (2**20, 2**24)
    with pytest.raises(PayloadTooLarge):
        encoded(of_size(PAYLOAD_LIMIT + 1))
    assert encode(an_envelope(of_size(PAYLOAD_LIMIT + 1)), PAYLOAD_LIMIT_MOST)


@pytest.mark.parametrize("filler", ["x", "é"])
def test_headers_may_have_8_kib_and_not_one_byte_more(filler: str) -> None:
    headers = of_size(HEADERS_LIMIT, filler)
    assert HEADERS_LIMIT == 8192
    assert read(encoded(headers=headers)).headers == headers
    with pytest.raises(PayloadTooLarge) as refused:
        encoded(headers=of_size(HEADERS_LIMIT + 1, filler))
    assert (refused.value.what, refused.value.size, refused.value.limit) == (
        "headers",
        HEADERS_LIMIT + 1,
        HEADERS_LIMIT,
    )


def test_an_envelope_may_have_64_kib_over_the_payload_limit_and_not_one_byte_more() -> None:
    limit, most = 1000, 1000 + ENVELOPE_EXTRA
    bare = len(encode(an_envelope(schema_name=""), limit))
    body = encode(an_envelope(schema_name="s" * (most - bare)), limit)
    assert ENVELOPE_EXTRA == 65536
    assert len(body) == most
    assert read(body, limit).input_data == {}
    with pytest.raises(PayloadTooLarge) as refused:
        encode(an_envelope(schema_name="s" * (most - bare + 1)), limit)
    assert (refused.value.what, refused.value.size, refused.value.limit) == ("envelope", most + 1, most)


@pytest.mark.parametrize("start", [b"", foreign()], ids=["no JSON", "JSON"])
@pytest.mark.parametrize("limit", [1, 1000, PAYLOAD_LIMIT])
def test_bytes_over_the_limit_are_too_large_whatever_they_say(start: bytes, limit: int) -> None:
    """Found before anything is parsed: what is no JSON would otherwise be malformed."""
    with pytest.raises(Refused, match=str(limit + ENVELOPE_EXTRA)) as refused:
        decode(start.ljust(limit + ENVELOPE_EXTRA + 1), limit)
    assert refused.value.reason == "too_large"
    within = start.ljust(limit + ENVELOPE_EXTRA)
    if start:
        assert read(within, limit).id == "an-id"
    else:
        with pytest.raises(Refused, match="not JSON"):
            decode(within, limit)


# --- refused on the way in


MALFORMED = {
    "nothing": b"",
    "blanks": b"  ",
    "no JSON": SECRET.encode(),
    "a null": b"null",
    "a number": b"1",
    "a text": b'"x"',
    "a list": b"[" + foreign() + b"]",
    "two objects": foreign() * 2,
    "a byte order mark": b"\xef\xbb\xbf" + foreign(),
    "UTF-16": foreign().decode().encode("utf-16"),
    "a NUL": foreign() + b"\0",
    "a NUL inside": foreign(input='{"a":"\0"}'),
    "a NUL before": b"\0" + foreign(),
    "not UTF-8": foreign(name='"x"').replace(b'"x"', b'"\xff\xfe"'),
    "an overlong form": foreign(name='"x"').replace(b'"x"', b'"\xc0\xaf"'),
    "a surrogate in UTF-8": foreign(name='"x"').replace(b'"x"', b'"\xed\xa0\x80"'),
    "a lone surrogate": foreign(input='{"a":"\\ud800"}'),
    "a lone surrogate as a key": foreign(input='{"\\udc00":1}'),
    "surrogates the wrong way round": foreign(input='{"a":"\\ude00\\ud83d"}'),
    "NaN": foreign(input='{"a":NaN}'),
    "Infinity": foreign(input='{"a":[Infinity]}'),
    "-Infinity": foreign(input='{"a":-Infinity}'),
    "1e999": foreign(input='{"a":1e999}'),
    "-1e999": foreign(input='{"a":[{"b":-1e999}]}'),
    "4,301 digits": foreign(input=f'{{"a":1{"0" * 4300}}}'),
    "-4,301 digits": foreign(input=f'{{"a":-1{"0" * 4300}}}'),
    "65 levels": foreign(input=json.dumps(nested(65))),
    "65 levels of lists": foreign(input=json.dumps(nested(65, "list"))),
    "100,000 levels": foreign(input='{"a":' * 100_000 + "1" + "}" * 100_000),
    "100,000 open lists": b"[" * 100_000,
    "a comma too many": foreign(input='{"a":1,}'),
    "a comment": foreign(input="{/* */}"),
    "single quotes": foreign(input="{'a':1}"),
    "NaN elsewhere": foreign(later="NaN"),
    "1e999 elsewhere": foreign(later="1e999"),
    "1e999 deep elsewhere": foreign(later='[{"a":-1e999}]'),
    "4,301 digits elsewhere": foreign(later="1" + "0" * 4300),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_the_json_of_one_object_is_malformed(body: bytes) -> None:
    with pytest.raises(Refused) as refused:
        decode(body)
    assert refused.value.reason == "malformed"
    assert SECRET not in everything_said(refused.value)


@pytest.mark.parametrize("end", range(len(foreign(headers='{"a":"b"}', timeout="2.5"))))
def test_an_envelope_that_was_cut_is_malformed(end: int) -> None:
    with pytest.raises(Refused) as refused:
        decode(foreign(headers='{"a":"b"}', timeout="2.5")[:end])
    assert refused.value.reason == "malformed"


WRONG = {
    "v": ["", "null", "true", "1.0", '"1"', "[1]", "{}"],
    "created_at": ["", "null", "true", "1.5", '"1"', "[]", "1e3"],
    "due_at": ["true", "1.5", '"1"', "[]", "{}"],
    "id": ["", "null", "7", "true", "[]", "{}"],
    "name": ["", "null", "7", "true", "[]", "{}"],
    "schema": ["null", "7", "true", "[]", "{}"],
    "input": ["", "null", "7", "true", "[]", '"{}"'],
    "priority": ["null", "true", "1.0", '"1"', "[]", "{}"],
    "headers": ["null", "7", "true", "[]", '"a"', '{"a":1}', '{"a":null}', '{"a":["b"]}'],
    "timeout": ["0", "-1", "0.0", "true", '"5"', "[]", "{}", "1e999", "-1e999", "1" + "0" * 400],
    "retry": [
        "null",
        "7",
        "false",
        "[]",
        '"3"',
        '{"max_attempts":0}',
        '{"max_attempts":1.0}',
        '{"max_attempts":null}',
        '{"base":-1}',
        '{"base":"1"}',
        '{"base":1e999}',
        '{"base":1' + "0" * 400 + "}",
        '{"factor":0}',
        '{"factor":1e999}',
        '{"factor":1' + "0" * 400 + "}",
        '{"cap":true}',
        '{"cap":1' + "0" * 400 + "}",
        '{"jitter":"half"}',
        '{"jitter":[]}',
        '{"crash_limit":0}',
    ],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG.items() for value in values],
    ids=lambda part: part[:30] or "left out",
)
def test_a_field_of_the_wrong_kind_is_malformed(field: str, value: str) -> None:
    with pytest.raises(Refused, match=field) as refused:
        decode(foreign(**{field: value}))
    assert refused.value.reason == "malformed"


@pytest.mark.parametrize(
    "job_id", ["", " ", "-a", ".a", "a b", "a/b", "a\\nforged line", "ä", "a" * 129], ids=lambda text: repr(text)[:20]
)
def test_an_id_that_could_not_be_published_is_malformed(job_id: str) -> None:
    with pytest.raises(Refused, match="id") as refused:
        decode(foreign(id=f'"{job_id}"'))
    assert refused.value.reason == "malformed"


@pytest.mark.parametrize("field", ["created_at", "due_at"])
@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("ms", [10**308, 10**400, -(10**400), WIDEST], ids=["308", "400", "-400", "4299"])
def test_an_instant_that_is_read_can_be_told_from_now(field: str, version: str, ms: int) -> None:
    """A worker ages what it does not know: an instant that is no number of seconds must not get that far."""
    try:
        envelope = decode(foreign(v=version, **{field: str(ms)}))
    except Refused as refused:
        assert refused.reason == "malformed"  # noqa: PT017 (one of two good answers)
        return
    instants = [envelope] if isinstance(envelope, int) else [envelope.created_ms, envelope.due_ms or 0]
    assert all(math.isfinite(time.time() - instant / 1000) for instant in instants)


@often
@given(st.binary(max_size=300))
@example(b"\xff")
@example(b"{}")
def test_whatever_the_bytes_nothing_but_refused_is_raised(body: bytes) -> None:
    with pytest.raises(Refused):
        decode(body)


FOREIGN_VALUES = st.one_of(
    VALUES,
    st.floats(),
    st.just(10**400),
    st.just(-(10**400)),
    st.dictionaries(
        st.sampled_from(["max_attempts", "base", "factor", "cap", "jitter", "crash_limit"]), NUMBERS | TEXT
    ),
)
KEYS = ["v", "id", "name", "schema", "created_at", "due_at", "priority", "headers", "timeout", "retry", "input", "x"]


@settings(often, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), FOREIGN_VALUES, min_size=1, max_size=4))
@example({"timeout": 10**400})
@example({"retry": {"base": 10**400}})
@example({"x": math.inf})
def test_whatever_an_envelope_says_it_is_refused_or_can_be_run_and_rewritten(changes: dict[str, Any]) -> None:
    frame = {"v": 1, "id": "an-id", "name": "orders", "created_at": 1, "input": {}, **changes}
    body = json.dumps(frame).replace("Infinity", "1e999").encode()
    try:
        envelope = decode(body)
    except Refused:
        return
    if isinstance(envelope, Envelope):
        json.dumps(job_dict(envelope, 1, envelope.input_data), allow_nan=False)
        assert facts(read(encode(envelope))) == facts(envelope)


@often
@given(ENVELOPES, st.data())
def test_an_envelope_with_a_wrong_byte_is_read_or_refused(envelope: Envelope, data: st.DataObject) -> None:
    body = bytearray(encode(envelope))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from(["change", "drop", "double"])):
            case "change":
                body[place] = data.draw(st.integers(0, 255))
            case "drop":
                del body[place]
            case _:
                body[place:place] = body[place : place + 5]
    try:
        decode(bytes(body))
    except Refused as refused:
        assert refused.reason == "malformed"  # noqa: PT017 (reading it is as good)


@often
@given(ENVELOPES, st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_no_error_quotes_what_it_could_not_read(envelope: Envelope, place: int, wrong: bytes) -> None:
    envelope.input_data = {**envelope.input_data, SECRET: [SECRET, {SECRET: SECRET}]}
    envelope.headers = {SECRET: SECRET}
    body = encode(envelope)
    place %= len(body)
    try:
        decode(body[:place] + wrong + body[place + 1 :])
    except JobsError as refused:
        assert SECRET not in everything_said(refused)  # noqa: PT017 (reading it is as good)


# --- what run gets


@often
@given(ENVELOPES, st.integers(1, 99))
def test_a_run_gets_json_values_only(envelope: Envelope, attempt: int) -> None:
    job = job_dict(envelope, attempt, envelope.input_data)
    assert list(job) == ["id", "name", "schema_name", "input_data", "priority", "created_at", "attempt", "headers"]
    assert exactly(json.loads(json.dumps(job, allow_nan=False))) == exactly(job)
    assert (job["id"], job["name"], job["schema_name"]) == (envelope.id, envelope.name, envelope.schema_name)
    assert (job["priority"], job["attempt"], job["headers"]) == (envelope.priority, attempt, envelope.headers)
    assert job["created_at"] == instant(envelope.created_ms)


def test_what_a_run_does_to_its_headers_stays_with_it() -> None:
    envelope = an_envelope(headers={"a": "b"})
    job_dict(envelope, 1, {})["headers"]["a"] = "c"
    assert envelope.headers == {"a": "b"}


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@often
@given(st.datetimes(timezones=st.just(UTC)))
@example(datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC))
@example(datetime.min.replace(tzinfo=UTC))
def test_an_instant_is_text_to_the_millisecond(when: datetime) -> None:
    ms = (when - EPOCH) // timedelta(milliseconds=1)
    assert datetime.fromisoformat(instant(ms)) == EPOCH + timedelta(milliseconds=ms)


def test_an_instant_reads_as_iso_8601_in_utc() -> None:
    assert instant(1_700_000_000_120) == "2023-11-14T22:13:20.120+00:00"


@pytest.mark.parametrize(
    "ms", [253_402_300_800_000, -62_135_596_800_001, 10**30, -(10**30), 10**400], ids=lambda ms: str(ms)[:20]
)
def test_an_instant_no_calendar_has_is_the_number_it_is(ms: int) -> None:
    assert instant(ms) == str(ms)


# --- what a backend stores


def test_a_message_is_ready_at_once_and_plain_unless_it_says_otherwise() -> None:
    message = Message("an-id", b"{}")
    assert (message.priority, message.delay, message.at, message.crash_limit) == (0, 0.0, None, None)
    assert [field.name for field in fields(Message)] == ["id", "body", "priority", "delay", "at", "crash_limit"]


def test_a_message_does_not_change_and_equals_another_that_says_the_same() -> None:
    message = Message("an-id", b"{}")
    with pytest.raises(FrozenInstanceError):
        message.body = b""  # type: ignore[misc]
    assert message == Message("an-id", b"{}") != Message("an-id", b"[]")
    assert not hasattr(message, "__dict__")
