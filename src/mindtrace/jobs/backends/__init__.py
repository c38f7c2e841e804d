"""`connect(url)` picks the backend and imports only that one."""

import os

from mindtrace.jobs.backend import Backend
from mindtrace.jobs.errors import ConfigError

LOCAL = "local://"
NAMESPACE = "mtj"
_SCHEMES = ("local", "redis", "rediss", "amqp", "amqps")


def connect(url: str | None = None, *, namespace: str | None = None) -> Backend:
    """The backend that the URL names; it is not opened yet.

    Args:
        url: `local://` for the one in this process; `redis://[[user]:password@]host[:port][/db]`;
            `amqp://[user:password@]host[:port][/virtual-host]` for RabbitMQ; `rediss://` and `amqps://` are the same
            with TLS; None takes `MINDTRACE_JOBS_URL`, else `local://`.
        namespace: what tells applications on one server apart; None takes `MINDTRACE_JOBS_NAMESPACE`, else `mtj`.
            `local://` has none.

    Raises:
        ConfigError: no backend of that scheme, or something in the URL is wrong; the text never shows what may be a
            password.
    """
    url = address(url)
    if url == LOCAL:
        from mindtrace.jobs.backends.local import LocalBackend

        if namespace is not None:
            raise ConfigError(f"namespace={namespace!r}: local:// has none, it is in this process alone")
        return LocalBackend()
    if url.startswith("amqp"):
        from mindtrace.jobs.backends.rabbitmq import RabbitMQBackend

        return RabbitMQBackend.from_url(url, namespace=named(namespace))
    from mindtrace.jobs.backends.redis import RedisBackend

    return RedisBackend.from_url(url, namespace=named(namespace))


def named(namespace: str | None) -> str:
    """The namespace, which for None is that of the environment."""
    return (os.environ.get("MINDTRACE_JOBS_NAMESPACE") or NAMESPACE) if namespace is None else namespace


def address(url: str | None) -> str:
    """The URL of a backend there is.

    Raises:
        ConfigError: see `connect`.
    """
    url = url or os.environ.get("MINDTRACE_JOBS_URL") or LOCAL
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        # Without a separator all of it is the "scheme", a password perhaps included.
        shown = f"{scheme[:20]}://" if separator else "a URL without ://"
        raise ConfigError(
            f"no backend for {shown} in this version: {', '.join(f'{name}://' for name in _SCHEMES)} are there"
        )
    if scheme == "local" and rest:
        raise ConfigError("local:// takes nothing behind it: it is in this process, and its jobs are in memory")
    return url


def shown(url: str | None) -> str:
    """The URL as it may be printed: without user, password and query.

    Raises:
        ConfigError: see `connect`.
    """
    url = address(url)
    if url == LOCAL:
        return LOCAL
    if url.startswith("amqp"):
        from mindtrace.jobs.backends.rabbitmq.address import Address as RabbitMQAddress

        return str(RabbitMQAddress.of_url(url))
    from mindtrace.jobs.backends.redis.address import Address as RedisAddress

    return str(RedisAddress.of_url(url))
