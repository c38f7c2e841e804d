"""`Job` and `JobSchema`: what someone asks for, and the shape it has to have."""

import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, cast, get_args, overload

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    RootModel,
    SecretBytes,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import to_json
from pydantic_core.core_schema import ErrorType

from mindtrace.jobs.errors import ConfigError, InputInvalid, Refused
from mindtrace.jobs.retry import RetryPolicy, is_seconds, is_whole

JobId: TypeAlias = str
"""Names one job for good: the key under which publishing it again is harmless. `[A-Za-z0-9][A-Za-z0-9._:-]{0,127}`."""

if TYPE_CHECKING:  # a bare `Consumer` or `JobSchema` is one of any models, for a strict checker, too
    import typing_extensions

    In = typing_extensions.TypeVar("In", bound=BaseModel | None, default=Any)
    Out = typing_extensions.TypeVar("Out", bound=BaseModel | None, default=Any)
else:
    In = TypeVar("In", bound=BaseModel | None)
    Out = TypeVar("Out", bound=BaseModel | None)
InModel = TypeVar("InModel", bound=BaseModel)
Model = TypeVar("Model", bound=BaseModel)

PRIORITY_RANGE = (-(2**31), 2**31 - 1)
"""The priorities that any backend can be asked for; a backend's own range may be narrower."""

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MASK = str(SecretStr("x"))
_OF_PYDANTIC = frozenset(get_args(ErrorType)) - {"value_error", "assertion_error"}
_IN_OUR_WORDS = {  # pydantic's quote the value, or what the user's code raised
    "union_tag_invalid": "no model has this tag",
    "get_attribute_error": "an attribute cannot be read",
    "iteration_error": "it cannot be iterated over",
    "mapping_type": "Input should be a valid mapping",
}
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED_SUFFIXES = (".dead", ".hold", ".bell")


class ExecutionStatus(StrEnum):
    """Where a job stands, coarsely."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job(BaseModel):
    """One unit of work someone asked for. It does not change once it is made.

    Attributes:
        id: chosen by whoever publishes; a UUIDv7 unless given. Publishing the same `Job` twice is publishing it once:
            for two jobs, make two.
        name: what people call it, as a rule the schema's name.
        schema_name: the schema its input was made for.
        input_data: the input, as JSON values.
        priority: higher is handed out first; None leaves it to the schema, then 0.
        created_at: when it was made, aware.
        headers: text to text, carried unchanged through retries, death and replay.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    id: JobId = Field(default_factory=lambda: new_job_id())
    name: str
    schema_name: str
    input_data: dict[str, JsonValue] = Field(default_factory=dict)
    priority: int | None = None
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    headers: dict[str, str] = Field(default_factory=dict)

    @field_validator("id")
    @classmethod
    def _id_is_a_name(cls, value: str) -> str:
        return checked_job_id(value)

    @field_validator("created_at")
    @classmethod
    def _created_at_is_aware(cls, value: datetime) -> datetime:
        if value.tzinfo is None:
            raise ValueError(f"created_at={value!r}: an aware datetime, such as datetime.now(UTC)")
        return value


