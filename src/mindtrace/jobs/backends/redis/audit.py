"""`audit`: whether what lies in the keys of a namespace is what `keys.py` says, at one instant."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Final, Literal, TypeAlias

from redis.exceptions import RedisError

from mindtrace.jobs.backends.redis.address import Address
from mindtrace.jobs.backends.redis.keys import registry
from mindtrace.jobs.backends.redis.scripts import text_of
from mindtrace.jobs.errors import BackendUnavailable
from mindtrace.jobs.job import checked_namespace, is_job_id

State: TypeAlias = Literal["ready", "scheduled", "leased", "dead"]
"""Where a job is that has not ended."""

_WITHIN = 30.0
_FOREVER: Final = -1
_TYPES: Final[Mapping[str, str]] = {
    "spec": "hash", "ready": "zset", "scheduled": "zset", "leased": "zset", "jobs": "hash", "states": "hash",
    "errors": "hash", "dead": "zset", "deaths": "hash", "known": "set", "call": "string", "bell": "list",
    "watch": "string",
}  # fmt: skip
_LIMITS: Final[Mapping[str, int]] = {"known": 180_000, "call": 300_000, "bell": 60_000, "watch": 1_500}
_NAMED: Final[Mapping[str, str]] = {"known": r"known:\d+", "call": r"call:[0-9a-f]{16}"}
_ID: Final = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
_MEMBER: Final = re.compile(rf"(?P<place>\d{{16}})(?P<id>{_ID})")
_RECEIPT: Final = re.compile(rf"[0-9a-f]{{16}}:(?P<number>[1-9]\d*):(?P<id>{_ID})")
_DEAD: Final = re.compile(r"(?P<id>.*)", re.DOTALL)
_NUMBERS: Final = re.compile(r"\d+ \d+ \d+ (?P<number>\d+) \d+ -?\d+ (?P<place>\d+) -?\d+")
_DEATH: Final = re.compile(r"\d+ [a-z_]+")
_STATES: Final[tuple[tuple[State, re.Pattern[str]], ...]] = (
    ("ready", _MEMBER), ("scheduled", _MEMBER), ("leased", _RECEIPT), ("dead", _DEAD),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found.

    Attributes:
        violations: what is not as it has to be, a sentence each; empty where all is well.
        states: queue -> id -> where it is; every queue that is declared is there. Of an id that is in several places,
            which is a violation, it has the last.
    """

    violations: list[str]
    states: Mapping[str, Mapping[str, State]]


async def audit(url: str, namespace: str) -> Audit:
    """Look at all keys of this namespace, in one step of the server, which changes nothing and holds up all others.

    Args:
        url: as `RedisBackend.from_url` takes it; the user has to be allowed to EVAL and KEYS.
        namespace: as its.

    Raises:
        ConfigError: it is no such URL or namespace.
        BackendUnavailable: no answer.
    """
    source = files("mindtrace.jobs.backends.redis").joinpath("lua", "audit.lua").read_text("utf-8")
    namespace = checked_namespace(namespace)
    connection: Any = Address.of_url(url).connection("mtjobs:audit")  # the driver's calls are not all typed
    try:
        async with asyncio.timeout(_WITHIN):
            await connection.connect()
            await connection.send_command("EVAL", source, 0, namespace)
            reply: list[Any] = await connection.read_response(disable_decoding=True)
    except (RedisError, OSError, TimeoutError) as error:
        raise BackendUnavailable(f"no audit from Redis: {error}") from error
    finally:
        with suppress(RedisError, OSError):
            await connection.disconnect(nowait=True)
    now, *found = reply
    return _judged(
        namespace, now, [_Key(text_of(key), kind.decode(), left, inside) for key, kind, left, inside in found]
    )


@dataclass(frozen=True, slots=True)
class _Key:
    """A key as the server has it; `inside` is flat, `left` in ms."""

    name: str
    type: str
    left: int
    inside: Sequence[bytes]

    @property
    def names(self) -> list[str]:
        return [text_of(one) for one in self.inside]

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        names = self.names
        return zip(names[::2], names[1::2], strict=True)


@dataclass(slots=True)
class _Queue:
    """The keys of one queue by their parts, `known:<minute>` and `call:<receiver>` among them."""

    name: str
    parts: dict[str, _Key] = field(default_factory=dict[str, _Key])

    def names(self, part: str) -> list[str]:
        """Members or fields."""
        key = self.parts.get(part)
        if key is None:
            return []
        return key.names if part in ("jobs", "errors") or ":" in part else [name for name, _ in key.pairs]

    def values(self, part: str) -> dict[str, str]:
        """Field or member -> value or score."""
        key = self.parts.get(part)
        return {} if key is None else dict(key.pairs)


