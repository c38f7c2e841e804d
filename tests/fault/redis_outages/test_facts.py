"""What shows at the start: no server, a wrong login, one that would lose jobs, a certificate nobody vouches for."""

import asyncio
import logging
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    AuthenticationFailed,
    BackendUnavailable,
    Job,
    JobsError,
    Orchestrator,
    QueueSpec,
    RedisBackend,
    RedisClient,
    UnsafeBackend,
    Worker,
    connect,
)
from mindtrace.jobs.job import new_job_id
from mindtrace.jobs.wire import Message

if TYPE_CHECKING:
    from tests.fault.redis_outages.conftest import Server

pytestmark = [pytest.mark.anyio, pytest.mark.fault, pytest.mark.redis]

NewServer = Callable[..., "Server"]
PASSWORD = "open-sesame-4711"  # noqa: S105 (of servers that live for a test)


async def refused(backend: RedisBackend) -> tuple[float, JobsError]:
    """Seconds until it could not be opened, and why."""
    began = time.monotonic()
    with pytest.raises(JobsError) as caught:
        await backend.open()
    return time.monotonic() - began, caught.value


async def opened_on(server: "Server", **options: Any) -> str:
    """The durability of a backend that was opened there, and closed."""
    backend = RedisBackend(port=server.port, **options)
    await backend.open()
    await backend.aclose()
    return backend.traits.durability


# --- no server --------------------------------------------------------------------------------------------------------


async def test_nothing_connects_before_it_is_opened() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        backend = RedisBackend(port=port)
        made = [
            backend,
            RedisBackend.from_url(f"redis://127.0.0.1:{port}/0"),
            connect(f"redis://127.0.0.1:{port}/0"),
            AsyncOrchestrator(RedisBackend(port=port)),
            Orchestrator(RedisClient(port=port)),
        ]
        assert made
        assert select.select([listening], [], [], 0.1)[0] == []
        opening = asyncio.create_task(backend.open())
        assert await asyncio.to_thread(select.select, [listening], [], [], 5.0) == ([listening], [], [])
        opening.cancel()
        await asyncio.wait({opening})


async def test_a_server_that_is_not_there_is_an_error_in_five_seconds_but_a_worker_goes_on_trying(
    no_port: int, silent_port: int, new_server: NewServer
) -> None:
    """An error whether the connection is refused or taken by somebody who says nothing; in the blocking face, too."""
    before = asyncio.all_tasks()
    server = new_server(appendfsync="always")
    ran = asyncio.Event()

    class Tells(AsyncConsumer):
        async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
            ran.set()
            return {}

    async def works() -> None:
        async with AsyncOrchestrator(RedisBackend(port=server.port)) as publisher:
            await publisher.declare(QueueSpec("jobs"))
            await publisher.publish("jobs", Job(name="jobs", schema_name="jobs", input_data={}))
        server.broker.kill()
        worker = Worker(AsyncOrchestrator(RedisBackend(port=server.port)), [Tells("jobs")])
        working = asyncio.create_task(worker.run())
        await asyncio.wait({working}, timeout=6.0)  # longer than one try to open takes
        await asyncio.to_thread(server.broker.restart)
        came = time.monotonic()
        async with asyncio.timeout(10):
            await ran.wait()
        assert time.monotonic() - came < 2.0
        worker.stop()
        assert await working == 0

    def blocks() -> tuple[float, BackendUnavailable]:
        began = time.monotonic()
        with pytest.raises(BackendUnavailable) as caught:
            Orchestrator(RedisClient(port=no_port, password=PASSWORD)).publish(
                "jobs", Job(name="jobs", schema_name="jobs", input_data={})
            )
        return time.monotonic() - began, caught.value

    *ends, _ = await asyncio.gather(
        refused(RedisBackend(port=no_port, password=PASSWORD)),
        refused(RedisBackend.from_url(f"redis://:{PASSWORD}@localhost:{silent_port}/0")),
        asyncio.to_thread(blocks),
        works(),
    )
    for (seconds, error), port in zip(ends, (no_port, silent_port, no_port), strict=True):
        assert type(error) is BackendUnavailable
        assert 4.5 < seconds < 6.0
        assert f"localhost:{port}" in str(error)
        assert PASSWORD not in str(error)
        assert error.retryable
        assert error.outcome == "not_done"
    assert asyncio.all_tasks() == before


async def test_a_backend_that_could_not_be_opened_can_be_opened_later(server: "Server") -> None:
    server.broker.kill()
    backend = RedisBackend(port=server.port)
    opening = asyncio.create_task(backend.open())
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait({opening})
    assert opening.cancelled()
    server.broker.restart()
    await backend.open()
    assert backend.traits.durability == "everysec"
    await backend.aclose()


# --- the login --------------------------------------------------------------------------------------------------------


