"""Cache URLs: which schemes there are, what a URL says, and how one is shown without its password."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

from cachebus.messages import CacheConfigurationError

_REDIS_SCHEMES = ("redis", "rediss", "redis+sentinel", "redis+cluster", "unix")

BUILT_IN = ("memory", "null", *_REDIS_SCHEMES, "memcached")
"""The schemes of the stores that come with cachebus."""

STORES = "cachebus.node.stores"
"""The entry point group in which other packages announce stores; an entry's name is the scheme of its URLs."""

ON_THE_BUS = "bus:"
"""The prefix of a backend that a worker has, where a URL could stand."""

HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
"""A host as name, name:port or [IPv6]:port."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")
_WRONG_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SECRET_OPTION = re.compile(r"(?i)([?&;][^=&;]*(?:pass|pwd|secret|token|key|credential|auth)[^=&;]*=)[^&;]*")


class Text(str):
    """An option as it was written in a URL or an environment variable: text, whatever its type."""

    __slots__ = ()


def is_url(source: str) -> bool:
    """Return whether a string is meant as a URL: it begins with a scheme and `://`, or with `bus:`."""
    return _URL.match(source) is not None or source.startswith(ON_THE_BUS)


def known_schemes() -> tuple[str, ...]:
    """Return every scheme that can be used now: the built-in ones, then those of installed packages, sorted."""
    return (*BUILT_IN, *sorted({entry.name for entry in entry_points(group=STORES)} - set(BUILT_IN)))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a parenthesis that names the known word nearest to a wrong one; empty if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def redact_url(url: str) -> str:
    """Return a URL with its password, and the values of secret-looking options, replaced by `***`.

    A password may hold `@ : / ? #` unescaped, so everything up to the last `@` counts as credentials: this hides too much
    rather than too little. It also takes strings that only resemble a URL.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "", url
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    # A name without a password may be a token, and a `/` or `?` before the colon means that it was no name.
    shown = f"{user}:***" if colon and re.fullmatch(r"[\w.%+-]*", user) else "***"
    return scheme + mark + (shown + at if at else "") + _SECRET_OPTION.sub(r"\1***", place)


def parse_url(url: str) -> tuple[str, dict[str, Any]]:
    """Return the type of backend that a URL names, and the options it gives, not yet checked.

    The URL of another package's store is left whole: its type is `plugin` and its one option `url`.

    Raises `CacheConfigurationError` for an unknown scheme and for what no URL of the scheme can hold.
    """
    shown = repr(redact_url(url))
    if url.startswith(ON_THE_BUS) and not _URL.match(url):
        return "bus", {"name": Text(url.removeprefix(ON_THE_BUS))}
    if (found := _URL.match(url)) is None:
        raise CacheConfigurationError(f"{shown} is no URL: it does not begin with scheme://")
    _check_printable(url, shown)
    scheme = found[1].lower()
    if scheme not in BUILT_IN:
        known = known_schemes()
        if scheme not in known:
            hint = did_you_mean(scheme, known)
            raise CacheConfigurationError(f"{shown}: unknown scheme {scheme!r}{hint}, known are {', '.join(known)}")
        return "plugin", {"url": url}
    place, query = _split(url[found.end() :], shown, "a URL of a cache")
    if scheme in _REDIS_SCHEMES:
        return "redis", _joined(_redis_options(scheme, place, shown), query, shown)
    if scheme == "memcached":
        return "memcached", _joined(_memcached_options(place, shown), query, shown)
    if place:
        raise CacheConfigurationError(
            f"{shown}: a {scheme} store lives in this process and has no host or path: write {scheme}://?option=value"
        )
    return scheme, _joined({}, query, shown)


def parse_bus_url(url: str) -> dict[str, Any]:
    """Return the options that the URL of a bus gives. Raises `CacheConfigurationError`."""
    shown = repr(redact_url(url))
    found = _URL.match(url)
    if found is None or (scheme := found[1].lower()) not in ("nats", "tls"):
        raise CacheConfigurationError(f"{shown}: a bus is reached by nats://host or tls://host")
    _check_printable(url, shown)
    place, query = _split(url[found.end() :], shown, "the URL of a bus")
    user, password, hosts, path = _parse_place(place, shown)
    if path:
        raise CacheConfigurationError(f"{shown}: the URL of a bus has no path")
    signed_in = {"user": user, "password": password} if password is not None else {"token": user} if user else {}
    given = signed_in | ({"hosts": hosts} if hosts else {}) | ({"tls": True} if scheme == "tls" else {})
    return _joined(given, query, shown)


