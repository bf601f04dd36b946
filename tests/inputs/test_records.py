"""Records of data files: every form of the same sample gives the same input, and each mistake is told apart."""

import base64
import io
import pickle
import tarfile
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsvl2_jax import configs
from dsvl2_jax.errors import DataError, SampleError
from dsvl2_jax.inputs import image_sources
from dsvl2_jax.inputs.image_sources import FilePool, index_tar, open_images
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.inputs.records import parse_record, process, resolve

MICRO = Path(configs.__file__).parent / "micro"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_dir(MICRO)


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    (root / "sub").mkdir()
    (root / "a.png").write_bytes(png(1))
    (root / "sub" / "b.png").write_bytes(png(2, (90, 30)))
    (root / "broken.png").write_bytes(png(3)[:60])
    (root.parent / "secret.png").write_bytes(png(4))
    for name, members in (("x-0.tar", ["a.png"]), ("x-1.tar", ["sub/b.png"])):
        with tarfile.open(root / name, "w") as archive:
            for member in members:
                archive.add(root / member, f"./{member}")
    return root


def read(processor: Processor, record: dict, images: Path | str, mask_prompt: bool = True) -> ModelInputs:
    store = open_images(str(images), "unused.jsonl")
    return process(resolve(parse_record(record), processor, store), processor, mask_prompt)


def same(one: ModelInputs, other: ModelInputs) -> bool:
    fields = ("input_ids", "labels", "image_index", "tiles", "tile_grid")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


SYSTEM, FIRST, ANSWER, SECOND, LAST = "Be brief.", "<image>\nWhat? <image>", "A cat.", "Sure?", "Yes."

MESSAGES = {
    "messages": [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": FIRST, "images": ["a.png", "sub/b.png"]},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": SECOND},
        {"role": "assistant", "content": LAST},
    ]
}
FORMS = {
    "images beside the turns": {
        "images": ["a.png", "sub/b.png"],
        "messages": [{"role": m["role"], "content": m["content"]} for m in MESSAGES["messages"]],
    },
    "LLaVA": {
        "id": 7,
        "image": ["a.png", "sub/b.png"],
        "conversations": [
            {"from": "system", "value": SYSTEM},
            {"from": "human", "value": FIRST},
            {"from": "gpt", "value": ANSWER},
            {"from": "user", "value": SECOND},
            {"from": "assistant", "value": LAST},
        ],
    },
    "content parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "a.png"},
                    {"type": "text", "text": "What? "},
                    {"type": "image_url", "image_url": {"url": "sub/b.png"}},
                ],
            },
            *MESSAGES["messages"][2:],
        ]
    },
}


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_ids_labels_and_tiles(processor, folder, form, mask_prompt):
    expected = read(processor, MESSAGES, folder, mask_prompt)
    assert len(expected.tile_grid) == 2
    assert same(read(processor, FORMS[form], folder, mask_prompt), expected)


def test_masked_labels_are_the_answers_alone(processor, folder):
    inputs = read(processor, MESSAGES, folder, mask_prompt=True)
    learnt = inputs.labels[1:][inputs.labels[1:] >= 0]
    assert processor.tokenizer.decode(learnt) == f"{ANSWER}{processor.tokenizer.eos_token}{LAST}" + (
        processor.tokenizer.eos_token
    )


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_images_without_tags_come_first_in_the_first_user_turn(processor, folder, key):
    def record(text: str, **more: object) -> dict:
        return {key: [{"from": "human", "value": text}, {"from": "gpt", "value": "A."}]} | more

    untagged = read(processor, record("What?", image=["a.png", "sub/b.png"]), folder)
    assert same(untagged, read(processor, record("<image>\n<image>\nWhat?", image=["a.png", "sub/b.png"]), folder))


def test_plain_text_is_learnt_whole_between_bos_and_eos(processor, folder):
    inputs = read(processor, {"text": "Once upon a time."}, folder)
    tokenizer = processor.tokenizer
    expected = [tokenizer.bos_id, *tokenizer.encode("Once upon a time."), tokenizer.eos_id]
    assert inputs.input_ids.tolist() == inputs.labels.tolist() == expected
    assert len(inputs.tiles) == 0


def test_text_with_images_masks_image_positions_only(processor, folder):
    inputs = read(processor, {"text": "Left <image> right", "images": ["a.png"]}, folder)
    assert np.array_equal(inputs.labels < 0, inputs.image_mask)
    assert inputs.image_mask.any() and not inputs.image_mask[1]
    caption = read(processor, {"text": "A cat.", "image": "a.png"}, folder)
    assert caption.image_mask[1] and same(
        caption, read(processor, {"text": "<image>\nA cat.", "image": "a.png"}, folder)
    )


def ask(image: object) -> dict:
    return {"image": image, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]}


def test_base64_is_the_same_decoded_in_pieces(monkeypatch):
    monkeypatch.setattr(image_sources, "_BASE64_PIECE", 8)
    for size in range(40):
        content = bytes(range(size))
        text = base64.b64encode(content).decode()
        assert image_sources.decode_base64(text) == content
        assert image_sources.decode_base64("\n".join([text[:5], f" {text[5:]}\t"])) == content
        assert image_sources.decode_base64(f"{text[:5]}\u2009{text[5:]}") == content
    for wrong in ("AAAAAAA=AAAA", "AA==AAAAAAAA", "AAA", "AAAAAAAAA", "AAAA====", "AAA*"):
        with pytest.raises(SampleError, match="not valid base64"):
            image_sources.decode_base64(wrong)


