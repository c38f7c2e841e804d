"""What is checked before a publish, where it is sent, and what the outcome means to the caller."""

import asyncio
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from mindtrace.jobs.backend import BATCH, QueueSpec
from mindtrace.jobs.backends.rabbitmq.admin import Admin
from mindtrace.jobs.backends.rabbitmq.counts import NEW, Counts, headers_of
from mindtrace.jobs.backends.rabbitmq.outbox import REFUSED, Outbox, Outcome, Posting
from mindtrace.jobs.backends.rabbitmq.topology import MOST_PRIORITY_LEVELS, PRIORITY_LEVELS, Topology
from mindtrace.jobs.delivery import Published
from mindtrace.jobs.errors import (
    AuthenticationFailed,
    BackendUnavailable,
    ConfigError,
    JobsError,
    NotSupported,
    QueueFull,
    QueueNotFound,
)
from mindtrace.jobs.wire import Message

PUBLISH_WITHIN = 10.0
"""Seconds for a publish, its repetitions included; then it is unknown whether it was stored."""
NAME = "rabbitmq"
_AGAIN_AFTER = 0.05
_LOOK_AGAIN_AFTER = 1.0


class _Turn:
    """Those who prepare a publish to one queue, one at a time."""

    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock: asyncio.Lock = asyncio.Lock()
        self.users: int = 0


