"""The README's Python, run block by block from top to bottom as a reader would, in one namespace; and its facts."""

import asyncio
import base64
import dataclasses
import hashlib
import inspect
import json
import logging
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from pydantic import BaseModel

import mindtrace.jobs
from mindtrace.jobs import (
    AsyncOrchestrator,
    AuthenticationFailed,
    ConfigError,
    Depth,
    Job,
    JobSchema,
    LocalBackend,
    LocalClient,
    LocalConsumerBackend,
    Orchestrator,
    QueueNotFound,
    QueueSpec,
    RabbitMQBackend,
    RabbitMQClient,
    RabbitMQConsumerBackend,
    RedisBackend,
    RedisClient,
    RedisConsumerBackend,
    RetryPolicy,
    Traits,
    Worker,
)
from mindtrace.jobs.clients import Client
from mindtrace.jobs.testing import brokers
from mindtrace.jobs.wire import HEADERS_LIMIT, PAYLOAD_LIMIT, Envelope, decode, encode

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


class Reader:
    """Someone who runs the page from its top, and sees what each `run` on it was given and returned."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "readme"}
        self.runs: list[tuple[dict[str, Any], Any]] = []
        self.interrupted = 0
        self._ran = threading.Event()
        self._left = list(BLOCKS)
        self._clients: set[Client[Any]] = set()

    def read(self, up_to: str = "") -> "Reader":
        """Run the blocks up to the first that contains this text; without, all that are left."""
        while self._left:
            block = self._left.pop(0)
            endless = "consumer.consume()\n" in block
            with self.watched(), self._ctrl_c_once_idle() if endless else _nothing():
                try:
                    exec(compile(block, "README.md", "exec"), self.names)  # noqa: S102 (our own page)
                except KeyboardInterrupt:
                    self.interrupted += 1
            for value in self.names.values():
                if isinstance(value, Client):
                    self._clients.add(value)
                elif isinstance(value, Orchestrator):
                    self._clients.add(value.backend)
            if up_to and up_to in block:
                return self
        assert not up_to, f"no block has {up_to!r}"
        return self

    def close(self) -> None:
        """Close what the page has opened: it trusts in the end of its program for that."""
        for client in self._clients:
            client.close()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the runs that this thread makes; the page stays as it is."""

        def watch(frame: FrameType, event: str, value: Any) -> None:
            code = frame.f_code
            if event == "return" and (code.co_filename, code.co_name) == ("README.md", "run"):
                self.runs.append((frame.f_locals["job_dict"], value))
                self._ran.set()

        sys.setprofile(watch)
        try:
            yield
        finally:
            sys.setprofile(None)

    @contextmanager
    def _ctrl_c_once_idle(self) -> Iterator[None]:
        """For a block that consumes without end: one job for it, then Ctrl-C."""
        started = threading.Event()
        told = logging.Handler()
        told.emit = lambda record: started.set() if record.getMessage().startswith("worker ") else None
        log = logging.getLogger("mindtrace.jobs")
        main = threading.get_ident()

        def interrupt() -> None:
            assert started.wait(10)
            jobs, queue = self.names["orchestrator"], self.names["consumer"].job_type_name
            self._ran.clear()
            jobs.publish(queue, Job(name="sum", schema_name="sum", input_data={"operation": "add", "a": 1, "b": 2}))
            assert self._ran.wait(10)
            while (depth := jobs.depth(queue)) not in (Depth(0, 0, 0, 0), Depth(0, None, None, 0)):
                assert depth.dead == 0
            signal.pthread_kill(main, signal.SIGINT)

        helper = threading.Thread(target=interrupt)
        before, level = signal.signal(signal.SIGINT, signal.default_int_handler), log.level
        log.addHandler(told)
        log.setLevel(logging.INFO)
        try:
            helper.start()
            yield
        finally:
            helper.join()
            log.setLevel(level)
            log.removeHandler(told)
            signal.signal(signal.SIGINT, before)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _the_usual_ports_lead_to(urls: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever connects to localhost from an event loop, at a port of these, comes to the server of this URL.

    The page says that Redis and RabbitMQ are there, and no test may listen there, or meet what does. So its words stay
    as they are, and so does every class they name: the road out of the loop is what turns.
    """
    connect = asyncio.BaseEventLoop.create_connection

    async def connected(loop: Any, protocol: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if host == "localhost" and port in (6379, 5672):
            assert port in urls, f"this part of the page needs no server at {port}"
            parts = urlsplit(urls[port])
            host, port = parts.hostname, parts.port
        return await connect(loop, protocol, host, port, **options)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.BaseEventLoop, "create_connection", connected)
        yield


def _ours(server: brokers.Broker) -> list[str]:
    """The connections of the library to it."""
    with redis.Redis.from_url(server.url, decode_responses=True) as admin:
        return [client["name"] for client in admin.client_list() if client["name"].startswith("mtjobs:")]


@pytest.fixture
def local_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """For the beginning of the page, which needs no server."""
    reader = Reader()
    with _the_usual_ports_lead_to({}, monkeypatch):
        yield reader
        reader.close()


@pytest.fixture
def server() -> Iterator[brokers.Broker]:
    """A Redis that nobody else reads the page on."""
    with brokers.redis(private=True) as server:
        yield server


@pytest.fixture
def redis_reader(server: brokers.Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """With that Redis where the page says that one is."""
    reader = Reader()
    with _the_usual_ports_lead_to({6379: server.url}, monkeypatch):
        yield reader
        reader.close()
        assert _ours(server) == []


def rights() -> list[list[str]]:
    """The words of each `rabbitmqctl` about users with few rights, as a shell would pass them on."""
    part = README.split("### Users with few rights on RabbitMQ\n")[1].split("\n## ")[0]
    return [shlex.split(line)[1:] for line in part.splitlines() if line.startswith("rabbitmqctl ")]


def _user(name: str, password: str) -> dict[str, str]:
    """As RabbitMQ keeps it: the hash begins with its salt, of four bytes."""
    salt = b"salt"
    kept = base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
    algorithm = "rabbit_password_hashing_sha256"
    return {"name": name, "password_hash": kept, "hashing_algorithm": algorithm, "tags": ""}


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[brokers.Broker]:
    """A RabbitMQ that nobody else reads the page on, with the users of the page."""
    users = [_user("user", "password")]
    hosts = [{"name": "/"}]
    permissions = [{"user": "user", "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}]
    for words in rights():
        match words:
            case ["add_vhost", name]:
                hosts.append({"name": name})
            case ["add_user", name, password]:
                users.append(_user(name, password))
            case ["set_permissions", "-p", host, name, configure, write, read]:
                permissions.append({"user": name, "vhost": host, "configure": configure, "write": write, "read": read})
            case _:
                raise AssertionError(words)
    definitions = tmp_path_factory.mktemp("rabbitmq") / "definitions.json"
    definitions.write_text(json.dumps({"users": users, "vhosts": hosts, "permissions": permissions}))
    with brokers.rabbitmq(settings={"load_definitions": str(definitions)}) as server:
        yield server


@pytest.fixture
def reader(server: brokers.Broker, rabbitmq: brokers.Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """With both servers where the page says that they are, and no job of the page on either."""
    reader = Reader()
    with _the_usual_ports_lead_to({6379: server.url, 5672: rabbitmq.url}, monkeypatch):
        yield reader
        reader.close()
        assert _ours(server) == []
    asyncio.run(_without_queues(rabbitmq.url))


async def _without_queues(url: str) -> None:
    async with AsyncOrchestrator(RabbitMQBackend.from_url(url)) as jobs:
        for queue in ("checkout", "maths_operations", "rabbitmq_priority"):
            with suppress(QueueNotFound):
                await jobs.delete(queue, force=True)


def on_redis(test: Any) -> Any:
    return pytest.mark.redis(pytest.mark.uses_broker("redis")(test))


def on_rabbitmq(test: Any) -> Any:
    return pytest.mark.rabbitmq(pytest.mark.uses_broker("rabbitmq")(test))


def on_both(test: Any) -> Any:
    return on_redis(on_rabbitmq(test))


@on_both
def test_every_block_of_the_page_runs(reader: Reader) -> None:
    reader.read()
    assert reader.interrupted == 3
    asyncio.run(reader.names["test_a_product_is_computed"]())
    assert len(BLOCKS) >= 17


@pytest.mark.local
def test_the_basic_example_computes_its_product_and_leaves_nothing_behind(local_reader: Reader) -> None:
    local_reader.read("consumer.consume(num_messages=1)")
    assert [value["operation_performed"] for _, value in local_reader.runs] == ["multiply(7.0, 3.0) = 21.0"]
    assert local_reader.names["orchestrator"].depth("maths_operations") == Depth(0, 0, 0, 0)


@pytest.mark.local
def test_what_a_run_is_given(local_reader: Reader) -> None:
    [(job_dict, _)] = local_reader.read("consumer.consume(num_messages=1)").runs
    assert {type(value) for value in job_dict.values()} <= {str, int, dict}
    assert set(job_dict) == set(re.findall(r"`(\w+)`", README.split("- `job_dict` has")[1].split(", as JSON")[0]))


@on_redis
def test_the_url_and_the_backend_of_the_page_store_jobs_and_namespaces_keep_them_apart(
    redis_reader: Reader, server: brokers.Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(redis_reader.read("async def on_redis").names["on_redis"]())
    assert capsys.readouterr().out == "[]\n"

    async def stored() -> tuple[list[QueueSpec], Depth]:
        async with AsyncOrchestrator(RedisBackend.from_url(server.url)) as jobs:
            return await jobs.queues(), await jobs.depth("checkout")

    assert asyncio.run(stored()) == ([QueueSpec("checkout")], Depth(1, 0, 0, 0))


@on_both
def test_the_url_and_the_backend_of_rabbitmq_store_jobs_and_namespaces_keep_them_apart(
    reader: Reader, rabbitmq: brokers.Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(reader.read("async def on_rabbitmq").names["on_rabbitmq"]())
    assert capsys.readouterr().out == "[]\n"

    async def stored() -> Depth:
        async with AsyncOrchestrator(RabbitMQBackend.from_url(rabbitmq.url)) as jobs:
            return await jobs.depth("checkout")

    assert asyncio.run(stored()) == Depth(1, None, None, 0)


def _consumes_without_a_schema(reader: Reader, client: type[Client[Any]], interrupted: int) -> None:
    """The whole numbers stay whole: no model has turned them into floats. Then Ctrl-C ended the endless `consume()`."""
    assert type(reader.names["orchestrator"].backend) is client
    assert reader.runs[-1][1]["operation_performed"] == "add(1, 2) = 3"
    assert reader.interrupted == interrupted


@on_redis
def test_a_consumer_connects_where_no_schema_is_known_and_inputs_are_not_checked(redis_reader: Reader) -> None:
    _consumes_without_a_schema(redis_reader.read("import RedisClient"), RedisClient, 1)


@on_both
def test_so_it_does_on_rabbitmq_and_after_the_backend_was_switched(reader: Reader) -> None:
    _consumes_without_a_schema(reader.read("import RabbitMQClient"), RabbitMQClient, 2)
    _consumes_without_a_schema(reader.read("# Same orchestrator and consumer"), RabbitMQClient, 3)


@on_redis
def test_an_orchestrator_of_a_url_sees_the_queue_of_the_client_before_it(
    redis_reader: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    redis_reader.read("import RedisClient")
    job = Job(name="sum", schema_name="sum", input_data={"a": 1})
    redis_reader.names["orchestrator"].publish("maths_operations", job)
    redis_reader.read("Orchestrator.from_url(")
    assert capsys.readouterr().out == "1\n"


@pytest.mark.local
def test_the_local_backend_is_detected(local_reader: Reader) -> None:
    names = local_reader.read("consumer.consume(num_messages=1)").names
    assert type(names["orchestrator"].backend) is LocalClient
    assert type(names["consumer"].consumer_backend) is LocalConsumerBackend
    assert type(names["orchestrator"].create_consumer_backend_for_schema(names["schema"])) is LocalConsumerBackend


@on_redis
def test_redis_is_detected(redis_reader: Reader) -> None:
    names = redis_reader.read("import RedisClient").names
    assert type(names["orchestrator"].backend) is RedisClient
    assert type(names["consumer"].consumer_backend) is RedisConsumerBackend
    assert type(names["orchestrator"].create_consumer_backend_for_schema(names["schema"])) is RedisConsumerBackend


@on_both
def test_rabbitmq_is_detected(reader: Reader) -> None:
    names = reader.read("# Automatically detects backend type").names
    detected = names["consumer"].consumer_backend
    assert type(names["orchestrator"].backend) is RabbitMQClient
    assert type(detected) is RabbitMQConsumerBackend
    assert f"`prefetch_count={detected.prefetch_count}`" in README
    assert type(names["orchestrator"].create_consumer_backend_for_schema(names["schema"])) is RabbitMQConsumerBackend


@on_both
@pytest.mark.parametrize(
    ("queue", "priorities", "results"),
    [
        ("priority_tasks", [10, 5, 1], [1024.0, 2.0, 3.0]),
        ("redis_priority", [100, 50], [27.0, 2.0]),
        ("rabbitmq_priority", [255, 128], [27.0, 2.0]),
    ],
)
def test_higher_priorities_are_consumed_first_by_a_consumer_of_an_orchestrator_that_knows_no_schema(
    reader: Reader, queue: str, priorities: list[int], results: list[float]
) -> None:
    reader.read(f'declare_queue("{queue}"')
    reader.runs.clear()
    consumer = reader.names["MathsConsumer"](queue)
    consumer.connect(reader.names["orchestrator"])
    with reader.watched():
        assert consumer.consume(num_messages=len(priorities)) == len(priorities)
    assert [job_dict["priority"] for job_dict, _ in reader.runs] == priorities
    assert [value["result"] for _, value in reader.runs] == results


# --- the facts about Redis and RabbitMQ


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below this heading, without its own."""
    table = re.findall(r"^\|(.*)\|$", README.split(f"{heading}\n")[1].split("\n##")[0], re.MULTILINE)
    return [[cell.strip() for cell in re.split(r" \|(?: |$)", row)] for row in table[2:]]


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("## Redis", RedisBackend),
        ("## Redis", RedisClient),
        ("## RabbitMQ", RabbitMQBackend),
        ("## RabbitMQ", RabbitMQClient),
    ],
)
def test_the_table_of_options_has_each_with_its_default(heading: str, kind: Any) -> None:
    told = {}
    for names, defaults, *_ in rows(heading):
        found = re.findall(r"`(\w+)`", names)
        values = re.findall(r"`([\w./]+)`", defaults) * (len(found) if defaults.count("`") == 2 else 1)
        told.update(zip(found, values, strict=True))
    options = inspect.signature(kind).parameters
    assert told == {name: str(parameter.default) for name, parameter in options.items()}


