"""`Address`: where a Redis is and how to log in; it never shows a password."""

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.retry import is_whole

CONNECT_WITHIN = 5.0
"""Seconds for name, socket, TLS and login."""
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_QUERY = frozenset(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"))


@dataclass(frozen=True, slots=True)
class Address:
    """A server and a login.

    Attributes:
        host: name or address.
        port: 6379 unless given.
        db: number of the database.
        username: of an ACL user; None for the default one.
        password: its password.
        tls: whether the connection is encrypted, and the server's certificate verified.
        ca_certs: a file of certificates to verify against, in place of the system's.
        certfile: a client certificate.
        keyfile: its key.
        allow_insecure: with TLS, take any certificate.
    """

    host: str = "localhost"
    port: int = 6379
    db: int = 0
    username: str | None = field(default=None, repr=False)  # many a URL has the password in its place
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = field(default=None, repr=False)
    allow_insecure: bool = False

    def __post_init__(self) -> None:
        for name, value, most in (("port", self.port, 65535), ("db", self.db, 2**31 - 1)):
            if not is_whole(value) or not 0 <= value <= most:
                raise ConfigError(f"{name}={value!r}: a whole number from 0 to {most}")
        for name in ("username", "password"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}: a text, or None")  # which is never shown
        host: Any = self.host
        if not isinstance(host, str) or not _HOST.fullmatch(host):
            raise ConfigError("host: a name or an address, and nothing else; a URL goes to from_url()")

    @classmethod
    def of_url(cls, url: str, *, allow_insecure: bool = False) -> "Address":
        """`redis://[[user]:password@]host[:port][/db]`; `rediss://` for TLS, which may add `?ssl_ca_certs=FILE`.

        Raises:
            ConfigError: it is no such URL. The text never holds the URL, which may hold a password.
        """
        try:
            parts = urlsplit(url)
            port = 6379 if parts.port is None else parts.port
        except ValueError:
            # Without its cause, which quotes what stands where the port should: perhaps the end of a password.
            raise ConfigError(
                "the URL's port or address is not one: redis://host:6379/0; in a password / ? # @ are %2F %3F %23 %40"
            ) from None
        if parts.fragment or "@" in parts.path + parts.query:
            raise ConfigError("the URL has # or a second @: in a password / ? # @ are written %2F %3F %23 %40")
        if parts.scheme not in ("redis", "rediss"):
            raise ConfigError(f"no Redis URL: {parts.scheme[:20]}://, and not redis:// or rediss://")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if not _QUERY.issuperset(query):
            # Nothing is passed on unread: to the driver some words there would mean another server or timeout. And
            # nothing is shown: it may be the rest of a password with a ? in it.
            raise ConfigError(f"the URL's query may have {', '.join(sorted(_QUERY))}, and nothing else")
        tls = parts.scheme == "rediss"
        if query and not tls:
            raise ConfigError(f"{', '.join(sorted(query))} are for rediss://, the encrypted connection")
        path = parts.path.strip("/")
        if path and not (path.isascii() and path.isdigit() and len(path) <= 10):
            raise ConfigError("the URL's path is the number of the database: redis://host:6379/0")
        return cls(
            host=parts.hostname or "localhost",
            port=port,
            db=int(path or 0),
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            tls=tls,
            ca_certs=query.get("ssl_ca_certs"),
            certfile=query.get("ssl_certfile"),
            keyfile=query.get("ssl_keyfile"),
            allow_insecure=allow_insecure,
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"

    def connection(self, client_name: str) -> Connection:
        """One connection of the driver, not connected yet: it retries nothing, and times nothing out, by itself."""
        options: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "db": self.db,
            "username": self.username,
            "password": self.password,
            "protocol": 2,  # 3, with its pushes, once served a left-over reply to the next caller
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": None,  # a blocking pop would be cut by it; what is overdue is for the link to see
            "socket_connect_timeout": CONNECT_WITHIN,
            "socket_keepalive": True,
            "health_check_interval": 0,
            "client_name": client_name,
            "socket_read_size": 1 << 18,
        }
        if not self.tls:
            return Connection(**options)
        return SSLConnection(
            **options,
            ssl_ca_certs=self.ca_certs,
            ssl_certfile=self.certfile,
            ssl_keyfile=self.keyfile,
            ssl_cert_reqs="none" if self.allow_insecure else "required",
            ssl_check_hostname=not self.allow_insecure,
        )
