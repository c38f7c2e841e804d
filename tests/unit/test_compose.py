"""compose.yaml and the set-up of both brokers on the README: safe, local to this machine, the same flags everywhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import REDIS_DURABILITY, Machine

ROOT = Path(__file__).parents[2]
FILE = ROOT / "compose.yaml"
TEXT = FILE.read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
FOR_TESTS = [name for name, service in SERVICES.items() if "test" in service.get("profiles", ())]
FOR_PEOPLE = [name for name in SERVICES if name not in FOR_TESTS]
REDIS = ["redis", "redis-test"]
RABBITMQ = ["rabbitmq", "rabbitmq-test"]

PINNED = r"[a-z][a-z/]*:\d+\.\d+(\.\d+)*(-[a-z][\w.-]*)?"

# What the file says so far. A key misspelt is none of these, and compose would refuse it.
KEYS = {"command", "healthcheck", "image", "mem_limit", "ports", "profiles", "restart", "tmpfs", "volumes"}
KEYS |= {"configs", "environment", "hostname", "stop_grace_period"}
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}


def flags(words: Sequence[str]) -> dict[str, str]:
    """What a Redis is set to by its arguments."""
    assert all(name.startswith("--") for name in words[::2]), words
    named = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    assert len(named) == len(words) / 2, f"one of {words} stands there twice"
    return named


def mebibytes(size: str) -> int:
    """Redis writes mb and Docker m; both mean 2^20 bytes."""
    found = re.fullmatch(r"(\d+)mb?", size)
    assert found, size
    return int(found[1])


def bash_lines() -> list[str]:
    """What the README has people type into a shell, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_up_starts_the_two_brokers_and_nothing_else() -> None:
    assert COMPOSE["name"] == "mindtrace-jobs"
    assert [name for name, service in SERVICES.items() if not service.get("profiles")] == ["redis", "rabbitmq"]


@pytest.mark.parametrize("name", FOR_PEOPLE)
def test_every_port_is_published_on_loopback_and_can_be_moved(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z_]+_PORT:-\d+\}:\d+", port), port


def test_redis_is_at_its_usual_port_unless_told_otherwise() -> None:
    assert SERVICES["redis"]["ports"] == ["127.0.0.1:${REDIS_PORT:-6379}:6379"]


def test_rabbitmq_is_at_its_usual_ports_unless_told_otherwise() -> None:
    ports = ["127.0.0.1:${AMQP_PORT:-5672}:5672", "127.0.0.1:${AMQP_UI_PORT:-15672}:15672"]
    assert SERVICES["rabbitmq"]["ports"] == ports


def test_no_two_services_share_a_port() -> None:
    ports = [port for name in FOR_PEOPLE for port in SERVICES[name]["ports"]]
    outside = [re.split(r":-|\}", port)[i] for port in ports for i in (0, 1)]
    assert len(set(outside)) == len(outside)


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_pinned_to_a_minor_version_and_can_be_replaced(name: str) -> None:
    image = re.fullmatch(r"\$\{([A-Z_]+)_IMAGE:-(.+)\}", SERVICES[name]["image"])
    assert image
    assert image[1] == name.removesuffix("-test").upper()
    assert re.fullmatch(PINNED, image[2]), image[2]


def test_the_valkey_that_is_named_is_pinned_too() -> None:
    [image] = re.findall(r"^#.* REDIS_IMAGE=(\S+) docker compose up -d --wait", TEXT, re.MULTILINE)
    assert re.fullmatch(PINNED, image)
    assert image.startswith("valkey/valkey:8.")


@pytest.mark.parametrize("name", REDIS)
def test_redis_is_started_with_the_flags_that_keep_jobs(name: str) -> None:
    """No program stands before them: Valkey's is called otherwise, and each image gives up root only for its own."""
    assert flags(SERVICES[name]["command"]) == {**REDIS_DURABILITY, "maxmemory": "256mb"}


@pytest.mark.parametrize("name", REDIS)
def test_redis_has_room_for_its_memory_twice_and_for_its_files_on_tmpfs(name: str) -> None:
    """Twice, since a fork rewrites the append-only file; a container over its limit is killed without a word."""
    service = SERVICES[name]
    data = mebibytes(flags(service["command"])["maxmemory"])
    files = sum(mebibytes(mount.partition("size=")[2]) for mount in service.get("tmpfs", ()))
    assert mebibytes(service["mem_limit"]) > 2 * data + files


