"""A lock manager without a bus, with a manual clock."""

from __future__ import annotations

from typing import Any

from cachebus.actors import LockManager
from cachebus.adapters.memory.locks import LockTable
from cachebus.bus import DeferredReply
from cachebus.messages import CacheError, Event, Failed, Message, Sweep
from cachebus.testing.fakes import ManualTimer, RecordingContext

from ...clock import ManualClock


class Caller:
    """Caller that waits for one reply, and may go away."""

    def __init__(self) -> None:
        self.reply: Any = None
        self.gone = False

    @property
    def waiting(self) -> bool:
        return self.reply is None and not self.gone

    def answer(self, reply: Any) -> None:
        if self.reply is None:
            self.reply = reply


class TimedContext(RecordingContext):
    """Context that records when its actor wants to be called back."""

    def __init__(self, clock: ManualClock, *kinds: type[Event]) -> None:
        super().__init__(*kinds, clock=clock)
        self.due: list[Message] = []

    def send_after(self, delay: float, message: Message) -> ManualTimer:
        return self.timers.call_after(delay, lambda: self.due.append(message))


class Managed:
    """Manager over a `LockTable`."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.table = LockTable(clock=self.clock, **{k: options.pop(k) for k in list(options) if k == "max_locks"})
        self.context = TimedContext(self.clock)
        self._options = options

    async def start(self) -> None:
        """Start an incarnation of the manager."""
        self.manager = LockManager(self.table, **self._options)
        self.manager.ctx = self.context
        await self.manager.on_start()
        self._serve = self.manager.handlers().plain

    def ask(self, request: Any) -> Caller:
        """Send a request. The caller gets the reply, now or later."""
        caller = Caller()
        reply: Any
        try:
            reply = self._serve[type(request)](request)
        except CacheError as error:
            reply = Failed.of(error)
        if isinstance(reply, DeferredReply):
            reply.attach(caller)
        else:
            caller.answer(reply)
        return caller

    def advance(self, seconds: float) -> None:
        """Advance the clock, and call the manager back whenever its timers are due."""
        until = self.clock.monotonic() + seconds
        while (due := self.context.timers.due()) <= until:
            self.clock.advance(max(0.0, due - self.clock.monotonic()))
            self.context.timers.fire()
            while self.context.due:
                message = self.context.due.pop(0)
                assert isinstance(message, Sweep)
                self.manager.on_sweep(message)
        self.clock.advance(until - self.clock.monotonic())
