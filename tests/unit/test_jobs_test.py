"""`JobsTest` as whoever tests an application meets it: its clock, its `drain`, and how it is opened and closed."""

import asyncio
import threading
import traceback
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncConsumer,
    Closed,
    ConfigError,
    Consumer,
    Depth,
    Discard,
    Job,
    JobSchema,
    QueueNotFound,
    QueueSpec,
    Reject,
    RetryLater,
    RetryPolicy,
    Snooze,
    current_job,
)
from mindtrace.jobs.testing.jobs import JobsTest, VirtualClock
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Then = Callable[[dict[str, Any]], Any]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Input(BaseModel):
    text: str = ""


class Output(BaseModel):
    length: int


class Recorder(AsyncConsumer):
    """Notes the text of each job it runs, and then does what it is told."""

    def __init__(self, name: str, then: Then | None = None, seen: list[str] | None = None) -> None:
        super().__init__(name)
        self.seen: list[str] = [] if seen is None else seen
        self.then = then

    async def run(self, job_dict: dict[str, Any]) -> Any:
        self.seen.append(job_dict["input_data"].get("text", ""))
        answer = self.then(job_dict) if self.then is not None else {}
        return await answer if isinstance(answer, Coroutine) else answer


class Blocking(Consumer):
    """The same, blocking."""

    def __init__(self, name: str, then: Then | None = None) -> None:
        super().__init__(name)
        self.seen: list[str] = []
        self.then = then

    def run(self, job_dict: dict[str, Any]) -> Any:
        self.seen.append(job_dict["input_data"].get("text", ""))
        return self.then(job_dict) if self.then is not None else {}


class Once(Recorder):
    retry = False


class Early(Recorder):
    ack = "early"


class Length(AsyncConsumer[Input, Output]):
    job_type_name = "length"

    async def handle(self, data: Input) -> Output:
        return Output(length=len(data.text))


def a_job(text: str = "", **options: Any) -> Job:
    return Job(name="job", schema_name="job", input_data={"text": text}, **options)


def failing(times: int = 1_000_000) -> Then:
    """Raises in the first runs of a job."""

    def run(job_dict: dict[str, Any]) -> dict[str, Any]:
        if job_dict["attempt"] <= times:
            raise ValueError("no such picture")
        return {}

    return run


def raising(error: BaseException) -> Then:
    def run(_: dict[str, Any]) -> None:
        raise error

    return run


# The clock


def test_the_clock_stands_still_until_it_is_advanced() -> None:
    clock = VirtualClock()
    assert (clock.now(), clock.now()) == (0.0, 0.0)
    before = datetime.now(UTC)
    clock.advance(3600)
    clock.advance(0.5)
    assert clock.now() == 3600.5
    assert timedelta(seconds=3600.5) <= clock.wall() - before < timedelta(seconds=3660)


@pytest.mark.parametrize("seconds", [-1, -1e-9, float("inf"), float("nan"), True, "1", None])
def test_a_clock_goes_only_forward_and_by_a_finite_time(seconds: Any) -> None:
    clock = VirtualClock()
    with pytest.raises(ConfigError, match="advance"):
        clock.advance(seconds)
    assert clock.now() == 0.0


async def test_whoever_waits_is_woken_when_the_time_has_come_the_earliest_first() -> None:
    clock, woken = VirtualClock(), list[float]()

    async def wait(when: float) -> None:
        await clock.until(when)
        woken.append(when)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        tasks = {when: group.create_task(wait(when)) for when in (30, 10, 40, 20)}
        await asyncio.sleep(0)
        tasks[20].cancel()
        clock.advance(30)
        await asyncio.wait({tasks[10], tasks[30]})
        assert woken == [10, 30]
        clock.advance(10)
    assert woken == [10, 30, 40]


async def test_a_time_that_has_come_is_not_waited_for() -> None:
    clock = VirtualClock()
    clock.advance(1)
    async with asyncio.timeout(5):
        await clock.until(1)
        await clock.until(0)


def test_the_clock_may_be_advanced_from_another_thread() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            group.create_task(clock.until(10))
            await asyncio.sleep(0)
            await asyncio.to_thread(clock.advance, 10)

    asyncio.run(main(), debug=True)  # the loop then refuses what another thread may not do


