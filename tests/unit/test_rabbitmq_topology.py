"""Names, arguments and the ladder of holds on RabbitMQ, walked through here as the broker would."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import QueueSpec
from mindtrace.jobs.backends.rabbitmq.topology import LEVELS, UNIT, Topology
from mindtrace.jobs.retry import MAX_DELAY

often = settings(deadline=None, database=None)

LONGEST = 255  # bytes of a name and of a routing key in AMQP
NS, NAME = "n" * 64, "q" * 128
QUEUES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
DELAYS = st.floats(0.000_001, MAX_DELAY, exclude_min=True)


def matches(pattern: str, key: str) -> bool:
    """As a topic exchange does: a star is one word, a hash any number of them."""
    words = [{"*": r"[^.]*", "#": r".*"}.get(word, re.escape(word)) for word in pattern.split(".")]
    return re.fullmatch(r"\.".join(words), key) is not None


def walked(topology: Topology, name: str, units: int) -> list[int]:
    """The ms that a delayed job is held at each stop, until it comes to the exchange of what is due."""
    holds = {hold.name: hold for hold in topology.holds(units)}
    exchange, key = topology.delayed(name, units)
    waits: list[int] = []
    while exchange != topology.due_exchange:
        hold = holds[exchange]
        held, passed = matches(hold.held_pattern, key), matches(hold.passed_pattern, key)
        assert held != passed  # one way, never both
        if held:
            assert hold.arguments["x-dead-letter-exchange"] == hold.below
            waits.append(hold.arguments["x-message-ttl"])
        exchange = hold.below
    assert matches(topology.due_pattern(name), key)
    return waits


@often
@given(DELAYS, QUEUES)
@example(0.1, "jobs")
@example(MAX_DELAY, "a.b")
@example(3700.0, "1.0")
def test_a_delay_is_held_for_its_time_rounded_up_to_the_unit(delay: float, name: str) -> None:
    topology = Topology("mtj")
    waits = walked(topology, name, topology.units(delay))
    assert delay - 1e-6 <= sum(waits) / 1000 < delay + UNIT + 1e-6
    assert waits == sorted(waits, reverse=True)
    assert len(set(waits)) == len(waits) <= LEVELS


@often
@given(st.integers(1, 2**LEVELS - 1), QUEUES, QUEUES)
@example(1, "b", "a.b")
@example(1, "a.b", "b")
@example(1, "b", "1.b")
@example(1, "b", "0.b")
def test_what_is_due_for_one_queue_is_due_for_no_other(units: int, name: str, other: str) -> None:
    topology = Topology("mtj")
    _, key = topology.delayed(name, units)
    assert matches(topology.due_pattern(other), key) == (name == other)


@pytest.mark.parametrize(
    ("delay", "units"),
    [(0, 0), (-5, 0), (0.0001, 1), (0.1, 1), (0.1001, 2), (0.2, 2), (0.3, 3), (0.7, 7), (61, 610), (3700, 37_000)],
)
def test_a_delay_in_units_is_rounded_up_once(delay: float, units: int) -> None:
    """And 0.3 s are 3 of 0.1 s, though in floats they are a little more."""
    assert max(0, Topology("mtj").units(delay)) == units


def test_the_longest_delay_has_a_level_for_each_of_its_digits_and_no_name_is_too_long() -> None:
    topology = Topology(NS)
    units = topology.units(MAX_DELAY)
    assert units.bit_length() == LEVELS
    exchange, key = topology.delayed(NAME, units)
    names = [topology.queue(NAME), topology.dead(NAME), topology.due_exchange, topology.priority_exchange]
    names += [topology.gone_exchange, topology.gone_queue, exchange, key, topology.due_pattern(NAME)]
    for hold in topology.holds(units):
        names += [hold.name, hold.held_pattern, hold.passed_pattern, hold.below]
    assert max(len(name.encode()) for name in names) <= LONGEST
    assert topology.units_of(key) == units


@often
@given(st.integers(1, 2**LEVELS - 1), st.integers(1, 2**LEVELS - 1))
def test_levels_are_the_same_for_every_delay_and_come_lowest_first(one: int, other: int) -> None:
    topology = Topology("mtj")
    few, more = sorted(([*topology.holds(units)] for units in (one, other)), key=len)
    assert more[: len(few)] == few
    assert [hold.below for hold in more] == [topology.due_exchange, *(hold.name for hold in more[:-1])]
    ttls = [hold.arguments["x-message-ttl"] for hold in more]
    assert all(higher == 2 * lower for lower, higher in pairwise(ttls))


@often
@given(QUEUES, st.integers(1, 2**LEVELS - 1))
def test_the_delay_can_be_read_off_the_key_and_off_no_other(name: str, units: int) -> None:
    topology = Topology("mtj")
    assert topology.units_of(topology.delayed(name, units)[1]) == units
    assert topology.units_of(topology.queue(name)) == 0
    assert topology.units_of("") == 0


@pytest.mark.parametrize(
    "name", ["mtj", "mtj.a", "gone", "due", "priority", "0", "a.b", "mtj-due", "28", "0." * 28 + "0"]
)
def test_no_queue_has_the_name_of_something_else(name: str) -> None:
    topology = Topology("mtj")
    ours = {topology.queue(name), topology.dead(name)}
    theirs = {topology.gone_queue, *(hold.name for hold in topology.holds(2**LEVELS - 1))}
    assert ours & theirs == ({topology.gone_queue} if name == "gone" else set())


NEVER_DROPS = {
    "x-overflow": "reject-publish",
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": "mtj:jobs.dead",
}
QUORUM = {"x-queue-type": "quorum", "x-dead-letter-strategy": "at-least-once", "x-delivery-limit": 100}


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        (QueueSpec("jobs"), NEVER_DROPS | QUORUM),
        (QueueSpec("jobs", max_length=10), NEVER_DROPS | QUORUM | {"x-max-length": 10**12 + 10}),
        (QueueSpec("jobs", "priority"), NEVER_DROPS | {"x-max-priority": 10}),
        (QueueSpec("jobs", "priority", 255), NEVER_DROPS | {"x-max-priority": 255}),
        (QueueSpec("jobs", "priority", 3, 1), NEVER_DROPS | {"x-max-priority": 3, "x-max-length": 10**12 + 1}),
    ],
)
def test_a_queue_has_these_arguments_for_ever(spec: QueueSpec, arguments: Mapping[str, Any]) -> None:
    """A queue that is there with others refuses every process of another version of this library."""
    assert Topology("mtj").arguments(spec) == arguments


def test_dead_letters_and_holds_have_these_arguments_for_ever() -> None:
    topology = Topology("mtj")
    unlimited = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}
    assert topology.dead_arguments == {**unlimited, "x-overflow": "reject-publish"}
    assert topology.reading_arguments == {"x-queue-type": "classic", "x-expires": 60_000}
    assert topology.due_arguments == {"alternate-exchange": "mtj:gone"}
    common = {**unlimited, "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
    first, second, *_, last = topology.holds(2**LEVELS - 1)
    assert first.arguments == common | {"x-message-ttl": 100, "x-dead-letter-exchange": "mtj:due"}
    assert second.arguments == common | {"x-message-ttl": 200, "x-dead-letter-exchange": "mtj:0.hold"}
    assert last.arguments == common | {"x-message-ttl": 100 * 2**28, "x-dead-letter-exchange": "mtj:27.hold"}


@pytest.mark.parametrize(
    "refusal",
    [
        "",
        "inequivalent arg 'durable' for queue 'mtj:jobs' in vhost '/': received 'true' but current is 'false'",
        "inequivalent arg 'x-max-length' for queue 'mtj:jobs' in vhost '/': received none but current is the value "
        "'1000000000000' of type 'signedint'",
        "inequivalent arg 'x-max-length' for queue 'mtj:jobs' in vhost '/': received none but current is the value "
        "'10' of type 'signedint'",
        "inequivalent arg 'x-expires' for queue 'mtj:jobs' in vhost '/': received none but current is the value "
        "'1000' of type 'signedint'",
        "inequivalent arg 'x-overflow' for queue 'mtj:jobs' in vhost '/': received 'drop-head' but current is none",
    ],
)
def test_a_queue_that_is_none_of_ours_is_known_for_one(refusal: str) -> None:
    assert Topology("mtj").corrected(QueueSpec("jobs"), refusal) is None
