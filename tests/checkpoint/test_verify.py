"""``--verify``: any changed bit and any lost byte of a stored file is found, and the file named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released_checkpoint
import toy_run
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

import dsvl2_jax
from dsvl2_jax.checkpoint import digests, rules
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import MANIFEST_NAME, PARAMS_NAME, read_manifest, resolve
from dsvl2_jax.checkpoint.verify import verify
from dsvl2_jax.convert.doctor import doctor, examine
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model.config import Config
from dsvl2_jax.train.run_directory import Identity, model_identity, opened
from dsvl2_jax.train.settings.load import load


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    """A converted directory, never to be left damaged."""
    directory = tmp_path_factory.mktemp("converted") / "mini"
    convert(checkpoints / "mini-tiny", directory)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a training run with two checkpoints."""
    work = tmp_path_factory.mktemp("run")
    source, data = toy_run.make_model(work / "model"), toy_run.make_data(work / "data", samples=3)
    settings = load(toy_run.write_config(work / "c.toml", source, data, work / "run"))
    config, random = Config.from_file(source), np.random.default_rng(3)
    leaves = {leaf.path: random.standard_normal(leaf.shape, np.float32) for leaf in rules.expand(config)}
    with opened(work / "run") as directory:
        directory.begin(settings, source, Identity(model_identity(source), {}))
        for step in (1, 2):
            params = jax.device_put(unflatten_dict(leaves))
            directory.save(step, {PARAMS_NAME: params}, {"a": jnp.ones(3)}, {"at": step})
    return work / "run"


def files_of(directory: Path, least: int = 1) -> list[Path]:
    """Files of at least so many bytes; Orbax leaves an empty one, in which no bit can change."""
    return sorted(file for file in directory.rglob("*") if file.is_file() and file.stat().st_size >= least)


def named(directory: Path, file: Path) -> bool:
    """Whether verification fails and names the file."""
    with pytest.raises(CheckpointError) as found:
        verify(directory)
    return str(file.relative_to(directory)) in str(found.value)


class changed:
    """Has other bytes in a file for a while."""

    def __init__(self, file: Path, content: bytes):
        self.file, self.content, self.before = file, content, file.read_bytes()

    def __enter__(self):
        self.file.write_bytes(self.content)

    def __exit__(self, *exc_info):
        self.file.write_bytes(self.before)


def flipped(file: Path, bit: int) -> changed:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    return changed(file, bytes(content))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_and_any_cut_of_a_converted_directory_is_found_and_its_file_named(converted, data):
    file = data.draw(st.sampled_from(files_of(converted)))
    content = file.read_bytes()
    if data.draw(st.booleans()):
        damage = flipped(file, data.draw(st.integers(0, 8 * len(content) - 1)))
    else:
        damage = changed(file, content[: data.draw(st.integers(0, len(content) - 1))])
    with damage:
        assert named(converted, file)


@pytest.mark.exhaustive
def test_every_flipped_bit_of_a_manifest_is_found(converted):
    manifest = converted / MANIFEST_NAME
    for bit in range(8 * manifest.stat().st_size):
        with flipped(manifest, bit), pytest.raises(CheckpointError, match=MANIFEST_NAME):
            read_manifest(converted)


def test_a_whole_directory_verifies_and_says_nothing(converted, capsys):
    assert verify(converted) == []
    load_params(converted, Config.from_file(converted), verify=True)
    assert doctor(converted, verify=True) == 0
    assert "note" not in "".join(capsys.readouterr())


