"""Leases in Redis. The lease of a key is stored under the key itself, so a write or a delete of the key ends it.

A lease replaces a missing or expired value with this string:

    8 bytes   mark      -1.0 as a double, which is never a version
    8 bytes   deadline  of the lease: Unix time of the server in milliseconds
    1 byte    type tag  l
    8 bytes   until     Unix time in milliseconds until which the expired entry may be served stale, 0 without one
    1 byte    length of the token, then the token: the requested name, a dot and a nonce
    16 bytes  stamp     when the load began (see `entry`)
    4 bytes   length of the packed tags that the request declared, then these tags
    rest      the expired entry, unchanged

A refresh leaves the live value in place. Its lease is a separate key, which holds the token, the version of the value
and the stamp. If the value has changed or is gone when the new value is stored, the lease is lost.
"""

from __future__ import annotations

import math
from typing import Any

from cachebus.messages import (
    BadMessage,
    GetOrLease,
    LeaseGranted,
    Loading,
    NotHeld,
    NotStored,
    Released,
    ReleaseLease,
    Renewed,
    RenewLease,
    Reply,
    Set,
    Stored,
)
from cachebus.messages.leases import NONCE_LENGTH, new_lease_name

from ..common.validation import check_lease, time_stale
from .commands import ScriptCall, slot_of, tag_of
from .connection import Argument
from .entry import pack_metadata, pack_tagged, pack_tags, read_entry, read_stale
from .scripts import ScriptVariants

_MARK = """
local MARK = struct.pack('>d', -1)
local function parts(raw)
  -- Splits a lease into token, deadline, end of stale serving, stale entry, stamp and tags.
  local deadline = struct.unpack('>d', raw, 9)
  local until_ms = struct.unpack('>d', raw, 18)
  local length = string.byte(raw, 26)
  local at = 47 + length
  local known = struct.unpack('>I4', raw, at - 4)
  local stale = string.sub(raw, at + known)
  if until_ms <= now_ms then stale = '' end
  return string.sub(raw, 27, 26 + length), deadline, until_ms, stale,
    string.sub(raw, 27 + length, 42 + length), string.sub(raw, at, at + known - 1)
end
local function is_lease(raw)
  return raw and #raw > 46 and string.sub(raw, 1, 8) == MARK and string.sub(raw, 17, 17) == 'l'
end
local function expiry_of(raw)
  if #raw < 16 then return 0 end
  local _, expiry = struct.unpack('>dd', raw)
  return expiry
end
local function publish_end(key, token, error)
  -- Notifies waiters in other processes. If the user may not publish, they poll when their wait ends.
  if #token > 255 then return end
  redis.pcall('PUBLISH', string.match(key, '^[^:]*') .. '#leases', string.char(#token) .. token .. error)
end
local function put_lease(key, token, lease_ms, until_ms, stale, stamp, known)
  local life = lease_ms
  if stale ~= '' and until_ms - now_ms > life then life = until_ms - now_ms end
  redis.call('SET', key, struct.pack('>dd', -1, now_ms + lease_ms) .. 'l' .. struct.pack('>d', until_ms)
    .. string.char(#token) .. token .. stamp .. struct.pack('>I4', #known) .. known .. stale, 'PX', math.ceil(life))
end
local function requested(token)
  return string.sub(token, 1, NAMELESS) -- Without the dot and the nonce.
end
local function is_revoked(stamp, known)
  return known ~= '' and holds(stamp, known) == false
end
""".replace("NAMELESS", str(-NONCE_LENGTH - 2))


def _script(body: str) -> ScriptVariants:
    return ScriptVariants(_MARK + body)


