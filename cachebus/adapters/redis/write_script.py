"""The script in Lua that writes, which is the busiest; and the scripts that a connection needs."""

from __future__ import annotations

from .scripts import INCREMENT, PEEK, READ, TOUCH, Script, ScriptVariants

PLAIN_BYTES = 1024
"""The largest form and value in a plain run of `WRITE`. The values that it replaces are copied, and large values replace
large ones: from about 4 KB on, reading the head of each is quicker."""

WRITE = ScriptVariants(
    """
-- For each key: form and value, milliseconds to live or '', and the condition: '', 'absent', 'present' or a version. One
-- more argument is 't' if values have tags. The answer is the new version, or the old one negated if the condition did not
-- hold, or an entry's head if that depends on its tags. This is the busiest script: `head` is written out in it, which
-- saves a fifth of its time.
local call, pcall, pack, unpack = redis.call, redis.pcall, struct.pack, struct.unpack
local function notify(key, lease)
  -- A load that has this lease is overtaken: its waiters find the new value (see adapters/redis/pubsub.py).
  if lease ~= '' then
    pcall('PUBLISH', string.match(key, '^[^:]*') .. '#leases', string.sub(lease, 1, 1 + string.byte(lease)))
  end
end
if #ARGV == #KEYS + 1 then
  -- A plain run: form and value for each key, and the milliseconds to live of all. SET returns what it replaces, so one
  -- command a key is enough. The answer is a single number if that is the version of all.
  local px, versions, same = ARGV[#ARGV], {}, true
  local expiry = px == '' and 0 or now_ms + px
  local header, at = pack('>dd', now, expiry), string.format('%.0f', expiry)
  local function set(try, key, entry, ...)
    if px == '' then return try('SET', key, entry, ...) end
    return try('SET', key, entry, 'PXAT', at, ...)  -- PX would be turned into PXAT for replicas.
  end
  for i = 1, #KEYS do
    local key, version = KEYS[i], now
    local raw = set(pcall, key, header .. ARGV[i], 'GET')
    if type(raw) == 'table' then
      set(call, key, header .. ARGV[i])  -- There was no string. Any other error is raised here.
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
    """The scripts that a new connection loads."""
    twins = (WRITE, TOUCH, INCREMENT, PEEK)
    return (READ, *(each.here for each in twins)) if here else tuple(each.elsewhere for each in twins)
