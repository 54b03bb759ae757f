"""What a bus can be told, by URL, by mapping and by environment; and what is refused, without a secret in it."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from cachebus.bus.nats.options import NatsOptions
from cachebus.messages import CacheConfigurationError
from cachebus.settings import Settings, load_settings
from cachebus.settings.bus import NatsSettings, bus_from_url

SECRET = "hunter" + str(2)
make: Any = NatsSettings


def told(settings: NatsSettings) -> NatsOptions:
    return settings.nats_options(budget=5.0, name="cachebus")


def test_the_defaults_are_those_of_the_bus() -> None:
    assert told(NatsSettings()) == NatsOptions()


def test_a_url_says_who_where_and_how() -> None:
    options = told(bus_from_url(f"nats://joe:{SECRET}%40@a:4333,b,[::1]:4444?window=7&resend_after=0.5"))
    assert options.servers == ("a:4333", "b:4222", "[::1]:4444")
    assert (options.user, options.password) == ("joe", f"{SECRET}@")
    assert (options.window, options.resend_after, options.tls) == (7, 0.5, False)


def test_a_name_alone_is_a_token_and_tls_is_a_scheme() -> None:
    options = told(bus_from_url(f"tls://{SECRET}@host"))
    assert (options.token, options.user, options.tls) == (SECRET, "", True)


@pytest.mark.parametrize(
    ("option", "value", "told_as", "expected"),
    [
        ("nkey_seed_file", "/seed", "nkey_seed_file", "/seed"),
        ("credentials_file", "/creds", "credentials_file", "/creds"),
        ("inbox_prefix", "_INBOX_a", "inbox_prefix", "_INBOX_a"),
        ("connect_timeout", 9, "connect_timeout", 9.0),
        ("reconnect_wait", 0.01, "reconnect_wait", 0.01),
        ("reconnect_wait_max", 9, "reconnect_wait_max", 9.0),
        ("ping_interval", 9, "ping_interval", 9.0),
        ("batch", 9, "batch", 9),
        ("batch_bytes", 9, "batch_bytes", 9),
        ("window", 9, "window", 9),
        ("max_waiting", 9, "max_waiting", 9),
        ("resend_after", 9, "resend_after", 9.0),
        ("claim_wait", 9, "claim_wait", 9.0),
        ("heartbeat", 9, "heartbeat", 9.0),
        ("heartbeat", "none", "heartbeat", None),
        ("events", ["cache_hit"], "events", ("cache_hit",)),
        ("events", "cache_hit,cache_m*", "events", ("cache_hit", "cache_m*")),
        ("events", [], "events", ()),
        ("events_format", "msgpack", "events_as_json", False),
        ("events_stream", "kept", "events_stream", "kept"),
        ("events_stream_max_age", 9, "events_stream_max_age", 9.0),
        ("events_stream_max_bytes", 9, "events_stream_max_bytes", 9),
        ("outbox", 9, "outbox", 9),
        ("pending_messages", 9, "pending_messages", 9),
        ("pending_bytes", 9, "pending_bytes", 9),
    ],
)
def test_every_option_reaches_the_bus(option: str, value: object, told_as: str, expected: object) -> None:
    assert getattr(told(make(**{option: value})), told_as) == expected


def test_no_option_of_the_bus_is_out_of_reach() -> None:
    reached = set(NatsSettings.model_fields) | {"servers", "events_as_json", "budget", "name"}
    assert {each.name for each in fields(NatsOptions)} <= reached


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://host", "expected a bus URL, nats://host or tls://host"),
        ("nats://host/path", "a bus URL cannot have a path"),
        ("nats://host#x", "cannot have a fragment"),
        ("nats://host?windows=2", r"unknown option \(did you mean 'window'\?\)"),
        ("nats://host?window=0", "window: expected a whole number, 1 or more"),
        ("nats://ho st", "contains a space"),
        ("nats://host?events=cache_hits", "unknown kind of event 'cache_hits'"),
        (f"nats://a:{SECRET}@host?token=t", "only one may be set"),
        ("nats://host?tls_key_file=k", "tls_key_file: there is no tls_cert_file"),
        ("nats://host?tls_ca_file=k", "need tls"),
        ("nats://host?events_stream=a.b", "events_stream: expected one word"),
        ("nats://host?reconnect_wait=9", "reconnect_wait_max: must not be less than reconnect_wait"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_is_shown(url: str, sentence: str) -> None:
    with pytest.raises(CacheConfigurationError, match=sentence) as caught:
        load_settings("memory://", bus=url)
    assert SECRET not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    settings = load_settings("memory://", bus=f"nats://joe:{SECRET}@host")
    assert settings.bus is not None
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(told(settings.bus))]
    assert not any(SECRET in each for each in shown)


def test_the_environment_names_a_bus_by_url_or_by_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEBUS_BUS", "nats://a:4333?window=3")
    assert load_settings("bus:primary").bus == NatsSettings(hosts=("a:4333",), window=3)
    monkeypatch.setenv("CACHEBUS_BUS", json.dumps({"hosts": ["b"]}))
    assert load_settings("bus:primary").bus == NatsSettings(hosts=("b",))
    monkeypatch.delenv("CACHEBUS_BUS")
    monkeypatch.setenv("CACHEBUS_BUS__WINDOW", "5")
    assert load_settings("bus:primary").bus == NatsSettings(window=5)


def test_a_backend_on_the_bus_needs_a_bus_and_a_name_that_is_one_word() -> None:
    with pytest.raises(CacheConfigurationError, match="backend 'primary' is on a bus, but no bus is configured"):
        load_settings("bus:primary")
    for name in ("", "a.b", "*", ">", "a b", "a\r\nb"):
        with pytest.raises(CacheConfigurationError, match="name"):
            load_settings(f"bus:{name}", bus="nats://host")
    settings = load_settings({"backends": ["memory://", {"type": "bus", "name": "far", "default": True}], "bus": {}})
    assert settings.default_backend.name == "far"


@pytest.mark.parametrize("namespace", ["a.b", "*", ">", "a b", "a\r\nb", "", "x" * 65])
def test_a_namespace_that_could_be_read_as_syntax_is_refused(namespace: str) -> None:
    with pytest.raises(CacheConfigurationError, match="namespace"):
        Settings(namespace=namespace, bus=NatsSettings())


def test_the_url_of_a_bus_and_its_options_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEBUS_BUS__TOKEN", "secret")
    monkeypatch.setenv("CACHEBUS_BUS__WINDOW", "4")
    monkeypatch.setenv("CACHEBUS_BUS", "nats://a:4222?window=3")
    for settings, host, window in (
        (Settings(), "a:4222", 4),
        (load_settings({"bus": "nats://b:4222"}), "b:4222", 4),
        (load_settings(bus="nats://c:4222?window=9"), "c:4222", 9),
    ):
        assert isinstance(settings.bus, NatsSettings)
        assert (settings.bus.hosts, settings.bus.window) == ((host,), window)
        assert settings.bus.token is not None
        assert settings.bus.token.get_secret_value() == "secret"
    assert Settings(bus=None).bus is None
