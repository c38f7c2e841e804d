"""What a backend is: `Backend` moves jobs, a `Receiver` hands them out under lease and settles them.

Mechanism only. What becomes of a job is decided above (`policy`), and travels down as a `Settlement`.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from mindtrace.jobs.delivery import (
    DeadFilter,
    DeadPage,
    DeadRecord,
    Delivery,
    Exchanged,
    Published,
    Settled,
    Settlement,
)
from mindtrace.jobs.errors import BackendUnavailable, Closed, ConfigError, ForkedProcess, QueueNotFound
from mindtrace.jobs.job import JobId, checked_queue_name
from mindtrace.jobs.wire import Message

BATCH = 500
"""The most messages that one call to a broker carries; longer sequences are split."""
DEAD_LETTERS_MANY = 10_000
"""So many dead letters in a queue are worth a warning: somebody should look."""


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A queue as it is declared.

    Attributes:
        name: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
        kind: `fifo`: oldest first; `priority`: highest first, oldest first within one; `stack`: newest first.
        priority_levels: n allows the priorities 0 to n, on every backend; None all that the backend has.
        max_length: the most ready and scheduled jobs; a publish beyond it is `QueueFull`. None: no limit.

    Raises:
        ConfigError: a value is out of its range.
    """

    name: str
    kind: Literal["fifo", "priority", "stack"] = "fifo"
    priority_levels: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        checked_queue_name(self.name)
        if self.kind not in ("fifo", "priority", "stack"):
            raise ConfigError(f"kind={self.kind!r}: 'fifo', 'priority' or 'stack'")
        if self.priority_levels is not None:
            if self.kind != "priority":
                raise ConfigError(f"priority_levels={self.priority_levels} on a {self.kind} queue: kind='priority'")
            _positive("priority_levels", self.priority_levels)
        if self.max_length is not None:
            _positive("max_length", self.max_length)

    def differences(self, asked: "QueueSpec") -> dict[str, tuple[object, object]]:
        """Property -> (what it is here, what was asked for), for `QueueMismatch`; the name aside."""
        names = ("kind", "priority_levels", "max_length")
        both = {name: (getattr(self, name), getattr(asked, name)) for name in names}
        return {name: (here, there) for name, (here, there) in both.items() if here != there}


@dataclass(frozen=True, slots=True)
class Depth:
    """How many jobs a queue holds, by state. None: this broker cannot know.

    Attributes:
        ready: could be received now, due and collectable ones included.
        scheduled: due later.
        leased: with a receiver.
        dead: in the dead letters.
    """

    ready: int
    scheduled: int | None
    leased: int | None
    dead: int


@dataclass(frozen=True, slots=True)
class Traits:
    """Where brokers differ.

    Attributes:
        name: of the backend.
        durability: what a publish that returned survives.
        priorities: lowest, highest.
        stack: whether stacks can be declared.
        lease_clock: leases end by a clock; False: the lease is the connection, extending is a local check.
        deduplicates: a known id is stored once.
        fences: a stale settlement is refused by the broker, and `number` never repeats.
        keeps_place: `Release` and a lost lease return a job to its old place.
        atomic_batch: of a batch (of up to 500) all that can be stored is stored in one step; in a full queue nothing.
        lookup: jobs can be looked up by id.
        exact_depth: `depth` knows scheduled and leased jobs too, all at one instant.
        lists_queues: `queues` gives all of the namespace; False: those that this process has declared or attached to.
        run_limit: seconds after which the broker, unless it is set up otherwise, takes a job away from a run that goes
            on, and gives it to another; None: never.
    """

    name: str
    durability: Literal["unknown", "memory", "os", "disk", "everysec", "always", "quorum"]
    priorities: tuple[int, int]
    stack: bool
    lease_clock: bool
    deduplicates: bool
    fences: bool
    keeps_place: bool
    atomic_batch: bool
    lookup: bool
    exact_depth: bool
    lists_queues: bool
    run_limit: float | None


