"""The ledger keeps what was written to it, and its invariants hold of every history that may be, and of no other."""

import asyncio
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from mindtrace.jobs import BackendUnavailable, QueueFull, QueueNotFound
from mindtrace.jobs.testing.leaks import LeakGuard
from mindtrace.jobs.testing.ledger import Entry, Ledger, Where, violations


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def told(history: str) -> list[Entry]:
    """Entries from their short form: a step and an id, number, settlement, options; parted by ";"."""
    entries: list[Entry] = []
    for line in filter(None, map(str.strip, re.split(r"[;\n]", history))):
        step, name, *rest = line.split()
        options: dict[str, Any] = {"pid": 1}
        if step == "answer":
            options |= {"number": int(rest.pop(0)), "settled": rest.pop(0), "accepted": True}
        elif step in ("start", "end"):
            options |= {"number": int(rest.pop(0))}
        for word in rest:
            option, _, value = word.partition("=")
            options[option] = {"refused": False, "none": None}[value] if option == "accepted" else int(value)
        entries.append(Entry(cast(Any, step), name, **options))
    return entries


def where(places: str) -> Mapping[str, Where | tuple[Where, ...]]:
    """From `a ready; b dead leased`."""
    ids = [place.split() for place in places.split(";") if place]
    return {name: cast(Any, states[0] if len(states) == 1 else tuple(states)) for name, *states in ids}


PUBLISHED = "intent a; confirmed a;"
RUN = "start a 1; effect a; end a 1; answer a 1 done;"


# --- The file


def test_every_event_is_kept_as_it_was_written_in_its_order(ledger: Ledger) -> None:
    assert ledger.entries() == []
    ledger.intent("a")
    ledger.confirmed("a")
    ledger.refused("b")
    ledger.unknown("c")
    ledger.start("a", 1, attempt=2)
    ledger.start("a", 2)
    ledger.effect("a")
    ledger.end("a", 2)
    ledger.answer("a", 2, True, "done")
    ledger.answer("a", 1, False, "retry")
    ledger.answer("b", 1, None, "release")
    pid = os.getpid()
    assert ledger.entries() == [
        Entry("intent", "a", pid),
        Entry("confirmed", "a", pid),
        Entry("refused", "b", pid),
        Entry("unknown", "c", pid),
        Entry("start", "a", pid, number=1, attempt=2),
        Entry("start", "a", pid, number=2),
        Entry("effect", "a", pid),
        Entry("end", "a", pid, number=2),
        Entry("answer", "a", pid, number=2, accepted=True, settled="done"),
        Entry("answer", "a", pid, number=1, accepted=False, settled="retry"),
        Entry("answer", "b", pid, number=1, settled="release"),
    ]


def test_an_id_may_hold_anything(ledger: Ledger) -> None:
    ids = ['{"step": "intent"}', "a\nb", "ü\ud800", ""]
    for job_id in ids:
        ledger.intent(job_id)
    assert [entry.id for entry in ledger.entries()] == ids


def test_a_ledger_holds_nothing_open_and_can_be_handed_to_another_process(ledger: Ledger) -> None:
    with LeakGuard(within=0.1):
        ledger.intent("a")
        pickle.loads(pickle.dumps(ledger)).confirmed("a")  # noqa: S301 - our own
        assert [entry.step for entry in ledger.entries()] == ["intent", "confirmed"]


@pytest.mark.parametrize("path", [str, Path], ids=["text", "path"])
def test_another_ledger_of_the_same_path_continues_the_file(tmp_path: Path, path: type[str] | type[Path]) -> None:
    Ledger(path(tmp_path / "ledger")).intent("a")
    Ledger(path(tmp_path / "ledger")).confirmed("a")
    assert [entry.step for entry in Ledger(tmp_path / "ledger").entries()] == ["intent", "confirmed"]


