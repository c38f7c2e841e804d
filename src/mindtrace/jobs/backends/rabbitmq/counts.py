"""What travels beside the envelope, in headers of ours: the job's id, its numbers, its errors, and its death.

| header       | value                                                                      | when                 |
|--------------|----------------------------------------------------------------------------|----------------------|
| `mtj-id`     | the job's id; `message_id` is another one for each sending                 | always               |
| `mtj-counts` | attempts, crashes, releases, number, replays, crash limit (-1: receiver's) | not all are as new   |
| `mtj-errors` | a JSON list of the failed runs, oldest first                               | there were any       |
| `mtj-died`   | microseconds since the epoch, and the reason                               | in the dead letters  |
| `mtj-due`    | microseconds since the epoch, by the clock of who published it             | it is delayed        |

The broker's own counts (`x-delivery-count`, `x-death`) changed their meaning between its versions: they are neither
read nor copied. What a header says that is not ours, or broken, counts as nothing.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast, get_args

from pamqp import commands

from mindtrace.jobs.delivery import DeadReason, RunError, shortened, with_error
from mindtrace.jobs.job import JobId, is_job_id

_COUNTS = re.compile(r"(\d{1,9}) (\d{1,9}) (\d{1,9}) (\d{1,9}) (\d{1,9}) (-1|\d{1,9})")
_DIED = re.compile(r"(\d{1,17}) ([a-z_]+)")
_DUE = re.compile(r"[0-9]{1,17}")
_REASONS: tuple[str, ...] = get_args(DeadReason)
_ERRORS_LONGEST = 96 * 1024
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Counts:
    """The numbers of a job.

    Attributes:
        attempts: starts that count against it, crashes included.
        crashes: deliveries that ended without a settlement.
        releases: hand-backs.
        number: deliveries, ever.
        replays: how often it came back from the dead letters.
        crash_limit: crashes until it is dead; None leaves it to the receiver.
    """

    attempts: int = 0
    crashes: int = 0
    releases: int = 0
    number: int = 0
    replays: int = 0
    crash_limit: int | None = None

    def text(self) -> str:
        """As it travels."""
        limit = -1 if self.crash_limit is None else self.crash_limit
        return f"{self.attempts} {self.crashes} {self.releases} {self.number} {self.replays} {limit}"

    def started(self) -> "Counts":
        """After one more delivery."""
        return replace(self, attempts=self.attempts + 1, number=self.number + 1)

    def crashed(self) -> "Counts":
        """After a delivery that ended without a settlement."""
        return replace(self, attempts=self.attempts + 1, number=self.number + 1, crashes=self.crashes + 1)

    def ended_by_crash(self) -> "Counts":
        """After a delivery, counted by `started` before, whose process died under it."""
        return replace(self, crashes=self.crashes + 1)

    def released(self) -> "Counts":
        """After a delivery that was handed back, counted by `started` before."""
        return replace(self, attempts=self.attempts - 1, releases=self.releases + 1)

    def replayed(self) -> "Counts":
        """Back from the dead letters."""
        return Counts(number=self.number, replays=self.replays + 1, crash_limit=self.crash_limit)


NEW = Counts()


def id_of(properties: commands.Basic.Properties, body: bytes) -> JobId:
    """The job's id; for what somebody else published, one that stays the same."""
    headers = properties.headers
    found: Any = None if headers is None else headers.get("mtj-id")
    if type(found) is str and is_job_id(found):
        return found
    if is_job_id(properties.message_id):
        return str(properties.message_id)
    return f"foreign-{hashlib.sha256(body).hexdigest()[:32]}"


def counts_of(headers: Mapping[str, Any] | None) -> Counts:
    """The numbers; as new where there are none of ours."""
    text: Any = None if headers is None else headers.get("mtj-counts")
    found = _COUNTS.fullmatch(text) if type(text) is str else None
    if found is None:
        return NEW
    attempts, crashes, releases, number, replays, limit = map(int, found.groups())
    return Counts(attempts, min(crashes, attempts), releases, number, replays, None if limit < 0 else limit)


