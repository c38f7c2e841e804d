"""What is said of a RabbitMQ that is not there: once, in the same words, and by us alone."""

import asyncio
import logging
import socket
from collections.abc import Iterator
from random import Random

import pytest

from mindtrace.jobs import BackendUnavailable
from mindtrace.jobs.backends.rabbitmq.address import Address
from mindtrace.jobs.backends.rabbitmq.line import Line
from mindtrace.jobs.backends.rabbitmq.link import Link

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def nobody() -> Iterator[Address]:
    """Bound and not listening: every connection is refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield Address("127.0.0.1", taken.getsockname()[1])


@pytest.fixture
def driver() -> Iterator[logging.Logger]:
    """The driver's logger, as in a process that has just begun."""
    log = logging.getLogger("aiormq")
    before = log.level
    log.setLevel(logging.NOTSET)
    yield log
    log.setLevel(before)


async def why(address: Address, *waits: float) -> list[str]:
    """What a link tells those who wait for it."""
    link, told = Link(address, "test", Random(1)), list[str]()
    link.start()
    try:
        for within in waits:
            with pytest.raises(BackendUnavailable) as gone:
                await link.connected(within)
            told.append(str(gone.value))
    finally:
        await link.aclose()
    return told


async def test_each_wait_for_it_ends_in_the_same_words_and_they_name_it_once(nobody: Address) -> None:
    first, *rest = await why(nobody, 0.212345, 0.1, 0.0612345)
    assert rest == [first, first]
    assert first.startswith(f"no RabbitMQ at {nobody}: ConnectionRefusedError: ")
    assert (first.count(str(nobody)), first.count("RabbitMQ")) == (1, 1)


async def test_a_wait_that_ends_before_the_first_answer_says_so() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = Address("127.0.0.1", silent.getsockname()[1])
        assert await why(address, 0.05) == [f"no RabbitMQ at {address}: no answer yet"]


async def test_the_driver_is_silent_also_where_everything_is_logged(
    nobody: Address, driver: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)  # of the root
    await why(nobody, 0.3)
    assert [record.name for record in caplog.records if record.name.startswith("mindtrace")] == [Link.__module__]
    assert [record for record in caplog.records if record.name.startswith("aiormq")] == []


@pytest.mark.parametrize("name", ["aiormq", "aiormq.connection"])
async def test_whoever_sets_a_level_for_the_driver_has_that_level(
    nobody: Address, driver: logging.Logger, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger=name)
    await why(nobody, 0.1)
    assert {record.name for record in caplog.records if record.levelno == logging.ERROR} == {"aiormq.connection"}


@pytest.mark.rabbitmq
async def test_a_server_that_takes_in_and_throws_out_is_said_to_be_lost_once(
    rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As it does while it comes up."""
    ups, enough = 0, asyncio.Event()

    def throw_out(line: Line) -> None:
        nonlocal ups
        ups += 1
        line.lost.set_result(ConnectionResetError("thrown out"))
        if ups == 4:
            enough.set()

    caplog.set_level(logging.DEBUG, "mindtrace.jobs")
    link = Link(Address.of_url(rabbitmq_url), "test", Random(1), throw_out)
    link.start()
    async with asyncio.timeout(20):
        await enough.wait()
    await link.aclose()
    levels = [record.levelno for record in caplog.records if "thrown out" in record.getMessage()]
    assert levels == [logging.WARNING, logging.DEBUG, logging.DEBUG]
