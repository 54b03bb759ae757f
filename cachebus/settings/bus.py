"""Settings of the bus (NATS) and of events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, SecretStr, field_serializer, model_validator

from cachebus.bus import EventPolicy, KeyForm, event_kinds, shares
from cachebus.bus.nats.options import NatsOptions
from cachebus.messages import CacheConfigurationError

from .backends import Hosts, host_and_port
from .fields import (
    AtLeastOne,
    BackendOptions,
    MaybeSeconds,
    Options,
    Seconds,
    Switch,
    named,
    optional,
    refuse_wrong,
    texts,
    word,
)
from .payload import key_bytes, read_key
from .urls import parse_bus_url, redact_url

_DEFAULT = NatsOptions()


def _kinds(value: object) -> tuple[str, ...]:
    given = [each for each in value.split(",") if each] if isinstance(value, str) else value
    kinds = texts(given, "expected event kinds, such as cache_set or cache_*")
    if kinds:
        event_kinds(kinds)
    return kinds


def _prefixes(value: object) -> tuple[str, ...]:
    expected = "expected subject prefixes, such as _INBOX"
    if not all(prefixes := texts(value, expected)):
        raise ValueError(expected)
    return prefixes


def _text(value: object) -> str:
    if isinstance(value, str) and value:
        return str(value)
    raise ValueError("expected text")


MaybeText = Annotated[str | None, "text or none", BeforeValidator(optional(_text))]


class BusSettings(BackendOptions):
    """A backend that a worker on the bus serves, such as `bus:primary`. The worker's settings define its store."""

    type: Literal["bus"] = "bus"


class NatsSettings(Options):
    """A bus over NATS. Durations are seconds, sizes are bytes.

    URL forms: `nats://user:password@host:4222,host2?window=4`, `nats://token@host`, and `tls://` to require TLS. In a
    user name, a password or a token, escape everything but letters and digits with `%`. `NatsOptions` in
    `cachebus.bus.nats.options` describes the other options.
    """

    type: Literal["nats"] = "nats"
    hosts: Hosts = ("localhost",)  # Servers of one cluster. The default port is 4222.
    user: str = ""  # User name. Requires `password`.
    password: SecretStr | None = None  # Password of `user`.
    token: SecretStr | None = None  # Authentication token, instead of a user.
    nkey_seed_file: MaybeText = None  # File with an nkey seed. Read on every connect.
    credentials_file: MaybeText = None  # `.creds` file with a JWT and a seed. Read on every connect.
    tls: Switch = False  # Refuse servers without TLS. Certificates and host names are always verified.
    tls_ca_file: MaybeText = None  # PEM file with the trusted authorities; by default those of the system.
    tls_cert_file: MaybeText = None  # PEM file with the client certificate, if the server requires one.
    tls_key_file: MaybeText = None  # PEM file with the unencrypted client key, if not in `tls_cert_file`.
    allow_insecure: Switch = False  # Allow connections without TLS in production, on a trusted network.
    inbox_prefix: Annotated[str, "text", BeforeValidator(_text)] = _DEFAULT.inbox_prefix
    reply_prefixes: Annotated[tuple[str, ...], "list of prefixes", BeforeValidator(_prefixes)] = _DEFAULT.reply_prefixes
    max_budget: Seconds = _DEFAULT.max_budget
    connect_timeout: Seconds = _DEFAULT.connect_timeout  # Timeout for connecting, including authentication.
    reconnect_wait: Seconds = _DEFAULT.reconnect_wait
    reconnect_wait_max: Seconds = _DEFAULT.reconnect_wait_max  # Maximum pause before a reconnect.
    ping_interval: Seconds = _DEFAULT.ping_interval
    batch: AtLeastOne = _DEFAULT.batch
    batch_bytes: AtLeastOne = _DEFAULT.batch_bytes
    window: AtLeastOne = _DEFAULT.window
    max_waiting: AtLeastOne = _DEFAULT.max_waiting
    resend_after: Seconds = _DEFAULT.resend_after
    claim_wait: Seconds = _DEFAULT.claim_wait
    events: Annotated[tuple[str, ...], "list of kinds", BeforeValidator(_kinds)] = _DEFAULT.events
    events_format: Literal["json", "msgpack"] = "json"  # Format of published events; most languages can read `json`.
    events_stream: Annotated[str | None, "one word or none", BeforeValidator(optional(word))] = None
    events_stream_max_age: Seconds = _DEFAULT.events_stream_max_age
    events_stream_max_bytes: AtLeastOne = _DEFAULT.events_stream_max_bytes
    heartbeat: MaybeSeconds = _DEFAULT.heartbeat
    outbox: AtLeastOne = _DEFAULT.outbox
    pending_messages: AtLeastOne = _DEFAULT.pending_messages
    pending_bytes: AtLeastOne = _DEFAULT.pending_bytes  # Maximum total size of these messages.

    @model_validator(mode="after")
    def _fits_together(self) -> NatsSettings:
        self.nats_options(budget=_DEFAULT.budget, name=_DEFAULT.name)
        return self

    def nats_options(self, *, budget: float, name: str) -> NatsOptions:
        """Return the options of the bus. Raises `CacheConfigurationError` for options that exclude each other."""
        other = {"type", "hosts", "password", "token", "events_format", "allow_insecure"}
        same = {each: getattr(self, each) for each in type(self).model_fields if each not in other}
        return NatsOptions(
            servers=tuple(
                f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
                for name, port in (host_and_port(host, 4222) for host in self.hosts)
            ),
            password=None if self.password is None else self.password.get_secret_value(),
            token=None if self.token is None else self.token.get_secret_value(),
            events_as_json=self.events_format == "json",
            budget=budget,
            name=name,
            **same,
        )


