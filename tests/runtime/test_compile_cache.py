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
