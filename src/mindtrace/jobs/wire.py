"""Job to bytes and back: the envelope, its format version, and `Message`, which a backend stores.

The envelope is one JSON object in UTF-8, so that programs in other languages can publish:

| key          | value                                               | left out when          |
|--------------|-----------------------------------------------------|------------------------|
| `v`          | 1; a version we do not know is left to other workers |                        |
| `id`         | the job's id                                        |                        |
| `name`       | the job's name                                      |                        |
| `schema`     | the name of its schema                              | it is the name         |
| `created_at` | integer ms since the epoch, UTC                     |                        |
| `due_at`     | the same, when it is first due                      | it was due at once     |
| `priority`   | integer                                             | 0                      |
| `headers`    | object, text to text                                | empty                  |
| `timeout`    | seconds for one run; null for no limit              | not given at publish   |
| `retry`      | object: the numbers of a `RetryPolicy`              | not given at publish   |
| `input`      | object                                              |                        |

`v`, `created_at` and `due_at` keep their meaning in every version. Fields we do not know survive a rewrite. JSON only:
no pickle, and no name in a message is ever imported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, cast

from pydantic import JsonValue
from pydantic_core import PydanticSerializationError, from_json, to_json

from mindtrace.jobs.errors import ConfigError, InputInvalid, PayloadTooLarge, Refused
from mindtrace.jobs.job import JobId, is_job_id
from mindtrace.jobs.retry import WIRE_FIELDS, RetryPolicy, is_seconds

VERSION = 1
NOTHING: Mapping[str, Any] = MappingProxyType({})
PAYLOAD_LIMIT = 1024 * 1024
"""Bytes of JSON that an input may have, unless the orchestrator is told otherwise."""
PAYLOAD_LIMIT_MOST = 16 * 1024 * 1024
ENVELOPE_EXTRA = 64 * 1024
"""Bytes that the envelope may have beyond the payload limit."""
HEADERS_LIMIT = 8 * 1024
DEPTH_LIMIT = 64
"""Levels of nesting of an input, itself the first."""
# One less than Python's own limit for text to int (sys.int_info.default_max_str_digits), beyond which no worker could
# read it: an older pydantic counts the sign as a digit.
_DIGITS_LIMIT = 4299
_WIDEST_INT = 10**_DIGITS_LIMIT
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_KEYS = frozenset(
    ("v", "id", "name", "schema", "created_at", "due_at", "priority", "headers", "timeout", "retry", "input")
)


@dataclass(frozen=True, slots=True)
class Message:
    """What a backend stores. It never reads or rewrites `body`; counters and errors live beside it, never in it.

    Attributes:
        id: the job's id, under which it is stored once.
        body: the envelope.
        priority: higher is handed out first.
        delay: seconds until it is ready. This and `at` are for the publish alone: what is received need not have them,
            and they do not count when messages are compared.
        at: an aware instant until it is ready, instead of `delay`.
        crash_limit: crashes until it is dead; None leaves it to the receiver.
    """

    id: JobId
    body: bytes
    priority: int = 0
    delay: float = field(default=0.0, compare=False)
    at: datetime | None = field(default=None, compare=False)
    crash_limit: int | None = None


@dataclass(slots=True, eq=False)
class Envelope:
    """What the bytes say. Instants are ms since the epoch; `timeout`: None where none was given, inf for no limit."""

    id: JobId
    name: str
    schema_name: str
    input_data: dict[str, Any]
    created_ms: int
    due_ms: int | None = None
    priority: int = 0
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    timeout: float | None = None
    retry: RetryPolicy | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict[str, Any])


def encode(envelope: Envelope, payload_limit: int = PAYLOAD_LIMIT) -> bytes:
    """The envelope as bytes.

    Raises:
        InputInvalid: the input holds what JSON cannot carry: NaN or an infinity, a lone surrogate, more than 64 levels,
            an integer of more than 4,299 digits.
        PayloadTooLarge: the input, the headers or the whole is over its limit.
        ConfigError: the headers are not text to text, or the retry policy holds what cannot travel.
    """
    try:
        _check_values(envelope.input_data, 1)
        payload = to_json(envelope.input_data)
    except (ValueError, PydanticSerializationError) as error:
        raise InputInvalid(
            envelope.schema_name, [{"type": "json", "loc": (), "msg": _without_values(error)}]
        ) from error
    if len(payload) > payload_limit:
        raise PayloadTooLarge("input", len(payload), payload_limit)
    frame: dict[str, Any] = {"v": VERSION, "id": envelope.id, "name": envelope.name}
    if envelope.schema_name != envelope.name:
        frame["schema"] = envelope.schema_name
    frame["created_at"] = envelope.created_ms
    if envelope.due_ms is not None:
        frame["due_at"] = envelope.due_ms
    if envelope.priority:
        frame["priority"] = envelope.priority
    if envelope.headers:
        frame["headers"] = _checked_headers(envelope.headers)
    if envelope.timeout is not None:
        frame["timeout"] = None if envelope.timeout == math.inf else envelope.timeout
    if envelope.retry is not None:
        frame["retry"] = envelope.retry.to_wire()
    if envelope.unknown:
        frame.update(envelope.unknown)
    try:
        head = to_json(frame)
    except PydanticSerializationError as error:
        raise ConfigError(f"the job's name is not UTF-8 text: {_without_values(error)}") from error
    # Spliced, so that the payload is written once and its size is known.
    body = b'%b,"input":%b}' % (head[:-1], payload)
    if len(body) > payload_limit + ENVELOPE_EXTRA:
        raise PayloadTooLarge("envelope", len(body), payload_limit + ENVELOPE_EXTRA)
    return body


def decode(body: bytes, payload_limit: int = PAYLOAD_LIMIT) -> Envelope | int:
    """What the bytes say; of duplicate keys the last counts.

    Returns:
        the envelope; or, for a format version that we do not know, the ms since the epoch at which it was first due.

    Raises:
        Refused: `too_large` (found before anything is parsed) or `malformed`.
    """
    if len(body) > payload_limit + ENVELOPE_EXTRA:
        raise Refused("too_large", f"an envelope of {len(body)} bytes, {payload_limit + ENVELOPE_EXTRA} allowed")
    try:
        # from_json takes bytes as UTF-8 and refuses a BOM, lone surrogates, NaN, and more than 200 levels of nesting.
        frame = _object(from_json(body, allow_inf_nan=False))
    except ValueError as error:
        raise Refused("malformed", f"not JSON: {_without_values(error)}") from error
    if frame is None:
        raise Refused("malformed", "not a JSON object")
    version: Any = frame.get("v")
    created: Any = frame.get("created_at")
    due: Any = frame.get("due_at")
    if type(version) is not int or not _is_instant(created) or not (due is None or _is_instant(due)):
        raise Refused("malformed", "v, created_at and due_at have to be integers, the last two of 64 bits")
    if version != VERSION:
        first_due: int = created if due is None else due
        return first_due
    return _envelope(frame, created, due)


def _envelope(frame: dict[str, Any], created: int, due: int | None) -> Envelope:
    """Fields of the right kind, or `Refused`: whoever writes to the broker can send anything."""
    get = frame.get
    name: Any = get("name")
    schema_name: Any = get("schema", name)
    input_data = _object(get("input"))
    job_id: Any = get("id")
    if not (type(name) is str and type(schema_name) is str and is_job_id(job_id) and input_data is not None):
        raise Refused("malformed", "id has to be a job id, name and schema text, input an object")
    try:
        _check_values(input_data, 1)
    except ValueError as error:
        raise Refused("malformed", str(error)) from error
    envelope = Envelope(job_id, name, schema_name, input_data, created, due, 0, NOTHING, None, None, NOTHING)
    if frame.keys() <= _PLAIN_KEYS:
        return envelope
    envelope.unknown = {key: value for key, value in frame.items() if key not in _KEYS}
    try:
        _check_values(dict(envelope.unknown), 0)
    except ValueError as error:
        raise Refused("malformed", str(error)) from error
    envelope.priority = get("priority", 0)
    headers = _object(get("headers", {}))
    if type(envelope.priority) is not int:
        raise Refused("malformed", "priority has to be an integer")
    if headers is None or not all(type(value) is str for value in headers.values()):
        raise Refused("malformed", "headers have to be an object of text")
    envelope.headers = headers
    if "timeout" in frame:
        timeout: Any = frame["timeout"]
        if timeout is not None and not (is_seconds(timeout) and timeout > 0):
            raise Refused("malformed", "timeout has to be a number above 0, or null")
        envelope.timeout = math.inf if timeout is None else timeout
    if "retry" in frame:
        retry: Any = frame["retry"]
        try:
            envelope.retry = RetryPolicy(**{key: value for key, value in retry.items() if key in WIRE_FIELDS})
        except (AttributeError, TypeError, ValueError) as error:
            raise Refused("malformed", "retry has to be an object with the numbers of a retry policy") from error
    return envelope


_PLAIN_KEYS = frozenset(("v", "id", "name", "schema", "created_at", "due_at", "input"))


def job_dict(envelope: Envelope, attempt: int, input_data: dict[str, Any]) -> dict[str, Any]:
    """What `run` gets: JSON values only, the same in a coroutine, a thread and from `receive_message`."""
    return {
        "id": envelope.id,
        "name": envelope.name,
        "schema_name": envelope.schema_name,
        "input_data": input_data,
        "priority": envelope.priority,
        "created_at": instant(envelope.created_ms),
        "attempt": attempt,
        "headers": dict(envelope.headers),
    }


def instant(ms: int) -> str:
    """Ms since the epoch as ISO 8601 text in UTC; an instant outside the years 1 to 9999 as the number it is."""
    try:
        return (_EPOCH + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds")
    except OverflowError:
        return str(ms)


def _object(value: Any) -> dict[str, Any] | None:
    """The value if it is a JSON object."""
    return cast(dict[str, Any], value) if type(value) is dict else None


def _is_instant(ms: object) -> bool:
    return type(ms) is int and -(2**63) <= ms < 2**63


def _check_values(value: JsonValue, level: int) -> None:
    """Refuse what JSON readers do not agree on."""
    if isinstance(value, dict | list):
        if level > DEPTH_LIMIT:
            raise ValueError(f"more than {DEPTH_LIMIT} levels of nesting")
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) is not str:
                _check_values(item, level + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):  # JSON has no word for it, and 1e999 is read as one
            raise ValueError("a number that is not finite")
    elif isinstance(value, int) and not -_WIDEST_INT < value < _WIDEST_INT:
        raise ValueError(f"an integer of more than {_DIGITS_LIMIT} digits")


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    plain: dict[Any, Any] = dict(headers)
    if not all(type(key) is str and type(value) is str for key, value in plain.items()):
        raise ConfigError("headers have to be text to text")
    try:
        size = len(to_json(plain))
    except PydanticSerializationError as error:
        raise ConfigError(f"headers have to be UTF-8 text: {_without_values(error)}") from error
    if size > HEADERS_LIMIT:
        raise PayloadTooLarge("headers", size, HEADERS_LIMIT)
    return plain


def _without_values(error: Exception) -> str:
    """The text of an error of the JSON library, cut where it would go on to quote the value."""
    return str(error).split(" character '", 1)[0][:200]