def test_the_table_of_what_each_backend_can_do_has_every_trait_as_it_is() -> None:
    """In the order of the fields, each with what it means; what a server decides is still unknown here."""
    backends = [LocalBackend(), RedisBackend(), RabbitMQBackend()]
    head = re.findall(r"^\| trait \| (.*) \| what it means \|$", README, re.MULTILINE)
    assert [name.lower() for name in head[0].split(" | ")] == [backend.traits.name for backend in backends]
    fields = [field.name for field in dataclasses.fields(Traits) if field.name != "name"]
    table = rows("## What each backend can do")
    assert [name for name, *_ in table] == [f"`{field}`" for field in fields]
    for field, (_, *told, means) in zip(fields, table, strict=True):
        assert told == [_shown(getattr(backend.traits, field)) for backend in backends], field
        assert means


def _shown(value: object) -> str:
    """A trait as the page writes it."""
    match value:
        case bool():
            return "yes" if value else "no"
        case str():
            return f"`{value}`"
        case None:
            return "none"
        case float():
            return f"{value:g} s"
        case (lowest, highest):
            return f"{_number(lowest)} to {_number(highest)}"
    raise AssertionError(f"{value!r}: how is it to be written?")


def _number(value: int) -> str:
    return {-(2**31): "-2^31", 2**31 - 1: "2^31 - 1"}.get(value, str(value))


