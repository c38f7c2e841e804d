"""What is said before any broker is asked: a queue's declaration, the traits, and where a backend is at home."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindtrace.jobs import Closed, ConfigError, Depth, ForkedProcess, QueueSpec, Traits
from mindtrace.jobs.backend import Home

often = settings(deadline=None, database=None)


# --- a queue


def test_a_queue_is_first_in_first_out_and_without_limit_unless_it_says_otherwise() -> None:
    spec = QueueSpec("orders")
    assert (spec.name, spec.kind, spec.priority_levels, spec.max_length) == ("orders", "fifo", None, None)
    assert [field.name for field in fields(QueueSpec)] == ["name", "kind", "priority_levels", "max_length"]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "fifo"},
        {"kind": "stack", "max_length": 1},
        {"kind": "priority"},
        {"kind": "priority", "priority_levels": 1},
        {"kind": "priority", "priority_levels": 255, "max_length": 2**31 - 1},
    ],
)
def test_a_queue_keeps_what_it_was_declared_with(options: dict[str, Any]) -> None:
    spec = QueueSpec("orders", **options)
    assert {name: getattr(spec, name) for name in options} == options
    assert spec == QueueSpec("orders", **options)


NUMBERS = [0, -1, 2**31, 10**400, 1.0, 2.5, "3", True, False, float("inf"), float("nan"), [1]]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("kind", value) for value in ["lifo", "FIFO", "", None, True, ["fifo"]]),
        *(("max_length", value) for value in NUMBERS),
        *(("priority_levels", value) for value in NUMBERS),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_out_of_its_range_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option}=") as refused:
        QueueSpec("orders", **{"kind": "priority", option: value})
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize("kind", ["fifo", "stack"])
def test_only_a_priority_queue_has_levels(kind: Any) -> None:
    with pytest.raises(ConfigError, match=f"priority_levels=10 on a {kind} queue: kind='priority'"):
        QueueSpec("orders", kind, priority_levels=10)


@often
@given(
    st.sampled_from(["", "-a", ".a", "amq.a", "a:b", "a{b}", "a\n", "a" * 129, "a.dead", "a.hold", "a.bell"])
    | st.text(":{} /\\\n", min_size=1)
)
def test_a_queue_that_no_broker_could_name_is_not_declared(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        QueueSpec(name)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (QueueSpec("orders"), "kind"),
        (Depth(1, 2, 3, 4), "ready"),
        (Traits("local", "memory", (0, 9), True, True, True, True, True, True, True, True, True, None), "stack"),
    ],
    ids=["queue", "depth", "traits"],
)
def test_a_value_does_not_change(value: Any, field: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(value, field, None)
    assert not hasattr(value, "__dict__")


def test_the_fields_of_a_depth_and_of_traits_are_fixed_in_name_and_order() -> None:
    assert [field.name for field in fields(Depth)] == ["ready", "scheduled", "leased", "dead"]
    assert [field.name for field in fields(Traits)] == [
        "name",
        "durability",
        "priorities",
        "stack",
        "lease_clock",
        "deduplicates",
        "fences",
        "keeps_place",
        "atomic_batch",
        "lookup",
        "exact_depth",
        "lists_queues",
        "run_limit",
    ]


# --- a home


def in_a_loop(call: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return call()

    return asyncio.run(main())


def test_what_was_never_opened_is_closed() -> None:
    with pytest.raises(Closed, match="the broker of this test is not open"):
        in_a_loop(Home("broker of this test").check)


def test_what_is_open_may_be_used_and_opened_again() -> None:
    home = Home("broker")

    def use() -> list[bool]:
        opened = [home.move_in(), home.move_in()]
        home.check()
        return opened

    assert in_a_loop(use) == [True, False]


def test_what_was_closed_is_closed_and_may_be_closed_again() -> None:
    home = Home("broker")

    def use() -> list[bool]:
        home.move_in()
        return [home.move_out(), home.move_out()]

    assert in_a_loop(use) == [True, False]
    with pytest.raises(Closed):
        in_a_loop(home.check)


@pytest.mark.parametrize("use", ["check", "move_in", "move_out"])
def test_a_second_loop_is_refused_and_the_first_stays_home(use: str) -> None:
    home = Home("broker")

    async def main() -> None:
        home.move_in()
        with pytest.raises(ConfigError, match="the broker was opened in another event loop"):
            await asyncio.to_thread(in_a_loop, getattr(home, use))
        home.check()

    asyncio.run(main())


def test_a_home_whose_loop_has_ended_can_be_left_for_another() -> None:
    home = Home("broker")
    in_a_loop(home.move_in)
    assert in_a_loop(home.move_in) is True
    assert in_a_loop(home.move_out) is True


def test_after_its_loop_has_ended_what_was_open_is_of_no_use() -> None:
    home = Home("broker")
    in_a_loop(home.move_in)
    with pytest.raises((ConfigError, Closed)):
        in_a_loop(home.check)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # a fork beside a thread of another test
@pytest.mark.parametrize("use", ["check", "move_in", "move_out"])
def test_a_forked_child_is_told_to_open_its_own(use: str) -> None:
    home = Home("broker")

    def in_a_child() -> int:
        home.move_in()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                getattr(home, use)()
            except ForkedProcess:
                status = 0
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        home.check()
        return os.waitstatus_to_exitcode(ended)

    assert in_a_loop(in_a_child) == 0
