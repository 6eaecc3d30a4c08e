"""Which network interface leads to the Router: the ranks of a group must reach each other the same way.

Left alone, gloo takes the interface that the host's name resolves to, which on many machines is the loopback.
"""

from __future__ import annotations

import socket

import psutil

_ANY_PORT = 9
"""Nothing is sent: a datagram socket that is connected only asks the kernel for its route."""


def interface_towards(host: str) -> str | None:
    """The interface with the address from which this machine reaches `host`; None where no interface has it."""
    family, kind, _, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        source = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == family and entry.address.partition("%")[0] == source for entry in addresses):
            return name
    return None
