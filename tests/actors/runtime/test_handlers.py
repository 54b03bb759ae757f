"""Handlers, which are found by the type of their parameter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cachebus.actors import Actor
from cachebus.messages import Get, Ping, Pong

from ..samples import Batched, Clerk, Crash, Desk, Drop, Number, Park, Plain, Porter, Slow

pytestmark = pytest.mark.anyio


async def test_handlers_are_sorted_by_how_they_run() -> None:
    table = Clerk(Desk()).handlers()
    assert {Plain, Drop, Park, Crash} <= set(table.plain)
    assert set(table.waiting) == {Slow}
    assert table.batch == {}
    batcher = Porter(Desk()).handlers()
    assert set(batcher.batch) == {Batched}
    assert set(batcher.plain) == {Plain, Ping}
    assert {*batcher.plain, *batcher.waiting, *batcher.batch} == {Batched, Plain, Ping}


async def test_a_union_of_messages_is_handled_by_one_method() -> None:
    clerk = Clerk(Desk())
    assert clerk.handlers().plain[Plain] == clerk.handlers().plain[Drop] == clerk.on_plain


async def test_an_actor_is_tested_without_a_bus() -> None:
    clerk = Clerk(Desk())
    assert clerk.on_plain(Plain(5)) == Number(5)


class Polite(Clerk):
    """Actor that inherits handlers, overrides one, and has methods that are not handlers."""

    def on_plain(self, request: Plain | Drop) -> Number:
        return Number(-request.value)

    def on_ping(self, request: Ping) -> Pong:
        return Pong("here")

    def helper(self, text: str) -> Unheard:  # type: ignore[name-defined]  # noqa: F821
        return text

    def two(self, one: Plain, other: Plain) -> None:
        raise AssertionError

    def _hidden(self, request: Get) -> None:
        raise AssertionError


async def test_handlers_are_inherited_and_replaced() -> None:
    table = Polite(Desk()).handlers()
    assert table.plain[Plain](Plain(3)) == Number(-3)
    assert table.plain[Ping](Ping()) == Pong("here")
    assert Crash in table.plain
    assert Get not in {*table.plain, *table.waiting, *table.batch}


class Torn(Actor):
    def on_one(self, request: Plain) -> Number:
        raise AssertionError

    def on_other(self, request: Plain) -> Number:
        raise AssertionError


class Hasty(Actor):
    def on_batch(self, batch: Sequence[Batched]) -> Sequence[Number]:
        raise AssertionError


class Lost(Actor):
    def on_plain(self, request: Unheard) -> Number:  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError


class Wrong(Actor):
    async def on_plain(self, request: Plain | Drop) -> Number | Pong:
        raise AssertionError


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        (Torn, r"Torn has two handlers for Plain: on_one and on_other"),
        (Hasty, r"Hasty\.on_batch takes a batch, so it must be an async def"),
        (Lost, r"Lost\.on_plain: the types .* must be importable at run time, .* \(name 'Unheard' is not defined\)"),
        (Wrong, r"Wrong\.on_plain returns Pong, but its request declares Number"),
    ],
)
async def test_an_actor_that_cannot_work_says_which_method_is_wrong(actor: type[Actor], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        actor().handlers()
