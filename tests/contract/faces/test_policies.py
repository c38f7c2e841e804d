"""Which retry policy and which timeout hold for a run, and what a policy decides, through both faces."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from mindtrace.jobs import Depth, Job, JobSchema, QueueSpec, RetryPolicy, current_job

pytestmark = pytest.mark.anyio

Known = Callable[[int, int, int, int], Depth]


def runs(most: int) -> RetryPolicy:
    return RetryPolicy(max_attempts=most, base=0.0)


def raising(*errors: Exception) -> Callable[[Any], None]:
    """Raises each in turn, then the last again."""
    left = list(errors)

    def act(_: Any) -> None:
        raise left.pop(0) if len(left) > 1 else left[0]

    return act


# --- how often


@pytest.mark.parametrize(
    ("publish", "schema", "own", "expected"),
    [
        (None, None, runs(2), 2),
        (None, runs(4), runs(2), 4),
        (runs(1), runs(4), runs(2), 1),
        (runs(5), None, runs(2), 5),
        (runs(5), None, None, 5),
        (False, runs(4), None, 1),
        (None, False, runs(2), 1),
        (None, None, False, 1),
    ],
)
async def test_the_policy_of_the_publish_comes_before_the_schemas_and_that_before_the_class(
    jobs: Any, orders: Any, publish: Any, schema: Any, own: Any, expected: int
) -> None:
    await jobs.register(JobSchema("chosen", orders.input, retry=schema))
    await jobs.publish("chosen", {}, retry=publish)
    options = {} if own is None else {"retry": own}
    await jobs.consume(jobs.consumer("run", raising(OSError()), "chosen", **options), expected)
    [record] = await jobs.dead("chosen")
    assert (record.reason, record.attempts) == ("attempts", expected)


@pytest.mark.parametrize("where", ["publish", "schema", "class"])
async def test_a_number_stands_for_so_many_runs(jobs: Any, orders: Any, where: str) -> None:
    await jobs.register(JobSchema("chosen", orders.input, retry=1 if where == "schema" else None))
    await jobs.publish("chosen", {}, retry=1 if where == "publish" else None)
    own: dict[str, Any] = {"retry": 1} if where == "class" else {}
    await jobs.consume(jobs.consumer("run", raising(OSError()), "chosen", **own), 1)
    assert [record.attempts for record in await jobs.dead("chosen")] == [1]


async def test_a_job_without_a_schema_has_the_policy_of_the_class_and_by_default_three_runs(jobs: Any) -> None:
    await jobs.declare(QueueSpec("plain"))
    consumer = jobs.consumer("run", raising(OSError()), "plain", retry=RetryPolicy(base=0.0))
    await jobs.publish("plain", Job(name="anything", schema_name="anything"))
    await jobs.consume(consumer, 3)
    assert [record.attempts for record in await jobs.dead("plain")] == [3]


# --- whether at all


async def test_an_error_that_is_not_among_those_to_retry_is_dead_at_once(jobs: Any, orders: Any) -> None:
    policy = RetryPolicy(base=0.0, retry_on=(ConnectionError,))
    await jobs.publish("orders", {})
    act = raising(ConnectionResetError("retried, as a subclass"), ValueError("not retried"))
    assert await jobs.consume(jobs.consumer("run", act, retry=policy), 2) == 2
    [record] = await jobs.dead("orders")
    assert (record.reason, record.attempts) == ("rejected", 2)
    assert [error.type for error in record.errors] == ["ConnectionResetError", "ValueError"]


async def test_an_exception_to_the_rule_wins_over_the_rule(jobs: Any, orders: Any) -> None:
    policy = RetryPolicy(base=0.0, retry_on=(OSError,), no_retry_on=(ConnectionError,))
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer("run", raising(OSError(), ConnectionResetError()), retry=policy), 2)
    assert [(record.reason, record.attempts) for record in await jobs.dead("orders")] == [("rejected", 2)]


async def test_a_number_at_publish_leaves_it_to_the_consumer_what_is_retried(jobs: Any, orders: Any) -> None:
    policy = RetryPolicy(base=0.0, no_retry_on=(ValueError,))
    await jobs.publish("orders", {}, retry=runs(5))
    await jobs.consume(jobs.consumer("run", raising(OSError(), ValueError()), retry=policy), 2)
    assert [(record.reason, record.attempts) for record in await jobs.dead("orders")] == [("rejected", 2)]


# --- how far apart


async def test_a_function_may_say_how_long_to_wait(jobs: Any, orders: Any, known: Known) -> None:
    asked: list[tuple[str, int]] = []

    def delay(error: Exception, failed: int) -> float:
        asked.append((str(error), failed))
        return 0.0 if failed < 3 else 3600.0

    policy = RetryPolicy(max_attempts=9, delay=delay)
    await jobs.publish("orders", {})
    act = raising(OSError("a"), OSError("b"), OSError("c"))
    await jobs.consume(jobs.consumer("run", act, retry=policy), 3)
    assert asked == [("a", 1), ("b", 2), ("c", 3)]
    assert await jobs.depth("orders") == known(0, 1, 0, 0)


async def test_a_function_that_gives_none_ends_the_job(jobs: Any, orders: Any) -> None:
    policy = RetryPolicy(max_attempts=9, delay=lambda _, failed: 0.0 if failed < 2 else None)
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer("run", raising(OSError()), retry=policy), 2)
    assert [(record.reason, record.attempts) for record in await jobs.dead("orders")] == [("rejected", 2)]


@pytest.mark.parametrize("answer", [-1.0, math.nan, math.inf, "soon", True], ids=repr)
async def test_a_function_that_gives_no_delay_leaves_it_to_the_formula(jobs: Any, orders: Any, answer: Any) -> None:
    policy = RetryPolicy(base=0.0, delay=lambda *_: answer)
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer("run", raising(OSError()), retry=policy), 3)
    assert [(record.reason, record.attempts) for record in await jobs.dead("orders")] == [("attempts", 3)]


async def test_a_function_that_raises_decides_nothing(jobs: Any, orders: Any) -> None:
    policy = RetryPolicy(base=0.0, delay=lambda *_: 1 / 0)
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer("run", raising(OSError()), retry=policy), 3)
    [record] = await jobs.dead("orders")
    assert (record.reason, record.errors[-1].type) == ("attempts", "OSError")


# --- how long a run may take


@pytest.mark.parametrize(
    ("publish", "schema", "own", "expected"),
    [
        (None, None, {"timeout": 1000.0}, 1000.0),
        (None, 2000.0, {"timeout": 1000.0}, 2000.0),
        (3000.0, 2000.0, {"timeout": 1000.0}, 3000.0),
        (3000, None, {}, 3000.0),
        (math.inf, 2000.0, {"timeout": 1000.0}, math.inf),
        (None, math.inf, {"timeout": 1000.0}, math.inf),
        (None, None, {"timeout": None}, math.inf),
        (None, None, {"timeout": math.inf}, math.inf),
        (3000.0, math.inf, {"timeout": None}, 3000.0),
    ],
)
async def test_the_timeout_of_the_publish_comes_before_the_schemas_and_that_before_the_class(
    jobs: Any, orders: Any, shape: str, publish: Any, schema: Any, own: dict[str, Any], expected: float
) -> None:
    left: list[float] = []
    await jobs.register(JobSchema("chosen", orders.input, timeout=schema))
    await jobs.publish("chosen", {}, timeout=publish)
    note = jobs.consumer(shape, lambda _: left.append(current_job().deadline - time.monotonic()), "chosen", **own)
    assert await jobs.consume(note, 1) == 1
    assert left == [pytest.approx(expected, abs=100)]
