"""What is printed: for a terminal, for a pipe, and with what somebody else wrote in it."""

import io
import sys
import time
from collections.abc import Callable

import pytest

from mindtrace.jobs.cli import output
from mindtrace.jobs.cli.output import Progress

pytestmark = pytest.mark.local


class Stream(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def until(self, found: Callable[[str], object]) -> str:
        """Waits until what was written is so."""
        deadline = time.monotonic() + 10
        while not found(self.getvalue()):
            assert time.monotonic() < deadline, self.getvalue()
            time.sleep(0.01)
        return self.getvalue()


ROWS = (("orders", 1234, None), ("mails\x1b[2J\n", 5, "a text that takes room"))


def test_a_table_is_whole_in_a_pipe_whatever_the_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    output.table(("queue", "jobs", "note"), ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "queue            jobs  note",
        "orders          1,234  -",
        "mails\\x1b[2J\\n      5  a text that takes room",
    ]


def test_a_table_is_cut_at_the_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Stream(is_terminal=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("NO_COLOR", "1")
    output.table(("queue", "jobs", "note"), ROWS)
    assert terminal.getvalue().splitlines() == [
        "queue            jo…",
        "orders          1,2…",
        "mails\\x1b[2J\\n     …",
    ]


@pytest.mark.parametrize(
    ("environment", "is_terminal", "coloured"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
    ids=str,
)
def test_colours_are_for_terminals_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_terminal: bool, coloured: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = output.styled("x", "bold", Stream(is_terminal=is_terminal))
    assert text == ("\033[1mx\033[0m" if coloured else "x")


def test_a_login_in_what_somebody_else_says_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    output.say("no amqp://user:p%40ss@host/x and no redis://:sec/r@t@host; a mail to me@home is shown\x07")
    assert capsys.readouterr().err == "no amqp://***@host/x and no redis://***@host; a mail to me@home is shown\\x07\n"


def test_progress_on_a_terminal_is_a_bar_with_rate_and_time_left_that_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Stream(is_terminal=True)
    with Progress("replay orders", 200, stream=stream) as progress:
        progress.add(50)
        text = stream.until(lambda text: "50 of 200" in text)
        last = text.rpartition("\r")[2]
        assert last.startswith("[######..................] replay orders: 50 of 200 jobs (25%), ")
        assert "/s, " in last
        assert " left" in last
        with progress.aside():
            assert stream.getvalue().endswith("\r\033[K")
        progress.reached(200)
        assert "left" not in stream.until(lambda text: "200 of 200" in text).rpartition("\r")[2]
    assert stream.getvalue().endswith("\r\033[K")


def test_progress_elsewhere_is_a_line_after_a_tenth_and_nothing_for_what_is_over_at_once() -> None:
    stream = Stream(is_terminal=False)
    with Progress("published", 100, stream=stream) as progress:
        progress.add(100)
    assert stream.getvalue() == ""
    with Progress("published", 100, stream=stream) as progress:
        progress.add(9)
        started = time.monotonic()
        while time.monotonic() < started + 1.2:  # no tenth yet: there is nothing to wait for but the time itself
            time.sleep(0.05)
        assert stream.getvalue() == ""
        progress.add(31)
        line = stream.until(lambda text: text.endswith("\n"))
    assert line.startswith("published: 40 of 100 jobs (40%), ")
    assert stream.getvalue() == line


def test_progress_without_a_known_end_has_a_rate_and_no_time_left() -> None:
    progress = Progress("read", unit="dead letters")
    progress.add(1200)
    assert progress.text().startswith("read: 1,200 dead letters, ")
    assert "left" not in progress.text()
