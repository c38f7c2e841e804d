"""How noxfile.py starts itself, from a Python that has no nox."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The interpreter behind the one of the tests: it has pip, as people's own has. A nox that it may have is hidden.
PYTHON = str(Path(sys.executable).resolve())
START = """
import runpy, sys
sys.modules["nox"] = None
sys.argv = sys.argv[1:]
{first}
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# A module named venv that stands in for the real one: it makes a launcher in no time, whose Python is a shell script.
QUICK_VENV = """
import os, pathlib, sys
with open(os.environ["LOG"], "a") as log:
    log.write("venv\\n")
if gate := os.environ.get("GATE"):
    open(gate).read()
python = pathlib.Path(sys.argv[-1], "bin", "python")
python.parent.mkdir(parents=True, exist_ok=True)
python.write_text(os.environ["LAUNCHER"])
python.chmod(0o755)
"""
LAUNCHER = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]
then echo "$*" >> "$LOG"
else echo "started $*"; exit 7
fi
"""
BROKEN_LAUNCHER = """#!/bin/sh
echo "no such package"; exit 1
"""


class Checkout:
    """A folder with nothing but what a first run needs, and a folder of stand-ins for modules beside it."""

    def __init__(self, folder: Path, **modules: str) -> None:
        self.folder = folder / "checkout"
        self.folder.mkdir()
        for name in ("noxfile.py", "pyproject.toml"):
            (self.folder / name).write_bytes((ROOT / name).read_bytes())
        self.modules = folder / "modules"
        self.modules.mkdir()
        for name, source in modules.items():
            (self.modules / f"{name}.py").write_text(source)
        self.log = folder / "log"
        self.log.touch()
        self.nox = self.folder / ".nox"
        self.launcher = self.nox / "_launcher"
        self.noxfile = self.folder / "noxfile.py"

    def start(self, *arguments: str, first: str = "", **environment: str) -> subprocess.Popen[str]:
        """Run the noxfile in a Python without nox; `first` is Python to execute before."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NOX", "PYTHONPATH"))}
        if any(self.modules.iterdir()):
            inherited["PYTHONPATH"] = str(self.modules)
        return subprocess.Popen(
            [PYTHON, "-c", START.format(first=first), str(self.noxfile), *arguments],
            cwd=self.folder.parent,
            env={**inherited, "LOG": str(self.log), "LAUNCHER": LAUNCHER, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, first: str = "", **environment: str) -> tuple[int, str, str]:
        """Its exit code, standard output and standard error."""
        started = self.start(*arguments, first=first, **environment)
        out, err = started.communicate()
        return started.returncode, out, err

    def logged(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path, venv=QUICK_VENV)


@pytest.mark.timeout(180)
def test_the_first_run_makes_a_launcher_and_the_next_one_downloads_nothing(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    code, out, err = checkout.run("--list")
    assert code == 0, err
    assert "- demo ->" in out
    [line] = [line for line in err.splitlines() if "Fetching" in line]
    assert re.search(r"nox.* into \.nox/_launcher", line)
    assert {entry.name for entry in checkout.nox.iterdir()} == {"_launcher", "_launcher.lock"}

    code, out, err = checkout.run("--list", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert (code, "- demo ->" in out, "Fetching" in err) == (0, True, False)


@pytest.mark.timeout(180)
def test_without_venv_the_launcher_is_made_by_virtualenv_whose_path_no_session_inherits(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, venv="raise SystemExit('ensurepip is not available')")
    with checkout.noxfile.open("a") as file:
        file.write("""
    @nox.session(python=False)
    def path(session: nox.Session) -> None:
        print(os.environ["PYTHONPATH"])
""")
    code, out, err = checkout.run("-s", "path")
    assert code == 0, err
    assert out == f"{checkout.modules}\n"
    assert "ensurepip" not in err
    assert {entry.name for entry in checkout.nox.iterdir()} == {"_launcher", "_launcher.lock"}


def test_the_launcher_gets_nox_then_the_same_arguments_and_its_exit_code_is_the_run_s(checkout: Checkout) -> None:
    code, out, _ = checkout.run("-s", "demo", "--", "--url", "a b")
    assert checkout.logged() == ["venv", "-m pip install --quiet nox>=2025.5"]
    assert (code, out) == (7, f"started {checkout.noxfile} -s demo -- --url a b\n")


def test_a_complete_launcher_is_used_as_it_is(checkout: Checkout) -> None:
    checkout.run()
    made = checkout.logged()
    code, _, err = checkout.run()
    assert (code, err, checkout.logged()) == (7, "", made)


def test_a_launcher_of_another_python_is_made_again(checkout: Checkout) -> None:
    checkout.run()
    [marker] = checkout.launcher.glob("*.txt")
    mine = marker.read_text()
    marker.write_text(mine.replace("3.", "2."))
    checkout.run()
    assert checkout.logged().count("venv") == 2
    assert marker.read_text() == mine


def test_a_launcher_that_lost_its_interpreter_is_made_again(checkout: Checkout) -> None:
    checkout.run()
    (checkout.launcher / "bin" / "python").unlink()
    assert checkout.run()[0] == 7
    assert checkout.logged().count("venv") == 2


def test_of_two_first_runs_at_once_one_builds_and_both_go_on(checkout: Checkout, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    one, other = checkout.start(GATE=str(gate)), checkout.start(GATE=str(gate))
    for started in (one, other):
        assert started.stderr is not None
        assert "Fetching" in started.stderr.readline()
    with gate.open("w"):  # opens when the builder is waiting there, and lets it through
        pass
    for started in (one, other):
        out, _ = started.communicate()
        assert (started.returncode, out) == (7, f"started {checkout.noxfile}\n")
    assert checkout.logged().count("venv") == 1


def test_a_failed_step_says_what_failed_and_leaves_nothing(checkout: Checkout) -> None:
    code, out, err = checkout.run(LAUNCHER=BROKEN_LAUNCHER)
    assert (code, out) == (1, "")
    assert err.splitlines()[1:] == [
        "This command failed:",
        f"  {checkout.launcher}/bin/python -m pip install --quiet 'nox>=2025.5'",
        "no such package",
    ]
    assert not checkout.launcher.exists()


def test_when_virtualenv_cannot_be_had_either_nothing_is_left(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, venv="raise SystemExit(1)", pip="raise SystemExit('no such package')")
    code, _, err = checkout.run()
    assert code == 1
    assert f"-m pip install --quiet --target {checkout.nox / '_virtualenv'} virtualenv\nno such package" in err
    assert [entry.name for entry in checkout.nox.iterdir()] == ["_launcher.lock"]


def test_an_older_python_is_told_so_before_anything_else(checkout: Checkout) -> None:
    code, out, err = checkout.run(first="sys.version_info = (3, 10, 0)")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"This needs Python 3\.11 or newer; .*\n", err)
    assert not checkout.nox.exists()


def test_a_python_without_pip_is_told_where_to_get_it(checkout: Checkout) -> None:
    code, out, err = checkout.run(first="sys.modules['pip'] = None")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"This needs pip, .* sudo apt-get install python3-pip\n", err)
    assert not checkout.nox.exists()


def test_a_launcher_that_has_no_nox_does_not_start_itself_for_ever(checkout: Checkout) -> None:
    checkout.run()
    code, out, err = checkout.run(first=f"sys.prefix = {str(checkout.launcher)!r}")
    assert (code, out) == (1, "")
    assert "remove that folder" in err


def test_the_launcher_and_the_script_block_ask_for_the_same_nox() -> None:
    text = (ROOT / "noxfile.py").read_text("utf-8")
    [block] = re.findall(r"^# /// script\n(.*?)^# ///$", text, re.MULTILINE | re.DOTALL)
    script = tomllib.loads(block.replace("# ", ""))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    [constant] = re.findall(r'^NOX = "(.*)"$', text, re.MULTILINE)
    assert script["dependencies"] == [constant]
    assert script["requires-python"] == project["project"]["requires-python"]
    assert constant in project["dependency-groups"]["types"]


def test_ci_runs_the_test_command_of_the_readme_word_for_word() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    commands = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    demo, tests, *_ = [command for command in commands if command.startswith("python3 noxfile.py")]
    assert (demo, tests) == ("python3 noxfile.py -s demo", "python3 noxfile.py")
    assert tests in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
