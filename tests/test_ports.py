"""HeldPorts: a port that nobody else gets before, or between, two lives of its server."""

from __future__ import annotations

import errno
import socket

import pytest

from cluster.ports import HeldPorts

HERE = "127.0.0.1"


def test_a_server_listens_on_a_held_port_again_and_again() -> None:
    with HeldPorts() as ports:
        port = ports.hold(HERE)
        for _ in range(2):
            with socket.create_server((HERE, port)), socket.create_connection((HERE, port), timeout=5):
                pass


def test_a_port_that_a_server_has_is_refused() -> None:
    with socket.create_server((HERE, 0)) as server, HeldPorts() as ports:
        with pytest.raises(OSError, match="in use") as refused:
            ports.hold(HERE, server.getsockname()[1])
        assert refused.value.errno == errno.EADDRINUSE


def test_nobody_who_asks_for_a_free_port_gets_a_held_one() -> None:
    with HeldPorts() as mine, HeldPorts() as others:
        held = {mine.hold(HERE) for _ in range(50)}
        assert len(held) == 50
        assert not held & {others.hold(HERE) for _ in range(500)}


def test_who_does_not_share_cannot_take_a_held_port() -> None:
    with HeldPorts() as ports, socket.socket() as client, pytest.raises(OSError, match="in use"):
        client.bind((HERE, ports.hold(HERE)))


def test_its_end_lets_the_ports_go() -> None:
    with HeldPorts() as ports:
        port = ports.hold(HERE)
    with socket.socket() as client:
        client.bind((HERE, port))
