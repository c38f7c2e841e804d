"""What was asked for and what was done, written down where no broker can lose it, and compared at the end.

    ledger = Ledger(tmp_path / "ledger")

    with ledger.publishing(job.id):                        # by each publisher
        await orchestrator.publish("jobs", job)

    async def run(self, job_dict):                         # by the job itself
        with ledger.running(job_dict["id"], current_job().number):
            ...
            ledger.effect(job_dict["id"])

    ledger.answer(job_id, number, True, "done")            # by a listener, or whoever settles
    with ledger.fault("SIGKILL to the broker"):            # by whoever breaks something
        broker.kill()

    assert violations(ledger.entries(), where) == []       # once all is quiet: where each id is in the broker now

Any number of processes may write to one file, and any of them may be killed at it.
"""

import json
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

__all__ = ["Entry", "Ledger", "SettledAs", "Step", "Where", "violations"]

_BEGIN = b'{"step"'  # with which each line begins, and which stands nowhere else in it: in a text it has backslashes

Step: TypeAlias = Literal[
    "intent", "confirmed", "refused", "unknown", "start", "effect", "end", "answer", "fault", "over"
]
"""What happened.

`intent`: about to publish. `confirmed`, `refused`, `unknown`: what became of that: stored, not stored, perhaps stored.
`start`, `effect`, `end`: of a run, by the job. `answer`: to a settlement. `fault`, `over`: something is broken, and no
longer is.
"""

SettledAs: TypeAlias = Literal["done", "retry", "dead", "release"]
"""How a delivery was to end."""

Where: TypeAlias = Literal["scheduled", "ready", "leased", "dead"]
"""Where a broker has a job that is not done."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line.

    Attributes:
        step: what happened.
        id: of the job; of a fault, what is broken.
        pid: the process that wrote it.
        number: of the delivery, where there is one.
        attempt: of a start: what the broker says that it is, `delivery.attempt`; None: not told.
        accepted: of an answer; None: there was none.
        settled: of an answer: the settlement that it is about.
    """

    step: Step
    id: str
    pid: int
    number: int | None = None
    attempt: int | None = None
    accepted: bool | None = None
    settled: SettledAs | None = None


class Ledger:
    """A file that is only ever appended to, a line at a time. Nothing is kept open: it may be pickled and forked.

    Args:
        path: the file, which need not be there. Its directory has to be.
    """

    def __init__(self, path: Path | str) -> None:
        self.path: Path = Path(path)

    def intent(self, job_id: str) -> None:
        """This id is about to be published. One for each attempt to."""
        self._write("intent", job_id)

    def confirmed(self, job_id: str) -> None:
        """The publish returned."""
        self._write("confirmed", job_id)

    def refused(self, job_id: str) -> None:
        """The publish raised, and said that nothing was stored."""
        self._write("refused", job_id)

    def unknown(self, job_id: str) -> None:
        """The publish raised, and nobody knows. That is also true of an intent that nothing follows."""
        self._write("unknown", job_id)

    def start(self, job_id: str, number: int, *, attempt: int | None = None) -> None:
        """A run begins, of this delivery of the id."""
        self._write("start", job_id, number=number, attempt=attempt)

    def effect(self, job_id: str) -> None:
        """The run did what it is there for."""
        self._write("effect", job_id)

    def end(self, job_id: str, number: int) -> None:
        """The run ends, however it does. It is settled only afterwards."""
        self._write("end", job_id, number=number)

    def answer(self, job_id: str, number: int, accepted: bool | None, settled: SettledAs) -> None:
        """A settlement was accepted, or refused since the lease was lost, or (None) got no answer."""
        self._write("answer", job_id, number=number, accepted=accepted, settled=settled)

    @contextmanager
    def publishing(self, job_id: str) -> Generator[None]:
        """The intent before the block and the outcome after it, by the `outcome` of what the block raises."""
        self.intent(job_id)
        try:
            yield
        except BaseException as error:
            (self.refused if getattr(error, "outcome", None) == "not_done" else self.unknown)(job_id)
            raise
        self.confirmed(job_id)

    @contextmanager
    def running(self, job_id: str, number: int, *, attempt: int | None = None) -> Generator[None]:
        """The start before the block, and the end after it."""
        self.start(job_id, number, attempt=attempt)
        try:
            yield
        finally:
            self.end(job_id, number)

    @contextmanager
    def fault(self, what: str) -> Generator[None]:
        """Something is broken in this block. Jobs that are in flight at any time of it may run once more for it.

        A process that the fault ends, and that so never leaves the block, leaves a fault of that one moment.
        """
        self._write("fault", what)
        try:
            yield
        finally:
            self._write("over", what)

    def entries(self) -> list[Entry]:
        """All lines so far. One whose writer was killed before it was finished is left out.

        Raises:
            ValueError: another line is no entry.
        """
        text = self.path.read_bytes() if self.path.exists() else b""
        lines = text.split(b"\n")[:-1]  # after the last end of a line comes nothing, or what was never finished
        return [_entry(self.path, at, line) for at, line in enumerate(lines, 1)]

    def _write(
        self,
        step: Step,
        what: str,
        *,
        number: int | None = None,
        attempt: int | None = None,
        accepted: bool | None = None,
        settled: SettledAs | None = None,
    ) -> None:
        entry = Entry(step, what, os.getpid(), number, attempt, accepted, settled)
        told = {name: value for name, value in asdict(entry).items() if value is not None}
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # One call, so that no other process can write in between, and nothing is in a buffer of ours.
            os.write(file, json.dumps(told).encode() + b"\n")
        finally:
            os.close(file)


