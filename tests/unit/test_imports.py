"""What `import mindtrace.jobs` loads, and what it gives."""

import subprocess
import sys
from pathlib import Path

import pytest

import mindtrace.jobs


def in_a_fresh_interpreter(code: str, path: Path | None = None) -> str:
    """What the code prints there; it must not complain of anything."""
    environment = {"PYTHONPATH": "" if path is None else str(path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.strip()


LOADED = """
import sys
print(*sorted({name.partition(".")[0] for name in sys.modules}
    & {"redis", "hiredis", "aio_pika", "aiormq", "pamqp", "pytest", "_pytest", "hypothesis"}))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import mindtrace.jobs",
        "from mindtrace.jobs import RedisClient, connect",
        "import mindtrace.jobs as jobs; jobs.Orchestrator(jobs.LocalClient()).declare(jobs.QueueSpec('queue'))",
        "import mindtrace.jobs as jobs; jobs.Orchestrator.from_url('local://').declare(jobs.QueueSpec('queue'))",
        "import mindtrace.jobs as jobs; jobs.LocalBackend(); jobs.connect()",
    ],
    ids=["import", "a client's class", "local queue", "local URL", "local backend"],
)
def test_no_driver_and_no_test_tool_is_imported_for_the_local_backend(code: str) -> None:
    assert in_a_fresh_interpreter(code + LOADED) == ""


ON_REDIS, ON_RABBITMQ = "hiredis redis", "aiormq pamqp"


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import mindtrace.jobs as jobs; jobs.RedisBackend", ON_REDIS),
        ("import mindtrace.jobs as jobs; jobs.RedisClient()", ON_REDIS),
        ("import mindtrace.jobs as jobs; jobs.connect('redis://')", ON_REDIS),
        ("import mindtrace.jobs as jobs; jobs.Orchestrator.from_url('rediss://')", ON_REDIS),
        ("import mindtrace.jobs as jobs; jobs.RabbitMQBackend", ON_RABBITMQ),
        ("import mindtrace.jobs as jobs; jobs.RabbitMQClient()", ON_RABBITMQ),
        ("import mindtrace.jobs as jobs; jobs.connect('amqp://')", ON_RABBITMQ),
        ("import mindtrace.jobs as jobs; jobs.Orchestrator.from_url('amqps://')", ON_RABBITMQ),
        ("from mindtrace.jobs import *", "aiormq hiredis pamqp redis"),
    ],
)
def test_the_driver_comes_with_the_first_that_names_its_backend_and_no_other_one(code: str, loaded: str) -> None:
    """A star names them all. None of these connects: there need be no server."""
    assert in_a_fresh_interpreter(code + LOADED) == loaded


@pytest.mark.parametrize("name", mindtrace.jobs.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mindtrace.jobs, name) is not None


def test_the_public_names_are_sorted_and_none_is_there_twice() -> None:
    assert mindtrace.jobs.__all__ == sorted(set(mindtrace.jobs.__all__))


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'mindtrace\.jobs' has no attribute 'Postgres'"):
        mindtrace.jobs.Postgres  # noqa: B018 (the access is the test)


def test_other_packages_may_live_beside_ours_in_the_namespace(tmp_path: Path) -> None:
    """`mindtrace` belongs to nobody: no `__init__.py`, so a second distribution adds `mindtrace.other`."""
    (tmp_path / "mindtrace" / "other").mkdir(parents=True)
    (tmp_path / "mindtrace" / "other" / "__init__.py").write_text("name = 'other'")
    printed = in_a_fresh_interpreter(
        "import mindtrace, mindtrace.jobs, mindtrace.other\n"
        "print(mindtrace.__file__, mindtrace.other.name, mindtrace.jobs.Worker.__name__)",
        tmp_path,
    )
    assert printed == "None other Worker"


def test_importing_starts_no_thread_and_says_nothing() -> None:
    printed = in_a_fresh_interpreter(
        "import logging, threading\nimport mindtrace.jobs\n"
        "print(threading.active_count(), logging.getLogger('mindtrace.jobs').level)\n"
        "logging.getLogger('mindtrace.jobs').error('not printed: the application has set up no logging')"
    )
    assert printed == "1 0"
