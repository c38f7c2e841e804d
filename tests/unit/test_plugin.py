"""The pytest plugin as its user meets it, and the promise of our own conftest: each test here is a run of pytest."""

import ast
import inspect
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis

import mindtrace.jobs.testing.plugin as plugin

CONFTEST = Path(__file__).parents[1] / "conftest.py"
PLUGIN = ("-p", plugin.__name__, "-p", "no:cacheprovider")


@pytest.fixture(autouse=True)
def _only_the_plugins_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours only once, whether or not its entry point is installed; and loading all others costs a second a run."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((str(parts.hostname), parts.port or 0), 1.0).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No Redis in the environment, none on PATH, and none to be installed."""
    for name in ("REDIS_URL", "REDIS_SERVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MTJ_TEST_APT", "0")
    return monkeypatch


@pytest.mark.redis
def test_tests_share_one_redis_which_ends_with_the_run(
    pytester: pytest.Pytester, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listens(redis_url)  # by now the chain has found a program, whatever it took
    monkeypatch.delenv("REDIS_URL", raising=False)
    pytester.makepyfile(
        """
        from pathlib import Path
        from redis import Redis

        def test_one(redis_url):
            Path("url").write_text(redis_url)
            with Redis.from_url(redis_url) as redis:
                assert redis.dbsize() == 0

        def test_two(redis_url):
            assert Path("url").read_text() == redis_url
        """
    )
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=2)
    url = Path("url").read_text()
    assert url != redis_url
    assert not listens(url)


