"""Blocking calls from wherever people make them: a script, threads, a running loop, the background loop, a fork."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

Start = Callable[[str], Any]


def test_a_script_publishes_consumes_and_ends(start: Start) -> None:
    program = start(
        """
        orchestrator = an_orchestrator()
        consumer = connected(Prints, orchestrator)
        orchestrator.publish("orders", Order(item="tea"))
        orchestrator.publish_many("orders", [Order(item="milk"), Order(item="salt")])
        print(orchestrator.receive_message("orders")["input_data"])
        print(orchestrator.count_queue_messages("orders"))
        print(consumer.consume(num_messages=2))
        """
    )
    assert program.rest() == ["{'item': 'tea'}", "2", "runs milk 1", "runs salt 1", "2"]
    assert program.ends_well()


def test_many_threads_share_one_background_loop_and_run_jobs_in_their_own(start: Start, backend: str) -> None:
    """The very first calls are made at the same moment; each job is run once, by a thread that consumes."""
    ours = ["mindtrace-jobs"] if backend == "local" else ["mindtrace-jobs", "mindtrace-jobs keeper"]
    program = start(
        """
        orchestrator = Orchestrator(a_client())
        together = threading.Barrier(8)

        class Tells(Consumer):
            def run(self, job_dict):
                print("runs", job_dict["input_data"]["item"], threading.current_thread().name)

        def works(name):
            together.wait()
            orchestrator.register(orders)
            for number in range(5):
                orchestrator.publish("orders", Order(item=f"{name}.{number}"))
            print("handled", connected(Tells, orchestrator).consume(num_messages=5))

        threads = [threading.Thread(target=works, args=(name,), name=f"thread-{name}") for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("left", orchestrator.count_queue_messages("orders"))
        print("others", [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()])
        """
    )
    lines = [line.split(" ", 1) for line in program.rest()]
    runs = [rest.split() for word, rest in lines if word == "runs"]
    assert Counter(item for item, _ in runs) == {f"{name}.{number}": 1 for name in range(8) for number in range(5)}
    assert Counter(thread for _, thread in runs) == {f"thread-{name}": 5 for name in range(8)}
    assert [rest for word, rest in lines if word != "runs"] == [*["5"] * 8, "0", str(ours)]
    assert program.ends_well()


@pytest.mark.parametrize(
    "call",
    [
        'orchestrator.publish("orders", Order())',
        "consumer.consume(num_messages=1)",
        "a_client().backend",
        "Orchestrator(a_client()).register(orders)",
        "Prints('orders').connect(Orchestrator(a_client()))",
    ],
)
def test_inside_a_running_loop_a_call_works_and_warns_once_at_its_own_line(
    start_local_or_redis: Start, call: str
) -> None:
    program = start_local_or_redis(
        f"""
        orchestrator = an_orchestrator()
        consumer = connected(Prints, orchestrator)
        orchestrator.publish_many("orders", [Order(), Order()])

        async def main():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    {call}  # here
                for warning in caught:
                    print(warning.category.__name__, warning.filename, warning.lineno)

        asyncio.run(main())
        """
    )
    here = next(n for n, line in enumerate(program.source.read_text().splitlines(), 1) if line.endswith("# here"))
    lines = [line for line in program.rest() if not line.startswith("runs")]
    assert lines == [f"RuntimeWarning {program.source} {here}"]
    assert program.ends_well()


def test_each_call_on_the_background_loop_is_refused_and_not_waited_for(start: Start) -> None:
    program = start(
        """
        orchestrator = an_orchestrator()
        other = connected(Prints, orchestrator)
        calls = {
            "publish": lambda: orchestrator.publish("orders", Order()),
            "receive_message": lambda: orchestrator.receive_message("orders"),
            "dead letters": lambda: orchestrator.dead_letters("orders").count(),
            "declare_queue": lambda: orchestrator.backend.declare_queue("more"),
            "close": lambda: orchestrator.backend.close(),
            "a new client": lambda: a_client().backend,
            "connect": lambda: Prints("alone").connect(orchestrator),
            "consume": lambda: other.consume(num_messages=1),
        }

        class Asks(Consumer):
            async def run(self, job_dict):
                for name, call in calls.items():
                    try:
                        call()
                    except WouldDeadlock:
                        continue
                    print("not refused:", name)

        orchestrator.publish("orders", Order())
        print(connected(Asks, orchestrator).consume(num_messages=1))
        """
    )
    assert program.rest() == ["1"]
    assert program.ends_well()


FORK = """
def in_a_child(function):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        threading.excepthook = sys.excepthook
        function()
        sys.exit(0)
    print("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        ("orchestrator.register(JobSchema('more', Order))", "fifo"),
        ("orchestrator.backend.declare_queue('more', queue_type='priority')", "priority"),
        ("orchestrator.declare(QueueSpec('more', 'stack'))", "stack"),
        ("Prints('more').connect(orchestrator)", "fifo"),
    ],
)
def test_a_forked_child_works_anew_with_the_queues_and_no_jobs(start_locally: Start, made: str, kind: str) -> None:
    """Whichever call made a queue; and what the child does, the parent never sees."""
    program = start_locally(
        FORK
        + f"""
orchestrator = an_orchestrator()
{made}
consumer = connected(Prints, orchestrator)
orchestrator.publish("orders", Order(item="of the parent"))

def child():
    print(sorted((spec.name, spec.kind) for spec in orchestrator.queues()))
    print(orchestrator.depth("orders"))
    orchestrator.publish("orders", Order(item="of the child"))
    print("child", consumer.consume(num_messages=1))
    orchestrator.publish("orders", Order(item="left in the child"))

in_a_child(child)
print("parent", consumer.consume(num_messages=1))
print(orchestrator.depth("orders"))
"""
    )
    nothing = "Depth(ready=0, scheduled=0, leased=0, dead=0)"
    assert program.rest() == [
        str([("more", kind), ("orders", "fifo")]),
        nothing,
        "runs of the child 1",
        "child 1",
        "child ended with 0",
        "runs of the parent 1",
        "parent 1",
        nothing,
    ]
    assert program.status() == 0
    assert "Traceback" not in program.errors()


