"""Whether a worker is alive and ready, over HTTP: `/livez` and `/readyz`, for Kubernetes and whoever else asks.

One thread of its own serves them, so that they answer while the application's loop is blocked, which is when they are
needed. It speaks as much HTTP as a probe does: a request line, headers that nobody reads, one answer, the end.
"""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from mindtrace.jobs.errors import ConfigError

_MOST = 64  # connections at once: the oldest makes room
_WITHIN = 5.0  # seconds that a connection may take altogether
_REQUEST_LIMIT = 8192  # bytes of request line and headers
_TEXTS: Final[Mapping[int, str]] = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


@dataclass(frozen=True, slots=True)
class State:
    """What is told.

    Attributes:
        alive: it works, or would if there were a broker. Where this is False, a restart is what helps.
        ready: it takes jobs.
        facts: why; JSON values. No payloads, no addresses.
    """

    alive: bool
    ready: bool
    facts: Mapping[str, Any]


@dataclass(slots=True, eq=False)
class _Visit:
    """One connection."""

    socket: socket.socket
    until: float
    request: bytes = b""
    answer: bytes = b""
    answered: bool = False


class Probes:
    """Listens from the start, so that a port in use is known at once; answers inside its `with` block.

    Args:
        host: the address to listen on.
        port: 0 picks a free one.
        state: asked anew for each request, in the thread of the probes.

    Attributes:
        host: as given.
        port: what it listens on.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(self, host: str, port: int, state: Callable[[], State]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=_MOST)
        except OSError as error:
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise ConfigError(f"the health port cannot listen on {where}: {error.strerror or error}") from None
        self.host: str = host
        self.port: int = self._listener.getsockname()[1]
        self._listener.setblocking(False)
        self._state = state
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._visits: dict[int, _Visit] = {}
        self._thread = threading.Thread(target=self._serve, name="mtj-probes", daemon=True)

    def __enter__(self) -> Self:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._rope.close()
        self._thread.join(_WITHIN)
        for visit in list(self._visits.values()):
            self._end(visit)
        self._selector.close()
        self._listener.close()
        self._bell.close()

    @property
    def url(self) -> str:
        """Where `/livez` and `/readyz` are."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def _serve(self) -> None:
        while True:
            soonest = min((visit.until for visit in self._visits.values()), default=None)
            timeout = None if soonest is None else max(0.0, soonest - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.fileobj is self._bell:
                    return
                if key.fileobj is self._listener:
                    self._welcome()
                else:
                    self._go_on(key.data)
            now = time.monotonic()
            for visit in [visit for visit in self._visits.values() if visit.until <= now]:
                self._end(visit)

    def _welcome(self) -> None:
        try:
            arrived, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are no more files to be had
            return
        arrived.setblocking(False)
        if len(self._visits) >= _MOST:
            self._end(next(iter(self._visits.values())))
        visit = _Visit(arrived, time.monotonic() + _WITHIN)
        self._visits[id(visit)] = visit
        self._selector.register(arrived, selectors.EVENT_READ, visit)

    def _go_on(self, visit: _Visit) -> None:
        if visit.socket.fileno() < 0:  # ended in this same round, to make room
            return
        try:
            if visit.answer:
                self._write(visit)
            elif data := visit.socket.recv(4096):
                if not visit.answered:
                    self._read(visit, data)
            else:
                self._end(visit)
        except BlockingIOError:
            return
        except OSError:
            self._end(visit)

    def _read(self, visit: _Visit, data: bytes) -> None:
        visit.request += data
        head, end, _ = visit.request.partition(b"\r\n\r\n")
        if end or len(visit.request) > _REQUEST_LIMIT:
            visit.answer = self._answer_to(head) if len(head) <= _REQUEST_LIMIT else _answer(431)
            self._write(visit)

    def _write(self, visit: _Visit) -> None:
        sent = 0
        with suppress(BlockingIOError):
            sent = visit.socket.send(visit.answer)
        visit.answer = visit.answer[sent:]
        visit.answered = not visit.answer
        self._selector.modify(visit.socket, selectors.EVENT_READ if visit.answered else selectors.EVENT_WRITE, visit)
        if visit.answered:  # and it is closed once the other end is: closed with unread data it would reset the answer
            visit.socket.shutdown(socket.SHUT_WR)

    def _answer_to(self, head: bytes) -> bytes:
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _answer(400)
        method, path = words[0], words[1].partition(b"?")[0]
        if path not in (b"/livez", b"/readyz"):
            return _answer(404, head_only=method == b"HEAD")
        if method not in (b"GET", b"HEAD"):
            return _answer(405)
        state = self._state()
        good = state.alive if path == b"/livez" else state.ready
        body = {"alive": state.alive, "ready": state.ready, **state.facts}
        return _answer(200 if good else 503, body, head_only=method == b"HEAD")

    def _end(self, visit: _Visit) -> None:
        del self._visits[id(visit)]
        self._selector.unregister(visit.socket)
        visit.socket.close()


def _answer(status: int, body: Mapping[str, Any] | None = None, *, head_only: bool = False) -> bytes:
    text = json.dumps({"error": _TEXTS[status]} if body is None else body).encode() + b"\n"
    allow = "Allow: GET, HEAD\r\n" if status == 405 else ""
    head = (
        f"HTTP/1.1 {status} {_TEXTS[status]}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
        f"{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if head_only else text)
