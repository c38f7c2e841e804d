"""What is logged when a worker starts, and that no payload is ever logged."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, RootModel, field_validator
from pydantic_core import PydanticCustomError

from mindtrace.jobs import (
    AsyncOrchestrator,
    ConfigError,
    InputInvalid,
    Job,
    JobSchema,
    JobsError,
    QueueNotFound,
    QueueSpec,
    Reject,
    RetryLater,
    RetryPolicy,
    Traits,
    Worker,
)
from mindtrace.jobs.backends.local import LocalBackend
from mindtrace.jobs.wire import Message

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Make = Callable[..., Any]
SECRET = "the-customers-secret"  # noqa: S105 (of a made-up customer)


class Order(BaseModel):
    card: str
    amount: int = 1


class Receipt(BaseModel):
    total: int


class Picky(BaseModel):
    card: str

    @field_validator("card")
    @classmethod
    def _known(cls, value: str) -> str:
        raise ValueError(f"no such card: {value}")


class Precise(BaseModel):
    card: str

    @field_validator("card")
    @classmethod
    def _known(cls, value: str) -> str:
        raise PydanticCustomError("no_card", "no such card: {card}", {"card": value})


class Visa(BaseModel):
    card: Literal["visa"]


class Amex(BaseModel):
    card: Literal["amex"]


class Tagged(RootModel[Annotated[Visa | Amex, Field(discriminator="card")]]):
    pass


def text_of(records: list[logging.LogRecord]) -> str:
    """All that any handler could print of them."""
    formatter = logging.Formatter()
    return "\n".join(f"{formatter.format(record)} {record.__dict__}" for record in records)


async def nothing(_: Any) -> None:
    pass


@pytest.mark.parametrize(("timeout", "said"), [(None, "no timeout"), (300.0, "timeout 300 s")])
async def test_a_worker_says_at_its_start_what_it_does(
    orchestrator: AsyncOrchestrator, consumer: Make, caplog: pytest.LogCaptureFixture, timeout: Any, said: str
) -> None:
    caplog.set_level(logging.INFO, "mindtrace.jobs")
    await orchestrator.register(JobSchema("orders", Order, queue="tills"))
    consumers = [consumer(nothing), consumer(nothing, "orders")]
    worker = Worker(orchestrator, consumers, concurrency=7, timeout=timeout, name="north", until_idle=True)
    await worker.run()
    [line] = [r.getMessage() for r in caplog.records if "concurrency" in r.getMessage()]
    for part in (worker.name, "north@", "jobs", "tills", "concurrency 7", said):
        assert part in line


class Hasty(LocalBackend):
    """Takes a job away from who runs it for longer than half an hour, as it says."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, run_limit=1800.0)


@pytest.mark.parametrize(("timeout", "own", "is_told"), [(300.0, ..., False), (300.0, 1790.0, True), (None, ..., True)])
async def test_a_worker_warns_where_a_run_may_take_longer_than_the_broker_leaves_it(
    consumer: Make, caplog: pytest.LogCaptureFixture, timeout: float | None, own: Any, is_told: bool
) -> None:
    async with AsyncOrchestrator(Hasty()) as orchestrator:
        runs = consumer(nothing)
        if own is not ...:
            type(runs).timeout = own
        await Worker(orchestrator, [runs], timeout=timeout, until_idle=True).run()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == is_told
    assert all("longer than 30 min" in line and "timeout" in line for line in told)


async def test_an_orchestrator_says_when_it_is_opened_how_durable_its_backend_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mindtrace.jobs")
    async with AsyncOrchestrator(LocalBackend()):
        [line] = [record.getMessage() for record in caplog.records]
    assert "local" in line
    assert "memory" in line


