"""What holds for this call: the flag, then the environment, then pyproject.toml, then the default; and which it was.

An `Option` is `--name` on the command line, `MINDTRACE_JOBS_NAME` in the environment and `name` in the table
`[tool.mindtrace-jobs]` of the pyproject.toml in the current directory. What selects jobs, describes one, or confirms
that something is destroyed is no `Option` but a plain argument: a variable somebody once set must not decide that.
"""

import os
import tomllib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeGuard, TypeVar, cast

from mindtrace.jobs.backends import shown
from mindtrace.jobs.cli.errors import UsageError, did_you_mean
from mindtrace.jobs.errors import ConfigError
from mindtrace.jobs.job import checked_namespace

T = TypeVar("T")

PREFIX = "MINDTRACE_JOBS_"
TABLE = "mindtrace-jobs"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True, slots=True, eq=False)
class Option(Generic[T]):
    """One setting. Made by `one`, `many`, `switch` or `count`, given to a parser by `Parser.take`.

    Attributes:
        name: as in `--name`.
        kind: how it stands on the command line.
        read: makes the value of its texts; raises ValueError, whose text says what is expected.
        default: where nobody says anything.
        help: for `--help`.
        metavar: what stands for its value there.
        short: such as `-c`.
        fallbacks: variables that are looked at after its own.
        show: the value as it may be printed.
        secret: its text is never shown, not even in an error.
    """

    name: str
    kind: Literal["one", "many", "switch", "count"]
    read: Callable[[Sequence[str]], T]
    default: T
    help: str
    metavar: str = ""
    short: str = ""
    fallbacks: tuple[str, ...] = ()
    show: Callable[[T], object] = lambda value: value
    secret: bool = False

    @property
    def key(self) -> str:
        """Its name where a name may have no dash."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Its own environment variable."""
        return f"{PREFIX}{self.key.upper()}"


def one(
    name: str,
    read: Callable[[str], T],
    default: T,
    help: str,
    *,
    metavar: str = "",
    short: str = "",
    fallbacks: tuple[str, ...] = (),
    show: Callable[[T], object] = lambda value: value,
    secret: bool = False,
) -> Option[T]:
    """An option with one value; of several on the command line the last one counts."""
    return Option(
        name, "one", lambda texts: read(texts[-1]), default, help, metavar, short, fallbacks, show=show, secret=secret
    )


def many(
    name: str, read: Callable[[str], T], help: str, *, metavar: str = "", short: str = ""
) -> Option[tuple[T, ...]]:
    """An option that may be given several times; in a variable its values are separated by commas."""
    empty: tuple[T, ...] = ()
    return Option(name, "many", lambda texts: tuple(read(text) for text in texts), empty, help, metavar, short)


def switch(name: str, help: str, *, short: str = "") -> Option[bool]:
    """`--name` and `--no-name`."""
    return Option(name, "switch", lambda texts: _read_bool(texts[-1]), False, help, "", short)


