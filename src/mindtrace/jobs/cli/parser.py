"""`Parser`: argparse that takes options, says what was probably meant, and leaves the end of the process to `main`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from mindtrace.jobs.cli.errors import UsageError, did_you_mean
from mindtrace.jobs.cli.settings import VERBOSE, Option

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser of one command, or of one below it.

    `parsed.parser` is the parser of the chosen command.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self._options: list[Option[Any]] = []
        self._below: dict[str, Parser] = {}
        self._maker: Any = None
        self.set_defaults(parser=self)
        self.take(VERBOSE)

    def take(self, *options: Option[Any]) -> None:
        """Have these options. Their values are got from the settings: `settings[OPTION]`."""
        for option in options:
            names = [name for name in (option.short, f"--{option.name}") if name]
            more: dict[str, Any] = {"dest": option.key, "help": option.help, "default": argparse.SUPPRESS}
            match option.kind:
                case "switch":
                    more["action"] = argparse.BooleanOptionalAction
                case "count":
                    more["action"] = "count"
                case "many":
                    more |= {"action": "append", "metavar": option.metavar or option.name.upper()}
                case "one":
                    more["metavar"] = option.metavar or option.name.upper()
            self.add_argument(*names, **more)
            self._options.append(option)

    def command(self, name: str, help: str, dest: str = "action") -> "Parser":
        """A command below this one, of which exactly one has to be given; which, `parsed` says under `dest`."""
        if self._maker is None:
            self._maker = self.add_subparsers(dest=dest, required=True, metavar="COMMAND")
        parser: Parser = self._maker.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        self._below[name] = parser
        return parser

    def options(self) -> list[Option[Any]]:
        """What it has taken, and what the commands below it have."""
        return [*self._options, *(option for parser in self._below.values() for option in parser.options())]

    def parse(self, words: Sequence[str] | None) -> argparse.Namespace:
        """What the words say.

        Raises:
            UsageError: they are wrong; the text says what was probably meant.
            SystemExit: `--help` was asked for, and given.
        """
        words = sys.argv[1:] if words is None else words
        try:
            parsed, unknown = self.parse_known_args(words)
        except UsageError:
            self._check_options(words)  # of two faults the more telling one: what is missing may be what is misspelt
            raise
        if unknown:
            chosen: Parser = parsed.parser
            word = next((word for word in unknown if word.startswith("-") and word != "-"), unknown[0])
            option = word.partition("=")[0]
            kind = "option" if option.startswith("-") and option != "-" else "argument"
            chosen.error(f"there is no {kind} {option!r} here{did_you_mean(option, chosen.option_strings())}")
        return parsed

    def _check_options(self, words: Sequence[str]) -> None:
        known = self._all_option_strings()
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--") and option != "--" and option not in known:
                self.error(f"there is no option {option!r}{did_you_mean(option, known)}")

    def _all_option_strings(self) -> set[str]:
        return {*self.option_strings(), *(text for one in self._below.values() for text in one._all_option_strings())}

    def option_strings(self) -> list[str]:
        """All that begins with a dash here."""
        return [text for action in self._actions for text in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and leave the rest to `--help`."""
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"{str(value)!r} is none of {', '.join(known)}{near}")


def argument(read: Callable[[str], T]) -> Callable[[str], T]:
    """The `type` of a plain argument: what `read` expects is said by argparse."""

    def checked(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return checked
