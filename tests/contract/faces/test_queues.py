"""Declare, count, depth, clean and delete, through both faces."""

from collections.abc import Callable
from typing import Any

import pytest

from mindtrace.jobs import (
    ConfigError,
    Depth,
    Job,
    NotSupported,
    QueueInUse,
    QueueMismatch,
    QueueNotFound,
    QueueSpec,
    RetryPolicy,
)

pytestmark = pytest.mark.anyio


Known = Callable[[int, int, int, int], Depth]


def a_job(**fields: Any) -> Job:
    return Job(name="anything", schema_name="anything", **fields)


@pytest.fixture
async def parcels(jobs: Any) -> str:
    await jobs.declare(QueueSpec("parcels"))
    return "parcels"


async def with_a_dead_job(jobs: Any) -> None:
    await jobs.publish("parcels", a_job(id="dead"))
    await jobs.consume(jobs.consumer("run", lambda _: 1 / 0, "parcels", retry=False), 1)


async def refused_as_a_stack(jobs: Any, spec: QueueSpec) -> None:
    """Where there are no stacks, declaring one says so and makes nothing."""
    before = await jobs.queues()
    with pytest.raises(NotSupported, match="stack") as refused:
        await jobs.declare(spec)
    assert (refused.value.feature, refused.value.backend) == ("a stack queue", jobs.traits.name)
    assert refused.value.needs
    assert (refused.value.outcome, refused.value.retryable) == ("not_done", False)
    assert await jobs.queues() == before


