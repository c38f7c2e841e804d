"""What lies on the server: its arguments for ever the same, and what of it somebody finds who did not declare it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import pytest
from aiormq.exceptions import ChannelPreconditionFailed

from mindtrace.jobs import (
    ConfigError,
    Dead,
    Delivery,
    Done,
    NotSupported,
    QueueFull,
    QueueMismatch,
    QueueNotFound,
    QueueSpec,
    RabbitMQBackend,
    Retry,
)
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.retry import MAX_DELAY
from mindtrace.jobs.wire import Message

if TYPE_CHECKING:
    from tests.rabbitmq.conftest import World

NewWorld = Callable[..., Awaitable["World"]]

pytestmark = [pytest.mark.anyio, pytest.mark.rabbitmq]

NO_LIMIT = 2**31 - 1
DEAD = {"x-queue-type": "quorum", "x-delivery-limit": NO_LIMIT, "x-overflow": "reject-publish"}
HOLD = DEAD | {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}


def a_message(**options: object) -> Message:
    return Message(new_job_id(), b"{}", **options)  # type: ignore[arg-type] (a test names what it needs)


async def is_declared_with(world: "World", queue: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a queue, by its name in the namespace, has just these arguments."""
    channel = await world.somebody.channel()
    try:
        await channel.queue_declare(f"{world.namespace}:{queue}", durable=True, arguments=dict(arguments))
    except ChannelPreconditionFailed:
        return False
    return True


# --- what is declared


async def test_every_queue_and_exchange_has_the_arguments_it_has_had_from_the_first_day(world: "World") -> None:
    """Whatever else its users ask for: what a queue is declared with must not depend on who comes first."""
    ns = world.namespace
    to_dead = {"x-dead-letter-exchange": "", "x-overflow": "reject-publish"}
    fifo = to_dead | {"x-queue-type": "quorum", "x-dead-letter-strategy": "at-least-once", "x-delivery-limit": 100}
    patient = await world.another(heartbeat=60, max_stall=None)
    for backend in (world.backend, patient):
        await backend.declare(QueueSpec(await world.queue("jobs")))
        await backend.declare(QueueSpec(await world.queue("urgent", "priority"), "priority"))
        await backend.declare(QueueSpec(await world.queue("few", "priority", 3), "priority", 3))
        await backend.publish("jobs", [a_message(delay=0.25, crash_limit=2)])
        async with backend.receiver(["jobs"], slots=7, lease=1.0, crash_limit=1, keep=False, strict=True) as receiver:
            [delivery] = await receiver.receive(1, wait=5)
            await receiver.settle([(delivery, Retry(0.0))])
            [delivery] = await receiver.receive(1, wait=5)
            await receiver.settle([(delivery, Done())])
    expected: dict[str, dict[str, Any]] = {
        "jobs": fifo | {"x-dead-letter-routing-key": f"{ns}:jobs.dead"},
        "urgent": to_dead | {"x-max-priority": 10, "x-dead-letter-routing-key": f"{ns}:urgent.dead"},
        "few": to_dead | {"x-max-priority": 3, "x-dead-letter-routing-key": f"{ns}:few.dead"},
        "0.hold": HOLD | {"x-message-ttl": 100, "x-dead-letter-exchange": f"{ns}:due"},
        "1.hold": HOLD | {"x-message-ttl": 200, "x-dead-letter-exchange": f"{ns}:0.hold"},
        **{f"{queue}.dead": DEAD for queue in ("jobs", "urgent", "few", "gone")},
    }
    for queue, arguments in expected.items():
        assert await is_declared_with(world, queue, arguments), queue
        for left_out in arguments:
            fewer = {name: value for name, value in arguments.items() if name != left_out}
            assert not await is_declared_with(world, queue, fewer), (queue, left_out)
    channel = await world.somebody.channel()
    for exchange, kind, arguments in (
        ("due", "topic", {"alternate-exchange": f"{ns}:gone"}),
        ("gone", "fanout", {}),
        ("priority", "direct", {}),
        ("0.hold", "topic", {}),
        ("1.hold", "topic", {}),
    ):
        await channel.exchange_declare(
            exchange=f"{ns}:{exchange}", exchange_type=kind, durable=True, arguments=dict(arguments)
        )
    assert await world.somebody.count("2.hold") is None


