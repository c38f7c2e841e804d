"""`on_broker`: what a command does with a broker, with the application's names for what is there."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from mindtrace.jobs.backends import LOCAL, connect
from mindtrace.jobs.cli.errors import CommandError, UsageError, did_you_mean
from mindtrace.jobs.cli.output import logging_to_stderr, say
from mindtrace.jobs.cli.parser import Parser
from mindtrace.jobs.cli.running import run
from mindtrace.jobs.cli.settings import APP, NAMESPACE, URL, VERBOSE, Settings, broker_for_the_application
from mindtrace.jobs.cli.target import App, Loaded, load
from mindtrace.jobs.errors import QueueNotFound
from mindtrace.jobs.job import JobSchema
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.sync import Orchestrator
from mindtrace.jobs.worker import Worker


@dataclass(frozen=True, slots=True)
class Reach:
    """A broker that answers.

    Attributes:
        jobs: an open orchestrator.
        schemas: of the application, by name.
        names: the queues that the application names; empty where none is named.
        untyped: those of them whose consumers have no schema, and take whatever there is.
        has_app: whether one is named.
    """

    jobs: AsyncOrchestrator
    schemas: Mapping[str, JobSchema[Any, Any]]
    names: tuple[str, ...] = ()
    untyped: frozenset[str] = frozenset()
    has_app: bool = False

    async def queues(self, asked: Iterable[str] = ()) -> list[str]:
        """Those of `known` that are declared."""
        return [name for name, is_declared in (await self.known(asked)).items() if is_declared]

    async def known(self, asked: Iterable[str] = ()) -> dict[str, bool]:
        """Those that are asked for; else all there are; on a broker that cannot list them, those the application names.

        Returns:
            whether each is declared. False only where nobody has asked for one that the application names, and it has
            not been used yet, which is said.

        Raises:
            UsageError: nobody names one, and the broker cannot list them.
        """
        named = list(dict.fromkeys(asked))
        if named:
            return dict.fromkeys(named, True)
        if self.jobs.backend.traits.lists_queues:
            return dict.fromkeys(sorted(spec.name for spec in await self.jobs.queues()), True)
        backend = self.jobs.backend.traits.name
        if not self.names:
            raise UsageError(f"{backend} cannot list its queues: name some with -q, or an application with --app")
        say(f"{backend} cannot list its queues: these are the ones that the application names")
        known = dict(zip(self.names, await asyncio.gather(*map(self._is_declared, self.names)), strict=True))
        for name, is_declared in known.items():
            if not is_declared:
                say(f"queue {name!r} is not declared yet: the application does that when it first uses it")
        return known

    async def _is_declared(self, name: str) -> bool:
        try:
            await self.jobs.depth(name)
        except QueueNotFound:
            return False
        return True


def take_broker(parser: Parser) -> None:
    """Have the options that say which broker."""
    parser.take(URL, NAMESPACE, APP)


def on_broker(settings: Settings, work: Callable[[Reach], Awaitable[int]]) -> int:
    """Connect, do the work, and close; in a loop of its own. Returns what the work returns.

    With an application it is the application's broker, or that of `--url` with the application's names.

    Raises:
        UsageError: no broker is named, or only the one inside a process.
        AppError: the application does not import.
        BackendUnavailable: no broker, or it refuses the login.
        CommandError: no queue of a name; the text says which one was probably meant.
        Stopped: a signal ended it.
    """
    with broker_for_the_application(settings), logging_to_stderr(settings[VERBOSE]):
        loaded = None if (target := settings[APP]) is None else load(target)
        return run(_work(settings, loaded, work))


async def _work(settings: Settings, loaded: Loaded | None, work: Callable[[Reach], Awaitable[int]]) -> int:
    async with _reached(settings, None if loaded is None else await loaded.app()) as reach:
        try:
            return await work(reach)
        except QueueNotFound as error:
            known = set(reach.names)
            if reach.jobs.backend.traits.lists_queues:
                known |= {spec.name for spec in await reach.jobs.queues()}
            raise CommandError(f"no queue {error.queue!r}{did_you_mean(error.queue, known - {error.queue})}") from error


@asynccontextmanager
async def _reached(settings: Settings, app: App | None) -> AsyncGenerator[Reach]:
    if app is None:
        if settings[URL] == LOCAL:
            told = "no broker is named" if settings.is_default(URL) else f"{settings.source(URL)} is {LOCAL}"
            raise UsageError(
                f"{told}: give --url, MINDTRACE_JOBS_URL, REDIS_URL or AMQP_URL; or --app, whose broker it is then."
                f" {LOCAL} is inside one process, where nothing reaches it from outside"
            )
        async with AsyncOrchestrator(connect(settings[URL], namespace=settings[NAMESPACE])) as jobs:
            yield Reach(jobs, {})
        return
    source = await _source(app)
    schemas, names = source.schemas, source.names
    if settings.source(URL) == f"--{URL.name}":
        if settings[URL] == LOCAL:
            raise UsageError(f"--url is {LOCAL}: it is inside one process, where nothing reaches it from outside")
        await source.jobs.aclose()  # which its factory may have opened
        jobs = AsyncOrchestrator(
            connect(settings[URL], namespace=settings[NAMESPACE]), payload_limit=source.jobs.payload_limit
        )
    elif settings.source(NAMESPACE) == f"--{NAMESPACE.name}":
        raise UsageError("--namespace is the application's own to say: give --url as well, or leave out --app")
    else:
        jobs = source.jobs
        if jobs.backend.traits.name == "local":
            raise UsageError(
                f"the broker of {settings[APP]} is {LOCAL}, inside its own process, where nothing reaches it from"
                " outside: have it connect() to MINDTRACE_JOBS_URL, or give --url"
            )
    async with jobs:
        declared = [spec.name for spec in await jobs.queues()]
        yield Reach(jobs, schemas, tuple(dict.fromkeys([*names, *declared])), source.untyped, True)


@dataclass(frozen=True, slots=True)
class _Source:
    """What an application brings."""

    jobs: AsyncOrchestrator
    schemas: Mapping[str, JobSchema[Any, Any]]
    names: tuple[str, ...]
    untyped: frozenset[str] = frozenset()


async def _source(app: App) -> _Source:
    if isinstance(app, Orchestrator):
        twin = await asyncio.to_thread(lambda: app.twin)  # it lives on the background loop: here is another one
        jobs = AsyncOrchestrator(app.backend.separate(), payload_limit=twin.payload_limit)
        declared = await asyncio.to_thread(app.queues)
        await asyncio.to_thread(app.backend.close)  # nobody asks there any more
        names = [schema.queue for schema in twin.schemas.values()] + [spec.name for spec in declared]
        return _Source(jobs, dict(twin.schemas), tuple(dict.fromkeys(names)))
    jobs = app.orchestrator if isinstance(app, Worker) else app
    schemas, names = dict(jobs.schemas), [schema.queue for schema in jobs.schemas.values()]
    untyped = set[str]()
    for consumer in app.consumers if isinstance(app, Worker) else ():
        schema = schemas.get(consumer.job_type_name) or consumer.schema()
        if schema is not None:
            schemas[schema.name] = schema
        else:
            untyped.add(consumer.job_type_name)
        names.append(consumer.job_type_name if schema is None else schema.queue)
    return _Source(jobs, schemas, tuple(dict.fromkeys(names)), frozenset(untyped))
