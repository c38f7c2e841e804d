"""How each way a run may end settles its job, through both faces and by each method a consumer may have."""

import asyncio
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from mindtrace.jobs import (
    Depth,
    Discard,
    Job,
    JobSchema,
    JobsError,
    QueueSpec,
    Reject,
    RetryLater,
    RetryPolicy,
    Snooze,
    current_job,
)
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

Known = Callable[[int, int, int, int], Depth]

AT_ONCE = RetryPolicy(base=0.0)
LATER = RetryPolicy(base=3600.0, cap=3600.0, jitter="none")


def item_of(job: Any) -> str:
    """`run` gets the job as a dict, `handle` its input as a model."""
    return job["input_data"]["item"] if isinstance(job, dict) else job.item


def raising(error: BaseException) -> Callable[[Any], None]:
    def act(_: Any) -> None:
        raise error

    return act


class Recorder:
    """A run that notes its attempt, then does what comes next in its list."""

    def __init__(self, *acts: Any) -> None:
        self.attempts: list[int] = []
        self._acts = acts

    def __call__(self, _: Any) -> Any:
        self.attempts.append(current_job().attempt)
        act = self._acts[min(len(self.attempts), len(self._acts)) - 1]
        if isinstance(act, BaseException):
            raise act
        return act


# --- it returned


async def test_a_run_that_returns_what_its_schema_says_is_done(
    jobs: Any, orders: Any, shape: str, known: Known
) -> None:
    seen: list[str] = []

    def act(job: Any) -> dict[str, int]:
        seen.append(item_of(job))
        return {"total": 3}

    await jobs.publish("orders", {"item": "milk"})
    await jobs.publish("orders", {"item": "sugar"})
    assert await jobs.consume(jobs.consumer(shape, act), 2) == 2
    assert seen == ["milk", "sugar"]
    assert await jobs.depth("orders") == known(0, 0, 0, 0)


async def test_handle_gets_a_model_and_may_return_one(jobs: Any, orders: Any) -> None:
    seen: list[BaseModel] = []

    def act(order: Any) -> Any:
        seen.append(order)
        return orders.output(total=order.amount)

    await jobs.publish("orders", {"amount": "3"})
    for shape in ("handle", "async handle"):
        await jobs.publish("orders", {"amount": "3"})
        await jobs.consume(jobs.consumer(shape, act), 1)
    assert seen == [orders.input(item="tea", amount=3)] * 2
    assert await jobs.dead("orders") == []


@pytest.mark.parametrize("wrong", [None, {}, {"total": "a-secret-sum"}, "a-secret-sum", 3, object()], ids=repr)
async def test_a_result_that_does_not_fit_is_dead_and_not_run_again(
    jobs: Any, orders: Any, shape: str, wrong: Any
) -> None:
    run = Recorder(wrong)
    await jobs.publish("orders", {})
    assert await jobs.consume(jobs.consumer(shape, run, retry=AT_ONCE), 1) == 1
    [record] = await jobs.dead("orders")
    assert (record.reason, record.attempts, run.attempts) == ("output_invalid", 1, [1])
    assert "secret" not in repr(record.errors)


async def test_a_result_may_be_a_model_with_aliases(jobs: Any, orders: Any) -> None:
    class Bill(BaseModel):
        total: int = Field(alias="Total")

    base = jobs.consumer_class(is_async=False)

    class Billing(base[orders.input, Bill]):
        def handle(self, data: Any) -> Bill:
            return Bill(Total=data.amount)

    await jobs.register(JobSchema("bills", orders.input, Bill))
    await jobs.publish("bills", {})
    await jobs.consume(Billing("bills"), 1)
    assert await jobs.dead("bills") == []


async def test_a_model_that_was_made_wrong_is_no_valid_result(jobs: Any, orders: Any) -> None:
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer("handle", lambda _: orders.output.model_construct(total="much")), 1)
    assert [record.reason for record in await jobs.dead("orders")] == ["output_invalid"]


