"""Why a lock has a fencing token: the resource refuses a late write of a paused holder whose lease has expired.

Run `python examples/fencing.py [URL]`. It uses the memory store unless you give the URL of a store, and takes two
seconds.
"""

from __future__ import annotations

import asyncio
import sys

from cachebus import CacheError, open_cache


class Account:
    """Resource that refuses writes with a token older than the newest one seen.

    In a database, use a column and a condition: `UPDATE ... WHERE fence <= :token`.
    """

    def __init__(self) -> None:
        self.balance = 100
        self.fence = 0

    def write(self, balance: int, token: int) -> bool:
        """Write the balance; return `True` if the token was accepted."""
        if token < self.fence:
            return False
        self.balance, self.fence = balance, token
        return True


async def play(url: str) -> list[str]:
    """Run the example and return its story, line by line."""
    story: list[str] = []
    account = Account()
    async with open_cache(url) as cache:
        # Simulate a paused process: the lease is not renewed.
        slow = await cache.lock("account", ttl=0.5, renew=False, owner="slow").acquire()
        seen = account.balance
        story.append(f"slow acquires the lock and reads {seen}")
        async with cache.lock("account", wait=10, owner="quick") as quick:
            story.append(f"quick acquires the lock, with a larger token: {quick.token > slow.token}")
            taken = account.write(account.balance - 30, quick.token)
            story.append(f"quick withdraws 30: {taken}")
        taken = account.write(seen - 50, slow.token)
        story.append(f"slow resumes and withdraws 50 of the {seen} that it read: {taken}")
        story.append(f"slow can see that it lost the lock: {slow.lost}")
        try:
            await slow.release()
        except CacheError as error:
            story.append(f"slow releases the lock: {type(error).__name__}")
        story.append(f"the balance is {account.balance}")
    return story


if __name__ == "__main__":
    print("\n".join(asyncio.run(play(sys.argv[1] if len(sys.argv) > 1 else "memory://"))))
