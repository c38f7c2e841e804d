"""The end of a program that made blocking calls: by itself, within 2 s, with its own status and no noise."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mindtrace.jobs.testing import brokers

Start = Callable[..., Any]

PROMISED = 2.0  # seconds from the end of main to the end of the process
SLACK = 3.0  # for a busy machine

WAITS = """
class Waits(Consumer):
    def run(self, job_dict):
        print("begins")
        threading.Event().wait()

class WaitsAsync(Consumer):
    async def run(self, job_dict):
        print("begins")
        await asyncio.Event().wait()

class Stubborn(Consumer):
    async def run(self, job_dict):
        print("begins")
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

orchestrator = an_orchestrator()

def in_the_background(kind):
    consumer = connected(kind, orchestrator)
    threading.Thread(target=consumer.consume, daemon=True).start()

def until_idle():
    while True:
        depth = orchestrator.depth("orders")
        if not depth.ready and not depth.leased:
            return
"""

STATES = {
    "nothing was ever called": "",
    "a published job waits": "orchestrator.publish('orders', Order())",
    "a script has consumed": """
orchestrator.publish('orders', Order())
connected(Prints, orchestrator).consume(num_messages=1)
""",
    "a daemon thread waits in consume": """
in_the_background(Prints)
orchestrator.publish('orders', Order())
until_idle()
""",
    "a daemon thread is in a run": """
in_the_background(Waits)
orchestrator.publish('orders', Order())
""",
    "the background loop is in a run": """
in_the_background(WaitsAsync)
orchestrator.publish('orders', Order())
""",
    "the background loop is in a run that refuses to end": """
in_the_background(Stubborn)
orchestrator.publish('orders', Order())
""",
    "the client was closed": "orchestrator.backend.close()",
}
ENDS = {
    "it returns": ("", 0, 0),
    "it raises": ("raise ValueError('of the user')", 1, 1),
    "it exits": ("sys.exit(3)", 3, 0),
}
CASES = [("it returns", state) for state in STATES] + [
    (end, state)
    for end in ("it raises", "it exits")
    for state in ("a script has consumed", "a daemon thread is in a run")
]


@pytest.mark.parametrize(("end", "state"), CASES)
def test_a_program_ends_by_itself(start: Start, end: str, state: str) -> None:
    last, status, tracebacks = ENDS[end]
    runs = "thread" in state or "loop" in state or "script" in state
    program = start(WAITS + STATES[state] + ("sys.stdin.readline()" if runs else "") + f"\nprint('the end')\n{last}\n")
    if runs:
        assert program.line() in ("begins", "runs tea 1")
        program.say()
    assert program.line() == "the end"
    assert program.status(within=PROMISED + SLACK) == status, program.errors()
    assert program.errors().count("Traceback") == tracebacks, program.errors()
    assert tracebacks or program.errors() == ""


def test_an_exit_handler_of_the_user_may_still_make_calls(start: Start) -> None:
    program = start(
        """
        import atexit

        orchestrator = an_orchestrator()
        orchestrator.publish("orders", Order())
        atexit.register(lambda: print("left", orchestrator.count_queue_messages("orders")))
        """
    )
    assert program.rest() == ["left 1"]
    assert program.ends_well()


def test_a_call_after_everything_was_closed_at_exit_is_refused_and_never_hangs(start: Start) -> None:
    """An exit handler registered before ours is called after it."""
    program = start(
        """
        orchestrator = an_orchestrator()
        """,
        first="""
import atexit

@atexit.register
def too_late():
    try:
        print(orchestrator.count_queue_messages("orders"))
    except JobsError as error:
        print(type(error).__name__)
""",
    )
    assert program.status(within=PROMISED + SLACK) == 0, program.errors()
    assert program.rest() == ["Closed"]
    assert program.errors() == ""


@pytest.mark.parametrize(
    ("state", "left", "runs"),
    [
        ("the background loop is in a run", "ready=2, scheduled=0, leased=0", ["runs first 1", "runs tea 1"]),
        ("a daemon thread is in a run", "ready=1, scheduled=0, leased=1", ["runs tea 1"]),
    ],
)
def test_a_run_that_can_be_ended_is_given_back_at_exit_and_one_that_cannot_is_left_to_its_lease(
    start_on_redis: Start, state: str, left: str, runs: list[str]
) -> None:
    """Given back it is in its old place, and no attempt; a thread goes on until the very end of the process."""
    code = "orchestrator.publish('orders', Order(item='first'))\n" + STATES[state] + "sys.stdin.readline()\n"
    first = start_on_redis(WAITS + code)
    assert first.line() == "begins"
    first.say()
    assert first.status(within=PROMISED + SLACK) == 0, first.errors()
    second = start_on_redis(
        f"""
        orchestrator = an_orchestrator()
        print(orchestrator.depth("orders"))
        print("handled", connected(Prints, orchestrator).consume(num_messages={len(runs)}))
        """
    )
    assert second.rest() == [f"Depth({left}, dead=0)", *runs, f"handled {len(runs)}"]
    assert second.ends_well()


@pytest.fixture
def own_server() -> Iterator[brokers.Broker]:
    with brokers.redis(private=True) as server:
        yield server


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
@pytest.mark.parametrize("harm", ["stop", "kill"])
@pytest.mark.parametrize("state", ["a script has consumed", "a daemon thread is in a run"])
def test_a_program_whose_server_is_silent_or_gone_ends_in_time_all_the_same(
    start_on: Callable[[str], Start], own_server: brokers.Broker, harm: str, state: str
) -> None:
    code = "print('ready')\nsys.stdin.readline()\nprint('the end')\n"
    program = start_on(own_server.url)(WAITS + STATES[state] + code)
    assert {program.line(), program.line()} in ({"runs tea 1", "ready"}, {"begins", "ready"})
    getattr(own_server, harm)()
    program.say()
    assert program.line() == "the end"
    assert program.status(within=PROMISED + SLACK) == 0, program.errors()
    assert program.errors() == ""
