"""The backend on RabbitMQ."""

from mindtrace.jobs.backends.rabbitmq.backend import RabbitMQBackend

__all__ = ["RabbitMQBackend"]
