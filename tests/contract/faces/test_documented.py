"""The blocking API as its page documents it, call by call, on every backend it names that there is."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    ConfigError,
    Consumer,
    ConsumerBackendBase,
    Depth,
    Job,
    JobSchema,
    LocalClient,
    LocalConsumerBackend,
    Orchestrator,
    QueueSpec,
    job_from_schema,
)


class MathsInput(BaseModel):
    operation: str = "add"
    a: float = 2.0
    b: float = 1.0


class MathsOutput(BaseModel):
    result: float = 0.0
    operation_performed: str = ""


class MathsConsumer(Consumer):
    def __init__(self, job_type_name: str) -> None:
        super().__init__(job_type_name)
        self.results: list[float] = []

    def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        input_data = job_dict.get("input_data", {})
        operation, a, b = (input_data.get(name) for name in ("operation", "a", "b"))
        if operation == "add":
            result = a + b
        elif operation == "multiply":
            result = a * b
        else:
            raise ValueError(f"Unknown operation: {operation}")
        self.results.append(result)
        return {"result": result, "operation_performed": f"{operation}({a}, {b}) = {result}"}


class Idle(Consumer):
    pass


@pytest.fixture(params=[pytest.param(LocalClient, id="local", marks=pytest.mark.local)])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A client, as the documented API calls a backend."""
    client = request.param()
    yield client
    client.close()


@pytest.fixture
def orchestrator(backend: Any) -> Orchestrator:
    return Orchestrator(backend)


@pytest.fixture
def schema() -> JobSchema[MathsInput, MathsOutput]:
    return JobSchema(name="maths_operations", input=MathsInput(), output=MathsOutput())


def a_job(**fields: Any) -> Job:
    return Job(name="task", schema_name="task", **fields)


def test_the_basic_example_runs(orchestrator: Orchestrator, schema: Any) -> None:
    assert orchestrator.register(schema) == "maths_operations"
    consumer = MathsConsumer("maths_operations")
    consumer.connect(orchestrator)
    job = job_from_schema(schema, MathsInput(operation="multiply", a=7.0, b=3.0))
    assert orchestrator.publish("maths_operations", job) == job.id
    assert orchestrator.count_queue_messages("maths_operations") == 1
    assert consumer.consume(num_messages=1) == 1
    assert consumer.results == [21.0]
    assert orchestrator.receive_message("maths_operations") is None
    assert orchestrator.depth("maths_operations") == Depth(0, 0, 0, 0)


def test_a_consumer_may_connect_before_its_schema_is_known(orchestrator: Orchestrator, schema: Any) -> None:
    """It attaches to the queue of its name, which it declares, and its input is not validated."""
    consumer = MathsConsumer("maths_operations")
    consumer.connect(orchestrator)
    assert orchestrator.queues() == [QueueSpec("maths_operations")]
    orchestrator.publish(
        "maths_operations", Job(name="x", schema_name="x", input_data={"operation": "add", "a": 1, "b": 2})
    )
    assert consumer.consume(num_messages=1) == 1
    assert consumer.results == [3]
    orchestrator.register(schema)
    orchestrator.publish("maths_operations", {"operation": "add"})
    assert consumer.consume(num_messages=1) == 1
    assert consumer.results == [3, 3.0]


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({}, QueueSpec("tasks")),
        ({"queue_type": "fifo"}, QueueSpec("tasks")),
        ({"queue_type": "priority"}, QueueSpec("tasks", "priority")),
        ({"queue_type": "stack"}, QueueSpec("tasks", "stack")),
        ({"max_priority": 255}, QueueSpec("tasks", "priority", 255)),
        ({"queue_type": "priority", "max_priority": 9}, QueueSpec("tasks", "priority", 9)),
    ],
    ids=str,
)
def test_a_client_declares_queues(backend: Any, orchestrator: Orchestrator, options: Any, spec: QueueSpec) -> None:
    for _ in range(2):
        backend.declare_queue("tasks", **options)
    assert orchestrator.queues() == [spec]


