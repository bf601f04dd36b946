"""Downloads over real TLS connections to a server in this process, to which every address of the test leads."""

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

import httpcore2
import pytest
import trustme

from dsvl2_jax.infer.serve.addresses import domain_name
from dsvl2_jax.infer.serve.downloads import Downloader
from dsvl2_jax.infer.serve.media_errors import MediaError

FIELD = "messages[1].content[0].image_url.url"
HOST, OTHER, PUBLIC, PUBLIC_2 = "pictures.example", "other.example", "93.184.215.14", "2606:2800:21f:cb07::1"
URL = f"https://{HOST}/cat.png"
PICTURE = bytes(range(256)) * 1000

Page = bytes | Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]]


def page(body: bytes = PICTURE, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def moved(location: str, status: str = "302 Found") -> bytes:
    return page(b"", status, f"Location: {location}")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Internet(httpcore2.AnyIOBackend):
    """Names, addresses that lead to one TLS server of this process, and what was asked of whom."""

    def __init__(self, authority: trustme.CA, pages: dict[str, Page]):
        self.pages = pages
        self.names = {HOST: [PUBLIC], OTHER: [PUBLIC_2]}
        self.addresses = {PUBLIC, PUBLIC_2}
        self.certified: tuple[str, ...] = (HOST, OTHER, "*.cdn.example", "xn--bcher-kva.example")
        self.resolved: list[str] = []
        self.called: list[tuple[str, int]] = []
        self.server_names: list[str | None] = []
        self.asked: list[str] = []
        self.port = 0
        self.open = 0
        self.authority = authority

    async def resolve(self, host: str) -> list[str]:
        self.resolved.append(host)
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    async def connect_tcp(self, host: str, port: int, **options: Any) -> httpcore2.AsyncNetworkStream:
        self.called.append((host, port))
        if host not in self.addresses:
            raise httpcore2.ConnectError("no route")
        return await super().connect_tcp("127.0.0.1", self.port, **options)

    def server_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(*self.certified).configure_cert(context)
        context.sni_callback = lambda _, name, __: self.server_names.append(name)
        return context

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in head[1:-2])
            assert headers["Accept-Encoding"] == "identity"
            assert not {"Cookie", "Authorization", "Referer"} & headers.keys()
            self.asked.append(headers["Host"] + head[0].split(" ")[1])
            answer = self.pages.get(self.asked[-1], page(b"", "404 Not Found"))
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                await answer(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has heard enough
        finally:
            self.open -= 1
            writer.close()


@pytest.fixture
def internet(authority) -> Internet:
    return Internet(authority, {f"{HOST}/cat.png": page()})


def get(
    internet: Internet,
    url: str = URL,
    domains: tuple[str, ...] = (HOST, OTHER),
    max_bytes: int = 10**6,
    time_limit: float = 60.0,
    ssl_context: ssl.SSLContext | None = None,
) -> bytes:
    if ssl_context is None:
        ssl_context = ssl.create_default_context()
        internet.authority.configure_trust(ssl_context)

    async def run() -> bytes:
        server = await asyncio.start_server(internet.serve, "127.0.0.1", 0, ssl=internet.server_context())
        internet.port = server.sockets[0].getsockname()[1]
        downloader = Downloader(
            domains,
            max_bytes=max_bytes,
            time_limit=time_limit,
            resolve=internet.resolve,
            network=internet,
            ssl_context=ssl_context,
        )
        async with server:
            return await downloader.get(url, FIELD)

    return asyncio.run(run())


def refused(internet: Internet, status: int, url: str = URL, **options: Any) -> str:
    """What the error says after the field."""
    with pytest.raises(MediaError) as caught:
        get(internet, url, **options)
    error = caught.value
    assert (error.status, error.field) == (status, FIELD)
    assert str(error).startswith(f"{FIELD}: ")
    return str(error).removeprefix(f"{FIELD}: ")


def test_a_picture_comes_from_the_address_that_its_name_was_resolved_to_once(internet):
    assert get(internet) == PICTURE
    assert internet.resolved == [HOST]
    assert internet.called == [(PUBLIC, 443)]
    assert internet.server_names == [HOST]


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("HTTPS://Pictures.EXAMPLE./cat.png", "/cat.png"),
        (f"https://{HOST}:443/cat.png#part", "/cat.png"),
        (f"https://{HOST}", "/"),
        (f"https://{HOST}?a=b c", "/?a=b%20c"),
        (f"https://{HOST}/a b/ä%2Fb.png?x=%41&y=/?@", "/a%20b/%C3%A4%2Fb.png?x=%41&y=/?@"),
        (f"https://{HOST}//elsewhere.example/../cat.png", "//elsewhere.example/../cat.png"),
    ],
)
def test_urls_are_asked_for_as_a_browser_does(internet, url, asked):
    internet.pages[HOST + asked] = page(b"found")
    assert get(internet, url) == b"found"
    assert internet.asked == [HOST + asked]


