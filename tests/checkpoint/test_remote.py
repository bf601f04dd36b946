"""Checkpoints and runs in object stores, against local emulators of Google Cloud Storage and S3."""

import importlib.util
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import object_stores
import pytest
import toy_run
from flax.traverse_util import flatten_dict

from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.checkpoint import orbax_io, remote
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import MANIFEST_NAME, kind, open_model, resolve
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError, RunError, UsageError
from dsvl2_jax.train import run as run_module
from dsvl2_jax.train.run import train


@pytest.fixture(scope="module", params=["gs", "s3"])
def store(request):
    """The address of a bucket."""
    environment = {}
    with (
        {"gs": object_stores.google, "s3": object_stores.amazon}[request.param](environment),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"{request.param}://{object_stores.BUCKET}"


@pytest.fixture(scope="module")
def converted(store, checkpoints):
    """The address of mini-small, converted into the store."""
    convert(checkpoints / "mini-small", f"{store}/ckpt")
    return f"{store}/ckpt"


def client(address):
    return fsspec.filesystem(address.split("://")[0], use_listings_cache=False, skip_instance_cache=True)


def params(directory):
    config, _ = open_model(directory)
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(load_params(directory, config)).items()}


def copy(address, new, without):
    """A copy below ``new`` of the objects below ``address``, without one."""
    files = client(address)
    for name in files.find(address):
        inside = name.partition(address.split("://")[1] + "/")[2]
        if inside != without:
            files.pipe_file(f"{new}/{inside}", files.cat_file(name))
    return new


def test_loads_bit_for_bit_what_a_disk_holds(converted, checkpoints, tmp_path, capsys):
    convert(checkpoints / "mini-small", tmp_path / "ckpt")
    expected, found = params(tmp_path / "ckpt"), params(resolve(converted))
    assert expected.keys() == found.keys()
    for path, leaf in expected.items():
        assert leaf.dtype == found[path].dtype
        np.testing.assert_array_equal(leaf.view(np.uint8), found[path].view(np.uint8))
    assert main(["doctor", converted, "--verify"]) == 0
    assert "ok: usable" in capsys.readouterr().out
    assert remote.path_of(Path(converted)) == remote.path_of(converted)  # one slash of the two is left in a Path


def test_exports_to_a_disk_alone(converted, checkpoints, tmp_path):
    export(converted, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (checkpoints / "mini-small/config.json").read_bytes()
    with pytest.raises(CheckpointError, match="to a disk alone"):
        export(converted, f"{converted}-exported")


def test_what_is_half_written_is_refused(converted, store):
    with pytest.raises(CheckpointError, match="did not finish"):
        kind(resolve(copy(converted, f"{store}/half", MANIFEST_NAME)))
    one = next(name for name in remote.file_sizes(remote.path_of(converted)) if name.startswith("params/"))
    damaged = resolve(copy(converted, f"{store}/lacking", one))
    with pytest.raises(CheckpointError, match=f"{one}: missing"):
        params(damaged)


def test_an_address_is_not_written_twice(converted, checkpoints):
    before = remote.file_sizes(remote.path_of(converted))
    with pytest.raises(CheckpointError, match="exists already and was not touched"):
        convert(checkpoints / "mini-small", converted)
    assert remote.file_sizes(remote.path_of(converted)) == before


def test_an_upload_that_fails_leaves_nothing(store, checkpoints, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("the network is gone")

    monkeypatch.setattr(type(remote._client(remote.path_of(store))), "put_file", broken)
    with pytest.raises(CheckpointError, match=f"^{store}/broken: .*the network is gone"):
        convert(checkpoints / "mini-small", f"{store}/broken")
    assert remote.names(remote.path_of(f"{store}/broken")) == set()


def test_errors_name_the_address_in_one_line(store, checkpoints, monkeypatch, capsys):
    elsewhere = store.replace(object_stores.BUCKET, "no-such-bucket")
    for arguments in (["doctor", f"{elsewhere}/x"], ["convert", str(checkpoints / "mini-small"), f"{elsewhere}/x"]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"dsvl2: error: {elsewhere}/x: the store does not let us") and error.count("\n") == 1
    assert main(["doctor", f"{store}/nothing"]) == 1
    assert capsys.readouterr().err == f"dsvl2: error: {store}/nothing: nothing is stored there. Check the address.\n"
    assert main(["doctor", f"{store.split('/')[0]}//"]) == 2
    assert "names no bucket" in capsys.readouterr().err

    def forbidden(*args, **kwargs):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(type(remote._client(remote.path_of(store))), "ls", forbidden)
    assert main(["doctor", f"{store}/ckpt"]) == 1
    assert "PermissionError: Forbidden). Check the bucket's name, the credentials" in capsys.readouterr().err


@pytest.mark.parametrize(("address", "extra"), [("gs://bucket/x", "gcs"), ("s3://bucket/x", "s3")])
def test_a_missing_client_names_the_extra(monkeypatch, address, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"pip install 'dsvl2-jax\[{extra}\]'"):
        resolve(address)


def test_the_released_layout_is_not_read_from_a_store(store, checkpoints):
    for file in (checkpoints / "mini-small").iterdir():
        client(store).put_file(str(file), f"{store}/released/{file.name}")
    with pytest.raises(CheckpointError, match=r"released layout.*Copy it"):
        kind(resolve(f"{store}/released"))


class Killed(BaseException):
    pass


def losses(text):
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]


def test_a_run_that_is_killed_goes_on_with_the_same_losses(store, tmp_path, monkeypatch, capsys):
    toy_run.make_model(tmp_path / "model")
    data, run = toy_run.make_data(tmp_path), f"{store}/run"
    tables = {"run": {"directory": run, "steps": 6, "checkpoint_every": 2, "keep_last": 1}}
    config = toy_run.write_config(tmp_path / "c.toml", tmp_path / "model", data, run, tables)
    train(config, [f"run.directory={tmp_path / 'run'}"])
    expected = losses((tmp_path / "run" / "log.jsonl").read_text())
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]

    # Killed at step 5, while the checkpoint of step 4 is complete and that of another step half written.
    steps = run_module._Loop._settle

    def settle(self, pending):
        steps(self, pending)
        if pending is not None and pending.step == 5:
            self.directory.wait()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_module._Loop, "_settle", settle)
        with pytest.raises(Killed):
            train(config)
    directory = remote.path_of(run)
    copy(f"{run}/checkpoints/4", f"{run}/checkpoints/5", orbax_io._COMPLETE)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        kind(directory / "checkpoints" / "5")
    assert resolve(run) == directory / "checkpoints" / "4"

    train(config)
    assert losses(client(run).cat_file(f"{run}/log.jsonl").decode()) == expected
    assert remote.names(directory / "checkpoints") == {"6"}
    local, stored = params(resolve(tmp_path / "run")), params(resolve(run))
    for path, leaf in local.items():
        np.testing.assert_array_equal(leaf, stored[path])
    assert main(["plot", run, "--out", str(tmp_path / "plot.png")]) == 0
    # A process that another one has followed stops, and leaves the run as it is.
    later = run_module.RunDirectory(directory)
    with run_module.opened(run) as earlier:
        later.claim()
        with pytest.raises(RunError, match="another process has begun to train"):
            earlier.save(8, {}, {}, {})
    assert remote.names(directory / "checkpoints") == {"6"}
    shutil.rmtree(tmp_path / "run")
