"""The fault machinery hits every await and every call, and catches the bugs it is made for."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest

from mindtrace.jobs import (
    Backend,
    BackendUnavailable,
    Dead,
    Depth,
    Done,
    LeaseLost,
    QueueNotFound,
    QueueSpec,
    Receiver,
)
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.testing.faults import CancelAt, Distant, FailingAt, Moment, every_call, every_suspension
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

Scenario = Callable[[CancelAt], Awaitable[None]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- CancelAt


async def nothing() -> str:
    return "value"


async def two_turns() -> str:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return "value"


async def a_finished_future() -> str:
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    await future  # gives the loop no turn, so no cancellation can come here
    return "value"


async def a_lock_and_an_event() -> str:
    lock, event = asyncio.Lock(), asyncio.Event()
    async with lock:  # free: no turn
        asyncio.get_running_loop().call_soon(event.set)
        await event.wait()
    return "value"


async def a_generator() -> str:
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0)
            yield number

    return "value" if [number async for number in numbers()] == [0, 1, 2] else ""


async def a_task_of_two_turns() -> str:
    task = asyncio.get_running_loop().create_task(two_turns())
    await asyncio.wait({task})  # one suspension of its own, two of the task's
    return task.result()


async def a_group() -> str:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(two_turns()) for _ in range(2)]
    return tasks[0].result()


@pytest.mark.parametrize(
    ("function", "suspensions"),
    [
        (nothing, 0),
        (two_turns, 2),
        (a_finished_future, 0),
        (a_lock_and_an_event, 1),
        (a_generator, 3),
        (a_task_of_two_turns, 3),
        (a_group, 5),
    ],
)
async def test_every_suspension_is_counted_and_nothing_else(
    function: Callable[[], Coroutine[Any, Any, str]], suspensions: int
) -> None:
    fault = CancelAt(0)
    ended = await fault.run(function())
    assert (fault.seen, fault.struck, fault.where) == (suspensions, 0, [])
    assert (ended.value, ended.error, ended.cancelled) == ("value", None, False)


@pytest.mark.parametrize("moment", ["waiting", "finished"])
@pytest.mark.parametrize("k", [1, 2, 3])
async def test_the_coroutine_is_cancelled_exactly_where_it_was_asked_for(k: int, moment: Moment) -> None:
    done: list[int] = []

    async def three_futures() -> None:
        for number in (1, 2, 3):
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(finish, future, number)
            await future
            done.append(-number)

    def finish(future: "asyncio.Future[None]", number: int) -> None:
        if not future.done():
            done.append(number)
            future.set_result(None)

    fault = CancelAt(k, moment)
    ended = await fault.run(three_futures())
    assert ended.cancelled
    before = [number for earlier in range(1, k) for number in (earlier, -earlier)]
    # Cancelled in time, the future takes no result; once it has one, the coroutine is cancelled and never sees it.
    assert done == before + ([k] if moment == "finished" else [])
    assert [fault.struck, fault.seen] == [1, k]
    assert fault.where[0].startswith("test_the_coroutine_is_cancelled_exactly_where_it_was_asked_for.<locals>.three_f")


async def test_the_moment_is_the_same_for_a_turn_of_the_loop_which_gives_nothing() -> None:
    for moment in ("waiting", "finished"):
        ended = await CancelAt(2, moment).run(two_turns())
        assert ended.cancelled


async def test_a_suspension_in_a_task_cancels_the_coroutine_that_started_it() -> None:
    cancelled: list[str] = []

    async def told(name: str, coroutine: Awaitable[object]) -> None:
        try:
            await coroutine
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    async def parent() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(told("child", two_turns()))

    fault = CancelAt(3)  # 1: the parent waits for the group, 2 and 3: the child
    assert (await fault.run(told("parent", parent()))).cancelled
    assert cancelled == ["child", "parent"]
    assert "two_turns" in fault.where[0]


async def test_tasks_of_others_are_not_counted() -> None:
    fault = CancelAt(0)
    async with asyncio.TaskGroup() as group:
        group.create_task(two_turns())
        group.create_task(fault.run(two_turns()))
    assert fault.seen == 2


@pytest.mark.parametrize("k", [1, 2])
async def test_a_timeout_runs_out_at_the_suspension(k: int) -> None:
    turns: list[int] = []

    async def turn_and_turn() -> None:
        for number in (1, 2):
            await asyncio.sleep(0)
            turns.append(number)

    ended = await CancelAt(k, "timeout").run(turn_and_turn())
    assert isinstance(ended.error, TimeoutError)
    assert turns == list(range(1, k))


async def test_a_second_cancellation_meets_the_clean_up() -> None:
    cleaned: list[int] = []

    async def with_a_clean_up() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            for number in (1, 2):
                await asyncio.sleep(0)
                cleaned.append(number)

    for again, left in ((0, [1, 2]), (1, []), (2, [1]), (3, [1, 2])):
        cleaned.clear()
        fault = CancelAt(1, again=again)
        assert (await fault.run(with_a_clean_up())).cancelled
        assert cleaned == left
        assert fault.struck == (2 if again in (1, 2) else 1)


async def test_what_the_coroutine_raises_or_returns_all_the_same_is_seen() -> None:
    async def raises() -> None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise LookupError("instead") from None

    async def swallows() -> str:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            return "swallowed"
        return "never cancelled"

    assert isinstance((await CancelAt(1).run(raises())).error, LookupError)
    assert (await CancelAt(1).run(swallows())).value == "swallowed"


async def test_a_coroutine_that_does_not_end_is_an_error() -> None:
    async def deaf() -> None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="did not end"):
        await CancelAt(1, limit=0.05).run(deaf())


async def test_every_suspension_is_cancelled_at_every_moment() -> None:
    met: list[tuple[int, Moment, int]] = []

    async def scenario(fault: CancelAt) -> None:
        ended = await fault.run(two_turns())
        assert ended.value == "value" if fault.k == 0 else ended.error is not None
        met.append((fault.k, fault.moment, fault.again))

    assert await every_suspension(scenario) == 6
    alone = [(k, moment, 0) for moment in ("waiting", "finished", "timeout") for k in (1, 2)]
    assert [point for point in met if point[0] and not point[2]] == alone


async def test_a_scenario_that_does_not_repeat_itself_is_refused() -> None:
    left = iter([3, 1, 0])

    async def shorter_each_time() -> None:
        for _ in range(next(left)):
            await asyncio.sleep(0)

    async def scenario(fault: CancelAt) -> None:
        await fault.run(shorter_each_time())

    with pytest.raises(AssertionError, match="no repeatable scenario"):
        await every_suspension(scenario, moments=["waiting"], twice=False)


class Buffer:
    """Hands over items, one at a time; `careful` decides whether it has the bug that this machinery is for."""

    def __init__(self, *, careful: bool) -> None:
        self.items = deque(["item"])
        self.careful = careful

    async def take(self, taken: list[str]) -> None:
        item = self.items.popleft()
        try:
            await asyncio.sleep(0)  # such as: writing it down
        except asyncio.CancelledError:
            if self.careful:
                self.items.appendleft(item)
            raise
        taken.append(item)


async def get_from_a_queue(items: "asyncio.Queue[str]", taken: list[str]) -> None:
    getter = asyncio.get_running_loop().create_task(items.get())
    try:
        await asyncio.shield(getter)
    finally:
        getter.cancel()
    taken.append(getter.result())


async def wait_for_a_shared_future(future: "asyncio.Future[str]", taken: list[str]) -> None:
    taken.append(await future)


@pytest.mark.parametrize("careful", [True, False])
async def test_an_item_that_was_taken_and_then_lost_is_caught(careful: bool) -> None:
    async def scenario(fault: CancelAt) -> None:
        buffer, taken = Buffer(careful=careful), list[str]()
        await fault.run(buffer.take(taken))
        assert [*buffer.items, *taken] == ["item"]

    if careful:
        assert await every_suspension(scenario) == 3
    else:
        with pytest.raises(AssertionError) as caught:
            await every_suspension(scenario)
        assert "cancelled at suspension 1 (waiting): " in caught.value.__notes__[0]
        assert "Buffer.take" in caught.value.__notes__[0]


@pytest.mark.parametrize(("moment", "caught"), [("waiting", False), ("finished", True)])
async def test_an_item_that_came_just_before_the_cancellation_is_only_lost_when_it_has_finished(
    moment: Moment, caught: bool
) -> None:
    """The race of every blocking pop: the item is handed over, and the one who gets it is cancelled."""

    async def scenario(fault: CancelAt) -> None:
        items: asyncio.Queue[str] = asyncio.Queue()
        taken: list[str] = []
        loop = asyncio.get_running_loop()
        turns = iter(range(3))

        def put_when_somebody_waits() -> None:
            loop.call_soon(items.put_nowait if next(turns) == 2 else lambda _: put_when_somebody_waits(), "item")

        put_when_somebody_waits()
        await fault.run(get_from_a_queue(items, taken))
        for _ in range(5):
            await asyncio.sleep(0)
        assert items.qsize() + len(taken) == 1

    if caught:
        with pytest.raises(AssertionError):
            await every_suspension(scenario, moments=[moment], twice=False)
    else:
        await every_suspension(scenario, moments=[moment], twice=False)


async def test_a_clean_up_that_a_second_cancellation_breaks_is_caught() -> None:
    async def scenario(fault: CancelAt) -> None:
        held = ["connection"]

        async def lets_go_after_a_turn() -> None:
            try:
                await asyncio.sleep(0)
            finally:
                await asyncio.sleep(0)  # such as: saying goodbye
                held.clear()

        await fault.run(lets_go_after_a_turn())
        # In the undisturbed run the clean-up is its second suspension, so once is enough to break it there.
        assert not held or fault.k == 2

    assert await every_suspension(scenario, twice=False) == 6
    with pytest.raises(AssertionError) as caught:
        await every_suspension(scenario)
    assert "and again 1 later" in caught.value.__notes__[0]


# --- FailingAt


def a_message() -> Message:
    return Message(new_job_id(), b"{}")


async def local_with_a_dead_job(message: Message) -> LocalBackend:
    backend = LocalBackend()
    await backend.open()
    await backend.declare(QueueSpec("jobs"))
    await backend.publish("jobs", [message])
    async with backend.receiver(["jobs"]) as receiver:
        [delivery] = await receiver.receive(1)
        await receiver.settle([(delivery, Dead("rejected"))])
    return backend


RAISING: dict[str, tuple[Callable[[Backend, Message], Awaitable[object]], Callable[[Backend], Awaitable[object]]]] = {
    # verb: the call, and what is changed once it was done
    "open": (lambda backend, _: backend.open(), lambda backend: _opened(backend)),
    "declare": (lambda backend, _: backend.declare(QueueSpec("more")), lambda backend: _names(backend)),
    "delete": (lambda backend, _: backend.delete("jobs", force=True), lambda backend: _names(backend)),
    "clean": (lambda backend, _: backend.clean("ready"), lambda backend: backend.depth("ready")),
    "depth": (lambda backend, _: backend.depth("jobs"), lambda backend: _names(backend)),
    "queues": (lambda backend, _: backend.queues(), lambda backend: _names(backend)),
    "list": (lambda backend, _: backend.dead_letters("jobs").list(DeadFilter()), lambda backend: _names(backend)),
    "get": (lambda backend, message: backend.dead_letters("jobs").get(message.id), lambda backend: _names(backend)),
    "count": (lambda backend, _: backend.dead_letters("jobs").count(), lambda backend: _names(backend)),
    "replay": (lambda backend, _: backend.dead_letters("jobs").replay(DeadFilter()), lambda b: b.depth("jobs")),
    "purge": (lambda backend, _: backend.dead_letters("jobs").purge(DeadFilter()), lambda b: b.depth("jobs")),
}
CHANGING = ("declare", "delete", "clean", "replay", "purge")


async def _names(backend: Backend) -> list[str]:
    return [spec.name for spec in await backend.queues()]


async def _opened(backend: Backend) -> bool:
    return bool(await backend.queues())


@pytest.mark.local
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("verb", RAISING)
async def test_a_broken_call_raises_and_was_done_or_not_as_asked(verb: str, done: bool) -> None:
    call, state = RAISING[verb]
    inside = await local_with_a_dead_job(message := a_message())
    await inside.declare(QueueSpec("ready"))
    await inside.publish("ready", [a_message()])
    before = await state(inside)
    broken = FailingAt(1, inside, done=done)
    with pytest.raises(BackendUnavailable):
        await call(broken, message)
    assert (broken.calls, broken.struck) == ([verb], verb)
    await inside.open()  # which a broken open closed
    assert (await state(inside) != before) == (done and verb in CHANGING)


@pytest.mark.local
async def test_a_failing_publish_gives_each_message_its_answer() -> None:
    for done in (False, True):
        inside = LocalBackend()
        await inside.open()
        await inside.declare(QueueSpec("jobs"))
        backend = FailingAt(1, inside, done=done)
        messages = [a_message(), a_message()]
        outcomes = await backend.publish("jobs", messages)
        assert [(type(o), o.maybe_published, o.job_ids) for o in outcomes if isinstance(o, BackendUnavailable)] == [
            (BackendUnavailable, done, (message.id,)) for message in messages
        ]
        assert (await backend.depth("jobs")).ready == (2 if done else 0)
        # The same ids again are safe, whichever it was.
        assert await backend.publish("jobs", messages) == (["duplicate"] * 2 if done else ["stored"] * 2)


@pytest.mark.local
@pytest.mark.parametrize("done", [False, True])
async def test_deliveries_whose_answer_was_lost_go_to_the_next_exchange(done: bool) -> None:
    inside = LocalBackend()
    await inside.open()
    await inside.declare(QueueSpec("jobs"))
    messages = [a_message() for _ in range(3)]
    await inside.publish("jobs", messages)
    backend = FailingAt(2, inside, done=done)
    async with backend.receiver(["jobs"], slots=3) as receiver:
        with pytest.raises(BackendUnavailable):
            await receiver.receive(2)
        assert (await inside.depth("jobs")).leased == (2 if done else 0)
        one = await receiver.receive(1)
        rest = await receiver.receive(3, wait=5)
        assert [delivery.message for delivery in one + rest] == messages
        assert {(delivery.attempt, delivery.releases) for delivery in one + rest} == {(1, 0)}
    assert (await inside.depth("jobs")) == Depth(3, 0, 0, 0)


@pytest.mark.local
@pytest.mark.parametrize("done", [False, True])
async def test_a_broken_settlement_is_answered_and_its_lease_is_over(done: bool) -> None:
    inside = LocalBackend()
    await inside.open()
    await inside.declare(QueueSpec("jobs"))
    await inside.publish("jobs", messages := [a_message(), a_message()])
    backend = FailingAt(3, inside, done=done)
    async with backend.receiver(["jobs"], slots=2) as receiver:
        [delivery] = await receiver.receive(1)
        exchanged = await receiver.exchange([(delivery, Done())], 1)
        assert [type(answer) for answer in exchanged.settled] == [BackendUnavailable]
        assert exchanged.deliveries == []
        [again] = await receiver.settle([(delivery, Done())])
        assert isinstance(again, LeaseLost)
        left = await receiver.receive(2)
    assert [delivery.message for delivery in left] == (messages[1:] if done else messages)


@pytest.mark.local
async def test_settle_alone_raises_what_broke_it_and_extend_gives_it() -> None:
    inside = LocalBackend()
    await inside.open()
    await inside.declare(QueueSpec("jobs"))
    await inside.publish("jobs", [a_message()])
    backend = FailingAt(3, inside)
    async with backend.receiver(["jobs"]) as receiver:
        [delivery] = await receiver.receive(1)
        assert [type(answer) for answer in await receiver.extend([delivery])] == [BackendUnavailable]
        assert await receiver.extend([delivery]) == [None]
    backend = FailingAt(3, inside)
    async with backend.receiver(["jobs"]) as receiver:
        [delivery] = await receiver.receive(1)
        with pytest.raises(BackendUnavailable):
            await receiver.settle([(delivery, Done())])


@pytest.mark.local
@pytest.mark.parametrize("done", [False, True])
async def test_a_receiver_that_could_not_be_entered_holds_nothing(done: bool) -> None:
    inside = LocalBackend()
    await inside.open()
    backend = FailingAt(1, inside, done=done)
    with pytest.raises(BackendUnavailable):
        async with backend.receiver(["jobs"]):
            pytest.fail("entered")
    async with backend.receiver(["jobs"]) as receiver:
        with pytest.raises(QueueNotFound):
            await receiver.receive(1)


@pytest.mark.local
async def test_every_call_is_broken_in_both_ways_until_a_run_passes_untouched() -> None:
    struck: list[tuple[int, bool, str | None]] = []

    async def scenario(backend: FailingAt) -> None:
        await backend.backend.open()
        for call in (lambda: backend.declare(QueueSpec("jobs"), attach=True), lambda: backend.queues()):
            try:
                await call()
            except BackendUnavailable:
                await call()
        await backend.aclose()
        struck.append((backend.n, backend.done, backend.struck))

    assert await every_call(LocalBackend, scenario) == 4
    verbs = [(1, "declare"), (2, "queues"), (3, None)]
    assert struck == [(n, done, verb) for done in (False, True) for n, verb in verbs]


@pytest.mark.local
async def test_a_caller_that_forgets_to_publish_again_is_caught() -> None:
    async def scenario(backend: FailingAt) -> None:
        await backend.backend.open()
        await backend.backend.declare(QueueSpec("jobs"))
        await backend.publish("jobs", [a_message()])
        assert (await backend.backend.depth("jobs")).ready == 1

    with pytest.raises(AssertionError) as caught:
        await every_call(LocalBackend, scenario)
    assert "call 1 (publish) broken before it was done" in caught.value.__notes__[0]


@pytest.mark.local
async def test_a_distant_exchange_that_is_cancelled_settles_and_keeps_what_it_received() -> None:
    """As a broker does: what was sent is done, and what it answered is not lost."""

    async def scenario(fault: CancelAt) -> None:
        inside = LocalBackend()
        await inside.open()
        await inside.declare(QueueSpec("jobs"))
        first, second = a_message(), a_message()
        await inside.publish("jobs", [first, second])

        async with Distant(inside).receiver(["jobs"], slots=2) as receiver:
            [delivery] = await receiver.receive(1)
            ended = await fault.run(receiver.exchange([(delivery, Done())], 1))
            assert (ended.error is None) == (fault.k == 0)
            received = ended.value.deliveries if ended.value else await receiver.receive(1)
            assert [d.message for d in received] == [second]
            [late] = await receiver.settle([(delivery, Done())])
            assert isinstance(late, LeaseLost)
        assert await inside.depth("jobs") == Depth(1, 0, 0, 0)

    assert await every_suspension(scenario) == 6


@pytest.mark.local
async def test_a_nudge_ends_the_wait_of_a_distant_receiver() -> None:
    inside = LocalBackend()
    await inside.open()
    await inside.declare(QueueSpec("jobs"))

    async def waits(receiver: Receiver) -> int:
        return len(await receiver.receive(1, wait=60))

    async with asyncio.timeout(5), Distant(inside).receiver(["jobs"]) as receiver, asyncio.TaskGroup() as group:
        task = group.create_task(waits(receiver))
        await asyncio.sleep(0)
        receiver.nudge()
    assert task.result() == 0
