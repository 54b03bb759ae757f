"""Cache URLs: which schemes there are, what a URL says, and how one is shown without its password."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any
from urllib.parse import parse_qsl

from cachebus.messages import CacheConfigurationError

from .server_urls import NATS_SCHEMES, REDIS_SCHEMES, memcached_options, nats_options, redis_options

BUILT_IN = ("memory", "null", *REDIS_SCHEMES, "memcached")
"""The schemes of the stores that come with cachebus."""

STORES = "cachebus.stores"
"""The entry point group in which other packages announce stores; an entry's name is the scheme of its URLs."""

ON_THE_BUS = "bus:"
"""What stands before the name of a backend that a worker has, where a URL could stand."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")
_SECRET_OPTION = re.compile(r"(?i)([?&;][^=&;]*(?:pass|pwd|secret|token|key|credential|auth)[^=&;]*=)[^&;]*")


class Text(str):
    """An option as it was written in a URL or an environment variable: text, whatever it is going to be."""

    __slots__ = ()


def is_url(source: str) -> bool:
    """Whether a string is meant as a URL: it begins with a scheme and `://`, or with `bus:`."""
    return _URL.match(source) is not None or source.startswith(ON_THE_BUS)


def known_schemes() -> tuple[str, ...]:
    """Every scheme that can be used now: the built-in ones, then those of installed packages, sorted."""
    return (*BUILT_IN, *sorted({entry.name for entry in entry_points(group=STORES)} - set(BUILT_IN)))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A parenthesis that names the known word nearest to a wrong one; empty where none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def redact_url(url: str) -> str:
    """A URL with its password, and the values of secret-looking options, replaced by `***`.

    A password may hold `@ : / ? #` unescaped, so everything up to the last `@` counts as credentials: this shows
    rather too little than too much. It also takes strings that only resemble a URL.
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
    """The type of backend that a URL names, and the options it gives. What an option may be, the settings know.

    The URL of another package's store is left whole: its type is `plugin` and its one option `url`.

    Raises `CacheConfigurationError` for an unknown scheme and for what no URL of the scheme can hold.
    """
    shown = repr(redact_url(url))
    if url.startswith(ON_THE_BUS) and not _URL.match(url):
        return "bus", {"name": Text(url.removeprefix(ON_THE_BUS))}
    if (found := _URL.match(url)) is None:
        raise CacheConfigurationError(f"{shown} is no URL: it does not begin with scheme://")
    if _UNPRINTABLE.search(url):
        raise CacheConfigurationError(f"{shown} holds a space or a control character: write it as %20 and so on")
    scheme = found[1].lower()
    if scheme not in BUILT_IN:
        known = known_schemes()
        if scheme not in known:
            hint = did_you_mean(scheme, known)
            raise CacheConfigurationError(f"{shown}: unknown scheme {scheme!r}{hint}, known are {', '.join(known)}")
        return "plugin", {"url": url}
    rest, fragment, _ = url[found.end() :].partition("#")
    place, _, query = rest.partition("?")
    if fragment:
        raise CacheConfigurationError(f"{shown}: a URL of a cache has no fragment: write # as %23")
    if scheme in REDIS_SCHEMES:
        return "redis", _joined(redis_options(scheme, place, shown), _options(query, shown), shown)
    if scheme == "memcached":
        return "memcached", _joined(memcached_options(place, shown), _options(query, shown), shown)
    if place:
        raise CacheConfigurationError(
            f"{shown}: a {scheme} store lives in this process and has no host or path: write {scheme}://?option=value"
        )
    return scheme, _options(query, shown)


def parse_bus_url(url: str) -> dict[str, Any]:
    """The options that the URL of a bus gives. Raises `CacheConfigurationError`."""
    shown = repr(redact_url(url))
    found = _URL.match(url)
    if found is None or (scheme := found[1].lower()) not in NATS_SCHEMES:
        raise CacheConfigurationError(f"{shown}: a bus is reached by nats://host or tls://host")
    if _UNPRINTABLE.search(url):
        raise CacheConfigurationError(f"{shown} holds a space or a control character: write it as %20 and so on")
    rest, fragment, _ = url[found.end() :].partition("#")
    if fragment:
        raise CacheConfigurationError(f"{shown}: the URL of a bus has no fragment: write # as %23")
    place, _, query = rest.partition("?")
    return _joined(nats_options(scheme, place, shown), _options(query, shown), shown)


def _options(query: str, shown: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
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


def _joined(place: dict[str, Any], query: dict[str, Any], shown: str) -> dict[str, Any]:
    options = {name: Text(value) if isinstance(value, str) else value for name, value in place.items()}
    for name, value in query.items():
        if name in options:
            raise CacheConfigurationError(f"{shown}: the option {name!r} is given twice")
        options[name] = value
    return options
