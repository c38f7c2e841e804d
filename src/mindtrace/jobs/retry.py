"""`RetryPolicy`: how often a job is run, and how far apart."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, cast

from mindtrace.jobs.errors import ConfigError, RunFailed

MAX_DELAY = 366 * 86400.0
"""The longest delay any backend takes, in seconds."""

_WIDEST = sys.float_info.max
WIRE_FIELDS = ("max_attempts", "base", "factor", "cap", "jitter", "crash_limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a failing job is run, how far apart, and how many crashes it may cause.

    The wait after the n-th failed run is drawn uniformly from 0 to `min(cap, base * factor ** (n - 1))` seconds ("full
    jitter", so that jobs that failed together do not come back together).

    Attributes:
        max_attempts: failed runs (raised, timed out) until the job is dead; 1 or more.
        base: seconds; the upper end of the first wait.
        factor: by how much each further wait may be longer; 1 or more.
        cap: seconds; no wait is longer.
        jitter: `full`, or `none` for the upper end itself.
        retry_on: exceptions that are retried; the others send the job to the dead letters at once, as `rejected`.
        no_retry_on: exceptions that are not, even if `retry_on` covers them.
        delay: in place of the formula: called with the exception (of a run in a process of its own, a `RunFailed`) and
            the number of failed runs, gives seconds, or None for no further run. A function that raises, or gives
            something else, counts as not there.
        crash_limit: deliveries that may end with their worker, or the process that runs them (killed, link lost), until
            the job is dead. They use up no attempt.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_attempts: int = 3
    base: float = 1.0
    factor: float = 2.0
    cap: float = 600.0
    jitter: Literal["full", "none"] = "full"
    retry_on: tuple[type[Exception], ...] = (Exception,)
    no_retry_on: tuple[type[Exception], ...] = ()
    delay: Callable[[Exception, int], float | None] | None = None
    crash_limit: int = 5

    def __post_init__(self) -> None:
        for name in ("max_attempts", "crash_limit"):
            value: Any = getattr(self, name)
            if not is_whole(value) or not 1 <= value <= 2**31 - 1:
                raise ConfigError(f"RetryPolicy({name}={value!r}): a whole number from 1 on")
        for name, least, most in (("base", 0.0, MAX_DELAY), ("factor", 1.0, math.inf), ("cap", 0.0, MAX_DELAY)):
            value = getattr(self, name)
            if not is_seconds(value) or not least <= value <= most:
                raise ConfigError(f"RetryPolicy({name}={value!r}): a finite number from {least:g} to {most:g}")
        if self.jitter not in ("full", "none"):
            raise ConfigError(f"RetryPolicy(jitter={self.jitter!r}): 'full' or 'none'")
        for name in ("retry_on", "no_retry_on"):
            value = getattr(self, name)
            if not _are_exceptions(value):
                raise ConfigError(f"RetryPolicy({name}={value!r}): a tuple of exception classes")
        if self.delay is not None and not callable(self.delay):
            raise ConfigError(f"RetryPolicy(delay={self.delay!r}): a function of the exception and the failed runs")

    @classmethod
    def of(cls, retry: "RetryPolicy | int | Literal[False]") -> "RetryPolicy":
        """`retry` options in short: a number is `max_attempts`, False is a single run.

        Raises:
            ConfigError: neither a policy, nor a number, nor False.
        """
        if isinstance(retry, RetryPolicy):
            return retry
        if retry is False:
            return cls(max_attempts=1)
        if retry is True or not isinstance(retry, int):  # pyright: ignore[reportUnnecessaryIsInstance] (as above)
            raise ConfigError(f"retry={retry!r}: a RetryPolicy, a number of runs, or False")
        return cls(max_attempts=retry)

    def retries(self, error: Exception) -> bool:
        """Whether this kind of failure may be retried at all."""
        return _is_a(error, self.retry_on) and not _is_a(error, self.no_retry_on)

    def wait(self, error: Exception, failed: int, random: Random) -> float | None:
        """Seconds until the next run after `failed` failed runs, this one included; None for no further run."""
        if self.delay is not None:
            try:
                asked = self.delay(error, failed)
            except Exception:  # the user's function: its own failure must not decide over the job
                asked = -1.0
            if asked is None or (is_seconds(asked) and 0 <= asked <= MAX_DELAY):
                return asked
        try:
            longest = min(self.cap, self.base * self.factor ** (failed - 1))
        except OverflowError:
            longest = self.cap if self.base else 0.0
        return random.uniform(0.0, longest) if self.jitter == "full" else longest

    def to_wire(self) -> dict[str, int | float | str]:
        """The fields that differ from the defaults, as JSON values.

        Raises:
            ConfigError: it holds exception classes or a function, which cannot travel with a job.
        """
        if self.delay is not None or self.retry_on != (Exception,) or self.no_retry_on:
            raise ConfigError(
                "retry= at publish carries numbers only: retry_on, no_retry_on and delay belong to the consumer or the "
                "schema, where the job is run"
            )
        return {name: getattr(self, name) for name in WIRE_FIELDS if getattr(self, name) != getattr(_DEFAULT, name)}


def is_seconds(value: object) -> bool:
    """Whether `value` is a finite number, as every duration has to be."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_WIDEST <= value <= _WIDEST  # NaN fails it, and an integer too wide for a float


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_a(error: Exception, kinds: tuple[type[Exception], ...]) -> bool:
    if isinstance(error, RunFailed):  # it stands for an exception of another process
        return any(error.is_a(kind) for kind in kinds)
    return isinstance(error, kinds)


def _are_exceptions(kinds: object) -> bool:
    if not isinstance(kinds, tuple):
        return False
    found = cast(tuple[object, ...], kinds)
    return all(isinstance(kind, type) and issubclass(kind, Exception) for kind in found)


_DEFAULT = RetryPolicy()
