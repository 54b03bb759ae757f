"""The error tree: one class per thing that can go wrong, each with a wire code and fields of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, dataclass_transform

_codes: dict[str, type[Any]] = {}


@dataclass_transform(eq_default=False)
class _Fields(Exception):
    """An exception whose annotated names are its fields, those of its base first, and so the parameters of its constructor.

    All classes share one constructor: a dataclass compiles one for each when cachebus is imported.
    """

    code: ClassVar[str]
    transient: ClassVar[bool] = False
    """Another attempt, a little later, may succeed; and many of these in a row mean that a backend is ill."""

    field_names: ClassVar[tuple[str, ...]] = ()
    """The names of the fields, those of the bases first."""

    def __init_subclass__(cls, code: str = "", transient: bool = False) -> None:
        own = [name for name, hint in vars(cls).get("__annotations__", {}).items() if not hint.startswith("ClassVar")]
        cls.field_names = tuple(dict.fromkeys((*cls.field_names, *own)))
        cls.transient = cls.transient or transient
        if code:
            cls.code = code
            if (holder := _codes.setdefault(code, cls)) is not cls:
                raise ValueError(f"error code {code!r} of {cls.__name__} belongs to {holder.__name__}")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if len(args) > len(cls.field_names):
            raise TypeError(f"{cls.__name__} takes {', '.join(cls.field_names)}, and {len(args)} arguments were given")
        given = dict(zip(cls.field_names, args, strict=False))
        if wrong := (kwargs.keys() - set(cls.field_names)) | (kwargs.keys() & given.keys()):
            raise TypeError(f"{cls.__name__} has no free field {', '.join(sorted(wrong))}")
        given |= kwargs
        if missing := [name for name in cls.field_names if name not in given and not hasattr(cls, name)]:
            raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}")
        vars(self).update(given)


class CacheError(_Fields, code="error"):
    """The root of every error that cachebus raises. `detail` is the sentence for people.

    A subclass may have fields instead, and a `template` that makes a sentence of them. It crosses the bus under its `code`.
    """

    detail: str
    template: ClassVar[str] = ""

    def __str__(self) -> str:
        return self.detail or self.template.format_map(self.wire_fields())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.wire_fields().items())})"

    def wire_fields(self) -> dict[str, Any]:
        """Return the fields as the codec sends them: an address, which is a kind of `str`, as a plain one."""
        values = {name: getattr(self, name) for name in self.field_names}
        return {name: str(value) if isinstance(value, str) else value for name, value in values.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self.code, str(self), self.wire_fields())


def error_class(code: str) -> type[CacheError]:
    """Return the class that a code names; `CacheError` for an unknown one."""
    return _codes.get(code, CacheError)


def error_codes() -> tuple[str, ...]:
    """Return every code that names a class of the tree."""
    return tuple(_codes)


def rebuild(code: str, detail: str, values: Mapping[str, Any]) -> CacheError:
    """Return the error that `code` names.

    An unknown code, or fields of another version of cachebus, still give a `CacheError` with the sender's sentence.
    """
    cls = error_class(code)
    try:
        made = cls(**{name: value for name, value in values.items() if name in cls.field_names})
        str(made)  # Fields of the wrong type show when the sentence is built.
    except (TypeError, ValueError):
        return CacheError(detail)
    return made


class CacheBackendError(CacheError, code="backend"):
    """Raised when a store failed for a reason of its own."""

    backend: str = ""

    def __str__(self) -> str:
        return f"backend {self.backend!r}: {self.detail}" if self.backend else self.detail


class CacheConnectionError(CacheBackendError, ConnectionError, code="connection", transient=True):
    """Raised when a store or a bus cannot be reached, or its connection was lost."""


class CacheCapacityError(CacheError, ValueError, code="capacity"):
    """Raised when a value is larger than the place where it should go. Sizes are bytes."""

    size: int = 0
    limit: int = 0

    def __str__(self) -> str:
        return f"{self.detail}: {self.size:,} bytes, the limit is {self.limit:,} bytes"


class CacheTimeoutError(CacheError, TimeoutError, code="timeout", transient=True):
    """Raised when no answer came within the call's time budget.

    `in_doubt` says that a request which must not be repeated may have been carried out all the same.
    """

    detail: str = "no answer"
    address: str = ""
    timeout: float = 0.0
    in_doubt: bool = False

    def __str__(self) -> str:
        doubt = "; whether the request was done is not known" if self.in_doubt else ""
        return f"{self.address or 'cache'}: {self.detail} within {self.timeout:g} s{doubt}"


class CacheConfigurationError(CacheError, ValueError, code="configuration"):
    """Raised when a setting, a URL or an option is wrong. Names it, and what is allowed."""


class CacheKeyError(CacheError, ValueError, code="key"):
    """Raised when a key is empty, not a `str`, or cannot be written as UTF-8. `key` is its `repr`, shortened."""

    key: str = ""

    def __str__(self) -> str:
        return f"{self.detail}, not {self.key}" if self.key else self.detail


class CacheSerializationError(CacheError, ValueError, code="serialization"):
    """Raised when a value cannot be turned into bytes, or bytes cannot be turned into the value they claim to be.

    `reason` is one word for why a stored payload is not taken; it is empty if a value could not be written.
    """

    reason: str = ""


class CacheInvalidationError(CacheError, code="invalidation"):
    """Raised when an invalidation could not be carried out, so that stale values may still be read."""


class CacheStampedeError(CacheError, code="stampede"):
    """Raised when a caller that has waited for another load may neither load nor be served a stale value."""


class LoaderFailed(CacheError, code="loader_failed"):
    """Raised when the loader of another process, whose value the caller waited for, raised `error` (its type's name).

    Callers in the loader's own process get the exception itself.
    """

    detail: str = ""
    error: str = ""
    template: ClassVar[str] = "the loader of another process raised {error}"


class WrongType(CacheError, TypeError, code="wrong_type"):
    """Raised when an operation meets a stored value of a type it cannot work on, such as a `str` for `increment`."""


class CapabilityError(CacheError, code="capability"):
    """Raised when a store is asked for what it cannot do."""

    detail: str = ""
    store: str = ""
    capability: str = ""
    template: ClassVar[str] = "store {store!r} cannot do {capability}"


class CircuitOpen(CacheError, code="circuit_open"):
    """Raised when a backend has failed so often that it gets no requests for a while. `retry_after` is in seconds."""

    detail: str = ""
    address: str = ""
    retry_after: float = 0.0
    template: ClassVar[str] = "circuit of {address} is open, next attempt in {retry_after:.3g} s"


class Overloaded(CacheError, code="overloaded", transient=True):
    """Raised when a mailbox is full. Nothing was done; try later, or send less."""

    detail: str = ""
    address: str = ""
    capacity: int = 0
    template: ClassVar[str] = "mailbox of {address} is full ({capacity} messages)"


class LockNotAcquired(CacheTimeoutError, code="lock_not_acquired"):
    """Raised when a lock could not be had in time: `owner` holds it, for `remaining` seconds more unless it renews it."""

    name: str = ""
    owner: str = ""
    remaining: float = 0.0

    def __str__(self) -> str:
        holder = f"{self.owner!r} holds it" if self.owner else "others were first"
        return f"the lock {self.name!r} was not to be had within {self.timeout:g} s: {holder}"


class LockNotHeld(CacheError, code="lock_not_held"):
    """Raised when a caller extends, releases or relies on a lock that it does not hold.

    The lock was released before, its time ran out, or its store has lost it. Another caller may hold it by now.
    """

    detail: str = ""
    name: str = ""
    template: ClassVar[str] = "the lock {name!r} is not held: it was given back, ran out, or was lost"


class LockNotOwned(LockNotHeld, code="lock_not_owned"):
    """Raised when a lock is extended or released, and `owner` holds it."""

    owner: str = ""
    template: ClassVar[str] = "the lock {name!r} is held by {owner!r}"


class NoSuchActor(CacheError, LookupError, code="no_such_actor"):
    """Raised when no actor serves the address of a request."""

    detail: str = ""
    address: str = ""
    template: ClassVar[str] = "no actor serves the address {address!r}"


class AddressInUse(CacheError, code="address_in_use"):
    """Raised when an address is already served, by `holder`."""

    detail: str = ""
    address: str = ""
    holder: str = ""
    template: ClassVar[str] = "the address {address!r} is already served by {holder}"


class ActorFailed(CacheError, code="actor_failed"):
    """Raised when an actor crashed while it handled the request. Whether the request took effect is not known."""

    detail: str = ""
    address: str = ""
    reason: str = ""
    template: ClassVar[str] = "actor {address} failed: {reason}"


class BadMessage(CacheError, ValueError, code="bad_message"):
    """Raised when a message cannot be decoded, is unknown or of a newer version, or its actor has no handler for it."""


class RateLimited(CacheError, code="rate_limited"):
    """Raised when a block is entered whose rate limit is used up.

    `key` is the name of the limit. `retry_after` is when it admits the same again, in seconds, if no other caller takes units.
    """

    detail: str = ""
    key: str = ""
    retry_after: float = 0.0
    template: ClassVar[str] = "the rate limit {key!r} is used up, try again in {retry_after:.3g} s"


class CacheClosed(CacheError, code="closed"):
    """Raised when a cache is used before it is open or after it was closed."""
