"""Request pipeline of a backend: gathers requests into batches and sends them to a pipelined store through the guard.

The state of a request is a slot in a batch. Everything else (circuit breaker, limit, timeout, counters, events) is
handled once per batch when it is sent, and once when its replies arrive.

The request of a lone caller is sent at once. With concurrent callers, a request waits for others: until the event loop
has run all ready tasks or, while batches are in flight, until one of them is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from threading import get_ident
from typing import Any

from cachebus.bus import ReplySlot, SlotBatch, TaskPort, current_trace, open_port, running_deadlines
from cachebus.messages import ActorFailed, CacheClosed, CacheError, Failed, Get, Reply, Request

from ..guard.circuit_breaker import CircuitState
from ..guard.guard import Guard
from ..ports import PipelinedStore
from ..runtime.actor import Context

_CLOSED = CircuitState.CLOSED
_request_of: Callable[[ReplySlot], Request[Any]] = attrgetter("request")

GOOD_BATCH = 16
"""Number of requests at which a batch is sent even while others are in flight.

Smaller batches wait for a reply, because a system call costs as much as ten requests.
"""

Count = Callable[[Sequence[Request[Any]], Sequence[Reply]], None]  # Counts the requests of a batch from their replies.
Emit = Callable[[Sequence[Request[Any]], Sequence[Reply], Sequence[str | None]], None]
"""Emits the events of a batch, from its requests, their replies and their trace contexts."""


class RequestPipeline:
    """Pipeline that gathers requests into batches and sends them. Belongs to the event loop on which it is made.

    At most one batch waits for the store. While it does, no more requests are taken; they stay in the bounded mailbox
    of the actor. A batch is sent when the size of its values reaches `max_bytes`.
    """

    def __init__(
        self, store: PipelinedStore, guard: Guard, ctx: Context, count: Count, emit: Emit, *, max_bytes: int = 1 << 20
    ) -> None:
        self.store: Any = store
        self._guard = guard
        self._attempts = guard.attempts
        self._breaker = guard.breaker
        self._ctx = ctx
        self._subscriptions = ctx.subscriptions
        self._count = count
        self._emit = emit
        self._max_batch = store.max_batch
        self._max_bytes = max_bytes
        self._deadlines = running_deadlines()
        self.takes_turns = self._deadlines is not None  # On asyncio, requests may be taken on the sender's stack.
        self._thread = get_ident()
        self._open: SlotBatch | None = None
        self._blocked: SlotBatch | None = None
        self._unblock_ports: list[TaskPort] = []
        self._lone = True
        self._is_scheduled = False
        guard.on_free = self._resume

    def __repr__(self) -> str:
        waiting = 0 if self._open is None else len(self._open.slots)
        return f"<RequestPipeline to {self.store!r}, {waiting} waiting>"

    def take(self, request: Request[Any]) -> ReplySlot | None:
        """Add a request to the open batch, on the sender's stack, and return its slot.

        Returns `None` if the request must go through the mailbox: on another thread, or while a batch waits for the
        store.
        """
        if self._blocked is not None or get_ident() != self._thread:
            return None
        batch = self._open
        if batch is None:
            batch = self._open = SlotBatch(self._deadlines)
        slot = ReplySlot(batch, request, current_trace() if self._subscriptions.kinds else None)
        slots = batch.slots
        slots.append(slot)
        if type(request) is not Get and type(value := getattr(request, "value", None)) is bytes:
            batch.size += len(value)
        count = len(slots)
        if count >= self._max_batch or batch.size >= self._max_bytes:
            self._flush()
        elif not self._is_scheduled:
            if count == 1 and (not self._attempts.short or self._breaker.state is not _CLOSED):
                if self._lone:
                    self._flush()
                else:
                    self._schedule()
            elif count == GOOD_BATCH:
                self._schedule()
        return slot

    async def put(self, requests: Sequence[Request[Any]], traces: Sequence[str | None]) -> Sequence[ReplySlot]:
        """Add requests from the mailbox, waiting while a batch waits for the store."""
        deadline = self._ctx.deadline
        slots: list[ReplySlot] = []
        for place, request in enumerate(requests):
            if self._blocked is not None:
                await self._wait_unblocked()
            slot = self.take(request)
            assert slot is not None
            if traces:
                slot.trace = traces[place]
            slots.append(slot)
            slot.batch.gone += 1  # A port does not report that its caller has gone.
            if deadline is not None:
                known = slot.batch.deadline
                slot.batch.deadline = deadline if known is None else min(known, deadline)
        return slots

    async def put_alone(self, request: Request[Any]) -> ReplySlot:
        """Send a request that needs many round trips in a separate batch."""
        trace = current_trace()
        self._flush()
        await self._wait_unblocked()
        was_lone = self._lone
        (slot,) = await self.put((request,), (trace,))
        self._flush()
        self._lone = was_lone
        return slot

    def fail_all(self, failed: Failed) -> None:
        """Answer all pending requests with `failed`."""
        self._guard.fail_all(failed)
        for batch in (self._open, self._blocked):
            if batch is not None:
                batch.fail(failed)
        self._open = None

    async def drain(self) -> None:
        """Send all gathered requests, and wait until the store has taken them."""
        self._flush()
        await self._wait_unblocked()

    # Gathering requests

    def _schedule(self) -> None:
        if self._deadlines is None:
            self._flush()
            return
        self._is_scheduled = True
        self._deadlines.loop.call_soon(self._flush)

    def _resume(self) -> None:
        # Scheduled behind the callers whose replies have just arrived, because they may send further requests.
        if not self._is_scheduled and (self._open is not None or not self._lone):
            self._schedule()

    # Sending batches

    def _flush(self) -> None:
        self._is_scheduled = False
        batch = self._open
        if batch is None:
            return
        try:
            self._open = None
            if batch.gone:
                batch.drop_gone()
                if not batch.slots:
                    batch.settle(())
                    return
            self._lone = len(batch.slots) == 1
            requests = list(map(_request_of, batch.slots))
            if self._guard.try_submit(self.store, requests, partial(self._on_replies, batch, requests), batch):
                return
        except CacheError as error:
            batch.fail(Failed.of(error))
            return
        except Exception as error:
            self._crash(batch, error)
            return
        except BaseException as error:
            self._crash(batch, error)
            raise
        self._blocked = batch
        self._ctx.start_soon(self._send_blocked)

    async def _send_blocked(self) -> None:
        """Send the batch that waits for the store."""
        batch = self._blocked
        assert batch is not None
        if not batch.slots:  # The actor has crashed in between.
            self._unblock()
            return
        try:
            requests = list(map(_request_of, batch.slots))
            await self._guard.submit(self.store, requests, partial(self._on_replies, batch, requests), batch)
        except CacheError as error:
            batch.fail(Failed.of(error))
        except Exception as error:
            self._crash(batch, error)
        except BaseException:
            batch.fail(Failed.of(CacheClosed(f"{self._ctx.address} was stopped during the request")))
            raise
        finally:
            self._unblock()

    def _unblock(self) -> None:
        self._blocked = None
        ports, self._unblock_ports = self._unblock_ports, []
        for port in ports:
            port.answer(None)

    async def _wait_unblocked(self) -> None:
        while self._blocked is not None:
            port = open_port()
            self._unblock_ports.append(port)
            await port.wait()

    # Receiving replies

    def _on_replies(self, batch: SlotBatch, requests: Sequence[Request[Any]], replies: Sequence[Reply]) -> None:
        if not batch.slots:
            return  # The batch was answered when the actor crashed.
        try:
            if len(replies) != len(batch.slots):
                raise TypeError(f"the store returned {len(replies)} replies for a batch of {len(batch.slots)} requests")
            self._count(requests, replies)
            if self._subscriptions.kinds:
                self._emit(requests, replies, [slot.trace for slot in batch.slots])
            batch.settle(replies)
        except Exception as error:
            self._crash(batch, error)
        except BaseException as error:
            self._crash(batch, error)
            raise

    def _crash(self, batch: SlotBatch, error: BaseException) -> None:
        """Answer a batch with `ActorFailed` after an unexpected exception, and crash the actor."""
        batch.fail(Failed.of(ActorFailed(address=self._ctx.address, reason=type(error).__name__)))
        self._ctx.crash(error)
