"""A script in Lua as the server knows it, and what most of ours begin with.

`TIME` is taken once a script. A version is larger than that of the value before it even if the clock was set back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_COMMON = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local now_ms = math.floor(now / 1000)

-- The version and the expiry of what is stored, whether anything is, and its form. What is not ours has version 0.
local function head(key)
  local raw = redis.pcall('GETRANGE', key, 0, 16)
  if type(raw) ~= 'string' then return 0, 0, true end
  if #raw < 16 then return 0, 0, #raw > 0 end
  local version, expiry = struct.unpack('>dd', raw)
  -- A lease is no value, and neither is what is only kept to be served stale.
  if version == -1 or (expiry > 0 and expiry <= now_ms) then return 0, 0, false end
  if not (version >= 1 and version < 9007199254740992 and version == math.floor(version)) then return 0, 0, true end
  return version, expiry, true, string.byte(raw, 17)
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
        return cls.bare(_COMMON + body)

    @classmethod
    def bare(cls, text: str) -> Script:
        """The script as it is."""
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
