"""`WorkerOptions`: what a worker is told, checked once."""

import math
from dataclasses import dataclass
from typing import Literal

from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.events import Listener
from mindtrace.jobs.retry import RetryPolicy, is_seconds, is_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Those of `Worker`, where they are told.

    Raises:
        ConfigError: a value is out of its range.
    """

    concurrency: int
    timeout: float | None
    retry: RetryPolicy | int | Literal[False] | None
    lease: float
    drain: float
    cancel_grace: float
    strict: bool
    prefetch: int
    ahead: int
    max_jobs: int | None
    max_memory: float | None
    max_age: float | None
    until_idle: bool
    poll_timeout: float
    unknown_ttl: float
    listeners: tuple[Listener, ...]
    name: str

    def __post_init__(self) -> None:
        for option, number in (("concurrency", self.concurrency), ("max_jobs", self.max_jobs)):
            if number is not None and (not is_whole(number) or number < 1):
                raise ConfigError(f"{option}={number!r}: a whole number from 1 on")
        if not is_whole(self.prefetch) or self.prefetch < 1:
            raise ConfigError(f"prefetch={self.prefetch!r}: a whole number from 1 on")
        if not is_whole(self.ahead) or self.ahead < 0:
            raise ConfigError(f"ahead={self.ahead!r}: a whole number from 0 on")
        for option, unit in (("max_memory", "MiB"), ("max_age", "seconds")):
            limit = getattr(self, option)
            if limit is not None and (not is_seconds(limit) or limit <= 0):
                raise ConfigError(f"{option}={limit!r}: {unit} above 0, or None for no limit")
        if not self.name:
            raise ConfigError(f"name={self.name!r}: at least one character")
        for option in ("drain", "cancel_grace", "unknown_ttl"):
            seconds = getattr(self, option)
            if not is_seconds(seconds) or seconds < 0:
                raise ConfigError(f"{option}={seconds!r}: seconds from 0 on")
        for option in ("lease", "poll_timeout"):
            seconds = getattr(self, option)
            if not is_seconds(seconds) or seconds <= 0:
                raise ConfigError(f"{option}={seconds!r}: seconds above 0")
        if self.timeout is not None and not (
            self.timeout == math.inf or (is_seconds(self.timeout) and self.timeout > 0)
        ):
            raise ConfigError(f"timeout={self.timeout!r}: seconds above 0, or None for no limit")
        RetryPolicy.of(False if self.retry is None else self.retry)

    @property
    def policy(self) -> RetryPolicy:
        """Of jobs that bring none, where neither schema nor class has one."""
        return RetryPolicy() if self.retry is None else RetryPolicy.of(self.retry)

    @property
    def longest(self) -> float:
        """Seconds for one run; inf for no limit."""
        return math.inf if self.timeout is None else self.timeout
