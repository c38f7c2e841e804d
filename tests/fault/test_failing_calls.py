"""What holds after one call to the backend broke, before it was done or with its answer lost: each call in turn."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncOrchestrator,
    Backend,
    BackendUnavailable,
    Closed,
    Dead,
    Delivery,
    Done,
    Job,
    JobNotFound,
    JobSchema,
    JobsError,
    LeaseLost,
    PublishIncomplete,
    QueueNotFound,
    QueueSpec,
    Receiver,
    Release,
    Retry,
    Settlement,
)
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.testing.faults import FailingAt, every_call

if TYPE_CHECKING:
    from tests.fault.conftest import Found, World

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.local]

PATIENCE = 5.0
T = TypeVar("T")
NewWorld = Callable[[Backend], "World"]
NewBackend = Callable[[], LocalBackend]


async def insisting(call: Callable[[], Awaitable[T]]) -> T:
    """The call, once more if it broke: never more than once does."""
    try:
        return await call()
    except BackendUnavailable:
        return await call()


async def raised(call: Awaitable[object]) -> JobsError | None:
    """What the call raised, if it did."""
    try:
        await call
    except JobsError as error:
        return error
    return None


@asynccontextmanager
async def a_receiver(world: "World", **options: Any) -> AsyncIterator[Receiver]:
    """A receiver on the queue, entered once more if that broke."""
    try:
        context = world.backend.receiver(["jobs"], **options)
        receiver = await context.__aenter__()
    except BackendUnavailable:
        context = world.backend.receiver(["jobs"], **options)
        receiver = await context.__aenter__()
    try:
        yield receiver
    finally:
        await context.__aexit__(None, None, None)


def unanswered(answer: object) -> bool:
    return isinstance(answer, BackendUnavailable)


# --- publish


async def test_a_publish_that_broke_says_if_the_job_may_be_stored_and_can_be_repeated(
    local: NewBackend, a_world: NewWorld
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            job = world.job()
            error = await raised(world.orchestrator.publish("jobs", job))
            if backend.struck:
                assert isinstance(error, BackendUnavailable)
                assert (error.job_ids, error.maybe_published) == ((job.id,), backend.done)
                assert (await world.inside.depth("jobs")).ready == (1 if error.maybe_published else 0)
                error = await raised(world.orchestrator.publish("jobs", job))
            assert error is None
            world.ledger.confirmed.add(job.id)
            assert (await world.audit()).waiting.keys() == {job.id}

    assert await every_call(local, scenario) == 2


@pytest.mark.parametrize("number", [3, 501])
async def test_a_batch_that_broke_says_which_jobs_are_not_stored_or_may_not_be(
    local: NewBackend, a_world: NewWorld, number: int
) -> None:
    """501 are two calls, so one half may be stored and the other not."""

    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            jobs = [world.job() for _ in range(number)]
            left: Sequence[Job] = []
            error = await raised(world.orchestrator.publish_many("jobs", jobs))
            there = (await world.inside.depth("jobs")).ready
            if isinstance(error, PublishIncomplete):
                left = [jobs[index] for index in error.failures]
                assert error.ids == [job.id for job in jobs if job not in left]
                world.ledger.confirmed.update(error.ids)
                assert {failure.outcome for failure in error.failures.values()} == {
                    "unknown" if backend.done else "not_done"
                }
                assert there == len(error.ids) + (len(left) if backend.done else 0)
            elif error is not None:
                assert isinstance(error, BackendUnavailable)
                assert (error.outcome, there) == ("not_done", 0)
                left = jobs
            assert bool(left) == bool(backend.struck)
            await world.orchestrator.publish_many("jobs", left)
            world.ledger.confirmed.update(job.id for job in jobs)
            assert (await world.audit()).waiting.keys() == {job.id for job in jobs}

    assert await every_call(local, scenario) == (2 if number == 3 else 4)


# --- receive, settle, extend


@pytest.mark.parametrize("in_one_call", [False, True])
async def test_a_loop_that_goes_on_after_a_broken_call_gets_every_job_done(
    local: NewBackend, a_world: NewWorld, in_one_call: bool
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            ids = await world.published(world.job(), world.job(), world.job())
            received: list[str] = []
            async with asyncio.timeout(PATIENCE), a_receiver(world) as receiver:
                pairs: list[tuple[Delivery, Settlement]] = []
                while {*ids} != world.ledger.done | world.ledger.perhaps_done or pairs:
                    limit = 1 if in_one_call or not pairs else 0
                    exchanged = await insisting(partial(receiver.exchange, pairs, limit))
                    for (delivery, settlement), answer in zip(pairs, exchanged.settled, strict=True):
                        world.note_settled(delivery, settlement, answer)
                        if unanswered(answer) and not backend.done:
                            world.ledger.perhaps_done.discard(delivery.message.id)  # so it comes again
                    pairs = [(delivery, Done()) for delivery in exchanged.deliveries]
                    received += [delivery.message.id for delivery in exchanged.deliveries]
            assert (await world.audit()).waiting == {}
            # One call broke, with one job in it: no more than that one is delivered twice, and none by a lost answer.
            again = [job_id for job_id in ids if received.count(job_id) > 1]
            assert len(received) - len(ids) == len(again) <= (0 if backend.done else 1)

    assert await every_call(local, scenario) >= 8


SETTLEMENTS = [Done(), Retry(0.0), Retry(5.0), Dead("rejected"), Release(), Release(5.0)]


@pytest.mark.parametrize("settlement", SETTLEMENTS, ids=repr)
async def test_a_settlement_that_broke_was_done_once_or_its_lease_is_over(
    local: NewBackend, a_world: NewWorld, settlement: Settlement
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            await world.published()
            async with a_receiver(world) as receiver:
                [delivery] = await insisting(lambda: receiver.receive(1))
                answer = await world.settle(receiver, delivery, settlement)
                broken = unanswered(answer)
                assert broken == (backend.struck == "exchange" and backend.n == len(backend.calls)) or answer is None
                assert isinstance(await world.settle(receiver, delivery, settlement), LeaseLost | BackendUnavailable)
            found = await world.audit()
            waiting = [(d.attempt, d.releases) for d in found.waiting.values()]
            if (broken and not backend.done) or isinstance(settlement, Release):
                assert (waiting, found.dead) == ([(1, 1)], {})
            elif isinstance(settlement, Retry):
                assert (waiting, found.dead) == ([(2, 0)], {})
            else:
                assert waiting == []
                assert len(found.dead) == isinstance(settlement, Dead)

    assert await every_call(local, scenario) == 8


async def test_an_extend_that_broke_can_be_repeated(local: NewBackend, a_world: NewWorld) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            await world.published()
            async with a_receiver(world, lease=10.0, keep=False) as receiver:
                [delivery] = await insisting(lambda: receiver.receive(1))
                ends = delivery.deadline
                world.clock.push(6.0)
                [answer] = await receiver.extend([delivery])
                if unanswered(answer):
                    assert delivery.deadline == (ends + 6.0 if backend.done else ends)
                    assert await receiver.extend([delivery]) == [None]
                assert delivery.deadline == ends + 6.0
                if unanswered(await world.settle(receiver, delivery, Done())) and not backend.done:
                    world.ledger.perhaps_done.clear()
            await world.audit()

    assert await every_call(local, scenario) == 8


async def test_receive_message_loses_a_job_only_with_the_answer_to_its_settlement(
    local: NewBackend, a_world: NewWorld
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            first, second = await world.published(world.job(), world.job())
            settlement = backend.n == 3  # 1: the receiver, 2: the receive
            try:
                taken = await world.orchestrator.receive_message("jobs")
                assert taken is not None
                assert backend.struck is None
                assert taken["id"] == first
                world.ledger.done.add(first)
            except BackendUnavailable:
                assert backend.struck is not None
                if settlement and backend.done:
                    world.ledger.perhaps_done.add(first)
            found = await world.audit()
            gone = backend.struck is None or (settlement and backend.done)
            assert [*found.waiting] == ([second] if gone else [first, second])
            assert {(delivery.attempt, delivery.crashes) for delivery in found.waiting.values()} == {(1, 0)}

    assert await every_call(local, scenario) == 6


# --- dead letters


async def test_dead_letters_are_read_again_after_a_broken_call(local: NewBackend, a_world: NewWorld) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            [job_id] = await world.died()
            letters = world.orchestrator.dead_letters("jobs")
            assert await insisting(letters.count) == 1
            assert [record.message.id for record in (await insisting(letters.list)).records] == [job_id]
            assert (await insisting(lambda: letters.get(job_id))).reason == "rejected"
            assert (await world.audit()).dead.keys() == {job_id}

    assert await every_call(local, scenario) == 6


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize("verb", ["replay", "purge"])
async def test_dead_letters_are_put_back_or_forgotten_once(
    local: NewBackend, a_world: NewWorld, verb: str, by_id: bool
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            ids = await world.died(world.job(), world.job())
            letters = world.orchestrator.dead_letters("jobs")
            call = letters.replay if verb == "replay" else letters.purge
            try:
                number = await call(ids if by_id else None)
            except BackendUnavailable:
                try:
                    number = await call(ids if by_id else None)
                except JobNotFound:
                    number = 0  # by id one is told that it was done before
                    assert by_id
                assert number == (0 if backend.done else 2)
            if verb == "purge":
                world.ledger.confirmed.difference_update(ids)
            found = await world.audit()
            assert found.dead == {}
            assert found.waiting.keys() == ({*ids} if verb == "replay" else set())
            assert {(d.attempt, d.number) for d in found.waiting.values()} <= {(1, 2)}

    assert await every_call(local, scenario) == 2


# --- queues


class Input(BaseModel):
    x: int = 0


async def test_queues_are_looked_after_with_one_more_try(local: NewBackend, a_world: NewWorld) -> None:
    schema = JobSchema("work", Input, queue="more")

    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            orchestrator = world.orchestrator
            assert await insisting(lambda: orchestrator.register(schema)) == "more"
            await insisting(lambda: orchestrator.declare(QueueSpec("pile", "stack")))
            specs = await insisting(orchestrator.queues)
            assert {spec.name: spec.kind for spec in specs} == {"jobs": "fifo", "more": "fifo", "pile": "stack"}
            await AsyncOrchestrator(world.inside).publish("more", world.job())
            assert await insisting(lambda: orchestrator.count_queue_messages("more")) == 1
            cleaned = await insisting(lambda: orchestrator.clean("more"))
            assert cleaned == (0 if backend.struck == "clean" and backend.done else 1)
            try:
                await insisting(lambda: orchestrator.delete("more"))
            except QueueNotFound:
                assert backend.struck == "delete"
                assert backend.done
            assert [spec.name for spec in await world.inside.queues()] == ["jobs", "pile"]
            await world.audit()

    assert await every_call(local, scenario) == 12


async def test_an_orchestrator_that_could_not_open_is_closed_and_opens_at_the_next_try(
    local: NewBackend, a_world: NewWorld
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            await world.inside.aclose()
            try:
                await world.orchestrator.open()
            except BackendUnavailable:
                with pytest.raises(Closed):
                    await world.inside.queues()
                await world.orchestrator.open()
            await world.orchestrator.aclose()
            with pytest.raises(Closed):
                await world.inside.queues()
            await world.audit()

    assert await every_call(local, scenario) == 2


async def test_leaving_and_closing_release_what_is_held_whatever_broke_before(
    local: NewBackend, a_world: NewWorld
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            ids = await world.published(world.job(), world.job(), world.job())
            async with a_receiver(world, slots=2) as left, a_receiver(world) as closed:
                await insisting(lambda: left.receive(2))
                await insisting(lambda: closed.receive(1))
                await world.orchestrator.aclose()
            found = await world.audit()
            assert {*found.waiting} == {*ids}
            assert {(d.attempt, d.releases, d.crashes) for d in found.waiting.values()} == {(1, 1, 0)}

    assert await every_call(local, scenario) >= 8


# --- workers


def assert_worked(world: "World", backend: FailingAt, found: "Found", does: Sequence[str]) -> None:
    """Every job ran to its end, none more than once beyond what was in flight at the fault, and all is settled."""
    ledger = world.ledger
    assert len(ledger.effects) == sum(what == "work" for what in does)
    assert not ledger.effects.keys() & (found.waiting.keys() | found.dead.keys())
    assert ledger.confirmed == ledger.effects.keys() | found.waiting.keys() | found.dead.keys()
    assert len(found.waiting) == sum(what == "fail" for what in does)
    assert {(d.attempt, d.crashes) for d in found.waiting.values()} <= {(2, 0)}
    assert len(found.dead) == sum(what == "reject" for what in does)
    in_flight = 2 if backend.struck == "exchange" and not backend.done else 0
    assert sum(ledger.started.values()) - len(ledger.started) <= in_flight


async def until_it_ends(world: "World", **options: Any) -> None:
    """What a supervisor does: start a worker again if it could not begin.

    Its status is 1 only where its last settlements were what broke: those jobs come back.
    """

    async def once() -> None:
        worker, _ = world.worker(**options)
        status = await worker.run()
        assert status == 0 or (worker.released and getattr(world.backend, "struck", None) == "exchange")

    async with asyncio.timeout(PATIENCE):
        await insisting(once)


@pytest.mark.parametrize(
    "does", [["work"], ["work", "work", "work"], ["fail", "work", "reject", "work", "work"]], ids=", ".join
)
async def test_a_worker_gets_every_job_done_whichever_call_breaks(
    local: NewBackend, a_world: NewWorld, does: list[str]
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            await world.published(*(world.job(does=what) for what in does))
            await until_it_ends(world, until_idle=True)
            assert_worked(world, backend, await world.audit(), does)

    assert await every_call(local, scenario) >= 8


async def test_a_worker_that_is_told_to_stop_leaves_nothing_leased_whichever_call_breaks(
    local: NewBackend, a_world: NewWorld
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            await world.published(*(world.job(does=what) for what in ("stop", "work", "work", "work")))
            await until_it_ends(world)
            found = await world.audit()
            assert world.ledger.effects
            assert {delivery.crashes for delivery in found.waiting.values()} == {0}
            assert {delivery.attempt for delivery in found.waiting.values()} == {1}

    assert await every_call(local, scenario) >= 8


async def test_a_block_with_a_worker_in_it_gets_every_job_done_whichever_call_breaks(
    local: NewBackend, a_world: NewWorld
) -> None:
    does = ["work", "fail", "work"]

    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            await world.published(*(world.job(does=what) for what in does))

            async def block() -> None:
                worker, consumer = world.worker()
                async with worker:
                    while len(world.ledger.effects) < 2 or not world.ledger.failed:
                        await consumer.effect.wait()
                        consumer.effect.clear()

            async with asyncio.timeout(PATIENCE):
                await insisting(block)
            ledger, found = world.ledger, await world.audit()
            # The last settlement of a drain that breaks is not tried again: its job is where it was.
            assert ledger.confirmed == ledger.effects.keys() | found.waiting.keys()
            assert {delivery.crashes for delivery in found.waiting.values()} == {0}
            assert found.dead == {}

    assert await every_call(local, scenario) >= 8


async def test_a_job_that_is_settled_before_it_runs_never_runs_twice_whichever_call_breaks(
    local: NewBackend, a_world: NewWorld, early: Callable[["World"], Any]
) -> None:
    async def scenario(backend: FailingAt) -> None:
        async with a_world(backend) as world:
            ids = await world.published(*(world.job() for _ in range(3)))
            world.ledger.perhaps_done.update(ids if backend.done else ())
            await until_it_ends(world, until_idle=True, consumer=early(world))
            found = await world.audit()
            assert all(count == 1 for count in world.ledger.started.values())
            assert found.waiting == {}
            assert backend.done or world.ledger.effects.keys() == {*ids}

    assert await every_call(local, scenario) >= 8
