"""Exceptions thrown into the code of the cache from outside, at an instruction of the test's choice."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import cachebus
from cachebus.adapters.memory.eviction import NEVER, WeighedEntry
from cachebus.adapters.memory.expiry_wheel import DROPPED
from cachebus.adapters.memory.store import MemoryStore

PACKAGE = str(Path(cachebus.__file__).parent)
TURN = (
    *(
        "actors/runtime/cell.py",
        "actors/runtime/mailbox.py",
        "actors/backend/actor.py",
        "actors/runtime/turns.py",
        "bus/reply_ports.py",
    ),
    *(
        "adapters/memory/store.py",
        "adapters/memory/entries.py",
        "adapters/memory/leases.py",
        "adapters/memory/expiry_wheel.py",
    ),
    *(
        "adapters/memory/tags.py",
        "adapters/common/rate_limit.py",
        "adapters/common/glob.py",
        "adapters/memory/eviction/",
    ),
)
"""The modules whose code runs in a turn of a memory backend."""
assert all(Path(PACKAGE, module).exists() for module in TURN)


class Hard(BaseException):
    """What Ctrl-C and some time limits raise."""


class Soft(Exception):
    """What the time limits of Celery and RQ raise."""


def raise_soft(*_: object) -> None:
    """A signal handler."""
    raise Soft


@contextmanager
def installed(handler: Any) -> Iterator[None]:
    """Have `handler` as a signal handler of this process."""
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class Injector:
    """Calls `throw` at the `at`-th instruction of the turn's code. `reached` says whether there were so many."""

    def __init__(self, at: int, throw: Callable[[], None]) -> None:
        self.reached = False
        self._left = at
        self._throw = throw

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function, and return what it returns."""
        if sys.version_info >= (3, 13):
            pytest.skip("Python 3.13 reports only some opcodes to a trace function that was set for a frame")
        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # From 3.12 on, settrace looks for a frame that asks for opcodes.
        sys.settrace(self._enter)
        try:
            return function()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) or not file[len(PACKAGE) + 1 :].startswith(TURN):
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            self._left -= 1
            if self._left == 0:
                self.reached = True
                self._throw()
        return self._step


def assert_sound(store: MemoryStore) -> None:
    """Compare everything that a memory store keeps beside its entries with these."""
    entries = store._entries
    assert store._changing is None
    assert not store._policy.changing
    assert all(entry.key == key for key, entry in entries.items())
    assert len(store._policy) == len(entries) <= (store._max_entries or len(entries))
    weights = [entry.weight for entry in entries.values() if isinstance(entry, WeighedEntry)]
    assert store._weight == sum(weights)
    assert store._weight <= (store._max_bytes or store._weight)
    carried: dict[str, int] = {}
    for entry in entries.values():
        for tag in entry.tags:
            carried[tag] = carried.get(tag, 0) + 1
    assert {tag: record[0] for tag, record in store._tags._tags.items()} == carried
    watched = {id(entry) for slot in store._wheel._slots.values() for entry in slot}
    assert all(id(entry) in watched for entry in entries.values() if entry.expires_at not in (NEVER, DROPPED))
    assert store._wheel._references == sum(map(len, store._wheel._slots.values()))
    assert set(store._wheel._heap) == set(store._wheel._slots)
    assert store._metadata_of.keys() <= entries.keys()
    meters = store._rate_limits
    assert not meters._changing
    assert {*meters._empty} == {*meters._states} == {key for _, _, key in meters._empty._heap} & {*meters._states}
    leases = store._leases
    waiting = [waiter for lease in (*leases.by_key.values(), *leases._revoked.values()) for waiter in lease.waiters]
    assert {*waiting} == {*leases._parked}
    assert {*leases._due} == {lease for lease in (*leases.by_key.values(), *leases._revoked.values()) if lease.waiters}
    assert leases.granting is None
    tagged: dict[str, set[str]] = {}
    for lease in leases.by_key.values():
        for tag in lease.request.tags:
            tagged.setdefault(tag, set()).add(lease.request.key)
    assert leases._tagged == tagged
    victims = [store._policy.evict() for _ in range(len(entries))]
    assert {id(each) for each in victims} == {id(each) for each in entries.values()}
    for each in entries.values():
        store._policy.admit(each)
