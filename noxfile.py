#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.5"]
# ///
"""What one runs in this repository: `python3 noxfile.py -s demo`, and `python3 noxfile.py` for all tests.

It needs Python 3.11 with pip, and nothing else. Where nox is missing, the first half of this file makes an environment
that has it and starts again in there. The second half are the sessions; `python3 noxfile.py --list` names them.
"""

import atexit
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    import nox
else:
    try:
        import nox
    except ModuleNotFoundError:
        nox = None
    if not hasattr(nox, "main"):
        nox = None  # too old to be started by a script: as good as missing

ROOT = Path(__file__).resolve().parent
NOX = "nox>=2025.5"
PYTHON_IN = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
LAUNCHER = ROOT / ".nox" / "_launcher"
VIRTUALENV = ROOT / ".nox" / "_virtualenv"
MARKER = LAUNCHER / "complete.txt"
MADE_WITH = f"Python {sys.version.split()[0]}, {NOX}"


# How it starts itself. A Python that is too old must still be able to read this file, to say so in one sentence.


def start_with_nox() -> NoReturn:
    """Go on as the launcher's Python, with the same file and arguments; make the launcher first, once."""
    if sys.version_info < (3, 11):  # noqa: UP036 - people start this file with older ones, too
        leave(2, f"This needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}.")
    if find_spec("pip") is None:
        leave(2, f"This needs pip, and {sys.executable} has none: sudo apt-get install python3-pip")
    if Path(sys.prefix) == LAUNCHER:
        leave(1, "No nox can be imported in .nox/_launcher. Unset PYTHONPATH or remove that folder, then try again.")
    if not is_complete():
        print(f"Fetching {NOX} from the package index, into .nox/_launcher (once).", file=sys.stderr, flush=True)
        with lock():
            if not is_complete():  # or another first run made it while this one waited
                make_launcher()
    command = [str(LAUNCHER / PYTHON_IN), str(ROOT / "noxfile.py"), *sys.argv[1:]]
    if sys.platform == "win32":
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)  # noqa: S606 - without a shell, on purpose


def is_complete() -> bool:
    """Whether the launcher is usable: its interpreter may be gone, together with the one that it was made from."""
    return (LAUNCHER / PYTHON_IN).exists() and MARKER.exists() and MARKER.read_text("utf-8") == MADE_WITH


def lock() -> TextIO:
    """Wait for the only right to make the launcher; closing the file gives it back."""
    LAUNCHER.parent.mkdir(exist_ok=True)
    file = open(str(LAUNCHER) + ".lock", "w")  # noqa: SIM115 - the caller closes it
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def make_launcher() -> None:
    """All of it or nothing: a launcher without its marker does not count, and none is left behind."""
    try:
        venv = [sys.executable, "-m", "venv", "--clear", str(LAUNCHER)]
        quiet = subprocess.DEVNULL
        if subprocess.run(venv, stdin=quiet, stdout=quiet, stderr=quiet, check=False).returncode != 0:
            # Debian keeps a part of venv in a package of its own. PEP 668, which closes the system to pip, leaves it
            # --target. PYTHONPATH is for this one call: set for any longer, it would leak into every session.
            must_run(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(VIRTUALENV), "virtualenv")
            must_run(sys.executable, "-m", "virtualenv", "--clear", str(LAUNCHER), PYTHONPATH=str(VIRTUALENV))
        must_run(str(LAUNCHER / PYTHON_IN), "-m", "pip", "install", "--quiet", NOX)
        MARKER.write_text(MADE_WITH, "utf-8")
    except BaseException:
        shutil.rmtree(str(LAUNCHER), ignore_errors=True)
        raise
    finally:
        shutil.rmtree(str(VIRTUALENV), ignore_errors=True)


def must_run(*command: str, **environment: str) -> None:
    """Run it in silence, unless it fails."""
    ended = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        leave(1, f"This command failed:\n  {shlex.join(command)}\n{ended.stdout.strip()}")


def leave(code: int, message: str) -> NoReturn:
    """Exit with `code`, which sys.exit(message) could not."""
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    os.chdir(str(ROOT))
    if nox is None:
        start_with_nox()
    nox.main()

