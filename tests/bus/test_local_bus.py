"""The in-process bus: routing, refusals and fairness."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from cachebus.actors import Actor, RestartPolicy, Supervisor
from cachebus.actors.runtime.turns import TurnToken
from cachebus.bus import TURNS_PER_CHECKPOINT, Address, LocalBus
from cachebus.messages import (
    ActorFailed,
    AddressInUse,
    CacheClosed,
    CacheError,
    DeadLetter,
    Delete,
    Deleted,
    Found,
    Get,
    Increment,
    Incremented,
    Missing,
    NoSuchActor,
    Reply,
    TakeSnapshot,
)

pytestmark = pytest.mark.anyio
PLACE = Address("test.place")
T = 20.0


class Echo(Actor):
    """Actor that answers `Get` with its key. It calls `nested` within the turn, if set."""

    nested: Any = None

    def on_get(self, request: Get) -> Found | Missing:
        if self.nested is not None:
            self.nested()
        return Found(request.key)


class Patient(Actor):
    """Actor that answers in its own task."""

    async def on_get(self, request: Get) -> Reply:
        await anyio.lowlevel.checkpoint()
        return Found(request.key)


@pytest.fixture
async def bus() -> AsyncIterator[LocalBus]:
    bus = LocalBus("test")
    yield bus
    bus.close()


@pytest.fixture
async def supervisor(bus: LocalBus) -> AsyncIterator[Supervisor]:
    async with Supervisor(bus) as supervisor:
        yield supervisor


async def test_a_request_to_nobody_says_so(bus: LocalBus) -> None:
    with pytest.raises(NoSuchActor, match=r"no actor serves the address 'test\.place'") as caught:
        await bus.request(PLACE, Get("k"), T)
    assert isinstance(caught.value, LookupError)
    with pytest.raises(NoSuchActor):
        bus.request_blocking(PLACE, Get("k"), T)


async def test_a_withdrawn_address_is_free_again(bus: LocalBus, supervisor: Supervisor) -> None:
    await supervisor.start(PLACE, Echo)
    await supervisor.stop(PLACE)
    with pytest.raises(NoSuchActor):
        await bus.request(PLACE, Get("k"), T)
    bus.withdraw(PLACE)
    await supervisor.start(PLACE, Echo)
    assert await bus.request(PLACE, Get("k"), T) == Found("k")


async def test_an_address_is_served_by_one(bus: LocalBus, supervisor: Supervisor) -> None:
    cell = await supervisor.start(PLACE, Echo)
    with pytest.raises(AddressInUse) as caught:
        bus.serve(PLACE, cell)
    assert caught.value.address == PLACE
    assert "Cell test.place" in str(caught.value)


async def test_what_is_sent_to_nobody_is_a_dead_letter(bus: LocalBus) -> None:
    with bus.subscribe(DeadLetter) as letters:
        bus.send(PLACE, Get("k"))
        letter = await anext(letters)
    assert isinstance(letter, DeadLetter)
    assert (letter.address, letter.wire_name) == (PLACE, "backend.get")
    assert "no actor serves" in letter.reason


async def test_what_is_sent_and_cannot_be_handled_is_a_dead_letter(bus: LocalBus, supervisor: Supervisor) -> None:
    await supervisor.start(PLACE, Echo)
    with bus.subscribe(DeadLetter) as letters:
        bus.send(PLACE, TakeSnapshot())
        letter = await anext(letters)
    assert isinstance(letter, DeadLetter)
    assert "has no handler for TakeSnapshot" in letter.reason


@pytest.mark.parametrize(
    "text", ["", ".", "a.", ".a", "a..b", "a b", "a.*", "a.>", "a\r\nb", "ü", "a/b", "x" * 65, "$SYS.x"]
)
def test_an_address_that_is_not_words_joined_by_dots_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not 1 to 64 letters"):
        Address(text)


@pytest.mark.parametrize("text", [None, 5, b"a"])
def test_an_address_that_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a string of words joined by dots"):
        Address(text)


@pytest.mark.parametrize("text", ["", "a.b", "*", ">", "a b", "a\n", None, "x" * 65])
def test_a_namespace_that_is_not_one_word_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="namespace"):
        LocalBus(text)


async def test_inline_turns_let_other_tasks_run_now_and_then(bus: LocalBus, supervisor: Supervisor) -> None:
    await supervisor.start(PLACE, Echo)
    others = 0
    done = False

    async def count() -> None:
        nonlocal others
        while not done:
            others += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        for _ in range(TURNS_PER_CHECKPOINT * 3 + 1):
            await bus.request(PLACE, Get("k"), T)
        done = True
    assert others >= 2


async def test_a_thread_asks_an_actor_that_waits(bus: LocalBus, supervisor: Supervisor) -> None:
    await supervisor.start(PLACE, Patient)
    assert await anyio.to_thread.run_sync(lambda: bus.request_blocking(PLACE, Get("k"), T)) == Found("k")


async def test_blocking_the_loop_for_an_actor_that_waits_is_refused(bus: LocalBus, supervisor: Supervisor) -> None:
    await supervisor.start(PLACE, Patient)
    with pytest.raises(CacheError, match="would block the event loop of this thread"):
        bus.request_blocking(PLACE, Get("k"), T)
    assert await bus.request(PLACE, Get("k"), T) == Found("k")


async def test_a_blocking_call_from_inside_a_turn_is_refused_and_does_not_hang(
    bus: LocalBus, supervisor: Supervisor
) -> None:
    refusals: list[str] = []
    echo = Echo()

    def nested() -> None:
        try:
            bus.request_blocking(PLACE, Get("inner"), T)
        except CacheError as error:
            refusals.append(str(error))

    echo.nested = nested
    await supervisor.start(PLACE, lambda: echo)
    assert await bus.request(PLACE, Get("outer"), T) == Found("outer")
    assert await anyio.to_thread.run_sync(lambda: bus.request_blocking(PLACE, Get("outer"), T)) == Found("outer")
    assert len(refusals) == 2
    assert all("during a turn of the same actor" in refusal for refusal in refusals)


async def test_tasks_of_another_event_loop_are_answered_there(bus: LocalBus, supervisor: Supervisor) -> None:
    await supervisor.start(PLACE, Patient)
    replies: list[Any] = []

    async def ask() -> None:
        replies.extend(await asyncio.gather(*(bus.request(PLACE, Get(str(n)), T) for n in range(20))))

    def elsewhere() -> None:
        asyncio.run(ask())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await anyio.to_thread.run_sync(thread.join)
    assert replies == [Found(str(number)) for number in range(20)]


async def test_a_closed_bus_refuses_everything(bus: LocalBus, supervisor: Supervisor) -> None:
    cell = await supervisor.start(PLACE, Echo)
    bus.close()
    with pytest.raises(CacheClosed):
        await bus.request(PLACE, Get("k"), T)
    with pytest.raises(CacheClosed):
        bus.serve(PLACE, cell)
    with pytest.raises(CacheClosed):
        bus.subscribe()


async def test_a_bus_says_in_its_repr_whom_it_serves(bus: LocalBus, supervisor: Supervisor) -> None:
    assert repr(bus) == "<LocalBus 'test' serving no addresses>"
    await supervisor.start(PLACE, Echo)
    assert repr(bus) == "<LocalBus 'test' serving test.place>"


class Fragile(Echo):
    """Actor with only plain handlers, one of which crashes."""

    def on_delete(self, request: Delete) -> Deleted:
        raise RuntimeError("a bug")

    def on_increment(self, request: Increment) -> Incremented:
        raise RuntimeError("a bug")


async def test_a_blocking_caller_in_a_loop_whose_request_crashes_a_plain_actor_is_told_so(
    bus: LocalBus, supervisor: Supervisor
) -> None:
    await supervisor.start(PLACE, Fragile)
    with pytest.raises(ActorFailed, match="RuntimeError"):
        bus.request_blocking(PLACE, Increment("k"), T)
    assert await bus.request(PLACE, Get("k"), T) == Found("k")
    # An idempotent request waits for the next incarnation, which cannot begin while its loop is blocked.
    with pytest.raises(CacheError, match="would block the event loop"):
        bus.request_blocking(PLACE, Delete("k"), T)
    assert await bus.request(PLACE, Get("k"), T) == Found("k")


async def test_a_blocking_caller_in_a_loop_is_told_that_an_actor_was_given_up(bus: LocalBus) -> None:
    async with Supervisor(bus, policy=RestartPolicy(max_restarts=0)) as supervisor:
        await supervisor.start(PLACE, Fragile)
        with pytest.raises(ActorFailed):
            await bus.request(PLACE, Increment("k"), T)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(ActorFailed, match="1 crashes"):
            bus.request_blocking(PLACE, Get("k"), T)


async def test_a_blocking_caller_in_a_loop_is_served_though_many_stand_before_it(
    bus: LocalBus, supervisor: Supervisor
) -> None:
    echo, inside, go = Echo(), threading.Event(), threading.Event()

    def hold() -> None:
        echo.nested = None
        inside.set()
        go.wait(T)

    echo.nested = hold
    await supervisor.start(PLACE, lambda: echo)
    thread = threading.Thread(target=bus.request_blocking, args=(PLACE, Get("long"), T))
    thread.start()
    inside.wait(T)
    for number in range(300):
        bus.send(PLACE, Get(str(number)))
    go.set()
    thread.join()
    assert bus.request_blocking(PLACE, Get("k"), 0.2) == Found("k")


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
async def test_a_budget_may_be_as_large_as_one_likes(bus: LocalBus, supervisor: Supervisor, timeout: float) -> None:
    await supervisor.start(PLACE, Patient)
    assert await bus.request(PLACE, Get("k"), timeout) == Found("k")
    assert await anyio.to_thread.run_sync(lambda: bus.request_blocking(PLACE, Get("k"), timeout)) == Found("k")


async def test_a_blocking_caller_serves_others_no_longer_than_until_its_own_turn(
    bus: LocalBus, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Prolific(Actor):
        """Actor that sends itself another message in each turn."""

        def __init__(self) -> None:
            super().__init__()
            self.turns_of: dict[int, int] = defaultdict(int)

        def on_increment(self, request: Increment) -> Incremented:
            self.turns_of[threading.get_ident()] += 1
            if request.delta < 5000:
                bus.send(PLACE, Increment(request.key, request.delta + 1))
            return Incremented(request.delta)

        def on_get(self, request: Get) -> Found | Missing:
            return Found(request.key)

    prolific = Prolific()
    cell = await supervisor.start(PLACE, lambda: prolific)
    monkeypatch.setattr(
        TurnToken, "claim", lambda self: None
    )  # Otherwise the claim would find that no turn is running.

    def ask() -> int:
        token = cell._turn.free.pop()
        bus.send(PLACE, Increment("k"))  # Waits in the mailbox, because the turn is taken.
        cell._turn.free.append(token)
        assert bus.request_blocking(PLACE, Get("k"), T) == Found("k")
        return prolific.turns_of[threading.get_ident()]

    assert 1 <= await anyio.to_thread.run_sync(ask) < 500


async def test_a_blocking_caller_in_a_loop_is_served_though_another_thread_holds_the_turn(
    bus: LocalBus, supervisor: Supervisor
) -> None:
    echo, inside, go = Echo(), threading.Event(), threading.Event()

    def hold() -> None:
        echo.nested = None
        inside.set()
        go.wait(T)

    echo.nested = hold
    cell = await supervisor.start(PLACE, lambda: echo)

    def release() -> None:
        while len(cell._mailbox) <= 300:
            go.wait(0.001)
        go.set()

    holder = threading.Thread(target=bus.request_blocking, args=(PLACE, Get("long"), T))
    holder.start()
    inside.wait(T)
    for number in range(300):
        bus.send(PLACE, Get(str(number)))
    releaser = threading.Thread(target=release)
    releaser.start()
    try:
        assert bus.request_blocking(PLACE, Get("k"), 0.3) == Found("k")
    finally:
        releaser.join()
        holder.join()
