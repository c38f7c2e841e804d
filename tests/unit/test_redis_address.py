"""Which Redis is meant: the URLs that are taken, those that are refused, and that no text ever shows a password."""

# ruff: noqa: S105, S106 (passwords of nothing)

import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import ConfigError, LocalBackend, LocalClient, Orchestrator, RedisBackend, RedisClient, connect
from mindtrace.jobs.backends.redis.address import Address

often = settings(deadline=None, database=None)

SECRET = "c4n4ry-pa55word"


# --- what a URL says


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://", Address()),
        ("redis://localhost:6379/0", Address("localhost", 6379, 0)),
        ("redis://localhost", Address("localhost")),
        ("redis://:6380", Address("localhost", 6380)),
        ("redis:///3", Address("localhost", db=3)),
        ("redis://redis.example.org:7000/15", Address("redis.example.org", 7000, 15)),
        ("redis://redis.example.org/", Address("redis.example.org")),
        ("redis://10.0.0.7:0", Address("10.0.0.7", 0)),
        ("redis://10.0.0.7:65535", Address("10.0.0.7", 65535)),
        ("redis://[::1]:6380/1", Address("::1", 6380, 1)),
        ("redis://:secret@host", Address("host", password="secret")),
        ("redis://jobs:secret@host/2", Address("host", db=2, username="jobs", password="secret")),
        ("redis://jobs@host", Address("host", username="jobs")),
        ("redis://a%40b:%3A%2F%3F%23%40%25@host", Address("host", username="a@b", password=":/?#@%")),
        ("redis://:s:e:c@host", Address("host", password="s:e:c")),
        ("redis://:p+w@host", Address("host", password="p+w")),
        ("rediss://host", Address("host", tls=True)),
        ("rediss://jobs:secret@host:6380/1", Address("host", 6380, 1, "jobs", "secret", tls=True)),
        (
            "rediss://host?ssl_ca_certs=/etc/ca.pem&ssl_certfile=me.pem&ssl_keyfile=my%20key.pem",
            Address("host", tls=True, ca_certs="/etc/ca.pem", certfile="me.pem", keyfile="my key.pem"),
        ),
    ],
)
def test_a_url_says_where_and_how_to_log_in(url: str, address: Address) -> None:
    assert Address.of_url(url) == address


@often
@given(
    username=st.text(min_size=1),
    password=st.text(min_size=1),
    host=st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
    port=st.integers(0, 65535),
    db=st.integers(0, 2**31 - 1),
    tls=st.booleans(),
)
def test_whatever_a_login_is_made_of_it_arrives_when_it_is_quoted(
    username: str, password: str, host: str, port: int, db: int, tls: bool
) -> None:
    login = "".join(f"%{byte:02X}" for byte in username.encode("utf-8", "replace"))
    login += ":" + "".join(f"%{byte:02X}" for byte in password.encode("utf-8", "replace"))
    known = [text.encode("utf-8", "replace").decode() for text in (username, password)]
    address = Address.of_url(f"{'rediss' if tls else 'redis'}://{login}@{host}:{port}/{db}")
    assert address == Address(host, port, db, *known, tls=tls)


def test_only_the_word_for_it_switches_verification_off() -> None:
    assert not Address.of_url("rediss://host").allow_insecure
    assert Address.of_url("rediss://host", allow_insecure=True).allow_insecure
    with pytest.raises(ConfigError, match="and nothing else"):
        Address.of_url("rediss://host?ssl_cert_reqs=none")


# --- what is refused

OPENED_BY: list[Callable[[str], object]] = [
    Address.of_url,
    connect,
    RedisBackend.from_url,
    RedisClient.from_url,
    Orchestrator.from_url,
]