LEASE = _script("""
-- ARGV: token for a new lease, its milliseconds, '1' to refresh a live value, 16 bytes for the stamp, and tags. Returns
-- one of
--   0 (found), entry
--   1 (granted), stale entry, token
--   2 (loading), token, milliseconds left, stale entry, stamp, tags
-- If the lease is held under the same requested name, the call is a repeat: the same lease is granted again.
local key, token, lease_ms, tags = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[5]
local raw = redis.call('GET', key)
if is_lease(raw) then
  local held, deadline, until_ms, stale, stamp, known = parts(raw)
  local lost = is_revoked(stamp, known)
  if stale ~= '' and valid(stale) == false then stale = '' end
  local again = requested(held) == requested(token)
  if not again and deadline > now_ms and not lost then
    return {2, held, deadline - now_ms, stale, stamp, known}
  end
  if again and not lost then token = held else stamp, known = stamp_of(tags, lease_ms, ARGV[4]), tags end
  put_lease(key, token, lease_ms, until_ms, stale, stamp, known)
  return {1, stale, token}
end
if not raw or #raw < 17 or valid(raw) == false then
  -- Nothing, foreign data, or an entry with an invalidated tag.
  put_lease(key, token, lease_ms, 0, '', stamp_of(tags, lease_ms, ARGV[4]), tags)
  return {1, '', token}
end
local expiry = expiry_of(raw)
if expiry > 0 and expiry <= now_ms then
  -- Only a loaded entry may be served stale. Redis removes any other within this millisecond.
  local stale = string.sub(raw, inner(raw), inner(raw)) == 'o' and raw or ''
  put_lease(key, token, lease_ms, now_ms + redis.call('PTTL', key), stale, stamp_of(tags, lease_ms, ARGV[4]), tags)
  return {1, stale, token}
end
if ARGV[3] == '1' then
  local version = struct.unpack('>d', raw)
  local mark = string.format('|%.17g|', version)
  if redis.call('SET', KEYS[2], token .. mark .. stamp_of(tags, lease_ms, ARGV[4]), 'NX', 'PX', lease_ms) then
    return {1, '', token}
  end
  local lease = redis.call('GET', KEYS[2])
  local held = string.sub(lease, 1, #token)
  if requested(held) == requested(token) and string.sub(lease, #token + 1, #token + #mark) == mark then
    return {1, '', held}
  end
end
return {0, raw}
""")

COMMIT = _script("""
-- ARGV: token, type tag and value, milliseconds to live, milliseconds to keep ('' for no expiry), 16 bytes about tags.
-- Returns the new version, or the negated version of the current value if the lease is lost.
local key, token, body = KEYS[1], ARGV[1], ARGV[2]
publish_end(key, token, '')
local raw = redis.call('GET', key)
local old, stamp, known, back, back_until = 0, nil, '', '', 0
if raw and #raw >= 8 and not is_lease(raw) then old = struct.unpack('>d', raw) end
if is_lease(raw) then
  local held, deadline
  held, deadline, back_until, back, stamp, known = parts(raw)
  if held ~= token or deadline <= now_ms then return 0 end
  if #back >= 8 then old = struct.unpack('>d', back) end
else
  local expiry = raw and expiry_of(raw) or 0
  if not raw or (expiry > 0 and expiry <= now_ms) then return 0 end
  local lease, prefix = redis.call('GET', KEYS[2]), token .. string.format('|%.17g|', old)
  if not lease or string.sub(lease, 1, #prefix) ~= prefix then return -old end
  stamp = string.sub(lease, #prefix + 1)
  redis.call('DEL', KEYS[2])
end
local tags = string.byte(body) == 116 and string.sub(body, 22, 21 + struct.unpack('>I4', body, 2)) or ''
if is_revoked(stamp, known) or (tags ~= '' and not is_current(stamp, tags, ARGV[4], ARGV[5])) then
  -- A tag was invalidated after the load began. The lease ends nevertheless.
  if not is_lease(raw) then return -old end
  if back ~= '' then
    redis.call('SET', key, back, 'PX', math.ceil(back_until - now_ms))
  else
    redis.call('DEL', key)
  end
  return 0
end
if tags ~= '' then body = string.sub(body, 1, 5) .. stamp .. string.sub(body, 22) end
local version = now
if old >= now then version = old + 1 end
if ARGV[4] == '' then
  redis.call('SET', key, header(version, ARGV[3]) .. body)
else
  redis.call('SET', key, header(version, ARGV[3]) .. body, 'PX', ARGV[4])
end
return version
""")

RENEW = _script("""
-- ARGV: token, milliseconds of the lease. Returns 0 if it is not held, 1 if it is, or {stamp, tags} if it has tags: the
-- lease is then held unless one of them was invalidated.
local key, token, lease_ms = KEYS[1], ARGV[1], tonumber(ARGV[2])
local raw = redis.call('GET', key)
if is_lease(raw) then
  local held, deadline, until_ms, stale, stamp, known = parts(raw)
  if held ~= token or deadline <= now_ms or is_revoked(stamp, known) then return 0 end
  put_lease(key, token, lease_ms, until_ms, stale, stamp, known)
  return known ~= '' and {stamp, known} or 1
end
local lease = redis.call('GET', KEYS[2])
if lease and string.sub(lease, 1, #token + 1) == token .. '|' then
  redis.call('PEXPIRE', KEYS[2], lease_ms)
  return 1
end
return 0
""")

