"""A server as a child process of the test run: started, killed, paused, and gone when the run is, however that ends."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_LIMIT = 20.0
"""Seconds after which a server that does not answer has failed to start."""

PAUSE_BETWEEN_TRIES = 0.005
"""Seconds between two tries to connect to a server that is starting."""

Probe = Callable[[socket.socket], bool]
"""Asks a server over a fresh connection whether it is ready to work."""


_LOWEST, _SHARE, _SHARES = 20_000, 1_500, 8
"""Ports from 20000 to 31999: below those that systems give to outgoing connections (32768 and up on Linux, 49152 on the
others), so that nobody's client takes one while its server is down. Each process of a test run has its own share of them."""

_ports = itertools.count(random.SystemRandom().randrange(_SHARE))


def free_port() -> int:
    """A port of this machine's loopback interface that nobody uses now, and nobody else in this test run will be given.

    A server may be down when another one is started, so no port is given twice before all have been.
    """
    share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES
    for _ in range(_SHARE):
        port = _LOWEST + share * _SHARE + next(_ports) % _SHARE
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("every port of this process's share is in use")


def answers(port: int, probe: Probe, host: str = "127.0.0.1") -> bool:
    """Whether the server on a port says that it is ready."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            return probe(connection)
    except OSError:
        return False


class _Reaper:
    """A small process that outlives this one by a moment: when its pipe closes, it ends what this process has left."""

    # The pipe closes even when this process is killed with SIGKILL, which no `atexit` and no `finally` survives.
    _SCRIPT = """
import os, shutil, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
left = {}
for line in sys.stdin:
    pid, _, folder = line.rstrip("\\n").partition(" ")
    if folder:
        left[int(pid)] = folder
    else:
        left.pop(int(pid), None)
for pid, folder in left.items():
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
    shutil.rmtree(folder, ignore_errors=True)
"""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def adopt(self, pid: int, folder: Path) -> None:
        """End `pid` and remove `folder` if this process dies first."""
        if self._process is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-c", self._SCRIPT], stdin=subprocess.PIPE, start_new_session=True
            )
            atexit.register(self._dismiss)
        self._tell(f"{pid} {folder}\n")

    def release(self, pid: int) -> None:
        """Forget a process that is gone: its number may soon be another's."""
        self._tell(f"{pid}\n")

    def _tell(self, line: str) -> None:
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.write(line.encode())
                process.stdin.flush()

    def _dismiss(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and self._owner == os.getpid():
            process.stdin.close()
            process.wait()


_reaper = _Reaper()


class ServerProcess:
    """A server run from a binary, on one port of the loopback interface, with a data folder of its own.

    `command` makes the command line from the port and the folder. Every method blocks until what it says is so, and may
    be called in any order; call them in a thread where an event loop must go on. `stop` also removes the folder.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        scheme: str,
        command: Callable[[int, Path], Sequence[str]],
        probe: Probe,
        *,
        credentials: str = "",
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"{scheme}://{credentials}{self.host}:{self.port}"
        self._scheme = scheme
        self._command = command
        self._probe = probe
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        pid = self._process.pid if self._process is not None else None
        return f"<ServerProcess {self._scheme} on port {self.port}, {f'pid {pid}' if pid else 'down'}>"

    @property
    def pid(self) -> int | None:
        """The number of the server's process; `None` while it is down."""
        return self._process.pid if self._process is not None else None

    @property
    def folder(self) -> Path:
        """The data folder. It survives `kill` and `restart`."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=f"cachebus-{self._scheme}-"))
        return self._folder

    def start(self) -> None:
        """Start the server, and return once it answers. Does nothing if it is up.

        Raises `RuntimeError` with what the server wrote if it ends at once or never answers.
        """
        if self._process is not None:
            return
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603
                list(self._command(self.port, self.folder)),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _reaper.adopt(self._process.pid, self.folder)
        limit = time.monotonic() + START_LIMIT
        while not answers(self.port, self._probe):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(PAUSE_BETWEEN_TRIES)
                self._forget()
                raise RuntimeError(f"{self!r} ended at once with code {code}:\n{_tail(log)}")
            if time.monotonic() > limit:
                self.kill()
                raise RuntimeError(f"{self!r} did not answer within {START_LIMIT:g} s:\n{_tail(log)}")

    def kill(self) -> None:
        """End the server as a power failure would. Does nothing if it is down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._forget()

    def restart(self) -> None:
        """Kill the server, and start it on the same port with the same data folder."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stop the server in its tracks: its connections stay, and nothing is answered."""
        if self._process is not None:
            suspend(self._process.pid)

    def resume(self) -> None:
        """Let a paused server go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server and remove its data."""
        self.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _forget(self) -> None:
        if self._process is not None:
            _reaper.release(self._process.pid)
            self._process = None


def suspend(pid: int) -> None:
    """Stop a child process, and return when all its threads have stopped. `SIGCONT` lets it go on.

    `SIGSTOP` is asynchronous: one thread receives it, and the others run until they notice.
    """
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
