"""What a worker process says on stderr: a banner and log lines, for people or as JSON."""

import logging
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from mindtrace.jobs.cli.output import say, without_login
from mindtrace.jobs.delivery import escaped
from mindtrace.jobs.logs import JobFilter, JsonFormatter

_log = logging.getLogger(__name__)

_OURS = "mindtrace.jobs"
_DRIVERS = ("aio_pika", "pamqp", "redis")  # at debug they would print what jobs hold; aiormq the backend quiets itself
_REMEMBERED = 60.0  # seconds that a warning has to be silent, before it is said again
_REMEMBERED_MOST = 100  # warnings


class Journal:
    """Where the lines go, and how they look.

    Args:
        form: `text` or `json`.
        level: the least that is logged.
        several: processes write to the same place: each line says which.
    """

    def __init__(self, form: str, level: int, *, several: bool) -> None:
        self.form: str = form
        self._level, self._several = level, several
        self._handler: logging.Handler | None = None

    def open(self, *, insists: bool) -> None:
        """Log to stderr from now on. An application that has set up logging of its own keeps it, unless we insist."""
        root = logging.getLogger()
        logging.getLogger(_OURS).setLevel(self._level)
        if root.handlers and not insists:
            return
        handler = self._handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if self.form == "json" else _TextFormatter(self._several))
        handler.addFilter(_Once())
        handler.addFilter(JobFilter())
        root.handlers[:] = [handler]
        root.setLevel(self._level)
        for name in _DRIVERS:
            driver = logging.getLogger(name)
            driver.setLevel(max(self._level, driver.level, logging.INFO))

    @contextmanager
    def held(self, failure: type[BaseException]) -> Generator[None]:
        """What the library logs inside the block is said after it; or never, where it fails like that, which says all.

        Args:
            failure: raised by the block.
        """
        records: list[logging.LogRecord] = []

        def hold(record: logging.LogRecord) -> bool:
            if record.name.startswith(_OURS):
                records.append(record)
                return False
            return True

        if self._handler is not None:
            self._handler.addFilter(hold)
        try:
            yield
        except failure:
            records.clear()
            raise
        finally:
            if self._handler is not None:
                self._handler.removeFilter(hold)
                for record in records:
                    self._handler.handle(record)

    def say(self, text: str) -> None:
        """What somebody asked for, at any level. Where nobody reads it, nothing is said, and nothing fails."""
        with suppress(OSError, ValueError):
            if self.form == "json":
                say_record(text, logging.INFO)
            else:
                say(text)

    def banner(self, facts: Mapping[str, Any]) -> None:
        """The first lines; as JSON they are one record."""
        if self.form == "json":
            _log.info("%s", ", ".join(f"{name} {value}" for name, value in facts.items()))
            return
        width = max(map(len, facts))
        for name, value in facts.items():
            self.say(f"{name:<{width}}  {value}")


def say_record(text: str, level: int, error: BaseException | None = None) -> None:
    """A line of JSON to stderr, as a logger would have it; with the traceback of the error, if one is given."""
    about: dict[str, Any] = {"name": __name__, "levelno": level, "levelname": logging.getLevelName(level), "msg": text}
    if error is not None:
        about["exc_info"] = (type(error), error, error.__traceback__)
    line = JsonFormatter().format(logging.makeLogRecord(about))
    print(without_login(line), file=sys.stderr, flush=True)


class _TextFormatter(logging.Formatter):
    """Time, level, message; what a message holds cannot forge a line."""

    def __init__(self, several: bool) -> None:
        super().__init__(f"%(asctime)s {'[%(process)d] ' if several else ''}%(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text, job_id = super().formatMessage(record), getattr(record, "job_id", "")
        if job_id and not record.name.startswith(_OURS):  # the library's own lines name theirs
            text = f"{text} (job {job_id})"
        return escaped(text)


class _Once(logging.Filter):
    """Leaves out a warning of ours that has just been said: while a broker is away, each try would say it."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING or not record.name.startswith(_OURS):
            return True
        text, now = record.getMessage(), time.monotonic()
        if now - self._said.pop(text, -_REMEMBERED) < _REMEMBERED:
            self._said[text] = now
            return False
        self._said[text] = now
        if len(self._said) > _REMEMBERED_MOST:
            del self._said[next(iter(self._said))]
        return True
