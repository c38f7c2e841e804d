"""`mindtrace-jobs`, from its first instruction on: Ctrl-C ends it without a traceback while the rest is still imported.

It stands beside the package, for which all of that is imported before anything in it runs. SIGTERM needs no more than
the system does.
"""

import os
import signal


def main() -> int:
    """Run the command line that this process was given. Returns its exit status, 130 for Ctrl-C whenever it comes."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored by whoever started us, who means it
        from mindtrace.jobs.cli import main

        return main()
    try:
        signal.signal(signal.SIGINT, _leave)
        from mindtrace.jobs.cli import main

        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
        signal.signal(signal.SIGINT, _leave)  # the interpreter takes its time to end
        return status
    except KeyboardInterrupt:  # just before or just after the command, which makes a status of its own
        return 128 + signal.SIGINT


def _leave(*_: object) -> None:
    os._exit(128 + signal.SIGINT)
