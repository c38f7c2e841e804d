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
        self._wanted: dict[bytes, str] | None = None  # while the receiver waits: bell -> queue
        self._listened: dict[bytes, str] | None = None  # at these there is a pop under way
        self._not_before = 0.0

    def listen(self, keys: Sequence[QueueKeys]) -> None:
        """Wait at these bells, until `stop`."""
        self._link.start()
        self._wanted = {one.bell.encode(): one.queue for one in keys}
        self._pop()

    def stop(self) -> None:
        """Wait no more; a pop that is under way ends by itself within a second."""
        self._wanted = None

    async def aclose(self) -> None:
        """Close the connection."""
        self._wanted = None
        await self._link.aclose()

    def _pop(self) -> None:
        now = time.monotonic()
        if self._wanted is None or self._listened is not None or now < self._not_before:
            return
        self._listened = self._wanted
        self._link.request(
            ("BLPOP", *self._listened, LISTEN),
            self._heard,
            deadline=now + LISTEN + REPLY_WITHIN,
            patience=LISTEN + REPLY_WITHIN,
            again=False,
        )

    def _heard(self, reply: Any, error: BaseException | None) -> None:
        listened, self._listened = self._listened or {}, None
        if error is not None:
            self._not_before = time.monotonic() + LISTEN  # meanwhile there are the receiver's own looks
            self._rung(None)  # whatever was rung while the line was down was not heard
        elif reply is not None:
            self._rung(listened[reply[0]])
        else:
            self._pop()
