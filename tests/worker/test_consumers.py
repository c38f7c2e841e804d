"""What a consumer class may say, when it is told that it is wrong, and which jobs it gets."""

import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from mindtrace.jobs import (
    AsyncConsumer,
    AsyncOrchestrator,
    ConfigError,
    Consumer,
    Depth,
    Job,
    JobSchema,
    QueueSpec,
    RetryPolicy,
    Worker,
)

pytestmark = [pytest.mark.anyio, pytest.mark.local]

Publish = Callable[..., Awaitable[list[str]]]
Make = Callable[..., Any]


class Take(BaseModel):
    n: int = 0


class Give(BaseModel):
    n: int = 0


class Other(BaseModel):
    n: int = 0


both = pytest.mark.parametrize("base", [AsyncConsumer, Consumer], ids=lambda base: base.__name__)


async def nothing(_: Any) -> None:
    pass


# --- when the class is made


@both
def test_run_and_handle_together_are_refused(base: Any) -> None:
    with pytest.raises(ConfigError, match=r"Torn.*both run and handle"):

        class Torn(base[Take, Give]):
            def run(self, job_dict: Any) -> Any: ...

            def handle(self, data: Any) -> Any: ...


@both
def test_a_method_that_is_added_beside_the_one_of_a_base_class_is_refused(base: Any) -> None:
    class Fine(base[Take, Give]):
        def run(self, job_dict: Any) -> Any: ...

    with pytest.raises(ConfigError, match="both run and handle"):

        class Torn(Fine):
            def handle(self, data: Any) -> Any: ...


@both
def test_handle_without_models_is_refused(base: Any) -> None:
    with pytest.raises(ConfigError, match=r"Untyped.*no models"):

        class Untyped(base):
            def handle(self, data: Any) -> Any: ...


@both
@pytest.mark.parametrize(
    ("typo", "meant"),
    [("retri", "retry"), ("timout", "timeout"), ("time_out", "timeout"), ("job_type_nam", "job_type_name")],
)
def test_a_typo_in_an_option_is_refused_with_what_was_meant(base: Any, typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"Hasty.*{typo!r}.*{meant!r}"):
        type("Hasty", (base,), {"run": lambda self, job: None, typo: 3})


@both
@pytest.mark.parametrize(
    "options",
    [
        {"retry": 0},
        {"retry": True},
        {"retry": "3"},
        {"timeout": 0},
        {"timeout": -1.0},
        {"timeout": math.nan},
        {"timeout": "1"},
        {"ack": "never"},
        {"job_type_name": "a b"},
        {"job_type_name": "jobs.dead"},
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_refused(base: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Wrong"):
        type("Wrong", (base,), {"run": lambda self, job: None, **options})


@both
def test_attributes_that_are_no_options_are_the_users_own(base: Any) -> None:
    class Mine(base):
        job_type_name = "mine"
        retry = RetryPolicy(max_attempts=2)
        timeout = None
        ack = "early"
        colour = "blue"
        _retri = 3

        def __init__(self, depot: str) -> None:
            super().__init__()
            self.depot = depot

        def run(self, job_dict: Any) -> Any: ...

        def retried(self) -> None: ...

    assert Mine("north").job_type_name == "mine"


# --- when it is put to work


@both
async def test_a_consumer_with_neither_run_nor_handle_is_refused_when_it_is_put_to_work(
    orchestrator: AsyncOrchestrator, base: Any
) -> None:
    class Idle(base):
        pass

    with pytest.raises(ConfigError, match=r"Idle.*neither run nor handle"):
        await Worker(orchestrator, [Idle("jobs")]).run()


async def test_a_consumer_without_a_name_is_refused_when_it_is_put_to_work(orchestrator: AsyncOrchestrator) -> None:
    class Nameless(AsyncConsumer):
        async def run(self, job_dict: Any) -> Any: ...

    with pytest.raises(ConfigError, match=r"Nameless.*no name"):
        await Worker(orchestrator, [Nameless()]).run()


async def test_two_consumers_for_one_schema_are_refused(orchestrator: AsyncOrchestrator, consumer: Make) -> None:
    await orchestrator.register(JobSchema("schema", Take))
    for name in ("schema", "jobs"):
        with pytest.raises(ConfigError, match=f"two consumers.*{name!r}"):
            await Worker(orchestrator, [consumer(nothing, name), consumer(nothing, name)]).run()


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"concurrency": 1.5},
        {"concurrency": True},
        {"max_jobs": 0},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"retry": 0},
        {"retry": "3"},
        {"lease": 0},
        {"lease": math.inf},
        {"drain": -1},
        {"drain": math.nan},
        {"cancel_grace": -0.1},
        {"unknown_ttl": "1"},
    ],
    ids=str,
)
async def test_an_option_of_the_worker_out_of_its_range_is_refused(
    orchestrator: AsyncOrchestrator, consumer: Make, options: Any
) -> None:
    with pytest.raises(ConfigError, match=next(iter(options)) + "|max_attempts"):
        Worker(orchestrator, [consumer(nothing)], **options)