def test_several_processes_can_write_to_one_file_and_be_killed_at_it(ledger: Ledger) -> None:
    program = (
        "import sys\n"
        "from mindtrace.jobs.testing.ledger import Ledger\n"
        "for number in range(1, 1_000_000):\n"
        "    Ledger(sys.argv[1]).start(sys.argv[2], number)\n"
    )
    writers = {
        name: subprocess.Popen([sys.executable, "-c", program, str(ledger.path), name]) for name in ("a", "b" * 3000)
    }
    try:
        while len({entry.id for entry in ledger.entries()}) < 2 or len(ledger.entries()) < 500:
            assert all(writer.poll() is None for writer in writers.values())
    finally:
        for writer in writers.values():
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    for name, writer in writers.items():
        entries = [entry for entry in ledger.entries() if entry.id == name]
        assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
        assert {entry.pid for entry in entries} == {writer.pid}


def test_a_line_that_was_never_finished_is_left_out_and_those_around_it_are_whole(ledger: Ledger) -> None:
    ledger.intent("a")
    whole = ledger.path.read_bytes()
    for size in range(len(whole)):
        ledger.path.write_bytes(whole + whole[:size])
        assert [entry.id for entry in ledger.entries()] == ["a"]
        ledger.confirmed("b")  # by another, who knows nothing of it
        entries = ledger.entries()
        assert [entry.id for entry in entries if entry.step == "confirmed"] == ["b"]
        assert len(entries) == 2


@pytest.mark.parametrize(
    "line", [b"no json", b'{"step": "intent"}', b'{"step": "intent", "id": "a", "pid": 1, "x": 1}']
)
def test_a_line_that_is_no_entry_is_an_error_that_names_it(ledger: Ledger, line: bytes) -> None:
    ledger.intent("a")
    with ledger.path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match="ledger, line 2 is no entry"):
        ledger.entries()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "confirmed"),
        (QueueNotFound(queue="jobs"), "refused"),
        (BackendUnavailable("not sent"), "refused"),
        (BackendUnavailable("sent", maybe_published=True), "unknown"),
        (asyncio.CancelledError(), "unknown"),
        (ValueError("of whom nothing is known"), "unknown"),
    ],
    ids=lambda case: case if isinstance(case, str) else type(case).__name__,
)
def test_a_publish_writes_its_intent_and_then_what_became_of_it(
    ledger: Ledger, error: BaseException | None, outcome: str
) -> None:
    def publish() -> None:
        with ledger.publishing("a"):
            assert [entry.step for entry in ledger.entries()] == ["intent"]
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            publish()
    else:
        publish()
    assert [(entry.step, entry.id) for entry in ledger.entries()] == [("intent", "a"), (outcome, "a")]


def test_a_run_and_a_fault_have_a_beginning_and_an_end_however_they_end(ledger: Ledger) -> None:
    def block() -> None:
        with ledger.fault("the line is cut"), ledger.running("a", 3, attempt=2):
            raise LookupError

    with pytest.raises(LookupError):
        block()
    pid = os.getpid()
    assert ledger.entries() == [
        Entry("fault", "the line is cut", pid),
        Entry("start", "a", pid, number=3, attempt=2),
        Entry("end", "a", pid, number=3),
        Entry("over", "the line is cut", pid),
    ]


# --- The invariants


