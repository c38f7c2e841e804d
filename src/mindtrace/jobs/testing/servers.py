"""One Redis or RabbitMQ process of our own, and the questions that only such a server can answer.

`brokers.py` is the public face, and decides where a broker comes from. Standard library only, as there.
"""

import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = ["RABBITMQ", "REDIS", "REDIS_DURABILITY", "Kind", "Make", "Place", "Server"]

Kind = Literal["redis", "rabbitmq"]

REDIS_DURABILITY: Final[Mapping[str, str]] = MappingProxyType(
    {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}
)
"""What a Redis that holds jobs has to be set to: it loses at most a second of them, and never evicts one."""

_MEMORY = "/dev/shm"  # noqa: S108 (a folder of a name that nobody knows is made in it)
_PLENTY = 4 * 1024**3  # bytes
_STOP_WITHIN = 10.0


@dataclass(frozen=True)
class Place:
    """Where a server of ours lives.

    Attributes:
        directory: all its files.
        ports: the service first; then, for RabbitMQ, Erlang's own and epmd's.
        settings: the caller's, in addition to ours or instead of them.
        environ: the caller's environment.
    """

    directory: Path
    ports: Sequence[int]
    settings: Mapping[str, str]
    environ: Mapping[str, str]


@dataclass(frozen=True)
class Make:
    """Where a Redis and a RabbitMQ differ.

    Attributes:
        title: its name in a sentence.
        schemes: of the URLs its clients take.
        port: the usual one.
        url: of a server of ours, by host and port.
        ports: how many it needs.
        ask: its version, by URL and seconds to wait; OSError where no such server answers.
        arrange: writes its files, and gives its arguments and its environment.
    """

    kind: Kind
    title: str
    schemes: tuple[str, ...]
    port: int
    url: str
    ports: int
    ask: Callable[[str, float], str]
    arrange: Callable[[Place], tuple[Sequence[str], Mapping[str, str]]]


class Server:
    """A process group, a directory and ports of its own. It ends with us, however we end."""

    # Reads the number of the running group, empty while there is none, and acts when we die without "done": a SIGKILL
    # runs no atexit. A shell, since it starts in a millisecond where a second Python takes tens of them.
    _LAST_WILL = """
        while read -r line; do [ "$line" = done ] && exit; group=$line; done
        [ -n "$group" ] && kill -s KILL -- "-$group"
        for try in 1 2 3 4 5; do [ -n "$2" ] && ! ERL_EPMD_PORT="$2" epmd -kill && sleep 0.2; done
        rm -rf -- "$1"
    """

    def __init__(
        self, make: Make, program: Path, *, settings: Mapping[str, str], environ: Mapping[str, str], timeout: float
    ) -> None:
        self._make, self._program, self._timeout = make, program, timeout
        self._ports = _free_ports(make.ports)
        self._epmd = self._ports.pop() if make.ports > 1 else None  # in no group of ours, and it outlives a restart
        self._process: subprocess.Popen[bytes] | None = None
        self.url: str = make.url.format(host="127.0.0.1", port=self._ports[0])
        self.directory: Path = Path(tempfile.mkdtemp(prefix=f"mtj-{make.kind}-", dir=_in_memory()))
        self._log = self.directory / "server.log"
        ports = [*self._ports, self._epmd] if self._epmd else self._ports
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, self.directory)
            self._arguments, self._environ = make.arrange(Place(self.directory, ports, settings, environ))
            self._heir = subprocess.Popen(  # noqa: S603 - our own script
                ["/bin/sh", "-c", self._LAST_WILL, "sh", self.directory, str(self._epmd or "")],
                # Never the environment as it is: while a test changes it, starting a program fails with "Bad address".
                env={"PATH": os.pathsep.join([environ.get("PATH", ""), os.defpath])},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # or Ctrl-C would end it before us
            )
            undo.pop_all()

    def start(self) -> str | None:
        """Its version once it answers; None if it died or stayed silent."""
        with self._log.open("ab") as log:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - the server program that was found or named
                    [self._program, *self._arguments],
                    env=self._environ,
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                return None
        self._tell_heir(str(self._process.pid))
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            # Waiting comes first: a server that lost its port to another is gone before the other is asked.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)
                return None
            with suppress(OSError):
                return self._make.ask(self.url, 2.0)
        return None

    def tail(self) -> list[str]:
        """The last 30 lines of its log."""
        return self._log.read_text("utf-8", "replace").splitlines()[-30:]

    def signal(self, number: signal.Signals) -> None:
        """Send it to the whole group."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL; on return nothing listens at its ports."""
        if self._process:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
            self._tell_heir("")
        # Processes that our child started are not ours to wait for; that they are gone shows at their ports.
        for port in self._ports:
            _until_closed(port)

    def end(self) -> None:
        """SIGTERM, ten seconds, SIGKILL; the last one always, for whoever in the group outlives its leader."""
        if self._process:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # a stopped process would take the first one only when continued
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_WITHIN)
        self.kill()

    def close(self) -> None:
        """End it, and leave nothing behind."""
        try:
            self.end()
            if self._epmd:
                # What `epmd -kill` sends, without having to find that program. Refused while epmd knows of a node.
                _until_closed(self._epmd, b"\x00\x01k")
            shutil.rmtree(self.directory, ignore_errors=True)
            self._tell_heir("done")
        finally:
            if self._heir.stdin:
                self._heir.stdin.close()
            self._heir.wait()

    def _tell_heir(self, line: str) -> None:
        if self._heir.stdin:
            with suppress(BrokenPipeError):
                self._heir.stdin.write(f"{line}\n".encode())
                self._heir.stdin.flush()


