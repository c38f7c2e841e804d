"""`RunningJob`: what a job is doing at this moment, down to the line of the user's code."""

import asyncio
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from mindtrace.jobs import runs
from mindtrace.jobs.job import JobId
from mindtrace.jobs.runs import Run

_WAY_THERE = {runs.__file__, asyncio.events.__file__}


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that a worker runs.

    Attributes:
        job_id: the job's.
        queue: where it came from.
        schema_name: what it is; empty where it names no schema.
        attempt: which start this is, from 1.
        seconds: since it began.
        kind: where it runs.
        stack: lines as in a traceback, outermost call first, from the user's code on; empty where it cannot be seen.
            Source lines only, no values.
    """

    job_id: JobId
    queue: str
    schema_name: str
    attempt: int
    seconds: float
    kind: Literal["coroutine", "thread", "process"]
    stack: list[str]


def running_jobs(in_flight: Iterable[Run], loop: asyncio.AbstractEventLoop, loop_thread: int) -> list[RunningJob]:
    """A snapshot of these runs, the oldest first; from any thread.

    Args:
        in_flight: of one worker.
        loop: its event loop.
        loop_thread: the thread in which that runs.
    """
    now, turning = time.monotonic(), asyncio.current_task(loop)
    found: list[RunningJob] = []
    for run in sorted(in_flight, key=lambda run: run.started):
        job, in_thread = run.job, run.thread is not None
        if in_thread:
            stack = [] if run.thread_id is None else stack_of_thread(run.thread_id)
        elif run.task is None:
            stack = []
        else:
            stack = stack_of_thread(loop_thread) if run.task is turning else _stack_of_coroutine(run.task.get_coro())
        kind: Literal["coroutine", "thread"] = "thread" if in_thread else "coroutine"
        found.append(RunningJob(job.id, job.queue, job.schema_name, job.attempt, now - run.started, kind, stack))
    return found


def stack_of_thread(thread: int) -> list[str]:
    """Where a thread is, as `RunningJob.stack` has it."""
    # The documented way, whatever its name begins with.
    frame = sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage]
    return [] if frame is None else _lines(traceback.extract_stack(frame))


def _stack_of_coroutine(coroutine: Any) -> list[str]:
    """From what the task runs down to what it waits for: a suspended frame does not know its caller, but its callee."""
    frames: list[FrameType] = []
    while coroutine is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(coroutine, f"{kind}_frame", None)
            if frame is not None:
                frames.append(frame)
                coroutine = getattr(coroutine, "gi_yieldfrom" if kind == "gi" else f"{kind}_await", None)
                break
        else:
            break
    return _lines(traceback.StackSummary.extract((frame, frame.f_lineno or 0) for frame in frames))


def _lines(stack: traceback.StackSummary) -> list[str]:
    """Without what lies above the user's code: the interpreter's, asyncio's and our own way there."""
    begins = 0
    for depth, frame in enumerate(stack):
        if frame.filename in _WAY_THERE:
            begins = depth + 1
    lines: list[str] = []
    for frame in stack[begins:] or stack:
        lines.append(f'File "{frame.filename}", line {frame.lineno}, in {frame.name}')
        if frame.line:
            lines.append(f"  {frame.line}")
    return lines
