"""Ctrl-C while `consume()` waits or runs a job: the job is released, nothing is lost, and one can consume again."""

from collections.abc import Callable
from typing import Any

import pytest

Start = Callable[[str], Any]

AFTERWARDS = """
    print("interrupted")
print(depth_of(orchestrator))
orchestrator.publish("orders", Order(item="later"))
print("handled", connected(Prints, orchestrator).consume(num_messages=orchestrator.count_queue_messages("orders")))
print(depth_of(orchestrator))
"""
NOTHING = "Depth(ready=0, scheduled=0, leased=0, dead=0)"


@pytest.mark.parametrize("num_messages", ["", "num_messages=5"])
def test_ctrl_c_ends_an_idle_consume(start_local_or_redis: Start, num_messages: str) -> None:
    program = start_local_or_redis(
        f"""
orchestrator = an_orchestrator()
orchestrator.publish("orders", Order())

def tells_when_idle():
    while depth_of(orchestrator) != Depth(0, 0, 0, 0):
        pass
    print("idle")

threading.Thread(target=tells_when_idle).start()
try:
    connected(Prints, orchestrator).consume({num_messages})
except KeyboardInterrupt:
"""
        + AFTERWARDS
    )
    assert program.line() == "runs tea 1"
    assert program.line() == "idle"
    program.interrupt()
    assert program.rest() == ["interrupted", NOTHING, "runs later 1", "handled 1", NOTHING]
    assert program.ends_well()


