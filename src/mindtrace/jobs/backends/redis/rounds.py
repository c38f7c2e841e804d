"""A round: one exchange script sent to each of some queues, and what came back."""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from mindtrace.jobs.backend import BATCH
from mindtrace.jobs.backends.redis.failures import lines_of
from mindtrace.jobs.backends.redis.keys import QueueKeys
from mindtrace.jobs.backends.redis.link import REPLY_WITHIN
from mindtrace.jobs.backends.redis.scripts import LARGEST_BODY, Scripts, milliseconds
from mindtrace.jobs.delivery import Dead, Delivery, Done, Retry, Settled, Settlement
from mindtrace.jobs.errors import BackendUnavailable, JobsError, LeaseLost
from mindtrace.jobs.wire import Message

_log = logging.getLogger(__name__)

__all__ = ["BATCH", "CallNumbers", "Claims", "Round"]

_AT_LEAST = 1.0  # seconds that the server has for a call, also for one that waited for its turn
_REMEMBERED = 280.0  # seconds for which a call may be repeated: the server forgets its answer after 300

_Pairs = Sequence[tuple[Delivery, Settlement]]


class CallNumbers:
    """The name under which the server remembers a receiver's last call, and the numbers of its calls.

    Lent to one receiver at a time: a thousand receivers in turn leave one memory behind, and not a thousand.
    """

    def __init__(self, name: str) -> None:
        self.name: str = name
        self._last = 0

    def next(self) -> int:
        """The number of another call."""
        self._last += 1
        return self._last


class Round:
    """What the queues answered, complete once `over` is done.

    Args:
        on_deliveries: told of what was taken, as soon as it is read.
        on_over: told once, when all have answered.
        on_left: given what was taken for a caller who is gone.
    """

    def __init__(
        self,
        on_deliveries: Callable[[list[Delivery]], None],
        on_over: Callable[["Round"], None],
        on_left: Callable[[list[Delivery]], None],
    ) -> None:
        self.settled: dict[Delivery, Settled] = {}
        self.deliveries: dict[str, list[Delivery]] = {}
        self.left: dict[str, int] = {}
        self.missing: list[str] = []
        self.look_at: float = float("inf")
        self.error: BackendUnavailable | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.unanswered: int = 0
        self._abandoned = False
        self._on_deliveries, self._on_over, self._on_left = on_deliveries, on_over, on_left

    async def answered(self, within: float | None) -> None:
        """Wait until it is over; a caller who does not wait to the end abandons it.

        Raises:
            BackendUnavailable: no answer within so many seconds, or none at all and nothing was to be settled.
        """
        try:
            await asyncio.wait((self.over,), timeout=within)
        except asyncio.CancelledError:
            self.abandon()
            raise
        if not self.over.done():
            self.abandon()
            raise BackendUnavailable(f"no answer from Redis within {within:g} s")
        if self.error is not None and not self.settled and not self.deliveries:
            raise self.error

    def abandon(self) -> None:
        """Nobody waits for it."""
        self._abandoned = True
        if self.over.done():
            self._leave()

    def took(self, deliveries: list[Delivery], queue: str) -> None:
        """These are ours now."""
        self.deliveries[queue] = deliveries
        self._on_deliveries(deliveries)

    def one_less(self) -> None:
        """One of the queues is through."""
        self.unanswered -= 1
        if self.unanswered == 0:
            self.over.set_result(None)
            self._on_over(self)
            if self._abandoned:
                self._leave()

    def _leave(self) -> None:
        self._on_left([delivery for some in self.deliveries.values() for delivery in some])


@dataclass(frozen=True, slots=True)
class _Call:
    """One exchange with one queue: `words` settles the deliveries of `settling`, in that order."""

    keys: QueueKeys
    limit: int
    settling: list[Delivery]
    words: list[str | bytes | int]

    @classmethod
    def of(cls, keys: QueueKeys, limit: int, pairs: _Pairs) -> "_Call":
        done = [delivery for delivery, settlement in pairs if isinstance(settlement, Done)]
        others = [pair for pair in pairs if not isinstance(pair[1], Done)]
        words: list[str | bytes | int] = [len(done), *(delivery.receipt for delivery in done)]
        for delivery, settlement in others:
            words += _words(delivery, settlement)
        return cls(keys, limit, [*done, *(delivery for delivery, _ in others)], words)


