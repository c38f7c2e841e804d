"""How much memory a process holds."""

import os
import sys

_MIB = 1024 * 1024


def resident(process: int | None = None) -> float:
    """MiB of a process that are in memory now.

    Args:
        process: its id; None for this process, of which, where the system does not tell, it is the most that ever were.

    Raises:
        OSError: that process is gone, or the system does not tell of others.
    """
    try:
        with open(f"/proc/{'self' if process is None else process}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB
    except OSError:
        if process is not None:
            raise
        import resource  # not on Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / _MIB if sys.platform == "darwin" else most / 1024