def _check_printable(url: str, shown: str) -> None:
    if _UNPRINTABLE.search(url):
        raise CacheConfigurationError(f"{shown} holds a space or a control character: write it as %20 and so on")


def _split(rest: str, shown: str, what: str) -> tuple[str, str]:
    """Return what stands before the `?` and what stands after it."""
    rest, fragment, _ = rest.partition("#")
    if fragment:
        raise CacheConfigurationError(f"{shown}: {what} has no fragment: write # as %23")
    place, _, query = rest.partition("?")
    return place, query


def _parse_place(place: str, shown: str) -> tuple[str, str | None, tuple[str, ...], str]:
    """Return user, password, hosts and path of `[user[:password]@]host[:port][,host[:port]...][/path]`.

    Escapes are undone. `password` is `None` if there is none. Errors show nothing of what may be a password.
    """
    authority, _, path = place.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    user, colon, password = credentials.partition(":")
    if (at and ":" in password) or "@" in credentials or "@" in path:
        raise CacheConfigurationError(f"{shown}: in a user or a password write : as %3A, / as %2F, @ as %40 and so on")
    found = tuple(hosts.split(",")) if hosts else ()
    for host in found:
        matched = HOST.fullmatch(host)
        if matched is None or (matched[2] and not 0 < int(matched[2]) < 65536):
            raise CacheConfigurationError(f"{shown}: a host is written as name, name:port or [IPv6]:port")
    plain: list[str] = []
    for text in (user, password, path):
        if _WRONG_ESCAPE.search(text):
            raise CacheConfigurationError(f"{shown}: a % is followed by two hexadecimal digits; write % as %25")
        try:
            plain.append(unquote_to_bytes(text).decode())
        except UnicodeDecodeError:
            raise CacheConfigurationError(f"{shown}: what is escaped with % is not UTF-8") from None
    return plain[0], plain[1] if colon else None, found, plain[2]


def _redis_options(scheme: str, place: str, shown: str) -> dict[str, Any]:
    user, password, hosts, path = _parse_place(place, shown)
    given = {"user": user, "password": password, "hosts": hosts}
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    if scheme == "unix":
        if hosts or not path:
            raise CacheConfigurationError(f"{shown}: write unix:///path/of/socket")
        return {**options, "socket": f"/{path}"}
    parts = path.split("/") if path else []
    if scheme == "rediss":
        options["tls"] = True
    if scheme == "redis+sentinel":
        if not parts or not parts[0]:
            raise CacheConfigurationError(f"{shown}: write redis+sentinel://host/service: the name of the master")
        options |= {"topology": "sentinel", "service": parts.pop(0)}
    if scheme == "redis+cluster":
        options["topology"] = "cluster"
    if parts:
        options["database"] = parts.pop(0)
        if not options["database"].isascii() or not options["database"].isdigit():
            raise CacheConfigurationError(f"{shown}: the database is a number")
    if parts:
        raise CacheConfigurationError(f"{shown}: there is too much in the path")
    return options


def _memcached_options(place: str, shown: str) -> dict[str, Any]:
    user, password, hosts, path = _parse_place(place, shown)
    if user or password is not None:
        raise CacheConfigurationError(f"{shown}: memcached takes no user and no password")
    if path:
        raise CacheConfigurationError(f"{shown}: a memcached has no path: write memcached://host1,host2?option=value")
    return {"hosts": hosts} if hosts else {}


def _joined(place: dict[str, Any], query: str, shown: str) -> dict[str, Any]:
    """Return the options of a place and those of a query, as texts."""
    options = {name: Text(value) if isinstance(value, str) else value for name, value in place.items()}
    for position, part in enumerate(query.split("&") if query else (), 1):
        if not part.partition("=")[1] or part.startswith("="):
            raise CacheConfigurationError(f"{shown}: option {position} is not written as name=value")
        ((name, value),) = parse_qsl(part, keep_blank_values=True)
        if name in options:
            raise CacheConfigurationError(f"{shown}: the option {name!r} is given twice")
        if name == "type":
            raise CacheConfigurationError(f"{shown}: the scheme says the type, so 'type' is no option of a URL")
        options[name] = Text(value)
    return options
