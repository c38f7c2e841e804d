"""The README's program, the example and the one in the wheel are the same, and do what they say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quickstart_is_the_same_in_all_three_places() -> None:
    program = (ROOT / "examples/quickstart.py").read_text()
    assert (ROOT / "src/mindtrace/jobs/cli/quickstart.py").read_text() == program
    assert f"```python\n{program}```" in (ROOT / "README.md").read_text()


def test_the_demo_shows_a_published_job_a_retry_a_result_and_the_next_command() -> None:
    run = subprocess.run([sys.executable, "-m", "mindtrace.jobs", "demo"], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    words = [line.split()[0] for line in run.stdout.splitlines()]
    assert words == ["backend", "published", "run", "run", "next"]
    assert "sells tea for 4.50" in run.stdout
