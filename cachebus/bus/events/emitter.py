"""The emitter: it adds the common fields to events and publishes them on the bus."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from msgspec.structs import replace

from cachebus.messages import Event

from ..clock import Clock
from ..tracing import current_trace
from .subscription import EventPolicy, SubscriptionRegistry


class _Publisher(Protocol):
    namespace: str
    clock: Clock
    subscriptions: SubscriptionRegistry
    policy: EventPolicy

    def publish(self, event: Event) -> None: ...


class _Origin:
    """The name of this process in events. A forked child gets a new one."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.name = f"{os.getpid()}-{os.urandom(4).hex()}"


_origin = _Origin()


def origin() -> str:
    """Return the name of this process in events."""
    return _origin.name


class Emitter:
    """A source of events. It numbers its events within an epoch, so that listeners can detect gaps.

    Check `subscriptions.kinds` before you build an event, or let `emit` build it. If an event has no listeners, it is
    not built. Events that sampling leaves out are not numbered, so they do not appear as gaps.
    """

    __slots__ = ("_bus", "_sampled", "_sequence", "backend", "epoch", "subscriptions")

    def __init__(self, bus: _Publisher, backend: str = "") -> None:
        self._bus = bus
        self._sampled = bus.policy.sampled if bus.policy.samples else None
        self.subscriptions = bus.subscriptions
        self.backend = backend
        self.renew()

    def renew(self) -> None:
        """Begin a new epoch, for a new incarnation of an actor. The epochs of an emitter only grow."""
        self.epoch = max(time.time_ns(), getattr(self, "epoch", 0) + 1)
        self._sequence = itertools.count(1)

    def emit(self, kind: type[Event], /, *fields: Any, **named: Any) -> None:
        """Build an event from its fields and publish it, if the kind has listeners and the event is in the sample."""
        if kind in self.subscriptions.kinds and (self._sampled is None or self._sampled(kind)):
            build: Callable[..., Event] = kind
            bus, seq, epoch = self._bus, next(self._sequence), self.epoch
            name = _origin.name
            # `_header` without its dictionary, because this runs on the caller's hot path.
            bus.publish(
                build(
                    *fields,
                    **named,
                    id=f"{name}-{epoch:x}-{seq}",
                    namespace=bus.namespace,
                    backend=self.backend,
                    origin=name,
                    epoch=epoch,
                    seq=seq,
                    time=bus.clock.wall(),
                    trace=current_trace(),
                )
            )

    def publish(self, event: Event) -> None:
        """Add the common fields to an event and publish it, if its kind has listeners and it is in the sample."""
        kind = type(event)
        if kind in self.subscriptions.kinds and (self._sampled is None or self._sampled(kind)):
            self._bus.publish(replace(event, **self._header()))

    def _header(self) -> dict[str, Any]:
        """Return the common fields of the next event."""
        seq = next(self._sequence)
        bus, origin, epoch = self._bus, _origin.name, self.epoch
        return {
            # A counter, because a uuid4 would cost more than the rest of the event.
            "id": f"{origin}-{epoch:x}-{seq}",
            "namespace": bus.namespace,
            "backend": self.backend,
            "origin": origin,
            "epoch": epoch,
            "seq": seq,
            "time": bus.clock.wall(),
            "trace": current_trace(),
        }
