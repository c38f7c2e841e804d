"""Both frameworks alike: what a client is answered, and how the orchestrator and a worker live with the service."""

import asyncio
import logging
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Closed,
    ConfigError,
    Consumer,
    LocalBackend,
    QueueNotFound,
    Worker,
)
from mindtrace.jobs.testing.faults import FailingAt
from mindtrace.jobs.testing.leaks import LeakGuard

pytestmark = [pytest.mark.anyio, pytest.mark.local]
TEA = {"item": "tea"}


@pytest.fixture
def jobs() -> AsyncOrchestrator:
    """What the service is given: the test looks into it while the service has it open."""
    return AsyncOrchestrator(LocalBackend())


# --- answers


async def test_a_job_that_is_handed_in_is_answered_202_with_its_id(serve: Any, jobs: AsyncOrchestrator) -> None:
    async with serve(jobs) as client:
        answer = await client.post("orders", TEA)
        job = await jobs.receive_message("orders")
    assert job is not None
    assert (answer.status, answer.body, job["input_data"]) == (202, {"job_id": job["id"]}, TEA)


@pytest.mark.parametrize("key", ["7c4a8d09-ca37", '"7c4a8d09-ca37"'], ids=["bare", "quoted"])
async def test_the_same_idempotency_key_makes_one_job_of_that_id(serve: Any, jobs: AsyncOrchestrator, key: str) -> None:
    async with serve(jobs) as client:
        answers = [await client.post("orders", TEA, Idempotency_Key=key) for _ in range(3)]
        assert [(one.status, one.body) for one in answers] == [(202, {"job_id": "7c4a8d09-ca37"})] * 3
        assert await jobs.count_queue_messages("orders") == 1


@pytest.mark.parametrize("key", ["", "a b", '"', "-a", "k" * 129])
async def test_a_key_that_cannot_be_an_id_is_answered_400_and_makes_no_job(
    serve: Any, jobs: AsyncOrchestrator, key: str
) -> None:
    async with serve(jobs) as client:
        answer = await client.post("orders", TEA, Idempotency_Key=key)
        assert answer.status == 400
        assert "Idempotency-Key: 1 to 128 of" in answer.body["detail"]
        assert await jobs.count_queue_messages("orders") == 0


async def test_what_is_wrong_with_an_input_is_answered_422_field_by_field(serve: Any, jobs: AsyncOrchestrator) -> None:
    async with serve(jobs) as client:
        answer = await client.post("orders", {"item": 7})
    [error] = answer.body["detail"]
    assert (answer.status, answer.body["error"], error["loc"], error["type"]) == (
        422,
        "input_invalid",
        ["item"],
        "string_type",
    )


async def test_an_input_over_the_limit_is_answered_413(serve: Any) -> None:
    async with serve(AsyncOrchestrator(LocalBackend(), payload_limit=20)) as client:
        answer = await client.post("orders", {"item": "t" * 20})
    assert (answer.status, answer.body["error"]) == (413, "payload_too_large")


async def test_a_full_queue_is_answered_503_and_when_to_come_again(serve: Any, jobs: AsyncOrchestrator) -> None:
    async with serve(jobs) as client:
        answers = [await client.post("orders", TEA) for _ in range(3)]
        assert [answer.status for answer in answers] == [202, 202, 503]
        assert (answers[2].body["error"], answers[2].headers["Retry-After"]) == ("queue_full", "5")
        await jobs.clean("orders")
        assert (await client.post("orders", TEA)).status == 202


@pytest.mark.parametrize("done", [True, False], ids=["stored", "not stored"])
async def test_where_it_is_unknown_whether_a_job_is_stored_the_request_can_be_repeated_with_the_id_of_the_answer(
    serve: Any, done: bool
) -> None:
    backend = FailingAt(0, LocalBackend(), done=done)
    jobs = AsyncOrchestrator(backend)
    async with serve(jobs) as client:
        backend.n = len(backend.calls) + 1
        answer = await client.post("orders", TEA)
        assert backend.struck == "publish"
        assert (answer.status, answer.body["error"]) == (503, "backend_unavailable")
        assert (answer.body["maybe_published"], answer.headers["Retry-After"]) == (done, "5")
        [job_id] = answer.body["job_ids"]
        again = await client.post("orders", TEA, Idempotency_Key=job_id)
        assert (again.status, again.body) == (202, {"job_id": job_id})
        assert await jobs.count_queue_messages("orders") == 1


