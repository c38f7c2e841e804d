"""A Redis and a RabbitMQ for tests and development: found, or started for the caller alone. Standard library only.

Each broker comes from the first of these that applies; a server found in the environment is only ever talked to:

    environment  --set-->  does it answer?  --no-->  BrokerUnavailable, at once: going on would hide a mistake
        | not set
    local binary --found-> start it, three tries -->  BrokerUnavailable with the end of its log
        | none
    docker compose --engine, plugin, compose.yaml-->  a project of its own, taken down with its volumes
        | something is missing
    apt-get  --root, on Debian-->  install both packages, start no service, then as local binary
        | does not apply
    BrokerUnavailable, with every step and why it did not apply
"""

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Final, Literal, Self
from urllib.parse import urlsplit

from mindtrace.jobs.testing.servers import RABBITMQ, REDIS, REDIS_DURABILITY, Kind, Make, Server

__all__ = ["REDIS_DURABILITY", "Broker", "BrokerUnavailable", "Kind", "Machine", "Source", "rabbitmq", "redis"]

Source = Literal["environment", "local binary", "docker compose", "apt-get"]

_PACKAGES = ("redis-server", "rabbitmq-server")
_STARTS = 3  # free ports are a race: another process may take one between our look and the server's bind


class BrokerUnavailable(RuntimeError):
    """No broker could be had. The text is for the person who ran the tests, and holds no password.

    Attributes:
        kind: the broker that is missing.
        tried: one line for each step of the chain, with why it did not apply; empty where one applied and failed.
    """

    def __init__(self, text: str, *, kind: Kind, tried: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.kind: Kind = kind
        self.tried: tuple[str, ...] = tuple(tried)


@dataclass(frozen=True)
class Machine:
    """What the chain may look at. The defaults are this machine as it is; a test makes a smaller one."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    root: Path = Path("/")  # where usr/lib/rabbitmq, etc/os-release and usr/sbin/policy-rc.d are
    euid: int = field(default_factory=lambda: os.geteuid() if sys.platform != "win32" else -1)
    compose: Path = Path("compose.yaml")

    def which(self, program: str) -> Path | None:
        """The program of this name on this machine's PATH."""
        found = shutil.which(program, path=self.environ.get("PATH", ""))
        return Path(found) if found else None


class Broker:
    """A broker that answered. A context manager: leaving it is `close()`, and so is the end of the interpreter.

    Attributes:
        kind: "redis" or "rabbitmq".
        url: what a client connects to, password included.
        version: as the server told it; "unknown" where it refused to.
        source: the step of the chain it came from.
        directory: data and log of a server process of ours; None for any other.
    """

    def __init__(
        self,
        kind: Kind,
        url: str,
        version: str,
        source: Source,
        *,
        server: Server | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.kind: Final = kind
        self.url: Final = url
        self.version: Final = version
        self.source: Final = source
        self.directory: Final[Path | None] = server.directory if server else None
        self._server = server
        self._release = release or (server.close if server else None)
        self._owner = os.getpid()
        if self._release:
            atexit.register(self.close)

    def kill(self) -> None:
        """SIGKILL, as a crash would have it. The data stays for `restart()`."""
        self._own("killed").kill()

    def stop(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, until `cont()`."""
        self._own("stopped").signal(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT, after `stop()`."""
        self._own("continued").signal(signal.SIGCONT)

    def restart(self) -> None:
        """End it in order if it still runs, and start it on the same ports and data. It answers on return.

        Raises:
            BrokerUnavailable: it would not come up again; the text ends with its log.
        """
        server = self._own("restarted")
        server.end()
        for _ in range(_STARTS):
            if server.start():
                return
            server.kill()
        raise _silent(self.kind, server.tail())

    def close(self) -> None:
        """End what was started for this broker and remove its data. A server we did not start is left alone."""
        # A fork inherits the object and its place in atexit, but not the server.
        if self._release and os.getpid() == self._owner:
            release, self._release = self._release, None
            self._server = None
            atexit.unregister(self.close)
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Broker {self.kind} {self.version} ({self.source}) at {_shown(self.url)}>"

    def _own(self, done: str) -> Server:
        if self._server is None:
            why = "it is closed" if self.directory else f"it comes from {self.source}: ask for private=True"
            raise RuntimeError(f"this {self.kind} server cannot be {done}: {why}")
        return self._server


def redis(
    *,
    private: bool = False,
    settings: Mapping[str, str] | None = None,
    timeout: float = 10.0,
    machine: Machine | None = None,
    say: Callable[[str], None] | None = None,
) -> Broker:
    """A Redis that answers, from the first step of the chain that applies.

    Args:
        private: a server process of the caller's own, which can be killed and restarted, whatever the environment says.
        settings: by name as in redis.conf, in addition to `REDIS_DURABILITY` or instead of it. Implies `private`.
        timeout: seconds that each of three starts may take.
        machine: where to look; this one.
        say: takes the line that is said before packages are installed; standard error.

    Raises:
        BrokerUnavailable: with what was tried and what helps.
    """
    return _provide(_FIND_REDIS, _Wish(private, settings or {}, timeout, machine or Machine(), say or _say))


def rabbitmq(
    *,
    private: bool = False,
    settings: Mapping[str, str] | None = None,
    timeout: float = 40.0,
    machine: Machine | None = None,
    say: Callable[[str], None] | None = None,
) -> Broker:
    """A RabbitMQ that answers, from the first step of the chain that applies. A private one takes four seconds.

    Args:
        private: a server process of the caller's own, which can be killed and restarted, whatever the environment says.
        settings: by name as in rabbitmq.conf, `{"consumer_timeout": "5000"}`. Implies `private`.
        timeout: seconds that each of three starts may take.
        machine: where to look; this one.
        say: takes the line that is said before packages are installed; standard error.

    Raises:
        BrokerUnavailable: with what was tried and what helps.
    """
    return _provide(_FIND_RABBITMQ, _Wish(private, settings or {}, timeout, machine or Machine(), say or _say))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - for the person at the terminal: packages get installed


@dataclass(frozen=True)
class _Wish:
    """What the caller asked for."""

    wants_private: bool
    settings: Mapping[str, str]
    timeout: float
    machine: Machine
    say: Callable[[str], None]

    @property
    def private(self) -> bool:
        return self.wants_private or bool(self.settings)


@dataclass(frozen=True)
class _Search:
    """Where a server of this make may be found."""

    make: Make
    variables: tuple[str, ...]  # each may hold a URL; the first that is set counts
    program: str  # this one may hold a server program
    programs: str  # what to say where there is none
    find: Callable[[Machine], Path | None]


# The chain. A step gives a broker, or why it did not apply.


def _provide(search: _Search, wish: _Wish) -> Broker:
    steps: dict[str, Callable[[_Search, _Wish], Broker | str]] = {
        " and ".join(f"${variable}" for variable in search.variables): _from_environment,
        "local binary": _from_local_binary,
        "docker compose": _from_compose,
        "apt-get": _from_apt,
    }
    tried: list[str] = []
    for name, step in steps.items():
        outcome = step(search, wish)
        if isinstance(outcome, Broker):
            return outcome
        tried.append(f"{name}: {outcome}")
    variable, example = search.variables[0], search.make.url.format(host="localhost", port=search.make.port)
    helps = [f"sudo apt-get install -y --no-install-recommends {' '.join(_PACKAGES)}"]
    if wish.machine.compose.is_file() and not wish.private:
        helps.append(f"docker compose up -d --wait   and   export {variable}={example}")
    if not wish.private:
        helps.append(f"export {variable}=...            (a broker you already have)")
    lines = [f"No {search.make.title} for the tests. Tried:", *(f"  - {line}" for line in tried)]
    lines += ["Do one of these, then run the same command again:", *(f"  {line}" for line in helps)]
    raise BrokerUnavailable("\n".join(lines), kind=search.make.kind, tried=tried)


def _from_environment(search: _Search, wish: _Wish) -> Broker | str:
    if wish.private:
        return "passed over, a private server was asked for"
    for variable in search.variables:
        if not (url := wish.machine.environ.get(variable)):
            continue
        try:
            parts = urlsplit(url)
            if parts.scheme not in search.make.schemes or "@" in parts.path:  # a "/" in a password, say
                raise ValueError
            return Broker(search.make.kind, url, search.make.ask(url, 5.0), "environment")
        except OSError as error:
            problem = f"no {search.make.title} answers at {_shown(url)}: {error.strerror or error}"
        except ValueError:  # its own text could quote a part of the password
            problem = f"it is not a URL of the form {search.make.url.format(host='host', port='port')}"
        text = f"No {search.make.title} for the tests. ${variable} is set, but {problem}\n"
        text += f"Start that server or correct the URL; without {variable} the tests look for one themselves."
        raise BrokerUnavailable(text, kind=search.make.kind)
    return "not set"


def _from_local_binary(search: _Search, wish: _Wish) -> Broker | str:
    variable = search.program
    if named := wish.machine.environ.get(variable):
        if not (program := wish.machine.which(named)):
            text = f"No {search.make.title} for the tests. ${variable} is set, but {named} is no program to run."
            raise BrokerUnavailable(text, kind=search.make.kind)
    elif not (program := search.find(wish.machine)):
        return f"no {search.programs} found"
    return _started(search, program, wish, "local binary")


def _started(search: _Search, program: Path, wish: _Wish, source: Source) -> Broker:
    make, tail = search.make, [""]
    for _ in range(_STARTS):
        with ExitStack() as undo:
            environ = wish.machine.environ
            server = Server(make, program, settings=wish.settings, environ=environ, timeout=wish.timeout)
            undo.callback(server.close)
            if version := server.start():
                undo.pop_all()
                return Broker(make.kind, server.url, version, source, server=server)
            tail = server.tail()
    raise _silent(make.kind, tail)


def _silent(kind: Kind, tail: Sequence[str]) -> BrokerUnavailable:
    title = {"redis": REDIS.title, "rabbitmq": RABBITMQ.title}[kind]
    text = f"No {title} for the tests: it was started {_STARTS} times and never answered. The end of its log:"
    return BrokerUnavailable("\n".join([text, *tail]), kind=kind)


def _from_compose(search: _Search, wish: _Wish) -> Broker | str:
    file, service = wish.machine.compose, f"{search.make.kind}-test"
    environ = {**wish.machine.environ, "RABBITMQ_DEFAULT_USER": "user", "RABBITMQ_DEFAULT_PASS": "password"}
    if wish.private:
        return "passed over, its servers cannot be killed, restarted or set up"
    if not file.is_file():
        return f"no {file}"
    if not (docker := wish.machine.which("docker")):
        return "no docker client"
    # Old clients exit with 0 whether or not an engine is there.
    if not (_run([str(docker), "info", "--format", "{{.ServerVersion}}"], environ, timeout=3.0) or "").strip():
        return "a docker client is there, but no engine answers"
    if _run([str(docker), "compose", "version"], environ) is None:
        return "a docker client and an engine are there, but no compose plugin"
    project = f"mtj-test-{os.urandom(4).hex()}"
    compose = [str(docker), "compose", "--file", str(file), "--project-name", project, "--profile", "test"]
    if service not in (_run([*compose, "config", "--services"], environ) or "").split():
        return f"{file} has no service {service} in the profile test"

    def release() -> None:
        _run([*compose, "down", "--volumes"], environ)

    with ExitStack() as undo:
        undo.callback(release)
        if _run([*compose, "up", "--detach", "--wait", service], environ) is None:
            return f"{service} of {file} did not start"
        published = (_run([*compose, "port", service, str(search.make.port)], environ) or "").strip()
        url = search.make.url.format(host="127.0.0.1", port=published.rpartition(":")[2])
        try:
            version = search.make.ask(url, 5.0)
        except (OSError, ValueError):
            return f"{service} of {file} was started, but does not answer at {published or 'any port'}"
        undo.pop_all()
        return Broker(search.make.kind, url, version, "docker compose", release=release)


def _from_apt(search: _Search, wish: _Wish) -> Broker | str:
    machine = wish.machine
    release = machine.root / "etc/os-release"
    system = release.read_text("utf-8") if release.is_file() else ""
    if machine.environ.get("MTJ_TEST_APT") == "0":
        return "switched off by MTJ_TEST_APT=0"
    if not re.search(r"^ID(_LIKE)?=.*\bdebian\b", system, re.MULTILINE):
        return "not a Debian"
    if machine.euid != 0:
        return "not root"
    if not (apt := machine.which("apt-get")):
        return "no apt-get found"
    environ = {**machine.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    # Waits for another apt-get of this machine, and lets each network request fail in finite time.
    command = [str(apt), "-q", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::http::Timeout=30"]
    try:
        with _alone_in(machine.root / "usr/sbin") as directory:
            # Whoever held the lock before us installed both packages.
            if not search.find(machine):
                wish.say(f"installing {' and '.join(_PACKAGES)} with apt-get, for the tests; no service is started")
                with _no_service_starts(directory / "policy-rc.d"):
                    # May fail where the install does not: one source of many is down, or another apt-get updates now.
                    _run([*command, "update"], environ)
                    problem = _install([*command, "install", "-y", "--no-install-recommends", *_PACKAGES], environ)
                if problem:
                    return f"install failed: {problem}"
    except OSError as error:  # a read-only system, or one laid out differently
        return f"not possible here: {error.strerror}"
    if not (program := search.find(machine)):
        return f"the packages are installed, but no {search.programs} was found"
    return _started(search, program, wish, "apt-get")


def _install(command: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """The last thing it said, if it failed."""
    with (
        TemporaryFile() as output,
        subprocess.Popen(  # noqa: S603 - a fixed command line, no shell
            command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as apt,
    ):
        try:
            apt.wait()
        except BaseException:
            # Not killed: dpkg would go on without it, and start services once the policy is no longer ours.
            apt.send_signal(signal.SIGINT)
            apt.wait()
            raise
        output.seek(0)
        said = output.read().decode("utf-8", "replace").split("\n")
    return (
        next((line.strip() for line in reversed(said) if line.strip()), "it said nothing") if apt.returncode else None
    )


@contextmanager
def _alone_in(directory: Path) -> Generator[Path]:
    """One process and one thread at a time. The lock is on the directory itself, so no lock file is left in it."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if sys.platform != "win32":  # where pytest loads this module, too, and no broker of ours runs
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield directory
    finally:
        os.close(handle)


@contextmanager
def _no_service_starts(policy: Path) -> Generator[None]:
    """The policy of this system answers 101, "not allowed", until we are done; then it is what it was before."""
    ours = b"#!/bin/sh\n# While packages for tests are installed: start no service.\nexit 101\n"
    aside = policy.with_name(f"{policy.name}.mtj-aside")
    # A run that was killed here has left our text, and what was there before beside it: keep that, not our text.
    if os.path.lexists(policy) and not (policy.is_file() and policy.read_bytes() == ours):
        policy.replace(aside)
    try:
        policy.write_bytes(ours)
        policy.chmod(0o755)
        yield
    finally:
        if os.path.lexists(aside):
            aside.replace(policy)
        else:
            policy.unlink(missing_ok=True)


def _run(command: Sequence[str], environ: Mapping[str, str], timeout: float | None = None) -> str | None:
    """What the command printed, or None if it failed or took longer."""
    try:
        done = subprocess.run(  # noqa: S603 - command lines of this file, no shell
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout


def _find_redis(machine: Machine) -> Path | None:
    return machine.which("redis-server") or machine.which("valkey-server")


def _find_rabbitmq(machine: Machine) -> Path | None:
    """The server's own script, which runs as any user, before Debian's wrapper, which insists on root or `rabbitmq`."""
    name, root = "rabbitmq-server", machine.root
    wrapped = (root / "usr/sbin").resolve()
    versions = sorted((root / "usr/lib/rabbitmq/lib").glob("*/sbin"), key=lambda path: _numbers(path.parent.name))
    path = [Path(entry) for entry in machine.environ.get("PATH", "").split(os.pathsep) if entry]
    folders = [
        root / "usr/lib/rabbitmq/bin",
        *reversed(versions),
        root / "opt/homebrew/sbin",
        root / "usr/local/sbin",
        *(entry for entry in path if entry.resolve() != wrapped),
        *(entry for entry in path if entry.resolve() == wrapped),
    ]
    found = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    return Path(found) if found else None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _shown(url: str) -> str:
    """Scheme and address alone: user, password and query stay out of every message."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return f"{parts.scheme}://{parts.hostname or 'localhost'}" + (f":{parts.port}" if parts.port else "")


_FIND_REDIS: Final = _Search(
    make=REDIS,
    variables=("REDIS_URL",),
    program="REDIS_SERVER",
    programs="redis-server or valkey-server",
    find=_find_redis,
)
_FIND_RABBITMQ: Final = _Search(
    make=RABBITMQ,
    variables=("AMQP_URL", "RABBITMQ_URL"),
    program="RABBITMQ_SERVER",
    programs="rabbitmq-server",
    find=_find_rabbitmq,
)
