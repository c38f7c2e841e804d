"""`RabbitMQBackend`: queues on a RabbitMQ server, shared by every process that names the same namespace."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Self

from mindtrace.jobs.backend import (
    DEAD_LETTERS_MANY,
    Backend,
    DeadLetters,
    Depth,
    QueueSpec,
    Receiver,
    Traits,
)
from mindtrace.jobs.backends.opening import Opening
from mindtrace.jobs.backends.rabbitmq.address import CONNECT_WITHIN, Address
from mindtrace.jobs.backends.rabbitmq.admin import Admin
from mindtrace.jobs.backends.rabbitmq.channels import ChannelClosed
from mindtrace.jobs.backends.rabbitmq.dead_letters import Opened, RabbitMQDeadLetters
from mindtrace.jobs.backends.rabbitmq.keeper import Keeper
from mindtrace.jobs.backends.rabbitmq.link import Link
from mindtrace.jobs.backends.rabbitmq.outbox import Outbox
from mindtrace.jobs.backends.rabbitmq.publishing import NAME, Publisher, in_parts
from mindtrace.jobs.backends.rabbitmq.receiver import RabbitMQReceiver
from mindtrace.jobs.backends.rabbitmq.topology import (
    DEFAULT_NAMESPACE,
    GONE,
    MOST_PRIORITY_LEVELS,
    PRIORITY_LEVELS,
    Topology,
)
from mindtrace.jobs.delivery import Delivery, Published
from mindtrace.jobs.errors import (
    AuthenticationFailed,
    ConfigError,
    NotSupported,
    QueueInUse,
    QueueMismatch,
    QueueNotFound,
)
from mindtrace.jobs.job import checked_namespace
from mindtrace.jobs.retry import is_seconds
from mindtrace.jobs.wire import Message

_log = logging.getLogger(__name__)

_OLDEST = (3, 10)
_MOST_SLOTS = 65535  # what a prefetch can say
_TRAITS = Traits(
    name=NAME,
    durability="quorum",
    priorities=(0, MOST_PRIORITY_LEVELS),
    stack=False,
    lease_clock=False,
    deduplicates=False,
    fences=False,
    keeps_place=False,
    atomic_batch=False,
    lookup=False,
    exact_depth=False,
    lists_queues=False,
    run_limit=1800.0,  # its consumer_timeout, of which no client is told
)


class RabbitMQBackend(Backend):
    """The backend on a RabbitMQ server, version 3.10 or later, without any plugin. It connects when it is opened.

    Args:
        host: name or address.
        port: its port; None for 5672, or 5671 with TLS.
        username: of a user.
        password: its password.
        virtual_host: where the queues are.
        tls: encrypt the connection, and verify the server's certificate.
        ca_certs: a file of certificates to verify against, in place of the system's.
        certfile: a client certificate.
        keyfile: its key.
        allow_insecure: with TLS, take any certificate; a warning at every start.
        namespace: what tells applications in one virtual host apart: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
        heartbeat: seconds; a server that is silent for three of them is given up, and the leases with it.
        max_stall: seconds that the event loop may stand still until its jobs are given back, and others run them;
            None: never.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int | None = None,
        username: str = "guest",
        password: str = "guest",  # noqa: S107 (what every RabbitMQ has for its own machine)
        *,
        virtual_host: str = "/",
        tls: bool = False,
        ca_certs: str | None = None,
        certfile: str | None = None,
        keyfile: str | None = None,
        allow_insecure: bool = False,
        namespace: str = DEFAULT_NAMESPACE,
        heartbeat: int = 10,
        max_stall: float | None = 600.0,
    ) -> None:
        address = Address(
            host, port, username, password, virtual_host, tls, ca_certs, certfile, keyfile, allow_insecure, heartbeat
        )
        self._set_up(address, namespace, max_stall)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        allow_insecure: bool = False,
        heartbeat: int = 10,
        max_stall: float | None = 600.0,
    ) -> Self:
        """As the constructor, with `amqp://[user:password@]host[:port][/virtual-host]`; `amqps://` for TLS.

        With `amqps://` the query may have `cafile`, `certfile` and `keyfile`, each the name of a file.

        Raises:
            ConfigError: it is no such URL; the text never shows it, since it may hold a password.
        """
        backend = cls.__new__(cls)
        backend._set_up(Address.of_url(url, allow_insecure=allow_insecure, heartbeat=heartbeat), namespace, max_stall)
        return backend

    def _set_up(self, address: Address, namespace: str, max_stall: float | None) -> None:
        if max_stall is not None and not (is_seconds(max_stall) and max_stall > 0):
            raise ConfigError(f"max_stall={max_stall!r}: seconds above 0, or None")
        self._max_stall = max_stall
        self._address, self._topology = address, Topology(checked_namespace(namespace))
        self._opening: Opening[_Open] = Opening("RabbitMQ backend", self._connect)
        self._random = Random()  # noqa: S311 (jitter, not secrets)

    def __repr__(self) -> str:
        return f"<RabbitMQBackend {self._address} namespace={self._topology.namespace}>"

    @property
    def traits(self) -> Traits:
        """What it can do. Of durability that of its FIFO queues; a priority queue is on one node's disk."""
        return _TRAITS

    async def open(self) -> None:
        """Connect, from this loop.

        Raises:
            BackendUnavailable: no server within 5 s.
            AuthenticationFailed: it refuses the login or the virtual host.
            ConfigError: it is too old, or this backend is open in another loop.
            ForkedProcess: it was opened in the parent process.
        """
        await self._opening.open()

    async def _connect(self, known_away: bool) -> "_Open":
        link = Link(self._address, "admin", self._random, quiet=known_away)
        link.start()
        try:
            line = await link.connected(CONNECT_WITHIN)
            _check_version(line.version)
        except BaseException:
            await link.aclose()
            raise
        if self._address.tls and self._address.allow_insecure:
            _log.warning("RabbitMQ at %s: the certificate is not verified (allow_insecure=True)", self._address)
        _log.info("RabbitMQ %s at %s", line.version, self._address)
        return _Open(link, self._address, self._random, self._topology)

    async def aclose(self) -> None:
        """End the receivers, which releases what they hold, and the connections; within a few seconds."""
        await self._opening.aclose()

    async def declare(self, spec: QueueSpec, *, attach: bool = False) -> None:
        """Make the queue if there is none: quorum for FIFO, classic for priorities."""
        opened = self._opened()
        self._check_kind(spec)
        known = opened.publisher.specs.get(spec.name)
        try:
            await opened.admin.declare(spec)
        except AuthenticationFailed:
            if not attach or await opened.admin.look(self._topology.queue(spec.name)) is None:
                raise
            opened.publisher.specs[spec.name] = None  # who may not declare is not told how it was declared
            return
        except ChannelClosed as error:
            if error.code != 406:
                raise
            there = await opened.admin.spec_of(spec.name)
            if not attach:
                raise QueueMismatch(spec.name, _differences(there, spec)) from error
            opened.publisher.specs[spec.name] = there
            if there is not None:
                opened.declared[spec.name] = there
            return
        if known is not None and known != spec and _real(known) == _real(spec):  # the broker cannot tell the two apart
            if not attach:
                raise QueueMismatch(spec.name, _differences(known, spec))
            return
        opened.publisher.specs[spec.name] = opened.declared[spec.name] = spec

    def _check_kind(self, spec: QueueSpec) -> None:
        if spec.name == GONE:
            raise NotSupported(
                f"a queue called {GONE!r}", NAME, "another name: so are the dead letters of queues that are gone"
            )
        if spec.kind == "stack":
            raise NotSupported("a stack queue", NAME, "the Local or the Redis backend")
        if spec.priority_levels is not None and spec.priority_levels > MOST_PRIORITY_LEVELS:
            raise NotSupported(
                f"priority_levels={spec.priority_levels}", NAME, f"a number from 1 to {MOST_PRIORITY_LEVELS}"
            )
        if (spec.priority_levels or 0) > PRIORITY_LEVELS:
            _log.warning(
                "the queue %s has %d priority levels: above %d RabbitMQ is slow, at 255 four times as slow",
                spec.name,
                spec.priority_levels,
                PRIORITY_LEVELS,
            )

    async def delete(self, queue: str, *, force: bool = False) -> None:
        """Delete a queue and its waiting jobs; delayed ones come due for a queue that is gone.

        What other processes hold of it RabbitMQ does not tell: it refuses as long as they consume from it.
        """
        opened = self._opened()
        readers = 0 if force else await opened.admin.readers(queue)
        depth = await self._depth(opened, queue)
        if not force:
            readers = readers or await opened.admin.readers(queue)  # else it began and took them before the count
            kept = await opened.admin.look(self._topology.queue(queue))
            mine = sum(receiver.leased(queue) for receiver in opened.receivers)
            ours = sum(receiver.consumers(queue) for receiver in opened.receivers)
            others = 0 if kept is None else kept.consumers - ours
            beside = {"consumers": max(0, others), "reading its dead letters": readers}
            if depth.dead or mine or any(beside.values()):
                counts = {"leased": mine, "dead": depth.dead}
                raise QueueInUse(queue, counts | {what: count for what, count in beside.items() if count})
        opened.publisher.specs.pop(queue, None)
        opened.declared.pop(queue, None)
        await opened.admin.delete(self._topology.queue(queue))
        await opened.admin.delete(self._topology.dead(queue))
        for receiver in opened.receivers:  # those of other processes hear of it from the server, if they consume
            receiver.lose_all(queue)

    async def clean(self, queue: str) -> int:
        """Cancel all ready jobs. Delayed ones are not reached: at their time they come back."""
        count = await self._opened().admin.purge(self._topology.queue(queue))
        if count is None:
            raise QueueNotFound(queue)
        return count

    async def depth(self, queue: str) -> Depth:
        """How many jobs are ready and dead; the others RabbitMQ does not tell."""
        depth = await self._depth(self._opened(), queue)
        if depth.dead >= DEAD_LETTERS_MANY:
            _log.warning("the queue %s has %d dead letters: look, replay or purge", queue, depth.dead)
        return depth

    async def _depth(self, opened: "_Open", queue: str) -> Depth:
        ready = await opened.admin.look(self._topology.queue(queue))
        if ready is None:
            raise QueueNotFound(queue)
        async with opened.reading:  # what is being read is not in its queue
            dead = await opened.admin.look(self._topology.dead(queue))
        return Depth(ready.messages, None, None, 0 if dead is None else dead.messages)

    async def queues(self) -> list[QueueSpec]:
        """Those that this backend object has declared or attached to: RabbitMQ does not list them."""
        opened = self._opened()
        for name in list(opened.declared):
            if await opened.admin.look(self._topology.queue(name)) is None:
                opened.declared.pop(name, None)
        return [opened.declared[name] for name in sorted(opened.declared)]

    async def publish(self, queue: str, messages: Sequence[Message]) -> list[Published]:
        """Store the messages, each confirmed by the broker and with an outcome of its own.

        Calls of one tick of the loop share a round trip; within 10 s it is stored, or the outcome says that nobody
        knows.
        """
        publisher = self._opened().publisher
        if len(messages) <= 1:
            return await publisher.publish(queue, messages) if messages else []
        outcomes: list[Published] = []
        for part in in_parts(messages):
            outcomes += await publisher.publish(queue, part)
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
        """A receiver of these queues. Its leases end with its channel; with `keep=False` also by their time."""
        opened = self._opened()
        opened.keeper.start()
        receiver = RabbitMQReceiver(
            self._opening.home,
            opened.keeper,
            queues,
            slots=min(slots, _MOST_SLOTS),
            lease=lease,
            crash_limit=crash_limit,
            keep=keep,
            strict=strict,
            max_stall=self._max_stall,
            lost=lost,
        )
        opened.receivers.add(receiver)
        try:
            yield receiver
        finally:
            await opened.leave(receiver)

    def dead_letters(self, queue: str) -> DeadLetters:
        """The queue's dead letters; of `gone` those that came due for queues that were gone."""
        return RabbitMQDeadLetters(lambda: self._opened().for_reading, self._topology, queue)

    def _opened(self) -> "_Open":
        return self._opening.connected()


