"""Lua script for writes, the most frequently run script, and the list of scripts that a connection loads."""

from __future__ import annotations

from .scripts import INCREMENT, PEEK, READ, TOUCH, Script, ScriptVariants

PLAIN_BYTES = 1024
"""Maximum bytes of a type tag and value in a plain run of `WRITE`.

A plain run copies the values that it replaces, and large values usually replace large ones. From about 4 KB, reading
only the head of each is faster."""

WRITE = ScriptVariants(
    """
-- ARGV, for each key: type tag and value, milliseconds to live or '', and the condition: '', 'absent', 'present' or a
-- version. A last argument is 't' if values have tags. Returns for each key the new version, the old version negated if
-- the condition did not hold, or the head of the entry if the result depends on its tags. This script runs most often,
-- so `head` is inlined, which saves a fifth of its time.
local call, pcall, pack, unpack = redis.call, redis.pcall, struct.pack, struct.unpack
local function notify(key, lease)
  -- This write ends the lease, so waiters can read the new value (see adapters/redis/pubsub.py).
  if lease ~= '' then
    pcall('PUBLISH', string.match(key, '^[^:]*') .. '#leases', string.sub(lease, 1, 1 + string.byte(lease)))
  end
end
if #ARGV == #KEYS + 1 then
  -- A plain run: type tag and value for each key, and one time to live for all. SET returns the value it replaces, so
  -- one command for each key is enough. Returns a single number if all have the same version.
  local px, versions, same = ARGV[#ARGV], {}, true
  local expiry = px == '' and 0 or now_ms + px
  local header, at = pack('>dd', now, expiry), string.format('%.0f', expiry)
  local function set(try, key, entry, ...)
    if px == '' then return try('SET', key, entry, ...) end
    return try('SET', key, entry, 'PXAT', at, ...)  -- Redis would rewrite PX to PXAT for replicas.
  end
  for i = 1, #KEYS do
    local key, version = KEYS[i], now
    local raw = set(pcall, key, header .. ARGV[i], 'GET')
    if type(raw) == 'table' then
      set(call, key, header .. ARGV[i])  -- The key held another type. Any other error is raised here.
    elseif raw and #raw >= 8 then
      local old = unpack('>d', raw)
      if old == -1 then
        notify(key, string.sub(raw, 26, 281))
      elseif old >= now and old < 9007199254740992 and old % 1 == 0 then
        version, same = old + 1, false
        set(call, key, pack('>dd', version, expiry) .. ARGV[i])
      end
    end
    versions[i] = version
  end
  return same and now or versions
end
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
      notify(key, call('GETRANGE', key, 25, 280))
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


def scripts(here: bool) -> tuple[Script, ...]:
    """Return the scripts that a new connection loads."""
    variants = (WRITE, TOUCH, INCREMENT, PEEK)
    return (READ, *(each.here for each in variants)) if here else tuple(each.elsewhere for each in variants)