@dataclass(frozen=True, slots=True)
class Outages:
    """Those that are over.

    Attributes:
        count: how often the connection was lost, and is there again.
        seconds: how long it was away, all of them together.
    """

    count: int = 0
    seconds: float = 0.0


NO_OUTAGES: Final = Outages()


class Receiver(Protocol):
    """Hands out deliveries of its queues and settles them.

    Used from the loop that entered it, except `extend`, `keeper_idle_for`, `is_away` and `outages`: they from any
    thread.
    """

    async def exchange(
        self, pairs: Sequence[tuple[Delivery, Settlement]], limit: int, *, wait: float = 0.0
    ) -> Exchanged:
        """Settle, then take up to `limit` (0: only settle), in one round trip for each queue touched.

        Waits up to `wait` seconds only if `pairs` is empty and nothing was ready; `nudge` ends the wait. One at a time.
        An answer to `pairs` is never lost to an error.

        Raises:
            BackendUnavailable: no broker, and there were no `pairs`.
            Closed: the receiver was left, or the backend closed, and there were no `pairs`.
        """
        ...

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """Make the leases of these deliveries last as long as a new one would; never shorter. From any thread."""
        ...

    def nudge(self) -> None:
        """End the wait of the exchange now in progress, or of the next one. Does no I/O."""
        ...

    def keeper_idle_for(self) -> float:
        """Seconds since the loop that keeps its leases last turned, about 1 at most; 0.0 where nothing has to."""
        return 0.0

    def is_away(self) -> bool:
        """Whether it has lost its broker, and not found it again; as far as it knows without asking."""
        return False

    def outages(self) -> Outages:
        """How often its broker was away, since the backend was opened."""
        return NO_OUTAGES

    async def receive(self, limit: int, *, wait: float = 0.0) -> list[Delivery]:
        """Take up to `limit` jobs: highest priority first, oldest first within one.

        Args:
            limit: 1 or more.
            wait: seconds to wait for a first job; returns as soon as there is one.

        Returns:
            0 to `limit` deliveries; empty only when `wait` ran out or a nudge ended it.

        Raises:
            QueueNotFound: never declared, or deleted since.
            BackendUnavailable: no broker; what it had handed over comes back when the lease ends.
        """
        exchanged = await self.exchange((), limit, wait=wait)
        if exchanged.missing and not exchanged.deliveries:
            raise QueueNotFound(exchanged.missing[0])
        return exchanged.deliveries

    async def settle(self, pairs: Sequence[tuple[Delivery, Settlement]]) -> list[Settled]:
        """End deliveries, each in one atomic step.

        Returns:
            one per pair, in order: None; the `LeaseLost` that says nothing was changed; `BackendUnavailable` for one
            that got no answer.

        Raises:
            BackendUnavailable: the broker gave no answer to any; the leases decide.
        """
        settled = (await self.exchange(pairs, 0)).settled
        unanswered = [answer for answer in settled if isinstance(answer, BackendUnavailable)]
        if unanswered and len(unanswered) == len(settled):
            raise unanswered[0]
        return settled


Progress: TypeAlias = Callable[[int, int], None]
"""Told how many are done, and of how many, while a long call goes on; on the loop of the call."""


