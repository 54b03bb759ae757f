"""Cache URLs: known schemes, parsing, and redaction of passwords."""

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
"""Schemes of the built-in stores."""

STORES = "cachebus.node.stores"
"""Entry point group for stores of other packages. The name of an entry is the scheme of its URLs."""

ON_THE_BUS = "bus:"
"""Prefix of the name of a worker's backend, which can be used instead of a URL."""

HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
"""Host as `name`, `name:port` or `[IPv6]:port`."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")
_WRONG_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SECRET_OPTION = re.compile(r"(?i)([?&;][^=&;]*(?:pass|pwd|secret|token|key|credential|auth)[^=&;]*=)[^&;]*")


class Text(str):
    """An option from a URL or an environment variable, still as text."""

    __slots__ = ()


def is_url(source: str) -> bool:
    """Return true if a string looks like a URL: it begins with a scheme and `://`, or with `bus:`."""
    return _URL.match(source) is not None or source.startswith(ON_THE_BUS)


def known_schemes() -> tuple[str, ...]:
    """Return all available schemes: the built-in ones, then those of installed packages, sorted."""
    return (*BUILT_IN, *sorted({entry.name for entry in entry_points(group=STORES)} - set(BUILT_IN)))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean ...?)"` with the known word nearest to an unknown one, or an empty string."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def redact_url(url: str) -> str:
    """Return a URL with its password and the values of possibly secret options replaced by `***`.

    A password may contain `@ : / ? #` unescaped, so everything up to the last `@` counts as credentials. This hides too
    much rather than too little. Strings that only resemble a URL are accepted too.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "", url
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    # A name without a password may be a token. A `/` or `?` before the colon means that it is not a user name.
    shown = f"{user}:***" if colon and re.fullmatch(r"[\w.%+-]*", user) else "***"
    return scheme + mark + (shown + at if at else "") + _SECRET_OPTION.sub(r"\1***", place)


def parse_url(url: str) -> tuple[str, dict[str, Any]]:
    """Return the backend type and the unvalidated options of a URL.

    The URL of another package's store is not parsed: its type is `plugin`, and its only option is `url`.

    Raises `CacheConfigurationError` for an unknown scheme or an invalid URL.
    """
    shown = repr(redact_url(url))
    if url.startswith(ON_THE_BUS) and not _URL.match(url):
        return "bus", {"name": Text(url.removeprefix(ON_THE_BUS))}
    if (found := _URL.match(url)) is None:
        raise CacheConfigurationError(f"{shown} is not a URL: expected scheme://...")
    _check_printable(url, shown)
    scheme = found[1].lower()
    if scheme not in BUILT_IN:
        known = known_schemes()
        if scheme not in known:
            hint = did_you_mean(scheme, known)
            listed = ", ".join(known)
            raise CacheConfigurationError(f"{shown}: unknown scheme {scheme!r}{hint}; known schemes are {listed}")
        return "plugin", {"url": url}
    place, query = _split(url[found.end() :], shown, "a cache URL")
    if scheme in _REDIS_SCHEMES:
        return "redis", _joined(_redis_options(scheme, place, shown), query, shown)
    if scheme == "memcached":
        return "memcached", _joined(_memcached_options(place, shown), query, shown)
    if place:
        raise CacheConfigurationError(
            f"{shown}: the URL of a {scheme} store has no host or path; write {scheme}://?option=value"
        )
    return scheme, _joined({}, query, shown)


def parse_bus_url(url: str) -> dict[str, Any]:
    """Return the unvalidated options of a bus URL. Raises `CacheConfigurationError`."""
    shown = repr(redact_url(url))
    found = _URL.match(url)
    if found is None or (scheme := found[1].lower()) not in ("nats", "tls"):
        raise CacheConfigurationError(f"{shown}: expected a bus URL, nats://host or tls://host")
    _check_printable(url, shown)
    place, query = _split(url[found.end() :], shown, "a bus URL")
    user, password, hosts, path = _parse_place(place, shown)
    if path:
        raise CacheConfigurationError(f"{shown}: a bus URL cannot have a path")
    signed_in = {"user": user, "password": password} if password is not None else {"token": user} if user else {}
    given = signed_in | ({"hosts": hosts} if hosts else {}) | ({"tls": True} if scheme == "tls" else {})
    return _joined(given, query, shown)


