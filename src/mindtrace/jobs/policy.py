"""`settlement_for`: how a run that ended settles its delivery. Pure: no clock, no broker, no logging."""

from dataclasses import replace
from random import Random

from mindtrace.jobs.delivery import Dead, DeadReason, Delivery, Done, Release, Retry, RunError, Settlement
from mindtrace.jobs.errors import Discard, Refused, Reject, RetryLater, RunCrashed, RunTimeout, Snooze, UnknownSchema
from mindtrace.jobs.retry import MAX_DELAY, RetryPolicy, is_seconds

_UNKNOWN_FIRST, _UNKNOWN_LONGEST = 1.0, 60.0


def settlement_for(delivery: Delivery, end: Done | Exception, policy: RetryPolicy, random: Random) -> Settlement:
    """Done if it returned, Retry while runs remain, then Dead; signals and refusals as they ask.

    Args:
        delivery: what was run.
        end: `Done`, or what the run raised: the user's exception, one of our signals, or `RunTimeout`, `RunAborted`,
            `RunCrashed`, `RunFailed`, `Refused`, `UnknownSchema`.
        policy: of the job, its schema, its consumer or the worker, whichever comes first.
        random: the source of the jitter.
    """
    match end:
        case Done():
            return end
        case Discard():
            return Done(discarded=end.reason)
        case Snooze():
            wait = _delay(end.delay)
            return _after_failure(delivery, end, policy, random) if wait is None else Release(wait)
        case Reject():
            return Dead("rejected", RunError.of(end))
        case Refused():
            return Dead(end.reason, RunError.of(end))
        case UnknownSchema():
            if end.waited >= end.patience:
                return Dead("unknown_schema", RunError.of(end))
            return Release(min(_UNKNOWN_LONGEST, _UNKNOWN_FIRST * 2 ** min(delivery.releases, 16)))
        case RunCrashed():
            return _after_crash(delivery, end, policy, random)
        case _:
            return _after_failure(delivery, end, policy, random)


def _after_failure(delivery: Delivery, end: Exception, policy: RetryPolicy, random: Random) -> Settlement:
    error = RunError.of(end)
    reason: DeadReason = "timeout" if isinstance(end, RunTimeout) else "attempts"
    failed = delivery.attempt - delivery.crashes  # this run included; a crash uses up no attempt
    if isinstance(end, RetryLater):
        if failed >= policy.max_attempts:
            return Dead(reason, error)
        asked = _delay(end.delay)
        wait = policy.wait(end, failed, random) if asked is None else asked
        return Dead("rejected", error) if wait is None else Retry(wait, end.reason, error)
    if not policy.retries(end):
        return Dead("rejected", error)
    if failed >= policy.max_attempts:
        return Dead(reason, error)
    wait = policy.wait(end, failed, random)
    return Dead("rejected", error) if wait is None else Retry(wait, error.type, error)


def _after_crash(delivery: Delivery, end: RunCrashed, policy: RetryPolicy, random: Random) -> Settlement:
    """As where a lease has lapsed, but with a wait: there the lease was the wait."""
    error = replace(RunError.of(end), traceback="")  # the user's code has none that could be known
    crashes, limit = delivery.crashes + 1, delivery.message.crash_limit
    if crashes >= (policy.crash_limit if limit is None else limit):
        return Dead("crash_limit", error, crash=True)
    wait = replace(policy, delay=None).wait(end, crashes, random)  # the user's function decides over failed runs
    return Retry(wait or 0.0, error.type, error, crash=True)


def _delay(asked: object) -> float | None:
    """A delay that user code asked for, brought into range; None where it is no number."""
    return min(max(float(asked), 0.0), MAX_DELAY) if isinstance(asked, int | float) and is_seconds(asked) else None