def test_a_loop_that_ended_does_not_keep_the_clock_from_going_on() -> None:
    clock, loop = VirtualClock(), asyncio.new_event_loop()
    task = loop.create_task(clock.until(10))
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    clock.advance(10)
    assert clock.now() == 10
    assert not task.done()
    task.get_coro().close()


@pytest.mark.parametrize("steps", [[0.8], [0.7, 0.1], [0.1] * 8])
async def test_a_delay_is_over_after_advances_that_add_up_to_it(steps: list[float]) -> None:
    async with JobsTest() as jobs:
        jobs.connect(Recorder("echo"))
        jobs.clock.advance(0.1)
        await jobs.publish("echo", a_job(), delay=0.8)
        for step in steps[:-1]:
            jobs.clock.advance(step)
        assert await jobs.drain() == 0
        jobs.clock.advance(steps[-1])
        assert await jobs.drain() == 1


async def test_an_instant_of_the_running_time_is_due_after_as_long_on_the_clock() -> None:
    async with JobsTest() as jobs:
        jobs.connect(Recorder("echo"))
        await jobs.publish("echo", a_job(), at=datetime.now(UTC) + timedelta(hours=1))
        jobs.clock.advance(3540)
        assert await jobs.drain() == 0
        jobs.clock.advance(60)
        assert await jobs.drain() == 1


async def test_advancing_makes_delays_due_in_order() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo"))
        for text, delay in (("third", 30), ("first", 10), ("second", 20), ("never", 31)):
            await jobs.publish("echo", a_job(text), delay=delay)
        jobs.clock.advance(30)
        assert await jobs.count_queue_messages("echo") == 3
        assert await jobs.drain() == 3
    assert echo.seen == ["first", "second", "third"]


async def test_advancing_ends_a_lease_and_wakes_the_receiver_that_waits_for_the_job() -> None:
    async with JobsTest() as jobs:
        await jobs.declare(QueueSpec("echo"))
        job_id = await jobs.publish("echo", a_job())
        receiver = jobs.backend.receiver
        async with receiver(["echo"], lease=30, keep=False) as stalled, receiver(["echo"]) as healthy:
            [first] = await stalled.receive(1)
            async with asyncio.timeout(5), asyncio.TaskGroup() as group:
                waiting = group.create_task(healthy.receive(1, wait=60))
                await asyncio.sleep(0)
                jobs.clock.advance(29)
                await asyncio.sleep(0)
                assert (await jobs.depth("echo")).leased == 1
                jobs.clock.advance(1.5)
                [second] = await waiting
    assert (first.message.id, second.message.id, second.crashes) == (job_id, job_id, 1)


# What drain runs


