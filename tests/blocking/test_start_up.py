"""The first call: what it says of the backend; and what it says, and when, where there is no server."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Start = Callable[[str], Any]

LOG = """
import logging

class Log(logging.Handler):
    def emit(self, record):
        if record.levelno == logging.INFO and record.getMessage().startswith("backend "):
            print(record.getMessage())

logging.getLogger("mindtrace.jobs").addHandler(Log())
logging.getLogger("mindtrace.jobs").setLevel(logging.INFO)
"""


def test_the_first_call_tells_the_backend_and_its_durability_in_the_words_of_the_async_api(
    start: Start, backend: str
) -> None:
    program = start(
        LOG
        + """
orchestrator = Orchestrator(a_client())
print("made")
orchestrator.declare(QueueSpec("orders"))
print("called")
orchestrator.depth("orders")

async def the_async_api():
    async with AsyncOrchestrator(connect(os.environ["BACKEND"])):
        pass

asyncio.run(the_async_api())
"""
    )
    made, first, called, same = program.rest()
    assert (made, called) == ("made", "called")
    assert first == same
    assert first.startswith(f"backend {backend} open, durability ")
    assert program.ends_well()


def test_a_backend_that_lacks_what_is_required_is_not_told_as_open(start_locally: Start) -> None:
    program = start_locally(
        LOG
        + """
from mindtrace.jobs import NotSupported

orchestrator = Orchestrator(a_client(), require={"lookup"})
for _ in range(2):
    try:
        orchestrator.queues()
    except NotSupported as error:
        print(error.feature)
"""
    )
    assert program.rest() == ["lookup", "lookup"]
    assert program.ends_well()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """Where nobody listens, and nobody else can begin to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.redis
def test_threads_that_make_the_first_call_together_hear_together_that_there_is_no_server(
    start_on: Callable[[str], Start], nowhere: str
) -> None:
    """Not one after the other, five seconds each; and the next call tries anew."""
    program = start_on(nowhere)(
        """
        import time
        orchestrator = Orchestrator(a_client())
        together = threading.Barrier(4)

        def calls():
            together.wait()
            begun = time.monotonic()
            try:
                orchestrator.queues()
            except JobsError as error:
                print(type(error).__name__, error.retryable, time.monotonic() - begun < 8)

        threads = [threading.Thread(target=calls) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        """
    )
    assert program.rest() == ["BackendUnavailable True True"] * 4
    assert program.ends_well()
