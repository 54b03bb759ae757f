"""Rate limits in Redis: the algorithm of `common.rate_limit` as one script that uses the server's clock.

The state of a limit is stored under `<namespace>#rate:<name>`, so scans, patterns and `Clear` do not include it. It is
four doubles: the level, the server's time in microseconds, the limit, and `per` in microseconds. It expires when the
level is 0.
"""

from __future__ import annotations

from typing import Any

from cachebus.messages import Admit, Admitted, RateLimitDenied, Reply

from ..common.rate_limit import CLOCK_BACK, check_admit, microseconds, per_of
from .commands import ScriptCall
from .scripts import COMMON, Script

ADMIT = Script(f"""{COMMON}
-- ARGV: limit, per in microseconds, burst, cost, wait in microseconds. Returns 1 or 0, the units left, the delay in
-- microseconds, and the microseconds until the level is 0.
local limit, per, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local at, level = now, 0
local raw = redis.call('GET', KEYS[1])
if raw and #raw == 32 then
  local kept, stamp, old_limit, old_per = struct.unpack('>dddd', raw)
  if stamp - now > {CLOCK_BACK} then
    -- The clock was set back. Store the new time even if the request is denied: otherwise the level would not fall
    -- until the clock has caught up.
    stamp = now
    redis.call('SET', KEYS[1], struct.pack('>dddd', kept, now, old_limit, old_per),
      'PX', math.ceil(kept / old_limit / 1000))
  end
  if stamp > now then at = stamp end
  level = math.max(0, kept - (at - stamp) * old_limit)
  if old_per ~= per then level = math.ceil(level * per / old_per) end
end
local room, after = burst * per, level + tonumber(ARGV[4]) * per
local lag, delay = at - now, 0
if after > room then delay = lag + math.ceil((after - room) / limit) end
if delay > tonumber(ARGV[5]) then
  return {{0, math.floor(math.max(0, room - level) / per), delay, lag + math.ceil(level / limit)}}
end
local reset = lag + math.ceil(after / limit)
redis.call('SET', KEYS[1], struct.pack('>dddd', after, at, limit, per), 'PX', math.ceil(reset / 1000))
return {{1, math.floor(math.max(0, room - after) / per), delay, reset}}
""")


def admit_call(request: Admit, prefix: str) -> ScriptCall:
    """Return the script call for a request. `prefix` is the key prefix of the namespace. Raises `BadMessage`."""
    check_admit(request)
    name, per, wait = f"{prefix[:-1]}#rate:{request.key}", per_of(request), microseconds(request.wait)
    return [1, name, request.limit, per, request.burst, request.cost, wait], name, _admitted, ADMIT


def _admitted(reply: Any, now: float) -> Reply:
    admitted, remaining, delay, reset = reply
    if admitted:
        return Admitted(remaining, reset / 1e6, delay / 1e6)
    return RateLimitDenied(remaining, delay / 1e6, reset / 1e6)
