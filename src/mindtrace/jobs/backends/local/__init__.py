"""The backend in this process: nothing to install or to start; jobs live as long as the object does."""

from mindtrace.jobs.backends.local.backend import LocalBackend
from mindtrace.jobs.backends.local.clock import Clock, SystemClock

__all__ = ["Clock", "LocalBackend", "SystemClock"]
