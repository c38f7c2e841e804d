"""`RedisBackend`: queues on a Redis server, shared by every process that names the same namespace."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Self

from mindtrace.jobs.backend import (
    BATCH,
    DEAD_LETTERS_MANY,
    Backend,
    DeadLetters,
    Depth,
    QueueSpec,
    Receiver,
    Traits,
)
from mindtrace.jobs.backends.opening import Opening
from mindtrace.jobs.backends.redis.address import CONNECT_WITHIN, Address
from mindtrace.jobs.backends.redis.dead_letters import RedisDeadLetters
from mindtrace.jobs.backends.redis.facts import Facts, judge, read_facts
from mindtrace.jobs.backends.redis.keeper import Keeper
from mindtrace.jobs.backends.redis.keys import DEFAULT_NAMESPACE, QueueKeys, registry
from mindtrace.jobs.backends.redis.link import Link
from mindtrace.jobs.backends.redis.publishing import Publisher, in_parts
from mindtrace.jobs.backends.redis.receiver import RedisReceiver
from mindtrace.jobs.backends.redis.rounds import CallNumbers
from mindtrace.jobs.backends.redis.scripts import Scripts, loads, spec_of, text_of
from mindtrace.jobs.delivery import Delivery, Published
from mindtrace.jobs.errors import BackendUnavailable, ConfigError, QueueInUse, QueueMismatch
from mindtrace.jobs.job import PRIORITY_RANGE, checked_namespace, is_queue_name
from mindtrace.jobs.retry import is_seconds
from mindtrace.jobs.wire import Message

_log = logging.getLogger(__name__)

_TRAITS = Traits(
    name="redis",
    durability="unknown",
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


class RedisBackend(Backend):
    """The backend on a Redis server, version 7.0 or later, or Valkey. It connects when it is opened.

    Args:
        host: name or address.
        port: its port.
        db: number of the database.
        username: of an ACL user; None for the default one.
        password: its password.
        tls: encrypt the connection, and verify the server's certificate.
        ca_certs: a file of certificates to verify against, in place of the system's.
        certfile: a client certificate.
        keyfile: its key.
        allow_insecure: with TLS, take any certificate; a warning at every start.
        namespace: what tells applications on one server apart: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
        allow_eviction: use a server that deletes keys when it is full; it may delete jobs.
        require_durable: refuse a server without an append-only file; else that is a warning.
        max_stall: seconds that the event loop may stand still until the leases of its jobs are left to end, and others
            run them; None: never.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = 6379,
        db: int = 0,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: bool = False,
        ca_certs: str | None = None,
        certfile: str | None = None,
        keyfile: str | None = None,
        allow_insecure: bool = False,
        namespace: str = DEFAULT_NAMESPACE,
        allow_eviction: bool = False,
        require_durable: bool = False,
        max_stall: float | None = 600.0,
    ) -> None:
        address = Address(host, port, db, username, password, tls, ca_certs, certfile, keyfile, allow_insecure)
        self._set_up(address, namespace, allow_eviction, require_durable, max_stall)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        allow_insecure: bool = False,
        allow_eviction: bool = False,
        require_durable: bool = False,
        max_stall: float | None = 600.0,
    ) -> Self:
        """As the constructor, with `redis://[[user]:password@]host[:port][/db]`; `rediss://` for TLS.

        With `rediss://` the query may have `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile`, each the name of a file.

        Raises:
            ConfigError: it is no such URL; the text never shows it, since it may hold a password.
        """
        backend = cls.__new__(cls)
        backend._set_up(
            Address.of_url(url, allow_insecure=allow_insecure), namespace, allow_eviction, require_durable, max_stall
        )
        return backend

    def _set_up(
        self, address: Address, namespace: str, allow_eviction: bool, require_durable: bool, max_stall: float | None
    ) -> None:
        if max_stall is not None and not (is_seconds(max_stall) and max_stall > 0):
            raise ConfigError(f"max_stall={max_stall!r}: seconds above 0, or None")
        self._max_stall = max_stall
        self._address, self._namespace = address, checked_namespace(namespace)
        self._allow_eviction, self._require_durable = allow_eviction, require_durable
        self._opening: Opening[_Open] = Opening("Redis backend", self._connect)
        self._facts = Facts()
        self._random = Random()  # noqa: S311 (jitter, not secrets)

    def __repr__(self) -> str:
        return f"<RedisBackend {self._address} namespace={self._namespace}>"

    @property
    def traits(self) -> Traits:
        """What it can do; the durability is the server's, known once it was opened."""
        return replace(_TRAITS, durability=self._facts.durability)

    async def open(self) -> None:
        """Connect, from this loop, and look how the server is set up.

        Raises:
            BackendUnavailable: no server within 5 s.
            AuthenticationFailed: it refuses the login.
            UnsafeBackend: it may delete jobs when it is full.
            ConfigError: it is too old, or this backend is open in another loop.
            ForkedProcess: it was opened in the parent process.
        """
        await self._opening.open()

    async def _connect(self, known_away: bool) -> "_Open":
        link = Link(self._address, "commands", self._random, loads("publish", "exchange"), quiet=known_away)
        link.start()
        try:
            await link.until_connected(CONNECT_WITHIN)
            scripts = Scripts(link)
            self._facts = await read_facts(scripts)
            judge(
                self._facts,
                str(self._address),
                allow_eviction=self._allow_eviction,
                require_durable=self._require_durable,
            )
        except BaseException:
            await link.aclose()
            raise
        if self._address.tls and self._address.allow_insecure:
            _log.warning("Redis at %s: the certificate is not verified (allow_insecure=True)", self._address)
        _log.info("Redis %s at %s: durability %s", self._facts.version, self._address, self._facts.durability)
        return _Open(
            scripts,
            Publisher(scripts, _TRAITS.name, self._namespace),
            Keeper(self._address, self._random, self._max_stall),
        )

    async def aclose(self) -> None:
        """End the receivers, which releases what they hold, and the connections; within a few seconds."""
        await self._opening.aclose()

    async def declare(self, spec: QueueSpec, *, attach: bool = False) -> None:
        """Make the queue if there is none."""
        scripts = self._opened().scripts
        # What is there already is not written again: a worker has to be able to start where the server is full.
        # The name in a call of its own, since it lies in another slot; before, or a crash leaves a queue nobody lists.
        await self._list(spec.name)
        there = await self._spec(scripts, spec.name)
        if there is None:
            there = await scripts.declare(self._keys(spec.name), spec)
            await self._list(spec.name)  # again: it may have been deleted in between
        if not attach and there != spec:
            raise QueueMismatch(spec.name, there.differences(spec))

    async def _list(self, queue: str) -> None:
        scripts = self._opened().scripts
        if not await scripts.command("SISMEMBER", registry(self._namespace), queue):
            await scripts.command("SADD", registry(self._namespace), queue)

    async def delete(self, queue: str, *, force: bool = False) -> None:
        """Delete a queue and its waiting jobs."""
        scripts = self._opened().scripts
        counts = await scripts.delete(self._keys(queue), queue, force)
        if counts:
            raise QueueInUse(queue, counts)
        for receiver in self._opened().receivers:  # those of other processes hear of it from the server
            receiver.lose_all(queue)
        await scripts.command("SREM", registry(self._namespace), queue)
        if await self._spec(scripts, queue) is not None:  # declared anew meanwhile
            await self._list(queue)

    async def clean(self, queue: str) -> int:
        """Cancel all ready and scheduled jobs, 500 in a step."""
        scripts, keys = self._opened().scripts, self._keys(queue)
        gone, there = await scripts.clean(keys, queue, BATCH)
        count = gone
        while gone and count < there:  # what comes meanwhile is not waited for
            gone, _ = await scripts.clean(keys, queue, min(BATCH, there - count))
            count += gone
        return count

    async def depth(self, queue: str) -> Depth:
        """How many jobs there are, by state; exact at one instant."""
        depth = Depth(*await self._opened().scripts.depth(self._keys(queue), queue))
        if depth.dead >= DEAD_LETTERS_MANY:
            _log.warning("the queue %s has %d dead letters: look, replay or purge", queue, depth.dead)
        return depth

    async def queues(self) -> list[QueueSpec]:
        """All that are declared in this namespace."""
        scripts = self._opened().scripts
        names: set[bytes] = set()
        cursor = b"0"
        while True:
            cursor, some = await scripts.command("SSCAN", registry(self._namespace), cursor, "COUNT", BATCH)
            names.update(some)
            if cursor == b"0":
                break
        found: list[QueueSpec] = []
        for name in sorted(text_of(name) for name in names):
            spec = await self._spec(scripts, name) if is_queue_name(name) else None
            if spec is not None:
                found.append(spec)
        return found

    async def _spec(self, scripts: Scripts, name: str) -> QueueSpec | None:
        """None where there is none, or none of ours."""
        try:
            values: list[bytes | None] = await scripts.command("HMGET", self._keys(name).spec, "kind", "levels", "most")
        except BackendUnavailable as error:
            if "WRONGTYPE" not in str(error):
                raise
            values = [b"of another kind of key"]
        if values[0] is None:
            return None
        spec = spec_of(name, values)
        if spec is None:
            _log.warning("the queue %r in namespace %s was written by somebody else", name, self._namespace)
        return spec

    async def publish(self, queue: str, messages: Sequence[Message]) -> list[Published]:
        """Store the messages; up to 500, or 16 MiB, at a time are stored whole or, if the queue is full, not at all.

        Calls of one tick of the loop share a round trip; within 10 s it is stored, or the outcome says that nobody
        knows.
        """
        publisher = self._opened().publisher
        if len(messages) == 1:
            return await publisher.put(queue, messages)
        outcomes: list[Published] = []
        for part in [publisher.put(queue, part) for part in in_parts(messages)]:
            outcomes += await part
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
        """A receiver of these queues."""
        opened = self._opened()
        calls = opened.names.pop() if opened.names else CallNumbers(secrets.token_hex(8))
        receiver = RedisReceiver(
            self._opening.home,
            opened.scripts,
            Link(self._address, "bell", self._random),
            calls,
            [self._keys(queue) for queue in dict.fromkeys(queues)],
            opened.keeper.idle_for if keep else _never_idle,
            slots=slots,
            lease=lease,
            crash_limit=crash_limit,
            strict=strict,
            lost=lost,
        )
        opened.receivers.add(receiver)
        try:
            if keep:
                opened.keeper.keep(receiver)
            yield receiver
        finally:
            await opened.leave(receiver)
            if receiver.is_quiet:
                opened.names.append(calls)

    def dead_letters(self, queue: str) -> DeadLetters:
        """The queue's dead letters."""
        return RedisDeadLetters(lambda: self._opened().scripts, self._keys(queue))

    def _opened(self) -> "_Open":
        return self._opening.connected()

    def _keys(self, queue: str) -> QueueKeys:
        return QueueKeys(self._namespace, queue)


