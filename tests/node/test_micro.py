"""NATS micro: what a worker answers to `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS` (ADR-32)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import nats
import pytest
from nats.aio.client import Client

from cachebus import Node, open_cache
from cachebus.bus import Address
from cachebus.bus.nats.micro import semantic_version
from cachebus.messages import CacheError
from cachebus.settings import load_settings
from cachebus.testing.servers import Server

pytestmark = pytest.mark.anyio
T = 20.0


@pytest.fixture
async def stranger(nats_server: Server) -> AsyncIterator[Client]:
    """A client of somebody else's."""
    client = await nats.connect(nats_server.url)
    yield client
    await client.close()


@pytest.fixture
async def node(nats_server: Server, namespace: str) -> AsyncIterator[Node]:
    """A node that serves a memory and nothing at all."""
    backends = ["memory://?default=true", "null://?name=other"]
    settings = load_settings({"backends": backends}, bus=nats_server.url, namespace=namespace)
    async with Node(settings, serve=True) as node:
        yield node


async def said(stranger: Client, subject: str, namespace: str) -> dict[str, Any]:
    """The answer of the namespace's one worker."""
    inbox = stranger.new_inbox()
    answers = await stranger.subscribe(inbox)
    await stranger.publish(subject, reply=inbox)
    while True:
        told: dict[str, Any] = json.loads((await answers.next_msg(timeout=T)).data)
        if told["metadata"]["namespace"] == namespace:
            return told


async def test_a_worker_says_that_it_is_there(node: Node, stranger: Client, namespace: str) -> None:
    told = await said(stranger, "$SRV.PING", namespace)
    assert told["type"] == "io.nats.micro.v1.ping_response"
    assert told["name"] == "cachebus"
    assert semantic_version(told["version"]) == told["version"] != "0.0.0"
    assert told["metadata"]["pid"] == str(os.getpid())
    assert all(isinstance(each, str) for each in told["metadata"].values())
    assert await said(stranger, "$SRV.PING.cachebus", namespace) == told
    assert await said(stranger, f"$SRV.PING.cachebus.{told['id']}", namespace) == told
    with pytest.raises(nats.errors.NoRespondersError):
        await stranger.request("$SRV.PING.cachebus.nobody", timeout=T)


async def test_a_worker_says_where_it_is_asked(node: Node, stranger: Client, namespace: str) -> None:
    told = await said(stranger, "$SRV.INFO.cachebus", namespace)
    assert told["type"] == "io.nats.micro.v1.info_response"
    assert told["description"]
    endpoints = {each["name"]: each for each in told["endpoints"]}
    assert endpoints["backend-primary"] == {
        "name": "backend-primary",
        "subject": f"cachebus.v1.{namespace}.req.backend.primary",
        "queue_group": "",
        "metadata": {"address": "backend.primary"},
    }
    assert endpoints["backend-other"]["queue_group"] == "q"
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", name) for name in endpoints)
    # The subject that it names is one where it answers.
    body = b'{"v": 1, "kind": "actor.ping"}'
    headers = {"Content-Type": "application/json"}
    answer = await stranger.request(endpoints["backend-primary"]["subject"], body, timeout=T, headers=headers)
    assert json.loads(answer.data)["kind"] == "reply.pong"


async def test_a_worker_says_how_it_does(node: Node, stranger: Client, namespace: str, nats_server: Server) -> None:
    async with open_cache("bus:primary", bus=nats_server.url, namespace=namespace, on_error="raise") as cache:
        await cache.set("k", "text")
        assert await cache.get("k") == "text"
        await asyncio.gather(*(cache.get(str(each)) for each in range(20)))
        with pytest.raises(CacheError):
            await cache.increment("k")
    told = await said(stranger, "$SRV.STATS.cachebus", namespace)
    assert told["type"] == "io.nats.micro.v1.stats_response"
    assert abs((datetime.now(UTC) - datetime.fromisoformat(told["started"])).total_seconds()) < 60
    figures = {each["data"]["address"]: each for each in told["endpoints"]}["backend.primary"]
    assert (figures["num_requests"], figures["num_errors"], figures["last_error"]) == (23, 1, "wrong_type")
    assert figures["processing_time"] > 0
    assert figures["average_processing_time"] == figures["processing_time"] // 23
    statistics = figures["data"]["statistics"]
    assert (statistics["hits"], statistics["misses"], statistics["sets"]) == (1, 20, 1)
    assert figures["data"]["mailbox"] == 0


async def test_everybody_who_asks_at_once_is_answered(node: Node, stranger: Client, namespace: str) -> None:
    asking = [said(stranger, "$SRV.STATS", namespace) for _ in range(50)]
    assert len({each["id"] for each in await asyncio.gather(*asking)}) == 1


async def test_an_address_that_is_left_is_no_endpoint_any_more(node: Node, stranger: Client, namespace: str) -> None:
    await node.supervisor.stop(Address("backend.other"))
    told = await said(stranger, "$SRV.INFO", namespace)
    assert [each["name"] for each in told["endpoints"]] == ["backend-primary", "locks-primary"]


async def test_who_serves_nobody_is_no_service(nats_server: Server, stranger: Client, namespace: str) -> None:
    async with open_cache("memory://", bus=nats_server.url, namespace=namespace):
        inbox = stranger.new_inbox()
        answers = await stranger.subscribe(inbox)
        await stranger.publish("$SRV.PING", reply=inbox)
        heard: list[str] = []
        with contextlib.suppress(nats.errors.TimeoutError):
            while (msg := await answers.next_msg(timeout=0.3)).data:
                heard.append(json.loads(msg.data)["metadata"]["namespace"])
        assert namespace not in heard


@pytest.mark.parametrize(
    ("version", "told"),
    [("1.2.3", "1.2.3"), ("0+unknown", "0.0.0"), ("1.2", "0.0.0"), ("1.2.3-rc.1+x", "1.2.3-rc.1+x")],
)
async def test_a_version_that_is_none_to_micro_is_left_out(version: str, told: str) -> None:
    assert semantic_version(version) == told
