"""Where a request's pictures come from: data URLs, folders and web servers, with the limits of each."""

import asyncio
import base64
import io
import os
import struct
import sys
import threading
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.serve import media
from dsvl2_jax.infer.serve.downloads import Downloader
from dsvl2_jax.infer.serve.media import Clip, Media, MediaOptions
from dsvl2_jax.infer.serve.media_errors import MediaError
from dsvl2_jax.inputs.images import load_image

FIELD = "messages[1].content[0].image_url.url"
RED = Image.new("RGB", (6, 4), "red")


def image_bytes(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


PNG = image_bytes(RED)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2, thread_name_prefix="media") as pool:
        yield pool


@pytest.fixture
def fetch(pool):
    """The bytes that a reference stands for, under some options."""

    def fetch(reference: Any, **options: Any) -> bytes:
        return asyncio.run(Media(MediaOptions(**options), pool).fetch(reference, FIELD))

    return fetch


@pytest.fixture
def refused(fetch):
    """What the error about a reference says after its field."""

    def refused(reference: Any, status: int, **options: Any) -> str:
        with pytest.raises(MediaError) as caught:
            fetch(reference, **options)
        assert (caught.value.status, caught.value.field) == (status, FIELD)
        message = str(caught.value)
        message.encode()  # an answer is UTF-8
        assert message.startswith(f"{FIELD}: ")
        assert len(message) < 500
        return message.removeprefix(f"{FIELD}: ")

    return refused


# Data URLs


@pytest.mark.parametrize(
    "url",
    [
        data_url(PNG),
        data_url(PNG, ""),
        data_url(PNG, "image/jpeg"),  # the bytes decide
        data_url(PNG).replace("data:", "DATA:").replace(";base64", ";Base64"),
        data_url(PNG, "image/png;name=a.png"),
        "data:;base64," + urllib.parse.quote(base64.b64encode(PNG), safe=""),
        "data:;base64," + base64.encodebytes(PNG).decode(),
    ],
)
def test_a_data_url_is_read_without_any_option(fetch, url):
    assert fetch(url) == PNG


@given(st.binary(min_size=1))
def test_any_bytes_come_through_a_data_url(pool, data):
    reader = Media(MediaOptions(max_bytes=len(data)), pool)
    assert asyncio.run(reader.fetch(data_url(data), FIELD)) == data
    if len(data) > 1:
        with pytest.raises(MediaError, match="more than"):
            asyncio.run(Media(MediaOptions(max_bytes=len(data) - 1), pool).fetch(data_url(data), FIELD))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("data:image/png;base64,iVBOR*w0KGgo=", "not valid base64"),
        ("data:image/png;base64,iVBORw0KGgo", "not valid base64"),
        ("data:image/png;base64,iVBO=Rw0KGgo", "not valid base64"),
        ("data:image/png;base64,äöü", "not valid base64"),
        ("data:image/png;base64,\ud800AAA", "not valid base64"),
        ("data:image/png;base64,%", "not valid base64"),
        ("data:image/png,%89PNG", "only data: URIs in base64"),
        ("data:image/png;base64", "only data: URIs in base64"),
        ("data:" + "x" * 100_000, "only data: URIs in base64"),
        ("data:", "only data: URIs in base64"),
    ],
)
def test_a_broken_data_url_says_what_is_wrong(refused, url, problem):
    assert problem in refused(url, 400)


def test_an_oversized_data_url_is_refused_before_it_is_decoded(refused, monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("it was decoded"))
    assert "1000 bytes" in refused("data:;base64," + "A" * 10**7, 413, max_bytes=1000)
    assert "1000 bytes" in refused("data:;base64," + "%41" * 10**6, 413, max_bytes=1000)


# Files, servers, and everything else


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "cat.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(b"secret")
    return root


def test_files_are_read_where_a_media_path_allows_it(fetch, refused, folder):
    paths = (str(folder),)
    for reference in ("cat.png", f"{folder}/cat.png", f"file://{folder}/cat.png", f"FILE://{folder}/cat.png"):
        assert fetch(reference, paths=paths) == PNG
    assert "(--media-path)" in refused("../secret.png", 403, paths=paths)
    assert "more than" in refused("cat.png", 413, paths=paths, max_bytes=len(PNG) - 1)


