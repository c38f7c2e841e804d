"""What the tests of the command line share: `cli`, which runs a command in this process; brokers; applications."""

import asyncio
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import aiormq
import pytest
from redis import Redis

from mindtrace.jobs import AsyncOrchestrator, Backend, Dead, Job, QueueSpec, RunError, connect
from mindtrace.jobs.cli import main

CANARY = "c4n4ry-pw"
VARIABLES = ("URL", "NAMESPACE", "APP", "JSON", "VERBOSE")


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Cli = Callable[..., Ended]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, an empty one; no setting comes from the machine, and what is imported is forgotten."""
    for name in ("REDIS_URL", "AMQP_URL", "NO_COLOR", "FORCE_COLOR", *(f"MINDTRACE_JOBS_{v}" for v in VARIABLES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if name not in known and str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command. Whatever it is, no output of it shows the password."""

    def run(*words: str) -> Ended:
        capsys.readouterr()
        status = main(words)
        out, err = capsys.readouterr()
        assert CANARY not in out + err
        assert "Traceback" not in err or "-vv" in words
        return Ended(status, out, err)

    return run


@dataclass
class Server:
    """A broker, in a namespace that no other test uses; the command line is told of it by the environment."""

    kind: str
    url: str
    namespace: str = field(default_factory=lambda: f"t{secrets.token_hex(6)}")

    def backend(self) -> Backend:
        return connect(self.url, namespace=self.namespace)

    def declare(self, *specs: QueueSpec) -> None:
        async def declare() -> None:
            async with AsyncOrchestrator(self.backend()) as jobs:
                for spec in specs:
                    await jobs.declare(spec)

        asyncio.run(declare())

    def publish(self, queue: str, *ids: str) -> None:
        async def publish() -> None:
            async with AsyncOrchestrator(self.backend()) as jobs:
                await jobs.declare(QueueSpec(queue))
                for job_id in ids:
                    await jobs.publish(queue, Job(id=job_id, name=queue, schema_name=queue, input_data={"of": job_id}))

        asyncio.run(publish())

    def bury(self, queue: str, *deaths: tuple[str, str, str]) -> None:
        """Have jobs that are dead: id, reason, and the text of the error."""

        async def bury() -> None:
            async with AsyncOrchestrator(self.backend()) as jobs:
                await jobs.declare(QueueSpec(queue))
                for job_id, *_ in deaths:
                    await jobs.publish(queue, Job(id=job_id, name=queue, schema_name=queue, input_data={"of": job_id}))
                async with jobs.backend.receiver([queue], slots=len(deaths)) as receiver:
                    for _, reason, text in deaths:
                        [delivery] = await receiver.receive(1, wait=5)
                        await receiver.settle([(delivery, Dead(reason, RunError("ShopError", text)))])  # type: ignore[arg-type]

        asyncio.run(bury())

    def ready(self, queue: str) -> list[str]:
        """The ids that are ready, in their order, which takes them off."""

        async def take() -> list[str]:
            async with AsyncOrchestrator(self.backend()) as jobs:
                count = await jobs.count_queue_messages(queue)
                taken = [await jobs.receive_message(queue) for _ in range(count)]
                return [job["id"] for job in taken if job is not None]

        return asyncio.run(take())

    def count(self, queue: str) -> int:
        """How many are ready."""

        async def look() -> int:
            async with AsyncOrchestrator(self.backend()) as jobs:
                return await jobs.count_queue_messages(queue)

        return asyncio.run(look())

    def dead(self, queue: str) -> list[str]:
        """The ids that are dead, the newest first."""

        async def look() -> list[str]:
            async with AsyncOrchestrator(self.backend()) as jobs:
                page = await jobs.dead_letters(queue).list()
                return [record.message.id for record in page.records]

        return asyncio.run(look())


QUEUES = ("orders", "mails", "checkout")


@pytest.fixture(
    params=[
        pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.uses_broker("redis")]),
        pytest.param("rabbitmq", marks=[pytest.mark.rabbitmq, pytest.mark.uses_broker("rabbitmq")]),
    ]
)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Each in turn."""
    server = request.getfixturevalue(f"on_{request.param}")
    monkeypatch.setenv("MINDTRACE_JOBS_URL", server.url)
    monkeypatch.setenv("MINDTRACE_JOBS_NAMESPACE", server.namespace)
    return server


@pytest.fixture
def on_redis(redis_url: str) -> Iterator[Server]:
    """With a password to look for in what is printed."""
    with Redis.from_url(redis_url) as admin:
        server = Server("redis", "")
        name = server.namespace
        server.url = redis_url.replace("://", f"://{name}:{quote(CANARY)}@")
        admin.execute_command("ACL", "SETUSER", name, "on", f">{CANARY}", f"~{name}:*", "+@all")
        yield server
        for key in admin.scan_iter(f"{name}:*", count=1000):
            admin.delete(key)
        admin.execute_command("ACL", "DELUSER", name)


@pytest.fixture
def on_rabbitmq(rabbitmq_url: str) -> Iterator[Server]:
    server = Server("rabbitmq", rabbitmq_url)
    yield server

    async def sweep() -> None:
        connection = await aiormq.connect(rabbitmq_url)
        channel = await connection.channel()
        for name in QUEUES:
            await channel.queue_delete(f"{server.namespace}:{name}")
            await channel.queue_delete(f"{server.namespace}:{name}.dead")
        for name in ("priority", "due", "gone"):
            await channel.exchange_delete(f"{server.namespace}:{name}")
        await connection.close()

    asyncio.run(sweep())


APP = """
import os
from pydantic import BaseModel
from mindtrace.jobs import *

class Order(BaseModel):
    item: str
    amount: int = 1

class Checkout(AsyncConsumer[Order, Order]):
    async def handle(self, data: Order) -> Order:
        return data

def backend():
    url, namespace = os.environ["MINDTRACE_JOBS_URL"], os.environ["MINDTRACE_JOBS_NAMESPACE"]
    kind = RabbitMQBackend if url.startswith("amqp") else RedisBackend
    return kind.from_url(url, namespace=namespace)

def worker():
    return Worker(AsyncOrchestrator(backend()), [Checkout("checkout")])

async def orchestrator():
    jobs = AsyncOrchestrator(backend())
    await jobs.open()
    await jobs.register(JobSchema("order", Order, queue="checkout", priority=None))
    return jobs

def blocking():
    url, namespace = os.environ["MINDTRACE_JOBS_URL"], os.environ["MINDTRACE_JOBS_NAMESPACE"]
    kind = RabbitMQClient if url.startswith("amqp") else RedisClient
    jobs = Orchestrator(kind.from_url(url, namespace=namespace))
    jobs.register(JobSchema("checkout", Order))
    return jobs
"""


@pytest.fixture
def shop(folder: Path) -> Path:
    """An application, `shop`, on the broker of the environment."""
    (folder / "shop.py").write_text(APP, "utf-8")
    return folder