class Publisher:
    """Publishes to the queues of one namespace.

    Args:
        outbox: what stores.
        admin: what looks.
        topology: the names.
    """

    def __init__(self, outbox: Outbox, admin: Admin, topology: Topology) -> None:
        self._outbox, self._admin, self._topology = outbox, admin, topology
        self.specs: dict[str, QueueSpec | None] = {}
        """What is known of queues; None for one that somebody else declared, or that nobody may look at."""
        self._looked: dict[str, float] = {}  # when it was looked how a full queue is
        self._turns: dict[str, _Turn] = {}  # of queues of which a publish is being prepared

    async def publish(self, queue: str, messages: Sequence[Message]) -> list[Published]:
        """One outcome each, in order."""
        deadline = time.monotonic() + PUBLISH_WITHIN
        spec = self.specs.get(queue)
        plain = not any(message.delay or message.at or message.priority for message in messages)
        if plain and queue in self.specs and (spec is None or spec.max_length is None) and queue not in self._turns:
            name = self._topology.queue(queue)
            postings = [
                Posting("", name, headers_of(message.id, _counts(message)), message.body) for message in messages
            ]
            outcomes = await self._outbox.put(postings, deadline)
            if outcomes == ["stored"] * len(outcomes):
                return outcomes  # type: ignore[return-value]
            return [await self._told(queue, m, outcome) for m, outcome in zip(messages, outcomes, strict=True)]
        return await self._prepared(queue, messages, deadline)

    async def _prepared(self, queue: str, messages: Sequence[Message], deadline: float) -> list[Published]:
        """Publish what needs a look at the server first; publishes to one queue in their order."""
        turn = self._turns.setdefault(queue, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                try:
                    spec, checked = await self._looked_up(queue, messages, deadline)
                except BackendUnavailable as error:
                    return [_again(error, message) for message in messages]
                except QueueNotFound as error:
                    return [error for _ in messages]
                postings = [posting for posting in checked if isinstance(posting, Posting)]
                sending = self._outbox.put(postings, deadline)
                if spec is not None and spec.max_length is not None:
                    await asyncio.wait({sending})  # or who comes next counts without them
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[queue]
        sent = iter(await sending)
        return [
            await self._told(queue, message, next(sent)) if isinstance(found, Posting) else found
            for message, found in zip(messages, checked, strict=True)
        ]

    async def _looked_up(
        self, queue: str, messages: Sequence[Message], deadline: float
    ) -> tuple[QueueSpec | None, list[Posting | JobsError]]:
        """How the queue is, and where each message goes; tried until the deadline, as all of a publish."""
        error = BackendUnavailable("no answer from RabbitMQ: its time is over")
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                while True:
                    try:
                        spec = await self._spec(queue)
                        checked = await self._checked(queue, spec, messages)
                        if any(isinstance(found, QueueFull) for found in checked) and self._may_have_changed(queue):
                            continue
                    except AuthenticationFailed:
                        raise
                    except BackendUnavailable as unavailable:
                        error = unavailable
                        await asyncio.sleep(_AGAIN_AFTER)
                    else:
                        return spec, checked
        except TimeoutError:
            raise error from None

    def _may_have_changed(self, queue: str) -> bool:
        """Forget how a queue is that is full as far as we know: another process may have declared it anew."""
        now = time.monotonic()
        if now - self._looked.get(queue, -math.inf) < _LOOK_AGAIN_AFTER:
            return False
        self._looked[queue] = now
        self.specs.pop(queue, None)
        return True

    async def _spec(self, queue: str) -> QueueSpec | None:
        if queue not in self.specs:
            if await self._admin.look(self._topology.queue(queue)) is None:
                raise QueueNotFound(queue)
            try:
                self.specs[queue] = await self._admin.spec_of(queue)
            except AuthenticationFailed:
                self.specs[queue] = None
        return self.specs[queue]

    async def _checked(
        self, queue: str, spec: QueueSpec | None, messages: Sequence[Message]
    ) -> list[Posting | JobsError]:
        """Where each goes, or why it does not."""
        now = datetime.now(UTC)
        found: list[Posting | JobsError] = []
        longest = 0
        for message in messages:
            refusal = self._refusal(queue, spec, message)
            if refusal is not None:
                found.append(refusal)
                continue
            units = self._topology.units(message.delay if message.at is None else (message.at - now).total_seconds())
            longest = max(longest, units)
            exchange, key = self.route(queue, units, message.priority)
            headers = headers_of(message.id, _counts(message), due=self._topology.due(now.timestamp(), units))
            found.append(Posting(exchange, key, headers, message.body, message.priority))
        bounded = spec is not None and spec.max_length is not None
        if longest > 0 or bounded:
            kept = await self._admin.look(self._topology.queue(queue))
            if kept is None:
                self.specs.pop(queue, None)
                raise QueueNotFound(queue)
            await self._admin.make_holds(longest)
            if spec is not None and spec.max_length is not None:
                room = spec.max_length - kept.messages
                for index, posting in enumerate(found):
                    if isinstance(posting, Posting) and posting.exchange in ("", self._topology.priority_exchange):
                        room -= 1
                        if room < 0:
                            found[index] = QueueFull(queue, spec.max_length)
        return found

    def route(self, queue: str, units: int, priority: int) -> tuple[str, str]:
        """Exchange and routing key."""
        if units > 0:
            return self._topology.delayed(queue, units)
        name = self._topology.queue(queue)
        return (self._topology.priority_exchange if priority else ""), name

    def _refusal(self, queue: str, spec: QueueSpec | None, message: Message) -> JobsError | None:
        priority = message.priority
        if not priority:
            return None
        if spec is not None and spec.kind != "priority":
            return _no_priorities(queue, priority)
        most = MOST_PRIORITY_LEVELS if spec is None else spec.priority_levels or PRIORITY_LEVELS
        if not 0 <= priority <= most:
            return ConfigError(f"priority={priority}: the queue {queue!r} has the levels 0 to {most}")
        return None

    async def _told(self, queue: str, message: Message, outcome: Outcome) -> Published:
        match outcome:
            case "stored":
                return "stored"
            case "unroutable":
                self.specs.pop(queue, None)
                self._admin.forget_holds()
                if message.priority and await self._is_there(queue):
                    return _no_priorities(queue, message.priority)
                return QueueNotFound(queue)
            case "refused":
                return BackendUnavailable(
                    f"RabbitMQ did not take the job for the queue {queue!r}: {REFUSED}", job_ids=[message.id]
                )
            case BackendUnavailable():
                return outcome if outcome.job_ids else _again(outcome, message)
            case _:
                return outcome

    async def _is_there(self, queue: str) -> bool:
        try:
            return await self._admin.look(self._topology.queue(queue)) is not None
        except BackendUnavailable:
            return False


def in_parts(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """As many together as share a confirm window's turn."""
    return [messages[start : start + BATCH] for start in range(0, len(messages), BATCH)]


def _counts(message: Message) -> Counts:
    return NEW if message.crash_limit is None else Counts(crash_limit=message.crash_limit)


def _no_priorities(queue: str, priority: int) -> NotSupported:
    return NotSupported(
        f"priority {priority} on the fifo queue {queue!r}", NAME, "a queue declared with kind='priority'"
    )


def _again(error: BackendUnavailable, message: Message) -> BackendUnavailable:
    """The same error for a message of its own."""
    kind = type(error) if type(error) in (BackendUnavailable, AuthenticationFailed) else BackendUnavailable
    one = kind(str(error), maybe_published=error.maybe_published, job_ids=[message.id])
    one.__cause__ = error.__cause__
    return one
