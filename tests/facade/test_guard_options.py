"""Every option of the guard, set in a URL and checked with a failing store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from anyio import to_thread
from anyio.lowlevel import checkpoint

from cachebus import (
    Cache,
    CacheConfigurationError,
    CacheConnectionError,
    CacheTimeoutError,
    CircuitOpen,
    Overloaded,
    Settings,
    open_cache,
)
from cachebus.actors.ports import NO_PROGRESS
from cachebus.messages import Reply, Request, WrongType
from cachebus.settings import backend_from_url, load_settings
from cachebus.settings.backends import GuardSettings

from ..clock import ManualClock
from .outages import Outage, down
from .plugins import announce


@asynccontextmanager
async def guarded(options: str, store: Outage, **more: Any) -> AsyncIterator[Cache]:
    """Open a cache over `store` with these options of the guard. Its failures raise."""
    async with open_cache(f"redis://?{options}", stores=lambda _: store, on_error="raise", **more) as cache:
        yield cache


async def ask(cache: Cache, times: int = 1) -> list[str]:
    """Return the outcomes of sequential reads."""
    outcomes: list[str] = []
    for _ in range(times):
        try:
            await cache.get("k")
        except (CircuitOpen, CacheConnectionError, CacheTimeoutError) as error:
            outcomes.append(type(error).code)
        else:
            outcomes.append("answered")
    return outcomes


async def state(cache: Cache) -> str:
    return str((await cache.statistics()).guard["state"])


# The circuit breaker


@pytest.mark.parametrize("threshold", [1, 3, 7])
async def test_breaker_failure_threshold_says_how_many_failures_open_the_circuit(threshold: int) -> None:
    async with guarded(f"breaker_failure_threshold={threshold}&retry_attempts=1", store := Outage()) as cache:
        store.error = down()
        assert await ask(cache, 10) == ["connection"] * threshold + ["circuit_open"] * (10 - threshold)
        assert len(store.asked) == threshold


async def test_breaker_off_leaves_a_failing_server_never_alone() -> None:
    async with guarded("breaker=off&breaker_failure_threshold=1&retry_attempts=1", store := Outage()) as cache:
        store.error = down()
        assert await ask(cache, 50) == ["connection"] * 50
        assert await state(cache) == "closed"


@pytest.mark.parametrize("recovery", [0.5, 60.0])
async def test_breaker_recovery_says_how_long_the_server_is_left_alone(recovery: float) -> None:
    clock, store = ManualClock(), Outage()
    options = f"breaker_recovery={recovery}&breaker_failure_threshold=1&retry_attempts=1"
    async with guarded(options, store, clock=clock) as cache:
        store.error = down()
        await ask(cache)
        store.error = None
        clock.advance(recovery - 0.01)
        assert await ask(cache) == ["circuit_open"]
        clock.advance(0.01)
        assert await ask(cache) == ["answered"]


@pytest.mark.parametrize("threshold", [1, 4])
async def test_breaker_success_threshold_says_how_many_probes_close_the_circuit(threshold: int) -> None:
    clock, store = ManualClock(), Outage()
    options = f"breaker_success_threshold={threshold}&breaker_failure_threshold=1&retry_attempts=1"
    async with guarded(options, store, clock=clock) as cache:
        store.error = down()
        await ask(cache)
        store.error = None
        clock.advance(30.0)
        for _ in range(threshold):
            assert await state(cache) != "closed"
            await ask(cache)
        assert await state(cache) == "closed"


class Piped(Outage):
    """`Outage` with several batches in flight, which `answer` answers."""

    long_running: frozenset[type[Request[Any]]] = frozenset()
    max_batch = 1

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[Any] = []

    async def submit(self, batch: Any, on_replies: Any) -> Any:
        self.asked.append(batch)
        if self.error is not None:
            raise self.error
        self.under_way.append((batch, on_replies))
        return NO_PROGRESS

    def try_submit(self, batch: Any, on_replies: Any) -> None:
        return None

    async def answer(self) -> None:
        """Answer the batches in flight."""
        under_way, self.under_way = self.under_way, []
        for batch, replied in under_way:
            replies: list[Reply] = list(await self.inner.execute(batch))
            replied(replies)


@pytest.mark.parametrize("most", [1, 2])
async def test_breaker_half_open_max_says_how_many_probe_at_a_time(most: int) -> None:
    clock, store = ManualClock(), Piped()
    options = f"breaker_half_open_max={most}&breaker_failure_threshold=1&retry_attempts=1"
    async with guarded(options, store, clock=clock) as cache:
        store.error = down()
        await ask(cache)
        store.error = None
        clock.advance(30.0)
        outcomes: list[str] = []

        async def probe() -> None:
            outcomes.extend(await ask(cache))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(probe)
            while len(outcomes) < 10 - most:
                await checkpoint()
            assert (outcomes, len(store.under_way)) == (["circuit_open"] * (10 - most), most)
            await store.answer()
        assert outcomes[10 - most :] == ["answered"] * most


@pytest.mark.parametrize("name", ["connection", "CacheConnectionError", "CacheBackendError", "timeout,connection"])
async def test_breaker_excluded_names_errors_that_are_no_failures(name: str) -> None:
    options = f"breaker_excluded={name}&breaker_failure_threshold=1&retry_attempts=1"
    async with guarded(options, store := Outage()) as cache:
        store.error = down()
        assert await ask(cache, 10) == ["connection"] * 10
        assert (await cache.statistics()).guard["failure_count"] == 0
    async with guarded(options.replace(name, "WrongType"), store := Outage()) as cache:
        store.error = down()
        assert await ask(cache, 2) == ["connection", "circuit_open"]


# Retries


@pytest.mark.parametrize("attempts", [1, 2, 6])
async def test_retry_attempts_says_how_often_a_read_is_tried(attempts: int) -> None:
    options = f"retry_attempts={attempts}&retry_backoff_base=0.0001&breaker=off"
    async with guarded(options, store := Outage()) as cache:
        store.error = down()
        assert await ask(cache) == ["connection"]
        assert len(store.asked) == attempts


@pytest.mark.parametrize("option", ["retry_backoff_base=1e18&retry_backoff_max=1e18", "retry_backoff_base=40"])
async def test_the_backoffs_say_how_long_the_pauses_are(option: str) -> None:
    if "max" not in option:
        with pytest.raises(CacheConfigurationError, match="retry_backoff_max 1 is less than retry_backoff_base 40"):
            backend_from_url(f"redis://?{option}")
        return
    # A pause that exceeds the time left for the call is not started, so the first failure is the answer. Pauses are
    # random below the base, which is so long that practically no pause fits.
    async with guarded(f"{option}&breaker=off", store := Outage(), timeout=60.0) as cache:
        store.error = down()
        assert await ask(cache, 20) == ["connection"] * 20
        assert len(store.asked) == 20


async def test_retry_backoff_max_bounds_the_pauses() -> None:
    # Pauses that double thirty times would exceed the time of the call.
    options = "retry_backoff_base=0.001&retry_backoff_max=0.001&retry_attempts=30&retry_budget=1&breaker=off"
    async with guarded(options, store := Outage()) as cache:
        store.error = down()
        assert await ask(cache) == ["connection"]
        assert len(store.asked) == 30


@pytest.mark.parametrize(("budget", "repetitions"), [("0", 10), ("0.5", 10 + 0.5 * 100), ("1", 100)])
async def test_retry_budget_bounds_the_repetitions_of_many_calls(budget: str, repetitions: float) -> None:
    options = f"retry_budget={budget}&retry_attempts=2&retry_backoff_base=0.0001&breaker=off"
    async with guarded(options, store := Outage()) as cache:
        store.error = down()
        await ask(cache, 100)
        tried = len(store.asked) - 100
    if budget == "0.5":
        # Retries are batches too, and earn their share of the budget.
        assert repetitions <= tried < 100 + 10
    else:
        assert tried == repetitions


# Timeouts


@pytest.mark.parametrize("seconds", [0.05, 0.2])
async def test_timeout_initial_says_how_long_the_first_answer_is_waited_for(seconds: float) -> None:
    options = f"timeout_initial={seconds}&retry_attempts=1"
    async with guarded(options, store := Outage()) as cache:
        store.silent = True
        with pytest.raises(CacheTimeoutError) as caught:
            await cache.get("k")
        assert seconds <= caught.value.timeout < seconds + 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [("", 0.1), ("timeout_min=0.7", 0.7), ("timeout_min=0.0001&timeout_max=0.0001", 0.0001)],
)
async def test_timeout_min_and_max_bound_the_adaptive_timeout(options: str, expected: float) -> None:
    async with guarded(f"{options}&retry_attempts=1".lstrip("&"), store := Outage()) as cache:
        del store
        # With a timeout of 0.1 ms, an answer may be too late. One answer in time is enough.
        while not (await cache.statistics()).guard["success_count"]:
            await ask(cache)
        assert (await cache.statistics()).guard["current_timeout"] <= max(expected, 0.0001)
        assert (await cache.statistics()).guard["current_timeout"] == pytest.approx(expected)


async def test_timeout_max_bounds_what_silence_makes_of_the_timeout() -> None:
    async with guarded("timeout_max=0.15&timeout_initial=0.1&retry_attempts=1", store := Outage()) as cache:
        store.silent = True
        await ask(cache, 4)
        assert (await cache.statistics()).guard["current_timeout"] == 0.15


async def test_timeout_window_says_of_how_many_answers_the_percentile_is() -> None:
    clock = ManualClock()

    class Slow(Outage):
        seconds = 1.0

        async def execute(self, batch: Any) -> Any:
            clock.advance(self.seconds)
            return await super().execute(batch)

    for window, p95 in ((5, 0.0), (1000, 1.0)):
        options = f"timeout_window={window}&timeout_initial=10"
        async with guarded(options, store := Slow(), clock=clock, timeout=60) as cache:
            await ask(cache, 10)
            store.seconds = 0.0
            await ask(cache, 10)
            assert (await cache.statistics()).guard["p95"] == p95


# The concurrency limit


async def test_max_concurrent_and_max_waiting_bound_what_the_server_is_asked() -> None:
    async with guarded("max_concurrent=2&max_waiting=0", store := Piped()) as cache:
        refused = 0

        async def ask_once() -> None:
            nonlocal refused
            try:
                await cache.get("k")
            except Overloaded:
                refused += 1

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(ask_once)
            while refused < 3:
                await checkpoint()
            guard = (await cache.statistics()).guard
            assert (len(store.under_way), guard["in_flight"], guard["rejected"]) == (2, 2, 3)
            await store.answer()
    store = Piped()
    async with guarded("max_concurrent=2&max_waiting=5", store) as cache, anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(cache.get, "k")
        answered = 0
        while answered < 5:
            while not store.under_way:
                await checkpoint()
            assert len(store.under_way) <= 2
            answered += len(store.under_way)
            await store.answer()


# Sources of the options


def test_the_defaults_are_the_documented_ones() -> None:
    assert GuardSettings().model_dump() == {
        "breaker": True,
        "breaker_failure_threshold": 5,
        "breaker_success_threshold": 3,
        "breaker_recovery": 30.0,
        "breaker_half_open_max": 3,
        "breaker_excluded": (),
        "retry_attempts": 3,
        "retry_backoff_base": 0.05,
        "retry_backoff_max": 1.0,
        "retry_budget": 0.2,
        "timeout_initial": 1.0,
        "timeout_min": 0.1,
        "timeout_max": 10.0,
        "timeout_window": 1000,
        "max_concurrent": 100,
        "max_waiting": 1000,
    }


def test_they_stand_flat_in_a_file_and_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cachebus.yaml"
    entry = {"type": "redis", "breaker_recovery": 0.5, "breaker_excluded": ["CacheTimeoutError"], "breaker": False}
    file.write_text(yaml.safe_dump({"backends": [entry]}))
    from_url = load_settings("redis://?breaker_recovery=0.5&breaker_excluded=timeout&breaker=no")
    assert load_settings(str(file)) == from_url
    monkeypatch.setenv("CACHEBUS_BACKENDS", '["redis://?breaker_recovery=0.5&breaker_excluded=timeout&breaker=no"]')
    assert load_settings() == from_url
    backend = from_url.default_backend
    assert isinstance(backend, GuardSettings)
    assert (backend.breaker_recovery, backend.breaker_excluded, backend.breaker) == (0.5, ("timeout",), False)


def test_what_a_store_is_comes_before_how_it_is_guarded() -> None:
    (shown,) = Settings(backends=("redis://",)).model_dump(mode="json")["backends"]  # type: ignore[arg-type]
    assert next(iter(shown)) == "type"
    assert list(shown)[-1] == "max_waiting"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("breaker_recovry=1", "did you mean 'breaker_recovery'?"),
        ("breaker_recovery=0", "breaker_recovery: expected seconds above 0"),
        ("breaker_failure_threshold=0", "breaker_failure_threshold: expected a whole number, 1 or more"),
        ("breaker_excluded=timeuot", "breaker_excluded: unknown error 'timeuot' (did you mean 'timeout'?)"),
        ("timeout_min=20", "timeout_max 10 is less than timeout_min 20"),
        ("retry_budget=1.5", "retry_budget: expected a number from 0 to 1"),
        ("max_waiting=-1", "max_waiting: expected a whole number, 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options: str, sentence: str) -> None:
    with pytest.raises(CacheConfigurationError) as caught:
        backend_from_url(f"redis://?{options}")
    assert sentence in str(caught.value)


async def test_a_store_of_another_package_is_guarded_by_its_options_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(tmp_path, monkeypatch)
    entry = {"type": "plugin", "url": "shelf://there", "breaker_failure_threshold": 1, "retry_attempts": 1}
    store = Outage()
    # In a thread, because it searches installed packages on disk.
    settings = await to_thread.run_sync(lambda: load_settings({"backends": [entry]}, on_error="raise"))
    async with open_cache(settings, stores=lambda _: store) as cache:
        store.error = down()
        assert await ask(cache, 2) == ["connection", "circuit_open"]


def test_an_error_of_the_tree_is_found_by_class_and_by_code() -> None:
    assert GuardSettings(breaker_excluded=["WrongType", "wrong_type", ""]).breaker_excluded == ("wrong_type",)  # type: ignore[arg-type]
    assert GuardSettings(breaker_excluded=("wrong_type",)).guard_policy().excluded == (WrongType,)
