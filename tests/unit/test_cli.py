"""The command line: what it prints, where, and with which exit status it ends."""

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mindtrace.jobs.cli import main

pytestmark = pytest.mark.local

QUICK = ("bench", "-n", "20")


@pytest.fixture(autouse=True)
def _no_url_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINDTRACE_JOBS_URL", "REDIS_URL", "AMQP_URL"):
        monkeypatch.delenv(name, raising=False)


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "mindtrace.jobs", *QUICK, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert run.returncode == 0
    assert json.loads(run.stdout)["plan"]["jobs"] == 20


def test_the_demo_ends_with_the_next_command_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("backend")
    assert "python3 noxfile.py" in last


def test_bench_prints_facts_and_then_a_line_for_each_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK]) == 0
    out, err = capsys.readouterr()
    facts, figures = out.split("\n\n")
    assert [line.split()[0] for line in facts.splitlines()] == ["machine", "backend", "plan"]
    assert [line[:28].rstrip() for line in figures.splitlines()] == [
        "publish, one at a time",
        "publish, 100 in flight",
        "publish, 1,000 a call",
        "process, 1 slot",
        "process, 10 slots",
        "process, 100 slots",
        "publish to run, when idle",
        "publish, blocking",
        "consume, blocking",
    ]
    assert all(line.startswith("measured: ") for line in err.splitlines())


def test_bench_shows_a_terminal_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["bench", "-n", "2000", "-c", "1"]) == 0
    assert re.search(r"\] measured: [0-6] of 7 figures \(\d+%\)", terminal.getvalue())
    assert terminal.getvalue().endswith("\r\033[K")


def test_bench_json_is_one_document_with_every_job_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--json", "--payload", "11"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["machine"]["cores"] >= 1
    assert document["backend"] == {"name": "local", "url": "local://", "durability": "memory"}
    assert document["plan"] == {"jobs": 20, "payload": 11, "slots": [1, 10, 100]}
    assert [figure["jobs"] for figure in document["figures"]] == [20] * 9
    for figure in document["figures"]:
        if "per_second" in figure:
            assert figure["per_second"] == pytest.approx(20 / figure["seconds"])
        else:
            assert 0 < figure["p50_ms"] <= figure["p99_ms"]


def test_bench_measures_the_one_concurrency_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "-c", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28].rstrip() for line in lines if line.startswith("process")] == ["process, 7 slots"]


def test_bench_writes_what_it_would_print_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*QUICK, "--json", "--out", str(tmp_path / "figures.json")]) == 0
    assert (tmp_path / "figures.json").read_text() == capsys.readouterr().out


def test_figures_that_cannot_be_written_are_printed_and_the_failure_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone" / "out")
    assert main([*QUICK, "--json", "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["figures"]) == 9
    assert "--out" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["bench", "--nonsense"], "--nonsense"),
        (["bench", "-n", "0"], "-n"),
        (["bench", "-n", "1000001"], "-n"),
        (["bench", "-n", "many"], "'many'"),
        (["bench", "-c", "0"], "-c"),
        (["bench", "-c", "1.5"], "-c"),
        (["bench", "--payload", "10"], "--payload"),
        (["bench", "--payload", "1048577"], "--payload"),
        (["bench", "-n", "1000000", "--payload", "1048576"], "1 GiB"),
        (["bench", "--out", "."], "--out"),
        (["bench", "--out", "no/such/folder/out.json"], "--out"),
        (["bench", "--out", "x" * 300], "--out"),
        (["bench", "--url", "nowhere://"], "nowhere://"),
        (["bench", "--url", "local"], "local"),
        (["bench", "--url", "local://["], "local://"),
    ],
)
def test_wrong_usage_is_exit_2_and_a_word_on_stderr(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(words)
    except SystemExit as left:  # how argparse leaves
        status = left.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert said in err


def test_the_url_comes_from_the_flag_and_then_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINDTRACE_JOBS_URL", "nowhere://")
    assert main([*QUICK]) == 2
    assert "nowhere://" in capsys.readouterr().err
    assert main([*QUICK, "--url", "local://"]) == 0


def test_a_password_in_the_url_is_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for scheme in ("local", "nowhere"):
        assert main([*QUICK, "--url", f"{scheme}://user:secret@here:1/0?password=secret"]) == 2
        assert "secret" not in "".join(capsys.readouterr())


def test_ctrl_c_ends_a_bench_with_130_and_no_traceback() -> None:
    command = [sys.executable, "-m", "mindtrace.jobs", "bench", "-n", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        while bench.stdout.readline().strip():  # the facts; behind them it measures
            pass
        bench.send_signal(signal.SIGINT)
        out, err = bench.communicate(timeout=30)
    *progress, last = err.splitlines()
    assert (bench.returncode, out, last) == (130, "", "interrupted")
    assert all(line.startswith("measured: 0 of ") for line in progress)