async def test_a_worker_without_consumers_is_refused(orchestrator: AsyncOrchestrator) -> None:
    with pytest.raises(ConfigError, match="consumer"):
        Worker(orchestrator, [])


async def test_a_typed_consumer_brings_its_own_schema(orchestrator: AsyncOrchestrator) -> None:
    seen: list[Any] = []

    class Typed(AsyncConsumer[Take, Give]):
        job_type_name = "typed"

        async def handle(self, data: Take) -> Give:
            seen.append(data)
            return Give(n=data.n)

    await orchestrator.declare(QueueSpec("typed"))
    await orchestrator.publish("typed", Job(name="typed", schema_name="typed", input_data={"n": "3"}))
    worker = Worker(orchestrator, [Typed()], max_jobs=1)
    await worker.run()
    assert (seen, worker.handled) == ([Take(n=3)], 1)
    await orchestrator.publish("typed", Take(n=4))  # registered now
    with pytest.raises(ConfigError, match="typed"):
        await orchestrator.register(JobSchema("typed", Other))


async def test_a_typed_consumer_of_another_input_than_its_schemas_is_refused(orchestrator: AsyncOrchestrator) -> None:
    class Typed(AsyncConsumer[Take, Give]):
        async def handle(self, data: Take) -> Give: ...

    await orchestrator.register(JobSchema("typed", Other, Give))
    with pytest.raises(ConfigError, match=r"Take.*Other"):
        await Worker(orchestrator, [Typed("typed")]).run()


async def test_the_models_of_a_generic_base_class_are_those_of_the_consumer(orchestrator: AsyncOrchestrator) -> None:
    seen: list[Any] = []

    class Base(AsyncConsumer[Take, Give]):
        async def handle(self, data: Take) -> Give:
            seen.append(data)
            return Give(n=data.n)

    class Derived(Base):
        job_type_name = "derived"

    await orchestrator.declare(QueueSpec("derived"))
    await orchestrator.publish("derived", Job(name="derived", schema_name="derived", input_data={"n": 3}))
    await Worker(orchestrator, [Derived()], max_jobs=1).run()
    assert seen == [Take(n=3)]


# --- which jobs it gets


async def test_a_consumer_without_a_schema_declares_its_queue_and_takes_whatever_is_in_it(
    orchestrator: AsyncOrchestrator, consumer: Make
) -> None:
    seen: list[tuple[str, Any]] = []

    async def act(job: dict[str, Any]) -> dict[str, Any]:
        seen.append((job["schema_name"], job["input_data"]))
        return {"any": "thing"}

    await Worker(orchestrator, [consumer(act, "fresh")], until_idle=True).run()
    assert QueueSpec("fresh") in await orchestrator.queues()
    for name in ("one", "two"):
        await orchestrator.publish("fresh", Job(name=name, schema_name=name, input_data={name: [1]}))
    await Worker(orchestrator, [consumer(act, "fresh")], concurrency=1, max_jobs=2).run()
    assert seen == [("one", {"one": [1]}), ("two", {"two": [1]})]
    assert await orchestrator.depth("fresh") == Depth(0, 0, 0, 0)


async def test_a_consumer_attaches_to_the_kind_of_queue_that_is_there(
    orchestrator: AsyncOrchestrator, consumer: Make
) -> None:
    await orchestrator.declare(QueueSpec("ranked", "priority"))
    await Worker(orchestrator, [consumer(nothing, "ranked")], until_idle=True).run()
    assert QueueSpec("ranked", "priority") in await orchestrator.queues()


async def test_consumers_that_share_a_queue_get_the_jobs_of_their_schemas_and_one_without_gets_the_rest(
    orchestrator: AsyncOrchestrator, consumer: Make
) -> None:
    seen: list[tuple[str, str]] = []

    def noting(name: str, who: str) -> Any:
        async def act(job: dict[str, Any]) -> None:
            seen.append((who, job["schema_name"]))

        return consumer(act, name)

    for name in ("one", "two"):
        await orchestrator.register(JobSchema(name, Take, queue="jobs"))
    for name in ("three", "two", "one"):
        await orchestrator.publish("jobs", Job(name=name, schema_name=name))
    consumers = [noting("jobs", "the rest"), noting("one", "one"), noting("two", "two")]
    await Worker(orchestrator, consumers, concurrency=1, max_jobs=3).run()
    assert seen == [("the rest", "three"), ("two", "two"), ("one", "one")]


async def test_a_plain_consumer_gets_its_input_as_its_schema_reads_it(
    orchestrator: AsyncOrchestrator, consumer: Make
) -> None:
    seen: list[Any] = []

    async def act(job: dict[str, Any]) -> None:
        seen.append(job["input_data"])

    await orchestrator.publish("jobs", Job(name="jobs", schema_name="jobs", input_data={"n": "3", "more": 1}))
    await orchestrator.register(JobSchema("jobs", Take))
    await Worker(orchestrator, [consumer(act)], max_jobs=1).run()
    assert seen == [{"n": 3}]