def test_names_of_other_alphabets_are_compared_and_asked_for_in_ascii(internet):
    internet.names["xn--bcher-kva.example"] = [PUBLIC]
    internet.pages["xn--bcher-kva.example/a.png"] = page(b"found")
    domain = domain_name("Bücher.example")
    for url in ("https://bücher.example/a.png", "https://BÜCHER．example/a.png", "https://xn--bcher-kva.example/a.png"):
        assert get(internet, url, domains=(domain,)) == b"found"


def test_a_wildcard_allows_all_names_below_and_not_the_name_itself(internet):
    internet.names |= {"a.cdn.example": [PUBLIC], "cdn.example": [PUBLIC]}
    internet.pages["a.cdn.example/x"] = page(b"found")
    assert get(internet, "https://a.cdn.example/x", domains=("*.cdn.example",)) == b"found"
    for host in ("cdn.example", "evilcdn.example", "a.cdn.example.evil.example"):
        assert "(--media-domain)" in refused(internet, 403, f"https://{host}/x", domains=("*.cdn.example",))
    assert internet.resolved == ["a.cdn.example"]


@pytest.mark.parametrize(
    ("url", "status", "problem"),
    [
        ("https://elsewhere.example/a.png", 403, "not fetched from 'elsewhere.example'"),
        (f"https://www.{HOST}/a.png", 403, "domains that this server allows"),
        (f"https://{HOST}.evil.example/a.png", 403, "domains that this server allows"),
        (f"https://{HOST}@evil.example/a.png", 400, "user name"),
        (f"https://me:secret@{HOST}/a.png", 400, "user name"),
        (f"https://evil.example\\@{HOST}/a.png", 400, "backslash"),
        (f"https://{HOST}\\.evil.example/a.png", 400, "backslash"),
        (f"https://{HOST}/a\r\nX: y", 400, "control character"),
        (f"https://{HOST}\t/a.png", 400, "control character"),
        (f"https://{HOST}\0.evil.example/a.png", 400, "control character"),
        (f"https://{HOST}:8443/a.png", 403, "port 8443"),
        (f"https://{HOST}:99999/a.png", 400, "not a URL"),
        (f"https://{HOST}:x/a.png", 400, "not a URL"),
        (f"https://{HOST}../a.png", 403, "domains"),
        ("https://evil.example#@pictures.example/a.png", 403, "domains"),
        ("https:///a.png", 403, "domains"),
        ("https:a.png", 403, "domains"),
        ("https://", 403, "domains"),
        ("https://[::1]/a.png", 403, "'::1'"),
        ("https://[fe80::1%25eth0]/a.png", 403, "domains"),
        ("https://[::ffff:169.254.169.254]/a.png", 403, "domains"),
        ("https://[::1/a.png", 400, "not a URL"),
        ("https://127.0.0.1/a.png", 403, "'127.0.0.1'"),
        ("https://１２７.０.０.１/a.png", 403, "domains"),
        ("https://2130706433/a.png", 403, "domains"),
        ("https://0x7f.1/a.png", 403, "domains"),
        ("https://localhost/a.png", 403, "domains"),
        (f"https://{HOST}/\ud800", 400, "not a URL"),
        ("https://" + "a" * 100_000, 403, "domains"),
        ("https://" + "ü" * 100_000 + ".example", 403, "domains"),
    ],
)
def test_all_other_urls_are_refused_before_anything_is_resolved(internet, url, status, problem):
    with pytest.raises(MediaError, match=problem) as caught:
        get(internet, url)
    assert caught.value.status == status
    assert len(str(caught.value)) < 400
    str(caught.value).encode()  # half a character of the URL would not go into the answer
    assert internet.resolved == internet.called == []


def test_a_query_may_hold_a_secret_and_is_not_repeated(internet):
    assert "hunter2" not in refused(internet, 400, f"https://{HOST}:x/a.png?signature=hunter2")


