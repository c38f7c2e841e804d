"""Which RabbitMQ is meant: the URLs that are taken, those that are refused, and that no text ever shows a password."""

# ruff: noqa: S105 (passwords of nothing)

import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mindtrace.jobs import ConfigError, Orchestrator, RabbitMQBackend, RabbitMQClient, connect
from mindtrace.jobs.backends.rabbitmq.address import Address

often = settings(deadline=None, database=None)

SECRET = "c4n4ry-pa55word"


# --- what a URL says


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("amqp://", Address()),
        ("amqp://localhost:5672/", Address("localhost", 5672)),
        ("amqp://guest:guest@localhost", Address("localhost", None, "guest", "guest")),
        ("amqp://:5673", Address("localhost", 5673)),
        ("amqp://host", Address("host")),
        ("amqp://host/", Address("host")),
        ("amqp://host/%2F", Address("host")),
        ("amqp://host/%2f", Address("host")),
        ("amqp://host/jobs", Address("host", virtual_host="jobs")),
        ("amqp://host/a%2Fb%20c", Address("host", virtual_host="a/b c")),
        ("amqp://host/%252F", Address("host", virtual_host="%2F")),
        ("amqp:///jobs", Address("localhost", virtual_host="jobs")),
        ("amqp://10.0.0.7:65535", Address("10.0.0.7", 65535)),
        ("amqp://[::1]:5673/jobs", Address("::1", 5673, virtual_host="jobs")),
        ("amqp://jobs:secret@host", Address("host", None, "jobs", "secret")),
        ("amqp://jobs@host", Address("host", None, "jobs")),
        ("amqp://jobs:@host", Address("host", None, "jobs", "")),
        ("amqp://:secret@host", Address("host", None, "", "secret")),
        ("amqp://a%40b:%3A%2F%3F%23%40%25@host", Address("host", None, "a@b", ":/?#@%")),
        ("amqp://a:s:e:c@host", Address("host", None, "a", "s:e:c")),
        ("amqp://a:p+w@host", Address("host", None, "a", "p+w")),
        ("amqps://host", Address("host", tls=True)),
        ("amqps://jobs:secret@host:5673/a", Address("host", 5673, "jobs", "secret", "a", True)),
        (
            "amqps://host?cafile=/etc/ca.pem&certfile=me.pem&keyfile=my%20key.pem",
            Address("host", tls=True, ca_certs="/etc/ca.pem", certfile="me.pem", keyfile="my key.pem"),
        ),
    ],
)
def test_a_url_says_where_and_how_to_log_in(url: str, address: Address) -> None:
    assert Address.of_url(url) == address


@pytest.mark.parametrize(
    "option", [{"port": 0}, {"host": None}, {"password": 7}, {"username": b"user"}, {"virtual_host": None}], ids=repr
)
def test_what_is_no_text_and_no_port_is_refused_at_once_and_not_shown(option: dict[str, Any]) -> None:
    [(name, value)] = option.items()
    with pytest.raises(ConfigError, match=f"{name}[:=]") as error:
        RabbitMQBackend(**option)
    assert name == "port" or repr(value) not in str(error.value)


@pytest.mark.parametrize(("tls", "port", "real"), [(False, None, 5672), (True, None, 5671), (True, 5672, 5672)])
def test_the_port_is_the_usual_one_unless_it_is_given(tls: bool, port: int | None, real: int) -> None:
    assert Address(port=port, tls=tls).real_port == real


@often
@given(
    username=st.text(min_size=1),
    password=st.text(min_size=1),
    host=st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
    port=st.integers(1, 65535),
    virtual_host=st.text(min_size=1, max_size=60),
    tls=st.booleans(),
)
@example("a", "%2F+ &=", "host", 5672, "/", False)
def test_whatever_a_login_is_made_of_it_arrives_when_it_is_quoted(
    username: str, password: str, host: str, port: int, virtual_host: str, tls: bool
) -> None:
    texts = [text.encode("utf-8", "replace") for text in (username, password, virtual_host)]
    quoted = ["".join(f"%{byte:02X}" for byte in text) for text in texts]
    known = [text.decode() for text in texts]
    address = Address.of_url(f"{'amqps' if tls else 'amqp'}://{quoted[0]}:{quoted[1]}@{host}:{port}/{quoted[2]}")
    assert address == Address(host, port, *known, tls=tls)
    login = address.login()
    assert [login.user, login.password, login.host, login.port] == [*known[:2], host, port]


