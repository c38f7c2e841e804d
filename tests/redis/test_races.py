"""What happens between two moments: calls that meet, answers that come late, a server that stands still."""

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from mindtrace.jobs import (
    BackendUnavailable,
    Closed,
    ConfigError,
    Done,
    LeaseLost,
    QueueFull,
    QueueSpec,
    RedisBackend,
    Retry,
)
from mindtrace.jobs.testing import FaultProxy, brokers
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

Opened = Callable[..., AbstractAsyncContextManager[RedisBackend]]


def messages(*ids: str) -> list[Message]:
    return [Message(job_id, b"{}") for job_id in ids]


@pytest.fixture
def broker() -> Iterator[Broker]:
    """One that may be stopped."""
    with brokers.redis(private=True) as broker:
        yield broker


@pytest.fixture
def opened(namespace: str) -> Opened:
    """A further backend of the same namespace, with a queue `jobs`."""

    @asynccontextmanager
    async def further(url: str, **options: Any) -> AsyncIterator[RedisBackend]:
        backend = RedisBackend.from_url(url, namespace=namespace, **options)
        await backend.open()
        try:
            await backend.declare(QueueSpec("jobs"), attach=True)
            yield backend
        finally:
            await backend.aclose()

    return further


async def scripts_called(server: Redis) -> int:
    stats: dict[str, Any] = await server.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


# --- one call to a queue in flight


async def test_more_settlements_than_one_call_takes_are_each_done_though_every_reply_is_lost(
    redis_url: str, opened: Opened
) -> None:
    async with FaultProxy.to(redis_url) as proxy, opened(proxy.url(redis_url)) as backend:
        await backend.publish("jobs", messages(*(f"j{n}" for n in range(500))))
        await backend.publish("jobs", messages(*(f"k{n}" for n in range(200))))
        async with backend.receiver(["jobs"], slots=700, keep=False) as receiver:
            taken = await receiver.receive(500)
            while len(taken) < 700:
                taken += await receiver.receive(700 - len(taken))
            trap = proxy.cut_reply(1)
            assert await receiver.settle([(delivery, Done()) for delivery in taken]) == [None] * 700
            assert trap.struck == b"EVALSHA"


async def test_a_settlement_behind_a_claim_that_nobody_waits_for_is_no_lost_lease(
    broker: Broker, opened: Opened
) -> None:
    """Both are on their way when the server stands still; and what the claim took is the next call's."""
    async with opened(broker.url) as backend:
        await backend.publish("jobs", messages("a", "b"))
        async with backend.receiver(["jobs"], slots=10) as receiver:
            taken = await receiver.receive(2)
            await backend.publish("jobs", messages("c", "d"))
            broker.stop()
            claim = asyncio.create_task(receiver.receive(5))
            await asyncio.sleep(0.05)
            claim.cancel()
            settling = asyncio.create_task(receiver.settle([(delivery, Done()) for delivery in taken]))
            await asyncio.sleep(0.05)
            broker.cont()
            assert await settling == [None, None]
            found = await receiver.receive(5)
            assert sorted(delivery.message.id for delivery in found) == ["c", "d"]
            assert (await backend.depth("jobs")).leased == 2


async def test_what_cannot_be_settled_is_said_and_harms_no_other_settlement(backend: RedisBackend, queue: str) -> None:
    await backend.publish(queue, messages("a", "b"))
    async with backend.receiver([queue], slots=2) as receiver:
        a, b = await receiver.receive(2)
        unfit: Any = Retry("soon")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            await receiver.settle([(a, unfit)])
        assert await receiver.settle([(b, Done()), (a, Done())]) == [None, None]


# --- publishes


async def test_the_calls_of_one_tick_are_one_script(backend: RedisBackend, queue: str, server: Redis) -> None:
    before = await scripts_called(server)
    outcomes = await asyncio.gather(*(backend.publish(queue, messages(f"j{n}")) for n in range(100)))
    assert outcomes == [["stored"]] * 100
    assert await scripts_called(server) == before + 1


async def test_a_job_that_fits_is_not_refused_for_another_callers(
    backend: RedisBackend, server: Redis, namespace: str
) -> None:
    await backend.declare(QueueSpec("small", max_length=3))
    await backend.publish("small", messages("a"))
    outcomes = await asyncio.gather(
        backend.publish("small", messages("b")),
        backend.publish("small", messages("c", "d", "e")),
        backend.publish("small", messages("f")),
    )
    assert outcomes[0] == outcomes[2] == ["stored"]
    assert [type(outcome) for outcome in outcomes[1]] == [QueueFull] * 3
    async with backend.receiver(["small"], slots=9) as receiver:
        assert [delivery.message.id for delivery in await receiver.receive(9)] == ["a", "b", "f"]


