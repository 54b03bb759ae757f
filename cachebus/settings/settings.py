"""The settings of a cache, where they come from, and which source wins."""

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
    """A store in the memory of this process."""

    by_reference: ClassVar[bool] = True

    type: Literal["memory"] = "memory"
    default_ttl: MaybeSeconds = None  # Seconds that values without a time to live are kept; `None` is no expiry.
    max_entries: MaybeAtLeastOne = 10_000  # How many values there may be; `None` is no bound.
    max_bytes: MaybeAtLeastOne = None  # How many bytes they may take together, by an estimate; `None` is no bound.
    policy: Policy = "s3fifo"  # Chooses what goes when the store is full.


class NullSettings(BackendOptions):
    """A store that keeps nothing: the application runs as if it had no cache."""

    by_reference: ClassVar[bool] = True

    type: Literal["null"] = "null"


class PluginSettings(GuardSettings, BackendOptions):
    """A store from another package, which reads its own URL. The scheme is an entry point of `cachebus.node.stores`.

    The URL may hold a password: `repr` and JSON show it masked.
    """

    type: Literal["plugin"] = "plugin"
    url: str
    """The package reads its own options from it."""

    @field_validator("url")
    @classmethod
    def _of_another_package(cls, url: str) -> str:
        if parse_url(url)[0] != "plugin":
            raise CacheConfigurationError(f"{redact_url(url)!r} is built in: give the URL itself, or its type")
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
    """How actors run. Durations are seconds."""

    mailbox_capacity: AtLeastOne = 10_000  # How many messages may wait for one actor before it answers `Overloaded`.
    inline_turns: Switch = True  # Whether a caller may run a turn that cannot wait on its own stack.
    max_restarts: NotNegative = 5  # How many restarts within `restart_window` are tried before an actor is given up.
    restart_window: Seconds = 30.0  # How long a crash counts, in seconds.
    restart_backoff: Seconds = 0.05  # Upper end of the first random pause; it doubles with each restart (full jitter).
    restart_backoff_max: Seconds = 5.0  # The upper end of the longest back-off, in seconds.

    @model_validator(mode="after")
    def _longest_is_not_shorter_than_first(self) -> ActorSettings:
        most, least = self.restart_backoff_max, self.restart_backoff
        refuse_wrong((most < least, f"restart_backoff_max {most:g} is less than restart_backoff {least:g}"))
        return self


def backend_from_url(url: str) -> BackendSettings:
    """Return the settings of the backend that a URL describes. Raises `CacheConfigurationError`."""
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
    # Apart from Settings, so that type checkers still see a constructor with its fields.
    def __init__(self, /, **values: Any) -> None:
        known = type(self).model_fields
        for name in values:
            if name not in known:
                raise CacheConfigurationError(sentence((redact_url(name),), unknown_option(name, list(known))))
        super().__init__(**with_sources(known, values))


