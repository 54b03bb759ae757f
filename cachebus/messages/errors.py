"""The error tree. Each class has a stable wire code and typed fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, dataclass_transform

_codes: dict[str, type[Any]] = {}


@dataclass_transform(eq_default=False)
class _Fields(Exception):
    """Base class that turns annotations into fields and constructor parameters, those of the base class first.

    All classes share one constructor. Dataclasses would compile one per class and slow down the import of cachebus.
    """

    code: ClassVar[str]
    transient: ClassVar[bool] = False
    """True if a retry may succeed. Several transient errors in a row mean that the backend is unhealthy."""

    field_names: ClassVar[tuple[str, ...]] = ()
    """Field names, those of the base classes first."""

    def __init_subclass__(cls, code: str = "", transient: bool = False) -> None:
        own = [name for name, hint in vars(cls).get("__annotations__", {}).items() if not hint.startswith("ClassVar")]
        cls.field_names = tuple(dict.fromkeys((*cls.field_names, *own)))
        cls.transient = cls.transient or transient
        if code:
            cls.code = code
            if (holder := _codes.setdefault(code, cls)) is not cls:
                raise ValueError(f"error code {code!r} of {cls.__name__} is already used by {holder.__name__}")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if len(args) > len(cls.field_names):
            expected = f"at most {len(cls.field_names)} arguments ({', '.join(cls.field_names)})"
            raise TypeError(f"{cls.__name__} takes {expected}, but {len(args)} were given")
        given = dict(zip(cls.field_names, args, strict=False))
        if wrong := (kwargs.keys() - set(cls.field_names)) | (kwargs.keys() & given.keys()):
            raise TypeError(f"{cls.__name__} got unexpected or repeated arguments: {', '.join(sorted(wrong))}")
        given |= kwargs
        if missing := [name for name in cls.field_names if name not in given and not hasattr(cls, name)]:
            raise TypeError(f"{cls.__name__} is missing arguments: {', '.join(missing)}")
        vars(self).update(given)


class CacheError(_Fields, code="error"):
    """Base class of every error that cachebus raises. `detail` is the human-readable message.

    A subclass may build its message from its fields with a `template` instead. `code` identifies the class on the bus.
    """

    detail: str
    template: ClassVar[str] = ""

    def __str__(self) -> str:
        return self.detail or self.template.format_map(self.wire_fields())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.wire_fields().items())})"

    def wire_fields(self) -> dict[str, Any]:
        """Return the fields as the codec sends them.

        Instances of `str` subclasses, such as addresses, become plain `str`.
        """
        values = {name: getattr(self, name) for name in self.field_names}
        return {name: str(value) if isinstance(value, str) else value for name, value in values.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self.code, str(self), self.wire_fields())


def error_class(code: str) -> type[CacheError]:
    """Return the error class for a code, or `CacheError` if the code is unknown."""
    return _codes.get(code, CacheError)


def error_codes() -> tuple[str, ...]:
    """Return the codes of all error classes."""
    return tuple(_codes)


def rebuild(code: str, detail: str, values: Mapping[str, Any]) -> CacheError:
    """Return an error of the class for `code`.

    If the code is unknown, or the fields come from another version of cachebus, return a `CacheError` with the
    sender's message.
    """
    cls = error_class(code)
    try:
        made = cls(**{name: value for name, value in values.items() if name in cls.field_names})
        str(made)  # Formatting the message reveals fields of the wrong type.
    except (TypeError, ValueError):
        return CacheError(detail)
    return made


class CacheBackendError(CacheError, code="backend"):
    """Raised when a store fails."""

    backend: str = ""

    def __str__(self) -> str:
        return f"backend {self.backend!r}: {self.detail}" if self.backend else self.detail


class CacheConnectionError(CacheBackendError, ConnectionError, code="connection", transient=True):
    """Raised when a store or a bus cannot be reached, or its connection is lost."""


class CacheCapacityError(CacheError, ValueError, code="capacity"):
    """Raised when a value is larger than a store, a payload or a bus message may be. Sizes are bytes."""

    size: int = 0
    limit: int = 0

    def __str__(self) -> str:
        return f"{self.detail}: {self.size:,} bytes, the limit is {self.limit:,} bytes"


class CacheTimeoutError(CacheError, TimeoutError, code="timeout", transient=True):
    """Raised when no reply arrived within the call's time budget.

    `in_doubt` is true if the request is not idempotent and may have been carried out anyway.
    """

    detail: str = "no answer"
    address: str = ""
    timeout: float = 0.0
    in_doubt: bool = False

    def __str__(self) -> str:
        doubt = "; whether the request was done is not known" if self.in_doubt else ""
        return f"{self.address or 'cache'}: {self.detail} within {self.timeout:g} s{doubt}"


class CacheConfigurationError(CacheError, ValueError, code="configuration"):
    """Raised when a setting, a URL or an option is invalid. The message names it and the allowed values."""


class CacheKeyError(CacheError, ValueError, code="key"):
    """Raised when a key is empty, not a `str`, or cannot be written as UTF-8. `key` is its `repr`, shortened."""

    key: str = ""

    def __str__(self) -> str:
        return f"{self.detail}, not {self.key}" if self.key else self.detail


class CacheSerializationError(CacheError, ValueError, code="serialization"):
    """Raised when a value cannot be serialized, or a stored payload cannot be deserialized.

    `reason` is one word for why a stored payload was rejected. It is empty if serialization failed.
    """

    reason: str = ""


class CacheInvalidationError(CacheError, code="invalidation"):
    """Raised when an invalidation fails. Stale values may still be read."""


class CacheStampedeError(CacheError, code="stampede"):
    """Raised when waiting for another caller's load timed out, and the caller may not load or use a stale value."""