@pytest.mark.parametrize("name", REDIS)
def test_redis_is_healthy_once_it_answers_without_an_error(name: str) -> None:
    """Without -e, redis-cli calls it a success that the data is still being loaded."""
    health = SERVICES[name]["healthcheck"]
    assert health["test"] == ["CMD", "redis-cli", "-e", "ping"]
    assert (health["interval"], health["timeout"], health["retries"]) == ("2s", "2s", 15)


@pytest.mark.parametrize("name", RABBITMQ)
def test_rabbitmq_is_healthy_once_it_listens_and_has_time_to_stop(name: str) -> None:
    service = SERVICES[name]
    health = service["healthcheck"]
    assert health["test"] == ["CMD", "rabbitmq-diagnostics", "-q", "check_port_connectivity"]
    assert (health["start_period"], service["stop_grace_period"]) == ("20s", "30s")


@pytest.mark.parametrize("name", RABBITMQ)
def test_rabbitmq_has_the_user_of_the_snippets_unless_told_otherwise(name: str) -> None:
    """Not guest, who may log in only from inside the container; and what the private brokers tell compose."""
    told = {"RABBITMQ_DEFAULT_USER": "user", "RABBITMQ_DEFAULT_PASS": "password"}
    assert SERVICES[name]["environment"] == {key: f"${{{key}:-{value}}}" for key, value in told.items()}


@pytest.mark.parametrize("name", RABBITMQ)
def test_rabbitmq_has_limits_of_its_own_and_a_name_that_stays(name: str) -> None:
    """Its data folder is named after its host: with a name of Docker's making a new container would find no jobs."""
    service = SERVICES[name]
    assert service["hostname"] == "rabbitmq"
    [config] = service["configs"]
    assert config["target"].startswith("/etc/rabbitmq/conf.d/")
    lines = COMPOSE["configs"][config["source"]]["content"].splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "disk_free_limit.absolute = 50MB",
        "vm_memory_high_watermark.relative = 0.6",
    ]
    assert [line for line in lines if line.startswith("# consumer_timeout = ")]


@pytest.mark.parametrize("name", RABBITMQ)
def test_rabbitmq_has_room_for_its_files_on_tmpfs(name: str) -> None:
    service = SERVICES[name]
    files = sum(mebibytes(mount.partition("size=")[2]) for mount in service.get("tmpfs", ()))
    assert mebibytes(service["mem_limit"]) - files >= 1024


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check_a_memory_limit_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"]
    assert mebibytes(service["mem_limit"])
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize(("name", "folder"), [("redis", "/data"), ("rabbitmq", "/var/lib/rabbitmq")])
def test_a_broker_keeps_its_data_in_a_volume(name: str, folder: str) -> None:
    assert SERVICES[name]["volumes"] == [f"{name}-data:{folder}"]
    assert f"{name}-data" in COMPOSE["volumes"]


@pytest.mark.parametrize("name", FOR_TESTS)
def test_what_is_for_tests_has_no_port_of_its_own_and_no_data_on_disk(name: str) -> None:
    """So that any number of them run beside each other, and beside those for people."""
    service = SERVICES[name]
    assert service["profiles"] == ["test"]
    assert all(re.fullmatch(r"127\.0\.0\.1::\d+", port) for port in service["ports"])
    assert "volumes" not in service
    assert "container_name" not in service


@pytest.mark.parametrize(("name", "folder"), [("redis-test", "/data"), ("rabbitmq-test", "/var/lib/rabbitmq")])
def test_a_broker_for_tests_has_its_data_on_tmpfs(name: str, folder: str) -> None:
    [mount] = SERVICES[name]["tmpfs"]
    assert mount.startswith(f"{folder}:size=")