BAD: dict[str, str] = {
    "a port that is a word": f"redis://:{SECRET}@host:port/0",
    "a port that is too high": f"redis://:{SECRET}@host:65536",
    "a port below 0": f"redis://:{SECRET}@host:-1",
    "a password with a slash in it": f"redis://:{SECRET}/x@host",
    "a password with a question mark in it": f"redis://:{SECRET}?x@host",
    "digits and a question mark in it": f"redis://:12?{SECRET}@host",
    "digits, a question mark and more in it": f"redis://:12?{SECRET}&x=1@host",
    "a hash in it": f"redis://:12#{SECRET}@host",
    "a fragment": f"redis://:{SECRET}@host/0#there",
    "a password with a bracket in it": f"redis://:{SECRET}[x@host",
    "a password where the port belongs": f"redis://host:{SECRET}",
    "a password where the database belongs": f"redis://host/{SECRET}",
    "a database that is a word": f"redis://:{SECRET}@host/jobs",
    "a database below 0": f"redis://:{SECRET}@host/-1",
    "a database in other digits": f"redis://:{SECRET}@host/\N{SUPERSCRIPT TWO}",
    "a database that no server has": f"redis://:{SECRET}@host/{2**31}",
    "a database of 5,000 digits": f"redis://:{SECRET}@host/{'9' * 5000}",
    "two paths": f"redis://:{SECRET}@host/0/1",
    "a query that the driver would obey": f"redis://:{SECRET}@host?host=elsewhere",
    "another": f"redis://:{SECRET}@host/0?socket_timeout=0.1",
    "a password in the query": f"redis://host?password={SECRET}",
    "certificates for a connection that is not encrypted": f"redis://:{SECRET}@host?ssl_ca_certs=/etc/ca.pem",
    "half an address of version 6": f"redis://:{SECRET}@[::1/0",
}
OF_NO_BACKEND = {
    "another broker": f"postgres://user:{SECRET}@host",
    "no scheme": f"user:{SECRET}@host:6379",
    "a scheme in capitals": f"REDIS://:{SECRET}@host",
    "one slash": f"redis:/:{SECRET}@host",
    "a socket": f"unix://:{SECRET}@/tmp/redis.sock",
    "something behind local": f"local://:{SECRET}@host",
}