async def test_names_of_every_length_fit(rabbitmq_url: str, new_world: NewWorld) -> None:
    """The longest namespace and queue: declared, published to with and without a delay and a priority, and deleted."""
    world = await new_world(rabbitmq_url, "N" * 64)
    names = [await world.queue("q" * 128), await world.queue("p" * 128, "priority")]
    for name in names:
        messages = [a_message(), a_message(delay=0.1), a_message(delay=MAX_DELAY)]
        if name.startswith("p"):
            messages.append(a_message(priority=3))
        assert await world.backend.publish(name, messages) == ["stored"] * len(messages)
        await world.somebody.until(name, len(messages) - 1)
    assert await world.somebody.count(f"{LEVELS - 1}.hold") == 2


# --- what differs

SPECS = [
    QueueSpec("jobs"),
    QueueSpec("jobs", max_length=7),
    QueueSpec("jobs", "priority"),
    QueueSpec("jobs", "priority", 1),
    QueueSpec("jobs", "priority", 200),
    QueueSpec("jobs", "priority", 1, 1_000_000),
]


@pytest.mark.parametrize("there", SPECS, ids=lambda spec: f"{spec.kind}-{spec.priority_levels}-{spec.max_length}")
async def test_a_queue_that_another_process_declared_is_found_as_it_is(world: "World", there: QueueSpec) -> None:
    """Whoever asks for something else is told each difference, and nothing changes; attaching takes it as it is."""
    await world.queue(there.name, there.kind, there.priority_levels, there.max_length)
    for asked in SPECS:
        other = await world.another()
        if asked == there:
            await other.declare(asked)
        else:
            names = ("kind", "priority_levels", "max_length")
            differences = {
                name: (getattr(there, name), getattr(asked, name))
                for name in names
                if getattr(there, name) != getattr(asked, name)
            }
            with pytest.raises(QueueMismatch) as refused:
                await other.declare(asked)
            assert refused.value.differences == differences
            assert await other.queues() == []
            await other.declare(asked, attach=True)
        assert await other.queues() == [there]
        await other.declare(there)
    assert await world.backend.queues() == [there]


async def test_ten_levels_and_all_there_are_look_the_same_to_the_broker_and_differ_in_one_process(
    world: "World",
) -> None:
    await world.queue("jobs", "priority")
    ten = QueueSpec("jobs", "priority", 10)
    with pytest.raises(QueueMismatch):
        await world.backend.declare(ten)
    other = await world.another()
    await other.declare(ten)


OTHERS: dict[str, dict[str, Any]] = {
    "none": {},
    "another type": {"x-queue-type": "quorum"},
    "an expiry": {"x-expires": 600_000},
    "a limit of its own": {"x-max-length": 5},
    "another way to drop": {"x-max-length": 1020, "x-overflow": "drop-head"},
    "lazy": {"x-queue-mode": "lazy"},
    "priorities": {"x-max-priority": 5},
}


@pytest.mark.parametrize("arguments", OTHERS.values(), ids=OTHERS)
async def test_a_queue_of_somebody_else_is_refused_and_can_be_attached_to(
    world: "World", arguments: dict[str, Any]
) -> None:
    channel = await world.somebody.channel()
    await channel.queue_declare(f"{world.namespace}:jobs", durable=True, arguments=arguments)
    for spec in (QueueSpec("jobs"), QueueSpec("jobs", "priority", 5), QueueSpec("jobs", max_length=10)):
        with pytest.raises(QueueMismatch):
            await world.backend.declare(spec)
    await world.backend.declare(QueueSpec("jobs"), attach=True)
    assert await world.backend.publish("jobs", [message := a_message()]) == ["stored"]
    async with world.backend.receiver(["jobs"]) as receiver:
        [delivery] = await receiver.receive(1, wait=5)
        assert delivery.message == message
        assert await receiver.settle([(delivery, Done())]) == [None]
    await channel.queue_delete(f"{world.namespace}:jobs")


# --- what a queue that another process declared can do


async def taken(backend: RabbitMQBackend, queue: str) -> list[int]:
    """The priorities of what is there, in the order it comes."""
    async with backend.receiver([queue], slots=50) as receiver:
        deliveries = await receiver.receive(50)
        await receiver.settle([(delivery, Done()) for delivery in deliveries])
    return [delivery.message.priority for delivery in deliveries]