class JobSchema(Generic[In, Out]):
    """What a kind of job takes and gives, and the options its jobs have unless they say otherwise.

    Args:
        name: names the kind, and the queue unless `queue` does.
        input: a pydantic model, class or instance (an instance stands for its class).
        output: the same for what a run returns; None for nothing.
        queue: the queue its jobs go to.
        retry: a policy, a number of runs, or False for one run.
        timeout: seconds for one run; `float("inf")` for no limit; None leaves it to the consumer, then the worker.
        priority: of its jobs.
        validate_output: `warn` logs a result that does not fit, in place of sending the job to the dead letters.

    Raises:
        ConfigError: a value is out of its range, or no model.
    """

    __slots__ = ("input", "name", "output", "priority", "queue", "retry", "timeout", "validate_output")

    name: str
    input: type[In]
    output: type[Out] | None
    queue: str
    retry: RetryPolicy | None
    timeout: float | None
    priority: int | None
    validate_output: Literal["error", "warn"]

    @overload
    def __init__(
        self: "JobSchema[InModel, None]",
        name: str,
        input: type[InModel] | InModel,
        output: None = None,
        *,
        queue: str | None = None,
        retry: RetryPolicy | int | Literal[False] | None = None,
        timeout: float | None = None,
        priority: int | None = None,
        validate_output: Literal["error", "warn"] = "error",
    ) -> None: ...

    @overload
    def __init__(
        self,
        name: str,
        input: type[In] | In,
        output: type[Out] | Out,
        *,
        queue: str | None = None,
        retry: RetryPolicy | int | Literal[False] | None = None,
        timeout: float | None = None,
        priority: int | None = None,
        validate_output: Literal["error", "warn"] = "error",
    ) -> None: ...

    def __init__(
        self,
        name: str,
        input: Any,
        output: Any = None,
        *,
        queue: str | None = None,
        retry: RetryPolicy | int | Literal[False] | None = None,
        timeout: float | None = None,
        priority: int | None = None,
        validate_output: Literal["error", "warn"] = "error",
    ) -> None:
        self.name = checked_queue_name(name)
        self.input = _model_class("input", input)
        self.output = None if output is None else _model_class("output", output)
        self.queue = self.name if queue is None else checked_queue_name(queue)
        self.retry = None if retry is None else RetryPolicy.of(retry)
        self.timeout = checked_timeout(timeout)
        self.priority = None if priority is None else checked_priority(priority)
        if validate_output not in ("error", "warn"):
            raise ConfigError(f"validate_output={validate_output!r}: 'error' or 'warn'")
        self.validate_output = validate_output

    def __repr__(self) -> str:
        output = "" if self.output is None else f", {self.output.__name__}"
        return f"JobSchema({self.name!r}, {self.input.__name__}{output})"

    def same_as(self, other: "JobSchema[Any, Any]") -> bool:
        """Whether both say the same: names, JSON schemas and options. The model classes may be different objects."""
        return self._facts() == other._facts()

    def checked_input(self, data: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
        """`data` as the JSON values that are sent, once the input model has accepted them.

        A mapping is read as JSON would be; a model is dumped by its aliases, since that is what a model reads.

        Raises:
            InputInvalid: the model refuses it, or it holds what JSON cannot carry.
        """
        model: type[Any] = self.input
        try:
            values = dumped(data if isinstance(data, BaseModel) else parsed(model, data), by_alias=True)
            parsed(model, values)  # what is sent has to be what the worker can read
        except ValidationError as error:
            raise InputInvalid(self.name, field_errors(error)) from None  # the cause would show the values
        except Exception as error:  # validators and serializers are the user's code
            found = {"type": "json", "loc": (), "msg": f"it cannot be written as JSON ({type(error).__name__})"}
            raise InputInvalid(self.name, [found]) from None
        return values

    def received(self, data: dict[str, Any]) -> Any:
        """The input of a job that arrived, as an instance of the input model.

        Raises:
            Refused: `input_invalid`; whoever published it did not check, or has another version of the model.
        """
        model: type[Any] = self.input
        try:
            return parsed(model, data)
        except ValidationError as error:
            raise Refused("input_invalid", str(InputInvalid(self.name, field_errors(error)))) from None
        except Exception as error:  # a validator is the user's code
            raise Refused("input_invalid", f"the input model of {self.name!r} raised {type(error).__name__}") from None

    def _facts(self) -> tuple[object, ...]:
        takes: Any = self.input
        gives: Any = self.output
        shapes: list[object] = [takes.model_json_schema(), None if gives is None else gives.model_json_schema()]
        return (self.name, shapes, self.queue, self.retry, self.timeout, self.priority, self.validate_output)


def job_from_schema(
    schema: JobSchema[InModel, Any],
    input_data: InModel | Mapping[str, Any],
    *,
    job_id: JobId | None = None,
    priority: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Job:
    """Make a job of this schema.

    Args:
        schema: what kind of job.
        input_data: an instance of its input model, or a mapping that makes one.
        job_id: names the job; a new UUIDv7 unless given.
        priority: higher is handed out first; None leaves it to the schema.
        headers: text to text, carried along unchanged.

    Raises:
        InputInvalid: the input does not fit the schema.
        ConfigError: the id or the priority is out of its range.
    """
    return Job(
        id=new_job_id() if job_id is None else checked_job_id(job_id),
        name=schema.name,
        schema_name=schema.name,
        input_data=schema.checked_input(input_data),
        priority=None if priority is None else checked_priority(priority),
        headers=dict(headers or {}),
    )


def new_job_id() -> JobId:
    """A UUIDv7 as text (RFC 9562, 5.7): 48 bits of milliseconds, so that ids sort by age, and 74 random ones."""
    ms, random = f"{time.time_ns() // 1_000_000:012x}", os.urandom(10).hex()
    variant = "89ab"[int(random[3], 16) & 3]
    return f"{ms[:8]}-{ms[8:]}-7{random[:3]}-{variant}{random[4:7]}-{random[7:19]}"


def parsed(model: type[Model], data: object) -> Model:
    """JSON values, or what a run returned, as an instance of the model.

    Raises:
        ValidationError: it does not fit.
    """
    try:
        return model.model_validate(data)
    except ValidationError:
        if not isinstance(data, Mapping):
            raise
    # A strict model refuses, as Python values, what JSON can only write as text or list (a date, a tuple): ask as JSON.
    return model.model_validate_json(to_json(dict(cast(Mapping[str, Any], data))))


def as_read(instance: BaseModel) -> Any:
    """The instance's fields under the names that its model reads them by."""
    if isinstance(instance, RootModel):
        return cast(Any, instance).root
    fields = type(instance).model_fields
    return {_read_name(name, fields[name]) if name in fields else name: value for name, value in vars(instance).items()}


def as_sent(instance: BaseModel) -> Any:
    """The instance as JSON values under the names that its model, and those inside it, read them by.

    Raises:
        ValueError: it holds what JSON cannot carry.
    """
    dump = instance.__pydantic_serializer__.to_python
    values: Any = dump(instance, mode="json", by_alias=True, round_trip=True, warnings=False)
    if isinstance(instance, RootModel):
        return values
    for name, field in type(instance).model_fields.items():
        written, read = field.serialization_alias or name, _read_name(name, field)
        if written != read and written in values:
            values[read] = values.pop(written)
    return values


def _read_name(name: str, field: FieldInfo) -> str:
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        alias = next((choice for choice in alias.choices if isinstance(choice, str)), None)
    return alias if isinstance(alias, str) else name


def dumped(instance: BaseModel, *, by_alias: bool = False) -> dict[str, Any]:
    """The model as a JSON object; computed fields are left out, since they are not input.

    Raises:
        ValueError: it holds what JSON cannot carry.
    """
    dump = instance.__pydantic_serializer__.to_python
    values: Any = dump(instance, mode="json", by_alias=by_alias, round_trip=True, warnings=False)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    found = cast(dict[str, Any], values)
    if _may_be_a_stand_in(found):
        _check_carried(dump(instance, mode="python", round_trip=True, warnings=False))
    return found


def _may_be_a_stand_in(value: JsonValue) -> bool:
    """Whether there is a null, as which an untyped NaN is written, or a mask, as which a secret is."""
    if isinstance(value, dict):
        return any(_may_be_a_stand_in(item) for item in value.values())
    if isinstance(value, list):
        return any(_may_be_a_stand_in(item) for item in value)
    return value is None or value == _MASK


def _check_carried(value: Any) -> None:
    """Refuse what JSON would carry as something else."""
    if isinstance(value, SecretStr | SecretBytes):
        raise ValueError("a secret, which is masked when it is written: send where to find it")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number that is not finite")
    elif isinstance(value, Mapping):
        for item in list(cast(dict[Any, Any], value).values()):
            _check_carried(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in cast(Iterable[Any], value):
            _check_carried(item)


def field_errors(error: ValidationError) -> list[Mapping[str, Any]]:
    """What pydantic found, without the values it refused: those are payload.

    The words of the model's own validators may quote a value as well, and are left out.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [{**one, "msg": _words(one["type"], one["msg"])} for one in found]


def _words(kind: str, text: str) -> str:
    return _IN_OUR_WORDS.get(kind, text) if kind in _OF_PYDANTIC else "refused by a validator of the model"


def checked_namespace(name: str) -> str:
    """The namespace, if it is one.

    Raises:
        ConfigError: not `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
    """
    if not _is_text(name, _NAMESPACE):
        raise ConfigError(f"namespace={name!r}: up to 64 of A-Z a-z 0-9 . _ -, the first a letter or a digit")
    return name


def checked_queue_name(name: str) -> str:
    """The name itself.

    Raises:
        ConfigError: not `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`, or reserved: the prefix `amq.`, and the suffixes `.dead`,
            `.hold`, `.bell`, which name parts of a queue.
    """
    if not is_queue_name(name):
        raise ConfigError(f"{name!r} is no queue name: 1 to 128 of A-Z a-z 0-9 . _ -, a letter or digit first")
    if name.startswith("amq.") or name.endswith(_RESERVED_SUFFIXES):
        raise ConfigError(f"the queue name {name!r} is reserved: no prefix amq., no suffix .dead, .hold or .bell")
    return name


def is_queue_name(value: object) -> bool:
    """Whether it is text that can name a queue."""
    return _is_text(value, _QUEUE_NAME)


def is_job_id(value: object) -> bool:
    """Whether it is text that can name a job."""
    return _is_text(value, _JOB_ID)


def checked_job_id(job_id: str) -> JobId:
    """The id itself.

    Raises:
        ConfigError: not `[A-Za-z0-9][A-Za-z0-9._:-]{0,127}`.
    """
    if not is_job_id(job_id):
        raise ConfigError(f"{job_id!r} is no job id: 1 to 128 of A-Z a-z 0-9 . _ : -, a letter or digit first")
    return job_id


def checked_priority(priority: int, lowest: int = PRIORITY_RANGE[0], highest: int = PRIORITY_RANGE[1]) -> int:
    """The priority itself.

    Raises:
        ConfigError: no whole number, or outside `lowest` to `highest`.
    """
    if not is_whole(priority):
        raise ConfigError(f"priority={priority!r}: a whole number from {lowest} to {highest}")
    if not lowest <= priority <= highest:
        raise ConfigError(f"priority={priority}: from {lowest} to {highest} here")
    return priority


def checked_timeout(timeout: float | None) -> float | None:
    """The timeout itself.

    Raises:
        ConfigError: not a number above 0; `float("inf")` stands for no limit.
    """
    if timeout is not None and not (timeout == float("inf") or (is_seconds(timeout) and timeout > 0)):
        raise ConfigError(f"timeout={timeout!r}: seconds above 0, or float('inf') for no limit")
    return timeout


def _is_text(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _model_class(which: str, model: object) -> type[Any]:
    kind = model if isinstance(model, type) else type(model)
    if not issubclass(kind, BaseModel) or kind is BaseModel:
        raise ConfigError(f"{which}={model!r}: a pydantic model, class or instance")
    return kind
