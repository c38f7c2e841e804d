"""What holds after a cancellation, wherever it comes: at each await, before and after what was awaited has finished,
once and twice, and by a timeout. Every scenario runs some dozens or hundreds of times."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncOrchestrator,
    Backend,
    Closed,
    Dead,
    Depth,
    Done,
    Event,
    JobPublished,
    JobSchema,
    LeaseLost,
    QueueNotFound,
    QueueSpec,
    Release,
    Retry,
    Settlement,
    Worker,
)
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.testing.faults import CancelAt, Distant, Ended, every_suspension

if TYPE_CHECKING:
    from tests.fault.conftest import World

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.local, pytest.mark.chaos]

PATIENCE = 5.0
NewWorld = Callable[[], "World"]


@pytest.fixture(params=["local", "distant"])
def new_world(
    request: pytest.FixtureRequest, local: Callable[[], LocalBackend], a_world: Callable[[Backend], "World"]
) -> NewWorld:
    """Worlds on the local backend itself, and on one that every call takes turns of the loop to reach."""
    return lambda: a_world(local() if request.param == "local" else Distant(local()))


@pytest.fixture
def distant_world(local: Callable[[], LocalBackend], a_world: Callable[[Backend], "World"]) -> NewWorld:
    """For calls that the local backend answers without giving the loop a turn."""
    return lambda: a_world(Distant(local()))


def assert_heard(fault: CancelAt, ended: Ended[Any]) -> None:
    """The cancellation came through: nobody swallowed it, and nothing was made of it."""
    if not fault.struck:
        assert ended.error is None
    elif fault.moment == "timeout" and fault.struck == 1:
        assert isinstance(ended.error, TimeoutError)
    else:
        assert ended.cancelled


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


# --- publish


async def test_a_cancelled_publish_has_stored_the_job_or_not_and_its_id_is_known(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            job = world.job()
            ended = await fault.run(world.orchestrator.publish("jobs", job))
            assert_heard(fault, ended)
            stored = (await world.inside.depth("jobs")).ready
            assert stored in ((1,) if ended.error is None else (0, 1))
            assert await world.published(job) == [job.id]  # again, under the same id
            found = await world.audit()
            assert found.waiting.keys() == {job.id}

    assert await every_suspension(scenario) >= 6


async def test_a_listener_that_is_cancelled_takes_nothing_back(new_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        heard: list[str] = []

        async def listener(event: Event) -> None:
            assert isinstance(event, JobPublished)
            heard.append(event.job_id)
            await asyncio.sleep(0)
            heard.append("written down")

        async with new_world() as world:
            orchestrator = AsyncOrchestrator(world.backend, listeners=[listener])
            job = world.job()
            ended = await fault.run(orchestrator.publish("jobs", job))
            assert_heard(fault, ended)
            if heard:
                world.ledger.confirmed.add(job.id)
            assert heard in ([], [job.id], [job.id, "written down"])
            await world.audit()

    assert await every_suspension(scenario) >= 3


async def test_a_cancelled_batch_is_there_up_to_some_500_and_can_be_published_again(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            jobs = [world.job() for _ in range(501)]
            assert_heard(fault, await fault.run(world.orchestrator.publish_many("jobs", jobs)))
            stored = (await world.inside.depth("jobs")).ready
            assert stored in ((501,) if not fault.struck else (0, 500, 501))
            assert await world.orchestrator.publish_many("jobs", jobs) == [job.id for job in jobs]
            world.ledger.confirmed.update(job.id for job in jobs)
            found = await world.audit()
            assert [*found.waiting] == [job.id for job in jobs]

    assert await every_suspension(scenario) >= 12


# --- receive


async def one_arrives(world: "World") -> None:
    await world.published()


async def two_arrive(world: "World") -> None:
    await world.published(world.job(), world.job())


async def one_is_due(world: "World") -> None:
    await world.published(delay=10.0)
    await turns()
    world.clock.push(10.0)


async def one_is_replayed(world: "World") -> None:
    [job_id] = await world.died()
    await world.inside.dead_letters("jobs").replay([job_id])


async def one_is_retried(world: "World") -> None:
    async with world.inside.receiver(["jobs"]) as receiver:
        await world.published()
        for delivery in await receiver.receive(1):
            await turns()
            await receiver.settle([(delivery, Retry(0.0))])


async def one_lapses(world: "World") -> None:
    async with world.inside.receiver(["jobs"], lease=5.0, keep=False) as stalled:
        await world.published()
        await stalled.receive(1)
        await turns()
        world.clock.push(6.0)
        await turns(20)


@pytest.mark.parametrize(
    ("comes", "jobs"),
    [(one_arrives, 1), (two_arrive, 2), (one_is_due, 1), (one_is_replayed, 1), (one_is_retried, 1), (one_lapses, 1)],
)
async def test_a_job_whose_receiver_is_cancelled_goes_to_the_others_that_wait(
    new_world: NewWorld, comes: Callable[["World"], Awaitable[None]], jobs: int
) -> None:
    """The first to wait is the first to be woken. If it is cancelled then, the others get its wake-up and its job."""

    async def takes_one(world: "World") -> None:
        async with world.backend.receiver(["jobs"]) as receiver:
            await receiver.receive(1, wait=1000.0)

    async def scenario(fault: CancelAt) -> None:
        async with new_world() as world:
            async with (
                world.backend.receiver(["jobs"]) as second,
                world.backend.receiver(["jobs"]) as third,
                asyncio.timeout(PATIENCE),
                asyncio.TaskGroup() as group,
            ):
                cancelled = group.create_task(fault.run(takes_one(world)))
                await turns()
                others = [group.create_task(other.receive(1, wait=1000.0)) for other in (second, third)[:jobs]]
                await turns()
                await comes(world)
                await asyncio.wait(others)
                world.clock.push(2000.0)  # where another came first, the one to be cancelled waits in vain
                assert_heard(fault, await cancelled)
                received = [delivery for other in others for delivery in other.result()]
                assert {delivery.message.id for delivery in received} == world.ledger.confirmed
                assert {delivery.crashes for delivery in received} == {1 if comes is one_lapses else 0}
            await world.audit()

    assert await every_suspension(scenario) >= 3


async def test_what_a_cancelled_receive_was_given_goes_to_the_next_call(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            ids = await world.published(world.job(), world.job(), world.job())
            async with world.backend.receiver(["jobs"], slots=3) as receiver:
                ended = await fault.run(receiver.receive(2))
                assert_heard(fault, ended)
                received = ended.value or []
                received += await receiver.receive(3 - len(received))
                assert [delivery.message.id for delivery in received] == ids
                assert {delivery.number for delivery in received} == {1}
            await world.audit()

    assert await every_suspension(scenario) >= 6


async def test_leaving_a_receiver_releases_all_it_holds_uncounted_and_in_its_place(new_world: NewWorld) -> None:
    async def holds_two(world: "World") -> None:
        async with world.backend.receiver(["jobs"], slots=2) as receiver:
            await receiver.receive(2)
            await asyncio.sleep(0)
            await receiver.receive(1, wait=0.0)

    async def scenario(fault: CancelAt) -> None:
        async with new_world() as world:
            ids = await world.published(world.job(), world.job(), world.job())
            assert_heard(fault, await fault.run(holds_two(world)))
            found = await world.audit()
            assert [*found.waiting] == ids
            assert {(delivery.attempt, delivery.crashes) for delivery in found.waiting.values()} == {(1, 0)}

    assert await every_suspension(scenario) >= 3


async def test_a_cancelled_receive_message_has_taken_one_job_or_none(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            first, second = await world.published(world.job(), world.job())
            ended = await fault.run(world.orchestrator.receive_message("jobs"))
            assert_heard(fault, ended)
            assert ended.value is None or ended.value["id"] == first
            (world.ledger.perhaps_done if fault.struck else world.ledger.done).add(first)
            found = await world.audit()
            assert [*found.waiting] in ([second], [first, second])
            assert {(delivery.attempt, delivery.crashes) for delivery in found.waiting.values()} == {(1, 0)}

    assert await every_suspension(scenario) >= 15


# --- settle and extend

SETTLEMENTS = [Done(), Retry(0.0), Retry(5.0), Dead("rejected"), Release(), Release(5.0)]


@pytest.mark.parametrize("settlement", SETTLEMENTS, ids=repr)
async def test_a_cancelled_settlement_is_done_once(distant_world: NewWorld, settlement: Settlement) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            [job_id] = await world.published()
            async with world.backend.receiver(["jobs"]) as receiver:
                [delivery] = await receiver.receive(1)
                ended = await fault.run(receiver.settle([(delivery, settlement)]))
                assert_heard(fault, ended)
                answer = await world.settle(receiver, delivery, settlement)
                assert answer is None if ended.error and answer is None else isinstance(answer, LeaseLost)
            assert_settled_once(await world.audit(), job_id, settlement)

    assert await every_suspension(scenario) >= 6


def assert_settled_once(found: Any, job_id: str, settlement: Settlement) -> None:
    """The job is where one settlement, and no more, has put it. The audit's own receive counts as an attempt."""
    waiting = [(d.attempt, d.releases, d.crashes) for d in found.waiting.values()]
    dead = [(record.attempts, record.reason) for record in found.dead.values()]
    match settlement:
        case Done():
            assert (waiting, dead) == ([], [])
        case Retry():
            assert (waiting, dead) == ([(2, 0, 0)], [])
        case Dead():
            assert (waiting, dead) == ([], [(1, "rejected")])
        case Release():
            assert (waiting, dead) == ([(1, 1, 0)], [])


