"""`RetryPolicy`: how far apart the runs of a job are, what it refuses, and what of it travels with a job."""

import json
import math
from dataclasses import FrozenInstanceError
from fractions import Fraction
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import ConfigError, RetryPolicy
from mindtrace.jobs.retry import MAX_DELAY

often = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

seconds = st.floats(0, MAX_DELAY)
bases = st.just(0.0) | st.floats(1e-9, MAX_DELAY)
policies = st.builds(
    RetryPolicy,
    base=bases,
    factor=st.floats(1, 1e9) | st.integers(1, 10),
    cap=seconds,
    jitter=st.sampled_from(["full", "none"]),
)
HUGE = 10**400  # an integer that no float can hold


class Retried(Exception):
    """What a run raised."""


def upper_end(policy: RetryPolicy, failed: int) -> float:
    """`min(cap, base * factor ** (failed - 1))` in exact numbers."""
    return float(min(Fraction(policy.cap), Fraction(policy.base) * Fraction(policy.factor) ** (failed - 1)))


def wait(policy: RetryPolicy, failed: int, seed: int = 0) -> float:
    asked = policy.wait(Retried(), failed, Random(seed))
    assert asked is not None
    return asked


def without_jitter(policy: RetryPolicy) -> RetryPolicy:
    return RetryPolicy(base=policy.base, factor=policy.factor, cap=policy.cap, jitter="none")


# --- how far apart


def test_the_defaults_are_the_promised_ones() -> None:
    policy = RetryPolicy()
    assert (policy.max_attempts, policy.crash_limit) == (3, 5)
    assert (policy.base, policy.factor, policy.cap, policy.jitter) == (1.0, 2.0, 600.0, "full")
    assert (policy.retry_on, policy.no_retry_on, policy.delay) == ((Exception,), (), None)


def test_without_jitter_the_waits_double_up_to_ten_minutes() -> None:
    policy = RetryPolicy(jitter="none")
    assert [wait(policy, failed) for failed in range(1, 13)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]


@often
@given(policies, st.integers(1, 60), st.integers())
@example(RetryPolicy(base=0.0, factor=1e9), 60, 0)
def test_a_wait_lies_between_nothing_and_its_upper_end(policy: RetryPolicy, failed: int, seed: int) -> None:
    longest = upper_end(policy, failed)
    assert 0 <= wait(policy, failed, seed) <= min(policy.cap, longest * (1 + 1e-12))


@often
@given(policies.map(without_jitter), st.integers(1, 60))
@example(RetryPolicy(base=0.0, factor=1e9, jitter="none"), 60)
def test_without_jitter_a_wait_is_its_upper_end(policy: RetryPolicy, failed: int) -> None:
    assert wait(policy, failed) == pytest.approx(upper_end(policy, failed), rel=1e-12)


@often
@given(policies.map(without_jitter), st.integers(1, 10_000))
def test_the_upper_end_never_falls(policy: RetryPolicy, failed: int) -> None:
    assert wait(policy, failed) <= wait(policy, failed + 1)


@often
@given(
    st.builds(RetryPolicy, base=bases, factor=st.floats(1, 1.7e308), cap=seconds),
    st.integers(1, 2**31 - 1) | st.none(),
)
def test_no_number_of_failed_runs_takes_a_wait_over_its_cap(policy: RetryPolicy, failed: int | None) -> None:
    assert 0 <= wait(policy, failed or 2**31 - 1) <= policy.cap


def test_numbers_that_are_whole_do_not_overflow_either() -> None:
    assert wait(RetryPolicy(base=2, factor=10, cap=600, jitter="none"), 5_000) == 600


@pytest.mark.parametrize("failed", [1, 2, 1024, 1025, 1026, 100_000])
def test_a_base_of_nothing_means_no_wait_however_often_a_job_has_failed(failed: int) -> None:
    assert wait(RetryPolicy(base=0, jitter="none"), failed) == 0


def test_a_seed_decides_the_waits() -> None:
    policy = RetryPolicy()
    one, other = Random(5), Random(5)
    assert [policy.wait(Retried(), n, one) for n in range(1, 20)] == [
        policy.wait(Retried(), n, other) for n in range(1, 20)
    ]
    assert wait(policy, 9, seed=1) != wait(policy, 9, seed=2)