elif nox is not None:  # loaded by nox, which reads the file a second time for its sessions
    nox.options.sessions = ["tests"]
    nox.options.reuse_venv = "yes"
    nox.options.default_venv_backend = "uv|virtualenv"
    nox.options.error_on_missing_interpreters = True
    if hasattr(nox.options, "download_python"):
        nox.options.download_python = "never"
    os.environ["UV_PYTHON_DOWNLOADS"] = "never"  # the same, where nox does not know that option yet

    PYPROJECT = nox.project.load_toml("pyproject.toml")
    CACHE = ROOT / ".nox" / "_cache"
    CACHES = {
        "HYPOTHESIS_STORAGE_DIRECTORY": str(CACHE / "hypothesis"),
        "MYPY_CACHE_DIR": str(CACHE / "mypy"),
        "PYRIGHT_PYTHON_CACHE_DIR": str(CACHE / "pyright"),
        "RUFF_CACHE_DIR": str(CACHE / "ruff"),
    }
    PYTEST = ("pytest", "-o", f"cache_dir={CACHE / 'pytest'}")
    PARTS = {"rabbitmq": "rabbitmq", "redis": "redis and not rabbitmq", "local": "not redis and not rabbitmq"}
    PASSED_OR_NONE = (0, 5)  # of pytest: all passed, or there was none in this part
    BROKERS = ("redis", "rabbitmq")
    BACKENDS = ("local", *BROKERS)
    STOPPING = 30.0  # seconds: a Ctrl-C reaches the command as well, and this long it may stop the brokers it started

    REQUIRED, *_ = VERSIONS = ("3.11", "3.12", "3.13")

    def find_interpreters() -> list[str]:
        """Those of VERSIONS that are here: the running one, and each whose python3.x is on PATH and runs."""
        # A python3.12 on PATH may only stand in for several, of which nobody has selected one: starting it tells.
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        nowhere = subprocess.DEVNULL
        trials = {
            version: subprocess.Popen([f"python{version}", "-c", "pass"], stdout=nowhere, stderr=nowhere)
            for version in VERSIONS
            if version != running and shutil.which(f"python{version}")
        }
        here = {running} | {version for version, trial in trials.items() if trial.wait() == 0}
        return [version for version in VERSIONS if version in here]

    FOUND = find_interpreters()
    tested: list[str] = []

    def group(name: str) -> tuple[str, ...]:
        """The requirements of a dependency group."""
        return nox.project.dependency_groups(PYPROJECT, name)

    def install(session: nox.Session, *wanted: str) -> None:
        """Install what the environment lacks; free when neither the wish nor pyproject.toml has changed since."""
        session.env.update(CACHES)
        done = Path(session.virtualenv.location, "installed.txt")
        state = "\n".join([*wanted, Path("pyproject.toml").read_text("utf-8")])
        if not done.exists() or done.read_text("utf-8") != state:
            done.unlink(missing_ok=True)
            session.install(*wanted)
            done.write_text(state, "utf-8")

    @nox.session
    def demo(session: nox.Session) -> None:
        """Run a first job on the local backend; words after -- go to the demo."""
        install(session, "-e", ".")
        session.run("mindtrace-jobs", "demo", *session.posargs, interrupt_timeout=STOPPING)

    @nox.session(python=FOUND if REQUIRED in FOUND else False)
    def tests(session: nox.Session) -> None:
        """Run all tests but the chaos, against real brokers of their own; words after -- go to pytest."""
        if REQUIRED not in FOUND:
            session.error(
                f"The tests need Python {REQUIRED}, and python{REQUIRED} is not on PATH, or does not run. Get it by"
                f" `apt-get install python{REQUIRED}`, `uv python install {REQUIRED}` or `pyenv install {REQUIRED}`"
            )
        if not tested:
            atexit.register(say_which_interpreters)
        tested.append(str(session.python))
        install(session, "-e", ".", *group("test"))
        if session.posargs:
            session.run(*PYTEST, *session.posargs, interrupt_timeout=STOPPING)
        else:
            run_in_parts(session, "not chaos", BACKENDS)

    @nox.session
    def chaos(session: nox.Session) -> None:
        """Kill, restart and cut for some minutes, and look for what was lost; words after -- go to pytest."""
        install(session, "-e", ".", *group("test"))
        if session.posargs:
            session.run(*PYTEST, "-m", "chaos", *session.posargs, interrupt_timeout=STOPPING)
        else:
            run_in_parts(session, "chaos", BROKERS)

    @nox.session
    def coverage(session: nox.Session) -> None:
        """Run what `tests` runs, and say which lines no test came to; it takes half as long again."""
        install(session, "-e", ".", *group("test"))
        session.env["COVERAGE_FILE"] = str(Path(session.virtualenv.location, "coverage"))
        session.run("coverage", "erase")
        run_in_parts(session, "not chaos", BACKENDS, "coverage", "run", "-m")
        session.run("coverage", "combine", "--quiet")
        session.run("coverage", "report")

    def run_in_parts(session: nox.Session, chosen: str, backends: Sequence[str], *before: str) -> None:
        """Run the tests that a marker expression chooses, those of each broker beside the others; some on each backend.

        One half of the time they wait for their brokers and for what they have started.
        """
        parts = {name: Path(session.virtualenv.location, f"exercised-{name}.json") for name in PARTS}
        for file in parts.values():
            file.unlink(missing_ok=True)
        commands = [
            (*before, "pytest", "-o", f"cache_dir={CACHE / f'pytest-{name}'}", f"--exercised={file}",
             "-m", f"({chosen}) and {PARTS[name]}")
            for name, file in parts.items()
        ]  # fmt: skip
        *others, here = commands
        try:
            with ExitStack() as stack:
                for number, command in enumerate(others):
                    stack.enter_context(beside(session, f"beside-{number}.txt", *command))
                session.run(*here, success_codes=PASSED_OR_NONE, interrupt_timeout=STOPPING)
        finally:
            total = put_together(list(parts.values()))
        if idle := [backend for backend, (_, passed) in total.items() if backend in backends and not passed]:
            session.error(f"no test passed on {', '.join(idle)}")

    @contextmanager
    def beside(session: nox.Session, report_name: str, program: str, *words: str) -> Iterator[None]:
        """Run other tests meanwhile; what they said follows at the end, and their failure is the session's."""
        report = Path(session.virtualenv.location, report_name)
        command = [str(shutil.which(program, path=session.bin)), *words]
        session.log(f"{shlex.join([program, *words])} (beside the next, which says its own first)")
        env = {name: value for name, value in {**os.environ, **session.env}.items() if value is not None}
        with report.open("wb") as output:
            process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            yield
            process.wait()
        except KeyboardInterrupt:  # it reached the process as well; a second one would cut its clean-up short
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOPPING)
            raise
        except Exception:
            process.wait()  # one half has failed: what of the other?
            raise
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            print(report.read_text("utf-8", "replace"), flush=True)
        if process.returncode not in PASSED_OR_NONE:
            session.error(f"the tests that ran beside failed: {process.returncode}")

    def put_together(counts: list[Path]) -> dict[str, tuple[str, int]]:
        """The closing line of several runs of pytest as if they had been one; names and numbers by backend."""
        total: dict[str, tuple[str, int]] = {}
        for file in counts:
            told = json.loads(file.read_text("utf-8")) if file.exists() else {}
            for backend, (name, passed) in told.items():
                other, before = total.get(backend, ("", 0))
                total[backend] = (max(name, other, key=len), before + passed)  # a version is of who started a broker
        if total:
            print(f"backends exercised: {', '.join(f'{name} {passed}' for name, passed in total.values())}", flush=True)
        return total

    def say_which_interpreters() -> None:
        """The last line, below nox's own summary."""
        missing = [f"python{version}" for version in VERSIONS if version not in FOUND]
        report = f"The tests ran on Python {', '.join(tested)}; not found: {', '.join(missing) or 'none'}."
        print(report, file=sys.stderr)

    @nox.session
    def lint(session: nox.Session) -> None:
        """Check style, format and the direction of imports."""
        install(session, *group("lint"))
        session.run("ruff", "check")
        session.run("ruff", "format", "--check")
        session.run("lint-imports", "--cache-dir", str(CACHE / "import-linter"), env={"PYTHONPATH": "src"})

    @nox.session
    def types(session: nox.Session) -> None:
        """Check types with mypy and pyright, and that the installed package tells users all of its types."""
        install(session, *group("types"), *PYPROJECT["project"]["dependencies"])
        session.install("--no-deps", "--force-reinstall", ".")  # not editable: the py.typed that ships is what counts
        session.env["PYRIGHT_PYTHON_GLOBAL_NODE"] = "0"  # the group's node, so that no other is needed
        session.env["PYRIGHT_PYTHON_IGNORE_WARNINGS"] = "1"  # of newer versions
        session.run("mypy", "src", "tests/typing", "noxfile.py")
        session.run("pyright")
        with session.chdir(session.virtualenv.location):  # away from src, which pyright would look into first
            session.run("pyright", "--verifytypes", "mindtrace.jobs", "--ignoreexternal")

    @nox.session
    def examples(session: nox.Session) -> None:
        """Run every example on every backend and compare its output; words after -- go to pytest."""
        install(session, "-e", ".", *group("test"))
        session.run(*PYTEST, "tests/examples", *session.posargs, interrupt_timeout=STOPPING)

    @nox.session
    def bench(session: nox.Session) -> None:
        """Measure, then compare with the hand-written loops; words after -- go to `mindtrace-jobs bench`."""
        install(session, "-e", ".")
        session.run("mindtrace-jobs", "bench", *session.posargs, interrupt_timeout=STOPPING)
        session.run("python", "tests/bench/compare.py", interrupt_timeout=STOPPING)
        session.run("python", "tests/bench/compare_redis.py", interrupt_timeout=STOPPING)
        session.run("python", "tests/bench/compare_rabbitmq.py", interrupt_timeout=STOPPING)

    @nox.session
    def build(session: nox.Session) -> None:
        """Build sdist and wheel, check the wheel, and run the demo from it in an empty environment."""
        install(session, "pip", *group("build"))  # build uses the pip beside it, which an environment of uv's lacks
        dist, empty = Path(session.virtualenv.location, "dist"), Path(session.virtualenv.location, "empty")
        shutil.rmtree(dist, ignore_errors=True)
        session.run("python", "-m", "build", "--outdir", str(dist))

        [wheel] = dist.glob("*.whl")
        inside = set(zipfile.ZipFile(wheel).namelist())
        sources = [file.relative_to("src") for file in Path("src").rglob("*") if file.is_file()]
        lacks = {file.as_posix() for file in sources if "__pycache__" not in file.parts} - inside
        if lacks or "mindtrace/jobs/py.typed" not in inside:
            session.error(f"The wheel lacks {', '.join(sorted(lacks)) or 'mindtrace/jobs/py.typed'}")
        if "mindtrace/__init__.py" in inside:
            session.error("The wheel has a mindtrace/__init__.py, which would hide all other mindtrace packages")

        session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(empty), external=True)
        session.run(str(empty / PYTHON_IN), "-m", "pip", "install", "--quiet", str(wheel), external=True)
        session.run(str((empty / PYTHON_IN).with_name("mindtrace-jobs")), "demo", external=True)

    START_BROKERS = """
import contextlib, signal
from mindtrace.jobs.testing import brokers

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)
with contextlib.suppress(KeyboardInterrupt), brokers.redis() as redis, brokers.rabbitmq() as rabbitmq:
    print(f"export REDIS_URL={redis.url}", f"export AMQP_URL={rabbitmq.url}", sep="\\n", flush=True)
    signal.pause()
"""

    @nox.session
    def brokers(session: nox.Session) -> None:
        """Start a Redis and a RabbitMQ, print how to export their URLs, stop them at Ctrl-C."""
        install(session, "-e", ".")
        session.run("python", "-c", START_BROKERS, log=False, interrupt_timeout=STOPPING)
