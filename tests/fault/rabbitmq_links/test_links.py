"""A line that is silent, a queue that goes away, a line lost again and again."""

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiormq
import pytest

from mindtrace.jobs import (
    BackendUnavailable,
    Dead,
    Delivery,
    Done,
    LeaseLost,
    QueueFull,
    QueueNotFound,
    QueueSpec,
    RabbitMQBackend,
    Receiver,
    Release,
    Retry,
    Settlement,
)
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.proxy import Amqp, FaultProxy
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.rabbitmq, pytest.mark.chaos]

Opened = Callable[..., Awaitable[RabbitMQBackend]]
Ctl = Callable[[str], Awaitable[None]]
HEARTBEAT = 2
MEMORY = "{resource_limit, memory, node()}"


def messages(*ids: str, **options: Any) -> list[Message]:
    return [Message(job_id, b"{}", **options) for job_id in ids]


async def silent(broker: Broker, opened: Opened, ways: str) -> None:
    """The lease is lost and told of in time, the backend ends in time, and the job comes again as a crash."""
    async with FaultProxy.to(broker.url, wire=Amqp) as proxy:
        backend = await opened(proxy, heartbeat=HEARTBEAT)
        queue = f"silent-{ways.replace(' ', '-')}"
        await backend.declare(QueueSpec(queue))
        await backend.publish(queue, messages("a"))
        lost: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        async with backend.receiver([queue], lost=lost.set_result) as receiver:
            [delivery] = await receiver.receive(1, wait=5.0)
            for way in ways.split():
                getattr(proxy, way).black_hole()
            async with asyncio.timeout(3 * HEARTBEAT + 2):
                assert await lost is delivery
            assert delivery.lost
            assert [type(one) for one in await receiver.settle([(delivery, Done())])] == [LeaseLost]
            started = time.monotonic()
            await backend.aclose()
            assert time.monotonic() - started < 5.0
    straight = await opened()
    async with straight.receiver([queue]) as receiver, asyncio.timeout(15):
        while not (taken := await receiver.receive(1, wait=5.0)):
            pass
        assert [(one.message.id, one.crashes) for one in taken] == [("a", 1)]
        assert await receiver.settle([(taken[0], Done())]) == [None]
    await straight.delete(queue, force=True)


async def test_a_silent_line_is_found_by_its_heartbeats_and_the_job_comes_again(broker: Broker, opened: Opened) -> None:
    async with asyncio.TaskGroup() as group:
        for ways in ("up", "down", "up down"):
            group.create_task(silent(broker, opened, ways))


async def quiet(broker: Broker, opened: Opened, ways: str, seconds: float) -> None:
    """What is in flight ends as it says it does, no lease is lost, and all goes on once the line is well."""
    queue = f"quiet-{ways.replace(' ', '-')}-{seconds:g}"
    async with FaultProxy.to(broker.url, wire=Amqp) as proxy, asyncio.timeout(seconds + 40):
        backend, straight = await opened(proxy), await opened()
        await backend.declare(QueueSpec(queue))
        lost = list[Delivery]()
        async with (
            backend.receiver([queue], slots=3, lost=lost.append) as holds,
            backend.receiver([queue], lost=lost.append) as waits,
            backend.receiver([queue]) as asks,
        ):
            await backend.publish(queue, messages("first"))
            [first] = await asks.receive(1)
            assert await asks.settle([(first, Retry(0.0))]) == [None]  # so that all four connections are there
            [first] = await asks.receive(1, wait=5.0)
            assert await asks.settle([(first, Done())]) == [None]
            await backend.publish(queue, messages("held", "done", "retried"))
            held, done, retried = await holds.receive(3)
            consumers = proxy.replies.count(b"BASIC.CONSUME-OK")
            waiting = asyncio.create_task(waits.receive(1, wait=300.0))
            while proxy.replies.count(b"BASIC.CONSUME-OK") == consumers:  # noqa: ASYNC110 (a list tells nobody)
                await asyncio.sleep(0.01)

            for way in ways.split():
                getattr(proxy, way).black_hole()
            asyncio.get_running_loop().call_later(seconds, proxy.calm)
            started, ended = time.monotonic(), dict[str, float]()

            async def timed(name: str, call: Awaitable[Any]) -> Any:
                try:
                    return await call
                except BackendUnavailable as error:
                    return error
                finally:
                    ended[name] = time.monotonic() - started

            depth, asked, [published], settled = await asyncio.gather(
                timed("depth", backend.depth(queue)),
                timed("receive", asks.receive(1)),
                timed("publish", backend.publish(queue, messages("published"))),
                timed("settle", holds.settle([(done, Done()), (retried, Retry(0.0))])),
            )
            assert (type(depth), type(asked), settled[0]) == (BackendUnavailable, BackendUnavailable, None)
            assert max(ended["depth"], ended["receive"]) < 5.0 + 2.0
            assert max(ended["publish"], ended["settle"]) < 10.0 + 2.0
            if seconds < 10.0:
                assert (published, settled[1]) == ("stored", None)
            else:
                assert isinstance(published, BackendUnavailable)
                assert published.maybe_published
                assert isinstance(settled[1], BackendUnavailable)

            wanted, seen = {"retried", "last"} | ({"published"} if published == "stored" else set[str]()), set[str]()
            taken = await waiting
            [stored] = await backend.publish(queue, messages("last"))
            assert (stored, lost) == ("stored", [])
            while not wanted <= (seen := seen | {one.message.id for one in taken}):
                assert await waits.settle([(one, Done()) for one in taken]) == [None] * len(taken)
                taken = await waits.receive(1, wait=5.0)
            assert await waits.settle([(one, Done()) for one in taken]) == [None] * len(taken)
            assert await holds.settle([(held, Done())]) == [None]
            assert seen <= {"retried", "last", "published"}
            assert lost == []
        await straight.delete(queue, force=True)


