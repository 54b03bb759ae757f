"""Locks in Redis, shared by every process that uses the server. Waiters are notified on a channel and do not poll.

Each operation is one atomic script that uses the server's clock. A lock named N in a namespace S uses these keys, all
in one slot:

    S#lock:{N}            hash:
                            t  ticket of the holder
                            o  owner of the holder
                            i  inbox of the holder
                            n  last fencing token issued, which is the holder's
                            u  expiry of the lock, in milliseconds
                            c  1 if the holder knows that it holds the lock
                            s  no holder with this token or a later one has lost the lock
                            q  last position assigned in the queue
    S#lock:{N}:queue      sorted set of waiting tickets, by position
    S#lock:{N}:waiting    hash: ticket -> inbox|until|ttl|owner, times in milliseconds
    S#lock:{N}:gone:T     exists for a minute after ticket T was abandoned

An inbox is the channel `S#lock:to:<process>`. When a lock is offered to a waiter, its process receives `ticket|name`
there and has CLAIM milliseconds to acquire it. Otherwise the process is considered dead, and all its waiters lose
their positions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

from cachebus.actors.ports import Capabilities, Gauges, LockListener, PipelinedStore
from cachebus.messages import (
    AcquireLock,
    CacheError,
    CapabilityError,
    DescribeLock,
    Failed,
    LockDenied,
    LockFree,
    LockGranted,
    LockInfo,
    LockNotOwned,
    LockQueued,
    NotHeld,
    Released,
    ReleaseLock,
    Renewed,
    RenewLock,
    Reply,
    Request,
)

from .commands import ScriptCall
from .connection import Argument
from .errors import BACKEND
from .pubsub import ChannelSubscription
from .scripts import COMMON, Script

CLAIM_MS = 2000  # Time in which another process must accept an offered lock.
RETAIN_MS = 7 * 86_400_000
"""How long the last token of an unused lock is kept, from the first grant on the day of its last holder. Later tokens
are still larger, because they come from the clock."""

GONE_MS = 60_000  # How long an abandoned ticket is rejected.
DAY_MS = 86_400_000

# Arguments: 1 ticket, 2 own inbox, 3 prefix of channels, 4 name, 5 '1' if PUBLISH does not count all receivers.
_LOCK = (
    f"{COMMON}local CLAIM, RETAIN, DAY, GONE = {CLAIM_MS}, {RETAIN_MS}, {DAY_MS}, {GONE_MS}"
    """
local state, queue, rows = KEYS[1], KEYS[2], KEYS[3]
local ticket, inbox, channels, name, silent = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1'
local s = redis.call('HMGET', state, 't', 'o', 'n', 'u', 'c', 's', 'i')
local holder, owner, token, until_ms = s[1] or '', s[2] or '', tonumber(s[3] or 0), tonumber(s[4] or 0)
local since = tonumber(s[6] or 0)
local lost, lost_token, next_ticket, next_ttl, offered = '', 0, '', 0, 0
local function leave(waiter)
  redis.call('HDEL', rows, waiter)
  return redis.call('ZREM', queue, waiter)
end
local function keep(key, ms)
  redis.call('PEXPIRE', key, math.max(RETAIN, 2 * ms))
end
local function grant(waiter, waiter_owner, ttl_ms, claimed, waiter_inbox)
  -- The retention is renewed once a day only: renewing it costs as much as granting the lock.
  local kept = math.floor(token / 1000 / DAY) == math.floor(now_ms / DAY)
  token = math.max(token + 1, now)
  holder, owner, until_ms = waiter, waiter_owner, now_ms + ttl_ms
  redis.call('HSET', state, 't', waiter, 'o', waiter_owner, 'n', token, 'u', until_ms, 'c', claimed, 'i', waiter_inbox)
  if since == 0 then
    since = token
    redis.call('HSET', state, 's', since)
  end
  if not kept or ttl_ms > DAY then keep(state, ttl_ms) end
end
local function pass_on()
  -- Grants a free lock to the first live waiter. A waiter in the calling process is notified by the reply.
  local at = 0
  while true do
    local some = redis.call('ZRANGE', queue, at, at + 15)
    if #some == 0 then return end
    for _, each in ipairs(some) do
      local row = redis.call('HGET', rows, each) or ''
      local waiter_inbox, waits_ms, ttl_ms, waiter_owner = string.match(row, '^([^|]*)|(%d+)|(%d+)|(.*)$')
      if not waiter_inbox or tonumber(waits_ms) <= now_ms then
        leave(each)
      elseif waiter_inbox == inbox then
        leave(each)
        grant(each, waiter_owner, tonumber(ttl_ms), 1, waiter_inbox)
        if each ~= ticket then next_ticket, next_ttl = each, tonumber(ttl_ms) end
        return
      elseif redis.call('PUBLISH', channels .. waiter_inbox, each .. '|' .. name) > 0 or silent then
        leave(each)
        grant(each, waiter_owner, math.min(tonumber(ttl_ms), CLAIM), 0, waiter_inbox)
        offered = 1
        return
      else
        at = at + 1
      end
    end
  end
