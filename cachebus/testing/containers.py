"""Servers in containers, for machines with a Docker engine but without the server's binary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .processes import PAUSE_BETWEEN_TRIES, START_LIMIT, Probe, answers, free_port


def docker_answers() -> bool:
    """Return true if testcontainers can be imported and a Docker engine responds."""
    try:
        # Imported by name, because testcontainers and its Docker client are not dependencies.
        import_module("testcontainers.core.container")
        engine: Any = import_module("docker").from_env(timeout=5)
        engine.ping()
    except Exception:  # Any error means that the engine cannot be used.
        return False
    return True


class ServerContainer:
    """A server run from an image, with the methods of `ServerProcess`. `stop` also removes its data."""

    host = "127.0.0.1"

    def __init__(
        self, scheme: str, image: str, inner_port: int, command: Sequence[str], probe: Probe, *, credentials: str = ""
    ) -> None:
        self.port = free_port()
        self.url = f"{scheme}://{credentials}{self.host}:{self.port}"
        self._probe = probe
        made: Any = import_module("testcontainers.core.container").DockerContainer(image)
        self._container: Any = made.with_bind_ports(inner_port, self.port).with_command(list(command))
        self._made = False
        self._up = False

    def __repr__(self) -> str:
        return f"<ServerContainer on port {self.port}, {'up' if self._up else 'down'}>"

    def start(self) -> None:
        """Start the server and wait until it responds. Do nothing if it is running."""
        if self._up:
            return
        if self._made:
            self._container.get_wrapped_container().start()
        else:
            self._container.start()
            self._made = True
        self._up = True
        limit = time.monotonic() + START_LIMIT
        while not answers(self.port, self._probe):
            if time.monotonic() > limit:
                raise RuntimeError(f"{self!r} did not respond within {START_LIMIT:g} s")
            time.sleep(PAUSE_BETWEEN_TRIES)

    def kill(self) -> None:
        """Kill the server, as a power failure would. Do nothing if it is not running."""
        if self._up:
            self._container.get_wrapped_container().kill()
            self._up = False

    def restart(self) -> None:
        """Kill the server and start it on the same port."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze the server. Its connections stay open, but it does not respond."""
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        """Resume a paused server."""
        self._container.get_wrapped_container().unpause()

    def stop(self) -> None:
        """Stop the server and remove its container."""
        if self._made:
            self._container.stop()
            self._made = self._up = False