def _entry(path: Path, at: int, line: bytes) -> Entry:
    try:
        # From its last beginning: what stands before that was never finished, and another process went on after it.
        return Entry(**json.loads(line[max(0, line.rfind(_BEGIN)) :]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, line {at} is no entry of a ledger: {line!r}") from error


# The invariants. Instants are places in the file: the order in which processes came to write.


@dataclass
class _Run:
    """One start."""

    at: int
    number: int
    attempt: int | None
    until: float = math.inf  # in flight up to here: settled, or begun again


@dataclass
class _Story:
    """All that the ledger says of one id, and where the broker has it."""

    id: str
    intents: list[int] = field(default_factory=list[int])
    outcomes: list[tuple[int, Step]] = field(default_factory=list[tuple[int, Step]])
    runs: list[_Run] = field(default_factory=list[_Run])
    ends: dict[int, int] = field(default_factory=dict[int, int])  # by number
    accepted: list[tuple[int, SettledAs]] = field(default_factory=list[tuple[int, SettledAs]])  # number, settlement
    effects: int = 0
    states: list[str] = field(default_factory=list[str])
    faults: list[int] = field(default_factory=list[int])  # one for each time that it was in flight at one

    def add(self, at: int, entry: Entry) -> None:
        number = entry.number or 0
        match entry.step:
            case "intent":
                self.intents.append(at)
            case "confirmed" | "refused" | "unknown":
                self.outcomes.append((at, entry.step))
            case "start":
                if self.runs:
                    self.runs[-1].until = min(at, self.runs[-1].until)
                self.runs.append(_Run(at, number, entry.attempt))
            case "effect":
                self.effects += 1
            case "end":
                self.ends[number] = at
            case "answer" if entry.accepted and entry.settled:
                self.accepted.append((number, entry.settled))
                for run in self.runs:
                    if run.number == number:
                        run.until = min(at, run.until)
            case _:
                pass

    def suffer(self, faults: Sequence[tuple[int, int]]) -> None:
        """Note at which faults, each from here to there, it was in flight: being published, or run."""
        published = [at for at, _ in self.outcomes] + [math.inf] * len(self.intents)
        publishing = list(zip(self.intents, published, strict=False))
        running = [(run.at, run.until) for run in self.runs]
        for began, over in faults:
            for flights in (publishing, running):
                self.faults += [began] * any(begin < over and began < end for begin, end in flights)

    def outcome(self) -> Step:
        """Confirmed if ever it was; refused if it always was; else nobody knows."""
        steps = [step for _, step in self.outcomes]
        if "confirmed" in steps:
            return "confirmed"
        return "refused" if steps.count("refused") == len(self.intents) > 0 else "unknown"

    def asked_again(self, number: int) -> bool:
        """Whether that delivery was settled so that another follows."""
        return any(number == given and settled in ("retry", "release") for given, settled in self.accepted)


def violations(
    entries: Sequence[Entry], where: Mapping[str, Where | tuple[Where, ...]], *, fenced: bool = True
) -> list[str]:
    """What does not hold, in words, of the invariants L1 to L8; empty: they all do.

    To be asked when all is quiet: nobody publishes or runs any more, and the longest lease ended a second ago.
    Commands of a person are not in the ledger: whoever cleans, purges, deletes or replays leaves those ids out.

    - L1: every confirmed id had an effect, or is dead, scheduled, ready or leased: in one state, and in none when done.
    - L2: no refused id ever starts, or is there.
    - L3: an unknown id is wholly there or wholly absent: begun, it is held to what L1 says.
    - L4: nothing starts, has an effect or is there that nobody intended.
    - L5: numbers rise with each start of an id, and no older delivery's settlement was accepted, and none twice.
    - L6: an id runs again only as its settlements ask for, and once more for each fault at which it was in flight: in a
      publish with no outcome yet, or in a run with no accepted answer yet. Without faults, never.
    - L7: the attempt that a start was told is the number of starts seen, but for those that were released. Each fault
      so far may have made it one more or less: a delivery was lost before its start, an answer before it came.
    - L8: nothing is leased.

    Args:
        entries: of the ledger, in its order.
        where: the state of each id that the broker has; several where it has it in several places.
        fenced: False for a broker that neither fences nor knows an id again, as its traits say: L5 is not asked, and an
            id that was in flight at a fault may be in several places, though one copy of it is done.
    """
    stories: dict[str, _Story] = {}
    faults: list[tuple[int, int]] = []
    broken: dict[tuple[str, int], int] = {}  # by what and who: where in `faults`
    for at, entry in enumerate(entries):
        if entry.step == "fault":
            broken[entry.id, entry.pid] = len(faults)
            faults.append((at, at))
        elif entry.step == "over":
            if (place := broken.pop((entry.id, entry.pid), None)) is not None:
                faults[place] = (faults[place][0], at)
        else:
            stories.setdefault(entry.id, _Story(entry.id)).add(at, entry)
    for job_id, states in where.items():
        stories.setdefault(job_id, _Story(job_id)).states += states if isinstance(states, tuple) else (states,)
    found: list[str] = []
    for story in stories.values():
        story.suffer(faults)
        found += _kept(story, fenced)
        found += _published(story)
        found += _in_order(story, faults) if fenced else ()
        found += _run_again(story)
        found += _attempts(story, faults)
        found += [f"L8: {story.id} is still leased"] * ("leased" in story.states)
    return found


def _kept(story: _Story, fenced: bool) -> Iterator[str]:
    """L1, and L3, which asks the same of an unknown id that has begun."""
    outcome, states = story.outcome(), " and ".join(story.states)
    if outcome == "refused" or not story.intents:
        return
    law = "L1" if outcome == "confirmed" else "L3"
    if not story.effects and not states:
        if outcome == "confirmed":
            yield f"L1: {story.id} was confirmed and is lost: it had no effect, and the broker does not have it"
        elif story.runs:
            yield f"L3: {story.id} was begun and is lost: it had no effect, and the broker does not have it"
    if fenced or not story.faults:
        if len(story.states) > 1:
            yield f"{law}: {story.id} is in {len(story.states)} places: {states}"
        if states and any(settled == "done" for _, settled in story.accepted):
            yield f"{law}: {story.id} is done, and {states} all the same"


def _published(story: _Story) -> Iterator[str]:
    """L2 and L4."""
    if story.intents and story.outcome() != "refused":
        return
    why = "L2: {} was refused, and" if story.intents else "L4: nobody intended {}, and it"
    for number, did in [
        (len(story.runs), f"started (number {', '.join(str(run.number) for run in story.runs)})"),
        (story.effects, "had an effect"),
        (len(story.states), f"is {' and '.join(story.states)}"),
    ]:
        if number:
            yield f"{why.format(story.id)} {did}"


def _in_order(story: _Story, faults: Sequence[tuple[int, int]]) -> Iterator[str]:
    """L5."""
    highest = 0
    numbers: set[int] = set()
    for run in story.runs:
        if run.number in numbers:
            yield f"L5: {story.id} started twice as number {run.number}"
        elif run.number < highest and not any(began < run.at for began, _ in faults):
            # After a fault it may be one that stood still between its delivery and its start.
            yield f"L5: {story.id} started as number {run.number} after number {highest}"
        numbers.add(run.number)
        highest = max(highest, run.number)
    taken = [number for number, _ in story.accepted]
    for number in sorted({number for number in taken if taken.count(number) > 1}):
        yield f"L5: two settlements of {story.id}, number {number}, were accepted"
    for number, settled in story.accepted:
        # Only what is written before a settlement is sent was surely there before it: hence the end, not the answer.
        sent = -1 if settled == "done" else story.ends.get(number, -1)
        later = [run.number for run in story.runs if run.number > number and (settled == "done" or run.at < sent)]
        if later:
            yield f"L5: {settled} was accepted for {story.id}, number {number}, which started as number {max(later)}"


def _run_again(story: _Story) -> Iterator[str]:
    """L6."""
    extra = [
        run.at for before, run in zip(story.runs, story.runs[1:], strict=False) if not story.asked_again(before.number)
    ]
    for count, at in enumerate(extra, 1):
        faults = sum(began < at for began in story.faults)
        if count > faults:
            yield f"L6: {story.id} ran {count} times more than it was asked to, and was in flight at {faults} faults"
            return


def _attempts(story: _Story, faults: Sequence[tuple[int, int]]) -> Iterator[str]:
    """L7."""
    released = {number for number, settled in story.accepted if settled == "release"}
    for run in story.runs:
        if run.attempt is None:
            continue
        seen = 1 + sum(other.number < run.number and other.number not in released for other in story.runs)
        so_far = sum(began < run.at for began, _ in faults)
        if abs(run.attempt - seen) > so_far:
            told = f"L7: {story.id}, number {run.number}, was told attempt {run.attempt}"
            yield f"{told} at start {seen} that counts, after {so_far} faults"