def _judged(namespace: str, now: int, keys: Iterable[_Key]) -> Audit:
    violations: list[str] = []
    queues: dict[str, _Queue] = {}
    registered: Collection[str] = ()
    of_queue = re.compile(re.escape(namespace) + r":\{([A-Za-z0-9][A-Za-z0-9._-]{0,127})\}:(.*)", re.DOTALL)
    for key in keys:
        if key.name == registry(namespace):
            registered = key.names if key.type == "set" else ()
            violations += _of_key(key, "set", _FOREVER)
        elif (match := of_queue.fullmatch(key.name)) is None:
            violations.append(f"{key.name!r}: a key of no queue")
        else:
            queue, part = match.groups()
            kind = part.partition(":")[0]
            if kind not in _TYPES or not re.fullmatch(_NAMED.get(kind, kind), part):
                violations.append(f"{key.name!r}: a queue has no such key")
                continue
            violations += _of_key(key, _TYPES[kind], _LIMITS.get(kind, _FOREVER))
            parts = queues.setdefault(queue, _Queue(queue)).parts
            if key.type == _TYPES[kind]:
                parts[part] = key
    states: dict[str, Mapping[str, State]] = {}
    for queue, found in sorted(queues.items()):

        def complain(text: str, queue: str = queue) -> None:
            violations.append(f"{queue}: {text}")

        found_states = _of_queue(found, now, complain)
        if "spec" in found.parts:
            states[queue] = found_states
            if queue not in registered:
                complain("declared, and not registered")
        elif left := sorted(part for part in found.parts if part.partition(":")[0] not in _LIMITS):
            complain(f"not declared, and yet it has {', '.join(left)}")
    return Audit(violations, states)


def _of_key(key: _Key, type_: str, limit: int) -> Iterator[str]:
    if key.type != type_:
        yield f"{key.name!r}: a {key.type} in place of a {type_}"
    if limit == _FOREVER and key.left != _FOREVER:
        yield f"{key.name!r}: goes away in {key.left} ms"
    if limit != _FOREVER and not 0 <= key.left <= limit:
        yield f"{key.name!r}: " + ("stays for ever" if key.left < 0 else f"stays for {key.left} ms, over {limit}")


def _of_queue(queue: _Queue, now: int, complain: Callable[[str], None]) -> dict[str, State]:
    spec = queue.values("spec")
    if spec and not _is_spec(spec):
        complain(f"its spec is none: {spec}")
    last = int(spec["place"]) if re.fullmatch(r"\d+", spec.get("place", "")) else None
    numbers = {job_id: _NUMBERS.fullmatch(text) for job_id, text in queue.values("states").items()}
    places: Counter[str] = Counter()
    states: dict[str, State] = {}
    for state, pattern in _STATES:
        for entry in queue.names(state):
            match = pattern.fullmatch(entry)
            if match is None:
                complain(f"{state}: {entry!r} is not well formed")
                continue
            facts = match.groupdict()
            job_id = facts["id"]
            if job_id in states:
                complain(f"{job_id!r} is {states[job_id]}, and {state}")
            states[job_id] = state
            if last is not None and int(facts.get("place") or 0) > last:
                complain(f"{job_id!r} has a place that was never given: {facts['place']}, after {last}")
            if "place" in facts:
                places[facts["place"]] += 1
            elif numbers.get(job_id) is None:
                complain(f"{job_id!r} is {state}, and has no numbers")
            if "number" in facts and (mine := numbers.get(job_id)) and mine["number"] != facts["number"]:
                complain(f"{job_id!r} is leased as delivery {facts['number']}, and its last one was {mine['number']}")
    for place, count in places.items():
        if count > 1:
            complain(f"{count} jobs have the place {place}")
    for job_id, match in numbers.items():
        if match is None:
            complain(f"the numbers of {job_id!r} are none: {queue.values('states')[job_id]!r}")
    _of_fields(queue, states, complain)
    for minute in (now // 60_000, now // 60_000 - 1):
        for job_id in states.keys() & set(queue.names(f"known:{minute}")):
            complain(f"{job_id!r} is {states[job_id]}, and known to have ended")
    return states


def _of_fields(queue: _Queue, states: Mapping[str, State], complain: Callable[[str], None]) -> None:
    bodies, deaths = queue.names("jobs"), queue.values("deaths")
    for job_id in states.keys() - set(bodies):
        complain(f"{job_id!r} is {states[job_id]}, and has no body")
    for part in ("jobs", "states", "errors"):
        for job_id in set(queue.names(part)) - states.keys():
            complain(f"{part}: {job_id!r} is nowhere else")
    dead = {job_id for job_id, state in states.items() if state == "dead"}
    for job_id in dead - deaths.keys():
        complain(f"{job_id!r} is dead, and nobody knows of what")
    for job_id, death in deaths.items():
        if job_id not in dead:
            complain(f"deaths: {job_id!r} is not dead")
        elif not _DEATH.fullmatch(death):
            complain(f"the death of {job_id!r} is none: {death!r}")
        elif not is_job_id(job_id) and not death.endswith(
            (" malformed", " too_large")
        ):  # what others wrote keeps its id
            complain(f"dead: {job_id!r} is not well formed")


def _is_spec(spec: Mapping[str, str]) -> bool:
    numbers = [spec.get(name, "") for name in ("levels", "most")]
    return (
        set(spec) == {"kind", "levels", "most", "place"}
        and spec["kind"] in ("fifo", "priority", "stack")
        and all(re.fullmatch(r"-1|\d+", number) for number in numbers)
        and re.fullmatch(r"\d+", spec["place"]) is not None
    )
