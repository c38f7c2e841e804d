"""What systemd hears: the datagrams of sd_notify, as it receives them."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mindtrace.jobs.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The address of a service manager, and where its mail arrives."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@mtj-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.settimeout(5)
        inbox.bind(name if name[0] == "/" else "\0" + name[1:])
        yield name, inbox


def test_a_service_tells_that_it_is_ready_alive_and_stopping(manager: tuple[str, socket.socket]) -> None:
    address, inbox = manager
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier(environ)
    assert environ == {"HOME": "/"}  # what we start later does not speak in our name
    assert notifier.interval == 1.5
    assert notifier.every <= 0.75
    notifier.beat(alive=False, ready=False, status="waiting for the broker")
    notifier.beat(alive=False, ready=False, status="waiting for the broker")  # said just now
    notifier.beat(alive=False, ready=True, status="receiving")  # no sign of life from what is not alive
    notifier.beat(alive=True, ready=True, status="receiving")
    notifier.beat(alive=True, ready=True, status="receiving")  # not yet time for another
    notifier.stopping("draining")
    notifier.stopping("draining")
    inbox.settimeout(0.2)
    said: list[str] = []
    with suppress(TimeoutError):
        while True:
            said.append(inbox.recv(4096).decode())
    assert said == [
        "EXTEND_TIMEOUT_USEC=30000000\nSTATUS=waiting for the broker",
        "READY=1\nSTATUS=receiving",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=draining",
    ]


@pytest.mark.parametrize(
    "watchdog",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}],
    ids=["none", "zero", "no number", "of another process"],
)
def test_no_sign_of_life_is_promised_where_none_is_asked_for(tmp_path: Path, watchdog: dict[str, str]) -> None:
    assert Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), **watchdog}).interval is None


def test_without_a_service_manager_nothing_is_sent_and_nothing_fails(caplog: pytest.LogCaptureFixture) -> None:
    Notifier({"WATCHDOG_USEC": "3000000"}).beat(alive=True, ready=True, status="receiving")
    assert caplog.records == []


@pytest.mark.parametrize("address", ["/nowhere/notify", "vsock:2:1234"])
def test_a_manager_that_cannot_be_told_is_said_once(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        notifier = Notifier({"NOTIFY_SOCKET": address})
        notifier.beat(alive=True, ready=True, status="receiving")
        notifier.stopping("draining")
    assert len(caplog.records) == 1
