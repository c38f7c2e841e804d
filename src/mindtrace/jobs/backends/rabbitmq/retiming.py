"""`Retiming`: after a restart of the broker, delayed jobs are put where they belong by now.

A level of the ladder holds a job for a fixed time from the moment it came there. Where that ended while the broker was
away, the job goes on when it is back, and is late from then on by as much. So the first worker that connects after a
restart takes the delayed jobs out, and publishes each with what is left of its delay: confirmed, then acknowledged, so
a crash between doubles one and loses none.

An exchange that is not durable tells whether the broker was restarted: whoever finds it missing takes the turn, which
is a queue that only one connection can have, and makes the exchange when all is done.

The levels are looked through downwards, the way that jobs take, so that none gets past. But what goes from one level to
the next is in neither for a while, after a restart for seconds if there is much. So it is done again until no job is
found that had gone a step before it was ever seen.
"""

import asyncio
import logging
import math
import time
from contextlib import suppress
from functools import partial
from typing import Any

from pamqp import commands

from mindtrace.jobs.backends.rabbitmq.admin import Admin
from mindtrace.jobs.backends.rabbitmq.channels import ChannelClosed, Content
from mindtrace.jobs.backends.rabbitmq.counts import counts_of, due_of, errors_of, headers_of, id_of
from mindtrace.jobs.backends.rabbitmq.lane import Lane
from mindtrace.jobs.backends.rabbitmq.line import Line
from mindtrace.jobs.backends.rabbitmq.outbox import Outbox, Outcome, Posting
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS, Topology
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, JobsError

_log = logging.getLogger(__name__)

_TAG = "delays"
_AHEAD = 50  # unacknowledged, and so in memory; a body may have some MB
_SENDING = 20  # batches; each that finds the queue quiet takes one message more than may be unacknowledged
_QUIET = 0.05
_PASSES = 10
_UNDER_WAY = 3.0  # for so long jobs may be between two levels, and seen in none, after a start of the broker
_AGAIN_AFTER = 1.0
_CLOSE_WITHIN = 1.0
_LOWEST = 3  # what is left in and below this level is less than is promised
_MOST = 10_000  # with more, it would make them late itself, and be a load for a server that has just started
_LOCKED = 405


