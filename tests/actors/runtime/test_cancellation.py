"""Cancellation of a caller at each of its awaits: the actor stays usable, and no request stays parked."""

from __future__ import annotations

import itertools
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from cachebus.actors import Actor, RestartPolicy, Supervisor
from cachebus.bus import Address, LocalBus
from cachebus.messages import CacheError, CacheTimeoutError, Request

from ..conftest import CLERK
from ..samples import (
    Again,
    Batched,
    Clerk,
    Crash,
    Desk,
    Drop,
    Number,
    Park,
    Plain,
    Porter,
    Refuse,
    Slow,
    Strange,
    Unpark,
)

pytestmark = pytest.mark.anyio
T = 20.0
PORTER = Address("test.porter")
AWAITS = 12
"""Maximum number of awaits of a call. A call that needs more fails the test."""


@types.coroutine
def cancelled_at(
    await_number: int, call: Coroutine[Any, Any, Any], scope: anyio.CancelScope
) -> Generator[Any, Any, tuple[int, Any]]:
    """Run `call`, and cancel `scope` at its suspension number `await_number`. Return the number of suspensions."""
    step: Callable[[], Any] = lambda: call.send(None)  # noqa: E731
    for suspensions in itertools.count():
        try:
            trap = step()
        except StopIteration as stop:
            return suspensions, stop.value
        except CacheError as error:
            return suspensions, error
        if suspensions + 1 == await_number:
            scope.cancel()
        try:
            value = yield trap
        except BaseException as error:
            step = lambda error=error: call.throw(error)  # type: ignore[misc]  # noqa: E731
        else:
            step = lambda value=value: call.send(value)  # type: ignore[misc]  # noqa: E731
    raise AssertionError("unreachable")


async def cancel(await_number: int, call: Coroutine[Any, Any, Any]) -> bool:
    """Return `True` if `call` was cancelled at this await, and `False` if it ended before."""
    suspensions = None
    with anyio.CancelScope() as scope:
        suspensions, _ = await cancelled_at(await_number, call, scope)
    return suspensions is None or suspensions >= await_number


@pytest.fixture
async def supervisor(bus: LocalBus, inline_turns: bool) -> AsyncIterator[Supervisor]:
    patient = RestartPolicy(max_restarts=1000, backoff=1e-9)
    async with Supervisor(bus, inline_turns=inline_turns, policy=patient, grace=0.2) as supervisor:
        yield supervisor


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize(
    "message",
    [Plain(7), Again(7), Slow(7), Drop(7), Park(), Refuse(), Crash(), Strange(), Batched(7)],
    ids=lambda each: type(each).__name__,
)
async def test_a_caller_cancelled_at_any_await_leaves_the_actor_usable_and_nothing_parked(
    bus: LocalBus, supervisor: Supervisor, message: Request[Any], busy: bool
) -> None:
    desk, porters = Desk(), Desk()
    cells = [
        await supervisor.start(CLERK, lambda: Clerk(desk)),
        await supervisor.start(PORTER, lambda: Porter(porters)),
    ]
    address = PORTER if isinstance(message, Batched) else CLERK
    occupation = Batched(1) if address == PORTER else Slow(1)

    async def occupy() -> None:
        assert await bus.request(address, occupation, T) == Number(1)

    async def help_out() -> None:
        await wait_all_tasks_blocked()
        desk.gate.set()
        porters.gate.set()
        await wait_all_tasks_blocked()
        if isinstance(message, Park):
            await bus.request(CLERK, Unpark(), T)

    for await_number in range(1, AWAITS):
        desk.gate, porters.gate = anyio.Event(), anyio.Event()
        with anyio.fail_after(T):
            async with anyio.create_task_group() as group:
                if busy:
                    group.start_soon(occupy)
                    await wait_all_tasks_blocked()
                bus._turns_left = 1  # The fairness checkpoint is one of the awaits.
                group.start_soon(help_out)
                was_cancelled = await cancel(await_number, bus.request(address, message, T))
            assert await bus.request(CLERK, Slow(2), T) == Number(2)
            assert await bus.request(CLERK, Plain(3), T) == Number(3)
            assert await bus.request(PORTER, Batched(4), T) == Number(4)
        assert [each for cell in cells for each in cell._deferred if each.waiting] == []
        assert [len(cell._mailbox) for cell in cells] == [0, 0]
        assert (desk.overlaps, porters.overlaps) == (0, 0)
        if not was_cancelled:
            break
    else:
        pytest.fail("the call never came to its end")
    assert await_number > (1 if supervisor._inline_turns is False or busy else 0)


async def test_a_caller_cancelled_at_the_checkpoint_of_fairness_leaves_no_promise_without_a_port(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    cell = await supervisor.start(CLERK, lambda: Clerk(desk))
    bus._turns_left = 1
    with anyio.CancelScope() as scope:
        scope.cancel()
        await bus.request(CLERK, Park(), T)
    await wait_all_tasks_blocked()
    assert [each for each in cell._deferred if each.waiting] == []


async def test_an_invalidation_whose_caller_is_cancelled_at_the_checkpoint_of_fairness_is_done(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    async with anyio.create_task_group() as group:
        group.start_soon(bus.request, CLERK, Slow(1), T)
        await wait_all_tasks_blocked()
        bus._turns_left = 1
        with anyio.CancelScope() as scope:
            scope.cancel()
            await bus.request(CLERK, Drop(2), T)
        desk.gate.set()
    assert await bus.request(CLERK, Plain(3), T) == Number(3)
    assert desk.handled == [1, 2, 3]


class Careful(Clerk):
    """Actor whose start and stop take several checkpoints."""

    async def on_start(self) -> None:
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()

    async def on_stop(self) -> None:
        await anyio.lowlevel.checkpoint()
        await super().on_stop()


async def test_a_start_cancelled_at_any_await_frees_the_address_and_stops_what_was_begun(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    def make() -> Actor:
        return Careful(desk)

    for await_number in range(1, AWAITS):
        started = not await cancel(await_number, supervisor.start(CLERK, make))
        await wait_all_tasks_blocked()
        if started:
            break
        assert desk.stopped == desk.lives
        await supervisor.start(CLERK, make)
        assert await bus.request(CLERK, Plain(1), T) == Number(1)
        await supervisor.stop(CLERK)
    else:
        pytest.fail("the start never came to its end")
    assert await_number > 1
    assert await bus.request(CLERK, Plain(1), T) == Number(1)


async def test_a_stop_cancelled_at_any_await_can_be_asked_for_again(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    for await_number in range(1, AWAITS):
        await supervisor.start(CLERK, lambda: Careful(desk))
        if not await cancel(await_number, supervisor.stop(CLERK)):
            break
        await supervisor.stop()
        assert desk.stopped == desk.lives
    else:
        pytest.fail("the stop never came to its end")
    assert await_number > 1
    assert desk.stopped == desk.lives


async def test_a_reply_that_nobody_waits_for_any_more_is_not_kept(bus: LocalBus, supervisor: Supervisor) -> None:
    cell = await supervisor.start(CLERK, lambda: Clerk(Desk()))
    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(bus.request, CLERK, Park(), T)
        await wait_all_tasks_blocked()
        assert cell.pending_replies == 50
        group.cancel_scope.cancel()
    assert cell.pending_replies == 0
    with pytest.raises(CacheTimeoutError):
        await bus.request(CLERK, Park(), 0.01)
    assert cell.pending_replies == 0
