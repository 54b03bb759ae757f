"""Lua scripts that run in the Redis server. Each is atomic and uses the server's clock.

A script calls `TIME` once. A version is always larger than that of the value it replaces, even if the clock was set
back.

An entry with tags has these fields between its header and its type tag:

    1 byte    type tag  t
    4 bytes   length of the packed tags
    16 bytes  stamp     epoch and number of the sequence, at the start of the entry's load
    rest      the tags, a msgpack array of str

The sequence of a namespace is one string: 8 random bytes, its *epoch*; a big-endian double, its *number*, which each
invalidation increments by one; then 256 doubles, one for each bucket of tags: the number at the last invalidation of
any tag in the bucket. The counter of a tag is a string too: the epoch, and the number at the tag's last invalidation.
See `entry` for the rule that decides whether an entry is valid.
"""

from __future__ import annotations

import hashlib

RETENTION_MS = 600_000
"""Milliseconds for which a counter outlives an invalidation, a lease, or the last entry with its tag."""

COMMON = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local now_ms = math.floor(now / 1000)
local function head(key)
  -- Returns version, expiry, whether the entry exists, and type tag. Foreign data has version 0.
  local raw = redis.pcall('GETRANGE', key, 0, 16)
  if type(raw) ~= 'string' then return 0, 0, true end
  if #raw < 16 then return 0, 0, #raw > 0 end
  local version, expiry = struct.unpack('>dd', raw)
  -- A lease is not a value, nor is an expired entry that is kept to be served stale.
  if version == -1 or (expiry > 0 and expiry <= now_ms) then return 0, 0, false end
  if not (version >= 1 and version < 9007199254740992 and version == math.floor(version)) then return 0, 0, true end
  return version, expiry, true, string.byte(raw, 17)
end
local function header(version, px)
  return struct.pack('>dd', version, px == '' and 0 or now_ms + tonumber(px))
end
"""

_LAYOUT = """
local function inner(raw)
  -- The position of the value's own type tag.
  if string.byte(raw, 17) ~= 116 then return 17 end
  return 38 + struct.unpack('>I4', raw, 18)
end
local function tag_stamp(raw)
  -- The stamp of an entry, and its packed tags.
  return string.sub(raw, 22, 37), string.sub(raw, 38, inner(raw) - 1)
end
"""

_SEQUENCE = f"""
local RETENTION = {RETENTION_MS}
local function sequence_key()
  local namespace = string.match(KEYS[1], '^[^:]*')
  return namespace .. '#tags:{{' .. namespace .. '}}'
end
local function bucket(counter)
  return 16 + 8 * tonumber(string.sub(redis.sha1hex(counter), 1, 2), 16)
end
local function stamp_at(sequence, proposed)
  -- The current stamp. A missing or lost sequence starts with a new epoch, which no entry has.
  local stamp = redis.call('GETRANGE', sequence, 0, 15)
  if #stamp == 16 then return stamp end
  stamp = string.sub(proposed, 1, 8) .. struct.pack('>d', 1)
  redis.call('SET', sequence, stamp)
  return stamp
end
local function keep(name, px)
  local left = redis.call('PTTL', name)
  if left < 0 then return end
  if px == '' then
    redis.call('PERSIST', name)
  elseif left < px + RETENTION / 2 then
    redis.call('PEXPIRE', name, px + RETENTION)
  end