HOLDS = {
    "nothing happened": ("", ""),
    "published and run": (PUBLISHED + RUN, ""),
    "published and not yet run": (PUBLISHED, "a ready"),
    "published for later": (PUBLISHED, "a scheduled"),
    "the effect is there, the answer never came": (PUBLISHED + "start a 1; effect a; end a 1", ""),
    "retried, and then done": (
        PUBLISHED + "start a 1 attempt=1; end a 1; answer a 1 retry; start a 2 attempt=2; effect a; answer a 2 done",
        "",
    ),
    "retried, and its answer is written late": (
        PUBLISHED + "start a 1; end a 1; start a 2; answer a 1 retry; end a 2; effect a; answer a 2 done",
        "",
    ),
    "retried, and its answer is written while the next worker is killed": (
        PUBLISHED + "start a 1; end a 1; start a 2; answer a 1 retry; fault kill; over kill; start a 3; effect a",
        "",
    ),
    "retried until it died": (
        PUBLISHED + "start a 1; end a 1; answer a 1 retry; start a 2; end a 2; answer a 2 dead",
        "a dead",
    ),
    "released, which is no attempt": (
        PUBLISHED + "start a 1 attempt=1; end a 1; answer a 1 release; start a 2 attempt=1; effect a; answer a 2 done",
        "",
    ),
    "delivered, released before it began, run": (
        PUBLISHED + "answer a 1 release; start a 2 attempt=1; effect a; answer a 2 done",
        "",
    ),
    "its worker was killed, another runs it": (
        PUBLISHED + "start a 1 attempt=1; fault kill; over kill; start a 2 attempt=2; effect a; answer a 2 done",
        "",
    ),
    "its worker was killed before it began": (
        PUBLISHED + "fault kill; over kill; start a 2 attempt=2; effect a; answer a 2 done",
        "",
    ),
    "it kills its worker, which never writes that it is over": (
        PUBLISHED + "start a 1; fault abort pid=1; start a 2; fault abort pid=2; start a 3; effect a; answer a 3 done",
        "",
    ),
    "it began while something was broken": (
        PUBLISHED + "fault cut; start a 1; over cut; start a 2; effect a; answer a 2 done",
        "",
    ),
    "the answer was lost, and it runs once more": (
        PUBLISHED
        + "start a 1; effect a; end a 1; fault cut; answer a 1 done accepted=none; over cut; start a 2; effect a",
        "a ready",
    ),
    "its worker stood still, another ran it, its own answer is refused": (
        PUBLISHED
        + "start a 1; fault stop; start a 2; effect a; end a 2; answer a 2 done; over stop; effect a; end a 1;"
        "answer a 1 done accepted=refused",
        "",
    ),
    "its worker stood still before the start, which so comes second": (
        PUBLISHED + "fault stop; start a 2; effect a; answer a 2 done; over stop; start a 1; end a 1",
        "",
    ),
    "unknown, and wholly there": ("intent a; unknown a", "a ready"),
    "unknown, and wholly absent": ("intent a; unknown a", ""),
    "unknown, and run": ("intent a; unknown a;" + RUN, ""),
    "the publisher was killed, nobody knows": ("intent a", ""),
    "refused": ("intent a; refused a", ""),
    "refused, published again and run": ("intent a; refused a;" + PUBLISHED + RUN, ""),
    "refused at first, and nobody knows of the second": ("intent a; refused a; intent a", "a ready"),
    "unknown, and then refused": ("intent a; unknown a; intent a; refused a", "a ready"),
}


@pytest.mark.parametrize(("history", "places"), HOLDS.values(), ids=HOLDS)
def test_nothing_is_found_in_a_history_that_may_be(history: str, places: str) -> None:
    assert violations(told(history), where(places)) == []


