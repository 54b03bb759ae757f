"""Supervision: actors are started, restarted after a crash, and stopped with nothing left unanswered."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Self

import anyio
import msgspec

from cachebus.bus import Address, Bus, Emitter, ReplyPort, Visibility, open_port
from cachebus.messages import (
    ActorFailed,
    ActorGaveUp,
    ActorRestarted,
    ActorStarted,
    ActorStopped,
    CacheClosed,
    CacheError,
)

from .actor import Actor
from .cell import Cell, Renewal

if TYPE_CHECKING:
    from anyio.abc import TaskGroup, TaskStatus

logger = logging.getLogger("cachebus.actors")


class RestartPolicy(msgspec.Struct, frozen=True):
    """How an actor that crashed is restarted.

    After more than `max_restarts` crashes within `window` seconds it stays down. The first restart of a window is at once.
    Before the n-th one there is a pause of a random part ("full jitter": Brooker, AWS Architecture Blog, 2015) of
    `backoff` * 2^(n-1) seconds, at most `backoff_max`.
    """

    max_restarts: int = 5
    window: float = 30.0
    backoff: float = 0.05
    backoff_max: float = 5.0

    def pause(self, crashes: int, chance: random.Random) -> float:
        """Seconds to wait before restarting after the `crashes`-th crash of a window."""
        if crashes <= 1:
            return 0.0
        # The exponent has a bound, because 2.0 ** 1024 is an OverflowError.
        return chance.uniform(0.0, min(self.backoff_max, self.backoff * 2.0 ** min(crashes - 2, 100)))


class _Charge:
    """One actor under supervision."""

    def __init__(self, cell: Cell, factory: Callable[[], Actor]) -> None:
        self.cell = cell
        self.factory = factory
        self.done = anyio.Event()
        self.pause_scope = anyio.CancelScope()
        self.lives_scope = anyio.CancelScope()


class Supervisor:
    """Runs actors, and restarts each by itself when it crashes. An asynchronous context manager. Leaving it stops every
    actor, the last started first: each finishes its turn and answers its mailbox, within `grace` seconds for all.
    Requests that are open then are answered with `CacheClosed`."""

    def __init__(
        self,
        bus: Bus,
        *,
        policy: RestartPolicy | None = None,
        capacity: int = 10_000,
        inline_turns: bool = True,
        grace: float = 5.0,
        seed: int | None = None,
    ) -> None:
        self.bus = bus
        self.policy = policy or RestartPolicy()
        self.grace = grace
        self._capacity = capacity
        self._inline_turns = inline_turns
        self._chance = random.Random(seed)
        self._charges: dict[Address, _Charge] = {}
        self._tasks: TaskGroup | None = None
        self._beside: deque[tuple[Cell, Callable[[], Awaitable[None]]]] = deque()
        self._asked: ReplyPort | None = None

    def __repr__(self) -> str:
        return f"<Supervisor of {', '.join(self._charges) or 'nobody'}>"

    async def __aenter__(self) -> Self:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._start_beside)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._tasks is not None
        try:
            # Shielded, because a cancelled application still owes answers to its callers.
            with anyio.CancelScope(shield=True):
                await self.stop()
        finally:
            self._tasks.cancel_scope.cancel()
            # The tasks are all ours, and their errors were dealt with: no error of the caller passes through here.
            await self._tasks.__aexit__(None, None, None)
            self._tasks = None

    async def start(
        self, address: Address, factory: Callable[[], Actor], *, backend: str = "", visibility: Visibility = "private"
    ) -> Cell:
        """Start the actor that `factory` makes, and serve it at `address`. Returns once it takes turns. `factory` is
        called again for every incarnation. `backend` is the name in the actor's events, and `visibility` says which
        processes may reach it. Raises `AddressInUse`, and any error of `on_start` in the first incarnation."""
        if self._tasks is None:
            raise CacheClosed("the supervisor is not open: use `async with`")
        emitter = Emitter(self.bus, backend)
        cell = Cell(address, emitter, self.bus.clock, capacity=self._capacity, inline_turns=self._inline_turns)
        cell.start_soon = lambda function: self._ask_beside(cell, function)
        cell.timers.start()
        self.bus.serve(address, cell)
        charge = _Charge(cell, factory)
        self._charges[address] = charge
        try:
            await self.bus.claim(address, visibility)
            await self._tasks.start(self._supervise, charge)
            await self.bus.announce(address, visibility)
        except BaseException:
            self._discard(charge)
            raise
        return cell

    async def stop(self, address: Address | None = None) -> None:
        """Stop one actor, or all of them, the last started first."""
        charges = [self._charges[address]] if address is not None else list(reversed(self._charges.values()))
        with anyio.move_on_after(self.grace):
            for charge in charges:
                await self.bus.retire(charge.cell.address)
                charge.cell.stop()
                charge.pause_scope.cancel()
                await charge.done.wait()
        # An actor that outlasts the grace does not take it from the others: they have as long again, all at once.
        others = [each for each in charges if not each.done.is_set()][1:]
        for charge in others:
            charge.cell.stop()
            charge.pause_scope.cancel()
        with anyio.move_on_after(self.grace):
            for charge in others:
                await charge.done.wait()
        for charge in charges:
            self._discard(charge)

    def forked(self) -> None:
        """Make every actor unusable in the child of a fork."""
        for charge in self._charges.values():
            charge.cell.forked()

    def _discard(self, charge: _Charge) -> None:
        # If it was discarded before, the address may have a successor by now.
        if self._charges.get(charge.cell.address) is charge:
            self.bus.withdraw(charge.cell.address)
            del self._charges[charge.cell.address]
        charge.cell.end(CacheClosed(f"{charge.cell.address} was stopped"))
        # An actor that has outlasted the grace gives up its turn, and the request in it is answered too.
        charge.lives_scope.cancel()

    async def _supervise(self, charge: _Charge, *, task_status: TaskStatus[None]) -> None:
        try:
            with charge.lives_scope:
                await self._lives(charge, task_status)
        except BaseException:
            # Cancelled from outside: there will be no more turns, so no caller may wait for one.
            charge.cell.end(CacheClosed(f"{charge.cell.address} was stopped"))
            raise
        finally:
            charge.cell.timers.close()
            charge.done.set()

    # Replies of a store arrive in callbacks of the event loop, and anyio starts no tasks from there. So functions are handed
    # to a task that starts them.

    def _ask_beside(self, cell: Cell, function: Callable[[], Awaitable[None]]) -> None:
        self._beside.append((cell, function))
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.answer(None)

    async def _start_beside(self) -> None:
        assert self._tasks is not None
        while True:
            while self._beside:
                self._tasks.start_soon(self._run_beside, *self._beside.popleft())
            asked = self._asked = open_port()
            await asked.wait()

    async def _run_beside(self, cell: Cell, function: Callable[[], Awaitable[None]]) -> None:
        try:
            await function()
        except Exception:
            logger.exception("something beside the turns of actor %s failed", cell.address)

    async def _lives(self, charge: _Charge, task_status: TaskStatus[None]) -> None:
        cell = charge.cell
        clock = self.bus.clock
        crashes: deque[float] = deque()
        reason = ""
        started = crashed = False
        while True:
            actor: Actor | None = None
            try:
                actor = charge.factory()
                actor.ctx = cell
                await actor.on_start()
                if not started:
                    actor.handlers()  # A class whose handlers are wrong is the starter's error, and no crash.
                    started = True
                    task_status.started()
                    cell.publish(ActorStarted(address=cell.address))
                else:
                    cell.publish(ActorRestarted(address=cell.address, reason=reason, restarts=cell.restarts))
                await cell.live(actor)
                cell.publish(ActorStopped(address=cell.address))
                return
            except Renewal:
                reason, crashed = "interrupted", False
                logger.warning("actor %s restarts because a turn was interrupted", cell.address)
            except Exception as error:
                if not started:
                    raise
                reason, crashed = type(error).__name__, True
                logger.exception("actor %s crashed", cell.address)
            finally:
                if actor is not None:
                    await self._farewell(cell, actor)
            if crashed:  # An interruption is no fault of the actor, so it costs no restart.
                now = clock.monotonic()
                crashes.append(now)
                while crashes[0] < now - self.policy.window:
                    crashes.popleft()
                cell.restarts += 1
                if len(crashes) > self.policy.max_restarts:
                    cell.end(ActorFailed(address=cell.address, reason=f"{reason}, {len(crashes)} crashes in a row"))
                    cell.publish(ActorGaveUp(address=cell.address, reason=reason, restarts=cell.restarts - 1))
                    # Other processes at the address may do better. Without them callers learn at once that there is none.
                    await self.bus.retire(cell.address)
                    return
                with charge.pause_scope:  # Stopping cuts the pause short.
                    await clock.sleep_until(now + self.policy.pause(len(crashes), self._chance))
            if cell.stopping:
                return
            charge.pause_scope = anyio.CancelScope()
            cell.emitter.renew()

    async def _farewell(self, cell: Cell, actor: Actor) -> None:
        # Shielded and bounded: an actor gives back its connections even when everything is being cancelled.
        with anyio.move_on_after(self.grace, shield=True):
            try:
                await actor.on_stop()
            except CacheError as error:
                logger.warning("actor %s did not stop cleanly: %s", cell.address, error)
            except Exception:
                logger.exception("actor %s did not stop cleanly", cell.address)
