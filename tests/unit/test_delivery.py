"""What a failed run leaves behind, and how little of it: `RunError` and `with_error`. And the values of the seam."""

import math
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import Dead, DeadPage, DeadRecord, Delivery, Done, Release, Retry, RunError
from mindtrace.jobs.delivery import MESSAGE_LIMIT, TRACEBACK_LIMIT, DeadFilter, Exchanged, with_error
from mindtrace.jobs.errors import RunAborted, RunFailed, RunTimeout
from mindtrace.jobs.wire import Message

often = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

SECRET = "hunter2"  # noqa: S105 (what no text of ours may quote)
ALL_LIMIT = 32 * 1024
NOW = datetime(2026, 1, 2, tzinfo=UTC)


class Outer:
    class Failed(Exception):
        """An exception inside a class."""


def raised(error: BaseException) -> BaseException:
    """The exception, with the traceback of a frame that holds a secret."""
    password = SECRET
    try:
        if password:
            raise error
    except BaseException as caught:  # also a SystemExit
        return caught
    raise AssertionError


def raised_by(source: str, filename: str) -> BaseException:
    """What running `source`, as the program of that file name, raises."""
    try:
        exec(compile(source, filename, "exec"), {})  # noqa: S102 (a program with a file name of its own)
    except Exception as error:
        return error
    raise AssertionError


def size(text: str) -> int:
    return len(text.encode())


def whole(error: RunError) -> int:
    return size(error.type) + size(error.message) + size(error.traceback)