class Settings(_Root):
    """Every setting of a cache. A keyword wins over the environment (`CACHEBUS_TIMEOUT`,
    `CACHEBUS_ACTORS__MAX_RESTARTS`), that over the default. `load_settings` also reads files and URLs.

    Raises `CacheConfigurationError` that names the option, the value and what is allowed; never a password.
    """

    model_config = ConfigDict(validate_default=True)

    namespace: Word = "default"
    """Keeps the keys of several applications in one store apart."""
    timeout: Seconds = 5.0
    """The time budget of one call, in seconds: the only deadline there is."""
    on_error: OnError = "miss"
    """When the backend fails: `miss`, and the application goes on as if nothing were cached; or `raise`."""
    backends: Annotated[
        tuple[_Entry, ...], "list of backends: URLs, or options with a type", BeforeValidator(_read_entries)
    ] = (MemorySettings(),)
    """Where values are kept. With several, one says `default: true`."""
    actors: Annotated[ActorSettings, BeforeValidator(named)] = ActorSettings()
    """How actors run."""
    bus: Annotated[NatsSettings | None, BeforeValidator(read_bus)] = None
    """How to reach other processes: the URL of a NATS server, or its options; `None` is no way."""
    payload: Annotated[PayloadSettings, BeforeValidator(named)] = PayloadSettings()
    """How values become bytes."""
    events: Annotated[EventSettings, BeforeValidator(named)] = EventSettings()
    """What events say, and how many of them go out."""
    locks: _Entry | None = None
    """Where locks are kept: a backend, or `bus:locks` in workers that name one; `None` is with the values of the default backend."""
    profile: Literal["dev", "production", "test"] | None = None
    """Sets of settings: `dev` is `debug`; `production` is that environment, zstd and checksums; `test` is a timeout of 30 s."""
    environment: Literal["development", "test", "production"] = "development"
    """`production` refuses settings that are insecure."""
    debug: Switch = False
    """Whether the log names the keys that something went wrong with."""

    @field_validator("backends")
    @classmethod
    def _one_default(cls, backends: tuple[BackendSettings, ...]) -> tuple[BackendSettings, ...]:
        names = [each.name for each in backends]
        twice = next((name for name in names if names.count(name) > 1), None)
        refuse_wrong(
            (not names, "there must be at least one"),
            (twice, f"the name {twice!r} is taken twice: give each backend its own"),
        )
        if len(backends) == 1:
            return (backends[0].model_copy(update={"default": True}),)
        defaults = [each.name for each in backends if each.default]
        refuse_wrong(
            (not defaults, f"one of {', '.join(names)} must be the default: say default: true there"),
            (len(defaults) > 1, f"only one can be the default, not all of {', '.join(defaults)}"),
        )
        return backends

    @field_validator("locks")
    @classmethod
    def _can_be_kept(cls, locks: BackendSettings | None) -> BackendSettings | None:
        kind = None if locks is None else locks.type
        refuse_wrong(
            (isinstance(locks, BusSettings) and locks.name != "locks", "the lock manager of a worker is at bus:locks"),
            (kind in ("null", "plugin"), f"a {kind} backend keeps no locks: memory, redis, memcached or bus:locks"),
        )
        return locks

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        on_bus = [f"backend {each.name!r} is" for each in self.backends if isinstance(each, BusSettings)]
        on_bus += ["locks are"] if isinstance(self.locks, BusSettings) else []
        if on_bus and self.bus is None:
            raise CacheConfigurationError(f"{on_bus[0]} on a bus: give its URL, bus='nats://host'")
        if self.environment == "production" and (found := list(security_issues(self))):
            raise problems_error(found)
        remote = ", ".join(each.name for each in self.backends if not each.by_reference)
        problem = f"payload.serializer: none is for the memory backend, and {remote} keeps bytes"
        refuse_wrong((self.payload.serializer == "none" and remote, problem))
        return self

    @property
    def locks_kept(self) -> BackendSettings:
        """The backend whose store keeps the locks."""
        return self.default_backend if self.locks is None else self.locks

    @property
    def default_backend(self) -> BackendSettings:
        """The backend for calls that name none."""
        return next(each for each in self.backends if each.default)

    def backend(self, name: str) -> BackendSettings:
        """Return the backend of a name. Raises `CacheConfigurationError` that lists the known ones."""
        known = {each.name: each for each in self.backends}
        if name in known:
            return known[name]
        raise CacheConfigurationError(f"no backend {name!r}{did_you_mean(name, known)}, known are {', '.join(known)}")


def load_settings(source: object = None, /, **overrides: Any) -> Settings:
    """Return the settings of a source: a `Settings`, a mapping, a file (.yaml .yml .toml .json), a URL, a list with one URL,
    or `None` for the environment alone. `overrides` win over the source, that over the environment, that over the defaults.

    Groups of options are merged, lists are replaced. Reads files, so it blocks: call it before the loop runs.

    Raises `CacheConfigurationError` that names the option, the value and what is allowed; never a password.
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
            raise CacheConfigurationError("tiers of backends are not available yet: give one URL")
        case _:
            raise CacheConfigurationError(
                f"settings are read from a mapping, a file or a URL, not from {shown(source)}"
            )


def security_issues(settings: Settings) -> Iterator[Problem]:
    """Yield the path of each insecure setting, and what to do. Settings that are fit for production yield nothing."""
    if settings.debug:
        yield ("debug",), "writes keys to the log; leave it out in production"
    events = settings.events
    if settings.payload.encryption_keys and events.keys == "plain":
        yield ("events", "keys"), "events carry plain keys while payloads are sealed; say keys: hash or keys: none"
    if settings.payload.encryption_keys and events.keys == "hash" and events.hash_key is None:
        yield (
            ("events", "hash_key"),
            "keys can be guessed from hashes without a secret while payloads are sealed; give one",
        )
    for place, backend in enumerate(settings.backends):
        if backend.type == "memory" and backend.max_entries is None and backend.max_bytes is None:
            yield ("backends", place, "max_entries"), "the memory backend has no bound; give max_entries or max_bytes"
        yield from _plain_text(("backends", place), backend)
    yield from _plain_text(("locks",), settings.locks)
    yield from _plain_text(("bus",), settings.bus)


_TLS_REMEDIES = {
    "redis": "use rediss:// (tls: true)",
    "memcached": "say tls: true",
    "nats": "use tls:// (tls: true)",
}


def _plain_text(at: tuple[str | int, ...], server: Any) -> Iterator[Problem]:
    remedy = _TLS_REMEDIES.get(getattr(server, "type", ""))
    if remedy is None or getattr(server, "socket", None):
        return
    foreign = [host for host in server.hosts if not _is_loopback(host)]
    if foreign and not (server.tls or server.allow_insecure):
        otherwise = f"{remedy}, or say allow_insecure: true where the network is trusted"
        yield (*at, "tls"), f"plain text to {', '.join(foreign)}; {otherwise}"


def _is_loopback(host: str) -> bool:
    name = host_and_port(host, 0)[0]
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
