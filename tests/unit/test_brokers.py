"""The private brokers: every step of the chain, and what is left when they end. Real servers where one is started."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import pytest
from redis import Redis
from redis.exceptions import TimeoutError as NoReply

from mindtrace.jobs.testing import brokers
from mindtrace.jobs.testing.brokers import REDIS_DURABILITY, Broker, BrokerUnavailable, Machine

LOOPBACK, V6_LOOPBACK = "0100007F", "00000000000000000000000001000000"  # as in /proc/net
OTHER_POLICY = b"#!/bin/sh\nexit 0\n"


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    """A machine with no program on PATH and nothing in the environment, on which we are root."""
    for folder in ("bin", "root/etc", "root/usr/sbin"):
        (tmp_path / folder).mkdir(parents=True)
    environ = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    return Machine(environ=environ, root=tmp_path / "root", euid=0, compose=tmp_path / "compose.yaml")


def with_program(machine: Machine, name: str, script: str) -> Path:
    """Put a shell script on this machine's PATH."""
    return executable(Path(machine.environ["PATH"]) / name, script)


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def with_environ(machine: Machine, **environ: str) -> Machine:
    return replace(machine, environ={**machine.environ, **environ})


def real(*programs: str) -> str:
    found = [path for program in programs if (path := shutil.which(program))]
    assert found, f"none of {programs} is on PATH"
    return found[0]


def redis_program() -> str:
    """There once the chain has run: `uses_broker` sees to that, and keeps the time it takes out of the test's."""
    return os.environ.get("REDIS_SERVER") or real("redis-server", "valkey-server")


@contextlib.contextmanager
def client(url: str, **options: float) -> Generator[Redis]:
    connected = Redis.from_url(url, decode_responses=True, **options)
    try:
        yield connected
    finally:
        connected.close()


def listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((str(parts.hostname), parts.port or 0), 1.0).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:
        return True  # it died as we came: the next look will find nobody
    return True


def _processes(directory: Path) -> Generator[Path]:
    """Every process of this machine that works in the directory, or was started with its name."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end as we look
            traces = [str((process / "cwd").readlink()).encode()]
            traces += [(process / name).read_bytes() for name in ("cmdline", "environ")]
            if int(process.name) != os.getpid() and any(str(directory).encode() in trace for trace in traces):
                yield process


def processes_of(directory: Path) -> list[str]:
    """Their command lines."""
    found: list[str] = []
    for process in _processes(directory):
        with contextlib.suppress(OSError):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def listening_addresses(directory: Path) -> set[str]:
    """Where they accept connections: the addresses as the kernel writes them."""
    sockets: set[str] = set()
    for process in _processes(directory):
        for handle in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(str(handle.readlink()))
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    listening = "0A"
    return {row[1].partition(":")[0] for row in rows if row[3] == listening and f"socket:[{row[9]}]" in sockets}


def until(condition: Callable[[], bool], within: float = 10.0) -> None:
    """For what another process does after ours has ended: nothing tells us of it."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture
def answering() -> Generator[Callable[[bytes], int]]:
    """Ports of servers that say one thing to whoever connects, and hang up."""
    with contextlib.ExitStack() as stack:

        def serve(reply: bytes) -> int:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def once() -> None:
                line, _ = listener.accept()
                with line:
                    line.recv(1024)
                    line.sendall(reply)

            thread = threading.Thread(target=once)
            thread.start()
            stack.callback(thread.join)
            return int(listener.getsockname()[1])

        yield serve


