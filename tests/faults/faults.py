"""The faults, each as it happens and what callers may be told of it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio

from cachebus import (
    CacheBackendError,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CacheTimeoutError,
    CircuitOpen,
    Overloaded,
)
from cachebus.messages import WrongType
from cachebus.testing.proxy import Mode

from .scene import CALLERS, NAMESPACE, Admin, Fault, Scene

GONE: frozenset[type[CacheError]] = frozenset({CacheConnectionError, CacheTimeoutError, CircuitOpen, Overloaded})
"""What is told of a server that does not answer."""


def through(mode: Mode, seconds: float = 0.0) -> Callable[[Scene], AbstractAsyncContextManager[None]]:
    """What the proxy does."""

    @asynccontextmanager
    async def happens(scene: Scene) -> AsyncGenerator[None]:
        await scene.switch(mode, seconds)
        yield
        await scene.switch("pass")

    return happens


def told(before: tuple[str, ...], after: tuple[str, ...]) -> Callable[[Scene], AbstractAsyncContextManager[None]]:
    """What a command does, and another one undoes."""

    @asynccontextmanager
    async def happens(scene: Scene) -> AsyncGenerator[None]:
        await scene.tell(*before)
        yield
        await scene.tell(*after)

    return happens


@asynccontextmanager
async def killed(scene: Scene) -> AsyncGenerator[None]:
    async def accident() -> None:
        await asyncio.sleep(0.05)  # So that it happens under calls that are on their way.
        await scene.do(scene.server.kill)

    accidents = asyncio.create_task(accident())
    yield
    await accidents
    await scene.do(scene.server.start)


@asynccontextmanager
async def stopped(scene: Scene) -> AsyncGenerator[None]:
    await scene.do(scene.server.pause)
    yield
    await scene.do(scene.server.resume)


@asynccontextmanager
async def wrong_password(scene: Scene) -> AsyncGenerator[None]:
    await scene.tell("ACL", "SETUSER", "app", "resetpass", ">another")
    await scene.tell("CLIENT", "KILL", "USER", "app")
    yield
    await scene.tell("ACL", "SETUSER", "app", "resetpass", ">right")


@asynccontextmanager
async def loading(scene: Scene) -> AsyncGenerator[None]:
    await scene.tell("SAVE")
    await scene.do(scene.server.kill)
    # It returns when the server has read everything; until then the server answers LOADING.
    starting = asyncio.create_task(scene.do(scene.server.start))
    with anyio.fail_after(30):
        while not await says_loading(scene):
            await asyncio.sleep(0.005)
    yield
    await starting


async def says_loading(scene: Scene) -> bool:
    try:
        await scene.tell("PING")
    except OSError:
        return False  # It does not listen yet.
    except RuntimeError as error:
        return "LOADING" in str(error)
    raise AssertionError("the server has read its data before anybody saw it")


@asynccontextmanager
async def cannot_save(scene: Scene) -> AsyncGenerator[None]:
    server: Any = scene.server
    in_the_way = server.folder / "dump.rdb" / "not-empty"
    await scene.do(lambda: in_the_way.mkdir(parents=True))
    await scene.tell("CONFIG", "SET", "save", "3600 1000000")
    await scene.tell("BGSAVE")
    with anyio.fail_after(30):
        while b"rdb_last_bgsave_status:err" not in await scene.tell("INFO", "persistence"):
            await asyncio.sleep(0.01)
    yield
    await scene.do(shutil.rmtree, in_the_way.parent)
    await scene.tell("CONFIG", "SET", "save", "")


@asynccontextmanager
async def scripts_forgotten(scene: Scene) -> AsyncGenerator[None]:
    async def forget() -> None:
        while True:
            await scene.tell("SCRIPT", "FLUSH")
            await asyncio.sleep(0.02)

    forgetting = asyncio.create_task(forget())
    yield
    forgetting.cancel()
    await asyncio.gather(forgetting, return_exceptions=True)


@asynccontextmanager
async def other_types(scene: Scene) -> AsyncGenerator[None]:
    keys = [f"{NAMESPACE}:n{number}" for number in range(CALLERS)]
    for key in keys:
        await scene.tell("RPUSH", key, "not a counter")
    yield
    await scene.tell("DEL", *keys)


@asynccontextmanager
async def too_many_clients(scene: Scene) -> AsyncGenerator[None]:
    admin = await scene.do(Admin, scene.server)
    assert b"+OK" in await scene.do(admin.tell, "CONFIG SET maxclients 1")
    await scene.do(admin.tell, "CLIENT KILL TYPE normal SKIPME yes")
    yield
    assert b"+OK" in await scene.do(admin.tell, "CONFIG SET maxclients 1000")
    admin.close()


DELAYED_LOADING = ("--key-load-delay", "300", "--loading-process-events-interval-bytes", "1024")

FAULTS = (
    Fault("connections refused", through("refuse"), GONE),
    Fault("reset in the middle of a reply", through("reset"), GONE),
    Fault("half open: accepts, says nothing", through("half_open"), GONE),
    Fault("300 ms of latency", through("latency", 0.3), GONE),
    Fault("one byte at a time", through("trickle"), GONE, silent=True),
    Fault("replies lost", through("lose_reply"), GONE),
    Fault("replies garbled", through("garbage"), GONE),
    Fault("server killed, and started again", killed, GONE, forgets=True),
    Fault("server stopped (SIGSTOP) past the deadline", stopped, GONE),
    Fault(
        "memory full, no eviction (OOM)",
        told(("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        frozenset({CacheBackendError}),
        says="OOM",
    ),
    Fault("wrong password", wrong_password, GONE | {CacheConfigurationError}, user=True, says="WRONGPASS"),
    Fault(
        "read-only replica (READONLY)",
        told(("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        GONE,
        says="READONLY",
    ),
    Fault("server reads its data (LOADING)", loading, GONE, options=DELAYED_LOADING, filling=3000, says="LOADING"),
    Fault("server cannot save (MISCONF)", cannot_save, frozenset({CacheBackendError}), says="MISCONF"),
    Fault("scripts forgotten (NOSCRIPT)", scripts_forgotten, frozenset(), silent=True),
    Fault("keys of another type (WRONGTYPE)", other_types, frozenset({WrongType}), says="Redis value"),
    Fault("too many clients (maxclients)", too_many_clients, GONE),
)
