"""The supervisor: it starts actors, restarts them after a crash, and answers every open request when it stops them."""

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
    """The policy for restarting crashed actors.

    After more than `max_restarts` crashes within `window` seconds, the actor stays down. The first restart of a
    window is immediate. Each further restart waits for a random delay between 0 and an upper bound ("full jitter":
    Brooker, AWS Architecture Blog, 2015). The bound starts at `backoff` seconds and doubles with each restart, up to
    `backoff_max`.
    """

    max_restarts: int = 5
    window: float = 30.0
    backoff: float = 0.05
    backoff_max: float = 5.0

    def pause(self, crashes: int, chance: random.Random) -> float:
        """Return the number of seconds to wait before the restart after the `crashes`-th crash of a window."""
        if crashes <= 1:
            return 0.0
        # The exponent is bounded, because 2.0 ** 1024 raises OverflowError.
        return chance.uniform(0.0, min(self.backoff_max, self.backoff * 2.0 ** min(crashes - 2, 100)))


class _SupervisedActor:
    """One actor under supervision."""

    def __init__(self, cell: Cell, factory: Callable[[], Actor]) -> None:
        self.cell = cell
        self.factory = factory
        self.done = anyio.Event()
        self.pause_scope = anyio.CancelScope()
        self.run_scope = anyio.CancelScope()


