"""`Turns`: which queues a receiver looks at next, and how many jobs it asks each of them for."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Final

from mindtrace.jobs.delivery import Delivery

AT_ONCE: Final = 100
"""Queues that one look takes in; of more, as many in turn."""


class Turns:
    """Of one receiver.

    Args:
        names: of its queues, in order.
        strict: in that order always, rather than in turns.

    Attributes:
        next: those to look at next, and to listen at until then.
    """

    def __init__(self, names: Iterable[str], *, strict: bool) -> None:
        self._names, self._strict = tuple(names), strict
        self.next: tuple[str, ...] = self._names[:AT_ONCE]

    def take(self) -> tuple[str, ...]:
        """Those to look at now. Then it is the turn of the next hundred; or of all of them with another one first."""
        asked = self.next
        if len(self._names) > AT_ONCE:
            self.next = self._from(asked[-1], 1)
        elif not self._strict:
            self.next = asked[1:] + asked[:1]
        return asked

    def begin_with(self, name: str) -> None:
        """Look at this one next."""
        self.next = self._from(name)

    def limits(self, asked: Sequence[str], left: dict[str, int], room: int) -> dict[str, int]:
        """How many to ask each queue for; `left` is what those asked before still had. Empty: there is no more."""
        if room <= 0:
            return {}
        open_ = [name for name in asked if left.get(name, 1) > 0]
        if self._strict:
            return {open_[0]: room} if open_ else {}
        each, more = divmod(room, len(open_) or 1)
        limits = {name: each + (index < more) for index, name in enumerate(open_)}
        return {name: limit for name, limit in limits.items() if limit > 0}

    def _from(self, name: str, further: int = 0) -> tuple[str, ...]:
        """A hundred from this one on."""
        at = self._names.index(name) + further
        return (self._names[at:] + self._names[:at])[:AT_ONCE]


def in_turns(lists: Sequence[list[Delivery]]) -> list[Delivery]:
    """The first of each, then the second of each, ..."""
    if len(lists) == 1:
        return lists[0]
    return [delivery for ranks in zip_longest(*lists) for delivery in ranks if delivery is not None]
