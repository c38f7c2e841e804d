"""Every queue and exchange on RabbitMQ, its arguments, and the way a job takes through them.

                       default exchange ──────────────> <ns>:<queue>          quorum (fifo) or classic (priority)
    publish, copies ──┬ <ns>:priority, direct ────────> <ns>:<queue>          only priority queues are bound
                      └ <ns>:<n>.hold, topic: delays      │  │
                                                          │  └ the broker's own limit ─> <ns>:<queue>.dead    quorum
                                                          └ a worker, who copies it there ─^

    <ns>:28.hold ──1──> <ns>:28.hold, a quorum queue: its messages expire after unit * 2^28, and go on to
         │ 0              the exchange below
         v
        ...
    <ns>:0.hold ──1──> <ns>:0.hold: expire after the unit, 0.1 s
         │ 0
         v
    <ns>:due, topic ──> <ns>:<queue>
         └ of a queue that is gone ──> <ns>:gone ──> <ns>:gone.dead

    <ns>:<queue>.reading.hold: empty, and there while somebody reads the dead letters of the queue

The routing key of a delayed job is its delay in units as 29 binary digits, then the queue's name: `0.0. ... .1.0.name`.
The exchange of level n looks at digit n: 1 is held there, 0 goes one level down. It is published to the exchange of its
highest 1. Levels come into being when a delay first needs them, the lowest first: at most 29 queues in a namespace,
whatever the delays. 366 days are 29 levels; the longest key has 58 + 128 of the 255 bytes that AMQP allows.

The arguments are the same on every version of the server and whatever the options of a worker: a queue that exists with
others is refused with 406, for ever. What can change lives in this library: attempts, crash limits, timeouts.

* Quorum queues dead-letter at least once, which asks for `overflow=reject-publish`, so nothing is ever dropped.
* `x-delivery-limit` is a back-stop far above any crash limit: 4.0 and later have 20 where nothing is said.
* `x-max-length` of a queue with a `max_length` of n is 10^12 + n: it carries n to processes that did not declare it,
  and is never reached. Publishes are counted here. The broker's own check would come late (3.10 stored 50 of 50
  messages sent at once with a limit of 10), refuse retries and due jobs too, and a due job that was refused would come
  three minutes after there is room, with everything behind it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mindtrace.jobs.backend import QueueSpec
from mindtrace.jobs.retry import MAX_DELAY

DEFAULT_NAMESPACE = "mtj"
UNIT = 0.1
"""Seconds to which delays are rounded up."""
LEVELS = 29
PRIORITY_LEVELS = 10
"""Of a priority queue that names none: each level costs the broker a queue of its own."""
MOST_PRIORITY_LEVELS = 255
GONE = "gone"
"""The name under which the dead letters of queues that are gone are found."""

Arguments = Mapping[str, Any]

_DELIVERY_LIMIT = 100
_FAR = 10**12
_NO_LIMIT = 2**31 - 1
_NEVER_DROPS = {"x-queue-type": "quorum", "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
_DEAD_ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": _NO_LIMIT, "x-overflow": "reject-publish"}
_DELAYED = re.compile(rf"(?:[01]\.){{{LEVELS}}}")
_DIFFERENCE = re.compile(
    r"inequivalent arg '([\w-]+)' for queue '.*?' in vhost '.*?': received .*? but current is "
    r"(?:the value '([^']*)' of type '\w+'|'([^']*)'|(none))",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Hold:
    """One level of the ladder: an exchange and, with the same name, a queue."""

    name: str
    arguments: Arguments
    held_pattern: str
    passed_pattern: str
    below: str


class Topology:
    """The names and arguments of one namespace.

    Args:
        namespace: what tells applications in one virtual host apart.

    Attributes:
        unit: seconds of the shortest hold, the same for everyone in a namespace.
    """

    unit: float = UNIT

    def __init__(self, namespace: str) -> None:
        self.namespace: str = namespace
        self.priority_exchange: str = f"{namespace}:priority"
        self.due_exchange: str = f"{namespace}:due"
        self.gone_exchange: str = f"{namespace}:{GONE}"
        self.gone_queue: str = self.dead(GONE)
        self.up_exchange: str = f"{namespace}:up.hold"
        self.turn_queue: str = f"{namespace}:turn.hold"
        self.due_arguments: Arguments = {"alternate-exchange": self.gone_exchange}

    def queue(self, name: str) -> str:
        """Where its jobs wait."""
        return f"{self.namespace}:{name}"

    def dead(self, name: str) -> str:
        """Where its dead letters lie."""
        return f"{self.namespace}:{name}.dead"

    def reading(self, name: str) -> str:
        """There as long as somebody reads its dead letters, who has a consumer on it."""
        return f"{self.namespace}:{name}.reading.hold"

    def hold(self, level: int) -> str:
        """A level of the ladder."""
        return f"{self.namespace}:{level}.hold"

    def arguments(self, spec: QueueSpec) -> Arguments:
        """What it is declared with."""
        common: dict[str, Any] = {
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self.dead(spec.name),
            "x-overflow": "reject-publish",
        }
        if spec.max_length is not None:
            common["x-max-length"] = _FAR + spec.max_length
        if spec.kind == "priority":
            return {**common, "x-max-priority": spec.priority_levels or PRIORITY_LEVELS}
        return {**common, **_NEVER_DROPS, "x-delivery-limit": _DELIVERY_LIMIT}

    @property
    def dead_arguments(self) -> Arguments:
        """Of all queues of dead letters. Looking counts as a delivery, so their limit is as good as none.

        Where a policy of the operator's limits them, what comes is refused: nothing that is there is dropped for it.
        """
        return _DEAD_ARGUMENTS

    @property
    def newest_arguments(self) -> Arguments:
        """Of a queue that is only made; it goes by itself should its maker die before deleting it."""
        return {"x-queue-type": "quorum", "x-expires": 60_000}

    @property
    def reading_arguments(self) -> Arguments:
        """Of a queue for who reads; it goes with the last of them, also should the server die meanwhile."""
        return {"x-queue-type": "classic", "x-expires": 60_000}

    def due_pattern(self, name: str) -> str:
        """Binds a queue to what is due for it, and to nothing of a queue whose name ends in the same words."""
        return "*." * LEVELS + name

    def units(self, delay: float) -> int:
        """A delay in units, rounded up."""
        return math.ceil(round(min(delay, MAX_DELAY) / self.unit, 6)) if delay > 0 else 0

    def due(self, now: float, units: int) -> float | None:
        """When a delay that begins now is over, in seconds since the epoch; None for no delay."""
        return now + units * self.unit if units > 0 else None

    def delayed(self, name: str, units: int) -> tuple[str, str]:
        """The exchange and the routing key of a delay of 1 unit or more."""
        digits = ".".join(f"{units:0{LEVELS}b}")
        return self.hold(units.bit_length() - 1), f"{digits}.{name}"

    def delayed_again(self, key: str, units: int) -> tuple[str, str]:
        """As `delayed`, for the queue that the routing key of another delay names."""
        return self.delayed(key.split(".", LEVELS)[LEVELS], units)

    def units_of(self, key: str) -> int:
        """The delay that a routing key asks for; 0 if it is none of a delay."""
        found = _DELAYED.match(key)
        return 0 if found is None else int(found[0].replace(".", ""), 2)

    def holds(self, units: int) -> Iterator[Hold]:
        """The levels that a delay of so many units needs, the lowest first."""
        for level in range(units.bit_length()):
            below = self.hold(level - 1) if level else self.due_exchange
            before = "*." * (LEVELS - 1 - level)
            arguments = {
                **_NEVER_DROPS,
                "x-dead-letter-exchange": below,
                "x-message-ttl": math.ceil(round(self.unit * 2**level * 1000, 6)),
                "x-delivery-limit": _NO_LIMIT,
            }
            yield Hold(self.hold(level), arguments, f"{before}1.#", f"{before}0.#", below)

    def corrected(self, spec: QueueSpec, refusal: str) -> QueueSpec | None:
        """`spec` with what the broker's refusal of it says is different; None if it is no queue of ours."""
        found = _DIFFERENCE.search(refusal)
        if found is None:
            return None
        argument, value = found[1], next((text for text in found.groups()[1:3] if text is not None), None)
        number = int(value) if value is not None and value.isascii() and value.isdigit() else None
        match argument:
            case "x-max-length":
                if number is None:
                    return replace(spec, max_length=None)
                return None if not 0 < number - _FAR < 2**31 else replace(spec, max_length=number - _FAR)
            case "x-max-priority" | "x-queue-type" | "x-delivery-limit" | "x-dead-letter-strategy":
                if argument == "x-max-priority" and number is not None:
                    levels = None if number == PRIORITY_LEVELS else number
                    return replace(spec, kind="priority", priority_levels=levels)
                if spec.kind == "priority" and (argument == "x-max-priority" or value == "quorum"):
                    return replace(spec, kind="fifo", priority_levels=None)
                if spec.kind != "priority" and (argument != "x-queue-type" or value == "classic"):
                    return replace(spec, kind="priority", priority_levels=None)
            case _:
                pass
        return None
