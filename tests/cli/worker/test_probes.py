"""The probes as a client sees them: statuses, bodies, and what a client that behaves badly gets."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.probes import Probes, State


class Subject:
    """What is probed."""

    def __init__(self) -> None:
        self.state = State(True, True, {"running": 3})


@pytest.fixture
def subject() -> Subject:
    return Subject()


@pytest.fixture
def probes(subject: Subject) -> Iterator[Probes]:
    with Probes("127.0.0.1", 0, lambda: subject.state) as probes:
        yield probes


def ask(probes: Probes, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, Any]:
    connection = HTTPConnection(probes.host, probes.port, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    return response, json.loads(body) if body else None


def said(probes: Probes, request: bytes) -> bytes:
    """All that a client that sends this is answered."""
    with socket.create_connection((probes.host, probes.port), timeout=5) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(4096), b""))


@pytest.mark.parametrize(("alive", "ready"), [(True, True), (True, False), (False, True), (False, False)])
def test_each_probe_tells_its_own_half_and_both_tell_why(
    probes: Probes, subject: Subject, alive: bool, ready: bool
) -> None:
    subject.state = State(alive, ready, {"running": 3})
    for path, good in (("/livez", alive), ("/readyz", ready), ("/livez?verbose=1", alive)):
        response, body = ask(probes, path)
        assert response.status == (200 if good else 503)
        assert response.getheader("Content-Type") == "application/json"
        assert response.getheader("Cache-Control") == "no-store"
        assert body == {"alive": alive, "ready": ready, "running": 3}
        head, nothing = ask(probes, path, "HEAD")
        assert (head.status, nothing, head.getheader("Content-Length")) == (
            response.status,
            None,
            response.getheader("Content-Length"),
        )


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /livez/ HTTP/1.1\r\n\r\n", 404),
        (b"POST /livez HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"DELETE /readyz HTTP/1.0\r\n\r\n", 405),
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01 \x00 \xff\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n", 431),
    ],
    ids=["root", "no such path", "post", "delete", "no request", "TLS", "too long"],
)
def test_what_is_no_probe_gets_an_error(probes: Probes, request_: bytes, status: int) -> None:
    head, _, body = said(probes, request_).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert (b"Allow: GET, HEAD" in head) == (status == 405)
    assert list(json.loads(body)) == ["error"]


def test_a_request_may_come_in_pieces(probes: Probes) -> None:
    with socket.create_connection((probes.host, probes.port), timeout=5) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (b"GET /li", b"vez HTTP/1.1\r\nHost: x\r", b"\n\r\n"):
            client.sendall(piece)
            assert ask(probes, "/livez")[0].status == 200
        assert b"".join(iter(lambda: client.recv(4096), b"")).startswith(b"HTTP/1.1 200 ")


def test_clients_that_send_nothing_keep_nobody_out(probes: Probes) -> None:
    """Not one, and not more than there is room for: the oldest of them make room."""
    idle = [socket.create_connection((probes.host, probes.port), timeout=5) for _ in range(70)]
    try:
        assert ask(probes, "/livez")[0].status == 200
        assert idle[0].recv(1) == b""
    finally:
        for client in idle:
            client.close()


def test_a_port_in_use_is_said_at_once(probes: Probes) -> None:
    with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{probes.port}: Address already in use"):
        Probes("127.0.0.1", probes.port, lambda: State(True, True, {}))


def test_the_port_is_free_again_afterwards(subject: Subject) -> None:
    with Probes("127.0.0.1", 0, lambda: subject.state) as probes:
        assert ask(probes, "/livez")[0].status == 200
    with Probes("127.0.0.1", probes.port, lambda: subject.state) as again:
        assert ask(again, "/livez")[0].status == 200