def test_whoever_loads_with_verify_hears_of_a_flipped_bit_and_without_it_does_not(converted, tmp_path):
    largest = max(files_of(converted / "params"), key=lambda file: file.stat().st_size)
    with flipped(largest, 8 * (largest.stat().st_size // 2)):
        uses = (
            lambda: load_params(converted, Config.from_file(converted), verify=True),
            lambda: dsvl2_jax.load(converted, verify=True),
            lambda: export(converted, tmp_path / "out", verify=True),
        )
        for use in uses:
            with pytest.raises(CheckpointError, match=rf"{largest.name}: changed"):
                use()
        assert not (tmp_path / "out").exists()
        load_params(converted, Config.from_file(converted))
        assert examine(converted).ok
        report = examine(converted, verify=True)
    assert not report.ok and largest.name in report.problems[0]


def test_a_manifest_of_before_loads_and_verify_says_what_has_no_digest(converted, tmp_path):
    old = released_checkpoint.copy(converted, tmp_path / "old")
    manifest = json.loads((old / MANIFEST_NAME).read_text())
    kept = {key: manifest[key] for key in ("version", "source", "parameters", "mixed_dtypes", "files")}
    (old / MANIFEST_NAME).write_text(json.dumps(kept, indent=1) + "\n")
    load_params(old, Config.from_file(old))
    (note,) = verify(old)
    assert note.startswith(f"{len(files_of(old, 0))} files have no digest and were not verified (convert again")


def test_the_manifest_has_the_digests_of_the_source(converted, checkpoints):
    manifest = read_manifest(converted)
    source = checkpoints / "mini-tiny"
    assert manifest["source_sha256"] == {file.name: digests.digest(file) for file in source.glob("*.safetensors")}
    assert manifest["sha256"].keys() == {str(f.relative_to(converted)) for f in files_of(converted, 0)} - {
        MANIFEST_NAME
    }


def test_a_file_that_was_added_has_no_digest(converted):
    (converted / "notes.txt").write_text("mine")
    (note,) = verify(converted)
    assert note.startswith("1 files have no digest") and note.endswith(": notes.txt")
    (converted / "notes.txt").unlink()


BAD_MANIFESTS = {
    "a size of a number without end": ('"files": {', '"files": {"a": 1e400,'),
    "a list of sizes": ('"files": {', '"files": [], "was": {'),
    "lists in lists": ('"version": 1', '"version": 1, "a": ' + "[" * 100_000),
    "a dtype that there is not": ('"mixed_dtypes": {', '"mixed_dtypes": {"a": "float7"'),
    "a file whose name is too long": ('"files": {', '"files": {"' + "x" * 5000 + '": 1,'),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_manifest_that_is_none_is_an_error_that_names_it(converted, case):
    manifest = converted / MANIFEST_NAME
    content = json.loads(manifest.read_text())
    old = {key: content[key] for key in ("version", "source", "parameters", "mixed_dtypes", "files")}
    before, after = BAD_MANIFESTS[case]
    text = json.dumps(old)
    assert before in text
    with changed(manifest, text.replace(before, after).encode()), pytest.raises(CheckpointError, match=str(converted)):
        read_manifest(converted)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_a_runs_checkpoint_is_found_and_its_file_named(run, data):
    directory = resolve(run)
    file = data.draw(st.sampled_from(files_of(directory)))
    with flipped(file, data.draw(st.integers(0, 8 * file.stat().st_size - 1))):
        assert named(directory, file)


def test_a_runs_checkpoint_verifies_and_a_run_that_was_stopped_before_its_digests_loads(run, tmp_path, capsys):
    directory = resolve(run)
    assert all("digests-0.json" in {f.name for f in files_of(directory.parent / step)} for step in ("1", "2"))
    assert [note for note in verify(directory) if "params" in note] == []
    assert doctor(run, verify=True) == 0
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (resolve(copy) / "digests-0.json").unlink()
    load_params(resolve(copy), Config.from_file(copy / "model"))
    assert any("the run was stopped before they were written" in note for note in verify(resolve(copy)))


def test_a_cut_file_of_a_runs_checkpoint_is_named_without_verify(run):
    directory = resolve(run)
    largest = max(files_of(directory / "params"), key=lambda file: file.stat().st_size)
    with changed(largest, largest.read_bytes()[:-1]), pytest.raises(CheckpointError, match=largest.name):
        load_params(directory, Config.from_file(run / "model"))


def hub_cache(work: Path, source: Path) -> Path:
    """The files of a directory as the hub's client keeps them: links to files named by their digests."""
    snapshot = work / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for file in source.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            name = digests.digest(file)
        else:
            name = digests.hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (blobs / name).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00001-of-000002.safetensors"])
def test_a_download_in_the_hubs_cache_is_compared_with_its_names(checkpoints, tmp_path, name):
    snapshot = hub_cache(tmp_path, checkpoints / "mini-tiny")
    assert verify(snapshot) == []
    with flipped(snapshot / name, 4000):
        assert named(snapshot, snapshot / name)


def test_a_released_directory_without_digests_says_so(checkpoints):
    (note,) = verify(checkpoints / "mini-tiny")
    assert "files have no digest and were not verified (write SHA256SUMS)" in note
