"""The compilation cache is the user's own choice, or in the user's cache directory."""

import jax
import pytest

from dsvl2_jax.runtime.compile_cache import enable_compilation_cache, user_cache


@pytest.fixture
def restored():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    values = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in values.items():
        jax.config.update(name, value)


def test_a_cache_that_the_user_set_is_kept(restored):
    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "/somewhere"


def test_without_one_it_is_in_the_users_cache_directory(restored, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "dsvl2_jax" / "xla")
    assert user_cache() == tmp_path / "dsvl2_jax"
    assert (tmp_path / "dsvl2_jax" / "xla").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("relative", ["", "here", "../there"])
def test_a_relative_cache_directory_does_not_count(monkeypatch, tmp_path, relative):
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "dsvl2_jax"


def test_a_cache_that_others_can_write_to_is_not_turned_on(restored, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dsvl2_jax" / "xla").mkdir(parents=True)
    (tmp_path / "dsvl2_jax" / "xla").chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", None)
    with pytest.warns(UserWarning, match="xla: compiled programs are neither read"):
        enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
