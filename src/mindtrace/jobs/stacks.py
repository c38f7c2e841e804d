"""Where a thread or a coroutine is, in lines as a traceback has them: source lines only, no values."""

import asyncio
import sys
import traceback
from os.path import dirname, join
from types import FrameType
from typing import Any, Final

DEEPEST: Final = 100
"""Calls that are told of one stack, the innermost ones."""

_WAY_THERE: Final = {asyncio.events.__file__, *(join(dirname(__file__), name) for name in ("runs.py", "child.py"))}


def stack_of_thread(thread: int) -> list[str]:
    """The calls of a thread of this process, the outermost first, from the user's code on; empty if there is none."""
    # The documented way, whatever its name begins with.
    frame = sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage]
    return [] if frame is None else _lines(traceback.extract_stack(frame, DEEPEST))


def stack_of_coroutine(coroutine: Any) -> list[str]:
    """From what a task runs down to what it waits for: a suspended frame does not know its caller, but its callee."""
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
    return _lines(traceback.StackSummary.extract((frame, frame.f_lineno or 0) for frame in frames[-DEEPEST:]))


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