async def test_a_schema_may_have_misfits_logged_instead(
    jobs: Any, orders: Any, shape: str, caplog: pytest.LogCaptureFixture, known: Known
) -> None:
    await jobs.register(JobSchema("tolerant", orders.input, orders.output, validate_output="warn"))
    await jobs.publish("tolerant", {}, job_id="odd")
    assert await jobs.consume(jobs.consumer(shape, lambda _: {"total": "a-secret-sum"}, "tolerant"), 1) == 1
    assert await jobs.depth("tolerant") == known(0, 0, 0, 0)
    [warning] = [
        record for record in caplog.records if record.levelno == logging.WARNING and "odd" in record.getMessage()
    ]
    assert "odd" in warning.getMessage()
    assert "total" in warning.getMessage()
    assert "secret" not in warning.getMessage()


@pytest.mark.parametrize("result", [None, {"any": 1}, "text", object()], ids=repr)
async def test_without_an_output_model_anything_may_be_returned(jobs: Any, result: Any, known: Known) -> None:
    class Note(BaseModel):
        text: str = ""

    await jobs.register(JobSchema("notes", Note))
    await jobs.declare(QueueSpec("plain"))
    for queue in ("notes", "plain"):
        await jobs.publish(queue, Job(name="notes" if queue == "notes" else "x", schema_name="notes"))
        assert await jobs.consume(jobs.consumer("run", lambda _: result, queue), 1) == 1
        assert await jobs.depth(queue) == known(0, 0, 0, 0)


# --- it raised


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


ERRORS = [
    ValueError("wrong"),
    StopIteration("over"),
    StopAsyncIteration(),
    TimeoutError("its own, not ours"),
    asyncio.CancelledError("from inside"),
    ExceptionGroup("two", [ValueError(), OSError()]),
    JobsError("nested"),
    Unprintable(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_run_that_raises_is_retried_and_after_its_last_attempt_dead(
    jobs: Any, orders: Any, shape: str, error: BaseException, known: Known
) -> None:
    """It never escapes `consume`; the default is three runs."""
    run = Recorder(error)
    await jobs.publish("orders", {})
    assert await jobs.consume(jobs.consumer(shape, run, retry=AT_ONCE), 3) == 3
    [record] = await jobs.dead("orders")
    assert (record.reason, record.attempts, run.attempts) == ("attempts", 3, [1, 2, 3])
    assert len(record.errors) == 3
    assert await jobs.depth("orders") == known(0, 0, 0, 1)


async def test_a_failed_run_waits_for_its_retry_in_the_queue(jobs: Any, orders: Any, shape: str, known: Known) -> None:
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer(shape, raising(OSError()), retry=LATER), 1)
    assert await jobs.depth("orders") == known(0, 1, 0, 0)


async def test_a_retry_that_succeeds_is_done(jobs: Any, orders: Any, shape: str, known: Known) -> None:
    run = Recorder(OSError(), OSError(), {"total": 1})
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer(shape, run, retry=AT_ONCE), 3)
    assert run.attempts == [1, 2, 3]
    assert await jobs.depth("orders") == known(0, 0, 0, 0)


async def test_a_retried_job_queues_behind_what_is_ready(jobs: Any, orders: Any) -> None:
    started: list[str] = []

    def act(job: Any) -> dict[str, int]:
        started.append(item_of(job))
        if started == ["first"]:
            raise OSError
        return {"total": 1}

    for item in ("first", "second"):
        await jobs.publish("orders", {"item": item})
    await jobs.consume(jobs.consumer("run", act, retry=AT_ONCE), 3)
    assert started == ["first", "second", "first"]


