"""One server from start to end: it listens, gets its engine ready, tells its address, and stops in good order.

The port is taken before anything is compiled, so that one in use is told at once, and so that /health can be asked
meanwhile. SIGTERM and Ctrl-C refuse what is new, finish what runs, and end with status 0; a second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from dsvl2_jax import fields
from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.fields import Problem, setting

if TYPE_CHECKING:
    from dsvl2_jax.infer.serve.async_engine import AsyncEngine

SSL_PASSWORD = "DSVL2_SSL_KEYFILE_PASSWORD"
_FLUSH = 10  # seconds that slow readers have for the rest of answers that are complete
_KEEP_ALIVE = 75  # seconds; clients that keep connections must not find them closed after five
_LOOK = 0.5  # seconds between two looks at the engine's health
_SWITCH = 0.001  # seconds after which a thread that holds Python's lock lets the loop, or the engine, have it
_HEADERS = 1 << 16  # bytes that the head of a request may have


@dataclasses.dataclass(frozen=True)
class ListenOptions:
    """Where a server listens, and how it stops.

    Attributes:
      port: 0: one that is free.
      ssl_certfile, ssl_keyfile: for https; the key may be in the certificate's file.
      ssl_ca_certs: clients must show a certificate of one of these authorities.
      shutdown_timeout: seconds that running answers have to end once the server is told to stop.

    Raises:
      UsageError: a value cannot be, or a file is not there.
    """

    host: str = "127.0.0.1"
    port: int = setting(8000, least=0, most=65535)
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    shutdown_timeout: float = setting(25.0, least=0)

    def __post_init__(self) -> None:
        problems = fields.check(self)
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                problems.append(Problem((name,), f"no such file: {path}."))
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            problems.append(Problem(("ssl_certfile",), "is missing; https needs a certificate."))
        fields.refuse((Problem((f"--{p.path[0].replace('_', '-')}",), p.text) for p in problems), UsageError)


class Server:
    """Runs an application around an engine."""

    def __init__(
        self,
        engine: AsyncEngine,
        app: FastAPI,
        options: ListenOptions,
        *,
        say: Callable[[str], None],
        on_ready: Callable[[str], None],
        end_process: Callable[[int], None] = os._exit,
    ):
        """
        Args:
          say: told what goes on.
          on_ready: told the address, once requests are answered.
          end_process: ends the process when the device hangs: threads that wait for it would keep it alive.

        Raises:
          UsageError: the address cannot be listened at, or the certificate cannot be used.
        """
        self._engine, self._options, self._say = engine, options, say
        self._on_ready, self._end_process = on_ready, end_process
        self._app, self._http = app, _Uvicorn(_config(app, options))
        self._socket = _listen(options.host, options.port)
        self._stopping = asyncio.Event()

    @property
    def address(self) -> str:
        """As ``http://127.0.0.1:8000``."""
        host, port = self._socket.getsockname()[:2]
        scheme = "http" if self._options.ssl_certfile is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Serves until it is told to stop; raises what the engine's start raises."""
        sys.setswitchinterval(_SWITCH)
        with asyncio.Runner(loop_factory=self._http.config.get_loop_factory()) as runner:
            runner.run(self.serve())

    async def serve(self) -> None:
        """The same, in a loop that runs."""
        with self._signals():
            http = asyncio.create_task(self._http.serve(sockets=[self._socket]))
            watchdog = asyncio.create_task(self._watch())
            try:
                await self._work(http)
            finally:
                watchdog.cancel()
                self._http.should_exit = True
                await http

    async def _work(self, http: asyncio.Task[None]) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        starting = asyncio.create_task(self._engine.start(self._say))
        try:
            await asyncio.wait({starting, stopping, http}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                self._app.state.serving.lag.forget()
                self._on_ready(self.address)
                await asyncio.wait({stopping, http}, return_when=asyncio.FIRST_COMPLETED)
            else:
                starting.cancel()
                await asyncio.wait({starting})
        finally:
            stopping.cancel()
        if http.done() and not self._stopping.is_set():
            await http
            raise DSVL2Error("the HTTP server has ended by itself; its log says why.")
        self._say("stopping: nothing new is taken, and what runs is finished")
        await self._engine.stop(self._options.shutdown_timeout)

    async def _watch(self) -> None:
        """Ends the process when the engine has given up on its device."""
        while self._engine.health != "failed":
            await asyncio.sleep(_LOOK)
        self._say("the device does not answer any more: the process ends, to be started again")
        self._end_process(1)

    def _stop(self) -> None:
        if self._stopping.is_set():
            self._say("told a second time: ending at once")
            self._end_process(130)
        self._stopping.set()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        added = []
        for one in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
                loop.add_signal_handler(one, self._stop)
                added.append(one)
        try:
            yield
        finally:
            for one in added:
                loop.remove_signal_handler(one)

    def stop(self) -> None:
        """Does what SIGTERM does. For the loop's own thread."""
        self._stopping.set()


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `Server`: uvicorn would stop listening at once, and end the process by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(app: FastAPI, options: ListenOptions) -> uvicorn.Config:
    files = {
        name: None if getattr(options, name) is None else str(getattr(options, name))
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    }
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_FLUSH,
        h11_max_incomplete_event_size=_HEADERS,
        ssl_cert_reqs=ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE,
        ssl_keyfile_password=os.environ.get(SSL_PASSWORD),
        **files,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"--ssl-certfile {options.ssl_certfile}: cannot be used ({error}). Give a PEM file with the certificate, "
            f"and its key with --ssl-keyfile; a key's password stands in {SSL_PASSWORD}."
        ) from None
    return config


def _listen(host: str, port: int) -> socket.socket:
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: cannot be listened at ({error.strerror or error}). Choose another port; 0 "
            "takes a free one."
        ) from None
