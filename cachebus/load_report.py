"""The events of one load, and how long it took."""

from __future__ import annotations

from cachebus.messages import LoadFailed, LoadStarted, LoadSucceeded

from .link import Link


class LoadReport:
    """A context manager around the call of a loader. `duration` is in seconds, once it has ended."""

    __slots__ = ("_emitter", "_key", "_now", "_started", "duration")

    def __init__(self, link: Link, key: str) -> None:
        self._emitter = link.emitter
        self._now = link.bus.clock.monotonic
        self._key = key
        self.duration = 0.0

    def __enter__(self) -> None:
        self._started = self._now()
        if LoadStarted in self._emitter.audience.kinds:
            self._emitter.emit(LoadStarted(key=self._key))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        self.duration = self._now() - self._started
        if kind is None:
            if LoadSucceeded in self._emitter.audience.kinds:
                self._emitter.emit(LoadSucceeded(key=self._key, duration=self.duration))
        elif LoadFailed in self._emitter.audience.kinds:
            self._emitter.emit(LoadFailed(key=self._key, error=kind.__name__, duration=self.duration))
