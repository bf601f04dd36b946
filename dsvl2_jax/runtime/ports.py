"""Where processes that share a mesh listen: at the address that they are told, and no more widely than that needs.

Tested in tests/security/test_network.py.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
import socket

_BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # jax's own setting of where process 0 listens


@dataclasses.dataclass(frozen=True)
class Ports:
    """Attributes:
    bind: HOST:PORT that process 0 listens at; None: jax's choice, which is every address of the host.
    is_local: only processes of this host can reach any of them.
    """

    bind: str | None
    is_local: bool

    @staticmethod
    def of(coordinator: str | None) -> Ports:
        """Those for a coordinator's HOST:PORT, or None for one that jax finds.

        An IP address of this host, or localhost, is listened at and no other. Everything else has process 0 listen at
        every address: others may know it by a name that stands for another address here, or by one of a gateway.
        """
        if coordinator is None or _BIND in os.environ:
            return Ports(None, False)
        host = _host(coordinator)
        if host == "localhost":
            return Ports(coordinator, True)
        try:
            address = ipaddress.ip_address(host)
            with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6) as probe:
                probe.bind((host, 0))
        except (ValueError, OSError):
            return Ports(None, False)
        return Ports(coordinator, address.is_loopback)

    def place_collectives(self) -> None:
        """Has gloo, between CPUs, listen at a local address too, where it would take that of the host's name.

        Called by each process after `jax.distributed.initialize`, and before jax is used for anything else.
        """
        if not self.is_local:
            return
        from jax._src import distributed, xla_bridge
        from jax._src.lib import _jax

        gloo = _jax.make_gloo_tcp_collectives(distributed.global_state.client, hostname=_host(self.bind))
        make_client = functools.partial(xla_bridge.make_cpu_client, gloo)
        xla_bridge.register_backend_factory("cpu", make_client, fail_quietly=False)

    def warning(self, coordinator: str) -> str:
        """What to say when not `is_local`."""
        every = f"every address of this host, port {coordinator.rpartition(':')[2]}"
        return (
            f"process 0 listens at {self.bind or os.environ.get(_BIND) or every}, and each process at a port for its "
            "data, without encryption and without asking who is there (unauthenticated): whoever can reach them may be "
            "able to run code. Use a network of your own."
        )


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
