"""What every test of this repository shares, and the promise that a full run leaves out no backend."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from mindtrace.jobs.testing.plugin import started_brokers

pytest_plugins = ["pytester"]

BACKENDS = ("local", "redis", "rabbitmq")


class _Exercised:
    """Counts the tests that passed on each backend, by marker."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._backends: dict[str, list[str]] = {}
        self._passed: Counter[str] = Counter()
        self._deselected: set[str] = set()
        self._missing: list[str] = []

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._deselected.update(backend for item in items for backend in _backends(item))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        # A report has no markers, only keywords, and a folder called redis is one of those too.
        self._backends = {item.nodeid: _backends(item) for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._passed.update(self._backends.get(report.nodeid, ()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        options = self._config.option
        # Of what these leave out nobody is told, unlike what -k, -m and --deselect do.
        ignored = options.ignore or options.ignore_glob or getattr(options, "lf", False)
        chosen = ignored or self._config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        cut_short = options.collectonly or session.shouldstop or session.shouldfail
        if not chosen and not cut_short and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self._missing = [b for b in BACKENDS if not self._passed[b] and b not in self._deselected]
        if self._missing:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._config.option.collectonly:
            brokers = {str(kind): broker for kind, broker in started_brokers(self._config).items()}
            names = {b: f"{b} {brokers[b].version} ({brokers[b].source})" if b in brokers else b for b in BACKENDS}
            if file := getattr(self._config.option, "exercised", None):
                counts = {backend: (names[backend], self._passed[backend]) for backend in BACKENDS}
                Path(file).write_text(json.dumps(counts), "utf-8")
            else:
                said = ", ".join(f"{names[backend]} {self._passed[backend]}" for backend in BACKENDS)
                terminalreporter.write_line(f"backends exercised: {said}")
        for backend in self._missing:
            hint = f'deselect it by name: -m "not {backend}"'
            terminalreporter.write_line(f"no test passed on {backend}; whoever wants that must {hint}", red=True)


def _backends(item: pytest.Item) -> list[str]:
    return [backend for backend in BACKENDS if item.get_closest_marker(backend)]


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "write there what the closing line would say, for whoever puts several runs together"
    parser.addoption("--exercised", metavar="FILE", help=told)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Exercised(config), "backends-exercised")
