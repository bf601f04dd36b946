"""Real HTTP servers on free ports, each in a thread, around an engine that answers with the bundled model."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image
from thread_engine import ThreadEngine, data_url

import dsvl2_jax
from dsvl2_jax.infer.constraints import GrammarCompiler
from dsvl2_jax.infer.serve.app import create_app
from dsvl2_jax.infer.serve.media import Media, MediaOptions
from dsvl2_jax.infer.serve.run import ListenOptions, Server
from dsvl2_jax.infer.serve.state import ServeOptions


@dataclasses.dataclass
class Running:
    """A server that runs, and the engine behind it."""

    url: str
    engine: ThreadEngine
    server: Server
    loop: asyncio.AbstractEventLoop
    said: list[str]
    app: Any

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=600, trust_env=False)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function in the server's loop."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def last_request(self) -> Any:
        return self.engine.answers[-1].request


def start(
    model: Any, media: MediaOptions, *, engine_of: Callable[[Any], ThreadEngine] = ThreadEngine, **options: Any
) -> tuple[Running, Callable[[], None]]:
    """A server, and what stops it; ``engine_of`` makes its engine of the model."""
    ready, box, failures = threading.Event(), {}, []

    async def main() -> None:
        engine, said = engine_of(model), []
        grammars = GrammarCompiler(model.processor.tokenizer, model.config.language.vocab_size)
        given = ServeOptions(**({"model_name": "micro"} | options))
        app = create_app(engine, given, Media(media, engine.pool), grammars)

        def on_ready(address: str) -> None:
            box["running"] = Running(address, engine, server, asyncio.get_running_loop(), said, app)
            ready.set()

        server = Server(engine, app, ListenOptions(port=0), say=said.append, on_ready=on_ready, end_process=said.append)
        await server.serve()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    if failures:
        raise failures[0]
    running = box["running"]

    def end() -> None:
        running.call(running.engine.gate.set)
        running.call(running.server.stop)
        thread.join(60)
        assert not thread.is_alive() and not failures

    return running, end


@pytest.fixture(scope="session")
def micro() -> Any:
    return dsvl2_jax.load(None)


@pytest.fixture(scope="session")
def started() -> Callable[..., tuple[Running, Callable[[], None]]]:
    """`start`, for modules that need a server around a model of their own."""
    return start


@pytest.fixture(scope="session")
def _shared(micro: Any) -> Iterator[Running]:
    running, end = start(micro, MediaOptions())
    yield running
    end()


@pytest.fixture
def running(_shared: Running) -> Iterator[Running]:
    """One server for all tests that need nothing of their own; its engine is set back after each."""
    yield _shared
    engine = _shared.engine
    engine.refusal = engine.failure = engine.pause_after = None
    engine.health = "ok"
    _shared.call(engine.gate.set)
    _shared.call(engine.gate.clear)


@pytest.fixture
def serve(micro: Any) -> Iterator[Callable[..., Running]]:
    """Starts servers with options of their own."""
    ends = []

    def make(media: MediaOptions = MediaOptions(), **options: Any) -> Running:  # noqa: B008 (frozen)
        running, end = start(micro, media, **options)
        ends.append(end)
        return running

    yield make
    for end in ends:
        end()


@pytest.fixture(scope="session")
def shapes() -> Image.Image:
    """The picture of the README."""
    return Image.open("configs/images/shapes.png").convert("RGB")


@pytest.fixture(scope="session")
def shapes_url(shapes: Image.Image) -> str:
    return data_url(shapes)
