"""Processes that share a mesh listen where they are told, and say aloud that their ports are open to whoever comes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import quick_compilation

from dsvl2_jax.runtime import ports
from dsvl2_jax.runtime.ports import Ports

MEET = """
import sys
from dsvl2_jax.runtime import processes
processes.Processes("2", sys.argv[1], int(sys.argv[2]), 120).join({})
processes.from_first(lambda: "opens the ports of the data too")
import json
sys.path.insert(0, sys.argv[3])
import audited
print(json.dumps(audited.listening()), flush=True)
processes.gather("both have looked")
processes.end(0)
"""


def test_the_multi_process_port_binds_where_it_is_told(tmp_path):
    host = "127.0.0.2"  # not the address of this machine's name
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    tests = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-c", MEET, f"{host}:{port}"]
    environment = os.environ | {"XLA_FLAGS": quick_compilation.FLAGS}
    pair = [
        subprocess.Popen([*command, str(i), tests], env=environment, stdout=-1, stderr=-1, text=True, cwd=tmp_path)
        for i in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=180) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], told
    found = [json.loads(out.splitlines()[-1]) for out, _ in told]
    assert len(found[0]) >= 2 and len(found[1]) >= 1
    assert f"{port:04X}" in {address.rpartition(":")[2] for address in found[0]}
    # In Linux's spelling, of IPv4 and of IPv4 in IPv6.
    assert {address.rpartition(":")[0][-8:] for one in found for address in one} == {"0200007F"}
    assert "warning" not in told[0][1] + told[1][1]


@pytest.mark.parametrize(
    "coordinator, bind, is_local",
    [
        ("127.0.0.1:80", "127.0.0.1:80", True),
        ("[::1]:80", "[::1]:80", True),
        ("localhost:80", "localhost:80", True),
        ("192.0.2.77:80", None, False),  # of no host: what a gateway has
        ("node-0.example:80", None, False),
        ("0.0.0.0:80", "0.0.0.0:80", False),
        (None, None, False),
    ],
)
def test_an_address_of_this_host_is_listened_at_and_no_other(coordinator, bind, is_local):
    if coordinator == "[::1]:80" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    assert Ports.of(coordinator) == Ports(bind, is_local)


def test_jaxs_own_setting_counts(monkeypatch):
    monkeypatch.setenv(ports._BIND, "10.0.0.5:80")
    assert Ports.of("localhost:80") == Ports(None, False)
    assert "process 0 listens at 10.0.0.5:80," in Ports.of("localhost:80").warning("localhost:80")


@pytest.mark.parametrize(
    "options, where", [([], "every address of this host, port 8476"), (["0.0.0.0:8476"], "0.0.0.0")]
)
def test_ports_that_others_can_reach_are_said_to_be_unauthenticated(options, where):
    said = Ports.of(*options or [None]).warning("10.0.0.1:8476")
    assert f"process 0 listens at {where}" in said
    assert "unauthenticated" in said and "without encryption" in said
