"""The events of one load, and how long it took."""

from __future__ import annotations

from cachebus.messages import LoadFailed, LoadStarted, LoadSucceeded

from .link import Link


class LoadReport:
    """A context manager around the call of a loader for some keys. `duration` is in seconds, once it has ended."""

    __slots__ = ("_emitter", "_keys", "_now", "_started", "duration")

    def __init__(self, link: Link, *keys: str) -> None:
        self._emitter = link.emitter
        self._now = link.bus.clock.monotonic
        self._keys = keys
        self.duration = 0.0

    def __enter__(self) -> None:
        self._started = self._now()
        if LoadStarted in self._emitter.audience.kinds:
            for key in self._keys:
                self._emitter.emit(LoadStarted(key=key))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        self.duration = self._now() - self._started
        if kind is None:
            if LoadSucceeded in self._emitter.audience.kinds:
                for key in self._keys:
                    self._emitter.emit(LoadSucceeded(key=key, duration=self.duration))
        elif LoadFailed in self._emitter.audience.kinds:
            for key in self._keys:
                self._emitter.emit(LoadFailed(key=key, error=kind.__name__, duration=self.duration))
