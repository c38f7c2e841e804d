"""Delayed jobs are looked through after a restart, by workers that may not or while RabbitMQ takes nothing."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import aiormq
import pytest
from aiormq.abc import AbstractChannel
from pamqp import commands

from mindtrace.jobs import Done, RabbitMQBackend
from mindtrace.jobs.backends.rabbitmq.counts import NEW, headers_of
from mindtrace.jobs.backends.rabbitmq.topology import Topology
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.rabbitmq, pytest.mark.chaos]

Ctl = Callable[[str], Awaitable[str]]
Opened = Callable[..., Awaitable[RabbitMQBackend]]

MEMORY = "{resource_limit, memory, node()}"
PATIENCE = 20.0


@pytest.fixture
async def channel(broker: Broker) -> AsyncIterator[AbstractChannel]:
    async with aiormq.connect(broker.url) as connection:
        yield await connection.channel()


async def late(channel: AbstractChannel, namespace: str, backend: RabbitMQBackend, count: int) -> set[str]:
    """Jobs that a restart has made late: they were due seconds ago, and would come in 100."""
    ids = {new_job_id() for _ in range(count)}
    await backend.publish("jobs", [Message(new_job_id(), b"{}", delay=100)])  # which makes the levels
    exchange, key = Topology(namespace).delayed("jobs", 1000)
    for job_id in ids:
        made = commands.Basic.Properties(headers=headers_of(job_id, NEW, due=time.time() - 5), delivery_mode=2)
        await channel.basic_publish(b"{}", exchange=exchange, routing_key=key, properties=made)
    await channel.exchange_delete(f"{namespace}:up.hold")  # as a restart does
    return ids


async def kept(channel: AbstractChannel, queue: str) -> int | None:
    """How many are ready in it."""
    return (await channel.queue_declare(queue, passive=True)).message_count


async def test_while_rabbitmq_blocks_publishers_delayed_jobs_wait_and_none_is_put_twice(
    opened: Opened, channel: AbstractChannel, namespace: str, ctl: Ctl
) -> None:
    """For longer than anybody else would wait for a confirmation."""
    backend = await opened()
    ids = await late(channel, namespace, backend, 300)
    await ctl(f"rabbit_alarm:set_alarm({{{MEMORY}, []}})")
    try:
        async with backend.receiver(["jobs"], slots=100) as receiver:
            assert await receiver.receive(1, wait=12) == []
            await ctl(f"rabbit_alarm:clear_alarm({MEMORY})")
            came = list[str]()
            async with asyncio.timeout(PATIENCE):
                while len(came) < len(ids):
                    deliveries = await receiver.receive(100, wait=1)
                    came += [delivery.message.id for delivery in deliveries]
                    await receiver.settle([(delivery, Done()) for delivery in deliveries])
    finally:
        await ctl(f"rabbit_alarm:clear_alarm({MEMORY})")
    assert sorted(came) == sorted(ids)
    async with asyncio.timeout(PATIENCE):
        while await kept(channel, f"{namespace}:9.hold") != 1:  # noqa: ASYNC110 (a count rings no bell)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("write", "read"), [(".*", ":jobs$"), (r"^amq\\.default$", ".*")], ids=["takes none out", "puts none back"]
)
async def test_a_worker_that_may_not_look_through_delayed_jobs_leaves_the_turn_to_others(
    opened: Opened,
    channel: AbstractChannel,
    namespace: str,
    broker: Broker,
    ctl: Ctl,
    caplog: pytest.LogCaptureFixture,
    write: str,
    read: str,
) -> None:
    caplog.set_level("WARNING", logger="mindtrace.jobs")
    backend = await opened()
    [job_id] = await late(channel, namespace, backend, 1)
    internal, user = "rabbit_auth_backend_internal", f'<<"{namespace}">>'
    await ctl(f'{internal}:add_user({user}, <<"few">>, <<"test">>)')
    await ctl(f'{internal}:set_permissions({user}, <<"/">>, <<".*">>, <<"{write}">>, <<"{read}">>, <<"test">>)')
    few = RabbitMQBackend("127.0.0.1", urlsplit(broker.url).port, namespace, "few", namespace=namespace)
    await few.open()
    try:
        async with few.receiver(["jobs"]) as one:
            while "may be late" not in caplog.text:
                assert await one.receive(1, wait=0.1) == []
            async with backend.receiver(["jobs"]) as other:
                [delivery] = await other.receive(1, wait=PATIENCE) or await one.receive(1)
                assert delivery.message.id == job_id
    finally:
        await few.aclose()
        await ctl(f'{internal}:delete_user({user}, <<"test">>)')
