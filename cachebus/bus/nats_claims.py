"""Claims: how an address with a single server gets one, and only one.

Every process that has or wants such an address listens on its owner subject. A claimant publishes its name and a number
there, and waits a moment for objections:

    a holder objects, always                    the claimant gives up
    a claimant with a lower number objects      the claimant gives up
    a claimant hears a claim of a lower number  it gives up by itself

Numbers are random. A claimant subscribes before it publishes, so of two claimants at least one hears the other, and both
decide by the same rule. After a reconnect a holder publishes its claim again, because two parts of a split network may
each have got one; the one with the higher number then retires.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable
from typing import Any

from cachebus.messages import AddressInUse, CacheError

from .nats_compat import Delivery, Listener
from .nats_connection import NatsConnection

logger = logging.getLogger("cachebus.bus")

_LONGEST_NAME = 200


class Claim:
    """One address that this process alone has, or wants. `on_lost` is called when another process has it."""

    def __init__(self, address: str, subject: str, connection: NatsConnection, on_lost: Callable[[], None]) -> None:
        self.address = address
        self.held = False
        self.identity = f"process {os.getpid()} on {socket.gethostname()}"
        self._subject = subject
        self._connection = connection
        self._on_lost = on_lost
        self._number = secrets.token_hex(16)
        self._listener: Listener | None = None
        self._objection: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def make(self) -> None:
        """Claim the address. Raises `AddressInUse` that names who has it, `CacheConnectionError` while away."""
        self._listener = await self._connection.listen(self._subject, self._heard)
        try:
            await self._connection.flush()
            self.say("claim")
            await self._connection.flush()
            done, _ = await asyncio.wait([self._objection], timeout=self._connection.options.claim_wait)
            if done:
                raise AddressInUse(address=self.address, holder=self._objection.result())
            self.held = True
        except BaseException:
            await self.release()
            raise

    async def release(self) -> None:
        """Give the address up."""
        self.held = False
        if self._listener is not None:
            listener, self._listener = self._listener, None
            await self._connection.leave(listener)

    def _heard(self, msg: Delivery) -> None:
        try:
            said: Any = json.loads(msg.data)
            word, number, to = str(said["says"]), str(said["number"]), str(said["to"])
            who = str(said["who"])[:_LONGEST_NAME]
        except (ValueError, TypeError, KeyError, RecursionError):
            return  # Junk.
        if word == "held":
            if to == self._number:
                self._yield_to(who)
        elif (word == "claim" and self.held) or ((self.held or word == "claim") and self._number < number):
            try:
                self.say("held", number)
            except CacheError:
                logger.warning("a claim to %s could not be objected to: the connection is away", self.address)
        else:
            self._yield_to(who)

    def say(self, word: str, to: str = "") -> None:
        """Publish a word: `claim`, `held` to the claimant with the number `to`, or `again` when the connection is back.
        Raises `CacheConnectionError` while away."""
        words = {"says": word, "number": self._number, "to": to, "who": self.identity}
        self._connection.write(self._subject, json.dumps(words).encode())

    def _yield_to(self, who: str) -> None:
        if self.held:
            self.held = False
            logger.error("%s is served by %s too; this process retires from it", self.address, who)
            self._on_lost()
        elif not self._objection.done():
            self._objection.set_result(who)
