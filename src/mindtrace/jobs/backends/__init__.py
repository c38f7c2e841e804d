"""`connect(url)` picks the backend and imports only that one."""

import os

from mindtrace.jobs.backend import Backend
from mindtrace.jobs.errors import ConfigError


def connect(url: str | None = None) -> Backend:
    """The backend that the URL names; it is not opened yet.

    Args:
        url: `local://` for the one in this process; None takes `MINDTRACE_JOBS_URL`, else `local://`.

    Raises:
        ConfigError: no backend of that scheme; the text never shows the rest of the URL, which may hold a password.
    """
    scheme, separator, rest = (url or os.environ.get("MINDTRACE_JOBS_URL") or "local://").partition("://")
    if scheme != "local" or not separator:
        raise ConfigError(f"no backend for {scheme[:20]}{separator} in this version: local:// is the one there is")
    if rest:
        raise ConfigError("local:// takes nothing behind it: it is in this process, and its jobs are in memory")
    from mindtrace.jobs.backends.local import LocalBackend

    return LocalBackend()
