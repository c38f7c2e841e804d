"""`arrive`: a worker finds its broker and receives from it; for a broker that is not there yet it waits."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random

from mindtrace.jobs.backend import Receiver
from mindtrace.jobs.errors import AuthenticationFailed, BackendUnavailable, Closed
from mindtrace.jobs.health import Pulse
from mindtrace.jobs.pump import LONGEST_PAUSE

_log = logging.getLogger(__name__)


async def arrive(
    receive: Callable[[], Awaitable[Receiver]],
    connect: Callable[[], Awaitable[None]],
    *,
    worker: str,
    pulse: Pulse,
    random: Random,
    stopped: asyncio.Event,
) -> Receiver | None:
    """Receive, and try again until there is a broker.

    Args:
        receive: finds or declares the queues, and gives what receives from them.
        connect: called where that says that nobody has opened the orchestrator.
        worker: its name.
        pulse: of the worker.
        random: the source of the jitter.
        stopped: ends the wait.

    Returns:
        None where it was stopped before.

    Raises:
        AuthenticationFailed: the broker refuses the login.
    """
    level = logging.WARNING
    while True:
        pulse.looks()
        try:
            return await receive()
        except AuthenticationFailed:
            raise
        except (Closed, BackendUnavailable) as error:
            try:
                if isinstance(error, Closed):
                    await connect()
                    continue
            except AuthenticationFailed:
                raise
            except BackendUnavailable as still:
                error = still
            pulse.failed()
            _log.log(level, "worker %s: %s; trying on", worker, error, extra={"worker": worker})
            level = logging.DEBUG  # once for all tries; that it is over, the lines of its start say
        with suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0.1, LONGEST_PAUSE)):
                await stopped.wait()
        if stopped.is_set():
            return None
