"""The line cut at every frame, in either direction: no job is lost, and no caller is told what is not true."""

import asyncio
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from mindtrace.jobs import (
    AuthenticationFailed,
    BackendUnavailable,
    Dead,
    Delivery,
    Done,
    JobNotFound,
    QueueSpec,
    RabbitMQBackend,
    Receiver,
    Release,
    Retry,
    Settlement,
)
from mindtrace.jobs.delivery import DeadFilter
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.proxy import Amqp, FaultProxy, Trap
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.rabbitmq, pytest.mark.chaos]

ALL = DeadFilter()
AT_ONCE = 12  # scenarios that run at the same time
PLANS: dict[str, Settlement] = {
    "done": Done(),
    "retried": Retry(0.0),
    "later": Retry(0.1),
    "dead": Dead("rejected"),
    "released": Release(),
    "snoozed": Release(0.1),
}
"""What becomes of a job the first time; the second time it is done."""


async def until_it_works(call: Callable[[], Awaitable[Any]]) -> Any:
    """Does it again for as long as there is no broker, which is never a matter of the login here."""
    while True:
        try:
            return await call()
        except BackendUnavailable as error:
            if isinstance(error, AuthenticationFailed):
                raise
            await asyncio.sleep(0.01)


@dataclass
class Story:
    """Six jobs on their ways through a queue, as a stubborn user takes them."""

    backend: RabbitMQBackend
    queue: str
    prefix: str
    absent: set[str] = field(default_factory=set[str])  # ids of which it was said that they are not there
    seen: list[str] = field(default_factory=list[str])
    settled: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    async def tell(self) -> None:
        await until_it_works(self.backend.open)
        await until_it_works(lambda: self.backend.declare(QueueSpec(self.queue)))
        await self._publish(["done"])
        await self._publish([name for name in PLANS if name != "done"])
        async with self.backend.receiver([self.queue], slots=10) as receiver:
            await self._run(receiver, {name: 1 if name in ("done", "dead") else 2 for name in PLANS})
        letters = self.backend.dead_letters(self.queue)
        page = await until_it_works(lambda: letters.list(ALL))
        [dead, *_] = [
            record.message.id for record in page.records if record.message.id.startswith(f"{self.prefix}dead")
        ]
        with suppress(JobNotFound):  # where the first try was carried out, and nobody heard of it
            await until_it_works(lambda: letters.replay([dead]))
        async with self.backend.receiver([self.queue], slots=10) as receiver:
            await self._run(receiver, {"dead": 2})

    async def _publish(self, names: list[str]) -> None:
        """Under the same id where nobody knows, and under a new one where it was said that nothing was stored."""
        left = [self.prefix + name for name in names]
        while left:
            outcomes = await self.backend.publish(self.queue, [Message(job_id, b"{}") for job_id in left])
            failed = [(job_id, outcome) for job_id, outcome in zip(left, outcomes, strict=True) if outcome != "stored"]
            left = []
            for job_id, outcome in failed:
                assert type(outcome) is BackendUnavailable, outcome
                if not outcome.maybe_published:
                    self.absent.add(job_id)
                left.append(job_id if outcome.maybe_published else f"{job_id}:")

    async def _run(self, receiver: Receiver, wanted: dict[str, int]) -> None:
        """Take and settle until each job was settled so many times: one that is lost never is."""
        while any(len(self.settled.get(name, [])) < times for name, times in wanted.items()):
            try:
                taken = await receiver.receive(10, wait=0.3)
            except BackendUnavailable:
                continue
            pairs: list[tuple[Delivery, Settlement]] = []
            for delivery in taken:
                assert delivery.message.id not in self.absent
                mine, name = self._named(delivery)
                self.seen += [name] if mine else []
                pairs.append((delivery, PLANS[name] if mine and not self.settled.get(name) else Done()))
            answers = await receiver.settle(pairs)
            for (delivery, settlement), answer in zip(pairs, answers, strict=True):
                mine, name = self._named(delivery)
                if answer is None and mine:
                    self.settled.setdefault(name, []).append(type(settlement).__name__)

    def _named(self, delivery: Delivery) -> tuple[bool, str]:
        """Whether it is this story's, and not a double that an earlier one left; and which of its jobs."""
        whose, _, name = delivery.message.id.rpartition("-")
        return f"{whose}-" == self.prefix, name.rstrip(":")


async def told(
    broker: Broker, namespace: str, queue: str, lay: Callable[[FaultProxy], Trap | None]
) -> tuple[FaultProxy, Trap | None]:
    """One story over a line with a trap in it."""
    async with asyncio.timeout(50), FaultProxy.to(broker.url, wire=Amqp) as proxy:
        trap = lay(proxy)
        backend = RabbitMQBackend.from_url(proxy.url(broker.url), namespace=namespace)
        story = Story(backend, queue, f"{secrets.token_hex(4)}-")
        try:
            await story.tell()
        except BaseException as error:
            error.add_note(f"{trap}: settled {story.settled}, seen {story.seen}")
            raise
        finally:
            async with asyncio.timeout(6):
                await backend.aclose()
    return proxy, trap


def cut(k: int, way: str, share: float, reset: bool, proxy: FaultProxy) -> Trap:
    return proxy.cut_at(k, getattr(proxy, way), share=share, reset=reset)


@pytest.mark.timeout(300)  # as many stories as there are frames, 12 at a time
@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_line_cut_at_any_frame_loses_no_job(broker: Broker, namespace: str, way: str) -> None:
    """Half of it arrives; or all of it, and then the line is reset."""
    clean, _ = await told(broker, namespace, "jobs", lambda _: None)
    frames = len(clean.requests if way == "up" else clean.replies)
    assert frames > 40
    left, struck = deque(range(1, frames + 1)), list[bytes]()

    async def some(queue: str) -> None:
        while left:
            k = left.popleft()
            share, reset = (0.5, False) if k % 2 else (1.0, True)
            lay = partial(cut, k, way, share, reset)
            _, trap = await told(broker, namespace, queue, lay)
            if trap is not None and trap.struck is not None:
                struck.append(trap.struck)

    queues = [f"jobs{number}" for number in range(AT_ONCE)]
    async with asyncio.TaskGroup() as group:
        for queue in queues:
            group.create_task(some(queue))
    assert len(struck) >= frames * 0.8
    wanted = {
        "up": {b"CONNECTION.OPEN", b"QUEUE.DECLARE", b"BASIC.PUBLISH", b"HEADER", b"BODY", b"BASIC.ACK", b"BASIC.GET"},
        "down": {b"CONNECTION.START", b"QUEUE.DECLARE-OK", b"BASIC.ACK", b"BASIC.GET-OK", b"HEADER", b"BODY"},
    }
    assert set(struck) >= wanted[way]
    backend = RabbitMQBackend.from_url(broker.url, namespace=namespace)
    await backend.open()
    for queue in queues:
        await backend.delete(queue, force=True)
    await backend.aclose()