FOUND = {
    "L1, lost": (PUBLISHED, "", ["L1: a was confirmed and is lost: it had no effect, and the broker does not have it"]),
    "L1, lost in its run": (PUBLISHED + "start a 1; end a 1", "", ["L1: a was confirmed and is lost"]),
    "L1, done without an effect": (
        PUBLISHED + "start a 1; end a 1; answer a 1 done",
        "",
        ["L1: a was confirmed and is l"],
    ),
    "L1, in two places": (PUBLISHED, "a ready dead", ["L1: a is in 2 places: ready and dead"]),
    "L1, twice in one": (PUBLISHED, "a ready ready", ["L1: a is in 2 places: ready and ready"]),
    "L1, done and ready": (PUBLISHED + RUN, "a ready", ["L1: a is done, and ready all the same"]),
    "L1, done and dead": (PUBLISHED + RUN, "a dead", ["L1: a is done, and dead all the same"]),
    "L2, started": ("intent a; refused a; start a 1", "", ["L2: a was refused, and started (number 1)"]),
    "L2, there": ("intent a; refused a", "a scheduled", ["L2: a was refused, and is scheduled"]),
    "L2, had an effect": ("intent a; refused a; effect a", "", ["L2: a was refused, and had an effect"]),
    "L3, begun and gone": ("intent a; unknown a; start a 1; end a 1", "", ["L3: a was begun and is lost"]),
    "L3, of a killed publisher": ("intent a; start a 1", "", ["L3: a was begun and is lost"]),
    "L3, in two places": ("intent a; unknown a", "a ready scheduled", ["L3: a is in 2 places: ready and scheduled"]),
    "L3, done and ready": ("intent a; unknown a;" + RUN, "a ready", ["L3: a is done, and ready all the same"]),
    "L4, an effect": ("effect a", "", ["L4: nobody intended a, and it had an effect"]),
    "L4, started": ("start a 1; end a 1", "", ["L4: nobody intended a, and it started (number 1)"]),
    "L4, there": ("", "a ready", ["L4: nobody intended a, and it is ready"]),
    "L5, a number twice": (
        PUBLISHED + "start a 1; fault kill; over kill; start a 1; effect a",
        "",
        ["L5: a started twice as number 1"],
    ),
    "L5, a number falls": (
        PUBLISHED + "start a 2; answer a 2 retry; start a 1; effect a",
        "",
        ["L5: a started as number 1 after number 2"],
    ),
    "L5, a receipt is good once": (
        PUBLISHED + RUN + "answer a 1 retry",
        "",
        ["L5: two settlements of a, number 1, were accepted"],
    ),
    "L5, done and started again": (
        PUBLISHED + "start a 1; fault stop; over stop; start a 2; effect a; answer a 1 done",
        "",
        ["L5: done was accepted for a, number 1, which started as number 2"],
    ),
    "L5, an older settlement was accepted": (
        PUBLISHED + "start a 1; fault stop; over stop; start a 2; effect a; end a 1; answer a 1 retry",
        "a ready",
        ["L5: retry was accepted for a, number 1, which started as number 2"],
    ),
    "L6, again without a fault": (
        PUBLISHED + "start a 1; effect a; start a 2",
        "",
        ["L6: a ran 1 times more than it was asked to, and was in flight at 0 faults"],
    ),
    "L6, twice for one fault": (
        PUBLISHED + "start a 1; fault kill; over kill; start a 2; start a 3; effect a",
        "",
        ["L6: a ran 2 times more than it was asked to, and was in flight at 1 faults"],
    ),
    "L6, before the fault": (
        PUBLISHED + "start a 1; start a 2; effect a; fault kill; over kill; start a 3",
        "",
        ["L6: a ran 1 times more than it was asked to, and was in flight at 0 faults"],
    ),
    "L6, the fault was before the run": (
        PUBLISHED + "fault kill; over kill; start a 1; effect a; start a 2",
        "",
        ["L6: a ran 1 times more than it was asked to, and was in flight at 0 faults"],
    ),
    "L6, the fault was after the answer": (
        PUBLISHED + "start a 1; answer a 1 retry; fault kill; over kill; start a 2; effect a; start a 3",
        "",
        ["L6: a ran 1 times more than it was asked to, and was in flight at 0 faults"],
    ),
    "L6, it was not in flight any more": (
        PUBLISHED + "start a 1; fault kill; over kill; start a 2; answer a 2 retry; fault kill; over kill;"
        "start a 3; effect a; start a 4",
        "",
        ["L6: a ran 2 times more than it was asked to, and was in flight at 1 faults"],
    ),
    "L6, another was in flight": (
        PUBLISHED + "intent b; confirmed b; start b 1; fault kill; over kill; effect b; start a 1; effect a; start a 2",
        "",
        ["L6: a ran 1 times more than it was asked to, and was in flight at 0 faults"],
    ),
    "L6, the answer of a run that was asked again is not one of another": (
        PUBLISHED + "start a 1; start a 2; effect a; answer a 2 retry",
        "a ready",
        ["L6: a ran 1 times more than it was asked to, and was in flight at 0 faults"],
    ),
    "L7, a start was not counted": (
        PUBLISHED + "start a 1 attempt=1; answer a 1 retry; start a 2 attempt=1; effect a",
        "",
        ["L7: a, number 2, was told attempt 1 at start 2 that counts, after 0 faults"],
    ),
    "L7, a release was counted": (
        PUBLISHED + "start a 1 attempt=1; answer a 1 release; start a 2 attempt=2; effect a",
        "",
        ["L7: a, number 2, was told attempt 2 at start 1 that counts, after 0 faults"],
    ),
    "L7, more than the fault explains": (
        PUBLISHED + "fault kill; over kill; start a 1 attempt=3; effect a",
        "",
        ["L7: a, number 1, was told attempt 3 at start 1 that counts, after 1 faults"],
    ),
    "L8": (PUBLISHED, "a leased", ["L8: a is still leased"]),
    "several": (
        PUBLISHED + "intent b; confirmed b; effect c",
        "a leased ready",
        [
            "L1: a is in 2 places: leased and ready",
            "L8: a is still leased",
            "L1: b was confirmed",
            "L4: nobody intended c",
        ],
    ),
}