async def test_a_wrong_login_is_an_error_at_once_and_is_not_tried_again(new_server: NewServer) -> None:
    server = new_server()
    server.say("ACL", "SETUSER", "worker", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    server.say("ACL", "SETUSER", "default", "resetpass", ">else", "nopass")
    before = len(server.say("ACL", "LOG"))
    wrong = [("worker", "wrong"), ("nobody", PASSWORD)]
    for user, password in wrong:
        seconds, error = await refused(RedisBackend(port=server.port, username=user, password=password))
        assert isinstance(error, AuthenticationFailed)
        assert seconds < 1.0
        assert not error.retryable
        assert password not in str(error)
    logged = server.say("ACL", "LOG")[: len(server.say("ACL", "LOG")) - before]
    assert sum(int(_field(entry, "count")) for entry in logged) == len(wrong)


async def test_a_login_that_is_refused_later_on_is_not_tried_again_until_somebody_calls_a_second_later(
    server: "Server",
) -> None:
    """Each connection asks once; what is called then fails at once. Who is let in again is in again."""
    server.say("ACL", "SETUSER", "worker", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    backend = RedisBackend(port=server.port, username="worker", password=PASSWORD)
    await backend.open()
    await backend.declare(QueueSpec("jobs"))
    server.say("ACL", "SETUSER", "worker", "resetpass", ">another")
    server.say("ACL", "LOG", "RESET")
    server.say("CLIENT", "KILL", "USER", "worker")
    for _ in range(10):
        async with asyncio.timeout(2):
            [outcome] = await backend.publish("jobs", [Message(new_job_id(), b"{}")])
        assert isinstance(outcome, AuthenticationFailed)
        assert outcome.outcome == "not_done"
        await asyncio.sleep(0.05)
    assert [int(_field(entry, "count")) for entry in server.say("ACL", "LOG")] == [1]
    server.say("ACL", "SETUSER", "worker", "resetpass", f">{PASSWORD}")
    async with asyncio.timeout(10):
        while await backend.publish("jobs", [Message("back", b"{}")]) != ["stored"]:  # noqa: ASYNC110 (no bell)
            await asyncio.sleep(0.05)
    await backend.aclose()


async def test_a_login_that_was_left_out_is_an_error_at_once(new_server: NewServer) -> None:
    server = new_server()
    server.say("ACL", "SETUSER", "admin", "on", ">other", "~*", "&*", "+@all")
    server.say("ACL", "SETUSER", "default", "resetpass", f">{PASSWORD}")
    seconds, error = await refused(RedisBackend(port=server.port))
    assert isinstance(error, AuthenticationFailed)
    assert seconds < 1.0
    backend = RedisBackend(port=server.port, password=PASSWORD)
    await backend.open()
    await backend.aclose()


def _field(entry: Any, name: str) -> Any:
    return entry[name] if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True))[name]


# --- what the server would do to the jobs -----------------------------------------------------------------------------


