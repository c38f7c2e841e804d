"""`RunningJob`: what a job is doing at this moment, down to the line of the user's code."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mindtrace.jobs.inquiry import ANSWER_WITHIN, stacks_told
from mindtrace.jobs.job import JobId
from mindtrace.jobs.runs import Run
from mindtrace.jobs.stacks import stack_of_coroutine, stack_of_thread


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
        stack: lines as in a traceback, outermost call first, from the user's code on, the innermost 100 calls; empty
            where it cannot be seen. Source lines only, no values.
        unseen: why a process of its own has told no stack; else empty.
    """

    job_id: JobId
    queue: str
    schema_name: str
    attempt: int
    seconds: float
    kind: Literal["coroutine", "thread", "process"]
    stack: list[str]
    unseen: str = ""


def running_jobs(in_flight: Iterable[Run], loop: asyncio.AbstractEventLoop, loop_thread: int) -> list[RunningJob]:
    """A snapshot of these runs, the oldest first; from any thread. Processes are asked, and have a second to answer.

    Args:
        in_flight: of one worker.
        loop: its event loop.
        loop_thread: the thread in which that runs.
    """
    now, turning = time.monotonic(), asyncio.current_task(loop)
    runs = sorted(in_flight, key=lambda run: run.started)
    children = {run: run.child for run in runs if run.child is not None}
    told = stacks_told({run: child.asked for run, child in children.items()})
    found: list[RunningJob] = []
    for run in runs:
        job, kind, stack, unseen = run.job, _kind_of(run), list[str](), ""
        seconds = now - run.started
        if kind == "process":
            stack = told.get(run, [])
            if run not in children:
                unseen = "its process is being started"
            elif run not in told:
                unseen = (
                    f"its process, pid {children[run].process.pid}, does not answer within {ANSWER_WITHIN:g} s: it may "
                    "be in C code that lets no Python run, or stand still"
                )
        elif kind == "thread" and run.thread_id is not None:
            stack = stack_of_thread(run.thread_id)
        elif kind == "coroutine" and run.task is not None:
            stack = stack_of_thread(loop_thread) if run.task is turning else stack_of_coroutine(run.task.get_coro())
        found.append(RunningJob(job.id, job.queue, job.schema_name, job.attempt, seconds, kind, stack, unseen))
    return found


def _kind_of(run: Run) -> Literal["coroutine", "thread", "process"]:
    if run.route.consumer.executor == "process":
        return "process"
    return "coroutine" if run.thread is None else "thread"
