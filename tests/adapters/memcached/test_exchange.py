"""An exchange without a server: the test passes in the bytes and sets the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cachebus.adapters.memcached.connection import MISS, RESYNC, STALL, Answer, Connection, Exchange
from cachebus.messages import CacheConnectionError, CacheError, Failed

STATISTICS = b"STAT version 1.6.18\r\nSTAT time 1700000000\r\nSTAT uptime 5\r\nEND\r\n"
TIMEOUT = 1.0


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def monotonic(self) -> float:
        return self.at

    def wall(self) -> float:
        return 1_700_000_000.5

    async def sleep_until(self, when: float) -> None:
        raise AssertionError("nothing sleeps here")


class Socket:
    """Socket whose other end is the test."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.unsent = 0
        self.closed = False

    @property
    def write(self) -> Callable[[bytes], None]:
        return self.sent.append

    def set_protocol(self, protocol: Any) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.closed = True


class Armed:
    def __init__(self, when: float, callback: Callable[[], Any]) -> None:
        self.when, self.callback = when, callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Timers:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.armed: list[Armed] = []

    def call_at(self, when: float, callback: Callable[[], Any], /) -> Armed:
        self.armed.append(Armed(when, callback))
        return self.armed[-1]

    def call_after(self, delay: float, callback: Callable[[], Any], /) -> Armed:
        return self.call_at(self.clock.at + delay, callback)

    def run(self) -> None:
        """Run the timers that are due."""
        due = [each for each in self.armed if not each.cancelled and each.when <= self.clock.at]
        self.armed = [each for each in self.armed if each not in due]
        for timer in due:
            timer.callback()

    def fire(self, late: float = 0.0) -> None:
        """Run the only active timer at its time, or `late` seconds after it."""
        (timer,) = [each for each in self.armed if not each.cancelled]
        self.armed.clear()
        self.clock.at = max(self.clock.at, timer.when + late)
        timer.callback()


