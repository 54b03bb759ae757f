"""Leases in Redis: who loads a key stands under the key itself, so that whatever removes or writes the key takes it away.

In the place of a missing value, or of one whose time is up, stands

    8 bytes   mark      -1.0 as a double, which no version is
    8 bytes   deadline  of the lease: Unix time of the server in milliseconds
    1 byte    form      l
    8 bytes   until     Unix time in milliseconds until which the value below may be served, 0 without one
    1 byte    length of the token, and the token
    rest      the entry whose time is up, as it was

A live value that is loaded anew stays where it is. Its lease is a key of its own, with the version of that value in it: if
the value has another version by the time the new one comes, or is gone, the lease is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cachebus.messages import (
    BadMessage,
    CacheSerializationError,
    GetOrLease,
    LeaseGranted,
    Loading,
    NotHeld,
    NotStored,
    Release,
    Released,
    Renew,
    Renewed,
    Reply,
    Set,
    Stale,
    Stored,
)

from .redis_connection import Argument
from .redis_scripts import Script
from .redis_slots import slot_of, tag_of
from .redis_values import HEADER, decode, pack_origin, read_or_fail, split_origin

_MARK = """
local MARK = struct.pack('>d', -1)
local function parts(raw)
  -- token, deadline, until when the stale entry may be served, and that entry: of a lease
  local deadline = struct.unpack('>d', raw, 9)
  local until_ms = struct.unpack('>d', raw, 18)
  local length = string.byte(raw, 26)
  local stale = string.sub(raw, 27 + length)
  if until_ms <= now_ms then stale = '' end
  return string.sub(raw, 27, 26 + length), deadline, until_ms, stale
end
local function is_lease(raw)
  return raw and #raw > 26 and string.sub(raw, 1, 8) == MARK and string.sub(raw, 17, 17) == 'l'
end
local function expiry_of(raw)
  if #raw < 16 then return 0 end
  local _, expiry = struct.unpack('>dd', raw)
  return expiry
