"""Tables and compressed files: the same samples as the plain file, in one copy that is whole or not there."""

import gzip
import json
import pickle
from pathlib import Path

import pytest

from dsvl2_jax.errors import DataError
from dsvl2_jax.inputs.image_sources import FilePool
from dsvl2_jax.train.data import unpacked
from dsvl2_jax.train.data.files import DataFile, data_paths, open_data_file

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [
    {
        "image": {"bytes": bytes([number]), "path": f"{number}.png"},
        "messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "word " * number}],
    }
    for number in range(150)
]
LINES = "".join(json.dumps({"text": f"Text {number}."}) + "\n" for number in range(40)).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dsvl2_jax" / "data"


def records(file: DataFile) -> list:
    pool = FilePool()
    return [file.read(index, pool) for index in range(len(file))]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "arrow file"])
def test_rows_of_tables_are_records(tmp_path, suffix, cache):
    path, table = tmp_path / f"a.{suffix.split()[0]}", pyarrow.Table.from_pylist(ROWS)
    if suffix == "parquet":
        parquet.write_table(table, path, row_group_size=70)
    else:
        new = pyarrow.ipc.new_stream if suffix == "arrow" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=40)
    file = pickle.loads(pickle.dumps(open_data_file(str(path))))
    assert len(file) == 150 and file.may_have_images and file.name(3) == f"{path}:4"
    assert records(file) == [(row, []) for row in ROWS]
    assert len(list(cache.glob("*"))) == (suffix == "parquet")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match="cannot be read as a table"):
        open_data_file(str(path))


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstd, lambda data: b"".join(map(gzip.compress, (data[:99], data[99:])))]
)
def test_compressed_lines_are_those_of_the_plain_file(tmp_path, pack, cache):
    suffix = "zst" if pack is zstd else "gz"
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(LINES))
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack(b"Once.\n"))
    plain, packed = open_data_file(str(tmp_path / "a.jsonl")), open_data_file(str(tmp_path / f"a.jsonl.{suffix}"))
    assert packed.digest == plain.digest and packed.name(4) == f"{tmp_path}/a.jsonl.{suffix}:5"
    assert records(pickle.loads(pickle.dumps(packed))) == records(plain)
    assert records(open_data_file(str(tmp_path / f"a.txt.{suffix}"))) == [({"text": "Once."}, [])]
    assert len(list(cache.iterdir())) == 2 and (cache.stat().st_mode & 0o77) == 0
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(pack(LINES)[:-9])
    with pytest.raises(DataError, match="damaged or cut short"):
        open_data_file(str(tmp_path / f"b.jsonl.{suffix}"))
    assert len(list(cache.iterdir())) == 2


def test_a_file_made_to_fill_the_disk_is_refused_and_leaves_nothing(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(unpacked, "_MOST_BYTES", 1 << 20)
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)):
        (tmp_path / name).write_bytes(pack(b" " * (1 << 23)))
        with pytest.raises(DataError, match="200 times as many bytes"):
            open_data_file(str(tmp_path / name))
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(tmp_path, monkeypatch, cache):
    def full(path, file, most):
        file.write(b"x")
        raise OSError(28, "No space left on device")

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    monkeypatch.setattr("dsvl2_jax.train.data.files.decompress", full)
    with pytest.raises(DataError, match=r"the disk is full.*XDG_CACHE_HOME") as error:
        open_data_file(str(tmp_path / "a.jsonl.gz"))
    assert "\n" not in str(error.value) and list(cache.iterdir()) == []


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: needs pyarrow.*dsvl2-jax\[train\]"):
        open_data_file(str(tmp_path / "a.parquet"))


def test_folders_of_data_sets_are_their_files(tmp_path):
    def paths(folder: str) -> list[str]:
        return [str(Path(path).relative_to(tmp_path)) for path in data_paths(str(tmp_path / folder), "set")]

    for name in ("hub/data/train-00000-of-00002.parquet", "hub/data/train-00001-of-00002.parquet", "hub/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert paths("hub") == ["hub/data/train-00000-of-00002.parquet", "hub/data/train-00001-of-00002.parquet"]
    (tmp_path / "hub/data/test-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match=r"several splits.*data/test-\*, .*data/train-\*"):
        paths("hub")
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    names = [f"data-{n:05}-of-00002.arrow" for n in range(2)]
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    with pytest.raises(DataError, match=f"{names[0]}: no such file"):
        paths("saved/train")
    for name in names:
        (saved / name).touch()
    assert paths("saved/train") == [f"saved/train/{name}" for name in names]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits.*saved/test, .*saved/train"):
        paths("saved")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without data files"):
        paths("empty")