@pytest.mark.parametrize("seconds", [7.0, 13.0])
async def test_a_silence_that_is_shorter_than_three_heartbeats_costs_no_lease_and_no_job(
    broker: Broker, opened: Opened, seconds: float
) -> None:
    """Longer than a call may take, and longer than a publish may."""
    async with asyncio.TaskGroup() as group:
        for ways in ("up", "down", "up down"):
            group.create_task(quiet(broker, opened, ways, seconds))


async def test_a_queue_deleted_under_its_consumer_is_missed_not_made_again(
    broker: Broker, namespace: str, opened: Opened
) -> None:
    """And what runs is told, while the leases on jobs of another queue live on."""
    backend = await opened()
    await backend.declare(QueueSpec("other"))
    lost: list[Delivery] = []
    async with backend.receiver(["jobs"], slots=2, lost=lost.append) as first, backend.receiver(["other"]) as second:
        waiting = asyncio.create_task(first.receive(1, wait=20.0))
        async with asyncio.timeout(10):
            async with aiormq.connect(broker.url) as connection:
                channel = await connection.channel()
                while not (await channel.queue_declare(f"{namespace}:jobs", passive=True)).consumer_count:
                    pass
                await backend.publish("jobs", messages("a"))
                await backend.publish("other", messages("b"))
                [running] = await waiting
                [other] = await second.receive(1, wait=5.0)
                waiting = asyncio.create_task(first.exchange([], 1, wait=20.0))
                await channel.queue_delete(f"{namespace}:jobs")
            assert (await waiting).missing == ("jobs",)
            while not lost:  # noqa: ASYNC110 (a list tells nobody)
                await asyncio.sleep(0.01)
        assert lost == [running]
        assert [type(one) for one in await first.settle([(running, Done())])] == [LeaseLost]
        assert (await first.exchange([], 1)).missing == ("jobs",)
        [outcome] = await backend.publish("jobs", messages("c"))
        assert isinstance(outcome, QueueNotFound)
        with pytest.raises(QueueNotFound):
            await backend.depth("jobs")
        assert await second.settle([(other, Done())]) == [None]


