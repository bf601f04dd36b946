"""Compilation is told apart from work."""

import jax
import jax.numpy as jnp

from dsvl2_jax.runtime.timing import Timing, compile_log


def test_compilation_inside_a_phase_counts_as_compilation():
    timing, count = Timing(), compile_log().count
    with timing.phase("work"):
        jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.arange(5.0)).block_until_ready()
    assert compile_log().count > count
    assert timing["compile"] > 0
    assert timing["work"] >= 0
    before = dict(timing)
    with timing.phase("work"):
        pass
    assert timing["work"] >= before["work"]
    assert timing["compile"] == before["compile"]