async def test_nothing_runs_until_it_is_drained() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo"))
        await jobs.publish("echo", a_job("one"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert echo.seen == []
        assert await jobs.drain() == 1
        assert echo.seen == ["one"]
        assert await jobs.drain() == 0
        assert await jobs.depth("echo") == Depth(0, 0, 0, 0)


@pytest.mark.parametrize("kind", [Recorder, Blocking])
async def test_jobs_are_run_in_the_order_of_their_publishes(
    kind: type[Recorder] | type[Blocking],
) -> None:
    async with JobsTest() as jobs:
        jobs.connect(consumer := kind("echo"))
        await jobs.publish_many("echo", [a_job(str(n)) for n in range(5)])
        assert await jobs.drain() == 5
    assert consumer.seen == ["0", "1", "2", "3", "4"]


async def test_a_priority_queue_is_drained_by_priority() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("ranked"))
        await jobs.declare(QueueSpec("ranked", "priority"))
        for priority in (1, 9, 5):
            await jobs.publish("ranked", a_job(str(priority)), priority=priority)
        assert await jobs.drain() == 3
    assert echo.seen == ["9", "5", "1"]


async def test_queues_are_drained_in_the_order_in_which_their_consumers_were_connected() -> None:
    seen: list[str] = []
    async with JobsTest() as jobs:
        for name in ("a", "b", "c"):
            jobs.connect(Recorder(name, seen=seen))
        for text in ("1", "2"):
            for name in ("c", "b", "a"):
                await jobs.publish(name, a_job(name + text))
        assert await jobs.drain() == 6
    assert seen == ["a1", "a2", "b1", "b2", "c1", "c2"]


async def test_what_a_run_publishes_is_run_too() -> None:
    async with JobsTest() as jobs:

        def publish_next(job_dict: dict[str, Any]) -> Any:
            left = int(job_dict["input_data"]["text"]) - 1
            return jobs.publish("count", a_job(str(left))) if left else {}

        jobs.connect(count := Recorder("count", publish_next))
        await jobs.publish("count", a_job("3"))
        assert await jobs.drain() == 3
    assert count.seen == ["3", "2", "1"]


async def test_a_coroutine_runs_on_the_loop_and_blocking_code_in_a_thread() -> None:
    threads: list[threading.Thread] = []
    note: Then = lambda _: threads.append(threading.current_thread())  # noqa: E731 (a name for its type)
    async with JobsTest() as jobs:
        jobs.connect(Recorder("async", note))
        jobs.connect(Blocking("blocking", note))
        await jobs.publish("async", a_job())
        before = threading.active_count()
        await jobs.drain()
        assert threads == [threading.current_thread()]
        assert threading.active_count() == before
        await jobs.publish("blocking", a_job())
        await jobs.drain()
    assert threads[1] is not threads[0]


class Elsewhere(Blocking):
    executor = "process"


async def test_what_runs_in_a_process_elsewhere_runs_in_a_thread_here_and_is_as_it_was_afterwards() -> None:
    async with JobsTest() as jobs:
        jobs.connect(consumer := Elsewhere("elsewhere"))
        await jobs.publish("elsewhere", a_job())
        await jobs.drain()
    assert len(consumer.seen) == 1
    assert consumer.executor == "process"


async def test_a_typed_consumer_brings_its_schema() -> None:
    async with JobsTest() as jobs:
        jobs.connect(Length())
        await jobs.publish("length", Input(text="four"))
        await jobs.publish("length", {"text": "five"})
        assert await jobs.drain() == 2
        await jobs.publish("length", Job(name="length", schema_name="length", input_data={"text": "six"}))
        assert await jobs.drain() == 1


async def test_a_consumer_may_be_connected_before_its_schema_is_registered() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo"))
        await jobs.register(JobSchema("echo", Input, queue="texts"))
        await jobs.publish("texts", Input(text="here"))
        assert await jobs.drain() == 1
        assert [spec.name for spec in await jobs.queues()] == ["texts"]
    assert echo.seen == ["here"]


async def test_jobs_of_a_queue_without_a_consumer_stay_where_they_are() -> None:
    async with JobsTest() as jobs:
        jobs.connect(Recorder("echo"))
        await jobs.declare(QueueSpec("other"))
        await jobs.publish("other", a_job())
        await jobs.publish("other", a_job(), delay=1)
        assert await jobs.drain(with_scheduled=True) == 0
        assert await jobs.depth("other") == Depth(1, 1, 0, 0)
        assert jobs.clock.now() == 0


async def test_a_consumer_is_as_it_was_once_its_jobs_have_run() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo"))
        before = dict(vars(echo))
        await jobs.publish("echo", a_job("one"))
        await jobs.drain()
        assert vars(echo) == before

        replaced: list[str] = []
        vars(echo)["run"] = run = Recorder("echo", seen=replaced).run
        await jobs.publish("echo", a_job("two"))
        await jobs.drain()
        assert (replaced, vars(echo)["run"]) == (["two"], run)


# Delays and retries


async def test_delayed_jobs_are_left_alone_unless_they_are_asked_for() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo"))
        await jobs.publish("echo", a_job("later"), delay=60)
        await jobs.publish("echo", a_job("now"))
        assert await jobs.drain() == 1
        assert (echo.seen, jobs.clock.now()) == (["now"], 0)
        assert await jobs.drain(with_scheduled=True) == 1
        assert (echo.seen, jobs.clock.now()) == (["now", "later"], 60)


async def test_delayed_jobs_are_run_in_due_order_over_all_queues_each_at_its_time() -> None:
    async with JobsTest() as jobs:
        times: list[tuple[str, float]] = []
        note: Then = lambda job: times.append((job["input_data"]["text"], jobs.clock.now()))  # noqa: E731 (as above)
        jobs.connect(Recorder("a", note))
        jobs.connect(Recorder("b", note))
        for queue, text, delay in (("a", "fourth", 90), ("b", "second", 20), ("a", "third", 30), ("b", "first", 10)):
            await jobs.publish(queue, a_job(text), delay=delay)
        assert await jobs.drain(with_scheduled=True) == 4
    assert times == [("first", 10), ("second", 20), ("third", 30), ("fourth", 90)]


async def test_a_job_that_fails_is_run_again_when_its_retry_is_due() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo", failing(times=2)))
        await jobs.publish("echo", a_job("again"))
        assert await jobs.drain() == 3
        assert echo.seen == ["again"] * 3
        assert await jobs.depth("echo") == Depth(0, 0, 0, 0)


async def test_retries_wait_as_long_as_they_may_so_that_each_run_of_a_test_is_the_same() -> None:
    async with JobsTest() as jobs:
        times: list[float] = []

        def run(_: dict[str, Any]) -> None:
            times.append(jobs.clock.now())
            failing(times=2)({"attempt": len(times)})

        jobs.connect(Recorder("echo", run))
        await jobs.publish("echo", a_job(), retry=RetryPolicy(base=10, factor=3, jitter="full"))
        await jobs.drain()
    assert times == [0, 10, 40]


async def test_what_becomes_due_on_the_way_to_a_retry_is_run_in_its_turn() -> None:
    seen: list[str] = []
    async with JobsTest() as jobs:
        jobs.connect(Recorder("fails", failing(times=1), seen))
        jobs.connect(Recorder("echo", seen=seen))
        await jobs.publish("fails", a_job("retried"), retry=RetryPolicy(base=10))
        await jobs.publish("echo", a_job("before"), delay=9)
        await jobs.publish("echo", a_job("after"), delay=11)
        assert await jobs.drain() == 3
        assert seen == ["retried", "before", "retried"]
        assert jobs.clock.now() == 10


async def test_every_retry_is_waited_for_the_longest_too() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo", failing(times=1)))
        await jobs.publish("echo", a_job("slow"), retry=RetryPolicy(base=100))
        await jobs.publish("echo", a_job("quick"), retry=RetryPolicy(base=10))
        assert await jobs.drain() == 4
        assert (echo.seen, jobs.clock.now()) == (["slow", "quick", "quick", "slow"], 100)


async def test_a_job_that_snoozes_is_a_delayed_one() -> None:
    naps = [60.0]
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo", lambda _: raising(Snooze(naps.pop()))({}) if naps else {}))
        await jobs.publish("echo", a_job("sleepy"))
        assert await jobs.drain() == 1
        assert (await jobs.depth("echo")).scheduled == 1
        assert await jobs.drain(with_scheduled=True) == 1
        assert (echo.seen, jobs.clock.now()) == (["sleepy"] * 2, 60)


async def test_a_job_that_asks_for_a_later_run_has_not_failed() -> None:
    async with JobsTest() as jobs:
        asks: Then = lambda job: raising(RetryLater(60))({}) if job["attempt"] == 1 else {}  # noqa: E731 (as above)
        jobs.connect(Recorder("echo", asks))
        await jobs.publish("echo", a_job())
        assert await jobs.drain(with_retries=False) == 1
        assert jobs.clock.now() == 0
        assert await jobs.drain() == 1
        assert jobs.clock.now() == 60


# What fails the test


@pytest.mark.parametrize("kind", [Recorder, Blocking])
async def test_a_job_that_dies_fails_the_test_and_says_which_and_why(kind: type[Recorder] | type[Blocking]) -> None:
    async with JobsTest() as jobs:
        jobs.connect(kind("resize", failing()))
        await jobs.register(JobSchema("resize", Input, queue="pictures"))
        job_id = await jobs.publish("pictures", Input())
        with pytest.raises(AssertionError) as caught:
            await jobs.drain()
        assert str(caught.value) == (
            f"job {job_id} (schema 'resize', queue 'pictures', attempt 3) is dead, 'attempts': "
            "ValueError: no such picture"
        )
        # The cause is what was raised, where it was raised.
        assert isinstance(caught.value.__cause__, ValueError)
        frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
        assert frames[-1].filename == __file__
        assert 'raise ValueError("no such picture")' in (frames[-1].line or "")
        [record] = (await jobs.dead_letters("pictures").list()).records
        assert (record.message.id, record.reason) == (job_id, "attempts")


async def test_without_retries_the_first_failure_fails_the_test_and_the_retry_can_be_drained_later() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo", failing(times=1)))
        await jobs.publish("echo", a_job("again"))
        with pytest.raises(
            AssertionError, match=r"attempt 1\) failed, with_retries=False: ValueError: no such"
        ) as caught:
            await jobs.drain(with_retries=False)
        assert isinstance(caught.value.__cause__, ValueError)
        assert (echo.seen, jobs.clock.now()) == (["again"], 0)
        assert await jobs.depth("echo") == Depth(0, 1, 0, 0)
        assert await jobs.drain() == 1
        assert jobs.clock.now() == 1


async def test_a_failure_ends_the_drain_before_the_next_job_and_another_drain_goes_on() -> None:
    async with JobsTest() as jobs:
        jobs.connect(bad := Once("bad", failing()))
        jobs.connect(good := Recorder("good"))
        await jobs.publish_many("bad", [a_job("1"), a_job("2")])
        await jobs.publish("good", a_job("3"))
        for seen in (["1"], ["1", "2"]):
            with pytest.raises(AssertionError, match="is dead"):
                await jobs.drain()
            assert (bad.seen, good.seen) == (seen, [])
        assert await jobs.drain() == 1
        assert good.seen == ["3"]
        records = (await jobs.dead_letters("bad").list()).records
        assert [(record.attempts, record.releases) for record in records] == [(1, 0), (1, 0)]


async def stuck() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("then", "text", "cause"),
    [
        (raising(Reject("no such customer")), "'rejected': mindtrace.jobs.errors.Reject: no such customer", Reject),
        (lambda _: {"length": "long"}, "'output_invalid': mindtrace.jobs.errors.Refused: the result", type(None)),
        (lambda _: stuck(), "'timeout': mindtrace.jobs.errors.RunTimeout: ", asyncio.CancelledError),
    ],
)
async def test_whatever_kills_a_job_is_told(then: Then, text: str, cause: type[BaseException]) -> None:
    async with JobsTest() as jobs:
        jobs.connect(Recorder("echo", then))
        await jobs.register(JobSchema("echo", Input, Output, timeout=0.01, retry=False))
        await jobs.publish("echo", Input())
        with pytest.raises(AssertionError) as caught:
            await jobs.drain()
    assert f"attempt 1) is dead, {text}" in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)


