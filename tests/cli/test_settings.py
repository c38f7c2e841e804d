"""Settings: which of several sources counts, and what is said of a wrong value."""

import json
from pathlib import Path
from typing import Any

import pytest

from mindtrace.jobs.cli import COMMANDS
from mindtrace.jobs.cli.parser import Parser

from .conftest import CANARY, Cli

pytestmark = pytest.mark.local


def found(cli: Cli, *words: str) -> dict[str, tuple[Any, str]]:
    """Each setting's value, and where it is from."""
    ended = cli("config", "--json", *words)
    assert (ended.status, ended.err) == (0, "")
    return {row["setting"]: (row["value"], row["from"]) for row in json.loads(ended.out)}


def in_project(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(f"[tool.mindtrace-jobs]\n{text}\n", "utf-8")


def test_the_environment_counts_before_pyproject_and_that_before_the_default(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(cli)["namespace"] == (None, "default")
    in_project(folder, 'namespace = "of-the-project"\napp = "shop:worker"')
    assert found(cli)["namespace"] == ("of-the-project", "pyproject.toml")
    monkeypatch.setenv("MINDTRACE_JOBS_NAMESPACE", "of-the-environment")
    assert found(cli)["namespace"] == ("of-the-environment", "MINDTRACE_JOBS_NAMESPACE")
    assert found(cli)["app"] == ("shop:worker", "pyproject.toml")


def test_a_flag_counts_before_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDTRACE_JOBS_JSON", "1")
    assert cli("version").out.startswith("{")
    assert cli("version", "--no-json").out.startswith("mindtrace-jobs")


def test_the_url_falls_back_to_what_other_programs_read(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(cli)["url"] == ("local://", "default")
    monkeypatch.setenv("AMQP_URL", f"amqp://user:{CANARY}@rabbit:5672/")
    assert found(cli)["url"] == ("amqp://rabbit:5672/", "AMQP_URL")
    monkeypatch.setenv("REDIS_URL", f"redis://:{CANARY}@redis/2")
    assert found(cli)["url"] == ("redis://redis:6379/2", "REDIS_URL")
    monkeypatch.setenv("MINDTRACE_JOBS_URL", f"rediss://{CANARY}:{CANARY}@own")
    assert found(cli)["url"] == ("rediss://own:6379/0", "MINDTRACE_JOBS_URL")
    monkeypatch.setenv("MINDTRACE_JOBS_URL", "")  # how a compose file says nothing
    assert found(cli)["url"] == ("redis://redis:6379/2", "REDIS_URL")


@pytest.mark.parametrize(
    ("words", "environment", "project", "said"),
    [
        (("--url", f"redis://:{CANARY}@host:x"), {}, "", ["--url", "port"]),
        ((), {"MINDTRACE_JOBS_URL": f"nowhere://{CANARY}"}, "", ["MINDTRACE_JOBS_URL", "nowhere://"]),
        ((), {"REDIS_URL": CANARY}, "", ["REDIS_URL", "://"]),
        ((), {}, f'url = "amqp://u:{CANARY}@h/a/b"', ["pyproject.toml: url", "virtual host"]),
        (("--namespace", "a b"), {}, "", ["--namespace 'a b'"]),
        ((), {"MINDTRACE_JOBS_JSON": "maybe"}, "", ["MINDTRACE_JOBS_JSON 'maybe'", "true"]),
        ((), {"MINDTRACE_JOBS_VERBOSE": "10"}, "", ["MINDTRACE_JOBS_VERBOSE '10'", "0 to 9"]),
        ((), {}, "namespace = [1, 2]", ["pyproject.toml: namespace", "one value"]),
        ((), {}, "namespace = {}", ["pyproject.toml: namespace", "one value"]),
        ((), {}, 'nmaespace = "x"', ["'nmaespace'", "did you mean 'namespace'?"]),
        ((), {}, "namespace = ", ["pyproject.toml"]),
    ],
)
def test_a_wrong_value_is_exit_2_and_says_which_where_from_and_what_is_expected(
    cli: Cli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    environment: dict[str, str],
    project: str,
    said: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if project:
        in_project(folder, project)
    ended = cli("status", *words)
    assert (ended.status, ended.out) == (2, "")
    [line] = ended.err.splitlines()
    for text in said:
        assert text in line


@pytest.mark.parametrize("text", ["[tool]\nmindtrace-jobs = 1", 'tool = "x"', "[tool.mindtrace-jobs", "\udce4"])
def test_a_pyproject_of_another_shape_is_said_or_has_nothing_for_us(cli: Cli, folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(text, "utf-8", "surrogateescape")
    ended = cli("status")
    assert ended.status == 2
    assert ("no broker is named" if text.startswith("tool =") else "pyproject.toml") in ended.err


def test_config_tells_of_everything_that_is_wrong_and_of_variables_that_mean_nothing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINDTRACE_JOBS_URL", CANARY)
    monkeypatch.setenv("MINDTRACE_JOBS_NAMESPACE", "a b")
    monkeypatch.setenv("MINDTRACE_JOBS_NAMSPACE", CANARY)
    ended = cli("config")
    assert ended.status == 2
    assert ended.err.count("MINDTRACE_JOBS_URL") == 1
    assert "MINDTRACE_JOBS_NAMESPACE 'a b'" in ended.err
    assert "warning: MINDTRACE_JOBS_NAMSPACE means nothing: did you mean 'MINDTRACE_JOBS_NAMESPACE'?" in ended.err
    assert "app" in ended.out


def test_config_tells_of_each_setting(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDTRACE_JOBS_VERBOSE", "1")
    settings = found(cli)
    assert settings["verbose"] == (1, "MINDTRACE_JOBS_VERBOSE")
    assert settings["json"] == (True, "--json")
    parser = Parser()
    for name, (command, help) in COMMANDS.items():
        command.add(parser.command(name, help))
    assert {option.name for option in parser.options()} == set(settings)


@pytest.mark.parametrize("words", [("version",), ("config",), ("status",), ("worker",)])
def test_every_command_warns_in_one_line_of_variables_that_mean_nothing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MINDTRACE_JOBS_PROCESSES", "2")
    before = cli(*words)
    monkeypatch.setenv("MINDTRACE_JOBS_PROCESES", CANARY)
    monkeypatch.setenv("MINDTRACE_JOBS_", CANARY)
    ended = cli(*words)
    [line] = [line for line in ended.err.splitlines() if line not in before.err.splitlines()]
    assert "MINDTRACE_JOBS_ means nothing" in line
    assert line.endswith("; MINDTRACE_JOBS_PROCESES means nothing: did you mean 'MINDTRACE_JOBS_PROCESSES'?")
    assert (ended.status, ended.out) == (before.status, before.out)
    assert "means nothing" not in before.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("satus",), "did you mean 'status'?"),
        (("queues", "lits"), "did you mean 'list'?"),
        (("status", "--quue", "x"), "did you mean '--queue'?"),
        (("--verison",), "there is no option '--verison': did you mean '--version'?"),
        (("dead", "show", "--payloda"), "did you mean '--payload'?"),
        (("status", "--js"), "'--js'"),  # nothing is shortened: a later option would change what it means
        (("status", "orders"), "'orders'"),
        (("dead", "list", "--reason", "attemps"), "did you mean 'attempts'?"),
        (("dead", "list", "--since", "yesterday"), "30m"),
        (("dead", "replay"), "--all"),
        (("dead", "replay", "--all", "--reason", "timeout"), "--all"),
        (("dead", "replay", "a", "--reason", "timeout"), "--reason"),
        (("dead", "replay", "--all", "--rate", "0"), "a second"),
        (("dead", "replay", "a", "--limit", "1"), "--limit"),
        (("publish", "x", "{}", "--delay", "1", "--at", "2030-01-01T00:00Z"), "--delay and --at"),
        (("publish", "x", "{}", "--at", "2030-01-01T00:00"), "offset"),
        (("publish", "x", "{}", "--delay", "soon"), "seconds"),
        (("publish", "x", "{}", "--skip", "1"), "--skip"),
        (("publish", "x", "@no-such-file"), "No such file"),
        (("dev", "reddis"), "did you mean 'redis'?"),
    ],
)
def test_wrong_words_are_exit_2_and_one_line_that_says_what_was_meant(
    cli: Cli, words: tuple[str, ...], said: str
) -> None:
    ended = cli(*words)
    assert (ended.status, ended.out) == (2, "")
    [line] = ended.err.splitlines()
    assert said in line


@pytest.mark.parametrize("words", [("status",), ("queues", "list"), ("dead", "list"), ("publish", "x", "{}")])
@pytest.mark.parametrize("url", ["", "local://"])
def test_what_is_inside_a_process_cannot_be_reached_from_outside(cli: Cli, words: tuple[str, ...], url: str) -> None:
    ended = cli(*words, *(("--url", url) if url else ()))
    assert ended.status == 2
    assert "local://" in ended.err
    assert "MINDTRACE_JOBS_URL" in ended.err
    assert ("--url is" in ended.err) == bool(url)


def test_version_and_help_are_for_stdout(cli: Cli) -> None:
    for words in (("--version",), ("version",), ("--help",), ("dead", "replay", "--help")):
        ended = cli(*words)
        assert (ended.status, ended.err) == (0, "")
        assert "mindtrace-jobs" in ended.out
