"""A RabbitMQ of these tests' own, and a backend on a queue of the test's own, by way of a proxy or straight."""

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import aiormq
import pytest

from mindtrace.jobs import QueueSpec, RabbitMQBackend
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import Broker
from mindtrace.jobs.testing.proxy import Amqp, FaultProxy


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """For all of these tests: whose numbers of connections and channels are ours alone."""
    with brokers.rabbitmq(private=True) as broker:
        yield broker


@pytest.fixture(autouse=True)
def quiet_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Hundreds of lines that break on purpose would bury what a failing test has to say."""
    caplog.set_level("CRITICAL", logger="mindtrace.jobs")


@pytest.fixture
async def namespace(broker: Broker) -> AsyncIterator[str]:
    """One that no other test uses; its queues `jobs` and its levels of delay are deleted afterwards."""
    name = f"t{secrets.token_hex(6)}"
    yield name
    async with asyncio.timeout(20), aiormq.connect(broker.url) as connection:
        channel = await connection.channel()
        for queue in ("jobs", "jobs.dead", "other", "other.dead", "gone.dead", *(f"{n}.hold" for n in range(LEVELS))):
            await channel.queue_delete(f"{name}:{queue}")


@pytest.fixture
async def proxy(broker: Broker) -> AsyncIterator[FaultProxy]:
    async with FaultProxy.to(broker.url, wire=Amqp) as proxy:
        yield proxy


@pytest.fixture
async def opened(broker: Broker, namespace: str) -> AsyncIterator[Callable[..., "object"]]:
    """Opens backends in the namespace, by way of a proxy if one is given."""
    async with AsyncExitStack() as closing:

        async def made(proxy: FaultProxy | None = None, *, heartbeat: int = 10) -> RabbitMQBackend:
            url = proxy.url(broker.url) if proxy else broker.url
            backend = RabbitMQBackend.from_url(url, namespace=namespace, heartbeat=heartbeat)
            await backend.open()
            closing.push_async_callback(backend.aclose)
            await backend.declare(QueueSpec("jobs"))
            return backend

        yield made


@pytest.fixture(scope="session")
def ctl(broker: Broker) -> Callable[[str], Awaitable[str]]:
    """Has the server evaluate an expression of Erlang, and gives what it says."""
    port = urlsplit(broker.url).port
    [environ] = [
        found
        for path in Path("/proc").glob("[0-9]*/environ")
        if (found := _environ(path)).get("RABBITMQ_NODENAME") == f"mtj{port}@localhost" and "ERL_EPMD_PORT" in found
    ][:1]
    program = shutil.which("rabbitmqctl", path="/usr/lib/rabbitmq/bin") or "rabbitmqctl"

    async def asked(expression: str) -> str:
        process = await asyncio.create_subprocess_exec(
            program,
            "eval",
            f"{expression}.",
            env=environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said
        return said.decode()

    return asked


def _environ(path: Path) -> dict[str, str]:
    try:
        lines = path.read_bytes().split(b"\0")
    except OSError:  # it has ended, or is somebody else's
        return {}
    return {name.decode(): value.decode() for name, _, value in (line.partition(b"=") for line in lines)}