async def test_what_cannot_be_sent_is_its_callers_error_alone(backend: RedisBackend, queue: str) -> None:
    outcomes = await asyncio.gather(
        backend.publish(queue, messages("a")),
        backend.publish(queue, messages("\ud800")),
        backend.publish(queue, messages("b")),
    )
    assert outcomes[0] == outcomes[2] == ["stored"]
    assert isinstance(outcomes[1][0], ConfigError)


async def test_publishes_keep_their_order_while_scripts_are_forgotten_and_learnt_again(
    redis_url: str, opened: Opened, server: Redis
) -> None:
    async with opened(redis_url) as backend, opened(redis_url) as other:
        await other.declare(QueueSpec("other"))
        large = b"x" * 300_000
        for attempt in range(10):
            await server.script_flush()
            ids = [f"{attempt}-{n:02}" for n in range(12)]
            publishing = asyncio.gather(*(backend.publish("jobs", [Message(job_id, large)]) for job_id in ids))
            for _ in range(attempt % 4):
                await asyncio.sleep(0.001)
            await other.publish("other", messages(f"o{attempt}"))
            assert await publishing == [["stored"]] * len(ids)
            async with backend.receiver(["jobs"], slots=20) as receiver:
                found: list[str] = []
                while len(found) < len(ids):
                    some = await receiver.receive(20)
                    found += [delivery.message.id for delivery in some]
                    await receiver.settle([(delivery, Done()) for delivery in some])
            assert found == ids


async def test_a_forgotten_script_makes_nothing_of_what_was_not_done(
    backend: RedisBackend, queue: str, server: Redis
) -> None:
    await backend.publish(queue, messages("a"))
    await server.script_flush()
    assert await backend.publish(queue, messages("a")) == ["duplicate"]


# --- many queues


@pytest.mark.parametrize("which", ["first", "last"])
async def test_of_more_queues_than_one_look_takes_none_is_forgotten(backend: RedisBackend, which: str) -> None:
    names = [f"q{n:03}" for n in range(205)]
    for name in names:
        await backend.declare(QueueSpec(name))
    async with backend.receiver(names, slots=5) as receiver:
        assert await receiver.receive(1, wait=0.1) == []
        waiting = asyncio.create_task(receiver.receive(1, wait=20.0))
        await asyncio.sleep(0)
        await backend.publish(names[0 if which == "first" else -1], messages("a"))
        async with asyncio.timeout(8):
            [delivery] = await waiting
    assert delivery.message.id == "a"


async def test_an_idle_receiver_looks_about_once_a_second_also_where_its_bell_is_refused(
    redis_url: str, opened: Opened, server: Redis, namespace: str
) -> None:
    for denied in ("", "-blpop"):
        rights = ["~*", "+@all", *filter(None, [denied])]
        await server.execute_command("ACL", "SETUSER", namespace, "reset", "on", ">secret", *rights)
        url = redis_url.replace("://", f"://{namespace}:secret@")
        async with opened(url) as backend, backend.receiver(["jobs"]) as receiver:
            await receiver.receive(1)
            before = await scripts_called(server)
            for _ in range(2):
                assert await receiver.receive(1, wait=1.0) == []
            assert await scripts_called(server) - before <= 5
    await server.execute_command("ACL", "DELUSER", namespace)


# --- leaving, closing, opening


async def test_what_comes_for_a_receiver_that_was_left_is_handed_back(broker: Broker, opened: Opened) -> None:
    async with opened(broker.url) as backend:
        await backend.publish("jobs", messages("a", "b"))
        async with backend.receiver(["jobs"], slots=2, lease=60.0) as receiver:
            await receiver.exchange([], 0)
            broker.stop()
            claim = asyncio.create_task(receiver.receive(2))
            await asyncio.sleep(0.05)
            claim.cancel()
        broker.cont()  # the receiver has been left, and its claim is answered only now
        async with asyncio.timeout(10):
            while (await backend.depth("jobs")).ready != 2:  # noqa: ASYNC110 (a depth rings no bell)
                await asyncio.sleep(0.01)
        async with backend.receiver(["jobs"], slots=2) as receiver:
            assert {(d.attempt, d.crashes) for d in await receiver.receive(2)} == {(1, 0)}


async def test_a_job_that_arrives_while_the_backend_is_closed_is_not_handed_out_and_given_back_as_well(
    broker: Broker, opened: Opened
) -> None:
    async with opened(broker.url) as other, opened(broker.url) as backend:
        async with backend.receiver(["jobs"], slots=2) as receiver:
            await backend.publish("jobs", messages("a"))
            broker.stop()
            claim = asyncio.create_task(receiver.receive(1))
            await asyncio.sleep(0.05)
            closing = asyncio.create_task(backend.aclose())
            await asyncio.sleep(0.05)
            broker.cont()
            with pytest.raises(Closed):
                await claim
            await closing
        async with other.receiver(["jobs"]) as receiver:
            [delivery] = await receiver.receive(1, wait=5.0)
            assert (delivery.attempt, delivery.releases, delivery.crashes) == (1, 1, 0)


