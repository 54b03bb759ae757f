"""Validation of subjects: the allowed words. A key is never part of a subject."""

from __future__ import annotations

from typing import Any

import pytest

from cachebus.bus import Address
from cachebus.bus.address import MAX_SUBJECT_LENGTH, Subjects
from cachebus.messages import CacheSet, EventsMissed, Found, Get

from .conftest import Connect, StartWorker

BAD = [
    "",
    ".",
    "a.b.",
    "a..b",
    "*",
    ">",
    "a.*",
    "a.>",
    "a b",
    "a\tb",
    "a\r\nPUB x 1",
    "a\x00",
    "ü",
    "x" * 65,
    "$SYS",
    None,
]


def test_subjects_are_words_behind_one_root() -> None:
    subjects = Subjects("shop")
    assert subjects.request("backend.primary") == "cachebus.v1.shop.req.backend.primary"
    assert subjects.owner("locks") == "cachebus.v1.shop.own.locks"
    assert subjects.event(CacheSet, "primary") == "cachebus.v1.shop.evt.cache_set.primary"
    assert subjects.event(EventsMissed, "") == "cachebus.v1.shop.evt.events_missed._"
    assert subjects.events(CacheSet) == "cachebus.v1.shop.evt.cache_set.*"


@pytest.mark.parametrize("text", [*BAD, "a.b"])
def test_a_namespace_or_a_backend_that_is_not_one_word_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="namespace"):
        Subjects(text)
    if text:
        with pytest.raises(ValueError, match="backend"):
            Subjects("shop").event(CacheSet, text)


@pytest.mark.parametrize("text", BAD)
def test_an_address_that_is_not_words_is_refused(text: Any) -> None:
    for make in (Subjects("shop").request, Subjects("shop").owner):
        with pytest.raises(ValueError, match="address"):
            make(text)


def test_a_subject_that_no_server_would_take_is_refused() -> None:
    with pytest.raises(ValueError, match=f"is too long; the limit is {MAX_SUBJECT_LENGTH}"):
        Subjects("shop").request(".".join(["x" * 64] * 20))


@pytest.mark.anyio
@pytest.mark.parametrize("key", ["*", ">", "a.>", "a b", "a\r\nPUB x 1", "\x00", "ü☕", "x" * 5000, "$SYS.REQ"])
async def test_a_key_may_be_anything(connect: Connect, start_worker: StartWorker, key: str) -> None:
    await start_worker("answering", "test.place")
    bus = await connect()
    assert await bus.request(Address("test.place"), Get(key), 20.0) == Found(key)
