"""The slots of a Redis Cluster: which server has which, where a redirection leads, and what is under way in each.

Keys are assigned to slots by CRC16 (XMODEM), of the key or of its hash tag: Redis Cluster Specification, "Key
distribution model".
"""

from __future__ import annotations

from binascii import crc_hqx
from collections import deque
from collections.abc import Iterable
from typing import Any

from cachebus.messages import CacheConnectionError

from .redis_connect import Endpoint
from .redis_connection import Waiters
from .redis_errors import BACKEND

SLOTS = 16384

REMEMBERED = 64
"""How many of what went out in a slot are remembered, while it has something under way."""


def slot_of(name: str) -> int:
    """The slot of a key as it stands in the server. Raises `UnicodeEncodeError` for what is no valid Unicode."""
    key = name.encode()
    opened = key.find(b"{")
    if opened >= 0:
        closed = key.find(b"}", opened + 1)
        if closed > opened + 1:
            key = key[opened + 1 : closed]
    return crc_hqx(key, 0) % SLOTS


def tag_of(slot: int) -> bytes:
    """Two bytes that, as a hash tag, put a key into a slot."""
    for top in range(4):  # A slot is 14 bits of 16: four pairs have it, and one without a brace will do.
        crc = slot | top << 14
        # Backwards through the checksum: its low byte says which step was the last one.
        last = _STEPS[crc & 0xFF]
        first = _STEPS[crc >> 8 ^ _step(last) >> 8]
        tag = bytes((first, last ^ _step(first) >> 8))
        if b"}" not in tag:
            return tag
    raise AssertionError("all four pairs have a brace")


def _step(byte: int) -> int:
    return crc_hqx(bytes((byte,)), 0)


_STEPS = {_step(byte) & 0xFF: byte for byte in range(256)}


class SlotMap:
    """Which server has which slot, as far as we know. `version` grows when a slot has changed hands."""

    def __init__(self) -> None:
        self.version = 0
        self._owners: dict[int, Endpoint] = {}

    def __repr__(self) -> str:
        return f"<SlotMap of {len(self._owners)} slots at {len(self.places())} servers>"

    def place(self, slot: int) -> Endpoint:
        """The server that has a slot. Raises `CacheConnectionError` where there is none."""
        owner = self._owners.get(slot)
        if owner is None:
            raise CacheConnectionError(f"no server of the cluster has the slot {slot}", BACKEND)
        return owner

    def places(self) -> list[Endpoint]:
        """Every server that has slots, in an order that does not depend on which slots."""
        return sorted(set(self._owners.values()), key=str)

    def move(self, slot: int, place: Endpoint) -> bool:
        """Take in where a slot is. `False` if that is known already."""
        if self._owners.get(slot) == place:
            return False
        self._owners[slot] = place
        self.version += 1
        return True

    def replace(self, owners: dict[int, Endpoint]) -> list[int]:
        """Take in a whole map, and say which slots have another owner by it."""
        changed = [slot for slot, place in owners.items() if self._owners.get(slot) != place]
        self._owners = owners
        self.version += bool(changed)
        return changed


def read_slots(reply: Any, asked: Endpoint) -> dict[int, Endpoint]:
    """The owners of all slots, by the reply of the server `asked` to `CLUSTER SLOTS`."""
    owners: dict[int, Endpoint] = {}
    for first, last, master, *_ in reply:
        # A server that does not know its own name gives none: it is where we found it.
        host = (master[0] or b"").decode()
        place = Endpoint(asked.host if host in ("", "?") else host, int(master[1]))
        for slot in range(first, last + 1):
            owners[slot] = place
    return owners


def read_redirection(reply: str, asked: Endpoint) -> tuple[int, Endpoint]:
    """The slot and the server that `MOVED 3999 10.0.0.1:6381` or `ASK ...` names, said by the server `asked`."""
    _, slot, target = reply.split(" ")[:3]
    host, _, port = target.rpartition(":")
    return int(slot), Endpoint(asked.host if host in ("", "?") else host, int(port))


class SlotTraffic:
    """What is under way in each slot, so that nothing overtakes what is sent once more.

    A slot is *held* from a redirection until all that was under way in it has its answer: what is sent then goes to the
    new server, and would be there before what the old one has not yet sent on. `change` waits until a slot has become idle.
    """

    def __init__(self) -> None:
        self._under_way: dict[int, int] = {}
        self._sent: dict[int, deque[object]] = {}
        self._newest_change: dict[int, object] = {}
        self._held: set[int] = set()
        self._waiters = Waiters()
        self.change = self._waiters.change

    def __repr__(self) -> str:
        return f"<SlotTraffic in {len(self._under_way)} slots, {len(self._held)} held>"

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._under_way

    def begin(self, slot: int, what: object, *, changes: bool = True) -> None:
        """Note that `what` goes out, and whether it may change anything."""
        self._under_way[slot] = self._under_way.get(slot, 0) + 1
        sent = self._sent.get(slot)
        if sent is None:
            sent = self._sent[slot] = deque(maxlen=REMEMBERED)
        sent.append(what)
        if changes:
            self._newest_change[slot] = what

    def end(self, slot: int) -> None:
        """Note that something of a slot has its answer."""
        left = self._under_way[slot] - 1
        if left:
            self._under_way[slot] = left
            return
        del self._under_way[slot], self._sent[slot]
        self._newest_change.pop(slot, None)
        self._held.discard(slot)
        self._waiters.wake()

    def is_newest(self, slot: int, what: object) -> bool:
        """Whether nothing of the slot went out after `what`."""
        return slot in self._sent and self._sent[slot][-1] is what

    def later(self, slot: int, what: object) -> list[object] | None:
        """What went out in the slot after `what`; `None` if that was too much to be remembered."""
        sent = list(self._sent.get(slot, ()))
        for at, each in enumerate(sent):
            if each is what:
                return sent[at + 1 :]
        return None

    def is_newest_change(self, slot: int, what: object) -> bool:
        """Whether nothing that may change anything in the slot went out after `what`."""
        return self._newest_change.get(slot) is what

    def hold(self, slot: int) -> None:
        """Let nothing new out until the slot is idle."""
        if slot in self._under_way:
            self._held.add(slot)

    def is_held(self, slots: Iterable[int]) -> bool:
        """Whether one of the slots is held."""
        return bool(self._held) and not self._held.isdisjoint(slots)