end
-- Expire the holder if its time is up. If it never accepted the lock, its process is dead: remove all waiters of its
-- inbox.
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
local function answer(code, fresh)
  -- Short, because each field costs as much as reading the queue. Code 0, success, is the most common.
  if lost_token > 0 and s[5] == '0' then lost_token = 0 end
  local others = next_ticket ~= '' or offered > 0 or lost_token > 0
  if code == 0 and not others then return {code, token} end
  local left = math.max(0, until_ms - now_ms)
  if not others then return {code, token, owner, left, fresh or 0} end
  return {code, token, owner, left, fresh or 0, next_ticket, next_ttl, offered, lost, lost_token}
end
"""
)


def _script(body: str) -> Script:
    return Script(_LOCK + body)


ACQUIRE = _script("""
-- Further arguments: 6 owner, 7 milliseconds to hold, 8 milliseconds to wait.
-- Codes: 0 granted, 1 queued, 2 denied.
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
  grant(ticket, me, ttl_ms, 1, inbox)
end
if holder == ticket then return answer(0) end
return answer(wait_ms > 0 and 1 or 2, fresh)
""")

RENEW = _script("""
-- Further arguments: 6 milliseconds to hold. Codes: 0 held, 1 held by another, 2 free.
if holder == ticket then
  until_ms = now_ms + tonumber(ARGV[6])
  redis.call('HSET', state, 'u', until_ms, 'c', 1)
  keep(state, tonumber(ARGV[6]))
  return answer(0)
end
if holder ~= '' then return answer(1) end
pass_on()
return answer(holder == '' and 2 or 1)
""")

RELEASE = _script("""
-- Further arguments: 6 mode, 7 token. Codes as for RENEW. Modes:
--   '0' release the lock
--   '1' abandon the ticket: reject a request for it that arrives late or is repeated by a process that does not know
--   '2' release only what belongs to the own inbox
--   '3' as '2', but only if the holder does not know that it holds the lock
local had = tonumber(ARGV[7])
if ARGV[6] == '1' then redis.call('SET', KEYS[4], '', 'PX', GONE) end
if ARGV[6] == '2' or ARGV[6] == '3' then
  local row = redis.call('HGET', rows, ticket)
  local waiter_inbox = holder == ticket and s[7] or row and string.match(row, '^([^|]*)|')
  if waiter_inbox ~= inbox or (ARGV[6] == '3' and holder == ticket and s[5] == '1') then return answer(2) end
end
if holder == ticket then
  if ARGV[6] == '0' and had ~= token then redis.call('HSET', state, 's', token + 1) end -- Taken from its holder.
  holder, owner, until_ms = '', '', 0
  redis.call('HSET', state, 't', '', 'u', 0)
  pass_on()
  return answer(0)
end
local code = 2
local was_released = since > 0 and had >= since and (had < token or had == token and holder == '')
if leave(ticket) == 1 or was_released then
  code = 0 -- It was waiting, or this repeats a release whose reply was lost.
elseif holder ~= '' and ARGV[6] == '0' then
  code = 1
