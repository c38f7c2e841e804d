"""What a test leaves behind is named; what only takes its time to be gone is waited for."""

import asyncio
import os
import re
import socket
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from anyio import to_thread
from redis.asyncio import Redis

from mindtrace.jobs.testing.leaks import LeakGuard

AT_ONCE = 0.02


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def nothing_starts_meanwhile(request: pytest.FixtureRequest) -> None:
    """The shared brokers of this run start in threads of this process, which keeps descriptors for them."""
    for name in ("redis", "rabbitmq"):
        if any(item.get_closest_marker(name) for item in request.session.items):
            request.getfixturevalue(f"{name}_url")


@contextmanager
def found(*patterns: str) -> Generator[None]:
    """The error has one line for each, in this order."""
    with pytest.raises(AssertionError) as raised:
        yield
    head, *lines = str(raised.value).splitlines()
    assert head == f"{len(patterns)} left behind:"
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line)


@asynccontextmanager
async def clients(redis_url: str, *, within: float) -> AsyncGenerator[LeakGuard, None]:
    """A guard that counts the connections to Redis; its own is there as long as it is."""
    async with Redis.from_url(redis_url, protocol=2) as own:

        async def count() -> int:
            return len(await own.client_list())

        yield LeakGuard(within=within, counters={"clients of Redis": count})


def test_a_block_that_leaves_nothing_passes(tmp_path: Path) -> None:
    with LeakGuard(), (tmp_path / "file").open("w") as file, socket.socket():
        file.write("closed at the end")
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()


def test_an_open_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "forgotten"
    with found(r"descriptor \d+: .*forgotten"), LeakGuard(within=AT_ONCE):
        file = path.open("w")
    file.close()


def test_a_descriptor_that_is_opened_anew_in_the_place_of_a_closed_one_is_named(tmp_path: Path) -> None:
    """One less and one more are not the same as none."""
    before = (tmp_path / "before").open("w")
    with found(rf"descriptor {before.fileno()}: .*after"), LeakGuard(within=AT_ONCE):
        before.close()
        after = (tmp_path / "after").open("w")
    after.close()


def test_a_connection_is_named_by_both_its_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ends = rf"\('127\.0\.0\.1', \d+\) \('127\.0\.0\.1', {port}\)"
        with found(rf"descriptor \d+: socket\S* {ends}"), LeakGuard(within=AT_ONCE):
            line = socket.create_connection(("127.0.0.1", port))
        line.close()
        with found(r"descriptor \d+: socket\S* \('0\.0\.0\.0', 0\)"), LeakGuard(within=AT_ONCE):
            alone = socket.socket()
        alone.close()


def test_naming_what_is_open_opens_nothing(tmp_path: Path) -> None:
    with LeakGuard():
        with (tmp_path / "file").open("w"), pytest.raises(AssertionError), LeakGuard(within=AT_ONCE):
            held = [(tmp_path / "other").open("w"), socket.socket()]
        for each in held:
            each.close()


def test_a_thread_is_named_and_one_that_ends_in_time_is_waited_for() -> None:
    go_on = threading.Event()
    with found(r"thread somebody"), LeakGuard(within=AT_ONCE):
        threading.Thread(target=go_on.wait, name="somebody").start()
    with LeakGuard(within=10):
        threading.Timer(0.05, int).start()
    go_on.set()


def test_the_error_of_the_block_is_raised_as_it_is() -> None:
    left: list[socket.socket] = []

    def block() -> None:
        left.append(socket.socket())
        raise LookupError("of the block")

    with pytest.raises(LookupError, match="of the block"), LeakGuard(within=AT_ONCE):
        block()
    left[0].close()


def test_counters_need_a_loop() -> None:
    async def count() -> int:
        return 0

    with pytest.raises(RuntimeError, match="async with LeakGuard"):
        LeakGuard(counters={"none": count}).__enter__()


@pytest.mark.anyio
async def test_a_task_is_named_and_one_that_ends_in_time_is_waited_for() -> None:
    go_on = asyncio.Event()

    async def waits() -> None:
        await go_on.wait()

    with found(r"task somebody \(test_a_task_is_named.*waits\)"):
        async with LeakGuard(within=AT_ONCE):
            left = asyncio.create_task(waits(), name="somebody")
    async with LeakGuard(within=10):
        later = asyncio.create_task(asyncio.sleep(0.05))
    assert later.done()
    async with LeakGuard(within=AT_ONCE):  # what was there before is nobody's leak
        await asyncio.sleep(0)
    go_on.set()
    await left


@pytest.mark.anyio
async def test_the_error_of_a_block_with_a_loop_is_raised_as_it_is_too() -> None:
    left: list[asyncio.Task[None]] = []

    async def block() -> None:
        left.append(asyncio.create_task(asyncio.sleep(100)))
        raise LookupError("of the block")

    with pytest.raises(LookupError, match="of the block"):
        async with LeakGuard(within=AT_ONCE):
            await block()
    left[0].cancel()


@pytest.mark.anyio
async def test_everything_that_is_left_is_named_at_once(tmp_path: Path) -> None:
    go_on = threading.Event()
    with found(r"task one .*", r"task two .*", r"thread somebody", rf"descriptor \d+: {tmp_path}/file"):
        async with LeakGuard(within=AT_ONCE):
            tasks = [asyncio.create_task(asyncio.sleep(100), name=name) for name in ("two", "one")]
            threading.Thread(target=go_on.wait, name="somebody").start()
            file = os.open(tmp_path / "file", os.O_CREAT)
    go_on.set()
    os.close(file)
    for task in tasks:
        task.cancel()


@pytest.mark.anyio
async def test_threads_that_are_kept_for_reuse_are_no_leak_unless_it_is_asked_for() -> None:
    async with LeakGuard(within=AT_ONCE):
        await asyncio.to_thread(int)
        await to_thread.run_sync(int)
    with found(r"thread asyncio_\d+"):
        async with LeakGuard(within=AT_ONCE, pools=()):
            meet = threading.Barrier(2)  # there is a thread for one of them
            await asyncio.gather(asyncio.to_thread(meet.wait), asyncio.to_thread(meet.wait))


@pytest.mark.anyio
@pytest.mark.redis
async def test_a_connection_that_the_server_still_has_is_counted(redis_url: str) -> None:
    async with clients(redis_url, within=10) as guard, guard, Redis.from_url(redis_url) as client:
        await client.ping()
    async with Redis.from_url(redis_url) as client, clients(redis_url, within=AT_ONCE) as guard:
        with found(r"descriptor \d+: socket.*", r"clients of Redis: \d+ instead of \d+"):
            async with guard:
                await client.ping()


@pytest.mark.anyio
async def test_a_guard_can_be_entered_in_one_task_and_left_in_another() -> None:
    """As fixtures of some pytest plugins are."""
    guard = LeakGuard(within=AT_ONCE)
    await asyncio.create_task(guard.__aenter__())
    await asyncio.create_task(guard.__aexit__(None, None, None))