async def test_a_thread_that_outlives_its_time_is_not_waited_for() -> None:
    end = threading.Event()
    async with JobsTest() as jobs:
        jobs.connect(Blocking("echo", lambda _: end.wait(30)))
        jobs.connect(good := Recorder("good"))
        await jobs.publish("echo", a_job(), timeout=0.01, retry=False)
        await jobs.publish("good", a_job("next"))
        with pytest.raises(AssertionError, match="is dead, 'timeout'"):
            await jobs.drain()
        assert not end.is_set()
        assert await jobs.drain() == 1
        end.set()
    assert good.seen == ["next"]


async def test_the_cause_is_that_of_the_last_run() -> None:
    def run(job_dict: dict[str, Any]) -> dict[str, Any]:
        failing(times=1)(job_dict)
        return {"length": "long"}

    async with JobsTest() as jobs:
        jobs.connect(Recorder("echo", run))
        await jobs.register(JobSchema("echo", Input, Output))
        await jobs.publish("echo", Input())
        with pytest.raises(AssertionError, match="'output_invalid'") as caught:
            await jobs.drain()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (Message("odd", b"{"), r"job odd \(queue 'echo', attempt 1\) is dead, 'malformed'"),
        (Job(id="odd", name="x", schema_name="new"), r"job odd .* was not run: no connected consumer knows its schema"),
        (Job(id="odd", name="x", schema_name="echo", input_data={"text": 1}), r"\(schema 'echo', .*'input_invalid'"),
    ],
)
async def test_a_job_that_cannot_be_run_fails_the_test(job: Message | Job, text: str) -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo"))
        if isinstance(job, Message):
            await jobs.queues()
            assert await jobs.backend.publish("echo", [job]) == ["stored"]
        else:
            await jobs.publish("echo", job)
        await jobs.register(JobSchema("echo", Input))
        with pytest.raises(AssertionError, match=text):
            await jobs.drain(with_scheduled=True)
    assert echo.seen == []


