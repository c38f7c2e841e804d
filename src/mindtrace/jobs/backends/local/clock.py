"""Where the local backend has its time from: the machine, or a test."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """A source of time."""

    def now(self) -> float:
        """Seconds, never going back."""
        ...

    def wall(self) -> datetime:
        """The time of day, aware."""
        ...

    async def until(self, when: float) -> None:
        """Return once `now()` is `when` or later."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """Seconds, never going back."""
        return time.monotonic()

    def wall(self) -> datetime:
        """The time of day, in UTC."""
        return datetime.now(UTC)

    async def until(self, when: float) -> None:
        """Return once `now()` is `when` or later."""
        while (left := when - time.monotonic()) > 0:  # noqa: ASYNC110 (it is the passing of time that is waited for)
            await asyncio.sleep(min(left, 86400.0))
