"""Threads, several event loops, forks and exits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

from cachebus import Cache, CacheClosed, CacheError, Found, Node, SyncCache, open_cache
from cachebus.adapters.memory.store import MemoryStore
from cachebus.client.background_loop import run

from ..house.paths import ROOT
from .faces import SilentStore, a_cache, a_sync_cache, settings

THREADS = 16
ROUNDS = 1_500
MAX_ENTRIES = 50


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Run `function` in `count` threads that begin at the same moment, and return their results."""
    start = threading.Barrier(count)

    def begin(number: int) -> Any:
        start.wait()
        return function(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Switch threads after 20 microseconds instead of 5 milliseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(interval)


# One backend, many threads


@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
def test_threads_and_a_loop_on_one_store_lose_no_update(inline: bool) -> None:
    stores: list[MemoryStore] = []

    def make_store(_: object) -> MemoryStore:
        stores.append(MemoryStore(max_entries=MAX_ENTRIES, policy="lru"))
        return stores[-1]

    rounds = ROUNDS if inline else ROUNDS // 10
    node = Node(settings(inline=inline, timeout=60.0), stores=make_store)
    failures: list[BaseException] = []

    def hammer(number: int) -> None:
        chance = random.Random(number)
        cache = Cache(lambda: node).attach(node.client(), blocking=True)
        try:
            for round_ in range(rounds):
                run(cache.increment("counter"))
                run(mixed(cache, chance, number, round_))
        except BaseException as error:
            failures.append(error)

    async def hammer_on_the_loop(number: int) -> None:
        chance = random.Random(number)
        cache = Cache(lambda: node).attach(node.client())
        for round_ in range(rounds):
            await cache.increment("counter")
            await mixed(cache, chance, number, round_)

    async def main() -> None:
        async with node:
            threads = [threading.Thread(target=hammer, args=(number,)) for number in range(THREADS)]
            for thread in threads:
                thread.start()
            await asyncio.gather(*[hammer_on_the_loop(THREADS + number) for number in range(4)])
            for thread in threads:
                await asyncio.to_thread(thread.join)
            assert await Cache(lambda: node).attach(node.client()).get("counter") == (THREADS + 4) * rounds

    asyncio.run(main())
    assert failures == []
    assert len(stores) == 1, "the actor must not crash"


async def mixed(cache: Cache, chance: random.Random, number: int, round_: int) -> None:
    key = f"k{chance.randrange(80)}"
    match chance.randrange(10):
        case 0 | 1:
            await cache.set(key, key, ttl=chance.choice([None, 0.001, 10.0]), tags=[f"t{number % 3}"])
        case 2 | 3 | 4:
            assert await cache.get(key, key) == key
        case 5:
            assert all(name == value for name, value in (await cache.get_many([key, "k1", "k2"])).items())
        case 6:
            await cache.delete(key)
        case 7:
            await cache.add(key, key)
            await cache.touch(key, ttl=5.0)
        case 8:
            await cache.invalidate_tags(f"t{number % 3}")
        case _:
            statistics = await cache.statistics()
            assert statistics.entries <= MAX_ENTRIES
            mine = f"mine {number}"
            await cache.set(mine, round_)
            assert await cache.get(mine, round_) == round_


def test_64_threads_share_a_synchronous_cache() -> None:
    with a_sync_cache(max_entries=1_000) as cache:

        def work(number: int) -> None:
            for round_ in range(200):
                cache.increment("counter")
                cache.set(f"{number}:{round_ % 10}", round_)
                assert cache.get(f"{number}:{round_ % 10}") == round_

        in_threads(64, work)
        assert cache.get("counter") == 64 * 200
        assert cache.statistics().overloaded == 0


@pytest.mark.usefixtures("frequent_switches")
def test_no_compare_and_set_of_two_threads_wins_twice() -> None:
    with a_sync_cache() as cache:
        cache.set("balance", 0)

        def work(_: int) -> int:
            won = 0
            for _ in range(300):
                found = cache.lookup("balance")
                assert isinstance(found, Found)
                won += cache.compare_and_set("balance", found.value + 1, version=found.version)
            return won

        assert sum(in_threads(8, work)) == cache.get("balance")


def test_a_first_use_that_races_opens_once() -> None:
    made: list[Node] = []

    def make_node() -> Node:
        made.append(Node(settings(), stores=lambda _: MemoryStore()))
        return made[-1]

    cache = SyncCache(make_node)
    in_threads(32, lambda number: cache.set(f"k{number}", number))
    assert len(made) == 1
    assert len(cache.get_many(f"k{number}" for number in range(32))) == 32
    cache.close()


def test_closing_while_threads_call_answers_every_call() -> None:
    cache = a_sync_cache()
    outcomes: list[str] = []
    under_way = threading.Barrier(9)

    def work(_: int) -> None:
        cache.set("key", 1)
        under_way.wait()
        try:
            while True:
                cache.increment("counter")
        except CacheClosed:
            outcomes.append("closed")

    with ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(work, number) for number in range(8)]
        under_way.wait()
        cache.close()
        for worker in workers:
            worker.result()
    assert outcomes == ["closed"] * 8