def test_full_jitter_is_spread_evenly() -> None:
    """Jobs that failed together do not come back together. The seed is fixed, so the counts are."""
    policy, random = RetryPolicy(base=100, cap=100), Random(20)
    waits = [policy.wait(Retried(), 1, random) or 0.0 for _ in range(10_000)]
    tenths = [sum(tenth <= delay / 10 < tenth + 1 for delay in waits) for tenth in range(10)]
    assert sum(tenths) == 10_000
    assert all(850 < count < 1150 for count in tenths)  # 1,000 each, and five standard deviations


def test_no_jitter_takes_no_randomness() -> None:
    random = Random(3)
    before = random.getstate()
    RetryPolicy(jitter="none").wait(Retried(), 3, random)
    assert random.getstate() == before


# --- a delay of one's own


def test_a_delay_function_is_asked_with_the_error_and_the_failed_runs() -> None:
    asked: list[tuple[Exception, int]] = []

    def delay(error: Exception, failed: int) -> float:
        asked.append((error, failed))
        return 12.5

    error = Retried("no")
    assert RetryPolicy(delay=delay).wait(error, 4, Random(0)) == 12.5
    assert asked == [(error, 4)]


@pytest.mark.parametrize("answer", [0, 0.0, 7, 7.5, MAX_DELAY])
def test_what_a_delay_function_answers_holds_without_jitter_or_cap(answer: float) -> None:
    assert RetryPolicy(cap=1, delay=lambda error, failed: answer).wait(Retried(), 1, Random(0)) == answer


def test_a_delay_function_that_answers_none_ends_the_runs() -> None:
    assert RetryPolicy(delay=lambda error, failed: None).wait(Retried(), 1, Random(0)) is None


@pytest.mark.parametrize(
    "answer",
    [-1, -0.001, math.nan, math.inf, -math.inf, MAX_DELAY * 1.01, HUGE, -HUGE, "5", True, object(), [1]],
    ids=lambda value: repr(value)[:30],
)
def test_a_delay_function_that_answers_nonsense_counts_as_not_there(answer: object) -> None:
    policy = RetryPolicy(jitter="none", delay=lambda error, failed: answer)  # type: ignore[arg-type,return-value]
    assert policy.wait(Retried(), 3, Random(0)) == 4


def test_a_delay_function_that_raises_counts_as_not_there() -> None:
    def delay(error: Exception, failed: int) -> float:
        raise ZeroDivisionError

    assert RetryPolicy(jitter="none", delay=delay).wait(Retried(), 3, Random(0)) == 4


# --- what is retried


@pytest.mark.parametrize(
    ("retry_on", "no_retry_on", "error", "retried"),
    [
        ((Exception,), (), ValueError(), True),
        ((LookupError,), (), KeyError(), True),
        ((LookupError,), (), ValueError(), False),
        ((LookupError, ValueError), (), ValueError(), True),
        ((), (), ValueError(), False),
        ((Exception,), (LookupError,), KeyError(), False),
        ((Exception,), (KeyError,), IndexError(), True),
        ((KeyError,), (LookupError,), KeyError(), False),
        ((KeyError,), (KeyError,), KeyError(), False),
    ],
)
def test_no_retry_on_wins_over_retry_on(
    retry_on: tuple[type[Exception], ...], no_retry_on: tuple[type[Exception], ...], error: Exception, retried: bool
) -> None:
    assert RetryPolicy(retry_on=retry_on, no_retry_on=no_retry_on).retries(error) is retried


# --- what is refused


