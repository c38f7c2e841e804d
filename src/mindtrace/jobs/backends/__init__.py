"""`connect(url)` picks the backend and imports only that one."""

import os
from urllib.parse import urlsplit

from mindtrace.jobs.backend import Backend
from mindtrace.jobs.errors import ConfigError


def connect(url: str | None = None) -> Backend:
    """The backend that the URL names; it is not opened yet.

    Args:
        url: `local://` for the one in this process; None takes `MINDTRACE_JOBS_URL`, else `local://`.

    Raises:
        ConfigError: no backend of that scheme.
    """
    scheme = urlsplit(url or os.environ.get("MINDTRACE_JOBS_URL") or "local://").scheme
    if scheme == "local":
        from mindtrace.jobs.backends.local import LocalBackend

        return LocalBackend()
    raise ConfigError(f"no backend for {scheme}:// in this version: local:// is the one there is")
