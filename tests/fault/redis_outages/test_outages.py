"""A Redis that is gone, silent, full, read-only or paused: what waits, what fails, and how soon it works again.

| the server                | runs  | publish                         | settle, extend            | receive          |
|---------------------------|-------|---------------------------------|---------------------------|------------------|
| gone, or silent           | go on | `BackendUnavailable` after 10 s | wait until the lease ends | fails within 5 s |
| paused for less than 10 s | go on | waits                           | wait                      | fails within 5 s |
| out of memory             | go on | `BackendFull`, nothing written  | work                      | works            |
| unable to write its disk  | go on | `BackendFull`, nothing written  | wait until the lease ends | fails            |
| read-only                 | go on | waits                           | wait                      | waits, or fails  |

Working again means that a publish and a receive work, 2 s after the server is back at the latest.
"""

import asyncio
import logging
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    Backend,
    BackendFull,
    BackendUnavailable,
    Closed,
    Dead,
    Delivery,
    Depth,
    Done,
    Event,
    Job,
    JobsError,
    JobSettled,
    LeaseLost,
    QueueSpec,
    Receiver,
    RedisBackend,
    Release,
    Retry,
    Settlement,
    Worker,
)
from mindtrace.jobs.delivery import DeadFilter, RunError
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

if TYPE_CHECKING:
    from tests.fault.redis_outages.conftest import Server

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.redis, pytest.mark.chaos]

NewServer = Callable[..., "Server"]
NewBackend = Callable[..., Awaitable[RedisBackend]]

BACK_WITHIN = 2.0
EVERY_SETTLEMENT: list[Settlement] = [
    Done(),
    Retry(0.0, error=RunError("ValueError", "a" * 1000, "", None, None, "")),
    Retry(300.0),
    Dead("rejected", error=RunError("ValueError", "a" * 1000, "", None, None, "")),
    Release(),
    Release(300.0),
]


def a_message(**options: Any) -> Message:
    return Message(new_job_id(), b"{}", **options)


def a_job(**data: Any) -> Job:
    return Job(name="jobs", schema_name="jobs", input_data=data)


async def published(backend: Backend, message: Message | None = None) -> object:
    """What became of one job."""
    [outcome] = await backend.publish("jobs", [message or a_message()])
    return outcome


async def timed(call: Awaitable[object]) -> tuple[float, object]:
    """Seconds until it ended, and what it returned or which of our errors it raised."""
    began = time.monotonic()
    try:
        ended: object = await call
    except JobsError as error:
        ended = error
    return time.monotonic() - began, ended


async def take(receiver: Receiver, limit: int = 1) -> list[Delivery]:
    """Deliveries, as many as asked for."""
    taken: list[Delivery] = []
    async with asyncio.timeout(10):
        while len(taken) < limit:
            taken += await receiver.receive(limit - len(taken), wait=10)
    return taken


async def until_back(backend: Backend, receiver: Receiver) -> tuple[float, float]:
    """Seconds from now until a publish is stored, and until a job is received and done: each tried all the time."""
    began = time.monotonic()

    async def stored() -> float:
        while await published(backend) != "stored":
            pass
        return time.monotonic() - began

    async def received() -> float:
        while True:
            with suppress(BackendUnavailable):
                if deliveries := await receiver.receive(1, wait=5):
                    assert await receiver.settle([(delivery, Done()) for delivery in deliveries]) == [None]
                    return time.monotonic() - began

    async with asyncio.timeout(10):
        publish, receive = await asyncio.gather(stored(), received())
    return publish, receive


@dataclass(frozen=True)
class Holdings:
    """What this process has of each kind."""

    files: int
    threads: int
    tasks: int

    @staticmethod
    def now() -> "Holdings":
        # The loop's own pool, which looks up names, grows to its size as it likes.
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
        return Holdings(len(os.listdir("/proc/self/fd")), len(threads), len(asyncio.all_tasks()))


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Gate(AsyncConsumer):
    """Runs that end when the gate is opened; while it is open, at once."""

    def __init__(self) -> None:
        super().__init__("jobs")
        self.starts: list[str] = []
        self.attempts: list[int] = []
        self.begun, self.opened = asyncio.Event(), asyncio.Event()

    async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        self.starts.append(job_dict["id"])
        self.attempts.append(job_dict["attempt"])
        self.begun.set()
        await self.opened.wait()
        return {}