def bus_from_url(url: str) -> NatsSettings:
    """Return the bus settings for a URL. Raises `CacheConfigurationError`."""
    options = parse_bus_url(url)
    try:
        return NatsSettings(**options)
    except CacheConfigurationError as error:
        raise CacheConfigurationError(f"{redact_url(url)!r}: {error}") from None


def read_bus(value: object) -> object:
    """Return the bus settings for a URL. Return other values unchanged."""
    return bus_from_url(value) if isinstance(value, str) else named(value)


_read_hash_key = read_key(32, 64)  # BLAKE2b supports keys of up to 64 bytes.


def _sample(value: object) -> tuple[tuple[str, float], ...]:
    # In the environment a mapping is JSON. It is stored as pairs, because settings are hashable.
    try:
        given: Any = json.loads(value) if isinstance(value, str) else value
        sample = dict(cast("Any", given)) if isinstance(given, Mapping | tuple) else None
    except (TypeError, ValueError):
        sample = None
    if sample is None or not all(
        isinstance(glob, str) and isinstance(share, int | float) and not isinstance(share, bool)
        for glob, share in sample.items()
    ):
        raise ValueError("expected rates from 0 to 1 by event kind, such as cache_hit: 0.01")
    sample = {str(glob): float(share) for glob, share in sample.items()}
    try:
        shares(sample)
    except ValueError as error:
        raise CacheConfigurationError(str(error)) from None
    return tuple(sample.items())


class EventSettings(Options):
    """Keys in events, and sampling."""

    keys: KeyForm = "plain"
    """Form of keys in events:

    `plain`, `hash` (32 hexadecimal digits of BLAKE2b) or `none` (empty). Tags are always plain.
    """
    hash_key: Annotated[
        SecretStr | None, "secret", BeforeValidator(lambda value: None if value is None else _read_hash_key(value))
    ] = None
    """Secret for hashed keys, 32 to 64 bytes, the same in all processes.

    Without it, keys can be guessed from hashes.
    """
    sample: Annotated[tuple[tuple[str, float], ...], "rates by kind", BeforeValidator(_sample)] = ()
    """Sampling rates by glob over event kinds, such as `{cache_hit: 0.01}`.

    The first matching glob applies. The counters of `statistics()` stay exact, and events that change values
    (`cache_set`, `cache_deleted`, ...) are never sampled.
    """

    @model_validator(mode="after")
    def _secret_is_used(self) -> EventSettings:
        unused = self.hash_key is not None and self.keys != "hash"
        refuse_wrong((unused, f"hash_key: is allowed only with keys: hash, not with keys: {self.keys}"))
        return self

    @field_serializer("sample")
    def _by_glob(self, sample: tuple[tuple[str, float], ...]) -> dict[str, float]:
        return dict(sample)

    @property
    def policy(self) -> EventPolicy:
        """Event policy with these options, for the bus."""
        return EventPolicy(self.keys, b"" if self.hash_key is None else key_bytes(self.hash_key), dict(self.sample))