def test_a_media_path_may_be_a_link_itself(fetch, folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert fetch(f"{link}/cat.png", paths=(str(link),)) == PNG
    assert fetch(f"{folder}/cat.png", paths=(str(link),)) == PNG


@pytest.mark.parametrize("reference", ["cat.png", "/etc/passwd", "file:///etc/passwd", "iVBORw0KGgo" * 1000])
def test_without_a_media_path_no_file_is_read(refused, reference):
    assert "(--media-path)" in refused(reference, 403)


@pytest.mark.parametrize("reference", [None, 3, True, b"x", ["a"], {"url": data_url(PNG)}, ""])
def test_what_is_no_string_is_named(refused, reference):
    assert "must be a string" in refused(reference, 400)


@pytest.mark.parametrize(
    "reference",
    [
        *(
            "http://pictures.example/a.png",
            "HTTP://a",
            "ftp://a/b",
            "blob:https://a/b",
            "javascript:alert(1)",
            "s3://a/b",
        ),
        *(
            "gopher://a:70/_x",
            "ssh://a",
            "about:blank",
            "C:\\cat.png",
            "x-" + "y" * 9999 + ":",
            "jar:file:///a!/b",
            "mailto:",
        ),
    ],
)
def test_other_schemes_are_refused(refused, folder, reference):
    options = {"domains": ("pictures.example",), "paths": (str(folder),)}
    assert "expected data" in refused(reference, 400, **options)


def test_without_a_media_domain_nothing_is_fetched(refused, monkeypatch):
    monkeypatch.setattr(Downloader, "get", lambda *_: pytest.fail("it was fetched"))
    assert "(--media-domain)" in refused("https://pictures.example/a.png", 403)


def test_the_options_reach_the_downloader(refused):
    assert "port 22" in refused("https://pictures.example:22/", 403, domains=("PICTURES.example.",))


# Decoding


def decode(data: bytes, pool: Any = None, **options: Any) -> Image.Image:
    return Media(MediaOptions(**options), pool).decode(data, FIELD)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_bytes(RED, "JPEG", exif=exif)


def test_pictures_are_read_as_a_person_sees_them_or_as_the_official_code_does():
    clear = image_bytes(Image.new("RGBA", (2, 2), (10, 20, 30, 0)))
    gray16 = image_bytes(Image.fromarray(np.array([[256, 65535]], np.uint16)))
    assert decode(turned()).size == (4, 6)
    assert decode(clear).getpixel((0, 0)) == (255, 255, 255)
    assert decode(gray16).getpixel((0, 0)) == (1, 1, 1)
    assert decode(turned(), official=True).size == (6, 4)
    assert decode(clear, official=True).getpixel((0, 0)) == (10, 20, 30)
    assert decode(gray16, official=True).getpixel((0, 0)) == (255, 255, 255)
    for data in (turned(), clear):
        np.testing.assert_array_equal(np.asarray(decode(data, official=True)), np.asarray(load_image(data)))


def test_a_decoded_picture_goes_through_the_processors_reading_unchanged():
    for data in (turned(), image_bytes(Image.new("RGBA", (2, 2), (10, 20, 30, 99)))):
        picture = decode(data)
        assert picture.mode == "RGB"
        for exif in (False, True):
            np.testing.assert_array_equal(np.asarray(load_image(picture, exif)), np.asarray(picture))


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that unpacks to black RGB pixels of this size."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("data", "status", "problem"),
    [
        (b"", 400, "not an image in a format that is read"),
        (b"<html>", 400, "not an image in a format that is read"),
        (image_bytes(RED, "EPS"), 400, "not an image in a format that is read"),
        (image_bytes(RED, "ICO"), 400, "not an image in a format that is read"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 400, "not an image in a format that is read"),
        (PNG[:50], 400, "damaged"),
        (bomb(0, 5), 400, "not an image in a format that is read"),
        (bomb(8_000, 8_000)[:200], 413, "8000×8000 pixels"),
        (bomb(20_000, 20_000)[:200], 413, "too large"),
    ],
)
def test_what_is_no_picture_or_too_large_a_one_is_an_error_that_names_the_field(monkeypatch, data, status, problem):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(MediaError, match=problem) as caught:
        decode(data)
    assert str(caught.value).startswith(f"{FIELD}: ")
    assert caught.value.status == status


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = bomb(3000, 2000)
    assert len(data) < 100_000
    assert decode(data, max_pixels=6_000_000).size == (3000, 2000)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(MediaError, match="3000×2000 pixels, expected at most 5999999 in all"):
        decode(data, max_pixels=5_999_999)