async def test_a_failed_job_that_was_settled_early_fails_the_test_since_it_is_lost() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Early("echo", failing()))
        await jobs.publish("echo", a_job("lost"))
        with pytest.raises(AssertionError, match=r"attempt 1\) failed and is lost .*: ValueError: no such") as caught:
            await jobs.drain()
        assert isinstance(caught.value.__cause__, ValueError)
        assert await jobs.depth("echo") == Depth(0, 0, 0, 0)

        echo.then = lambda _: stuck()
        await jobs.publish("echo", a_job("slow"), timeout=0.01)
        with pytest.raises(AssertionError, match=r"is lost .*: CancelledError"):
            await jobs.drain()

        for then in (None, raising(Discard("stale"))):
            echo.then = then
            await jobs.publish("echo", a_job("fine"))
            assert await jobs.drain() == 1
    assert echo.seen == ["lost", "slow", "fine", "fine"]


@pytest.mark.parametrize("kind", [Recorder, Once])
async def test_a_job_that_exits_fails_the_test_and_not_the_run_of_all_tests(kind: type[Recorder]) -> None:
    async with JobsTest() as jobs:
        jobs.connect(kind("echo", raising(SystemExit(3))))
        await jobs.publish("echo", a_job())
        with pytest.raises(AssertionError, match="raised SystemExit") as caught:
            await jobs.drain()
    assert isinstance(caught.value.__cause__, SystemExit)