# Docker, in as far as the private brokers talk to it: it reads the file, and "publishes" a port where a Redis is.
DOCKER = """
import sys, yaml

match sys.argv[1:]:
    case ["info", *_]:
        print("27.0")
    case ["compose", "version"]:
        pass
    case ["compose", "--file", file, "--project-name", _, "--profile", profile, *command]:
        with open(file) as text:
            services = yaml.safe_load(text)["services"]
        services = {name: told for name, told in services.items() if profile in told.get("profiles", [profile])}
        match command:
            case ["config", "--services"]:
                print(*services, sep="\\n")
            case ["up", "--detach", "--wait", name]:
                sys.exit(name not in services)
            case ["port", name, inside]:
                [port] = [port for port in services[name]["ports"] if port.endswith(f":{inside}")]
                print(port.removesuffix(inside).removesuffix(":") + "PORT")
            case ["down", "--volumes"]:
                pass
            case _:
                sys.exit(2)
    case _:
        sys.exit(2)
"""


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_the_private_brokers_find_the_redis_for_tests(tmp_path: Path) -> None:
    with brokers.redis(private=True) as inside, brokers.redis(machine=with_docker(tmp_path, inside.url)) as broker:
        assert (broker.source, broker.url) == ("docker compose", inside.url)


@pytest.mark.rabbitmq
@pytest.mark.uses_broker("rabbitmq")
def test_the_private_brokers_find_the_rabbitmq_for_tests(tmp_path: Path, rabbitmq_url: str) -> None:
    port = urlsplit(rabbitmq_url).port
    with brokers.rabbitmq(machine=with_docker(tmp_path, rabbitmq_url)) as broker:
        assert (broker.source, broker.url) == ("docker compose", f"amqp://user:password@127.0.0.1:{port}/")


def with_docker(folder: Path, url: str) -> Machine:
    """A machine that has nothing but Docker, and this server in it."""
    script, docker = folder / "docker.py", folder / "bin" / "docker"
    script.write_text(DOCKER.replace("PORT", str(urlsplit(url).port)))
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(script)])} "$@"\n')
    docker.chmod(0o755)
    return Machine(environ={"PATH": str(docker.parent), "MTJ_TEST_APT": "0"}, root=folder, compose=FILE)


def test_compose_takes_every_word_of_the_file() -> None:
    """Its plugin says so, where there is one. What would stop it elsewhere is looked for by hand, and always."""
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"configs", "name", "services", "volumes"}
    for service in SERVICES.values():
        assert set(service) <= KEYS
        assert set(service["healthcheck"]) <= HEALTH_KEYS
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= set(COMPOSE["volumes"])
        assert {config["source"] for config in service.get("configs", ())} <= set(COMPOSE["configs"])
        assert all(type(word) is str for word in service.get("command", ()))
    docker = shutil.which("docker")
    if docker and run(docker, "compose", "version").returncode == 0:
        told = run(docker, "compose", "--file", str(FILE), "--profile", "test", "config", "--quiet")
        assert told.returncode == 0, told.stderr


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Without the variables that compose would read."""
    theirs = ("AMQP_", "COMPOSE_", "RABBITMQ_", "REDIS_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_the_sdist_has_the_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert f"/{FILE.name}" in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


# The README.

SETUPS = [
    """**Setup Redis:**
```bash
# Local installation
redis-server

# Using Docker
docker run -d --name redis -p 6379:6379 redis:latest

# Test connection
redis-cli ping\x20
```
""",
    """**Setup RabbitMQ:**
```bash
# Using Docker (recommended)
docker run -d --name rabbitmq -p 5672:5672 -p 15672:15672 -e RABBITMQ_DEFAULT_USER=user\
 -e RABBITMQ_DEFAULT_PASS=password rabbitmq:3-management
```
""",
]


@pytest.mark.parametrize("setup", SETUPS, ids=["redis", "rabbitmq"])
def test_the_set_up_that_people_know_is_on_the_readme_word_for_word(setup: str) -> None:
    assert setup in README


def test_the_readme_starts_redis_with_the_flags_that_keep_jobs() -> None:
    [line] = [line for line in bash_lines() if line.startswith("redis-server ")]
    assert flags(shlex.split(line)[1:]) == REDIS_DURABILITY


@pytest.mark.parametrize(
    ("name", "variable", "url"),
    [("redis", "REDIS_PORT", "redis://{}/0"), ("rabbitmq", "AMQP_PORT", "amqp://user:password@{}/")],
)
def test_the_readme_starts_compose_and_names_where_that_broker_is(name: str, variable: str, url: str) -> None:
    assert f"docker compose up -d --wait {name}" in bash_lines()
    urls = [line.partition("=")[2] for line in bash_lines() if line.startswith("export MINDTRACE_JOBS_URL=")]
    port, *_ = SERVICES[name]["ports"]
    assert url.format(re.sub(rf"\$\{{{variable}:-(\d+)\}}", r"\1", port).rsplit(":", 1)[0]) in urls