# Redis.


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_a_redis_of_our_own_keeps_jobs_and_listens_on_loopback_alone() -> None:
    with brokers.redis(private=True) as broker, client(broker.url) as redis:
        assert broker.kind == "redis"
        assert broker.source in ("local binary", "apt-get")
        assert broker.version == redis.info("server")["redis_version"]
        assert {name: redis.config_get(name)[name] for name in REDIS_DURABILITY} == dict(REDIS_DURABILITY)
        assert broker.directory
        assert listening_addresses(broker.directory) == {LOOPBACK}


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_what_was_written_survives_a_kill_and_an_orderly_restart() -> None:
    with brokers.redis(private=True) as broker, client(broker.url) as redis:
        redis.set("job", "1")
        broker.kill()
        assert not listens(broker.url)
        broker.restart()
        assert redis.get("job") == "1"
        first = redis.info("server")["process_id"]
        broker.restart()
        assert redis.get("job") == "1"
        assert redis.info("server")["process_id"] != first


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_a_stopped_redis_is_silent_until_it_is_continued_and_can_be_closed_while_stopped() -> None:
    with brokers.redis(private=True) as broker, client(broker.url, socket_timeout=0.1) as redis:
        assert redis.ping()
        broker.stop()
        with pytest.raises(NoReply):
            redis.ping()
        broker.cont()
        until(redis.ping)
        broker.stop()


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_nothing_is_left_of_a_closed_redis_and_closing_twice_is_harmless() -> None:
    broker = brokers.redis(private=True)
    assert broker.directory
    assert any("redis-server" in command for command in processes_of(broker.directory))
    broker.close()
    broker.close()
    assert not listens(broker.url)
    assert not broker.directory.exists()
    assert processes_of(broker.directory) == []
    with pytest.raises(RuntimeError, match="cannot be restarted: it is closed"):
        broker.restart()


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_two_redis_at_once_share_nothing() -> None:
    with brokers.redis(private=True) as one, brokers.redis(private=True) as other:
        assert one.url != other.url
        assert one.directory != other.directory
        with client(one.url) as here, client(other.url) as there:
            here.set("job", "1")
            one.kill()
            assert there.dbsize() == 0


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_settings_replace_ours_and_imply_a_private_server(bare: Machine) -> None:
    machine = with_environ(bare, REDIS_URL="redis://127.0.0.1:1/0", REDIS_SERVER=redis_program())
    with brokers.redis(settings={"appendfsync": "always", "maxmemory": "1mb"}, machine=machine) as broker:
        with client(broker.url) as redis:
            assert redis.config_get("appendfsync") == {"appendfsync": "always"}
            assert redis.config_get("maxmemory") == {"maxmemory": "1048576"}
        assert broker.source == "local binary"


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_a_password_in_the_url_is_used_and_shown_nowhere(bare: Machine) -> None:
    with brokers.redis(private=True) as own, client(own.url) as redis:
        redis.config_set("requirepass", "s3cret")
        right = own.url.replace("://", "://default:s3cret@")
        broker = brokers.redis(machine=with_environ(bare, REDIS_URL=right))
        assert broker.version == own.version
        assert "s3cret" not in repr(broker)
        for wrong in ("://:wr0ng@", "://"):
            machine = with_environ(bare, REDIS_URL=own.url.replace("://", wrong))
            with pytest.raises(BrokerUnavailable, match=r"WRONGPASS|NOAUTH") as raised:
                brokers.redis(machine=machine)
            assert "wr0ng" not in str(raised.value)
        redis.config_set("requirepass", "")


# However we end.

