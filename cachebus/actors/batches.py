"""Turns that take a batch of messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachebus.bus import Envelope

from .actor import AsyncHandler, BatchHandler


def check_batch(envelopes: Sequence[Envelope], replies: Sequence[Any]) -> None:
    """Raise `TypeError` unless there is one reply for each message."""
    if len(replies) != len(envelopes):
        raise TypeError(f"a batch of {len(envelopes)} messages got {len(replies)} replies")


def alone(handler: AsyncHandler) -> BatchHandler:
    """A handler of one message as a handler of a batch of one."""

    async def handle(batch: Sequence[Any]) -> Sequence[Any]:
        return [await handler(batch[0])]

    return handle
