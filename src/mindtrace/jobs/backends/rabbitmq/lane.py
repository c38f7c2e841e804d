"""`Lane`: a channel that receives, what is out on it, and how the queue comes to know that it is done."""

import secrets
from collections.abc import Iterable
from typing import Any

from pamqp import commands

from mindtrace.jobs.backends.rabbitmq.channels import Channel, Content

_FEW = 16


class Lane:
    """A channel and the tags that are out on it, in order.

    A quorum queue lets a channel have 32 commands on their way; further acknowledgements wait in the channel, and are
    forgotten with it. So there are as few of them as can be, and a channel is flushed before it is closed.

    Args:
        channel: open.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel: Channel = channel
        self.receipts: str = secrets.token_hex(8)
        self._out: dict[int, None] = {}
        self._acknowledged = 0

    @property
    def is_dirty(self) -> bool:
        """Whether acknowledgements may wait in the channel."""
        return self._acknowledged > _FEW and not self.channel.is_closed

    def add(self, tag: int) -> None:
        """A message has come."""
        self._out[tag] = None

    def acknowledge(self, tags: Iterable[int]) -> None:
        """In as few frames as can be: one for all up to the first that is still out, one for each other."""
        done = {tag for tag in tags if tag in self._out}
        if not done or self.channel.is_closed:
            return
        prefix = 0
        for tag in self._out:
            if tag not in done:
                break
            prefix = tag
        frames: list[Any] = []
        if prefix:
            frames.append(commands.Basic.Ack(prefix, True))
        for tag in sorted(done):
            del self._out[tag]
            if tag > prefix:
                frames.append(commands.Basic.Ack(tag, False))
        self._acknowledged += len(done)  # each message that was got is a command of its own, in whatever frame
        self.channel.send(*frames)

    def give_back(self, tag: int) -> None:
        """To the queue, marked as handed over before: the next one counts a crash."""
        if tag in self._out:
            del self._out[tag]
            self.channel.send(commands.Basic.Nack(tag, False, True))

    async def flush(self, queue: str) -> Content | None:
        """Have a queue, named as on the server, know of all acknowledgements. Gives a message that it cost.

        A get goes through the queue's log, behind what was on its way; with its answer the channel learns that there
        is room, and has sent the rest once it answers the next call.

        Raises:
            BackendUnavailable: no answer.
        """
        content = await self.channel.call(commands.Basic.Get(queue=queue))
        if isinstance(content, Content):
            self.add(content.frame.delivery_tag)
            self._out = dict.fromkeys(sorted(self._out))  # what was pushed right behind it may have been added before
        await self.channel.call(commands.Basic.Qos(prefetch_count=1))
        self._acknowledged = 0
        return content if isinstance(content, Content) else None