@pytest.mark.parametrize("delay", [0.0, 3600.0])
async def test_a_job_that_publishes_itself_without_end_is_an_error(delay: float) -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo", lambda _: jobs.publish("echo", a_job(), delay=delay)))
        await jobs.publish("echo", a_job())
        with pytest.raises(AssertionError, match="after 7 runs there are more: does a job publish itself without end"):
            await jobs.drain(with_scheduled=True, max_jobs=7)
    assert len(echo.seen) == 7


async def test_retries_count_as_runs() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo", failing()))
        await jobs.publish("echo", a_job(), retry=100)
        with pytest.raises(AssertionError, match="after 7 runs"):
            await jobs.drain(max_jobs=7)
    assert len(echo.seen) == 7


async def test_as_many_jobs_as_allowed_are_no_error() -> None:
    async with JobsTest() as jobs:
        jobs.connect(Recorder("echo"))
        await jobs.publish_many("echo", [a_job() for _ in range(3)])
        await jobs.publish("echo", a_job(), delay=1)
        assert await jobs.drain(max_jobs=3) == 3


# What is refused


@pytest.mark.parametrize("max_jobs", [0, -1, 1.5, True, None])
async def test_max_jobs_is_a_whole_number_from_one_on(max_jobs: Any) -> None:
    async with JobsTest() as jobs:
        jobs.connect(Recorder("echo"))
        with pytest.raises(ConfigError, match="max_jobs"):
            await jobs.drain(max_jobs=max_jobs)


async def test_a_drain_with_nothing_connected_is_refused() -> None:
    async with JobsTest() as jobs:
        with pytest.raises(ConfigError, match=r"connect\(consumer\) first"):
            await jobs.drain()


async def test_a_drain_inside_a_drain_is_refused() -> None:
    async with JobsTest() as jobs:
        jobs.connect(Once("echo", lambda _: jobs.drain()))
        await jobs.publish("echo", a_job())
        with pytest.raises(AssertionError) as caught:
            await jobs.drain()
        assert isinstance(caught.value.__cause__, ConfigError)
        assert await jobs.drain() == 0