RUNS = {
    "blocking": """
    def run(self, job_dict):
        print("begins", job_dict["attempt"])
        sys.stdin.readline()
""",
    "blocking, which catches and raises": """
    def run(self, job_dict):
        try:
            print("begins", job_dict["attempt"])
            sys.stdin.readline()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("in words of its own") from None
""",
    "typed": """
    def handle(self, order):
        print("begins", current_job().attempt)
        threading.Event().wait()
""",
    "a coroutine": """
    async def run(self, job_dict):
        print("begins", job_dict["attempt"])
        await asyncio.Event().wait()
""",
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_ctrl_c_in_a_run_gives_the_job_back_and_counts_no_attempt(start: Start, backend: str, run: str) -> None:
    """It is ready again in its old place, before those that were published after it; on RabbitMQ behind them."""
    in_turn = ["runs first 1", "runs second 1"]
    base = "Consumer[Order, Order]" if "handle" in run else "Consumer"
    program = start(
        f"""
class Waits({base}):
{run}
orchestrator = an_orchestrator()
orchestrator.publish_many("orders", [Order(item="first"), Order(item="second")])
try:
    connected(Waits, orchestrator).consume()
except KeyboardInterrupt:
"""
        + AFTERWARDS
    )
    assert program.line() == "begins 1"
    program.interrupt()
    assert program.rest() == [
        "interrupted",
        "Depth(ready=2, scheduled=0, leased=0, dead=0)",
        *(in_turn[::-1] if backend == "rabbitmq" else in_turn),
        "runs later 1",
        "handled 3",
        NOTHING,
    ]
    assert program.ends_well()


def test_a_run_that_swallows_ctrl_c_is_done_and_consume_goes_on_to_the_next_one(start: Start) -> None:
    """It took the interrupt for itself: its job is neither lost nor run twice. The next Ctrl-C ends `consume()`."""
    program = start(
        """
class Swallows(Consumer):
    def run(self, job_dict):
        try:
            print("begins", job_dict["input_data"]["item"])
            sys.stdin.readline()
        except KeyboardInterrupt:
            if job_dict["input_data"]["item"] == "second":
                raise

orchestrator = an_orchestrator()
orchestrator.publish_many("orders", [Order(item="first"), Order(item="second")])
try:
    connected(Swallows, orchestrator).consume()
except KeyboardInterrupt:
"""
        + AFTERWARDS
    )
    assert program.line() == "begins first"
    program.interrupt()
    assert program.line() == "begins second"
    program.interrupt()
    assert program.rest() == [
        "interrupted",
        "Depth(ready=1, scheduled=0, leased=0, dead=0)",
        "runs second 1",
        "runs later 1",
        "handled 2",
        NOTHING,
    ]
    assert program.ends_well()


def test_a_run_may_clean_up_after_ctrl_c_for_as_long_as_it_takes(start: Start) -> None:
    """`consume()` raises once the run has given way, not before; until then the job is nobody else's."""
    program = start(
        """
class CleansUp(Consumer):
    def run(self, job_dict):
        try:
            print("begins")
            sys.stdin.readline()
        finally:
            print("cleans up, ready:", orchestrator.count_queue_messages("orders"))
            sys.stdin.readline()

orchestrator = an_orchestrator()
orchestrator.publish("orders", Order())
try:
    connected(CleansUp, orchestrator).consume()
except KeyboardInterrupt:
"""
        + AFTERWARDS
    )
    assert program.line() == "begins"
    program.interrupt()
    assert program.line() == "cleans up, ready: 0"
    program.say()
    assert program.rest() == [
        "interrupted",
        "Depth(ready=1, scheduled=0, leased=0, dead=0)",
        "runs tea 1",
        "runs later 1",
        "handled 2",
        NOTHING,
    ]
    assert program.ends_well()


def test_ctrl_c_again_while_an_async_run_cleans_up_loses_nothing(start: Start) -> None:
    program = start(
        """
class CleansUp(Consumer):
    async def run(self, job_dict):
        print("begins")
        try:
            await asyncio.Event().wait()
        finally:
            print("cleans up")
            await asyncio.to_thread(released.wait)

released = threading.Event()
orchestrator = an_orchestrator()
orchestrator.publish("orders", Order())
try:
    connected(CleansUp, orchestrator).consume()
except KeyboardInterrupt:
    print("interrupted")
sys.stdin.readline()
released.set()
while depth_of(orchestrator).leased:
    pass
print("handled", connected(Prints, orchestrator).consume(num_messages=1))
"""
    )
    assert program.line() == "begins"
    program.interrupt()
    assert program.line() == "cleans up"
    program.interrupt()
    program.say()
    assert program.rest() == ["interrupted", "runs tea 1", "handled 1"]
    assert program.ends_well()


def test_an_uncaught_ctrl_c_ends_the_program_as_python_does(start: Start) -> None:
    program = start(
        """
class Waits(Consumer):
    def run(self, job_dict):
        print("begins")
        sys.stdin.readline()

orchestrator = an_orchestrator()
orchestrator.publish("orders", Order())
connected(Waits, orchestrator).consume()
"""
    )
    assert program.line() == "begins"
    program.interrupt()
    assert program.status() == -2
    assert program.errors().rstrip().endswith("KeyboardInterrupt")
    assert program.errors().count("Traceback") == 1


def test_ctrl_c_at_any_line_of_consume_loses_nothing(start_local_or_redis: Start) -> None:
    """Interrupted at its 1st line, its 2nd, and so on, until it gets through; each time a second consume works."""
    program = start_local_or_redis(
        """
import mindtrace.jobs

OURS = os.path.dirname(mindtrace.jobs.__file__)
where = ""

def interrupt_at(n):
    passed = 0
    def trace(frame, event, argument):
        global where
        nonlocal passed
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        passed += event == "line"
        if event == "line" and passed == n:
            where = f"{os.path.relpath(frame.f_code.co_filename, OURS)}:{frame.f_lineno}, {frame.f_code.co_name}"
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace
    sys.settrace(trace)

class Notes(Consumer):
    def run(self, job_dict):
        seen.add(job_dict["id"])

def lost():
    for _ in range(10_000):
        depth = depth_of(orchestrator)
        if not depth.leased:
            break
    else:
        return "its job stays leased"
    if depth.ready and consumer.consume(num_messages=depth.ready) != depth.ready:
        return "the second consume handled too few"
    return "" if seen == published and depth_of(orchestrator) == Depth(0, 0, 0, 0) else "a job is lost"

n = 0
raised = True
while raised:
    n += 1
    orchestrator, seen = an_orchestrator(), set()
    consumer = connected(Notes, orchestrator)
    published = set(orchestrator.publish_many("orders", [Order(), Order()]))
    consumer.consume(num_messages=1)
    try:
        interrupt_at(n)
        consumer.consume(num_messages=1)
        raised = False
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    if problem := lost():
        print(f"interrupted at {where}: {problem}")
print("got through")
"""
    )
    assert program.rest() == ["got through"]
    assert program.status() == 0
    assert "Traceback" not in program.errors()
