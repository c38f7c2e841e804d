"""An asyncio-native job queue: at least once, the same on every backend, with a blocking face for scripts."""

import logging
from typing import TYPE_CHECKING, Any

from mindtrace.jobs.backend import Backend, Depth, QueueSpec, Receiver, Traits
from mindtrace.jobs.backends import connect
from mindtrace.jobs.clients import BackendType, LocalClient, RabbitMQClient, RedisClient
from mindtrace.jobs.consumer import AsyncConsumer, CurrentJob, current_job
from mindtrace.jobs.dead_letters import AsyncDeadLetters
from mindtrace.jobs.delivery import (
    Dead,
    DeadPage,
    DeadReason,
    DeadRecord,
    Delivery,
    Done,
    Release,
    Retry,
    RunError,
    Settlement,
)
from mindtrace.jobs.errors import (
    AuthenticationFailed,
    BackendFull,
    BackendUnavailable,
    Closed,
    ConfigError,
    Discard,
    ForkedProcess,
    InputInvalid,
    JobNotFound,
    JobsError,
    JobSignal,
    LeaseLost,
    NotSupported,
    Outcome,
    PayloadTooLarge,
    PublishIncomplete,
    QueueFull,
    QueueInUse,
    QueueMismatch,
    QueueNotFound,
    Reject,
    RetryLater,
    RunTimeout,
    Snooze,
    UnsafeBackend,
    WouldDeadlock,
)
from mindtrace.jobs.events import (
    Event,
    JobLeaseLost,
    JobPublished,
    JobSettled,
    JobStarted,
    Listener,
    Reconnected,
    SchemaMismatch,
)
from mindtrace.jobs.health import Health
from mindtrace.jobs.job import ExecutionStatus, Job, JobId, JobSchema, job_from_schema
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.retry import RetryPolicy
from mindtrace.jobs.running import RunningJob
from mindtrace.jobs.sync import (
    Consumer,
    ConsumerBackendBase,
    DeadLetters,
    LocalConsumerBackend,
    Orchestrator,
    RabbitMQConsumerBackend,
    RedisConsumerBackend,
)
from mindtrace.jobs.worker import Worker

if TYPE_CHECKING:
    from mindtrace.jobs.backends.local import LocalBackend as LocalBackend
    from mindtrace.jobs.backends.rabbitmq import RabbitMQBackend as RabbitMQBackend
    from mindtrace.jobs.backends.redis import RedisBackend as RedisBackend

__all__ = [
    "AsyncConsumer",
    "AsyncDeadLetters",
    "AsyncOrchestrator",
    "AuthenticationFailed",
    "Backend",
    "BackendFull",
    "BackendType",
    "BackendUnavailable",
    "Closed",
    "ConfigError",
    "Consumer",
    "ConsumerBackendBase",
    "CurrentJob",
    "Dead",
    "DeadLetters",
    "DeadPage",
    "DeadReason",
    "DeadRecord",
    "Delivery",
    "Depth",
    "Discard",
    "Done",
    "Event",
    "ExecutionStatus",
    "ForkedProcess",
    "Health",
    "InputInvalid",
    "Job",
    "JobId",
    "JobLeaseLost",
    "JobNotFound",
    "JobPublished",
    "JobSchema",
    "JobSettled",
    "JobSignal",
    "JobStarted",
    "JobsError",
    "LeaseLost",
    "Listener",
    "LocalBackend",
    "LocalClient",
    "LocalConsumerBackend",
    "NotSupported",
    "Orchestrator",
    "Outcome",
    "PayloadTooLarge",
    "PublishIncomplete",
    "QueueFull",
    "QueueInUse",
    "QueueMismatch",
    "QueueNotFound",
    "QueueSpec",
    "RabbitMQBackend",
    "RabbitMQClient",
    "RabbitMQConsumerBackend",
    "Receiver",
    "Reconnected",
    "RedisBackend",
    "RedisClient",
    "RedisConsumerBackend",
    "Reject",
    "Release",
    "Retry",
    "RetryLater",
    "RetryPolicy",
    "RunError",
    "RunTimeout",
    "RunningJob",
    "SchemaMismatch",
    "Settlement",
    "Snooze",
    "Traits",
    "UnsafeBackend",
    "Worker",
    "WouldDeadlock",
    "connect",
    "current_job",
    "job_from_schema",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """The backend classes, each imported with its driver when it is first named."""
    if name == "LocalBackend":
        from mindtrace.jobs.backends.local import LocalBackend

        return LocalBackend
    if name == "RabbitMQBackend":
        from mindtrace.jobs.backends.rabbitmq import RabbitMQBackend

        return RabbitMQBackend
    if name == "RedisBackend":
        from mindtrace.jobs.backends.redis import RedisBackend

        return RedisBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