async def test_a_job_whose_get_is_answered_too_late_is_another_receivers(proxy: FaultProxy, opened: Opened) -> None:
    """It was handed to a call that has given up; and who gave up receives again once the line is well."""
    backend, another = await opened(proxy), await opened()
    await another.publish("jobs", messages("a"))

    async def hold_back() -> None:
        proxy.down.black_hole()

    async with backend.receiver(["jobs"]) as receiver, another.receiver(["jobs"]) as second, asyncio.timeout(30):
        proxy.before(1, hold_back, of=lambda name: name == b"BASIC.GET")
        with pytest.raises(BackendUnavailable, match="no answer from RabbitMQ within 5 s"):
            await receiver.receive(1)
        [delivery] = await second.receive(1, wait=5.0)
        assert (delivery.message.id, delivery.attempt, delivery.crashes) == ("a", 2, 1)
        proxy.down.flow()
        assert await second.settle([(delivery, Done())]) == [None]
        await another.publish("jobs", messages("b"))
        [delivery] = await receiver.receive(1, wait=5.0)
        assert (delivery.message.id, delivery.crashes) == ("b", 0)
        assert await receiver.settle([(delivery, Done())]) == [None]
        assert (await another.depth("jobs")).ready == 0


async def test_what_was_done_outlasts_its_receiver_though_its_queue_is_slow_to_write_it_down(
    namespace: str, opened: Opened, ctl: Ctl
) -> None:
    """Of 40 acknowledgements the channel passes on 33, and 7 wait in it when the receiver is left.

    Another queue that it takes from is gone by then.
    """
    backend, another = await opened(), await opened()
    await backend.declare(QueueSpec("other"))
    await backend.publish("jobs", messages(*(f"{n}" for n in range(40))))
    async with backend.receiver(["other", "jobs"], slots=40) as receiver, asyncio.timeout(20):
        deliveries = list[Delivery]()
        while len(deliveries) < 40:
            deliveries += await receiver.receive(40, wait=5.0)
        await another.delete("other")
        await ctl(
            f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{namespace}:jobs">>)),'
            " {Name, _} = amqqueue:get_pid(Q), sys:suspend(Name),"
            " spawn(fun() -> timer:sleep(2000), sys:resume(Name) end)"
        )
        assert await receiver.settle([(delivery, Done()) for delivery in deliveries]) == [None] * 40
    await another.publish("jobs", messages("last"))  # behind whatever has come back
    async with another.receiver(["jobs"], slots=41) as receiver:
        assert [one.message.id for one in await receiver.receive(41, wait=5.0)] == ["last"]


async def test_an_exchange_that_is_gone_costs_neither_the_connection_nor_a_lease(
    broker: Broker, namespace: str, opened: Opened
) -> None:
    """The server closes the channel for it, 404: a new one takes its place."""
    backend = await opened()
    await backend.declare(QueueSpec("other", "priority"))
    async with backend.receiver(["jobs"]) as receiver:
        await backend.publish("jobs", messages("a"))
        [held] = await receiver.receive(1, wait=5.0)
        assert await backend.publish("other", messages("x", priority=1)) == ["stored"]
        async with aiormq.connect(broker.url) as connection:
            channel = await connection.channel()
            await channel.exchange_delete(f"{namespace}:priority")
        outcomes = await asyncio.gather(
            backend.publish("other", messages("y", priority=1)), *(backend.publish("jobs", messages(n)) for n in "bcd")
        )
        assert outcomes[0] != ["stored"]
        assert outcomes[1:] == [["stored"]] * 3
        assert await receiver.settle([(held, Done())]) == [None]
        assert not held.lost


async def test_a_full_queue_is_full_for_who_did_not_declare_it_too(opened: Opened) -> None:
    backend, another = await opened(), await opened()
    await backend.declare(QueueSpec("other", max_length=2))
    outcomes = await backend.publish("other", messages("a", "b", "c"))
    assert [type(one) for one in outcomes] == [str, str, QueueFull]
    [outcome] = await another.publish("other", messages("d"))
    assert isinstance(outcome, QueueFull)
    assert outcome.args == QueueFull("other", 2).args
    assert (await backend.depth("other")).ready == 2


