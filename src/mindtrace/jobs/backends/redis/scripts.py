"""One coroutine for each script in lua/: arguments in, values out. What lies in which key is in keys.py."""

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from mindtrace.jobs.backend import BATCH, QueueSpec
from mindtrace.jobs.backends.redis.keys import QueueKeys
from mindtrace.jobs.backends.redis.line import Request, Words
from mindtrace.jobs.backends.redis.link import Link
from mindtrace.jobs.delivery import Delivery
from mindtrace.jobs.errors import BackendUnavailable, QueueNotFound
from mindtrace.jobs.retry import MAX_DELAY
from mindtrace.jobs.wire import ENVELOPE_EXTRA, PAYLOAD_LIMIT_MOST

FORMAT = 1
"""Of every script's reply; two versions of this library that share a queue have to agree on it."""
CALL_WITHIN = 10.0
"""Seconds for a call of queue administration, its repetitions included."""
LARGEST_BODY = PAYLOAD_LIMIT_MOST + ENVELOPE_EXTRA
_KINDS: dict[str, Literal["fifo", "priority", "stack"]] = {"fifo": "fifo", "priority": "priority", "stack": "stack"}
_FRAGMENTS = {
    "clean": ("_once",),
    "delete": ("_once",),
    "replay": ("_once",),
    "purge": ("_once",),
    "dead_list": ("_letters",),
    "dead_get": ("_letters",),
}

Answer = Callable[[Any, BaseException | None], None]
Letters = list[list[bytes]]


@dataclass(frozen=True, slots=True)
class Script:
    """A script as it is sent: by its hash, and whole where the server does not know it."""

    source: str
    sha: str


@cache
def script(name: str) -> Script:
    """The script of lua/<name>.lua, with the fragments it uses behind its first line, which has its flags."""
    flags, _, body = _file(name).partition("\n")
    source = "\n".join((flags, _file("_queue"), *(_file(fragment) for fragment in _FRAGMENTS.get(name, ())), body))
    return Script(source, hashlib.sha1(source.encode()).hexdigest())  # noqa: S324 (it is Redis' name for it)


def _file(name: str) -> str:
    return files("mindtrace.jobs.backends.redis").joinpath("lua", f"{name}.lua").read_text("utf-8")


