"""The error tree: one class per thing that can go wrong, each with a wire code and fields of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, dataclass_transform

_codes: dict[str, type[Any]] = {}


@dataclass_transform(eq_default=False)
class _Fields(Exception):
    """An exception whose annotated names are its fields, in order after those of its base, and so the parameters of its
    constructor. There is one constructor for every class: a dataclass compiles one for each when cachebus is imported."""

    code: ClassVar[str]
    field_names: ClassVar[tuple[str, ...]] = ()
    """The names of the fields, those of the bases first."""

    def __init_subclass__(cls) -> None:
        own = [name for name, hint in vars(cls).get("__annotations__", {}).items() if not hint.startswith("ClassVar")]
        cls.field_names = tuple(dict.fromkeys((*cls.field_names, *own)))
        if "code" in vars(cls) and (holder := _codes.setdefault(cls.code, cls)) is not cls:
            raise ValueError(f"error code {cls.code!r} of {cls.__name__} belongs to {holder.__name__}")

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


class CacheError(_Fields):
    """The root of every error that cachebus raises. `detail` is the sentence for people.

    A subclass has fields instead, builds its sentence from them, and crosses the bus under its `code`.
    """

    detail: str

    code: ClassVar[str] = "error"

    transient: ClassVar[bool] = False
    """Another attempt, a little later, may succeed; and many of these in a row mean that a backend is ill."""

    def __str__(self) -> str:
        return self.sentence()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.wire_fields().items())})"

    def sentence(self) -> str:
        """What went wrong, in one sentence that names the value and what was expected."""
        return self.detail

    def wire_fields(self) -> dict[str, Any]:
        """The fields, as the codec sends them: an address, which is a kind of `str`, as a plain one."""
        values = {name: getattr(self, name) for name in self.field_names}
        return {name: str(value) if isinstance(value, str) else value for name, value in values.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self.code, str(self), self.wire_fields())


def error_class(code: str) -> type[CacheError]:
    """The class that a code names; `CacheError` for an unknown one."""
    return _codes.get(code, CacheError)


def error_codes() -> tuple[str, ...]:
    """Every code that names a class of the tree."""
    return tuple(_codes)


def rebuild(code: str, detail: str, values: Mapping[str, Any]) -> CacheError:
    """The error that `code` names. An unknown code, or fields that a newer or older sender chose otherwise, still
    give a `CacheError` with the sender's sentence."""
    cls = error_class(code)
    try:
        made = cls(**{name: value for name, value in values.items() if name in cls.field_names})
        str(made)  # Fields of the wrong type show when the sentence is built.
    except (TypeError, ValueError):
        return CacheError(detail)
    return made


class CacheBackendError(CacheError):
    """Raised when a store failed for a reason of its own."""

    backend: str = ""
    code: ClassVar[str] = "backend"

    def sentence(self) -> str:
        return f"backend {self.backend!r}: {self.detail}" if self.backend else self.detail


class CacheConnectionError(CacheBackendError, ConnectionError):
    """Raised when a store or a bus cannot be reached, or its connection was lost."""

    code: ClassVar[str] = "connection"
    transient: ClassVar[bool] = True


class CacheCapacityError(CacheError, ValueError):
    """Raised when a value is larger than the place where it should go. Sizes are bytes."""

    detail: str
    size: int = 0
    limit: int = 0
    code: ClassVar[str] = "capacity"

    def sentence(self) -> str:
        return f"{self.detail}: {self.size:,} bytes, the limit is {self.limit:,} bytes"


class CacheTimeoutError(CacheError, TimeoutError):
    """Raised when an answer did not come within the call's time budget. `in_doubt` says that the request may have been
    done all the same, and that doing it again would not be the same."""

    detail: str = "no answer"
    address: str = ""
    timeout: float = 0.0
    in_doubt: bool = False
    code: ClassVar[str] = "timeout"
    transient: ClassVar[bool] = True

    def sentence(self) -> str:
        doubt = "; whether the request was done is not known" if self.in_doubt else ""
        return f"{self.address or 'cache'}: {self.detail} within {self.timeout:g} s{doubt}"


class CacheConfigurationError(CacheError, ValueError):
    """Raised when a setting, a URL or an option is wrong. Names it, and what is allowed."""

    code: ClassVar[str] = "configuration"


class CacheKeyError(CacheError, ValueError):
    """Raised when a key is empty, not a `str`, or cannot be written as UTF-8. `key` is its `repr`, shortened."""

    detail: str
    key: str = ""
    code: ClassVar[str] = "key"

    def sentence(self) -> str:
        return f"{self.detail}, not {self.key}" if self.key else self.detail


class CacheSerializationError(CacheError, ValueError):
    """Raised when a value cannot be turned into bytes, or bytes cannot be turned into the value they claim to be.

    `reason` is one word for why a stored payload is not taken; it is empty where a value could not be written.
    """

    detail: str
    reason: str = ""
    code: ClassVar[str] = "serialization"


