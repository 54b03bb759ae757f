"""The permanent part of an actor: its address, mailbox and turn, which survive each incarnation of the actor.

A token ensures that the actor runs one turn at a time. `list.pop` and `list.append` are atomic and take 30 ns; a
`threading.Lock` takes 140 ns. No caller blocks for the token: a caller that does not get it posts to the mailbox. The
holder checks the mailbox *after* it has returned the token, and a poster tries the token *after* it has posted. One of
them therefore sees the message:

    holder                          poster
    ------                          ------
    return the token                mailbox.append(envelope)
    if mailbox: take the token      if the token is free: take it
      and serve, or wake the task     and serve, or wake the task

The message is then served on the stack of the holder ("flat combining": Hendler et al., SPAA 2010) or, if its handler
can wait, by the actor's task.

An interrupted turn (see `turns.py`) does not return the token. The next caller that finds it missing takes over the
turn and repairs its state: the envelope that was being served, the actor, and the deferred replies that were lost.
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

from .actor import Actor, BatchHandler, EagerHandler, Handlers, PlainHandler, as_batch_handler, check_batch
from .mailbox import STOP, Mailbox
from .turns import TurnToken, is_interruption

logger = logging.getLogger("cachebus.actors")

_COMBINE = 64  # Turns that one caller runs for others before it leaves the rest to the actor's task.
_TURNS_PER_CHECKPOINT = 128  # Turns of the actor's task before it lets other tasks run.
_RECHECK_AFTER = 0.01  # Seconds until a message that waits for a turn checks again if the holder was interrupted.
_BETWEEN_CLAIMS = 0.002  # Minimum number of seconds between two searches of the stacks of all threads.
_CLAIMS_SHARE = 50  # Ratio of the pause after a search to the duration of the search.


class Renewal(Exception):
    """Raised to replace an actor whose state cannot be repaired after an interrupted turn."""


class Cell:
    """The mailbox and the turn of one actor, which survive its crashes. A `Recipient` for the bus.

    `capacity` bounds the mailbox. If it is full, requests are answered with `Overloaded`. Requests that invalidate are
    accepted even then; their number is bounded by the callers that wait for them. With `inline_turns=False`, every turn
    runs in the actor's task.
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
        self.timers = LoopTimers(clock)  # The supervisor starts them on its event loop.
        # Set by the supervisor, which has the task group.
        self.start_soon: Callable[[Callable[[], Awaitable[None]]], None]
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
        self._recheck_scheduled = False
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
        """Number of messages that were rejected because the mailbox was full."""
        return self._mailbox.overloaded

    @property
    def waiting(self) -> int:
        """Number of messages in the mailbox."""
        return len(self._mailbox)

    @property
    def pending_replies(self) -> int:
        """Number of deferred replies that callers still wait for."""
        return len(self._deferred)

    # For the bus

    def turn(self, kind: type[Message]) -> Turn:
        turn = self._turns.get(kind)
        if turn is None:
            turn = self._turns[kind] = self.make_turn(kind)
        return turn

    def make_turn(self, kind: type[Message]) -> Turn:
        """Create the function that `turn` returns and caches for each kind."""
        # A closure, because this is the hot path of a cache and each attribute lookup on self costs 10-20 ns.
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
                free.append(token)  # Not in a `finally`: after an interruption, the next caller must repair the state.
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
        # `has_room` and `_take_in` are inlined, because most requests to a remote backend pass here.
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
            return "it was called during a turn of the same actor, for example by a weigher or a finalizer"
        if not self._ended and (self._handlers.waiting or self._handlers.batch or not self._inline) and in_event_loop():
            return "it would block the event loop of this thread; await an asynchronous cache, or use another thread"
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
        self._crashed(error if isinstance(error, Exception) else RuntimeError(f"aborted by {type(error).__name__}"))

    def send_after(self, delay: float, message: Message) -> Timer:
        # Accepted even if the mailbox is full, because the actor would otherwise wait for this message indefinitely.
        return self.timers.call_after(delay, lambda: self._take_in(Envelope(message)))

    # For the supervisor

    async def run(self, actor: Actor) -> None:
        """Run the turns of `actor` until `stop`, then drain the mailbox. If the actor crashes, its error is raised."""
        self._crash = None
        self._actor = actor
        self._handlers = actor.handlers()
        if self._inline_turns and not self.stopping:
            self._inline.update(self._handlers.plain)
            self._eager.update(self._handlers.eager)
            self._name_all_handlers()
        try:
            while True:
                # Opened before the mailbox is checked, so that a wake-up between the check and the wait is not lost.
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
                    for deferred in tuple(self._deferred):  # No other incarnation knows these replies.
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
        """Reject new messages, serve the queued ones, then end the current incarnation."""
        if not self.stopping:
            self.stopping = True
            self._leave_to_the_task()
            self._mailbox.append(Envelope(STOP))
            self._wake_up()

    def end(self, error: CacheError) -> None:
        """Answer all pending and all future requests with `error`."""
        self._ended = error
        self._leave_to_the_task()
        self.timers.close()
        self._mailbox.refuse_all(error)
        for deferred in tuple(self._deferred):
            deferred.answer(Failed.of(error))

    def forked(self) -> None:
        """Close this cell in a forked child, which has neither its event loop nor its task."""
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
        """Serve messages with plain handlers on this stack, and leave the rest to the actor's task."""
        turns = 0
        try:
            while self._mailbox and self._inline:
                # Continue if a thread is blocked on a reply: its event loop may be the one that the actor's task needs.
                if turns and turns % _COMBINE == 0 and not self._mailbox.blocks_a_thread():
                    break
                try:
                    token = self._turn.free.pop()
                except IndexError:
                    if self._reclaim():
                        continue
                    self._recheck_soon()
                    return  # The holder serves the mailbox when it has returned the token.
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
        """Run the turn of the first message, or return `False` if its handler is not plain. Requires the token."""
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
        """Remove and return the first message. It is recorded first, so an interruption cannot lose it."""
        try:
            self._serving = self._mailbox[0]
            envelope = self._serving = self._mailbox.popleft()
        except IndexError:
            return None  # `end` has answered it.
        return envelope

    def _reclaim(self) -> bool:
        """Recover the turn from an interrupted holder, repair the state and free the turn. True if it was recovered."""
        # Under contention the holder is usually fine, and searching the stacks of many threads takes longer than many
        # turns. So the time spent on searches is limited. Callers between two searches are served by the holder or by
        # the recheck.
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
        """Repair the state after an interrupted turn. If this method is interrupted too, it is run again."""
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

    def _recheck_soon(self) -> None:
        """Schedule another attempt to serve the mailbox, because the holder may have been interrupted."""
        if not self._recheck_scheduled:
            self.timers.call_after(_RECHECK_AFTER, self._recheck)
            self._recheck_scheduled = True

    def _recheck(self) -> None:
        self._recheck_scheduled = False
        self._serve_mail()

    async def _take_turns(self) -> bool:
        """Serve the mailbox in the actor's task. Return `False` if another caller holds the turn."""
        try:
            token = self._turn.free.pop()
        except IndexError:
            if not self._reclaim():
                self._recheck_soon()
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
                    self._serving = None  # The batch turn answers it in any case.
                    await self._batch_turn(
                        batch, self._mailbox.collect(envelope, batch, self._handlers.batch.get, self._actor)
                    )
                elif (waiting := self._handlers.waiting.get(kind)) is not None:
                    self._serving = None
                    await self._batch_turn(as_batch_handler(waiting), [envelope], envelope.trace)
                else:
                    refusal = f"{type(self._actor).__name__} at {self.address} has no handler for {kind.__name__}"
                    self._mailbox.answer(envelope, BadMessage(refusal))
                turns += 1
                self._serving = None
                if turns % _TURNS_PER_CHECKPOINT == 0:
                    await checkpoint()
            self._serving = None
        finally:
            if self._serving is None:  # Otherwise a plain turn was interrupted, and the next caller repairs the state.
                self._turn.free.append(token)
        return True

    def _plain_turn(self, handler: PlainHandler, envelope: Envelope) -> None:
        token = turn_trace.set(envelope.trace)  # This may be the stack of another caller.
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
        token = turn_trace.set(trace)  # `None` for a batch; its handler reads `traces`.
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
        """End this incarnation. An idempotent message is retried once, by the next incarnation."""
        self._crash = error
        self._leave_to_the_task()
        if envelope is not None:
            self._do_again(envelope, type(error).__name__)
        self._wake_up()

    def _do_again(self, envelope: Envelope, reason: str) -> None:
        """Put a message whose turn failed back into the mailbox, or answer it with `ActorFailed`."""
        message = envelope.message
        if isinstance(message, Request) and message.IDEMPOTENT and not envelope.attempts:
            envelope.attempts += 1
            self._mailbox.appendleft(envelope)
            if self._ended is not None:
                self._mailbox.refuse_all(self._ended)
        else:
            self._mailbox.answer(envelope, ActorFailed(address=self.address, reason=reason))

    def _wake_up(self) -> None:
        # Remove each wake-up once it is used: answering a port twice costs more than the rest of posting. Remove it
        # after the answer, so that an interruption between the two only costs the next caller a second answer.
        if self._wakes:
            with suppress(IndexError, ValueError):
                wake = self._wakes[0]
                wake.answer(None)
                self._wakes.remove(wake)

    def _leave_to_the_task(self) -> None:
        """Stop running turns on the stacks of callers."""
        self._inline.clear()
        self._eager.clear()
        self._name_all_handlers()

    def _name_handlers(self, kind: type[Message], called: list[Any]) -> None:
        """Store the current handlers of a kind for its turn: indexing a list is faster than a dict lookup."""
        called[:] = self._inline.get(kind), self._eager.get(kind)
        if self._inline.get(kind) is not called[0] or self._eager.get(kind) is not called[1]:
            called[:] = None, None  # Another thread has removed the handlers meanwhile.

    def _name_all_handlers(self) -> None:
        for kind, called in tuple(self._called.items()):
            self._name_handlers(kind, called)


_TURN_CODES = {vars(Cell)[name].__code__ for name in ("_serve_mail", "_take_turns", "_reclaim")} | {
    each for each in Cell.make_turn.__code__.co_consts if hasattr(each, "co_code")
}
