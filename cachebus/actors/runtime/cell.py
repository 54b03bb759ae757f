"""The permanent part of an actor: its address, its mailbox and its turn. Lives of the actor come and go in it.

One turn at a time, by a token. `list.pop` and `list.append` are atomic and take 30 ns where a `threading.Lock` takes
140 ns. No caller blocks for the token: one that does not get it posts to the mailbox. A holder looks into the mailbox
*after* it has given the token back, and a poster tries the token *after* it has posted, so one of the two sees the message:

    holder                          poster
    ------                          ------
    give(token)                     mailbox.append(envelope)
    if mailbox: take the token      if the token is free: take it
      and serve, or wake the task     and serve, or wake the task

The message is then served on the stack of the holder ("flat combining": Hendler et al., SPAA 2010) or, if its handler
can wait, by the actor's task.

A turn that is interrupted (see `turns.py`) does not give the token back. The next one that finds it gone takes the turn over
and repairs what was left half done: the envelope that was being served, the actor, and the deferred replies that it lost.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from anyio.lowlevel import checkpoint

from cachebus.bus import (
    PENDING,
    Address,
    Clock,
    DeferredReply,
    Emitter,
    Envelope,
    Pending,
    ReplyPort,
    Turn,
    in_event_loop,
    open_port,
    turn_trace,
)
from cachebus.bus.timers import LoopTimers, Timer
from cachebus.messages import (
    ActorFailed,
    BadMessage,
    CacheClosed,
    CacheError,
    Failed,
    Message,
    Reply,
    Request,
)

from .actor import Actor, BatchHandler, EagerHandler, Handlers, PlainHandler, alone, check_batch
from .mailbox import STOP, Mailbox
from .turns import TurnToken, is_interruption

logger = logging.getLogger("cachebus.actors")

_COMBINE = 64  # Turns that one caller takes for others before the actor's task goes on with them.
_TURNS_PER_CHECKPOINT = 128  # Turns of the actor's task without letting other tasks run.
_LOOK_AGAIN = 0.01
"""Seconds after which a message that waits for a turn looks whether the holder was interrupted."""


_BETWEEN_CLAIMS = 0.002
"""Seconds between two looks at the stacks of all threads, at least, for callers that find the turn taken."""

_CLAIMS_SHARE = 50
"""How many times longer than a look the pause after it is."""


class Renewal(Exception):
    """Ends one incarnation of an actor that an interrupted turn left in a state which only a new incarnation puts right."""


class Cell:
    """The mailbox and the turn of one actor; it outlives the actor's crashes. A `Recipient` for the bus.

    `capacity` bounds the mailbox; beyond it requests are answered `Overloaded`, except those that invalidate, whose
    number is bounded by the callers who wait for them. With `inline_turns=False` every turn is the task's.
    """

    def __init__(
        self, address: Address, emitter: Emitter, clock: Clock, *, capacity: int = 10_000, inline_turns: bool = True
    ) -> None:
        self.address = address
        self.restarts = 0
        self.emitter = emitter
        self.publish = emitter.publish
        self.emit = emitter.emit
        self.clock = clock
        self.subscriptions = emitter.subscriptions
        self.deadline: float | None = None
        self._batch: list[Envelope] = []
        self.timers = LoopTimers(clock)  # Started by the supervisor, whose event loop it is.
        self.start_soon: Callable[[Callable[[], Awaitable[None]]], None]  # The supervisor's, who has the task group.
        self._inline_turns = inline_turns
        self._turn = TurnToken(self, _TURN_CODES)
        self._mailbox = Mailbox(address, emitter, clock, capacity)
        self._inline: dict[type[Message], PlainHandler] = {}
        self._handlers = Handlers()
        self._actor: Actor | None = None
        self._deferred: set[DeferredReply] = set()
        self._eager: dict[type[Message], EagerHandler] = {}
        self._turns: dict[type[Message], Turn] = {}
        self._called: dict[type[Message], list[Any]] = {}
        self._wakes: list[ReplyPort] = []
        self._serving: Envelope | None = None
        self._looks_again = False
        self._next_claim = 0.0
        self._crash: Exception | None = None
        self.stopping = False
        self._stopped = False
        self._ended: CacheError | None = None

    def __repr__(self) -> str:
        state = "ended" if self._ended else "stopping" if self.stopping else "up" if self._actor else "down"
        return f"<Cell {self.address} {state}, {len(self._mailbox)}/{self._mailbox.capacity} in the mailbox>"

    @property
    def overloaded(self) -> int:
        """How many messages the full mailbox has turned away."""
        return self._mailbox.overloaded

    @property
    def waiting(self) -> int:
        """How many messages are in the mailbox."""
        return len(self._mailbox)

    @property
    def pending_replies(self) -> int:
        """How many replies the actor has promised to callers that still wait for them."""
        return len(self._deferred)

    # For the bus

    def turn(self, kind: type[Message]) -> Turn:
        turn = self._turns.get(kind)
        if turn is None:
            turn = self._turns[kind] = self.make_turn(kind)
        return turn

    def make_turn(self, kind: type[Message]) -> Turn:
        """As `turn`, which makes one for each kind."""
        # A closure over everything it needs: this is the hot path of a cache, and each lookup on self costs 10-20 ns.
        mailbox, free = self._mailbox, self._turn.free
        called = self._called.setdefault(kind, [None, None])
        self._name_handlers(kind, called)

        def take_turn(message: Message) -> Reply | Pending | None:
            if mailbox:
                return None
            reply: Reply | Pending | None
            try:
                try:
                    token = free.pop()
                except IndexError:
                    return None
                try:
                    handler = called[0]
                    if handler is not None:
                        reply = handler(message)
                        if reply is None:
                            raise TypeError(f"the handler of {kind.__name__} returned None, not a reply")
                    else:
                        reply = None if (eager := called[1]) is None else eager(message)
                except CacheError as error:
                    reply = Failed.of(error)
                except Exception as error:
                    if is_interruption(error):
                        raise
                    reply = DeferredReply()
                    self._crashed(error, Envelope(message, reply))
                free.append(token)  # Not in a `finally`: an interrupted turn leaves it to the next one.
                if mailbox:
                    self._serve_mail()
                return reply
            except BaseException:
                self._wake_up()
                raise

        return take_turn

    def post(self, envelope: Envelope) -> None:
        if self._ended is not None or self.stopping:
            self._mailbox.answer(envelope, self._ended or CacheClosed(f"{self.address} is being stopped"))
            return
        # `has_room` and `_take_in`, less their calls: what most requests to a remote backend come by.
        mailbox = self._mailbox
        if len(mailbox) < mailbox.capacity or mailbox.has_room(envelope):
            mailbox.append(envelope)
            if type(envelope.message) in self._inline:
                self._serve_mail()
            elif self._wakes:
                self._wake_up()
            if self._ended is not None:
                mailbox.refuse_all(self._ended)

    def obstacle_to_blocking(self) -> str | None:
        if self._turn.held_here():
            return "it was called from inside a turn of this very actor, by a weigher, a finalizer or the like"
        if not self._ended and (self._handlers.waiting or self._handlers.batch or not self._inline) and in_event_loop():
            return "it would stop the event loop of this thread; await an asynchronous cache, or use another thread"
        return None

    # For the actor: the context

    @property
    def traces(self) -> list[str | None]:
        return [each.trace for each in self._batch]

    def defer(self) -> DeferredReply:
        deferred = DeferredReply(self._deferred.discard)
        self._deferred.add(deferred)
        return deferred

    def crash(self, error: BaseException) -> None:
        self._crashed(error if isinstance(error, Exception) else RuntimeError(f"broken off by {type(error).__name__}"))

    def send_after(self, delay: float, message: Message) -> Timer:
        # Whatever the mailbox holds: an actor that is not told what it waits for waits for it for ever.
        return self.timers.call_after(delay, lambda: self._take_in(Envelope(message)))

    # For the supervisor

    async def live(self, actor: Actor) -> None:
        """Take turns with `actor` until `stop`; then finish what is in the mailbox. Raises what crashed the actor."""
        self._crash = None
        self._actor = actor
        self._handlers = actor.handlers()
        if self._inline_turns and not self.stopping:
            self._inline.update(self._handlers.plain)
            self._eager.update(self._handlers.eager)
            self._name_all_handlers()
        try:
            while True:
                # Opened before looking, so that a wake-up between the look and the wait is not lost.
                wake = open_port()
                self._wakes[:] = [wake]
                self._turn.task = turns = self._take_turns()
                try:
                    took = await turns
                except Exception as error:
                    if not is_interruption(error):
                        raise
                    logger.warning("the task of actor %s was interrupted by %s", self.address, type(error).__name__)
                    continue
                if self._crash is not None:
                    for deferred in tuple(self._deferred):  # What this incarnation has parked, no other knows.
                        deferred.answer(Failed.of(ActorFailed(address=self.address, reason=type(self._crash).__name__)))
                    raise self._crash
                if self._stopped:
                    return
                if not took or not self._mailbox:
                    await wake.wait()
        finally:
            self._leave_to_the_task()
            self._wakes.clear()
            self._actor = None

    def stop(self) -> None:
        """Take nothing in from now on, serve what is in the mailbox, then let the current incarnation end."""
        if not self.stopping:
            self.stopping = True
            self._leave_to_the_task()
            self._mailbox.append(Envelope(STOP))
            self._wake_up()

    def end(self, error: CacheError) -> None:
        """Answer everything that is open, and everything that comes, with `error`."""
        self._ended = error
        self._leave_to_the_task()
        self.timers.close()
        self._mailbox.refuse_all(error)
        for deferred in tuple(self._deferred):
            deferred.answer(Failed.of(error))

    def forked(self) -> None:
        """Become unusable in the child of a fork: its loop, its task and the holder of its turn stayed behind."""
        self._turn = TurnToken(self, _TURN_CODES)
        self._mailbox.clear()
        self._deferred.clear()
        self.timers.forked()
        self.end(CacheClosed("this process was forked after the cache was opened; open it again in the child"))

    # Turns

    def _take_in(self, envelope: Envelope) -> None:
        self._mailbox.append(envelope)
        if type(envelope.message) in self._inline:
            self._serve_mail()
        else:
            self._wake_up()
        if self._ended is not None:
            self._mailbox.refuse_all(self._ended)

    def _serve_mail(self) -> None:
        """Serve the mailbox on this stack as far as plain handlers go, and leave the rest to the task."""
        turns = 0
        try:
            while self._mailbox and self._inline:
                # Not while a thread blocks in there: it may be the one whose loop the actor's task needs.
                if turns and turns % _COMBINE == 0 and not self._mailbox.blocks_a_thread():
                    break
                try:
                    token = self._turn.free.pop()
                except IndexError:
                    if self._reclaim():
                        continue
                    self._look_again()
                    return  # The holder comes by here when it has given the token back.
                served = self._serve_one()
                self._turn.free.append(token)
                if not served:
                    break
                turns += 1
        except BaseException:
            self._wake_up()
            raise
        if self._mailbox:
            self._wake_up()

    def _serve_one(self) -> bool:
        """Take the first message's turn if its handler is plain. Holds the token."""
        if not self._mailbox:
            return True
        handler = self._inline.get(type(self._mailbox[0].message))
        if handler is None:
            return False
        envelope = self._take_out()
        if envelope is not None and self._mailbox.worthwhile(envelope, self.clock.monotonic()):
            self._plain_turn(handler, envelope)
        self._serving = None
        return True

    def _take_out(self) -> Envelope | None:
        """The first message of the mailbox. It is noted before it is taken out, so that no interruption loses it."""
        try:
            self._serving = self._mailbox[0]
            envelope = self._serving = self._mailbox.popleft()
        except IndexError:
            return None  # `end` has answered it.
        return envelope

    def _reclaim(self) -> bool:
        """Take the turn over from a holder that was interrupted, put right what it left, and let the turn be free."""
        # Under contention the holder is well, and a look at the stacks of many threads takes longer than many turns: so
        # looks are a small part of the time. A caller that comes in between is served by the holder, or by `_look_again`.
        if (began := monotonic()) < self._next_claim:
            return False
        self._next_claim = began + 1.0
        token = self._turn.claim()
        ended = monotonic()
        self._next_claim = ended + max(_BETWEEN_CLAIMS, _CLAIMS_SHARE * (ended - began))
        if token is None:
            return False
        self._next_claim = 0.0
        self._repair()
        self._turn.free.append(token)
        return True

    def _repair(self) -> None:
        """Put right what an interrupted turn left half done. May itself be interrupted, and is then done once more."""
        envelope = self._serving
        if envelope is not None and not (self._mailbox and self._mailbox[0] is envelope):
            self._do_again(envelope, "interrupted")
        self._serving = None
        if self._crash is None and self._actor is not None:
            try:
                held = self._actor.repair()
            except Exception as error:
                if is_interruption(error):
                    raise
                self._crashed(error)
                return
            if held is None:
                self._crash = Renewal("a turn was interrupted")
            else:
                lost = ActorFailed(address=self.address, reason="interrupted")
                for deferred in self._deferred.difference(held):
                    deferred.answer(Failed.of(lost))
                    deferred.hand_over()
        if self._crash is not None:
            self._leave_to_the_task()
            self._wake_up()

    def _look_again(self) -> None:
        """Come back soon to a message that waits for a turn: the holder may be interrupted without a word."""
        if not self._looks_again:
            self.timers.call_after(_LOOK_AGAIN, self._look)
            self._looks_again = True

    def _look(self) -> None:
        self._looks_again = False
        self._serve_mail()

    async def _take_turns(self) -> bool:
        """Serve the mailbox as the actor's task. `False` if another caller has the turn."""
        try:
            token = self._turn.free.pop()
        except IndexError:
            if not self._reclaim():
                self._look_again()
                return False
            return True
        turns = 0
        assert self._actor is not None
        try:
            while self._mailbox and self._crash is None:
                if (envelope := self._take_out()) is None:
                    break
                if envelope.message is STOP:
                    self._stopped = True
                    break
                kind = type(envelope.message)
                if not self._mailbox.worthwhile(envelope, self.clock.monotonic()):
                    continue
                if (plain := self._handlers.plain.get(kind)) is not None:
                    self._plain_turn(plain, envelope)
                elif (batch := self._handlers.batch.get(kind)) is not None:
                    self._serving = None  # Its turn answers it, whatever happens.
                    await self._batch_turn(
                        batch, self._mailbox.collect(envelope, batch, self._handlers.batch.get, self._actor)
                    )
                elif (waiting := self._handlers.waiting.get(kind)) is not None:
                    self._serving = None
                    await self._batch_turn(alone(waiting), [envelope], envelope.trace)
                else:
                    refusal = f"{type(self._actor).__name__} at {self.address} has no handler of {kind.__name__}"
                    self._mailbox.answer(envelope, BadMessage(refusal))
                turns += 1
                self._serving = None
                if turns % _TURNS_PER_CHECKPOINT == 0:
                    await checkpoint()
            self._serving = None
        finally:
            if self._serving is None:  # Else a plain turn was interrupted, and the next one puts things right.
                self._turn.free.append(token)
        return True

    def _plain_turn(self, handler: PlainHandler, envelope: Envelope) -> None:
        token = turn_trace.set(envelope.trace)  # Whoever's stack this is.
        try:
            self._settle(envelope, handler(envelope.message))
        except CacheError as error:
            self._mailbox.answer(envelope, error)
        except Exception as error:
            if is_interruption(error):
                raise
            self._crashed(error, envelope)
        finally:
            turn_trace.reset(token)

    async def _batch_turn(self, handler: BatchHandler, envelopes: list[Envelope], trace: str | None = None) -> None:
        self.deadline = min([each.deadline for each in envelopes if each.deadline is not None], default=None)
        self._batch = envelopes
        token = turn_trace.set(trace)  # A batch has none: its handler asks for `traces`.
        try:
            replies = await handler([each.message for each in envelopes])
            check_batch(envelopes, replies)
            for envelope, reply in zip(envelopes, replies, strict=True):
                self._settle(envelope, reply)
        except CacheError as error:
            for envelope in envelopes:
                self._mailbox.answer(envelope, error)
        except Exception as error:
            for envelope in reversed(envelopes):
                self._crashed(error, envelope)
        except BaseException:
            for envelope in envelopes:
                self._mailbox.answer(envelope, CacheClosed(f"{self.address} was stopped during the request"))
            raise
        finally:
            turn_trace.reset(token)
            self._batch, self.deadline = [], None

    # Answers

    def _settle(self, envelope: Envelope, reply: Reply | Pending | None) -> None:
        if isinstance(reply, PENDING):
            if envelope.port is not None:
                reply.attach(envelope.port)
        elif reply is not None:
            self._mailbox.answer(envelope, reply)
        elif envelope.port is not None:
            raise TypeError(f"the handler of {type(envelope.message).__name__} returned None, not a reply")

    # Crashes

    def _crashed(self, error: Exception, envelope: Envelope | None = None) -> None:
        """End this incarnation. The message goes to the next one if it may be done twice and was not tried before."""
        self._crash = error
        self._leave_to_the_task()
        if envelope is not None:
            self._do_again(envelope, type(error).__name__)
        self._wake_up()

    def _do_again(self, envelope: Envelope, reason: str) -> None:
        """Put a message back into the mailbox whose turn went wrong, or answer that it failed."""
        message = envelope.message
        if isinstance(message, Request) and message.IDEMPOTENT and not envelope.attempts:
            envelope.attempts += 1
            self._mailbox.appendleft(envelope)
            if self._ended is not None:
                self._mailbox.refuse_all(self._ended)
        else:
            self._mailbox.answer(envelope, ActorFailed(address=self.address, reason=reason))

    def _wake_up(self) -> None:
        # Each wake-up is taken out by one caller: asking an answered port again costs more than the rest of posting.
        # Not before it is answered, so that an interruption between the two costs the next caller a look and no more.
        if self._wakes:
            with suppress(IndexError, ValueError):
                wake = self._wakes[0]
                wake.answer(None)
                self._wakes.remove(wake)

    def _leave_to_the_task(self) -> None:
        """Take no turns on the stacks of others from now on."""
        self._inline.clear()
        self._eager.clear()
        self._name_all_handlers()

    def _name_handlers(self, kind: type[Message], called: list[Any]) -> None:
        """Note which handlers the turn of a kind calls now: a look into a list takes less than one into a dict."""
        called[:] = self._inline.get(kind), self._eager.get(kind)
        if self._inline.get(kind) is not called[0] or self._eager.get(kind) is not called[1]:
            called[:] = None, None  # Another thread has taken the handlers out meanwhile.

    def _name_all_handlers(self) -> None:
        for kind, called in tuple(self._called.items()):
            self._name_handlers(kind, called)


_TURN_CODES = {vars(Cell)[name].__code__ for name in ("_serve_mail", "_take_turns", "_reclaim")} | {
    each for each in Cell.make_turn.__code__.co_consts if hasattr(each, "co_code")
}
