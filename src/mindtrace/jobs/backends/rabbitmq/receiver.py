"""A receiver on RabbitMQ as its user's loop sees it: each call goes to the keeper's loop and comes back once."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from mindtrace.jobs.backend import Home, Outages, Receiver
from mindtrace.jobs.backends.rabbitmq.consuming import Consuming
from mindtrace.jobs.backends.rabbitmq.keeper import Keeper
from mindtrace.jobs.backends.rabbitmq.settling import Pairs
from mindtrace.jobs.delivery import Delivery, Exchanged, Settled
from mindtrace.jobs.errors import BackendUnavailable, Closed, LeaseLost

LEAVE_WITHIN = 4.0


class RabbitMQReceiver(Receiver):
    """See `Receiver`.

    Args:
        home: the loop it belongs to.
        keeper: where its deliveries are.
        queues: it takes from, in order.
        slots: see `Backend.receiver`, as the rest.
    """

    def __init__(
        self,
        home: Home,
        keeper: Keeper,
        queues: Sequence[str],
        *,
        slots: int,
        lease: float,
        crash_limit: int,
        keep: bool,
        strict: bool,
        max_stall: float | None,
        lost: Callable[[Delivery], None] | None,
    ) -> None:
        self._home, self._keeper, self._lost = home, keeper, lost
        self._loop = asyncio.get_running_loop()
        self._ended = False
        self._consuming = Consuming(
            keeper.post,
            queues,
            slots=slots,
            lease=None if keep else lease,
            crash_limit=crash_limit,
            strict=strict,
            max_stall=max_stall if keep else None,
            on_lost=self._on_lost,
            ask=self._ask,
        )

    @property
    def has_ended(self) -> bool:
        """Whether it was left, or its backend closed."""
        return self._ended

    def leased(self, queue: str) -> int:
        """How many jobs of a queue it holds."""
        return sum(delivery.queue == queue for delivery in list(self._consuming.held))  # one step of the interpreter

    def consumers(self, queue: str) -> int:
        """How many consumers the server counts for it."""
        return self._consuming.consumers(queue)

    async def exchange(self, pairs: Pairs, limit: int, *, wait: float = 0.0) -> Exchanged:
        """Settle and take; a caller who is cancelled misses nothing, the next call has it."""
        if self._ended:
            if not pairs:
                raise Closed("the receiver was left, or its backend closed")
            return Exchanged([LeaseLost(delivery.message.id) for delivery, _ in pairs], [])
        self._home.check()
        answer: asyncio.Future[Exchanged] = self._loop.create_future()
        call = self._consuming.call(pairs, limit, wait)

        async def carried_out() -> None:
            result: Exchanged | Exception
            try:
                result = await self._consuming.exchange(call)
            except asyncio.CancelledError:  # the backend is being closed: the caller would wait for ever
                result = _unanswered(call.pairs)
            except Exception as error:  # a settlement that cannot be written down, say: the caller is told
                result = error
            try:
                self._loop.call_soon_threadsafe(given, result)
            except RuntimeError:  # that loop is closed: nobody will ever settle what it held
                self._consuming.abandon()

        def given(result: Exchanged | Exception) -> None:
            if answer.done():  # the caller was cancelled
                if isinstance(result, Exchanged) and result.deliveries:
                    self._keeper.call(self._consuming.put_back, result.deliveries)
            elif isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        self._keeper.begin(carried_out)
        try:
            exchanged = await answer
        except asyncio.CancelledError:
            call.gone = True  # at once, from this thread: a nudge that follows is for the next call
            self._keeper.call(self._consuming.wake)
            if answer.done() and not answer.cancelled() and answer.exception() is None:  # it had come already
                self._keeper.call(self._consuming.put_back, answer.result().deliveries)
            raise
        if not self.has_ended:
            return exchanged
        if not pairs:  # ended meanwhile, which releases what was taken
            raise Closed("the receiver was left, or its backend closed")
        return Exchanged(exchanged.settled, [], exchanged.missing)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """Whether they are still held; from any thread."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            self._home.check()
        answer: asyncio.Future[list[Settled]] = loop.create_future()

        def asked() -> None:
            answers = self._consuming.extend(deliveries)
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(told, answers)

        def told(answers: list[Settled]) -> None:
            if not answer.done():
                answer.set_result(answers)

        if self._ended:
            return [LeaseLost(delivery.message.id) for delivery in deliveries]
        self._keeper.call(asked)
        return await answer

    def nudge(self) -> None:
        """End the wait of the exchange now in progress, or of the next one."""
        if not self._consuming.nudged:
            self._consuming.nudged = True
            if self._consuming.is_waiting:  # else it looks before it waits
                self._keeper.call(self._consuming.wake)

    def keeper_idle_for(self) -> float:
        """Seconds since the loop in which its deliveries are last turned."""
        return self._keeper.idle_for()

    def is_away(self) -> bool:
        """Whether the connection that delivers is lost."""
        return self._keeper.post.link.is_away

    def outages(self) -> Outages:
        """How often the connection that delivers was lost."""
        return self._keeper.post.link.outages

    def lose_all(self, queue: str) -> None:
        """The queue is gone, and with it every lease on its jobs."""
        self._keeper.call(self._consuming.lose_all, queue)

    async def end(self) -> None:
        """Release what is held and be of no more use; within a few seconds, whatever the server does."""
        if not self._ended:
            self._ended = True
            until = time.monotonic() + LEAVE_WITHIN
            await self._keeper.run(lambda: self._consuming.end(until), LEAVE_WITHIN + 1.0)

    def _on_lost(self, delivery: Delivery) -> None:
        """From the keeper's loop."""
        if self._lost is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._lost, delivery)

    def _ask(self, turned: Callable[[], None]) -> None:
        """Have it called by a turn of the user's loop; from the keeper's."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(turned)


def _unanswered(pairs: Pairs) -> Exchanged | Exception:
    """What the caller of an exchange is told that was cut short: nobody knows what became of its settlements."""
    closed = "the backend was closed meanwhile"
    return Exchanged([BackendUnavailable(closed) for _ in pairs], []) if pairs else Closed(closed)
