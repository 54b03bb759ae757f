"""The settings of a cache, and their sources in order of precedence."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from os import PathLike, fsdecode
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from cachebus.client.failure_policy import OnError
from cachebus.messages import CacheConfigurationError

from .backends import GuardSettings, MemcachedSettings, RedisSettings, host_and_port
from .bus import BusSettings, EventSettings, NatsSettings, read_bus
from .fields import (
    AtLeastOne,
    BackendOptions,
    MaybeAtLeastOne,
    MaybeSeconds,
    NotNegative,
    Options,
    Problem,
    Seconds,
    Switch,
    Word,
    named,
    problems_error,
    refuse_wrong,
    sentence,
    shown,
    unknown_option,
)
from .payload import PayloadSettings
from .sources import read_file, with_sources
from .urls import did_you_mean, is_url, parse_url, redact_url

Policy: TypeAlias = Literal["s3fifo", "lru", "lfu", "sieve"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class MemorySettings(BackendOptions):
    """A store in the memory of the process."""

    by_reference: ClassVar[bool] = True

    type: Literal["memory"] = "memory"
    default_ttl: MaybeSeconds = None  # Time to live, in seconds, of values stored without one; `None` means no expiry.
    max_entries: MaybeAtLeastOne = 10_000  # Maximum number of entries; `None` means no limit.
    max_bytes: MaybeAtLeastOne = None  # Maximum total size of the entries, estimated; `None` means no limit.
    policy: Policy = "s3fifo"  # Eviction policy for a full store.


class NullSettings(BackendOptions):
    """A store that keeps nothing. The application runs as if it had no cache."""

    by_reference: ClassVar[bool] = True

    type: Literal["null"] = "null"


class PluginSettings(GuardSettings, BackendOptions):
    """A store from another package. The scheme of its URL is an entry point in the group `cachebus.node.stores`.

    The URL may contain a password, which `repr` and JSON mask.
    """

    type: Literal["plugin"] = "plugin"
    url: str
    """URL of the store. The package parses the options in it."""

    @field_validator("url")
    @classmethod
    def _of_another_package(cls, url: str) -> str:
        if parse_url(url)[0] != "plugin":
            raise CacheConfigurationError(f"{redact_url(url)!r} has a built-in scheme: use the URL or its type instead")
        return str(url)

    @field_serializer("url", when_used="json")
    def _masked(self, url: str) -> str:
        return redact_url(url)

    def __repr_args__(self) -> Any:
        return [(name, redact_url(value) if name == "url" else value) for name, value in super().__repr_args__()]


BackendSettings: TypeAlias = (
    MemorySettings | NullSettings | RedisSettings | MemcachedSettings | PluginSettings | BusSettings
)


class ActorSettings(Options):
    """Mailboxes, turns and restarts of actors. Durations are seconds."""

    mailbox_capacity: AtLeastOne = 10_000  # Maximum number of messages in a mailbox; more raise `Overloaded`.
    inline_turns: Switch = True  # Let callers run non-waiting turns on their own stack, without a task switch.
    max_restarts: NotNegative = 5  # Maximum number of restarts within `restart_window`; then the actor is stopped.
    restart_window: Seconds = 30.0  # Period in which restarts are counted.
    restart_backoff: Seconds = 0.05  # Upper bound of the first random pause; it doubles per restart (full jitter).
    restart_backoff_max: Seconds = 5.0  # Maximum pause before a restart.

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> ActorSettings:
        most, least = self.restart_backoff_max, self.restart_backoff
        refuse_wrong((most < least, f"restart_backoff_max {most:g} is less than restart_backoff {least:g}"))
        return self


def backend_from_url(url: str) -> BackendSettings:
    """Return the backend settings for a URL. Raises `CacheConfigurationError`."""
    kind, options = parse_url(url)
    made = next(each for each in get_args(BackendSettings) if each.model_fields["type"].default == kind)
    try:
        backend: BackendSettings = made(**options)
    except CacheConfigurationError as error:
        raise CacheConfigurationError(f"{redact_url(url)!r}: {error}") from None
    return backend


def _read_entry(value: object) -> object:
    return backend_from_url(value) if isinstance(value, str) else named(value)


def _read_entries(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    raise ValueError("expected a list of backends, each a URL or options with a type")


_Entry = Annotated[BackendSettings, Field(discriminator="type"), BeforeValidator(_read_entry)]


class _Root(Options):
    # A separate base class, so that type checkers still derive the constructor of Settings from its fields.
    def __init__(self, /, **values: Any) -> None:
        known = type(self).model_fields
        for name in values:
            if name not in known:
                raise CacheConfigurationError(sentence((redact_url(name),), unknown_option(name, list(known))))
        super().__init__(**with_sources(known, values))


class Settings(_Root):
    """All settings of a cache.

    Keyword arguments take precedence over environment variables (`CACHEBUS_TIMEOUT`, `CACHEBUS_ACTORS__MAX_RESTARTS`),
    and these over the defaults. `load_settings` also reads files and URLs.

    Raises `CacheConfigurationError`, which names the option, its value and the allowed values, but never a password.
    """

    model_config = ConfigDict(validate_default=True)

    namespace: Word = "default"
    """Separates the keys of applications that share a store."""
    timeout: Seconds = 5.0
    """Time budget of each call, in seconds. It is the only deadline of the call."""
    on_error: OnError = "miss"
    """Behaviour if the backend fails: `miss` continues as if nothing were cached; `raise` raises the error."""
    backends: Annotated[
        tuple[_Entry, ...], "list of backends: URLs, or options with a type", BeforeValidator(_read_entries)
    ] = (MemorySettings(),)
    """Stores for values. If there are several, exactly one needs `default: true`."""
    actors: Annotated[ActorSettings, BeforeValidator(named)] = ActorSettings()
    """Options of the actors in this process."""
    bus: Annotated[NatsSettings | None, BeforeValidator(read_bus)] = None
    """Connection to other processes: the URL of a NATS server or its options. With `None`, there is no connection."""
    payload: Annotated[PayloadSettings, BeforeValidator(named)] = PayloadSettings()
    """Serialization, compression, signing and encryption of values."""
    events: Annotated[EventSettings, BeforeValidator(named)] = EventSettings()
    """Keys in events, and sampling."""
    locks: _Entry | None = None
    """Store for locks: a backend, or `bus:locks` to use a worker's lock store.

    `None` uses the store of the default backend.
    """
    profile: Literal["dev", "production", "test"] | None = None
    """Preset:

    `dev` enables `debug`; `production` sets that environment, zstd and checksums; `test` sets a timeout of 30 s.
    """
    environment: Literal["development", "test", "production"] = "development"
    """`production` rejects insecure settings."""
    debug: Switch = False
    """Include the affected keys in log messages."""

    @field_validator("backends")
    @classmethod
    def _one_default(cls, backends: tuple[BackendSettings, ...]) -> tuple[BackendSettings, ...]:
        names = [each.name for each in backends]
        twice = next((name for name in names if names.count(name) > 1), None)
        refuse_wrong(
            (not names, "expected at least one backend"),
            (twice, f"the name {twice!r} is used twice; give each backend a different name"),
        )
        if len(backends) == 1:
            return (backends[0].model_copy(update={"default": True}),)
        defaults = [each.name for each in backends if each.default]
        refuse_wrong(
            (not defaults, f"one of {', '.join(names)} must be the default: set default: true on it"),
            (len(defaults) > 1, f"only one backend can be the default, not {' and '.join(defaults)}"),
        )
        return backends

    @field_validator("locks")
    @classmethod
    def _can_be_kept(cls, locks: BackendSettings | None) -> BackendSettings | None:
        kind = None if locks is None else locks.type
        refuse_wrong(
            (isinstance(locks, BusSettings) and locks.name != "locks", "expected bus:locks for the locks of a worker"),
            (kind in ("null", "plugin"), f"expected a memory, redis or memcached backend or bus:locks, not {kind}"),
        )
        return locks

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        on_bus = [f"backend {each.name!r} is" for each in self.backends if isinstance(each, BusSettings)]
        on_bus += ["locks are"] if isinstance(self.locks, BusSettings) else []
        if on_bus and self.bus is None:
            raise CacheConfigurationError(f"{on_bus[0]} on a bus, but no bus is configured: set bus='nats://host'")
        if self.environment == "production" and (found := list(security_issues(self))):
            raise problems_error(found)
        remote = ", ".join(each.name for each in self.backends if not each.by_reference)
        problem = f"payload.serializer: none requires the memory backend, but {remote} keeps bytes"
        refuse_wrong((self.payload.serializer == "none" and remote, problem))
        return self

    @property
    def locks_kept(self) -> BackendSettings:
        """Settings of the backend that stores the locks."""
        return self.default_backend if self.locks is None else self.locks

    @property
    def default_backend(self) -> BackendSettings:
        """Settings of the default backend."""
        return next(each for each in self.backends if each.default)

    def backend(self, name: str) -> BackendSettings:
        """Return the settings of a backend by name. Raises `CacheConfigurationError`, which lists the known names."""
        known = {each.name: each for each in self.backends}
        if name in known:
            return known[name]
        hint = did_you_mean(name, known)
        raise CacheConfigurationError(f"unknown backend {name!r}{hint}; known backends are {', '.join(known)}")


def load_settings(source: object = None, /, **overrides: Any) -> Settings:
    """Load settings from a source.

    The source is a `Settings`, a mapping, a file (.yaml .yml .toml .json), a URL or a list with one URL. `None` reads
    only the environment. `overrides` take precedence over the source, the source over the environment, and the
    environment over the defaults. Groups of options are merged; lists are replaced.

    Reading a file blocks, so call this before the event loop runs.

    Raises `CacheConfigurationError`, which names the option, its value and the allowed values, but never a password.
    """
    if isinstance(source, Settings) and not overrides:
        return source
    values = _read(source)
    for name, value in overrides.items():
        below = values.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping | BaseModel):
            group: dict[str, Any] = dict(below)  # pyright: ignore[reportUnknownArgumentType]
            values[name] = {**group, **value}
        else:
            values[name] = value
    return Settings(**values)


def _read(source: object) -> dict[str, Any]:
    match source:
        case None:
            return {}
        case Settings():
            return dict(source)
        case Mapping():
            return dict(named(cast("Mapping[str, Any]", source)))
        case PathLike():
            return named(read_file(Path(fsdecode(cast("PathLike[str]", source)))))
        case str() if is_url(source):
            return {"backends": [backend_from_url(source)]}
        case str():
            return named(read_file(source))
        case [str() as url] if is_url(url):
            return _read(url)
        case [_, _, *_]:  # pyright: ignore[reportUnknownVariableType]
            raise CacheConfigurationError("expected one URL: tiers of several backends are not supported yet")
        case _:
            raise CacheConfigurationError(f"expected settings as a mapping, a file or a URL, not {shown(source)}")


def security_issues(settings: Settings) -> Iterator[Problem]:
    """Yield the path of each insecure setting and how to fix it.

    Yield nothing if the settings are fit for production.
    """
    if settings.debug:
        yield ("debug",), "writes keys to the log; remove it in production"
    events = settings.events
    if settings.payload.encryption_keys and events.keys == "plain":
        yield ("events", "keys"), "events contain plain keys while payloads are sealed; set keys: hash or keys: none"
    if settings.payload.encryption_keys and events.keys == "hash" and events.hash_key is None:
        yield (
            ("events", "hash_key"),
            "without a secret, keys can be guessed from their hashes while payloads are sealed; set hash_key",
        )
    for place, backend in enumerate(settings.backends):
        if backend.type == "memory" and backend.max_entries is None and backend.max_bytes is None:
            yield ("backends", place, "max_entries"), "the memory backend has no limit; set max_entries or max_bytes"
        yield from _plain_text(("backends", place), backend)
    yield from _plain_text(("locks",), settings.locks)
    yield from _plain_text(("bus",), settings.bus)


_TLS_REMEDIES = {
    "redis": "use rediss:// (tls: true)",
    "memcached": "set tls: true",
    "nats": "use tls:// (tls: true)",
}


def _plain_text(at: tuple[str | int, ...], server: Any) -> Iterator[Problem]:
    remedy = _TLS_REMEDIES.get(getattr(server, "type", ""))
    if remedy is None or getattr(server, "socket", None):
        return
    foreign = [host for host in server.hosts if not _is_loopback(host)]
    if foreign and not (server.tls or server.allow_insecure):
        otherwise = f"{remedy}, or set allow_insecure: true if the network is trusted"
        yield (*at, "tls"), f"connections to {', '.join(foreign)} are not encrypted; {otherwise}"


def _is_loopback(host: str) -> bool:
    name = host_and_port(host, 0)[0]
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
