"""`Address`: where a RabbitMQ is and how to log in; it never shows a password."""

import re
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from yarl import URL

from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.retry import is_whole

CONNECT_WITHIN = 5.0
"""Seconds for name, socket, TLS and login."""
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_QUERY = frozenset(("cafile", "certfile", "keyfile"))


@dataclass(frozen=True, slots=True)
class Address:
    """A server and a login.

    Attributes:
        host: name or address.
        port: 5672 unless given, 5671 with TLS.
        username: of the user.
        password: its password.
        virtual_host: where the queues are.
        tls: whether the connection is encrypted, and the server's certificate verified.
        ca_certs: a file of certificates to verify against, in place of the system's.
        certfile: a client certificate.
        keyfile: its key.
        allow_insecure: with TLS, take any certificate.
        heartbeat: seconds; a peer from which nothing came for three of them is dead.
    """

    host: str = "localhost"
    port: int | None = None
    username: str = field(default="guest", repr=False)  # many a URL has the password in its place
    password: str = field(default="guest", repr=False)
    virtual_host: str = "/"
    tls: bool = False
    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = field(default=None, repr=False)
    allow_insecure: bool = False
    heartbeat: int = 10

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("port", self.real_port, 1, 65535),
            ("heartbeat", self.heartbeat, 1, 3600),
        ):
            if not is_whole(value) or not least <= value <= most:
                raise ConfigError(f"{name}={value!r}: a whole number from {least} to {most}")
        for name in ("username", "password", "virtual_host"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: a text")  # which is never shown
        host: Any = self.host
        if not isinstance(host, str) or not _HOST.fullmatch(host):
            raise ConfigError("host: a name or an address, and nothing else; a URL goes to from_url()")
        if not 1 <= len(self.virtual_host.encode()) <= 255:
            raise ConfigError("virtual_host: a name of 1 to 255 bytes; the one there always is is /")

    @property
    def real_port(self) -> int:
        """The port, also where none was given."""
        if self.port is None:
            return 5671 if self.tls else 5672
        return self.port

    @classmethod
    def of_url(cls, url: str, *, allow_insecure: bool = False, heartbeat: int = 10) -> "Address":
        """`amqp://[user:password@]host[:port][/virtual-host]`; `amqps://` for TLS, which may add `?cafile=FILE`.

        As RabbitMQ's URI specification has it, no path means the virtual host `/`, which is also written `%2F`.

        Raises:
            ConfigError: it is no such URL. The text never holds the URL, which may hold a password.
        """
        try:
            parts = urlsplit(url)
            port, readable = parts.port, True
        except ValueError:
            parts, port, readable = urlsplit(""), None, False
        if not readable:  # raised out here, without a context: that quotes what stands for the port, perhaps a password
            raise ConfigError(
                "the URL's port or address is not one: amqp://host:5672/; in a password / ? # @ are %2F %3F %23 %40"
            )
        if parts.fragment or "@" in parts.path + parts.query:
            raise ConfigError("the URL has # or a second @: in a password / ? # @ are written %2F %3F %23 %40")
        if parts.scheme not in ("amqp", "amqps"):
            raise ConfigError(f"no RabbitMQ URL: {parts.scheme[:20]}://, and not amqp:// or amqps://")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if not _QUERY.issuperset(query):
            # Nothing is passed on unread: to the driver some words there would mean no verification, or no heartbeat.
            # And nothing is shown: it may be the rest of a password with a ? in it.
            raise ConfigError(f"the URL's query may have {', '.join(sorted(_QUERY))}, and nothing else")
        tls = parts.scheme == "amqps"
        if query and not tls:
            raise ConfigError(f"{', '.join(sorted(query))} are for amqps://, the encrypted connection")
        path = parts.path.removeprefix("/")
        if "/" in path:
            raise ConfigError("the URL's path is the name of a virtual host: amqp://host/name, with / in it as %2F")
        return cls(
            host=parts.hostname or "localhost",
            port=port,
            username="guest" if parts.username is None else unquote(parts.username),
            password="guest" if parts.password is None else unquote(parts.password),
            virtual_host=unquote(path) or "/",
            tls=tls,
            ca_certs=query.get("cafile"),
            certfile=query.get("certfile"),
            keyfile=query.get("keyfile"),
            allow_insecure=allow_insecure,
            heartbeat=heartbeat,
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        where = "" if self.virtual_host == "/" else quote(self.virtual_host, safe="")
        return f"{'amqps' if self.tls else 'amqp'}://{host}:{self.real_port}/{where}"

    def login(self) -> URL:
        """As the driver wants it. It holds the password."""
        return URL.build(
            scheme="amqps" if self.tls else "amqp",
            user=self.username,
            password=self.password,
            host=self.host,
            port=self.real_port,
            path="/",
            query={"heartbeat": str(self.heartbeat)},
        )

    def context(self) -> ssl.SSLContext | None:
        """For the connection; None without TLS.

        Raises:
            OSError: a file is not there, or is no certificate.
        """
        if not self.tls:
            return None
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.ca_certs)
        if self.certfile is not None:
            context.load_cert_chain(self.certfile, self.keyfile)
        if self.allow_insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
