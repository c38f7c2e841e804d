"""`LocalBackend`: the queues of one object, and who may use them."""

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

from mindtrace.jobs.backend import BATCH, Backend, DeadLetters, Depth, Home, QueueSpec, Receiver, Traits
from mindtrace.jobs.backends.local.clock import Clock, SystemClock
from mindtrace.jobs.backends.local.dead_letters import LocalDeadLetters
from mindtrace.jobs.backends.local.queue import NAME, Queue
from mindtrace.jobs.backends.local.receiver import LocalReceiver
from mindtrace.jobs.delivery import Delivery, Published
from mindtrace.jobs.errors import QueueInUse, QueueMismatch, QueueNotFound
from mindtrace.jobs.job import PRIORITY_RANGE
from mindtrace.jobs.wire import Message

_TRAITS = Traits(
    name=NAME,
    durability="memory",
    priorities=PRIORITY_RANGE,
    stack=True,
    lease_clock=True,
    deduplicates=True,
    fences=True,
    keeps_place=True,
    atomic_batch=True,
    lookup=False,
    exact_depth=True,
    lists_queues=True,
    run_limit=None,
)


class LocalBackend(Backend):
    """The backend in this process.

    Args:
        clock: where it has its time from; the machine's unless a test brings one.
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self._home = Home("local backend")
        self._queues: dict[str, Queue] = {}
        self._receivers: set[LocalReceiver] = set()

    @property
    def traits(self) -> Traits:
        """What it can do."""
        return _TRAITS

    async def open(self) -> None:
        """Be used from this loop.

        Raises:
            ConfigError: it is open in another loop.
            ForkedProcess: it was opened in the parent process, whose jobs it still holds.
        """
        if self._home.move_in():
            await self._end_receivers()  # of a loop that ended without closing them

    async def aclose(self) -> None:
        """End the receivers, which releases what they hold. The jobs stay with the object."""
        if self._home.move_out():
            await self._end_receivers()

    async def _end_receivers(self) -> None:
        receivers = list(self._receivers)
        for receiver in receivers:
            receiver.release()  # all of them before the first await: a cancelled close releases everything, too
        for receiver in receivers:
            await receiver.end()

    def without_jobs(self) -> "LocalBackend":
        """Another one with the same queues and no jobs, for a forked process: those here are its parent's to run."""
        other = LocalBackend(clock=self.clock)
        other._queues = {name: Queue(queue.spec, self.clock) for name, queue in self._queues.items()}
        return other

    async def declare(self, spec: QueueSpec, *, attach: bool = False) -> None:
        """Make the queue if there is none."""
        self._home.check()
        queue = self._queues.get(spec.name)
        if queue is None:
            self._queues[spec.name] = Queue(spec, self.clock)
        elif not attach and queue.spec != spec:
            raise QueueMismatch(spec.name, queue.spec.differences(spec))

    async def delete(self, queue: str, *, force: bool = False) -> None:
        """Delete a queue and its waiting jobs."""
        found = self._queue(queue)
        depth = found.depth(self.clock.now())
        if not force and (depth.leased or depth.dead):
            raise QueueInUse(queue, {"leased": depth.leased or 0, "dead": depth.dead})
        del self._queues[queue]
        found.end()

    async def clean(self, queue: str) -> int:
        """Cancel all ready and scheduled jobs."""
        return self._queue(queue).clean(self.clock.now())

    async def depth(self, queue: str) -> Depth:
        """How many jobs there are, by state; exact."""
        return self._queue(queue).depth(self.clock.now())

    async def queues(self) -> list[QueueSpec]:
        """All that are declared."""
        self._home.check()
        return [queue.spec for queue in self._queues.values()]

    async def publish(self, queue: str, messages: Sequence[Message]) -> list[Published]:
        """Store the messages; up to 500 at a time are stored whole or, if the queue is full, not at all."""
        self._home.check()
        found = self._queues.get(queue)
        if found is None:
            return [QueueNotFound(queue) for _ in messages]
        outcomes: list[Published] = []
        for start in range(0, len(messages), BATCH):
            outcomes += found.publish(messages[start : start + BATCH])
        await self._home.breathe()  # after it is stored, or a later call could overtake it
        return outcomes

    @asynccontextmanager
    async def receiver(
        self,
        queues: Sequence[str],
        *,
        slots: int = 1,
        lease: float = 30.0,
        crash_limit: int = 5,
        keep: bool = True,
        strict: bool = False,
        lost: Callable[[Delivery], None] | None = None,
    ) -> AsyncGenerator[Receiver, None]:
        """A receiver of these queues. With `keep` its leases end only with it: it lives and dies with the backend."""
        self._home.check()
        receiver = LocalReceiver(
            self._home,
            self.clock,
            self._queues,
            queues,
            slots=slots,
            lease=lease,
            crash_limit=crash_limit,
            keep=keep,
            strict=strict,
            lost=lost,
        )
        self._receivers.add(receiver)
        try:
            yield receiver
        finally:
            self._receivers.discard(receiver)
            await receiver.end()

    def dead_letters(self, queue: str) -> DeadLetters:
        """The queue's dead letters."""
        return LocalDeadLetters(self._home, self.clock, self._queues, queue)

    def next_due(self, queue: str) -> float | None:
        """When, on its clock, the next scheduled job is due or a lease lapses; for a test that moves the clock."""
        due = self._queue(queue).next_change()
        return None if due == math.inf else due

    def _queue(self, queue: str) -> Queue:
        self._home.check()
        found = self._queues.get(queue)
        if found is None:
            raise QueueNotFound(queue)
        return found
