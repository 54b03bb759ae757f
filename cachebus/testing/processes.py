"""Servers as child processes of the test run. They are always removed at its end, even if it is killed."""

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
"""Seconds after which a server that does not respond has failed to start."""

PAUSE_BETWEEN_TRIES = 0.005
"""Seconds between two attempts to connect to a server that is starting."""

Probe = Callable[[socket.socket], bool]
"""Function that checks over a new connection if a server is ready."""


_LOWEST, _SHARE, _SHARES = 20_000, 1_500, 8
"""Ports from 20000 to 31999, divided among the processes of a test run.

Systems use higher ports for outgoing connections (from 32768 on Linux, from 49152 elsewhere), so no client takes the
port of a server that is down.
"""

_ports = itertools.count(random.SystemRandom().randrange(_SHARE))


def free_port() -> int:
    """Return an unused port of the loopback interface that no other process of the test run will get.

    A port is not reused before all others have been returned, because its server may only be down for a while.
    """
    share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES
    for _ in range(_SHARE):
        port = _LOWEST + share * _SHARE + next(_ports) % _SHARE
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("all ports of this process are in use")


def answers(port: int, probe: Probe, host: str = "127.0.0.1") -> bool:
    """Return true if the server on a port is ready."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            return probe(connection)
    except OSError:
        return False


class _Reaper:
    """A helper process that cleans up after this process: when its pipe closes, it kills the remaining servers."""

    # The pipe also closes if this process gets SIGKILL, which skips every `atexit` and `finally`.
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
        """Kill `pid` and remove `folder` if this process ends first."""
        if self._process is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-c", self._SCRIPT], stdin=subprocess.PIPE, start_new_session=True
            )
            atexit.register(self._dismiss)
        self._tell(f"{pid} {folder}\n")

    def release(self, pid: int) -> None:
        """Stop watching a process that has ended, because its pid may be reused."""
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
    """A server run from a binary, on a port of the loopback interface, with its own data folder.

    `command` returns the command line for the port and the folder. Every method blocks until it has taken effect, so in
    async code call it in a thread. Methods may be called in any order. `stop` also removes the folder.
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
        """Process id of the server, or `None` if it is not running."""
        return self._process.pid if self._process is not None else None

    @property
    def folder(self) -> Path:
        """Data folder, which survives `kill` and `restart`."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=f"cachebus-{self._scheme}-"))
        return self._folder

    def start(self) -> None:
        """Start the server and wait until it responds. Do nothing if it is running.

        Raises `RuntimeError` with the server's output if it exits or does not respond.
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
                raise RuntimeError(f"{self!r} exited with code {code}:\n{_tail(log)}")
            if time.monotonic() > limit:
                self.kill()
                raise RuntimeError(f"{self!r} did not respond within {START_LIMIT:g} s:\n{_tail(log)}")

    def kill(self) -> None:
        """Kill the server, as a power failure would. Do nothing if it is not running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._forget()

    def restart(self) -> None:
        """Kill the server and start it on the same port with the same data folder."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze the server. Its connections stay open, but it does not respond."""
        if self._process is not None:
            suspend(self._process.pid)

    def resume(self) -> None:
        """Resume a paused server."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop the server and remove its data."""
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
