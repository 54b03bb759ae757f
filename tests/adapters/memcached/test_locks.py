"""A Memcached lock that changes between two commands of its release."""

from __future__ import annotations

from typing import Any

import pytest

from cachebus.adapters.memcached.connection import EXISTS, MISS
from cachebus.adapters.memcached.locks import BACK, _Locks
from cachebus.messages import LockNotOwned, NotHeld, Released, ReleaseLock


class Standing:
    """Fake connection whose clock stands still."""

    def now(self) -> float:
        return 0.0


@pytest.mark.parametrize("next_holder", [True, False])
def test_one_that_was_lost_between_looking_and_deleting_leaves_no_note(next_holder: bool) -> None:
    connection: Any = Standing()
    talk = _Locks(connection, "ns").run([ReleaseLock("a", "t1", "me", 7)])
    commands, count = next(talk)
    assert commands.startswith(b"mg ")
    commands, count = talk.send([(b"1000|t1|me", 5)])
    assert commands.startswith(b"md ")
    assert commands.endswith(BACK + b"\r\n")
    assert count == 2
    commands, count = talk.send([EXISTS if next_holder else MISS, 0])
    assert commands.startswith(b"md ")
    assert b"-" in commands, "the release note is deleted, not the lock"
    commands, count = talk.send([0])
    assert commands.startswith(b"mg ")
    commands, count = talk.send([(b"1000|t2|you", 6)] if next_holder else [MISS])
    assert commands.startswith(b"mg ")
    with pytest.raises(StopIteration) as done:
        talk.send([MISS])
    (reply,) = done.value.value
    assert reply != Released()
    if next_holder:
        assert isinstance(reply.error(), LockNotOwned)
    else:
        assert reply == NotHeld()