@often
@given(heartbeat=st.integers(1, 3600), tls=st.booleans())
def test_the_driver_is_told_the_heartbeat_and_nothing_else_that_a_url_could_say(heartbeat: int, tls: bool) -> None:
    login = Address(heartbeat=heartbeat, tls=tls).login()
    assert dict(login.query) == {"heartbeat": str(heartbeat)}
    assert login.scheme == ("amqps" if tls else "amqp")


def test_only_the_word_for_it_switches_verification_off() -> None:
    assert not Address.of_url("amqps://host").allow_insecure
    assert Address.of_url("amqps://host", allow_insecure=True).allow_insecure
    for query in ("no_verify_ssl=1", "verify=0"):
        with pytest.raises(ConfigError, match="and nothing else"):
            Address.of_url(f"amqps://host?{query}")
    strict, lax = Address(tls=True).context(), Address(tls=True, allow_insecure=True).context()
    assert strict is not None
    assert lax is not None
    assert (strict.check_hostname, lax.check_hostname) == (True, False)
    assert (strict.verify_mode.name, lax.verify_mode.name) == ("CERT_REQUIRED", "CERT_NONE")
    assert Address().context() is None


# --- what is refused

OPENED_BY: list[Callable[[str], object]] = [
    Address.of_url,
    connect,
    RabbitMQBackend.from_url,
    RabbitMQClient.from_url,
    Orchestrator.from_url,
]

BAD: dict[str, str] = {
    "a port that is a word": f"amqp://a:{SECRET}@host:port/",
    "a port that is too high": f"amqp://a:{SECRET}@host:65536",
    "a port below 0": f"amqp://a:{SECRET}@host:-1",
    "a password with a slash in it": f"amqp://a:{SECRET}/x@host",
    "digits and a slash in it": f"amqp://a:12/{SECRET}@host",
    "a password with a question mark in it": f"amqp://a:{SECRET}?x@host",
    "digits and a question mark in it": f"amqp://a:12?{SECRET}@host",
    "digits, a question mark and more in it": f"amqp://a:12?{SECRET}&x=1@host",
    "a hash in it": f"amqp://a:12#{SECRET}@host",
    "a fragment": f"amqp://a:{SECRET}@host/jobs#there",
    "a password with a bracket in it": f"amqp://a:{SECRET}[x@host",
    "a password where the port belongs": f"amqp://host:{SECRET}",
    "two paths": f"amqp://a:{SECRET}@host/jobs/1",
    "a slash too many": f"amqp://a:{SECRET}@host//",
    "a virtual host with a longer name than there is": f"amqp://a:{SECRET}@host/{'%C3%A9' * 128}",
    "a query that the driver would obey": f"amqp://a:{SECRET}@host?heartbeat=0",
    "another": f"amqps://a:{SECRET}@host/?no_verify_ssl=1",
    "a third": f"amqp://a:{SECRET}@host/?auth=external",
    "a password in the query": f"amqp://host?password={SECRET}",
    "certificates for a connection that is not encrypted": f"amqp://a:{SECRET}@host?cafile=/etc/ca.pem",
    "half an address of version 6": f"amqp://a:{SECRET}@[::1/",
    "a host with a space": f"amqp://a:{SECRET}@a b",
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


@pytest.mark.parametrize("scheme", ["redis", "http", "AMQP+x", "amqp091", ""])
def test_a_url_of_something_else_is_refused_and_its_password_is_not_shown(scheme: str) -> None:
    for opened_by in (Address.of_url, RabbitMQBackend.from_url, RabbitMQClient.from_url):
        with pytest.raises(ConfigError) as refused:
            opened_by(f"{scheme}://user:{SECRET}@host")
        assert SECRET not in shown(refused.value)


@often
@given(st.text(max_size=30), st.text(max_size=10))
@example("@", "")
@example("12?", "")
@example("12#", "")
@example("12/", "")
@example("", "?host=elsewhere")
@example("", "]")
def test_whatever_a_url_is_it_is_taken_or_refused_as_a_config_error_without_the_password(
    before: str, after: str
) -> None:
    try:
        address = Address.of_url(f"amqp://a:{before}{SECRET}{after}@host")
        text = f"{address}{address!r}"
    except ConfigError as error:
        text = shown(error)
    assert SECRET not in text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        *(({"port": value}, "port=") for value in (-1, 65536, 5672.0, "5672", True)),
        *(({"host": value}, "host") for value in ("", "a b", "user@host", "amqp://host", "host/jobs", "a\n")),
        *(({"virtual_host": value}, "virtual_host") for value in ("", "a" * 256, "é" * 128)),
        *(({"heartbeat": value}, "heartbeat=") for value in (0, -1, 3601, 10.0, "10", True, None)),
        *(({"max_stall": value}, "max_stall=") for value in (0, -1.0, "600", True, float("nan"))),
        *(({"namespace": value}, "namespace") for value in ("", "a:b", "a{b}", ".a", "a" * 65, "a b", 7)),
    ],
)
@pytest.mark.parametrize("kind", [RabbitMQBackend, RabbitMQClient])
def test_a_value_out_of_its_range_is_refused_by_name_when_it_is_made(
    kind: Any, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word) as refused:
        kind(**options, password=SECRET)
    assert SECRET not in shown(refused.value)