end
local function tell_end(key, token, error)
  -- On the channel of the namespace, to those who wait elsewhere. If that is forbidden to us, they ask again by themselves.
  redis.pcall('PUBLISH', string.match(key, '^[^:]*') .. '#leases', string.char(#token) .. token .. error)
end
local function put_lease(key, token, lease_ms, until_ms, stale)
  local life = lease_ms
  if stale ~= '' and until_ms - now_ms > life then life = until_ms - now_ms end
  redis.call('SET', key, struct.pack('>dd', -1, now_ms + lease_ms) .. 'l' .. struct.pack('>d', until_ms)
    .. string.char(#token) .. token .. stale, 'PX', math.ceil(life))
end
"""

LEASE = Script.of(
    _MARK
    + """
-- ARGV: token, milliseconds of the lease, '1' to load a live value anew. The answer begins with 0 found, 1 granted or 2
-- loading; then the entry, the stale entry, or token, milliseconds left and stale entry.
local key, token, lease_ms = KEYS[1], ARGV[1], tonumber(ARGV[2])
local raw = redis.call('GET', key)
if is_lease(raw) then
  local held, deadline, until_ms, stale = parts(raw)
  if held ~= token and deadline > now_ms then return {2, held, deadline - now_ms, stale} end
  put_lease(key, token, lease_ms, until_ms, stale)
  return {1, stale}
end
if not raw or #raw < 17 then
  -- Nothing, or what is nothing of ours.
  put_lease(key, token, lease_ms, 0, '')
  return {1, ''}
end
local expiry = expiry_of(raw)
if expiry > 0 and expiry <= now_ms then
  -- Only what was loaded may be served stale. Anything else is about to be removed by Redis, within this millisecond.
  local stale = string.sub(raw, 17, 17) == 'o' and raw or ''
  put_lease(key, token, lease_ms, now_ms + redis.call('PTTL', key), stale)
  return {1, stale}
end
if ARGV[3] == '1' then
  local version = struct.unpack('>d', raw)
  local lease = token .. string.format('|%.17g', version)
  if redis.call('SET', KEYS[2], lease, 'NX', 'PX', lease_ms) or redis.call('GET', KEYS[2]) == lease then
    return {1, ''}
  end
end
return {0, raw}
"""
)

COMMIT = Script.of(
    _MARK
    + """
-- ARGV: token, form and value, milliseconds to live, milliseconds to be kept; '' is for ever. The answer is the version, or
-- that of what is in the way, negated.
local key, token = KEYS[1], ARGV[1]
tell_end(key, token, '')
local raw = redis.call('GET', key)
local old = 0
if raw and #raw >= 8 and not is_lease(raw) then old = struct.unpack('>d', raw) end
if is_lease(raw) then
  local held, deadline, until_ms, stale = parts(raw)
  if held ~= token or deadline <= now_ms then return 0 end
  if #stale >= 8 then old = struct.unpack('>d', stale) end
else
  local expiry = raw and expiry_of(raw) or 0
  if not raw or (expiry > 0 and expiry <= now_ms) then return 0 end
  if redis.call('GET', KEYS[2]) ~= token .. string.format('|%.17g', old) then return -old end
  redis.call('DEL', KEYS[2])
end
local version = now
if old >= now then version = old + 1 end
if ARGV[4] == '' then
  redis.call('SET', key, header(version, ARGV[3]) .. ARGV[2])
else
  redis.call('SET', key, header(version, ARGV[3]) .. ARGV[2], 'PX', ARGV[4])
end
return version
"""
)

RENEW = Script.of(
    _MARK
    + """
-- ARGV: token, milliseconds of the lease. The answer is 1 if it is held.
local key, token, lease_ms = KEYS[1], ARGV[1], tonumber(ARGV[2])
local raw = redis.call('GET', key)
if is_lease(raw) then
  local held, deadline, until_ms, stale = parts(raw)
  if held ~= token or deadline <= now_ms then return 0 end
  put_lease(key, token, lease_ms, until_ms, stale)
  return 1
end
local lease = redis.call('GET', KEYS[2])
if lease and string.sub(lease, 1, #token + 1) == token .. '|' then
  redis.call('PEXPIRE', KEYS[2], lease_ms)
  return 1
end
return 0
"""
)

RELEASE = Script.of(
    _MARK
    + """
-- ARGV: token, name of the error that the loader has failed with. The answer is 1 if it was held.
local key, token = KEYS[1], ARGV[1]
tell_end(key, token, ARGV[2])
local raw = redis.call('GET', key)
if is_lease(raw) then
  local held, deadline, until_ms, stale = parts(raw)
  if held ~= token then return 0 end
  if stale ~= '' then
    redis.call('SET', key, stale, 'PX', math.ceil(until_ms - now_ms))
  else
    redis.call('DEL', key)
  end
  return deadline > now_ms and 1 or 0
end
local lease = redis.call('GET', KEYS[2])
if lease and string.sub(lease, 1, #token + 1) == token .. '|' then
  redis.call('DEL', KEYS[2])
  return 1
end
return 0
"""
)

LEASE_SCRIPTS = (LEASE, COMMIT, RENEW, RELEASE)

Leases = GetOrLease | Renew | Release
Parsed = Callable[[Any, float], Reply]


def lease_call(request: Leases, key: str) -> tuple[list[Argument], Script, Parsed]:
    """The words after the script's name, the script, and how its reply is read. `key` is the key in Redis."""
    keys: list[Argument] = [2, key, _anew(key)]
    if len(request.token.encode()) > 255:
        raise BadMessage("the token of a lease has 255 bytes at most")
    if isinstance(request, GetOrLease):
        if not request.refresh:
            keys = [1, key]  # So that it does well in a slot of a cluster that is being moved.
        words = [*keys, request.token, _ms(request.lease_ttl), "1" if request.refresh else "0"]
        return words, LEASE, lambda reply, now: _leased(reply, now, request.token)
    if isinstance(request, Renew):
        ttl = request.lease_ttl
        return [*keys, request.token, _ms(ttl)], RENEW, lambda held, _: Renewed(ttl) if held else NotHeld()
    return [*keys, request.token, request.error], RELEASE, lambda held, _: Released() if held else NotHeld()


def commit_call(request: Set, key: str, body: bytes, px: str) -> tuple[list[Argument], Script, Parsed]:
    """As `lease_call`, for a value that is stored under a lease. `px` is its time to live in milliseconds, as text."""
    if request.only_if is not None:
        raise BadMessage("a value that is stored under a lease has no other condition")
    kept = px
    if (origin := request.origin) is not None:
        lifetime = int(px) / 1000 if px else None
        body = pack_origin(origin, lifetime) + body
        if px:
            kept = str(int(px) + math.ceil(max(0.0, origin.stale_for) * 1000))
    words: list[Argument] = [2, key, _anew(key), request.lease or "", body, px, kept]
    return words, COMMIT, _committed


def _committed(version: Any, now: float) -> Reply:
    return Stored(float(version)) if version > 0 else NotStored(float(-version), "lease_lost")


def _leased(reply: Any, now: float, token: str) -> Reply:
    if reply[0] == 0:
        # It was live to the server, whatever our clock says.
        return read_or_fail(reply[1], now, live=True)
    if reply[0] == 1:
        return LeaseGranted(token, _stale(reply[1], "", 0.0))
    holder, remaining = reply[1].decode(), reply[2] / 1000
    return _stale(reply[3], holder, remaining) or Loading(holder, remaining)


def _stale(raw: bytes, lease: str, remaining: float) -> Stale | None:
    if not raw:
        return None
    try:
        origin, _, plain = split_origin(raw)
        value = decode(plain)
    except CacheSerializationError:
        return None  # Damaged, and so nothing to serve.
    version, _ = HEADER.unpack_from(raw)
    return Stale(value, version, (), version * 1e-6, origin.load_time, origin.etag, lease, remaining)


def _anew(key: str) -> Argument:
    """Where the lease of a live value stands: in the same slot of a cluster, and outside of the namespace's keys."""
    namespace = key.partition(":")[0]
    if "{" not in key and "}" not in key:
        return f"{namespace}#lease:{{{key}}}"
    name = f"{namespace}#lease:{key}"
    try:
        slot = slot_of(key)
        if slot_of(name) == slot:
            return name
        # After the namespace, as in the others, by whose names access is given; if there is a brace in it, its tag counts.
        tag = b"{%b}" % tag_of(slot)
        place = f"{namespace}#lease:".encode()
        return place + tag + key.encode() if b"{" not in place else tag + place + key.encode()
    except UnicodeEncodeError:
        return name  # Refused when it is packed.


def _ms(seconds: float) -> int:
    if not 0 < seconds < math.inf:
        raise BadMessage(f"lease_ttl must be a positive number of seconds, not {seconds!r}")
    return max(1, math.ceil(seconds * 1000))
