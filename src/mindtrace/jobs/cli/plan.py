"""`Plan`: what `worker` makes of its command line, for one worker process."""

from dataclasses import dataclass
from typing import Literal

from mindtrace.jobs.cli.journal import Journal


@dataclass(frozen=True, slots=True)
class Plan:
    """What one worker process is told.

    Attributes:
        target: whose worker.
        processes: how many run it, under a supervisor; None for this one alone.
        insists: on a log of the command's own, where the application has set up another.
        supervised: the open file over which it tells its supervisor how it is; None where it has none.
    """

    target: str
    processes: int | None
    queues: tuple[str, ...]
    concurrency: int | None
    burst: bool
    max_jobs: int | None
    max_memory: int | None
    drain: float | None
    loop: Literal["asyncio", "uvloop"]
    health: tuple[str, int] | None
    journal: Journal
    insists: bool
    supervised: int | None
