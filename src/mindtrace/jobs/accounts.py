"""`Accounts`: counts, logs and tells how deliveries have ended, and what else a worker learns."""

import logging
from collections import deque
from collections.abc import Sequence

from mindtrace.jobs.delivery import Dead, Delivery, Done, Release, Settled, Settlement
from mindtrace.jobs.errors import LeaseLost, UnknownSchema
from mindtrace.jobs.events import Event, JobLeaseLost, JobSettled, Listener, Reconnected, SchemaMismatch, told
from mindtrace.jobs.job import ExecutionStatus
from mindtrace.jobs.runs import Finished, Run, about

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
        self._of_worker = {"worker": worker}
        self.news: deque[Event] = deque()
        """What was learned where nobody can wait for a listener, and is still to be told."""

    def lost(self, run: Run) -> None:
        """Its lease is gone, while it runs."""
        job = run.job
        self._note(JobLeaseLost(job.queue, job.id, job.schema_name, job.attempt))

    def unknown(self, delivery: Delivery, error: UnknownSchema) -> None:
        """Nobody here knows what it is."""
        self._note(
            SchemaMismatch(delivery.queue, delivery.message.id, error.schema_name, delivery.attempt, error.waited)
        )

    def reconnected(self, backend: str, seconds: float) -> None:
        """The broker is there again."""
        _log.info("worker %s: %s is there again, after %.1f s", self._worker, backend, seconds, extra=self._of_worker)
        self._note(Reconnected(backend, seconds))

    async def tell(self) -> None:
        """What was noted since the last time, in order."""
        while self.news:
            await told(self._listeners, self.news.popleft())

    async def settled(self, finished: Sequence[Finished], answers: Sequence[Settled]) -> None:
        """Deliveries have ended; `answers` says what the broker made of it."""
        for end, answer in zip(finished, answers, strict=True):
            delivery, settlement, run = end.delivery, end.settlement, end.run
            if answer is None:
                self.handled += not isinstance(settlement, Release)
            elif run is None or not run.job.lease_lost:  # else it is said already
                extra = about(delivery, self._worker, end.schema_name)
                _log.warning("job %s: %s", delivery.message.id, answer, extra=extra)
                if isinstance(answer, LeaseLost):
                    self._note(JobLeaseLost(delivery.queue, delivery.message.id, end.schema_name, delivery.attempt))
            if self._listeners:
                if self.news:
                    await self.tell()
                event = JobSettled(
                    delivery.queue,
                    delivery.message.id,
                    end.schema_name,
                    delivery.attempt,
                    settlement,
                    answer is None,
                    _status(settlement),
                    0.0 if run is None else run.ended_at - run.started,
                )
                await told(self._listeners, event)

    def _note(self, event: Event) -> None:
        if self._listeners:
            self.news.append(event)


def _status(settlement: Settlement) -> ExecutionStatus:
    match settlement:
        case Done():
            return ExecutionStatus.COMPLETED
        case Dead():
            return ExecutionStatus.FAILED
        case _:
            return ExecutionStatus.QUEUED
