"""`Accounts`: counts, logs and tells how deliveries have ended."""

import logging
import time
from collections.abc import Sequence

from mindtrace.jobs.delivery import Dead, Done, Release, Settled, Settlement
from mindtrace.jobs.events import JobSettled, Listener, told
from mindtrace.jobs.job import ExecutionStatus
from mindtrace.jobs.runs import Finished, about

_log = logging.getLogger(__name__)


class Accounts:
    """Of one worker.

    Args:
        worker: its name.
        listeners: who is told.
    """

    def __init__(self, worker: str, listeners: Sequence[Listener]) -> None:
        self.handled: int = 0
        """Deliveries that were settled, and not handed back."""
        self._worker, self._listeners = worker, listeners

    async def settled(self, finished: Sequence[Finished], answers: Sequence[Settled]) -> None:
        """Deliveries have ended; `answers` says what the broker made of it."""
        for end, answer in zip(finished, answers, strict=True):
            delivery, settlement, run = end.delivery, end.settlement, end.run
            if answer is None:
                self.handled += not isinstance(settlement, Release)
            elif run is None or not run.job.lease_lost:  # else it is said already
                _log.warning("job %s: %s", delivery.message.id, answer, extra=about(delivery, self._worker))
            if self._listeners:
                event = JobSettled(
                    delivery.queue,
                    delivery.message.id,
                    end.schema_name,
                    delivery.attempt,
                    settlement,
                    answer is None,
                    _status(settlement),
                    0.0 if run is None else time.monotonic() - run.started,
                )
                await told(self._listeners, event)


def _status(settlement: Settlement) -> ExecutionStatus:
    match settlement:
        case Done():
            return ExecutionStatus.COMPLETED
        case Dead():
            return ExecutionStatus.FAILED
        case _:
            return ExecutionStatus.QUEUED
