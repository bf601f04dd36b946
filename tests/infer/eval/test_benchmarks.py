"""`dsvl2 data import`: published tables and shards, made up here in their form, become questions of `dsvl2 eval`."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.errors import DataError, UsageError
from dsvl2_jax.infer.eval.benchmarks import import_benchmark
from dsvl2_jax.infer.eval.samples import Sample, read_samples
from dsvl2_jax.inputs.image_sources import FolderImages


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGE = base64.b64encode(jpeg()).decode()
ROW = {"index": "9", "question": "what?", "image": IMAGE, "answer": "this"}


def write_table(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return file


def read(file: Path) -> list[Sample]:
    return read_samples(file, FolderImages(str(file.parent)), metric=None, template=None, limit=None)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("DocVQA_VAL", [{"answer": "['a b', 'A']"}], [{"metric": "anls", "answers": ["a b", "A"]}]),
        ("OCRBench", [{"answer": "['12']"}], [{"metric": "contains", "answers": ["12"]}]),
        ("TextVQA_VAL", [{"answer": str(["x"] * 10)}], [{"metric": "vqa", "answers": ["x"] * 10}]),
        ("ChartQA_TEST", [{"answer": "7", "split": "test_human"}], [{"metric": "relaxed", "task": "test_human"}]),
        (
            "MMBench_DEV_EN",
            [
                {"index": "5", "answer": "A", "A": "p", "B": "q", "hint": "see"},
                {"index": "1000005", "answer": "B", "A": "q", "B": "p", "hint": "", "image": "5"},
            ],
            [
                {"metric": "choice", "choices": ["p", "q"], "group": "5", "question": "see\nwhat?"},
                {"choices": ["q", "p"], "group": "5", "images": ["MMBench_DEV_EN/5-0.jpg"]},
            ],
        ),
        (
            "MMMU_DEV_VAL",
            [
                {"index": "1", "split": "dev", "answer": "A", "A": "p", "B": "q"},
                {"index": "2", "split": "validation", "answer": "A", "A": "p", "B": "q", "image": "TWO"},
            ],
            [{"id": "2", "images": ["MMMU_DEV_VAL/2-0.jpg", "MMMU_DEV_VAL/2-1.jpg"]}],
        ),
        (
            "MathVista_MINI",
            [
                {"question_type": "multi_choice", "choices": "['3', '4']", "answer": "4"},
                {"question_type": "free_form", "choices": "", "answer": "1.5"},
            ],
            [{"metric": "choice", "choices": ["3", "4"]}, {"metric": "exact", "answers": ["1.5"], "choices": []}],
        ),
    ],
)
def test_published_tables_become_questions(tmp_path, name, rows, expected):
    rows = [ROW | row for row in rows]
    rows = [row | {"image": str([IMAGE] * 2)} if row["image"] == "TWO" else row for row in rows]
    file = import_benchmark(write_table(tmp_path / f"{name}.tsv", rows))
    assert file == tmp_path / f"{name}.jsonl"
    samples = read(file)
    assert len(samples) == len(expected)
    for sample, wanted in zip(samples, expected, strict=True):
        question = sample.question.split("\nA. ")[0]
        found = dataclasses.asdict(sample) | {"question": question}
        for key, value in wanted.items():
            assert found[key] == (tuple(value) if isinstance(value, list) else value)


def test_the_command_prints_the_file_and_counts_and_replaces_what_was_there(tmp_path, capsys):
    source = write_table(tmp_path / "OCRBench.tsv", [ROW, ROW | {"index": "10"}])
    assert main(["data", "import", str(source)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'OCRBench.jsonl'}\n" and printed.err == "2 questions, 2 images\n"
    assert {file.name for file in (tmp_path / "OCRBench").iterdir()} == {"9-0.jpg", "10-0.jpg"}
    assert (tmp_path / "OCRBench" / "9-0.jpg").read_bytes() == jpeg()
    write_table(source, [ROW])
    assert main(["data", "import", str(source)]) == 0
    assert [file.name for file in (tmp_path / "OCRBench").iterdir()] == ["9-0.jpg"]
    assert len(read(tmp_path / "OCRBench.jsonl")) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"OCRBench", "OCRBench.jsonl", "OCRBench.tsv"}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "OCRBench",
            [{"index": "1", "question": "x", "answer": "y"}],
            ":2: the table has no column 'image'",
        ),
        ("OCRBench", [ROW, ROW | {"image": "!" * 80}], r":3: column 'image': image 1 is not base64 \("),
        ("OCRBench", [ROW | {"image": "8"}], ":2: column 'image' is '8', which is the index of no row before it"),
        ("OCRBench", [ROW | {"image": "[]"}], ":2: column 'image' has no image"),
        ("OCRBench", [ROW | {"answer": "['a', print()]"}], ":2: column 'answer' begins with a bracket and is no list"),
        ("OCRBench", [ROW | {"index": "../../9"}], "'../../9-0.jpg' would lie outside of the folder of the images"),
        ("MMBench_DEV_EN", [ROW | {"index": "nine"}], ":2: index 'nine', expected a whole number"),
        ("OCRBench", [], "would have no question"),
    ],
)
def test_a_broken_table_is_named_with_its_line_and_leaves_nothing(tmp_path, name, rows, message):
    source = write_table(tmp_path / f"{name}.tsv", rows)
    with pytest.raises(DataError, match=message):
        import_benchmark(source)
    assert list(tmp_path.iterdir()) == [source]


def test_an_interrupted_import_keeps_the_older_one(tmp_path):
    source = write_table(tmp_path / "OCRBench.tsv", [ROW])
    file = import_benchmark(source)
    before = file.read_bytes()
    write_table(source, [ROW | {"question": "other?"}, ROW | {"image": "7"}])
    with pytest.raises(DataError):
        import_benchmark(source)
    assert file.read_bytes() == before and (tmp_path / "OCRBench" / "9-0.jpg").is_file()


REFCOCO = {
    "image_info": {"file_name": "COCO_1.jpg"},
    "image": {"bytes": jpeg()},
    "ref_list": [
        {
            "ann_info": {"bbox": [2, 3, 10, 12]},
            "ref_info": {"sentences": [{"sent": "the left one"}, {"sent": "a cup"}]},
        },
        {"ann_info": {"bbox": [0, 0, 20, 20]}, "ref_info": {"sentences": [{"sent": "everything"}]}},
    ],
}


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A download whose shard holds rows as JSON, and a stand-in for pyarrow, which is no dependency, that reads it."""

    class File:
        def __init__(self, path):
            self._rows = json.loads(Path(path).read_text())

        def iter_batches(self, batch_size):
            rows = [row | {"image": {"bytes": base64.b64decode(row["image"]["bytes"])}} for row in self._rows]
            return [types.SimpleNamespace(to_pylist=lambda: rows)]

    pyarrow = types.ModuleType("pyarrow")
    pyarrow.ArrowException, pyarrow.parquet = RuntimeError, types.ModuleType("pyarrow.parquet")
    pyarrow.parquet.ParquetFile = File
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow.parquet)

    def write(*rows):
        (tmp_path / "refcoco" / "data").mkdir(parents=True)
        content = [row | {"image": {"bytes": IMAGE}} for row in rows]
        (tmp_path / "refcoco" / "data" / "refcoco_unc_val-00000-of-00001.parquet").write_text(json.dumps(content))
        return tmp_path / "refcoco"

    return write


