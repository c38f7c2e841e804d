"""What the commands do with a broker, on each that there is."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mindtrace.jobs import QueueSpec

from .conftest import CANARY, Cli, Server

THREE = (("a", "rejected", "no 17 in stock"), ("b", "timeout", "too \x1b[2Jslow"), ("c", "rejected", "no 4 in stock"))


def test_status_counts_by_state_and_says_where_a_broker_cannot_know(cli: Cli, server: Server) -> None:
    server.publish("orders", "1", "2")
    server.bury("mails", *THREE)
    ended = cli("status", "-q", "orders", "-q", "mails")
    unknown = "0" if server.kind == "redis" else "-"
    assert (ended.status, ended.err) == (0, "")
    assert [line.split() for line in ended.lines] == [
        ["queue", "ready", "scheduled", "leased", "dead"],
        ["orders", "2", unknown, unknown, "0"],
        ["mails", "0", unknown, unknown, "3"],
    ]
    [_, mails] = json.loads(cli("status", "--json", "-q", "orders", "-q", "mails").out)
    count = 0 if server.kind == "redis" else None
    assert mails == {"queue": "mails", "ready": 0, "scheduled": count, "leased": count, "dead": 3}


def test_a_wrong_password_is_exit_4_and_shown_nowhere(cli: Cli, server: Server) -> None:
    place = urlsplit(server.url)
    ended = cli("status", "-q", "orders", "--url", f"{place.scheme}://nobody:{CANARY}@{place.hostname}:{place.port}")
    assert (ended.status, ended.out) == (4, "")
    [line] = ended.err.splitlines()
    assert "refuses" in line


def test_all_queues_are_those_of_the_broker_or_those_that_the_application_names(
    cli: Cli, server: Server, shop: Path
) -> None:
    server.declare(QueueSpec("orders", "priority", 5), QueueSpec("checkout", max_length=7))
    alone, with_app = cli("queues", "list"), cli("queues", "list", "--app", "shop:worker")
    if server.kind == "redis":
        assert [line.split() for line in alone.lines] == [
            ["queue", "kind", "priorities", "max", "length"],
            ["checkout", "fifo", "-", "7"],
            ["orders", "priority", "5", "-"],
        ]
        assert with_app == alone
    else:
        assert (alone.status, alone.out) == (2, "")
        assert "-q" in alone.err
        assert [line.split()[0] for line in with_app.lines] == ["queue", "checkout"]
        assert "the application names" in with_app.err


SEVERAL = """
import shop
from mindtrace.jobs import AsyncOrchestrator, Worker

def several():
    return Worker(AsyncOrchestrator(shop.backend()), [shop.Checkout(name) for name in ("checkout", "mails", "orders")])