class Settled:
    """A listener that counts how runs ended."""

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.lost: list[str] = []
        self._more = asyncio.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, JobSettled):
            (self.accepted if event.accepted and isinstance(event.settlement, Done) else self.lost).append(event.job_id)
            self._more.set()

    async def count(self, n: int) -> None:
        """Wait until so many were accepted."""
        async with asyncio.timeout(15):
            while len(self.accepted) < n:
                self._more.clear()
                await self._more.wait()


# --- gone -------------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_gone_for_twenty_seconds_under_load_costs_no_job_and_nothing_grows(
    new_server: NewServer, new_backend: NewBackend
) -> None:
    server = new_server(appendfsync="always")
    backend = await new_backend(server)
    gate, settled, stored, refused = Gate(), Settled(), list[Message](), list[tuple[float, object]]()
    over = asyncio.Event()

    async def publisher() -> None:
        while not over.is_set():
            message = a_message()
            seconds, outcome = await timed(published(backend, message))
            if outcome == "stored":
                stored.append(message)
            else:
                refused.append((seconds, outcome))
            await asyncio.sleep(0.01)

    orchestrator = AsyncOrchestrator(RedisBackend(port=server.port))
    await orchestrator.open()
    await orchestrator.declare(QueueSpec("work"))
    gate.job_type_name = "work"
    worker = Worker(orchestrator, [gate], concurrency=2, lease=60.0, listeners=[settled])
    working = asyncio.create_task(worker.run())
    running = await orchestrator.publish("work", Job(name="work", schema_name="work", input_data={}))
    await gate.begun.wait()

    async with (
        backend.receiver(["jobs"], slots=4, lease=60.0) as holder,
        backend.receiver(["jobs"], slots=9) as receiver,
    ):
        publishers = [asyncio.create_task(publisher()) for _ in range(20)]
        held = await take(holder, 4)
        server.broker.kill()
        settling = asyncio.create_task(
            holder.settle(list(zip(held, [Done(), Retry(300.0), Dead("rejected"), Release(300.0)], strict=True)))
        )
        gate.opened.set()  # a run that ends while there is nobody to tell
        await asyncio.sleep(11)  # now every publisher has met it
        holdings, size = Holdings.now(), memory()
        assert not settling.done()
        await asyncio.sleep(9)
        assert abs(Holdings.now().tasks - holdings.tasks) <= 1
        assert abs(Holdings.now().files - holdings.files) <= 3  # a try to connect comes and goes on each link
        assert Holdings.now().threads == holdings.threads
        assert memory() - size < 2 * 1024 * 1024

        await asyncio.to_thread(server.broker.restart)
        publish, receive = await until_back(backend, receiver)
        assert max(publish, receive) < BACK_WITHIN
        assert await settling == [None] * 4  # the lease runs still: it was worth waiting for
        await settled.count(1)
        over.set()
        await asyncio.gather(*publishers)
        # None that was stored is missing: publishing it again finds each of them, and stores none.
        assert set(await asyncio.gather(*(published(backend, message) for message in stored))) == {"duplicate"}
        assert await backend.clean("jobs") > 0

    assert (gate.starts, settled.accepted, settled.lost) == ([running], [running], [])
    worker.stop()
    assert await working == 0
    await orchestrator.aclose()

    unknown = 0
    for seconds, outcome in refused:
        assert type(outcome) is BackendUnavailable
        assert 9.5 < seconds < 11.0
        unknown += outcome.maybe_published
    # In flight as it was killed: all of them, at most; those that came later were never sent.
    assert unknown <= 20
    assert len(refused) > unknown
    assert await backend.depth("jobs") == Depth(0, 0, 0, 1)


