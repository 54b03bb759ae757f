"""Lua for locks in Redis: each decision is one step in the server, by its clock.

A lock named N in a namespace S is in these keys, which a cluster keeps in one slot:

    S#lock:{N}            hash   t ticket, o owner and i inbox of the holder; n its token, the last one given; u until when it
                                 holds, in milliseconds; c 1 if it knows that it does; s a token: nobody who had that one or a
                                 later one has lost the lock; q the last number of a place in the queue
    S#lock:{N}:queue      sorted set of tickets that wait, by the number of their places
    S#lock:{N}:waiting    hash   ticket -> inbox|until|ttl|owner, the times in milliseconds
    S#lock:{N}:gone:T     there for a minute after the ticket T was given up

An inbox is a channel, `S#lock:to:<process>`: there a process is told `ticket|name` when a lock is offered to one that waits in
it. It then has CLAIM milliseconds to ask for it. If it does not, all that waits there loses its place: it is away.
"""

from __future__ import annotations

from .redis_scripts import COMMON, Script

CLAIM_MS = 2000
"""How long a lock that is offered to another process is kept for it."""

RETAIN_MS = 7 * 86_400_000
"""How long the last token of a lock that nobody wants is remembered, from the first time on the day of its last holder. After
that the clock alone makes it grow."""

GONE_MS = 60_000
"""How long a ticket that was given up is refused."""

DAY_MS = 86_400_000

# Arguments: 1 ticket, 2 our inbox, 3 what channels begin with, 4 name, 5 whether PUBLISH does not say who heard it.
_HEAD = f"""{COMMON}
local state, queue, rows = KEYS[1], KEYS[2], KEYS[3]
local ticket, inbox, channels, name, silent = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1'
local CLAIM, RETAIN, DAY = {CLAIM_MS}, {RETAIN_MS}, {DAY_MS}
local s = redis.call('HMGET', state, 't', 'o', 'n', 'u', 'c', 's', 'i')
local holder, owner, token, until_ms = s[1] or '', s[2] or '', tonumber(s[3] or 0), tonumber(s[4] or 0)
local since = tonumber(s[6] or 0)
local lost, lost_token, next_ticket, next_ttl, offered = '', 0, '', 0, 0
"""
_LOCK = (
    _HEAD
    + """
local function leave(who)
  redis.call('HDEL', rows, who)
  return redis.call('ZREM', queue, who)
end

local function keep(key, ms)
  redis.call('PEXPIRE', key, math.max(RETAIN, 2 * ms))
end

local function give(who, whose, ttl_ms, claimed, where)
  -- The state is kept for a week from the first time of a day, because each time would cost as much as the giving.
  local kept = math.floor(token / 1000 / DAY) == math.floor(now_ms / DAY)
  token = math.max(token + 1, now)
  holder, owner, until_ms = who, whose, now_ms + ttl_ms
  redis.call('HSET', state, 't', who, 'o', whose, 'n', token, 'u', until_ms, 'c', claimed, 'i', where)
  if since == 0 then
    since = token
    redis.call('HSET', state, 's', since)
  end
  if not kept or ttl_ms > DAY then keep(state, ttl_ms) end
end

-- Give a free lock to the first who waits and is there. Who waits in our own process is told by the reply.
local function pass_on()
  local at = 0
  while true do
    local some = redis.call('ZRANGE', queue, at, at + 15)
    if #some == 0 then return end
    for _, each in ipairs(some) do
      local row = redis.call('HGET', rows, each) or ''
      local where, waits_ms, ttl_ms, whose = string.match(row, '^([^|]*)|(%d+)|(%d+)|(.*)$')
      if not where or tonumber(waits_ms) <= now_ms then
        leave(each)
      elseif where == inbox then
        leave(each)
        give(each, whose, tonumber(ttl_ms), 1, where)
        if each ~= ticket then next_ticket, next_ttl = each, tonumber(ttl_ms) end
        return
      elseif redis.call('PUBLISH', channels .. where, each .. '|' .. name) > 0 or silent then
        leave(each)
        give(each, whose, math.min(tonumber(ttl_ms), CLAIM), 0, where)
        offered = 1
        return
      else
        at = at + 1
      end
    end
  end
end

-- Whose time is up holds nothing. If it never knew that it did, its process is away, and so are all who wait in there.
if holder ~= '' and until_ms <= now_ms then
  lost, lost_token = owner, token
  if s[5] == '0' then
    local all = redis.call('HGETALL', rows)
    for n = 1, #all, 2 do
      if string.match(all[n + 1], '^([^|]*)|') == s[7] then leave(all[n]) end
    end
  end
  if s[5] ~= '0' then since = token + 1 end
  holder, owner, until_ms = '', '', 0
  redis.call('HSET', state, 't', '', 'u', 0, 's', since)
end

-- As short as may be, because each part of it costs as much as looking into the queue. 0 is what most callers hope for.
local function answer(code, fresh)
  if lost_token > 0 and s[5] == '0' then lost_token = 0 end
  local others = next_ticket ~= '' or offered > 0 or lost_token > 0
  if code == 0 and not others then return {code, token} end
  local left = math.max(0, until_ms - now_ms)
  if not others then return {code, token, owner, left, fresh or 0} end
  return {code, token, owner, left, fresh or 0, next_ticket, next_ttl, offered, lost, lost_token}
end
"""
)