TELL = "print(r.url, r.directory, flush=True)"


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)", "0"])
def test_a_server_ends_with_the_process_that_forgot_it(end: str) -> None:
    script = (
        f"import os, signal; from mindtrace.jobs.testing import brokers as b; r = b.redis(private=True); {TELL}; {end}"
    )
    told = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=30).stdout
    url, directory = told.split()
    until(lambda: not listens(url) and not Path(directory).exists() and not processes_of(Path(directory)))


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_a_forked_child_leaves_the_server_to_its_parent() -> None:
    script = f"""
import os, sys
from mindtrace.jobs.testing import brokers
r = brokers.redis(private=True)
child = os.fork()
if not child:
    sys.exit()  # runs what the parent left for the end of the interpreter
os.waitpid(child, 0)
r.restart()
{TELL}
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], stdout=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 0
    assert not listens(done.stdout.split()[0])


def test_a_server_whose_files_cannot_be_written_leaves_no_directory(tmp_path: Path) -> None:
    """In a process of its own: the temporary directory of this one is also that of the brokers it starts now."""
    executable(tmp_path / "bin/rabbitmq-server", "exit 1")
    script = "from mindtrace.jobs.testing.brokers import rabbitmq; rabbitmq(settings={'default_vhost': chr(0xD800)})"
    environ = {**os.environ, "TMPDIR": str(tmp_path), "RABBITMQ_SERVER": str(tmp_path / "bin/rabbitmq-server")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True, timeout=30)
    assert "UnicodeEncodeError" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "bin"]


# The chain: environment.


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_a_redis_of_the_environment_is_taken_and_left_as_it_is(bare: Machine) -> None:
    with brokers.redis(private=True) as own, client(own.url) as redis:
        redis.set("theirs", "1")
        with brokers.redis(machine=with_environ(bare, REDIS_URL=own.url)) as broker:
            assert (broker.url, broker.source, broker.directory) == (own.url, "environment", None)
            for harm in (broker.kill, broker.stop, broker.cont, broker.restart):
                with pytest.raises(RuntimeError, match="it comes from environment: ask for private=True"):
                    harm()
        assert redis.get("theirs") == "1"


@pytest.mark.rabbitmq
def test_a_rabbitmq_of_the_environment_is_taken_from_two_variables(bare: Machine, rabbitmq_url: str) -> None:
    for machine in (
        with_environ(bare, AMQP_URL=rabbitmq_url, RABBITMQ_URL="amqp://127.0.0.1:1/"),
        with_environ(bare, AMQP_URL="", RABBITMQ_URL=rabbitmq_url),
    ):
        broker = brokers.rabbitmq(machine=machine)
        assert (broker.url, broker.source) == (rabbitmq_url, "environment")
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", broker.version)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (
            "redis://me:s3cret@127.0.0.1:1/0?password=s3cret",
            "no Redis answers at redis://127.0.0.1:1: Connection refused",
        ),
        ("unix:///nowhere/redis.sock", "no Redis answers at unix:///nowhere/redis.sock: No such file or directory"),
        ("redis://:s3/cret@127.0.0.1/0", "it is not a URL of the form redis://host:port/0"),
        ("redis://me:1/s3cret@127.0.0.1/0", "it is not a URL of the form redis://host:port/0"),
        ("127.0.0.1:6379", "it is not a URL of the form redis://host:port/0"),
        ("amqp://127.0.0.1:1/", "it is not a URL of the form redis://host:port/0"),
    ],
)
def test_a_url_that_is_set_and_wrong_fails_at_once_and_keeps_its_password(bare: Machine, url: str, why: str) -> None:
    """Although a server program is there: going on would hide the mistake."""
    with_program(bare, "redis-server", "exit 1")
    with pytest.raises(BrokerUnavailable) as raised:
        brokers.redis(machine=with_environ(bare, REDIS_URL=url))
    assert str(raised.value) == (
        f"No Redis for the tests. $REDIS_URL is set, but {why}\n"
        "Start that server or correct the URL; without REDIS_URL the tests look for one themselves."
    )
    assert raised.value.tried == ()
    assert raised.value.__context__ is None


def test_a_server_that_is_no_redis_or_no_rabbitmq_is_not_taken_for_one(
    bare: Machine, answering: Callable[[bytes], int]
) -> None:
    for reply in (b"AMQP\x00\x01\x00\x00", b"", b"\x08\x00\x00\x00\x00\x00\x00\xce"):
        url = f"amqp://127.0.0.1:{answering(reply)}/"
        with pytest.raises(BrokerUnavailable, match=r"no RabbitMQ answers at .*: it does not speak AMQP 0-9-1"):
            brokers.rabbitmq(machine=with_environ(bare, AMQP_URL=url))
    for reply, why in ((b"-LOADING dataset\r\n", "-LOADING dataset"), (b"", "it closed the connection")):
        url = f"redis://127.0.0.1:{answering(reply)}/0"
        with pytest.raises(BrokerUnavailable, match=f"no Redis answers at .*: {why}"):
            brokers.redis(machine=with_environ(bare, REDIS_URL=url))


# The chain: a local binary.


def test_a_named_program_that_is_not_there_fails_at_once(bare: Machine) -> None:
    with_program(bare, "redis-server", "exit 1")
    with pytest.raises(BrokerUnavailable, match=r"\$REDIS_SERVER is set, but /nowhere/redis is no program to run"):
        brokers.redis(machine=with_environ(bare, REDIS_SERVER="/nowhere/redis"))


def test_a_start_that_dies_is_tried_three_times_and_shows_the_end_of_its_log(bare: Machine, tmp_path: Path) -> None:
    with_program(
        bare,
        "valkey-server",
        f'echo "$*" >> {tmp_path}/starts; for i in 1 2 3 4; do printf "$i\\n%s\\n" {" ".join("abcdefgh")}; done',
    )
    with pytest.raises(BrokerUnavailable) as raised:
        brokers.redis(machine=bare)
    first, *tail = str(raised.value).splitlines()
    assert first == "No Redis for the tests: it was started 3 times and never answered. The end of its log:"
    assert len(tail) == 30
    starts = (tmp_path / "starts").read_text().splitlines()
    assert len(starts) == 3
    directories = [Path(re.findall(r"--dir (\S+)", start)[0]) for start in starts]
    assert len(set(directories)) == 3
    assert not any(directory.exists() for directory in directories)


def test_a_start_that_stays_silent_is_ended(bare: Machine, tmp_path: Path) -> None:
    with_program(bare, "redis-server", f'echo "$*" >> {tmp_path}/starts; exec {real("sleep")} 60')
    with pytest.raises(BrokerUnavailable, match="never answered"):
        brokers.redis(machine=bare, timeout=0.1)
    for start in (tmp_path / "starts").read_text().splitlines():
        assert processes_of(Path(re.findall(r"--dir (\S+)", start)[0])) == []


def test_a_program_that_the_system_cannot_run_says_so(bare: Machine) -> None:
    with_program(bare, "redis-server", "").write_bytes(b"not a program")
    with pytest.raises(BrokerUnavailable, match="Exec format error"):
        brokers.redis(machine=bare)


def test_the_scripts_of_rabbitmq_come_before_the_wrapper_of_debian(bare: Machine, tmp_path: Path) -> None:
    """Each candidate says where it is, then goes: the next start finds the next one."""
    root, path = bare.root, Path(bare.environ["PATH"])
    machine = with_environ(bare, PATH=f"{root}/usr/sbin:{path}", RABBITMQ_SERVER=str(tmp_path / "named"))
    candidates = [
        tmp_path / "named",
        root / "usr/lib/rabbitmq/bin/rabbitmq-server",
        root / "usr/lib/rabbitmq/lib/rabbitmq_server-3.10.8/sbin/rabbitmq-server",
        root / "usr/lib/rabbitmq/lib/rabbitmq_server-3.9.29/sbin/rabbitmq-server",
        root / "opt/homebrew/sbin/rabbitmq-server",
        path / "rabbitmq-server",
        root / "usr/sbin/rabbitmq-server",
    ]
    for candidate in candidates:
        executable(candidate, 'echo "I am $0"')
    for candidate in candidates:
        with pytest.raises(BrokerUnavailable, match=f"I am {candidate}"):
            brokers.rabbitmq(machine=machine)
        candidate.unlink()
        machine = replace(machine, environ={"PATH": machine.environ["PATH"], "MTJ_TEST_APT": "0"})
    with pytest.raises(BrokerUnavailable, match="local binary: no rabbitmq-server found"):
        brokers.rabbitmq(machine=machine)


# The chain: docker compose. The client is a script that notes how it was called.

DOCKER = """
echo "$*" >> {calls}
case "$*" in
  info*) {info} ;;
  "compose version") {plugin} ;;
  *"config --services") echo redis-test; echo rabbitmq-test ;;
  *"up --detach --wait"*) {up} ;;
  *"port redis-test 6379") echo 127.0.0.1:{port} ;;
