"""The data pipeline: what it reads, in which order, what it leaves out, and that it continues exactly."""

import dataclasses
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from packed import sources, unpack
from PIL import Image

from dsvl2_jax import configs
from dsvl2_jax.errors import DataError
from dsvl2_jax.inputs.image_sources import FilePool
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.model.config import Config
from dsvl2_jax.train.data.files import open_data_file
from dsvl2_jax.train.data.pipeline import (
    BatchShard,
    DataStats,
    Pipeline,
    StepData,
    fingerprint,
    open_training,
    open_validation,
)
from dsvl2_jax.train.data.samples import SkippedSample, open_sources
from dsvl2_jax.train.settings.schema import DataSettings, RunSettings, Settings, SourceSettings

MICRO = Path(configs.__file__).parent / "micro"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_dir(MICRO)


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.from_file(MICRO)


def jpeg(seed: int, size: tuple[int, int] = (40, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def ask(image: str | None, answer: str) -> dict:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"image": image} if image else {})


def write_lines(path: Path, records: list[dict | str]) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """mixed.jsonl: 30 samples with images and without, some broken (every tenth); text.jsonl: 12 texts."""
    root = tmp_path_factory.mktemp("data")
    for seed, size in enumerate([(40, 40), (90, 30)]):
        (root / f"{seed}.jpg").write_bytes(jpeg(seed, size))
    mixed: list[dict | str] = []
    for number in range(30):
        image = f"{number % 2}.jpg" if number % 3 else None
        mixed.append(ask("nope.jpg" if number % 10 == 7 else image, f"Answer {number} " + "word " * (number % 7 * 5)))
    write_lines(root / "mixed.jsonl", mixed)
    write_lines(root / "text.jsonl", [{"text": f"Text {number} " + "and so on " * number} for number in range(12)])
    return root


def make_settings(*paths: Path | str, weights: tuple[float, ...] = (), validation: tuple = (), **data) -> Settings:
    weights = weights or (1.0,) * len(paths)
    train = {f"set{n}": SourceSettings(str(path), weights[n]) for n, path in enumerate(paths)}
    held_out = {f"held{n}": SourceSettings(str(path)) for n, path in enumerate(validation)}
    defaults = {"sequence_length": 512, "tiles_per_sequence": 20, "packing_bins": 4, "max_broken_share": 0.5}
    return Settings(data=DataSettings(train=train, validation=held_out, **(defaults | data)), run=RunSettings(seed=11))


def pipeline(settings: Settings, processor: Processor, config: Config, **sizes) -> Pipeline:
    return open_training(settings, processor, config, BatchShard(**({"rows": 2, "accumulation": 2} | sizes)))


def take(steps: Pipeline, count: int) -> list[StepData]:
    return [next(steps) for _ in range(count)]


def assert_same(one: StepData, other: StepData) -> None:
    assert one.sources == other.sources
    assert one.stats == other.stats
    assert jax.tree.structure(one.batch) == jax.tree.structure(other.batch)
    for (path, left), right in zip(jax.tree.leaves_with_path(one.batch), jax.tree.leaves(other.batch), strict=True):
        assert left.dtype == right.dtype and np.array_equal(left, right), path


def in_steps(steps: list[StepData]) -> Counter:
    return Counter(name for step in steps for name in step.sources)


STEPS = 6


@pytest.fixture(scope="module")
def reference(root, processor, config) -> dict[bool, tuple[list[StepData], list[dict]]]:
    """By packing: the steps of an uninterrupted run without workers, and the state before and after each."""
    found = {}
    for packing in (True, False):
        steps = pipeline(make_settings(root / "mixed.jsonl", root / "text.jsonl", packing=packing), processor, config)
        states, out = [json.dumps(steps.get_state())], []
        for _ in range(STEPS):
            out.append(next(steps))
            states.append(json.dumps(steps.get_state()))
        steps.close()
        found[packing] = out, states
    return found


def test_shapes_dtypes_and_counts(reference):
    for packing, (steps, _) in reference.items():
        batch, stats = steps[-1].batch, steps[-1].stats
        for name in ("ids", "labels", "image_index", "positions", "segments"):
            assert getattr(batch, name).shape == (2, 2, 512) and getattr(batch, name).dtype == np.int32
        assert batch.with_images.dtype == bool and batch.tiles.dtype == np.uint8
        assert batch.tiles.shape == (2, 40, 126, 126, 3)
        assert stats.samples == sum(len(step.sources) for step in steps)
        assert stats.tokens == sum(int((step.batch.segments > 0).sum()) for step in steps)
        assert stats.tokens + stats.padding_tokens == STEPS * 2 * 2 * 512
        assert stats.tiles + stats.padding_tiles == STEPS * 2 * 40 and stats.tiles > 0
        assert set(stats.skipped) == {"image missing"} and stats.skipped_samples > 0
        assert (max(int(step.batch.segments.max()) for step in steps) == 1) is not packing