async def test_a_record_about_a_job_names_it_and_comes_from_the_librarys_own_loggers(
    orchestrator: AsyncOrchestrator, consumer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(_: Any) -> None:
        raise OSError

    caplog.set_level(logging.DEBUG)
    job_id = await orchestrator.publish("jobs", Job(name="jobs", schema_name="jobs"))
    await Worker(orchestrator, [consumer(act)], retry=False, max_jobs=1).run()
    about = [record for record in caplog.records if job_id in record.getMessage()]
    assert about
    assert all(record.name.startswith("mindtrace.jobs") for record in about)
    assert max(record.levelno for record in about) == logging.ERROR


async def test_no_payload_is_logged_at_any_level_however_a_job_ends(
    orchestrator: AsyncOrchestrator, consumer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ends: dict[str, Any] = {
        "returns": {"total": 1},
        "misfit": {"total": SECRET},
        "raises": ValueError(SECRET),
        "again": RetryLater(3600, SECRET),
        "rejects": Reject(SECRET),
        "cancels": asyncio.CancelledError(SECRET),
        "hangs": None,
    }

    async def act(job: dict[str, Any]) -> Any:
        end = ends[job["headers"]["end"]]
        if isinstance(end, BaseException):
            raise end
        return end or await asyncio.Event().wait()

    def thread(job: dict[str, Any]) -> Any:
        raise KeyError(job["input_data"]["card"])

    for schema in (
        JobSchema("orders", Order, Receipt),
        JobSchema("warned", Order, Receipt, validate_output="warn"),
        JobSchema("threaded", Order, Receipt),
    ):
        await orchestrator.register(schema)
    for queue in ("orders", "warned"):
        for end in ends:
            await orchestrator.publish(
                queue, Order(card=SECRET), headers={"end": end, "x": SECRET}, timeout=0.01, retry=1 + (end == "raises")
            )
    await orchestrator.publish("threaded", Order(card=SECRET), retry=False)
    await orchestrator.publish("orders", {"card": SECRET}, headers={"end": "returns"}, job_id="twice")
    await orchestrator.publish("orders", {"card": SECRET * 2}, headers={"end": "returns"}, job_id="twice")
    for publish in (
        orchestrator.publish("orders", {"card": [SECRET]}),
        orchestrator.publish("orders", Order(card=SECRET), priority=3),
        orchestrator.publish("nowhere", Job(name="x", schema_name="x", input_data={"card": SECRET})),
    ):
        with pytest.raises(JobsError) as refused:
            await publish
        assert SECRET not in str(refused.value)
    envelope = b'{"v":1,"id":"i","name":"%b","created_at":1000,"input":%b}'
    bodies = [
        envelope % (b"orders", b'{"card":["%b"]}' % SECRET.encode()),
        envelope % (b"orders", b'{"%b"' % SECRET.encode()),
        envelope % (b"unknown", b'{"card":"%b"}' % SECRET.encode()),
        SECRET.encode(),
        SECRET.encode() + b"\xff",
        SECRET.encode() * 100_000,
    ]
    await orchestrator.backend.publish("orders", [Message(f"raw-{n}", body) for n, body in enumerate(bodies)])
    consumers = [consumer(act, "orders"), consumer(act, "warned"), consumer(thread, "threaded")]
    worker = Worker(orchestrator, consumers, retry=RetryPolicy(base=0.0), until_idle=True)
    await worker.run()
    assert worker.handled > 20
    assert len(caplog.records) > 20
    assert SECRET not in text_of(caplog.records)


@pytest.mark.parametrize("validate_output", ["warn", "error"])
@pytest.mark.parametrize("model", [Picky, Precise, Tagged])
async def test_no_payload_is_logged_when_a_validator_quotes_it(
    orchestrator: AsyncOrchestrator,
    consumer: Make,
    caplog: pytest.LogCaptureFixture,
    model: type[BaseModel],
    validate_output: Any,
) -> None:
    """One of the user's, or one of pydantic's own."""

    async def act(job: dict[str, Any]) -> Any:
        return job["input_data"]

    caplog.set_level(logging.DEBUG)
    await orchestrator.register(JobSchema("picky", Order, model, validate_output=validate_output))
    await orchestrator.publish("picky", {"card": SECRET})
    await Worker(orchestrator, [consumer(act, "picky")], max_jobs=1).run()
    assert SECRET not in text_of(caplog.records)


async def test_no_error_quotes_the_input_that_it_refuses(orchestrator: AsyncOrchestrator) -> None:
    await orchestrator.register(JobSchema("orders", Order))
    cases = [("orders", {"card": "x", "amount": SECRET})]
    for queue, model in {"picky": Picky, "precise": Precise, "tagged": Tagged}.items():
        await orchestrator.register(JobSchema(queue, model))
        cases.append((queue, {"card": SECRET}))
    for queue, bad in cases:
        with pytest.raises(InputInvalid) as refused:
            await orchestrator.publish(queue, bad)
        assert SECRET not in f"{refused.value} {refused.value.errors}"


async def test_the_errors_of_a_queue_name_it_and_nothing_else(orchestrator: AsyncOrchestrator) -> None:
    with pytest.raises(QueueNotFound, match="nowhere"):
        await orchestrator.publish("nowhere", Job(name=SECRET, schema_name=SECRET))
    with pytest.raises(ConfigError, match="'jobs'") as refused:
        await orchestrator.publish("jobs", {"card": SECRET})
    assert SECRET not in str(refused.value)
    assert await orchestrator.queues() == [QueueSpec("jobs")]
