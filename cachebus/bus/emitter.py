"""Speaking: one voice that stamps what it says and hands it to the bus."""

from __future__ import annotations

import itertools
import os
import time
from typing import Protocol

from cachebus.messages import Event

from .clock import Clock
from .subscription import Audience


class _Publisher(Protocol):
    namespace: str
    clock: Clock
    audience: Audience
    redact_keys: bool

    def publish(self, event: Event) -> None: ...


class _Origin:
    """The name of this process in events, another one after a fork."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.name = f"{os.getpid()}-{os.urandom(4).hex()}"


_origin = _Origin()


def origin() -> str:
    """The name of this process in events."""
    return _origin.name


class Emitter:
    """One voice: it counts what it says in its epoch, so that a listener sees a gap.

    Look at `audience.kinds` before building an event: nobody listening, nothing is built.
    """

    __slots__ = ("_bus", "_sequence", "audience", "backend", "epoch")

    def __init__(self, bus: _Publisher, backend: str = "") -> None:
        self._bus = bus
        self.audience = bus.audience
        self.backend = backend
        self.renew()

    def renew(self) -> None:
        """Begin a new epoch, as an actor's new life does. Epochs of one voice only grow."""
        self.epoch = max(time.time_ns(), getattr(self, "epoch", 0) + 1)
        self._sequence = itertools.count(1)

    def emit(self, event: Event) -> None:
        """Stamp an event and publish it, if anybody wants its kind."""
        if type(event) not in self.audience.kinds:
            return
        seq = next(self._sequence)
        header: dict[str, object] = {
            # A counter, because a uuid4 costs more than the rest of the event.
            "id": f"{_origin.name}-{self.epoch:x}-{seq}",
            "namespace": self._bus.namespace,
            "backend": self.backend,
            "origin": _origin.name,
            "epoch": self.epoch,
            "seq": seq,
            "time": self._bus.clock.wall(),
        }
        if self._bus.redact_keys and hasattr(event, "key"):
            header["key"] = ""
        event.stamp(header)
        self._bus.publish(event)
