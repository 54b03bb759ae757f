"""Lua that runs in the Redis server: what must be one step, and what needs the server's clock."""

from __future__ import annotations

from .redis_script import Script
from .redis_tag_scripts import PEEK, READ, Twin

WRITE = Twin(
    """
-- For each key: form and value, milliseconds to live or '', and the condition: '', 'absent', 'present' or a version. One
-- more argument is 't' where values have tags. The answer is the new version, or the old one negated where the condition did
-- not hold, or an entry's head where that depends on its tags. This is the busiest script: it reads `head` out at length,
-- which takes a fifth of its time away.
local call, pcall, pack, unpack = redis.call, redis.pcall, struct.pack, struct.unpack
local tagged = ARGV[3 * #KEYS + 1] == 't'
local out = {}
for i = 1, #KEYS do
  local key, px, only_if = KEYS[i], ARGV[3 * i - 1], ARGV[3 * i]
  local raw = pcall('GETRANGE', key, 0, 16)
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
    elseif only_if ~= '' and #raw >= 16 then
      local expiry = unpack('>d', raw, 9)
      exists = not (expiry > 0 and expiry <= now_ms)
      if exists and string.byte(raw, 17) == 116 then
        raw = call('GET', key)
        exists = tags().valid(raw)
      end
    end
    if not (old >= 1 and old < 9007199254740992) or old % 1 ~= 0 then old = 0 end
  end
  if exists == nil then
    out[i] = string.sub(raw, 1, tags().inner(raw))
  elseif only_if == '' or (only_if == 'absent' and not exists) or (only_if == 'present' and exists)
      or (exists and old > 0 and tonumber(only_if) == old) then
    local version = now
    if old >= now then version = old + 1 end
    local body = ARGV[3 * i - 2]
    if tagged and string.byte(body) == 116 then body = tags().stamped(body, px) end
    if px == '' then
      call('SET', key, pack('>dd', version, 0) .. body)
    else
      call('SET', key, pack('>dd', version, now_ms + px) .. body, 'PX', px)
    end
    out[i] = version
  else
    out[i] = exists and -old or 0
  end
end
return out
""",
    later=True,
)

TOUCH = Twin(
    """
-- Gives a value ARGV[1] milliseconds to live, '' for ever. The answer is its version, 0 where there is no value, or an
-- entry's head where that depends on its tags.
local version, _, exists, form = head(KEYS[1])
if not exists then return 0 end
if version == 0 then return redis.error_reply('WRONGTYPE no entry') end
if form == 116 then
  local raw = redis.call('GET', KEYS[1])
  local is_valid = valid(raw)
  if is_valid == nil then return string.sub(raw, 1, inner(raw)) end
  if not is_valid then return 0 end
  local _, tags = claim(raw)
  keep_all(tags, ARGV[1])
end
redis.call('SETRANGE', KEYS[1], 0, header(version, ARGV[1]))
if ARGV[1] == '' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return version
"""
)

INCREMENT = Twin(
    """
-- Adds ARGV[1] to a counter that keeps its expiry. A missing one becomes ARGV[2] and lives for ARGV[3] milliseconds; with
-- ARGV[2] '' it stays missing. The answer is the number as text, because Lua's are exact to 53 bits only: the sum is
-- Redis's own. An entry's head in a list where it depends on its tags.
local key = KEYS[1]
local old, expiry, exists, form = head(key)
if form == 116 then
  local raw = redis.call('GET', key)
  exists = valid(raw)
  if exists == nil then return {string.sub(raw, 1, inner(raw))} end
end
if not exists then
  if ARGV[2] == '' then return false end
  local body, version = 'I' .. ARGV[2], math.max(now, old + 1)
  if ARGV[3] == '' then
    redis.call('SET', key, header(version, '') .. body)
  else
    redis.call('SET', key, header(version, ARGV[3]) .. body, 'PX', ARGV[3])
  end
  return ARGV[2]
end
if old == 0 then return redis.error_reply('WRONGTYPE no entry') end
local raw = redis.call('GET', key)
local at = inner(raw)
if string.sub(raw, at, at) ~= 'I' then return redis.error_reply('NOTCOUNTER not an int') end
redis.call('SET', key, string.sub(raw, at + 1), 'KEEPTTL')
if type(redis.pcall('INCRBY', key, ARGV[1])) == 'table' then
  redis.call('SET', key, raw, 'KEEPTTL')
  return redis.error_reply('OUTOFRANGE over 64 bits')
end
local sum = redis.call('GET', key)
redis.call('SET', key, struct.pack('>dd', math.max(now, old + 1), expiry) .. string.sub(raw, 17, at) .. sum, 'KEEPTTL')
return sum
"""
)


LATE_IS_WRONG = frozenset(script for twin in (WRITE, TOUCH, INCREMENT) for script in (twin.here, twin.elsewhere))
"""Those that must not be done after what was sent later. The others read, or look for themselves whether they come too late."""

READING = frozenset({READ, PEEK.here, PEEK.elsewhere})
"""Those that change nothing."""


def scripts(here: bool) -> tuple[Script, ...]:
    """Those that a server is told of when a connection is made."""
    twins = (WRITE, TOUCH, INCREMENT, PEEK)
    return (READ, *(each.here for each in twins)) if here else tuple(each.elsewhere for each in twins)