async def test_a_run_that_cancels_itself_has_failed(jobs: Any, orders: Any) -> None:
    async def act(_: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.Event().wait()

    await jobs.publish("orders", {})
    assert await jobs.consume(jobs.consumer("async run", act, retry=RetryPolicy(max_attempts=2, base=0.0)), 2) == 2
    [record] = await jobs.dead("orders")
    assert (record.reason, record.attempts) == ("attempts", 2)
    assert record.errors[-1].type.endswith("CancelledError")


async def test_a_dead_record_keeps_every_error_and_the_newest_in_full(jobs: Any, orders: Any) -> None:
    run = Recorder(*(ValueError(f"run {n}") for n in range(1, 13)))
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer("run", run, retry=RetryPolicy(max_attempts=12, base=0.0)), 12)
    [record] = await jobs.dead("orders")
    assert [error.message for error in record.errors] == [f"run {n}" for n in range(3, 13)]
    assert [bool(error.traceback) for error in record.errors] == [False] * 9 + [True]


# --- its time was over


async def test_a_coroutine_whose_time_is_over_is_cancelled_and_retried_then_dead(jobs: Any, orders: Any) -> None:
    cancelled: list[bool] = []

    async def act(_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(current_job().cancelled)

    await jobs.publish("orders", {}, timeout=0.01)
    assert await jobs.consume(jobs.consumer("async run", act, retry=RetryPolicy(max_attempts=2, base=0.0)), 2) == 2
    [record] = await jobs.dead("orders")
    assert (record.reason, record.attempts, cancelled) == ("timeout", 2, [True, True])
    assert [error.type for error in record.errors] == ["mindtrace.jobs.errors.RunTimeout"] * 2


async def test_a_run_that_ends_within_its_grace_has_finished(jobs: Any, orders: Any, known: Known) -> None:
    async def act(_: Any) -> dict[str, int]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return {"total": 1}
        return {}

    await jobs.publish("orders", {}, timeout=0.01)
    assert await jobs.consume(jobs.consumer("async run", act), 1) == 1
    assert await jobs.depth("orders") == known(0, 0, 0, 0)


async def test_a_run_that_fails_within_its_grace_has_timed_out(jobs: Any, orders: Any) -> None:
    async def act(_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("while cleaning up")

    await jobs.publish("orders", {}, timeout=0.01, retry=False)
    await jobs.consume(jobs.consumer("async run", act), 1)
    assert [record.reason for record in await jobs.dead("orders")] == ["timeout"]


@pytest.mark.parametrize("shape", ["run", "handle"])
async def test_a_thread_whose_time_is_over_is_settled_at_once_and_its_late_return_refused(
    jobs: Any, orders: Any, shape: str, gate: Any, known: Known
) -> None:
    flags: list[bool] = []

    def act(_: Any) -> dict[str, int]:
        gate.enter()
        flags.append(current_job().cancelled)
        return {"total": 1}

    await jobs.publish("orders", {}, timeout=0.01, retry=False)
    async with jobs.consuming(jobs.consumer(shape, act), 1), asyncio.timeout(10):
        await gate.entered()
        await jobs.until_dead("orders")
        assert await jobs.depth("orders") == known(0, 0, 0, 1)
        gate.open()
        while not flags:  # noqa: ASYNC110 (a stop does not wait for what is settled already)
            await asyncio.sleep(0.001)
    [record] = await jobs.dead("orders")
    assert (record.reason, flags) == ("timeout", [True])


# --- it was never run


async def test_an_input_that_its_schema_refuses_on_arrival_is_dead_and_kept(jobs: Any, orders: Any, shape: str) -> None:
    run = Recorder({"total": 1})
    await jobs.put(
        "orders", Message("bad", b'{"v":1,"id":"bad","name":"orders","created_at":1,"input":{"amount":"no"}}')
    )
    await jobs.publish("orders", {})
    assert await jobs.consume(jobs.consumer(shape, run, retry=AT_ONCE), 2) == 2
    [record] = await jobs.dead("orders")
    assert (record.message.id, record.reason, run.attempts) == ("bad", "input_invalid", [1])
    assert b'"amount":"no"' in record.message.body
    assert "amount" in record.errors[0].message


async def test_a_body_that_cannot_be_read_is_dead_with_its_bytes_and_the_worker_goes_on(
    jobs: Any, orders: Any, malformed: bytes, known: Known
) -> None:
    run = Recorder({"total": 1})
    await jobs.put("orders", Message("broken", malformed))
    await jobs.publish("orders", {})
    assert await jobs.consume(jobs.consumer("async run", run), 2) == 2
    [record] = await jobs.dead("orders")
    assert (record.message.body, record.reason, run.attempts) == (malformed, "malformed", [1])
    assert await jobs.depth("orders") == known(0, 0, 0, 1)


async def test_a_body_above_the_limit_is_dead_as_too_large(jobs: Any, orders: Any) -> None:
    body = b" " * (2**20 + 64 * 1024 + 1)
    await jobs.put("orders", Message("huge", body))
    await jobs.consume(jobs.consumer("run", raising(AssertionError("run all the same"))), 1)
    [record] = await jobs.dead("orders")
    assert (record.reason, record.message.body) == ("too_large", body)


@pytest.mark.parametrize("fields", [{"name": '"others"'}, {"schema": '"others"'}, {"v": "2"}], ids=str)
async def test_a_job_of_an_unknown_schema_or_format_is_released_uncounted(
    jobs: Any, orders: Any, fields: dict[str, str], an_envelope: Callable[..., bytes], known: Known
) -> None:
    now = "99999999999999"  # first due in the far future, so that nobody has waited for it yet
    run = Recorder({"total": 1})
    await jobs.put("orders", Message("alien", an_envelope(created_at=now, **fields)))
    assert await jobs.consume(jobs.consumer("run", run), 1) == 0
    assert run.attempts == []
    assert await jobs.depth("orders") == known(0, 1, 0, 0)


@pytest.mark.parametrize("fields", [{"name": '"others"'}, {"v": "2", "name": "null"}], ids=str)
async def test_a_job_that_nobody_knew_for_a_day_is_dead(
    jobs: Any, orders: Any, fields: dict[str, str], an_envelope: Callable[..., bytes]
) -> None:
    await jobs.put("orders", Message("alien", an_envelope(created_at="1000", **fields)))
    assert await jobs.consume(jobs.consumer("run", Recorder(None)), 1) == 1
    assert [record.reason for record in await jobs.dead("orders")] == ["unknown_schema"]


async def test_patience_with_an_unknown_schema_begins_when_the_job_is_due(
    jobs: Any, orders: Any, an_envelope: Callable[..., bytes], known: Known
) -> None:
    body = an_envelope(created_at="1000", due_at="99999999999999", name='"others"')
    await jobs.put("orders", Message("alien", body))
    assert await jobs.consume(jobs.consumer("run", Recorder(None)), 1) == 0
    assert await jobs.depth("orders") == known(0, 1, 0, 0)


# --- it steered itself


async def test_retry_later_counts_as_an_attempt_and_waits_as_long_as_it_says(
    jobs: Any, orders: Any, shape: str, known: Known
) -> None:
    run = Recorder(RetryLater(0), RetryLater(delay=0, reason="busy"), RetryLater(3600))
    await jobs.publish("orders", {}, job_id="first")
    await jobs.consume(jobs.consumer(shape, run, retry=RetryPolicy(max_attempts=4, base=3600.0)), 3)
    assert run.attempts == [1, 2, 3]
    assert await jobs.depth("orders") == known(0, 1, 0, 0)


async def test_retry_later_without_a_delay_leaves_it_to_the_policy(jobs: Any, orders: Any, shape: str) -> None:
    run = Recorder(RetryLater())
    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer(shape, run, retry=AT_ONCE), 2)
    assert run.attempts == [1, 2]


async def test_retry_later_with_no_attempt_left_is_dead(jobs: Any, orders: Any, shape: str) -> None:
    await jobs.publish("orders", {}, retry=False)
    await jobs.consume(jobs.consumer(shape, raising(RetryLater(1, "the till is shut"))), 1)
    [record] = await jobs.dead("orders")
    assert (record.reason, record.errors[0].message) == ("attempts", "the till is shut")


async def test_snooze_puts_off_under_the_same_attempt_number(jobs: Any, orders: Any, shape: str, known: Known) -> None:
    run = Recorder(Snooze(0), Snooze(0.001), Snooze(0), Snooze(3600))
    await jobs.publish("orders", {}, retry=False)
    await jobs.consume(jobs.consumer(shape, run), 4)
    assert run.attempts == [1, 1, 1, 1]
    assert await jobs.depth("orders") == known(0, 1, 0, 0)


async def test_discard_ends_quietly(jobs: Any, orders: Any, shape: str, known: Known) -> None:
    await jobs.publish("orders", {})
    assert await jobs.consume(jobs.consumer(shape, raising(Discard("sold out"))), 1) == 1
    assert await jobs.depth("orders") == known(0, 0, 0, 0)


async def test_reject_is_dead_at_once_with_its_reason(jobs: Any, orders: Any, shape: str) -> None:
    run = Recorder(Reject("no such tea"))
    await jobs.publish("orders", {})
    assert await jobs.consume(jobs.consumer(shape, run, retry=AT_ONCE), 1) == 1
    [record] = await jobs.dead("orders")
    assert (record.reason, record.attempts, record.errors[0].message) == ("rejected", 1, "no such tea")


async def test_no_except_of_the_librarys_errors_swallows_a_signal(jobs: Any, orders: Any) -> None:
    def act(_: Any) -> dict[str, int]:
        try:
            raise Reject("no such tea")
        except JobsError:
            return {"total": 1}

    await jobs.publish("orders", {})
    await jobs.consume(jobs.consumer("run", act), 1)
    assert [record.reason for record in await jobs.dead("orders")] == ["rejected"]


# --- it wanted to end the process


class Collapse(BaseException):
    pass


@pytest.mark.parametrize("error", [SystemExit(3), Collapse("all of it")], ids=lambda error: type(error).__name__)
async def test_a_run_that_raises_no_exception_has_failed_and_ends_the_worker(
    jobs: Any, orders: Any, shape: str, error: BaseException
) -> None:
    run = Recorder(error)
    await jobs.publish("orders", {}, job_id="exits", retry=RetryPolicy(max_attempts=2, base=0.0))
    consumer = jobs.consumer(shape, run)
    for attempts in (1, 2):
        with pytest.raises(type(error)) as raised:
            await jobs.consume(consumer, 9)
        assert raised.value is error
        assert len(run.attempts) == attempts
    [record] = await jobs.dead("orders")
    assert (record.reason, record.attempts, run.attempts) == ("attempts", 2, [1, 2])
    assert record.errors[-1].type.endswith(type(error).__name__)


async def test_a_keyboard_interrupt_releases_its_job_and_is_raised(
    jobs: Any, orders: Any, shape: str, known: Known
) -> None:
    run = Recorder(KeyboardInterrupt(), {"total": 1})
    await jobs.publish("orders", {}, retry=False)
    consumer = jobs.consumer(shape, run)
    with pytest.raises(KeyboardInterrupt):
        await jobs.consume(consumer, 9)
    assert await jobs.depth("orders") == known(1, 0, 0, 0)
    assert await jobs.consume(consumer, 1) == 1
    assert run.attempts == [1, 1]
    assert await jobs.depth("orders") == known(0, 0, 0, 0)


# --- its process died


async def test_a_run_whose_process_dies_is_a_crash_and_dead_at_its_limit(
    jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one attempt only, and without a lease that would have to end first."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "worker"))
    await jobs.declare(QueueSpec("jobs"))
    job = Job(name="jobs", schema_name="jobs", input_data={"act": "kill"})
    await jobs.publish("jobs", job, retry=RetryPolicy(max_attempts=1, base=0.0, crash_limit=2))
    assert await jobs.consume(importlib.import_module("in_processes").Acts("jobs"), 2) == 2
    [record] = await jobs.dead("jobs")
    assert (record.reason, record.attempts, record.crashes) == ("crash_limit", 2, 2)
    assert [error.type for error in record.errors] == ["mindtrace.jobs.errors.RunCrashed"] * 2
