"""What a user's editor and type checker see; checked, never run.

A `type: ignore` below is a promise too: both checkers complain if there is nothing to ignore.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, assert_type

from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncDeadLetters,
    AsyncOrchestrator,
    Backend,
    BackendType,
    Consumer,
    ConsumerBackendBase,
    CurrentJob,
    DeadLetters,
    DeadPage,
    DeadRecord,
    Depth,
    Event,
    ExecutionStatus,
    Health,
    Job,
    JobId,
    JobLeaseLost,
    JobPublished,
    JobSchema,
    JobSettled,
    JobStarted,
    LocalBackend,
    LocalClient,
    Orchestrator,
    QueueSpec,
    RabbitMQBackend,
    RabbitMQClient,
    RabbitMQConsumerBackend,
    Reconnected,
    RedisBackend,
    RedisClient,
    RedisConsumerBackend,
    Retry,
    RetryPolicy,
    RunningJob,
    SchemaMismatch,
    Worker,
    connect,
    current_job,
    job_from_schema,
)


class Take(BaseModel):
    a: int = 0


class Give(BaseModel):
    b: int = 0


# --- schemas and jobs: models as classes or as instances, with and without an output

both = JobSchema("both", Take, Give)
assert_type(both, JobSchema[Take, Give])
assert_type(JobSchema(name="instances", input=Take(), output=Give()), JobSchema[Take, Give])
assert_type(JobSchema(name="mixed", input=Take, output=Give()), JobSchema[Take, Give])
assert_type(JobSchema("no_output", Take), JobSchema[Take, None])
assert_type(JobSchema("no_output", Take()), JobSchema[Take, None])
assert_type(JobSchema("options", Take, Give, queue="q", retry=2, timeout=1.5, priority=3), JobSchema[Take, Give])
assert_type(both.input, type[Take])
assert_type(both.output, type[Give] | None)

JobSchema("no_model", int)  # type: ignore[type-var]
JobSchema("no_option", Take, Give, prio=3)  # type: ignore[call-overload]
JobSchema("no_policy", Take, Give, retry="often")  # type: ignore[call-overload]

job = job_from_schema(both, Take(a=1), job_id="mine", priority=3, headers={"k": "v"})
assert_type(job, Job)
assert_type(job_from_schema(both, {"a": 1}), Job)
assert_type(job.id, JobId)
assert_type(job.priority, int | None)
assert_type(job.created_at, datetime)

job_from_schema(both, Give())  # type: ignore[misc]
job_from_schema(both, 1)  # type: ignore[arg-type]
job_from_schema("both", Take())  # type: ignore[arg-type]
job_from_schema(both, Take(), delay=3)  # type: ignore[call-arg]

assert_type(RetryPolicy(max_attempts=5, base=0.5).max_attempts, int)
RetryPolicy(5)  # type: ignore[call-arg]
RetryPolicy(attempts=5)  # type: ignore[call-arg]


# --- the blocking API

client = LocalClient()
client.declare_queue("queue", queue_type="priority", max_priority=9)
client.declare_queue("queue", queue_type="heap")  # type: ignore[arg-type]
backend: Backend = client.backend
assert_type(client.backend, LocalBackend)
assert_type(client.backend_type, BackendType)
assert_type(LocalClient.backend_type, BackendType)

redis = RedisClient("localhost", 6379, 0)
assert_type(RedisClient(host="localhost", port=6379, db=0), RedisClient)
RedisClient(username="a", password="", tls=True, ca_certs="c", certfile="d", keyfile="e", allow_insecure=False)
RedisClient(namespace="shop", allow_eviction=False, require_durable=True, max_stall=None)
assert_type(RedisClient.from_url("redis://localhost:6379/0", namespace="shop", require_durable=True), RedisClient)
assert_type(redis.backend, RedisBackend)
assert_type(redis.backend_type, BackendType)
redis.declare_queue("queue", queue_type="priority")
RedisClient("localhost", "6379")  # type: ignore[arg-type]
RedisClient("localhost", 6379, 0, "user")  # type: ignore[call-arg]
RedisClient(durable=True)  # type: ignore[call-arg]
RedisClient.from_url("redis://", password="")  # type: ignore[call-arg]

rabbitmq = RabbitMQClient("localhost", 5672, "user", "password")
assert_type(RabbitMQClient(host="localhost", port=5672, username="user", password=""), RabbitMQClient)
RabbitMQClient(virtual_host="/", tls=True, ca_certs="c", certfile="d", keyfile="e", allow_insecure=False)
RabbitMQClient(namespace="shop", heartbeat=5, max_stall=None)
assert_type(RabbitMQClient.from_url("amqp://localhost/", namespace="shop", heartbeat=5), RabbitMQClient)
assert_type(rabbitmq.backend, RabbitMQBackend)
assert_type(rabbitmq.backend_type, BackendType)
rabbitmq.declare_queue("queue", max_priority=255)
RabbitMQClient("localhost", "5672")  # type: ignore[arg-type]
RabbitMQClient("localhost", 5672, "user", "password", "/")  # type: ignore[call-arg]
RabbitMQClient(prefetch_count=1)  # type: ignore[call-arg]
RabbitMQClient.from_url("amqp://", password="")  # type: ignore[call-arg]

orchestrator = Orchestrator(client)
assert_type(Orchestrator(client, require={"stack"}, payload_limit=1024, listeners=[print]), Orchestrator)
assert_type(Orchestrator(redis), Orchestrator)
assert_type(Orchestrator(rabbitmq), Orchestrator)
assert_type(Orchestrator.from_url(), Orchestrator)
assert_type(Orchestrator.from_url("redis://", require={"stack"}, payload_limit=1024, listeners=[print]), Orchestrator)
Orchestrator.from_url(client)  # type: ignore[arg-type]
Orchestrator.from_url("redis://", namespace="shop")  # type: ignore[call-arg]
orchestrator.backend.declare_queue("queue", queue_type="priority")
assert_type(orchestrator.backend.backend_type, BackendType)
assert_type(orchestrator.register(both), str)
assert_type(orchestrator.publish("queue", job), str)
assert_type(orchestrator.publish("queue", Take(), priority=3, delay=1.5, headers={"k": "v"}), str)
assert_type(orchestrator.publish("queue", {"a": 1}, at=datetime.now(UTC), retry=False, timeout=3), str)
assert_type(orchestrator.publish_many("queue", [Take(), job, {"a": 1}], retry=RetryPolicy()), list[str])
assert_type(orchestrator.receive_message("queue"), dict[str, Any] | None)
assert_type(orchestrator.count_queue_messages("queue"), int)
assert_type(orchestrator.depth("queue"), Depth)
assert_type(orchestrator.queues(), list[QueueSpec])
assert_type(orchestrator.clean("queue"), int)

orchestrator.declare(QueueSpec("queue", "stack"))
orchestrator.delete("queue", force=True)
orchestrator.publish("queue", Take(), prio=3)  # type: ignore[call-arg]
orchestrator.publish("queue", "text")  # type: ignore[arg-type]
orchestrator.publish("queue", Take(), 3)  # type: ignore[call-arg]
orchestrator.publish("queue", Take(), delay="soon")  # type: ignore[arg-type]
orchestrator.publish_many("queue", Take())  # type: ignore[arg-type]
Orchestrator()  # type: ignore[call-arg]
Orchestrator(connect())  # type: ignore[arg-type]


class Publish(Protocol):
    """The whole signature, as a hover shows it: every keyword by its name, and no `**kwargs`."""

    def __call__(
        self,
        queue_name: str,
        job: Job | BaseModel | Mapping[str, Any],
        *,
        delay: float | None = None,
        at: datetime | None = None,
        priority: int | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | int | Literal[False] | None = None,
        headers: Mapping[str, str] | None = None,
        job_id: JobId | None = None,
    ) -> str: ...


publish: Publish = orchestrator.publish

letters = orchestrator.dead_letters("queue")
assert_type(letters, DeadLetters)
assert_type(letters.count(), int)
assert_type(letters.list(limit=10, reason="attempts"), DeadPage)
assert_type(letters.list().records, list[DeadRecord])
assert_type(letters.list().cursor, str | None)
assert_type(letters.get("id"), DeadRecord)
assert_type(letters.replay(["id"], rate=10.0), int)
assert_type(letters.purge(schema="both", since=datetime.now(UTC)), int)
letters.list(reason="bored")  # type: ignore[arg-type]


class Plain(Consumer[Any, Any]):
    """The documented consumer: a dict in, a dict out. (Only strict checkers ask for the type arguments.)"""

    def run(self, job_dict: dict[str, Any]) -> dict[str, Any]:
        assert_type(current_job(), CurrentJob)
        return {"b": job_dict["input_data"]["a"]}


class Typed(Consumer[Take, Give]):
    retry = RetryPolicy(max_attempts=5)
    timeout = 60.0

    def handle(self, data: Take) -> Give:
        return Give(b=data.a)


for consumer in (Plain("both"), Typed("both"), Typed()):
    consumer.connect(orchestrator)
    assert_type(consumer.consume(), int)
    assert_type(consumer.consume(3), int)
    assert_type(consumer.consume(num_messages=3), int)
    assert_type(consumer.consumer_backend, ConsumerBackendBase | None)
    consumer.consume("3")  # type: ignore[arg-type]
assert_type(orchestrator.create_consumer_backend_for_schema(both), ConsumerBackendBase)
assert_type(orchestrator.create_consumer_backend_for_schema(both).consume(num_messages=1), int)
assert_type(RedisConsumerBackend("queue", orchestrator).consume(), int)
assert_type(RedisConsumerBackend("queue", orchestrator, poll_timeout=5).poll_timeout, float)
RedisConsumerBackend("queue", orchestrator, timeout=5)  # type: ignore[call-arg]
assert_type(RabbitMQConsumerBackend("queue", orchestrator).consume(), int)
assert_type(RabbitMQConsumerBackend("queue", orchestrator, prefetch_count=1).prefetch_count, int)
RabbitMQConsumerBackend("queue", orchestrator, prefetch=1)  # type: ignore[call-arg]
Plain("both").connect(client)  # type: ignore[arg-type]


# --- the async API


class Coroutine(AsyncConsumer[Take, Give]):
    retry = 2
    timeout = None

    async def handle(self, data: Take) -> Give:
        assert_type(current_job().attempt, int)
        assert_type(current_job().headers, Mapping[str, str])
        return Give(b=data.a)


def listener(event: Event) -> None:
    if isinstance(event, JobSettled):
        assert_type(event.status, ExecutionStatus)
        if isinstance(event.settlement, Retry):
            assert_type(event.settlement.delay, float)
    elif isinstance(event, Reconnected):
        assert_type(event.seconds, float)
    elif isinstance(event, SchemaMismatch):
        assert_type(event.waited, float)
    else:
        assert_type(event, JobPublished | JobStarted | JobLeaseLost)


async def awaited(jobs: AsyncOrchestrator) -> None:
    assert_type(await jobs.publish("queue", Take(), delay=1.5), str)
    assert_type(await jobs.publish_many("queue", [Take()]), list[str])
    assert_type(await jobs.receive_message("queue"), dict[str, Any] | None)
    assert_type(await jobs.depth("queue"), Depth)
    assert_type(jobs.dead_letters("queue"), AsyncDeadLetters)
    assert_type((await jobs.dead_letters("queue").list()).records, list[DeadRecord])
    await jobs.publish("queue", Take(), prio=3)  # type: ignore[call-arg]

    worker = Worker(jobs, [Coroutine("both"), Typed("other")], concurrency=5, timeout=None, listeners=[listener])
    assert_type(await worker.run(), int)
    assert_type(worker.health(), Health)
    assert_type(worker.running(), list[RunningJob])
    worker.configure(queues=["both"], concurrency=2, timeout=None, max_memory=512.0)
    worker.configure(timeout="never")  # type: ignore[arg-type]
    async with worker as entered:
        assert_type(entered, Worker)
    Worker(jobs, Coroutine("both"))  # type: ignore[arg-type]
    Worker(jobs, [Coroutine("both")], workers=5)  # type: ignore[call-arg]


async def opened() -> None:
    async with AsyncOrchestrator(connect(), require={"stack"}, listeners=[listener]) as jobs:
        assert_type(jobs, AsyncOrchestrator)
    AsyncOrchestrator(LocalBackend())
    AsyncOrchestrator(RedisBackend("localhost", 6379, 0, namespace="shop", require_durable=True))
    AsyncOrchestrator(RedisBackend.from_url("rediss://localhost", allow_insecure=True, allow_eviction=True))
    AsyncOrchestrator(RabbitMQBackend("localhost", 5672, "user", "password", virtual_host="/", namespace="shop"))
    AsyncOrchestrator(RabbitMQBackend.from_url("amqps://localhost/", allow_insecure=True, heartbeat=5, max_stall=None))
    RabbitMQBackend("localhost", 5672, "user", "password", "/")  # type: ignore[call-arg]
    RabbitMQBackend(port="5672")  # type: ignore[arg-type]
    AsyncOrchestrator(rabbitmq)  # type: ignore[arg-type]
    RedisBackend("localhost", 6379, 0, "user")  # type: ignore[call-arg]
    RedisBackend(port="6379")  # type: ignore[arg-type]
    AsyncOrchestrator(redis)  # type: ignore[arg-type]
    AsyncOrchestrator(LocalClient())  # type: ignore[arg-type]


def records(page: DeadPage) -> Sequence[str]:
    return [f"{record.reason}: {record.errors[-1].message}" for record in page.records]