class LoaderFailed(CacheError, code="loader_failed"):
    """Raised when the caller waited for a loader in another process and that loader raised.

    `error` is the exception's type name.

    Callers in the loader's process get the exception itself.
    """

    detail: str = ""
    error: str = ""
    template: ClassVar[str] = "the loader in another process raised {error}"


class WrongType(CacheError, TypeError, code="wrong_type"):
    """Raised when an operation does not support the type of the stored value, such as `increment` on a `str`."""


class CapabilityError(CacheError, code="capability"):
    """Raised when a store does not support an operation."""

    detail: str = ""
    store: str = ""
    capability: str = ""
    template: ClassVar[str] = "store {store!r} does not support {capability}"


class CircuitOpen(CacheError, code="circuit_open"):
    """Raised when the circuit breaker of a backend is open after repeated failures. `retry_after` is in seconds."""

    detail: str = ""
    address: str = ""
    retry_after: float = 0.0
    template: ClassVar[str] = "the circuit of {address} is open; next attempt in {retry_after:.3g} s"


class Overloaded(CacheError, code="overloaded", transient=True):
    """Raised when a mailbox is full. The request was not carried out; retry later or send fewer requests."""

    detail: str = ""
    address: str = ""
    capacity: int = 0
    template: ClassVar[str] = "the mailbox of {address} is full ({capacity} messages)"


class LockNotAcquired(CacheTimeoutError, code="lock_not_acquired"):
    """Raised when a lock could not be acquired in time.

    `owner` holds it. The lock expires in `remaining` seconds unless the owner renews it.
    """

    name: str = ""
    owner: str = ""
    remaining: float = 0.0

    def __str__(self) -> str:
        holder = f"{self.owner!r} holds it" if self.owner else "other callers are ahead in the queue"
        return f"could not acquire the lock {self.name!r} within {self.timeout:g} s: {holder}"


class LockNotHeld(CacheError, code="lock_not_held"):
    """Raised when a caller extends, releases or relies on a lock that it does not hold.

    The lock was already released, has expired, or was lost by its store. Another caller may hold it by now.
    """

    detail: str = ""
    name: str = ""
    template: ClassVar[str] = "the lock {name!r} is not held: it was released, has expired, or was lost by its store"


class LockNotOwned(LockNotHeld, code="lock_not_owned"):
    """Raised when a caller extends or releases a lock that another `owner` holds."""

    owner: str = ""
    template: ClassVar[str] = "the lock {name!r} is held by {owner!r}"


class NoSuchActor(CacheError, LookupError, code="no_such_actor"):
    """Raised when no actor serves the address of a request."""

    detail: str = ""
    address: str = ""
    template: ClassVar[str] = "no actor serves the address {address!r}"


class AddressInUse(CacheError, code="address_in_use"):
    """Raised when an address is already served by `holder`."""

    detail: str = ""
    address: str = ""
    holder: str = ""
    template: ClassVar[str] = "the address {address!r} is already served by {holder}"


class ActorFailed(CacheError, code="actor_failed"):
    """Raised when an actor crashed while it handled the request. The request may or may not have taken effect."""

    detail: str = ""
    address: str = ""
    reason: str = ""
    template: ClassVar[str] = "actor {address} failed: {reason}"


class BadMessage(CacheError, ValueError, code="bad_message"):
    """Raised when a message cannot be decoded, is unknown, has a newer version, or has no handler in its actor."""


class RateLimited(CacheError, code="rate_limited"):
    """Raised when a rate limit has no units left for the call.

    `key` is the name of the limit. The same call is admitted after `retry_after` seconds, if no other caller takes
    units.
    """

    detail: str = ""
    key: str = ""
    retry_after: float = 0.0
    template: ClassVar[str] = "the rate limit {key!r} is exhausted; try again in {retry_after:.3g} s"


class CacheClosed(CacheError, code="closed"):
    """Raised when a cache is used before it is opened or after it is closed."""
