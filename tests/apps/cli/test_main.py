"""The `dsvl2` command: what it prints, where, and with which exit status."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import golden
import pytest
from PIL import Image

import dsvl2_jax
from dsvl2_jax import SamplingParams
from dsvl2_jax.apps.chat import chat
from dsvl2_jax.apps.cli.main import COMMANDS, main
from dsvl2_jax.apps.micro.build import EVALUATION_SAMPLES, EVALUATION_SEED
from dsvl2_jax.checkpoint import locate
from dsvl2_jax.inputs.processor import Processor

IMAGES = golden.DATA / "images"


@pytest.fixture
def run(capsys):
    """Runs a command in this process: (exit status, standard output, standard error)."""

    def call(*args):
        try:
            status = main([str(a) for a in args])
        except SystemExit as stop:  # argument parsing leaves this way
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture(scope="module")
def mini(checkpoints):
    return checkpoints / "mini-small"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"dsvl2 {command}" in out


TOGETHER = {"--processes": "None", "--coordinator": "None", "--process": "None", "--connect-timeout": "300"}
COMPUTING = {"--dtype": "float32", "--mesh": "None"}
VERIFYING = COMPUTING | {
    "--verify": "False", "--cache-dtype": "None", "--context": "None", "--rope-scaling": "None",
}  # fmt: skip
TILES = {"--max-tiles": "None", "--min-tiles": "None"}
VISUALS = TILES | {"--frames": "None", "--frame-choice": "None"}
LOADING = VERIFYING | VISUALS | {"--adapter": "None", "--as-seen": "False", "--strict-special-tokens": "False"}
ANSWERING = {
    "--system": "''", "--max-new-tokens": "512", "--temperature": "0.0", "--top-p": "1.0", "--top-k": "50",
    "--repetition-penalty": "1.0", "--seed": "0", "--speculate": "0",
}  # fmt: skip
OPTIONS = {
    "convert": {
        "--dtype": "None", "--max-memory": "1GiB", "--quantize": "None", "--rule": "repeatable", "--calibrate": "None",
    },
    "export": {"--dtype": "None", "--verify": "False"},
    "merge": {"--layout": "None", "--verify": "False"},
    "generate": {
        "--prompt": "required", "--image": "repeatable", "--video": "repeatable", "--stop": "repeatable",
        "--chunk-size": "None", "--json": "False", "--draw": "None", **ANSWERING, **LOADING, **TOGETHER,
    },
    "chat": ANSWERING | LOADING,
    "serve": {
        "--plan": "False", "--host": "127.0.0.1", "--port": "8000", "--api-key-file": "None",
        "--cors-origin": "repeatable", "--ssl-certfile": "None", "--ssl-keyfile": "None", "--ssl-ca-certs": "None",
        "--shutdown-timeout": "25.0", "--slots": "8", "--speculate": "0", "--prefix-bytes": "1GiB",
        "--feature-bytes": "1GiB",
        "--max-queue": "256", "--max-queued-tokens": "1048576", "--max-tiles": "64", "--max-wait": "120.0",
        "--hang-timeout": "300.0", "--max-body": "32MiB", "--max-images": "16", "--max-image-bytes": "32MiB",
        "--max-image-pixels": "50000000", "--max-request-pixels": "200000000", "--max-image-tiles": "None",
        "--max-video-bytes": "64MiB", "--max-video-seconds": "600.0", "--max-frames": "32", "--video-timeout": "20.0",
        "--model-name": "''", "--model-alias": "repeatable", "--adapter": "repeatable",
        "--default-max-tokens": "512", "--media-domain": "repeatable",
        "--media-path": "repeatable", "--media-timeout": "10.0", "--official-images": "False",
        "--honour-detail": "False", "--strict-special-tokens": "False", **VERIFYING, **TOGETHER,
    },
    "demo": {"--seed": "0", "--out": "out", **VERIFYING},
    "train": {"--profile": "None", "--tensorboard": "False", "--verify": "False", **TOGETHER},
    "data check": {
        "--ckpt": "None", "--images": "''", "--follow-links": "False", "--sequence-length": "4096",
        "--tiles-per-sequence": "20", "--mask-prompt": "False", "--problems": "20", "--histogram": "None",
        "--json": "False", "--as-seen": "False", "--boxes": "auto", "--draw": "None", "--count": "None",
        "--argument": "repeatable", **VISUALS,
    },
    "data import": {},
    "plot": {"--out": "plot.png"},
    "eval": {
        "--metric": "None", "--images": "''", "--follow-links": "False", "--out": "None", "--batch-size": "None",
        "--max-new-tokens": "128", "--dtype": "None", "--cache-dtype": "None", "--mesh": "None",
        "--verify": "False", "--adapter": "None", **TILES,
        "--prompt-template": "None", "--limit": "None", "--report-samples": "1000", "--json": "False",
        "--server": "None", "--server-model": "None", "--api-key-file": "None", "--concurrency": "None",
        "--timeout": "None", "--extra-body": "None", "--as-seen": "False", "--speculate": "None",
        "--context": "None", "--rope-scaling": "None", **TOGETHER,
    },
    "plan": {
        "--topology": "None", "--job": "None", "--batch": "None", "--sequence": "None", "--slots": "None",
        "--micro": "None", "--set": "repeatable", "--quantize": "None", "--rule": "repeatable",
        "--cache-dtype": "None", "--mesh": "auto", "--csv": "None", "--profile": "False", "--no-cache": "False",
        "--json": "False",
    },
    "bench convert": {"--size": "tiny", "--directory": "None", "--keep": "None", "--repeats": "2"},
    "bench generate": {"--new-tokens": "32", "--speculate": "0", **COMPUTING},
    "bench load": {"--size": "tiny", "--directory": "None", "--processes": "2", **COMPUTING},
    "bench model": {
        "--layers": "None", "--jobs": "decode,prefill,encode", "--slots": "1,16,64", "--context": "1024",
        "--tokens": "1024,4096", "--tiles": "10", "--set": "repeatable", "--dtype": "None", "--quantize": "None",
        "--against": "None", "--profile": "None", "--budget": "None", "--json": "False", "--plot": "None",
    },
    "bench quantize": {
        "--kinds": "int8,int4,float8", "--rule": "repeatable", "--data": "None", "--samples": "None", "--prompts": "16",
        "--directory": "None", "--json": "False",
    },
    "bench serve": {
        "--size": "None", "--layers": "None", "--directory": "None",
        "--only": "", "--clients": "1 32", "--slots": "8", "--seconds": "20.0", "--input-tokens": "64",
        "--output-tokens": "64", "--picture-share": "0.5", "--trials": "5", "--long-tokens": "4000",
        "--megapixels": "12.0", "--soak": "600.0", "--soak-requests": "10000", "--soak-distinct": "100",
        "--seed": "0", "--json": "False", "--plot": "None", **COMPUTING,
    },
    "bench tune": {"--size": "None", "--json": "False", "--out": "None"},
    "bench train": {"--rows": "2", "--length": "1024", "--steps": "3", "--rounds": "3", "--adapter": "False"},
    "micro start": {},
    "micro data": {"--workers": "2"},
    "micro questions": {"--seed": str(EVALUATION_SEED), "--samples": str(EVALUATION_SAMPLES)},
    "micro ship": {},
    "micro examples": {},
    "micro draw": {
        "--name": "samples", "--count": "1000", "--seed": "0", "--held-out": "False", "--mixture": "full",
        "--turns": "8", "--workers": "1",
    },
    "doctor": {"--verify": "False", "--json": "False"},
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_has_its_options_and_defaults(run, command):
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", "", out).partition("options ")[2].split())
    found = {}
    for option in re.split(r"(?<!\S)(?=--[a-z])", text)[1:]:
        default = re.findall(r"\((?:default: ([^()]*)|(required|repeatable))\)", option)
        # A list may be broken after a comma.
        found[option.split()[0]] = "".join(default[-1]).replace(", ", ",") if default else None
    assert found == {"--help": None} | OPTIONS[command]


def test_no_command_is_left_out():
    assert {command.split()[0] for command in OPTIONS} == set(COMMANDS)


@pytest.mark.parametrize("command", ([], ["train"]))
def test_help_does_not_load_jax(command):
    program = "import sys; from dsvl2_jax.apps.cli.main import main\n"
    program += f"try: main([*{command}, '--help'])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_training_help_lists_the_settings(run):
    _, out, _ = run("train", "--help")
    assert "--tensorboard" in out and "\nmicrobatch_size = 1  # rows that a data shard" in out


def test_generate_prints_the_official_answer(run, mini):
    status, out, err = run("generate", mini, "--prompt", golden.conversations()["text"][0]["content"],
                           "--max-new-tokens", 48)  # fmt: skip
    assert (status, err) == (0, "")
    model = dsvl2_jax.load(mini)
    expected = golden.until_eos(golden.arrays("mini-small.f32")["text/greedy_ids"])
    assert out == model.processor.tokenizer.decode([t for t in expected if t != 1]) + "\n"


def test_generate_json_holds_everything(run, mini):
    status, out, _ = run(
        "generate", mini, "--json", "--prompt", "Describe this image.", "--image", IMAGES / "exact_384x384.png",
        "--max-new-tokens", 48,
    )  # fmt: skip
    assert status == 0
    report = json.loads(out)
    # One image and no tag: "<image>\n" is put in front, which is the golden prompt.
    expected = golden.until_eos(golden.arrays("mini-small.f32")["img_exact384/greedy_ids"])
    sure = golden.sure_steps("mini-small.f32", "img_exact384", "greedy")
    golden.assert_same_tokens(report["token_ids"], expected, sure)
    assert report["image_tokens"] == 421
    assert report["prompt_tokens"] == 438
    assert report["finish_reason"] in ("stop", "length")
    assert (report["boxes"], report["malformed_boxes"]) == ([], 0)
    assert set(report["timing"]) == {"load", "compile", "encode", "prefill", "decode", "decode_tokens_per_second"}


def test_images_may_follow_one_flag_or_repeat_it(run, mini):
    images = [IMAGES / "rgba_257x123.png", IMAGES / "tiny_20x20.png"]
    ask = ("generate", mini, "--json", "--max-new-tokens", 4, "--prompt", "First <image> then <image>, compare.")
    together = run(*ask, "--image", *images)
    apart = run(*ask, "--image", images[0], "--image", images[1])
    assert json.loads(together[1])["token_ids"] == json.loads(apart[1])["token_ids"]
    assert json.loads(together[1])["image_tokens"] == 842


@pytest.fixture
def frames(tmp_path):
    """A folder of twelve pictures, from black to red."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (400, 200), (20 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def test_generate_shows_a_video_as_pictures_and_cuts_them_as_it_is_told(run, frames):
    ask = ("generate", "--json", "--max-new-tokens", 2, "--prompt")
    of_video = json.loads(run(*ask, "What?", "--video", frames, "--frames", 3)[1])
    of_images = json.loads(run(*ask, "What?", "--image", *(frames / f"{n}.png" for n in (2, 6, 10)))[1])
    assert of_video["token_ids"] == of_images["token_ids"] and of_video["tiles"] == of_images["tiles"] == 6
    tagged = ("Is <image> in <video>?", "--image", frames / "1.png", "--video", frames, "--frames", 2)
    status, out, _ = run(*ask, *tagged, "--min-tiles", 2, "--max-tiles", 2, "--draw", frames / "drawn.png")
    cut = json.loads(out)
    assert status == 0 and cut["tiles"] == 9 and cut["image_tokens"] > of_video["image_tokens"]
    assert Image.open(frames / "drawn.png").getpixel((0, 0)) == (180, 0, 0)  # the last frame