SPECS = [
    QueueSpec("q"),
    QueueSpec("q", "priority"),
    QueueSpec("q", "priority", priority_levels=5),
    QueueSpec("q", "stack"),
    QueueSpec("q", max_length=7),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
async def test_declaring_the_same_again_keeps_the_queue_and_its_jobs(jobs: Any, spec: QueueSpec) -> None:
    if spec.kind == "stack" and not jobs.traits.stack:
        await refused_as_a_stack(jobs, spec)
        return
    await jobs.declare(spec)
    await jobs.publish("q", a_job())
    await jobs.declare(spec)
    assert await jobs.queues() == [spec]
    assert await jobs.count_queue_messages("q") == 1


@pytest.mark.parametrize(
    ("there", "asked", "differences"),
    [
        (QueueSpec("q"), QueueSpec("q", "stack"), {"kind": ("fifo", "stack")}),
        (QueueSpec("q", max_length=7), QueueSpec("q"), {"max_length": (7, None)}),
        (
            QueueSpec("q", "priority", 5),
            QueueSpec("q", "priority", 6, 7),
            {"priority_levels": (5, 6), "max_length": (None, 7)},
        ),
    ],
)
async def test_declaring_otherwise_is_a_mismatch_and_changes_nothing(
    jobs: Any, there: QueueSpec, asked: QueueSpec, differences: dict[str, Any]
) -> None:
    await jobs.declare(there)
    await jobs.publish("q", a_job())
    if asked.kind == "stack" and not jobs.traits.stack:
        await refused_as_a_stack(jobs, asked)
    else:
        with pytest.raises(QueueMismatch) as refused:
            await jobs.declare(asked)
        assert (refused.value.queue, refused.value.differences) == ("q", differences)
        assert (refused.value.outcome, refused.value.retryable) == ("not_done", False)
    assert await jobs.queues() == [there]
    assert await jobs.count_queue_messages("q") == 1


@pytest.mark.parametrize(
    "name", ["", "a b", "-a", ".a", "a:b", "a{b}", "a" * 129, "amq.a", "a.dead", "a.hold", "a.bell", "é"]
)
async def test_a_name_that_no_queue_may_have_is_a_value_error(jobs: Any, name: str) -> None:
    consumer = jobs.consumer_class(is_async=False)
    with pytest.raises(ValueError, match="queue name"):
        QueueSpec(name)
    if name:  # none at all is said when it is connected
        with pytest.raises(ConfigError, match="queue name"):
            consumer(name)


@pytest.mark.parametrize(
    "call", ["receive_message", "count_queue_messages", "depth", "clean", "delete"], ids=lambda call: call
)
async def test_a_queue_that_was_never_declared_is_not_found(jobs: Any, parcels: str, call: str) -> None:
    with pytest.raises(QueueNotFound) as refused:
        await getattr(jobs, call)("Parcels")  # case counts
    assert refused.value.queue == "Parcels"
    assert (refused.value.outcome, refused.value.retryable) == ("not_done", False)


async def test_depth_counts_by_state(jobs: Any, parcels: str, gate: Any, known: Known) -> None:
    await with_a_dead_job(jobs)
    await jobs.publish_many(parcels, [a_job() for _ in range(4)])
    await jobs.publish_many(parcels, [a_job() for _ in range(2)], delay=3600)
    async with jobs.consuming(jobs.consumer("run", lambda _: gate.enter(), parcels), 1):
        await gate.entered()
        assert await jobs.depth(parcels) == known(3, 2, 1, 1)
        assert await jobs.count_queue_messages(parcels) == 3
        gate.open()
    assert await jobs.depth(parcels) == known(3, 2, 0, 1)


async def test_clean_cancels_what_waits_and_leaves_what_is_leased_or_dead(
    jobs: Any, parcels: str, gate: Any, known: Known
) -> None:
    await with_a_dead_job(jobs)
    await jobs.publish_many(parcels, [a_job() for _ in range(4)])
    await jobs.publish(parcels, a_job(), delay=3600)
    async with jobs.consuming(jobs.consumer("run", lambda _: gate.enter(), parcels), 1):
        await gate.entered()
        assert await jobs.clean(parcels) == (4 if jobs.traits.exact_depth else 3)  # or none knows of the delayed one
        assert await jobs.depth(parcels) == known(0, 0, 1, 1)
        gate.open()
    assert await jobs.depth(parcels) == known(0, 0, 0, 1)
    assert await jobs.clean(parcels) == 0


async def test_a_job_that_was_running_during_a_clean_is_retried_all_the_same(
    jobs: Any, parcels: str, gate: Any
) -> None:
    def fail(_: Any) -> None:
        gate.enter()
        raise OSError("the door is shut")

    await jobs.publish(parcels, a_job(id="kept"))
    async with jobs.consuming(jobs.consumer("run", fail, parcels, retry=RetryPolicy(base=0.0)), 1):
        await gate.entered()
        assert await jobs.clean(parcels) == 0
        gate.open()
    assert (await jobs.receive_message(parcels))["id"] == "kept"


async def test_a_deleted_queue_is_gone_with_what_waited(jobs: Any, parcels: str, known: Known) -> None:
    await jobs.publish(parcels, a_job())
    await jobs.publish(parcels, a_job(), delay=3600)
    await jobs.delete(parcels)
    assert await jobs.queues() == []
    with pytest.raises(QueueNotFound):
        await jobs.publish(parcels, a_job())
    with pytest.raises(QueueNotFound):
        await jobs.delete(parcels)
    await jobs.declare(QueueSpec(parcels, "stack" if jobs.traits.stack else "priority"))
    assert await jobs.depth(parcels) == known(0, 0, 0, 0)


async def test_a_queue_with_dead_jobs_is_deleted_by_force_only(jobs: Any, parcels: str, known: Known) -> None:
    await with_a_dead_job(jobs)
    with pytest.raises(QueueInUse) as refused:
        await jobs.delete(parcels)
    assert (refused.value.queue, refused.value.counts) == (parcels, {"leased": 0, "dead": 1})
    assert await jobs.depth(parcels) == known(0, 0, 0, 1)
    await jobs.delete(parcels, force=True)
    await jobs.declare(QueueSpec(parcels))
    assert await jobs.depth(parcels) == known(0, 0, 0, 0)


async def test_a_queue_with_a_running_job_is_deleted_by_force_only_and_its_worker_is_told(
    jobs: Any, parcels: str, gate: Any
) -> None:
    async def delete_it_while_it_runs() -> None:
        async with jobs.consuming(jobs.consumer("run", lambda _: gate.enter(), parcels), 1):
            await gate.entered()
            with pytest.raises(QueueInUse) as refused:
                await jobs.delete(parcels)
            assert refused.value.counts == {"leased": 1, "dead": 0}
            await jobs.delete(parcels, force=True)
            gate.open()

    await jobs.publish(parcels, a_job())
    with pytest.raises(ExceptionGroup) as ended:
        await delete_it_while_it_runs()
    assert ended.group_contains(QueueNotFound)
    assert await jobs.queues() == []  # nothing brings it back to life