class Claims:
    """Makes the calls of one receiver, and reads their answers.

    Args:
        scripts: over the link for commands.
        calls: its name and numbers.
        lease: seconds.
        crash_limit: for jobs that bring none.
    """

    def __init__(self, scripts: Scripts, calls: CallNumbers, lease: float, crash_limit: int) -> None:
        self._scripts, self._calls, self._lease, self._crash_limit = scripts, calls, lease, crash_limit
        # The server remembers the last call only: to each queue one is in flight, and these wait behind it.
        self._behind: dict[str, deque[Callable[[], None]]] = {}

    def calls(self, queues: Mapping[str, tuple[QueueKeys, int]], pairs: _Pairs) -> list[_Call]:
        """One call for each queue; several where it has more than 500 pairs. Raises for what cannot be sent.

        Args:
            queues: name -> its keys, and how many to take from it.
            pairs: to settle, each of one of these queues.
        """
        by_queue: dict[str, list[tuple[Delivery, Settlement]]] = {name: [] for name in queues}
        for pair in pairs:
            by_queue[pair[0].queue].append(pair)
        calls: list[_Call] = []
        for name, (keys, limit) in queues.items():
            mine = by_queue[name]
            for start in range(0, len(mine) or 1, BATCH):
                is_last = start + BATCH >= len(mine)
                calls.append(_Call.of(keys, min(limit, BATCH) if is_last else 0, mine[start : start + BATCH]))
        return calls

    def send(self, a_round: Round, calls: Sequence[_Call], waits: bool, deadline: float | None) -> None:
        """Send the calls, again and again until `deadline`.

        Args:
            a_round: collects the answers.
            calls: of `calls`.
            waits: the receiver is going to wait if there is nothing.
            deadline: on the monotonic clock; None: until the leases at stake have ended.
        """
        a_round.unanswered = len(calls)
        for call in calls:
            send = partial(self._send_one, a_round, call, waits, deadline or self._deadline_of(call))
            if call.keys.queue in self._behind:
                self._behind[call.keys.queue].append(send)
            else:
                self._behind[call.keys.queue] = deque()
                send()

    def _send_next(self, queue: str) -> None:
        if self._behind[queue]:
            self._behind[queue].popleft()()
        else:
            del self._behind[queue]

    def _deadline_of(self, call: _Call) -> float:
        """When the leases at stake have ended; from the moment it was asked for, however long it waits for its turn."""
        now = time.monotonic()
        ends = [now + REPLY_WITHIN, *(delivery.deadline for delivery in call.settling)]
        if call.limit:
            ends.append(now + self._lease)
        return min(max(ends), now + _REMEMBERED)

    def _send_one(self, a_round: Round, call: _Call, waits: bool, deadline: float) -> None:
        keys, in_order = call.keys, call.settling
        words = (
            self._calls.name, self._calls.next(), call.limit, milliseconds(self._lease), self._crash_limit,
            os.urandom(8).hex(), LARGEST_BODY, int(waits), *call.words,
        )  # fmt: skip
        now = time.monotonic()
        deadline = max(deadline, now + _AT_LEAST)

        def answer(reply: Any, error: BaseException | None) -> None:
            if error is not None:
                unknown = _unknown(error)
                a_round.settled.update(dict.fromkeys(in_order, unknown))
                a_round.error = unknown
            elif reply[1] == b"missing":
                a_round.settled.update((delivery, LeaseLost(delivery.message.id)) for delivery in in_order)
                a_round.missing.append(keys.queue)
            else:
                try:
                    self._read(a_round, keys.queue, in_order, reply, now + self._lease)
                except (ValueError, LookupError, TypeError) as unreadable:
                    _log.exception("an answer of Redis for queue %s cannot be read", keys.queue)
                    a_round.error = _unknown(BackendUnavailable(f"an answer that cannot be read: {unreadable}"))
                    for delivery in in_order:
                        a_round.settled.setdefault(delivery, a_round.error)
            self._send_next(keys.queue)
            a_round.one_less()

        self._scripts.send_exchange(keys, words, deadline, answer)

    def _read(self, a_round: Round, queue: str, settled: list[Delivery], reply: Any, deadline: float) -> None:
        for delivery, digit in zip(settled, reply[2], strict=True):
            a_round.settled[delivery] = None if digit == 49 else LeaseLost(delivery.message.id)  # 49: the byte "1"
        if reply[3] >= 0:
            a_round.look_at = min(a_round.look_at, time.monotonic() + reply[3] / 1000)
        a_round.left[queue] = reply[4]
        values = reply[5:]
        if values:
            a_round.took(
                [
                    _delivery(queue, receipt.decode(), body, numbers, deadline)
                    for receipt, body, numbers in zip(values[::3], values[1::3], values[2::3], strict=True)
                ],
                queue,
            )


def _delivery(queue: str, receipt: str, body: bytes, numbers: bytes, deadline: float) -> Delivery:
    _, number, job_id = receipt.split(":", 2)
    attempts, crashes, releases, priority, crash_limit = _numbers(numbers)
    message = Message(job_id, body, priority, 0.0, None, crash_limit)
    return Delivery(queue, message, attempts, crashes, releases, int(number), receipt, deadline)


@lru_cache(1024)
def _numbers(text: bytes) -> tuple[int, int, int, int, int | None]:
    """Nearly all jobs have the same ones."""
    attempts, crashes, releases, priority, crash_limit = map(int, text.split())
    return attempts, crashes, releases, priority, None if crash_limit < 0 else crash_limit


def _words(delivery: Delivery, settlement: Settlement) -> tuple[str, str, str | bytes | int, str, str]:
    if isinstance(settlement, Retry):
        kind = "retry crash" if settlement.crash else "retry"
        return (delivery.receipt, kind, milliseconds(settlement.delay), *lines_of(settlement.error))
    if isinstance(settlement, Dead):
        kind = "dead crash" if settlement.crash else "dead"
        return (delivery.receipt, kind, settlement.reason.encode(), *lines_of(settlement.error))
    assert not isinstance(settlement, Done)  # noqa: S101 (those are told apart before)
    return (delivery.receipt, "release", milliseconds(settlement.delay), "", "")


def _unknown(error: BaseException) -> BackendUnavailable:
    if isinstance(error, BackendUnavailable):
        return error
    assert isinstance(error, JobsError)  # noqa: S101 (the link gives ours)
    ours = BackendUnavailable(str(error))
    ours.__cause__ = error
    return ours
