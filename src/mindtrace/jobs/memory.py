"""How much memory this process holds."""

import os
import sys

_STATM = "/proc/self/statm"
_MIB = 1024 * 1024


def resident() -> float:
    """MiB of this process that are in memory now; where the system does not tell, the most that ever were."""
    try:
        with open(_STATM, "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB
    except OSError:
        import resource  # not on Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / _MIB if sys.platform == "darwin" else most / 1024
