"""Exceptions from signal handlers and full stacks, at any instruction of a turn: only the interrupted call is lost."""

from __future__ import annotations

import functools
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from cachebus import SyncCache, open_sync_cache
from cachebus.adapters.memory.store import MemoryStore
from cachebus.bus import Envelope, ThreadPort
from cachebus.messages import Get, GetOrLease, LeaseGranted, ReleaseLease, Set

from ..interruptions import Hard, Injector, Soft, assert_sound, installed, raise_soft
from .faces import settings

OLD = {"a": 1, "b": 2, "c": 3, "n": 7}


class Bench:
    """Synchronous cache over a memory store that the test can inspect."""

    def __init__(self, **options: Any) -> None:
        self.store = MemoryStore(**options)
        self.cache = open_sync_cache(settings(timeout=20.0), stores=lambda _: self.store)
        self.cell: Any = self.cache.client.bus.recipient(self.cache.client.address)

    def prepare(self) -> None:
        """Reset the cache to the state before each attempt."""
        self.cache.clear()
        for key, value in OLD.items():
            self.cache.set(key, value, ttl=60.0, tags=["t", key])

    def check(self, allowed: dict[str, set[Any]]) -> None:
        """Check that the next calls work, and that every value is right or missing."""
        found = self.cache.get_many([*OLD, "new", "other"])
        for key, value in found.items():
            assert value in allowed.get(key, {OLD.get(key)}), key
        assert self.cache.set("after", 1)
        assert self.cache.get("after") == 1
        assert self.cache.delete("after")
        assert self.cache.statistics().restarts == 0
        assert self.cell._turn.free
        assert not self.cell._mailbox
        assert self.cell._crash is None
        assert not [each for each in self.cell._deferred if each.waiting]
        assert_sound(self.store)


STORES: dict[str, dict[str, Any]] = {
    "s3fifo": {},
    "lru": {"policy": "lru"},
    "lfu": {"policy": "lfu"},
    "weighed": {"policy": "sieve", "max_bytes": 2000, "weigher": lambda _: 10},
}


@pytest.fixture(params=STORES, name="bench")
def a_bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(**{"max_entries": 5, **STORES[request.param]})
    yield bench
    bench.cache.close()


def _fill(cache: SyncCache) -> None:
    for number in range(4):
        cache.set("other", number, ttl=5.0)
        cache.set(f"fill:{number}", number)


VERBS: dict[str, tuple[Callable[[SyncCache], Any], dict[str, set[Any]]]] = {
    "get": (lambda cache: cache.get("a"), {}),
    "miss": (lambda cache: cache.get("new"), {}),
    "get_many": (lambda cache: cache.get_many(["a", "b", "new"]), {}),
    "exists": (lambda cache: cache.exists("a"), {}),
    "overwrite": (lambda cache: cache.set("a", 10, ttl=5.0, tags=["t", "u"]), {"a": {1, 10}}),
    "insert": (lambda cache: cache.set("new", 10, ttl=5.0, tags=["t", "u"]), {"new": {10}}),
    "evict": (_fill, {"other": {0, 1, 2, 3}}),
    "set_many": (lambda cache: cache.set_many({"a": 10, "new": 11}, tags=["u"]), {"a": {1, 10}, "new": {11}}),
    "add": (lambda cache: cache.add("new", 10), {"new": {10}}),
    "only_if": (lambda cache: cache.set("a", 10, only_if="present"), {"a": {1, 10}}),
    "compare_and_set": (
        lambda cache: cache.compare_and_set("a", 10, version=cache.lookup("a").version),  # type: ignore[union-attr]
        {"a": {1, 10}},
    ),
    "touch": (lambda cache: cache.touch("a", ttl=3.0), {}),
    "increment": (lambda cache: cache.increment("n"), {"n": {7, 8}}),
    "delete": (lambda cache: cache.delete("a"), {}),
    "delete_many": (lambda cache: cache.delete_many(["a", "b"]), {}),
    "delete_pattern": (lambda cache: cache.delete_pattern("[ab]"), {}),
    "scan": (lambda cache: list(cache.scan("*")), {}),
    "invalidate_tags": (lambda cache: cache.invalidate_tags("t", "a"), {}),
    "clear": (lambda cache: cache.clear(), {}),
    "get_or_load": (lambda cache: cache.get_or_load("a", lambda: 99), {}),
    "rate_limit": (lambda cache: cache.rate_limit("limit", 5, 60.0).check(), {}),
}


def throw_hard() -> None:
    raise Hard


def throw_soft() -> None:
    raise_soft()