@on_redis
@pytest.mark.parametrize(("appendonly", "appendfsync", "durability"), [row[:3] for row in rows("### What is stored")])
def test_the_durability_of_a_server_is_the_one_of_the_table(appendonly: str, appendfsync: str, durability: str) -> None:
    settings = {"appendonly": appendonly.strip("`"), "appendfsync": appendfsync.strip("`")}

    async def opened(url: str) -> str:
        async with AsyncOrchestrator(RedisBackend.from_url(url)) as jobs:
            return jobs.backend.traits.durability

    with brokers.redis(settings=settings) as server:
        assert asyncio.run(opened(server.url)) == durability.strip("`")


def the_user_of_the_page() -> list[str]:
    """The words of `ACL SETUSER`, as a shell would pass them on."""
    [line] = re.findall(r"^redis-cli (ACL SETUSER (?:.*\\\n)*.*)$", README, re.MULTILINE)
    return shlex.split(line.replace("\\\n", ""))


@on_redis
def test_the_user_of_the_page_may_do_all_that_the_library_asks_for(server: brokers.Broker) -> None:
    """Every call there is, and what a worker asks for; the server keeps a log of what it refused."""

    class Fails(mindtrace.jobs.AsyncConsumer[Any, Any]):
        retry = RetryPolicy(max_attempts=2, base=0.01)

        async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
            if job_dict["input_data"]:
                raise ConnectionError
            return {}

    def job(*, fails: bool = False) -> Job:
        return Job(name="q", schema_name="q", input_data={"fails": True} if fails else {})

    async def everything(url: str) -> None:
        async with AsyncOrchestrator(RedisBackend.from_url(url)) as jobs:
            for spec in (QueueSpec("q"), QueueSpec("stack", "stack"), QueueSpec("ranked", "priority", 9, 5)):
                await jobs.declare(spec)
                await jobs.publish(spec.name, job(), job_id="twice")
                await jobs.publish(spec.name, job(), job_id="twice")
                await jobs.publish(spec.name, job(), delay=0.01)
                assert await jobs.receive_message(spec.name)
            assert len(await jobs.queues()) == 3
            await jobs.publish("q", job(fails=True), retry=2)
            await Worker(jobs, [Fails("q")], max_jobs=3, lease=0.3).run()  # which waits at the bell, too
            letters = jobs.dead_letters("q")
            [record] = (await letters.list()).records
            await letters.get(record.message.id)
            assert await letters.replay() == 1
            assert await jobs.receive_message("q")
            await jobs.publish("q", job(fails=True), retry=False)
            await Worker(jobs, [Fails("q")], max_jobs=1).run()
            assert (await letters.count(), await letters.purge()) == (1, 1)
            await jobs.publish("q", job())
            async with jobs.backend.receiver(["q"]) as receiver:
                held = await receiver.receive(1, wait=5)
                assert await receiver.extend(held) == [None]
            async with jobs.backend.receiver(["q"], lease=0.1, keep=False, crash_limit=1) as receiver:
                assert await receiver.receive(1, wait=5)
                assert await receiver.receive(1, wait=0.5) == []  # it lapses, and is dead
            assert await jobs.clean("stack") == 1
            await jobs.delete("stack", force=True)

    with redis.Redis.from_url(server.url, decode_responses=True) as admin:
        admin.execute_command(*the_user_of_the_page())
        asyncio.run(asyncio.wait_for(everything(server.url.replace("//", "//jobs:a-password@")), 20))
        assert [entry["object"] for entry in admin.acl_log()] == []


