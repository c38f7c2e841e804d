"""`mindtrace-jobs publish`: hand in one job, or one for each line of stdin."""

import argparse
import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import from_json

from mindtrace.jobs.backend import QueueSpec
from mindtrace.jobs.cli.errors import FAILED, FINE, CommandError, UsageError, did_you_mean
from mindtrace.jobs.cli.lines import Lines
from mindtrace.jobs.cli.output import Progress, counted, document, json_line, say
from mindtrace.jobs.cli.parser import Parser, argument
from mindtrace.jobs.cli.reach import Reach, on_broker, take_broker
from mindtrace.jobs.cli.selection import instant
from mindtrace.jobs.cli.settings import JSON, Settings, seconds, whole
from mindtrace.jobs.errors import ConfigError, InputInvalid, JobsError, PayloadTooLarge
from mindtrace.jobs.job import (
    PRIORITY_RANGE,
    Job,
    JobId,
    JobSchema,
    checked_job_id,
    field_errors,
    job_from_schema,
    new_job_id,
)

_SHOWN = 20
"""So many lines that could not be published are told one by one."""


def add(parser: Parser) -> None:
    """Declare the options and arguments."""
    take_broker(parser)
    parser.take(JSON)
    parser.add_argument("schema", metavar="SCHEMA", help="what kind of job")
    parser.add_argument(
        "input", nargs="?", default="{}", metavar="JSON|@FILE|-", help="its input; - reads one from each line of stdin"
    )
    parser.add_argument("-q", "--queue", metavar="QUEUE", help="where to (the schema's queue, or the one of its name)")
    parser.add_argument("--priority", type=argument(whole(*PRIORITY_RANGE)), metavar="N", help="higher is first")
    parser.add_argument("--delay", type=argument(seconds()), metavar="SECONDS", help="until it is ready; or 5m, 2h, 1d")
    parser.add_argument("--at", type=argument(instant), metavar="TIME", help="when it is ready: 2030-01-31T08:00+01:00")
    parser.add_argument("--id", type=argument(checked_job_id), help="its id; with - the line's number is put behind it")
    parser.add_argument(
        "--skip", type=argument(whole(0, 2**63)), default=0, metavar="N", help="with -: the first N lines are done"
    )


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Publish, and print the ids."""
    if parsed.delay is not None and parsed.at is not None:
        raise UsageError("--delay and --at both say when: give one of them")
    if parsed.input == "-":
        return on_broker(settings, lambda reach: _Stream(_template(parsed, reach), parsed, settings).publish(reach))
    if parsed.skip:
        raise UsageError("--skip is for -, many jobs from stdin")
    text = _text(parsed.input)

    async def publish(reach: Reach) -> int:
        template = _template(parsed, reach)
        try:
            data = _object(text)
        except ValueError as error:
            raise UsageError(f"the input is not a JSON object: {error}") from None
        job_id = await template.publish(reach, template.job(data, parsed.id))
        if settings[JSON]:
            document({"id": job_id, "queue": template.queue, "schema": parsed.schema})
        else:
            print(job_id)
        return FINE

    return on_broker(settings, publish)


def _text(word: str) -> str | bytes:
    if not word.startswith("@"):
        return word
    try:
        return Path(word[1:]).read_bytes()
    except OSError as error:
        raise UsageError(f"{word}: {error.strerror}") from error


def _object(text: str | bytes) -> dict[str, Any]:
    """Raises ValueError, without the text, where it is none."""
    value: object = from_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is of type {type(value).__name__}")
    return cast(dict[str, Any], value)


@dataclass(frozen=True, slots=True)
class _Template:
    """What the jobs of one call have in common."""

    name: str
    queue: str
    schema: JobSchema[Any, Any] | None
    priority: int | None
    options: Mapping[str, Any]
    declares: bool

    def job(self, data: dict[str, Any], job_id: JobId | None) -> Job:
        """Raises InputInvalid."""
        if self.schema is not None:
            return job_from_schema(self.schema, data, job_id=job_id, priority=self.priority)
        name, job_id = self.name, job_id or new_job_id()
        try:
            return Job(id=job_id, name=name, schema_name=name, input_data=data, priority=self.priority)
        except ValidationError as error:
            raise InputInvalid(name, field_errors(error)) from None  # the cause would show the values

    async def declare(self, reach: Reach) -> None:
        """Have the queue of the schema, or of a consumer without one, as the application has it when it starts."""
        if self.declares and self.schema is not None:
            await reach.jobs.register(self.schema)
        elif self.declares and self.name in reach.untyped:
            await reach.jobs.backend.declare(QueueSpec(self.name), attach=True)

    async def publish(self, reach: Reach, job: Job) -> JobId:
        await self.declare(reach)
        return await reach.jobs.publish(self.queue, job, **self.options)


def _template(parsed: argparse.Namespace, reach: Reach) -> _Template:
    schema = reach.schemas.get(parsed.schema)
    if not reach.has_app:
        say("no application is named: the input is not validated (--app MODULE:OBJECT does that)")
    elif schema is None and parsed.schema in reach.untyped:
        say(f"the consumer of {parsed.schema!r} has no schema: the input is not validated")
    elif schema is None:
        near = did_you_mean(parsed.schema, [*reach.schemas, *reach.untyped])
        raise UsageError(f"the application has no schema {parsed.schema!r}{near}")
    priority = parsed.priority if parsed.priority is not None or schema is None else schema.priority
    options = {"delay": parsed.delay, "at": parsed.at}
    queue = parsed.queue or (parsed.schema if schema is None else schema.queue)
    return _Template(parsed.schema, queue, schema, priority, options, parsed.queue is None)


@dataclass(slots=True)
class _Stream:
    """Jobs from the lines of stdin: batch by batch, each outcome told apart."""

    template: _Template
    parsed: argparse.Namespace
    settings: Settings
    published: int = 0
    refused: int = 0
    through: int = 0  # the last line of which it is known what became of it, and of all before it
    failure: JobsError | None = None
    _beyond: int = field(default=0)  # jobs that are stored though they stand behind the failure

    async def publish(self, reach: Reach) -> int:
        """Returns 1 if a line could not be published."""
        await self.template.declare(reach)
        lines = Lines(sys.stdin.fileno())
        self.through = self.parsed.skip
        try:
            with Progress("published") as progress:
                async for batch in lines.batches():
                    todo = [(number, line) for number, line in batch if number > self.parsed.skip]
                    await self._publish(reach, todo)
                    sys.stdout.flush()  # whoever reads the ids need not wait for more of them
                    about = lines.about
                    progress.reached(self.published, None if about is None else max(self.published, about))
                    if self.failure is not None:
                        break
        except (asyncio.CancelledError, CommandError):
            self._say_how_to_resume()
            raise
        if self.failure is not None:
            self._say_how_to_resume()
            raise self.failure
        refused = f", {counted(self.refused, 'line')} refused" if self.refused else ""
        say(f"{counted(self.published, 'job')} published{refused}")
        return FAILED if self.refused else FINE

    async def _publish(self, reach: Reach, batch: list[tuple[int, bytes]]) -> None:
        jobs: list[tuple[int, Job]] = []
        refused: list[tuple[int, str]] = []
        for number, line in batch:
            if line.strip():
                try:
                    jobs.append((number, self.template.job(_object(line), self._id(number))))
                except ConfigError:  # an id that is too long: it is a ValueError, too, and no fault of the line's
                    raise
                except InputInvalid as error:
                    refused.append((number, str(error)))
                except ValueError as error:
                    refused.append((number, f"not a JSON object: {error}"))
        queue, options = self.template.queue, self.template.options
        # All in flight at once share round trips, and each has an outcome of its own. A signal waits for them, which
        # takes 10 s at the most: afterwards nobody has to guess what is stored.
        sent = asyncio.gather(*(reach.jobs.publish(queue, job, **options) for _, job in jobs), return_exceptions=True)
        try:
            await asyncio.shield(sent)
        finally:
            refused += self._account([number for number, _ in jobs], await sent)
            for number, why in sorted(refused):
                self._refuse(number, why)
            if self.failure is None and batch:
                self.through = batch[-1][0]

    def _account(self, numbers: list[int], outcomes: list[JobId | BaseException]) -> list[tuple[int, str]]:
        """Counts what is stored. Gives the lines that are at fault themselves."""
        refused: list[tuple[int, str]] = []
        for number, outcome in zip(numbers, outcomes, strict=True):
            if isinstance(outcome, InputInvalid | PayloadTooLarge):
                refused.append((number, str(outcome)))
            elif isinstance(outcome, JobsError):
                if self.failure is None:
                    self.failure, self.through = outcome, number - 1
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                self.published += 1
                self._beyond += self.failure is not None
                if self.settings[JSON]:
                    json_line({"line": number, "id": outcome})
        return refused

    def _refuse(self, number: int, why: str) -> None:
        self.refused += 1
        if self.refused <= _SHOWN:
            say(f"line {number}: {why}")
        elif self.refused == _SHOWN + 1:
            say("further lines like these are counted, and not shown")

    def _id(self, number: int) -> JobId | None:
        return None if self.parsed.id is None else checked_job_id(f"{self.parsed.id}-{number}")

    def _say_how_to_resume(self) -> None:
        done = f"{counted(self.published, 'job')} published, {counted(self.refused, 'line')} refused"
        say(f"{done}: {f'lines 1 to {self.through:,} are done' if self.through else 'no line is done'}")
        say(f"to go on: the same command and lines, with --skip {self.through}")
        if self._beyond:
            say(f"{self._beyond:,} of the lines after that are stored as well, and will be published a second time")
        if self.failure is not None and self.failure.outcome == "unknown":
            say("whether the next ones are stored is not known: they may be published a second time")