async def test_closing_with_1_000_calls_under_way_answers_them_all() -> None:
    store = SilentStore()
    answers = 0

    async def call(number: int) -> None:
        nonlocal answers
        with contextlib.suppress(CacheError):
            await cache.get(f"k{number}", "missing")
        answers += 1

    async with open_cache(settings(), stores=lambda _: store) as cache, anyio.create_task_group() as tasks:
        for number in range(1_000):
            tasks.start_soon(call, number)
        await anyio.wait_all_tasks_blocked()
        store.release()
        await cache.close()
    assert answers == 1_000


# Inside a running loop


def test_memory_hits_work_inside_a_running_loop() -> None:
    cache = a_sync_cache()
    cache.set("key", 1)

    async def main() -> None:
        assert cache.get("key") == 1
        assert cache.get("missing", 5) == 5
        cache.set("other", 2)
        assert cache.increment("n", initial=cache.get("n", 0)) >= 1
        assert sorted(cache.scan()) == ["key", "n", "other"]

    asyncio.run(main())
    anyio.run(main, backend="trio")
    cache.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_first_use_inside_a_running_loop_opens_the_cache(backend: str) -> None:
    cache = a_sync_cache()

    async def main() -> None:
        cache.set("key", 1)
        assert cache.get("key") == 1

    anyio.run(main, backend=backend)
    assert cache.get("key") == 1
    cache.close()


@pytest.mark.parametrize("what", ["a store that waits", "turns by the task"])
def test_what_would_stop_the_running_loop_is_refused(what: str) -> None:
    store = SilentStore()
    store.release()
    if what == "a store that waits":
        cache = SyncCache(lambda: Node(settings(), stores=lambda _: store))
    else:
        cache = a_sync_cache(inline=False)
    assert cache.get("key", "outside") == "outside"

    async def main() -> None:
        for call in (lambda: cache.get("key"), lambda: cache.set("key", 1), lambda: cache.increment("n"), cache.clear):
            with pytest.raises(CacheError, match=r"backend\.primary would deadlock: it would block the event loop"):
                call()
        assert await asyncio.to_thread(cache.get, "key", "thread") == "thread"

    asyncio.run(main())
    assert cache.get("key", "outside") == "outside"
    cache.close()


# More than one loop


def test_a_second_loop_in_another_thread_uses_the_same_cache() -> None:
    async def main() -> None:
        async with a_cache() as cache:
            await cache.set("from", "the first")
            others = await asyncio.to_thread(lambda: [asyncio.run(other(cache, "asyncio")), in_trio(cache)])
            assert others == ["the first", "asyncio"]
            assert await cache.get("from") == "trio"

    async def other(cache: Cache, name: str) -> Any:
        before = await cache.get("from")
        await cache.set("from", name)
        for _ in range(2_000):
            await cache.increment("n")
        return before

    def in_trio(cache: Cache) -> Any:
        return anyio.run(other, cache, "trio", backend="trio")

    asyncio.run(main())


def test_a_second_loop_waits_for_turns_that_the_first_one_takes() -> None:
    async def main() -> None:
        async with a_cache(inline=False) as cache:
            await cache.set("key", 1)

            async def other() -> Any:
                return [await cache.get("key"), await cache.increment("n"), (await cache.health()).ok]

            assert await asyncio.to_thread(lambda: asyncio.run(other())) == [1, 1, True]
            assert await asyncio.to_thread(lambda: anyio.run(other, backend="trio")) == [1, 2, True]

    asyncio.run(main())


def test_a_new_cache_can_be_opened_in_each_run_of_a_loop() -> None:
    async def main() -> None:
        async with a_cache() as cache:
            assert await cache.get("key") is None
            await cache.set("key", 1)

    for _ in range(3):
        asyncio.run(main())
        anyio.run(main, backend="trio")


def test_a_cache_whose_loop_is_gone_says_so() -> None:
    cache = a_cache()

    async def main() -> None:
        async with cache:
            await cache.set("key", 1)

    asyncio.run(main())
    with pytest.raises(CacheClosed, match="the cache is closed"):
        asyncio.run(cache.get("key"))


# Exits and forks, each in a new interpreter