@pytest.mark.redis
def test_a_run_that_is_interrupted_leaves_no_server(
    pytester: pytest.Pytester, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    pytester.makepyfile(
        """
        from pathlib import Path

        def test_one(redis_url):
            Path("url").write_text(redis_url)
            raise KeyboardInterrupt
        """
    )
    run = pytester.inline_run(*PLUGIN, no_reraise_ctrlc=True)
    assert run.ret == pytest.ExitCode.INTERRUPTED
    assert Path("url").read_text() != redis_url
    assert not listens(Path("url").read_text())


@pytest.mark.redis
def test_a_start_takes_nothing_from_the_time_of_a_test(
    pytester: pytest.Pytester, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listens(redis_url)
    slow = pytester.path / "slow-redis"
    slow.write_text(f'#!/bin/sh\nsleep 1\nexec {shutil.which("redis-server") or shutil.which("valkey-server")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("REDIS_SERVER", str(slow))
    pytester.makepyfile("def test_one(redis_url): pass")
    pytester.runpytest_inprocess(*PLUGIN, "-p", "pytest_timeout", "-o", "timeout=0.5").assert_outcomes(passed=1)


@pytest.mark.redis
def test_a_fixture_may_ask_for_its_broker_as_it_runs(
    pytester: pytest.Pytester, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture(params=["local", pytest.param("redis", marks=pytest.mark.uses_broker("redis"))])
        def backend(request):
            return request.getfixturevalue("redis_url") if request.param == "redis" else "local://"

        def test_backend(backend):
            assert backend

        def test_late(request):
            assert request.getfixturevalue("redis_url")

        def test_unit():
            pass
        """
    )
    run = pytester.runpytest_inprocess(*PLUGIN, "-v")
    run.assert_outcomes(passed=4)
    # The parameter said what it needs, and so it comes last.
    order = ["*::test_backend?local? *", "*::test_late *", "*::test_unit *", "*::test_backend?redis? *"]
    run.stdout.fnmatch_lines(order, consecutive=True)


def test_tests_without_a_broker_run_first_and_those_with_rabbitmq_last(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_a(rabbitmq_url): pass
        def test_b(redis_url): pass
        def test_c(): pass
        def test_d(redis_url, rabbitmq_url): pass
        def test_e(): pass
        def test_f(redis_url): pass
        """
    )
    run = pytester.runpytest_inprocess(*PLUGIN, "--collect-only", "-q")
    run.stdout.fnmatch_lines([f"*::test_{name}" for name in "cebfad"], consecutive=True)


def test_a_missing_broker_fails_each_test_that_needs_it_and_tells_the_story_once(
    pytester: pytest.Pytester, bare: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_one(redis_url): pass
        def test_two(redis_url): pass
        def test_late(request): request.getfixturevalue("redis_url")
        def test_unit(): pass

        @pytest.mark.skip
        def test_skipped(redis_url): pass
        """
    )
    run = pytester.runpytest_inprocess(*PLUGIN)
    run.assert_outcomes(passed=1, skipped=1, errors=2, failed=1)
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    text = run.stdout.str().partition("short test summary")[0]
    assert text.count("Do one of these, then run the same command again:") == 1
    assert text.count("No Redis for the tests. Tried: (in full where the first test failed)") == 2
    assert "Traceback" not in text
    assert "During handling" not in text


@pytest.mark.parametrize(
    "test",
    [
        "def test_one(): pass",
        "import pytest\n@pytest.fixture\ndef redis_url(): return 'theirs'\ndef test_one(redis_url): assert redis_url",
        "import pytest\n@pytest.mark.skip\ndef test_two(redis_url): pass\ndef test_one(): pass",
    ],
)
def test_nothing_starts_for_tests_that_need_none_of_ours(
    pytester: pytest.Pytester, bare: pytest.MonkeyPatch, test: str
) -> None:
    pytester.makepyfile(test)
    run = pytester.runpytest_inprocess(*PLUGIN)
    assert run.parseoutcomes()["passed"] == 1
    assert run.ret == pytest.ExitCode.OK


def test_the_fixtures_are_synchronous_and_the_plugin_loads_no_client() -> None:
    """Fixtures that are not coroutines work under every asyncio plugin."""
    assert not inspect.iscoroutinefunction(plugin.redis_url)
    script = f"import sys, {plugin.__name__}; print([m for m in ('redis', 'aio_pika', 'aiormq') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, timeout=30)
    assert told.stdout.strip() == "[]"


def test_the_plugin_loads_no_more_of_the_library_than_the_import_of_it() -> None:
    ours = "sorted(name for name in sys.modules if name.startswith('mindtrace.jobs'))"
    script = f"import sys, mindtrace.jobs; print({ours}); import {plugin.__name__}; print({ours})"
    told = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, timeout=30)
    library, with_plugin = (set(ast.literal_eval(line)) for line in told.stdout.splitlines())
    testing = {f"mindtrace.jobs.testing{part}" for part in ("", ".brokers", ".plugin", ".servers")}
    assert with_plugin - library <= testing


CONSUMER = """
import asyncio
import pytest
from mindtrace.jobs import AsyncConsumer, Closed, Job

JOB = Job(name="x", schema_name="x")

class Echo(AsyncConsumer):
    async def run(self, job_dict):
        return {}
"""


def test_the_fixture_jobs_serves_the_coroutines_of_anyio_and_plain_functions(pytester: pytest.Pytester) -> None:
    """And a fixture that is no coroutine can prepare it for either."""
    pytester.makepyfile(
        CONSUMER
        + """
@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.fixture
def jobs(jobs):
    jobs.connect(Echo("echo"))
    return jobs

@pytest.fixture
async def published(jobs):
    return await jobs.publish("echo", JOB, delay=60)

@pytest.mark.anyio
async def test_coroutine(published, jobs):
    assert published == JOB.id
    assert await jobs.drain() == 0
    jobs.clock.advance(60)
    assert await jobs.drain() == 1

def test_one_loop(jobs):
    async def main():
        await jobs.publish("echo", JOB)
        assert await jobs.drain() == 1

    asyncio.run(main())

def test_several_loops(jobs):
    asyncio.run(jobs.publish("echo", JOB))
    assert asyncio.run(jobs.drain()) == 1

def test_block(jobs):
    async def main():
        async with jobs:
            await jobs.publish("echo", JOB)
            assert await jobs.drain() == 1

    asyncio.run(main())
"""
    )
    run = pytester.runpytest_inprocess(*PLUGIN, "-p", "anyio.pytest_plugin", "-W", "error")
    run.assert_outcomes(passed=4)


def test_each_test_has_jobs_of_its_own_and_they_end_with_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        CONSUMER
        + """
earlier = []

def test_first(jobs):
    earlier.append(jobs)
    jobs.connect(Echo("echo"))
    asyncio.run(jobs.publish("echo", JOB))

def test_second(jobs):
    jobs.connect(Echo("echo"))
    assert asyncio.run(jobs.drain()) == 0
    with pytest.raises(Closed, match="is over"):
        asyncio.run(earlier[0].publish("echo", JOB))
"""
    )
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=2)


def test_a_job_that_fails_is_shown_where_it_failed_and_without_our_frames(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        CONSUMER
        + """
class Broken(AsyncConsumer):
    async def run(self, job_dict):
        assert job_dict["name"] == "y"

def test_it(jobs):
    jobs.connect(Broken("echo"))
    asyncio.run(jobs.publish("echo", JOB, retry=False))
    asyncio.run(jobs.drain())
"""
    )
    run = pytester.runpytest_inprocess(*PLUGIN)
    run.assert_outcomes(failed=1)
    lines = [
        '>       assert job_dict["name"] == "y"',
        "The above exception was the direct cause of the following exception:",
        ">   *asyncio.run(jobs.drain())",
        "E * job * (schema 'x', queue 'echo', attempt 1) is dead, 'attempts': AssertionError: *",
    ]
    run.stdout.fnmatch_lines([line.replace("[", "[[]") for line in lines])
    run.stdout.no_re_match_line(r".*testing/jobs\.py:\d+: ")


# Our own conftest: a full run leaves out no backend.


@pytest.fixture
def repository(pytester: pytest.Pytester) -> pytest.Pytester:
    """A repository with our conftest, whose tests are in tests/."""
    markers = "\n".join(f"    {name}: runs there" for name in ("local", "redis", "rabbitmq"))
    pytester.makeini(f"[pytest]\ntestpaths = tests\naddopts = --import-mode=importlib\nmarkers =\n{markers}")
    pytester.mkdir("tests").joinpath("conftest.py").write_text(CONFTEST.read_text())
    return pytester


def with_tests(repository: pytest.Pytester, *marks: str, body: str = "pass") -> None:
    lines = [f"@pytest.mark.{mark}\ndef test_{mark}(): {body}\n" for mark in marks]
    (repository.path / "tests" / "test_some.py").write_text("\n".join(["import pytest", *lines]))


def closing_line(run: pytest.RunResult) -> str:
    [line] = [line for line in run.outlines if line.startswith("backends exercised: ")]
    return line


def test_a_full_run_on_all_three_backends_says_how_many_tests_each_ran(repository: pytest.Pytester) -> None:
    with_tests(repository, "local", "redis", "rabbitmq")
    numbers = "[1, 2, pytest.param(3, marks=pytest.mark.redis)]"
    more = f"import pytest\n@pytest.mark.local\n@pytest.mark.parametrize('n', {numbers})"
    (repository.path / "tests" / "test_more.py").write_text(f"{more}\ndef test_more(n): pass\n")
    run = repository.runpytest_inprocess(*PLUGIN)
    assert run.ret == pytest.ExitCode.OK
    assert closing_line(run) == "backends exercised: local 4, redis 2, rabbitmq 1"


@pytest.mark.redis
def test_the_closing_line_names_version_and_source_of_what_was_started(
    repository: pytest.Pytester, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    with_tests(repository, "local", "rabbitmq")
    file = repository.path / "tests" / "test_redis.py"
    file.write_text("import pytest\n@pytest.mark.redis\ndef test_it(redis_url): pass\n")
    run = repository.runpytest_inprocess(*PLUGIN)
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        version = redis.info("server")["redis_version"]
    assert closing_line(run) == f"backends exercised: local 1, redis {version} (environment) 1, rabbitmq 1"


@pytest.mark.parametrize("body", [None, "pytest.skip('no')", "assert False"])
def test_a_full_run_in_which_no_test_passed_on_a_backend_fails(repository: pytest.Pytester, body: str | None) -> None:
    """Whether there is no such test, or it skips itself; a failed one fails the run in any case."""
    with_tests(repository, "local", "redis")
    if body:
        with_tests(repository, "rabbitmq", body=body)
        (repository.path / "tests" / "test_some.py").rename(repository.path / "tests" / "test_other.py")
        with_tests(repository, "local", "redis")
    run = repository.runpytest_inprocess(*PLUGIN)
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    assert closing_line(run) == "backends exercised: local 1, redis 1, rabbitmq 0"
    assert 'no test passed on rabbitmq; whoever wants that must deselect it by name: -m "not rabbitmq"' in run.outlines


def test_only_the_marker_counts_and_not_a_name(repository: pytest.Pytester) -> None:
    with_tests(repository, "local", "redis")
    repository.mkdir("tests/rabbitmq").joinpath("test_rabbitmq.py").write_text("def test_rabbitmq(): pass\n")
    run = repository.runpytest_inprocess(*PLUGIN)
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    assert closing_line(run) == "backends exercised: local 1, redis 1, rabbitmq 0"


@pytest.mark.parametrize(
    "selection",
    [
        ("-m", "not rabbitmq"),
        ("-m", "local"),
        ("-k", "local or redis"),
        ("--deselect", "tests/test_some.py::test_rabbitmq"),
        ("tests/test_some.py::test_local",),
        ("--collect-only",),
    ],
)
def test_what_was_deselected_is_not_missed(repository: pytest.Pytester, selection: tuple[str, ...]) -> None:
    with_tests(repository, "local", "redis", "rabbitmq")
    run = repository.runpytest_inprocess(*PLUGIN, *selection)
    assert run.ret == pytest.ExitCode.OK
    assert "no test passed on" not in run.stdout.str()


def test_deselecting_one_backend_excuses_no_other(repository: pytest.Pytester) -> None:
    with_tests(repository, "local", "rabbitmq")
    run = repository.runpytest_inprocess(*PLUGIN, "-m", "not rabbitmq")
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    assert [line for line in run.outlines if line.startswith("no test passed on")] == [
        'no test passed on redis; whoever wants that must deselect it by name: -m "not redis"'
    ]