class _Open:
    """What an open backend has."""

    def __init__(self, link: Link, address: Address, random: Random, topology: Topology) -> None:
        self.admin: Admin = Admin(link, topology)
        self.outbox: Outbox = Outbox(address, "publish", random)
        self.publisher: Publisher = Publisher(self.outbox, self.admin, topology)
        self.keeper: Keeper = Keeper(address, random, topology)
        self.receivers: set[RabbitMQReceiver] = set()
        self.declared: dict[str, QueueSpec] = {}
        self.reading: asyncio.Lock = asyncio.Lock()
        self.for_reading: Opened = Opened(self.admin, self.outbox, self.reading)
        self._link = link
        self._leaving: set[asyncio.Task[None]] = set()

    async def leave(self, receiver: RabbitMQReceiver) -> None:
        """End a receiver, also where who waits for it is cancelled meanwhile."""
        if receiver not in self.receivers:
            return
        self.receivers.discard(receiver)
        task = asyncio.create_task(receiver.end())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await asyncio.wait({task})

    async def aclose(self) -> None:
        """Close everything, whatever the caller does meanwhile."""
        closing = asyncio.create_task(self._close())
        self._leaving.add(closing)
        closing.add_done_callback(self._leaving.discard)
        await asyncio.wait({closing})

    def abandon(self) -> None:
        """Their loop is closed: end the thread, and with it the connection that has the leases."""
        self.keeper.stop()

    async def _close(self) -> None:
        await asyncio.gather(*(self.leave(receiver) for receiver in list(self.receivers)))
        leaving = self._leaving - {task for task in (asyncio.current_task(),) if task is not None}
        if leaving:
            await asyncio.wait(leaving)
        await asyncio.gather(self.keeper.aclose(), self.outbox.aclose(), self._link.aclose())


def _check_version(version: str) -> None:
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers and numbers < _OLDEST:
        raise ConfigError(f"RabbitMQ {version}: version 3.10 or later is needed")


def _real(spec: QueueSpec) -> tuple[str, int | None, int | None]:
    """As the broker sees it."""
    levels = (spec.priority_levels or PRIORITY_LEVELS) if spec.kind == "priority" else None
    return spec.kind, levels, spec.max_length


def _differences(there: QueueSpec | None, asked: QueueSpec) -> dict[str, tuple[object, object]]:
    return {"arguments": ("of somebody else", "of this library")} if there is None else there.differences(asked)