def test_refcoco_has_a_question_for_each_expression(parquet):
    folder = parquet(REFCOCO)
    file = import_benchmark(folder)
    assert file == folder / "val.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["question"] for record in records] == ["the left one", "a cup", "everything"]
    assert [record["boxes"] for record in records] == [[[2, 3, 12, 15]], [[2, 3, 12, 15]], [[0, 0, 20, 20]]]
    assert {record["image"] for record in records} == {"images/COCO_1.jpg"}
    file.write_text("".join(json.dumps(record | {"metric": "iou"}) + "\n" for record in records))
    assert [sample.boxes for sample in read(file)][2] == ((0, 0, 20, 20),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_info": {"file_name": "../up.jpg"}}, "'../up.jpg' would lie outside"),
        ({"ref_list": [{"ann_info": {}}]}, r"not in the form of jxu124/refcoco-benchmark \(KeyError: 'bbox'\)"),
    ],
)
def test_a_broken_refcoco_row_is_named(parquet, change, message):
    folder = parquet(REFCOCO | change)
    with pytest.raises(DataError, match=message):
        import_benchmark(folder)
    assert [file.name for file in folder.iterdir()] == ["data"]


def test_what_cannot_be_imported_is_said(parquet, tmp_path, monkeypatch, capsys):
    with pytest.raises(DataError, match=r"has no data/refcoco_unc_val-\*.parquet"):
        import_benchmark(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert main(["data", "import", str(tmp_path / "notes.txt")]) == 2
    assert "neither a table of VLMEvalKit (a file NAME.tsv) nor the folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        import_benchmark(tmp_path)
