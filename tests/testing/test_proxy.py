from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from cachebus.testing.proxy import Mode, Proxy


class Echo(socketserver.ThreadingTCPServer):
    """Says back what it hears, and remembers it."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.heard = b""
        super().__init__(("127.0.0.1", 0), EchoHandler)


class EchoHandler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        echo = self.server
        assert isinstance(echo, Echo)
        try:
            while data := self.request.recv(65536):
                echo.heard += data
                self.request.sendall(data)
        except ConnectionError:
            pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.server_address[1]) as running:
        yield running


def connect(proxy: Proxy, timeout: float = 10.0) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout)


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


@pytest.mark.parametrize("mode", ["pass", "latency", "trickle"])
def test_what_is_said_arrives_whole_in_the_modes_that_only_slow_it_down(proxy: Proxy, mode: Mode) -> None:
    proxy.switch(mode, seconds=0.01)
    said = bytes(range(256)) * 20
    with connect(proxy) as connection:
        connection.sendall(said)
        assert receive(connection, len(said)) == said
    assert proxy.connections == 1
    assert proxy.bytes_in == proxy.bytes_out == len(said)


def test_refuse_ends_open_connections_and_takes_no_new_ones_until_it_is_over(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
        proxy.switch("refuse")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.switch("pass")
    with connect(proxy) as connection:
        connection.sendall(b"b")
        assert receive(connection, 1) == b"b"


def test_reset_comes_in_the_middle_of_a_reply(proxy: Proxy) -> None:
    proxy.switch("reset")
    with connect(proxy) as connection:
        connection.sendall(b"12345678")
        assert receive(connection, 4) == b"1234"
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_half_open_accepts_and_says_nothing_and_delivers_when_it_is_over(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as early:
        early.sendall(b"x")
        assert receive(early, 1) == b"x"
        proxy.switch("half_open")
        with connect(proxy) as late:
            for connection in (early, late):
                connection.sendall(b"y")
                connection.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
                connection.settimeout(10)
            assert echo.heard == b"x"
            proxy.switch("pass")
            assert receive(early, 1) == receive(late, 1) == b"y"


def test_lose_reply_asks_the_server_and_keeps_the_answer(proxy: Proxy, echo: Echo) -> None:
    proxy.switch("lose_reply")
    with connect(proxy) as connection:
        connection.sendall(b"done")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert echo.heard == b"done"
    assert proxy.bytes_out == 0


def test_garbage_changes_every_byte_of_a_reply(proxy: Proxy, echo: Echo) -> None:
    proxy.switch("garbage")
    with connect(proxy) as connection:
        connection.sendall(b"+OK\r\n")
        reply = receive(connection, 5)
    assert echo.heard == b"+OK\r\n"
    assert all(one != other for one, other in zip(reply, b"+OK\r\n", strict=True))


def test_cut_ends_every_open_connection_and_leaves_the_door_open(proxy: Proxy) -> None:
    with connect(proxy) as first, connect(proxy) as second:
        for each in (first, second):
            each.sendall(b"a")
            assert receive(each, 1) == b"a"
        assert proxy.open_connections == 2
        proxy.cut()
        for each in (first, second):
            with pytest.raises(ConnectionResetError):
                each.recv(1)
    with connect(proxy) as third:
        third.sendall(b"b")
        assert receive(third, 1) == b"b"


def test_a_url_keeps_all_but_the_place() -> None:
    proxy = Proxy("10.0.0.1", 6379)
    proxy.port = 5
    assert proxy.url("redis://u:p%40@10.0.0.1:6379/3?a=b") == "redis://u:p%40@127.0.0.1:5/3?a=b"


def test_an_unknown_mode_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ValueError, match="half_open"):
        Proxy("127.0.0.1", 1, "sluggish")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_slow_line_needs_a_speed() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Proxy("127.0.0.1", 1, "slow")
