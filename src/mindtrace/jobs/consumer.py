"""`AsyncConsumer`, the class a user writes; what every consumer declares; and `current_job()` for the code inside."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, get_args, get_origin

from pydantic import BaseModel

from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.job import In, JobId, JobSchema, Out, checked_queue_name, checked_timeout
from mindtrace.jobs.retry import RetryPolicy

_OPTIONS = ("job_type_name", "retry", "timeout", "ack")


@dataclass(slots=True, eq=False)
class CurrentJob:
    """The job that the code around the call is running.

    Attributes:
        id: the job's.
        attempt: which start this is, from 1.
        number: which delivery of this job, ever; rises with each, so a database can refuse an older one.
        headers: as published.
        deadline: when its time is over, on `time.monotonic()`; inf for no limit.
        cancelled: it should give up: its time is over, the worker stops, or its lease is gone. A coroutine is cancelled
            as well; code in a thread has to look.
        lease_lost: the job is another worker's now; what this run returns is thrown away.
        queue: where it came from.
        schema_name: what it is; empty where it names no schema.
        worker: the name of the worker that runs it.
    """

    id: JobId
    attempt: int
    number: int
    headers: Mapping[str, str]
    deadline: float = math.inf
    cancelled: bool = False
    lease_lost: bool = False
    queue: str = ""
    schema_name: str = ""
    worker: str = ""


_current: ContextVar[CurrentJob] = ContextVar("mindtrace_jobs_current_job")


def current_job() -> CurrentJob:
    """The job being run here; right in coroutines, the tasks they start, and threads.

    Raises:
        LookupError: outside a job.
    """
    try:
        return _current.get()
    except LookupError:
        raise LookupError("current_job() outside a job: it is known only inside run() or handle()") from None


def job_here() -> CurrentJob | None:
    """The job being run here, if any."""
    return _current.get(None)


def enter_job(job: CurrentJob) -> None:
    """Make it the current one of the running context."""
    _current.set(job)


@dataclass(frozen=True, slots=True)
class Calls:
    """How a consumer class is called: which method, what it takes, and whether it is a coroutine function."""

    method: Literal["run", "handle"] | None
    is_async: bool = False
    input: type[BaseModel] | None = None
    output: type[BaseModel] | None = None


def _check_options(cls: "type[AnyConsumer[Any, Any]]") -> None:
    declared = vars(cls)
    try:
        if declared.get("retry") is not None:
            RetryPolicy.of(declared["retry"])
        checked_timeout(declared.get("timeout"))
        if declared.get("job_type_name"):
            checked_queue_name(declared["job_type_name"])
    except ConfigError as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error
    if declared.get("ack", "late") not in ("late", "early"):
        raise ConfigError(f"{cls.__name__}: ack={declared['ack']!r}: 'late' or 'early'")
    for name, value in declared.items():
        if name.startswith("_") or name in _OPTIONS or callable(value) or isinstance(value, property):
            continue
        if near := difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.8):
            raise ConfigError(f"{cls.__name__}: there is no option {name!r}: did you mean {near[0]!r}?")


def _calls(cls: "type[AnyConsumer[Any, Any]]") -> Calls:
    run, handle = getattr(cls, "run", None), getattr(cls, "handle", None)
    if run is not None and handle is not None:
        raise ConfigError(f"{cls.__name__} has both run and handle: which is to be called?")
    method: Callable[..., Any] | None = run or handle
    if method is None:
        return Calls(None)
    is_async = inspect.iscoroutinefunction(method)
    if handle is None:
        return Calls("run", is_async)
    models = _models(cls)
    if models[0] is None:
        raise ConfigError(f"{cls.__name__} has handle but no models: class {cls.__name__}(...[Input, Output])")
    return Calls("handle", is_async, *models)


def _models(cls: type) -> tuple[type[BaseModel] | None, type[BaseModel] | None]:
    """The models in `AsyncConsumer[In, Out]`, wherever among the bases it stands."""
    for base in (base for kind in cls.__mro__ for base in getattr(kind, "__orig_bases__", ())):
        origin = get_origin(base)
        if isinstance(origin, type) and issubclass(origin, AnyConsumer):
            first, second = (*get_args(base), None)[:2]
            if isinstance(first, type) and issubclass(first, BaseModel):
                output = second if isinstance(second, type) and issubclass(second, BaseModel) else None
                return first, output
    return None, None


class AnyConsumer(Generic[In, Out]):
    """What both kinds of consumer declare: a name, options as class attributes, and one method that runs a job.

    Attributes:
        job_type_name: the schema it runs, and the queue where no schema of that name is registered.
        retry: a policy, a number of runs, or False for one.
        timeout: seconds for one run; None for no limit.
        ack: `early` settles a job before it is run: at most once, no retry, no dead letter.
    """

    job_type_name: str = ""
    retry: ClassVar[RetryPolicy | int | Literal[False] | None] = None
    timeout: ClassVar[float | None]
    ack: ClassVar[Literal["late", "early"]] = "late"

    calls: ClassVar[Calls] = Calls(None)

    def __init__(self, job_type_name: str | None = None) -> None:
        if job_type_name is not None:
            self.job_type_name = checked_queue_name(job_type_name)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_options(cls)
        cls.calls = _calls(cls)

    @classmethod
    def class_timeout(cls) -> float | None:
        """Seconds that the class gives a run; inf for no limit, None where it says nothing."""
        if not hasattr(cls, "timeout"):
            return None
        return math.inf if cls.timeout is None else cls.timeout

    def check(self) -> None:
        """Nothing, if it can be put to work.

        Raises:
            ConfigError: it has neither `run` nor `handle`, or no name.
        """
        kind = type(self).__name__
        if self.calls.method is None:
            raise ConfigError(f"{kind} has neither run nor handle: write one of them")
        if not self.job_type_name:
            raise ConfigError(f"{kind} has no name: {kind}('name of the schema or queue')")

    def schema(self) -> JobSchema[Any, Any] | None:
        """The schema that a typed consumer's own models make; None for a plain one."""
        if self.calls.input is None:
            return None
        return JobSchema(self.job_type_name, self.calls.input, self.calls.output)


class AsyncConsumer(AnyConsumer[In, Out]):
    """Runs jobs of one kind, by one of two methods that you write.

    - `async def run(self, job_dict: dict) -> dict`: the job as a dict with `id`, `name`, `schema_name`, `input_data`,
      `priority`, `created_at`, `attempt` and `headers`.
    - `async def handle(self, data: In) -> Out` in a class `AsyncConsumer[In, Out]`: the input as a model.

    One instance serves one worker, and several jobs at once.
    """
