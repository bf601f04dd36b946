"""A server's process: where it listens, what it prints, and how it stops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from thread_engine import ThreadEngine

from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.infer.serve.app import create_app
from dsvl2_jax.infer.serve.media import Media, MediaOptions
from dsvl2_jax.infer.serve.run import ListenOptions, Server
from dsvl2_jax.infer.serve.state import ServeOptions

TESTS = Path(__file__).parents[2]
HELLO = {"messages": [{"role": "user", "content": "Describe the image."}], "max_tokens": 40, "ignore_eos": True}

PROGRAM = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import asyncio, dsvl2_jax
from thread_engine import ThreadEngine
from dsvl2_jax.infer.serve.app import create_app
from dsvl2_jax.infer.serve.media import Media, MediaOptions
from dsvl2_jax.infer.serve.run import ListenOptions, Server
from dsvl2_jax.infer.serve.state import ServeOptions

engine = ThreadEngine(dsvl2_jax.load(None))
engine.pause_after = int(sys.argv[1]) if sys.argv[1:] else None
app = create_app(engine, ServeOptions(), Media(MediaOptions(), engine.pool), None)
say = lambda text: print(text, file=sys.stderr, flush=True)
Server(engine, app, ListenOptions(port=0), say=say, on_ready=lambda address: print(address, flush=True)).run()
"""


@pytest.fixture
def process(request):
    """A server of its own; with a parameter its answers stop after so many deltas."""
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, [request.param] if hasattr(request, "param") else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=TESTS.parent,
    )
    yield running
    running.kill()
    running.wait()


def test_sigterm_finishes_what_runs_and_ends_with_0(process):
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=HELLO | {"stream": True}, timeout=600) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        process.send_signal(signal.SIGTERM)
        assert list(lines)[-2] == "data: [DONE]"
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0
    assert out == "" and "stopping" in err  # one line on standard output, and that was the address


@pytest.mark.parametrize("process", [0], indirect=True)
def test_a_second_signal_ends_at_once(process):
    address = process.stdout.readline().strip()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, f"{address}/v1/chat/completions", json=HELLO, timeout=None)
        while 'num_requests_running{model_name="dsvl2"} 1.0' not in httpx.get(f"{address}/metrics").text:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        while not process.stderr.readline().startswith("stopping"):
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert isinstance(asked.exception(), httpx.HTTPError)


class Engine(ThreadEngine):
    """Starts when it is told to, or fails."""

    def __init__(self, model, begin, error=None):
        super().__init__(model)
        self.health, self._begin, self._error = "starting", begin, error

    async def start(self, say=lambda _: None):
        await self._begin.wait()
        if self._error is not None:
            raise self._error
        await super().start(say)


def serve(model, inside, *, error=None, **options):
    """Runs a server in this thread and ``inside(server, engine, begin)`` beside it; what it said and printed."""
    said, printed = [], []

    async def main():
        begin = asyncio.Event()
        engine = Engine(model, begin, error)
        app = create_app(engine, ServeOptions(), Media(MediaOptions(), engine.pool), None)
        server = Server(
            engine, app, ListenOptions(**{"port": 0} | options), say=said.append, on_ready=printed.append,
            end_process=lambda status: (said.append(status), server.stop()),
        )  # fmt: skip
        await asyncio.gather(server.serve(), inside(server, engine, begin))

    asyncio.run(main())
    return said, printed


async def get(server, path, **options):
    async with httpx.AsyncClient(trust_env=False, timeout=30, **options) as client:
        return await client.get(server.address + path)


def test_it_listens_before_it_is_ready_and_tells_its_address_after(micro):
    async def inside(server, engine, begin):
        response = await get(server, "/health")
        assert response.json() == {"status": "starting"}
        assert (await get(server, "/ready")).status_code == 503
        begin.set()
        while (await get(server, "/ready")).status_code != 200:
            await asyncio.sleep(0.01)
        server.stop()

    said, printed = serve(micro, inside)
    assert len(printed) == 1 and printed[0].startswith("http://127.0.0.1:") and said[-1].startswith("stopping")


def test_what_keeps_the_engine_from_starting_is_raised(micro):
    async def inside(server, engine, begin):
        begin.set()

    with pytest.raises(DSVL2Error, match="no memory"):
        serve(micro, inside, error=DSVL2Error("no memory for the caches"))


def test_it_can_be_stopped_while_it_starts(micro):
    async def inside(server, engine, begin):
        assert (await get(server, "/health")).status_code == 200
        server.stop()

    said, printed = serve(micro, inside)
    assert printed == [] and said[-1].startswith("stopping")


def test_a_device_that_hangs_ends_the_process(micro):
    async def inside(server, engine, begin):
        begin.set()
        while engine.health != "ok":
            await asyncio.sleep(0.01)
        engine.health = "failed"

    said, _ = serve(micro, inside)
    assert 1 in said and any("does not answer" in str(text) for text in said)


def test_while_it_stops_what_is_new_is_refused(micro):
    async def inside(server, engine, begin):
        begin.set()
        while engine.health != "ok":
            await asyncio.sleep(0.01)
        engine.pause_after = 0
        async with httpx.AsyncClient(trust_env=False, timeout=600, base_url=server.address) as client:
            old = asyncio.create_task(client.post("/v1/chat/completions", json=HELLO))
            while not engine.answers:
                await asyncio.sleep(0.01)
            server.stop()
            while engine.health != "stopping":
                await asyncio.sleep(0.01)
            new = await client.post("/v1/chat/completions", json=HELLO)
            assert new.status_code == 503 and new.headers["retry-after"] == "5"
            assert (await client.get("/ready")).status_code == 503
            engine.gate.set()
            assert (await old).status_code == 200

    serve(micro, inside)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
    subprocess.run(
        [*command, "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True
    )
    return cert, key


def test_https(micro, certificate):
    cert, key = certificate

    async def inside(server, engine, begin):
        begin.set()
        assert server.address.startswith("https://")
        response = await get(server, "/health", verify=ssl.create_default_context(cafile=cert))
        assert response.status_code == 200
        server.stop()

    serve(micro, inside, ssl_certfile=cert, ssl_keyfile=key)


def test_options_that_cannot_be_are_told(micro, tmp_path, certificate):
    broken = tmp_path / "broken.pem"
    broken.write_text("nonsense")
    with pytest.raises(UsageError, match=r"--ssl-certfile.*no such file"):
        ListenOptions(ssl_certfile=tmp_path / "none")
    with pytest.raises(UsageError, match="--ssl-certfile: is missing"):
        ListenOptions(ssl_keyfile=broken)
    with pytest.raises(UsageError, match="--port"):
        ListenOptions(port=70_000)
    engine = ThreadEngine(micro)
    app = create_app(engine, ServeOptions(), Media(MediaOptions(), engine.pool), None)
    for options in (ListenOptions(ssl_certfile=broken), ListenOptions(ssl_certfile=certificate[0])):
        with pytest.raises(UsageError, match="PEM"):
            Server(engine, app, options, say=print, on_ready=print)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: cannot be listened at"):
            Server(engine, app, ListenOptions(port=port), say=print, on_ready=print)
    with pytest.raises(UsageError, match="cannot be listened at"):
        Server(engine, app, ListenOptions(host="no.such.host.invalid"), say=print, on_ready=print)