class Errand(BaseModel):
    fails: bool = False


class Runs(mindtrace.jobs.AsyncConsumer[Any, Any]):
    """Fails where it is told to."""

    retry = RetryPolicy(max_attempts=2, base=0.01)

    async def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        if job_dict["input_data"].get("fails"):
            raise ConnectionError
        return {}


def _as(user: str, server: brokers.Broker) -> AsyncOrchestrator:
    url = server.url.replace("user:password", f"{user}:a-password") + "jobs"
    return AsyncOrchestrator(RabbitMQBackend.from_url(url))


@on_rabbitmq
def test_the_users_of_the_page_may_do_what_it_says_on_rabbitmq_and_no_more(rabbitmq: brokers.Broker) -> None:
    """The publisher comes first to a delay of one length, the worker to a longer one: each makes its levels."""
    well, fails = (
        Job(name="q", schema_name="q", input_data={}),
        Job(name="q", schema_name="q", input_data={"fails": True}),
    )

    async def everything() -> None:
        async with _as("administrator", rabbitmq) as admin:
            await admin.declare(QueueSpec("q"))
            await admin.declare(QueueSpec("ranked", "priority", 9, 5))
            async with _as("publisher", rabbitmq) as jobs:
                await jobs.register(JobSchema("q", Errand))
                await jobs.publish("q", fails)
                await jobs.publish("q", well, delay=0.2, job_id="later")
                await jobs.publish("ranked", well, priority=9)
                with pytest.raises(AuthenticationFailed):
                    await jobs.receive_message("q")
                with pytest.raises(AuthenticationFailed):
                    await jobs.dead_letters("q").list()
                with pytest.raises(AuthenticationFailed):
                    await jobs.declare(QueueSpec("other"))
                with pytest.raises(AuthenticationFailed):
                    await jobs.delete("q", force=True)
            async with _as("worker", rabbitmq) as jobs:
                with pytest.raises(AuthenticationFailed):
                    await jobs.declare(QueueSpec("other"))
                with pytest.raises(AuthenticationFailed):
                    await jobs.delete("q", force=True)
                await Worker(jobs, [Runs("q"), Runs("ranked")], max_jobs=4).run()
                await jobs.publish("q", well, delay=3600)
                await jobs.publish("q", well)
            assert await admin.clean("q") == 1
            letters = admin.dead_letters("q")
            [record] = (await letters.list()).records
            assert record.message.id == fails.id
            assert await letters.replay() == 1
            assert await admin.receive_message("q")
            await admin.delete("q", force=True)
            await admin.delete("ranked", force=True)

    asyncio.run(asyncio.wait_for(everything(), 40))


