"""`Lines`: what comes on a file descriptor, line by line, as it comes, without holding up the loop."""

import asyncio
import os
import stat
from collections.abc import AsyncGenerator

from mindtrace.jobs.backend import BATCH
from mindtrace.jobs.cli.errors import CommandError
from mindtrace.jobs.wire import PAYLOAD_LIMIT_MOST

_CHUNK = 1 << 16
_LONGEST = 2 * PAYLOAD_LIMIT_MOST


class Lines:
    """The lines of a file, pipe or terminal.

    Args:
        fd: its descriptor.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = 0
        self._read_lines = 0
        status = os.fstat(fd)
        self._size = status.st_size - os.lseek(fd, 0, os.SEEK_CUR) if stat.S_ISREG(status.st_mode) else None

    @property
    def about(self) -> int | None:
        """How many lines there are, as far as one can guess by those that are read; None where nobody can."""
        if self._size is None or not self._bytes:
            return None
        return max(self._read_lines, round(self._read_lines * self._size / self._bytes))

    async def batches(self) -> AsyncGenerator[list[tuple[int, bytes]]]:
        """The lines with their numbers, from 1; at once what is there, up to 500 together.

        Raises:
            CommandError: a line is longer than any job's input can be.
        """
        rest = b""
        while chunk := await self._chunk():
            self._bytes += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LONGEST:
                number = self._read_lines + len(lines) + 1
                raise CommandError(f"line {number}: over {_LONGEST:,} bytes; is this JSON Lines?")
            for start in range(0, len(lines), BATCH):
                yield self._numbered(lines[start : start + BATCH])
        if rest:
            yield self._numbered([rest])

    def _numbered(self, lines: list[bytes]) -> list[tuple[int, bytes]]:
        first = self._read_lines + 1
        self._read_lines += len(lines)
        return list(enumerate(lines, first))

    async def _chunk(self) -> bytes:
        """Waits for the descriptor in the loop, so that Ctrl-C ends it at once, and reads no more than is there."""
        loop = asyncio.get_running_loop()
        there: asyncio.Future[None] = loop.create_future()

        def found() -> None:
            if not there.done():
                there.set_result(None)

        try:
            loop.add_reader(self._fd, found)
        except PermissionError:  # a file, which never keeps anybody waiting
            await asyncio.sleep(0)
        else:
            try:
                await there
            finally:
                loop.remove_reader(self._fd)
        return os.read(self._fd, _CHUNK)
