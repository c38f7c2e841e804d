"""What goes wrong around a run and must not spread: odd listeners, wrapped coroutines, lost leases, odd validators."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import pytest
from pydantic import BaseModel, RootModel, SecretStr, field_validator

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Event,
    InputInvalid,
    JobSchema,
    JobSettled,
    JobStarted,
    QueueSpec,
    RetryPolicy,
    Worker,
)

pytestmark = [pytest.mark.anyio, pytest.mark.local]


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a decorator does that knows nothing of coroutines."""

    @wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    call.__wrapped__ = None  # type: ignore[attr-defined]  # or inspect would see through it
    return call


async def test_a_short_timeout_beside_a_long_one_is_kept(
    orchestrator: AsyncOrchestrator, publish: Any, consumer: Any
) -> None:
    forever = asyncio.Event()

    async def act(job: dict[str, Any]) -> None:
        await forever.wait()

    await publish(timeout=300)
    await publish(timeout=0.05, retry=False)
    async with Worker(orchestrator, [consumer(act)], concurrency=2, drain=0), asyncio.timeout(10):
        while not await orchestrator.dead_letters("jobs").count():  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0)
    assert (await orchestrator.depth("jobs")).ready == 1  # the long one was released


async def test_a_coroutine_function_behind_a_plain_wrapper_is_cancelled_as_any_other(
    orchestrator: AsyncOrchestrator, publish: Any
) -> None:
    cancelled = asyncio.Event()

    class Waits(AsyncConsumer):
        @wrapped
        async def run(self, job_dict: dict[str, Any]) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    await publish(timeout=0.05, retry=False)
    worker = Worker(orchestrator, [Waits("jobs")], max_jobs=1)
    async with asyncio.timeout(10):
        await worker.run()
    assert cancelled.is_set()
    assert worker.health().stuck == 0
    [record] = (await orchestrator.dead_letters("jobs").list()).records
    assert record.reason == "timeout"


async def test_a_listener_that_cancels_itself_stops_nothing(
    orchestrator: AsyncOrchestrator, publish: Any, consumer: Any
) -> None:
    ran: list[int] = []

    async def act(job: dict[str, Any]) -> None:
        ran.append(job["input_data"]["n"])

    async def listener(event: Event) -> None:
        raise asyncio.CancelledError

    await publish(3)
    async with asyncio.timeout(10):
        assert await Worker(orchestrator, [consumer(act)], concurrency=1, max_jobs=3, listeners=[listener]).run() == 0
    assert ran == [1, 2, 3]


async def test_a_job_that_cancels_itself_dies_also_in_a_task_that_once_swallowed_a_cancellation(
    orchestrator: AsyncOrchestrator, publish: Any, consumer: Any
) -> None:
    async def act(job: dict[str, Any]) -> None:
        raise asyncio.CancelledError

    async def swallows_then_works() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await Worker(orchestrator, [consumer(act, retry=False)], max_jobs=1).run()

    await publish()
    task = asyncio.create_task(swallows_then_works())
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(10):
        await task
    [record] = (await orchestrator.dead_letters("jobs").list()).records
    assert (record.reason, record.attempts, record.releases) == ("attempts", 1, 0)


async def test_what_lost_its_lease_before_it_began_is_not_run(
    orchestrator: AsyncOrchestrator, publish: Any, consumer: Any
) -> None:
    """The queue goes while a listener is told how the job before it ended."""
    ran: list[int] = []

    async def act(job: dict[str, Any]) -> None:
        ran.append(job["input_data"]["n"])

    async def listener(event: Event) -> None:
        if isinstance(event, JobStarted):
            await orchestrator.delete("jobs", force=True)
            await orchestrator.declare(QueueSpec("jobs"))

    await publish(2)
    worker = Worker(orchestrator, [consumer(act)], concurrency=2, until_idle=True, listeners=[listener])
    async with asyncio.timeout(10):
        await worker.run()
    assert ran == []
    assert worker.handled == 0


async def test_a_lost_run_that_ignores_its_cancellation_is_reported_stuck(
    orchestrator: AsyncOrchestrator, publish: Any, consumer: Any
) -> None:
    began, end = asyncio.Event(), asyncio.Event()

    async def act(job: dict[str, Any]) -> None:
        began.set()
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue

    await publish()
    worker = Worker(orchestrator, [consumer(act)], concurrency=1, cancel_grace=0.01)
    async with worker, asyncio.timeout(10):
        await began.wait()
        await orchestrator.delete("jobs", force=True)
        await orchestrator.declare(QueueSpec("jobs"))
        while not worker.health().stuck:  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0)
        assert not worker.health().healthy
        end.set()
        while worker.health().running:  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0)
        assert worker.health().stuck == 0