COUNTS = [0, -1, 2**31, 1.0, 2.5, True, False, "3", None, math.inf, math.nan]
NUMBERS = [-0.001, -1, math.nan, math.inf, -math.inf, HUGE, -HUGE, True, "1", None, 1j]
CLASSES = [
    Exception,
    [ValueError],
    "ValueError",
    (ValueError(),),
    (KeyboardInterrupt,),
    (BaseException,),
    (int,),
    (1,),
    None,
]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_attempts", value) for value in COUNTS),
        *(("crash_limit", value) for value in COUNTS),
        *(("base", value) for value in [*NUMBERS, MAX_DELAY + 1]),
        *(("cap", value) for value in [*NUMBERS, MAX_DELAY + 1]),
        *(("factor", value) for value in [*NUMBERS, 0, 0.999]),
        *(("jitter", value) for value in ["half", "FULL", "", None, True, 0, ["full"]]),
        *(("retry_on", value) for value in CLASSES),
        *(("no_retry_on", value) for value in CLASSES),
        *(("delay", value) for value in [5, 5.0, "5", (1,)]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_value_out_of_its_range_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        RetryPolicy(**{option: value})  # type: ignore[arg-type]
    assert f"{option}={value!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_attempts", 1),
        ("max_attempts", 2**31 - 1),
        ("crash_limit", 1),
        ("crash_limit", 2**31 - 1),
        ("base", 0),
        ("base", MAX_DELAY),
        ("cap", 0.0),
        ("cap", int(MAX_DELAY)),
        ("factor", 1),
        ("factor", 1.7e308),
        ("retry_on", ()),
    ],
)
def test_the_ends_of_a_range_are_in_it(option: str, value: object) -> None:
    assert getattr(RetryPolicy(**{option: value}), option) == value  # type: ignore[arg-type]


def test_a_policy_does_not_change_and_equals_another_that_says_the_same() -> None:
    policy = RetryPolicy(max_attempts=7)
    with pytest.raises(FrozenInstanceError):
        policy.max_attempts = 8  # type: ignore[misc]
    assert policy == RetryPolicy(max_attempts=7) != RetryPolicy(max_attempts=8)
    assert hash(policy) == hash(RetryPolicy(max_attempts=7))


def test_the_fields_have_to_be_named() -> None:
    with pytest.raises(TypeError):
        RetryPolicy(3)  # type: ignore[call-arg]


# --- in short


def test_a_policy_stands_for_itself() -> None:
    policy = RetryPolicy(max_attempts=9)
    assert RetryPolicy.of(policy) is policy


@pytest.mark.parametrize(("retry", "runs"), [(False, 1), (1, 1), (8, 8)])
def test_a_number_is_how_many_runs_and_false_is_one(retry: int, runs: int) -> None:
    assert RetryPolicy.of(retry) == RetryPolicy(max_attempts=runs)


@pytest.mark.parametrize("retry", [True, None, "3", 2.5, (), {"max_attempts": 3}], ids=lambda value: repr(value)[:30])
def test_what_is_no_policy_is_refused(retry: object) -> None:
    with pytest.raises(ConfigError, match="retry=") as refused:
        RetryPolicy.of(retry)  # type: ignore[arg-type]
    assert repr(retry) in str(refused.value)


@pytest.mark.parametrize("retry", [0, -1, 2**31])
def test_a_number_of_runs_has_to_be_in_range(retry: int) -> None:
    with pytest.raises(ConfigError, match=f"max_attempts={retry}"):
        RetryPolicy.of(retry)


# --- what travels


def test_only_what_differs_from_the_defaults_travels() -> None:
    assert RetryPolicy().to_wire() == {}
    assert RetryPolicy(max_attempts=4, jitter="none").to_wire() == {"max_attempts": 4, "jitter": "none"}


@often
@given(
    st.builds(
        RetryPolicy,
        max_attempts=st.integers(1, 2**31 - 1),
        crash_limit=st.integers(1, 2**31 - 1),
        base=bases,
        factor=st.floats(1, 1e300),
        cap=seconds,
        jitter=st.sampled_from(["full", "none"]),
    )
)
def test_the_numbers_come_back_from_json_as_they_were(policy: RetryPolicy) -> None:
    assert RetryPolicy(**json.loads(json.dumps(policy.to_wire()))) == policy


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy(retry_on=(ValueError,)),
        RetryPolicy(retry_on=()),
        RetryPolicy(no_retry_on=(ValueError,)),
        RetryPolicy(delay=lambda error, failed: 1.0),
    ],
    ids=["retry_on", "nothing", "no_retry_on", "delay"],
)
def test_classes_and_functions_do_not_travel(policy: RetryPolicy) -> None:
    with pytest.raises(ConfigError, match="retry_on, no_retry_on and delay"):
        policy.to_wire()