end
local function ensure(sequence, stamp, name, px)
  -- Make sure that the counter lives as long as an entry of `px` milliseconds. A lost counter gets the number of its
  -- bucket: the tag's last invalidation was not later.
  local epoch, counter = string.sub(stamp, 1, 8), redis.call('GET', name)
  if counter and string.sub(counter, 1, 8) == epoch then
    keep(name, px)
    return counter
  end
  local at = bucket(name)
  local number = redis.call('GETRANGE', sequence, at, at + 7)
  counter = epoch .. (#number == 8 and number or struct.pack('>d', 0))
  if px == '' then
    redis.call('SET', name, counter)
  else
    redis.call('SET', name, counter, 'PX', px + RETENTION)
  end
  return counter
end
local function is_after(counter, stamp)
  return not counter or string.sub(counter, 1, 8) ~= string.sub(stamp, 1, 8)
    or struct.unpack('>d', counter, 9) > struct.unpack('>d', stamp, 9)
end
"""

_HERE = """
local function names(tags)
  local found, at = cmsgpack.unpack(tags), sequence_key() .. ':'
  for i = 1, #found do found[i] = at .. found[i] end
  return found
end
local function holds(stamp, tags)
  -- True if no tag was invalidated after the stamp.
  for _, name in ipairs(names(tags)) do
    if is_after(redis.call('GET', name), stamp) then return false end
  end
  return true
end
local function stamp_of(tags, px, proposed)
  -- The current stamp. Creates missing counters of the tags.
  local sequence = sequence_key()
  local stamp = stamp_at(sequence, proposed)
  if tags ~= '' then
    for _, name in ipairs(names(tags)) do ensure(sequence, stamp, name, px) end
  end
  return stamp
end
local function is_current(stamp, tags, px, proposed)
  -- True if a load that began at `stamp` may be stored with the tags.
  stamp_of(tags, px, proposed)
  return holds(stamp, tags)
end
local function stamped(body, px)
  local tags = string.sub(body, 22, 21 + struct.unpack('>I4', body, 2))
  return string.sub(body, 1, 5) .. stamp_of(tags, px, string.sub(body, 6, 21)) .. string.sub(body, 22)
end
local function keep_all(tags, px)
  for _, name in ipairs(names(tags)) do keep(name, px) end
end
"""

_ELSEWHERE = """
-- The counters are in another slot, so the caller reads them first. The last argument is its verdict: '+' or '-', then
-- the stamp and the tags it applies to. For any other stamp the result is nil: unknown.
local function holds(stamp, tags)
  local verdict = ARGV[#ARGV]
  if verdict == '+' .. stamp .. tags then return true end
  if verdict == '-' .. stamp .. tags then return false end
  return nil
end
local function stamp_of(tags, px, stamp)
  return stamp
end
local function is_current(stamp, tags, px, latest)
  -- `latest` is the largest counter.
  return string.sub(stamp, 1, 8) == string.sub(latest, 1, 8)
    and struct.unpack('>d', stamp, 9) >= struct.unpack('>d', latest, 9)
end
local function stamped(body, px)
  return body
end
local function keep_all(tags, px)
end
"""

_VALID = """
local function valid(raw)
  -- True if no tag of the entry was invalidated later; nil if unknown. A damaged entry is not valid.
  if string.byte(raw, 17) ~= 116 then return true end
  local understood, holding = pcall(function() return inner(raw) <= #raw and holds(tag_stamp(raw)) end)
  if not understood then return false end
  return holding
end
"""

_TAGS_HERE = _LAYOUT + _SEQUENCE + _HERE + _VALID
_TAGS_ELSEWHERE = _LAYOUT + _ELSEWHERE + _VALID
_LATER = """
local made
local function tags()
  if made then return made end
%s
  made = {inner = inner, stamped = stamped, valid = valid}
  return made
end
"""


class Script:
    """Lua script and the SHA-1 by which the server caches it."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class ScriptVariants:
    """Script in two variants: `here` reads the tag counters; `elsewhere`, for a cluster, gets a verdict from the
    caller.

    With `later`, the script calls `tags()` for the tag functions. Defining them takes longer than running a small
    script.
    """

    __slots__ = ("elsewhere", "here")

    def __init__(self, body: str, *, later: bool = False) -> None:
        functions = COMMON + (_LATER if later else "%s")
        self.here = Script(functions % _TAGS_HERE + body)
        self.elsewhere = Script(functions % _TAGS_ELSEWHERE + body)

    def at(self, here: bool) -> Script:
        """Return the variant for scripts that can read the counters (`here`), or the other one."""
        return self.here if here else self.elsewhere


READ = Script(
    _TAGS_HERE
    + """
-- Like MGET, but omits entries with invalidated tags.
local out = {}
for first = 1, #KEYS, 1000 do
  local raws = redis.call('MGET', unpack(KEYS, first, math.min(first + 999, #KEYS)))
  for i = 1, #raws do
    local raw = raws[i]
    if raw and string.byte(raw, 17) == 116 and not valid(raw) then raw = false end
    out[first + i - 1] = raw
  end
end
return out
"""
)

PEEK = ScriptVariants("""
-- Returns the header and type tag of a valid entry, with its stamp and tags if it has any.
local raw = redis.call('GETRANGE', KEYS[1], 0, 16)
if string.byte(raw, 17) ~= 116 then return raw end
raw = redis.call('GET', KEYS[1])
if valid(raw) == false then return '' end
return string.sub(raw, 1, inner(raw))
""")


def _counting(body: str) -> Script:
    return Script(_SEQUENCE + body)


INVALIDATE = _counting("""
-- KEYS: the sequence, then counters. ARGV: the epoch to use if the sequence is missing.
local sequence = KEYS[1]
local stamp = stamp_at(sequence, ARGV[1])
local epoch, number = string.sub(stamp, 1, 8), struct.pack('>d', struct.unpack('>d', stamp, 9) + 1)
redis.call('SETRANGE', sequence, 0, epoch .. number)
for i = 2, #KEYS do
  redis.call('SETRANGE', sequence, bucket(KEYS[i]), number)
  -- Without a counter, no valid entry has the tag. With one, no entry older than this invalidation needs it any more.
  redis.call('SET', KEYS[i], epoch .. number, 'XX', 'PX', RETENTION)
end
return 1
""")

STAMP = _counting("""
-- KEYS: the sequence, then counters. ARGV: the epoch to use if the sequence is missing; milliseconds, '' for no expiry.
-- Returns the current stamp, then the counters.
local sequence = KEYS[1]
local out = {stamp_at(sequence, ARGV[1])}
for i = 2, #KEYS do out[i] = ensure(sequence, out[1], KEYS[i], ARGV[2]) end
return out
""")

KEEP = _counting("""
-- KEYS: counters. ARGV: milliseconds for which to keep them, '' for no expiry. Returns the counters.
for i = 1, #KEYS do keep(KEYS[i], ARGV[1]) end
return redis.call('MGET', unpack(KEYS))
""")

TOUCH = ScriptVariants("""
-- Sets the time to live of a value to ARGV[1] milliseconds, '' for no expiry. Returns its version, 0 if there is no
-- value, or the head of the entry if the result depends on its tags.
local version, _, exists, form = head(KEYS[1])
if not exists then return 0 end
if version == 0 then return redis.error_reply('WRONGTYPE not an entry') end
if form == 116 then
  local raw = redis.call('GET', KEYS[1])
  local is_valid = valid(raw)
  if is_valid == nil then return string.sub(raw, 1, inner(raw)) end
  if not is_valid then return 0 end
  local _, tags = tag_stamp(raw)
  keep_all(tags, ARGV[1])
end
redis.call('SETRANGE', KEYS[1], 0, header(version, ARGV[1]))
if ARGV[1] == '' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return version
""")

INCREMENT = ScriptVariants("""
-- Adds ARGV[1] to a counter, which keeps its expiry. A missing counter is set to ARGV[2] for ARGV[3] milliseconds; if
-- ARGV[2] is '', it stays missing. INCRBY computes the sum and it is returned as text, because numbers in Lua are exact
-- only to 53 bits. Returns a list with the head of the entry if the result depends on its tags.
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
if old == 0 then return redis.error_reply('WRONGTYPE not an entry') end
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
""")
