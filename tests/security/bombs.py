"""Files that claim or unpack to far more than they are, read with little memory to spare.

python tests/security/bombs.py FOLDER prints, as JSON, what each of them came to.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import resource
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from videos import video

from dsvl2_jax.checkpoint.safetensors_source import Source
from dsvl2_jax.inputs.image_sources import decode_base64, index_tar
from dsvl2_jax.inputs.images import load_image
from dsvl2_jax.inputs.videos import read_frames

SPARE = 200 << 20  # bytes; each file asks for more


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def resized(form: str, side: int) -> bytes:
    """A small file of a format whose header claims another size."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, form)
    data = bytearray(file.getvalue())
    if form == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif form == "GIF":
        data[6:10] = struct.pack("<HH", min(side, 65535), min(side, 65535))
    elif form == "TIFF":
        at = struct.unpack_from("<I", data, 4)[0]
        for entry in range(struct.unpack_from("<H", data, at)[0]):
            tag = at + 2 + 12 * entry
            if struct.unpack_from("<H", data, tag)[0] in (256, 257):  # width and height, in 4 bytes each
                data[tag : tag + 12] = struct.pack("<HHII", struct.unpack_from("<H", data, tag)[0], 4, 1, side)
    return bytes(data)


def resized_video(side: int) -> bytes:
    """A small WebM whose second half claims another size."""
    data = bytearray(video([50 * i for i in range(5)], "webm", "libvpx", keyframes=2))
    at = data.rindex(b"\x9d\x01\x2a")  # of a keyframe of VP8, before its width and height
    data[at + 3 : at + 7] = struct.pack("<HH", side, side)
    return bytes(data)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def tar(path: Path, size: int) -> str:
    member = tarfile.TarInfo("a.png")
    member.size = size
    return str(written(path, member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))


def weights(folder: Path, header: int) -> Path:
    folder.mkdir()
    written(folder / "model.safetensors", struct.pack("<Q", header) + b"{" + b" " * 100)
    return folder


def cases(folder: Path) -> dict[str, Callable[[], object]]:
    text = zlib.compress(bytes(256 << 20), 1)
    many = [chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1 << 20), 1))] * 256
    animated = io.BytesIO()
    frames = [Image.new("P", (1000, 1000), i) for i in range(2)]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[::-1] * 50)
    url = base64.b64encode(png(60_000)).decode()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    return {
        "video pixels": lambda: read_frames(resized_video(16_383)),
        "video playlist": lambda: read_frames(playlist),
        "PNG pixels": lambda: load_image(png(60_000)),
        "PNG text": lambda: load_image(png(8, chunk(b"zTXt", b"key\0\0" + text))),
        "PNG international text": lambda: load_image(png(8, chunk(b"iTXt", b"key\0\1\0\0\0" + text))),
        "PNG profile": lambda: load_image(png(8, chunk(b"iCCP", b"key\0\0" + text))),
        "PNG many texts": lambda: load_image(png(8, *many)),
        "BMP pixels": lambda: load_image(resized("BMP", 60_000)),
        "GIF pixels": lambda: load_image(resized("GIF", 60_000)),
        "TIFF pixels": lambda: load_image(resized("TIFF", 60_000)),
        "PPM pixels": lambda: load_image(b"P6 60000 60000 255\n" + bytes(10)),
        "animation": lambda: load_image(animated.getvalue()).size,
        "base64": lambda: load_image(decode_base64(url)),
        "tar member": lambda: index_tar(tar(folder / "a.tar", 8 << 30)),
        "tar member beyond all numbers": lambda: index_tar(tar(folder / "b.tar", 1 << 62)),
        "compressed tar": lambda: index_tar(str(written(folder / "c.tar", gzip.compress(bytes(1 << 20))))),
        "weights' header": lambda: Source(weights(folder / "far", 1 << 62)),
        "weights' header of the file's size": lambda: Source(weights(folder / "near", 1 << 34)),
    }


def main(folder: Path) -> None:
    todo = cases(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
    came_to = {}
    for name, case in todo.items():
        try:
            came_to[name] = f"read: {case()!r}"
        except BaseException as error:
            came_to[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(came_to))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
