"""`dsvl2_jax.train.run_directory`, and how the rest of the project finds a run's checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_run
from flax.traverse_util import flatten_dict, unflatten_dict

from dsvl2_jax.checkpoint import orbax_io, rules
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, kind, open_model, resolve
from dsvl2_jax.checkpoint.verify import verify
from dsvl2_jax.errors import CheckpointError, RunError
from dsvl2_jax.model.deepseek_vl2 import entry_axes
from dsvl2_jax.train import run_directory
from dsvl2_jax.train.run_directory import Identity, model_identity, opened
from dsvl2_jax.train.settings.load import load


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toy_run.make_model(tmp_path_factory.mktemp("run-directory") / "model")


@pytest.fixture(scope="module")
def model(source):
    """(configuration, parameters: vision in bfloat16 as a frozen encoder's may be)."""
    config, _ = open_model(source)
    random = np.random.default_rng(3)

    def draw(leaf):
        dtype = jnp.bfloat16 if leaf.path[0] == "vision" else np.float32
        return jax.device_put(random.standard_normal(leaf.shape, np.float32).astype(dtype))

    return config, unflatten_dict({leaf.path: draw(leaf) for leaf in rules.expand(config)})


@pytest.fixture
def begun(tmp_path, source):
    """begun(): opens a run that has begun. Its settings and identity are attributes of the function."""
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    file = toy_run.write_config(tmp_path / "config.toml", source, data, tmp_path / "runs" / "one")

    @contextlib.contextmanager
    def open_run():
        with opened(open_run.path) as run:
            if not run.started:
                run.begin(open_run.settings, source, open_run.identity)
            yield run

    open_run.settings = load(file)
    open_run.path = tmp_path / "runs" / "one"
    open_run.identity = Identity(model_identity(source), {"data.jsonl": "abc"})
    return open_run


SMALL = {"a": jnp.arange(6.0)}


def save(run, step, **options):
    run.save(step, SMALL, SMALL, {"at": step}, **options)
    return run.wait()


def names(run):
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def test_a_checkpoint_comes_back_bit_for_bit_though_its_arrays_are_donated(begun, model):
    config, params = model
    some = dict(list(flatten_dict(params, sep="/").items())[:3])
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(mu_dtype=jnp.bfloat16))
    _, optimizer = jax.jit(lambda x: transform.update(x, transform.init(x)))(some)
    iterator = {"rows": {"next": 3, "names": ["a", None]}, "share": 0.1}
    kept = jax.tree.map(np.array, (params, optimizer))
    given = jax.device_put(kept)
    with begun() as run:
        run.save(7, {PARAMS_NAME: given[0]}, given[1], iterator, entries=entry_axes(config))
        for leaf in jax.tree.leaves(given):
            leaf.delete()
        saved = run.wait()
        assert saved.step == 7
        assert saved.seconds > 0
        assert run.poll() is None
        assert run.steps() == [7]
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), optimizer)
        restored = run.restore(7, abstract)
    assert restored.iterator == iterator
    assert jax.tree.structure(restored.optimizer) == jax.tree.structure(optimizer)
    directory = resolve(run.path)
    assert directory == run.path / "checkpoints" / "7"
    assert kind(directory) == "run"
    loaded = load_params(directory, open_model(directory)[0])
    for found, expected in zip(jax.tree.leaves((loaded, restored.optimizer)), jax.tree.leaves(kept), strict=True):
        assert found.dtype == expected.dtype
        assert np.asarray(found).tobytes() == expected.tobytes()


def test_the_last_ones_and_the_best_are_kept(begun):
    with begun() as run:
        for step, loss in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, None), (5, 2.0), (6, 1.0), (7, None)):
            save(run, step, validation_loss=loss)
            run.prune(2)
        assert names(run) == ["6", "7"]  # of equals the newer one is kept
        save(run, 8, validation_loss=1.5)
        run.prune(2)
        assert names(run) == ["6", "7", "8"]
    with begun() as run:  # known again from the files
        save(run, 9)
        run.prune(1)
        assert names(run) == ["6", "9"]


def test_without_validation_the_last_ones_are_kept(begun):
    with begun() as run:
        for step in (1, 2, 10):
            save(run, step)
        run.prune(2)
        assert run.steps() == [2, 10]


def test_what_a_killed_run_left_is_no_checkpoint_and_is_removed(begun):
    with begun() as run:
        save(run, 2)
    left = run.path / "checkpoints"
    for name in ("4.orbax-checkpoint-tmp", "1.removing"):
        shutil.copytree(left / "2", left / name)
    (left / "3").mkdir()  # as on a file system that cannot rename
    assert resolve(run.path).name == "2"
    for name in ("3", "4.orbax-checkpoint-tmp", "1.removing", "5"):
        with pytest.raises(CheckpointError):
            kind(resolve(left / name))
    with begun() as run:
        assert names(run) == ["2", "3"]
        assert run.steps() == [2]


def test_a_checkpoint_being_written_is_finished_when_the_run_ends_or_fails(begun):
    with pytest.raises(ZeroDivisionError), begun() as run:
        run.save(3, SMALL, SMALL, {})
        1 / 0  # noqa: B018
    assert run.steps() == [3]


def test_a_run_without_checkpoints_says_so(begun):
    with begun() as run:
        pass
    with pytest.raises(CheckpointError, match="not written a complete checkpoint"):
        resolve(run.path)