def shown(error: BaseException) -> str:
    """All that could come to stand in a log."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.__cause__)


@pytest.mark.parametrize("opened_by", OPENED_BY, ids=lambda function: function.__qualname__)
@pytest.mark.parametrize("url", BAD.values(), ids=BAD)
def test_a_url_that_is_none_is_refused_before_anything_is_sent_and_its_password_is_not_shown(
    url: str, opened_by: Callable[[str], object]
) -> None:
    with pytest.raises(ConfigError) as refused:
        opened_by(url)
    assert SECRET not in shown(refused.value)
    assert str(refused.value)


@pytest.mark.parametrize("opened_by", [connect, Orchestrator.from_url], ids=lambda function: function.__qualname__)
@pytest.mark.parametrize("url", OF_NO_BACKEND.values(), ids=OF_NO_BACKEND)
def test_a_url_of_no_backend_is_refused_and_its_password_is_not_shown(
    url: str, opened_by: Callable[[str], object]
) -> None:
    with pytest.raises(ConfigError) as refused:
        opened_by(url)
    assert SECRET not in shown(refused.value)


@often
@given(st.text(max_size=30), st.text(max_size=10))
@example("@", "")
@example("12?", "")
@example("12#", "")
@example("", "?host=elsewhere")
@example("", "]")
def test_whatever_a_url_is_it_is_taken_or_refused_as_a_config_error_without_the_password(
    before: str, after: str
) -> None:
    try:
        address = Address.of_url(f"redis://:{before}{SECRET}{after}@host")
        text = f"{address}{address!r}"
    except ConfigError as error:
        text = shown(error)
    assert SECRET not in text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        *(({"port": value}, "port=") for value in (-1, 65536, 6379.0, "6379", True, None)),
        *(({"db": value}, "db=") for value in (-1, 2**31, 0.0, "0", False, None)),
        *(({"host": value}, "host") for value in ("", "a b", "user@host", "redis://host", "host/0", "a\n")),
        *(({"max_stall": value}, "max_stall=") for value in (0, -1.0, "600", True, float("nan"))),
        *(({"namespace": value}, "namespace") for value in ("", "a:b", "a{b}", ".a", "a" * 65, "a b", 7)),
    ],
)
@pytest.mark.parametrize("kind", [RedisBackend, RedisClient])
def test_a_value_out_of_its_range_is_refused_by_name_when_it_is_made(
    kind: Any, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word) as refused:
        kind(**options, password=SECRET)
    assert SECRET not in shown(refused.value)


# --- what is shown

LOGIN = {"username": "jobs", "password": SECRET, "tls": True, "keyfile": "/etc/my.key"}


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address(), "redis://localhost:6379/0"),
        (Address("::1", 6380, 1), "redis://[::1]:6380/1"),
        (Address("host", 6380, 1, **LOGIN), "rediss://host:6380/1"),
    ],
)
def test_an_address_is_shown_without_its_login(address: Address, text: str) -> None:
    assert str(address) == text
    assert f"{address}" == text
    assert SECRET not in repr(address)


@pytest.mark.parametrize(
    "made",
    [
        RedisBackend("host", 6380, 1, password=SECRET, tls=True),
        RedisBackend.from_url(f"rediss://:{SECRET}@host:6380/1"),
        connect(f"rediss://jobs:{SECRET}@host:6380/1"),
    ],
)
def test_a_backend_is_shown_with_its_address_and_namespace_and_no_login(made: object) -> None:
    assert repr(made) == "<RedisBackend rediss://host:6380/1 namespace=mtj>"
    assert str(made) == repr(made)


def test_a_client_and_an_orchestrator_show_no_login() -> None:
    client = RedisClient(password=SECRET)
    orchestrator = Orchestrator.from_url(f"redis://:{SECRET}@host")
    for value in (client, orchestrator, orchestrator.backend):
        assert SECRET not in f"{value} {value!r}"


# --- which backend it is


@pytest.mark.parametrize("url", [None, "", "local://"])
def test_without_a_url_jobs_stay_in_this_process(url: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINDTRACE_JOBS_URL", raising=False)
    assert type(connect(url)) is LocalBackend
    assert type(Orchestrator.from_url(url).backend) is LocalClient


@pytest.mark.parametrize("url", ["redis://host:6380/1", "rediss://host:6380/1"])
def test_a_url_given_or_in_the_environment_picks_redis(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these connects: it is said when it is opened whether there is a server."""
    shown = f"<RedisBackend {url} namespace=mtj>"
    assert repr(connect(url)) == shown
    assert type(Orchestrator.from_url(url).backend) is RedisClient
    monkeypatch.setenv("MINDTRACE_JOBS_URL", url)
    assert repr(connect()) == shown
    assert type(Orchestrator.from_url().backend) is RedisClient
    assert type(connect("local://")) is LocalBackend


def test_a_namespace_given_or_in_the_environment_counts_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDTRACE_JOBS_NAMESPACE", "shop")
    assert repr(connect("redis://host")) == "<RedisBackend redis://host:6379/0 namespace=shop>"
    assert repr(connect("redis://host", namespace="mine")) == "<RedisBackend redis://host:6379/0 namespace=mine>"
    assert type(connect("local://")) is LocalBackend  # which has none
    monkeypatch.setenv("MINDTRACE_JOBS_NAMESPACE", "a shop")
    with pytest.raises(ConfigError, match="namespace='a shop'"):
        connect("redis://host")


def test_what_the_orchestrator_is_told_beside_the_url_counts() -> None:
    with pytest.raises(ConfigError, match="payload_limit=0"):
        Orchestrator.from_url("redis://", payload_limit=0)
    with pytest.raises(ConfigError, match="speed"):
        Orchestrator.from_url("redis://", require={"speed"})