def whole(least: int, most: int) -> Callable[[str], int]:
    """Reads a whole number of this range."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return value

    return read


def seconds(least: float = 0.0) -> Callable[[str], float]:
    """Reads seconds, or a number with `s`, `m`, `h` or `d` behind it."""

    def read(text: str) -> float:
        unit = _UNITS.get(text[-1:].lower())
        number = text if unit is None else text[:-1]
        try:
            value = float(number) * (unit or 1.0)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):  # nan is no such number either
            raise ValueError(f"seconds from {least:g} on, or a number with s, m, h or d behind it")
        return value

    return read


_UNITS: Final[Mapping[str, float]] = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def word(*allowed: str) -> Callable[[str], str]:
    """Reads one of these words."""

    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}{did_you_mean(text, allowed)}")
        return text

    return read


def _read_bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("1, true, yes or on; 0, false, no or off")


def _read_url(text: str) -> str:
    try:
        shown(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


URL: Final = one(
    "url",
    _read_url,
    "local://",
    "the broker: redis://host:6379/0, amqp://host:5672/; the password is better kept in the environment",
    fallbacks=("REDIS_URL", "AMQP_URL"),
    show=shown,
    secret=True,
)
BROKER: Final = f"{PREFIX}URL"
"""The variable in which `connect()` without a URL looks."""
NAMESPACE: Final[Option[str | None]] = one(
    "namespace", checked_namespace, None, "what tells applications on one server apart (mtj)"
)
APP: Final[Option[str | None]] = one(
    "app", str, None, "the application, whose broker, schemas and queues are meant", metavar="MODULE:OBJECT"
)
JSON: Final = switch("json", "print JSON: one document, or a line each where it streams")
VERBOSE: Final[Option[int]] = Option(
    "verbose",
    "count",
    lambda texts: whole(0, 9)(texts[-1]),
    0,
    "say more on stderr; -vv adds the traceback of an error",
    short="-v",
)


class Project:
    """The table of a pyproject.toml.

    Args:
        folder: where the file is, if there is one.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "pyproject.toml"

    @cached_property
    def table(self) -> Mapping[str, Any]:
        """Its keys, with `-` for `_`; empty where there is no such file or table.

        Raises:
            UsageError: the file cannot be read, or the table is none.
        """
        try:
            document = tomllib.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageError(f"pyproject.toml: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"pyproject.toml: {error}") from error
        tool: object = document.get("tool", {})
        table: object = tool.get(TABLE, {}) if _is_table(tool) else {}
        if not _is_table(table):
            raise UsageError(f"pyproject.toml: tool.{TABLE} is a table: [tool.{TABLE}]")
        return {key.replace("_", "-"): value for key, value in table.items()}


class Settings:
    """The values of the options, each looked up when it is first asked for: `settings[URL]`.

    Args:
        flags: what stood on the command line, by `Option.key`.
        environ: the environment.
        project: the table of pyproject.toml.
        known: all options that there are, of all commands.
    """

    def __init__(
        self, flags: Mapping[str, Any], environ: Mapping[str, str], project: Project, known: Sequence[Option[Any]] = ()
    ) -> None:
        self.known: tuple[Option[Any], ...] = tuple(dict.fromkeys(known))
        self._flags, self._environ, self._project = flags, environ, project
        self._found: dict[Option[Any], tuple[Any, str]] = {}

    @classmethod
    def of_here(cls, flags: Mapping[str, Any] | None = None, known: Sequence[Option[Any]] = ()) -> "Settings":
        """With this process's environment, and the pyproject.toml of the current directory."""
        return cls(flags or {}, os.environ, Project(Path.cwd()), known)

    def __getitem__(self, option: Option[T]) -> T:
        value, _ = self._look_up(option)
        return value

    def source(self, option: Option[Any]) -> str:
        """Where its value comes from: a flag, a variable, `pyproject.toml` or `default`. Raises as the look-up does."""
        return self._look_up(option)[1]

    def is_default(self, option: Option[Any]) -> bool:
        """Whether nobody said anything."""
        return self.source(option) == "default"

    def check(self, options: Iterable[Option[Any]]) -> None:
        """Look these up, so that what is wrong with one is said before anything is done."""
        for option in options:
            self._look_up(option)

    def check_project(self) -> None:
        """Nothing, if every key of the table is an option.

        Raises:
            UsageError: one is not; or the file cannot be read.
        """
        names = [option.name for option in self.known]
        for key in self._project.table:
            if key not in names:
                raise UsageError(f"pyproject.toml: [tool.{TABLE}] has no {key!r}{did_you_mean(key, names)}")

    def unknown_variables(self) -> str:
        """In one line, the variables that are named like ours and mean nothing to us; empty where there are none."""
        known = [option.variable for option in self.known]
        unknown = sorted(name for name in self._environ if name.startswith(PREFIX) and name not in known)
        return "; ".join(f"{name} means nothing{did_you_mean(name, known)}" for name in unknown)

    def _look_up(self, option: Option[T]) -> tuple[T, str]:
        found = self._found.get(option)
        if found is None:
            found = self._found[option] = self._read(option)
        return cast(tuple[T, str], found)

    def _read(self, option: Option[T]) -> tuple[T, str]:
        texts, source = self._texts(option)
        if texts is None:
            return option.default, source
        try:
            return option.read(texts), source
        except ValueError as error:
            where = f"pyproject.toml: {option.name}" if source == "pyproject.toml" else source
            said = "" if option.secret else f" {', '.join(repr(text) for text in texts)}"
            raise UsageError(f"{where}{said}: {error}") from None

    def _texts(self, option: Option[Any]) -> tuple[list[str] | None, str]:
        flag = self._flags.get(option.key)
        if flag is not None:
            return [str(value) for value in _listed(flag)], f"--{option.name}"
        for variable in (option.variable, *option.fallbacks):
            text = self._environ.get(variable)
            if text:
                return [part.strip() for part in text.split(",")] if option.kind == "many" else [text], variable
        if self.known:
            self.check_project()
        value = self._project.table.get(option.name)
        if value is None:
            return None, "default"
        values = _listed(value)
        if not values or (len(values) > 1 and option.kind != "many") or not all(_is_plain(item) for item in values):
            expected = "a list of texts" if option.kind == "many" else "one value"
            raise UsageError(f"pyproject.toml: {option.name}: {expected}")
        return [str(item) for item in values], "pyproject.toml"


def _listed(value: object) -> list[Any]:
    return value if _is_list(value) else [value]


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _is_table(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


@contextmanager
def broker_for_the_application(settings: Settings) -> Generator[None]:
    """In the block `connect()` without a URL, or a namespace, leads to that of these settings, if they name one."""
    url = None if settings.is_default(URL) else settings[URL]
    with broker_is(url), _variable_is(NAMESPACE.variable, settings[NAMESPACE]):
        yield


@contextmanager
def broker_is(url: str | None) -> Generator[None]:
    """In the block `connect()` without a URL leads there, also in processes that are started in it; None: as before."""
    with _variable_is(BROKER, url):
        yield


@contextmanager
def _variable_is(name: str, value: str | None) -> Generator[None]:
    if value is None:
        yield
        return
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
