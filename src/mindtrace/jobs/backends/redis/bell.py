"""`Bell`: how an idle receiver hears of a job. It pops a token, never a job: one that gets lost costs a second."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from mindtrace.jobs.backends.redis.keys import QueueKeys
from mindtrace.jobs.backends.redis.link import REPLY_WITHIN, Link

LISTEN = 1.0
"""Seconds that one pop blocks; so a dead connection is found within a few."""


class Bell:
    """One connection that waits at the bells of queues.

    Args:
        link: its own; a blocking pop keeps everything behind it waiting.
        rung: called with the queue's name when a token came, with None when there is to be looked without one.
    """

    def __init__(self, link: Link, rung: Callable[[str | None], None]) -> None:
        self._link, self._rung = link, rung
        self._listening = False
        self._not_before = 0.0
        self._queues: dict[bytes, str] = {}

    def listen(self, keys: Sequence[QueueKeys]) -> None:
        """Wait at these bells for a second, unless it is still waiting."""
        if self._listening or time.monotonic() < self._not_before:
            return
        self._link.start()
        self._queues = {one.bell.encode(): one.queue for one in keys}
        self._listening = True
        self._link.request(
            ("BLPOP", *self._queues, LISTEN),
            self._heard,
            deadline=time.monotonic() + LISTEN + REPLY_WITHIN,
            patience=LISTEN + REPLY_WITHIN,
            again=False,
        )

    async def aclose(self) -> None:
        """Close the connection."""
        await self._link.aclose()

    def _heard(self, reply: Any, error: BaseException | None) -> None:
        self._listening = False
        if error is not None:
            self._not_before = time.monotonic() + LISTEN  # meanwhile there are the receiver's own looks
            self._rung(None)  # whatever was rung while the line was down was not heard
        elif reply is not None:
            self._rung(self._queues[reply[0]])
