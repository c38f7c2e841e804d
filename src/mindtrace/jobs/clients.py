"""The clients of the blocking face: each makes its backend, opens it on the background loop, and closes it at exit."""

import os
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

from mindtrace.jobs.backend import Backend, QueueSpec
from mindtrace.jobs.backends import LOCAL, address, named
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.background import background

if TYPE_CHECKING:
    from mindtrace.jobs.backends.rabbitmq import RabbitMQBackend
    from mindtrace.jobs.backends.redis import RedisBackend

B = TypeVar("B", bound=Backend)


class BackendType(StrEnum):
    """Which backend a client speaks to."""

    LOCAL = "local"
    REDIS = "redis"
    RABBITMQ = "rabbitmq"


class Client(Generic[B]):
    """A backend for the blocking API: opened on the background loop when it is first used; in a forked child anew."""

    backend_type: ClassVar[BackendType]

    def __init__(self) -> None:
        self._backend = self._new(None)
        self._pid = os.getpid()
        self._is_open = False

    @property
    def backend(self) -> B:
        """The async backend, opened on the background loop."""
        if not self._is_open or self._pid != os.getpid():
            background.call(self._open)
        return self._backend

    def declare_queue(
        self,
        queue_name: str,
        *,
        queue_type: Literal["fifo", "priority", "stack"] | None = None,
        max_priority: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Make a queue if there is none.

        Args:
            queue_name: its name.
            queue_type: `fifo` unless given; `max_priority` alone means `priority`.
            max_priority: allows the priorities 0 to this one.
            max_length: the most ready and scheduled jobs.

        Raises:
            QueueMismatch: it exists with other properties.
        """
        kind = queue_type or ("fifo" if max_priority is None else "priority")
        spec = QueueSpec(queue_name, kind, max_priority, max_length)
        backend = self.backend
        background.call(lambda: backend.declare(spec))

    def close(self) -> None:
        """Close the backend; the next call opens it again."""
        if self._is_open and self._pid == os.getpid():
            background.call(self._close)

    def separate(self) -> B:
        """Another backend of the same address, which nobody has opened yet: for an event loop of the caller's own."""
        return self._new(None)

    def _new(self, old: B | None) -> B:
        """A backend; in a forked child in place of the parent's."""
        raise NotImplementedError

    async def _close(self) -> None:
        self._is_open = False
        background.not_at_exit(self._backend.aclose)
        await self._backend.aclose()

    async def _open(self) -> None:
        if self._pid != os.getpid():
            self._backend, self._pid, self._is_open = self._new(self._backend), os.getpid(), False
        if not self._is_open:
            await self._backend.open()  # which several first calls at once share
        if not self._is_open:
            background.at_exit(self._backend.aclose)
            self._is_open = True


class LocalClient(Client[LocalBackend]):
    """The backend in this process, for the blocking API; in a forked child anew, with its queues and no jobs."""

    backend_type: ClassVar[BackendType] = BackendType.LOCAL

    def _new(self, old: LocalBackend | None) -> LocalBackend:
        return LocalBackend() if old is None else old.without_jobs()


class RedisClient(Client["RedisBackend"]):
    """The backend on a Redis server, for the blocking API. It connects with the first call.

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
        namespace: what tells applications on one server apart.
        allow_eviction: use a server that deletes keys when it is full; it may delete jobs.
        require_durable: refuse a server without an append-only file; else that is a warning.
        max_stall: seconds that a run on the background loop, one with `async`, may block it until the leases there are
            left to end, and others run the jobs; None: never.

    Raises:
        ConfigError: a value is out of its range.
    """

    backend_type: ClassVar[BackendType] = BackendType.REDIS

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
        namespace: str = "mtj",
        allow_eviction: bool = False,
        require_durable: bool = False,
        max_stall: float | None = 600.0,
    ) -> None:
        from mindtrace.jobs.backends.redis import RedisBackend  # with its driver, which nobody else has to load

        self._set_up(
            lambda: RedisBackend(
                host,
                port,
                db,
                username=username,
                password=password,
                tls=tls,
                ca_certs=ca_certs,
                certfile=certfile,
                keyfile=keyfile,
                allow_insecure=allow_insecure,
                namespace=namespace,
                allow_eviction=allow_eviction,
                require_durable=require_durable,
                max_stall=max_stall,
            )
        )

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = "mtj",
        allow_insecure: bool = False,
        allow_eviction: bool = False,
        require_durable: bool = False,
        max_stall: float | None = 600.0,
    ) -> Self:
        """As the constructor, with `redis://[[user]:password@]host[:port][/db]`; `rediss://` for TLS.

        Raises:
            ConfigError: it is no such URL.
        """
        from mindtrace.jobs.backends.redis import RedisBackend

        client = cls.__new__(cls)
        client._set_up(
            lambda: RedisBackend.from_url(
                url,
                namespace=namespace,
                allow_insecure=allow_insecure,
                allow_eviction=allow_eviction,
                require_durable=require_durable,
                max_stall=max_stall,
            )
        )
        return client

    def _set_up(self, make: Callable[[], "RedisBackend"]) -> None:
        self._make = make
        super().__init__()

    def _new(self, old: "RedisBackend | None") -> "RedisBackend":
        return self._make()