class Supervisor:
    """Runs actors and restarts each one that crashes, independently of the others. An asynchronous context manager.

    On exit, it stops the actors in reverse order of their start. Each one finishes its turn and drains its mailbox.
    After `grace` seconds in total, requests that are still open are answered with `CacheClosed`.
    """

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
        self._actors: dict[Address, _SupervisedActor] = {}
        self._tasks: TaskGroup | None = None
        self._start_requests: deque[tuple[Cell, Callable[[], Awaitable[None]]]] = deque()
        self._wake: ReplyPort | None = None

    def __repr__(self) -> str:
        return f"<Supervisor of {', '.join(self._actors) or 'no actors'}>"

    async def __aenter__(self) -> Self:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._start_background)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._tasks is not None
        try:
            # Shielded, because open requests must be answered even if the application is cancelled.
            with anyio.CancelScope(shield=True):
                await self.stop()
        finally:
            self._tasks.cancel_scope.cancel()
            # The tasks belong to this class and handle their errors, so the caller's error is not passed on.
            await self._tasks.__aexit__(None, None, None)
            self._tasks = None

    async def start(
        self, address: Address, factory: Callable[[], Actor], *, backend: str = "", visibility: Visibility = "private"
    ) -> Cell:
        """Start the actor that `factory` returns and serve it at `address`. Returns when the actor is running.

        `factory` is called again for each incarnation. `backend` is the backend name in the actor's events.
        `visibility` determines which processes can reach the actor. Raises `AddressInUse`, and any error that
        `on_start` raises in the first incarnation.
        """
        if self._tasks is None:
            raise CacheClosed("the supervisor is not open; use `async with`")
        emitter = Emitter(self.bus, backend)
        cell = Cell(address, emitter, self.bus.clock, capacity=self._capacity, inline_turns=self._inline_turns)
        cell.start_soon = lambda function: self._start_soon(cell, function)
        cell.timers.start()
        self.bus.serve(address, cell)
        supervised = _SupervisedActor(cell, factory)
        self._actors[address] = supervised
        try:
            await self.bus.claim(address, visibility)
            await self._tasks.start(self._supervise, supervised)
            await self.bus.announce(address, visibility)
        except BaseException:
            self._discard(supervised)
            raise
        return cell

    async def stop(self, address: Address | None = None) -> None:
        """Stop one actor, or all of them in reverse order of their start."""
        chosen = [self._actors[address]] if address is not None else list(reversed(self._actors.values()))
        with anyio.move_on_after(self.grace):
            for supervised in chosen:
                await self.bus.retire(supervised.cell.address)
                supervised.cell.stop()
                supervised.pause_scope.cancel()
                await supervised.done.wait()
        # If one actor uses up the grace period, the others still get one, concurrently.
        others = [each for each in chosen if not each.done.is_set()][1:]
        for supervised in others:
            supervised.cell.stop()
            supervised.pause_scope.cancel()
        with anyio.move_on_after(self.grace):
            for supervised in others:
                await supervised.done.wait()
        for supervised in chosen:
            self._discard(supervised)

    def forked(self) -> None:
        """Close every actor in a forked child process."""
        for supervised in self._actors.values():
            supervised.cell.forked()

    def _discard(self, supervised: _SupervisedActor) -> None:
        # If it was discarded before, another actor may use the address by now.
        if self._actors.get(supervised.cell.address) is supervised:
            self.bus.withdraw(supervised.cell.address)
            del self._actors[supervised.cell.address]
        supervised.cell.end(CacheClosed(f"{supervised.cell.address} was stopped"))
        # Cancel the turn of an actor that is still running after the grace period, so that its request is answered too.
        supervised.run_scope.cancel()

    async def _supervise(self, supervised: _SupervisedActor, *, task_status: TaskStatus[None]) -> None:
        try:
            with supervised.run_scope:
                await self._run_incarnations(supervised, task_status)
        except BaseException:
            # Cancelled from outside: no more turns will run, so no caller may wait for one.
            supervised.cell.end(CacheClosed(f"{supervised.cell.address} was stopped"))
            raise
        finally:
            supervised.cell.timers.close()
            supervised.done.set()

    # The replies of a store arrive in callbacks of the event loop, where anyio cannot start tasks. So a task starts the
    # functions.

    def _start_soon(self, cell: Cell, function: Callable[[], Awaitable[None]]) -> None:
        self._start_requests.append((cell, function))
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.answer(None)

    async def _start_background(self) -> None:
        assert self._tasks is not None
        while True:
            while self._start_requests:
                self._tasks.start_soon(self._run_background, *self._start_requests.popleft())
            wake = self._wake = open_port()
            await wake.wait()

    async def _run_background(self, cell: Cell, function: Callable[[], Awaitable[None]]) -> None:
        try:
            await function()
        except Exception:
            logger.exception("a background function of actor %s failed", cell.address)

    async def _run_incarnations(self, supervised: _SupervisedActor, task_status: TaskStatus[None]) -> None:
        cell = supervised.cell
        clock = self.bus.clock
        crashes: deque[float] = deque()
        reason = ""
        started = crashed = False
        while True:
            actor: Actor | None = None
            try:
                actor = supervised.factory()
                actor.ctx = cell
                await actor.on_start()
                if not started:
                    actor.handlers()  # Invalid handlers are an error of the caller of `start`, not a crash.
                    started = True
                    task_status.started()
                    cell.publish(ActorStarted(address=cell.address))
                else:
                    cell.publish(ActorRestarted(address=cell.address, reason=reason, restarts=cell.restarts))
                await cell.run(actor)
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
                    await self._stop_actor(cell, actor)
            if crashed:  # An interruption is not the actor's fault, so it does not count as a restart.
                now = clock.monotonic()
                crashes.append(now)
                while crashes[0] < now - self.policy.window:
                    crashes.popleft()
                cell.restarts += 1
                if len(crashes) > self.policy.max_restarts:
                    cell.end(ActorFailed(address=cell.address, reason=f"{reason}, {len(crashes)} crashes in a row"))
                    cell.publish(ActorGaveUp(address=cell.address, reason=reason, restarts=cell.restarts - 1))
                    # Another process may still serve the address. If none does, callers fail immediately.
                    await self.bus.retire(cell.address)
                    return
                with supervised.pause_scope:  # Cancelled by `stop`.
                    await clock.sleep_until(now + self.policy.pause(len(crashes), self._chance))
            if cell.stopping:
                return
            supervised.pause_scope = anyio.CancelScope()
            cell.emitter.renew()

    async def _stop_actor(self, cell: Cell, actor: Actor) -> None:
        # Shielded and bounded in time: an actor closes its connections even if the supervisor is cancelled.
        with anyio.move_on_after(self.grace, shield=True):
            try:
                await actor.on_stop()
            except CacheError as error:
                logger.warning("actor %s did not stop cleanly: %s", cell.address, error)
            except Exception:
                logger.exception("actor %s did not stop cleanly", cell.address)