class Line:
    """A connection after its handshake."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.socket = Socket()
        self.timers = Timers(self.clock)
        self.results: list[Any] = []
        clock: Any = self.clock
        transport: Any = self.socket
        self.connection = Connection("here:1", transport, clock, self.timers, TIMEOUT)
        self.connection.begin(asking(b"version\r\n"), self.results.append)
        self.connection.data_received(STATISTICS)
        self.connection.data_received(b"EN\r\n")
        assert self.results == [[MISS]]
        self.results.clear()
        self.socket.sent.clear()


def asking(*commands: bytes) -> Exchange[list[Answer]]:
    """Return an exchange that sends all of these commands at once."""
    return (yield b"".join(commands), len(commands))


@pytest.fixture
def line() -> Line:
    return Line()


def test_answers_may_come_in_pieces_of_any_size(line: Line) -> None:
    answers = (
        b"VA 4 c7\r\nV\r\n1\r\nEN\r\nHD c9\r\nVA 0 c8\r\n\r\nNS\r\nEX\r\nSERVER_ERROR out of memory storing object\r\n"
    )
    for size in range(1, len(answers) + 1):
        line.connection.begin(asking(*[b"mg a v c\r\n"] * 7), line.results.append)
        for at in range(0, len(answers), size):
            line.connection.data_received(answers[at : at + size])
        got = line.results.pop()
        assert got[:-1] == [(b"V\r\n1", 7), MISS, 9, (b"", 8), -2, -3], size
        assert isinstance(got[-1], CacheError)
    assert not line.socket.closed


@pytest.mark.parametrize(
    "said",
    [
        b"XX\r\n",
        b"VA x c1\r\n",
        b"VA -1 c1\r\n",
        b"VA 5 t1\r\n",
        b"VA 2 c1\r\nabcd\r\n",
        b"VA 99999999999 c1\r\n",
        b"HD x\r\n",
        b"EN\r\nEN\r\n",
        b"x" * 5000,
        b"VA 1\r\n",
        b"SERVER_ERROR what\r\n",
        b"HD c\xff\r\n",
        b"\r\n",
    ],
)
def test_broken_framing_drops_the_connection_and_answers_the_exchange(line: Line, said: bytes) -> None:
    line.connection.begin(asking(b"mg a v c\r\n"), line.results.append, 3)
    line.connection.data_received(said)
    assert line.socket.closed
    assert [type(reply) for reply in line.results.pop()] == [Failed] * 3
    line.connection.data_received(b"EN\r\n")  # Late data, after the exchange has ended.
    assert line.results == []


def test_a_word_that_nobody_asked_for_drops_the_connection(line: Line) -> None:
    line.connection.data_received(b"EN\r\n")
    assert line.socket.closed
    assert isinstance(line.connection.lost, CacheConnectionError)


def test_silence_ends_an_exchange_at_its_time(line: Line) -> None:
    started = line.clock.at
    line.connection.begin(asking(b"mg a v c\r\n"), line.results.append)
    while not line.results:
        line.timers.fire()
    assert isinstance(line.results[0], CacheConnectionError)
    assert "no answer within 1 s" in str(line.results[0])
    assert TIMEOUT <= line.clock.at - started < TIMEOUT + 0.1
    assert line.socket.closed


def test_the_time_of_an_exchange_grows_with_what_is_sent(line: Line) -> None:
    started = line.clock.at
    line.connection.begin(asking(bytes(5_000_000)), line.results.append)
    line.timers.fire()
    assert line.results == []
    while not line.results:
        line.timers.fire()
    assert line.clock.at - started > TIMEOUT + 4


def test_bytes_that_arrive_extend_an_exchange_and_a_trickle_does_not(line: Line) -> None:
    connection, started = line.connection, line.clock.at
    connection.begin(asking(b"mg a v c\r\n"), line.results.append)
    connection.data_received(b"VA 1000000 c5\r\n")
    for _ in range(10):
        # A slow connection: bytes have arrived each time the timer runs.
        connection.data_received(bytes(100_000))
        line.timers.fire()
        assert line.results == []
    connection.data_received(b"\r\n")
    assert line.results.pop() == [(bytes(1_000_000), 5)]
    assert line.clock.at - started > 5 * TIMEOUT
    assert connection.last_progress == line.clock.at
    line.timers.fire()  # Nothing is in flight.

    connection.begin(asking(b"mg a v c\r\n"), line.results.append)
    connection.data_received(b"VA 1000000 c5\r\n")
    started = line.clock.at
    while not line.results:
        line.clock.at += 0.02
        connection.data_received(b"x")
        line.timers.run()
    assert line.clock.at - started < TIMEOUT + 0.2
    assert isinstance(line.results.pop(), CacheConnectionError)


def test_bytes_that_leave_extend_an_exchange(line: Line) -> None:
    line.socket.unsent = 400_000
    line.connection.begin(asking(bytes(400_000)), line.results.append)
    line.timers.fire()  # The timer of a previous exchange.
    for unsent in (300_000, 200_000, 100_000):
        line.socket.unsent = unsent
        line.timers.fire()
        assert line.results == []
        assert line.connection.last_progress == line.clock.at
    while not line.results:  # No more bytes are sent.
        line.timers.fire()
    assert isinstance(line.results.pop(), CacheConnectionError)


def test_a_timer_that_is_late_lets_what_has_come_be_heard_first(line: Line) -> None:
    line.connection.begin(asking(b"mg a v c\r\n"), line.results.append)
    line.timers.fire(late=5.0)  # The event loop was blocked.
    assert line.results == []
    line.connection.data_received(b"EN\r\n")
    assert line.results == [[MISS]]
    line.connection.begin(asking(b"mg a v c\r\n"), line.results.append)
    line.timers.fire(late=5.0)
    line.timers.fire(late=STALL / 2)
    assert isinstance(line.results[-1], CacheConnectionError)


def test_the_clock_of_the_server_is_read_once_more_within_an_exchange(line: Line) -> None:
    line.clock.at += RESYNC + 1
    line.connection.begin(asking(b"mg a v c\r\n"), line.results.append)
    assert line.socket.sent == [b"stats\r\n"]
    line.connection.data_received(STATISTICS)
    assert line.socket.sent[1:] == [b"mg a v c\r\n"]
    line.connection.data_received(b"EN\r\n")
    assert line.results == [[MISS]]


def test_closing_answers_the_exchange_in_flight(line: Line) -> None:
    line.connection.begin(asking(b"mg a v c\r\n"), line.results.append, 2)
    line.connection.close()
    assert [type(reply) for reply in line.results.pop()] == [Failed] * 2
    assert line.socket.closed


def test_a_fault_of_ours_answers_the_exchange_and_is_raised(line: Line) -> None:
    def faulty() -> Exchange[None]:
        yield b"mg a v c\r\n", 1
        raise ZeroDivisionError

    line.connection.begin(faulty(), line.results.append, 1)
    with pytest.raises(ZeroDivisionError):
        line.connection.data_received(b"EN\r\n")
    (reply,) = line.results.pop()
    assert "cannot process an answer" in reply.detail
    assert line.socket.closed
