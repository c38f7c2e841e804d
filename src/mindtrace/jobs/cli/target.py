"""TARGET: `module:object`, or a function without arguments that gives one; found, imported, and checked."""

import asyncio
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from mindtrace.jobs.cli.errors import AppError, UsageError, did_you_mean
from mindtrace.jobs.errors import BackendUnavailable, ConfigError
from mindtrace.jobs.orchestrator import AsyncOrchestrator
from mindtrace.jobs.sync import Orchestrator
from mindtrace.jobs.worker import Worker

App: TypeAlias = Worker | AsyncOrchestrator | Orchestrator

_KINDS = "a Worker, an AsyncOrchestrator, an Orchestrator, or a function without arguments that gives one"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a target names.

    Attributes:
        target: as it was written.
        found: the object; None until `app()` where an async function makes it.
    """

    target: str
    found: App | None
    _factory: Callable[[], Awaitable[object]] | None = None

    async def app(self) -> App:
        """The object, from the running loop; made there by an async function.

        Raises:
            AppError: the function raised.
            UsageError: it gave something else.
            BackendUnavailable: it found no broker.
        """
        if self._factory is None:
            assert self.found is not None  # noqa: S101 (one of the two there is)
            return self.found
        try:
            found = await self._factory()
        except (BackendUnavailable, AppError):
            raise
        except (Exception, SystemExit) as error:  # the user's code
            raise _failed(self.target, error) from error
        return _checked(self.target, found)


def load(target: str) -> Loaded:
    """Import the target, with the current directory on `sys.path`; a plain function is called, an async one is not yet.

    Args:
        target: `module:object`.

    Raises:
        UsageError: it is no such text, the module has no such object, or the object is of no use.
        AppError: the module does not import, or the function raised.
        BackendUnavailable: the import, or the function, found no broker.
    """
    module, separator, path = target.partition(":")
    if not separator or not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise UsageError(f"{target!r} is no target: MODULE:OBJECT, such as shop.jobs:worker")
    found = _attribute(target, _import(target, module), path)
    if isinstance(found, App):
        return Loaded(target, found)
    if not inspect.isroutine(found) or _needs_arguments(found):
        return Loaded(target, _checked(target, found))
    if inspect.iscoroutinefunction(found):
        return Loaded(target, None, cast(Callable[[], Awaitable[object]], found))
    made = _guarded(target, cast(Callable[[], object], found))
    if inspect.isawaitable(made):
        return Loaded(target, None, lambda: made)
    return Loaded(target, _checked(target, made))


def _import(target: str, module: str) -> object:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return _guarded(target, lambda: importlib.import_module(module))


def _guarded(target: str, call: Callable[[], object]) -> object:
    try:
        return call()
    except BackendUnavailable:
        raise
    except (Exception, SystemExit) as error:  # the user's code
        raise _failed(target, error) from error


def _failed(target: str, error: BaseException) -> AppError | UsageError:
    """In one line: what, and where in the user's code."""
    module = target.partition(":")[0]
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return AppError(f"{target}: there is no module {error.name!r} in {Path.cwd()} or on the path")
    where, text = _place(error), str(error)
    if isinstance(error, SyntaxError) and error.filename:
        where, text = f"{_short(error.filename)}:{error.lineno}", error.msg
    line = " ".join(text.split())
    said = f"{target}: {type(error).__name__}{': ' if line else ''}{line}{where and f' ({where})'}"
    return UsageError(said) if isinstance(error, ConfigError) else AppError(said)


def described(error: BaseException) -> str:
    """What a job raised, and where; never its text, which may hold payload."""
    where = _place(error)
    return f"{type(error).__name__}{where and f' ({where})'}"


def _place(error: BaseException) -> str:
    """The innermost line outside the import system, asyncio and this library."""
    trace, place = error.__traceback__, ""
    ours, standard = str(Path(__file__).parents[1]), {Path(str(one.__file__)).parent for one in (importlib, asyncio)}
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(("<frozen", ours)) and Path(name).parent not in standard:
            place = f"{_short(name)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _short(name: str) -> str:
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def _attribute(target: str, module: object, path: str) -> object:
    found = module
    for part in path.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            raise UsageError(f"{target}: there is no {part!r}{did_you_mean(part, names)}")
        found = getattr(found, part)
    return found


def _checked(target: str, found: object) -> App:
    if isinstance(found, App):
        return found
    if isinstance(found, type):
        what = f"the class {found.__name__}"
    elif inspect.isroutine(found):
        what = f"{found.__name__}(), which takes arguments"
    else:
        what = f"of type {type(found).__name__}"
    raise UsageError(f"{target} is {what}: it has to be {_KINDS}")


def _needs_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return True
    return False
