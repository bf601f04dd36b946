"""Everything that reads a file or a text of a user, as one function of its bytes: what the fuzzing runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsvl2_jax import configs
from dsvl2_jax.checkpoint import digests, locate, pytorch_file, safetensors_file, shards
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.infer.eval import metrics, results
from dsvl2_jax.infer.eval.benchmarks import refcoco_row_records, table_records
from dsvl2_jax.infer.eval.chat_request import ServerOptions, read_key
from dsvl2_jax.infer.eval.samples import read_samples, score
from dsvl2_jax.infer.serve.auth import read_keys
from dsvl2_jax.inputs.grounding import draw_boxes, parse_boxes
from dsvl2_jax.inputs.image_sources import FilePool, FolderImages, TarImages
from dsvl2_jax.inputs.images import image_size, load_image, tile_image
from dsvl2_jax.inputs.processor import Processor, ProcessorConfig
from dsvl2_jax.inputs.records import parse_record, process, resolve
from dsvl2_jax.inputs.tokenizer import PROCESSOR_TOKENS, StreamDecoder, Tokenizer
from dsvl2_jax.json_files import parse_json
from dsvl2_jax.messages import printable
from dsvl2_jax.model.config import Config
from dsvl2_jax.train.data.encoder_samples import Pairs, parse_regions, process_regions
from dsvl2_jax.train.data.files import open_data_file
from dsvl2_jax.train.log import run_log
from dsvl2_jax.train.settings import load as settings

MICRO = Path(configs.__file__).parent / "micro"
PICTURES = Path(configs.__file__).parent / "images"
TEXT = "The 3 cats <image> wrote: naïve 世界 😀\n\n <|ref|>"


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader, which returns or raises a `DSVL2Error`. ``kind`` and ``dictionary`` are `inputs.changed`'s."""

    name: str
    kind: str
    seeds: Callable[[], Sequence[Any]]
    read: Callable[[bytes, Path], Any]
    dictionary: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {}


def target(kind: str, seeds: Callable[[], Sequence[Any]], dictionary: Sequence[str] = ()) -> Callable:
    def add(read: Callable[[bytes, Path], Any]) -> Callable[[bytes, Path], Any]:
        name = read.__name__
        TARGETS[name] = Target(name, kind, functools.cache(seeds), read, tuple(dictionary))
        return read

    return add


@functools.cache
def processor() -> Processor:
    return Processor.from_dir(MICRO)


@functools.cache
def picture() -> bytes:
    return image_files()[0]


def micro(name: str) -> Callable[[], list[Any]]:
    return lambda: [json.loads((MICRO / name).read_text())]


def written(content: bytes, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def parsed(content: bytes) -> Any:
    """A value as a data file or request gives it; what is no JSON never gets further."""
    try:
        return parse_json(content)
    except ValueError as error:
        raise DSVL2Error(str(error)) from None


# Checkpoints


def safetensors_files() -> list[bytes]:
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}
    header["b.c"] = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
    text = json.dumps(header).encode()
    return [struct.pack("<Q", len(text)) + text + bytes(32)]


@target("bytes", safetensors_files)
def safetensors(content: bytes, folder: Path) -> None:
    safetensors_file.read_header(written(content, folder / "weights", "model.safetensors"))


def safetensors_headers() -> list[Any]:
    content = safetensors_files()[0]
    return [json.loads(content[8:-32])]


@target("json", safetensors_headers)
def safetensors_header(content: bytes, folder: Path) -> None:
    content = struct.pack("<Q", len(content)) + content + bytes(32)
    safetensors_file.read_header(written(content, folder / "weights", "model.safetensors"))


