"""Failed runs as lines of JSON in `errors`: the newest in full, then all in short, newest first."""

import json
from datetime import UTC, datetime
from typing import Any, cast

from mindtrace.jobs.delivery import RunError, shortened, with_error


def lines_of(error: RunError | None) -> tuple[str, str]:
    """It in full and in short; empty if there is none. JSON has no line break in it."""
    if error is None:
        return "", ""
    return _line(error), _line(shortened(error))


def errors_of(lines: bytes) -> tuple[RunError, ...]:
    """Oldest first, as `with_error` keeps them. What is no error of ours is left out."""
    full, *short = [_error(line) for line in lines.split(b"\n")] if lines else [None]
    errors: tuple[RunError, ...] = ()
    for error in reversed(short[1:]):
        errors = with_error(errors, error)
    return with_error(errors, full)


def _line(error: RunError) -> str:
    fields = {
        "type": error.type,
        "message": error.message,
        "traceback": error.traceback,
        "started_at": None if error.started_at is None else error.started_at.timestamp(),
        "ended_at": None if error.ended_at is None else error.ended_at.timestamp(),
        "worker": error.worker,
    }
    return json.dumps({name: value for name, value in fields.items() if value}, separators=(",", ":"))


def _error(line: bytes) -> RunError | None:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    known = cast("dict[str, Any]", fields)
    texts = [str(known.get(name, "")) for name in ("type", "message", "traceback", "worker")]
    started, ended = (_instant(known.get(name)) for name in ("started_at", "ended_at"))
    return RunError(texts[0], texts[1], texts[2], started, ended, texts[3])


def _instant(value: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(value, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
