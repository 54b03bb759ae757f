"""Creating the nats-py client of one connection. It never logs secrets, and always uses TLS if `tls` is set.

The reconnect feature of nats-py is disabled, for two reasons. It would buffer unsent messages and send them after the
reconnect, when their budgets are spent and a late `Set` may restore a value that was deleted meanwhile. It also
closes for good on most errors that a server can report. So a client is used until it is closed, and then replaced.
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
"""Maximum number of bytes that may wait for the socket. Callers of `write` may apply lower limits."""

_PERMANENT = ("Authorization Violation", NO_TLS)  # Errors, in nats-py's words, that another attempt will not fix.
OnError = Callable[[Exception], None]


async def connect(
    options: NatsOptions, servers: list[str], on_error: OnError, on_end: Callable[[], None]
) -> CompatClient:
    """Return a client that is connected to one of the servers. The servers are tried in random order.

    `on_error` is called for later errors, and `on_end` when the client may have been closed. Raises
    `CacheConnectionError` with the error of each server. Raises `CacheConfigurationError` if a file cannot be used,
    or if every server failed with an error that another attempt will not fix, such as a wrong password.
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
                    # Two attempts, then the next server: with 0, nats-py would retry without end.
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
            # The last error of nats-py may only be that no server is left; the first one has the reason.
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
        raise CacheConfigurationError(f"all NATS servers refused the connection ({'; '.join(reasons)})")
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
    """Return the credentials and the TLS context, as arguments of `connect`. Blocks, because it reads files."""
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
        # Created for nats:// too, because a server may require TLS.
        context = ssl.create_default_context(cafile=options.tls_ca_file)
        if options.tls_cert_file:
            context.load_cert_chain(options.tls_cert_file, options.tls_key_file)
        found["tls"] = context
    except (OSError, ValueError) as error:  # An ssl.SSLError is an OSError, a UnicodeDecodeError a ValueError.
        problem = f"cannot use a file for the NATS connection: {type(error).__name__}"
        if isinstance(error, OSError) and error.filename:
            problem += f" for {error.filename}"
    else:
        return found
    raise CacheConfigurationError(problem)