@pytest.mark.parametrize(("history", "places", "found"), FOUND.values(), ids=FOUND)
def test_what_may_not_be_is_found(history: str, places: str, found: list[str]) -> None:
    got = violations(told(history), where(places))
    assert [line[: len(start)] for line, start in zip(got, found, strict=True)] == found


@pytest.mark.parametrize(
    ("history", "places"),
    [
        (PUBLISHED + "start a 1; fault kill; over kill; start a 1; effect a; answer a 1 done; answer a 1 done", ""),
        (
            PUBLISHED + "start a 1; fault kill; over kill; start a 2; effect a; answer a 2 done; answer a 1 done",
            "a ready",
        ),
        ("intent a; fault cut; over cut; confirmed a;" + RUN, "a ready"),
        ("intent a; fault cut; over cut; confirmed a;" + RUN + "start a 1; effect a; answer a 1 done", ""),
        (PUBLISHED + "start a 1; fault kill; over kill; start a 2; effect a", "a ready dead"),
    ],
)
def test_a_broker_without_fences_may_have_copies_of_what_was_in_flight_at_a_fault(history: str, places: str) -> None:
    assert violations(told(history), where(places), fenced=False) == []
    assert violations(told(history), where(places)) != []


@pytest.mark.parametrize(
    ("history", "places", "found"),
    [
        (PUBLISHED + RUN, "a ready", "L1: a is done, and ready all the same"),
        (PUBLISHED, "a ready ready", "L1: a is in 2 places"),
        (PUBLISHED + "fault kill; over kill;", "a ready ready", "L1: a is in 2 places"),
        (PUBLISHED + RUN + "start a 1; effect a", "", "L6: a ran 1 times more"),
    ],
)
def test_without_a_fault_it_may_not(history: str, places: str, found: str) -> None:
    [got] = violations(told(history), where(places), fenced=False)
    assert got.startswith(found)


def test_the_ledger_of_a_real_run_is_judged_by_what_was_written(ledger: Ledger) -> None:
    with ledger.publishing("a"):
        pass
    with pytest.raises(QueueFull), ledger.publishing("b"):
        raise QueueFull(queue="jobs", limit=1)
    with ledger.fault("the worker is killed"):
        ledger.start("a", 1, attempt=1)
    with ledger.running("a", 2, attempt=2):
        ledger.effect("a")
    ledger.answer("a", 2, True, "done")
    assert violations(ledger.entries(), {}) == []
    assert violations(ledger.entries(), {"b": "ready"}) == ["L2: b was refused, and is ready"]
