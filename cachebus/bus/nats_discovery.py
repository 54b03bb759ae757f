"""Who is there: workers are asked by NATS micro, and answer for themselves."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from pydantic import BaseModel, ValidationError

from .nats import NatsBus
from .nats_compat import Delivery
from .nats_micro import NAME, PREFIX


class _Metadata(BaseModel):
    namespace: str
    host: str


class _Data(BaseModel):
    address: str
    mailbox: int = 0
    statistics: dict[str, Any] = {}
    error: str = ""


class _Endpoint(BaseModel):
    subject: str
    queue_group: str = ""
    num_requests: int
    num_errors: int
    last_error: str
    data: _Data


class _Statistics(BaseModel):
    id: str
    version: str
    started: str
    metadata: _Metadata
    endpoints: list[_Endpoint]


async def discover(bus: NatsBus, wait: float) -> list[dict[str, Any]]:
    """What the workers on the server of an open bus answer to `$SRV.STATS` within `wait` seconds, the first answer of
    each. What is no such answer is left out. Raises `CacheConnectionError` while the connection is away."""
    found: dict[str, dict[str, Any]] = {}
    nobody = asyncio.Event()

    def heard(msg: Delivery) -> None:
        if msg.headers.get("Status") == "503":
            nobody.set()
            return
        try:
            told = _Statistics.model_validate(json.loads(msg.data)).model_dump()
        except (ValueError, RecursionError, ValidationError):
            return  # Another service of the name, or junk.
        found.setdefault(told["id"], told)

    connection = bus.connection
    inbox = f"{bus.options.inbox_prefix}.{secrets.token_hex(12)}"
    listener = await connection.listen(inbox, heard)
    try:
        connection.write(f"{PREFIX}.STATS.{NAME}", b"", inbox)
        try:
            async with asyncio.timeout(wait):
                await nobody.wait()
        except TimeoutError:
            pass
    finally:
        await connection.leave(listener)
    return list(found.values())