def test_a_forked_child_works_on_a_connection_of_its_own_beside_the_parent_on_the_same_queue(
    start_on_redis: Start,
) -> None:
    """Both with the orchestrator and consumer of before the fork, at the same time; no job is lost or run twice."""
    program = start_on_redis(
        FORK
        + """
class Tells(Consumer):
    def run(self, job_dict):
        print(job_dict["input_data"]["item"], os.getpid() == parent)

parent = os.getpid()
orchestrator = an_orchestrator()
consumer = connected(Tells, orchestrator)
orchestrator.publish_many("orders", [Order(item=f"before {n}") for n in range(50)])

def child():
    works("child")
    print("schema is known:", orchestrator.publish("orders", {"item": "of a dict"}) != "")

def works(name):
    for n in range(20):
        orchestrator.publish("orders", Order(item=f"{name} {n}"))
        consumer.consume(num_messages=2)

pid = os.fork()
if pid == 0:
    child()
    sys.exit(0)
works("parent")
print("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
consumer.consume(num_messages=orchestrator.count_queue_messages("orders"))
print(orchestrator.depth("orders"))
"""
    )
    *lines, nothing = program.rest()
    assert nothing == "Depth(ready=0, scheduled=0, leased=0, dead=0)"
    assert {"child ended with 0", "schema is known: True"} <= set(lines)
    runs = [line.rsplit(" ", 1) for line in lines if line.endswith(("True", "False")) and "known" not in line]
    made = [f"before {n}" for n in range(50)] + [f"{name} {n}" for name in ("child", "parent") for n in range(20)]
    assert Counter(item for item, _ in runs) == Counter([*made, "of a dict"])
    assert {where for _, where in runs} == {"True", "False"}
    assert program.status() == 0
    assert "Traceback" not in program.errors()


def test_a_forked_child_leaves_what_the_parent_has_received_to_the_parent(start_on_redis: Start) -> None:
    """Its end neither releases the job that the parent is in the middle of, nor closes the parent's connections."""
    program = start_on_redis(
        FORK
        + """
class Forks(Consumer):
    def run(self, job_dict):
        in_a_child(lambda: print("child sees", orchestrator.depth("orders")))
        in_a_child(lambda: None)
        print("parent sees", orchestrator.depth("orders"), job_dict["attempt"])

orchestrator = an_orchestrator()
orchestrator.publish("orders", Order())
print("handled", connected(Forks, orchestrator).consume(num_messages=1))
print(orchestrator.depth("orders"))
"""
    )
    held = "Depth(ready=0, scheduled=0, leased=1, dead=0)"
    ended = "child ended with 0"
    assert program.rest() == [
        f"child sees {held}",
        ended,
        ended,
        f"parent sees {held} 1",
        "handled 1",
        held.replace("leased=1", "leased=0"),
    ]
    assert program.status() == 0
    assert "Traceback" not in program.errors()


def test_a_child_that_never_touches_its_jobs_ends_like_any_other(start: Start) -> None:
    program = start(
        FORK
        + """
orchestrator = an_orchestrator()
in_a_child(lambda: None)
print(orchestrator.count_queue_messages("orders"))
"""
    )
    assert program.rest() == ["child ended with 0", "0"]
    assert program.status() == 0
    assert "Traceback" not in program.errors()


def test_a_process_started_by_a_run_leaves_the_job_to_the_parent(start_locally: Start) -> None:
    """The child inherits the stack of `consume()`, and not the loop that drives it."""
    program = start_locally(
        """
        import multiprocessing

        def child():
            print("child sees", orchestrator.count_queue_messages("orders"))

        class Forks(Consumer):
            def run(self, job_dict):
                process = multiprocessing.get_context("fork").Process(target=child)
                process.start()
                process.join()
                print("child ended with", process.exitcode)

        orchestrator = an_orchestrator()
        consumer = connected(Forks, orchestrator)
        orchestrator.publish_many("orders", [Order(), Order()])
        print("parent", consumer.consume(num_messages=2))
        """
    )
    assert program.rest() == [*["child sees 0", "child ended with 0"] * 2, "parent 2"]
    assert program.status() == 0
