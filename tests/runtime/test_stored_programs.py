"""Programs come from disk where they are whole and fit, and are made again where they are not."""

import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dsvl2_jax.runtime import stored_programs
from dsvl2_jax.runtime.stored_programs import StoredPrograms
from dsvl2_jax.runtime.timing import compile_log

traced = []


@functools.partial(jax.jit, static_argnames="power", donate_argnames="state")
def advance(state, x, power):
    traced.append(power)
    return state + jnp.sum(x["x"] ** power), x["x"] * 2


@pytest.fixture
def programs(tmp_path):
    """Makes what a fresh process would have, with the sources' one file as it is given."""
    sources = tmp_path / "sources"
    sources.mkdir()

    def make(text="a = 1"):
        (sources / "module.py").write_text(text)
        return StoredPrograms(jax.devices()[:1], [sources], tmp_path / "programs")

    return make


def call(programs, power=3, size=4):
    x = np.arange(size, dtype=np.float32)
    state, twice = programs.call(advance, {"power": power}, {"state": np.float32(1), "x": {"x": x}})
    assert float(state) == 1 + (x**power).sum()
    np.testing.assert_array_equal(twice, 2 * x)


def made(action):
    """How many programs an action traced, and compiled."""
    jax.clear_caches()
    before, compiled = len(traced), compile_log().count
    action()
    return len(traced) - before, compile_log().count - compiled


def test_a_second_process_neither_traces_nor_compiles(programs):
    first = programs()
    assert made(lambda: call(first))[0] == 1
    assert made(lambda: call(first))[0] == 0
    assert made(lambda: call(programs())) == (0, 0)


def test_other_shapes_arguments_and_sources_are_other_programs(programs):
    call(programs())
    assert made(lambda: call(programs(), power=2))[0] == 1
    assert made(lambda: call(programs(), size=5))[0] == 1
    assert made(lambda: call(programs("a = 2")))[0] == 1
    assert made(lambda: call(programs()))[0] == 0


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:200] + b"x" + b[201:]])
def test_a_damaged_file_is_made_again(programs, tmp_path, damage):
    call(programs())
    (file,) = (tmp_path / "programs").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert made(lambda: call(programs()))[0] == 1
    assert made(lambda: call(programs()))[0] == 0


def test_a_folder_that_cannot_be_written_costs_only_time(programs, tmp_path):
    (tmp_path / "programs").write_text("a file")
    call(programs())


def test_a_full_disk_leaves_nothing_half_written(programs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored_programs.os, "replace", full)
    call(programs())
    assert list((tmp_path / "programs").iterdir()) == []


def test_what_nobody_used_for_long_is_removed(programs, tmp_path):
    call(programs())
    (old,) = (tmp_path / "programs").iterdir()
    long_ago = time.time() - 2 * stored_programs._KEPT
    os.utime(old, (long_ago, long_ago))
    call(programs())  # used again
    assert old.exists()
    os.utime(old, (long_ago, long_ago))
    call(programs(), power=5)
    assert not old.exists()


def test_jaxs_own_cache_works_afterwards_as_before(programs):
    before = jax.config.jax_enable_compilation_cache
    call(programs())
    assert jax.config.jax_enable_compilation_cache == before


def test_what_cannot_be_stored_is_called_as_ever(programs, tmp_path, monkeypatch):
    def refuse(program):
        raise NotImplementedError

    monkeypatch.setattr(stored_programs.serialize_executable, "serialize", refuse)
    call(programs())
    assert list((tmp_path / "programs").iterdir()) == []


def test_a_folder_is_made_for_its_user_alone(programs, tmp_path):
    call(programs())
    (file,) = (tmp_path / "programs").iterdir()
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_can_write_to_is_neither_read_nor_filled(programs, tmp_path, mode):
    call(programs())
    (tmp_path / "programs").chmod(mode)
    with pytest.warns(UserWarning, match=rf"programs: .* has mode {mode:o}. Remove it, or set XDG_CACHE_HOME"):
        refused = programs()
    assert made(lambda: call(refused))[0] == 1
    assert made(lambda: call(refused, power=2))[0] == 1
    assert len(list((tmp_path / "programs").iterdir())) == 1


def test_a_folder_and_a_file_of_somebody_else_are_not_read(programs, tmp_path, monkeypatch):
    call(programs())
    (file,) = (tmp_path / "programs").iterdir()
    file.chmod(0o620)
    assert made(lambda: call(programs()))[0] == 1
    owner = file.stat().st_uid or 1
    if os.geteuid() == 0:
        os.chown(tmp_path / "programs", owner, -1)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.warns(UserWarning, match=f"it belongs to user {owner} "):
        programs()


def test_what_jax_read_from_its_own_cache_is_not_stored(programs, tmp_path):
    """A program that is read from there lacks its functions when it is written again."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    x = np.arange(4096, dtype=np.float32)
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for _ in range(2):  # the second time it is read
            jax.clear_caches()
            advance(state=np.float32(1), x={"x": x}, power=2)[1].block_until_ready()
        assert any((tmp_path / "xla").glob("jit_advance*"))
        call(programs(), power=2, size=4096)
        jax.clear_caches()
        call(programs(), power=2, size=4096)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
