"""`worker` whose jobs run in processes that die: by their own hand, for want of memory, by whoever kills them.

Only the job itself is run again for it. Its neighbours go on, and the probes say so all the time.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import pytest

from mindtrace.jobs import DeadRecord

pytestmark = [pytest.mark.chaos, pytest.mark.fault]

CRASH_LIMIT = 5  # the default
GOOD = 1000
ON_BOTH = pytest.mark.parametrize(
    "site",
    [
        pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.uses_broker("redis")]),
        pytest.param("rabbitmq", marks=[pytest.mark.rabbitmq, pytest.mark.uses_broker("rabbitmq")]),
    ],
    indirect=True,
)

APP = """
import os, resource, signal, time
from pathlib import Path
from app import *
from mindtrace.jobs import Consumer, RetryPolicy, current_job

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants to look at what is left

def note(what):
    job = current_job()
    with open("ledger", "ab", buffering=0) as file:  # one call: whole lines, whoever else writes
        file.write(f"{what} {job.queue} {job.id} {job.attempt}\\n".encode())

class InProcess(Consumer):
    executor = "process"
    retry = RetryPolicy(base=0)

    def run(self, job_dict):
        note("start")
        match job_dict["input_data"].get("how"):
            case "abort":
                os.abort()
            case "killed":  # as the system does when memory runs out
                os.kill(os.getpid(), signal.SIGKILL)
            case "limit":  # of 300 MiB that its consumer allows it reaches about 110
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)
                fill()
            case "greedy":
                fill()
            case "gate":
                wait_for_gate()
        note("done")

class Small(InProcess):
    max_memory = 300

class InThread(Consumer):
    def run(self, job_dict):
        note("start")
        wait_for_gate()
        note("done")

class OnLoop(AsyncConsumer):
    async def run(self, job_dict):
        note("start")
        await asyncio.to_thread(wait_for_gate)
        note("done")

def fill():
    held = []
    while True:
        held.append(os.urandom(1024) * 1024)

def wait_for_gate():
    while not Path("gate").exists():
        time.sleep(0.01)

poisoned = Worker(an_orchestrator(), [InProcess("jobs")], concurrency=2)
mixed = Worker(
    an_orchestrator(),
    [Small("jobs"), InProcess("processes"), InThread("threads"), OnLoop("loop")],
    concurrency=5,
)
"""


@pytest.fixture
def site(request: pytest.FixtureRequest, site_on: Callable[[str], Any]) -> Any:
    """On a broker of this kind."""
    site = site_on(request.getfixturevalue(f"{request.param}_url"))
    site.write(APP, "process_jobs.py")
    return site


class Watch(threading.Thread):
    """Asks the probes all the time, and remembers what they say."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.said = Counter[tuple[str, int]]()
        self.most_running = 0
        self._port, self._over = port, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            for path in ("/livez", "/readyz"):
                connection = HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", path)
                response = connection.getresponse()
                told = json.loads(response.read())
                connection.close()
                self.said[path, response.status] += 1
                self.most_running = max(self.most_running, told.get("running", 0))

    def end(self) -> Counter[tuple[str, int]]:
        self._over.set()
        self.join(10)
        assert not self.is_alive()
        return self.said


def ledger(site: Any) -> Counter[tuple[str, str]]:
    """How often a job was begun and ended, by step and id."""
    path = site.folder / "ledger"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter((line.split()[0], line.split()[2]) for line in lines)


def dead(site: Any, queue: str = "jobs") -> list[DeadRecord]:
    async def look(orchestrator: Any) -> list[DeadRecord]:
        return list((await orchestrator.dead_letters(queue).list()).records)

    return list(site.ask(look))


@ON_BOTH
@pytest.mark.timeout(120)
def test_a_poison_job_among_a_thousand_takes_no_other_and_no_worker_with_it(
    site: Any, until: Callable[..., None]
) -> None:
    """Each good one is run once: only the process of the poison job dies, and the four that supervise it live on."""
    good = site.publish(GOOD // 4)
    [poison] = site.publish(how="abort")
    good += site.publish(GOOD - GOOD // 4)
    command = site.start("process_jobs:poisoned", "--processes", "4", "--health-port", "0")
    port = command.port()
    for number in (1, 2, 3, 4):
        command.err.until(f"worker {number} started")
    command.err.until("done in")
    watch = Watch(port)
    watch.start()
    until(lambda: sum(step == "done" for step, _ in ledger(site)) == GOOD and dead(site), within=60.0)
    until(lambda: site.depth().ready == 0)
    assert {status for _, status in watch.end()} == {200}
    command.send(15)
    assert command.status() == 0

    counts = ledger(site)
    assert counts == Counter({("start", poison): CRASH_LIMIT}) + Counter(
        {(step, job_id): 1 for step in ("start", "done") for job_id in good}
    )
    [record] = dead(site)
    assert (record.message.id, record.reason) == (poison, "crash_limit")
    assert (record.attempts, record.crashes) == (CRASH_LIMIT, CRASH_LIMIT)
    assert "SIGABRT" in record.errors[-1].message
    assert len(command.children()) == 4  # none was replaced


@ON_BOTH
def test_jobs_that_fill_memory_end_alone_and_the_probes_stay_green(site: Any, until: Callable[..., None]) -> None:
    """By a limit of the process, by `max_memory`, and killed as by the system; beside them one of each other kind."""
    others = [site.publish(queue=queue, how="gate")[0] for queue in ("processes", "threads", "loop")]
    command = site.start("process_jobs:mixed", "--health-port", "0")
    watch = Watch(command.port())
    until(lambda: all(ledger(site)["start", job_id] for job_id in others))
    watch.start()
    ids = {how: site.publish(how=how)[0] for how in ("limit", "greedy", "killed")}
    after = site.publish(20)
    until(lambda: len(dead(site)) == 3 and all(ledger(site)["done", job_id] for job_id in after), within=40.0)
    assert {status for _, status in watch.end()} == {200}
    assert watch.most_running >= 4
    assert not any(ledger(site)["done", job_id] for job_id in others)
    site.gate().touch()
    until(lambda: all(ledger(site)["done", job_id] for job_id in others))
    command.send(15)
    assert command.status() == 0

    counts = ledger(site)
    assert all((counts["start", job_id], counts["done", job_id]) == (1, 1) for job_id in (*others, *after))
    records = {record.message.id: record for record in dead(site)}
    ends = {how: (records[ids[how]].reason, records[ids[how]].crashes, counts["start", ids[how]]) for how in ids}
    assert ends == {
        "limit": ("attempts", 0, 3),
        "greedy": ("crash_limit", CRASH_LIMIT, CRASH_LIMIT),
        "killed": ("crash_limit", CRASH_LIMIT, CRASH_LIMIT),
    }
    assert records[ids["limit"]].errors[-1].type == "MemoryError"
    assert "max_memory=300" in records[ids["greedy"]].errors[-1].message
    assert "SIGKILL, as the system does when memory runs out" in records[ids["killed"]].errors[-1].message
    assert "Traceback" not in "\n".join(command.err.all())