def test_folder_tar_and_inline_images_give_the_same_tiles(processor, folder):
    expected = read(processor, ask("a.png"), folder)
    text = base64.b64encode(png(1)).decode()
    inline = [text, f"data:image/png;base64,{text}", {"base64": text}, {"bytes": text, "path": "elsewhere.png"}]
    wrapped = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    inline += [f"data:;BASE64,{urllib.parse.quote(text, safe='')}", f"data:image/png;name=a.png;base64,{wrapped}"]
    for image in (*inline, {"path": "a.png"}, {"url": f"data:image/png;base64,{text}"}):
        assert same(read(processor, ask(image), folder), expected)
    for name in ("a.png", "./a.png"):
        assert same(read(processor, ask(name), folder / "x-*.tar"), expected)
    assert same(read(processor, ask("sub/b.png"), folder), read(processor, ask("sub/b.png"), folder / "x-*.tar"))


@pytest.mark.parametrize("images", ["", "x-*.tar"], ids=["folder", "tar"])
@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        (ask("nope.png"), "image missing", "'nope.png'"),
        (ask(3), "image reference", "found int"),
        (ask("https://example.com/a.png"), "image reference", "on the web"),
        (ask("data:image/png,xyz"), "image reference", "only data: URIs in base64"),
        (ask("data:image/png;base64,%%%"), "image reference", "not valid base64"),
        (ask("data:image/png;base64,AAAA"), "image unreadable", "not an image"),
    ],
)
def test_a_bad_image_is_named(processor, folder, images, record, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        read(processor, record, folder / images if images else folder)
    assert error.value.reason == reason


def test_names_cannot_lead_out_of_the_folder(processor, folder):
    for name in ("../secret.png", "sub/../../secret.png", str(folder.parent / "secret.png"), "file:///etc/passwd"):
        with pytest.raises(SampleError, match="outside of the image folder"):
            read(processor, ask(name), folder)
    assert read(processor, ask("sub/../a.png"), folder).tiles.any()
    assert read(processor, ask(str(folder / "a.png")), folder).tiles.any()


def test_a_truncated_image_is_unreadable_and_named(processor, folder):
    with pytest.raises(SampleError, match=r"broken\.png") as error:
        read(processor, ask("broken.png"), folder)
    assert error.value.reason == "image unreadable"


def test_a_name_in_two_shards_is_refused(processor, folder, tmp_path):
    for shard in ("0.tar", "1.tar"):
        with tarfile.open(tmp_path / shard, "w") as archive:
            archive.add(folder / "a.png", "a.png")
    with pytest.raises(SampleError, match=r"not one image.*0\.tar.*1\.tar"):
        read(processor, ask("a.png"), tmp_path / "*.tar")


TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ([1], "record", "expected a JSON object, found a list"),
        ({"prompt": "x"}, "record", 'expected "messages", "conversations" or "text", or.*; found prompt'),
        ({"text": 5}, "record", '"text" of type int'),
        ({"text": "  "}, "record", "empty"),
        ({"messages": []}, "record", "one or more turns"),
        ({"messages": ["Hi."]}, "record", "turn 1: expected an object.*found str"),
        ({"messages": [{"role": "user"}]}, "record", "turn 1.*found role"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "record", "unknown role 'bot'"),
        ({"messages": [{"role": "user", "content": 1}]}, "record", "content is of type int"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "record", "neither text nor an image"),
        ({"messages": TURNS[:1]}, "conversation", "ends in an assistant turn"),
        ({"messages": TURNS[::-1]}, "conversation", "expected a turn of the user"),
        ({"messages": [{**TURNS[0], "content": "<image>"}, TURNS[1]]}, "conversation", "1 <image> tag.*0 image"),
        ({"messages": [{**TURNS[0], "images": ["a.png"]}, TURNS[1]], "image": "a.png"}, "record", "given twice"),
        ({"messages": [TURNS[0], {**TURNS[1], "images": ["a.png"]}]}, "conversation", "turn 2 .assistant. has 0"),
        (
            {"messages": [{**TURNS[0], "content": "<image>"}, TURNS[1]], "images": ["a.png", "a.png"]},
            "conversation",
            "1 <image> tag.* 2 image",
        ),
    ],
)
def test_a_bad_record_says_what_was_expected(processor, folder, record, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        read(processor, record, folder)
    assert error.value.reason == reason


def test_errors_and_stores_survive_pickling_into_workers(folder):
    error = pickle.loads(pickle.dumps(SampleError("record", "what")))
    assert (error.reason, str(error)) == ("record", "what")
    pool = FilePool()
    path = str(folder / "a.png")
    assert pool.read(path, 1, 3) == pickle.loads(pickle.dumps(pool)).read(path, 1, 3) == b"PNG"
    store = open_images(str(folder / "x-*.tar"), "a.jsonl")
    assert pickle.loads(pickle.dumps(store)).find("a.png") == store.find("a.png") == png(1)
    with pytest.raises(OSError, match="shorter"):
        pool.read(path, 0, 1 << 20)


def test_image_stores_that_do_not_exist_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder of images"):
        open_images(str(tmp_path / "nothing"), "a.jsonl")
    with pytest.raises(DataError, match="the pattern matches no file"):
        open_images(str(tmp_path / "*.tar"), "a.jsonl")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as archive:
        archive.add(folder / "a.png", "a.png")
    with pytest.raises(DataError, match="uncompressed tar"):
        open_images(str(tmp_path / "zipped.tar"), "a.jsonl")
    whole = (folder / "x-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:600])
    with pytest.raises(DataError, match="not a whole, uncompressed tar"):
        index_tar(str(tmp_path / "cut.tar"))
