"""The child processes of a worker, which run the jobs of consumers with `executor="process"`.

    (none) ──start──> starting ──ready──> idle <──answer── busy ──dies, is killed──> over
                          │                │ └───job────────^                         ^
                          └─unfit, too slow┴─worn, of another consumer, worker ends───┘

A child belongs to one consumer. `children` is one of them as seen from here, `child` is what it does.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from mindtrace.jobs.child import LEAVE_WITHIN, is_child
from mindtrace.jobs.children import Child, result_of
from mindtrace.jobs.consumer import AnyConsumer, CurrentJob
from mindtrace.jobs.errors import ConfigError, JobsError, RunCrashed, Snooze

_log = logging.getLogger(__name__)

_START_WITHIN = 60.0  # seconds for an interpreter and the imports of an application
_GONE_WITHIN = 5.0  # seconds from a SIGKILL on
_LOOK = 0.5  # seconds between looks at what the busy ones hold, and whether they live
_AGAIN_AFTER = 1.0  # seconds until a job comes back for which no child could be started


class ChildUnfit(ConfigError):
    """A child says that it cannot import its consumer, or make it: no child ever will."""


class _NotStarted(JobsError):
    """No child could be had this time."""


class Processes:
    """Up to so many children at once, started when they are needed and used again."""

    def __init__(self) -> None:
        self._size = 1
        self._idle: list[Child] = []
        self._busy: set[Child] = set()  # those that start among them
        self._ending: dict[Child, asyncio.Task[None]] = {}
        self._looking: asyncio.TimerHandle | None = None

    async def open(self, consumers: Sequence[AnyConsumer[Any, Any]], size: int, stopped: asyncio.Event) -> None:
        """Start one child for each consumer that needs any: what is wrong with it is better known before the first job.

        Args:
            consumers: all of a worker.
            size: children at once.
            stopped: ends the wait.

        Raises:
            ConfigError: a consumer cannot be run in a process.
        """
        self._size = size
        wanted = [consumer for consumer in consumers if consumer.executor == "process"]
        if not wanted:
            return
        if is_child():
            raise ConfigError(
                "a process that runs jobs cannot have a worker with executor='process': in the program itself, start "
                "workers under `if __name__ == '__main__':`"
            )
        for consumer in wanted:
            consumer.check()
        starting = asyncio.ensure_future(self._start_all(wanted[:size]))
        stop = asyncio.ensure_future(stopped.wait())
        try:
            await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (starting, stop):
                task.cancel()
            await asyncio.wait({starting, stop})
        if not starting.cancelled():
            starting.result()

    async def run(
        self, consumer: AnyConsumer[Any, Any], job: CurrentJob, data: Any, begun: Callable[[Child], None]
    ) -> object:
        """Run a job in a child; cancelled, the child is killed.

        Args:
            consumer: whose method.
            job: what `current_job()` gives there.
            data: what the method takes, as JSON values.
            begun: called with the child when it is there, and the time of the run begins.

        Returns:
            what the method returned, as JSON values; or `Unwritable`.

        Raises:
            RunFailed: it raised.
            JobSignal: it raised one.
            RunCrashed: the child died.
            Refused: the input does not fit, in the child.
            ChildUnfit: no child can make this consumer.
        """
        try:
            child = await self._taken(consumer)
        except _NotStarted as error:
            _log.error("%s; the job is put off", error)
            raise Snooze(_AGAIN_AFTER, str(error)) from None
        begun(child)
        try:
            answer = await child.perform(job, data)
        except BaseException:
            self._end(child)
            raise
        if answer is None:
            await asyncio.wait({self._end(child)})
            raise RunCrashed(child.how_it_ended())
        self._busy.discard(child)
        if self._is_worn(child, answer):
            self._end(child, politely=True)
        else:
            self._idle.append(child)
        return result_of(answer)

    async def aclose(self) -> None:
        """End all; returns when they are gone, within seconds."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        try:
            for child in [*self._busy]:
                self._end(child)
            for child in [*self._idle]:
                self._end(child, politely=True)
            if self._ending:
                await asyncio.wait([*self._ending.values()])
        except BaseException:
            for child in [*self._ending]:
                child.kill()
            raise

    # --- one child

    async def _start_all(self, consumers: Sequence[AnyConsumer[Any, Any]]) -> None:
        for consumer in consumers:
            try:
                child = await self._start(consumer)
            except _NotStarted as error:
                raise ChildUnfit(str(error)) from None
            self._busy.discard(child)
            self._idle.append(child)

    async def _taken(self, consumer: AnyConsumer[Any, Any]) -> Child:
        """One for this consumer, out of the idle ones if there is any: the last used, whose memory is still warm."""
        for child in reversed(self._idle):
            if child.consumer is consumer and not child.ended.done():
                self._idle.remove(child)
                self._busy.add(child)
                self._look_soon()
                return child
        for child in [child for child in self._idle if child.ended.done()]:  # killed by somebody while it was idle
            self._end(child)
        while self._idle and len(self._idle) + len(self._busy) >= self._size:
            self._end(self._idle[0], politely=True)
        return await self._start(consumer)

    async def _start(self, consumer: AnyConsumer[Any, Any]) -> Child:
        name = f"the process for {type(consumer).__module__}:{type(consumer).__qualname__}"
        try:
            child = Child(consumer)
        except OSError as error:
            raise _NotStarted(f"{name} could not be started: {error.strerror or error}") from error
        self._busy.add(child)
        self._look_soon()
        try:
            async with asyncio.timeout(_START_WITHIN):
                answer = await child.greet()
        except TimeoutError:
            self._end(child)
            raise _NotStarted(f"{name} was not ready within {_START_WITHIN:g} s") from None
        except BaseException:
            self._end(child)
            raise
        if answer is None:
            await asyncio.wait({self._end(child)})
            raise _NotStarted(f"{name} was not ready: {child.how_it_ended()}")
        if "unfit" in answer:
            self._end(child, politely=True)
            raise ChildUnfit(f"{name} cannot make it: {answer['unfit']}\n{answer['traceback']}".rstrip())
        if child.is_too_large():
            held, limit = child.holds(), consumer.max_memory
            self._end(child)
            raise ChildUnfit(f"{name} holds {held} MiB before its first job, max_memory={limit}: give it more")
        return child

    def _is_worn(self, child: Child, answer: dict[str, Any]) -> bool:
        """Whether another is to take its place."""
        most = child.consumer.max_jobs
        return answer.get("leaves", False) or (most is not None and child.jobs >= most) or child.is_too_large()

    def _end(self, child: Child, *, politely: bool = False) -> "asyncio.Task[None]":
        """End it, at once or by telling it. The task is done when it is gone."""
        if politely:
            child.retire()
        else:
            child.kill()
        if child not in self._ending:
            self._busy.discard(child)
            if child in self._idle:
                self._idle.remove(child)
            self._ending[child] = asyncio.get_running_loop().create_task(self._bury(child, politely))
        return self._ending[child]

    async def _bury(self, child: Child, politely: bool) -> None:
        try:
            if politely:
                await asyncio.wait({child.ended}, timeout=LEAVE_WITHIN)
            child.kill()  # a socket that is closed is a process that ends; and what it may have started
            pause, until = 0.001, time.monotonic() + _GONE_WITHIN
            while child.process.poll() is None:
                if time.monotonic() > until:
                    _log.error("process %d does not end, though it was killed", child.process.pid)
                    break
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.05)
        finally:
            child.kill()
            del self._ending[child]

    def _look_soon(self) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """At those that are busy: what they hold; and whether they live, should another hold the socket open."""
        self._looking = None
        for child in [*self._busy]:
            if child.jobs and child.is_too_large():
                child.why = f"the process that ran it held {child.holds()} MiB, max_memory={child.consumer.max_memory}"
                child.kill()
            elif child.is_dead():
                child.kill()
        if self._busy:
            self._look_soon()