def _never_idle() -> float:
    return 0.0


class _Open:
    """What an open backend has."""

    def __init__(self, scripts: Scripts, publisher: Publisher, keeper: Keeper) -> None:
        self.scripts: Scripts = scripts
        self.publisher: Publisher = publisher
        self.keeper: Keeper = keeper
        self.receivers: set[RedisReceiver] = set()
        self.names: list[CallNumbers] = []  # of receivers that were left
        self._leaving: set[asyncio.Task[None]] = set()

    async def leave(self, receiver: RedisReceiver) -> None:
        """End it; once begun this goes on, whatever becomes of the caller."""
        if receiver in self.receivers:
            self.receivers.discard(receiver)
            self.keeper.let_go(receiver)
            task = asyncio.create_task(receiver.end())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            await asyncio.wait({task})
            task.result()

    async def aclose(self) -> None:
        """End the receivers and the connections."""
        task = asyncio.create_task(self._close())
        await asyncio.wait({task})
        task.result()

    def abandon(self) -> None:
        """Their loop is closed: end the thread. What their receivers hold is free when its lease ends."""
        self.keeper.stop()

    async def _close(self) -> None:
        for receiver in self.receivers:
            self.keeper.let_go(receiver)
        ends = [receiver.end() for receiver in self.receivers]
        await asyncio.gather(*ends, *self._leaving, self.keeper.aclose())
        self.receivers.clear()
        await self.scripts.link.aclose()
