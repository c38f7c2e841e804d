"""Declaring, counting, cleaning and deleting queues."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import (
    Backend,
    Closed,
    ConfigError,
    Dead,
    Delivery,
    Depth,
    Done,
    LeaseLost,
    NotSupported,
    QueueInUse,
    QueueMismatch,
    QueueNotFound,
    QueueSpec,
    Receiver,
    Release,
    Retry,
    Settlement,
)
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

pytestmark = pytest.mark.anyio

NewQueue = Callable[..., Awaitable[str]]
Known = Callable[[int, int, int, int], Depth]
UntilReady = Callable[[str, int], Awaitable[None]]


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def take(receiver: Receiver) -> Delivery:
    [delivery] = await receiver.receive(1, wait=5)
    return delivery


async def filled(backend: Backend, queue: str, receiver: Receiver) -> Delivery:
    """One job of each state, two that are ready; returns the leased one. The receiver needs two slots."""
    await backend.publish(queue, [a_message(), a_message(), a_message(), a_message(), a_message(delay=300)])
    dead, leased = await receiver.receive(2)
    await receiver.settle([(dead, Dead("rejected"))])
    return leased


# --- declare ----------------------------------------------------------------------------------------------------------

SPECS = [
    QueueSpec("q"),
    QueueSpec("q", "priority"),
    QueueSpec("q", "priority", priority_levels=3),
    QueueSpec("q", "priority", priority_levels=4),
    QueueSpec("q", max_length=5),
    QueueSpec("q", max_length=6),
]


@pytest.mark.parametrize("spec", SPECS)
async def test_declaring_the_same_again_changes_nothing(backend: Backend, spec: QueueSpec) -> None:
    await backend.declare(spec)
    await backend.publish("q", [a_message()])
    await backend.declare(QueueSpec(spec.name, spec.kind, spec.priority_levels, spec.max_length))
    assert await backend.queues() == [spec]
    assert (await backend.depth("q")).ready == 1


@pytest.mark.parametrize("there", SPECS)
@pytest.mark.parametrize("asked", SPECS)
async def test_declaring_otherwise_is_refused_and_changes_nothing(
    backend: Backend, there: QueueSpec, asked: QueueSpec
) -> None:
    if there == asked:
        return  # see above
    await backend.declare(there)
    await backend.publish("q", [a_message()])
    with pytest.raises(QueueMismatch) as raised:
        await backend.declare(asked)
    assert raised.value.queue == "q"
    assert raised.value.differences == {
        name: (getattr(there, name), getattr(asked, name))
        for name in ("kind", "priority_levels", "max_length")
        if getattr(there, name) != getattr(asked, name)
    }
    assert await backend.queues() == [there]
    assert (await backend.depth("q")).ready == 1


async def test_a_stack_is_declared_or_refused_at_once(backend: Backend) -> None:
    if backend.traits.stack:
        await backend.declare(QueueSpec("pile", "stack"))
        assert await backend.queues() == [QueueSpec("pile", "stack")]
    else:
        with pytest.raises(NotSupported) as raised:
            await backend.declare(QueueSpec("pile", "stack"))
        assert raised.value.backend == backend.traits.name
        assert await backend.queues() == []


async def test_attaching_leaves_what_is_there_and_declares_what_is_not(backend: Backend) -> None:
    await backend.declare(QueueSpec("q", "priority", priority_levels=3))
    await backend.declare(QueueSpec("q"), attach=True)
    await backend.declare(QueueSpec("new"), attach=True)
    assert sorted(await backend.queues(), key=lambda spec: spec.name) == [
        QueueSpec("new"),
        QueueSpec("q", "priority", priority_levels=3),
    ]


async def test_case_counts_in_a_name(backend: Backend) -> None:
    await backend.declare(QueueSpec("jobs"))
    await backend.declare(QueueSpec("Jobs", "priority"))
    await backend.publish("Jobs", [a_message(priority=1)])
    assert [(await backend.depth(name)).ready for name in ("jobs", "Jobs")] == [0, 1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True), min_size=1, max_size=3))
async def test_any_name_of_the_grammar_is_a_queue_of_its_own(backend: Backend, names: set[str]) -> None:
    if any(name.lower().startswith("amq.") or name.endswith((".dead", ".hold", ".bell")) for name in names):
        return  # reserved: see below
    for count, name in enumerate(sorted(names), 1):
        await backend.declare(QueueSpec(name))
        await backend.publish(name, [a_message() for _ in range(count)])
    for count, name in enumerate(sorted(names), 1):
        assert await backend.clean(name) == count
        await backend.delete(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".a", "-a", "_a", "a b", "a:b", "a{b}", "a/b", "a*", "ä", "a\n", "a\0", "x" * 129),  # the grammar
        *("amq.jobs", "jobs.dead", "jobs.hold", "jobs.bell"),  # reserved
    ],
)
async def test_a_name_that_could_reach_into_anothers_keys_is_no_queue(name: str) -> None:
    with pytest.raises(ConfigError):
        QueueSpec(name)


@pytest.mark.parametrize(
    "properties",
    [
        {"kind": "lifo"},
        {"priority_levels": 3},
        {"kind": "stack", "priority_levels": 3},
        {"kind": "priority", "priority_levels": 0},
        {"kind": "priority", "priority_levels": 1.5},
        {"max_length": 0},
        {"max_length": -1},
        {"max_length": True},
    ],
)
async def test_a_queue_of_nonsense_is_refused_before_anything_is_sent(properties: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        QueueSpec("q", **properties)  # type: ignore[arg-type]


# --- depth ------------------------------------------------------------------------------------------------------------


async def test_depth_counts_each_state(backend: Backend, queue: str) -> None:
    async with backend.receiver([queue], slots=2) as receiver:
        await filled(backend, queue, receiver)
        depth = await backend.depth(queue)
    assert (depth.ready, depth.dead) == (2, 1)
    assert depth.scheduled in (1, None)
    assert depth.leased in (1, None)


# --- clean ------------------------------------------------------------------------------------------------------------


async def test_clean_cancels_what_waits_and_nothing_else(backend: Backend, queue: str, known: Known) -> None:
    async with backend.receiver([queue], slots=2) as receiver:
        leased = await filled(backend, queue, receiver)
        cleaned = await backend.clean(queue)
        depth = await backend.depth(queue)
        if depth.scheduled is None:
            assert cleaned == 2  # it cannot reach the held ones
        else:
            assert cleaned == 3
            assert depth == known(0, 0, 1, 1)
        assert (depth.ready, depth.dead) == (0, 1)
        assert await backend.clean(queue) == 0
        assert await receiver.settle([(leased, Done())]) == [None]


@pytest.mark.parametrize(
    ("settlement", "ready"), [(Retry(0.0), 1), (Release(), 1), (Retry(300.0), 0), (Dead("rejected"), 0), (Done(), 0)]
)
async def test_a_job_that_was_leased_when_its_queue_was_cleaned_settles_as_ever(
    backend: Backend, queue: str, settlement: Settlement, ready: int
) -> None:
    await backend.publish(queue, [message := a_message(), a_message()])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        assert await backend.clean(queue) == 1
        assert await receiver.settle([(delivery, settlement)]) == [None]
        assert (await backend.depth(queue)).ready == ready
        if ready:
            assert (await take(receiver)).message == message


async def test_a_cleaned_queue_takes_new_jobs_in_order(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message() for _ in range(3)] + [a_message(delay=0.05)])
    await backend.clean(queue)
    messages = [a_message() for _ in range(3)]
    await backend.publish(queue, messages)
    async with backend.receiver([queue], slots=9) as receiver:
        assert [delivery.message for delivery in await receiver.receive(9)] == messages
        if backend.traits.exact_depth:  # else it cannot be reached where it waits
            assert await receiver.receive(1, wait=0.1) == []  # what was scheduled does not come back


async def test_clean_makes_room_in_a_full_queue(backend: Backend, new_queue: NewQueue) -> None:
    queue = await new_queue(max_length=1)
    await backend.publish(queue, [a_message()])
    await backend.clean(queue)
    assert await backend.publish(queue, [a_message()]) == ["stored"]


# --- delete -----------------------------------------------------------------------------------------------------------


async def test_delete_takes_what_waits_along(backend: Backend, queue: str, known: Known) -> None:
    await backend.publish(queue, [message := a_message(), a_message(delay=300)])
    await backend.delete(queue)
    assert await backend.queues() == []
    await backend.declare(QueueSpec(queue, "priority"))  # another kind, as nothing is left of the first
    assert await backend.depth(queue) == known(0, 0, 0, 0)
    assert await backend.publish(queue, [message]) == ["stored"]


async def test_delete_refuses_while_jobs_are_leased_or_dead(backend: Backend, queue: str) -> None:
    async with backend.receiver([queue], slots=2) as receiver:
        leased = await filled(backend, queue, receiver)
        before = await backend.depth(queue)
        with pytest.raises(QueueInUse) as raised:
            await backend.delete(queue)
        assert raised.value.queue == queue
        assert raised.value.counts["dead"] == 1
        if before.leased is not None:
            assert raised.value.counts["leased"] == 1
        assert await backend.depth(queue) == before
        await receiver.settle([(leased, Done())])
        with pytest.raises(QueueInUse):
            await backend.delete(queue)
        assert await backend.dead_letters(queue).purge([]) == 0
        for record in (await backend.dead_letters(queue).list(DeadFilter())).records:
            await backend.dead_letters(queue).purge([record.message.id])
    await backend.delete(queue)
    assert await backend.queues() == []


async def test_one_leased_job_is_enough_to_refuse_a_delete(backend: Backend, queue: str) -> None:
    await backend.publish(queue, [a_message()])
    async with backend.receiver([queue]) as receiver:
        delivery = await take(receiver)
        with pytest.raises(QueueInUse):
            await backend.delete(queue)
        assert await receiver.settle([(delivery, Done())]) == [None]
    await backend.delete(queue)


async def test_a_forced_delete_takes_everything_along(backend: Backend, queue: str, known: Known) -> None:
    told: asyncio.Queue[Delivery] = asyncio.Queue()
    async with backend.receiver([queue], slots=2, lost=told.put_nowait) as receiver:
        leased = await filled(backend, queue, receiver)
        await backend.delete(queue, force=True)
        assert await backend.queues() == []
        async with asyncio.timeout(5):
            assert await told.get() == leased
        await backend.declare(QueueSpec(queue))
        assert await backend.depth(queue) == known(0, 0, 0, 0)
        [lost] = await receiver.settle([(leased, Release())])
        assert isinstance(lost, LeaseLost)
        assert await backend.depth(queue) == known(0, 0, 0, 0)


async def test_deleting_one_queue_leaves_the_others(backend: Backend, new_queue: NewQueue) -> None:
    goes, stays = await new_queue(), await new_queue()
    await backend.publish(goes, [a_message()])
    await backend.publish(stays, [message := a_message()])
    await backend.delete(goes)
    async with backend.receiver([stays]) as receiver:
        assert (await take(receiver)).message == message


@pytest.mark.parametrize("how_many", [1, 3])
async def test_who_waits_for_a_queue_is_told_when_it_is_deleted(backend: Backend, queue: str, how_many: int) -> None:
    async def waits() -> None:
        async with backend.receiver([queue]) as receiver:
            with pytest.raises(QueueNotFound) as raised:
                await receiver.receive(1, wait=300)
            assert raised.value.queue == queue

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        for _ in range(how_many):
            tasks.create_task(waits())
        await asyncio.sleep(0)
        await backend.delete(queue)
    assert await backend.queues() == []  # nobody made it again


async def test_a_receiver_of_several_queues_names_the_missing_and_serves_the_rest(
    backend: Backend, new_queue: NewQueue
) -> None:
    stays, goes = await new_queue(), await new_queue()
    async with backend.receiver([goes, stays], slots=2) as receiver:
        await backend.delete(goes)
        await backend.publish(stays, [message := a_message()])
        exchanged = await receiver.exchange([], 2, wait=5)
        assert [delivery.message for delivery in exchanged.deliveries] == [message]
        assert exchanged.missing == (goes,)
        await backend.declare(QueueSpec(goes))  # by somebody else: then it is served again
        await backend.publish(goes, [message := a_message()])
        exchanged = await receiver.exchange([], 2, wait=5)
        assert [delivery.message for delivery in exchanged.deliveries] == [message]
        assert exchanged.missing == ()


# --- what is not there ------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Backend], Awaitable[object]]] = {
    "depth": lambda backend: backend.depth("jobs"),
    "clean": lambda backend: backend.clean("jobs"),
    "delete": lambda backend: backend.delete("jobs"),
    "delete by force": lambda backend: backend.delete("jobs", force=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("deleted", [True, False])
async def test_a_queue_that_is_not_there_is_said_to_be_missing(
    backend: Backend, call: Callable[[Backend], Awaitable[object]], deleted: bool
) -> None:
    if deleted:
        await backend.declare(QueueSpec("jobs"))
        await backend.delete("jobs")
    with pytest.raises(QueueNotFound) as raised:
        await call(backend)
    assert (raised.value.queue, raised.value.outcome) == ("jobs", "not_done")


async def test_receiving_from_a_queue_that_is_not_there_does_not_wait(backend: Backend) -> None:
    async with backend.receiver(["nowhere"]) as receiver, asyncio.timeout(10):
        with pytest.raises(QueueNotFound):
            await receiver.receive(1, wait=300)


async def _enter_a_receiver(backend: Backend) -> None:
    async with backend.receiver(["jobs"]) as receiver:
        await receiver.receive(1)


@pytest.mark.parametrize(
    "call",
    [
        *CALLS.values(),
        lambda backend: backend.declare(QueueSpec("jobs")),
        lambda backend: backend.queues(),
        lambda backend: backend.publish("jobs", []),
        _enter_a_receiver,
    ],
    ids=[*CALLS.keys(), "declare", "queues", "publish", "receiver"],
)
async def test_a_closed_backend_says_so(
    backend: Backend, queue: str, call: Callable[[Backend], Awaitable[object]]
) -> None:
    await backend.aclose()
    with pytest.raises(Closed):
        await call(backend)