RELEASE = _script("""
-- ARGV: token or requested name; name of the loader's error, if any. Returns 1 if the lease was held.
local key, token = KEYS[1], ARGV[1]
local raw = redis.call('GET', key)
if is_lease(raw) then
  local held, deadline, until_ms, stale, stamp, known = parts(raw)
  if requested(held) == token then token = held end
  publish_end(key, token, ARGV[2])
  if held ~= token then return 0 end
  if stale ~= '' then
    redis.call('SET', key, stale, 'PX', math.ceil(until_ms - now_ms))
  else
    redis.call('DEL', key)
  end
  return deadline > now_ms and not is_revoked(stamp, known) and 1 or 0
end
local lease = redis.call('GET', KEYS[2])
local stop = lease and string.find(lease, '|', #token + 1, true)
local held = stop and string.sub(lease, 1, stop - 1)
if held and requested(held) == token then token = held end
publish_end(key, token, ARGV[2])
if held == token then
  redis.call('DEL', KEYS[2])
  return 1
end
return 0
""")

Leases = GetOrLease | RenewLease | ReleaseLease


def lease_call(request: Leases, key: str, stamp: bytes, verdict: bytes | None) -> ScriptCall:
    """Return the script call for a lease request. `key` is the key in Redis.

    `verdict` is the result of a tag check; `None` if the script reads the counters.
    """
    here = verdict is None
    more: list[Argument] = [] if verdict is None else [verdict]
    if isinstance(request, GetOrLease):
        check_lease(request)
        # A call with a single key also works while a cluster moves its slot.
        keys: list[Argument] = [2, key, _refresh_name(key)] if request.refresh else [1, key]
        words = [*keys, new_lease_name(request.token), _ms(request.lease_ttl), "1" if request.refresh else "0", stamp]
        words += (pack_tags(request.tags) if request.tags else b"", *more)
        return words, key, _leased, LEASE.here if here else LEASE.elsewhere
    words = [2, key, _refresh_name(key), request.token]
    if isinstance(request, RenewLease):
        ttl = request.lease_ttl
        check_lease(request)
        return [*words, _ms(ttl), *more], key, lambda held, _: Renewed(ttl) if held else NotHeld(), RENEW.at(here)
    return [*words, request.error, *more], key, lambda held, _: Released() if held else NotHeld(), RELEASE.at(here)


def commit_call(request: Set, key: str, body: bytes, px: str, stamp: bytes, here: bool) -> ScriptCall:
    """Return the script call that stores a value under a lease.

    `px` is the time to live in milliseconds, as text. `stamp` is the largest tag counter if the script cannot read
    them.
    """
    if request.only_if is not None:
        raise BadMessage("only_if cannot be combined with a lease")
    if (metadata := request.metadata) is not None:
        body = pack_metadata(metadata, int(px) / 1000 if px else None) + body
    if request.tags:
        body = pack_tagged(body, request.tags, stamp)
    words: list[Argument] = [2, key, _refresh_name(key), request.lease or "", body, px, kept_for(request, px), stamp]
    return words, key, _committed, COMMIT.here if here else COMMIT.elsewhere


def kept_for(request: Set, px: str) -> str:
    """Return the milliseconds for which an entry is kept, including the time in which it may be served stale."""
    return str(int(px) + math.ceil(time_stale(request.metadata) * 1000)) if px else px


def _committed(version: Any, now: float) -> Reply:
    return Stored(float(version)) if version > 0 else NotStored(float(-version), "lease_lost")


def _leased(reply: Any, now: float) -> Reply:
    if reply[0] == 0:
        # The server found it live, so the local estimate of its clock does not matter.
        return read_entry(reply[1], now, live=True)[1]
    if reply[0] == 1:
        return LeaseGranted(reply[2].decode(), read_stale(reply[1], "", 0.0))
    holder, remaining = reply[1].decode(), reply[2] / 1000
    return read_stale(reply[3], holder, remaining) or Loading(holder, remaining)


def _refresh_name(key: str) -> Argument:
    """Return the key for the lease of a live value. It is in the same slot and outside `<namespace>:`."""
    namespace = key.partition(":")[0]
    if "{" not in key and "}" not in key:
        return f"{namespace}#lease:{{{key}}}"
    name = f"{namespace}#lease:{key}"
    slot = slot_of(key)
    if slot_of(name) == slot:
        return name
    # The namespace comes first, because access rules match on it. If it has a brace, its own hash tag would win.
    tag = b"{%b}" % tag_of(slot)
    place = f"{namespace}#lease:".encode()
    return place + tag + key.encode() if b"{" not in place else tag + place + key.encode()


def _ms(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))
