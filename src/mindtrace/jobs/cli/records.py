"""How a dead letter is shown: as a row, in full, as JSON; and grouped with those that died of the same."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from mindtrace.jobs.cli.output import result
from mindtrace.jobs.delivery import DeadRecord, RunError
from mindtrace.jobs.errors import Refused
from mindtrace.jobs.wire import PAYLOAD_LIMIT_MOST, Envelope, decode

HEADER: Final = ("id", "queue", "schema", "reason", "attempts", "died", "error")
GROUP_HEADER: Final = ("jobs", "queue", "schema", "reason", "error", "first", "last")
_ERROR: Final = 100  # characters of an error's text in a row
_NUMBER: Final = re.compile(r"[\w-]*\d[\w-]*")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter that has been opened."""

    record: DeadRecord
    envelope: Envelope | None

    @classmethod
    def of(cls, record: DeadRecord) -> "Letter":
        """What can be read of it."""
        try:
            envelope = decode(record.message.body, PAYLOAD_LIMIT_MOST)
        except Refused:
            return cls(record, None)
        return cls(record, envelope if isinstance(envelope, Envelope) else None)

    @property
    def schema(self) -> str | None:
        """The name of its schema; None where its bytes cannot be read."""
        return None if self.envelope is None else self.envelope.schema_name

    @property
    def error(self) -> RunError | None:
        """Of its last run."""
        return self.record.errors[-1] if self.record.errors else None

    def row(self) -> tuple[object, ...]:
        """As `HEADER` has it."""
        record = self.record
        job_id = record.message.id
        return job_id, record.queue, self.schema, record.reason, record.attempts, _time(record.died_at), self.short()

    def short(self) -> str | None:
        """The error's type and the first line of its text."""
        if self.error is None:
            return None
        first = self.error.message.partition("\n")[0]
        text = f"{self.error.type}: {first}" if first else self.error.type
        return text if len(text) <= _ERROR else f"{text[: _ERROR - 1]}…"

    def values(self, *, payload: bool, errors: bool) -> dict[str, Any]:
        """As JSON values."""
        record, envelope = self.record, self.envelope
        values: dict[str, Any] = {
            "id": record.message.id,
            "queue": record.queue,
            "schema": self.schema,
            "reason": record.reason,
            "attempts": record.attempts,
            "crashes": record.crashes,
            "releases": record.releases,
            "number": record.number,
            "replays": record.replays,
            "priority": record.message.priority,
            "created_at": None if envelope is None else _stamp(_of_ms(envelope.created_ms)),
            "died_at": _stamp(record.died_at),
            "error": None if self.error is None else {"type": self.error.type, "message": self.error.message},
        }
        if errors:
            values["headers"] = {} if envelope is None else dict(envelope.headers)
            values["errors"] = [_error_values(error) for error in record.errors]
        if payload:
            values["input"] = self.payload()
        return values

    def payload(self) -> Any:
        """The input; where nothing can be read, the bytes as text."""
        if self.envelope is not None:
            return self.envelope.input_data
        return self.record.message.body.decode("utf-8", "backslashreplace")

    def print(self, *, payload: bool) -> None:
        """In full."""
        values = self.values(payload=False, errors=True)
        del values["error"]
        errors, headers = values.pop("errors"), values.pop("headers")
        for name, value in values.items():
            result(f"{name:<12}{'-' if value is None else _one_line(value)}")
        for name, value in headers.items():
            result(f"{'header':<12}{_one_line(name)}: {_one_line(value)}")
        for number, error in enumerate(errors, 1):
            said = _one_line(f"{error['type']}: {error['message']}")
            result(f"{f'error {number}':<12}{said} ({error['ended_at'] or '-'}, {_one_line(error['worker'] or '-')})")
            if error["traceback"]:
                result(error["traceback"].rstrip("\n"))
        if payload:
            result(f"{'input':<12}{_as_json(self.payload())}")


class Group:
    """Those that died of the same: one queue, schema, reason, and error."""

    def __init__(self, letter: Letter) -> None:
        self._letter = letter
        self._jobs = 0
        self._first = self._last = letter.record.died_at

    @staticmethod
    def key(letter: Letter) -> tuple[object, ...]:
        """What those of one group have in common: of the error all but what looks like a number or an id."""
        return letter.record.queue, letter.schema, letter.record.reason, _gist(letter)

    def add(self, letter: Letter) -> None:
        """One more."""
        self._jobs += 1
        self._first, self._last = min(self._first, letter.record.died_at), max(self._last, letter.record.died_at)

    @property
    def order(self) -> tuple[int, datetime]:
        """The largest first, then the newest."""
        return self._jobs, self._last

    def row(self) -> tuple[object, ...]:
        """As `GROUP_HEADER` has it."""
        letter = self._letter
        queue, reason = letter.record.queue, letter.record.reason
        return self._jobs, queue, letter.schema, reason, _gist(letter), _time(self._first), _time(self._last)

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        jobs, queue, schema, reason, error, _, _ = self.row()
        first, last = _stamp(self._first), _stamp(self._last)
        names = ("jobs", "queue", "schema", "reason", "error", "first", "last")
        return dict(zip(names, (jobs, queue, schema, reason, error, first, last), strict=True))


def _error_values(error: RunError) -> dict[str, Any]:
    return {
        "type": error.type,
        "message": error.message,
        "traceback": error.traceback,
        "started_at": None if error.started_at is None else _stamp(error.started_at),
        "ended_at": None if error.ended_at is None else _stamp(error.ended_at),
        "worker": error.worker,
    }


def _gist(letter: Letter) -> str | None:
    text = letter.short()
    return None if text is None else _NUMBER.sub("…", text)


def _of_ms(ms: int) -> datetime | None:
    try:
        return _EPOCH + timedelta(milliseconds=ms)
    except OverflowError:  # whoever wrote this had another clock
        return None


def _stamp(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat(timespec="milliseconds")


def _time(at: datetime) -> str:
    """To the second, in UTC."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def _one_line(value: object) -> str:
    """Whoever published chose it: it must not look like a line of ours."""
    return str(value).replace("\n", "\\n").replace("\t", "\\t")


def _as_json(value: object) -> str:
    return json.dumps(value, indent=2)