def _in_memory() -> str | None:
    """A file system in memory, if it has plenty of room; None: wherever temporary files go, as $TMPDIR says.

    What a private broker keeps ends with it, and need not survive the machine. A RabbitMQ that does not wait for a disk
    at each queue and each confirm took 0.7 of the time for a part of the contract suite.
    """
    with suppress(OSError):
        if not os.environ.get("TMPDIR") and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _PLENTY:
            return _MEMORY
    return None


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _until_closed(port: int, request: bytes = b"") -> None:
    """Wait until nothing listens there, asking for it by `request`. Gives up after ten seconds."""
    deadline = time.monotonic() + _STOP_WITHIN
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), 1.0) as line:
                line.sendall(request)
                if request:
                    line.recv(16)
        except ConnectionRefusedError:
            return
        except OSError:
            pass  # it is going away
        time.sleep(0.01)


# Redis.


def _arrange_redis(place: Place) -> tuple[Sequence[str], Mapping[str, str]]:
    settings = {
        "port": str(place.ports[0]),
        "bind": "127.0.0.1",
        "dir": str(place.directory),
        **REDIS_DURABILITY,
        "daemonize": "no",
        "logfile": "",
        **place.settings,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", value)], place.environ


def _ask_redis(url: str, timeout: float) -> str:
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    password = unquote(parts.password or "") or query.get("password")
    user = unquote(parts.username or "") or query.get("username")
    with _connect(url, REDIS.port, timeout) as line, line.makefile("rb") as replies:
        if password:
            line.sendall(_words("AUTH", *filter(None, [user]), password))
            _expect(replies.readline(), b"+OK")
        line.sendall(_words("PING") + _words("INFO", "server"))
        _expect(replies.readline(), b"+PONG")
        length = replies.readline()
        told = replies.read(int(length[1:])) if length.startswith(b"$") else b""
        version = re.search(rb"^redis_version:(\S+)", told, re.MULTILINE)
        return version[1].decode() if version else "unknown"


def _words(*words: str) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def _expect(reply: bytes, wanted: bytes) -> None:
    if reply.rstrip() != wanted:
        raise ConnectionError(reply.decode("utf-8", "replace").strip() or "it closed the connection")


REDIS: Final = Make(
    kind="redis",
    title="Redis",
    schemes=("redis", "rediss", "unix"),
    port=6379,
    url="redis://{host}:{port}/0",
    ports=1,
    ask=_ask_redis,
    arrange=_arrange_redis,
)


# RabbitMQ.


def _arrange_rabbitmq(place: Place) -> tuple[Sequence[str], Mapping[str, str]]:
    directory, (port, distribution, epmd) = place.directory, place.ports
    settings = {
        "listeners.tcp.1": f"127.0.0.1:{port}",
        "disk_free_limit.absolute": "50MB",
        "log.console": "true",
        "log.file": "false",
        "default_user": "user",
        "default_pass": "password",
        **place.settings,
    }
    config, plugins = directory / "rabbitmq.conf", directory / "enabled_plugins"
    config.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()), "utf-8")
    plugins.write_text("[].\n", "utf-8")
    # Inherited ones would move our node into another's directory or cluster.
    theirs = ("RABBITMQ_", "ERL_")
    return [], {name: value for name, value in place.environ.items() if not name.startswith(theirs)} | {
        "HOME": str(directory),  # the Erlang cookie lives there
        "RABBITMQ_NODENAME": f"mtj{port}@localhost",
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(directory / "config"),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
        "RABBITMQ_CONFIG_FILE": str(config),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",  # no setting of the system comes in
        "RABBITMQ_DIST_PORT": str(distribution),
        "ERL_EPMD_PORT": str(epmd),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        # One scheduler is kind to a small machine. Erlang's own port listens on every interface unless told otherwise.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 -kernel inet_dist_use_interface {127,0,0,1}",
    }


def _ask_rabbitmq(url: str, timeout: float) -> str:
    with _connect(url, 5671 if url.startswith("amqps:") else RABBITMQ.port, timeout) as line:
        line.sendall(b"AMQP\x00\x00\x09\x01")
        with line.makefile("rb") as replies:
            head = replies.read(7)
            if len(head) < 7 or head[0] != 1:  # 1: a method frame, and the first one is Connection.Start
                raise ConnectionError("it does not speak AMQP 0-9-1")
            told = replies.read(struct.unpack(">I", head[3:])[0])
    # A table entry: the name with its length, S for a long string, the text with its length.
    at = told.find(b"\x07versionS")
    if at < 0:
        return "unknown"
    (length,) = struct.unpack_from(">I", told, at + 9)
    return told[at + 13 : at + 13 + length].decode("utf-8", "replace")


RABBITMQ: Final = Make(
    kind="rabbitmq",
    title="RabbitMQ",
    schemes=("amqp", "amqps"),
    port=5672,
    url="amqp://user:password@{host}:{port}/",
    ports=3,
    ask=_ask_rabbitmq,
    arrange=_arrange_rabbitmq,
)


def _connect(url: str, default_port: int, timeout: float) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        line = socket.socket(socket.AF_UNIX)
        try:
            line.settimeout(timeout)
            line.connect(unquote(parts.path))
        except OSError:
            line.close()
            raise
        return line
    host = parts.hostname or "localhost"
    if parts.scheme not in ("rediss", "amqps"):
        return socket.create_connection((host, parts.port or default_port), timeout)
    query = dict(parse_qsl(parts.query))
    context = ssl.create_default_context(cafile=query.get("ssl_ca_certs") or query.get("cafile"))
    return context.wrap_socket(
        socket.create_connection((host, parts.port or default_port), timeout), server_hostname=host
    )