async def test_fifty_lost_lines_leave_nothing_behind(proxy: FaultProxy, opened: Opened) -> None:
    backend = await opened(proxy)
    async with backend.receiver(["jobs"]) as receiver, asyncio.timeout(50):

        async def once(name: str) -> None:
            """A job that comes, is tried again, and done: by way of all four connections."""
            assert await backend.publish("jobs", messages(name)) == ["stored"]
            while True:
                try:
                    taken = await receiver.receive(1, wait=5.0)
                except BackendUnavailable:
                    continue
                if not taken:
                    continue
                last = taken[0].message.id == name and taken[0].attempt > 1
                settlement = Done() if last or taken[0].message.id != name else Retry(0.0)
                if await receiver.settle([(taken[0], settlement)]) == [None] and last:
                    break

        def there() -> tuple[int, int, int, int]:
            return len(asyncio.all_tasks()), threading.active_count(), len(os.listdir("/dev/fd")), proxy.connections

        await once("first")
        before, accepted = there(), proxy.accepted
        assert proxy.connections == 4
        number = 0
        while proxy.accepted < accepted + 50:
            proxy.reset()
            await once(str(number := number + 1))
        while there() != before:  # noqa: ASYNC110 (a number tells nobody)
            await asyncio.sleep(0.01)


async def test_a_server_out_of_memory_stores_nothing_and_still_hears_what_is_done(
    broker: Broker, opened: Opened, ctl: Ctl
) -> None:
    backend = await opened()
    async with backend.receiver(["jobs"]) as receiver:
        assert await backend.publish("jobs", messages("a")) == ["stored"]
        [delivery] = await receiver.receive(1, wait=5.0)
        await ctl("vm_memory_monitor:set_vm_memory_high_watermark(0.000001)")
        try:
            started = time.monotonic()
            publishing = asyncio.create_task(backend.publish("jobs", messages("b")))
            assert await receiver.settle([(delivery, Done())]) == [None]
            [outcome] = await publishing
            assert 9.0 < time.monotonic() - started < 12.0
        finally:
            await ctl("vm_memory_monitor:set_vm_memory_high_watermark(0.8)")
        assert isinstance(outcome, BackendUnavailable)
        assert outcome.maybe_published
        assert list(outcome.job_ids) == ["b"]
        assert "blocks publishers" in str(outcome)
        async with asyncio.timeout(15):
            while not (taken := await receiver.receive(2, wait=5.0)):
                pass
        assert {one.message.id for one in taken} == {"b"}
        assert await receiver.settle([(one, Done()) for one in taken]) == [None] * len(taken)
        assert await backend.publish("jobs", messages("c")) == ["stored"]


@pytest.mark.parametrize("settlement", [Retry(0.0), Retry(0.5), Dead("rejected"), Release()], ids=repr)
async def test_a_job_is_not_acknowledged_before_its_copy_is_stored(
    proxy: FaultProxy, opened: Opened, ctl: Ctl, settlement: Settlement
) -> None:
    """Whoever dies between the two leaves the original."""
    dies, backend = await opened(proxy), await opened()
    await backend.publish("jobs", messages("a"))
    async with dies.receiver(["jobs"]) as receiver:
        [delivery] = await receiver.receive(1, wait=5.0)
        await ctl(f"rabbit_alarm:set_alarm({{{MEMORY}, []}})")  # what is published now is not even read
        try:
            settling = asyncio.create_task(receiver.exchange([(delivery, settlement)], 0))
            await asyncio.sleep(1)
            assert not settling.done()
            proxy.refuse()
            proxy.reset()
            await asyncio.sleep(0.5)
        finally:
            await ctl(f"rabbit_alarm:clear_alarm({MEMORY})")
        settling.cancel()
        async with asyncio.timeout(15), backend.receiver(["jobs"]) as another:
            while not (taken := await another.receive(1, wait=1.0)):
                pass
            assert [one.message.id for one in taken] == ["a"]
            assert await another.settle([(taken[0], Done())]) == [None]