def attempts(
    bench: Bench,
    call: Callable[[], Any],
    throw: Callable[[], None],
    stride: int,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[bool]:
    """Prepare and call, with an interruption at each instruction of the call."""
    reached, at = True, 0
    with installed(raise_soft):
        while reached:
            at += stride
            bench.prepare()
            begin()
            injector = Injector(at, throw)
            try:
                injector.run(call)
                assert not injector.reached, "the exception did not reach the caller"
            except (Hard, Soft):
                assert injector.reached
            reached = injector.reached
            yield reached
    assert at > 20


@pytest.mark.parametrize("verb", VERBS)
def test_an_interruption_at_any_instruction_costs_no_more_than_what_was_being_done(verb: str) -> None:
    bench = Bench(max_entries=5)
    call, allowed = VERBS[verb]
    for _ in attempts(bench, lambda: call(bench.cache), throw_hard, 1):
        bench.check(allowed)
    bench.cache.close()


@pytest.mark.parametrize("verb", ["get", "overwrite", "evict", "set_many", "increment", "touch", "delete", "clear"])
def test_nor_with_another_policy_or_from_a_signal_handler_that_raises_an_exception(bench: Bench, verb: str) -> None:
    call, allowed = VERBS[verb]
    for _ in attempts(bench, lambda: call(bench.cache), throw_soft, 5):
        bench.check(allowed)


def test_a_repair_may_be_interrupted_too() -> None:
    bench = Bench(max_entries=5)

    def breaks_a_write(at: int) -> bool:
        """Interrupt a write at an instruction. Return `True` if an entry needs a repair."""
        with suppress(Hard):
            Injector(at, throw_hard).run(lambda: bench.cache.set("a", 10, ttl=5.0, tags=["t", "u"]))
        return bench.store._changing == "a"

    halfway = []
    for at in range(1, 400):
        bench.prepare()
        if breaks_a_write(at):
            halfway.append(at)
    middle = halfway[len(halfway) // 2]
    reached, at = True, 0
    while reached:
        at += 1
        bench.prepare()
        assert breaks_a_write(middle)
        # The next call repairs the damage of the first interruption, and is interrupted as well.
        injector = Injector(at, throw_hard)
        with suppress(Hard):
            injector.run(lambda: bench.cache.get("b"))
        reached = injector.reached
        bench.check({"a": {1, 10}})
    assert at > 20
    bench.cache.close()


def test_callers_who_wait_for_a_load_are_answered_whatever_is_interrupted() -> None:
    bench = Bench(max_entries=5)
    ask = bench.cell.turn(GetOrLease)

    def ask_as(owner: str, token: str) -> Any:
        return ask(GetOrLease("key", token=token, owner=owner, lease_ttl=60.0, wait=60.0, tags=("t",)))

    def end_the_load(kind: str) -> None:
        if kind == "store":
            bench.cache.client.try_inline_set(Set("key", 5, 60.0, ("t",), lease=lease[0]))
        elif kind == "release":
            bench.cell.turn(ReleaseLease)(ReleaseLease("key", lease[0]))
        elif kind == "overtake":
            bench.cache.set("key", 6)
        else:
            bench.cache.invalidate_tags("t")

    lease = [""]
    ports: list[ThreadPort] = []

    def begin() -> None:
        lease[0] = ask_as("first", "first").token
        ports.clear()
        for number in range(2):
            ports.append(ThreadPort())
            ask_as(f"waiter{number}", f"waiter{number}").attach(ports[-1])

    for kind in ("store", "release", "overtake", "invalidate"):
        for _ in attempts(bench, functools.partial(end_the_load, kind), throw_hard, 3, begin):
            assert bench.cache.get("nothing") is None
            assert_sound(bench.store)
            # Release the lease once more, in case it survived: every waiter must get an answer.
            bench.cache.clear()
            bench.cell.turn(ReleaseLease)(ReleaseLease("key", lease[0]))
            for port in ports:
                answer = port.wait(5.0, lambda: "forgotten")
                assert answer != "forgotten"
                if isinstance(answer, LeaseGranted):  # Release the lease for the next waiter.
                    bench.cell.turn(ReleaseLease)(ReleaseLease("key", answer.token))
            assert not [each for each in bench.cell._deferred if each.waiting]
    bench.cache.close()


@pytest.mark.parametrize("throw", [throw_hard, throw_soft])
def test_a_thread_that_waits_for_a_turn_is_served_when_the_turn_is_interrupted(throw: Callable[[], None]) -> None:
    answers: list[Any] = []
    threads: list[threading.Thread] = []

    def weigh(value: Any) -> int:
        if value == "interrupt":
            thread = threading.Thread(target=lambda: answers.append(bench.cache.get("a")))
            threads.append(thread)
            thread.start()
            while not bench.cell._mailbox:
                pass
            throw()
        return 10

    bench = Bench(max_bytes=10_000, weigher=weigh)
    bench.cache.set("a", 1)
    with installed(raise_soft), pytest.raises((Hard, Soft)):
        bench.cache.set("b", "interrupt")
    threads[0].join()
    assert answers == [1]
    assert bench.cache.statistics().restarts == 0
    assert_sound(bench.store)
    bench.cache.close()


def test_a_thread_is_served_though_the_interrupted_turn_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = []
    bench = Bench()
    bench.cache.set("a", 1)
    bench.cell._turn.free.pop()  # As after a turn on a full stack that could not wake the actor's task.
    port = ThreadPort()
    monkeypatch.setattr(bench.cell, "_reclaim", lambda: False)
    bench.cell.post(Envelope(Get("a"), port))
    monkeypatch.undo()
    answers.append(port.wait(5.0, lambda: "forgotten"))
    assert answers[0].value == 1
    bench.cache.close()


def test_a_turn_under_way_is_never_taken_over() -> None:
    inside, go, most = [0], threading.Event(), [0]

    def weigh(value: Any) -> int:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        if value == "long":
            go.wait(10.0)
        inside[0] -= 1
        return 10

    bench = Bench(max_bytes=10_000, weigher=weigh)
    first = threading.Thread(target=lambda: bench.cache.set("a", "long"))
    first.start()
    others = [threading.Thread(target=lambda: bench.cache.set("b", 1)) for _ in range(4)]
    while bench.cell._turn.free:
        pass
    for each in others:
        each.start()
    while len(bench.cell._mailbox) < len(others):
        assert bench.cell._reclaim() is False
    go.set()
    for each in [first, *others]:
        each.join()
    assert most == [1]
    assert bench.cache.get("a") == "long"
    bench.cache.close()


def test_the_turn_stays_whole_under_a_storm_of_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python swallows exceptions in callbacks of weak references, and passes them to this hook.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    bench = Bench(max_entries=50)
    chance = random.Random(5)
    written: dict[str, set[int]] = {}

    def alarm(*_: object) -> None:
        raise Soft

    before = signal.signal(signal.SIGALRM, alarm)
    raised = number = 0
    try:
        while raised < 300:
            try:
                # Repeatedly, because some exceptions are swallowed.
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(50e-6, 2e-3), 2e-3)
                try:
                    while True:
                        number += 1
                        key = f"k{number % 80}"
                        written.setdefault(key, set()).add(number)
                        bench.cache.set(key, number, ttl=30.0, tags=["t"])
                        assert bench.cache.get(key) in (None, number)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Soft:
                raised += 1
                found = bench.cache.get(f"k{number % 80}")
                assert found is None or found in written[f"k{number % 80}"]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert bench.cache.get("nothing") is None
    assert bench.cache.statistics().restarts == 0
    assert_sound(bench.store)
    bench.cache.close()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verb", ["get", "miss", "overwrite", "insert", "delete", "increment", "get_or_load", "clear"])
def test_a_full_stack_at_any_depth_reaches_its_caller_and_changes_nothing_else(verb: str) -> None:
    call, allowed = VERBS[verb]
    bench = Bench(max_entries=5)

    def at_depth(frames: int) -> Any:
        return call(bench.cache) if frames <= 0 else at_depth(frames - 1)

    def depth() -> int:
        frame, count = sys._getframe(), 0
        while frame is not None:
            frame, count = frame.f_back, count + 1  # type: ignore[assignment]
        return count

    overflows = 0
    for room in range(60, 0, -1):
        bench.prepare()
        try:
            at_depth(sys.getrecursionlimit() - depth() - room)
        except RecursionError:
            overflows += 1
        bench.check(allowed)
    assert overflows > 2
    assert bench.cache.statistics().restarts == 0
    bench.cache.close()


def test_endless_recursion_over_a_cache_leaves_it_as_it_was() -> None:
    bench = Bench()
    bench.cache.set("rate", 7)
    node: list[Any] = []
    node.append(node)

    def walk(node: list[Any]) -> int:
        return int(bench.cache.get("rate")) + walk(node[0])

    for _ in range(12):
        with pytest.raises(RecursionError):
            walk(node)
        assert bench.cache.get("rate") == 7
    assert bench.cache.statistics().restarts == 0
    bench.cache.close()