@pytest.mark.parametrize("known_by", ["nothing", "attach"])
async def test_a_priority_is_not_ignored_on_a_queue_that_another_process_declared(
    world: "World", known_by: str
) -> None:
    other = await world.another()
    await world.queue("plain")
    await world.queue("three", "priority", 3)
    await world.queue("all", "priority")
    if known_by == "attach":
        for name in ("plain", "three", "all"):
            await other.declare(QueueSpec(name), attach=True)
    for delay in (0.0, 0.1):
        outcomes = await other.publish("plain", [a_message(delay=delay), a_message(priority=1, delay=delay)])
        assert outcomes[0] == "stored"
        assert isinstance(outcomes[1], NotSupported)
        assert "plain" in str(outcomes[1])
        for name, most in (("three", 3), ("all", 10)):
            outcomes = await other.publish(
                name, [a_message(priority=each, delay=delay) for each in (0, most, most + 1, -1)]
            )
            assert outcomes[:2] == ["stored", "stored"]
            assert [type(outcome) for outcome in outcomes[2:]] == [ConfigError, ConfigError]
    for name, priorities in (("plain", [0, 0]), ("three", [3, 3, 0, 0]), ("all", [10, 10, 0, 0])):
        await world.somebody.until(name, len(priorities))
        assert await taken(other, name) == priorities


async def test_a_limit_holds_for_a_process_that_did_not_declare_the_queue(world: "World") -> None:
    await world.queue("jobs", max_length=3)
    other = await world.another()
    outcomes = await other.publish("jobs", [a_message() for _ in range(5)])
    assert outcomes[:3] == ["stored"] * 3
    assert [type(outcome) for outcome in outcomes[3:]] == [QueueFull, QueueFull]
    assert await world.somebody.count("jobs") == 3


async def test_a_limit_that_another_process_has_lifted_is_no_limit_any_more(world: "World") -> None:
    other = await world.another()
    await world.queue("jobs", max_length=2)
    assert await other.publish("jobs", [a_message(), a_message()]) == ["stored"] * 2
    [full] = await other.publish("jobs", [a_message()])
    assert isinstance(full, QueueFull)
    await world.backend.delete("jobs")
    await world.queue("jobs")
    async with asyncio.timeout(10):
        told: list[object] = []
        while len(told) < 5:
            told += [one for one in await other.publish("jobs", [a_message()]) if one == "stored"]


async def test_the_name_of_the_dead_letters_of_queues_that_are_gone_is_no_name_for_a_queue(world: "World") -> None:
    with pytest.raises(NotSupported, match="a queue called 'gone'"):
        await world.queue("gone")
    with pytest.raises(QueueNotFound):
        await world.backend.delete("gone", force=True)


async def test_a_queue_that_was_declared_anew_with_another_kind_is_found_again(world: "World") -> None:
    """The other process still believes what it knew; the broker does not let it ignore a priority."""
    other = await world.another()
    await world.queue("jobs", "priority")
    assert await other.publish("jobs", [a_message(priority=3)]) == ["stored"]
    await world.backend.delete("jobs")
    [outcome] = await other.publish("jobs", [a_message(priority=3)])
    assert isinstance(outcome, QueueNotFound)
    await world.queue("jobs")
    [outcome] = await other.publish("jobs", [a_message(priority=3)])
    assert isinstance(outcome, NotSupported)
    assert await other.publish("jobs", [a_message()]) == ["stored"]


@pytest.mark.parametrize("kind", ["fifo", "priority"])
async def test_what_is_stored_is_stored_on_disk_also_what_is_retried_or_dead(
    world: "World", kind: Literal["fifo", "priority"]
) -> None:
    """Which a quorum queue does in any case, and a classic one with messages that say so."""
    await world.queue("jobs", kind)
    await world.backend.publish("jobs", [a_message(), a_message()])
    async with world.backend.receiver(["jobs"], slots=2) as receiver:
        deliveries: list[Delivery] = []
        while len(deliveries) < 2:
            deliveries += await receiver.receive(2, wait=10.0)
        settlements = zip(deliveries, (Retry(0.0), Dead("rejected")), strict=True)
        assert await receiver.settle([*settlements]) == [None, None]
    await world.backend.publish("jobs", [a_message()])
    channel = await world.somebody.channel()
    for queue in ("jobs", "jobs", "jobs.dead"):
        got = await channel.basic_get(f"{world.namespace}:{queue}")
        assert got.header.properties.delivery_mode == 2