def test_higher_numbers_are_processed_first(backend: Any, orchestrator: Orchestrator) -> None:
    backend.declare_queue("priority_tasks", queue_type="priority")
    urgent, normal, background = a_job(), a_job(), a_job()
    orchestrator.publish("priority_tasks", background, priority=1)
    orchestrator.publish("priority_tasks", urgent, priority=10)
    orchestrator.publish("priority_tasks", normal, priority=5)
    seen: list[str] = []

    class Noting(Consumer):
        def run(self, job_dict: dict[str, Any]) -> None:
            seen.append(job_dict["id"])

    consumer = Noting("priority_tasks")
    consumer.connect(orchestrator)
    assert consumer.consume(3) == 3
    assert seen == [urgent.id, normal.id, background.id]


def test_a_consumer_gets_the_backend_that_the_orchestrator_has(orchestrator: Orchestrator, schema: Any) -> None:
    drives = orchestrator.create_consumer_backend_for_schema(schema)
    assert isinstance(drives, LocalConsumerBackend)
    assert isinstance(drives, ConsumerBackendBase)
    assert drives.queue_name == "maths_operations"
    with pytest.raises(ConfigError, match="connect"):
        drives.consume(1)


def test_one_consumer_may_move_to_another_orchestrator(orchestrator: Orchestrator, schema: Any) -> None:
    consumer = MathsConsumer("maths_operations")
    other = Orchestrator(LocalClient())
    for each in (orchestrator, other):
        each.register(schema)
        each.publish("maths_operations", MathsInput())
        consumer.connect(each)
        assert consumer.consume(1) == 1
    other.backend.close()
    assert consumer.results == [3.0, 3.0]


def test_a_job_that_raises_never_escapes_consume(orchestrator: Orchestrator, schema: Any) -> None:
    orchestrator.register(schema)
    orchestrator.publish("maths_operations", MathsInput(operation="divide"), retry=False)
    orchestrator.publish("maths_operations", MathsInput())
    consumer = MathsConsumer("maths_operations")
    consumer.connect(orchestrator)
    assert consumer.consume(num_messages=2) == 2
    assert consumer.results == [3.0]
    [record] = orchestrator.dead_letters("maths_operations").list().records
    assert record.errors[0].message == "Unknown operation: divide"


@pytest.mark.parametrize("n", [0, -1])
def test_consuming_no_jobs_returns_at_once(orchestrator: Orchestrator, n: int) -> None:
    consumer = MathsConsumer("maths_operations")
    consumer.connect(orchestrator)
    orchestrator.publish("maths_operations", a_job())
    assert consumer.consume(n) == 0
    assert orchestrator.count_queue_messages("maths_operations") == 1


def test_a_consumer_that_is_not_connected_says_so() -> None:
    with pytest.raises(ConfigError, match=r"MathsConsumer.*connect"):
        MathsConsumer("maths_operations").consume(1)


def test_a_consumer_with_nothing_to_run_or_without_a_name_is_refused_when_it_is_connected(
    orchestrator: Orchestrator,
) -> None:
    class Nameless(MathsConsumer):
        def __init__(self) -> None:
            Consumer.__init__(self)

    with pytest.raises(ConfigError, match=r"Idle.*neither run nor handle"):
        Idle("maths_operations").connect(orchestrator)
    with pytest.raises(ConfigError, match="name"):
        Nameless().connect(orchestrator)
    assert orchestrator.queues() == []


def test_a_coroutine_may_be_the_run_of_a_blocking_consumer(orchestrator: Orchestrator) -> None:
    seen: list[str] = []

    class Coroutine(Consumer):
        async def run(self, job_dict: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            seen.append(job_dict["id"])

    consumer = Coroutine("tasks")
    consumer.connect(orchestrator)
    job_id = orchestrator.publish("tasks", a_job())
    assert consumer.consume(1) == 1
    assert seen == [job_id]