def pytorch_files() -> list[bytes]:
    """A tensor as `torch.save` writes it: a zip archive of a pickle and of the storage."""
    pickled = (
        b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtRu."
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in (
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            ("data/0", bytes(24)),
            ("version", b"3"),
        ):
            archive.writestr(f"archive/{name}", content)
    return [out.getvalue()]


@target("bytes", pytorch_files)
def pytorch(content: bytes, folder: Path) -> None:
    pytorch_file.read_header(written(content, folder / "weights", "pytorch_model.bin"))


@target(
    "json", lambda: [{"metadata": {"total_size": 32}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}]
)
def safetensors_index(content: bytes, folder: Path) -> None:
    shards.read_index(written(content, folder, "model.safetensors.index.json"))


@target("json", lambda: [{"version": 1, "files": {"a": 3}, "parameters": {"a": {"shape": [1], "dtype": "float32"}}}])
def manifest(content: bytes, folder: Path) -> None:
    (folder / "a").write_bytes(b"abc")
    locate.read_manifest(written(content, folder, locate.MANIFEST_NAME).parent)


def digest_files() -> list[str]:
    return ["".join(f"{c * 64}  {name}\n" for c, name in (("a", "a"), ("0", "b.json"), ("f", "c d")))]


@target("text", digest_files, ("\n", "  ", "*a", "../a"))
def digest_file(content: bytes, folder: Path) -> None:
    (folder / "a").write_bytes(b"abc")
    digests.check_sums(written(content, folder, digests.SUMS_NAME).parent)


@target("json", lambda: [*micro("config.json")(), {**micro("config.json")()[0], "candidate_resolutions": [[384, 384]]}])
def config(content: bytes, folder: Path) -> None:
    read = Config.from_file(written(content, folder, "config.json"))
    hash((read.tokens_per_tile, read.language.cache_width, read.language.has_moe, read.vision.mlp_dim))


@target("json", micro("processor_config.json"))
def processor_config(content: bytes, folder: Path) -> None:
    read = ProcessorConfig.from_dir(written(content, folder, "processor_config.json").parent)
    image = load_image(picture())
    tile_image(image, read.candidate_resolutions, read.tile_size, read.pad_colour)


# Tokenizers


def tokenizer_documents() -> list[Any]:
    """The bundled tokenizer with a part of its vocabulary, and with parts of other kinds."""
    document = json.loads((MICRO / "tokenizer.json").read_text())
    model = document["model"]
    model["vocab"] = kept = dict(list(model["vocab"].items())[:280])
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    words = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    pieces = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0]],
        "byte_fallback": False,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAAAAAAA"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return [
        document,
        document | {"model": words, "pre_tokenizer": {"type": "Whitespace"}, "normalizer": {"type": "NFC"}},
        document | {"model": pieces, "normalizer": {"type": "Sequence", "normalizers": [replace, charsmap]}},
        document | {"pre_tokenizer": metaspace, "decoder": {"type": "Sequence", "decoders": [strip, {"type": "Fuse"}]}},
        document | {"pre_tokenizer": {"type": "FixedLength", "length": 5}},
    ]


@functools.cache
def tokenizer_bytes() -> bytes:
    return json.dumps(tokenizer_documents()[0]).encode()


def use_tokenizer(folder: Path) -> None:
    read = Tokenizer.from_dir(folder)
    for special in (True, False):
        ids = read.encode(TEXT, special)
        read.decode(ids, special)
    stream = StreamDecoder(read)
    assert all(isinstance(stream.push(index), str) for index in ids) and isinstance(stream.flush(), str)
    for index in (*ids, 0, 299, len(read)):
        read.token_bytes(index)
    read.check_fits(1 << 31)


@target("json", tokenizer_documents)
def tokenizer(content: bytes, folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(MICRO / name, folder)
    use_tokenizer(written(content, folder, "tokenizer.json").parent)


def tokenizer_configs() -> list[Any]:
    added = {str(index): {"content": token, "special": True} for index, token in enumerate(PROCESSOR_TOKENS, 300)}
    return [*micro("tokenizer_config.json")(), {**micro("tokenizer_config.json")()[0], "added_tokens_decoder": added}]


@target("json", tokenizer_configs)
def tokenizer_config(content: bytes, folder: Path) -> None:
    written(tokenizer_bytes(), folder / "bpe", "tokenizer.json")
    use_tokenizer(written(content, folder / "bpe", "tokenizer_config.json").parent)


@target("json", tokenizer_configs)
def tokenizer_config_beside_model(content: bytes, folder: Path) -> None:
    content = content.replace("<｜begin▁of▁sentence｜>".encode("ascii", "backslashreplace"), b"<s>")
    content = content.replace("<｜end▁of▁sentence｜>".encode("ascii", "backslashreplace"), b"</s>")
    written(sentencepiece_files()[0], folder / "pieces", "tokenizer.model")
    use_tokenizer(written(content, folder / "pieces", "tokenizer_config.json").parent)


@functools.cache
def sentencepiece_files() -> list[bytes]:
    import sentencepiece

    model = io.BytesIO()
    lines = ["hello world, this is a text", "boxes and shapes of red colour", "another line"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=64, model_type="bpe", minloglevel=9
    )
    return [model.getvalue()]


@target("bytes", sentencepiece_files)
def tokenizer_model(content: bytes, folder: Path) -> None:
    names = json.dumps({"bos_token": "<s>", "eos_token": "</s>"}).encode()
    written(names, folder / "model", "tokenizer_config.json")
    use_tokenizer(written(content, folder / "model", "tokenizer.model").parent)


# Pictures


@functools.cache
def image_files() -> list[bytes]:
    """A small picture in every format that Pillow writes, in every mode that the format has."""
    Image.init()
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 4), np.uint8)
    image, files = Image.fromarray(pixels, "RGBA"), []
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("PNG", *sorted(Image.SAVE)):
        if name in ("PDF", "EPS", "PALM"):  # no pictures, or none that Pillow reads again
            continue
        for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16", "CMYK", "F"):
            out = io.BytesIO()
            with contextlib.suppress(Exception):  # the format does not have this mode
                with_mode = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
                with_mode.save(out, name, **({"exif": exif} if name in ("JPEG", "PNG", "WEBP") else {}))
                files.append(out.getvalue())
    frames, out = [image.convert("RGB"), image.rotate(90).convert("RGB")], io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return [*files, out.getvalue()]