def death_of(headers: Mapping[str, Any] | None) -> tuple[datetime, DeadReason] | None:
    """When and of what it died; None where no worker of ours said so."""
    text: Any = None if headers is None else headers.get("mtj-died")
    found = _DIED.fullmatch(text) if type(text) is str else None
    if found is None or found[2] not in _REASONS:
        return None
    return _EPOCH + timedelta(microseconds=int(found[1])), cast("DeadReason", found[2])


def due_of(headers: Mapping[str, Any] | None) -> float | None:
    """When it is due, in seconds since the epoch; None where nobody of ours said so."""
    text: Any = None if headers is None else headers.get("mtj-due")
    found = _DUE.fullmatch(text) if type(text) is str else None
    return None if found is None else int(found[0]) / 1e6


def errors_of(headers: Mapping[str, Any] | None) -> tuple[RunError, ...]:
    """Oldest first. What is no error of ours is left out."""
    text: Any = None if headers is None else headers.get("mtj-errors")
    if type(text) is not str:
        return ()
    try:
        listed: Any = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    errors: tuple[RunError, ...] = ()
    for known in dicts_of(listed):
        texts = [_text(known.get(name)) for name in ("type", "message", "traceback", "worker")]
        started, ended = (_instant(known.get(name)) for name in ("started_at", "ended_at"))
        errors = with_error(errors, RunError(texts[0], texts[1], texts[2], started, ended, texts[3]))
    return errors


def headers_of(
    job_id: JobId,
    counts: Counts,
    errors: tuple[RunError, ...] = (),
    died: tuple[datetime, DeadReason] | None = None,
    room: int = _ERRORS_LONGEST,
    due: float | None = None,
) -> dict[str, Any]:
    """The headers of a message.

    Args:
        job_id: of the job.
        counts: its numbers.
        errors: of its failed runs, oldest first.
        died: when and of what.
        room: bytes that its errors may have: headers have to fit into one frame.
        due: seconds since the epoch.
    """
    headers: dict[str, Any] = {"mtj-id": job_id}
    if counts != NEW:
        headers["mtj-counts"] = counts.text()
    if errors:
        headers["mtj-errors"] = _errors_text(errors, room)
    if died is not None:
        headers["mtj-died"] = f"{(died[0] - _EPOCH) // timedelta(microseconds=1)} {died[1]}"
    if due is not None:
        headers["mtj-due"] = f"{due * 1e6:.0f}"
    return headers


def _errors_text(errors: tuple[RunError, ...], room: int) -> str:
    """As many of the newest as there is room for; of the last one, if need be, only the beginning."""
    kept = list(errors)
    text = _json(kept)
    while len(text.encode()) > room and len(kept) > 1:
        del kept[0]
        text = _json(kept)
    if len(text.encode()) > room:
        text = _json([shortened(kept[0])])
    if len(text.encode()) > room:
        text = _json([replace(shortened(kept[0]), type=kept[0].type[:100], worker=kept[0].worker[:100])])
    return text


def _json(errors: Sequence[RunError]) -> str:
    return json.dumps([_fields(error) for error in errors], ensure_ascii=False, separators=(",", ":"))


def _fields(error: RunError) -> dict[str, Any]:
    fields = {
        "type": error.type,
        "message": error.message,
        "traceback": error.traceback,
        "started_at": None if error.started_at is None else error.started_at.timestamp(),
        "ended_at": None if error.ended_at is None else error.ended_at.timestamp(),
        "worker": error.worker,
    }
    return {name: value for name, value in fields.items() if value}


def dicts_of(listed: Any) -> list[dict[str, Any]]:
    """The tables in a list; of anything else none."""
    found: list[Any] = [*listed] if isinstance(listed, list) else []
    return [one for one in found if isinstance(one, dict)]


def _text(value: Any) -> str:
    """Of a lone surrogate a question mark: no message can carry it."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _instant(value: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(value, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