"""


@pytest.mark.rabbitmq
def test_a_queue_that_the_application_names_and_has_not_declared_yet_hides_none_of_the_others(
    cli: Cli, on_rabbitmq: Server, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINDTRACE_JOBS_URL", on_rabbitmq.url)
    monkeypatch.setenv("MINDTRACE_JOBS_NAMESPACE", on_rabbitmq.namespace)
    (shop / "more.py").write_text(SEVERAL, "utf-8")
    on_rabbitmq.bury("mails", ("a", "rejected", "no"), ("b", "rejected", "no"))
    app = ("--app", "more:several")
    nothing = {"ready": None, "scheduled": None, "leased": None, "dead": None}

    status = cli("status", *app)
    assert (status.status, [line.split() for line in status.lines[1:]]) == (
        0,
        [["checkout", "-", "-", "-", "-"], ["mails", "0", "-", "-", "2"], ["orders", "-", "-", "-", "-"]],
    )
    rows = {row.pop("queue"): row for row in json.loads(cli("status", "--json", *app).out)}
    assert rows == {"checkout": nothing, "mails": {**nothing, "ready": 0, "dead": 2}, "orders": nothing}
    listed = cli("queues", "list", *app)
    assert (listed.status, [line.split()[0] for line in listed.lines[1:]]) == (0, ["mails"])
    letters = cli("dead", "list", *app)
    assert (letters.status, len(letters.lines)) == (0, 3)
    assert cli("dead", "show", "a", *app).status == 0
    assert cli("dead", "purge", "a", "--yes", *app).out == "1 job forgotten\n"
    replayed = cli("dead", "replay", "--all", *app)
    assert (replayed.status, replayed.out) == (0, "1 job put back\n")
    for ended in (status, listed, letters, replayed):
        assert [line for line in ended.err.splitlines() if "is not declared yet" in line] == [
            f"queue '{name}' is not declared yet: the application does that when it first uses it"
            for name in ("checkout", "orders")
        ]
    asked = cli("status", "-q", "checkout", *app)
    assert (asked.status, "no queue 'checkout'" in asked.err) == (1, True)


@pytest.mark.rabbitmq
def test_where_no_queue_of_the_application_is_declared_yet_there_is_nothing_to_show_or_to_destroy(
    cli: Cli, on_rabbitmq: Server, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINDTRACE_JOBS_URL", on_rabbitmq.url)
    monkeypatch.setenv("MINDTRACE_JOBS_NAMESPACE", on_rabbitmq.namespace)
    app = ("--app", "shop:worker")
    assert json.loads(cli("queues", "list", "--json", *app).out) == []
    assert cli("dead", "list", *app).status == 0
    assert cli("dead", "purge", "--all", *app).out == "0 jobs forgotten\n"
    assert cli("dead", "show", "a", *app).status == 1


@pytest.mark.parametrize("app", ["worker", "orchestrator", "blocking"])
def test_an_application_of_any_kind_brings_its_broker_its_schemas_and_its_queues(
    cli: Cli, server: Server, shop: Path, app: str
) -> None:
    schema = "order" if app == "orchestrator" else "checkout"
    published = cli("publish", schema, '{"item": "tea"}', "--app", f"shop:{app}", "--id", "one")
    assert (published.status, published.out, published.err) == (0, "one\n", "")
    refused = cli("publish", schema, '{"amount": "c4n4ry"}', "--app", f"shop:{app}")
    assert refused.status == 1
    assert "item: Field required" in refused.err
    assert "c4n4ry" not in refused.err
    unknown = cli("publish", schema[:-1], "{}", "--app", f"shop:{app}")
    assert unknown.status == 2
    assert f"did you mean '{schema}'?" in unknown.err
    assert cli("status", "--app", f"shop:{app}").lines[1].split()[:2] == ["checkout", "1"]
    assert server.ready("checkout") == ["one"]


PLAIN = """
from pydantic import BaseModel
from mindtrace.jobs import *

class Anything(BaseModel):
    pass

class Takes(AsyncConsumer):
    async def run(self, job_dict):
        return {}

def worker(**names):
    return Worker(AsyncOrchestrator(connect(**names)), [Takes("checkout")])

def blocking():
    jobs = Orchestrator.from_url()
    jobs.register(JobSchema("checkout", Anything))
    return jobs

def elsewhere():
    return worker(namespace="no-place")
