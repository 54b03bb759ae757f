"""Exchanges with a real Memcached, one command at a time: the test decides which client sends the next command.

Races happen between two commands of one exchange, and rarely occur by chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from cachebus.actors.ports import SYSTEM_CLOCK
from cachebus.adapters.memcached.connection import Connection
from cachebus.adapters.memcached.keys import Keys
from cachebus.adapters.memcached.planner import plan
from cachebus.adapters.memcached.server import Endpoint
from cachebus.adapters.memcached.values import Values
from cachebus.testing.servers import Server

from .real_server_memcached import ask, asking, commands_of, connect

Steps = Generator[None, None, Any]
"""Operation of a client: stops before each command, and returns its result."""


class Client:
    """Client of a server, with a separate connection."""

    def __init__(self, server: Server, namespace: str) -> None:
        self.connection: Connection = connect(Endpoint(server.host, server.port), SYSTEM_CLOCK)
        self._values = Values(Keys(namespace), None, False)

    def close(self) -> None:
        self.connection.close()

    def steps(self, request: Any) -> Steps:
        """Execute a request, stopping before each command."""
        talk = plan(self.connection, self._values, [request])
        try:
            question = next(talk)
            while True:
                answers: list[Any] = []
                for command in commands_of(question[0]):
                    yield
                    answers += ask(self.connection, asking(command))
                question = talk.send(answers)
        except StopIteration as done:
            return done.value[0] if isinstance(done.value, list) else done.value

    def do(self, request: Any) -> Any:
        """Execute a request without stopping."""
        return finish(self.steps(request))

    def forget_tags(self) -> None:
        """Forget the tags of all keys, like a new client."""
        self._values.memory.names.clear()


def finish(steps: Steps) -> Any:
    """Run the remaining steps and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def interleave(first: Steps, second: Steps, when: Sequence[int]) -> tuple[Any, Any]:
    """Run both and return their results. The n-th step of `second` runs after `when[n]` steps of `first`."""
    made, results = 0, [None, None]
    ended = [False, False]

    def step(which: int, steps: Steps) -> None:
        if not ended[which]:
            try:
                next(steps)
            except StopIteration as done:
                ended[which], results[which] = True, done.value

    for moment in when:
        while made < moment and not ended[0]:
            step(0, first)
            made += 1
        step(1, second)
    for which, steps in ((1, second), (0, first)):
        while not ended[which]:
            step(which, steps)
    return results[0], results[1]


def moments(length: int, others: int) -> Iterator[tuple[int, ...]]:
    """Return all interleavings of `others` steps with `length` steps."""
    return itertools.combinations_with_replacement(range(length + 1), others)


def count(make: Callable[[], Steps]) -> int:
    """Return the number of steps."""
    return sum(1 for _ in make())
