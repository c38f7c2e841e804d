"""What the server says of itself at the start: version, persistence, eviction."""

import logging
import re
from dataclasses import dataclass
from typing import Any, Literal

from mindtrace.jobs.backends.redis.scripts import Scripts
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, ConfigError, UnsafeBackend

_log = logging.getLogger(__name__)

_OLDEST = (7, 0)
Durability = Literal["unknown", "memory", "os", "disk", "everysec", "always", "quorum"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the server; None where it does not say.

    Attributes:
        version: such as `7.0.15`.
        durability: what a reply to a publish survives.
        evicts: the policy by which it deletes keys when it is full; None if it never does.
    """

    version: str | None = None
    durability: Durability = "unknown"
    evicts: str | None = None


async def read_facts(scripts: Scripts) -> Facts:
    """Ask the server. Whatever it refuses to tell is unknown, and no error.

    Raises:
        BackendUnavailable: it does not answer.
        ConfigError: it is too old for the scripts.
    """
    info: bytes = await _told(scripts, "INFO") or b""
    found: list[tuple[bytes, bytes]] = re.findall(rb"^(\w+):(.*?)\r?$", info, re.MULTILINE)
    facts = dict(found)
    version = facts.get(b"redis_version", b"").decode("ascii", "replace") or None
    numbers = [int(number) for number in re.findall(r"\d+", version or "")[:2]]
    if numbers and tuple(numbers) < _OLDEST:
        raise ConfigError(f"Redis {version}: version 7.0 or later is needed (or Valkey)")
    policy = facts.get(b"maxmemory_policy", b"noeviction").decode("ascii", "replace")
    limited = facts.get(b"maxmemory", b"0") != b"0"
    return Facts(
        version,
        await _durability(scripts, facts.get(b"aof_enabled")),
        policy if limited and policy != "noeviction" else None,
    )


async def _durability(scripts: Scripts, aof_enabled: bytes | None) -> Durability:
    if aof_enabled is None:
        return "unknown"
    if aof_enabled != b"1":
        return "memory"
    reply: list[bytes] = await _told(scripts, "CONFIG", "GET", "appendfsync") or []
    policy = reply[1] if len(reply) == 2 else b""
    known: dict[bytes, Durability] = {b"always": "always", b"everysec": "everysec", b"no": "os"}
    return known.get(policy, "unknown")


async def _told(scripts: Scripts, *words: str) -> Any:
    """The reply; None where the server refuses to tell."""
    try:
        return await scripts.command(*words)
    except AuthenticationFailed:
        return None
    except BackendUnavailable as error:
        if error.__cause__ is not None and "ERR" in str(error.__cause__):
            return None
        raise


def judge(facts: Facts, address: str, *, allow_eviction: bool, require_durable: bool) -> None:
    """Say what is dangerous about it.

    Raises:
        UnsafeBackend: it may lose jobs in silence, and nobody allowed that.
    """
    if facts.evicts is not None and not allow_eviction:
        raise UnsafeBackend(
            f"Redis at {address} has maxmemory-policy {facts.evicts}: when it is full it deletes jobs. Set "
            "maxmemory-policy noeviction, or accept the loss with allow_eviction=True"
        )
    if facts.durability == "memory":
        text = (
            f"Redis at {address} has no append-only file: a crash or a restart of it loses the jobs stored since its "
            "last snapshot, or all of them. Set appendonly yes"
        )
        if require_durable:
            raise UnsafeBackend(f"{text}, or leave out require_durable=True")
        _log.warning("%s", text)