"""


@pytest.mark.parametrize("app", ["worker", "blocking"])
@pytest.mark.parametrize("source", ["variable", "pyproject.toml"])
def test_an_application_that_names_no_namespace_is_in_that_of_the_settings(
    cli: Cli, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, app: str, source: str
) -> None:
    """So that all commands mean the same queue, with an application and without one."""
    (folder / "plain.py").write_text(PLAIN, "utf-8")
    server.declare(QueueSpec("checkout"))
    if source == "pyproject.toml":
        monkeypatch.delenv("MINDTRACE_JOBS_NAMESPACE")
        table = f'[tool.mindtrace-jobs]\nnamespace = "{server.namespace}"'
        (folder / "pyproject.toml").write_text(table, "utf-8")
    assert cli("publish", "checkout", "{}", "--app", f"plain:{app}", "--id", "one").out == "one\n"
    for words in ((), ("--app", f"plain:{app}")):
        assert cli("status", "-q", "checkout", *words).lines[1].split()[:2] == ["checkout", "1"]
    assert server.ready("checkout") == ["one"]


@pytest.mark.rabbitmq
def test_a_namespace_that_the_application_names_counts_before_that_of_the_settings(
    cli: Cli, on_rabbitmq: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "plain.py").write_text(PLAIN.replace("no-place", on_rabbitmq.namespace), "utf-8")
    monkeypatch.setenv("MINDTRACE_JOBS_URL", on_rabbitmq.url)
    monkeypatch.setenv("MINDTRACE_JOBS_NAMESPACE", "of-the-settings")
    assert cli("publish", "checkout", "{}", "--app", "plain:elsewhere", "--id", "one").out == "one\n"
    assert on_rabbitmq.ready("checkout") == ["one"]


def test_a_consumer_without_a_schema_takes_whatever_is_published_for_it(cli: Cli, server: Server, shop: Path) -> None:
    """Also before its worker was ever started, which makes the queue."""
    (shop / "mails.py").write_text(
        "from shop import *\n"
        "class Mails(AsyncConsumer):\n    async def run(self, job_dict): ...\n"
        "worker = Worker(AsyncOrchestrator(backend()), [Mails('mails'), Checkout('checkout')])",
        "utf-8",
    )
    published = cli("publish", "mails", '{"to": "anybody"}', "--app", "mails:worker", "--id", "one")
    assert (published.status, published.out) == (0, "one\n")
    assert published.err == "the consumer of 'mails' has no schema: the input is not validated\n"
    near = cli("publish", "mail", "{}", "--app", "mails:worker")
    assert (near.status, near.out) == (2, "")
    assert "no schema 'mail': did you mean 'mails'?" in near.err
    assert server.ready("mails") == ["one"]


def test_without_an_application_a_job_is_published_as_it_is_and_that_is_said(
    cli: Cli, server: Server, folder: Path
) -> None:
    server.declare(QueueSpec("orders", "priority"))
    (folder / "input.json").write_text('{"from": "a file"}', "utf-8")
    first = cli("publish", "tea", "@input.json", "-q", "orders", "--id", "1")
    assert (first.status, first.out) == (0, "1\n")
    assert "not validated" in first.err
    second = cli("publish", "tea", "-q", "orders", "--priority", "5", "--json", "--id", "2")
    assert json.loads(second.out) == {"id": "2", "queue": "orders", "schema": "tea"}
    assert server.ready("orders") == ["2", "1"]
    for words in (("[1]",), ('{"a"',), ("1",)):
        wrong = cli("publish", "orders", *words)
        assert wrong.status == 2
        assert "not a JSON object" in wrong.err


@pytest.mark.redis
def test_a_job_may_be_published_for_later(cli: Cli, on_redis: Server) -> None:
    on_redis.declare(QueueSpec("orders"))
    where = ("--url", on_redis.url, "--namespace", on_redis.namespace)
    at = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert cli("publish", "orders", "{}", "--delay", "5m", *where).status == 0
    assert cli("publish", "orders", "{}", "--at", at, *where).status == 0
    [orders] = json.loads(cli("status", "--json", *where).out)
    assert (orders["ready"], orders["scheduled"]) == (0, 2)


Stdin = Callable[..., None]


@pytest.fixture
def stdin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stdin]:
    """Has these lines come on stdin; what is no text, as JSON."""
    with ExitStack() as stack:

        def has(*lines: Any) -> None:
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
            (folder / "lines").write_text("\n".join(texts), "utf-8")
            monkeypatch.setattr(sys, "stdin", stack.enter_context((folder / "lines").open()))

        yield has


def test_a_bad_line_is_told_by_its_number_and_all_others_are_published(
    cli: Cli, server: Server, shop: Path, stdin: Stdin
) -> None:
    good = {"item": "tea"}
    stdin(good, "", {"amount": "c4n4ry"}, "c4n4ry", [good], good, {"item": "x" * 2**20}, good)
    ended = cli("publish", "checkout", "-", "--app", "shop:worker", "--id", "night", "--json")
    assert ended.status == 1
    said = ended.err.splitlines()
    assert [line.partition(":")[0] for line in said[:-1]] == ["line 3", "line 4", "line 5", "line 7"]
    assert "c4n4ry" not in ended.err
    assert said[-1] == "3 jobs published, 4 lines refused"
    assert [json.loads(line) for line in ended.lines] == [{"line": n, "id": f"night-{n}"} for n in (1, 6, 8)]
    assert server.ready("checkout") == ["night-1", "night-6", "night-8"]


def test_what_json_allows_and_no_job_can_carry_is_a_bad_line_as_well(cli: Cli, on_redis: Server, stdin: Stdin) -> None:
    on_redis.declare(QueueSpec("orders"))
    stdin('{"c4n4ry": 1e999}', '{"c4n4ry": ' * 150 + "1" + "}" * 150, '{"c4n4ry": "\\ud800"}', "{}")
    ended = cli("publish", "orders", "-", "--url", on_redis.url, "--namespace", on_redis.namespace)
    assert ended.status == 1
    assert [line.partition(":")[0] for line in ended.err.splitlines()[1:-1]] == ["line 1", "line 2", "line 3"]
    assert "c4n4ry" not in ended.err
    assert len(on_redis.ready("orders")) == 1


def test_lines_come_from_a_pipe_in_batches_and_may_be_skipped(
    cli: Cli, on_redis: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_redis.declare(QueueSpec("orders"))
    reading, writing = os.pipe()
    os.write(writing, b'{"n": 1}\n' * 1200 + b'{"n": 1}')  # the last line may lack its end
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        where = ("--url", on_redis.url, "--namespace", on_redis.namespace)
        ended = cli("publish", "orders", "-", "--id", "n", "--skip", "1199", *where)
    assert (ended.status, ended.err.splitlines()[-1]) == (0, "2 jobs published")
    assert on_redis.ready("orders") == ["n-1200", "n-1201"]


def test_a_failure_of_the_queue_ends_the_stream_and_says_how_to_go_on(cli: Cli, server: Server, stdin: Stdin) -> None:
    server.declare(QueueSpec("orders"))
    stdin({}, {})
    ended = cli("publish", "orders", "-", "-q", "ordres")
    assert ended.status == 1
    assert "0 jobs published" in ended.err
    assert "--skip 0" in ended.err
    assert "no queue 'ordres'" in ended.err
    assert ("did you mean 'orders'?" in ended.err) == (server.kind == "redis")


def test_clean_and_delete_need_a_yes_and_delete_spares_the_dead_unless_forced(cli: Cli, server: Server) -> None:
    server.bury("orders", THREE[0])
    server.publish("orders", "1", "2")
    for verb in ("clean", "delete"):
        asked = cli("queues", verb, "orders")
        assert (asked.status, asked.out) == (2, "")
        assert "--yes" in asked.err
    cleaned = cli("queues", "clean", "orders", "--yes", "--json")
    assert json.loads(cleaned.out) == {"queue": "orders", "cancelled": 2}
    refused = cli("queues", "delete", "orders", "--yes")
    assert refused.status == 1
    assert "dead" in refused.err
    assert cli("queues", "delete", "orders", "--yes", "--force").status == 0
    gone = cli("queues", "delete", "orders", "--yes", "--force")
    assert (gone.status, "no queue 'orders'" in gone.err) == (1, True)


@pytest.mark.redis
def test_a_person_at_a_terminal_types_the_name(cli: Cli, on_redis: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    on_redis.publish("orders", "1")
    where = ("--url", on_redis.url, "--namespace", on_redis.namespace)
    person, terminal = os.openpty()
    with os.fdopen(terminal, "r+b", 0) as raw, open(person, "wb", 0) as keys:
        monkeypatch.setattr(sys, "stdin", raw)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        keys.write(b"order\n")
        mistaken = cli("queues", "clean", "orders", *where)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        keys.write(b"orders\n")
        meant = cli("queues", "clean", "orders", *where)
    assert (mistaken.status, "nothing was done" in mistaken.err) == (1, True)
    assert (meant.status, meant.out) == (0, "1 job of orders cancelled\n")


def test_dead_letters_are_listed_in_pages_filtered_and_grouped(cli: Cli, server: Server) -> None:
    server.bury("orders", *THREE)
    server.bury("mails", ("d", "rejected", ""))
    both = ("-q", "orders", "-q", "mails")
    ended = cli("dead", "list", *both)
    assert [line.split()[0] for line in ended.lines] == ["id", "c", "b", "a", "d"]
    assert "too \\x1b[2Jslow" in ended.out
    pages, more = [], ("--limit", "2")
    while more:
        page = json.loads(cli("dead", "list", "--json", *both, "--limit", "2", *more).out)
        pages.append("".join(record["id"] for record in page["records"]))
        more = ("--cursor", page["cursor"]) if page["cursor"] else ()
    assert pages == ["cb", "ad"]
    assert [line.split()[0] for line in cli("dead", "list", *both, "--reason", "rejected").lines[1:]] == ["c", "a", "d"]
    assert cli("dead", "list", *both, "--schema", "mails").lines[1].split()[0] == "d"
    assert len(cli("dead", "list", *both, "--since", "1h").lines) == 5
    assert len(cli("dead", "list", *both, "--since", "2090-01-01T00:00Z").lines) == 1
    groups = json.loads(cli("dead", "list", *both, "--group", "--json").out)
    assert [(group["jobs"], group["queue"], group["reason"]) for group in groups] == [
        (2, "orders", "rejected"),
        (1, "mails", "rejected"),
        (1, "orders", "timeout"),
    ]
    assert groups[0]["error"] == "ShopError: no … in stock"


def test_a_dead_letter_is_shown_in_full_and_its_input_only_if_asked_for(cli: Cli, server: Server) -> None:
    server.bury("orders", *THREE)
    ended = cli("dead", "show", "b", "-q", "orders")
    assert ended.status == 0
    facts = dict(line.split(None, 1) for line in ended.lines)
    assert (facts["id"], facts["reason"], facts["number"]) == ("b", "timeout", "1")
    assert "too \\x1b[2Jslow" in ended.out
    assert '"of"' not in ended.out
    assert '"of": "b"' in cli("dead", "show", "b", "-q", "orders", "--payload").out
    record = json.loads(cli("dead", "show", "b", "-q", "orders", "--payload", "--json").out)
    assert (record["input"], record["errors"][0]["type"]) == ({"of": "b"}, "ShopError")
    none = cli("dead", "show", "x", "-q", "orders")
    assert (none.status, "'x'" in none.err) == (1, True)


def test_replay_puts_back_ids_a_filter_or_all_and_purge_forgets(cli: Cli, server: Server) -> None:
    server.bury("orders", *THREE, ("d", "timeout", "x"), ("e", "timeout", "x"))
    server.bury("mails", ("f", "timeout", "x"))
    both = ("-q", "orders", "-q", "mails")
    some = cli("dead", "replay", "c", "zz", "f", *both)
    assert (some.status, some.out) == (1, "2 jobs put back\n")
    assert "'zz'" in some.err
    assert server.ready("mails") == ["f"]
    limited = cli("dead", "replay", "--reason", "timeout", "--limit", "2", "--rate", "1000/s", "--json", *both)
    assert json.loads(limited.out) == {"jobs": 2, "missing": []}
    assert server.ready("orders") == ["c", "b", "d"]
    asked = cli("dead", "purge", "--all", *both)
    assert (asked.status, "--yes" in asked.err) == (2, True)
    assert cli("dead", "purge", "e", "--yes", *both).out == "1 job forgotten\n"
    assert server.dead("orders") == ["a"]
    assert cli("dead", "replay", "--all", *both).out == "1 job put back\n"
    assert cli("dead", "replay", "--all", *both).out == "0 jobs put back\n"


@pytest.mark.redis
def test_many_ids_are_found_among_all(cli: Cli, on_redis: Server) -> None:
    on_redis.bury("orders", *((f"j{n}", "rejected", "") for n in range(9)))
    where = ("--url", on_redis.url, "--namespace", on_redis.namespace)
    ended = cli("dead", "replay", *(f"j{n}" for n in range(4)), *where)
    assert (ended.status, ended.out) == (0, "4 jobs put back\n")
    assert len(on_redis.dead("orders")) == 5