async def test_an_alarm_multiplies_no_job_that_fails_in_it_or_whose_worker_died(
    proxy: FaultProxy, opened: Opened, ctl: Ctl
) -> None:
    """Their copies wait until it is over; given back meanwhile they would be run again, and copied again.

    What waits so takes up its slot.
    """
    runs: list[tuple[str, int, int]] = []
    over = asyncio.Event()

    async def work(receiver: Receiver) -> None:
        while not over.is_set():
            with suppress(BackendUnavailable):
                for delivery in await receiver.receive(1, wait=0.5):
                    runs.append((delivery.message.id, delivery.attempt, delivery.crashes))
                    fails = delivery.message.id == "fails" and delivery.attempt == 1
                    await receiver.settle([(delivery, Retry(0.0) if fails else Done())])

    backend, dies = await opened(), await opened(proxy)
    await backend.publish("jobs", messages("dies"))
    async with dies.receiver(["jobs"]) as receiver:
        assert len(await receiver.receive(1, wait=5.0)) == 1
        proxy.refuse()
        proxy.reset()
    await backend.publish("jobs", messages("fails", "third"))
    await ctl("vm_memory_monitor:set_vm_memory_high_watermark(0.000001)")
    try:
        async with backend.receiver(["jobs"]) as receiver, asyncio.TaskGroup() as group:
            group.create_task(work(receiver))
            await asyncio.sleep(15)  # for longer than anybody waits for a copy
            assert runs == [("fails", 1, 0)]
            await ctl("vm_memory_monitor:set_vm_memory_high_watermark(0.8)")
            async with asyncio.timeout(15):
                while len(runs) < 4:  # noqa: ASYNC110 (a list tells nobody)
                    await asyncio.sleep(0.05)
            await asyncio.sleep(2)  # for what must not come
            over.set()
    finally:
        await ctl("vm_memory_monitor:set_vm_memory_high_watermark(0.8)")
    assert sorted(runs) == [("dies", 2, 1), ("fails", 1, 0), ("fails", 2, 0), ("third", 1, 0)]
    assert (await backend.depth("jobs")).ready == 0


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("limit", "looks_every"), [(3.0, 0.5), (8.0, 60.0)])
async def test_a_run_that_takes_longer_than_the_server_allows_loses_its_lease(
    broker: Broker, opened: Opened, ctl: Ctl, limit: float, looks_every: float
) -> None:
    """The server closes the channel at its next look, one a minute; who comes next gets the job as one that crashed."""

    async def configure(limit: float, looks_every: float) -> None:
        values = f"[{{consumer_timeout, {limit * 1000:.0f}}}, {{channel_tick_interval, {looks_every * 1000:.0f}}}]"
        await ctl(f"[application:set_env(rabbit, K, V) || {{K, V}} <- {values}]")

    await configure(limit, looks_every)
    try:
        backend, another = await opened(), await opened()
        await backend.publish("jobs", messages("a"))
        lost: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        async with backend.receiver(["jobs"], lost=lost.set_result) as receiver:
            async with asyncio.timeout(limit + 2 * looks_every + 15):
                [delivery] = await receiver.receive(1, wait=5.0)
                assert await lost is delivery
            assert [type(one) for one in await receiver.settle([(delivery, Done())])] == [LeaseLost]
            async with another.receiver(["jobs"]) as second, asyncio.timeout(15):
                while not (taken := await second.receive(1, wait=5.0)):
                    pass
                assert [(one.message.id, one.crashes, one.attempt) for one in taken] == [("a", 1, 2)]
                assert await second.settle([(taken[0], Done())]) == [None]
    finally:
        await configure(1800.0, 60.0)


async def test_a_publish_ends_in_time_also_where_the_loop_stands_still_again_and_again(
    proxy: FaultProxy, opened: Opened
) -> None:
    backend = await opened(proxy)
    assert await backend.publish("jobs", messages("before")) == ["stored"]
    proxy.refuse()
    proxy.reset()
    publishing = asyncio.create_task(backend.publish("jobs", messages("a")))
    for _ in range(20):
        time.sleep(1.2)  # noqa: ASYNC251 (which nobody should do)
        await asyncio.sleep(0)
        if publishing.done():
            break
    assert publishing.done()
    assert [type(outcome) for outcome in await publishing] == [BackendUnavailable]


async def test_an_outage_of_seven_seconds_costs_no_publish_whatever_it_has_to_look_up_first(
    proxy: FaultProxy, opened: Opened
) -> None:
    backend, fresh = await opened(proxy), await opened(proxy)
    await backend.declare(QueueSpec("other", max_length=10))
    await fresh.aclose()
    await fresh.open()  # and knows of no queue
    proxy.refuse()
    proxy.reset()
    publishing = asyncio.gather(
        backend.publish("jobs", messages("plain")),
        backend.publish("jobs", messages("delayed", delay=0.1)),
        backend.publish("other", messages("bounded")),
        fresh.publish("jobs", messages("first")),
    )
    await asyncio.sleep(7)
    proxy.accept()
    assert await publishing == [["stored"]] * 4
