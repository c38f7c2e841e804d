"""The comparison itself: that it runs and judges; what it finds is for `nox -s bench`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.local
def test_the_comparison_judges_every_target_and_only_strict_makes_a_miss_a_failure() -> None:
    command = [sys.executable, str(Path(__file__).with_name("compare.py")), "-n", "100", "--rounds", "1", "--strict"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = run.stdout.splitlines()
    judged = [line.split()[0] for line in lines if re.search(r"  (met|missed)$", line)]
    assert sorted(set(judged)) == ["P10", "P12", "P14", "P9"], run.stderr
    assert run.returncode == any(line.endswith("missed") and line.startswith("P") for line in lines)
