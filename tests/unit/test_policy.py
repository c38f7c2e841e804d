"""`settlement_for`: how a run that ended settles its delivery, row by row; a pure function."""

import logging
import math
from dataclasses import asdict
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import (
    Dead,
    Delivery,
    Discard,
    Done,
    JobSignal,
    Reject,
    Release,
    Retry,
    RetryLater,
    RetryPolicy,
    RunCrashed,
    RunFailed,
    RunTimeout,
    Settlement,
    Snooze,
)
from mindtrace.jobs.delivery import DeadReason
from mindtrace.jobs.errors import Refused, RunAborted, UnknownSchema
from mindtrace.jobs.policy import settlement_for
from mindtrace.jobs.retry import MAX_DELAY
from mindtrace.jobs.wire import Message

often = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

EXACT = RetryPolicy(jitter="none")
DAY = 86400.0
HUGE = 10**400  # an integer that no float can hold


def a_delivery(attempt: int = 1, crashes: int = 0, releases: int = 0) -> Delivery:
    number = attempt + releases
    return Delivery("jobs", Message("an-id", b"{}"), attempt, crashes, releases, number, "receipt", math.inf)


def settled(
    end: Done | Exception, policy: RetryPolicy = EXACT, *, attempt: int = 1, crashes: int = 0, releases: int = 0
) -> Settlement:
    return settlement_for(a_delivery(attempt, crashes, releases), end, policy, Random(0))


def dead(settlement: Settlement) -> DeadReason | None:
    """Why the job is dead; None where it is not."""
    return settlement.reason if isinstance(settlement, Dead) else None


def aborted_by(cause: BaseException) -> RunAborted:
    end = RunAborted("the run was aborted")
    end.__cause__ = cause
    return end


def unknown(waited: float, patience: float = DAY) -> UnknownSchema:
    return UnknownSchema("of_tomorrow", waited, patience)


FAILURES = [
    pytest.param(ValueError("no"), "attempts", "ValueError", id="raised"),
    pytest.param(TimeoutError("its own"), "attempts", "TimeoutError", id="raised a TimeoutError of its own"),
    pytest.param(RunTimeout(5.0), "timeout", "mindtrace.jobs.errors.RunTimeout", id="timed out"),
    pytest.param(aborted_by(SystemExit(3)), "attempts", "SystemExit", id="exited"),
    pytest.param(aborted_by(GeneratorExit()), "attempts", "GeneratorExit", id="raised a BaseException"),
    pytest.param(
        RunAborted("the run cancelled itself"), "attempts", "mindtrace.jobs.errors.RunAborted", id="cancelled"
    ),
]


# --- a run that returned


@pytest.mark.parametrize("end", [Done(), Done(b"{}", 60.0), Done(discarded="old")], ids=["bare", "result", "discarded"])
@pytest.mark.parametrize("attempt", [1, 3, 99])
def test_a_run_that_returned_is_done_whatever_the_attempt(end: Done, attempt: int) -> None:
    assert settled(end, attempt=attempt) is end


# --- a run that failed


@pytest.mark.parametrize(("end", "reason", "kind"), FAILURES)
def test_a_failed_run_is_retried_and_its_last_one_dies_of_it(end: Exception, reason: DeadReason, kind: str) -> None:
    for attempt, delay in ((1, 1.0), (2, 2.0)):
        retry = settled(end, attempt=attempt)
        assert isinstance(retry, Retry)
        assert (retry.delay, retry.error and retry.error.type) == (delay, kind)
    last = settled(end, attempt=3)
    assert isinstance(last, Dead)
    assert (last.reason, last.error and last.error.type) == (reason, kind)


@often
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_only_failed_runs_are_compared_with_the_maximum(failed: int, crashes: int, releases: int, maximum: int) -> None:
    """Neither a crash nor a release uses up an attempt, or lengthens a wait."""
    policy = RetryPolicy(max_attempts=maximum, jitter="none")
    settlement = settled(ValueError(), policy, attempt=failed + crashes, crashes=crashes, releases=releases)
    if failed < maximum:
        assert isinstance(settlement, Retry)
        assert settlement.delay == min(600.0, 2.0 ** (failed - 1))
    else:
        assert dead(settlement) == "attempts"


@pytest.mark.parametrize("maximum", [1, 2, 3, 10])
def test_the_maximum_is_how_many_runs_may_fail(maximum: int) -> None:
    policy = RetryPolicy(max_attempts=maximum)
    ends = [dead(settled(ValueError(), policy, attempt=attempt)) for attempt in range(1, maximum + 2)]
    assert ends == [*[None] * (maximum - 1), "attempts", "attempts"]


