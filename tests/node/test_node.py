"""A node does what its settings say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

from cachebus import ActorFailed, CacheClosed, CacheTimeoutError, Node, Overloaded, Settings, open_cache
from cachebus.actors import BatchStore, Capabilities, Gauges, InlineStore
from cachebus.adapters.memory.store import MemoryStore
from cachebus.client.failure_policy import OnError
from cachebus.messages import ActorGaveUp, CacheSet, Get, Missing, Reply, Request

pytestmark = pytest.mark.anyio


class FailingStore(MemoryStore):
    """A memory store with a bug in `increment`, which is not idempotent: each such request is a crash."""

    def verb(self, kind: type[Request[Any]]) -> Callable[[Any], Reply] | None:
        return self._fail if kind.__name__ == "Increment" else super().verb(kind)

    def _fail(self, request: Request[Any]) -> Reply:
        raise RuntimeError("a bug")


class SilentStore:
    """A batch store that answers nothing until it is told to."""

    name = "silent"
    capabilities = Capabilities()

    def __init__(self) -> None:
        self.speak = anyio.Event()

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        await self.speak.wait()
        return [Missing() for _ in batch]


def settings(on_error: OnError = "miss", /, **actors: object) -> Settings:
    return Settings(on_error=on_error, actors=actors)  # type: ignore[arg-type]


async def crashes_until_it_stays_down(**actors: object) -> int:
    made: list[InlineStore | BatchStore] = []

    def make(backend: object) -> FailingStore:
        made.append(store := FailingStore())
        return store

    async with open_cache(settings(restart_backoff=1e-6, **actors), stores=make) as cache:
        with cache.events(ActorGaveUp) as gave_up:
            crashes = 0
            while not len(gave_up):
                with pytest.raises(ActorFailed):
                    await cache.increment("n")
                crashes += 1
                assert crashes < 20
    return len(made)


async def test_an_actor_is_begun_anew_as_often_as_the_settings_say() -> None:
    assert await crashes_until_it_stays_down(max_restarts=1) == 2
    assert await crashes_until_it_stays_down(max_restarts=3) == 4


async def test_the_restart_options_reach_the_supervisor() -> None:
    node = Node(settings(max_restarts=7, restart_window=11.0, restart_backoff=0.5, restart_backoff_max=3.0))
    policy = node.supervisor.policy
    assert (policy.max_restarts, policy.window, policy.backoff, policy.backoff_max) == (7, 11.0, 0.5, 3.0)


async def test_a_mailbox_holds_as_many_messages_as_the_settings_say() -> None:
    store = SilentStore()
    outcomes: list[str] = []

    async with open_cache(settings("raise", mailbox_capacity=2), stores=lambda backend: store) as cache:

        async def ask(key: str) -> None:
            try:
                await cache.get(key)
            except Overloaded as error:
                outcomes.append(f"overloaded at {error.capacity}")
            else:
                outcomes.append("answered")

        async with anyio.create_task_group() as group:
            group.start_soon(ask, "under work")
            await anyio.wait_all_tasks_blocked()
            for key in ("first", "second", "third"):
                group.start_soon(ask, key)
            await anyio.wait_all_tasks_blocked()
            assert outcomes == ["overloaded at 2"]
            store.speak.set()
    assert outcomes == ["overloaded at 2", "answered", "answered", "answered"]


@pytest.mark.parametrize("inline", [True, False])
async def test_turns_run_on_the_callers_stack_only_if_the_settings_say_so(inline: bool) -> None:
    async with open_cache(settings(inline_turns=inline)) as cache:
        reply = cache.client.try_inline_get(Get("k"))
        assert (reply is not None) is inline
        assert await cache.get("k") is None


async def test_a_call_ends_within_the_timeout_of_the_settings() -> None:
    async with open_cache(Settings(timeout=0.05, on_error="raise"), stores=lambda backend: SilentStore()) as cache:
        with anyio.fail_after(30), pytest.raises(CacheTimeoutError) as caught:
            await cache.get("k")
    assert caught.value.timeout == 0.05
    assert caught.value.address == "backend.primary"


async def test_events_carry_the_namespace_and_the_backend_of_the_settings() -> None:
    async with open_cache("memory://?name=hot", namespace="shop") as cache:
        with cache.events(CacheSet) as events:
            await cache.set("k", 1)
            event = await anext(events)
    assert (event.namespace, event.backend) == ("shop", "hot")


async def test_each_backend_is_a_cache_of_its_own() -> None:
    both = Settings(backends=("memory://?name=hot&default=true", "memory://?name=cold"))  # type: ignore[arg-type]
    async with Node(both) as node:
        hot, cold = open_cache(both).attach(node.client()), open_cache(both).attach(node.client("cold"))
        await hot.set("k", "hot")
        assert await cold.get("k") is None
        assert await hot.get("k") == "hot"


async def test_a_named_backend_is_the_one_that_is_opened() -> None:
    both = Settings(backends=("memory://?name=hot&default=true", "memory://?name=cold"))  # type: ignore[arg-type]
    async with open_cache(both, name="cold") as cache:
        assert cache.client.address == "backend.cold"


async def test_a_node_is_entered_once() -> None:
    node = Node(Settings())
    async with node:
        pass
    with pytest.raises(CacheClosed):
        await node.__aenter__()
