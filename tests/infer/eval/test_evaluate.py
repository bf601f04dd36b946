"""`dsvl2 eval`: what it reads and refuses, how it resumes, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dsvl2_jax
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.checkpoint.locate import open_model, resolve
from dsvl2_jax.errors import ConversationError, DataError, DSVL2Error, RunError, UsageError
from dsvl2_jax.infer.answer import Generation
from dsvl2_jax.infer.eval import evaluate, loaded
from dsvl2_jax.infer.eval import samples as eval_data
from dsvl2_jax.infer.eval.evaluate import EvalOptions
from dsvl2_jax.infer.eval.loaded import checkpoint_digest, prompt_size
from dsvl2_jax.inputs.grounding import parse_boxes
from dsvl2_jax.inputs.image_sources import FolderImages

BOX = "<|ref|>it<|/ref|><|det|>[[0, 0, 499, 999]]<|/det|>"  # the left half
RECORDS = [
    {"id": "colour-1", "task": "colour", "metric": "exact", "question": "red?", "image": "wide.png", "answer": "Red."},
    {"task": "colour", "metric": "exact", "question": "blue?", "images": ["wide.png"], "answers": ["blue"]},
    {"task": "choice", "metric": "choice", "question": "which?", "choices": ["one", "two"], "answer": "two"},
    {"task": "boxes", "metric": "iou", "question": "left half?", "image": "wide.png", "boxes": [[0, 0, 100, 40]]},
    {"task": "boxes", "metric": "iou", "question": "right half?", "image": "wide.png", "boxes": [[100, 0, 200, 40]]},
    {"question": "both?", "images": ["wide.png", "small.png"], "answers": ["hello"]},
    {"task": "caption", "metric": "facts", "question": "say all", "image": "small.png", "facts": ["a", "b"]},
]
ANSWERS = {"red?": "red", "which?": "B", "half?": BOX, "both?": "Helo", "say all": "a and <b>b</b>"}


@pytest.fixture
def questions(tmp_path):
    """A file of `RECORDS` with its images."""
    Image.new("RGB", (200, 40), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "small.png")
    return write(tmp_path / "data.jsonl", RECORDS)


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class Parrot:
    """Stands for the model: answers from `ANSWERS`, and keeps what it was asked."""

    def __init__(self):
        self.processor = open_model(resolve(None))[1]
        self.asked: list = []
        self.slots = self.drafts = None
        self.context = 4096
        self.dies_at = None

    def check_context(self, inputs):
        if len(inputs.input_ids) > self.context:
            raise ConversationError("too long")

    def answers(self, requests, slots, *, speculate):
        self.slots, self.drafts = slots, speculate
        for index, request in enumerate(requests):
            if len(self.asked) == self.dies_at:
                raise KeyboardInterrupt
            self.asked.append(request.inputs)
            yield index, " first words"
            yield index, self._answer(request.inputs)

    def _answer(self, one):
        text = next((answer for key, answer in ANSWERS.items() if key in one.prompt), "nothing")
        return Generation([5, 1], f" {text} ", "stop", parse_boxes(text, one.image_sizes), None, len(one.input_ids), 0)


@pytest.fixture
def parrot(monkeypatch):
    model = Parrot()

    def load(ckpt, options):
        model.processor.set_visuals(options.max_tiles, options.min_tiles)
        return model

    monkeypatch.setattr(loaded, "load", load)
    return model


def options(tmp_path, **changes):
    return dataclasses.replace(EvalOptions(metric="anls", out=tmp_path / "out", batch_size=2), **changes)


def results(tmp_path):
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    return {result["line"]: result for result in map(json.loads, lines)}


def read(path: Path, **arguments):
    settings = {"metric": None, "template": None, "limit": None} | arguments
    return eval_data.read_samples(path, FolderImages(str(path.parent)), **settings)


def test_scores_are_kept_one_by_one_and_summed_by_task(questions, tmp_path, parrot, capsys):
    summary = evaluate.evaluate(None, questions, options(tmp_path))
    assert summary["tasks"] == {
        "colour": {"metric": "exact", "samples": 2, "score": 0.5},
        "choice": {"metric": "choice", "samples": 1, "score": 1.0},
        "boxes": {"metric": "iou", "samples": 2, "score": 0.5, "mean_iou": pytest.approx(0.495, abs=0.01)},
        "data": {"metric": "anls", "samples": 1, "score": 0.8},
        "caption": {"metric": "facts", "samples": 1, "score": 0.5},
    }
    assert summary["samples"] == 7
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    kept = results(tmp_path)
    assert sorted(kept) == [1, 2, 3, 4, 5, 6, 7]
    assert kept[1] | {"answer_tokens": 0, "prompt_tokens": 0} == {
        "line": 1, "id": "colour-1", "task": "colour", "metric": "exact", "question": "red?", "images": ["wide.png"],
        "references": ["Red."], "answer": "red", "score": 1.0, "finish_reason": "stop", "prompt_tokens": 0,
        "image_tokens": 0, "answer_tokens": 0,
    }  # fmt: skip
    assert kept[4]["boxes"] == [[0, 0, 99, 40]]
    assert kept[4]["references"] == ["0, 0, 100, 40"]
    assert kept[2]["id"] == "2"
    out = capsys.readouterr().out
    for cell in ("colour", "50.0 %", "80.0 %", "report.html"):
        assert cell in out


def test_malformed_boxes_are_counted_in_results_summary_table_and_report(questions, tmp_path, parrot, capsys):
    parrot_answers = {"left half?": f"{BOX} <|det|>[[1,2,3],[0,0,1,2000]]<|/det|>", "right half?": "<|det|>[[1,2,3,4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ANSWERS", parrot_answers)
        summary = evaluate.evaluate(None, questions, options(tmp_path))
    assert summary["tasks"]["boxes"]["malformed_boxes"] == 3
    assert "malformed_boxes" not in summary["tasks"]["colour"]
    assert (results(tmp_path)[4]["malformed_boxes"], results(tmp_path)[5]["malformed_boxes"]) == (2, 1)
    assert "malformed" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    row = re.search(r'<tr><th scope="row">boxes</th>.*', page)[0]
    assert row.endswith('<td class="number"></td><td class="number">3</td></tr>')


def test_as_seen_pictures_are_turned_their_boxes_too_and_otherwise_there_is_one_warning(tmp_path, parrot, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (400, 200), name.replace("a.jpg", "red").replace("b.jpg", "blue")).save(
            tmp_path / name, exif=exif
        )
    boxes = {"a.jpg": [0, 0, 100, 400], "b.jpg": [100, 0, 200, 400]}  # of pictures 200 wide and 400 high
    asked = [{"metric": "iou", "question": "left half?", "image": name, "boxes": [box]} for name, box in boxes.items()]
    data = write(tmp_path / "data.jsonl", asked)
    with pytest.raises(DataError, match="which is 400×200"):
        evaluate.evaluate(None, data, options(tmp_path))
    evaluate.evaluate(None, data, options(tmp_path, as_seen=True))
    assert [results(tmp_path)[line]["boxes"] for line in (1, 2)] == [[[0, 0, 99, 400]]] * 2
    assert [inputs.image_sizes.tolist() for inputs in parrot.asked] == [[[200, 400]]] * 2
    assert "warning" not in capsys.readouterr().err
    thumbnails = list((tmp_path / "out" / "thumbnails").iterdir())
    assert [Image.open(file).size for file in thumbnails] == [(200, 400)] * 2
    with pytest.raises(RunError, match="as_seen"):
        evaluate.evaluate(
            None, write(data, [record | {"boxes": [[0, 0, 1, 1]]} for record in asked]), options(tmp_path)
        )
    evaluate.evaluate(None, data, options(tmp_path, out=tmp_path / "stored"))
    err = capsys.readouterr().err
    assert err.count("warning: 2 pictures with an EXIF orientation") == 1 and "--as-seen turns them" in err


def test_a_group_is_as_right_as_its_worst_sample(questions, tmp_path, parrot):
    choice = RECORDS[2]
    turned = choice | {"choices": ["two", "one"]}  # the parrot says B still
    write(questions, [choice | {"group": 1}, turned | {"group": 1}, choice | {"group": "2"}, choice])
    entry = evaluate.evaluate(None, questions, options(tmp_path))["tasks"]["choice"]
    assert entry == {"metric": "choice", "samples": 4, "groups": 3, "score": 0.666667}


def test_json_prints_the_summary_alone(questions, tmp_path, parrot, capsys):
    assert main(["eval", str(questions), "--metric", "anls", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["data"] == {"metric": "anls", "samples": 1, "score": 0.8}


def test_without_out_results_go_below_eval(questions, tmp_path, parrot, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(questions), "--metric", "anls"]) == 0
    assert (tmp_path / "eval" / "bundled" / "data" / "report.html").is_file()


def test_the_largest_come_first_and_as_many_grow_as_are_wanted(questions, tmp_path, parrot):
    evaluate.evaluate(None, questions, options(tmp_path, speculate=3))
    tiles = [len(inputs.tiles) for inputs in parrot.asked]
    assert tiles == sorted(tiles, reverse=True) and len(tiles) == 7
    assert parrot.slots == 2 and parrot.drafts == 3


def test_a_killed_run_goes_on_and_ends_the_same(questions, tmp_path, parrot):
    whole = evaluate.evaluate(None, questions, options(tmp_path, out=tmp_path / "whole"))
    parrot.asked.clear()
    parrot.dies_at = 4
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(None, questions, options(tmp_path))
    assert len(results(tmp_path)) == 4
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"line": 3, "task": "cho')  # torn by the kill
    parrot.dies_at = None
    parrot.asked.clear()
    summary = evaluate.evaluate(None, questions, options(tmp_path, batch_size=8))  # of any size
    assert len(parrot.asked) == 3
    assert summary["answered_now"] == 3
    assert summary["tasks"] == whole["tasks"]
    assert len(results(tmp_path)) == 7
    parrot.asked.clear()
    again = evaluate.evaluate(None, questions, options(tmp_path))
    assert parrot.asked == []
    assert again["samples_per_second"] is None


def test_a_larger_limit_goes_on(questions, tmp_path, parrot):
    assert evaluate.evaluate(None, questions, options(tmp_path, limit=3))["samples"] == 3
    assert evaluate.evaluate(None, questions, options(tmp_path))["answered_now"] == 4
    assert evaluate.evaluate(None, questions, options(tmp_path, limit=2))["samples"] == 2


def test_another_evaluation_is_refused(questions, tmp_path, parrot, checkpoints):
    evaluate.evaluate(None, questions, options(tmp_path))
    with pytest.raises(RunError, match=r"options.max_new_tokens was 128, is 9"):
        evaluate.evaluate(None, questions, options(tmp_path, max_new_tokens=9))
    with pytest.raises(RunError, match=r"checkpoint.name was \"bundled\", is \"mini-tiny\"; checkpoint.digest was"):
        evaluate.evaluate(str(checkpoints / "mini-tiny"), questions, options(tmp_path))
    write(questions, RECORDS[:-1])
    with pytest.raises(RunError, match=r"data.digest was .* Choose another --out, or remove the directory"):
        evaluate.evaluate(None, questions, options(tmp_path))


def test_a_directory_of_something_else_is_left_alone(questions, tmp_path, parrot):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds no evaluation, but thesis.txt"):
        evaluate.evaluate(None, questions, options(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_broken_line_of_results_is_named(questions, tmp_path, parrot):
    evaluate.evaluate(None, questions, options(tmp_path))
    file = tmp_path / "out" / "results.jsonl"
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(RunError, match=r"results.jsonl:1: not a result"):
        evaluate.evaluate(None, questions, options(tmp_path))


def test_a_prompt_beyond_the_context_counts_as_wrong(questions, tmp_path, parrot):
    parrot.context = 100  # two tiled images have more
    summary = evaluate.evaluate(None, questions, options(tmp_path))
    assert summary["tasks"]["data"] == {"metric": "anls", "samples": 1, "score": 0.0, "unanswered": 1}
    assert results(tmp_path)[6]["error"] == "too long"


def test_an_image_that_cannot_be_decoded_names_its_line(questions, tmp_path, parrot):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])  # the header is whole
    write(questions, [*RECORDS, RECORDS[0] | {"image": "cut.png"}])
    with pytest.raises(DataError, match=r"data.jsonl:8: .*cut.png: the image cannot be read"):
        evaluate.evaluate(None, questions, options(tmp_path))


def test_candidates_give_more_tiles(questions, tmp_path, parrot):
    side = parrot.processor.config.tile_size
    Image.new("RGB", (side * 6, side * 3)).save(tmp_path / "large.png")
    write(questions, [RECORDS[0] | {"image": "large.png"}])
    evaluate.evaluate(None, questions, options(tmp_path))
    evaluate.evaluate(None, questions, options(tmp_path, out=tmp_path / "more", max_tiles=18))
    assert [len(inputs.tiles) for inputs in parrot.asked] == [9, 19]
    records = [
        RECORDS[0] | {"image": "large.png", "max_tiles": 2},
        RECORDS[0] | {"image": {"path": "large.png", "max_tiles": 4}},
    ]
    write(questions, records)
    evaluate.evaluate(None, questions, options(tmp_path, out=tmp_path / "own"))
    assert sorted(len(inputs.tiles) for inputs in parrot.asked[2:]) == [3, 3]
    write(questions, [RECORDS[0] | {"video": "a.mp4", "image": None}])
    with pytest.raises(DataError, match="has a video, and questions are about images"):
        evaluate.evaluate(None, questions, options(tmp_path, out=tmp_path / "video"))


def test_prompt_size_is_that_of_the_processor(questions, parrot):
    for sample in read(questions, metric="anls"):
        images = [questions.parent / name for name in sample.images]
        inputs = parrot.processor(list(sample.conversation), images)
        tiles, tokens = prompt_size(sample, parrot.processor)
        assert tiles == len(inputs.tiles)
        assert abs(len(inputs.input_ids) - tokens) < 20


def test_the_report_shows_everything_and_runs_nothing_of_it(questions, tmp_path, parrot):
    evil = '</script><img src=x onerror="alert(1)"><!--'
    write(questions, [*RECORDS, RECORDS[0] | {"id": evil, "task": evil, "question": evil}])
    evaluate.evaluate(None, questions, options(tmp_path))
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'onerror="' not in page.replace('\\"', "")
    assert page.count("</script>") == 2
    assert "&lt;/script&gt;&lt;img" in page  # the table of tasks
    assert "http://" not in page and "https://" not in page
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(shown) == 8
    assert shown[7]["question"] == evil
    assert shown[3]["right"] == [[0, 0, 50, 100]]
    assert shown[3]["answered"] == [[0, 0, 49.5, 100]]
    for entry in shown:
        for source, width, height in entry["images"]:
            assert Image.open(tmp_path / "out" / source).size == (width, height)
    assert len(list((tmp_path / "out" / "thumbnails").iterdir())) == 2  # one per image, however many questions


def test_the_report_can_show_fewer_and_later_more(questions, tmp_path, parrot):
    def shown():
        page = (tmp_path / "out" / "report.html").read_text()
        return [entry["id"] for entry in json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])]

    evaluate.evaluate(None, questions, options(tmp_path, report_samples=0))
    assert shown() == []
    evaluate.evaluate(None, questions, options(tmp_path, report_samples=1))
    assert shown() == ["colour-1", "3", "4", "6", "7"]
    assert len(list((tmp_path / "out" / "thumbnails").iterdir())) == 2


def test_prompts_are_made_from_questions_choices_and_the_template(questions):
    prompts = [sample.conversation[-1]["content"] for sample in read(questions, metric="anls")]
    assert prompts[0] == "<image>\nred?"
    assert prompts[2] == "which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly."
    assert prompts[5] == "<image>\n<image>\nboth?"
    braces = [RECORDS[0] | {"question": "what is {choices} in <image>?"}]
    for template, prompt in (
        (r"Q: {question}\nShort.", "Q: what is {choices} in <image>?\nShort."),
        ("{question} {unknown} {}", "what is {choices} in <image>? {unknown} {}"),
    ):
        samples = read(write(questions, braces), template=template)
        assert samples[0].conversation[-1]["content"] == prompt
    located = read(write(questions, RECORDS[:1]), template="<|ref|>{question}<|/ref|>")
    assert located[0].conversation[-1]["content"] == "<image>\n<|ref|>red?<|/ref|>"
    assert located[0].question == "<|ref|>red?<|/ref|>"


def test_training_conversations_are_read_with_their_last_answer_as_reference(questions):
    turns = [("user", "one?"), ("assistant", "1"), ("user", "<image> two?"), ("assistant", " 2 ")]
    messages = [{"role": role, "content": content} for role, content in turns]
    located = [{"from": "human", "value": "where?"}, {"from": "gpt", "value": BOX}]
    first, second, third = read(
        write(
            questions,
            [
                {"messages": messages, "images": ["wide.png"]},
                {"messages": messages[:3], "image": "wide.png", "answers": ["2", "two"]},
                {"conversations": located, "image": "wide.png", "metric": "iou"},
            ],
        ),
        metric="exact",
    )
    assert first.conversation == tuple(messages[:3])
    assert first.answers == ("2",)
    assert second.answers == ("2", "two")
    assert third.boxes == ((0, 0, 99, 40),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not JSON"),
        ([], "expected a JSON object, found list"),
        ({"question": "x", "answer": "y"}, 'has no "metric", and --metric gives none'),
        ({"question": "x", "metric": "bleu"}, "\"metric\" is 'bleu', expected one of exact"),
        ({"metric": "exact", "answer": "y"}, 'expected "question" or "messages"; found answer, metric'),
        ({"metric": "exact", "question": ["x"], "answer": "y"}, "\"question\" is ['x'], expected a text"),
        ({"metric": "exact", "question": "x"}, 'the metric exact needs "answers"'),
        ({"metric": "exact", "question": "x", "answers": [{}]}, '"answers" is [{}], expected a list of texts'),
        ({"metric": "exact", "question": "x", "answer": " "}, '"answer" is " ", expected'),
        ({"metric": "vqa", "question": "x", "answer": "y"}, 'needs the "answers" of several annotators; found 1'),
        ({"metric": "choice", "question": "x", "answer": "A"}, 'needs 2 to 26 "choices"; found 0'),
        ({"metric": "choice", "question": "x", "choices": ["p", "q"], "answer": "C"}, "'C' is neither a letter up"),
        ({"metric": "facts", "question": "x"}, 'the metric facts needs "facts"'),
        ({"metric": "iou", "question": "x", "boxes": [[0, 0, 1, 1]]}, "the metric iou needs an image"),
        ({"metric": "iou", "question": "x", "image": "wide.png"}, 'the metric iou needs "boxes"'),
        ({"metric": "iou", "question": "x", "image": "wide.png", "boxes": [1, 2, 3, 4]}, "a list of [x1, y1, x2, y2]"),
        ({"metric": "iou", "question": "x", "image": "wide.png", "boxes": [[150, 9, 60, 8]]}, "neither x, y, width"),
        ({"metric": "iou", "question": "x", "image": "wide.png", "boxes": [[0, 0, 500, 500]]}, "which is 200×40"),
        ({"metric": "exact", "question": "x", "answer": "y", "image": "no.png"}, "image 'no.png': no such file"),
        ({"metric": "exact", "question": "x", "answer": "y", "image": "../x.png"}, "outside of the image folder"),
        ({"metric": "exact", "question": "x", "answer": "y", "image": "data.jsonl"}, "not an image in a format"),
        ({"metric": "exact", "question": "<image>", "answer": "y"}, "has 1 <image> tag(s) and 0 image(s)"),
        ({"metric": "exact", "messages": [{"role": "assistant", "content": "y"}]}, "has no turn of the user"),
    ],
)  # fmt: skip
def test_a_broken_record_is_named_with_file_and_line(questions, record, message):
    line = record if isinstance(record, str) else json.dumps(record)
    questions.write_text(json.dumps(RECORDS[0]) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=r"data.jsonl:3: ") as caught:
        read(questions)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: must be positive, not 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens: must be positive, not -1"),
        (["--max-tiles", "0"], "--max-tiles: must be from 1 to 100, not 0"),
        (["--limit", "0"], "--limit: must be positive, not 0"),
        (["--report-samples", "-1"], "--report-samples: must be 0 or more, not -1"),
        (["--prompt-template", "Answer:"], "--prompt-template: found 'Answer:', expected a text with {question}"),
        (["b", "c"], "found 3 arguments, expected [CKPT] DATA.jsonl"),
    ],
)
def test_wrong_options_are_usage_errors(questions, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(questions), *arguments, "--metric", "anls"]) == UsageError.exit_status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    for name, message in (("none", "not found"), ("empty.jsonl", "has no samples"), ("latin.jsonl", "UTF-8")):
        with pytest.raises(DSVL2Error, match=rf"{name}.*{message}"):
            read(tmp_path / name, metric="exact")


def test_checkpoints_are_told_apart_by_one_changed_byte(tmp_path, checkpoints):
    source, copy = checkpoints / "mini-tiny", tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert checkpoint_digest(copy) == checkpoint_digest(source)
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert checkpoint_digest(copy) != checkpoint_digest(source)


def test_results_are_told_apart_by_their_adapter(questions, tmp_path, parrot, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapters = [tmp_path / "mine", tmp_path / "runs" / "lora" / "checkpoints" / "8" / "adapter"]
    for adapter in adapters:
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.bin").write_bytes(b"numbers")
    (tmp_path / "runs" / "lora" / "run.json").touch()
    answers = ["eval", str(questions), "--metric", "anls"]
    for adapter in (None, *adapters):
        assert main(answers + ([] if adapter is None else ["--adapter", str(adapter)])) == 0
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"bundled", "bundled+mine", "bundled+lora-8"}
    (adapters[0] / "adapter_model.bin").write_bytes(b"others")
    assert main([*answers, "--adapter", str(adapters[0])]) == 1
    assert main([*answers, "--adapter", str(tmp_path / "none")]) == 1


def test_it_works_without_the_training_extra():
    program = (
        "import sys\n"
        "for name in ('grain', 'optax', 'matplotlib', 'torch', 'transformers'): sys.modules[name] = None\n"
        "import dsvl2_jax.infer.eval.evaluate\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("mesh", [None, "data=4,tensor=2"])
def test_questions_are_answered_as_the_model_answers_them_alone(questions, tmp_path, mesh):
    write(questions, [RECORDS[6] | {"question": f"What is {what}?"} for what in ("this", "that there", "it")])
    evaluate.evaluate(None, questions, options(tmp_path, batch_size=4, mesh=mesh, max_new_tokens=12))
    kept = results(tmp_path)
    model, sample = dsvl2_jax.load(), read(questions)[1]
    inputs = model.processor(list(sample.conversation), [questions.parent / "small.png"])
    assert kept[2]["answer"] == model.generate(inputs, 12).text.strip()
    assert kept[2]["prompt_tokens"] == len(inputs.input_ids)
