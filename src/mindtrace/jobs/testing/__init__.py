"""What tests of your own can use: a kit without a broker, real brokers of their own, and what breaks them on purpose.

Nothing is imported before it is named: the pytest plugin loads this package in every run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mindtrace.jobs.testing.jobs import JobsTest as JobsTest
    from mindtrace.jobs.testing.leaks import LeakGuard as LeakGuard
    from mindtrace.jobs.testing.ledger import Ledger as Ledger
    from mindtrace.jobs.testing.proxy import FaultProxy as FaultProxy

__all__ = ["FaultProxy", "JobsTest", "LeakGuard", "Ledger"]

_HOMES: Final = {"FaultProxy": "proxy", "JobsTest": "jobs", "LeakGuard": "leaks", "Ledger": "ledger"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(found, name)