async def test_a_queue_that_was_deleted_is_reported() -> None:
    async with JobsTest() as jobs:
        jobs.connect(Recorder("echo"))
        await jobs.delete("echo")
        with pytest.raises(QueueNotFound, match="echo"):
            await jobs.drain()


class Nameless(AsyncConsumer):
    async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        return job_dict


class Idle(AsyncConsumer):
    pass


@pytest.mark.parametrize(
    ("consumer", "text"),
    [
        (Length, "an instance"),
        (Idle("echo"), "neither run nor handle"),
        (Nameless(), "no name"),
        (Blocking("known"), "two consumers for 'known'"),
    ],
)
def test_what_cannot_run_jobs_cannot_be_connected(consumer: Any, text: str) -> None:
    jobs = JobsTest()
    jobs.connect(Recorder("known"))
    with pytest.raises(ConfigError, match=text):
        jobs.connect(consumer)


# Open and closed


async def test_it_ends_with_its_block_and_can_be_opened_again() -> None:
    async with JobsTest() as jobs:
        jobs.connect(echo := Recorder("echo"))
        await jobs.publish("echo", a_job("kept"))
    for call in (jobs.publish("echo", a_job()), jobs.drain(), jobs.depth("echo"), jobs.declare(QueueSpec("new"))):
        with pytest.raises(Closed):
            await call
    with pytest.raises(Closed):
        await jobs.backend.queues()
    await jobs.aclose()
    async with jobs:
        assert await jobs.drain() == 1
    assert echo.seen == ["kept"]


def test_it_is_used_without_a_block_from_one_loop_after_another() -> None:
    jobs = JobsTest()
    jobs.connect(echo := Once("echo", failing()))
    job_id = asyncio.run(jobs.publish("echo", a_job("late"), delay=60))
    with pytest.raises(AssertionError, match="is dead"):
        asyncio.run(jobs.drain(with_scheduled=True))
    assert asyncio.run(jobs.dead_letters("echo").get(job_id)).reason == "attempts"
    assert asyncio.run(jobs.dead_letters("echo").replay()) == 1
    echo.then = None
    assert asyncio.run(jobs.receive_message("echo")) is not None
    assert asyncio.run(jobs.drain()) == 0


@pytest.mark.parametrize(
    "first",
    [
        lambda jobs: jobs.publish("echo", a_job()),
        lambda jobs: jobs.publish_many("echo", [a_job()]),
        lambda jobs: jobs.receive_message("echo"),
        lambda jobs: jobs.depth("echo"),
        lambda jobs: jobs.count_queue_messages("echo"),
        lambda jobs: jobs.clean("echo"),
        lambda jobs: jobs.delete("echo"),
        lambda jobs: jobs.queues(),
        lambda jobs: jobs.dead_letters("echo").list(),
        lambda jobs: jobs.dead_letters("echo").count(),
        lambda jobs: jobs.dead_letters("echo").replay(),
        lambda jobs: jobs.dead_letters("echo").purge(),
        lambda jobs: jobs.register(JobSchema("new", Input)),
        lambda jobs: jobs.declare(QueueSpec("new")),
        lambda jobs: jobs.drain(),
    ],
)
async def test_any_call_can_be_the_first(first: Callable[[JobsTest], Coroutine[Any, Any, Any]]) -> None:
    jobs = JobsTest()
    jobs.connect(Recorder("echo"))
    await first(jobs)


def test_two_loops_at_a_time_are_refused() -> None:
    jobs = JobsTest()
    jobs.connect(Recorder("echo"))
    with asyncio.Runner() as one, asyncio.Runner() as other:
        one.run(jobs.publish("echo", a_job()))
        with pytest.raises(ConfigError, match="another event loop"):
            other.run(jobs.drain())


async def test_a_job_knows_itself_while_it_is_drained() -> None:
    ids: list[str] = []
    async with JobsTest() as jobs:
        jobs.connect(Recorder("async", lambda _: ids.append(current_job().id)))
        jobs.connect(Blocking("blocking", lambda _: ids.append(current_job().id)))
        published = [await jobs.publish(queue, a_job()) for queue in ("async", "blocking")]
        await jobs.drain()
    assert ids == published
