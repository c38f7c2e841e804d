"""The README's Python, run block by block from top to bottom as a reader would, in one namespace; and its facts."""

import asyncio
import inspect
import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import mindtrace.jobs
from mindtrace.jobs import ConfigError, Depth, Job, JobSchema, LocalClient, LocalConsumerBackend, RetryPolicy, Worker
from mindtrace.jobs.wire import HEADERS_LIMIT, PAYLOAD_LIMIT, Envelope, decode, encode

pytestmark = pytest.mark.local

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


class Reader:
    """Someone who runs the page from its top, and sees what each `run` on it was given and returned."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "readme"}
        self.runs: list[tuple[dict[str, Any], Any]] = []
        self.interrupted = 0
        self._ran = threading.Event()
        self._left = list(BLOCKS)

    def read(self, up_to: str = "") -> "Reader":
        """Run the blocks up to the first that contains this text; without, all that are left."""
        while self._left:
            block = self._left.pop(0)
            endless = "consumer.consume()\n" in block
            with self.watched(), self._ctrl_c_once_idle() if endless else _nothing():
                try:
                    exec(compile(block, "README.md", "exec"), self.names)  # noqa: S102 (our own page)
                except KeyboardInterrupt:
                    self.interrupted += 1
            if up_to and up_to in block:
                return self
        assert not up_to, f"no block has {up_to!r}"
        return self

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the runs that this thread makes; the page stays as it is."""

        def watch(frame: FrameType, event: str, value: Any) -> None:
            code = frame.f_code
            if event == "return" and (code.co_filename, code.co_name) == ("README.md", "run"):
                self.runs.append((frame.f_locals["job_dict"], value))
                self._ran.set()

        sys.setprofile(watch)
        try:
            yield
        finally:
            sys.setprofile(None)

    @contextmanager
    def _ctrl_c_once_idle(self) -> Iterator[None]:
        """For a block that consumes without end: one job for it, then Ctrl-C."""
        started = threading.Event()
        told = logging.Handler()
        told.emit = lambda record: started.set() if record.getMessage().startswith("worker ") else None
        log = logging.getLogger("mindtrace.jobs")
        main = threading.get_ident()

        def interrupt() -> None:
            assert started.wait(10)
            jobs, queue = self.names["orchestrator"], self.names["consumer"].job_type_name
            self._ran.clear()
            jobs.publish(queue, Job(name="sum", schema_name="sum", input_data={"operation": "add", "a": 1, "b": 2}))
            assert self._ran.wait(10)
            while jobs.depth(queue) != Depth(0, 0, 0, 0):
                pass
            signal.pthread_kill(main, signal.SIGINT)

        helper = threading.Thread(target=interrupt)
        before, level = signal.signal(signal.SIGINT, signal.default_int_handler), log.level
        log.addHandler(told)
        log.setLevel(logging.INFO)
        try:
            helper.start()
            yield
        finally:
            helper.join()
            log.setLevel(level)
            log.removeHandler(told)
            signal.signal(signal.SIGINT, before)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_every_block_of_the_page_runs() -> None:
    reader = Reader().read()
    assert reader.interrupted == 1
    asyncio.run(reader.names["test_a_product_is_computed"]())
    assert len(BLOCKS) >= 9


def test_the_basic_example_computes_its_product_and_leaves_nothing_behind() -> None:
    reader = Reader().read("consumer.consume(num_messages=1)")
    assert [value["operation_performed"] for _, value in reader.runs] == ["multiply(7.0, 3.0) = 21.0"]
    assert reader.names["orchestrator"].depth("maths_operations") == Depth(0, 0, 0, 0)


def test_what_a_run_is_given() -> None:
    [(job_dict, _)] = Reader().read("consumer.consume(num_messages=1)").runs
    assert {type(value) for value in job_dict.values()} <= {str, int, dict}
    assert set(job_dict) == set(re.findall(r"`(\w+)`", README.split("- `job_dict` has")[1].split(", as JSON")[0]))


def test_a_consumer_connects_where_no_schema_is_known_and_inputs_are_not_checked() -> None:
    """The whole numbers stay whole: no model has turned them into floats. Then Ctrl-C ends the endless `consume()`."""
    reader = Reader().read("# Same orchestrator and consumer code")
    assert reader.runs[-1][1]["operation_performed"] == "add(1, 2) = 3"
    assert reader.interrupted == 1


