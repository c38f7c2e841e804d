"""The two services, each started as its first line says, called over HTTP, and stopped by SIGTERM."""

import json
import shlex
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from mindtrace.jobs.testing import brokers

Start = Callable[..., Any]

ROOT = Path(__file__).parents[2]
TEA = {"item": "tea", "email": "ada@example.org"}
LIMIT = 1024**2


@dataclass(frozen=True)
class Example:
    """A service, and what is particular about it.

    Attributes:
        path: of the file whose first line is `command`.
        worker: the command that runs its jobs in a process of its own.
        any_port: how it is asked for a free port: further words of the command, and of the environment.
        stopped: the exit status after SIGTERM.
        absent: the exit status where there is no broker.
    """

    path: str
    command: str
    worker: str
    any_port: tuple[list[str], dict[str, str]]
    stopped: int
    absent: int


EXAMPLES = [
    Example(
        "examples/fastapi_service/app.py",
        "uvicorn examples.fastapi_service.app:app",
        "mindtrace-jobs worker examples.fastapi_service.work:worker",
        (["--port", "0"], {}),
        -signal.SIGTERM,  # once all is shut down, uvicorn ends itself by the signal that it was stopped with
        3,
    ),
    Example(
        "examples/aiohttp_service.py",
        "python examples/aiohttp_service.py",
        "mindtrace-jobs worker examples.aiohttp_service:worker",
        ([], {"PORT": "0"}),
        0,
        1,
    ),
]
EACH = pytest.mark.parametrize("example", EXAMPLES, ids=["fastapi", "aiohttp"])


class Service:
    """One that was started, and calls to it."""

    def __init__(self, example: Example, start: Start, **environment: str) -> None:
        first = (ROOT / example.path).read_text("utf-8").splitlines()[0]
        assert first == f"# {example.command}"
        words, port = example.any_port
        self.example, self.program = example, start(*shlex.split(example.command), *words, **port, **environment)
        self.port = 0

    def up(self) -> "Service":
        """Itself, once it answers."""
        self.port = int(self.program.says(r"unning on http://127\.0\.0\.1:(\d+)")[1])
        return self

    def post(self, order: object, key: str | None = None) -> tuple[int, Any, Mapping[str, str]]:
        """Status, body and headers of the answer."""
        headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request("POST", "/orders", json.dumps(order), headers)
            answer = connection.getresponse()
            return (
                answer.status,
                json.loads(answer.read()),
                {name.lower(): value for name, value in answer.getheaders()},
            )

    def stop(self) -> None:
        """In order, with nothing left behind."""
        assert self.program.stop() == self.example.stopped, "".join(self.program.said)
        assert "Traceback" not in "".join(self.program.said)


def started_worker(example: Example, start: Start, **environment: str) -> Any:
    assert any(example.worker in file.read_text("utf-8") for file in (ROOT / example.path).parent.glob("*.py"))
    return start(*shlex.split(example.worker), **environment)


@pytest.fixture
def redis() -> Iterator[brokers.Broker]:
    with brokers.redis(private=True) as server:
        yield server


@EACH
@pytest.mark.parametrize(
    "broker",
    [
        pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.uses_broker("redis")]),
        pytest.param("own_rabbitmq", marks=[pytest.mark.rabbitmq, pytest.mark.uses_broker("rabbitmq")]),
    ],
)
def test_a_service_hands_in_jobs_that_a_worker_of_another_process_runs(
    example: Example, broker: str, request: pytest.FixtureRequest, start: Start
) -> None:
    url = request.getfixturevalue(broker).url
    service, worker = (
        Service(example, start, MINDTRACE_JOBS_URL=url),
        started_worker(example, start, MINDTRACE_JOBS_URL=url),
    )
    service.up()

    status, body, _ = service.post(TEA)
    assert (status, list(body)) == (202, ["job_id"])
    assert [service.post(TEA | {"item": "cake"}, key="a-cake")[:2] for _ in range(2)] == [
        (202, {"job_id": "a-cake"})
    ] * 2
    assert service.post(TEA | {"item": ""})[0] == 422
    assert service.post(TEA | {"item": "t" * LIMIT})[0] == 413
    assert service.post(TEA | {"item": "the last"})[0] == 202
    worker.says("confirms   the last to ada@example.org")

    service.stop()
    assert worker.stop() == 0
    confirmed = sorted(line.split()[1] for line in worker.said if line.startswith("confirms "))
    cakes = 1 if broker == "redis" else 2  # RabbitMQ knows no ids
    assert confirmed == ["cake"] * cakes + ["tea", "the"]
    assert not [line for line in service.program.said if line.startswith("confirms ")]


@EACH
@pytest.mark.local
def test_without_a_broker_the_service_runs_its_jobs_itself(example: Example, start: Start) -> None:
    service = Service(example, start).up()
    assert service.post(TEA, key="a-tea")[:2] == (202, {"job_id": "a-tea"})
    service.program.says("confirms   tea to ada@example.org")
    assert service.post(TEA, key="a-tea")[0] == 202
    assert service.post(TEA | {"item": "the last"})[0] == 202
    service.program.says("confirms   the last to ada@example.org")
    service.stop()
    assert len([line for line in service.program.said if "confirms   tea" in line]) == 1


@pytest.mark.chaos
@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("redis", "rabbitmq")]
)
def test_while_its_broker_is_away_a_service_answers_503_and_the_same_request_succeeds_afterwards(
    kind: str, start: Start
) -> None:
    with getattr(brokers, kind)(private=True) as broker, ThreadPoolExecutor() as pool:
        services = [Service(example, start, MINDTRACE_JOBS_URL=broker.url) for example in EXAMPLES]
        list(pool.map(Service.up, services))
        broker.kill()
        # Both at once: a publish waits 10 s for its broker.
        for status, body, headers in pool.map(lambda service: service.post(TEA, key="a-tea"), services):
            assert (status, body["error"], body["job_ids"]) == (503, "backend_unavailable", ["a-tea"])
            assert headers["retry-after"] == "5"
        broker.restart()
        for service in services:
            assert service.post(TEA, key="a-tea")[:2] == (202, {"job_id": "a-tea"})
            service.stop()


@pytest.mark.redis
def test_without_its_broker_a_service_does_not_start_and_says_why_without_the_password(start: Start) -> None:
    with socket.socket() as nobody:  # bound and not listening: every connection is refused
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://:open-sesame@127.0.0.1:{nobody.getsockname()[1]}/0"
        services = [Service(example, start, MINDTRACE_JOBS_URL=url) for example in EXAMPLES]
        for service in services:
            assert service.program.ends() == service.example.absent
            said = "".join(service.program.said)
            assert "BackendUnavailable: no Redis at redis://127.0.0.1" in said
            assert "sesame" not in said
