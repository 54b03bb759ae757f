"""URLs of stores in servers: who connects, to which hosts, and what stands in the path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from cachebus.messages import CacheConfigurationError

NATS_SCHEMES = ("nats", "tls")
REDIS_SCHEMES = ("redis", "rediss", "redis+sentinel", "redis+cluster", "unix")

_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says between `scheme://` and `?`, with its escapes undone. `password` is `None` where there is none."""

    user: str
    password: str | None
    hosts: tuple[str, ...]
    path: str


def split_place(place: str, shown: str) -> Place:
    """Take `[user[:password]@]host[:port][,host[:port]...][/path]` apart. `shown` is the URL as an error may show it.

    Raises `CacheConfigurationError`, which shows nothing of what may be a password.
    """
    authority, _, path = place.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    user, colon, password = credentials.partition(":")
    if (at and ":" in password) or "@" in credentials or "@" in path:
        raise CacheConfigurationError(f"{shown}: in a user or a password write : as %3A, / as %2F, @ as %40 and so on")
    found = tuple(hosts.split(",")) if hosts else ()
    for host in found:
        matched = _HOST.fullmatch(host)
        if matched is None or (matched[1] and not 0 < int(matched[1]) < 65536):
            raise CacheConfigurationError(f"{shown}: a host is written as name, name:port or [IPv6]:port")
    return Place(_plain(user, shown), _plain(password, shown) if colon else None, found, _plain(path, shown))


def redis_options(scheme: str, place: str, shown: str) -> dict[str, Any]:
    """The options that a URL gives before its `?`. Raises `CacheConfigurationError`."""
    found = split_place(place, shown)
    options: dict[str, Any] = {}
    if found.user:
        options["user"] = found.user
    if found.password:
        options["password"] = found.password
    if scheme == "unix":
        if found.hosts or not found.path:
            raise CacheConfigurationError(f"{shown}: write unix:///path/of/socket")
        return {**options, "socket": f"/{found.path}"}
    if found.hosts:
        options["hosts"] = found.hosts
    if scheme == "rediss":
        options["tls"] = True
    path = found.path.split("/") if found.path else []
    if scheme == "redis+sentinel":
        if not path or not path[0]:
            raise CacheConfigurationError(f"{shown}: write redis+sentinel://host/service: the name of the master")
        options |= {"topology": "sentinel", "service": path.pop(0)}
    if scheme == "redis+cluster":
        options["topology"] = "cluster"
    if path:
        options["database"] = path.pop(0)
        if not options["database"].isascii() or not options["database"].isdigit():
            raise CacheConfigurationError(f"{shown}: the database is a number")
    if path:
        raise CacheConfigurationError(f"{shown}: there is too much in the path")
    return options


def memcached_options(place: str, shown: str) -> dict[str, Any]:
    """The options that a URL gives before its `?`. Raises `CacheConfigurationError`."""
    found = split_place(place, shown)
    if found.user or found.password is not None:
        raise CacheConfigurationError(f"{shown}: memcached takes no user and no password")
    if found.path:
        raise CacheConfigurationError(f"{shown}: a memcached has no path: write memcached://host1,host2?option=value")
    return {"hosts": found.hosts} if found.hosts else {}


def nats_options(scheme: str, place: str, shown: str) -> dict[str, Any]:
    """The options that the URL of a bus gives before its `?`. Raises `CacheConfigurationError`."""
    found = split_place(place, shown)
    options: dict[str, Any] = {}
    if found.password is not None:
        options |= {"user": found.user, "password": found.password}
    elif found.user:
        options["token"] = found.user
    if found.hosts:
        options["hosts"] = found.hosts
    if scheme == "tls":
        options["tls"] = True
    if found.path:
        raise CacheConfigurationError(f"{shown}: the URL of a bus has no path")
    return options


def _plain(text: str, shown: str) -> str:
    if _ESCAPE.search(text):
        raise CacheConfigurationError(f"{shown}: a % is followed by two hexadecimal digits; write % as %25")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise CacheConfigurationError(f"{shown}: what is escaped with % is not UTF-8") from None