def test_the_backend_is_detected() -> None:
    names = Reader().read("# Automatically detects backend type").names
    assert type(names["orchestrator"].backend) is LocalClient
    assert type(names["consumer"].consumer_backend) is LocalConsumerBackend
    assert type(names["orchestrator"].create_consumer_backend_for_schema(names["schema"])) is LocalConsumerBackend


def test_higher_priorities_are_consumed_first_by_a_consumer_of_an_orchestrator_that_knows_no_schema() -> None:
    reader = Reader().read("background_job, priority=1")
    reader.runs.clear()
    consumer = reader.names["MathsConsumer"]("priority_tasks")
    consumer.connect(reader.names["orchestrator"])
    with reader.watched():
        assert consumer.consume(num_messages=3) == 3
    assert [job_dict["priority"] for job_dict, _ in reader.runs] == [10, 5, 1]
    assert [value["result"] for _, value in reader.runs] == [1024.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["Consumer", "Orchestrator"])
def test_the_reference_tells_the_signatures_as_they_are(name: str) -> None:
    documented, real = Reader().read("def receive_message").names[name], getattr(mindtrace.jobs, name)
    for method, function in inspect.getmembers(documented, inspect.isfunction):
        told = inspect.signature(function).parameters
        if method == "run":  # a user's to write
            assert list(told) == ["self", "job_dict"]
            continue
        is_so = inspect.signature(getattr(real, method)).parameters
        assert [(p.name, p.kind, p.default) for p in told.values()] == [
            (p.name, p.kind, p.default) for p in is_so.values()
        ], method


def test_the_json_of_the_page_is_a_job() -> None:
    [example] = re.findall(r"^```json\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    envelope = decode(example.encode(), PAYLOAD_LIMIT)
    assert isinstance(envelope, Envelope)
    assert (envelope.schema_name, envelope.input_data["operation"]) == ("maths_operations", "multiply")


def test_the_table_of_the_wire_format_has_every_key_there_is() -> None:
    everything = Envelope("id", "name", "schema", {}, 1, 2, 3, {"k": "v"}, 4.0, RetryPolicy(max_attempts=5))
    table = README.split("## Wire format")[1].split("## ")[0]
    told = [key for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    assert sorted(told) == sorted(json.loads(encode(everything, PAYLOAD_LIMIT)))


def test_the_table_of_defaults_says_what_the_code_does() -> None:
    worker = {name: parameter.default for name, parameter in inspect.signature(Worker).parameters.items()}
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", README.split("## Defaults")[1], re.MULTILINE))
    assert rows["attempts"] == str(RetryPolicy().max_attempts)
    assert rows["crashes until a job is dead"] == str(RetryPolicy().crash_limit)
    assert rows["timeout of a run"] == f"none in `consume()`; {worker['timeout'] / 60:g} min in a `Worker`"
    assert rows["jobs at once"] == f"1 in `consume()`; {worker['concurrency']} in a `Worker`"
    assert rows["lease"].startswith(f"{worker['lease']:g} s")
    assert rows["drain at a stop"].startswith(f"{worker['drain']:g} s")
    assert rows["input"] == f"at most {PAYLOAD_LIMIT // 2**20} MiB of JSON"
    assert rows["headers"] == f"at most {HEADERS_LIMIT // 2**10} KiB of JSON"


@pytest.mark.parametrize("name", ["a" * 128, "a" * 129, "9._-", ".a", "a b", "", "ä"])
def test_the_pattern_of_queue_names_is_the_one_in_use(name: str) -> None:
    [pattern] = re.findall(r"\| queue name \| `(.*?)`", README)
    try:
        accepted = JobSchema(name, Job).queue == name
    except ConfigError:
        accepted = False
    assert accepted == bool(re.fullmatch(pattern, name))


def test_every_link_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert link in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_the_page_names_every_session_and_every_example() -> None:
    sessions = re.findall(r"@nox\.session.*?\n\s+def (\w+)\(", (ROOT / "noxfile.py").read_text("utf-8"))
    contributing = README.split("## Contributing")[1]
    assert sessions
    assert [name for name in sessions if f"`{name}`" not in contributing and f"-s {name}" not in README] == []
    examples = [f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")]
    assert [path for path in examples if f"({path})" not in README.split("## Examples")[1]] == []
