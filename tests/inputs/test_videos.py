"""Frames of videos: the right ones of every kind of file and of folders, and what is no video is named."""

import io
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import videos
from PIL import Image

from dsvl2_jax.errors import ImageError, UsageError
from dsvl2_jax.inputs.video_file import LimitError, VideoLimits
from dsvl2_jax.inputs.videos import read_frames

SHADES = [5 * i for i in range(50)]  # five seconds
CLOSE = 6  # what codecs may change of a gray value


def near(pictures, expected):
    found = videos.grays(pictures)
    return len(found) == len(expected) and all(abs(a - b) <= CLOSE for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("container, codec", videos.KINDS)
def test_the_frames_of_every_kind_of_file_are_the_right_ones(container, codec):
    data = videos.video(SHADES, container, codec)
    even = read_frames(data, 5)
    assert near(even, [25, 75, 125, 175, 225]) and {picture.size for picture in even} == {(64, 48)}
    assert {picture.mode for picture in even} == {"RGB"}
    assert near(read_frames(data, 1), [125])
    assert near(read_frames(data, 50), SHADES) and near(read_frames(data, 1024), SHADES)


def test_scenes_are_found_in_a_file_and_in_a_folder(tmp_path):
    shades = [20] * 14 + [200] * 22 + [90] * 14
    for number, shade in enumerate(shades):
        Image.new("RGB", (20 + number, 10), (shade, shade, shade)).save(tmp_path / f"{number}.png")
    for source in (videos.video(shades), tmp_path):
        assert videos.grays(read_frames(source, 3, "scene"))[1] in range(196, 205)
        assert near(read_frames(source, 3, "scene"), [20, 200, 90])
        assert near(read_frames(source, 8, "scene"), [20, 200, 90])  # no more scenes than there are
        assert near(read_frames(source, 1, "scene"), [200])


def test_frames_are_those_shown_at_their_moments_where_times_are_uneven():
    # Of 35 tenths of a second the fifth frame is shown from the fourth to the thirtieth: three of four parts' middles.
    times = list(itertools.accumulate([1, 1, 1, 1, 26, 1, 1, 1, 1], initial=0))
    assert near(read_frames(videos.video([10 * i for i in range(10)], times=times), 4), [40, 50])


@pytest.mark.parametrize("keyframes", [1, 5, 100])
def test_frames_do_not_depend_on_where_keyframes_are(keyframes):
    assert near(read_frames(videos.video(SHADES, keyframes=keyframes), 7), [15, 50, 85, 125, 160, 195, 230])


def test_paths_and_bytes_and_names_give_the_same_and_leave_nothing(tmp_path, monkeypatch):
    data = videos.video(SHADES)
    file = tmp_path / "a.mp4"
    file.write_bytes(data)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    expected = [np.asarray(picture) for picture in read_frames(data, 3)]
    for source in (file, str(file), bytearray(data), memoryview(data)):
        for found, other in zip(read_frames(source, 3), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(found), other)
    assert os.listdir(tmp_path) == ["a.mp4"]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def turned(data: bytes, degrees: int) -> bytes:
    """An MP4 whose header says that players turn it clockwise."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    unit = 1 << 16
    matrix = [cos * unit, sin * unit, 0, -sin * unit, cos * unit, 0, 0, 0, 1 << 30]
    at = data.index(b"tkhd") + 4 + 40
    return data[:at] + b"".join(value.to_bytes(4, "big", signed=True) for value in matrix) + data[at + 36 :]


def test_frames_are_turned_as_players_do():
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255  # top left
    file = io.BytesIO()
    with videos.av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.mux(stream.encode(videos.av.VideoFrame.from_ndarray(pixels, "rgb24")))
        output.mux(stream.encode())
    corners = {0: (0, 0), 90: (1, 0), 180: (1, 1), 270: (0, 1)}  # where the white one comes to lie: right, down
    for degrees, (right, down) in corners.items():
        (picture,) = read_frames(turned(file.getvalue(), degrees) if degrees else file.getvalue())
        assert picture.size == ((48, 64) if degrees % 180 else (64, 48))
        half = np.array(picture.size) // 2
        seen = [
            [picture.getpixel((int(half[0] * (x + 0.5)), int(half[1] * (y + 0.5))))[0] for x in (0, 1)] for y in (0, 1)
        ]
        assert seen[down][right] > 200 and sum(map(sum, seen)) < 300, (degrees, seen)


def test_pixels_that_are_not_square_become_so():
    (picture,) = read_frames(videos.video([9], aspect=2))
    assert picture.size == (128, 48)
    (picture,) = read_frames(videos.video([9], aspect=1000))  # a mistake
    assert picture.size == (64, 48)


def test_folders_are_read_in_the_order_of_numbers_and_pictures_alone_count(tmp_path):
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    assert videos.grays(read_frames(tmp_path, 1024)) == [20 * number for number in range(12)]
    assert videos.grays(read_frames(tmp_path, 3)) == [40, 120, 200]
    listed = [tmp_path / "frame1.png", Image.new("RGB", (4, 4)), (tmp_path / "frame2.png").read_bytes()]
    assert videos.grays(read_frames(listed)) == [20, 0, 40]


# What is no video


def test_what_is_missing_empty_or_something_else_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    (tmp_path / "none.mp4").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    cases = {
        tmp_path / "nowhere.mp4": "nowhere.mp4: no such file",
        tmp_path / "empty": r"empty: has no frames\. Expected one or more pictures",
        tmp_path / "none.mp4": "none.mp4: not a video in a format that is read",
        tmp_path / "a.png": "a.png: not a video in a format that is read",
        "a\0b.mp4": "cannot be read",
        5: "video object int: expected a file's path",
        b"no video": "video of 8 bytes: not a video",
        videos.sound(): "video of .* bytes: has no moving pictures, only audio",
        videos.sound("mp3", "libmp3lame"): "not a video in a format that is read",
    }
    for source, message in cases.items():
        with pytest.raises(ImageError, match=message):
            read_frames(source)
    with pytest.raises(ImageError, match="has no frames"):
        read_frames([])
    with pytest.raises(UsageError, match="frames is 0"):
        read_frames(videos.video([1]), 0)


def test_a_file_that_is_cut_short_or_damaged_is_named(tmp_path):
    shades = [i * 2 % 255 for i in range(100)]
    # Its index comes first.
    whole = videos.video(shades, container_options={"movflags": "faststart"}, path=tmp_path / "whole.mp4")
    for part in (0.3, 0.6, 0.95):
        with pytest.raises(ImageError, match=r"cut short|damaged"):
            read_frames(whole[: int(len(whole) * part)])
    rng = np.random.default_rng(0)
    noise = bytearray(whole)
    start = noise.index(b"mdat") + 4
    noise[start:] = rng.bytes(len(noise) - start)
    with pytest.raises(ImageError, match=r"damaged: the frame at \d\.\d\d seconds cannot be decoded"):
        read_frames(bytes(noise))


def test_any_damage_ends_in_frames_or_in_an_image_error():
    rng = np.random.default_rng(1)
    for container, codec in (("mp4", "libx264"), ("webm", "libvpx-vp9"), ("mpegts", "libx264"), ("avi", "mpeg4")):
        whole = videos.video(SHADES[:20], container, codec)
        for _ in range(12):
            broken = bytearray(whole)
            for place in rng.integers(0, len(whole), rng.integers(1, 30)):
                broken[place] = rng.integers(0, 256)
            try:
                frames = read_frames(bytes(broken[: rng.integers(1, len(whole) + 1)]), 4, rng.choice(["even", "scene"]))
                assert 1 <= len(frames) <= 4
            except ImageError as error:
                assert str(error).startswith("video of ")


def test_limits_are_kept_and_named():
    data = videos.video(SHADES)
    cases = [
        (VideoLimits(max_pixels=64 * 48 - 1), "its frames are 64×48 pixels, more than the 3071"),
        (VideoLimits(max_total_pixels=64 * 48 * 3 - 1), "have more than the 9215 pixels"),
        (VideoLimits(max_seconds=4.9), r"lasts 5 seconds, more than the 4\.9"),
        (VideoLimits(max_stored=49), "has more than the 49 frames"),
        (VideoLimits(deadline=time.monotonic() - 1), "takes too long to decode"),
    ]
    for limits, message in cases:
        with pytest.raises(LimitError, match=message):
            read_frames(data, 3, limits=limits)
    assert len(read_frames(data, 3, limits=VideoLimits(64 * 48, 64 * 48 * 3, 5.0, 50, time.monotonic() + 60))) == 3


def test_without_the_extra_a_file_says_what_to_install_and_a_folder_is_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = """if True:
        import sys
        sys.modules["av"] = None
        from dsvl2_jax.inputs.videos import read_frames
        assert len(read_frames(sys.argv[1])) == 1
        try:
            read_frames(b"x")
        except Exception as error:
            print(type(error).__name__, error)
    """
    child = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert child.stdout.startswith("UsageError videos need PyAV, which is not installed: pip install -e '.[video]'")