class DeadLetters(Protocol):
    """The dead letters of one queue. Looking changes nothing."""

    async def list(self, where: DeadFilter, *, limit: int = 100, cursor: str | None = None) -> DeadPage:
        """A page, newest first."""
        ...

    async def get(self, job_id: JobId) -> DeadRecord:
        """One record. Raises `JobNotFound`."""
        ...

    async def count(self) -> int:
        """How many there are."""
        ...

    async def replay(
        self,
        which: Sequence[JobId] | DeadFilter,
        *,
        rate: float | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Put jobs back under their ids, with their counters at 0.

        Args:
            which: these ids; or all that the filter leaves, oldest first.
            rate: at most so many a second.
            limit: the first so many of them.
            progress: told after each step.

        Returns:
            how many were put back.

        Raises:
            JobNotFound: an id that is not there; nothing was put back.
        """
        ...

    async def purge(
        self, which: Sequence[JobId] | DeadFilter, *, limit: int | None = None, progress: Progress | None = None
    ) -> int:
        """Forget them. Returns how many. Raises `JobNotFound` for an id that is not there; nothing was forgotten."""
        ...


class Backend(Protocol):
    """Moves jobs. Queue administration raises `QueueNotFound` for a queue that is not there."""

    @property
    def traits(self) -> Traits:
        """What it can do; what the server decides is filled in by `open`."""
        ...

    async def open(self) -> None:
        """Connect. Opening an open backend does nothing."""
        ...

    async def aclose(self) -> None:
        """Close within a deadline. Closing twice does nothing."""
        ...

    async def declare(self, spec: QueueSpec, *, attach: bool = False) -> None:
        """Make the queue if there is none.

        Args:
            spec: the queue.
            attach: leave a queue of that name as it is, whatever its kind.

        Raises:
            QueueMismatch: it exists with other properties, and `attach` is False.
            NotSupported: this backend has no such kind.
        """
        ...

    async def delete(self, queue: str, *, force: bool = False) -> None:
        """Delete a queue and its waiting jobs. Raises `QueueInUse` for leased or dead jobs, unless `force`."""
        ...

    async def clean(self, queue: str) -> int:
        """Cancel all ready and scheduled jobs; leased and dead ones stay. Returns how many."""
        ...

    async def depth(self, queue: str) -> Depth:
        """How many jobs there are, by state."""
        ...

    async def queues(self) -> list[QueueSpec]:
        """Declared in this namespace."""
        ...

    async def publish(self, queue: str, messages: Sequence[Message]) -> list[Published]:
        """One outcome each, in order; raises only `Closed`, `ForkedProcess` and cancellation."""
        ...

    def receiver(
        self,
        queues: Sequence[str],
        *,
        slots: int = 1,
        lease: float = 30.0,
        crash_limit: int = 5,
        keep: bool = True,
        strict: bool = False,
        lost: Callable[[Delivery], None] | None = None,
    ) -> AbstractAsyncContextManager[Receiver]:
        """A receiver of these queues; leaving it releases what it holds unsettled.

        Args:
            queues: in fair turns, or in order of preference if `strict`.
            slots: the most it holds.
            lease: seconds a delivery is its own.
            crash_limit: for messages that bring none.
            keep: its keeper extends all it holds.
            strict: see `queues`.
            lost: called in the entering loop, once for each delivery whose lease is gone.
        """
        ...

    def dead_letters(self, queue: str) -> DeadLetters:
        """The queue's dead letters."""
        ...


class Home:
    """The loop and the process that opened a backend; use from any other is refused, where it would hang or corrupt."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._breaths = 0

    def move_in(self) -> bool:
        """The running loop is home from now on. Returns whether it was not before.

        Raises:
            ForkedProcess: the parent process has it open.
            ConfigError: another loop has.
        """
        if self._loop is not None and not self._loop.is_closed():
            self.check()
            return False
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        return True

    def move_out(self) -> bool:
        """There is no home any more. Returns whether there was one. Raises as `move_in`."""
        if self._loop is None:
            return False
        if not self._loop.is_closed():
            self.check()
        self._loop = None
        return True

    def is_left(self) -> bool:
        """Whether its loop was closed, in this process, and nobody moved out."""
        return self._loop is not None and self._loop.is_closed() and os.getpid() == self._pid

    async def breathe(self) -> None:
        """Let the loop turn, every 64th time: calls that never wait would keep everything else from running."""
        self._breaths += 1
        if not self._breaths % 64:
            await asyncio.sleep(0)

    def check(self) -> None:
        """Raises `Closed`, `ForkedProcess` or, from another loop, `ConfigError`."""
        if self._loop is None:
            raise Closed(f"the {self._what} is not open: use it inside `async with`, or await its open()")
        if os.getpid() != self._pid:
            raise ForkedProcess(f"the {self._what} was opened in the parent process: open one in this process")
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigError(f"the {self._what} was opened in another event loop: open one in this loop")


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**31 - 1:
        raise ConfigError(f"{name}={value!r}: a whole number from 1 on")