ACQUIRE = Script(
    _LOCK
    + """
-- More: 6 owner, 7 milliseconds to hold, 8 milliseconds to wait.
local me, ttl_ms, wait_ms = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local some = redis.call('EXISTS', KEYS[4], queue) > 0
if some and redis.call('EXISTS', KEYS[4]) == 1 then return answer(2) end
if holder == ticket then
  until_ms = now_ms + ttl_ms
  redis.call('HSET', state, 'u', until_ms, 'c', 1, 'i', inbox)
  keep(state, ttl_ms)
  return answer(0)
end
local fresh = 0
if holder ~= '' or some then
  if wait_ms > 0 then
    if not redis.call('ZSCORE', queue, ticket) then
      fresh = 1
      redis.call('ZADD', queue, redis.call('HINCRBY', state, 'q', 1), ticket)
      keep(queue, wait_ms)
      keep(state, math.max(wait_ms, until_ms - now_ms))
    end
    redis.call('HSET', rows, ticket, table.concat({inbox, now_ms + wait_ms, ttl_ms, me}, '|'))
    keep(rows, wait_ms)
  else
    leave(ticket)
  end
  if holder == '' then pass_on() end
end
if holder == '' then
  if some then leave(ticket) end
  give(ticket, me, ttl_ms, 1, inbox)
end
if holder == ticket then return answer(0) end
return answer(wait_ms > 0 and 1 or 2, fresh)
"""
)

RENEW = Script(
    _LOCK
    + """
-- More: 6 milliseconds to hold. The code is 0 if it is held, 1 if another holds it, 2 if nobody does.
if holder == ticket then
  until_ms = now_ms + tonumber(ARGV[6])
  redis.call('HSET', state, 'u', until_ms, 'c', 1)
  keep(state, tonumber(ARGV[6]))
  return answer(0)
end
if holder ~= '' then return answer(1) end
pass_on()
return answer(holder == '' and 2 or 1)
"""
)

RELEASE = Script(
    _LOCK
    + f"""
-- More: 6 '1' to give up what may come only now, or be asked again by a process that does not know: it is refused then;
-- '2' to give up only what is told to our inbox; '3' only if it does not know that it holds. 7 token.
-- The codes are those of RENEW.
local had = tonumber(ARGV[7])
if ARGV[6] == '1' then redis.call('SET', KEYS[4], '', 'PX', {GONE_MS}) end
"""
    + """
if ARGV[6] == '2' or ARGV[6] == '3' then
  local row = redis.call('HGET', rows, ticket)
  local where = holder == ticket and s[7] or row and string.match(row, '^([^|]*)|')
  if where ~= inbox or (ARGV[6] == '3' and holder == ticket and s[5] == '1') then return answer(2) end
end
if holder == ticket then
  if ARGV[6] == '0' and had ~= token then redis.call('HSET', state, 's', token + 1) end -- It was taken from its holder.
  holder, owner, until_ms = '', '', 0
  redis.call('HSET', state, 't', '', 'u', 0)
  pass_on()
  return answer(0)
end
local code = 2
local gave_back = since > 0 and had >= since and (had < token or had == token and holder == '')
if leave(ticket) == 1 or gave_back then
  code = 0 -- It waited; or it is told once more, because the answer to the first time was lost.
elseif holder ~= '' and ARGV[6] == '0' then
  code = 1
end
if holder == '' then pass_on() end
return answer(code)
"""
)

DESCRIBE = Script(
    _LOCK
    + """
if holder == '' then pass_on() end
-- The code is 0 if nobody holds it.
return answer(holder == '' and 0 or 1)
"""
)