async def test_a_queue_that_is_deleted_and_declared_at_once_is_listed_while_it_is_there(
    redis_url: str, opened: Opened
) -> None:
    async with opened(redis_url) as one, opened(redis_url) as two:
        for _ in range(50):
            await one.declare(QueueSpec("again"))
            await asyncio.gather(one.delete("again"), two.declare(QueueSpec("again")), return_exceptions=True)
            there = await two.publish("again", messages(secrets.token_hex(8)))
            listed = "again" in [spec.name for spec in await two.queues()]
            assert listed == (there == ["stored"])
            if listed:
                await one.delete("again", force=True)


# --- leases


async def test_the_leases_of_a_loop_that_has_ended_end_too(redis_url: str, opened: Opened, namespace: str) -> None:
    left: list[Any] = []  # or the collector would close it

    def in_a_loop_of_its_own() -> None:
        async def take() -> None:
            backend = RedisBackend.from_url(redis_url, namespace=namespace)
            await backend.open()
            context = backend.receiver(["jobs"], lease=0.3)
            receiver = await context.__aenter__()
            left.extend([backend, context, receiver, *await receiver.receive(1)])

        loop = asyncio.new_event_loop()
        loop.run_until_complete(take())
        left.append([task.cancel() for task in asyncio.all_tasks(loop)])
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    async with opened(redis_url) as backend:
        await backend.publish("jobs", messages("a"))
        thread = threading.Thread(target=in_a_loop_of_its_own)
        thread.start()
        await asyncio.to_thread(thread.join)
        async with backend.receiver(["jobs"]) as receiver, asyncio.timeout(10):
            [delivery] = await receiver.receive(1, wait=8.0)
    assert (delivery.message.id, delivery.crashes) == ("a", 1)


@pytest.mark.parametrize("stalled", [False, True])
async def test_a_loop_that_stands_still_for_longer_than_it_may_loses_its_jobs_and_no_other_does(
    redis_url: str, opened: Opened, namespace: str, stalled: bool
) -> None:
    """Its lease is longer than that: a loop that turns is not taken for one that does not."""
    over, has_taken = threading.Event(), threading.Event()
    answers: list[Any] = []

    def in_a_loop_of_its_own() -> None:
        async def take() -> None:
            async with (
                opened(redis_url, max_stall=0.3) as backend,
                backend.receiver(["jobs"], lease=0.9) as receiver,
            ):
                [delivery] = await receiver.receive(1, wait=5.0)
                has_taken.set()
                while not over.is_set():
                    if stalled:
                        over.wait(10)
                    await asyncio.sleep(0.01)
                answers.extend(await receiver.settle([(delivery, Done())]))

        asyncio.run(take())

    async with opened(redis_url) as backend:
        thread = threading.Thread(target=in_a_loop_of_its_own)
        thread.start()
        try:
            await backend.publish("jobs", messages("a"))
            assert await asyncio.to_thread(has_taken.wait, 10)
            async with backend.receiver(["jobs"]) as receiver:
                found = await receiver.receive(1, wait=6.0 if stalled else 2.5)
        finally:
            over.set()
            await asyncio.to_thread(thread.join)
    assert [delivery.message.id for delivery in found] == (["a"] if stalled else [])
    assert isinstance(answers[0], LeaseLost) == stalled


# --- an outage


@pytest.mark.chaos
async def test_a_settlement_behind_a_call_without_an_answer_is_told_when_its_lease_has_ended(
    redis_url: str, namespace: str
) -> None:
    """And not a whole lease later: the receive loop that waits for it would seem dead."""
    async with FaultProxy.to(redis_url) as proxy:
        backend = RedisBackend.from_url(proxy.url(redis_url), namespace=namespace)
        await backend.open()
        await backend.declare(QueueSpec("jobs"))
        await backend.publish("jobs", messages("a"))
        async with backend.receiver(["jobs"], slots=2, lease=6.0, keep=False) as receiver:
            [delivery] = await receiver.receive(1, wait=5.0)
            proxy.refuse()
            proxy.reset()
            look = asyncio.create_task(receiver.receive(1))
            await asyncio.sleep(0.05)
            look.cancel()
            async with asyncio.timeout(9):
                [answer] = (await receiver.exchange([(delivery, Done())], 0)).settled
            assert isinstance(answer, BackendUnavailable)
        await backend.aclose()
