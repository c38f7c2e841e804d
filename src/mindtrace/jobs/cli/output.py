"""What the command line prints: results on stdout, all else on stderr; plain where nobody looks at it."""

import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self, TextIO

from mindtrace.jobs.cli.errors import CommandError, UsageError
from mindtrace.jobs.cli.lines import Lines
from mindtrace.jobs.delivery import escaped

_LOGIN: Final = re.compile(r"(?<=://)[^\s'\"]*@")  # up to the last @: a password may have one
_BAR = 24  # characters
_DRAW_EVERY, _LINE_EVERY, _QUIET = 0.1, 5.0, 1.0
_LOOK_EVERY = 0.1
_STYLES: Final = {"bold": "1", "red": "31", "yellow": "33"}


def say(text: str) -> None:
    """A line to stderr: control characters are escaped, and what may be a login in a URL is left out."""
    print(escaped(without_login(text), "\n"), file=sys.stderr, flush=True)


def without_login(text: str) -> str:
    """The text without what may be a login in a URL."""
    return _LOGIN.sub("***@", text)


def result(text: str) -> None:
    """A line of the result, to stdout; control characters are escaped."""
    print(escaped(text, "\n\t"))


def document(value: Any) -> None:
    """The result as one JSON document."""
    print(json.dumps(value, indent=2))  # ASCII, so no control character of a terminal is in it


def json_line(value: Any) -> None:
    """One of many results, as a line of JSON."""
    print(json.dumps(value))


def counted(count: int, what: str) -> str:
    """`1 job`, `1,000 jobs`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def has_terminal(stream: TextIO) -> bool:
    """Whether somebody looks at it who can be shown a moving line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colour(stream: TextIO) -> bool:
    """Whether colours are wanted there: NO_COLOR and FORCE_COLOR decide before the terminal does."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return os.environ["FORCE_COLOR"] != "0"
    return has_terminal(stream)


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """The text in `bold`, `red` or `yellow`, where that is wanted on the stream (stdout)."""
    return f"\033[{_STYLES[style]}m{text}\033[0m" if has_colour(stream or sys.stdout) else text


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header: numbers to the right; cut at the terminal's width, and nowhere else."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(column[0]), *map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [any(isinstance(row[index], int) for row in rows) for index in range(len(header))]
    most = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for number, row in enumerate([list(header), *cells]):
        line = "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        if most is not None and len(line) > most:
            line = line[: max(0, most - 1)] + "…"
        print(styled(line, "bold") if number == 0 else line)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else escaped(str(value))


class Progress:
    """How far a long command is, on stderr: a bar on a terminal, else a line every 5 s or 10 %.

    A thread of its own draws, so that `add` costs an addition, and the line moves while nothing else does.

    Args:
        what: is being done.
        total: how many there are; None where nobody knows.
        unit: of what.
        stream: stderr.
    """

    def __init__(
        self, what: str, total: int | None = None, *, unit: str = "jobs", stream: TextIO | None = None
    ) -> None:
        self.what: str = what
        self.total: int | None = total
        self.done: int = 0
        self._unit, self._stream = unit, stream or sys.stderr
        self._moves = has_terminal(self._stream)
        self._started = self._said_at = time.monotonic()
        self._said_share, self._drawn = 0.0, False
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._started = self._said_at = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._clear()

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count

    def reached(self, done: int, total: int | None = None) -> None:
        """So many are done, in all."""
        self.done = done
        if total is not None:
            self.total = total

    @contextmanager
    def aside(self) -> Generator[None]:
        """Print something else meanwhile: the bar makes room for it."""
        with self._lock:
            self._clear()
            yield
            sys.stdout.flush()

    def text(self) -> str:
        """The line without the bar."""
        done, total, seconds = self.done, self.total, time.monotonic() - self._started
        rate = done / seconds if seconds > 0 else 0.0
        parts = [f"{done:,} {self._unit}" if total is None else f"{done:,} of {total:,} {self._unit}"]
        if self.total:
            parts[0] += f" ({done / self.total:.0%})"
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
        if total and 0 < done < total and rate:
            parts.append(f"{_duration((total - done) / rate)} left")
        return f"{self.what}: {', '.join(parts)}"

    def _show(self) -> None:
        while not self._ended.wait(_DRAW_EVERY if self._moves else _LOOK_EVERY):
            with self._lock:
                if self._moves:
                    self._draw()
                else:
                    self._tell()

    def _draw(self) -> None:
        line, width = self.text(), shutil.get_terminal_size().columns
        if self.total:
            full = min(_BAR, int(_BAR * self.done / self.total))
            line = f"[{'#' * full}{'.' * (_BAR - full)}] {line}"
        self._stream.write(f"\r{line[: max(0, width - 1)]}\033[K")
        self._stream.flush()
        self._drawn = True

    def _tell(self) -> None:
        now = time.monotonic()
        share = self.done / self.total if self.total else 0.0
        since = now - self._said_at
        # What is over within a second needs no line at all, and no second deserves two.
        if since >= _LINE_EVERY or (share - self._said_share >= 0.1 and since >= _QUIET):
            self._said_at, self._said_share = now, share
            print(self.text(), file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write("\r\033[K")
            self._stream.flush()
            self._drawn = False


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


async def confirm(what: str, name: str, *, is_sure: bool) -> None:
    """Nothing, if it may be destroyed: with `--yes`, or by whoever types its name at the terminal.

    Args:
        what: is going to happen, as a sentence.
        name: to be typed.
        is_sure: `--yes` was given.

    Raises:
        UsageError: nobody can be asked.
        CommandError: another name was typed.
    """
    if is_sure:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{what} Nobody can be asked here: say --yes; nothing was done")
    say(f"{what} Type {name} to go on:")
    async for typed in Lines(sys.stdin.fileno()).batches():
        if typed[0][1].decode("utf-8", "replace").strip() == name:
            return
        break
    raise CommandError(f"that is not {name}: nothing was done")


@contextmanager
def logging_to_stderr(verbosity: int) -> Generator[None]:
    """The library's log, on stderr: warnings; with 1 what happens, with 2 all there is."""
    handler, logger = _ToStderr(), logging.getLogger("mindtrace.jobs")
    before = logger.level
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.ERROR and record.name.startswith("mindtrace.jobs.backends."):
            return  # it is raised as well, and told as what ends the command
        say(self.format(record).replace("WARNING", "warning:", 1).replace("INFO ", "", 1))