end
if holder == '' then pass_on() end
return answer(code)
""")

DESCRIBE = _script("""
if holder == '' then pass_on() end
-- Codes: 0 free, 1 held.
return answer(holder == '' and 0 or 1)
""")


class _Transport(PipelinedStore, Protocol):
    """`RedisStore` or `RedisClusterStore`."""

    def subscribe(self, *arguments: Any) -> ChannelSubscription: ...


class RedisLockStore:
    """`LockStore` and `PipelinedStore` for a Redis server or cluster.

    Without contention, acquiring and releasing a lock take one round trip each. Waiters are queued in Redis. Releasing
    a lock grants it to the first waiter in the same step. A waiter in the releasing process is notified by the reply, a
    waiter in another process through its inbox. Fencing tokens are microseconds of the server's clock, or the last
    token plus one.

    `transport` creates the store that sends the scripts. `clustered` is true if `PUBLISH` counts the receivers of one
    server only.
    """

    name = BACKEND
    capabilities = Capabilities(locks=True)
    poll: float | None = None
    max_batch = 128
    long_running: frozenset[type[Request[Any]]] = frozenset()

    def __init__(self, transport: Callable[..., _Transport], *, namespace: str, clustered: bool) -> None:
        self.listener: LockListener | None = None
        self.inbox = os.urandom(8).hex()
        self._prefix = f"{namespace}#lock:"
        self._clustered = clustered
        self._transport = store = transport(call=self.call)
        self.execute, self.submit, self.try_submit = store.execute, store.submit, store.try_submit
        self._is_open = False
        self._subscription: ChannelSubscription | None = None
        self._inbox_error: CacheError | None = None  # Why the inbox cannot be subscribed to.

    def __repr__(self) -> str:
        return f"<RedisLockStore over {self._transport!r}, {'listening' if self._subscription else 'no waiter yet'}>"

    async def open(self) -> None:
        await self._transport.open()
        self._is_open = True

    async def close(self) -> None:
        self._is_open = False  # Replies may arrive until the transport is closed.
        subscription, self._subscription, self._inbox_error = self._subscription, None, None
        try:
            if subscription is not None:
                await subscription.close()
        finally:
            await self._transport.close()

    def gauges(self) -> Gauges:
        return Gauges()

    # Commands

    def call(self, request: Request[Any]) -> ScriptCall:
        """Return the script call for a request."""
        name = getattr(request, "name", "")
        state = f"{self._prefix}{{{_tag(name)}}}"
        keys: list[Argument] = [state, f"{state}:queue", f"{state}:waiting"]
        ticket = getattr(request, "ticket", "")
        arguments: list[Argument] = [ticket, self.inbox, f"{self._prefix}to:", name, "1" if self._clustered else "0"]
        gone = f"{state}:gone:{ticket}"
        read: Callable[[Any], Reply]
        match request:
            case AcquireLock(owner=owner, ttl=ttl, wait=wait):
                keys.append(gone)
                arguments += [owner, _ms(ttl), _ms(wait)]
                script, read = ACQUIRE, partial(_acquired, ttl)
            case RenewLock(ttl=ttl):
                arguments.append(_ms(ttl))
                script, read = RENEW, partial(_held, Renewed(ttl), name)
            case ReleaseLock(token=token, abandon=abandon, unclaimed=unclaimed, offered=offered):
                keys.append(gone)
                arguments += ["1" if abandon else "3" if offered else "2" if unclaimed else "0", token]
                script, read = RELEASE, partial(_held, Released(), name)
            case DescribeLock():
                script, read = DESCRIBE, _described
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

        def make(reply: Any, now: float) -> Reply:
            passed_on = len(reply) > 5 and self._notify_listener(name, reply)
            answer = read(reply)
            if type(answer) is Released and self.listener is not None and not passed_on:
                # The queue is empty, so local waiters have lost their positions, for example after FLUSHALL.
                self.listener.look(name)
            if type(answer) is LockQueued:
                if self._subscription is None and self._is_open:
                    inbox = f"{self._prefix}to:{self.inbox}"
                    self._subscription = self._transport.subscribe(
                        inbox, self._on_offer, self._check_all, self._on_inbox_error
                    )
                if self._inbox_error is not None:
                    return Failed.of(self._inbox_error)
            return answer

        return [len(keys), *keys, *arguments], state, make, script

    def _notify_listener(self, name: str, reply: Any) -> bool:
        """Notify the listener of changes for other callers. Return `True` if one was granted or offered the lock."""
        token = reply[1]
        next_ticket, next_ttl, offered, lost, lost_token = reply[5:]
        if self.listener is None:
            return False
        if lost_token:
            self.listener.expired(name, lost.decode(), lost_token)
        if next_ticket:
            self.listener.granted(name, next_ticket.decode(), LockGranted(token, next_ttl / 1000))
        if offered:
            # Check again after the offer ends, in case that process is dead.
            self.listener.look(name, delay=CLAIM_MS / 1000 + 0.1)
        return bool(next_ticket or offered)

    # The inbox

    def _on_inbox_error(self, error: CacheError) -> None:
        if not error.transient:
            # For example, the user may not subscribe. Waiting would be pointless, so callers get the error at once.
            self._inbox_error = error
            self._check_all()

    def _on_offer(self, payload: bytes) -> None:
        ticket, _, name = payload.decode().partition("|")
        if self.listener is not None:
            self.listener.look(name, ticket)

    def _check_all(self) -> None:
        if self.listener is not None:
            self.listener.look_everywhere()


def _tag(name: str) -> str:
    """Return the hash tag for a name: the name itself, or a digest if it cannot stand between braces."""
    raw = name.encode("utf-8", "surrogatepass")
    if len(raw) <= 200 and name.isprintable() and "{" not in name and "}" not in name:
        return name
    return f"\x01{blake2b(raw, digest_size=32, person=b'cachebus.lock').hexdigest()}"


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _acquired(ttl: float, reply: Any) -> Reply:
    code, token = reply[:2]
    if code == 0:
        return LockGranted(token, ttl)
    owner, remaining, fresh = reply[2:5]
    if code == 1:
        return LockQueued(owner.decode(), remaining / 1000, bool(fresh))
    return LockDenied(owner.decode(), remaining / 1000)


def _held(good: Reply, name: str, reply: Any) -> Reply:
    code = reply[0]
    if code == 0:
        return good
    if code == 1:
        return Failed.of(LockNotOwned(name=name, owner=reply[2].decode()))
    return NotHeld()


def _described(reply: Any) -> Reply:
    if not reply[0]:
        return LockFree()
    token, owner, remaining = reply[1:4]
    return LockInfo(owner.decode(), token, remaining / 1000)
