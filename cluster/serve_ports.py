"""Where the replicas of Ray Serve listen for each other."""

from __future__ import annotations

from typing import Any


def listen_on_node_address() -> None:
    """Let this process's replica listen on its node's own address: Serve would take all interfaces.

    To be called in a deployment's constructor, after which Serve opens that port. Serve has no setting for it.
    """
    import ray
    from ray.serve._private import replica as serve_replica

    replica: Any = serve_replica
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray has no types there
    add_port = replica.add_port_to_grpc_server

    def add_port_here(server: Any, _address: str) -> int:
        port: int = add_port(server, f"[{host}]:0" if ":" in host else f"{host}:0")
        return port

    replica.add_port_to_grpc_server = add_port_here
