"""What `consume()` counts, what it lets out, and which thread the runs are in."""

from collections.abc import Callable
from typing import Any

import pytest

Start = Callable[[str], Any]


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        (1, ["runs a 1", "handled 1", "left 2"]),
        (3, ["runs a 1", "runs b 1", "runs c 1", "handled 3", "left 0"]),
        (0, ["handled 0", "left 3"]),
    ],
)
def test_consume_returns_after_as_many_deliveries_as_asked(start_locally: Start, asked: int, lines: list[str]) -> None:
    program = start_locally(
        f"""
        orchestrator = an_orchestrator()
        orchestrator.publish_many("orders", [Order(item=item) for item in "abc"])
        print("handled", connected(Prints, orchestrator).consume(num_messages={asked}))
        print("left", orchestrator.count_queue_messages("orders"))
        """
    )
    assert program.rest() == lines
    assert program.ends_well()


@pytest.mark.parametrize("prefix", ["", "async "])
@pytest.mark.parametrize("raised", ["ValueError('no tea')", "asyncio.CancelledError()", "Reject('no tea')"])
def test_a_job_that_raises_never_escapes_consume(start_locally: Start, prefix: str, raised: str) -> None:
    """Its runs count as deliveries; then it lies in the dead letters, and the next job is run."""
    program = start_locally(
        f"""
        class Fails(Consumer):
            retry = RetryPolicy(max_attempts=1)
            {prefix}def run(self, job_dict):
                print("runs", job_dict["input_data"]["item"])
                if job_dict["input_data"]["item"] == "bad":
                    raise {raised}

        orchestrator = Orchestrator(LocalClient())
        orchestrator.register(JobSchema("orders", Order))
        orchestrator.publish_many("orders", [Order(item="bad"), Order(item="good")])
        print("handled", connected(Fails, orchestrator).consume(num_messages=2))
        print("dead", orchestrator.dead_letters("orders").count())
        """
    )
    assert program.rest() == ["runs bad", "runs good", "handled 2", "dead 1"]
    assert program.ends_well()


def test_each_run_of_a_retried_job_counts_as_a_delivery(start_locally: Start) -> None:
    program = start_locally(
        """
        class Fails(Consumer):
            def run(self, job_dict):
                print("runs", job_dict["attempt"])
                raise ConnectionError

        orchestrator = an_orchestrator()
        orchestrator.publish("orders", Order())
        consumer = connected(Fails, orchestrator)
        print("handled", consumer.consume(num_messages=2))
        print("handled", consumer.consume(num_messages=1))
        print([record.reason for record in orchestrator.dead_letters("orders").list().records])
        """
    )
    assert program.rest() == ["runs 1", "runs 2", "handled 2", "runs 3", "handled 1", "['attempts']"]
    assert program.ends_well()


def test_a_job_that_exits_counts_as_failed_and_ends_the_program(start: Start) -> None:
    program = start(
        """
        class Exits(Consumer):
            retry = False
            def run(self, job_dict):
                sys.exit(3)

        orchestrator = Orchestrator(a_client())
        orchestrator.register(JobSchema("orders", Order))
        orchestrator.publish_many("orders", [Order(), Order()])
        try:
            connected(Exits, orchestrator).consume()
        finally:
            print(depth_of(orchestrator))
        """
    )
    assert program.rest() == ["Depth(ready=1, scheduled=0, leased=0, dead=1)"]
    assert program.status() == 3
    assert program.errors() == ""


def test_a_plain_run_is_in_the_thread_that_consumes_and_a_coroutine_on_the_background_loop(
    start_locally: Start,
) -> None:
    program = start_locally(
        """
        class Plain(Consumer):
            def run(self, job_dict):
                print("plain", threading.current_thread() is threading.main_thread(), current_job().attempt)

        class Coroutine(Consumer):
            async def run(self, job_dict):
                await asyncio.sleep(0)
                print("coroutine", threading.current_thread().name, current_job().attempt)

        orchestrator = an_orchestrator()
        for kind in (Plain, Coroutine):
            orchestrator.publish("orders", Order())
            connected(kind, orchestrator).consume(num_messages=1)
        """
    )
    assert program.rest() == ["plain True 1", "coroutine mindtrace-jobs 1"]
    assert program.ends_well()


def test_a_run_may_publish_and_consume_in_its_turn(start: Start) -> None:
    program = start(
        """
        class Outer(Consumer):
            def run(self, job_dict):
                orchestrator.publish("inner", {"item": job_dict["input_data"]["item"] + " inside"})
                print("inner handled", inner.consume(num_messages=1))

        orchestrator = an_orchestrator()
        orchestrator.register(JobSchema("inner", Order))
        inner = Prints("inner")
        inner.connect(orchestrator)
        orchestrator.publish("orders", Order())
        print("outer handled", connected(Outer, orchestrator).consume(num_messages=1))
        """
    )
    assert program.rest() == ["runs tea inside 1", "inner handled 1", "outer handled 1"]
    assert program.ends_well()


def test_consume_without_connect_says_what_to_call(start_locally: Start) -> None:
    program = start_locally(
        """
        try:
            Prints("orders").consume()
        except ConfigError as error:
            print(error)
        """
    )
    assert program.rest() == ["Prints is not connected: call connect(orchestrator) first"]
    assert program.ends_well()


def test_a_job_published_while_consume_waits_is_run_at_once(start: Start) -> None:
    program = start(
        """
        orchestrator = an_orchestrator()
        consumer = connected(Prints, orchestrator)
        thread = threading.Thread(target=lambda: print("handled", consumer.consume(num_messages=2)))
        thread.start()
        for item in ("tea", "milk"):
            sys.stdin.readline()
            orchestrator.publish("orders", Order(item=item))
        thread.join()
        """
    )
    program.say()
    assert program.line() == "runs tea 1"  # it has gone back to wait, or is about to
    program.say()
    assert program.rest() == ["runs milk 1", "handled 2"]
    assert program.ends_well()
