"""How a worker asks its children where in the code they are, over a socket of each that is for nothing else.

    worker ──> child    a byte, and with it one end of a pair of sockets made for this one answer
    child ──> worker    through that: the lines of a stack, as JSON                                   (end)

So it may be asked from any thread, by several at once and while the worker's loop stands still; no answer is taken for
another's, and one that comes too late meets a closed end. In the child a thread answers: not where C code lets no
Python run.
"""

import os
import select
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Final, TypeVar

from pydantic import TypeAdapter
from pydantic_core import to_json

from mindtrace.jobs.stacks import stack_of_thread

ANSWER_WITHIN: Final = 1.0
"""Seconds that all who are asked together have to answer."""

_CLOSE_ON_EXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_LARGEST: Final = 256 * 1024  # bytes of an answer
_LINES: Final = TypeAdapter(list[str])
_LOCK_WITHIN: Final = 0.1

K = TypeVar("K")


class Asked:
    """The worker's end of the socket of one child."""

    def __init__(self, line: socket.socket) -> None:
        self._line, self._lock = line, threading.Lock()

    def close(self) -> None:
        """Ask no more."""
        with self._lock:
            self._line.close()

    def ask(self) -> socket.socket | None:
        """Where its answer will come; None if it cannot be asked. From any thread, also in a signal handler."""
        try:
            ours, theirs = socket.socketpair()
        except OSError:  # there are no more files to be had
            return None
        with theirs:
            # With a bound: a handler may have interrupted the very thread that holds it.
            if self._lock.acquire(timeout=_LOCK_WITHIN):
                try:
                    socket.send_fds(self._line, [b"?"], [theirs.fileno()], socket.MSG_DONTWAIT)
                except OSError:
                    pass
                else:
                    return ours
                finally:
                    self._lock.release()
        ours.close()
        return None


def stacks_told(asked: Mapping[K, Asked]) -> dict[K, list[str]]:
    """Ask them all, and wait for their answers.

    Returns:
        the lines of those that answer in time.
    """
    with ExitStack() as stack:
        poll, deadline = select.poll(), time.monotonic() + ANSWER_WITHIN
        waiting: dict[int, tuple[K, socket.socket, bytearray]] = {}
        for key, one in asked.items():
            answers = one.ask()
            if answers is not None:
                stack.enter_context(answers)
                poll.register(answers, select.POLLIN)
                waiting[answers.fileno()] = key, answers, bytearray()
        told: dict[K, list[str]] = {}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                key, answers, so_far = waiting[fd]
                part = _received(answers)
                so_far += part
                if part and len(so_far) <= _LARGEST:
                    continue
                poll.unregister(fd)
                del waiting[fd]
                if not part and (lines := _read(so_far)) is not None:
                    told[key] = lines
        return told


def answer(line: socket.socket, thread: int) -> bool:
    """In the child: tell whoever asks where this thread is. False where nobody will ask any more."""
    try:
        asked, ends, *_ = socket.recv_fds(line, 1, 1, _CLOSE_ON_EXEC | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    for end in ends:
        os.set_inheritable(end, False)
        # Memory may be full, and what is asked is the user's code, in any state: no reason to end whoever answers.
        with socket.socket(fileno=end) as answers, suppress(Exception):
            answers.settimeout(ANSWER_WITHIN)
            lines = [line.encode("utf-8", "backslashreplace").decode() for line in stack_of_thread(thread)]
            answers.sendall(to_json(lines))
            answers.shutdown(socket.SHUT_RDWR)  # what the job forks at this moment may hold it open
    return bool(asked)


def _received(answers: socket.socket) -> bytes:
    try:
        return answers.recv(65536, socket.MSG_DONTWAIT)
    except OSError:
        return b""


def _read(told: bytearray) -> list[str] | None:
    """Text and nothing else; None where it is no such answer."""
    try:
        return _LINES.validate_json(bytes(told))
    except ValueError:
        return None