def test_a_packed_batch_is_its_samples(reference, root, processor, config):
    settings = make_settings(root / "mixed.jsonl", root / "text.jsonl")
    samples = {}
    for source in open_sources("data.train", settings.data.train, processor, settings.data):
        for index in range(len(source)):
            item = source[index]
            if not isinstance(item, SkippedSample):
                ids, labels, merge = item["tokens"].T
                made_of = sources(merge, item["tiles"], config.tokens_per_tile)
                samples[item["name"]] = ids.tolist(), labels.tolist(), made_of, len(item["tiles"]) > 0
    for step in reference[True][0]:
        assert unpack(step.batch, config.tokens_per_tile) == [samples[name] for name in step.sources]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_run_continues_bit_identically(reference, root, processor, config, packing, at):
    expected, states = reference[packing]
    settings = make_settings(root / "mixed.jsonl", root / "text.jsonl", packing=packing)
    steps = pipeline(settings, processor, config)
    steps.set_state(json.loads(states[at]))
    for number in range(at, STEPS):
        assert_same(next(steps), expected[number])
        assert json.loads(json.dumps(steps.get_state())) == json.loads(states[number + 1])
    steps.set_state(json.loads(states[2]))  # back again, in a pipeline that has run
    assert_same(next(steps), expected[2])
    steps.close()


def test_workers_give_the_same_data_and_states_and_continue(reference, root, processor, config):
    expected, states = reference[True]
    steps = pipeline(make_settings(root / "mixed.jsonl", root / "text.jsonl", workers=2), processor, config)
    steps.set_state(json.loads(states[2]))
    for number in range(2, STEPS):
        assert_same(next(steps), expected[number])
        assert json.loads(json.dumps(steps.get_state())) == json.loads(states[number + 1])
    steps.close()


def test_a_state_goes_on_with_other_processes_rows_and_streams_of_its_own(root, processor, config):
    """Two streams: the samples of every step are the same, whoever reads them, and so is what follows a state."""
    settings = make_settings(root / "mixed.jsonl", root / "text.jsonl", streams=2)
    splits = [[BatchShard(rows=4)], [BatchShard(rows=1, accumulation=4)], [BatchShard((i,), 4) for i in (0, 1, 2, 3)]]
    splits += [
        [BatchShard((0, 2), 4), BatchShard((1, 3), 4)],
        [BatchShard((i,), 2, rows=1, accumulation=2) for i in (0, 1)],
    ]
    state, found = None, []
    for split in splits:
        processes = [open_training(settings, processor, config, shard) for shard in split]
        if state is not None:
            for steps in processes:
                steps.set_state(json.loads(state))
        parts = [take(steps, 2) for steps in processes]
        found.append(
            [sorted(row.tobytes() for part in parts for row in part[n].batch.ids.reshape(-1, 512)) for n in (0, 1)]
        )
        if state is None:  # the others go on after the first step
            found[0] = [found[0][1], sorted(row.tobytes() for row in next(processes[0]).batch.ids.reshape(-1, 512))]
        for steps in processes:
            steps.close()
        if state is None:
            again = open_training(settings, processor, config, split[0])
            next(again)
            state = json.dumps(again.get_state())
            again.close()
    assert all(len(rows) == 4 for rows in found[0])
    assert all(other == found[0] for other in found[1:])
    assert [
        len(steps) for steps in (BatchShard((0,), 2, accumulation=2).stream_rows(2), BatchShard((1,), 2).stream_rows(1))
    ] == [2, 1]
    one = open_training(settings, processor, config, BatchShard((1,), 2))
    with pytest.raises(DataError, match="lacks stream 1 of"):
        one.set_state({"streams": {"0": {}}})
    one.close()