esac
"""


def with_docker(
    machine: Machine, *, info: str = "echo 27.0", plugin: str = ":", up: str = ":", port: str = "1"
) -> Path:
    machine.compose.write_text("services: {}\n")
    calls = machine.compose.with_name("calls")
    with_program(machine, "docker", DOCKER.format(calls=calls, info=info, plugin=plugin, up=up, port=port))
    return calls


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_docker_compose_gives_a_server_in_a_project_of_its_own(bare: Machine) -> None:
    with brokers.redis(private=True) as inside:
        calls = with_docker(bare, port=str(urlsplit(inside.url).port))
        with brokers.redis(machine=bare) as broker:
            assert (broker.source, broker.url, broker.version) == ("docker compose", inside.url, inside.version)
            with pytest.raises(RuntimeError, match="it comes from docker compose"):
                broker.kill()
        *_, up, _, down = calls.read_text().splitlines()
    project = re.search(r"--project-name (mtj-test-[0-9a-f]{8}) --profile test", up)
    assert project
    assert up.endswith("up --detach --wait redis-test")
    assert down == f"compose --file {bare.compose} --project-name {project[1]} --profile test down --volumes"


@pytest.mark.parametrize(
    ("docker", "why"),
    [
        ({"info": "exit 1"}, "a docker client is there, but no engine answers"),
        ({"info": ":"}, "a docker client is there, but no engine answers"),
        ({"plugin": "exit 1"}, "a docker client and an engine are there, but no compose plugin"),
        ({"up": "exit 1"}, "redis-test of {file} did not start"),
        ({"port": "1"}, "redis-test of {file} was started, but does not answer at 127.0.0.1:1"),
    ],
)
def test_docker_compose_says_what_it_lacks_and_takes_down_what_it_began(
    bare: Machine, docker: dict[str, str], why: str
) -> None:
    calls = with_docker(bare, **docker)
    with pytest.raises(BrokerUnavailable) as raised:
        brokers.redis(machine=with_environ(bare, MTJ_TEST_APT="0"))
    assert f"docker compose: {why.format(file=bare.compose)}" in raised.value.tried
    assert "docker compose up -d --wait   and   export REDIS_URL=redis://localhost:6379/0" in str(raised.value)
    begun = [call.rpartition("--profile test ")[2] for call in calls.read_text().splitlines()]
    assert ("down --volumes" in begun) == any(call.startswith("up") for call in begun)


def test_an_engine_that_never_answers_is_given_up(bare: Machine) -> None:
    with_docker(bare, info=f"exec {real('sleep')} 60")
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable, match="a docker client is there, but no engine answers"):
        brokers.redis(machine=with_environ(bare, MTJ_TEST_APT="0"))
    assert time.monotonic() - started < 10


# The chain: apt-get. It, too, is a script here; what it "installs" starts the real Redis.

APT = """
echo "$DEBIAN_FRONTEND $*" >> {calls}
case "$*" in
  *update) exit {update} ;;
