"""Talks with a real Memcached, one command at a time: who says the next one is up to the test.

What happens between two commands of one piece cannot be had by chance alone, and is where a race is lost.
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
"""What a client does: it stops before each command, and returns what came of it."""


class Client:
    """One client of a server, with a connection of its own."""

    def __init__(self, server: Server, namespace: str) -> None:
        self.connection: Connection = connect(Endpoint(server.host, server.port), SYSTEM_CLOCK)
        self._values = Values(Keys(namespace), None, False)

    def close(self) -> None:
        self.connection.close()

    def steps(self, request: Any) -> Steps:
        """Carry out a request, stopping before each command."""
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
        """Carry out a request in one go."""
        return finish(self.steps(request))

    def forget_tags(self) -> None:
        """Know nothing of the tags of keys, as a client that has just come."""
        self._values.memory.names.clear()


def finish(steps: Steps) -> Any:
    """What comes of all the steps that are left."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def interleave(first: Steps, second: Steps, when: Sequence[int]) -> tuple[Any, Any]:
    """What comes of both: the n-th step of `second` is made when `first` has made `when[n]` of its own."""
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
    """Every way in which `others` steps can lie between `length` steps."""
    return itertools.combinations_with_replacement(range(length + 1), others)


def count(make: Callable[[], Steps]) -> int:
    """How many steps there are."""
    return sum(1 for _ in make())