ORPHANS = """
import os, sys
import jax
import numpy as np
sys.path[:0] = sys.argv[2:]
from test_pipeline import MICRO, Config, Path, Processor, make_settings, pipeline
if __name__ == "__main__":
    steps = pipeline(make_settings(Path(sys.argv[1]), workers=1), Processor.from_dir(MICRO), Config.from_file(MICRO))
    next(steps)
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""


def test_workers_end_when_the_run_is_killed(root, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(ORPHANS)
    folders = [str(Path(__file__).parents[n]) for n in (0, 2)]  # of this module, and of the helpers that it imports
    command = [sys.executable, str(script), str(root / "text.jsonl"), *folders]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        workers = [int(pid) for pid in run.stdout.readline().split()]
        assert len(workers) == 1 and Path(f"/proc/{workers[0]}").exists()
        run.kill()
    for _ in range(600):
        if not alive(workers[0]):
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there a minute after its run was killed")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_share_an_epoch_without_overlap(root, processor, config):
    epoch = Counter(f"{root / 'text.jsonl'}:{line}" for line in range(1, 13))
    settings = make_settings(root / "text.jsonl", packing=False, streams=3)
    found = Counter()
    for index in range(3):
        steps = pipeline(settings, processor, config, data_shards=(index,), total_shards=3, rows=2, accumulation=1)
        assert steps.parts == 3
        share = in_steps(take(steps, 2))
        steps.close()
        assert sum(share.values()) == 4
        found += share
    assert found == epoch


def test_every_epoch_has_every_sample_once_in_another_order(root, processor, config):
    steps = pipeline(make_settings(root / "text.jsonl", packing=False), processor, config, rows=12, accumulation=1)
    first, second = take(steps, 2)
    steps.close()
    assert sorted(first.sources) == sorted(second.sources) and len(set(first.sources)) == 12
    assert first.sources != second.sources
    ordered = make_settings(root / "text.jsonl", packing=False, shuffle=False)
    steps = pipeline(ordered, processor, config, rows=12, accumulation=1)
    assert next(steps).sources == [f"{root / 'text.jsonl'}:{line}" for line in range(1, 13)]
    steps.close()


def test_a_mixture_follows_its_weights(root, processor, config):
    settings = make_settings(root / "mixed.jsonl", root / "text.jsonl", weights=(0.3, 0.7), packing=False)
    steps = pipeline(settings, processor, config, rows=50, accumulation=2)
    step = next(steps)
    steps.close()
    from_text = sum("text.jsonl" in name for name in step.sources)
    read = len(step.sources) + step.stats.skipped_samples
    assert from_text / read == pytest.approx(0.7, abs=0.02)
    alone = make_settings(root / "mixed.jsonl", root / "text.jsonl", weights=(0.0, 1.0))
    steps = pipeline(alone, processor, config)
    step = next(steps)
    steps.close()
    assert all("text.jsonl" in name for name in step.sources)
    assert step.batch.tiles.shape == (2, 0, 126, 126, 3)  # no source has images: no room is kept for tiles


def test_broken_samples_are_logged_with_file_line_and_image(reference, root, processor, config, caplog):
    with caplog.at_level(logging.WARNING):
        steps = pipeline(make_settings(root / "mixed.jsonl", shuffle=False), processor, config)
        next(steps)
        steps.close()
    assert f"{root / 'mixed.jsonl'}:8: left out (image missing): image 'nope.jpg'" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_are_not_read_as_seen_are_warned_of_once_and_counted(
    tmp_path, processor, config, caplog, workers
):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40), "red").save(tmp_path / "turned.jpg", exif=exif)
    path = write_lines(tmp_path / "a.jsonl", [ask("turned.jpg", f"word {number}") for number in range(3)])
    processor = dataclasses.replace(processor, warns=False)
    for as_seen, said in ((False, 1), (True, 0)):
        caplog.clear()
        reader = dataclasses.replace(processor, as_seen=as_seen)
        steps = pipeline(make_settings(path, shuffle=False, workers=workers, as_seen=as_seen), reader, config)
        take(steps, 1)
        steps.close()
        assert caplog.text.count(f"{path}:1, and perhaps later samples: 1 picture with an EXIF orientation") == said
        assert caplog.text.count("in all: ") == said
        assert caplog.text.count("data.as_seen = true") == 2 * said


def test_too_many_broken_samples_stop_the_run(root, processor, config):
    steps = pipeline(make_settings(root / "mixed.jsonl", max_broken_share=0.05), processor, config)
    with pytest.raises(DataError, match=r"2 of the first \d+ samples are broken.*0\.05 of every 30(.|\n)*nope\.jpg"):
        take(steps, 20)
    steps.close()
    steps = pipeline(make_settings(root / "mixed.jsonl", max_broken_share=0.1), processor, config)
    assert take(steps, 20)[-1].stats.skipped["image missing"] > 6
    steps.close()


def test_samples_that_never_fit_stop_the_run(root, processor, config):
    steps = pipeline(make_settings(root / "mixed.jsonl", sequence_length=8), processor, config)
    with pytest.raises(DataError, match=r"none of the last \d+ samples can be used.*sequence_length"):
        next(steps)
    steps.close()


def test_long_samples_are_skipped_or_truncated_and_counted(root, processor, config):
    def stats(too_long: str) -> DataStats:
        settings = make_settings(root / "text.jsonl", sequence_length=32, too_long=too_long, packing=False)
        steps = pipeline(settings, processor, config, rows=6, accumulation=1)
        counts = take(steps, 2)[-1].stats
        steps.close()
        return counts

    skipped, truncated = stats("skip"), stats("truncate")
    assert skipped.truncated == 0 and skipped.skipped["too many tokens"] > 0
    assert truncated.skipped == {} and 0 < truncated.truncated < truncated.samples == 12


def test_validation_is_read_once_in_order_and_its_last_step_padded(root, processor, config):
    settings = make_settings(root / "text.jsonl", validation=(root / "mixed.jsonl", root / "text.jsonl"), packing=False)
    shard = BatchShard(rows=4, accumulation=2)
    held_out = open_validation(settings, processor, config, shard)
    steps = list(held_out)
    good = [f"{root / 'mixed.jsonl'}:{n + 1}" for n in range(30) if n % 10 != 7]
    expected = good + [f"{root / 'text.jsonl'}:{n + 1}" for n in range(12)]
    assert [name for step in steps for name in step.sources] == expected
    assert steps[-1].stats.skipped == {"image missing": 3} and len(steps) == 5
    last = steps[-1].batch
    rows = last.segments.reshape(8, -1).any(axis=1)
    assert rows.tolist() == [True] * 7 + [False]
    assert last.ids.shape == steps[0].batch.ids.shape and last.tiles.shape == steps[0].batch.tiles.shape
    for one, other in zip(held_out, steps, strict=True):  # a second pass is the same
        assert_same(one, other)
    threaded = dataclasses.replace(settings, data=dataclasses.replace(settings.data, workers=3))
    threaded_steps = list(open_validation(threaded, processor, config, shard))
    for one, other in zip(threaded_steps, steps, strict=True):
        assert_same(one, other)
    assert open_validation(make_settings(root / "text.jsonl"), processor, config, shard) is None


def test_validation_is_the_same_for_any_number_of_processes(root, processor, config):
    settings = make_settings(root / "text.jsonl", validation=(root / "mixed.jsonl",))
    whole = list(open_validation(settings, processor, config, BatchShard(rows=2, accumulation=2)))
    parts = [
        list(open_validation(settings, processor, config, BatchShard((index,), 2, accumulation=2)))
        for index in range(2)
    ]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for step, left, right in zip(whole, *parts, strict=True):
        assert np.array_equal(step.batch.ids, np.concatenate([left.batch.ids, right.batch.ids], axis=1))
        assert step.stats == left.stats == right.stats
        assert step.sources == left.sources == right.sources


def test_the_fingerprint_changes_with_any_byte(root, tmp_path):
    for name in ("mixed.jsonl", "text.jsonl"):
        shutil.copy(root / name, tmp_path)
    add_members(tmp_path / "images.tar", {"a.jpg": jpeg(0)})
    settings = make_settings(tmp_path / "mixed.jsonl", validation=(tmp_path / "text.jsonl",))
    source = dataclasses.replace(settings.data.train["set0"], images=str(tmp_path / "*.tar"))
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, train={"set0": source}))
    before = fingerprint(settings)
    assert set(before) == {str(tmp_path / name) for name in ("mixed.jsonl", "text.jsonl", "images.tar")}
    assert fingerprint(settings) == before
    for name in ("mixed.jsonl", "text.jsonl"):
        contents = bytearray((tmp_path / name).read_bytes())
        contents[-10] ^= 1
        (tmp_path / name).write_bytes(contents)
        os.utime(tmp_path / name, ns=(1, hash(name) % 10**9))
        after = fingerprint(settings)
        assert {path for path in before if after[path] != before[path]} == {str(tmp_path / name)}
        before = after
    add_members(tmp_path / "images.tar", {"b.jpg": jpeg(0)})
    os.utime(tmp_path / "images.tar", ns=(1, 5))
    assert fingerprint(settings)[str(tmp_path / "images.tar")] != before[str(tmp_path / "images.tar")]


def add_members(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return str(path)


def test_a_json_array_blank_lines_and_a_byte_order_mark_are_read(tmp_path):
    records = [{"text": "Grüße, 世界"}, {"text": "b", "images": []}, {"text": "c"}]
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode())
    arrays = []
    for number, (indent, ascii_only) in enumerate([(None, True), (2, False)]):
        arrays.append(tmp_path / f"{number}.json")
        arrays[-1].write_text("\n " + json.dumps(records, indent=indent, ensure_ascii=ascii_only) + "\n", "utf-8")
    arrays[1].write_bytes(b"\xef\xbb\xbf" + arrays[1].read_bytes())
    for path in (lines, *arrays):
        file = open_data_file(str(path))
        assert [file.read(index, FilePool())[0] for index in range(len(file))] == records
        assert file.may_have_images
    assert [open_data_file(str(lines)).name(index) for index in range(3)] == [f"{lines}:{n}" for n in (1, 3, 5)]
    assert [open_data_file(str(arrays[1])).name(index) for index in range(3)] == [
        f"{arrays[1]}:{n}" for n in (3, 6, 10)
    ]
    for broken in ('[{"text": "a"} {"text": "b"}]', '[{"text": "a"}', "[1, ]x"[:4]):
        (tmp_path / "broken.json").write_text(broken)
        os.utime(tmp_path / "broken.json", ns=(1, len(broken)))
        with pytest.raises(DataError, match="no JSON array"):
            open_data_file(str(tmp_path / "broken.json"))


def test_shards_of_samples_text_files_and_broken_lines(tmp_path, processor, config):
    add_members(
        tmp_path / "shard-0.tar",
        {
            "a/1.json": json.dumps(ask("any-name.jpg", "One.")).encode(),
            "a/1.jpg": jpeg(0),
            "a/1.cls": b"7",
            "a/2.txt": b"A caption.",
            "a/2.jpg": jpeg(1, (90, 30)),
            "a/3.jpg": jpeg(2),
        },
    )
    (tmp_path / "story.txt").write_text("Once upon a time.\n\nThe end.\n")
    lines = write_lines(tmp_path / "broken.jsonl", ["{", '{"text": "fine"}', '"text"'])
    settings = make_settings(
        tmp_path / "shard-*.tar", tmp_path / "*.txt", lines, packing=False, shuffle=False, max_broken_share=1.0
    )
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, validation=settings.data.train))
    (step,) = open_validation(settings, processor, config, BatchShard(rows=4))
    shard = tmp_path / "shard-0.tar"
    assert step.sources == [f"{shard}:a/1", f"{shard}:a/2", f"{tmp_path / 'story.txt'}:1", f"{lines}:2"]
    assert step.stats.skipped == {"record": 3}
    expected = [
        processor(ask_turns("<image>\nWhat?", "One."), [jpeg(0)], inference=False),
        processor(prompt="<image>\nA caption.", images=[jpeg(1, (90, 30))], inference=False),
        processor(prompt="Once upon a time.\n\nThe end.", inference=False),
        processor(prompt="fine", inference=False),
    ]
    for row, inputs in enumerate(expected):
        assert step.batch.ids[0, row, : len(inputs.input_ids)].tolist() == inputs.input_ids.tolist()
        assert not step.batch.segments[0, row, len(inputs.input_ids) :].any()
        assert np.array_equal(step.batch.tiles[0, row * 20 : row * 20 + len(inputs.tiles)], inputs.tiles)


def ask_turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_sets_that_cannot_be_read_are_refused(tmp_path, root, processor, config):
    def refused(match: str, *paths, **data) -> None:
        with pytest.raises(DataError, match=match):
            pipeline(make_settings(*paths, **data), processor, config)

    refused(r"no data set to read.*data\.train\.NAME")
    refused("no data set to read", root / "text.jsonl", weights=(0.0,))
    refused(r"missing\.jsonl: no such file \(data\.train\.set0\)", tmp_path / "missing.jsonl")
    refused(r"the pattern matches no file \(data\.train\.set1\)", root / "text.jsonl", tmp_path / "*.jsonl")
    refused("is empty|no samples", write_lines(tmp_path / "empty.jsonl", []))
    refused("the path is empty", "")
    refused(r"\.xz is not read at random", write_lines(tmp_path / "a.jsonl.xz", []))
    refused(r"\.gz is not read at random", write_lines(tmp_path / "a.tar.gz", []))
    (tmp_path / "folder").mkdir()
    refused(r"a folder without data files \(data\.train\.set0\)", tmp_path / "folder")
    add_members(tmp_path / "no.tar", {"readme.md": b"x"})
    refused("no samples", tmp_path / "no.tar")