def test_draw_writes_the_image_at_its_own_size(run, mini, tmp_path):
    status, _, err = run(
        "generate", mini, "--prompt", "Describe this image.", "--image", IMAGES / "exact_384x384.png",
        "--max-new-tokens", 4, "--draw", tmp_path / "out.png",
    )  # fmt: skip
    assert status == 0
    assert "drawn into" in err
    assert Image.open(tmp_path / "out.png").size == (384, 384)


def test_a_picture_that_is_not_read_as_seen_is_warned_of_and_as_seen_reads_and_draws_it(run, mini, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 300)).save(tmp_path / "turned.jpg", exif=exif)
    ask = ("generate", mini, "--prompt", "x", "--image", tmp_path / "turned.jpg", "--max-new-tokens", 2,
           "--draw", tmp_path / "out.png")  # fmt: skip
    status, _, err = run(*ask)
    assert (status, Image.open(tmp_path / "out.png").size) == (0, (400, 300))
    assert err.count("dsvl2: warning: 1 picture with an EXIF orientation") == 1 and "--as-seen turns them" in err
    status, _, err = run(*ask, "--as-seen")
    assert (status, Image.open(tmp_path / "out.png").size) == (0, (300, 400))
    assert "warning" not in err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["generate", "--prompt", "x", "--exif"], 2, "--exif: this option is now called --as-seen"),
        (
            ["generate", "--prompt", "x", "--temperature", "-1"],
            2,
            "temperature: must be 0 (greedy) or a positive number",
        ),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], 2, "max_new_tokens: found 0"),
        (["generate", "--prompt", "x", "--mesh", "rows=2"], 2, "unknown axis 'rows'"),
        (["generate", "--prompt", "x", "--mesh", "tensor=3"], 2, "needs 3 devices"),
        (["generate", "--prompt", "x", "--draw", "out.png"], 2, "--draw needs an --image or a --video"),
        (["generate", "--prompt", "x", "--frames", "4"], 2, "--frames and --frame-choice are of a video"),
        (["generate", "--prompt", "x", "--max-tiles", "101"], 2, "max_tiles is 101, expected a whole number"),
        (["generate", "--prompt", "x", "--min-tiles", "12"], 2, "min_tiles is 12, but the checkpoint's"),
        (["generate", "--prompt", "x", "--video", "none.mp4"], 1, "none.mp4: no such file"),
        (["eval", "x.jsonl", "--candidates", "18"], 2, "--candidates: this option is now called --max-tiles"),
        (["generate", "--prompt", "x", "--image", "a.png", "--draw", "nowhere/out.png"], 2, "nowhere"),
        (["generate", "--prompt", "two <image> <image>", "--image", "IMAGE"], 1, "2 <image> tag(s) but 1 image(s)"),
        (["generate", "--prompt", "none", "--image", "missing.png"], 1, "missing.png"),
        (["generate", "not-there", "--prompt", "x"], 1, "not-there: no such directory"),
        (["convert", "not-there", "dst"], 1, "not-there"),
        (["convert", "MINI", "dst", "--max-memory", "lots"], 2, "lots"),
        (["export", "not-there", "dst"], 1, "not-there"),
        (["doctor", "not-there"], 1, "not-there"),
    ],
)
def test_a_failure_is_one_message_and_an_exit_status(run, mini, tmp_path, monkeypatch, args, status, message):
    monkeypatch.chdir(tmp_path)
    names = {"IMAGE": str(IMAGES / "tiny_20x20.png"), "MINI": str(mini)}
    args = [names.get(a, a) for a in args]
    if args[0] == "generate" and "not-there" not in args:
        args.insert(1, str(mini))
    found, out, err = run(*args)
    assert found == status
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_exit_with_2(run):
    for args in (["generate"], ["generate", "--prompt", "x", "--top-k", "many"], ["nonsense"], []):
        assert run(*args)[0] == 2


