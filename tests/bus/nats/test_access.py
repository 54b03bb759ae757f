"""Access: passwords, tokens, keys, TLS, and the sample permissions."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import anyio.to_thread
import nkeys  # type: ignore[import-untyped]
import pytest

from cachebus.actors import Supervisor
from cachebus.bus import Address, Emitter
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.micro import discover
from cachebus.bus.nats.options import NatsOptions
from cachebus.messages import (
    CacheClosed,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CacheSet,
    Found,
    Get,
)
from cachebus.testing.servers import Server, run_nats

from ...certificates import Certificates
from .actors import Answering
from .conftest import ROOT, options
from .operators import Operator

pytestmark = pytest.mark.anyio
PLACE = Address("test.place")
T = 20.0
SECRET = "hunter" + str(2)


async def connects(server: Server, **given: Any) -> None:
    """Connect and send a request."""
    async with NatsBus("shop", options(server, **given)) as bus, Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        async with NatsBus("shop", options(server, **given)) as other:
            assert await other.request(PLACE, Get("k"), T) == Found("k")


async def refused(
    server: Server, caplog: pytest.LogCaptureFixture, error: type[CacheError] = CacheConfigurationError, **given: Any
) -> str:
    """Return the error of a refused connection, and check that it contains no secret."""
    with caplog.at_level(logging.DEBUG), pytest.raises(error) as caught:
        await connects(server, **given)
    shown = [str(caught.value), repr(caught.value), caplog.text, repr(options(server, **given))]
    assert not any(SECRET in each for each in shown)
    return str(caught.value)


async def test_a_password(caplog: pytest.LogCaptureFixture) -> None:
    with run_nats("--user", "joe", "--pass", SECRET) as server:
        await connects(server, user="joe", password=SECRET)
        assert "Authorization Violation" in await refused(server, caplog, user="joe", password=f"{SECRET}x")
        assert "Authorization Violation" in await refused(server, caplog)


async def test_a_token(caplog: pytest.LogCaptureFixture) -> None:
    with run_nats("--auth", SECRET) as server:
        await connects(server, token=SECRET)
        assert "Authorization Violation" in await refused(server, caplog, token=f"{SECRET}x")


async def test_an_nkey(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    seed = tmp_path / "seed"
    seed.write_bytes(raw)
    public = nkeys.from_seed(bytearray(raw)).public_key.decode()
    settings = tmp_path / "keys.conf"
    settings.write_text(f"authorization {{ users = [ {{ nkey: {public} }} ] }}\n")
    with run_nats("--config", str(settings)) as server:
        await connects(server, nkey_seed_file=str(seed))
        assert "Authorization Violation" in await refused(server, caplog)


async def test_a_file_of_credentials_opens_requests_events_and_streams(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operator = Operator()
    config = tmp_path / "operator.conf"
    config.write_text(operator.config)
    mine = operator.credentials(tmp_path / "mine.creds")
    theirs = Operator().credentials(tmp_path / "theirs.creds")
    with run_nats("--config", str(config), jetstream=True) as server:
        await connects(server, credentials_file=mine)
        assert "Authorization Violation" in await refused(server, caplog)
        assert "Authorization Violation" in await refused(server, caplog, credentials_file=theirs)
        given = options(server, credentials_file=mine, events_stream="kept")
        async with NatsBus("shop", given) as bus, NatsBus("shop", options(server, credentials_file=mine)) as other:
            Emitter(bus, "primary").publish(CacheSet(key="before"))
            with other.subscribe(CacheSet, since=0.0) as heard:
                assert (await anext(heard)).key == "before"  # type: ignore[attr-defined]
            await anyio.to_thread.run_sync(server.restart)
            with anyio.fail_after(30), other.subscribe(CacheSet) as heard:
                # It reconnects by itself, because the file is read at every connect.
                while not (bus.connection.up and other.connection.up):
                    await anyio.sleep(0.01)
                await other.settled()
                Emitter(bus, "primary").publish(CacheSet(key="after"))
                assert (await anext(heard)).key == "after"  # type: ignore[attr-defined]
    secret = Path(mine).read_text().splitlines()[-2]
    assert secret.startswith("SU")
    assert secret not in caplog.text


async def test_credentials_that_allow_no_streams_say_which_stream_is_not_there(tmp_path: Path) -> None:
    operator = Operator()
    config = tmp_path / "operator.conf"
    config.write_text(operator.config)
    caller = operator.credentials(tmp_path / "caller.creds", pub={"deny": ["$JS.API.>"]})
    with run_nats("--config", str(config), jetstream=True) as server:
        await connects(server, credentials_file=caller)
        with pytest.raises(CacheError, match="events_stream 'kept'"):
            await connects(server, credentials_file=caller, events_stream="kept")


@pytest.mark.parametrize("option", ["nkey_seed_file", "credentials_file", "tls_ca_file"])
async def test_a_file_that_is_not_there_is_named(nats_server: Server, option: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {option: str(tmp_path / "nowhere"), "tls": option == "tls_ca_file"}
    with pytest.raises(CacheConfigurationError, match="cannot use a file for the NATS connection: FileNotFoundError"):
        await connects(nats_server, **given)


async def test_nobody_there(caplog: pytest.LogCaptureFixture) -> None:
    with run_nats() as server:
        await anyio.to_thread.run_sync(server.stop)
        assert "no NATS server can be reached (127.0.0.1:" in await refused(server, caplog, CacheConnectionError)


async def test_the_second_of_two_servers_will_do(nats_server: Server) -> None:
    servers = ("127.0.0.1:1", f"{nats_server.host}:{nats_server.port}")
    async with NatsBus("shop", NatsOptions(servers=servers)) as bus:
        assert bus.connection.up


async def test_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = await anyio.to_thread.run_sync(Certificates, tmp_path)
    shown = ("--tls", "--tlscert", str(made.server), "--tlskey", str(made.key("server")))
    authority = str(made.ca)
    with run_nats(*shown) as server:
        await connects(server, tls=True, tls_ca_file=authority)
        assert "certificate verify failed" in await refused(server, caplog, tls=True)
        assert "certificate verify failed" in await refused(server, caplog)
    with run_nats(*shown, "--tlsverify", "--tlscacert", authority) as server:
        ours = {"tls_cert_file": str(made.client), "tls_key_file": str(made.key("client"))}
        await connects(server, tls=True, tls_ca_file=authority, **ours)
        await refused(server, caplog, CacheConnectionError, tls=True, tls_ca_file=authority)


async def test_a_server_without_tls_learns_nothing_where_tls_was_asked_for(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with run_nats("--auth", SECRET, "--trace", "--log", str(tmp_path / "server.log")) as server:
        assert "the server offers no TLS" in await refused(server, caplog, tls=True, token=SECRET)
    assert "[CONNECT" not in (tmp_path / "server.log").read_text()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_trio_is_told_that_nats_needs_asyncio(nats_server: Server) -> None:
    with pytest.raises(CacheConfigurationError, match="requires asyncio, because nats-py supports no other event loop"):
        await NatsBus("shop", options(nats_server)).open()


async def test_a_bus_is_opened_once(nats_server: Server) -> None:
    bus = NatsBus("shop", options(nats_server))
    with pytest.raises(CacheConnectionError, match="not open"):
        await bus.request(PLACE, Get("k"), T)
    async with bus:
        with pytest.raises(CacheClosed):
            await bus.open()
    with pytest.raises(CacheClosed):
        await bus.request(PLACE, Get("k"), T)
    with pytest.raises(CacheClosed):
        await bus.open()


async def test_the_sample_of_permissions_separates_callers_from_publishers(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("WORKER", "CALLER", "LISTENER", "PUBLISHER", "OPERATOR", "KEEPER"):
        monkeypatch.setenv(f"NATS_{user}_PASSWORD", SECRET)
    with run_nats("--config", str(ROOT / "docs" / "nats.conf")) as server:

        def as_(user: str) -> NatsBus:
            return NatsBus("shop", options(server, user=user, password=SECRET))

        async with (
            as_("worker") as worker,
            as_("caller") as caller,
            as_("publisher") as publisher,
            as_("operator") as operator,
            Supervisor(worker) as supervisor,
        ):
            await supervisor.start(PLACE, Answering, visibility="sole")
            assert await caller.request(PLACE, Get("k"), T) == Found("k")
            (seen,) = await discover(operator.connection, 1.0)
            assert [each["data"]["address"] for each in seen["endpoints"]] == [PLACE]
            assert await discover(caller.connection, 0.2) == []
            with pytest.raises(CacheError):
                await publisher.request(PLACE, Get("k"), 0.2)
            with worker.subscribe(CacheSet) as heard:
                await worker.settled()
                Emitter(caller, "primary").publish(CacheSet(key="forged"))
                await caller.connection.flush()
                Emitter(publisher, "primary").publish(CacheSet(key="told"))
                event = await anext(heard)
                assert isinstance(event, CacheSet)
                assert event.key == "told"
