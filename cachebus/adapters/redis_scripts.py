"""Lua that runs in the Redis server: what must be one step, and what needs the server's clock.

`TIME` is taken once a script. A version is larger than that of the value before it even if the clock was set back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_COMMON = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local now_ms = math.floor(now / 1000)

-- The version and the expiry of what is stored, and whether anything is. What is not ours has version 0.
local function head(key)
  local raw = redis.pcall('GETRANGE', key, 0, 15)
  if type(raw) ~= 'string' then return 0, 0, true end
  if #raw < 16 then return 0, 0, #raw > 0 end
  local version, expiry = struct.unpack('>dd', raw)
  -- A lease is no value, and neither is what is only kept to be served stale.
  if version == -1 or (expiry > 0 and expiry <= now_ms) then return 0, 0, false end
  if not (version >= 1 and version < 9007199254740992 and version == math.floor(version)) then return 0, 0, true end
  return version, expiry, true
end

local function header(version, px)
  return struct.pack('>dd', version, px == '' and 0 or now_ms + tonumber(px))
end
"""


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the name under which the server knows it."""

    text: str
    sha: str

    @classmethod
    def of(cls, body: str) -> Script:
        """The script with the common functions before `body`."""
        text = _COMMON + body
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


WRITE = Script.of(
    """
-- For each key: form and value, milliseconds to live or '', and the condition: '', 'absent', 'present' or a version.
-- The answer is the new version, or the old one negated where the condition did not hold. This is the busiest script:
-- it reads `head` out at length, which takes a fifth of its time away.
local call, pcall, pack, unpack = redis.call, redis.pcall, struct.pack, struct.unpack
local out = {}
for i = 1, #KEYS do
  local key, px, only_if = KEYS[i], ARGV[3 * i - 1], ARGV[3 * i]
  local raw = pcall('GETRANGE', key, 0, 15)
  local old, exists = 0, raw ~= ''
  if exists and type(raw) == 'string' and #raw >= 8 then
    old = unpack('>d', raw)
    if old == -1 then
      exists = false
      -- The lease of a load that is overtaken: whoever waits for it finds this value (see redis_watch.py).
      local lease = call('GETRANGE', key, 25, 280)
      if lease ~= '' then
        pcall('PUBLISH', string.match(key, '^[^:]*') .. '#leases', string.sub(lease, 1, 1 + string.byte(lease)))
      end
    elseif only_if ~= '' and #raw == 16 then
      local expiry = unpack('>d', raw, 9)
      exists = not (expiry > 0 and expiry <= now_ms)
    end
    if not (old >= 1 and old < 9007199254740992) or old % 1 ~= 0 then old = 0 end
  end
  if only_if == '' or (only_if == 'absent' and not exists) or (only_if == 'present' and exists)
      or (exists and old > 0 and tonumber(only_if) == old) then
    local version = now
    if old >= now then version = old + 1 end
    if px == '' then
      call('SET', key, pack('>dd', version, 0) .. ARGV[3 * i - 2])
    else
      call('SET', key, pack('>dd', version, now_ms + px) .. ARGV[3 * i - 2], 'PX', px)
    end
    out[i] = version
  else
    out[i] = -old
  end
end
return out
"""
)

TOUCH = Script.of(
    """
-- Gives a value ARGV[1] milliseconds to live, '' for ever. The answer is its version, 0 where there is no value.
local version, _, exists = head(KEYS[1])
if not exists then return 0 end
if version == 0 then return redis.error_reply('WRONGTYPE no entry') end
redis.call('SETRANGE', KEYS[1], 0, header(version, ARGV[1]))
if ARGV[1] == '' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return version
"""
)

INCREMENT = Script.of(
    """
-- Adds ARGV[1] to a counter that keeps its expiry. A missing one becomes ARGV[2] and lives for ARGV[3] milliseconds; with
-- ARGV[2] '' it stays missing. The answer is the number as text, because Lua's are exact to 53 bits only: the sum is
-- Redis's own.
local key = KEYS[1]
local old, expiry, exists = head(key)
if not exists then
  if ARGV[2] == '' then return false end
  local body = 'I' .. ARGV[2]
  if ARGV[3] == '' then
    redis.call('SET', key, header(now, '') .. body)
  else
    redis.call('SET', key, header(now, ARGV[3]) .. body, 'PX', ARGV[3])
  end
  return ARGV[2]
end
if old == 0 then return redis.error_reply('WRONGTYPE no entry') end
local raw = redis.call('GET', key)
if string.sub(raw, 17, 17) ~= 'I' then return redis.error_reply('NOTCOUNTER not an int') end
redis.call('SET', key, string.sub(raw, 18), 'KEEPTTL')
if type(redis.pcall('INCRBY', key, ARGV[1])) == 'table' then
  redis.call('SET', key, raw, 'KEEPTTL')
  return redis.error_reply('OUTOFRANGE over 64 bits')
end
local sum = redis.call('GET', key)
redis.call('SET', key, struct.pack('>dd', math.max(now, old + 1), expiry) .. 'I' .. sum, 'KEEPTTL')
return sum
"""
)

SCRIPTS = (WRITE, TOUCH, INCREMENT)