def test_a_job_that_lived_through_its_crashes_still_has_all_its_runs() -> None:
    assert [dead(settled(ValueError(), attempt=4 + failed, crashes=4)) for failed in (1, 2, 3)] == [
        None,
        None,
        "attempts",
    ]


@often
@given(st.integers(1, 20), st.integers(), st.floats(0, 1000), st.floats(1, 10), st.floats(0, 1000))
def test_the_wait_is_the_policys_drawn_from_the_random_passed_in(
    failed: int, seed: int, base: float, factor: float, cap: float
) -> None:
    policy = RetryPolicy(max_attempts=99, base=base, factor=factor, cap=cap)
    error = ValueError()
    settlement = settlement_for(a_delivery(failed), error, policy, Random(seed))
    assert isinstance(settlement, Retry)
    assert settlement.delay == policy.wait(error, failed, Random(seed))
    assert 0 <= settlement.delay <= cap


def test_an_error_travels_with_its_text() -> None:
    retry, last = settled(KeyError("lost")), settled(KeyError("lost"), attempt=3)
    assert isinstance(retry, Retry)
    assert isinstance(last, Dead)
    assert retry.error is not None
    assert retry.error == last.error
    assert (retry.error.type, retry.error.message) == ("KeyError", "'lost'")


@pytest.mark.parametrize("attempt", [1, 2, 3])
@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy(no_retry_on=(ValueError,)),
        RetryPolicy(no_retry_on=(Exception,)),
        RetryPolicy(retry_on=(ValueError,), no_retry_on=(ValueError,)),
        RetryPolicy(retry_on=(UnicodeError,), no_retry_on=(ValueError,)),
        RetryPolicy(retry_on=(KeyError,)),
        RetryPolicy(retry_on=()),
    ],
    ids=["named", "its parent", "named twice", "its child", "another", "none"],
)
def test_an_error_that_may_not_be_retried_is_rejected_at_once(policy: RetryPolicy, attempt: int) -> None:
    settlement = settled(UnicodeError("no"), policy, attempt=attempt)
    assert isinstance(settlement, Dead)
    assert (settlement.reason, settlement.error and settlement.error.message) == ("rejected", "no")


def test_an_error_beside_those_that_may_not_be_retried_is_retried() -> None:
    policy = RetryPolicy(retry_on=(LookupError,), no_retry_on=(KeyError,))
    assert isinstance(settled(IndexError(), policy), Retry)


def test_a_delay_function_decides_over_the_wait_and_the_end() -> None:
    policy = RetryPolicy(max_attempts=9, delay=lambda error, failed: None if failed == 3 else failed * 10.0)
    delays = [
        s.delay if isinstance(s, Retry) else dead(s)
        for s in (settled(ValueError(), policy, attempt=2 + failed, crashes=2) for failed in (1, 2, 3))
    ]
    assert delays == [10.0, 20.0, "rejected"]


def test_a_delay_function_gives_no_run_beyond_the_maximum() -> None:
    assert dead(settled(ValueError(), RetryPolicy(delay=lambda error, failed: 1.0), attempt=3)) == "attempts"


# --- what is not run, or not kept


@pytest.mark.parametrize("reason", ["malformed", "too_large", "input_invalid", "output_invalid"])
@pytest.mark.parametrize("policy", [EXACT, RetryPolicy(max_attempts=99, delay=lambda error, failed: 1.0)])
def test_what_is_refused_is_dead_of_it_at_once(reason: DeadReason, policy: RetryPolicy) -> None:
    settlement = settled(Refused(reason, "does not fit"), policy)  # type: ignore[arg-type]
    assert isinstance(settlement, Dead)
    assert (settlement.reason, settlement.error and settlement.error.message) == (reason, "does not fit")


def test_a_job_nobody_knows_is_released_further_and_further_apart() -> None:
    delays = [settled(unknown(10.0), releases=releases) for releases in (0, 1, 2, 3, 4, 5, 6, 7, 100, 2**31)]
    assert delays == [Release(float(delay)) for delay in (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)]