async def test_a_cancelled_exchange_has_settled_and_loses_nothing_it_received(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            _, second = await world.published(world.job(), world.job())
            async with world.backend.receiver(["jobs"]) as receiver:
                [delivery] = await receiver.receive(1)
                ended = await fault.run(receiver.exchange([(delivery, Done())], 1))
                assert_heard(fault, ended)
                assert isinstance(await world.settle(receiver, delivery, Done()), LeaseLost)
                received = ended.value.deliveries if ended.value else await receiver.receive(1)
                assert [(d.message.id, d.number) for d in received] == [(second, 1)]
            found = await world.audit()
            assert found.waiting.keys() == {second}

    assert await every_suspension(scenario) >= 6


async def test_a_cancelled_extend_was_done_or_not_and_can_be_repeated(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            await world.published()
            async with world.backend.receiver(["jobs"], lease=10.0, keep=False) as receiver:
                [delivery] = await receiver.receive(1)
                ends = delivery.deadline
                world.clock.push(6.0)
                assert_heard(fault, await fault.run(receiver.extend([delivery])))
                assert delivery.deadline in ((ends, ends + 6.0) if fault.struck else (ends + 6.0,))
                assert await receiver.extend([delivery]) == [None]
                assert delivery.deadline == ends + 6.0
                assert await world.settle(receiver, delivery, Done()) is None
            await world.audit()

    assert await every_suspension(scenario) >= 6


# --- dead letters


@pytest.mark.parametrize("rate", [None, 2.0])
async def test_a_cancelled_replay_leaves_each_job_dead_or_put_back(new_world: NewWorld, rate: float | None) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with new_world() as world:
            ids = await world.died(world.job(), world.job(), world.job())
            letters = world.orchestrator.dead_letters("jobs")
            async with asyncio.TaskGroup() as group:
                replay = group.create_task(fault.run(letters.replay(rate=rate)))
                for _ in range(4):
                    await turns()
                    world.clock.push(0.5)
            ended = await replay
            assert_heard(fault, ended)
            depth = await world.inside.depth("jobs")
            assert depth.ready + depth.dead == 3
            assert fault.struck or ended.value == depth.ready == 3
            assert await letters.replay() == depth.dead
            found = await world.audit()
            assert found.waiting.keys() == {*ids}
            assert {(d.attempt, d.number, d.releases) for d in found.waiting.values()} == {(1, 2, 0)}

    await every_suspension(scenario)


async def test_a_cancelled_purge_has_forgotten_all_or_none(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            ids = await world.died(world.job(), world.job())
            letters = world.orchestrator.dead_letters("jobs")
            assert_heard(fault, await fault.run(letters.purge()))
            left = await letters.count()
            assert left in ((0, 2) if fault.struck else (0,))
            assert await letters.purge() == left
            world.ledger.confirmed.difference_update(ids)
            assert await world.audit()

    assert await every_suspension(scenario) >= 6


# --- queues


async def test_a_cancelled_declare_was_done_or_not_and_can_be_repeated(distant_world: NewWorld) -> None:
    spec = QueueSpec("more", "stack")

    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            assert_heard(fault, await fault.run(world.orchestrator.declare(spec)))
            assert fault.struck or spec in await world.inside.queues()
            await world.orchestrator.declare(spec)
            assert (await world.inside.queues()).count(spec) == 1
            await world.audit()

    assert await every_suspension(scenario) >= 6


async def test_a_cancelled_registration_can_be_repeated(distant_world: NewWorld) -> None:
    class Input(BaseModel):
        x: int = 0

    schema = JobSchema("work", Input, queue="more")

    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            assert_heard(fault, await fault.run(world.orchestrator.register(schema)))
            assert await world.orchestrator.register(schema) == "more"
            await world.orchestrator.publish("more", {"x": 1})
            assert await world.orchestrator.count_queue_messages("more") == 1
            await world.audit()

    assert await every_suspension(scenario) >= 6


async def test_a_cancelled_delete_has_deleted_all_or_nothing(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            await world.orchestrator.declare(QueueSpec("more"))
            await world.orchestrator.publish("more", world.job())
            assert_heard(fault, await fault.run(world.orchestrator.delete("more")))
            if any(spec.name == "more" for spec in await world.inside.queues()):
                assert fault.struck
                assert await world.inside.depth("more") == Depth(1, 0, 0, 0)
                await world.orchestrator.delete("more")
            with pytest.raises(QueueNotFound):
                await world.orchestrator.delete("more")
            await world.audit()

    assert await every_suspension(scenario) >= 6


async def test_a_cancelled_clean_has_taken_all_that_waits_or_nothing(distant_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with distant_world() as world:
            leased, *waiting = await world.published(world.job(), world.job(), world.job())
            async with world.backend.receiver(["jobs"]) as receiver:
                await receiver.receive(1)
                ended = await fault.run(world.orchestrator.clean("jobs"))
                assert_heard(fault, ended)
                left = (await world.inside.depth("jobs")).ready
                assert left in ((0, 2) if fault.struck else (0,))
                assert await world.orchestrator.clean("jobs") == left
            world.ledger.confirmed.difference_update(waiting)
            assert (await world.audit()).waiting.keys() == {leased}

    assert await every_suspension(scenario) >= 6


async def test_a_cancelled_close_closes_all_the_same_and_releases_what_was_held(new_world: NewWorld) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with new_world() as world, asyncio.timeout(PATIENCE):
            [job_id] = await world.published()
            async with (
                world.backend.receiver(["jobs"]) as holder,
                world.backend.receiver(["jobs"]) as first,
                world.backend.receiver(["jobs"]) as second,
            ):
                await holder.receive(1)
                async with asyncio.TaskGroup() as group:
                    waits = [group.create_task(_closed(waiter.receive(1, wait=1000.0))) for waiter in (first, second)]
                    await turns()
                    assert_heard(fault, await fault.run(world.orchestrator.aclose()))
                assert [wait.result() for wait in waits] == [True, True]
                with pytest.raises(Closed):
                    await world.orchestrator.depth("jobs")
                await world.orchestrator.aclose()
            found = await world.audit()
            assert {d.message.id: (d.attempt, d.releases) for d in found.waiting.values()} == {job_id: (1, 1)}

    await every_suspension(scenario)


async def _closed(call: Awaitable[object]) -> bool:
    try:
        await call
    except Closed:
        return True
    return False


# --- workers


def assert_worked(world: "World", found: Any) -> None:
    """A job that had its effect is done; one that failed has failed once; the others are where they were, uncounted."""
    ledger = world.ledger
    assert all(count == 1 for count in ledger.effects.values())
    assert not ledger.effects.keys() & (found.waiting.keys() | found.dead.keys())
    assert ledger.confirmed == ledger.effects.keys() | found.waiting.keys() | found.dead.keys()
    for job_id, delivery in found.waiting.items():
        assert delivery.crashes == 0
        assert delivery.attempt == (2 if job_id in ledger.failed else 1)
    assert found.dead.keys() <= ledger.failed


@pytest.mark.parametrize(
    "does",
    [
        ["work"],
        ["work", "work", "work"],
        ["work", "fail", "reject"],
        ["clean up", "work"],
        ["work", "stop", "work", "work"],
        ["work", "stop now", "work"],
    ],
    ids=", ".join,
)
async def test_a_cancelled_worker_settles_what_has_run_and_releases_the_rest(
    new_world: NewWorld, does: list[str]
) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with new_world() as world:
            await world.published(*(world.job(does=what) for what in does))
            worker, _ = world.worker(until_idle=True)
            handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
            assert_heard(fault, await fault.run(worker.run()))
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
            assert_worked(world, await world.audit())

    assert await every_suspension(scenario) >= 6


async def test_a_cancelled_block_with_a_worker_in_it_ends_the_worker(new_world: NewWorld) -> None:
    async def block(worker: Worker, effect: asyncio.Event) -> None:
        async with worker:
            await effect.wait()

    async def scenario(fault: CancelAt) -> None:
        async with new_world() as world:
            await world.published(*(world.job(does=what) for what in ("fail", "work", "work")))
            worker, consumer = world.worker()
            assert_heard(fault, await fault.run(block(worker, consumer.effect)))
            assert_worked(world, await world.audit())

    assert await every_suspension(scenario) >= 6


async def test_a_worker_that_is_cancelled_while_a_thread_runs_settles_what_the_thread_has_done(
    local: Callable[[], LocalBackend], a_world: Callable[[Backend], "World"], blocking: Callable[["World"], Any]
) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with a_world(local()) as world:
            await world.published()
            worker, _ = world.worker(until_idle=True, consumer=blocking(world))
            assert_heard(fault, await fault.run(worker.run()))
            assert_worked(world, await world.audit())

    assert await every_suspension(scenario, twice=False) >= 6


async def test_a_job_whose_thread_does_not_end_is_released_and_no_task_waits_for_it(
    local: Callable[[], LocalBackend], a_world: Callable[[Backend], "World"], blocking: Callable[["World"], Any]
) -> None:
    async def scenario(fault: CancelAt) -> None:
        async with a_world(local()) as world, asyncio.timeout(PATIENCE):
            [job_id] = await world.published()
            worker, consumer = world.worker(until_idle=True, cancel_grace=0.0, consumer=blocking(world))
            consumer.held.clear()
            worked = asyncio.get_running_loop().create_task(fault.run(worker.run()))
            await turns(20)
            if not fault.struck:
                consumer.held.set()
            assert_heard(fault, await worked)
            found = await world.audit()
            consumer.held.set()
            assert {d.message.id: (d.attempt, d.crashes) for d in found.waiting.values()} in ({}, {job_id: (1, 0)})
            assert found.waiting or job_id in world.ledger.done

    assert await every_suspension(scenario, twice=False) >= 6