@pytest.mark.parametrize("address", ["10.1.2.3", "::1", "::ffff:169.254.169.254", "fe80::1%eth0", "not-an-address"])
def test_a_private_address_is_not_called_even_among_public_ones(internet, address):
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        internet.names[HOST] = answer
        assert "not public" in refused(internet, 403)
    assert internet.called == []


def test_names_that_are_not_known_or_have_no_address_are_named(internet):
    del internet.names[HOST]
    assert HOST in refused(internet, 400)
    internet.names[HOST] = []
    assert "not known" in refused(internet, 400)


def test_the_next_address_is_called_when_one_does_not_answer(internet):
    internet.names[HOST] = ["2606:4700::1", PUBLIC]
    assert get(internet) == PICTURE
    assert internet.called == [("2606:4700::1", 443), (PUBLIC, 443)]
    internet.addresses.clear()
    assert "could not be downloaded from pictures.example (no route)" in refused(internet, 400)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("location", [f"https://{OTHER}/b.png", f"//{OTHER}/b.png"])
def test_a_redirect_is_followed_to_another_allowed_domain(internet, status, location):
    internet.pages |= {f"{HOST}/cat.png": moved(location, status), f"{OTHER}/b.png": page(b"b")}
    assert get(internet) == b"b"
    assert internet.called == [(PUBLIC, 443), (PUBLIC_2, 443)]
    assert internet.server_names == [HOST, OTHER]


def test_a_redirect_may_be_relative(internet):
    internet.pages |= {f"{HOST}/a/b": moved("../c?d"), f"{HOST}/c?d": page(b"c")}
    assert get(internet, f"https://{HOST}/a/b") == b"c"


@pytest.mark.parametrize(
    ("location", "status", "problem"),
    [
        ("https://elsewhere.example/", 403, "elsewhere.example"),
        ("https://127.0.0.1/", 403, "127.0.0.1"),
        ("https://[::1]/", 403, "::1"),
        (f"http://{HOST}/cat.png", 400, "https alone"),
        ("file:///etc/passwd", 400, "https alone"),
        ("data:image/png;base64,AAAA", 400, "https alone"),
        (f"https://{HOST}:22/", 403, "port 22"),
        (f"https://a:b@{HOST}/", 400, "user name"),
        ("https://[", 400, "not a URL"),
        ("", 400, "more than 5 times"),
    ],
)
def test_every_redirect_is_checked_like_the_first_url(internet, location, status, problem):
    internet.pages[f"{HOST}/cat.png"] = moved(location)
    assert problem in refused(internet, status)
    assert {host for host, _ in internet.called} == {PUBLIC}


def test_a_redirect_that_is_no_text_is_refused(internet):
    internet.pages[f"{HOST}/cat.png"] = b"HTTP/1.1 302 Found\r\nLocation: https://\xff\xfe/\r\n\r\n"
    assert "domains that this server allows" in refused(internet, 403)


def test_a_redirect_to_an_allowed_name_with_a_private_address_is_refused(internet):
    internet.names[OTHER] = ["10.0.0.1"]
    internet.pages[f"{HOST}/cat.png"] = moved(f"https://{OTHER}/")
    assert OTHER in refused(internet, 403)
    assert internet.called == [(PUBLIC, 443)]


def test_a_name_that_changes_its_address_between_redirects_is_checked_again(internet):
    async def rebind(writer: asyncio.StreamWriter) -> None:
        internet.names[HOST] = ["127.0.0.1"]
        writer.write(moved("/b.png"))

    internet.pages |= {f"{HOST}/cat.png": rebind, f"{HOST}/b.png": page(b"secret")}
    assert "not public" in refused(internet, 403)
    assert internet.called == [(PUBLIC, 443)]


def test_redirects_end(internet):
    internet.pages |= {f"{HOST}/{i}": moved(f"/{i + 1}") for i in range(9)} | {f"{HOST}/5": page(b"last")}
    assert get(internet, f"https://{HOST}/0") == b"last"
    internet.pages |= {f"{HOST}/5": moved("/6"), f"{HOST}/6": page(b"never")}
    assert "redirected more than 5 times" in refused(internet, 400, f"https://{HOST}/0")


def test_the_certificate_must_be_the_hosts_and_of_a_trustedauthority(internet):
    internet.certified = (OTHER,)
    assert "certificate" in refused(internet, 400)
    internet.certified = (HOST,)
    assert "certificate" in refused(internet, 400, ssl_context=httpcore2.default_ssl_context())
    assert internet.asked == []