async def test_a_mistake_of_the_service_is_a_500_that_tells_the_client_nothing(
    serve: Any, jobs: AsyncOrchestrator, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(jobs) as client:
        answer = await client.post("nowhere", TEA)
    assert answer.status == 500
    assert "nowhere" not in str(answer.body)
    assert any(record.exc_info and isinstance(record.exc_info[1], ConfigError) for record in caplog.records)


# --- the orchestrator's life


async def test_the_orchestrator_is_open_while_the_service_is(live: Any, jobs: AsyncOrchestrator) -> None:
    for _ in range(2):  # a second server, or a test's, may start it again
        async with live(jobs):
            assert await jobs.count_queue_messages("orders") == 0
        with pytest.raises(Closed):
            await jobs.count_queue_messages("orders")


# --- a worker beside the service


class Gate:
    """A worker whose run says that it has begun, and ends when it may."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.ended: list[Any] = []
        self.made: Worker | None = None

    def worker(self, jobs: AsyncOrchestrator) -> Worker:
        async def run(_: object, job: dict[str, Any]) -> None:
            self.begun.set()
            await self.may_end.wait()
            self.ended.append(job["input_data"])

        self.made = Worker(jobs, [type("Gated", (AsyncConsumer,), {"run": run})("orders")])
        return self.made

    async def drains(self) -> None:
        """Wait until the worker takes no more."""
        while self.made is None or not self.made.health().draining:  # noqa: ASYNC110 (health tells nobody)
            await asyncio.sleep(0)


async def test_a_worker_in_the_process_runs_what_is_handed_in(serve: Any, jobs: AsyncOrchestrator) -> None:
    gate = Gate()
    async with LeakGuard(), serve(jobs, gate.worker) as client:
        assert (await client.post("orders", TEA)).status == 202
        await gate.begun.wait()
        gate.may_end.set()
    assert gate.ended == [TEA]


async def stopping(live: Any, jobs: AsyncOrchestrator, gate: Gate) -> None:
    """A service that stops while a job runs in it."""
    async with live(jobs, gate.worker):
        await jobs.publish("orders", TEA)
        await gate.begun.wait()


async def test_at_a_stop_the_worker_ends_what_it_runs_and_settles_it_before_the_orchestrator_closes(
    live: Any, jobs: AsyncOrchestrator
) -> None:
    gate = Gate()
    async with LeakGuard(), asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(stopping(live, jobs, gate))
        await gate.drains()
        assert (await jobs.depth("orders")).leased == 1
        gate.may_end.set()
    assert gate.ended == [TEA]
    async with jobs:
        depth = await jobs.depth("orders")
        assert (depth.ready, depth.leased) == (0, 0)


async def test_a_stop_that_is_cancelled_gives_back_what_runs_at_once(live: Any, jobs: AsyncOrchestrator) -> None:
    gate = Gate()
    async with LeakGuard(), asyncio.timeout(20):  # the drain alone would take 30
        service = asyncio.create_task(stopping(live, jobs, gate))
        await gate.drains()
        service.cancel()
        await asyncio.wait({service})
        assert service.cancelled()
    async with jobs:
        depth = await jobs.depth("orders")
        assert (depth.ready, depth.leased) == (1, 0)


async def test_a_worker_that_cannot_start_fails_the_start_of_the_service(live: Any, jobs: AsyncOrchestrator) -> None:
    class Twice(Consumer):
        def run(self, job_dict: dict) -> dict: ...

    async with LeakGuard():
        with pytest.raises(ConfigError, match="two consumers for 'orders'"):
            async with live(jobs, lambda jobs: Worker(jobs, [Twice("orders"), Twice("orders")])):
                pytest.fail("it started")
        with pytest.raises(Closed):
            await jobs.depth("orders")


class Leaving(Consumer):
    def run(self, job_dict: dict) -> dict:
        raise SystemExit("S3CRET")


async def leaves(jobs: AsyncOrchestrator) -> None:
    await jobs.publish("orders", TEA)


async def loses_its_queue(jobs: AsyncOrchestrator) -> None:
    await jobs.delete("orders", force=True)


@pytest.fixture
def reported() -> Iterator[asyncio.Event]:
    """Set when the end of the worker is logged, without what a job put into the text of its exception."""
    told, handler = asyncio.Event(), logging.Handler(logging.CRITICAL)
    line = re.compile(r"the worker in this process has ended\n(SystemExit|\S*QueueNotFound: .*orders.*)\n +File ")
    handler.emit = lambda record: told.set() if line.match(record.getMessage()) and not record.exc_info else None
    log = logging.getLogger("mindtrace.jobs.integrations")
    log.addHandler(handler)
    yield told
    log.removeHandler(handler)


@pytest.fixture(params=[True, False], ids=["SIGTERM is taken", "SIGTERM would kill"])
def signals(request: pytest.FixtureRequest) -> Iterator[list[int] | None]:
    """The signals that a server was sent; None where none takes any, and the process must not get one."""
    sent: list[int] | None = [] if request.param else None
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL if sent is None else lambda number, _: sent.append(number))
    yield sent
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("end", "error"), [(leaves, SystemExit), (loses_its_queue, QueueNotFound)])
async def test_a_worker_that_ends_by_an_error_stops_the_server_and_the_error_is_raised(
    live: Any,
    jobs: AsyncOrchestrator,
    reported: asyncio.Event,
    signals: list[int] | None,
    end: Callable[[AsyncOrchestrator], Any],
    error: type[BaseException],
) -> None:
    with pytest.raises(BaseException) as raised:  # noqa: PT011, PT012 (which one is asked below; the exit raises it)
        async with live(jobs, lambda jobs: Worker(jobs, [Leaving("orders")])):
            await end(jobs)
            await reported.wait()
            await jobs.queues()  # until the server has stopped, requests are served
    assert reported.is_set()
    assert error in kinds(raised.value)
    assert signals in (None, [signal.SIGTERM])


def kinds(error: BaseException) -> set[type[BaseException]]:
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return {type(error)}.union(*map(kinds, inner))