@target("bytes", image_files)
def images(content: bytes, folder: Path) -> None:
    image_size(content)
    load_image(content)
    load_image(content, as_seen=True)


# Conversations, grounding, records


def conversations() -> list[Any]:
    part = [{"type": "text", "text": "What is <image>?"}]
    return [
        [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "And?"},
        ],
        [{"role": "system", "content": "Short."}, {"role": "User", "content": part, "images": ["chart.png"]}],
        [{"from": "human", "value": "<image>\nWhat?", "images": [{"path": "shapes.png"}]}],
    ]


@target("json", conversations)
def conversation(content: bytes, folder: Path) -> None:
    with contextlib.chdir(PICTURES):
        processor()(parsed(content))


@target("text", lambda: ["What is <image>?", "<|User|>: Hi\n\n<|Assistant|>: Yes"], PROCESSOR_TOKENS)
def prompt(content: bytes, folder: Path) -> None:
    text = content.decode(errors="surrogateescape")
    processor()(prompt=text, apply_sft_format=len(text) % 2 == 0)


@target("text", lambda: ["<|ref|>a red circle<|/ref|><|det|>[[10, 20, 300, 999], [0,0,1,1]]<|/det|>"], PROCESSOR_TOKENS)
def grounding(content: bytes, folder: Path) -> None:
    text = content.decode(errors="surrogateescape")
    draw_boxes(Image.new("RGB", (40, 30)), parse_boxes(text, [(40, 30)]))
    for metric in (metrics.exact, metrics.contains, metrics.relaxed, metrics.vqa, metrics.anls):
        metric(text[:500], ["a", "3.5"])
    metrics.choice(text[:500], ["yes", "no"], "A")
    printable(text)