# --- what is shown

LOGIN = {"username": f"jobs-{SECRET}", "password": SECRET, "tls": True, "keyfile": f"/etc/{SECRET}.key"}


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address(), "amqp://localhost:5672/"),
        (Address("::1", 5673, virtual_host="a/b c"), "amqp://[::1]:5673/a%2Fb%20c"),
        (Address("host", **LOGIN), "amqps://host:5671/"),
    ],
)
def test_an_address_is_shown_without_its_login(address: Address, text: str) -> None:
    assert str(address) == text
    assert f"{address}" == text
    assert SECRET not in repr(address)


@pytest.mark.parametrize(
    "made",
    [
        RabbitMQBackend("host", 5673, "jobs", SECRET, virtual_host="a", tls=True),
        RabbitMQBackend.from_url(f"amqps://jobs:{SECRET}@host:5673/a"),
        connect(f"amqps://jobs:{SECRET}@host:5673/a"),
    ],
)
def test_a_backend_is_shown_with_its_address_and_namespace_and_no_login(made: object) -> None:
    assert repr(made) == "<RabbitMQBackend amqps://host:5673/a namespace=mtj>"
    assert str(made) == repr(made)


def test_a_client_and_an_orchestrator_show_no_login() -> None:
    client = RabbitMQClient(password=SECRET)
    orchestrator = Orchestrator.from_url(f"amqp://a:{SECRET}@host")
    for value in (client, orchestrator, orchestrator.backend):
        assert SECRET not in f"{value} {value!r}"


@pytest.mark.parametrize("url", ["amqp://host:5673/a", "amqps://host:5673/a"])
def test_a_url_given_or_in_the_environment_picks_rabbitmq(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these connects: it is said when it is opened whether there is a server."""
    shown = f"<RabbitMQBackend {url} namespace=mtj>"
    assert repr(connect(url)) == shown
    assert type(Orchestrator.from_url(url).backend) is RabbitMQClient
    monkeypatch.setenv("MINDTRACE_JOBS_URL", url)
    assert repr(connect()) == shown
    assert type(Orchestrator.from_url().backend) is RabbitMQClient