@pytest.mark.parametrize(
    ("waited", "patience", "reason"),
    [
        (-5.0, DAY, None),
        (DAY - 1, DAY, None),
        (DAY, DAY, "unknown_schema"),
        (DAY * 400, DAY, "unknown_schema"),
        (59.0, 60.0, None),
        (60.0, 60.0, "unknown_schema"),
    ],
)
def test_a_job_nobody_came_to_know_is_dead_in_the_end(
    waited: float, patience: float, reason: DeadReason | None
) -> None:
    """It is the time waited that decides, neither the attempts nor the releases."""
    for attempt, releases in ((1, 0), (99, 0), (1, 9999)):
        settlement = settled(unknown(waited, patience), attempt=attempt, releases=releases)
        assert dead(settlement) == reason
        assert isinstance(settlement, Release if reason is None else Dead)


# --- signals


def test_retry_later_waits_as_the_policy_says_unless_told() -> None:
    policy = RetryPolicy(max_attempts=9)
    asked = settlement_for(a_delivery(4), RetryLater(reason="busy"), policy, Random(7))
    plain = settlement_for(a_delivery(4), ValueError(), policy, Random(7))
    assert isinstance(asked, Retry)
    assert isinstance(plain, Retry)
    assert (asked.delay, asked.reason) == (plain.delay, "busy")
    assert asked.error is not None
    assert asked.error.message == "busy"


@pytest.mark.parametrize("delay", [0, 0.0, 2.5, 7, 5000.0, MAX_DELAY])
@pytest.mark.parametrize("policy", [RetryPolicy(cap=1), RetryPolicy(delay=lambda error, failed: 3.0)])
def test_a_delay_that_a_job_asks_for_holds_without_jitter_or_cap(delay: float, policy: RetryPolicy) -> None:
    settlement = settled(RetryLater(delay), policy)
    assert isinstance(settlement, Retry)
    assert settlement.delay == delay


def test_retry_later_counts_as_an_attempt() -> None:
    ends = [dead(settled(RetryLater(5.0), attempt=2 + failed, crashes=2)) for failed in (1, 2, 3, 4)]
    assert ends == [None, None, "attempts", "attempts"]


@pytest.mark.parametrize("policy", [RetryPolicy(retry_on=()), RetryPolicy(no_retry_on=(Exception,))])
def test_retry_later_is_no_error_that_a_policy_could_refuse(policy: RetryPolicy) -> None:
    assert isinstance(settled(RetryLater(), policy), Retry)


@pytest.mark.parametrize("attempt", [1, 3, 99])
@pytest.mark.parametrize("delay", [0, 0.0, 2.5, MAX_DELAY])
def test_a_snooze_is_a_release_whatever_the_attempt(delay: float, attempt: int) -> None:
    assert settled(Snooze(delay, "not yet"), attempt=attempt) == Release(delay)


@pytest.mark.parametrize(
    ("asked", "given"), [(-1, 0.0), (-math.pi, 0.0), (MAX_DELAY + 1, MAX_DELAY), (1e300, MAX_DELAY)]
)
def test_a_delay_that_a_job_asks_for_is_brought_into_range(asked: float, given: float) -> None:
    retry, release = settled(RetryLater(asked)), settled(Snooze(asked))
    assert isinstance(retry, Retry)
    assert (retry.delay, release) == (given, Release(given))


@pytest.mark.parametrize("reason", ["", "out of date"])
@pytest.mark.parametrize("attempt", [1, 3, 99])
def test_a_discarded_job_is_done_and_says_why(reason: str, attempt: int) -> None:
    assert settled(Discard(reason), attempt=attempt) == Done(discarded=reason)


@pytest.mark.parametrize("attempt", [1, 3])
def test_a_rejected_job_is_dead_at_once_in_its_own_words(attempt: int) -> None:
    settlement = settled(Reject("no such customer"), RetryPolicy(max_attempts=9), attempt=attempt)
    assert isinstance(settlement, Dead)
    assert (settlement.reason, settlement.error and settlement.error.message) == ("rejected", "no such customer")


@pytest.mark.parametrize(
    ("signal", "asked", "kind"),
    [(RetryLater, 1.0, Retry), (Snooze, 1.0, Release), (Discard, "old", Done), (Reject, "no", Dead)],
)
def test_a_signal_of_ones_own_steers_as_the_one_it_is_made_from(
    signal: type[JobSignal], asked: object, kind: type[Settlement]
) -> None:
    own = type("Own", (signal,), {})
    assert isinstance(settled(own(asked)), kind)


# --- a run in a process of its own


CRASH = RunCrashed("the process was ended by SIGABRT")