async def test_a_server_that_evicts_is_refused_unless_that_is_allowed(new_server: NewServer) -> None:
    server = new_server(maxmemory="100mb", maxmemory_policy="allkeys-lru")
    _, error = await refused(RedisBackend(port=server.port))
    assert isinstance(error, UnsafeBackend)
    assert not error.retryable
    assert "allkeys-lru" in str(error)
    assert "noeviction" in str(error)
    assert "allow_eviction=True" in str(error)
    assert await opened_on(server, allow_eviction=True) == "everysec"
    server.say("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert await opened_on(server) == "everysec"
    server.say("CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "maxmemory", "0")  # never full
    assert await opened_on(server) == "everysec"


@pytest.mark.parametrize(
    ("setting", "durability"), [("always", "always"), ("everysec", "everysec"), ("no", "os")], ids=str
)
async def test_the_durability_is_the_servers(
    new_server: NewServer, caplog: pytest.LogCaptureFixture, setting: str, durability: str
) -> None:
    server = new_server(appendfsync=setting)
    with caplog.at_level(logging.WARNING, "mindtrace.jobs"):
        assert await opened_on(server, require_durable=True) == durability
    assert caplog.messages == []


async def test_without_a_log_on_disk_there_is_a_warning_and_where_that_is_asked_for_an_error(
    new_server: NewServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = new_server(appendonly="no")
    with caplog.at_level(logging.WARNING, "mindtrace.jobs"):
        assert await opened_on(server) == "memory"
    [warning] = caplog.messages
    assert "loses the jobs stored since its last snapshot" in warning
    assert "appendonly yes" in warning
    _, error = await refused(RedisBackend(port=server.port, require_durable=True))
    assert isinstance(error, UnsafeBackend)
    assert "appendonly yes" in str(error)


@pytest.mark.parametrize("may_not", [["-config"], ["-info"], ["-config", "-info"]], ids=" ".join)
async def test_what_the_server_does_not_tell_is_unknown_and_no_error(new_server: NewServer, may_not: list[str]) -> None:
    server = new_server()
    server.say("ACL", "SETUSER", "worker", "on", f">{PASSWORD}", "~*", "&*", "+@all", *may_not)
    assert await opened_on(server, username="worker", password=PASSWORD) == "unknown"


async def test_calls_wait_while_the_server_loads_its_data(new_server: NewServer) -> None:
    """Of a backend that was open before the server came back, and of one that is opened meanwhile."""
    loading = {"aof_use_rdb_preamble": "yes", "key_load_delay": "1000", "loading_process_events_interval_bytes": "1024"}
    server = new_server(enable_debug_command="yes", appendonly="no", **loading)
    before = RedisBackend(port=server.port)
    await before.open()
    await before.declare(QueueSpec("jobs"))
    server.say("DEBUG", "POPULATE", 1500, "filler", 10)
    server.say("SAVE")  # what an append-only file begins with; at the start it is read key by key
    server.broker.kill()
    restarting = asyncio.create_task(asyncio.to_thread(server.broker.restart))
    while not await asyncio.to_thread(_is_loading, server):  # noqa: ASYNC110 (nobody tells)
        await asyncio.sleep(0.01)
    meanwhile = RedisBackend(port=server.port)
    await meanwhile.open()
    outcomes = await asyncio.gather(
        before.publish("jobs", [Message(new_job_id(), b"{}")]),
        meanwhile.publish("jobs", [Message(new_job_id(), b"{}")]),
    )
    assert outcomes == [["stored"], ["stored"]]
    assert (await before.depth("jobs")).ready == 2
    await restarting
    await before.aclose()
    await meanwhile.aclose()


def _is_loading(server: "Server") -> bool:
    try:
        return bool(server.info("persistence")["loading"])
    except redis.ConnectionError:
        return False


# --- TLS --------------------------------------------------------------------------------------------------------------


class Certificates:
    """Two authorities, and a certificate for `localhost` by the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = shutil.which("openssl")
        assert self._program, "the tests of TLS make their certificates with the program openssl: install it"
        self.ours, self.another = self._authority("ours"), self._authority("another")
        self.key, self.certificate = folder / "server.key", folder / "server.crt"
        names = folder / "names"
        names.write_text("subjectAltName=DNS:localhost\n")
        request = folder / "server.csr"
        self._run("req", *self._new_key(self.key), "-subj", "/CN=localhost", "-out", request)
        self._run(
            *("x509", "-req", "-in", request, "-CA", self.ours, "-CAkey", folder / "ours.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", names, "-out", self.certificate),
        )

    def _authority(self, name: str) -> Path:
        certificate = self._folder / f"{name}.crt"
        key = self._new_key(self._folder / f"{name}.key")
        self._run("req", "-x509", *key, "-days", "2", "-subj", f"/CN={name}", "-out", certificate)
        return certificate

    @staticmethod
    def _new_key(file: Path) -> list[str | Path]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", file]

    def _run(self, *words: str | Path) -> None:
        subprocess.run([str(self._program), *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls_port(new_server: NewServer, certificates: Certificates) -> int:
    """Where a server listens that takes encrypted connections only there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    new_server(
        tls_port=str(port),
        tls_cert_file=str(certificates.certificate),
        tls_key_file=str(certificates.key),
        tls_ca_cert_file=str(certificates.ours),
        tls_auth_clients="no",
    )
    return port


async def test_a_certificate_that_is_vouched_for_is_accepted(
    tls_port: int, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    backend = RedisBackend.from_url(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={certificates.ours}")
    with caplog.at_level(logging.WARNING, "mindtrace.jobs"):
        await backend.open()
    await backend.declare(QueueSpec("jobs"))
    assert await backend.publish("jobs", [Message(new_job_id(), b"{}")]) == ["stored"]
    async with backend.receiver(["jobs"]) as receiver:  # its bell and its keeper connect alike
        assert len(await receiver.receive(1, wait=5)) == 1
        assert await receiver.receive(1, wait=0.1) == []
    await backend.aclose()
    assert caplog.messages == []


async def test_a_certificate_that_nobody_vouches_for_is_refused_unless_that_is_allowed(
    tls_port: int, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """By another authority, by none that this system knows, for another name; allowed, it is a warning each time."""
    ends = await asyncio.gather(
        refused(RedisBackend(port=tls_port, tls=True, ca_certs=str(certificates.another))),
        refused(RedisBackend(port=tls_port, tls=True)),
        refused(RedisBackend("127.0.0.1", port=tls_port, tls=True, ca_certs=str(certificates.ours))),
    )
    for _, error in ends:
        assert isinstance(error, BackendUnavailable)
        assert "certificate verify failed" in str(error).lower()
    with caplog.at_level(logging.WARNING, "mindtrace.jobs"):
        for _ in range(2):
            backend = RedisBackend(port=tls_port, tls=True, allow_insecure=True)
            await backend.open()
            await backend.declare(QueueSpec("jobs"))
            await backend.aclose()
    warnings = [text for text in caplog.messages if "not verified" in text]
    assert len(warnings) == 2
    assert "allow_insecure=True" in warnings[0]
