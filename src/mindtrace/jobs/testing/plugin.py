"""What pytest gives to any test that names it: `jobs`, the test kit; `redis_url` and `rabbitmq_url`, private brokers.

A run has at most one Redis and one RabbitMQ. Those that a collected test names start in threads of their own as soon as
the collection is complete; the tests that need none run first, meanwhile. A broker that cannot be had fails the tests
that need it, and skips none: whoever wants fewer tests deselects them.
"""

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import pytest

from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import Broker, BrokerUnavailable, Kind, Machine

if TYPE_CHECKING:
    from mindtrace.jobs.testing.jobs import JobsTest

__all__ = ["jobs", "rabbitmq_url", "redis_url", "started_brokers"]

_FIXTURES: Final[Mapping[str, Kind]] = {"redis_url": "redis", "rabbitmq_url": "rabbitmq"}


@pytest.fixture
def jobs() -> "Generator[JobsTest]":
    """A `JobsTest` of this test's own. Not a coroutine, so that it works under every asyncio plugin, and under none."""
    from mindtrace.jobs.testing.jobs import JobsTest  # here, or each run of pytest would load a backend

    jobs = JobsTest()
    yield jobs
    jobs.close()


@pytest.fixture(scope="session")
def redis_url(pytestconfig: pytest.Config) -> str:
    """The URL of a Redis that all tests of this run share: keep them apart by namespace, and flush nothing."""
    return pytestconfig.stash[_SHARED].get("redis").url


@pytest.fixture(scope="session")
def rabbitmq_url(pytestconfig: pytest.Config) -> str:
    """The URL of a RabbitMQ that all tests of this run share: keep them apart by namespace."""
    return pytestconfig.stash[_SHARED].get("rabbitmq").url


def started_brokers(config: pytest.Config) -> Mapping[Kind, Broker]:
    """The brokers that came up for this run, for their version and source; closed ones too."""
    return config.stash[_SHARED].started()


class _SharedBrokers:
    """The brokers of one run, each provided once, by a thread."""

    def __init__(self) -> None:
        # The real one: by the time a thread says that it installs packages, pytest may have put another in its place.
        self._stderr = os.dup(2)
        self._threads = ThreadPoolExecutor(len(_FIXTURES), thread_name_prefix="mtj-broker")
        self._futures: dict[Kind, Future[Broker]] = {}
        self._told: set[Kind] = set()

    def start(self, kind: Kind) -> Future[Broker]:
        provide: Callable[..., Broker] = {"redis": brokers.redis, "rabbitmq": brokers.rabbitmq}[kind]
        if kind not in self._futures:
            # The environment is read here: a test that changes it must not meet a thread that copies it.
            self._futures[kind] = self._threads.submit(provide, machine=Machine(), say=self._say)
        return self._futures[kind]

    def get(self, kind: Kind) -> Broker:
        """Waits for it. Where it cannot be had, the test fails: with the whole story once, then with one line."""
        try:
            return self.start(kind).result()
        except BrokerUnavailable as error:
            text = f"{str(error).splitlines()[0]} (in full where the first test failed)"
            if kind not in self._told:
                self._told.add(kind)
                text = str(error)
        pytest.fail(text, pytrace=False)

    def started(self) -> dict[Kind, Broker]:
        up: dict[Kind, Broker] = {}
        for kind, future in self._futures.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                up[kind] = future.result()
        return up

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for broker in self.started().values():
            broker.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    def _say(self, line: str) -> None:
        os.write(self._stderr, f"\n{line}\n".encode())


_SHARED: Final = pytest.StashKey[_SharedBrokers]()


def _needed(item: pytest.Item) -> Iterator[Kind]:
    """The brokers that a test names by our fixtures or by the mark; any other starts when a fixture asks for it."""
    definitions: Mapping[str, Any] = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    marked = {name for mark in item.iter_markers("uses_broker") for name in mark.args}
    for name, kind in _FIXTURES.items():
        # Only ours: somebody else's fixture of the same name must not start a server, let alone install one.
        ours = name in definitions and definitions[name][-1].func.__module__ == __name__
        if ours or kind in marked:
            yield kind


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "uses_broker(*kinds): starts redis or rabbitmq early, for a parameter whose fixture asks for it as it runs",
    )
    config.stash[_SHARED] = _SharedBrokers()


@pytest.hookimpl(trylast=True)  # after whoever else orders them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # RabbitMQ last: it takes seconds to start.
    ranks = [None, "redis", "rabbitmq"]
    items.sort(key=lambda item: max((ranks.index(kind) for kind in _needed(item)), default=0))


def pytest_collection_finish(session: pytest.Session) -> None:
    options = session.config.option
    if options.collectonly or (session.testsfailed and not options.continue_on_collection_errors):
        return  # no test will run
    for item in session.items:
        for kind in _needed(item):
            session.config.stash[_SHARED].start(kind)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout: a server's start is not the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    for kind in _needed(item):
        item.config.stash[_SHARED].start(kind).exception()
    return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for kind in _needed(item):
        item.config.stash[_SHARED].get(kind)


@pytest.hookimpl(trylast=True)  # after the fixtures that talk to them; on Ctrl-C too
def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_SHARED].close()


def pytest_unconfigure(config: pytest.Config) -> None:
    # Where pytest ended before it had a session, and perhaps before it came to our configure.
    if shared := config.stash.get(_SHARED, None):
        shared.close()
