"""The background loop itself: shared by threads from the first call on, and hard to kill."""

from collections.abc import Callable
from typing import Any

import pytest

Start = Callable[[str], Any]


def test_first_calls_from_several_threads_share_one_orchestrator(start_local_or_redis: Start) -> None:
    program = start_local_or_redis(
        """
for n in range(20):
    orchestrator = Orchestrator(a_client(str(n)))
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


def test_first_calls_from_several_threads_of_a_forked_child_share_one_orchestrator_that_knows_all_schemas(
    start_local_or_redis: Start,
) -> None:
    program = start_local_or_redis(
        """
orchestrators = [an_orchestrator(str(n)) for n in range(10)]
for orchestrator in orchestrators:
    for n in range(20):
        orchestrator.register(JobSchema(f"more{n}", Order))
pid = os.fork()
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
for orchestrator in orchestrators:
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
        orchestrator.publish(f"orders{i}", {"item": "of a dict"})
del orchestrator, orchestrators
gc.collect()  # what is left of the parent's tasks complains of nothing
print("all known")
os._exit(0)  # as a child of multiprocessing ends
"""
    )
    assert program.rest() == ["all known"]
    assert program.status() == 0
    assert "Traceback" not in program.errors()


@pytest.mark.parametrize("raised", ["SystemExit(3)", "KeyboardInterrupt()"])
def test_what_a_listener_raises_to_end_the_program_reaches_the_caller_and_leaves_the_loop_running(
    start_locally: Start, raised: str
) -> None:
    program = start_locally(
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