class Retiming:
    """Of one namespace; used from the keeper's loop.

    Args:
        admin: what looks.
        copies: what stores.
        topology: the names.
    """

    def __init__(self, admin: Admin, copies: Outbox, topology: Topology) -> None:
        self._admin, self._copies, self._topology = admin, copies, topology
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    def on_up(self, line: Line) -> None:
        """There is a connection: see whether it is the first one since the broker started."""
        task = asyncio.create_task(self._see(line), name="mindtrace-jobs rabbitmq delays")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Stop, if there is time for it once what was taken out is put back: else some of it would be there twice."""
        self._closing.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_WITHIN)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _see(self, line: Line) -> None:
        while not (line.lost.done() or self._closing.is_set()):
            try:
                if await self._is_done() or await self._take_turn(line):
                    return
            except AuthenticationFailed as error:
                _log.warning("delayed jobs may be late where RabbitMQ was restarted: %s", error)
                return
            except JobsError as error:
                _log.info("delayed jobs are not looked through yet: %s", error)
            await self._pause()

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_AGAIN_AFTER):
                await self._closing.wait()

    async def _is_done(self) -> bool:
        return await self._admin.has_exchange(self._topology.up_exchange)

    async def _take_turn(self, line: Line) -> bool:
        """Look through all levels, unless somebody else is at it."""
        turn = await line.channel()
        try:
            await turn.call(commands.Queue.Declare(queue=self._topology.turn_queue, exclusive=True))
            if not await self._is_done() and await self._put_all():
                await self._admin.make_up_exchange()
        except ChannelClosed as error:
            if error.code == _LOCKED:
                return False
            raise
        finally:
            turn.begin(commands.Queue.Delete(queue=self._topology.turn_queue))  # a refusal has closed the channel
            turn.begin_close()
        return True

    async def _put_all(self) -> bool:
        """Whether it came to an end."""
        counts = list[int]()
        while len(counts) < LEVELS and (kept := await self._admin.look(self._topology.hold(len(counts)))) is not None:
            counts.append(kept.messages)
        if not counts:
            return True
        if sum(counts) > _MOST:
            _log.warning("RabbitMQ was restarted: of %d delayed jobs some are late by as much", sum(counts))
            return True
        began, started, seen = time.time(), time.monotonic(), set[Any]()
        for _ in range(_PASSES):
            new = 0
            for level in range(len(counts) - 1, _LOWEST - 1, -1):
                new += await self._put(level, seen, began)
            if not new and time.monotonic() - started > _UNDER_WAY:
                break
            await self._pause()
            if self._closing.is_set():
                return False
        if seen:
            seconds = time.monotonic() - started
            _log.info("RabbitMQ was restarted: looked through %d delayed jobs, %.1f s", len(seen), seconds)
        return True

    async def _put(self, level: int, seen: set[Any], began: float) -> int:
        """Publish what came to a level before this was called for the rest of its time.

        Gives how many of those never seen may be late: they had gone a step when this began.

        Raises:
            AuthenticationFailed: this user may not read there, or not publish.
            BackendUnavailable: the connection is gone, or RabbitMQ does not take what is published.
        """
        queue = self._topology.hold(level)
        taking = _Taking(Lane(await self._admin.channel()), queue)
        sending: set[asyncio.Future[list[Outcome]]] = set()
        back = set[Any]()  # what was put into this level again: behind it there is nothing old
        new = taken = 0

        def put(got: list[Content]) -> bool:
            """Whether there may be more."""
            nonlocal new, taken
            found = [(content, posting) for content in got if (posting := self._posting(content)) is not None]
            jobs = {_job_of(posting) for _, posting in found}
            new += sum(_job_of(job) not in seen and self._had_gone(one, level, began) for one, job in found)
            taken += len(got)
            more = back.isdisjoint(jobs) and taken < _MOST  # of what somebody publishes meanwhile there may be no end
            seen.update(jobs)
            back.update(_job_of(posting) for _, posting in found if posting.exchange == queue)
            # However long it takes: what is handed back after it was sent is there twice.
            future = self._copies.put([posting for _, posting in found], math.inf)
            future.add_done_callback(partial(taking.settle, [content for content, _ in found]))
            sending.add(future)
            future.add_done_callback(sending.discard)
            return more

        try:
            while not self._closing.is_set() and (got := await taking.some()) and put(got):
                await taking.until_stored(sending, but=_SENDING)
            put(await taking.rest())
            await taking.until_stored(sending)
            put(await taking.flush())
            await taking.until_stored(sending)
        finally:
            taking.end()
            for future in list(sending):
                future.cancel()  # nothing more of it is sent
        return new

    def _had_gone(self, content: Content, level: int, began: float) -> bool:
        """Whether it was published before, and has come from a level above."""
        asked = self._topology.units_of(content.frame.routing_key or "")
        due = due_of(content.properties.headers)
        return asked >= 2 ** (level + 1) and due is not None and due - asked * self._topology.unit < began

    def _posting(self, content: Content) -> Posting | None:
        """What is left of its delay; None for what is none of ours."""
        properties, key = content.properties, content.frame.routing_key or ""
        due, asked = due_of(properties.headers), self._topology.units_of(key)
        if due is None or not asked:
            return None
        units = min(max(self._topology.units(due - time.time()), 1), asked)
        counts, errors = counts_of(properties.headers), errors_of(properties.headers)
        headers = headers_of(id_of(properties, content.body), counts, errors, due=due)
        exchange, key = self._topology.delayed_again(key, units)
        return Posting(exchange, key, headers, content.body, properties.priority or 0)


class _Taking:
    """What is taken out of one queue: pushed by the server, since each get would be a write to its disk.

    Args:
        lane: a channel of its own.
        queue: by its name on the server.
    """

    def __init__(self, lane: Lane, queue: str) -> None:
        self._lane, self._queue = lane, queue
        self._came: list[Content] = []
        self._changed = asyncio.Event()
        self._begun = False
        self._refusal: JobsError | None = None

    async def some(self) -> list[Content]:
        """What has come; nothing where the queue is empty."""
        while True:
            if not self._came and self._begun:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_QUIET):
                        await self._changed.wait()
            if not self._came:
                content = await self._lane.flush(self._queue)  # which knows for certain
                if content is not None:
                    self._came.append(content)
            if not self._came or self._begun:
                came, self._came = self._came, []
                self._changed.clear()
                return came
            await self._begin()

    async def _begin(self) -> None:
        self._begun = True
        channel = self._lane.channel
        channel.on_content = self._on_content
        channel.gone.add_done_callback(lambda _: self._changed.set())
        await channel.call(commands.Basic.Qos(prefetch_count=_AHEAD))
        await channel.call(commands.Basic.Consume(queue=self._queue, consumer_tag=_TAG))

    def _on_content(self, content: Content) -> None:
        self._lane.add(content.frame.delivery_tag)
        self._came.append(content)
        self._changed.set()

    def settle(self, contents: list[Content], outcomes: "asyncio.Future[list[Outcome]]") -> None:
        """Acknowledge what is stored. What has no place to go stays."""
        if outcomes.cancelled():
            return
        together = list(zip(contents, outcomes.result(), strict=True))
        self._lane.acknowledge([one.frame.delivery_tag for one, outcome in together if outcome == "stored"])
        for _, outcome in together:
            if isinstance(outcome, JobsError):
                self._refusal = outcome
            elif outcome == "refused":
                self._refusal = BackendUnavailable("RabbitMQ did not take a delayed job")

    async def until_stored(self, sending: "set[asyncio.Future[list[Outcome]]]", but: int = 0) -> None:
        """Wait for all of them but so many.

        Raises:
            JobsError: one was refused, or what was taken out is lost meanwhile, with its connection.
        """
        gone = self._lane.channel.gone
        while len(sending) > but and not gone.done():
            either: set[asyncio.Future[Any]] = {*sending, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise gone.result()
        if self._refusal is not None:
            raise self._refusal

    async def rest(self) -> list[Content]:
        """Take no more. What had come until then."""
        if self._begun:
            await self._lane.channel.call(commands.Basic.Cancel(consumer_tag=_TAG))
        came, self._came = self._came, []
        return came

    async def flush(self) -> list[Content]:
        """Have the queue know of all that was acknowledged, which may cost a message."""
        content = await self._lane.flush(self._queue) if self._lane.is_dirty else None
        return [] if content is None else [content]

    def end(self) -> None:
        """What was not acknowledged goes back."""
        self._lane.channel.begin_close()


def _job_of(posting: Posting) -> tuple[Any, Any]:
    """What tells it from others, also from another under the same id."""
    return posting.headers["mtj-id"], posting.headers["mtj-due"]
