"""The options of a bus: how it reaches other processes over NATS, and which events it carries how."""

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
    kinds = texts(given, "expected kinds of events, such as cache_set or cache_*")
    if kinds:
        event_kinds(kinds)
    return kinds


def _prefixes(value: object) -> tuple[str, ...]:
    expected = "expected beginnings of subjects, such as _INBOX"
    if not all(prefixes := texts(value, expected)):
        raise ValueError(expected)
    return prefixes


def _text(value: object) -> str:
    if isinstance(value, str) and value:
        return str(value)
    raise ValueError("expected text")


MaybeText = Annotated[str | None, "text or none", BeforeValidator(optional(_text))]


class BusSettings(BackendOptions):
    """A backend that some worker on the bus has; as a string, `bus:primary`. The worker's settings say what it is."""

    type: Literal["bus"] = "bus"


class NatsSettings(Options):
    """A bus over NATS. Durations are seconds, sizes are bytes.

    As a URL: `nats://user:password@host:4222,host2?window=4`, `nats://token@host`, and `tls://` to refuse a server without
    TLS. In a user, a password or a token, everything but letters and digits is escaped with `%`. Options without a description
    here are those of `cachebus.bus.nats.options.NatsOptions`.
    """

    type: Literal["nats"] = "nats"
    hosts: Hosts = ("localhost",)  # Servers of one cluster, each with or without a port: 4222 if left out.
    user: str = ""  # The user to sign in as, with `password`.
    password: SecretStr | None = None  # The password of `user`.
    token: SecretStr | None = None  # The token to sign in with, instead of a user.
    nkey_seed_file: MaybeText = None  # A file with the seed of an nkey. Read at every connect.
    credentials_file: MaybeText = None  # A `.creds` file, with a JWT and a seed. Read at every connect.
    tls: Switch = False  # Whether a server without TLS is refused. Certificates and host names are always checked.
    tls_ca_file: MaybeText = None  # The authorities to trust, as a PEM file; those of the system if left out.
    tls_cert_file: MaybeText = None  # Our own certificate, as a PEM file, if the server asks for one.
    tls_key_file: MaybeText = None  # The key to our certificate, unencrypted, if it is not in the same file.
    allow_insecure: Switch = False  # Whether production may talk plain text to them, because the network is trusted.
    inbox_prefix: Annotated[str, "text", BeforeValidator(_text)] = _DEFAULT.inbox_prefix
    reply_prefixes: Annotated[tuple[str, ...], "list of prefixes", BeforeValidator(_prefixes)] = _DEFAULT.reply_prefixes
    max_budget: Seconds = _DEFAULT.max_budget
    connect_timeout: Seconds = _DEFAULT.connect_timeout  # How long connecting may take, greeting included.
    reconnect_wait: Seconds = _DEFAULT.reconnect_wait
    reconnect_wait_max: Seconds = _DEFAULT.reconnect_wait_max  # The upper end of the longest pause before a reconnect.
    ping_interval: Seconds = _DEFAULT.ping_interval
    batch: AtLeastOne = _DEFAULT.batch
    batch_bytes: AtLeastOne = _DEFAULT.batch_bytes
    window: AtLeastOne = _DEFAULT.window
    max_waiting: AtLeastOne = _DEFAULT.max_waiting
    resend_after: Seconds = _DEFAULT.resend_after
    claim_wait: Seconds = _DEFAULT.claim_wait
    events: Annotated[tuple[str, ...], "list of kinds", BeforeValidator(_kinds)] = _DEFAULT.events
    events_format: Literal["json", "msgpack"] = "json"  # `json` is for listeners in any language.
    events_stream: Annotated[str | None, "one word or none", BeforeValidator(optional(word))] = None
    events_stream_max_age: Seconds = _DEFAULT.events_stream_max_age
    events_stream_max_bytes: AtLeastOne = _DEFAULT.events_stream_max_bytes
    heartbeat: MaybeSeconds = _DEFAULT.heartbeat
    outbox: AtLeastOne = _DEFAULT.outbox
    pending_messages: AtLeastOne = _DEFAULT.pending_messages
    pending_bytes: AtLeastOne = _DEFAULT.pending_bytes  # How many bytes of them may be taken at once.

    @model_validator(mode="after")
    def _fits_together(self) -> NatsSettings:
        self.nats_options(budget=_DEFAULT.budget, name=_DEFAULT.name)
        return self

    def nats_options(self, *, budget: float, name: str) -> NatsOptions:
        """Return the options for the bus. Raises `CacheConfigurationError` for options that exclude each other."""
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
    """Return the settings of the bus that a URL describes. Raises `CacheConfigurationError`."""
    options = parse_bus_url(url)
    try:
        return NatsSettings(**options)
    except CacheConfigurationError as error:
        raise CacheConfigurationError(f"{redact_url(url)!r}: {error}") from None


def read_bus(value: object) -> object:
    """Return the settings of a URL; let through named options."""
    return bus_from_url(value) if isinstance(value, str) else named(value)


_read_hash_key = read_key(32, 64)  # BLAKE2b takes no longer key.


def _sample(value: object) -> tuple[tuple[str, float], ...]:
    # The environment has a mapping as JSON. Kept as pairs, because settings can be hashed.
    try:
        given: Any = json.loads(value) if isinstance(value, str) else value
        sample = dict(cast("Any", given)) if isinstance(given, Mapping | tuple) else None
    except (TypeError, ValueError):
        sample = None
    if sample is None or not all(
        isinstance(glob, str) and isinstance(share, int | float) and not isinstance(share, bool)
        for glob, share in sample.items()
    ):
        raise ValueError("expected shares from 0 to 1 by kinds of events, such as cache_hit: 0.01")
    sample = {str(glob): float(share) for glob, share in sample.items()}
    try:
        shares(sample)
    except ValueError as error:
        raise CacheConfigurationError(str(error)) from None
    return tuple(sample.items())


class EventSettings(Options):
    """What events say, and how many of them go out."""

    keys: KeyForm = "plain"
    """Keys in events: `plain`; `hash`, 32 hexadecimal digits of BLAKE2b; or `none`, the empty string. Tags stay plain."""
    hash_key: Annotated[
        SecretStr | None, "secret", BeforeValidator(lambda value: None if value is None else _read_hash_key(value))
    ] = None
    """The secret of hashed keys, 32 to 64 bytes, the same for all processes. Without it, keys can be guessed from their hashes."""
    sample: Annotated[tuple[tuple[str, float], ...], "shares by kind", BeforeValidator(_sample)] = ()
    """The share of a kind of events that goes out, by globs: `{cache_hit: 0.01}`. Of several that fit, the first counts; the
    counters of `statistics()` stay exact. What changes values (`cache_set`, `cache_deleted`, ...) is not sampled."""

    @model_validator(mode="after")
    def _secret_is_used(self) -> EventSettings:
        unused = self.hash_key is not None and self.keys != "hash"
        refuse_wrong((unused, f"hash_key: only keys: hash has a use for it, not keys: {self.keys}"))
        return self

    @field_serializer("sample")
    def _by_glob(self, sample: tuple[tuple[str, float], ...]) -> dict[str, float]:
        return dict(sample)

    @property
    def policy(self) -> EventPolicy:
        """The same options, for the bus."""
        return EventPolicy(self.keys, b"" if self.hash_key is None else key_bytes(self.hash_key), dict(self.sample))
