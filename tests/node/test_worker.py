"""Workers as processes: they serve, share or refuse, drain when they are asked to stop, and tell no secret."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from cachebus import Cache, CacheError, Settings, open_cache
from cachebus.actors.ports import InlineStore
from cachebus.adapters.memory.store import MemoryStore
from cachebus.bus import Address
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.micro import discover
from cachebus.bus.nats.options import NatsOptions
from cachebus.messages import CacheConfigurationError, Get, Request
from cachebus.node.worker import Worker
from cachebus.testing.servers import Server, run_nats, run_redis

from ..lateness import within
from .conftest import RunWorker

pytestmark = pytest.mark.anyio
SECRET = "hunter" + str(2)


async def served(server: Server, namespace: str) -> dict[str, int]:
    """How many requests each worker of the namespace has been sent."""
    async with NatsBus(namespace, NatsOptions(servers=(f"{server.host}:{server.port}",))) as bus:
        found = await discover(bus.connection, 1.0)
    mine = [each for each in found if each["metadata"]["namespace"] == namespace]
    return {each["id"]: sum(place["num_requests"] for place in each["endpoints"]) for each in mine}


async def test_a_file_of_settings_makes_a_worker(
    run_worker: RunWorker, nats_server: Server, namespace: str, tmp_path: Path
) -> None:
    config = tmp_path / "cachebus.yaml"
    config.write_text(
        "backends:\n- {type: memory, name: primary, max_entries: 2, default: true}\n- {type: 'null', name: other}\n"
    )
    await anyio.to_thread.run_sync(run_worker, "--config", str(config))
    async with open_cache("bus:primary", bus=nats_server.url, namespace=namespace, on_error="raise") as cache:
        for key in "abc":
            await cache.set(key, key)
        assert (await cache.statistics()).max_entries == 2
    async with open_cache("bus:other", bus=nats_server.url, namespace=namespace, on_error="raise") as cache:
        assert (await cache.statistics()).store == "null"


async def test_workers_of_one_redis_share_the_work(
    run_worker: RunWorker, nats_server: Server, redis_server: Server, namespace: str
) -> None:
    for _ in range(2):
        await anyio.to_thread.run_sync(run_worker, "--backend", f"primary={redis_server.url}")
    async with open_cache("bus:primary", bus=nats_server.url, namespace=namespace, on_error="raise") as cache:
        for number in range(60):
            await cache.set(str(number), number)
            assert await cache.get(str(number)) == number
    shares = await served(nats_server, namespace)
    assert len(shares) == 2
    assert sum(shares.values()) == 120
    assert min(shares.values()) > 0


def test_a_second_worker_of_a_sole_store_is_refused_with_the_name_of_the_holder(run_worker: RunWorker) -> None:
    first = run_worker("--backend", "primary=memory://")
    second = run_worker("--backend", "primary=memory://", serves=False)
    assert second.ended() == 3
    (line,) = second.lines
    assert line.startswith("cachebus: the address 'backend.primary' is already served by process")
    assert str(first.process.pid) in line
    first.signal(signal.SIGTERM)
    assert first.ended() == 0
    run_worker("--backend", "primary=memory://")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_has_come_in_is_answered_before_a_worker_ends(
    run_worker: RunWorker, nats_server: Server, namespace: str, number: int
) -> None:
    with run_redis() as redis:
        url = f"primary={redis.url}?timeout_min=10&timeout_max=10&connect_timeout=30"
        worker = await anyio.to_thread.run_sync(run_worker, "--backend", url)
        where: dict[str, Any] = {
            "bus": f"{nats_server.url}?resend_after=60",
            "namespace": namespace,
            "on_error": "raise",
        }
        async with open_cache("bus:primary", timeout=15.0, **where) as cache:
            await cache.set_many({str(each): each for each in range(50)})
            redis.pause()
            asking = [asyncio.create_task(cache.get(str(each))) for each in range(50)]
            while sum((await served(nats_server, namespace)).values()) < 51:
                await asyncio.sleep(0.01)
            worker.signal(number)
            await anyio.to_thread.run_sync(worker.wait_for, "draining")
            redis.resume()
            assert await asyncio.gather(*asking) == list(range(50))
        assert await anyio.to_thread.run_sync(worker.ended) == 0
        assert "message=stopped" in worker.lines[-1]


async def test_a_worker_ends_within_its_grace_and_answers_with_an_error_what_it_could_not_do(
    run_worker: RunWorker, nats_server: Server, namespace: str
) -> None:
    with run_redis() as redis:
        url = f"primary={redis.url}?timeout_min=30&timeout_max=30&connect_timeout=30"
        worker = await anyio.to_thread.run_sync(run_worker, "--backend", url, "--grace", "2")
        where: dict[str, Any] = {
            "bus": f"{nats_server.url}?resend_after=60",
            "namespace": namespace,
            "on_error": "raise",
        }
        async with open_cache("bus:primary", timeout=15.0, **where) as cache:
            await cache.set("k", 1)
            redis.pause()
            asking = asyncio.create_task(cache.get("k"))
            while sum((await served(nats_server, namespace)).values()) < 2:
                await asyncio.sleep(0.01)
            started = time.monotonic()
            worker.signal(signal.SIGTERM)
            with pytest.raises(CacheError):
                await asking
            assert await anyio.to_thread.run_sync(worker.ended) == 0
            assert 0.5 < time.monotonic() - started < within(2.0)
        redis.resume()


async def test_a_second_signal_ends_a_worker_at_once(
    run_worker: RunWorker, nats_server: Server, namespace: str
) -> None:
    with run_redis() as redis:
        url = f"primary={redis.url}?timeout_min=60&timeout_max=60&connect_timeout=30"
        worker = await anyio.to_thread.run_sync(run_worker, "--backend", url, "--grace", "60")
        async with open_cache("bus:primary", bus=nats_server.url, namespace=namespace, timeout=15.0) as cache:
            await cache.set("k", 1)
            redis.pause()
            asking = asyncio.create_task(cache.get("k"))
            while sum((await served(nats_server, namespace)).values()) < 2:
                await asyncio.sleep(0.01)
            worker.signal(signal.SIGTERM)
            await anyio.to_thread.run_sync(worker.wait_for, "draining")
            worker.signal(signal.SIGTERM)
            assert await anyio.to_thread.run_sync(worker.ended) == 1
            asking.cancel()
        redis.resume()


def test_a_server_that_hangs_does_not_keep_a_worker_beyond_its_grace(run_worker: RunWorker) -> None:
    with run_nats() as server:
        worker = run_worker("--backend", "primary=memory://", "--grace", "1", server=server)
        server.pause()
        started = time.monotonic()
        worker.signal(signal.SIGTERM)
        assert worker.ended() == 1
        assert 0.9 < time.monotonic() - started < within(1.0)
        server.resume()
    assert "the grace period has expired" in worker.lines[-1]


async def test_a_killed_worker_costs_no_answer_where_another_one_serves(
    run_worker: RunWorker, nats_server: Server, redis_server: Server, namespace: str
) -> None:
    workers = [await anyio.to_thread.run_sync(run_worker, "--backend", f"primary={redis_server.url}") for _ in range(2)]
    outcomes: list[Any] = []

    async def call(cache: Cache, number: int) -> None:
        for _ in range(40):
            value = await cache.get(str(number))
            outcomes.append(value == number)

    async with AsyncExitStack() as stack:
        bus = f"{nats_server.url}?resend_after=0.2"
        cache = await stack.enter_async_context(
            open_cache("bus:primary", bus=bus, namespace=namespace, on_error="raise", timeout=10.0)
        )
        await cache.set_many({str(each): each for each in range(100)})
        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(call, cache, number)
            while len(outcomes) < 1000:
                await asyncio.sleep(0)
            workers[0].process.kill()
    assert outcomes == [True] * 4000


def test_no_secret_is_in_what_a_worker_says(run_worker: RunWorker, nats_server: Server) -> None:
    with run_redis(password="another") as redis:
        url = f"redis://:{SECRET}@{redis.host}:{redis.port}"
        locked_out = run_worker("--backend", f"primary={url}", "--log-level", "debug", serves=False)
        assert locked_out.ended() == 2
        assert "rejected the user or the password" in locked_out.lines[-1]
    with run_redis(password=SECRET) as redis:
        worker = run_worker("--backend", f"primary={redis.url}", "--log-level", "debug")
        worker.signal(signal.SIGTERM)
        assert worker.ended() == 0
    refused = run_worker("--backend", f"primary=nonsense://:{SECRET}@host", serves=False)
    assert refused.ended() == 2
    said = "".join(worker.lines + refused.lines + locked_out.lines)
    assert "serving" in said
    assert SECRET not in said
    assert "Traceback" not in "".join(refused.lines)


def test_every_line_of_a_log_is_one_fact(run_worker: RunWorker) -> None:
    worker = run_worker("--backend", "primary=memory://", "--log-format", "json")
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0
    lines = [json.loads(line) for line in worker.lines]
    assert [each["message"] for each in lines] == ["serving", "draining", "actor stopped", "actor stopped", "stopped"]
    assert all({"time", "level", "message"} <= each.keys() for each in lines)
    assert lines[0]["addresses"] == "backend.primary:sole"
    quiet = run_worker("--backend", "primary=memory://", "--log-level", "error", serves=False)
    while quiet.process.poll() is None:
        quiet.signal(signal.SIGTERM)
        time.sleep(0.05)
    assert not any("serving" in line for line in quiet.lines)


@pytest.mark.parametrize("away", ["nats", "redis"])
async def test_a_worker_waits_for_what_it_needs(
    run_worker: RunWorker, namespace: str, tmp_path: Path, away: str
) -> None:
    with run_nats() as nats, run_redis() as redis:
        late = nats if away == "nats" else redis
        config = tmp_path / "cachebus.yaml"
        config.write_text(f"on_error: raise\nbackends: ['{redis.url}']\n")
        await anyio.to_thread.run_sync(late.kill)
        worker = run_worker("--config", str(config), server=nats, serves=False)
        for _ in range(2):
            assert f"127.0.0.1:{late.port}" in await anyio.to_thread.run_sync(worker.wait_for, "waiting")
        await anyio.to_thread.run_sync(late.start)
        await anyio.to_thread.run_sync(worker.wait_for, "serving")
        async with open_cache("bus:primary", bus=nats.url, namespace=namespace, on_error="raise") as cache:
            await cache.set("k", 1)
            assert await cache.get("k") == 1
        worker.signal(signal.SIGTERM)
        assert await anyio.to_thread.run_sync(worker.ended) == 0


def test_a_worker_waits_so_long_and_no_longer(run_worker: RunWorker) -> None:
    with run_nats() as nats:
        nats.kill()
        impatient = run_worker("--backend", "primary=memory://", "--wait", "0.2", server=nats, serves=False)
        assert impatient.ended() == 3
        assert "no NATS server can be reached" in impatient.lines[-1]
        stopped = run_worker("--backend", "primary=memory://", server=nats, serves=False)
        stopped.wait_for("waiting")
        stopped.signal(signal.SIGTERM)
        assert stopped.ended() == 0
    with run_nats("--auth", "right") as nats:
        refused = run_worker("--backend", "primary=memory://", server=nats, serves=False)
        assert refused.ended() == 2
        assert "Authorization Violation" in refused.lines[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--backend", "a.b=memory://"], "a.b"),
        (["--backend", "memory"], "memory"),
        (["--backend", "primary=bus:primary"], "a worker needs a backend to serve"),
        (["--config", "absent.yaml"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run_worker: RunWorker, arguments: list[str], sentence: str) -> None:
    worker = run_worker(*arguments, serves=False)
    assert worker.ended() == 2
    (line,) = worker.lines
    assert line.startswith("cachebus: ")
    assert sentence in line


async def test_a_worker_without_a_bus_is_refused() -> None:
    with pytest.raises(CacheConfigurationError, match="--bus"):
        Worker(Settings())


class Broken(MemoryStore):
    """A store with a bug."""

    def verb(self, kind: type[Request[Any]]) -> Callable[[Any], Any] | None:
        return _fail if kind is Get else super().verb(kind)


def _fail(request: Get) -> Any:
    raise RuntimeError("a bug")


async def test_a_worker_whose_every_actor_stays_down_ends(nats_server: Server, namespace: str) -> None:
    def broken(_: object) -> InlineStore:
        return Broken()

    settings = Settings(
        namespace=namespace,
        bus=nats_server.url,  # type: ignore[arg-type]
        actors={"max_restarts": 0},  # type: ignore[arg-type]
    )
    ready = asyncio.Event()
    worker = Worker(settings, stores=broken)
    running = asyncio.create_task(worker.run(ready.set))
    await ready.wait()
    async with NatsBus(namespace, NatsOptions(servers=(f"{nats_server.host}:{nats_server.port}",))) as bus:
        with pytest.raises(CacheError):
            await bus.request(Address("backend.primary"), Get("k"), 5.0)
        assert await asyncio.wait_for(running, 10) == 1