class CacheInvalidationError(CacheError):
    """Raised when an invalidation could not be carried out, so that stale values may still be read."""

    code: ClassVar[str] = "invalidation"


class CacheStampedeError(CacheError):
    """Raised when a caller that waited for somebody else's load may neither load nor be served a stale value."""

    code: ClassVar[str] = "stampede"


class LoaderFailed(CacheError):
    """Raised where a value was waited for that another process loads, and its loader raised `error` (its type's name).
    Within a process everybody gets the exception itself."""

    detail: str = ""
    error: str = ""
    code: ClassVar[str] = "loader_failed"

    def sentence(self) -> str:
        return self.detail or f"the loader of another process raised {self.error}"


class WrongType(CacheError, TypeError):
    """Raised when an operation meets a stored value of a type it cannot work on, such as a `str` for `increment`."""

    code: ClassVar[str] = "wrong_type"


class CapabilityError(CacheError):
    """Raised when a store is asked for what it cannot do."""

    detail: str = ""
    store: str = ""
    capability: str = ""
    code: ClassVar[str] = "capability"

    def sentence(self) -> str:
        return self.detail or f"store {self.store!r} cannot do {self.capability}"


class CircuitOpen(CacheError):
    """Raised when a backend has failed so often that it is left alone for a while. `retry_after` is in seconds."""

    detail: str = ""
    address: str = ""
    retry_after: float = 0.0
    code: ClassVar[str] = "circuit_open"

    def sentence(self) -> str:
        return self.detail or f"circuit of {self.address} is open, next attempt in {self.retry_after:.3g} s"


class Overloaded(CacheError):
    """Raised when a mailbox is full. Nothing was done; try later, or send less."""

    detail: str = ""
    address: str = ""
    capacity: int = 0
    code: ClassVar[str] = "overloaded"
    transient: ClassVar[bool] = True

    def sentence(self) -> str:
        return self.detail or f"mailbox of {self.address} is full ({self.capacity} messages)"


class LockNotAcquired(CacheTimeoutError):
    """Raised when a lock could not be had in time: `owner` holds it, for `remaining` seconds more unless it renews it."""

    name: str = ""
    owner: str = ""
    remaining: float = 0.0
    code: ClassVar[str] = "lock_not_acquired"

    def sentence(self) -> str:
        holder = f"{self.owner!r} holds it" if self.owner else "others were first"
        return f"the lock {self.name!r} was not to be had within {self.timeout:g} s: {holder}"


class LockNotHeld(CacheError):
    """Raised when a lock is extended, given back or relied on by whoever does not hold it: it was given back before, its
    time ran out, or its store has lost it. Somebody else may hold it by now."""

    detail: str = ""
    name: str = ""
    code: ClassVar[str] = "lock_not_held"

    def sentence(self) -> str:
        return self.detail or f"the lock {self.name!r} is not held: it was given back, ran out, or was lost"


class LockNotOwned(LockNotHeld):
    """Raised when a lock is extended or given back, and `owner` holds it."""

    owner: str = ""
    code: ClassVar[str] = "lock_not_owned"

    def sentence(self) -> str:
        return self.detail or f"the lock {self.name!r} is held by {self.owner!r}"


class NoSuchActor(CacheError, LookupError):
    """Raised when nobody serves the address that a request was sent to."""

    detail: str = ""
    address: str = ""
    code: ClassVar[str] = "no_such_actor"

    def sentence(self) -> str:
        return self.detail or f"no actor serves the address {self.address!r}"


class AddressInUse(CacheError):
    """Raised when an address is already served, by `holder`."""

    detail: str = ""
    address: str = ""
    holder: str = ""
    code: ClassVar[str] = "address_in_use"

    def sentence(self) -> str:
        return self.detail or f"the address {self.address!r} is already served by {self.holder}"


class ActorFailed(CacheError):
    """Raised when an actor crashed while it handled the request. Whether the request took effect is not known."""

    detail: str = ""
    address: str = ""
    reason: str = ""
    code: ClassVar[str] = "actor_failed"

    def sentence(self) -> str:
        return self.detail or f"actor {self.address} failed: {self.reason}"


class BadMessage(CacheError, ValueError):
    """Raised when a message is not one: undecodable, unknown, of a newer version, or sent to an actor without a
    handler for it."""

    code: ClassVar[str] = "bad_message"


class RateLimited(CacheError):
    """Raised when a rate limit refuses whoever enters its block. `key` is its name; `retry_after` the seconds after which
    it would not, if nobody else takes anything."""

    detail: str = ""
    key: str = ""
    retry_after: float = 0.0
    code: ClassVar[str] = "rate_limited"

    def sentence(self) -> str:
        return self.detail or f"the rate limit {self.key!r} is used up, try again in {self.retry_after:.3g} s"


class CacheClosed(CacheError):
    """Raised when a cache is used before it is open or after it was closed."""

    code: ClassVar[str] = "closed"