def test_certificates_are_checked_unless_a_context_is_given():
    context = Downloader((HOST,), max_bytes=1, time_limit=1.0)._ssl_context
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(bytes(2**16))
        await writer.drain()


async def endless_chunks(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
        await writer.drain()


async def endless_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not writer.is_closing():
        writer.write(b"X: " + b"y" * 1000 + b"\r\n")
        await writer.drain()


def test_a_file_may_have_as_many_bytes_as_the_limit_and_no_more(internet):
    assert get(internet, max_bytes=len(PICTURE)) == PICTURE
    assert f"{len(PICTURE) - 1} bytes" in refused(internet, 413, max_bytes=len(PICTURE) - 1)


@pytest.mark.parametrize("answer", [endless, endless_chunks, b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"])
def test_an_oversized_file_is_given_up_whether_it_says_so_or_not(internet, answer):
    internet.pages[f"{HOST}/cat.png"] = answer
    assert "1000 bytes" in refused(internet, 413, max_bytes=1000)


def test_a_file_without_length_ends_with_the_connection(internet):
    internet.pages[f"{HOST}/cat.png"] = b"HTTP/1.1 200 OK\r\n\r\nall of it"
    assert get(internet) == b"all of it"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (page(b"", "404 Not Found"), "404"),
        (page(b"", "500 Oh"), "500"),
        (page(b"", "206 Partial Content"), "206"),
        (page(b"", "302 Found"), "302"),
        (page(b"", "304 Not Modified"), "304"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "101|downloaded"),
        (page(PICTURE, "200 OK", "Content-Encoding: gzip"), "'gzip'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", "could not be downloaded"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "could not be downloaded"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "could not be downloaded"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "could not be downloaded"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "could not be downloaded"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n", "could not be downloaded"),
        (b"", "could not be downloaded"),
        (b"SSH-2.0-server\r\n", "could not be downloaded"),
        (endless_headers, "could not be downloaded"),
    ],
)
def test_an_answer_without_a_file_is_an_error_that_names_the_host(internet, answer, problem):
    internet.pages[f"{HOST}/cat.png"] = answer
    with pytest.raises(MediaError, match=problem) as caught:
        get(internet)
    assert caught.value.status == 400
    assert HOST in str(caught.value)


async def drip(writer: asyncio.StreamWriter) -> None:
    """Never silent for long, so that a limit of each read would not end it."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def silence(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        await asyncio.sleep(0.01)
        writer.write(b"")
        await writer.drain()


@pytest.mark.parametrize("answer", [drip, silence])
def test_a_slow_server_is_given_up_at_the_time_limit_and_hung_up_on(internet, answer):
    internet.pages[f"{HOST}/cat.png"] = answer
    assert "within 0.4 seconds" in refused(internet, 400, time_limit=0.4)
    assert internet.asked == [f"{HOST}/cat.png"]


def test_the_time_limit_covers_redirects_and_names(internet):
    async def slow_redirect(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        writer.write(moved("/cat.png"))

    internet.pages[f"{HOST}/cat.png"] = slow_redirect
    assert "within 0.4 seconds" in refused(internet, 400, time_limit=0.4)

    async def never(host: str) -> list[str]:
        await asyncio.Event().wait()
        return []

    internet.resolve = never
    assert "within 0.1 seconds" in refused(internet, 400, time_limit=0.1)


def test_a_server_that_never_answers_the_handshake_is_hung_up_on(internet, authority):
    async def run() -> bytes:
        gone = asyncio.Event()

        async def stare(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(2**16):
                pass
            gone.set()
            writer.close()

        server = await asyncio.start_server(stare, "127.0.0.1", 0)
        internet.port = server.sockets[0].getsockname()[1]
        context = httpcore2.default_ssl_context()
        downloader = Downloader(
            (HOST,), max_bytes=9, time_limit=0.3, resolve=internet.resolve, network=internet, ssl_context=context
        )
        async with server:
            with pytest.raises(MediaError, match=r"0\.3 seconds"):
                await downloader.get(URL, FIELD)
            await gone.wait()  # for ever, if the connection stayed open

    asyncio.run(run())


def test_the_systems_resolver_is_asked_unless_another_is_given():
    async def run() -> None:
        await Downloader(("localhost",), max_bytes=1, time_limit=60.0).get("https://localhost/", FIELD)

    with pytest.raises(MediaError, match="not public"):
        asyncio.run(run())
