"""What a conversation or a raw prompt may be, and errors that say which turn is wrong and why."""

import numpy as np
import pytest
from golden import DATA
from PIL import Image

from dsvl2_jax.errors import ConversationError, ImageError
from dsvl2_jax.inputs.conversation import prepend_image_tags
from dsvl2_jax.inputs.processor import Processor


@pytest.fixture(scope="module")
def mini() -> Processor:
    return Processor.from_dir(DATA / "checkpoints" / "mini-tiny")


def user(content, **rest):
    return {"role": "user", "content": content, **rest}


def assistant(content, **rest):
    return {"role": "assistant", "content": content, **rest}


SYSTEM = {"role": "system", "content": "Be brief."}
PICTURE = [Image.new("RGB", (8, 8))]


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        ([], {}, "empty"),
        ("hello", {}, "str"),
        (["hello"], {}, r"turn 1: .*found str"),
        ([{"role": "user"}], {}, "turn 1: .*found role"),
        ([{"role": "robot", "content": ""}], {}, r"turn 1: unknown role 'robot'.*'user', .*'system'"),
        ([{"role": ["user"], "content": ""}], {}, "turn 1: unknown role"),
        ([user(None)], {}, r"turn 1 \(user\): content is of type NoneType"),
        ([user("a\ud800")], {}, r"turn 1 \(user\): content is not valid Unicode at character 1"),
        ([SYSTEM], {}, "turn 1 .*Add a user turn"),
        ([user("a"), SYSTEM], {}, r"turn 2 \(system\).*only be the first"),
        ([SYSTEM, SYSTEM, user("a")], {}, r"turn 2 \(system\).*only be the first"),
        ([assistant("a")], {}, r"turn 1 \(assistant\): expected a turn of the user"),
        ([SYSTEM, user("a"), user("b")], {}, r"turn 3 \(user\): expected a turn of the assistant"),
        ([user("a"), assistant("b")], {}, r"turn 2 \(assistant\) is the last and has text"),
        ([user("a")], {"inference": False}, r"turn 1 \(user\) is the last"),
        ([user("a"), assistant(" ")], {"inference": False}, r"turn 2 \(assistant\) is the last"),
        ([user("<image>")], {}, r"1 <image> tag.* 0 image.*turn 1 \(user\) has 1 and 0"),
        ([user("a", images=PICTURE)], {}, r"0 <image> tag.* 1 image"),
        ([user("<image><image>"), assistant("b"), user("c", images=PICTURE)], {}, r"2 <image> tag.* 1 image.*turn 3"),
        ([user("<image>", images=PICTURE), assistant("<image>")], {}, r"turn 2 \(assistant\): has 1 <image>"),
        ([user("<image>", image=PICTURE, images=PICTURE)], {}, r'turn 1 \(user\): "images" and "image" are both given'),
        ([user("Hi.", speaker=1)], {}, r"turn 1 \(user\): has speaker, which the model does not use"),
        ([user("<image_placeholder>\nWhat?", images=PICTURE)], {}, "<image_placeholder>.* Write <image> where"),
        ([{"role": "User", "content": "<image_placeholder>"}], {}, "<image_placeholder>.* Write <image> where"),
        ([user("<image>")], {"images": PICTURE * 2}, "1 <image> tag.* 2 image"),
    ],
)
def test_bad_conversation_is_an_error_that_says_where_and_why(mini, conversation, options, message):
    with pytest.raises(ConversationError, match=message):
        mini(conversation, **options)


def test_bad_prompt_is_an_error(mini):
    with pytest.raises(ConversationError, match=r"the prompt has 2 <image> tag\(s\) but 1 image"):
        mini(prompt="<image><image>", images=PICTURE)
    with pytest.raises(ConversationError, match="the prompt is of type int"):
        mini(prompt=3)
    with pytest.raises(ConversationError, match="images is of type"):
        mini(prompt="<image>", images=PICTURE[0])
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        mini(prompt="<image>", images=["nowhere.png"])


def test_conversation_may_leave_the_empty_answer_out(mini):
    turns = [{"role": "user", "content": "Hi."}]
    short, long = mini(turns), mini([*turns, {"role": "assistant", "content": "  "}])
    np.testing.assert_array_equal(short.input_ids, long.input_ids)
    assert short.input_ids[-1] == mini.tokenizer.encode(":")[0]


def test_image_tags_are_put_in_front_of_a_prompt_without_any():
    assert prepend_image_tags("What?", 2) == "<image>\n<image>\nWhat?"
    assert prepend_image_tags("See <image>.", 2) == "See <image>."
    assert prepend_image_tags("What?", 0) == "What?"