# Whole requests


def load(pool: Any, references: list[Any], downloader: Any = None, **options: Any) -> list[Image.Image]:
    named = [(reference, f"messages[0].content[{i}].image_url.url") for i, reference in enumerate(references)]
    return asyncio.run(Media(MediaOptions(**options), pool, downloader).load(named))


def test_the_pictures_of_a_request_keep_their_order(pool, folder):
    class Web:
        async def get(self, url: str, field: str) -> bytes:
            await asyncio.sleep(0.01)  # behind the others
            assert (url, field) == ("https://a.example/x", "messages[0].content[0].image_url.url")
            return image_bytes(Image.new("RGB", (1, 1)))

    references = ["https://a.example/x", data_url(image_bytes(Image.new("RGB", (2, 1)))), "cat.png"]
    pictures = load(pool, references, Web(), paths=(str(folder),))
    assert [picture.size for picture in pictures] == [(1, 1), (2, 1), (6, 4)]
    assert load(pool, []) == []


def test_files_are_read_and_pictures_decoded_in_the_pool(pool, folder, monkeypatch):
    threads = set()

    def spy(original):
        def wrapper(*arguments, **options):
            threads.add(threading.current_thread().name.rpartition("_")[0])
            return original(*arguments, **options)

        return wrapper

    for name in ("decode_base64", "load_image", "image_size", "read_file"):
        monkeypatch.setattr(media, name, spy(getattr(media, name)))
    load(pool, [data_url(PNG), "cat.png"], paths=(str(folder),))
    assert threads == {"media"}


def test_too_many_pictures_are_refused_before_any_is_read(pool, monkeypatch):
    monkeypatch.setattr(Media, "fetch", lambda *_: pytest.fail("one was read"))
    with pytest.raises(MediaError, match="messages: has 3 pictures, expected at most 2") as caught:
        load(pool, [data_url(PNG)] * 3, max_images=2)
    assert caught.value.status == 413


def test_the_pixels_of_all_pictures_together_have_a_limit(pool, monkeypatch):
    url = data_url(PNG)
    assert len(load(pool, [url] * 3, max_request_pixels=3 * 24)) == 3
    monkeypatch.setattr(media, "load_image", lambda *_, **__: pytest.fail("one was decoded"))
    with pytest.raises(MediaError, match="messages: its pictures have 72 pixels in all, expected at most 71") as caught:
        load(pool, [url] * 3, max_request_pixels=3 * 24 - 1)
    assert caught.value.status == 413


def test_one_bad_picture_names_its_own_field_and_ends_the_other_downloads(pool):
    ended = []

    class Web:
        async def get(self, url: str, field: str) -> bytes:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(url)
            return b""

    with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[1\]\.image_url\.url: .*base64"):
        load(pool, ["https://a.example/x", "data:image/png;base64,*"], Web())
    assert ended == ["https://a.example/x"]
    with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[1\]\.image_url\.url: .*not an image"):
        load(pool, [data_url(PNG), data_url(b"text")])


# Options


def test_wrong_options_are_all_listed(tmp_path):
    with pytest.raises(UsageError) as caught:
        MediaOptions(max_bytes=0, max_pixels=10**9, max_images=-1, time_limit=0, official=1)
    for name in ("max_bytes", "max_pixels", "max_images", "time_limit", "official"):
        assert f"{name}: must be" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        MediaOptions(domains=("a.example", "https://b.example/x", "10.0.0.1"), paths=(str(tmp_path), "no/such/folder"))
    for problem in ("domains[1]: must be a host name", 'not "10.0.0.1"', "paths[1]: must be a folder that is there"):
        assert problem in str(caught.value)
    assert "domains[0]" not in str(caught.value)
    with pytest.raises(UsageError, match="domains: must be a list of host names"):
        MediaOptions(domains="a.example")


