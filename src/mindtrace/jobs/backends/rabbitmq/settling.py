"""`Settling`: how a delivery ends on the server: acknowledged, or first copied to where it belongs now.

A copy is confirmed before the original is acknowledged. Between the two it is there twice, and never not at all.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeAlias

from mindtrace.jobs.backends.rabbitmq.channels import Content
from mindtrace.jobs.backends.rabbitmq.counts import Counts, counts_of, errors_of, headers_of, id_of
from mindtrace.jobs.backends.rabbitmq.holdings import Held, Holdings
from mindtrace.jobs.backends.rabbitmq.keeper import Post
from mindtrace.jobs.backends.rabbitmq.lane import Lane
from mindtrace.jobs.backends.rabbitmq.outbox import REFUSED, Outcome, Posting
from mindtrace.jobs.delivery import (
    Dead,
    DeadReason,
    Delivery,
    Done,
    Release,
    Retry,
    RunError,
    Settled,
    Settlement,
    with_error,
)
from mindtrace.jobs.errors import BackendUnavailable, LeaseLost
from mindtrace.jobs.wire import Message

_log = logging.getLogger(__name__)

Pairs: TypeAlias = Sequence[tuple[Delivery, Settlement]]
_Copied: TypeAlias = tuple[int, Delivery, Held, Posting]  # the first: which answer is theirs

_COPY_WITHIN = 10.0
_A_MOMENT = 0.5  # seconds for the answer of what is given up by then
_AGAIN_AFTER = 0.5
_MICROSECOND = timedelta(microseconds=1)


class Settling:
    """The settlements of one receiver.

    Args:
        post: where copies go.
        holdings: what there is to settle.
        crash_limit: for messages that bring none.
        changed: called when a crash is counted, or copies are stored.
    """

    def __init__(self, post: Post, holdings: Holdings, *, crash_limit: int, changed: Callable[[], None]) -> None:
        self._post, self._topology, self._holdings = post, post.topology, holdings
        self._crash_limit, self._changed = crash_limit, changed
        self._counting: set[asyncio.Task[None]] = set()
        self._storing: set[asyncio.Task[list[Settled]]] = set()
        self._died = datetime.fromtimestamp(0, UTC)

    async def settle(self, pairs: Pairs, until: float | None = None) -> list[Settled]:
        """End deliveries, copies by `until` on the monotonic clock. One answer each, in order."""
        answers: list[Settled] = []
        acks: list[Held] = []
        copies: list[_Copied] = []
        for delivery, settlement in pairs:
            held = self._holdings.held.get(delivery)
            if held is None or held.lane.channel.is_closed:
                answers.append(LeaseLost(delivery.message.id))
                continue
            answers.append(None)
            if isinstance(settlement, Done):
                acks.append(held)
            else:
                copies.append((len(answers) - 1, delivery, held, self._copy(delivery, held, settlement)))
            del self._holdings.held[delivery]
        self._acknowledge(acks)
        if copies:
            deadline = time.monotonic() + _COPY_WITHIN if until is None else until
            storing = asyncio.get_running_loop().create_task(self._store_and_acknowledge(copies, deadline))
            self._storing.add(storing)
            self._holdings.copying += len(copies)
            storing.add_done_callback(partial(self._stored, len(copies)))
            await asyncio.wait({storing}, timeout=max(0.0, deadline + _A_MOMENT - time.monotonic()))
            for at, (index, *_) in enumerate(copies):
                answers[index] = storing.result()[at] if storing.done() else _not_yet()
        return answers

    def _stored(self, count: int, storing: "asyncio.Task[list[Settled]]") -> None:
        self._storing.discard(storing)
        self._holdings.copying -= count
        self._changed()

    async def finish(self, until: float) -> None:
        """Wait for copies that nobody waits for any more; what is not sent by then is not sent at all."""
        if self._storing:
            await asyncio.wait(self._storing, timeout=max(0.0, until - time.monotonic()))
        for storing in list(self._storing):
            storing.cancel()

    async def _store_and_acknowledge(self, copies: Sequence[_Copied], deadline: float) -> list[Settled]:
        """One answer each, in order. Goes on behind `deadline` where the server blocks who publishes.

        Given back meanwhile, a job would be run again, and once more for each copy that lies in the socket.
        """
        outcomes = await self._store([posting for *_, posting in copies], deadline)
        answers: list[Settled] = []
        stored: list[Held] = []
        for (_, delivery, held, _), outcome in zip(copies, outcomes, strict=True):
            if outcome == "stored":
                answers.append(None)
                stored.append(held)
                continue
            if outcome == "unroutable":
                answers.append(LeaseLost(delivery.message.id))
            elif isinstance(outcome, BackendUnavailable):
                answers.append(outcome)
            else:
                answers.append(BackendUnavailable(f"RabbitMQ did not take the copy: {REFUSED}"))
            self._holdings.give_back(delivery.message, held)
        self._acknowledge(stored)
        return answers

    def _copy(self, delivery: Delivery, held: Held, settlement: Settlement) -> Posting:
        match settlement:
            case Retry(delay=delay, error=error, crash=crash):
                counts = held.counts.ended_by_crash() if crash else held.counts
                return self._posting(delivery, held, counts, delay, error)
            case Release(delay=delay):
                return self._posting(delivery, held, held.counts.released(), delay)
            case Dead(reason=reason, error=error, crash=crash):
                counts = held.counts.ended_by_crash() if crash else held.counts
                return self._dead(delivery.queue, delivery.message, counts, held.headers, reason, error)
            case Done():
                raise AssertionError("a Done has no copy")

    def _posting(
        self, delivery: Delivery, held: Held, counts: Counts, delay: float, error: RunError | None = None
    ) -> Posting:
        message, queue = delivery.message, delivery.queue
        errors = with_error(errors_of(held.headers), error)
        units = self._topology.units(delay)
        exchange, key = self._topology.delayed(queue, units) if units > 0 else ("", self._topology.queue(queue))
        headers = headers_of(message.id, counts, errors, due=self._topology.due(time.time(), units))
        return Posting(exchange, key, headers, message.body, message.priority)

    def _dead(
        self,
        queue: str,
        message: Message,
        counts: Counts,
        headers: Any,
        reason: DeadReason,
        error: RunError | None = None,
    ) -> Posting:
        errors = with_error(errors_of(headers), error)
        self._died = max(datetime.now(UTC), self._died + _MICROSECOND)  # so that those of one moment keep their order
        died = (self._died, reason)
        return Posting(
            "", self._topology.dead(queue), headers_of(message.id, counts, errors, died), message.body, message.priority
        )

    async def _store(self, postings: Sequence[Posting], deadline: float) -> list[Outcome]:
        """Have copies stored; once more those that found missing what the library itself has made."""
        try:
            await self._make_holds(postings)
            outcomes = await self._post.copies.put(postings, deadline)
            again = [at for at, outcome in enumerate(outcomes) if outcome == "unroutable"]
            if again and await self._made_again([postings[at] for at in again]):
                once_more = await self._post.copies.put([postings[at] for at in again], deadline)
                for at, outcome in zip(again, once_more, strict=True):
                    outcomes[at] = outcome
        except BackendUnavailable as error:
            return [error for _ in postings]
        return outcomes

    async def _made_again(self, postings: Sequence[Posting]) -> bool:
        """Whether there may be a place for them now: levels of the ladder, a queue of dead letters."""
        delayed = [posting for posting in postings if posting.exchange]
        if delayed:
            self._post.admin.forget_holds()
            await self._make_holds(delayed)
        dead = {posting.key for posting in postings if not posting.exchange}
        there = [
            await self._post.admin.declare_dead(name)
            for name in self._holdings.names
            if self._topology.dead(name) in dead
        ]
        return bool(delayed) or any(there)

    async def _make_holds(self, postings: Sequence[Posting]) -> None:
        await self._post.admin.make_holds(
            max((self._topology.units_of(posting.key) for posting in postings), default=0)
        )

    def _acknowledge(self, acks: Sequence[Held]) -> None:
        by_lane: dict[Lane, list[int]] = {}
        for held in acks:
            by_lane.setdefault(held.lane, []).append(held.tag)
        for lane, tags in by_lane.items():
            lane.acknowledge(tags)

    def count_crash(self, lane: Lane, queue: str, content: Content) -> "asyncio.Task[None]":
        """A message that somebody had and did not settle: published again, or dead; done when it is acknowledged."""
        headers = content.properties.headers
        counts = counts_of(headers).crashed()
        message = Message(id_of(content.properties, content.body), content.body, content.properties.priority or 0)
        limit = self._crash_limit if counts.crash_limit is None else counts.crash_limit
        if counts.crashes >= limit:
            _log.error("job %s of queue %s is dead: its runs end without a settlement", message.id, queue)
            posting = self._dead(queue, message, counts, headers, "crash_limit")
        else:
            errors = errors_of(headers)
            fresh = headers_of(message.id, counts, errors)
            posting = Posting("", self._topology.queue(queue), fresh, message.body, message.priority)
        lane.add(content.frame.delivery_tag)
        counting = asyncio.get_running_loop().create_task(
            self._count(lane, queue, content.frame.delivery_tag, posting, counts.number)
        )
        self._counting.add(counting)
        counting.add_done_callback(self._counting.discard)
        return counting

    async def _count(self, lane: Lane, queue: str, tag: int, posting: Posting, number: int) -> None:
        [outcome] = await self._store([posting], time.monotonic() + _COPY_WITHIN)
        if outcome == "stored":
            lane.acknowledge([tag])
        else:
            job_id = posting.headers["mtj-id"]
            _log.warning("job %s of queue %s could not be counted: %s", job_id, queue, outcome)
            await asyncio.sleep(_AGAIN_AFTER)
            self._post.remember(job_id, number)
            lane.give_back(tag)  # it comes again
        self._changed()


def _not_yet() -> BackendUnavailable:
    return BackendUnavailable(
        "RabbitMQ has not taken the copy yet: it blocks publishers, it is out of memory or disk; it is kept for then",
        maybe_published=True,
    )
