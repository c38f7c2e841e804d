"""`Outbox`: publishes with confirms over one link; all of one tick leave together, each gets an outcome of its own.

    put ──> waiting ──window──> pending ──ack──> stored, or unroutable if it came back before
               ^                   │ └──nack──> refused
               └──channel lost─────┘     deadline ──> BackendUnavailable, unknown if it was ever sent

What was sent and not confirmed when its channel closes is sent again: a job is stored twice rather than not at all.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, TypeAlias

from pamqp import commands
from pamqp.frame import marshal

from mindtrace.jobs.backends.rabbitmq.address import Address
from mindtrace.jobs.backends.rabbitmq.channels import Channel, ChannelClosed, Content
from mindtrace.jobs.backends.rabbitmq.line import Line
from mindtrace.jobs.backends.rabbitmq.link import Link
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, Closed, JobsError

_log = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["stored", "unroutable", "refused"] | JobsError
"""`refused`: the broker did not take it; `unroutable`: no queue there, or no exchange."""

REFUSED = "the queue is full, by a policy of the server's, or most of its nodes are away"
"""Why a broker refuses what it can route."""

_WINDOW = 1000
_WINDOW_BYTES = 16 * 1024 * 1024
_TOGETHER = 256 * 1024  # bytes in one write
_TICK = 0.1
_STOOD_STILL = 1.0  # seconds that the loop is late
_AFTER_A_REFUSAL = 0.05
_PERSISTENT = 2


@dataclass(slots=True)
class Posting:
    """One message to be stored.

    Attributes:
        exchange: empty for the default one.
        key: routing key; on the default exchange the queue.
        headers: see `counts`.
        body: of it.
        priority: 0 to 255.
    """

    exchange: str
    key: str
    headers: dict[str, Any]
    body: bytes
    priority: int = 0


class _Batch:
    __slots__ = ("deadline", "future", "left", "outcomes")

    def __init__(self, count: int, deadline: float, future: "asyncio.Future[list[Outcome]]") -> None:
        self.outcomes: list[Outcome] = ["stored"] * count
        self.left, self.deadline, self.future = count, deadline, future


@dataclass(slots=True)
class _Entry:
    posting: Posting
    batch: _Batch
    index: int
    sent: bool = False
    returned: bool = False
    done: bool = False


class Outbox:
    """Stores messages; used from the loop that makes it.

    Args:
        address: of the server.
        role: of its connection.
        random: the source of the jitter.
        patient: what waits is not given up while the server blocks who publishes, for want of memory or disk.
    """

    def __init__(self, address: Address, role: str, random: Random, *, patient: bool = False) -> None:
        self.link: Link = Link(address, role, random, self._on_up)
        self._loop, self._patient = asyncio.get_running_loop(), patient
        self._waiting: deque[_Entry] = deque()
        self._pending: dict[int, _Entry] = {}
        self._bytes = 0
        self._channel: Channel | None = None
        self._prefix = ""
        self._tag = 0
        self._heads: dict[tuple[str, str], bytes] = {}
        self._careful = 0  # so many are sent one by one: one of them made the server close the channel
        self._flushing: asyncio.Handle | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._tick_due = 0.0
        self._is_reading = False
        self._serving: set[asyncio.Task[None]] = set()
        self._closed = False

    def put(self, postings: Sequence[Posting], deadline: float) -> "asyncio.Future[list[Outcome]]":
        """Have them stored, in order, until `deadline` on the monotonic clock. The future has one outcome each."""
        future: asyncio.Future[list[Outcome]] = self._loop.create_future()
        if not postings:
            future.set_result([])
        elif self._closed:
            future.set_result([Closed("the connection to RabbitMQ is closed") for _ in postings])
        else:
            self.link.start()  # also where the login was refused: it may be right by now
            batch = _Batch(len(postings), deadline, future)
            self._waiting.extend(_Entry(posting, batch, index) for index, posting in enumerate(postings))
            self._flush_soon()
            if self._ticking is None:
                self._tick_soon()
            if self.link.failed is not None:
                self._fail_all(self.link.failed)
        return future

    async def aclose(self) -> None:
        """Close; what waits is told so."""
        self._closed = True
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        await self.link.aclose()
        for task in list(self._serving):
            task.cancel()
            await asyncio.wait({task})
        self._recall()
        for entry in list(self._waiting):
            self._fail(entry, "it was closed")
        self._waiting.clear()

    # --- the channel

    def _on_up(self, line: Line) -> None:
        task = asyncio.create_task(self._serve(line), name="mindtrace-jobs rabbitmq publishes")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, line: Line) -> None:
        """Have a channel for as long as the line lasts."""
        while not line.lost.done():
            try:
                channel = await line.channel()
                channel.on_confirm = self._on_confirm
                channel.on_return = self._on_return
                await channel.call(commands.Confirm.Select())
            except BackendUnavailable as error:
                _log.warning("no channel to publish on: %s", error)
                await asyncio.sleep(_AFTER_A_REFUSAL)
                continue
            self._channel, self._tag, self._heads = channel, 0, {}
            self._prefix = secrets.token_hex(6) + "-"
            self._flush()
            await asyncio.wait({channel.gone})
            self._channel = None
            self._on_channel_gone(channel.gone.result())
            if not line.lost.done():
                await asyncio.sleep(_AFTER_A_REFUSAL)

    def _on_channel_gone(self, why: JobsError) -> None:
        if isinstance(why, ChannelClosed | AuthenticationFailed):  # one of them is not to the server's liking
            in_flight = [entry for entry in self._pending.values() if not entry.done]
            if len(in_flight) == 1:
                missing = isinstance(why, ChannelClosed) and why.code == 404
                self._resolve(in_flight[0], "unroutable" if missing else why)
            else:
                self._careful = len(in_flight)
        self._recall()

    def _recall(self) -> None:
        """What was not confirmed waits again, in its order."""
        again = [entry for entry in self._pending.values() if not entry.done]
        self._pending, self._bytes = {}, 0
        for entry in again:
            entry.returned = False
        self._waiting.extendleft(reversed(again))

    # --- sending

    def _flush_soon(self) -> None:
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        channel, waiting, pending = self._channel, self._waiting, self._pending
        if channel is None or channel.is_closed or self._is_blocked():
            return
        chunk: list[bytes] = []
        size = 0
        window = 1 if self._careful > 0 else _WINDOW
        while waiting and len(pending) < window and (self._bytes < _WINDOW_BYTES or not pending):
            entry = waiting.popleft()
            if entry.done:
                continue
            if entry.batch.future.done() and not entry.sent:  # its caller was cancelled: nothing of it is sent any more
                entry.done = True
                continue
            self._careful -= self._careful > 0
            self._tag += 1
            pending[self._tag] = entry
            entry.sent = True
            data = self._encoded(channel, entry.posting)
            self._bytes += len(data)
            chunk.append(data)
            size += len(data)
            if size > _TOGETHER:
                channel.write(b"".join(chunk))
                chunk, size = [], 0
        if chunk:
            channel.write(b"".join(chunk))

    def _encoded(self, channel: Channel, posting: Posting) -> bytes:
        route = (posting.exchange, posting.key)
        head = self._heads.get(route)
        if head is None:
            frame = commands.Basic.Publish(exchange=posting.exchange, routing_key=posting.key, mandatory=True)
            head = marshal(frame, channel.number)
            if len(self._heads) >= _WINDOW:
                self._heads.clear()
            self._heads[route] = head
        properties = commands.Basic.Properties(
            content_type="application/json",
            headers=posting.headers,
            delivery_mode=_PERSISTENT,
            priority=posting.priority or None,
            message_id=f"{self._prefix}{self._tag}",
        )
        return channel.message(head, properties, posting.body)

    # --- what comes back

    def _on_return(self, content: Content) -> None:
        prefix, _, tag = (content.properties.message_id or "").partition("-")
        entry = self._pending.get(int(tag)) if f"{prefix}-" == self._prefix and tag.isdigit() else None
        if entry is not None:
            entry.returned = True

    def _on_confirm(self, tag: int, multiple: bool, taken: bool) -> None:
        pending = self._pending
        if multiple:
            tags: list[int] = []
            for one in pending:
                if one > tag > 0:
                    break
                tags.append(one)
        else:
            tags = [tag]
        for one in tags:
            entry = pending.pop(one, None)
            if entry is not None:
                self._bytes -= len(entry.posting.body) + 200
                if not entry.done:
                    self._resolve(entry, ("unroutable" if entry.returned else "stored") if taken else "refused")
        if not pending:
            self._bytes = 0
        if self._waiting:
            self._flush_soon()

    def _resolve(self, entry: _Entry, outcome: Outcome) -> None:
        entry.done = True
        batch = entry.batch
        if outcome != "stored":
            batch.outcomes[entry.index] = outcome
        batch.left -= 1
        if not batch.left and not batch.future.done():
            batch.future.set_result(batch.outcomes)

    def _fail(self, entry: _Entry, why: str) -> None:
        if not entry.done:
            job_id = entry.posting.headers.get("mtj-id", "")
            error = BackendUnavailable(
                f"no confirmation from RabbitMQ at {self.link.address}: {why}",
                maybe_published=entry.sent,
                job_ids=[job_id],
            )
            error.__cause__ = self.link.why
            self._resolve(entry, error)

    # --- time

    def _tick_soon(self, pause: float = _TICK) -> None:
        self._tick_due = self._loop.time() + pause
        self._ticking = self._loop.call_at(self._tick_due, self._tick)

    def _tick(self) -> None:
        """While anything waits: give up what is over its time."""
        self._ticking = None
        if self._loop.time() - self._tick_due > _STOOD_STILL and not self._is_reading:
            self._is_reading = True  # what came meanwhile, in this turn: then look again
            self._tick_soon(0.0)
            return
        self._is_reading = False
        if self.link.failed is not None:
            self._fail_all(self.link.failed)
        else:
            if not (self._patient and self._is_blocked()):
                self._give_up_late()
            if self._waiting:  # held up, perhaps, by a server that blocked who publishes
                self._flush_soon()
        if self._waiting or any(not entry.done for entry in self._pending.values()):
            self._tick_soon()

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for entry in [*self._pending.values(), *self._waiting]:
            if entry.batch.deadline <= now:
                self._fail(entry, self._why_late())
        if self._waiting and self._waiting[0].done:
            self._waiting = deque(entry for entry in self._waiting if not entry.done)

    def _is_blocked(self) -> bool:
        """Whether what is sent now would lie in a socket that nobody reads."""
        return self.link.line is not None and self.link.line.blocked

    def _fail_all(self, why: AuthenticationFailed) -> None:
        """The login is refused."""
        for entry in [*self._pending.values(), *self._waiting]:
            if not entry.done:
                job_ids = [entry.posting.headers.get("mtj-id", "")]
                error = AuthenticationFailed(str(why), maybe_published=entry.sent, job_ids=job_ids)
                error.__cause__ = why.__cause__
                self._resolve(entry, error)
        self._waiting.clear()

    def _why_late(self) -> str:
        if self.link.line is None:
            return f"its time is over ({self.link.why})" if self.link.why else "its time is over"
        if self._is_blocked():
            return "its time is over; the broker blocks publishers, it is out of memory or disk"
        return "its time is over"
