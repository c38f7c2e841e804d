"""`Supervisor`, with processes that end when a test says so, on a clock that runs ahead whenever all wait."""

import asyncio
import os
import selectors
import signal
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mindtrace.jobs.cli import children, supervisor
from mindtrace.jobs.cli.children import Child
from mindtrace.jobs.cli.errors import Relayed
from mindtrace.jobs.cli.report import Report
from mindtrace.jobs.cli.supervisor import Supervisor
from mindtrace.jobs.notify import Notifier

pytestmark = pytest.mark.anyio

READY = Report("running", ready=True, has_worked=True)


class Ahead(asyncio.SelectorEventLoop):
    """Its clock is put forward to what is due next, once nobody has anything else to do."""

    def __init__(self) -> None:
        super().__init__(_Hasty(self))
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class _Hasty(selectors.DefaultSelector):
    def __init__(self, loop: Ahead) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and timeout is None:
            raise AssertionError("all wait, and nothing is due")
        if not events:
            self._loop.now += timeout or 0.0
        return events


class Process:
    """In place of one of the system's: a worker that does what the test says."""

    def __init__(self, pid: int) -> None:
        self.pid, self.got = pid, list[signal.Signals]()
        self.reader = asyncio.StreamReader()
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def tell(self, report: Report) -> None:
        self.reader.feed_data(report.encode())

    def end(self, status: int, last: Report | None = None) -> None:
        if last is not None:
            self.tell(last)
        self.reader.feed_eof()
        self._status.set_result(status)

    async def wait(self) -> int:
        return await self._status

    def send_signal(self, number: signal.Signals) -> None:
        self.got.append(number)


class Keeping:
    """A supervisor that runs.

    Attributes:
        started: the processes that it has started, in turn.
        status: of its end, or why it cannot go on.
    """

    def __init__(self, processes: int, *, burst: bool) -> None:
        self._supervisor = Supervisor(
            ["app:worker"], processes, burst=burst, notifier=Notifier({}), introduce=lambda about: None
        )
        self._news: asyncio.Queue[Process] = asyncio.Queue()
        self.started = list[Process]()
        self.status: asyncio.Task[int] = asyncio.create_task(self._supervisor.run())

    async def start(self, name: str, words: Sequence[str]) -> Child:
        process = Process(1_000_000_000 + len(self.started))
        self.started.append(process)
        self._news.put_nowait(process)
        return Child(name, cast(Any, process), process.reader, cast(Any, SimpleNamespace(close=lambda: None)))

    async def next(self, *, ready: bool = False) -> Process:
        """The next that it starts; also ready, if it is to be."""
        async with asyncio.timeout(100):
            process = await self._news.get()
        if ready:
            process.tell(READY)
            await asyncio.sleep(0.2)
        return process


Keep = Callable[..., Keeping]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": Ahead}


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Keep:
    """Starts a supervisor of so many processes."""

    def started(processes: int = 1, *, burst: bool = False) -> Keeping:
        clock = SimpleNamespace(monotonic=asyncio.get_running_loop().time)
        for module in (children, supervisor):
            monkeypatch.setattr(module, "time", clock)
        keeping = Keeping(processes, burst=burst)
        monkeypatch.setattr(Child, "start", keeping.start)
        return keeping

    return started


@pytest.mark.parametrize("status", [2, 3, 4])
async def test_a_process_that_tells_why_it_cannot_start_stops_all(keep: Keep, status: int) -> None:
    keeping = keep(2)
    first = await keeping.next()
    first.end(status, Report(failure="there is no such queue"))
    with pytest.raises(Relayed, match="there is no such queue") as failed:
        await keeping.status
    assert (failed.value.status, len(keeping.started)) == (status, 1)


@pytest.mark.parametrize("status", [0, 1, 2, 3, 4, -9])
@pytest.mark.parametrize("last", [None, Report("running")], ids=["says nothing", "runs"])
async def test_one_that_ends_without_a_word_is_started_again_whatever_its_status(
    keep: Keep, status: int, last: Report | None
) -> None:
    """A job may have ended it, before anybody could see that it worked."""
    keeping = keep(2)
    (await keeping.next()).end(status, last)
    again, other = [await keeping.next() for _ in range(2)]
    assert not keeping.status.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.1)
    for process in (again, other):
        assert process.got == [signal.SIGTERM]
        process.end(-signal.SIGTERM)
    assert await keeping.status == 0