def test_an_interrupt_that_python_would_forget_ends_the_command(run, monkeypatch):
    """One that falls into a callback of the garbage collector."""

    def interrupted():
        forgotten = types.SimpleNamespace(exc_type=KeyboardInterrupt, exc_value=KeyboardInterrupt(), object=None)
        sys.unraisablehook(forgotten)
        for _ in range(2000):  # a long sleep would be over before the interrupt is noticed
            time.sleep(0.01)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
    try:
        monkeypatch.setitem(COMMANDS, "doctor", interrupted)
        assert run("doctor") == (130, "", "dsvl2: interrupted\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_the_encoding_cannot_say_is_escaped():
    program = "import sys; from dsvl2_jax.apps.cli import main\n"
    program += "main.COMMANDS['doctor'] = lambda: print('<｜end▁of▁sentence｜>')\nsys.exit(main.main(['doctor']))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "<\\uff5cend\\u2581of\\u2581sentence\\uff5c>\n", "")


def test_a_file_that_cannot_be_written_is_named(run, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here/a.json")

    monkeypatch.setitem(COMMANDS, "doctor", full)
    status, _, err = run("doctor")
    assert status == 1
    assert err.startswith("dsvl2: error: here/a.json: No space left on device. ")


def test_debug_shows_the_traceback(mini):
    program = [sys.executable, "-m", "dsvl2_jax", "generate", "not-there", "--prompt", "x"]
    quiet = subprocess.run(program, capture_output=True, text=True, check=False)
    loud = subprocess.run([*program, "--debug"], capture_output=True, text=True, check=False)
    assert (quiet.returncode, loud.returncode) == (1, 1)
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr


def test_chat_remembers_attaches_and_recovers(mini, capsys, monkeypatch):
    model = dsvl2_jax.load(mini)
    seen = []
    process = model.processor.__call__
    monkeypatch.setattr(type(model.processor), "__call__", lambda self, turns: seen.append(turns) or process(turns))
    script = [
        "/help", "/nonsense", f"/image {IMAGES / 'tiny_20x20.png'} missing.png", "What is this?",
        "Two <image> tags <image> here", "And now?", "/reset", "Hello", "/quit", "never read",
    ]  # fmt: skip
    chat(model, "Be brief.", 4, SamplingParams(), io.StringIO("\n".join(script)))
    out = capsys.readouterr().out
    assert "missing.png: no such file" in out
    assert "/nonsense is no command" in out
    assert "not sent: " in out
    first, broken, second, fresh = seen
    assert [t["role"] for t in first] == ["system", "user"]
    assert first[1]["content"] == "<image>\nWhat is this?"
    assert [t["role"] for t in second] == ["system", "user", "assistant", "user"]
    assert second[3]["content"] == "And now?"
    assert second[2]["content"] in out
    assert broken[:3] == second[:3]
    assert [t["role"] for t in fresh] == ["system", "user"]


def test_chat_attaches_videos(frames, capsys):
    asked = []
    processor = Processor.from_dir(locate.resolve(None))
    answer = types.SimpleNamespace(text="Yes.", boxes=[], malformed_boxes=0)
    model = types.SimpleNamespace(processor=processor, generate=lambda inputs, *_, **__: asked.append(inputs) or answer)
    script = [
        f"/video {frames} none.mp4",
        "Is <video> red?",
        "And now?",
        f"/image {frames / '1.png'}",
        "This?",
        "/quit",
    ]
    chat(model, "", 4, SamplingParams(), io.StringIO("\n".join(script)))
    out = capsys.readouterr().out
    assert f"attached {frames}" in out and "none.mp4: no such file" in out
    assert [len(inputs.tile_grid) for inputs in asked] == [8, 8, 9]
    assert asked[0].prompt.startswith("<|User|>: Is <image>\n<image>\n")


def test_chat_says_once_that_pictures_are_read_otherwise_than_seen(mini, capsys, tmp_path):
    Image.new("RGBA", (20, 20)).save(tmp_path / "clear.png")
    model = dsvl2_jax.load(mini)
    model.processor.warns = False
    script = [f"/image {tmp_path / 'clear.png'}", "What?", f"/image {tmp_path / 'clear.png'}", "And now?", "/quit"]
    chat(model, "", 2, SamplingParams(), io.StringIO("\n".join(script)))
    out = capsys.readouterr().out
    assert out.count("(warning: 1 picture with transparent pixels") == 1 and "--as-seen" in out


def test_bench_generate_prints_its_figures(run, mini):
    status, out, _ = run("bench", "generate", mini, "--new-tokens", 4, "--speculate", 2)
    assert status == 0 and "the same tokens with drafts" in out
    for figure in ("parameters", "load", "compile", "encode", "prefill", "tokens/s", "GiB resident"):
        assert figure in out
