"""What stands for a video: in parts, beside a turn, in a record, in a list; and what cannot be is named."""

import dataclasses

import numpy as np
import pytest
from golden import DATA
from PIL import Image

from dsvl2_jax.errors import ConversationError, ImageError, SampleError, UsageError
from dsvl2_jax.inputs.image_sources import FolderImages
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.inputs.records import parse_record, process, resolve
from dsvl2_jax.inputs.tile_budget import TileBudget
from dsvl2_jax.inputs.turns import read_turn
from dsvl2_jax.inputs.visuals import Picture, Video, read_visual

ANSWER = {"role": "assistant", "content": "Red."}


@pytest.fixture(scope="module")
def mini() -> Processor:
    return Processor.from_dir(DATA / "checkpoints" / "mini-tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a folder of twelve frames, clip, and a picture, a.png."""
    root = tmp_path_factory.mktemp("data")
    (root / "clip").mkdir()
    for number in range(12):
        Image.new("RGB", (800, 400), (20 * number, 0, 0)).save(root / "clip" / f"{number}.png")
    Image.new("RGB", (800, 400), "blue").save(root / "a.png")
    return root


def same(one, other):
    for name in ("input_ids", "labels", "image_index", "tiles", "tile_grid", "image_sizes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_every_way_to_give_a_video_is_its_frames_as_images(mini, folder):
    clip = folder / "clip"
    frames = [clip / f"{number}.png" for number in (2, 6, 10)]
    expected = mini([{"role": "user", "content": "<image>\n<image>\n<image>\nWhat?", "images": frames}])
    assert expected.tile_grid.tolist() == [[1, 1]] * 3
    three = {"video": clip, "frames": 3}
    text = {"type": "text", "text": "What?"}
    turns = [
        {"role": "user", "content": [{"type": "video", **three}, text]},
        {"role": "user", "content": [{"type": "video_url", "video_url": {"url": str(clip)}, "frames": 3}, text]},
        {"role": "user", "content": [{"type": "video_url", "video_url": {"url": str(clip), "frames": 3}}, text]},
        {"role": "user", "content": [{"type": "input_video", "video_url": str(clip), "frames": 3}, text]},
        {"role": "user", "content": [{"video": [clip / f"{n}.png" for n in range(12)], "frames": 3}, text]},
        {"role": "user", "content": "<video>\nWhat?", "videos": [three]},
        {"role": "user", "content": "<image>\nWhat?", "video": three},
        {"role": "user", "content": "<image>\nWhat?", "images": [three]},
    ]
    for turn in turns:
        same(mini([turn]), expected)
    inputs = mini([{"role": "user", "content": "<image>\nWhat?"}], images=[three])
    same(inputs, expected)
    assert inputs.prompt == expected.prompt
    processor = dataclasses.replace(mini, frames=3)
    same(processor([{"role": "user", "content": "<video>\nWhat?", "video": clip}]), expected)
    raw = mini(prompt="<image>\nWhat?", images=[three])
    same(raw, mini(prompt="<image>\n<image>\n<image>\nWhat?", images=frames))


def test_frames_are_cut_into_tiles_where_a_budget_says_so(mini, folder):
    part = {"type": "video", "video": folder / "clip", "frames": 3, "max_tiles": 4}
    assert mini([{"role": "user", "content": [part]}]).tile_grid.tolist() == [[2, 1]] * 3
    del part["max_tiles"]
    assert mini([{"role": "user", "content": [part]}]).tile_grid.tolist() == [[1, 1]] * 3
    assert mini([{"role": "user", "content": [part]}], min_tiles=2, max_tiles=4).tile_grid.tolist() == [[2, 1]] * 3
    two = {"type": "video", "video": folder / "clip", "frames": 2}
    assert mini([{"role": "user", "content": [two]}]).tile_grid.tolist() == [[3, 2]] * 2


def test_images_and_videos_keep_the_order_of_their_tags():
    turn = {
        "role": "user",
        "content": "A <video> B <image> C <video>",
        "images": ["a.png"],
        "videos": ["1.mp4", "2.mp4"],
    }
    read = read_turn(turn, "turn 1")
    assert read.text == "A <image> B <image> C <image>"
    assert read.images == ({"video": "1.mp4"}, "a.png", {"video": "2.mp4"})
    without = read_turn({**turn, "content": "<image><image><image>"}, "turn 1")
    assert without.images == ("a.png", {"video": "1.mp4"}, {"video": "2.mp4"})
    # Without a video its tag is text, as ever.
    assert read_turn({"role": "user", "content": "<video>"}, "turn 1").text == "<video>"


@pytest.mark.parametrize(
    "turn, message",
    [
        ({"content": "<video> <video>", "video": "a.mp4"}, r"2 <video> tag\(s\) in the text, but 1 given"),
        ({"content": "<video> <image>", "video": "a.mp4"}, r"1 <image> tag\(s\) in the text, but 0 given"),
        ({"content": [{"type": "video"}]}, r"content\[0\] has no video of its own"),
        ({"content": [{"type": "image", "max_tiles": 4}], "image": "a"}, r"content\[0\] has no image of its own"),
        ({"content": [{"type": "video", "video": "a", "url": "b"}]}, "has its video twice, under video and url"),
        ({"content": [{"type": "video", "video": "a"}], "videos": ["b"]}, "images are given twice"),
        ({"content": "x", "video": "a", "videos": ["b"]}, '"videos" and "video" are both given'),
    ],
)
def test_turns_that_cannot_be_are_named(turn, message):
    with pytest.raises(ConversationError, match=f"turn 3.*{message}"):
        read_turn({"role": "user", **turn}, "turn 3")


def test_options_that_mean_nothing_are_named(mini, folder):
    part = {"type": "video", "video": folder / "clip", "fps": 2}
    with pytest.raises(ConversationError, match=r"has content\[0\]\.fps, which the model does not use"):
        mini([{"role": "user", "content": [part]}])
    for options, message in (
        ({"frames": 0}, "the video's frames is 0, expected a whole number from 1 to 1024"),
        ({"frame_choice": "first"}, "the video's frame_choice is 'first', expected even or scene"),
        ({"max_tiles": 0}, "the video's max_tiles is 0"),
    ):
        with pytest.raises(UsageError, match=message):
            mini([{"role": "user", "content": [{"type": "video", "video": folder / "clip", **options}]}])
    with pytest.raises(ImageError, match="has no frames"):
        mini([{"role": "user", "content": "<image>"}], images=[{"video": []}])


def test_a_reference_is_read_with_its_options():
    assert read_visual("a.png") == Picture("a.png")
    assert read_visual({"path": "a.png", "max_tiles": 2}) == Picture({"path": "a.png", "max_tiles": 2}, TileBudget(2))
    assert read_visual({"image": "a.png", "min_tiles": 2}) == Picture("a.png", TileBudget(None, 2))
    assert read_visual({"image": "a.png", "video": None}) == Picture("a.png")
    assert read_visual({"video": "a.mp4", "frames": 2}) == Video("a.mp4", 2)
    nested = {"url": "a.mp4", "frames": 2, "max_tiles": 3}
    assert read_visual({"video": nested, "max_tiles": 4}) == Video(nested, 2, None, TileBudget(4))


# Records


def learnt(record, mini, folder):
    return process(resolve(parse_record(record), mini, FolderImages(str(folder))), mini, False)


def test_a_records_videos_and_budgets_are_honoured(mini, folder):
    turns = [{"role": "user", "content": "<video>\nWhat?"}, ANSWER]
    expected = mini(
        [{**turns[0], "videos": [{"video": folder / "clip", "frames": 3}]}, ANSWER], inference=False, mask_prompt=False
    )
    records = [
        {"messages": turns, "video": "clip", "frames": 3},
        {"messages": turns, "videos": [{"path": "clip", "frames": 3}]},
        {"messages": [{**turns[0], "video": "clip"}, ANSWER], "frames": 3},
        {"messages": [{"role": "user", "content": "What?"}, ANSWER], "video": {"path": "clip"}, "frames": 3},
        {"query": "<image>\nWhat?", "response": "Red.", "video": "clip", "frames": 3, "frame_choice": "even"},
    ]
    for record in records:
        same(learnt(record, mini, folder), expected)
        assert parse_record(record).unused == ()
    tiles = {"query": "What?", "response": "Red.", "image": "a.png", "max_tiles": 2}
    assert learnt(tiles, mini, folder).tile_grid.tolist() == [[2, 1]]
    own = {**tiles, "image": [{"path": "a.png", "max_tiles": 1}, "a.png"]}
    assert learnt(own, mini, folder).tile_grid.tolist() == [[1, 1], [2, 1]]
    text = {"text": "<video>\nA red clip.", "video": "clip", "frames": 2, "frame_choice": "scene"}
    assert len(learnt(text, mini, folder).tile_grid) == 2


@pytest.mark.parametrize(
    "record, reason, message",
    [
        ({"video": "nope"}, "image missing", "image 'nope': no such file"),
        ({"video": "../x"}, "image reference", "is outside of the image folder"),
        ({"video": "https://a.example/a.mp4"}, "image reference", "is on the web"),
        ({"video": "clip", "frames": 0}, "record", "frames is 0"),
        ({"image": "a.png", "max_tiles": 0}, "record", "max_tiles is 0"),
        ({"image": "a.png", "min_tiles": 12}, "conversation", "Give max_tiles too"),
        ({"video": "clip", "objects": {"ref": ["x"], "bbox": [[1, 2, 3, 4]]}}, "record", "the frames of a video"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_are_broken_and_say_why(mini, folder, record, reason, message):
    with pytest.raises(SampleError, match=message) as caught:
        learnt(
            {"query": "<ref-object> <bbox>" if "objects" in record else "What?", "response": "Red.", **record},
            mini,
            folder,
        )
    assert caught.value.reason == reason


def test_options_of_videos_without_a_video_are_told():
    record = {"query": "What?", "response": "Red.", "image": "a.png", "frames": 3, "frame_choice": "even"}
    assert parse_record(record).unused == ("frames", "frame_choice")
