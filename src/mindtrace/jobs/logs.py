"""Log records that say which job they belong to, and a format of one JSON object a line.

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])

What the library logs about a job carries `job_id`, `queue`, `schema`, `attempt` and `worker`, and never a payload. What
user code logs inside a run, in a coroutine or a thread, carries them where a handler has the filter or this formatter.
Nothing is set up by an import.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

from mindtrace.jobs.consumer import job_here

FIELDS: Final = ("job_id", "queue", "schema", "attempt", "worker")
"""Of a record about a job."""


class JobFilter(logging.Filter):
    """Lets every record pass, and has it say which job it belongs to.

    For a handler; on a logger it would see that logger's own records only. Outside a job the fields are there and
    empty, so that a format may name them: `%(job_id)s %(message)s`. One that a record brings is left as it is.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields."""
        for name, value in _fields_of(record).items():
            setattr(record, name, value)
        return True


class JsonFormatter(logging.Formatter):
    r"""One JSON object a line: `{"time": ..., "level": ..., "logger": ..., "message": ...}`.

    Then the fields of the job, those that are known, and `exception` and `stack` as text where there are any. The time
    is ISO 8601 in UTC, with microseconds. Whatever is in a text, a line stays one line of ASCII: line ends, control
    characters and all that is not ASCII are written as `\n` and `\u00e9`.

    It looks for the job where it formats. A handler that formats in another thread, as behind a `QueueHandler`, needs a
    `JobFilter` on the handler in front.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in _fields_of(record).items() if value not in ("", None)}
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str).replace("\x7f", "\\u007f")  # the one that JSON leaves as it is


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the record brings; what it lacks is of the job that is run here, unless it speaks of another one."""
    brought, job = vars(record), job_here()
    if job is None or brought.get("job_id"):
        here: tuple[Any, ...] = ("", "", "", None, "")
    else:
        here = (job.id, job.queue, job.schema_name, job.attempt, job.worker)
    return {name: brought.get(name) or value for name, value in zip(FIELDS, here, strict=True)}
