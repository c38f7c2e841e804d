"""The background loop itself: shared by threads from the first call on, and hard to kill."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.local

Start = Callable[[str], Any]


def test_first_calls_from_several_threads_share_one_orchestrator(start: Start) -> None:
    program = start(
        """
for n in range(20):
    orchestrator = Orchestrator(LocalClient())
    barrier = threading.Barrier(4)

    def registers(name):
        barrier.wait()
        orchestrator.register(JobSchema(name, Order))

    threads = [threading.Thread(target=registers, args=(f"orders{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        orchestrator.publish(f"orders{i}", Order())
print("all known")
"""
    )
    assert program.rest() == ["all known"]
    assert program.ends_well()


@pytest.mark.parametrize("raised", ["SystemExit(3)", "KeyboardInterrupt()"])
def test_what_a_listener_raises_to_end_the_program_reaches_the_caller_and_leaves_the_loop_running(
    start: Start, raised: str
) -> None:
    program = start(
        f"""
def listener(event):
    raise {raised}

client = LocalClient()
orchestrator = Orchestrator(client, listeners=[listener])
orchestrator.register(JobSchema("orders", Order))
try:
    orchestrator.publish("orders", Order())
except (SystemExit, KeyboardInterrupt) as error:
    print("raised", type(error).__name__)
print("stored", Orchestrator(client).count_queue_messages("orders"))
"""
    )
    assert program.rest() == [f"raised {raised.partition('(')[0]}", "stored 1"]
    assert program.ends_well()
