"""`Supervisor`, with processes that end when a test says so, on a clock that runs ahead whenever all wait."""

import asyncio
import os
import selectors
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
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
ENDED = replace(READY, ready=False, has_ended=True)


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
        self._news = asyncio.Event()
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def tell(self, report: Report) -> None:
        self.reader.feed_data(report.encode())

    def end(self, status: int, last: Report | None = None) -> None:
        if last is not None:
            self.tell(last)
        self.reader.feed_eof()
        self._status.set_result(status)

    @property
    def runs(self) -> bool:
        return not self._status.done()

    async def wait(self) -> int:
        return await self._status

    def send_signal(self, number: signal.Signals) -> None:
        self.got.append(number)
        self._news.set()

    async def hears(self, number: signal.Signals) -> float:
        """When it has got that."""
        async with asyncio.timeout(100):
            while number not in self.got:
                self._news.clear()
                await self._news.wait()
        return asyncio.get_running_loop().time()


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
        self.status: asyncio.Task[int] = asyncio.create_task(asyncio.wait_for(self._supervisor.run(), 1000))

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

    async def stop(self) -> int:
        """Its status, after a SIGTERM that all obey which still run."""
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        for process in self.started:
            if process.got[-1:] == [signal.SIGTERM] and process.runs:
                process.end(0, ENDED)
        return await self.status


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
    for _ in range(2):  # it again, and the other
        await keeping.next()
    assert await keeping.stop() == 0


async def test_in_a_burst_one_that_leaves_something_is_replaced_until_one_leaves_nothing(keep: Keep) -> None:
    """Also where nobody has seen it ready: one that has settled something has been."""
    keeping = keep(burst=True)
    (await keeping.next(ready=True)).end(0, replace(ENDED, has_left_some=True))
    (await keeping.next()).end(0, Report("running", has_ended=True, has_worked=True, has_left_some=True))
    (await keeping.next()).end(0, Report("running", has_ended=True))
    assert await keeping.status == 0
    assert len(keeping.started) == 3


async def test_in_a_burst_one_that_does_not_tell_its_end_has_crashed_and_is_no_success(keep: Keep) -> None:
    keeping = keep(burst=True)
    (await keeping.next(ready=True)).end(0)
    (await keeping.next(ready=True)).end(0, ENDED)
    assert await keeping.status == 1


async def test_one_that_tells_its_end_is_replaced_at_once_and_one_that_does_not_after_a_pause(keep: Keep) -> None:
    keeping, now = keep(), asyncio.get_running_loop().time
    process, pauses = await keeping.next(ready=True), list[float]()
    for last in (ENDED, None):
        process.end(0, last)
        ended = now()
        process = await keeping.next()
        pauses.append(now() - ended)
        process.tell(READY)
        await asyncio.sleep(0.2)
    assert pauses[0] == 0
    assert pauses[1] >= 0.25
    assert await keeping.stop() == 0


@pytest.mark.parametrize(
    ("end", "last", "status"),
    [(0, ENDED, 0), (-signal.SIGTERM, ENDED, 0), (0, None, 1), (1, READY, 1), (-signal.SIGKILL, None, 1)],
    ids=["drains", "drains, and a signal meets it as it leaves", "a job exits", "hands back", "is killed"],
)
async def test_what_becomes_of_one_that_is_to_drain_is_the_status(
    keep: Keep, end: int, last: Report | None, status: int
) -> None:
    keeping = keep()
    process = await keeping.next(ready=True)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.1)
    assert process.got == [signal.SIGTERM]
    process.end(end, last)
    assert await keeping.status == status


async def test_the_pauses_between_crashes_double_up_to_half_a_minute_until_one_has_held_or_has_done_its_work(
    keep: Keep,
) -> None:
    keeping, now = keep(), asyncio.get_running_loop().time
    process, longest = await keeping.next(), [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    for lives, pauses in ((0.0, longest), (61.0, [0.5]), (0.0, [1.0]), (59.0, [2.0])):
        for pause in pauses:
            await asyncio.sleep(lives)
            process.end(1)
            ended = now()
            process = await keeping.next()
            assert pause / 2 <= now() - ended <= pause
    process.tell(READY)
    process.end(0, ENDED)
    (await keeping.next()).end(1)
    ended = now()
    await keeping.next()
    assert 0.25 <= now() - ended <= 0.5
    assert await keeping.stop() == 0


async def test_one_that_does_not_end_in_its_time_is_killed(keep: Keep) -> None:
    """In what it said that it may need after a first signal, or in 15 s after a second one."""
    for signals, patience in ((1, 40.0), (2, 15.0)):
        keeping, now = keep(), asyncio.get_running_loop().time
        process = await keeping.next(ready=True)
        process.tell(replace(READY, leave_within=40.0))
        await asyncio.sleep(0.1)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.01)
        told = now()
        assert await process.hears(signal.SIGKILL) - told == pytest.approx(patience, abs=0.1)
        assert process.got == [*[signal.SIGTERM] * signals, signal.SIGKILL]
        process.end(-signal.SIGKILL)
        assert await keeping.status == 1


async def test_a_rolling_restart_ends_with_the_first_successor_that_does_not_start(keep: Keep) -> None:
    keeping = keep(2)
    old = [await keeping.next(ready=True) for _ in range(2)]
    os.kill(os.getpid(), signal.SIGHUP)
    (await keeping.next()).end(3, Report(failure="ZeroDivisionError"))
    await asyncio.sleep(1.0)
    assert (len(keeping.started), [process.got for process in old]) == (3, [[], []])
    assert await keeping.stop() == 0


async def test_a_rolling_restart_ends_with_a_successor_that_is_not_ready_within_a_minute(keep: Keep) -> None:
    keeping, now = keep(2), asyncio.get_running_loop().time
    old = [await keeping.next(ready=True) for _ in range(2)]
    os.kill(os.getpid(), signal.SIGHUP)
    new, asked = await keeping.next(), now()
    new.tell(Report("running"))
    assert await new.hears(signal.SIGTERM) - asked == pytest.approx(60.0, abs=0.1)
    new.end(0)
    await asyncio.sleep(1.0)
    assert (len(keeping.started), [process.got for process in old]) == (3, [[], []])
    assert await keeping.stop() == 0