class Scripts:
    """The scripts, sent over one link.

    Args:
        link: to the server; its supervisor runs in the loop that calls.
    """

    def __init__(self, link: Link) -> None:
        self.link: Link = link

    # For the calls that carry jobs: they go on without their caller, so their answers are handed to a function.

    def send_publish(self, keys: QueueKeys, words: Words, deadline: float, answer: Answer) -> Request:
        """Store messages: `words` has three for each, see publish.lua."""
        return self._send("publish", keys, words, deadline, answer)

    def send_exchange(self, keys: QueueKeys, words: Words, deadline: float, answer: Answer) -> Request:
        """Settle and receive, see exchange.lua."""
        return self._send("exchange", keys, words, deadline, answer, waits_out=True)

    # For the others.

    async def extend(
        self, keys: QueueKeys, lease: float, deliveries: Sequence[Delivery], within: float
    ) -> list[Delivery]:
        """Those whose job had already gone to another; the deadlines of the rest are moved."""
        until = time.monotonic() + lease
        words: Words = [milliseconds(lease), *(delivery.receipt for delivery in deliveries)]
        reply = await self._call("extend", keys, words, within)
        gone: list[Delivery] = []
        for delivery, digit in zip(deliveries, reply[1], strict=True):
            if digit == 49:  # the byte "1"
                delivery.deadline = max(delivery.deadline, until)
            else:
                gone.append(delivery)
        return gone

    async def declare(self, keys: QueueKeys, spec: QueueSpec) -> QueueSpec:
        """The queue as it is there now."""
        levels = -1 if spec.priority_levels is None else spec.priority_levels
        most = -1 if spec.max_length is None else spec.max_length
        reply = await self._call("declare", keys, [spec.kind, levels, most])
        there = spec_of(spec.name, reply[1:4])
        if there is None:
            raise BackendUnavailable(
                f"the queue {spec.name!r} is of a kind that this version does not know: upgrade it"
            )
        return there

    async def depth(self, keys: QueueKeys, queue: str) -> tuple[int, int, int, int]:
        """Ready, scheduled, leased, dead."""
        ready, scheduled, leased, dead = (await self._ok("depth", keys, queue))[2:6]
        return ready, scheduled, leased, dead

    async def clean(self, keys: QueueKeys, queue: str, most: int) -> tuple[int, int]:
        """How many were cancelled, and how many there were before."""
        gone, there = (await self._ok("clean", keys, queue, _call_id(), most))[2:4]
        return gone, there

    async def delete(self, keys: QueueKeys, queue: str, force: bool) -> dict[str, int]:
        """Empty if it is deleted; else what is still in it."""
        reply = await self._ok("delete", keys, queue, _call_id(), int(force))
        return {"leased": reply[2], "dead": reply[3]} if reply[1] == b"in use" else {}

    async def dead_list(
        self, keys: QueueKeys, queue: str, before: str, limit: int, reason: str, since_ms: int
    ) -> tuple[str, list[list[bytes]]]:
        """How far it looked (empty: to the end), and six values for each letter: see dead_list.lua."""
        reply = await self._ok("dead_list", keys, queue, before, limit, reason, since_ms)
        return reply[2].decode(), _in_sixes(reply[3:])

    async def dead_get(self, keys: QueueKeys, queue: str, job_id: str) -> list[bytes] | None:
        """Its six values."""
        letters = _in_sixes((await self._ok("dead_get", keys, queue, _bytes(job_id)))[2:])
        return letters[0] if letters else None

    async def dead_missing(self, keys: QueueKeys, queue: str, job_ids: Sequence[str]) -> str | None:
        """The first of these ids that is not among the dead letters."""
        for start in range(0, len(job_ids), BATCH):
            some = job_ids[start : start + BATCH]
            found: bytes = (await self._ok("dead_has", keys, queue, *map(_bytes, some)))[2]
            if 48 in found:  # the byte "0"
                return str(some[found.index(48)])
        return None

    async def replay(self, keys: QueueKeys, queue: str, job_ids: Sequence[str]) -> int:
        """How many were put back."""
        count: int = (await self._ok("replay", keys, queue, _call_id(), *map(_bytes, job_ids)))[2]
        return count

    async def purge(self, keys: QueueKeys, queue: str, job_ids: Sequence[str]) -> int:
        """How many are forgotten."""
        count: int = (await self._ok("purge", keys, queue, _call_id(), *map(_bytes, job_ids)))[2]
        return count

    async def command(self, *words: str | bytes | int | float) -> Any:
        """One plain command, which may be repeated without harm."""
        return await self._answered(lambda answer: self.link.request(words, answer, deadline=_in(CALL_WITHIN)))

    async def _ok(self, name: str, keys: QueueKeys, queue: str, *words: str | bytes | int | float) -> list[Any]:
        reply = await self._call(name, keys, words)
        if reply[1] == b"missing":
            raise QueueNotFound(queue)
        return reply

    async def _call(self, name: str, keys: QueueKeys, words: Words, within: float = CALL_WITHIN) -> list[Any]:
        reply: list[Any] = await self._answered(lambda answer: self._send(name, keys, words, _in(within), answer))
        return reply

    async def _answered(self, send: Callable[[Answer], object]) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answer(reply: Any, error: BaseException | None) -> None:
            if future.done():
                return  # its caller was cancelled
            if error is None:
                future.set_result(reply)
            else:
                future.set_exception(error)

        send(answer)
        return await future

    def _send(
        self, name: str, keys: QueueKeys, words: Words, deadline: float, answer: Answer, *, waits_out: bool = False
    ) -> Request:
        found = script(name)

        def checked(reply: Any, error: BaseException | None) -> None:
            if error is None and reply[0] != FORMAT:
                reply, error = None, BackendUnavailable("the reply is of another version of this library: upgrade it")
            answer(reply, error)

        return self.link.request(
            ("EVALSHA", found.sha, 1, keys.prefix, *words),
            checked,
            deadline=deadline,
            fallback=("EVAL", found.source, 1, keys.prefix, *words),
            waits_out=waits_out,
        )


def spec_of(queue: str, values: Sequence[bytes | None]) -> QueueSpec | None:
    """A queue from its kind, levels and most; None if those are not of ours."""
    try:
        kind, levels, most = ((value or b"").decode() for value in values)
        return QueueSpec(
            queue, _KINDS[kind], None if int(levels) < 0 else int(levels), None if int(most) < 0 else int(most)
        )
    except (ValueError, KeyError):
        return None


def loads(*names: str) -> list[Words]:
    """The commands by which a server learns these scripts before they are called."""
    return [("SCRIPT", "LOAD", script(name).source) for name in names]


def text_of(raw: bytes) -> str:
    """A name as the server has it; what is no UTF-8 survives there and back."""
    return raw.decode("utf-8", "surrogateescape")


def milliseconds(seconds: float) -> int:
    """Rounded up: never early. What is longer than any delay may be is as long as that."""
    return math.ceil(seconds * 1000) if seconds < MAX_DELAY else round(MAX_DELAY * 1000)


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # nothing that `text_of` gives: there is no such id, and the server will say so
        return text.encode("utf-8", "surrogatepass")


def _in(seconds: float) -> float:
    return time.monotonic() + seconds


def _call_id() -> str:
    return secrets.token_hex(8)


def _in_sixes(values: Sequence[bytes]) -> list[list[bytes]]:
    return [list(values[start : start + 6]) for start in range(0, len(values), 6)]