esac
while read -r line; do echo "$line" >> {policy}; done < {root}/usr/sbin/policy-rc.d
{install}
"""


def with_apt(machine: Machine, install: str | None = None, *, update: int = 0) -> Path:
    (machine.root / "etc/os-release").write_text('NAME="Any"\nID=any\nID_LIKE="ubuntu debian"\n')
    calls, server = machine.compose.with_name("calls"), Path(machine.environ["PATH"]) / "redis-server"
    policy = machine.compose.with_name("policy-seen")
    if install is None:
        ready = executable(machine.compose.with_name("ready"), f'exec {redis_program()} "$@"')
        install = f"{real('cp')} -p {ready} {server}"
    script = APT.format(calls=calls, policy=policy, root=machine.root, update=update, install=install)
    with_program(machine, "apt-get", script)
    return calls


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
@pytest.mark.parametrize("before", [None, OTHER_POLICY])
@pytest.mark.parametrize("update", [0, 100])
def test_apt_installs_both_packages_while_no_service_may_start(
    bare: Machine, before: bytes | None, update: int
) -> None:
    """Also where the lists cannot be updated, as when another apt-get holds them."""
    calls, policy, said = with_apt(bare, update=update), bare.root / "usr/sbin/policy-rc.d", list[str]()
    if before:
        policy.write_bytes(before)
        policy.chmod(0o750)
    with brokers.redis(machine=bare, say=said.append) as broker, client(broker.url) as redis:
        assert broker.source == "apt-get"
        assert redis.ping()
    options = "noninteractive -q -o DPkg::Lock::Timeout=120 -o Acquire::http::Timeout=30"
    packages = "redis-server rabbitmq-server"
    install = f"install -y --no-install-recommends {packages}"
    assert calls.read_text().splitlines() == [f"{options} update", f"{options} {install}"]
    assert said == ["installing redis-server and rabbitmq-server with apt-get, for the tests; no service is started"]
    assert "exit 101" in bare.compose.with_name("policy-seen").read_text()
    assert list(policy.parent.iterdir()) == ([policy] if before else [])
    if before:
        assert (policy.read_bytes(), policy.stat().st_mode & 0o777) == (before, 0o750)


@pytest.mark.redis
@pytest.mark.uses_broker("redis")
def test_two_threads_that_find_nothing_install_once(bare: Machine) -> None:
    calls, taken = with_apt(bare), list[Broker]()
    threads = [threading.Thread(target=lambda: taken.append(brokers.redis(machine=bare))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for broker in taken:
        broker.close()
    assert [broker.source for broker in taken].count("apt-get") >= 1
    assert len(taken) == 2
    assert calls.read_text().count("install -y") == 1


def test_an_install_that_fails_says_why_and_gives_the_policy_back(bare: Machine) -> None:
    policy = bare.root / "usr/sbin/policy-rc.d"
    policy.write_bytes(OTHER_POLICY)
    with_apt(bare, "echo 'E: Unable to locate package'; echo; exit 100")
    with pytest.raises(BrokerUnavailable, match=r"apt-get: install failed: E: Unable to locate package"):
        brokers.redis(machine=bare)
    assert policy.read_bytes() == OTHER_POLICY
    with_apt(bare, ":")
    with pytest.raises(BrokerUnavailable, match="apt-get: the packages are installed, but no redis-server or"):
        brokers.redis(machine=bare)


def test_a_system_that_cannot_be_changed_says_so(bare: Machine) -> None:
    with_apt(bare)
    (bare.root / "usr/sbin").rmdir()
    with pytest.raises(BrokerUnavailable, match="apt-get: not possible here: No such file or directory"):
        brokers.redis(machine=bare)


def test_ctrl_c_waits_for_apt_and_gives_the_policy_back(bare: Machine) -> None:
    policy = bare.root / "usr/sbin/policy-rc.d"
    policy.write_bytes(OTHER_POLICY)
    with_apt(bare, f'kill -s INT "$PPID"; exec {real("sleep")} 60')
    with pytest.raises(KeyboardInterrupt):
        brokers.redis(machine=bare)
    assert list(policy.parent.iterdir()) == [policy]
    assert policy.read_bytes() == OTHER_POLICY


def test_what_a_killed_install_left_behind_is_put_right_by_the_next(bare: Machine) -> None:
    policy = bare.root / "usr/sbin/policy-rc.d"
    policy.write_bytes(OTHER_POLICY)
    with_apt(bare, 'kill -s KILL "$PPID"')
    script = "import pathlib, sys; from mindtrace.jobs.testing.brokers import Machine, redis\n"
    script += f"redis(machine=Machine(environ={dict(bare.environ)}, root=pathlib.Path({str(bare.root)!r}), euid=0))"
    assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL, timeout=30).returncode == -9
    until(lambda: b"exit 101" in policy.read_bytes())
    with_apt(bare, "exit 1")
    with pytest.raises(BrokerUnavailable, match="apt-get: install failed"):
        brokers.redis(machine=bare)
    assert list(policy.parent.iterdir()) == [policy]
    assert policy.read_bytes() == OTHER_POLICY


def test_apt_is_for_root_on_debian_and_can_be_switched_off(bare: Machine) -> None:
    calls = with_apt(bare)
    (fedora := bare.root.with_name("fedora") / "etc").mkdir(parents=True)
    (fedora / "os-release").write_text("ID=fedora\n")
    for machine, why in (
        (with_environ(bare, MTJ_TEST_APT="0"), "switched off by MTJ_TEST_APT=0"),
        (replace(bare, euid=1000), "not root"),
        (replace(bare, root=fedora.parent), "not a Debian"),
        (replace(bare, root=fedora), "not a Debian"),
        (with_environ(bare, PATH=""), "no apt-get found"),
    ):
        with pytest.raises(BrokerUnavailable) as raised:
            brokers.redis(machine=machine)
        assert raised.value.tried[-1] == f"apt-get: {why}"
    assert not calls.exists()


# The chain: nothing applies.


def test_the_failure_tells_every_step_and_what_helps(bare: Machine) -> None:
    with_docker(bare, info="exit 1")
    (bare.root / "etc/os-release").write_text("ID=debian\n")
    with pytest.raises(BrokerUnavailable) as raised:
        brokers.rabbitmq(machine=replace(bare, euid=1000))
    assert str(raised.value) == (
        "No RabbitMQ for the tests. Tried:\n"
        "  - $AMQP_URL and $RABBITMQ_URL: not set\n"
        "  - local binary: no rabbitmq-server found\n"
        "  - docker compose: a docker client is there, but no engine answers\n"
        "  - apt-get: not root\n"
        "Do one of these, then run the same command again:\n"
        "  sudo apt-get install -y --no-install-recommends redis-server rabbitmq-server\n"
        "  docker compose up -d --wait   and   export AMQP_URL=amqp://user:password@localhost:5672/\n"
        "  export AMQP_URL=...            (a broker you already have)"
    )
    assert raised.value.kind == "rabbitmq"


def test_the_failure_of_a_private_redis_offers_no_server_that_would_not_do(bare: Machine) -> None:
    machine = with_environ(bare, REDIS_URL="redis://127.0.0.1:1/0", MTJ_TEST_APT="0")
    with pytest.raises(BrokerUnavailable) as raised:
        brokers.redis(private=True, machine=machine)
    assert str(raised.value) == (
        "No Redis for the tests. Tried:\n"
        "  - $REDIS_URL: passed over, a private server was asked for\n"
        "  - local binary: no redis-server or valkey-server found\n"
        "  - docker compose: passed over, its servers cannot be killed, restarted or set up\n"
        "  - apt-get: switched off by MTJ_TEST_APT=0\n"
        "Do one of these, then run the same command again:\n"
        "  sudo apt-get install -y --no-install-recommends redis-server rabbitmq-server"
    )


# RabbitMQ: each start takes seconds, and many of them on a busy machine, so one node lives through all of it.


@pytest.mark.rabbitmq
@pytest.mark.uses_broker("rabbitmq")
@pytest.mark.timeout(180)
def test_a_rabbitmq_of_our_own_is_private_restarts_with_its_messages_and_leaves_nothing() -> None:
    inherited = {"RABBITMQ_NODENAME": "theirs@localhost", "RABBITMQ_CONFIG_FILE": "/nowhere", "ERL_EPMD_PORT": "1"}
    machine = Machine(environ={**os.environ, **inherited, "ERL_FLAGS": "-no_such_flag"})
    with brokers.rabbitmq(settings={"consumer_timeout": "75000"}, machine=machine) as broker:
        directory = broker.directory
        assert directory
        assert broker.source in ("local binary", "apt-get")
        assert listening_addresses(directory) == {LOOPBACK, V6_LOOPBACK}
        assert not any("theirs" in command or "no_such_flag" in command for command in processes_of(directory))
        assert "consumer_timeout = 75000" in (directory / "rabbitmq.conf").read_text()
        epmd = next(line for line in processes_of(directory) if "epmd -daemon" in line)
        asyncio.run(publish(broker.url))
        broker.kill()
        assert not listens(broker.url)
        broker.restart()
        assert asyncio.run(received(broker.url)) == b"job"
        assert epmd in processes_of(directory)
    assert not listens(broker.url)
    assert not directory.exists()
    assert processes_of(directory) == []


async def publish(url: str) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("jobs", durable=True)
        message = aio_pika.Message(b"job", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key="jobs")


async def received(url: str) -> bytes:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("jobs", durable=True)
        message = await queue.get()
        await message.ack()
        return message.body
