"""Pictures from web servers, fetched so that no request makes this machine speak to whom it should not.

A client names the address, so the server might be made to ask a neighbour that trusts it: a cloud's metadata service,
a database, a printer (server-side request forgery). Hence https alone, to names that the operator allowed, at public
addresses; the name is resolved once and the connection goes to the address that was checked; a redirect is a new
address and is checked as one. Proxies of the environment are not used: they would resolve the name again.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpcore2

from dsvl2_jax.infer.serve.addresses import host_name, is_public
from dsvl2_jax.infer.serve.media_errors import MediaError, shown, too_many_bytes
from dsvl2_jax.messages import first_line

PORT = 443
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_MOST_DOWNLOADS = 32  # at once; others wait, within their time limit
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "dsvl2-jax", "Connection": "close"}

Resolver = Callable[[str], Awaitable[Sequence[str]]]


class Downloader:
    """Fetches files over https from allowed domains. One event loop's; any number of downloads at once."""

    def __init__(
        self,
        domains: Sequence[str],
        *,
        max_bytes: int,
        time_limit: float,
        kind: str = "picture",
        resolve: Resolver | None = None,
        network: httpcore2.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ):
        """
        Args:
          domains: `domain_name`s.
          max_bytes: the most that a file may have.
          time_limit: seconds, for all of a download: names, connections, redirects, the file.
          kind: "picture" or "video", what is fetched.
          resolve: the addresses of a host name; the system's resolver unless given. Raises OSError.
          network: opens the connections to addresses; the system's unless given.
          ssl_context: whom to trust; those whom the system trusts unless given.
        """
        self._names = {domain for domain in domains if not domain.startswith("*")}
        self._suffixes = tuple(domain.removeprefix("*") for domain in domains if domain.startswith("*"))
        self._max_bytes, self._time_limit, self._kind = max_bytes, time_limit, kind
        self._headers = {"Accept": {"picture": "image/*", "video": "video/*"}[kind], **_HEADERS}
        self._resolve = resolve or _resolve
        self._network = network or httpcore2.AnyIOBackend()
        self._ssl_context = ssl_context or httpcore2.default_ssl_context()
        self._free = asyncio.Semaphore(_MOST_DOWNLOADS)

    async def get(self, url: str, field: str) -> bytes:
        """The file at a URL. Raises MediaError that names the field."""
        try:
            async with asyncio.timeout(self._time_limit), self._free:
                base = ""
                for _ in range(1 + _MOST_REDIRECTS):
                    host, target = self._target(url, base, field)
                    content, location = await self._request(host, target, await self._addresses(host, field), field)
                    if location is None:
                        return content
                    url, base = location, f"https://{host}{target}"
                raise MediaError(field, 400, f"is redirected more than {_MOST_REDIRECTS} times. Send the last URL.")
        except TimeoutError:
            raise MediaError(
                field, 400, f"could not be downloaded within {self._time_limit:g} seconds. Send it as a data: URL."
            ) from None

    def _target(self, url: str, base: str, field: str) -> tuple[str, str]:
        """(host name, path and query) of a URL that may be asked; it may be relative to ``base``."""
        try:
            # urlsplit drops control characters, and others read a backslash as a slash.
            if re.search(r"[\x00-\x1f\x7f\\]", url):
                raise ValueError("it has a control character or a backslash")
            parts = urllib.parse.urlsplit(urllib.parse.urljoin(base, url))
            if "@" in parts.netloc:
                raise ValueError("it has a user name before the host")
            host, port = parts.hostname or "", parts.port
            target = urllib.parse.quote(parts.path or "/", "/%:@!$&'()*+,;=~")
            if parts.query:
                target += "?" + urllib.parse.quote(parts.query, "/?%:@!$&'()*+,;=~")
        except ValueError as error:
            raise MediaError(field, 400, f"{shown(url)} is not a URL that can be fetched: {error}.") from None
        if parts.scheme != "https":
            raise MediaError(field, 400, f"leads to {shown(url)}; pictures are fetched over https alone.")
        try:
            name = host_name(host)
        except ValueError:
            name = ""
        if name not in self._names and not name.endswith(self._suffixes):
            raise MediaError(
                field,
                403,
                f"pictures are not fetched from {shown(host)}: it is none of the domains that this server allows "
                "(--media-domain). Send the picture as a data: URL.",
            )
        if port not in (None, PORT):
            raise MediaError(field, 403, f"leads to port {port}; pictures are fetched from port {PORT} alone.")
        return name, target

    async def _addresses(self, host: str, field: str) -> list[str]:
        try:
            addresses = list(await self._resolve(host))
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise MediaError(field, 400, f"the host {host} is not known. Check the name.")
        # All of them: an answer that mixes is made to be tried until the private one is met.
        if not all(map(is_public, addresses)):
            raise MediaError(field, 403, f"the host {host} has an address that is not public, so it is not asked.")
        return addresses

    async def _request(self, host: str, target: str, addresses: Sequence[str], field: str) -> tuple[bytes, str | None]:
        """The file, or b"" and where it is said to be."""
        url = httpcore2.URL(scheme="https", host=host, port=PORT, target=target)
        # Half of the time for the first of several addresses, so that the second gets a chance.
        options = {"timeout": {"connect": self._time_limit / min(len(addresses), 2)}}
        request = httpcore2.Request("GET", url, headers={"Host": host, **self._headers}, extensions=options)
        network = _Pinned(self._network, addresses)
        connection = httpcore2.AsyncHTTPConnection(url.origin, self._ssl_context, network_backend=network)
        try:
            response = await connection.handle_async_request(request)
            headers = {name.lower(): value.decode("utf-8", "replace") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in headers:
                return b"", headers[b"location"]
            return await self._body(response, headers, host, field), None
        except TimeoutError:
            raise  # `get` says how much time there is
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError) as error:
            reason = first_line(error)
            raise MediaError(field, 400, f"could not be downloaded from {host} ({reason}). Check the URL.") from None
        finally:
            await network.aclose()

    async def _body(self, response: httpcore2.Response, headers: dict[bytes, str], host: str, field: str) -> bytes:
        if response.status != 200:
            raise MediaError(field, 400, f"{host} answered with HTTP status {response.status}, expected 200.")
        if (encoding := headers.get(b"content-encoding", "identity")).lower() != "identity":
            raise MediaError(field, 400, f"{host} sent it in the encoding {shown(encoding)}, which was not asked for.")
        content = bytearray()
        if int(headers.get(b"content-length", "0")) <= self._max_bytes:  # a number: h11 has seen to it
            async with contextlib.aclosing(response.aiter_stream()) as chunks:
                async for chunk in chunks:
                    content += chunk
                    if len(content) > self._max_bytes:
                        break
                else:
                    return bytes(content)
        raise MediaError(field, 413, too_many_bytes(self._max_bytes, self._kind))


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that were checked, whatever the host's name would resolve to by now."""

    def __init__(self, network: httpcore2.AsyncNetworkBackend, addresses: Sequence[str]):
        self._network, self._addresses = network, addresses
        self._streams: list[httpcore2.AsyncNetworkStream] = []

    async def connect_tcp(self, host: str, port: int, **options: Any) -> httpcore2.AsyncNetworkStream:
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        for address in self._addresses:
            try:
                stream = await self._network.connect_tcp(address, port, **options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                self._streams.append(stream)
                return stream
        raise failure

    async def aclose(self) -> None:
        """Closes what was opened, also where the time was up within the TLS handshake: httpcore2 forgets that."""
        for stream in self._streams:
            await stream.aclose()


async def _resolve(host: str) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    return [address[0] for *_, address in found]
