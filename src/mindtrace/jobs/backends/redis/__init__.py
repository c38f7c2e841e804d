"""The backend on a Redis server: several processes share its queues, and jobs survive all of them."""

from mindtrace.jobs.backends.redis.backend import RedisBackend

__all__ = ["RedisBackend"]
