"""`Admin`: looks at queues and makes them, on a channel that is thrown away when the server refuses something."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pamqp import commands
from pamqp.base import Frame

from mindtrace.jobs.backend import QueueSpec
from mindtrace.jobs.backends.rabbitmq.channels import REPLY_WITHIN, Channel, ChannelClosed
from mindtrace.jobs.backends.rabbitmq.link import Link
from mindtrace.jobs.backends.rabbitmq.topology import Topology
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, JobsError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_NOT_FOUND, _DIFFERENT = 404, 406
_PROBES = 6
_IDLE_CHANNELS = 4
_READER = "reader"
_END_WITHIN = 1.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A queue as the server counts it."""

    messages: int
    consumers: int


class Admin:
    """Administration over one link. A call that loses its connection is made again on the next: all may be repeated.

    Args:
        link: whose connection it uses.
        topology: the names.
    """

    def __init__(self, link: Link, topology: Topology) -> None:
        self._link, self._topology = link, topology
        self._idle: list[Channel] = []
        self._units = 0  # the longest delay for which there are levels

    async def look(self, queue: str) -> Kept | None:
        """A queue by its name on the server; None if there is none.

        Raises:
            BackendUnavailable: no answer within 5 s.
        """

        async def asked(channel: Channel) -> Kept | None:
            try:
                reply = await channel.call(commands.Queue.Declare(queue=queue, passive=True))
            except ChannelClosed as error:
                if error.code == _NOT_FOUND:
                    return None
                raise
            return Kept(reply.message_count, reply.consumer_count)

        return await self._on_a_channel(asked)

    async def declare(self, spec: QueueSpec) -> None:
        """Make the queue, its dead letters and its bindings.

        Raises:
            ChannelClosed: with code 406, it is there and differs.
            AuthenticationFailed: this user may not.
            BackendUnavailable: no answer within 5 s.
        """
        topology = self._topology
        queue, dead = topology.queue(spec.name), topology.dead(spec.name)
        declare, exchange = commands.Queue.Declare, commands.Exchange.Declare
        calls: list[Frame] = [
            declare(queue=queue, durable=True, arguments=dict(topology.arguments(spec))),
            declare(queue=dead, durable=True, arguments=dict(topology.dead_arguments)),
            exchange(
                exchange=topology.due_exchange,
                exchange_type="topic",
                durable=True,
                arguments=dict(topology.due_arguments),
            ),
            commands.Queue.Bind(
                queue=queue, exchange=topology.due_exchange, routing_key=topology.due_pattern(spec.name)
            ),
        ]
        if spec.kind == "priority":
            calls += [
                exchange(exchange=topology.priority_exchange, exchange_type="direct", durable=True),
                commands.Queue.Bind(queue=queue, exchange=topology.priority_exchange, routing_key=queue),
            ]
        calls += self._written_down()
        await self._on_a_channel(lambda channel: _all(channel, calls))

    async def declare_dead(self, queue: str) -> bool:
        """Make the queue of its dead letters again, if the queue itself is there. Returns whether it is."""
        if await self.look(self._topology.queue(queue)) is None:
            return False
        arguments = dict(self._topology.dead_arguments)
        dead = self._topology.dead(queue)
        await self._on_a_channel(_Asked(commands.Queue.Declare(queue=dead, durable=True, arguments=arguments)))
        return True

    async def begin_to_read(self, queue: str) -> Channel:
        """Have all know that somebody reads its dead letters, until `end_reading`, or the channel is closed.

        Raises:
            BackendUnavailable: no connection within 5 s, or it was lost.
            AuthenticationFailed: this user may not declare; the channel is closed.
        """
        channel, mark = await self.channel(), self._topology.reading(queue)
        arguments = dict(self._topology.reading_arguments)
        calls: list[Frame] = [
            commands.Queue.Declare(queue=mark, durable=True, auto_delete=True, arguments=arguments),
            commands.Basic.Consume(queue=mark, consumer_tag=_READER, no_ack=True),
        ]
        try:
            await _all(channel, calls)
        except BaseException:
            channel.begin_close()
            raise
        return channel

    async def end_reading(self, channel: Channel) -> None:
        """When this returns nobody counts this reader any more; or after a second."""
        try:
            with suppress(JobsError, TimeoutError):
                async with asyncio.timeout(_END_WITHIN):
                    await channel.call(commands.Basic.Cancel(consumer_tag=_READER))  # which its queue answers
        finally:  # also for a caller who is cancelled here
            channel.begin_close()

    async def readers(self, queue: str) -> int:
        """How many read its dead letters at this moment."""
        mark = await self.look(self._topology.reading(queue))
        return 0 if mark is None else mark.consumers

    async def spec_of(self, name: str) -> QueueSpec | None:
        """How a queue that exists was declared, as far as the server's refusals tell; None if it is none of ours.

        Raises:
            AuthenticationFailed: this user may not declare, so nobody knows.
            BackendUnavailable: no answer within 5 s.
        """
        spec: QueueSpec | None = QueueSpec(name)
        for _ in range(_PROBES):
            assert spec is not None  # noqa: S101 (left below)
            arguments = dict(self._topology.arguments(spec))
            frame = commands.Queue.Declare(queue=self._topology.queue(name), durable=True, arguments=arguments)
            try:
                await self._on_a_channel(_Asked(frame))
            except ChannelClosed as error:
                if error.code != _DIFFERENT:
                    raise
                spec = self._topology.corrected(spec, str(error))
                if spec is None:
                    return None
            else:
                return spec
        return None

    async def delete(self, queue: str) -> None:
        """Delete a queue by its name on the server; nothing happens if there is none."""
        await self._on_a_channel(_Asked(commands.Queue.Delete(queue=queue)))

    async def purge(self, queue: str) -> int | None:
        """Forget what is ready in it. How many that were; None if there is no such queue."""

        async def asked(channel: Channel) -> int | None:
            try:
                reply = await channel.call(commands.Queue.Purge(queue=queue))
            except ChannelClosed as error:
                if error.code == _NOT_FOUND:
                    return None
                raise
            count: int = reply.message_count
            return count

        return await self._on_a_channel(asked)

    async def make_holds(self, units: int) -> None:
        """Have the levels that a delay of so many units needs."""
        if units.bit_length() <= self._units:
            return
        topology = self._topology
        exchange, queue = commands.Exchange.Declare, commands.Queue.Declare
        calls: list[Frame] = [
            exchange(exchange=topology.gone_exchange, exchange_type="fanout", durable=True),
            queue(queue=topology.gone_queue, durable=True, arguments=dict(topology.dead_arguments)),
            commands.Queue.Bind(queue=topology.gone_queue, exchange=topology.gone_exchange),
            exchange(
                exchange=topology.due_exchange,
                exchange_type="topic",
                durable=True,
                arguments=dict(topology.due_arguments),
            ),
        ]
        for hold in topology.holds(units):
            calls += [
                queue(queue=hold.name, durable=True, arguments=dict(hold.arguments)),
                exchange(exchange=hold.name, exchange_type="topic", durable=True),
                commands.Queue.Bind(queue=hold.name, exchange=hold.name, routing_key=hold.held_pattern),
                commands.Exchange.Bind(destination=hold.below, source=hold.name, routing_key=hold.passed_pattern),
            ]
        if not self._units and await self.look(topology.hold(0)) is None:
            calls.append(self._up_exchange())  # the first of the namespace: no restart can have made any late
        calls += self._written_down()
        await self._on_a_channel(lambda channel: _all(channel, calls))
        self._units = units.bit_length()

    async def has_exchange(self, exchange: str) -> bool:
        """Whether the server has an exchange."""
        try:
            await self._on_a_channel(_Asked(commands.Exchange.Declare(exchange=exchange, passive=True)))
        except ChannelClosed as error:
            if error.code != _NOT_FOUND:
                raise
            return False
        return True

    async def make_up_exchange(self) -> None:
        """Have the exchange that tells that the server has not been restarted since."""
        await self._on_a_channel(_Asked(self._up_exchange()))

    def _up_exchange(self) -> Frame:
        return commands.Exchange.Declare(exchange=self._topology.up_exchange, durable=False)

    def _written_down(self) -> list[Frame]:
        """Makes another quorum queue, and deletes it.

        The newest one of a server is written down with the one after it, or half a second later: killed before that,
        3.10.8 came back with an empty queue, and what was confirmed in it was gone. So the newest is one of no worth.
        """
        newest = (
            f"{self._topology.namespace}:{secrets.token_hex(8)}.hold"  # two who make the same one end in an error 541
        )
        return [
            commands.Queue.Declare(queue=newest, durable=True, arguments=dict(self._topology.newest_arguments)),
            commands.Queue.Delete(queue=newest),
        ]

    def forget_holds(self) -> None:
        """They were not all there: make them again before the next delay."""
        self._units = 0

    async def channel(self) -> Channel:
        """Another channel, for whoever reads; closed by its user.

        Raises:
            BackendUnavailable: no connection within 5 s.
        """
        return await (await self._link.connected(REPLY_WITHIN)).channel()

    async def _on_a_channel(self, ask: Callable[[Channel], Awaitable[_T]]) -> _T:
        """Ask on a channel that nobody else uses meanwhile: the server closes it for a refusal, which is this call's.

        It is used again only after an answer: of a call that was cancelled the next one would get the refusal.
        """
        deadline = time.monotonic() + REPLY_WITHIN
        while True:
            line = await self._link.connected(max(0.0, deadline - time.monotonic()))
            self._idle = [channel for channel in self._idle if not channel.is_closed]
            channel: Channel | None = self._idle.pop() if self._idle else None
            answered = False
            try:
                if channel is None:
                    channel = await line.channel()
                answer = await ask(channel)
                answered = True
            except (ChannelClosed, AuthenticationFailed):
                raise
            except BackendUnavailable:
                if not line.lost.done() or time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(0)  # the link has yet to see that this line is lost
                continue
            finally:
                if channel is not None:
                    if answered and len(self._idle) < _IDLE_CHANNELS:
                        self._idle.append(channel)
                    else:
                        channel.begin_close()
            return answer


@dataclass(frozen=True, slots=True)
class _Asked:
    """One call."""

    frame: Frame

    async def __call__(self, channel: Channel) -> Any:
        return await channel.call(self.frame)


async def _all(channel: Channel, calls: Sequence[Frame]) -> None:
    """One round trip for all of them; the first refusal is raised."""
    replies: list[Any] = [channel.begin(call) for call in calls]
    for reply in replies:
        await channel.reply(reply)
