"""A video opens nothing but itself, whatever it names, and is read by few of FFmpeg's readers."""

from __future__ import annotations

import builtins
import os
import socket

import pytest
import videos

from dsvl2_jax.errors import ImageError
from dsvl2_jax.inputs.videos import read_frames

SECRET = videos.video([10, 20, 30])


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(SECRET)
    return tmp_path / "secret.mp4"


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def scripts(name: str) -> dict[str, bytes]:
    return {
        "HLS": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n".encode(),
        "list": f"ffconcat version 1.0\nfile '{name}'\n".encode(),
        "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "DASH": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{name}</BaseURL>'
        "</Period></MPD>".encode(),
        "SMIL": f'<smil><body><video src="{name}"/></body></smil>'.encode(),
        "reference": b"RTSPtextRTSP://" + name.encode(),
    }


@pytest.mark.parametrize("kind", scripts(""))
def test_what_names_other_files_or_hosts_is_no_video(kind, secret, listener, tmp_path):
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.mp4"
    for name in (str(secret), f"file:{secret}", url):
        data = scripts(name)[kind]
        with pytest.raises(ImageError, match="not a video in a format that is read"):
            read_frames(data)
        for suffix in ("m3u8", "mp4", "ffconcat", "sdp", "mpd"):
            file = tmp_path / f"a.{suffix}"
            file.write_bytes(data)
            with pytest.raises(ImageError, match="not a video in a format that is read"):
                read_frames(file)


def test_names_are_paths_and_never_protocols(secret, listener, tmp_path):
    port = listener.getsockname()[1]
    names = (f"concat:{secret}|{secret}", f"file:{secret}", f"http://127.0.0.1:{port}/a.mp4", f"subfile,,:{secret}")
    for name in (*names, f"crypto:{secret}", f"cache:{secret}", "pipe:0", "lavfi:testsrc", "/dev/video0"):
        with pytest.raises(ImageError, match=r"no such file|neither a file"):
            read_frames(name)


def test_reading_opens_the_file_alone(secret, monkeypatch):
    opened, real = [], builtins.open

    def spy(path, *arguments, **options):
        opened.append(os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", spy)
    assert len(read_frames(secret)) == 3
    assert opened == [str(secret)]


@pytest.mark.parametrize("container, codec", [("matroska", "ffv1"), ("avi", "rawvideo"), ("nut", "libx264")])
def test_other_codecs_and_containers_are_named(container, codec):
    data = videos.video([1, 2], container, codec)
    with pytest.raises(ImageError, match=rf"stored as {codec}, which is not read|not a video in a format"):
        read_frames(data)


def test_a_pipe_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ImageError, match="neither a file nor a folder"):
        read_frames(tmp_path / "pipe.mp4")