# --- the type


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ValueError("no"), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (Outer.Failed("no"), f"{__name__}.Outer.Failed"),
        (RunTimeout(5.0), "mindtrace.jobs.errors.RunTimeout"),
        (ExceptionGroup("both", [ValueError()]), "ExceptionGroup"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_is_named_with_its_module_unless_it_is_pythons_own(error: BaseException, name: str) -> None:
    assert RunError.of(error).type == name


# --- the message


def test_a_message_is_the_text_of_the_error() -> None:
    assert RunError.of(ValueError("no such customer: é 😀")).message == "no such customer: é 😀"
    assert RunError.of(ValueError()).message == ""


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
@pytest.mark.parametrize("over", [0, 1, 2, 3, 4, 100_000])
def test_a_message_has_at_most_4_kib_and_no_broken_character(character: str, over: int) -> None:
    text = character * (MESSAGE_LIMIT // size(character)) + "y" * over
    text += "y" * (MESSAGE_LIMIT + over - size(text))
    message = RunError.of(ValueError(text)).message
    assert MESSAGE_LIMIT == 4096
    if over:
        assert MESSAGE_LIMIT - 8 < size(message) <= MESSAGE_LIMIT
        assert message.endswith("…")
        assert text.startswith(message[:-1])
    else:
        assert message == text


CONTROL = ["\n", "\r", "\t", "\0", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\ud800", "\U000e0001"]


@pytest.mark.parametrize("character", CONTROL, ids=ascii)
def test_a_control_character_is_escaped(character: str) -> None:
    """So that no text can forge a line of a log, colour a terminal, or turn the reading direction."""
    message = RunError.of(ValueError(f"before{character}after")).message
    assert message.isprintable()
    assert message.startswith("before\\")
    assert message.endswith("after")
    assert message.encode().decode("unicode_escape") == f"before{character}after"


def test_it_is_escaped_also_where_there_are_no_codecs_any_more() -> None:
    """As when something is logged while the interpreter ends."""
    code = """
import codecs, encodings
from mindtrace.jobs.delivery import escaped
codecs.unregister(encodings.search_function)
print(escaped("before\\nafter"))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("before\\nafter\n", "")


@often
@given(st.text(st.characters(), max_size=400).map(lambda text: text * 30))
@example("\n" * 10_000)
@example("\U000e0001" * 10_000)
@example("\ud800" * 10_000)
def test_whatever_the_text_its_message_is_short_and_printable(text: str) -> None:
    error = RunError.of(ValueError(text))
    assert size(error.message) <= MESSAGE_LIMIT
    assert error.message.isprintable()


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError(SECRET)


class NoText(Exception):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


class Endless(Exception):
    def __str__(self) -> str:
        return str(self)


@pytest.mark.parametrize(
    ("error", "why"), [(Broken(), "RuntimeError"), (NoText(), "TypeError"), (Endless(), "RecursionError")]
)
def test_an_error_whose_text_cannot_be_read_is_an_error_all_the_same(error: Exception, why: str) -> None:
    run_error = RunError.of(raised(error))
    assert run_error.type.endswith(type(error).__name__)
    assert why in run_error.message
    assert SECRET not in run_error.message
    assert "raised" in run_error.traceback


def test_a_class_name_of_any_length_is_kept_short() -> None:
    assert size(RunError.of(type("X" * 100_000, (Exception,), {})()).type) <= MESSAGE_LIMIT


# --- the traceback


def test_a_traceback_shows_the_frames_and_no_locals() -> None:
    error = RunError.of(raised(ValueError("no")))
    assert "in raised\n    raise error\n" in error.traceback
    assert SECRET not in error.traceback
    assert error.traceback == "".join(traceback.format_tb(raised(ValueError("no")).__traceback__))


def test_an_error_that_was_never_raised_has_no_traceback() -> None:
    assert RunError.of(ValueError()).traceback == ""


def chain_of_calls(depth: int) -> str:
    """A program in which functions of different names call each other, so that no frame can be left out as repeated."""
    functions = [f"def f{n}(): f{n + 1}()" for n in range(depth)]
    return "\n".join([*functions, f"def f{depth}(): 1/0", "f0()"])


@pytest.mark.parametrize("name", ["program", "é" * 200, "€" * 200, "😀" * 200])
def test_of_a_long_traceback_the_innermost_frames_are_kept(name: str) -> None:
    error = RunError.of(raised_by(chain_of_calls(600), name))
    assert TRACEBACK_LIMIT == 16384
    assert size(error.traceback) <= TRACEBACK_LIMIT
    assert error.traceback.startswith("…")
    assert error.traceback.endswith("in f600\n")
    assert "in f599\n" in error.traceback
    assert "in f0\n" not in error.traceback


@pytest.mark.parametrize("character", ["\x1b", "\r", "\u2028", "\U000e0001", "\xa0"], ids=ascii)
@pytest.mark.parametrize("length", [1, 100, 3000])
def test_a_traceback_is_escaped_line_by_line_and_short_even_so(character: str, length: int) -> None:
    error = RunError.of(raised_by("1/0", character * length))
    assert all(line.isprintable() for line in error.traceback.split("\n"))
    assert size(error.traceback) <= TRACEBACK_LIMIT
    assert error.traceback.endswith("line 1, in <module>\n")


# --- what is no `Exception`


@pytest.mark.parametrize("cause", [SystemExit("stop it"), GeneratorExit("stop it"), Outer.Failed("stop it")])
def test_an_aborted_run_shows_what_aborted_it(cause: BaseException) -> None:
    end = RunAborted("the run was aborted")
    end.__cause__ = raised(cause)
    error = RunError.of(end)
    assert (error.type.rpartition(".")[2], error.message) == (type(cause).__name__, "stop it")
    assert "in raised\n" in error.traceback


def test_an_aborted_run_without_a_cause_shows_itself() -> None:
    error = RunError.of(RunAborted("the run cancelled itself"))
    assert (error.type, error.message) == ("mindtrace.jobs.errors.RunAborted", "the run cancelled itself")


def test_any_other_error_shows_itself_and_not_its_cause() -> None:
    end = ValueError("outer")
    end.__cause__ = KeyError("inner")
    assert RunError.of(end).message == "outer"


def test_when_and_where_are_not_known_to_an_error() -> None:
    error = RunError.of(ValueError())
    assert (error.started_at, error.ended_at, error.worker) == (None, None, "")


# --- the errors of a job


def an_error(number: int, message: str = "no", trace: str = "frames\n") -> RunError:
    return RunError(f"Error{number}", message, trace, NOW, NOW, f"worker@host:{number}")


def after(errors: list[RunError]) -> tuple[RunError, ...]:
    """What a job carries after these runs failed, one after the other."""
    kept: tuple[RunError, ...] = ()
    for error in errors:
        kept = with_error(kept, error)
    return kept


@pytest.mark.parametrize("runs", [1, 2, 9, 10, 11, 50])
def test_a_job_carries_its_last_ten_errors_oldest_first(runs: int) -> None:
    assert [error.type for error in after([an_error(n) for n in range(runs)])] == [
        f"Error{n}" for n in range(max(0, runs - 10), runs)
    ]


def test_only_the_newest_error_is_kept_in_full() -> None:
    *older, newest = after([an_error(n, "m" * 4096, "t" * 16384) for n in range(3)])
    assert newest == an_error(2, "m" * 4096, "t" * 16384)
    assert [(error.type, error.traceback) for error in older] == [("Error0", ""), ("Error1", "")]
    assert [(e.started_at, e.ended_at, e.worker) for e in older] == [
        (NOW, NOW, "worker@host:0"),
        (NOW, NOW, "worker@host:1"),
    ]


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
def test_an_older_error_keeps_200_characters_whatever_the_language(character: str) -> None:
    fits, cut, _ = after([an_error(0, character * 200), an_error(1, character * 201), an_error(2)])
    assert fits.message == character * 200
    assert len(cut.message) <= 200
    assert cut.message[:190] == character * 190
    assert cut.message.endswith("…")


def test_without_an_error_nothing_changes() -> None:
    errors = after([an_error(n) for n in range(4)])
    assert with_error(errors, None) == errors
    assert with_error([], None) == ()
    assert with_error(list(errors), None) == errors


def test_what_was_passed_in_stays_as_it_was() -> None:
    errors = [an_error(n) for n in range(10)]
    with_error(errors, an_error(10))
    assert errors == [an_error(n) for n in range(10)]


@often
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["x", "é", "€", "😀"]), st.integers(0, 4096), st.integers(0, 16384), st.integers(1, 3000)
        ),
        min_size=1,
        max_size=14,
    )
)
@example([("😀", 1024, 4096, 3000)] * 12)
@example([("x", 4096, 16384, 3000)] * 12)
def test_the_errors_of_a_job_have_at_most_32_kib_in_all(runs: list[tuple[str, int, int, int]]) -> None:
    errors = [
        RunError(
            "Error" * (kind // 5),
            character * min(message, MESSAGE_LIMIT // size(character)),
            character * min(trace, TRACEBACK_LIMIT // size(character)),
        )
        for character, message, trace, kind in runs
    ]
    kept = after(errors)
    assert kept[-1] == errors[-1]
    assert sum(whole(error) for error in kept) <= ALL_LIMIT


def test_where_there_is_too_much_the_oldest_goes_first() -> None:
    def an_error_of(number: int) -> RunError:
        return RunError(f"{number:04}" * 1000, "", "")

    kept = after([an_error_of(number) for number in range(12)])
    assert [error.type[:4] for error in kept] == [f"{n:04}" for n in range(12 - len(kept), 12)]
    assert ALL_LIMIT - 4000 < sum(whole(error) for error in kept) <= ALL_LIMIT


def test_what_another_process_says_of_an_error_is_cut_and_escaped_as_an_error_of_this_one() -> None:
    error = RunError.of(RunFailed("shop.Sold\x1b", "a\nb" + "c" * 10_000, "frames\n" * 10_000, "", ["shop:Sold"]))
    assert (error.type, error.message[:5]) == ("shop.Sold\\x1b", "a\\nbc")
    assert len(error.message.encode()) <= MESSAGE_LIMIT
    assert len(error.traceback.encode()) <= TRACEBACK_LIMIT


# --- the values of the seam


VALUES: list[tuple[type[Any], list[str]]] = [
    (Delivery, ["queue", "message", "attempt", "crashes", "releases", "number", "receipt", "deadline", "lost"]),
    (Done, ["result", "keep", "discarded"]),
    (Retry, ["delay", "reason", "error", "crash"]),
    (Dead, ["reason", "error", "crash"]),
    (Release, ["delay"]),
    (Exchanged, ["settled", "deliveries", "missing"]),
]


@pytest.mark.parametrize(("kind", "names"), VALUES, ids=[kind.__name__ for kind, _ in VALUES])
def test_the_fields_of_the_seam_are_fixed_in_name_and_order(kind: type[Any], names: list[str]) -> None:
    assert [field.name for field in fields(kind)] == names


def a_delivery() -> Delivery:
    return Delivery("jobs", Message("an-id", b"{}"), 1, 0, 0, 1, "receipt", math.inf)


MAKERS: list[Callable[[], Any]] = [
    Done,
    lambda: Retry(1.0),
    lambda: Dead("attempts"),
    Release,
    lambda: Exchanged([], []),
    lambda: RunError("ValueError", "no"),
    lambda: DeadRecord("jobs", Message("an-id", b"{}"), "attempts", 3, 0, 0, 3, NOW),
    lambda: DeadPage([]),
    DeadFilter,
]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: type(make()).__name__)
def test_a_value_does_not_change_and_equals_another_that_says_the_same(make: Callable[[], Any]) -> None:
    value = make()
    assert is_dataclass(value)
    assert value == make()
    assert not hasattr(value, "__dict__")
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, None)


def test_a_settlement_is_plain_unless_it_says_otherwise() -> None:
    assert (Done().result, Done().keep, Done().discarded) == (None, 0.0, None)
    assert (Retry(1.0).reason, Retry(1.0).error, Dead("timeout").error) == ("", None, None)
    assert (Release().delay, Retry(1.0).crash, Dead("timeout").crash) == (0.0, False, False)


def test_a_delivery_is_itself_and_no_other() -> None:
    """The same job handed over twice is two deliveries, which a worker holds apart."""
    one, other = a_delivery(), a_delivery()
    assert one != other
    assert len({one, other}) == 2
    assert one.lost is False
    one.lost = True
    assert not hasattr(one, "__dict__")