def test_options_are_brought_into_one_form(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    options = MediaOptions(domains=["*.BÜCHER.example."], paths=[f"{tmp_path}/link/."], time_limit=3)
    assert options.domains == ("*.xn--bcher-kva.example",)
    assert options.paths == (os.path.realpath(tmp_path),)
    assert options.time_limit == 3.0


# Videos


def load_videos(pool: Any, clips: list[Any], downloader: Any = None, **options: Any) -> list[list[Image.Image]]:
    named = [Clip(*clip) for clip in clips]
    pictures = [RED] * options.pop("pictures", 0)
    return asyncio.run(Media(MediaOptions(**options), pool, downloader).load_videos(named, "messages", pictures))


VIDEO_FIELD = "messages[0].content[0].video_url.url"


@pytest.fixture(scope="module")
def film() -> bytes:
    return pytest.importorskip("videos", reason="videos need the extra video").video([10 * i for i in range(20)])


def clip(data: bytes, frames: int = 4, choice: str = "even") -> tuple[str, str, int, str]:
    return data_url(data, "video/mp4"), VIDEO_FIELD, frames, choice


def test_the_frames_of_a_requests_videos_come_in_order(pool, film, folder):
    (folder / "a.mp4").write_bytes(film)

    class Web:
        async def get(self, url: str, field: str) -> bytes:
            assert (url, field) == ("https://a.example/v", VIDEO_FIELD)
            return film

    named = [("https://a.example/v", VIDEO_FIELD, 2, "even"), clip(film), ("a.mp4", VIDEO_FIELD, 1, "scene")]
    found = load_videos(pool, named, Web(), paths=(str(folder),))
    assert [len(frames) for frames in found] == [2, 4, 1]
    assert {frame.size for frames in found for frame in frames} == {(64, 48)}
    assert load_videos(pool, []) == []


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"max_frames": 7}, 413, "messages: asks for 8 frames of videos, expected at most 7"),
        ({"max_video_bytes": 100}, 413, "more than the 100 bytes that a video may have"),
        ({"max_pixels": 3071}, 413, "its frames are 64×48 pixels, more than the 3071"),
        ({"max_request_pixels": 8 * 3072 - 1}, 413, "have more than the"),
        ({"max_request_pixels": 8 * 3072, "pictures": 1}, 413, "have more than the"),
        ({"max_video_seconds": 1.9}, 413, "lasts 2 seconds, more than the 1.9"),
        ({"video_time_limit": 1e-9}, 413, "takes too long to decode"),
    ],
)
def test_what_videos_may_cost_is_bounded(pool, film, options, status, message):
    with pytest.raises(MediaError, match=message) as caught:
        load_videos(pool, [clip(film), clip(film)], **options)
    assert caught.value.status == status and caught.value.field in ("messages", VIDEO_FIELD)
    assert len(load_videos(pool, [clip(film), clip(film)], max_frames=8, max_request_pixels=8 * 3072)) == 2


def test_what_is_no_video_is_told_by_its_field(pool, film):
    for data, message in ((PNG, "not a video in a format"), (film[:500], "not a video|damaged|cut short")):
        with pytest.raises(MediaError, match=message) as caught:
            load_videos(pool, [clip(data)])
        assert (caught.value.status, caught.value.field) == (400, VIDEO_FIELD)
    with pytest.raises(MediaError, match=r"fetches no videos \(--media-domain\)\. Send the video itself") as caught:
        load_videos(pool, [("https://a.example/v", VIDEO_FIELD, 1, "even")])
    assert caught.value.status == 403
    with pytest.raises(MediaError, match="must be a string with a video's URL"):
        load_videos(pool, [("", VIDEO_FIELD, 1, "even")])


def test_without_the_extra_a_server_says_so(pool, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match="this server reads no videos: videos need PyAV") as caught:
        load_videos(pool, [clip(b"x")])
    assert caught.value.status == 403


def test_a_video_is_asked_for_as_a_video_over_the_web():
    reader = Media(MediaOptions(domains=("a.example",)), None)
    kinds = {kind: downloader._headers["Accept"] for kind, downloader in reader._downloaders.items()}
    assert kinds == {"picture": "image/*", "video": "video/*"}
    assert reader._downloaders["video"]._max_bytes == MediaOptions().max_video_bytes
