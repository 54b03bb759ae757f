"""The trace context of a request reaches its handler and the events."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import nats
import pytest
from opentelemetry import trace as opentelemetry

from cachebus import Cache, Node, open_cache
from cachebus.bus import current_trace, use_trace
from cachebus.bus.codec.messages import JSON, encode
from cachebus.messages import CacheSet, Event, Get, Set
from cachebus.settings import load_settings
from cachebus.testing.servers import Server, redis_server

__all__ = ["redis_server"]

pytestmark = pytest.mark.anyio
T = 20.0
FIRST = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECOND = "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203332-00"


def span(trace_id: int, span_id: int) -> Any:
    context = opentelemetry.SpanContext(trace_id, span_id, is_remote=False, trace_flags=opentelemetry.TraceFlags(1))
    return opentelemetry.use_span(opentelemetry.NonRecordingSpan(context))


@asynccontextmanager
async def worker_and_caller(nats_server: Server, namespace: str, backend: str) -> AsyncIterator[Cache]:
    settings = load_settings(backend, namespace=namespace, bus=nats_server.url)
    # Opened within a span, which must not affect the requests.
    with span(7, 7):
        async with (
            Node(settings, serve=True),
            open_cache("bus:primary", bus=nats_server.url, namespace=namespace) as cache,
        ):
            yield cache


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_events_of_a_worker_carry_the_trace_of_the_request(
    nats_server: Server, redis_server: Server, namespace: str, kind: str
) -> None:
    backend = "memory://" if kind == "memory" else redis_server.url
    async with worker_and_caller(nats_server, namespace, backend) as cache:
        with cache.events(CacheSet) as heard:
            await cache.client.bus.settled()  # type: ignore[attr-defined]

            async def put(key: str, trace: str | None) -> None:
                with span(0, 0), use_trace(trace):  # An invalid span counts as no span.
                    await cache.set(key, 1)

            traces: dict[str, str | None] = {"a": FIRST, "b": SECOND, "c": None, "d": FIRST}
            await put("a", FIRST)
            assert (await anext(heard)).trace == FIRST
            # Sent together, so that they share a batch.
            await asyncio.gather(*(put(f"{key}{number}", traces[key]) for key in traces for number in range(20)))
            events: list[Any] = [await anext(heard) for _ in range(80)]
            assert {each.key: each.trace for each in events} == {
                f"{key}{number}": traces[key] for key in traces for number in range(20)
            }


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_the_span_of_opentelemetry_comes_first(
    nats_server: Server, redis_server: Server, namespace: str, kind: str
) -> None:
    async with open_cache("memory://" if kind == "memory" else redis_server.url, namespace=namespace) as cache:
        with cache.events(CacheSet) as heard:
            with span(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331), use_trace(SECOND):
                await cache.set("k", 1)
            assert (await anext(heard)).trace == FIRST
            await cache.set("k", 1)
            assert (await anext(heard)).trace is None
            with use_trace(SECOND):
                await cache.set("k", 1)
            assert (await anext(heard)).trace == SECOND


async def test_a_stranger_says_its_trace_in_the_header_and_no_nonsense_gets_through(
    nats_server: Server, namespace: str
) -> None:
    client = await nats.connect(nats_server.url)
    subject = f"cachebus.v1.{namespace}.req.backend.primary"
    try:
        async with worker_and_caller(nats_server, namespace, "memory://") as cache:
            with cache.events(CacheSet) as heard:
                await cache.client.bus.settled()  # type: ignore[attr-defined]
                for given, expected in ((FIRST, FIRST), ("ff" + FIRST[2:], None), ("junk", None), ("", None)):
                    headers = {"Content-Type": JSON, "traceparent": given}
                    await client.request(subject, encode(Set("k", 1), JSON), timeout=T, headers=headers)
                    assert (await anext(heard)).trace == expected
                several = {"Content-Type": JSON, "Cachebus-Traceparents": f"{FIRST},,{SECOND}"}
                body = encode([Set("a", 1), Get("b"), Set("c", 1)], JSON)
                await client.request(subject, body, timeout=T, headers=several)
                told: list[Event] = [await anext(heard) for _ in range(2)]
                assert [each.trace for each in told] == [FIRST, SECOND]
    finally:
        await client.close()


def test_opentelemetry_is_never_imported_here_and_a_broken_one_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    with use_trace(FIRST):
        assert current_trace() == FIRST
        assert "opentelemetry.trace" not in sys.modules
        monkeypatch.setitem(sys.modules, "opentelemetry.trace", sys)
        assert current_trace() == FIRST
    assert current_trace() is None
    for wrong in ("junk", FIRST.upper(), f"{FIRST}\r\nX: y", "00-" + "0" * 32 + FIRST[35:]):
        with pytest.raises(ValueError, match="a traceparent must be"), use_trace(wrong):
            pass
