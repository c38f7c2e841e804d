"""Publishes of one tick of the loop share a script call; each caller still has its own outcome."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mindtrace.jobs.backend import BATCH
from mindtrace.jobs.backends.redis.keys import QueueKeys
from mindtrace.jobs.backends.redis.scripts import Scripts, milliseconds
from mindtrace.jobs.delivery import Published
from mindtrace.jobs.errors import BackendUnavailable, ConfigError, JobsError, NotSupported, QueueFull, QueueNotFound
from mindtrace.jobs.wire import Message

_log = logging.getLogger(__name__)

PUBLISH_WITHIN = 10.0
"""Seconds for a publish, its repetitions included; then it is unknown whether it was stored."""
LARGEST_CALL = 16 * 1024 * 1024
"""Bytes of bodies in one call, unless the first one alone has more: a call keeps all others waiting."""
_CALL_BYTES = 1024 * 1024  # of bodies, from which on a call takes no other caller's messages
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(slots=True)
class _Batch:
    """What one caller hands in. `alone`: in a call of its own."""

    messages: Sequence[Message]
    future: "asyncio.Future[list[Published]]"
    deadline: float
    alone: bool = False


class Publisher:
    """Collects what is published, by queue. One call to a queue is in flight: so the order holds, whatever is repeated.

    Args:
        scripts: over the link for commands.
        name: of the backend, for its errors.
        namespace: of the keys.
    """

    def __init__(self, scripts: Scripts, name: str, namespace: str) -> None:
        self._scripts, self._name, self._namespace = scripts, name, namespace
        self._collected: dict[str, deque[_Batch]] = {}  # of each queue that has a call in flight, or one in this tick
        self._keys: dict[str, QueueKeys] = {}
        self._loop = asyncio.get_running_loop()

    def put(self, queue: str, messages: Sequence[Message]) -> "asyncio.Future[list[Published]]":
        """Have up to 500 messages stored in one step. The future gives one outcome each."""
        future: asyncio.Future[list[Published]] = self._loop.create_future()
        batch = _Batch(messages, future, time.monotonic() + PUBLISH_WITHIN)
        collected = self._collected.get(queue)
        if collected is None:
            collected = self._collected[queue] = deque[_Batch]()
            self._loop.call_soon(self._send_next, queue)
        collected.append(batch)
        return future

    def _send_next(self, queue: str) -> None:
        """What has come together for a queue, or as much of it as one call takes."""
        collected = self._collected[queue]
        call: list[_Batch] = []
        count = size = 0
        while collected and not (call and call[0].alone):
            batch = collected[0]
            more = sum(len(message.body) for message in batch.messages)
            if call and (batch.alone or count + len(batch.messages) > BATCH or size + more > _CALL_BYTES):
                break
            call.append(collected.popleft())
            count += len(batch.messages)
            size += more
        if call:
            self._send(queue, call)
        else:
            del self._collected[queue]

    def _send(self, queue: str, call: list[_Batch]) -> None:
        if queue not in self._keys:
            self._keys[queue] = QueueKeys(self._namespace, queue)
        words: list[str | bytes] = []
        for batch in call:
            for message in batch.messages:
                words += (message.id, message.body, _options(message))

        def answer(reply: Any, error: BaseException | None) -> None:
            if len(call) > 1 and error is None and reply[1] == b"ok" and b"f" in reply[2]:
                self._put_back(queue, call)  # together they did not fit, and nothing was stored: each by itself may
            else:
                self._tell(queue, call, reply, error, again=error is None and request.sent > 1)
            self._send_next(queue)

        try:
            request = self._scripts.send_publish(self._keys[queue], words, call[0].deadline, answer)
        except UnicodeEncodeError:  # an id that is no text: an error of its own caller alone
            if len(call) > 1:
                self._put_back(queue, call)
            else:
                unfit = ConfigError("an id of the batch is no text in UTF-8")
                call[0].future.set_result([unfit for _ in call[0].messages])
            self._send_next(queue)

    def _put_back(self, queue: str, call: list[_Batch]) -> None:
        for batch in call:
            batch.alone = True
        self._collected[queue].extendleft(reversed(call))

    def _tell(self, queue: str, call: list[_Batch], reply: Any, error: BaseException | None, *, again: bool) -> None:
        letters = b"" if error is not None or reply[1] == b"missing" else reply[2]
        if again:  # what is there already was stored by a sending of ours whose reply was lost
            letters = letters.replace(b"d", b"s")
        at = 0
        for batch in call:
            messages, future = batch.messages, batch.future
            if future.done():  # its caller was cancelled
                pass
            elif error is not None:
                future.set_result(_failed(messages, error))
            elif not letters:
                future.set_result([QueueNotFound(queue) for _ in messages])
            else:
                mine = letters[at : at + len(messages)]
                if mine == b"s" * len(mine):
                    future.set_result(["stored"] * len(messages))
                else:
                    future.set_result(
                        [self._outcome(queue, m, letter, reply) for m, letter in zip(messages, mine, strict=True)]
                    )
            at += len(messages)

    def _outcome(self, queue: str, message: Message, letter: int, reply: Any) -> Published:
        match chr(letter):
            case "s":
                return "stored"
            case "d":
                return "duplicate"
            case "b":
                _log.info("job %s of queue %s is published already: its first content stays", message.id, queue)
                return "duplicate"
            case "f":
                return QueueFull(queue, int(reply[4]))
            case "k":
                return NotSupported(
                    f"priority {message.priority} on the {reply[5].decode()} queue {queue!r}",
                    self._name,
                    "a queue declared with kind='priority'",
                )
            case _:
                return ConfigError(
                    f"priority={message.priority}: the queue {queue!r} has the levels 0 to {int(reply[3])}"
                )


def in_parts(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """As many together as are stored in one step."""
    parts: list[Sequence[Message]] = []
    start = size = 0
    for at, message in enumerate(messages):
        if at > start and (at - start == BATCH or size + len(message.body) > LARGEST_CALL):
            parts.append(messages[start:at])
            start, size = at, 0
        size += len(message.body)
    return [*parts, messages[start:]] if messages else []


def _options(message: Message) -> str:
    """As publish.lua reads them; empty for what nearly all messages are."""
    if not (message.priority or message.delay or message.at or message.crash_limit is not None):
        return ""
    if message.at is not None:
        due = f"@{max(0, -(-(message.at - _EPOCH) // _MILLISECOND))}"
    else:
        due = f"+{milliseconds(message.delay)}" if message.delay > 0 else "0"
    return f"{message.priority} {due} {-1 if message.crash_limit is None else message.crash_limit}"


def _failed(messages: Sequence[Message], error: BaseException) -> list[Published]:
    """The same error for each, with its own id."""
    if not isinstance(error, BackendUnavailable):
        assert isinstance(error, JobsError)  # noqa: S101 (the link raises ours)
        return [error for _ in messages]
    outcomes: list[Published] = []
    for message in messages:
        one = type(error)(str(error), maybe_published=error.maybe_published, job_ids=[message.id])
        one.__cause__ = error.__cause__
        outcomes.append(one)
    return outcomes