def test_a_crash_uses_up_no_attempt_and_the_last_one_is_the_limit() -> None:
    """With the defaults a poison job starts five times, however few failures it may have."""
    once = RetryPolicy(max_attempts=1, jitter="none")
    for crashes, delay in ((0, 1.0), (1, 2.0), (3, 8.0)):
        settlement = settled(CRASH, once, attempt=crashes + 1, crashes=crashes)
        assert isinstance(settlement, Retry)
        assert (settlement.crash, settlement.delay) == (True, delay)
        assert settlement.error is not None
        assert settlement.error.message == "the process was ended by SIGABRT"
    last = settled(CRASH, once, attempt=5, crashes=4)
    assert isinstance(last, Dead)
    assert (last.reason, last.crash) == ("crash_limit", True)


def test_the_limit_of_the_job_comes_before_that_of_the_policy() -> None:
    delivery = a_delivery()
    delivery.message = Message("an-id", b"{}", crash_limit=1)
    assert dead(settlement_for(delivery, CRASH, EXACT, Random(0))) == "crash_limit"


def test_a_users_function_decides_over_failed_runs_and_not_over_crashes() -> None:
    settlement = settled(CRASH, RetryPolicy(delay=lambda error, failed: None))
    assert isinstance(settlement, Retry)


class Sold(LookupError):
    pass


@pytest.mark.parametrize(
    ("policy", "runs_again"),
    [
        (RetryPolicy(), True),
        (RetryPolicy(retry_on=(Sold,)), True),
        (RetryPolicy(retry_on=(KeyError, LookupError)), True),
        (RetryPolicy(retry_on=(KeyError,)), False),
        (RetryPolicy(retry_on=()), False),
        (RetryPolicy(no_retry_on=(LookupError,)), False),
        (RetryPolicy(retry_on=(Sold,), no_retry_on=(KeyError,)), True),
        (RetryPolicy(retry_on=(RunFailed,)), False),
    ],
)
def test_an_error_of_another_process_is_judged_by_the_names_of_its_classes(
    policy: RetryPolicy, runs_again: bool
) -> None:
    names = [f"{kind.__module__}:{kind.__qualname__}" for kind in Sold.__mro__]
    settlement = settled(RunFailed("shop.Sold", "out", "", "", names), policy)
    assert isinstance(settlement, Retry) == runs_again
    assert runs_again or dead(settlement) == "rejected"


# --- whatever comes, one value


ENDS = st.one_of(
    st.just(Done()),
    st.builds(ValueError, st.text()),
    st.builds(RunTimeout, st.floats(0.1, 1e6)),
    st.builds(RunCrashed, st.text()),
    st.builds(RunFailed, st.text(), st.text(), st.text(), st.text(), st.lists(st.text())),
    st.builds(RetryLater, st.none() | st.floats() | st.integers(), st.text()),
    st.builds(Snooze, st.floats() | st.integers(-(10**300), 10**300), st.text()),
    st.builds(Discard, st.text()),
    st.builds(Reject, st.text()),
    st.builds(UnknownSchema, st.text(), st.floats(-1e9, 1e9), st.floats(0, 1e9)),
    st.builds(Refused, st.sampled_from(["malformed", "too_large", "input_invalid", "output_invalid"]), st.text()),
)


@often
@given(ENDS, st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000), st.integers())
def test_the_same_end_is_settled_the_same_and_nothing_is_touched(
    end: Done | Exception, failed: int, crashes: int, releases: int, seed: int
) -> None:
    policy, delivery = RetryPolicy(max_attempts=500), a_delivery(failed + crashes, crashes, releases)
    before = asdict(delivery)
    settlement = settlement_for(delivery, end, policy, Random(seed))
    assert settlement == settlement_for(delivery, end, policy, Random(seed))
    assert asdict(delivery) == before
    if isinstance(settlement, Retry | Release):
        assert 0 <= settlement.delay <= MAX_DELAY


@pytest.mark.parametrize(
    "delay", [math.nan, math.inf, -math.inf, HUGE, -HUGE, "5", None], ids=lambda delay: repr(delay)[:10]
)
def test_a_delay_that_is_no_number_of_seconds_still_settles(delay: float) -> None:
    """It is a failed run: put off by no time at all it would turn for ever."""
    for signal in (RetryLater(delay, "why"), Snooze(delay, "why")):
        settlement = settled(signal)
        assert isinstance(settlement, Retry)
        assert 0 <= settlement.delay <= MAX_DELAY


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for end in (Done(), ValueError(), RunTimeout(1.0), Snooze(1.0), Refused("malformed", "no"), unknown(DAY)):
            settled(end, attempt=3)
    assert caplog.records == []