def records() -> list[Any]:
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "<|det|>[[1,2,3,4]]<|/det|>"}]
    roles = [{"role": "user", "content": "<image>Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}]
    boxes = {"ref": ["circle"], "bbox": [[18, 7, 21, 11]]}
    region = {"box": [1, 2, 30, 40], "kind": "star", "colour": "red"}
    return [
        {"conversations": turns, "image": "shapes.png", "system": "Short."},
        {"messages": roles, "images": ["shapes.png"], "objects": boxes},
        {"query": "<image>What?", "response": "A", "history": [["Hello", "Hi"]], "images": ["chart.png"]},
        {"instruction": "<image>What?", "input": "x", "output": "A", "images": [{"path": "chart.png"}]},
        {"text": "<image>A chart", "image": "chart.png"},
        {"image": "shapes.png", "regions": [region, region]},
    ]


def use_record(value: Any, own: Sequence[bytes] = ()) -> None:
    store = FolderImages(str(PICTURES))
    with contextlib.suppress(DSVL2Error):
        process(resolve(parse_record(value, own), processor(), store), processor(), True)
    process_regions(parse_regions(value, own), processor(), store, Pairs(tokens=64, phrases=4))


@target("json", records)
def record(content: bytes, folder: Path) -> None:
    use_record(parsed(content))


def use_data_file(path: Path) -> None:
    file, pool = open_data_file(str(path)), FilePool()
    for number in range(len(file)):
        file.name(number)
        with contextlib.suppress(DSVL2Error, OSError):
            value, own = file.read(number, pool)
            use_record(value, own)


@target("lines", lambda: [records()])
def data_lines(content: bytes, folder: Path) -> None:
    use_data_file(written(content, folder, f"{len(content)}.jsonl"))


@target("json", lambda: [records()])
def data_array(content: bytes, folder: Path) -> None:
    use_data_file(written(content, folder, f"{len(content)}.json"))


@functools.cache
def tar_files() -> list[bytes]:
    """Tars in every format, of good samples and of members that no sample may have."""
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:

            def add(
                name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", archive=archive
            ) -> None:
                member = tarfile.TarInfo(name)
                member.size, member.type, member.linkname = len(content), kind, link
                archive.addfile(member, io.BytesIO(content))

            add("a.json", json.dumps(records()[4]).encode())
            add("a.png", picture())
            add("../../b.txt", b"text")
            add("c.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
            add("c.json", kind=tarfile.LNKTYPE, link="a.json")
            add("d.png", kind=tarfile.CHRTYPE)
            add("d" * 90 + "/" + "e" * 60 + ".txt", b"long")
        found.append(out.getvalue())
    return found


@target("bytes", tar_files)
def shard(content: bytes, folder: Path) -> None:
    path = written(content, folder, f"{abs(hash(content))}.tar")
    try:
        use_data_file(path)
        TarImages([str(path)]).find("a.png")
    finally:
        path.unlink()


# Settings, logs, evaluation


def preset_texts() -> list[str]:
    return [settings.presets()[name].read_text() for name in ("base-sft", "tiny-align")]


TOML_WORDS = ("[", "]", "[[a]]", "=", "\n", "a.b.c = 1\n", "'''", '"""', "1979-05-27", "inf", "0x", "\\u0000", "{a = ")


@target("text", preset_texts, TOML_WORDS)
def toml(content: bytes, folder: Path) -> None:
    settings.load(written(content, folder, "config.toml"))


@target("text", lambda: ["run.steps=100", "data.train.mine.path=mine.jsonl", "mesh={expert = 2}"], TOML_WORDS)
def override(content: bytes, folder: Path) -> None:
    settings.load("base-sft", [content.decode(errors="surrogateescape")])


def log_lines() -> list[Any]:
    return [[{"kind": "start", "step": 0}, {"kind": "step", "step": 1, "loss": 2.5}, {"kind": "step", "step": 2}]]


@target("lines", log_lines)
def training_log(content: bytes, folder: Path) -> None:
    written(content, folder, run_log.LOG_NAME)
    run_log.RunLog(folder).cut(1)


def questions() -> list[Any]:
    picture = {"image": "shapes.png", "id": "q", "task": "t"}
    return [
        [
            {"question": "What?", "answer": "A", "metric": "exact"} | picture,
            {"question": "<image>Where?", "boxes": [[1, 2, 30, 40]], "metric": "iou"} | picture,
            {"question": "Which?", "choices": ["a", "b"], "answer": "A", "metric": "choice", "group": 3} | picture,
            {"question": "What?", "answers": ["1", "2"], "metric": "vqa"},
            {"messages": records()[1]["messages"], "images": ["shapes.png"], "metric": "facts", "facts": ["red"]},
        ]
    ]


@target("lines", questions)
def eval_file(content: bytes, folder: Path) -> None:
    path = written(content, folder, "questions.jsonl")
    for sample in read_samples(path, FolderImages(str(PICTURES)), metric="exact", template=None, limit=None):
        score(sample, "A [1, 2]", [(1, 2, 30, 40)])


@target("lines", lambda: [[{"line": 1, "answer": "a", "score": 1.0}, {"line": 2, "answer": None, "error": "x"}]])
def eval_results(content: bytes, folder: Path) -> None:
    results._read_results(written(content, folder, results.RESULTS_NAME))


def tables() -> list[str]:
    image = "/9j/" + "A" * 100
    return [
        f"index\timage\tquestion\tA\tB\tanswer\tsplit\thint\n1\t{image}\tWhat?\ta\tb\tA\tx\t\n2\t1\tWhy?\tc\td\t['B']\tx\th\n"
    ]


@target(
    "text",
    tables,
    (
        "\t",
        "\n",
        '"',
        "[",
        "['a', 'b']",
        "index",
        "1e9",
        "()",
        "{" * 200,
        "[" * 200,
        "[" + "-" * 30_000 + "1]",
        "[" + "1+" * 9000 + "1]",
    ),
)
def table(content: bytes, folder: Path) -> None:
    list(table_records(written(content, folder, "MMBench.tsv"), lambda name, data: None))


def refcoco_rows() -> list[Any]:
    reference = {"ann_info": {"bbox": [1, 2, 3, 4]}, "ref_info": {"sentences": [{"sent": "the cat"}]}}
    return [{"image_info": {"file_name": "a.jpg"}, "image": {"bytes": "x"}, "ref_list": [reference]}]


@target("json", refcoco_rows)
def refcoco(content: bytes, folder: Path) -> None:
    list(refcoco_row_records(parsed(content), "shard", lambda name, data: None))


@target("text", lambda: ["# keys\nalice sk-0123456789abcdef\n"], ("\n", " ", "#"))
def key_file(content: bytes, folder: Path) -> None:
    path = written(content, folder, "keys")
    with contextlib.suppress(DSVL2Error):
        read_keys(path)
    read_key(path)


@target("json", lambda: [{"temperature": 0.5, "extra": {"a": [1]}}])
def extra_body(content: bytes, folder: Path) -> None:
    ServerOptions("http://127.0.0.1:8000", extra_body=content.decode(errors="surrogateescape"))


@target("text", lambda: ["http://127.0.0.1:8000/v1", "https://host.example:443"], ("[", "]", ":", "@", "?", "#", "%"))
def server_address(content: bytes, folder: Path) -> None:
    ServerOptions(content.decode(errors="surrogateescape"))