class RabbitMQClient(Client["RabbitMQBackend"]):
    """The backend on a RabbitMQ server, for the blocking API. It connects with the first call.

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
        namespace: what tells applications in one virtual host apart.
        heartbeat: seconds; a server that is silent for three of them is given up, and the leases with it.
        max_stall: seconds that a run on the background loop, one with `async`, may block it until the jobs there are
            given back, and others run them; None: never.

    Raises:
        ConfigError: a value is out of its range.
    """

    backend_type: ClassVar[BackendType] = BackendType.RABBITMQ

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
        namespace: str = "mtj",
        heartbeat: int = 10,
        max_stall: float | None = 600.0,
    ) -> None:
        from mindtrace.jobs.backends.rabbitmq import RabbitMQBackend  # with its driver, which nobody else has to load

        self._set_up(
            lambda: RabbitMQBackend(
                host,
                port,
                username,
                password,
                virtual_host=virtual_host,
                tls=tls,
                ca_certs=ca_certs,
                certfile=certfile,
                keyfile=keyfile,
                allow_insecure=allow_insecure,
                namespace=namespace,
                heartbeat=heartbeat,
                max_stall=max_stall,
            )
        )

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = "mtj",
        allow_insecure: bool = False,
        heartbeat: int = 10,
        max_stall: float | None = 600.0,
    ) -> Self:
        """As the constructor, with `amqp://[user:password@]host[:port][/virtual-host]`; `amqps://` for TLS.

        Raises:
            ConfigError: it is no such URL.
        """
        from mindtrace.jobs.backends.rabbitmq import RabbitMQBackend

        client = cls.__new__(cls)
        client._set_up(
            lambda: RabbitMQBackend.from_url(
                url, namespace=namespace, allow_insecure=allow_insecure, heartbeat=heartbeat, max_stall=max_stall
            )
        )
        return client

    def _set_up(self, make: Callable[[], "RabbitMQBackend"]) -> None:
        self._make = make
        super().__init__()

    def _new(self, old: "RabbitMQBackend | None") -> "RabbitMQBackend":
        return self._make()


def client_of(url: str | None) -> Client[Any]:
    """The client of the backend that the URL names; None takes `MINDTRACE_JOBS_URL`, else `local://`.

    Its namespace is that of `MINDTRACE_JOBS_NAMESPACE`, else `mtj`.

    Raises:
        ConfigError: no backend of that scheme, or no such namespace.
    """
    url = address(url)
    if url == LOCAL:
        return LocalClient()
    kind = RabbitMQClient if url.startswith("amqp") else RedisClient
    return kind.from_url(url, namespace=named(None))