def test_one_process_at_a_time(begun):
    with begun() as run, pytest.raises(CheckpointError, match="another process is training"), begun():
        pass
    with begun():
        assert (run.path / "run.json").is_file()


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"no training run \(it has thesis.txt\)"), opened(tmp_path / "mine"):
        pass
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"), opened(tmp_path / "file" / "run"):
        pass


def test_a_start_cut_short_starts_anew(begun, monkeypatch):
    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_text", killed)
        with pytest.raises(KeyboardInterrupt), begun():
            pass
    with begun() as run:
        run.check(begun.settings, begun.identity)


def test_another_run_is_told_apart_and_every_difference_is_named(begun):
    identity = begun.identity
    with begun() as run:
        run.check(begun.settings, identity)
        optimizer = dataclasses.replace(begun.settings.optimizer, learning_rate=1.0, beta1=0.5)
        model = {**identity.model, "config.json": "another"}
        other = dataclasses.replace(identity, model=model)
        with pytest.raises(RunError) as caught:
            run.check(dataclasses.replace(begun.settings, optimizer=optimizer), other)
        for part in (
            "optimizer.learning_rate",
            "optimizer.beta1",
            "model: config.json",
        ):
            assert part in str(caught.value)
        assert "choose another run.directory" in str(caught.value)


def test_a_run_from_before_settings_were_renamed_resumes(begun):
    with begun() as run:
        file = run.path / "config.toml"
        text = file.read_text()
        old = text.replace("microbatch_size =", "micro_sequences =").replace("lr_multiplier =", "rate =")
        assert old.count("\nrate = ") == 3 and "\nmicro_sequences = 2\n" in old
        file.write_text(old)
        run.check(begun.settings, begun.identity)
        run.write_settings(begun.settings)
        assert file.read_text() == text
        file.write_text(old.replace("rate = 0.1", "rate = 0.2"))
        with pytest.raises(RunError, match="not the rules of the start"):
            run.check(begun.settings, begun.identity)


def test_changed_data_is_told_apart(begun):
    with begun() as run, pytest.raises(RunError) as caught:
        run.check(begun.settings, dataclasses.replace(begun.identity, data={"data.jsonl": "abd", "more.jsonl": "1"}))
    assert "data.jsonl has changed" in str(caught.value)
    assert "more.jsonl is new" in str(caught.value)
    assert "Put the files back" in str(caught.value)


def test_a_run_of_another_version_is_refused(begun):
    with begun() as run:
        content = json.loads((run.path / "run.json").read_text())
        (run.path / "run.json").write_text(json.dumps(content | {"version": 99}))
        with pytest.raises(RunError, match="version 99"):
            run.check(begun.settings, begun.identity)
        (run.path / "run.json").write_text("{")
        with pytest.raises(RunError, match="cannot be read"):
            run.check(begun.settings, begun.identity)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_no_temporary_one(begun, monkeypatch):
    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    with begun() as run:
        save(run, 1)
        with monkeypatch.context() as patch:
            patch.setattr(orbax_io._Document, "_file", staticmethod(full))
            run.save(2, SMALL, SMALL, {})
            with pytest.raises(RunError, match=r"too full.*48 bytes are needed.*are free.*step 1, is untouched"):
                run.wait()
        assert names(run) == ["1"]
        save(run, 3)
        assert run.steps() == [1, 3]


def test_a_disk_too_full_is_seen_before_anything_is_written(begun, monkeypatch):
    usage = shutil.disk_usage("/")
    with begun() as run:
        with monkeypatch.context() as patch:
            patch.setattr(run_directory.shutil, "disk_usage", lambda path: usage._replace(free=10))
            with pytest.raises(
                RunError, match=r"48 bytes are needed, 10 bytes are free\. There is no earlier checkpoint"
            ):
                run.save(2, SMALL, SMALL, {})
        assert names(run) == []


def test_a_damaged_checkpoint_is_named(begun):
    with begun() as run:
        save(run, 1)
        for file in (run.checkpoint(1) / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        with pytest.raises(RunError, match=r"checkpoints/1: cannot be read .*the checkpoint before it"):
            run.restore(1, jax.eval_shape(lambda: SMALL))


def test_digests_that_a_kill_came_before_are_written_when_the_run_goes_on(begun):
    # A killed process left no digests, or a part of them under another name.
    with begun() as run:
        save(run, 1)
    folder = run.checkpoint(1)
    digests = (folder / "digests-0.json").read_text()
    (folder / "digests-0.json").rename(folder / "digests-0.json.new")
    with begun() as run:
        assert sorted(file.name for file in folder.glob("digests-*")) == []
        run.restore(1, jax.eval_shape(lambda: SMALL))
    assert (folder / "digests-0.json").read_text() == digests
    assert verify(folder) == []


def test_a_moved_run_still_loads(begun, model, tmp_path):
    config, params = model
    with begun() as run:
        run.save(5, {PARAMS_NAME: params}, SMALL, {})
    run.path.rename(tmp_path / "elsewhere")
    directory = resolve(tmp_path / "elsewhere")
    loaded = load_params(directory, config, dtype="float32")
    np.testing.assert_array_equal(loaded["language"]["embed_tokens"], params["language"]["embed_tokens"])
    assert loaded["vision"]["pos_embed"].dtype == jnp.float32