async def test_it_works_again_two_seconds_after_each_return(new_server: NewServer, new_backend: NewBackend) -> None:
    """Killed, ended in order, or only cut off, for as long as it takes to try at the slowest pace."""
    ways: list[tuple[str, float]] = [("killed", 0.0), ("ended", 0.0), ("cut", 0.0), ("killed", 1.0), ("stopped", 1.0)]
    ways += [("killed", 5.0)] * 5

    async def outage(way: str, lasts: float) -> tuple[float, float]:
        server = new_server()
        backend = await new_backend(server)
        async with backend.receiver(["jobs"]) as receiver:
            await until_back(backend, receiver)
            if way == "cut":
                server.say("CLIENT", "KILL", "TYPE", "normal")
            elif way == "ended":
                await asyncio.to_thread(server.broker.restart)
            elif way == "stopped":
                server.broker.stop()
                await asyncio.sleep(lasts)
                server.broker.cont()
            else:
                server.broker.kill()
                await asyncio.sleep(lasts)
                await asyncio.to_thread(server.broker.restart)
            return await until_back(backend, receiver)

    for way, times in zip(ways, await asyncio.gather(*(outage(*way) for way in ways)), strict=True):
        assert max(times) < BACK_WITHIN, way


async def test_fifty_reconnects_leave_nothing_behind(server: "Server", new_backend: NewBackend) -> None:
    backend = await new_backend(server)
    async with backend.receiver(["jobs"], slots=2, lease=1.0) as receiver:

        async def cut_off() -> None:
            server.say("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert await published(backend) == "stored"
            [delivery] = await take(receiver)
            assert await receiver.settle([(delivery, Done())]) == [None]

        async def settled_down() -> tuple[Holdings, set[str]]:
            async with asyncio.timeout(10):
                while len(server.clients()) != 2:  # commands and bell: the keeper has had nothing to extend
                    await asyncio.wait([asyncio.create_task(receiver.receive(1, wait=0.1))])
            return Holdings.now(), {client["name"] for client in server.clients()}

        await cut_off()
        before, size = await settled_down(), memory()
        for _ in range(50):
            await cut_off()
        assert await settled_down() == before
        assert memory() - size < 2 * 1024 * 1024


async def test_what_a_server_that_forgot_the_scripts_stored_before_is_a_duplicate(
    server: "Server", new_backend: NewBackend
) -> None:
    """That it asks for the script is no sending of ours whose reply was lost."""
    backend = await new_backend(server)
    message = a_message()
    assert await published(backend, message) == "stored"
    server.say("SCRIPT", "FLUSH")
    assert await published(backend, message) == "duplicate"


# --- silent -----------------------------------------------------------------------------------------------------------


async def test_no_call_waits_longer_than_it_says_for_a_silent_server_and_a_pause_of_eight_seconds_loses_nothing(
    new_server: NewServer, new_backend: NewBackend
) -> None:
    """The connections stay open: only time tells. Closing takes 5 s at the most, whatever is held or under way."""

    async def silenced() -> tuple["Server", RedisBackend]:
        server = new_server()
        return server, await new_backend(server)

    async def publishes() -> None:
        server, backend = await silenced()
        server.broker.stop()
        seconds, outcome = await timed(published(backend))
        assert 9.5 < seconds < 11.0
        assert isinstance(outcome, BackendUnavailable)
        assert outcome.maybe_published
        assert outcome.outcome == "unknown"
        assert len(outcome.job_ids) == 1

    async def asks() -> None:
        server, backend = await silenced()
        server.broker.stop()
        seconds, outcome = await timed(backend.depth("jobs"))
        assert isinstance(outcome, BackendUnavailable)
        assert seconds < 11.0

    async def receives() -> None:
        server, backend = await silenced()
        async with backend.receiver(["jobs"]) as receiver:
            server.broker.stop()
            seconds, outcome = await timed(receiver.receive(1, wait=60))
            assert isinstance(outcome, BackendUnavailable)
            assert seconds < 6.5  # its next look is a second away, and gets five
            closing, _ = await timed(backend.aclose())
            assert closing < 5.0

    async def opens() -> None:
        server, _ = await silenced()
        server.broker.stop()
        seconds, outcome = await timed(RedisBackend(port=server.port).open())
        assert isinstance(outcome, BackendUnavailable)
        assert seconds < 6.0

    async def closes_with_all_under_way() -> None:
        server, backend = await silenced()
        for _ in range(3):
            await published(backend)
        async with backend.receiver(["jobs"], slots=3, lease=18.0) as receiver:
            first, second, _ = await take(receiver, 3)
            server.broker.stop()
            calls = [
                asyncio.create_task(timed(published(backend))),
                asyncio.create_task(timed(receiver.settle([(first, Done())]))),
                asyncio.create_task(timed(backend.depth("jobs"))),
            ]
            await asyncio.sleep(6.3)  # the keeper, too, waits for an answer now
            closing, _ = await timed(backend.aclose())
            assert closing < 5.0
            for _, outcome in await asyncio.gather(*calls):
                assert isinstance(outcome, BackendUnavailable | Closed)
            [answer] = await receiver.settle([(second, Done())])
            assert isinstance(answer, LeaseLost)

    async def pauses() -> None:
        # What was under way is done once, what was held is held still, and is extended when the server speaks again.
        server, backend = await silenced()
        other = await new_backend(server)
        lost: list[Delivery] = []
        messages = [a_message() for _ in range(3)]
        assert await backend.publish("jobs", messages) == ["stored"] * 3
        async with (
            backend.receiver(["jobs"], slots=3, lease=15.0, lost=lost.append) as holder,
            other.receiver(["jobs"], slots=10) as hungry,
        ):
            held = await take(holder, 3)
            deadlines = [delivery.deadline for delivery in held]
            server.say("CLIENT", "PAUSE", 8000, "ALL")
            began = time.monotonic()
            outcome, settled = await asyncio.gather(published(backend), holder.settle([(held[0], Done())]))
            assert 7.5 < time.monotonic() - began < 8.0 + BACK_WITHIN
            assert (outcome, settled) == ("stored", [None])
            [delivery] = await take(hungry)  # that one job, once
            assert delivery.message.id not in {message.id for message in messages}
            async with asyncio.timeout(10):
                while min(d.deadline for d in held[1:]) < max(deadlines) + 8:  # noqa: ASYNC110 (the keeper tells nobody)
                    await asyncio.sleep(0.02)
            assert await hungry.receive(10, wait=0.2) == []
            assert await holder.settle([(delivery, Done()) for delivery in held[1:]]) == [None, None]
            assert await hungry.settle([(delivery, Done())]) == [None]
        assert lost == []
        assert await backend.depth("jobs") == Depth(0, 0, 0, 0)

    await asyncio.gather(publishes(), asks(), receives(), opens(), closes_with_all_under_way(), pauses())


async def test_a_run_that_blocks_the_loop_for_three_leases_runs_once(server: "Server") -> None:
    """A hungry receiver in another thread gets nothing meanwhile: somebody keeps the lease."""
    starts: list[int] = []
    looks: list[list[Delivery]] = []
    settled = Settled()
    began, over = threading.Event(), threading.Event()

    class Blocks(AsyncConsumer):
        async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
            starts.append(job_dict["attempt"])
            worker.stop()
            began.set()
            time.sleep(3.0)  # noqa: ASYNC251 (what it should not do, and what people do)
            return {}

    async def wants_it() -> None:
        backend = RedisBackend(port=server.port)
        await backend.open()
        async with backend.receiver(["jobs"], slots=10) as hungry:
            while not over.is_set():
                looks.append(await hungry.receive(10, wait=0.05))
        await backend.aclose()

    def another_thread() -> None:
        assert began.wait(10)
        asyncio.run(wants_it())

    async with AsyncOrchestrator(RedisBackend(port=server.port)) as orchestrator:
        await orchestrator.declare(QueueSpec("jobs"))
        job_id = await orchestrator.publish("jobs", a_job())
        worker = Worker(orchestrator, [Blocks("jobs")], lease=1.0, listeners=[settled])
        hungry = asyncio.create_task(asyncio.to_thread(another_thread))
        await asyncio.sleep(0)
        async with worker:
            await settled.count(1)
        over.set()
        await hungry
        assert (starts, settled.accepted, settled.lost) == ([1], [job_id], [])
        assert len(looks) > 10
        assert not any(looks)
        assert await orchestrator.depth("jobs") == Depth(0, 0, 0, 0)


# --- full -------------------------------------------------------------------------------------------------------------


async def test_a_server_out_of_memory_stores_nothing_and_can_still_be_emptied(
    new_server: NewServer, new_backend: NewBackend
) -> None:
    """Every call: those that need memory are refused and change no key; all that settle, take or forget work."""
    server = new_server()
    backend = await new_backend(server)
    await backend.declare(QueueSpec("spare"))
    letters = backend.dead_letters("jobs")
    n = len(EVERY_SETTLEMENT)
    assert await backend.publish("jobs", [a_message() for _ in range(n + 6)]) == ["stored"] * (n + 6)
    async with backend.receiver(["jobs"], slots=n + 6, lease=60.0) as receiver:
        dying = await take(receiver, 2)
        assert await receiver.settle([(delivery, Dead("rejected")) for delivery in dying]) == [None, None]
        held = await take(receiver, n)
        server.say("CONFIG", "SET", "maxmemory", "1mb")  # less than an empty server uses

        before = server.keys()
        for messages in ([a_message()], [a_message(delay=60.0), a_message()], [a_message() for _ in range(1200)]):
            for outcome in await backend.publish("jobs", messages):
                assert type(outcome) is BackendFull
                assert outcome.retryable
                assert outcome.outcome == "not_done"
        with pytest.raises(BackendFull):
            await letters.replay([dying[0].message.id])
        with pytest.raises(BackendFull):
            await backend.declare(QueueSpec("another"))
        assert server.keys() == before

        assert await receiver.extend(held) == [None] * n
        assert await receiver.settle(list(zip(held, EVERY_SETTLEMENT, strict=True))) == [None] * n
        assert await backend.depth("jobs") == Depth(4 + 2, 2, 0, 2 + 1)
        again = await take(receiver, 2)
        assert await receiver.settle([(delivery, Done()) for delivery in again]) == [None, None]
        await take(receiver, 1)  # released as the receiver is left
    assert await backend.depth("jobs") == Depth(4, 2, 0, 3)
    assert {spec.name for spec in await backend.queues()} == {"jobs", "spare"}
    page = await letters.list(DeadFilter())
    assert {record.message.id for record in page.records} == {
        held[3].message.id,
        *(delivery.message.id for delivery in dying),
    }
    assert [error.type for error in (await letters.get(held[3].message.id)).errors] == ["ValueError"]
    assert await letters.purge(DeadFilter()) == 3
    assert await backend.clean("jobs") == 6
    await backend.delete("spare")
    assert await backend.depth("jobs") == Depth(0, 0, 0, 0)

    server.say("CONFIG", "SET", "maxmemory", "0")
    assert await published(backend) == "stored"


async def test_a_lease_that_lapses_while_the_server_is_out_of_memory_is_collected(
    server: "Server", new_backend: NewBackend
) -> None:
    backend = await new_backend(server)
    messages = [a_message(), a_message(crash_limit=1)]
    await backend.publish("jobs", messages)
    async with backend.receiver(["jobs"], slots=2, lease=0.1, keep=False) as stalled:
        await take(stalled, 2)
        server.say("CONFIG", "SET", "maxmemory", "1mb")
        async with backend.receiver(["jobs"], slots=2) as healthy:
            [delivery] = await take(healthy)
            assert (delivery.message, delivery.crashes) == (messages[0], 1)
            assert await healthy.settle([(delivery, Done())]) == [None]
    assert await backend.depth("jobs") == Depth(0, 0, 0, 1)


async def test_a_worker_that_starts_while_the_server_is_out_of_memory_empties_its_queue(
    server: "Server", new_backend: NewBackend
) -> None:
    """Or nobody could ever make room."""
    backend = await new_backend(server)
    await backend.publish("jobs", [])
    async with AsyncOrchestrator(RedisBackend(port=server.port)) as orchestrator:
        jobs = await orchestrator.publish_many("jobs", [a_job() for _ in range(20)])
        server.say("CONFIG", "SET", "maxmemory", "1mb")
        gate = Gate()
        gate.opened.set()
        worker = Worker(orchestrator, [gate], until_idle=True)
        assert await worker.run() == 0
    assert sorted(gate.starts) == sorted(jobs)
    assert await backend.depth("jobs") == Depth(0, 0, 0, 0)


async def test_a_server_that_cannot_write_its_disk_stores_nothing_and_what_is_settled_meanwhile_is_not_lost(
    new_server: NewServer, new_backend: NewBackend, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """It refuses settlements, too: they wait, as for a server that is not there. That is said once."""
    caplog.set_level("WARNING", "mindtrace.jobs")
    (directory := tmp_path / "data").mkdir()
    server = new_server(dir=str(directory), appendonly="no", save="3600 1")
    backend = await new_backend(server)
    await published(backend)
    async with backend.receiver(["jobs"], lease=30.0) as receiver:
        held = await take(receiver)
        directory.rmdir()
        server.say("BGSAVE")
        while server.info("persistence")["rdb_last_bgsave_status"] == "ok":  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)
        before = server.keys()
        outcome = await published(backend)
        assert type(outcome) is BackendFull
        assert "MISCONF" in str(outcome)
        assert server.keys() == before
        settling = asyncio.create_task(receiver.settle([(held[0], Done())]))
        await asyncio.wait({settling}, timeout=2.0)  # they are sent again every half second
        assert _warnings(caplog, "Redis at .* cannot write: MISCONF") == 1
        server.say("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
        publish, receive = await until_back(backend, receiver)
        assert max(publish, receive) < BACK_WITHIN
        assert await settling == [None]
    assert await backend.depth("jobs") == Depth(0, 0, 0, 0)


# --- read-only --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", ["yes", "no"], ids=["READONLY", "MASTERDOWN"])
async def test_a_server_that_is_a_replica_for_a_while_fails_no_job(
    new_server: NewServer, new_backend: NewBackend, caplog: pytest.LogCaptureFixture, stale: str
) -> None:
    """It follows a copy of itself, as after a failover, and is made the master again. That is said once."""
    caplog.set_level("WARNING", "mindtrace.jobs")
    quick = {"repl_diskless_sync_delay": "0"}
    server = new_server(replica_serve_stale_data=stale, **quick)
    backend = await new_backend(server)
    gate, settled = Gate(), Settled()
    async with AsyncOrchestrator(RedisBackend(port=server.port)) as orchestrator:
        ids = await orchestrator.publish_many("jobs", [a_job() for _ in range(4)])
        worker = Worker(orchestrator, [gate], concurrency=2, lease=30.0, listeners=[settled])
        async with worker:
            async with asyncio.timeout(10):
                while len(gate.starts) < 2:
                    gate.begun.clear()
                    await gate.begun.wait()
            copy = new_server(**quick)
            copy.say("REPLICAOF", "127.0.0.1", server.port)
            await asyncio.to_thread(_until_in_sync, copy)
            copy.say("REPLICAOF", "NO", "ONE")
            server.say("REPLICAOF", "127.0.0.1", copy.port)
            if stale == "no":
                copy.broker.kill()  # nobody to follow: it answers no question at all
            else:
                await asyncio.to_thread(_until_in_sync, server)
            calls = [asyncio.create_task(orchestrator.publish("jobs", a_job())) for _ in range(3)]
            gate.opened.set()
            await asyncio.wait(calls, timeout=1.0)
            assert not any(call.done() for call in calls)
            assert settled.accepted == []
            assert _warnings(caplog, r"lost Redis .* \(commands\)") == 1
            server.say("REPLICAOF", "NO", "ONE")
            back = time.monotonic()
            ids += await asyncio.gather(*calls)
            assert time.monotonic() - back < BACK_WITHIN
            await settled.count(4 + 3)
    # Each of them once, and at the first attempt: what was read-only meanwhile was never a failure of a run.
    assert sorted(gate.starts) == sorted(ids)
    assert set(gate.attempts) == {1}
    assert settled.lost == []
    assert await backend.depth("jobs") == Depth(0, 0, 0, 0)


def _warnings(caplog: pytest.LogCaptureFixture, pattern: str) -> int:
    """How many there were."""
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return sum(bool(re.search(pattern, text)) for text in said)


def _until_in_sync(server: "Server") -> None:
    deadline = time.monotonic() + 10
    while server.info("replication").get("master_link_status") != "up":
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- callers that go away ---------------------------------------------------------------------------------------------


async def test_a_storm_of_cancellations_loses_no_job_and_no_wake_up(server: "Server", new_backend: NewBackend) -> None:
    """400 times ten calls over one connection, each cancelled at a moment of its own."""
    backend = await new_backend(server)
    dice = random.Random(20)
    tried, stored, done = set[str](), set[str](), set[str]()

    async def publishes() -> None:
        message = a_message()
        tried.add(message.id)
        if await published(backend, message) == "stored":
            stored.add(message.id)

    async def receives(receiver: Receiver) -> None:
        deliveries = await receiver.receive(2, wait=1)
        ids = {delivery.message.id for delivery in deliveries}
        settling = asyncio.create_task(receiver.settle([(delivery, Done()) for delivery in deliveries]))
        try:
            assert await asyncio.shield(settling) == [None] * len(ids)
        finally:
            if await settling == [None] * len(ids):
                done.update(ids)

    async def empties(receiver: Receiver) -> None:
        while deliveries := await receiver.receive(2, wait=1.2):  # what nobody waited for is released by then
            done.update(delivery.message.id for delivery in deliveries)
            assert await receiver.settle([(delivery, Done()) for delivery in deliveries]) == [None] * len(deliveries)

    async def cancelled_somewhere(call: Awaitable[None]) -> None:
        task = asyncio.ensure_future(call)
        for _ in range(dice.randrange(12)):
            await asyncio.sleep(0)
        if dice.random() < 0.5:
            await asyncio.sleep(dice.uniform(0, 0.003))
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async with (
        backend.receiver(["jobs"], slots=2) as one,
        backend.receiver(["jobs"], slots=2) as two,
        backend.receiver(["jobs"], slots=2) as three,
    ):
        receivers: Sequence[Receiver] = (one, two, three)
        for receiver in receivers:
            await receiver.receive(1, wait=0.1)  # its bell is up
        holdings = Holdings.now()
        for _ in range(400):
            calls: list[Awaitable[None]] = [publishes() for _ in range(7)]
            calls += [receives(receiver) for receiver in receivers]
            await asyncio.gather(*map(cancelled_somewhere, calls))
        await asyncio.gather(*map(empties, receivers))
        assert Holdings.now() == holdings
        assert len(stored) > 500
        assert stored <= done <= tried
        waits = [asyncio.create_task(take(receiver)) for receiver in receivers]
        await asyncio.wait(waits, timeout=0.7)
        assert not any(wait.done() for wait in waits)
        began = time.monotonic()
        await backend.publish("jobs", [a_message() for _ in receivers])
        await asyncio.gather(*waits)
        assert time.monotonic() - began < 0.5  # woken, and not by a look of their own


async def test_a_ring_for_a_caller_who_went_away_wakes_another(server: "Server", new_backend: NewBackend) -> None:
    backend = await new_backend(server)
    async with backend.receiver(["jobs"]) as one, backend.receiver(["jobs"]) as two:
        for gone, there in ((one, two), (two, one), (one, two)):
            going = asyncio.create_task(gone.receive(1, wait=30))
            await asyncio.wait({going}, timeout=0.1)  # it is the first in line for the bell
            going.cancel()
            await asyncio.wait({going})
            staying = asyncio.create_task(there.receive(1, wait=30))
            await asyncio.wait({staying}, timeout=0.1)
            assert not staying.done()
            began = time.monotonic()
            await published(backend)
            [delivery] = await staying
            assert time.monotonic() - began < 0.5
            assert await there.settle([(delivery, Done())]) == [None]


async def test_a_publish_ends_in_time_also_where_the_loop_stands_still_again_and_again(server: "Server") -> None:
    backend = RedisBackend(port=server.port)
    await backend.open()
    await backend.declare(QueueSpec("jobs"))
    server.broker.kill()
    publishing = asyncio.create_task(backend.publish("jobs", [Message("a", b"{}")]))
    for _ in range(20):
        time.sleep(1.2)  # noqa: ASYNC251 (which nobody should do)
        await asyncio.sleep(0)
        if publishing.done():
            break
    assert publishing.done()
    assert [type(outcome) for outcome in await publishing] == [BackendUnavailable]
    await backend.aclose()