def _check_printable(url: str, shown: str) -> None:
    if _UNPRINTABLE.search(url):
        raise CacheConfigurationError(f"{shown} contains a space or a control character; escape it, such as %20")


def _split(rest: str, shown: str, what: str) -> tuple[str, str]:
    """Return the parts before and after the `?`."""
    rest, fragment, _ = rest.partition("#")
    if fragment:
        raise CacheConfigurationError(f"{shown}: {what} cannot have a fragment; write # as %23")
    place, _, query = rest.partition("?")
    return place, query


def _parse_place(place: str, shown: str) -> tuple[str, str | None, tuple[str, ...], str]:
    """Return user, password, hosts and path of `[user[:password]@]host[:port][,host[:port]...][/path]`.

    The parts are unescaped. `password` is `None` if there is none. Errors never show a possible password.
    """
    authority, _, path = place.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    user, colon, password = credentials.partition(":")
    if (at and ":" in password) or "@" in credentials or "@" in path:
        raise CacheConfigurationError(
            f"{shown}: escape special characters in a user or a password: : as %3A, / as %2F, @ as %40"
        )
    found = tuple(hosts.split(",")) if hosts else ()
    for host in found:
        matched = HOST.fullmatch(host)
        if matched is None or (matched[2] and not 0 < int(matched[2]) < 65536):
            raise CacheConfigurationError(f"{shown}: expected a host as name, name:port or [IPv6]:port")
    plain: list[str] = []
    for text in (user, password, path):
        if _WRONG_ESCAPE.search(text):
            raise CacheConfigurationError(f"{shown}: expected two hexadecimal digits after %; write % as %25")
        try:
            plain.append(unquote_to_bytes(text).decode())
        except UnicodeDecodeError:
            raise CacheConfigurationError(f"{shown}: the characters escaped with % are not valid UTF-8") from None
    return plain[0], plain[1] if colon else None, found, plain[2]


def _redis_options(scheme: str, place: str, shown: str) -> dict[str, Any]:
    user, password, hosts, path = _parse_place(place, shown)
    given = {"user": user, "password": password, "hosts": hosts}
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    if scheme == "unix":
        if hosts or not path:
            raise CacheConfigurationError(f"{shown}: expected unix:///path/of/socket")
        return {**options, "socket": f"/{path}"}
    parts = path.split("/") if path else []
    if scheme == "rediss":
        options["tls"] = True
    if scheme == "redis+sentinel":
        if not parts or not parts[0]:
            raise CacheConfigurationError(
                f"{shown}: expected redis+sentinel://host/service, where service is the name of the master"
            )
        options |= {"topology": "sentinel", "service": parts.pop(0)}
    if scheme == "redis+cluster":
        options["topology"] = "cluster"
    if parts:
        options["database"] = parts.pop(0)
        if not options["database"].isascii() or not options["database"].isdigit():
            raise CacheConfigurationError(f"{shown}: expected a number as the database")
    if parts:
        raise CacheConfigurationError(f"{shown}: the path has too many parts")
    return options


def _memcached_options(place: str, shown: str) -> dict[str, Any]:
    user, password, hosts, path = _parse_place(place, shown)
    if user or password is not None:
        raise CacheConfigurationError(f"{shown}: memcached does not support a user or a password")
    if path:
        raise CacheConfigurationError(
            f"{shown}: the URL of a memcached store has no path; write memcached://host1,host2?option=value"
        )
    return {"hosts": hosts} if hosts else {}


def _joined(place: dict[str, Any], query: str, shown: str) -> dict[str, Any]:
    """Return the options of the host part and of the query, as text."""
    options = {name: Text(value) if isinstance(value, str) else value for name, value in place.items()}
    for position, part in enumerate(query.split("&") if query else (), 1):
        if not part.partition("=")[1] or part.startswith("="):
            raise CacheConfigurationError(f"{shown}: option {position} is not of the form name=value")
        ((name, value),) = parse_qsl(part, keep_blank_values=True)
        if name in options:
            raise CacheConfigurationError(f"{shown}: the option {name!r} is given twice")
        if name == "type":
            raise CacheConfigurationError(f"{shown}: 'type' is not an option of a URL; the scheme determines the type")
        options[name] = Text(value)
    return options
