"""The link does not know each message by name: what carries a value is coded, and no field is lost."""

from __future__ import annotations

from typing import Any

from cachebus import open_sync_cache
from cachebus.client.encoding_client import has_value, with_value
from cachebus.messages import WIRE_NAMES, Found, Incremented, Reply, Request, Set

VALUED = {"backend.set", "backend.add", "backend.compare_and_set", "reply.found"}


class LeasedSet(Request[Found], frozen=True, tag="test.leased_set"):
    key: str
    value: Any
    lease: int = 0


class StaleValue(Reply, frozen=True, tag="test.stale"):
    value: Any
    age: float = 0.0


def test_every_message_with_a_value_is_known() -> None:
    ours = {name: kind for name, kind in WIRE_NAMES.items() if kind.__module__.startswith("cachebus.")}
    assert {name for name, kind in ours.items() if has_value(kind)} >= VALUED
    assert has_value(LeasedSet)
    assert has_value(StaleValue)
    assert not has_value(Incremented)
    assert not has_value(type(None))


def test_no_field_is_lost() -> None:
    leased = LeasedSet("k", 1, lease=7)
    assert with_value(leased, 2) == LeasedSet("k", 2, lease=7)
    assert leased.value == 1
    for each in (Set("k", 1, 2.0, ("t",), "absent"), Found(1, 2.0, 3.0, ("t",), 4.0), StaleValue(1, 2.0)):
        assert with_value(each, each.value) == each


def test_a_message_is_not_changed_by_sending_it() -> None:
    with open_sync_cache("memory://", payload={"serializer": "msgpack"}) as cache:
        sent = Set("k", (1,))
        for _ in range(2):
            cache.client.try_inline_set(sent)
            assert sent == Set("k", (1,))
            assert cache.get("k") == (1,)