# --- the facts about the rest


@pytest.mark.parametrize("name", ["Consumer", "Orchestrator"])
def test_the_reference_tells_the_signatures_as_they_are(name: str) -> None:
    [block] = [block for block in BLOCKS if "def receive_message" in block]
    names: dict[str, Any] = {"JobSchema": JobSchema, "Orchestrator": Orchestrator}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102 (our own page)
    documented, real = names[name], getattr(mindtrace.jobs, name)
    for method, function in inspect.getmembers(documented, inspect.isfunction):
        told = inspect.signature(function).parameters
        if method == "run":  # a user's to write
            assert list(told) == ["self", "job_dict"]
            continue
        is_so = inspect.signature(getattr(real, method)).parameters
        assert [(p.name, p.kind, p.default) for p in told.values()] == [
            (p.name, p.kind, p.default) for p in is_so.values()
        ], method


def test_the_json_of_the_page_is_a_job() -> None:
    [example] = re.findall(r"^```json\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    envelope = decode(example.encode(), PAYLOAD_LIMIT)
    assert isinstance(envelope, Envelope)
    assert (envelope.schema_name, envelope.input_data["operation"]) == ("maths_operations", "multiply")


def test_the_table_of_the_wire_format_has_every_key_there_is() -> None:
    everything = Envelope("id", "name", "schema", {}, 1, 2, 3, {"k": "v"}, 4.0, RetryPolicy(max_attempts=5))
    table = README.split("## Wire format")[1].split("## ")[0]
    told = [key for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    assert sorted(told) == sorted(json.loads(encode(everything, PAYLOAD_LIMIT)))


def test_the_table_of_defaults_says_what_the_code_does() -> None:
    worker = {name: parameter.default for name, parameter in inspect.signature(Worker).parameters.items()}
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", README.split("## Defaults")[1], re.MULTILINE))
    assert rows["attempts"] == str(RetryPolicy().max_attempts)
    assert rows["crashes until a job is dead"] == str(RetryPolicy().crash_limit)
    assert rows["timeout of a run"] == f"none in `consume()`; {worker['timeout'] / 60:g} min in a `Worker`"
    assert rows["jobs at once"] == f"1 in `consume()`; {worker['concurrency']} in a `Worker`"
    assert rows["lease"].startswith(f"{worker['lease']:g} s")
    assert rows["drain at a stop"].startswith(f"{worker['drain']:g} s")
    assert rows["input"] == f"at most {PAYLOAD_LIMIT // 2**20} MiB of JSON"
    assert rows["headers"] == f"at most {HEADERS_LIMIT // 2**10} KiB of JSON"


@pytest.mark.parametrize("name", ["a" * 128, "a" * 129, "9._-", ".a", "a b", "", "ä"])
def test_the_pattern_of_queue_names_is_the_one_in_use(name: str) -> None:
    [pattern] = re.findall(r"\| queue name \| `(.*?)`", README)
    try:
        accepted = JobSchema(name, Job).queue == name
    except ConfigError:
        accepted = False
    assert accepted == bool(re.fullmatch(pattern, name))


def test_every_link_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert link in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_the_page_names_every_session_and_every_example() -> None:
    sessions = re.findall(r"@nox\.session.*?\n\s+def (\w+)\(", (ROOT / "noxfile.py").read_text("utf-8"))
    contributing = README.split("## Contributing")[1]
    assert sessions
    assert [name for name in sessions if f"`{name}`" not in contributing and f"-s {name}" not in README] == []
    examples = [f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")]
    assert [path for path in examples if f"({path})" not in README.split("## Examples")[1]] == []