async def test_an_early_settlement_is_told_with_its_schema(orchestrator: AsyncOrchestrator, consumer: Any) -> None:
    class Order(BaseModel):
        item: str

    settled: list[JobSettled] = []

    async def act(job: dict[str, Any]) -> None:
        pass

    await orchestrator.register(JobSchema("orders", Order))
    await orchestrator.publish("orders", Order(item="tea"))
    listener = lambda event: settled.append(event) if isinstance(event, JobSettled) else None  # noqa: E731
    await Worker(orchestrator, [consumer(act, "orders", ack="early")], max_jobs=1, listeners=[listener]).run()
    assert [event.schema_name for event in settled] == ["orders"]


class Numbers(RootModel[list[int]]):
    pass


class Explodes(BaseModel):
    a: int

    @field_validator("a")
    @classmethod
    def _explode(cls, value: int) -> int:
        if value > 1:
            raise TypeError("no ValueError")
        return value


class Empty(BaseModel):
    pass


async def ended(orchestrator: AsyncOrchestrator, output: Any, returned: Any) -> list[str]:
    """Why the job is dead, if it is."""
    await orchestrator.register(JobSchema("gives", Empty, output, retry=RetryPolicy(max_attempts=2, base=0)))

    class Gives(AsyncConsumer):
        async def run(self, job_dict: dict[str, Any]) -> Any:
            return returned

    await orchestrator.publish("gives", {})
    await Worker(orchestrator, [Gives("gives")], max_jobs=1).run()
    assert (await orchestrator.depth("gives")).ready == 0
    return [record.reason for record in (await orchestrator.dead_letters("gives").list()).records]


async def test_a_root_model_is_a_valid_result(orchestrator: AsyncOrchestrator) -> None:
    assert await ended(orchestrator, Numbers, Numbers([1, 2])) == []


async def test_a_result_that_blows_up_its_model_is_dead_and_not_run_again(orchestrator: AsyncOrchestrator) -> None:
    assert await ended(orchestrator, Explodes, {"a": 2}) == ["output_invalid"]


async def test_an_input_that_blows_up_its_model_is_refused_on_both_sides(orchestrator: AsyncOrchestrator) -> None:
    await orchestrator.register(JobSchema("takes", Explodes))
    with pytest.raises(InputInvalid):
        await orchestrator.publish("takes", {"a": 2})
    id_ = await orchestrator.publish("takes", {"a": 1})
    letters = orchestrator.dead_letters("takes")
    assert (await orchestrator.receive_message("takes") or {})["id"] == id_
    assert await letters.count() == 0


async def test_a_secret_is_refused_and_not_sent_as_its_mask(orchestrator: AsyncOrchestrator) -> None:
    class Login(BaseModel):
        password: SecretStr

    class Logins(BaseModel):
        shown: str = "**********"  # no secret: a text may look like a mask
        inner: list[Login] = []

    await orchestrator.register(JobSchema("login", Login))
    await orchestrator.register(JobSchema("logins", Logins))
    await orchestrator.publish("logins", Logins())
    login = Login(password=SecretStr("hunter2"))
    with pytest.raises(InputInvalid):
        await orchestrator.publish("logins", Logins(inner=[login]))
    for given in (login, {"password": "hunter2"}):
        with pytest.raises(InputInvalid) as refused:
            await orchestrator.publish("login", given)
        assert "hunter2" not in f"{refused.value} {refused.value.errors}"
    assert await orchestrator.count_queue_messages("login") == 0


async def without_end(call: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(0.05):
        while True:
            await call()


async def test_publishing_without_end_lets_the_loop_turn(orchestrator: AsyncOrchestrator, publish: Any) -> None:
    with pytest.raises(TimeoutError):
        await without_end(publish)
    assert await orchestrator.count_queue_messages("jobs") > 0


async def test_taking_without_end_lets_the_loop_turn(orchestrator: AsyncOrchestrator) -> None:
    with pytest.raises(TimeoutError):
        await without_end(lambda: orchestrator.receive_message("jobs"))


async def test_a_schema_whose_classes_were_made_anew_replaces_the_old_one(orchestrator: AsyncOrchestrator) -> None:
    """As in a cell of a notebook that is run twice."""
    for _ in range(2):

        class Order(BaseModel):
            item: str

        class Bill(BaseModel):
            total: int

        await orchestrator.register(JobSchema("orders", Order, queue="shop"))
        await orchestrator.register(JobSchema("bills", Bill, queue="shop"))

    taken: list[object] = []

    class Takes(AsyncConsumer[Order, None]):
        async def handle(self, order: Order) -> None:
            taken.append(order)

    await orchestrator.publish("shop", Order(item="tea"))
    await Worker(orchestrator, [Takes("orders")], max_jobs=1).run()
    assert taken == [Order(item="tea")]
