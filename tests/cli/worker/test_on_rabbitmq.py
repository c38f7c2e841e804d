"""`mindtrace-jobs worker` on RabbitMQ: several processes, the second signal, and a server that is not there."""

import re
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.rabbitmq


def test_processes_hand_back_what_they_run_and_others_take_it_with_no_attempt_used(
    rabbitmq_url: str, site_on: Callable[[str], Any]
) -> None:
    site = site_on(rabbitmq_url)
    site.publish(2, gate=str(site.gate()))
    command = site.start("app:worker", "--processes", "2", "-c", "1")
    for _ in range(2):
        command.out.until("begins . 1$")
    for said in ("SIGTERM: draining, 1 running", "SIGTERM again: cancelling and handing back 1"):
        command.send(signal.SIGTERM)
        for _ in range(2):
            command.err.until(said)
    assert command.status(within=10) == 1
    site.gate().touch()
    burst = site.start("app:worker", "--burst")
    assert burst.status() == 0
    assert {tuple(line.split()[1:]) for line in burst.out.all()} == {
        ("begins", "1", "1"), ("ends", "1"), ("begins", "2", "1"), ("ends", "2"),
    }  # fmt: skip


def test_in_a_burst_processes_are_replaced_until_nothing_is_ready(
    rabbitmq_url: str, site_on: Callable[[str], Any]
) -> None:
    site = site_on(rabbitmq_url)
    site.publish(7)
    burst = site.start("app:worker", "--processes", "2", "--burst", "--max-jobs", "2", "-c", "1")
    assert burst.status() == 0
    assert sum("ends" in line for line in burst.out.all()) == 7


def test_a_server_that_is_not_there_is_said_by_us_and_not_by_the_driver(
    site_on: Callable[[str], Any],
) -> None:
    with socket.socket() as nobody:  # bound and not listening: every connection is refused
        nobody.bind(("127.0.0.1", 0))
        site = site_on(f"amqp://127.0.0.1:{nobody.getsockname()[1]}/")
        worker = site.start("app:worker", "--log-level", "debug")
        worker.err.until("WARNING no RabbitMQ at .* ConnectionRefusedError: .*; trying on$")  # after a first try
        worker.send(signal.SIGKILL)
        assert "transport" not in "\n".join(worker.err.all())


@pytest.mark.parametrize("words", [[], ["--processes", "2"]], ids=["one", "several"])
def test_a_refused_login_is_one_line(rabbitmq_url: str, site_on: Callable[[str], Any], words: list[str]) -> None:
    site = site_on(re.sub("//[^@]*@", "//nobody:canary@", rabbitmq_url))
    worker = site.start("app:worker", *words)
    assert worker.status() == 4
    lines = worker.err.all()
    assert ["refuses" in line or "REFUSED" in line for line in lines] == [False] * (len(lines) - 1) + [True]
    assert not any("canary" in line or "ERROR" in line or "cannot start" in line for line in lines)
