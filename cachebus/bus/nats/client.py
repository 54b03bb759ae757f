"""One incarnation of a connection: a nats-py client with our options, quiet about secrets, and never talking without TLS where
TLS was asked for.

nats-py's own reconnecting is off. It would keep what was not sent yet and send it after the return, when the budgets in
it are long spent and a late `Set` may bring back what was deleted meanwhile; and it ends for good on most errors that a
server can report. So a client is used until it is closed, and then another one is made.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nats.errors
from nats.aio.client import RawCredentials

from cachebus.messages import CacheConfigurationError, CacheConnectionError

from .compat import NO_TLS, CompatClient, check_release
from .options import NatsOptions

PENDING = 64 * 1024 * 1024
"""Bytes that may wait for the socket. What is refused before that, the callers of `write` decide."""

_PERMANENT = ("Authorization Violation", NO_TLS)  # What servers say, in nats-py's words, that they will say again.
OnError = Callable[[Exception], None]


async def connect(
    options: NatsOptions, servers: list[str], on_error: OnError, on_end: Callable[[], None]
) -> CompatClient:
    """A client that is connected to one of the servers, tried in random order.

    `on_error` hears of what goes wrong later, and `on_end` is called when the client may have ended. Raises
    `CacheConnectionError` with what each server said; `CacheConfigurationError` for files that cannot be used, and where each
    server said what another attempt will not mend, such as a wrong password.
    """
    secrets = await asyncio.to_thread(_secrets, options)
    reasons: list[str] = []
    hopeless = 0
    for server in random.sample(servers, len(servers)):
        client = CompatClient()
        client.tls_wanted = options.tls
        faults: list[Exception] = []
        try:
            async with asyncio.timeout(options.connect_timeout):
                await client.connect(
                    servers=[f"{'tls' if options.tls else 'nats'}://{server}"],
                    name=options.name,
                    allow_reconnect=False,
                    # Two tries, and then the next server: with 0 nats-py would try for ever.
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=options.connect_timeout,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
                    ping_interval=options.ping_interval,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
                    max_outstanding_pings=2,
                    no_echo=True,
                    inbox_prefix=options.inbox_prefix,
                    pending_size=PENDING,
                    **_callbacks(faults, on_error, on_end),
                    **secrets,
                )
            return client
        except (nats.errors.Error, OSError, TimeoutError) as error:
            # What nats-py raises at last may be that no server is left; what it was told first says why.
            first = next(iter(faults), error)
            reasons.append(f"{server}: {_reason(first)}")
            hopeless += isinstance(first, ssl.SSLCertVerificationError) or any(
                each in str(first) for each in _PERMANENT
            )
            client.abandon()
        except BaseException:
            client.abandon()
            raise
    if hopeless == len(reasons):
        raise CacheConfigurationError(f"no NATS server takes us in ({'; '.join(reasons)})")
    raise CacheConnectionError(f"no NATS server can be reached ({'; '.join(reasons)})", "nats")


def _callbacks(faults: list[Exception], on_error: OnError, on_end: Callable[[], None]) -> dict[str, Any]:
    async def error(exception: Exception) -> None:
        faults.append(exception)
        del faults[8:]
        on_error(exception)
        on_end()

    async def end() -> None:
        on_end()

    return {"error_cb": error, "disconnected_cb": end, "closed_cb": end}


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _secrets(options: NatsOptions) -> dict[str, Any]:
    """What signs us in. Reads files, so it blocks."""
    check_release()
    found: dict[str, Any] = {}
    try:
        if options.user:
            found |= {"user": options.user, "password": options.password}
        if options.token:
            found["token"] = options.token
        if options.nkey_seed_file:
            found["nkeys_seed_str"] = Path(options.nkey_seed_file).read_text(encoding="ascii")
        if options.credentials_file:
            found["user_credentials"] = RawCredentials(Path(options.credentials_file).read_text(encoding="ascii"))
        # Made for nats:// too: a server may demand TLS of whoever comes.
        context = ssl.create_default_context(cafile=options.tls_ca_file)
        if options.tls_cert_file:
            context.load_cert_chain(options.tls_cert_file, options.tls_key_file)
        found["tls"] = context
    except (OSError, ValueError) as error:  # An ssl.SSLError is an OSError, a UnicodeDecodeError a ValueError.
        problem = f"a file for NATS cannot be used: {type(error).__name__}"
        if isinstance(error, OSError) and error.filename:
            problem += f" for {error.filename}"
    else:
        return found
    raise CacheConfigurationError(problem)
