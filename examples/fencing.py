"""Why a lock has a token: a holder that was stopped past its lease writes late, and the resource refuses it.

`python examples/fencing.py [URL]` plays it on the memory store, or on that of a URL. It takes two seconds.
"""

from __future__ import annotations

import asyncio
import sys

from cachebus import CacheError, open_cache


class Account:
    """A resource that takes no write with a token older than one that it has seen. With a database it is a column and a
    condition: `UPDATE ... WHERE fence <= :token`."""

    def __init__(self) -> None:
        self.balance = 100
        self.fence = 0

    def write(self, balance: int, token: int) -> bool:
        """Whether the write was taken."""
        if token < self.fence:
            return False
        self.balance, self.fence = balance, token
        return True


async def play(url: str) -> list[str]:
    """What happened, line by line."""
    said: list[str] = []
    account = Account()
    async with open_cache(url) as cache:
        # As if its process were stopped: it does not renew its lease.
        slow = await cache.lock("account", ttl=0.5, renew=False, owner="slow").acquire()
        seen = account.balance
        said.append(f"slow has the lock and reads {seen}")
        async with cache.lock("account", wait=10, owner="quick") as quick:
            said.append(f"quick has the lock, with a larger token: {quick.token > slow.token}")
            taken = account.write(account.balance - 30, quick.token)
            said.append(f"quick takes 30: {taken}")
        taken = account.write(seen - 50, slow.token)
        said.append(f"slow goes on and takes 50 of the {seen} that it saw: {taken}")
        said.append(f"slow could have known: {slow.lost}")
        try:
            await slow.release()
        except CacheError as error:
            said.append(f"slow is told: {type(error).__name__}")
        said.append(f"the balance is {account.balance}")
    return said


if __name__ == "__main__":
    print("\n".join(asyncio.run(play(sys.argv[1] if len(sys.argv) > 1 else "memory://"))))