def python(code: str, timeout: float = 40.0) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter, for about `timeout` seconds at most."""
    header = "import asyncio, os, sys, threading\nfrom cachebus import *\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", header + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_clean(ran: subprocess.CompletedProcess[str], output: str) -> None:
    assert (ran.stderr, ran.stdout, ran.returncode) == ("", output, 0)


@pytest.mark.parametrize(
    "code",
    [
        "cache = open_sync_cache('memory://'); cache.set('key', 1, ttl=60); print(cache.get('key'))",
        "cache = open_sync_cache('memory://').__enter__(); cache.set('key', 1); print(cache.get('key')); sys.exit(0)",
        "import atexit; cache = open_sync_cache('memory://'); cache.set('key', 1); atexit.register(lambda: print(cache.get('key')))",
        "class V:\n  def __del__(self): cache.get('key')\ncache = open_sync_cache('memory://'); cache.set('key', V()); print(1)",
        "cache = open_sync_cache('memory://'); cache.set('key', 1); print(cache.get('key')); cache.close()",
        "cache = open_sync_cache('memory://')\nt = threading.Thread(target=lambda: cache.set('key', 1)); t.start(); t.join(); print(cache.get('key'))",
        "cache = open_sync_cache('memory://'); e = cache.events(); cache.set('key', 1); print(len([e.next(0)]))",
    ],
    ids=["at the end", "by sys.exit", "used at exit", "a value with __del__", "closed", "from a thread", "listening"],
)
def test_an_interpreter_exits_at_once_without_a_close_and_without_a_word(code: str) -> None:
    assert_clean(python(code), "1\n")


def test_an_interpreter_exits_when_a_thread_still_waits_for_an_answer() -> None:
    ran = python(
        "from tests.facade.faces import SilentStore\n"
        "cache = open_sync_cache('memory://', stores=lambda _: SilentStore(), timeout=60)\n"
        "cache.health()\n"
        "threading.Thread(target=cache.get, args=('key',), daemon=True).start()\n"
        "print(1)"
    )
    assert_clean(ran, "1\n")


FORK = """
def in_child(function):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            function()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_child_of_a_fork_has_a_synchronous_cache_of_its_own() -> None:
    ran = python(
        FORK
        + """
cache = open_sync_cache('memory://')
cache.set('key', 'parent')
def child():
    print(repr(cache), cache.get('key'))
    cache.set('key', 'child')
    print(cache.get('key'), cache.increment('n'), cache.increment('n'))
    in_child(lambda: print('grandchild', cache.get('key')))
in_child(child)
print(cache.get('key'), cache.get('n'))
in_child(lambda: (cache.set('key', 2), cache.close(), cache.close()))
print(cache.get('key'))
cache.close()
def closed():
    try: cache.get('key')
    except CacheClosed as error: print(error)
in_child(closed)
"""
    )
    assert_clean(
        ran,
        "<SyncCache unopened> None\nchild 1 2\ngrandchild None\nparent None\nparent\nthe cache is closed\n",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_other_threads_load_leaves_no_load_behind_in_the_child() -> None:
    ran = python(
        FORK
        + """
cache = open_sync_cache('memory://')
loading, go_on = threading.Event(), threading.Event()
@cache.cached(key='key')
def load():
    loading.set()
    go_on.wait()
    return 1
thread = threading.Thread(target=load); thread.start(); loading.wait()
def child():
    go_on.set()
    print('child', load())
in_child(child)
go_on.set(); thread.join()
print('parent', load())
@cache.cached(key='forking')
def fork():
    in_child(lambda: print('in the child of a loader', cache.get('forking')))
    return 2
print(fork())
"""
    )
    assert_clean(ran, "child 1\nparent 1\nin the child of a loader None\n2\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_an_asynchronous_cache_in_the_child_of_a_fork_says_why_it_is_closed() -> None:
    ran = python(
        FORK
        + """
from cachebus.client.background_loop import run
async def main():
    async with open_cache('memory://') as cache:
        await cache.set('key', 1)
        calls = {
            'get': lambda: cache.get('key'), 'set': lambda: cache.set('key', 1), 'lookup': lambda: cache.lookup('key'),
            'increment': lambda: cache.increment('n'), 'health': cache.health, 'clear': cache.clear,
        }
        load = cache.cached(key='key')(main)
        calls['decorated'] = load
        def child():
            for name, call in calls.items():
                try: run(call())
                except CacheClosed as error: assert 'forked' in str(error), (name, error)
                else: print(name, 'worked')
            async def anew():
                async with open_cache('memory://') as cache: print(await cache.get('key', 'anew'))
            threading.Thread(target=lambda: asyncio.run(anew())).start()
            [t.join() for t in threading.enumerate() if t is not threading.current_thread()]
        in_child(child)
        print(await cache.get('key'), (await cache.health()).ok)
asyncio.run(main())
"""
    )
    assert_clean(ran, "anew\n1 True\n")


def test_a_spawned_process_begins_with_a_cache_of_its_own() -> None:
    ran = python(
        """
import multiprocessing, concurrent.futures
from tests.facade.test_threads import spawned
cache = open_sync_cache('memory://'); cache.set('key', 'parent')
with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    print(pool.submit(spawned).result())
print(cache.get('key'))
"""
    )
    assert_clean(ran, "None\nparent\n")


def spawned() -> Any:
    with a_sync_cache() as cache:
        return cache.get("key")
