"""What tests of your own can use: a kit without a broker, and real brokers of their own.

Nothing is imported before it is named: the pytest plugin loads this package in every run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindtrace.jobs.testing.jobs import JobsTest as JobsTest

__all__ = ["JobsTest"]


def __getattr__(name: str) -> Any:
    if name == "JobsTest":
        from mindtrace.jobs.testing.jobs import JobsTest

        return JobsTest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
