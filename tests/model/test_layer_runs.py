"""One loop over layers, separate or stacked. Which layers are a run is tested in tests/train/test_stacked.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.model.layer_runs import LayerRun, run_layers

RUN = LayerRun("language", "layers_", 1, 3)
SCALES = jnp.asarray([2.0, 3.0, 5.0])
SEPARATE = {f"layers_{i + 1}": {"scale": scale} for i, scale in enumerate(SCALES)}
STACKED = {"layers_1_to_3": {"scale": SCALES}}
X = jnp.asarray([1.0, -2.0])


def layer(x, params, state):
    x = x * params["scale"] + 1
    return x, None if state is None else state + 1, x.sum()


def test_stacked_layers_give_what_separate_ones_do():
    x, states, reports = run_layers(RUN, SEPARATE, layer, X)
    assert states == [None] * 3
    np.testing.assert_array_equal(x, (((X * 2 + 1) * 3) + 1) * 5 + 1)
    scanned, states, scanned_reports = run_layers(RUN, STACKED, layer, X)
    assert states == []
    np.testing.assert_array_equal(scanned, x)
    np.testing.assert_array_equal(scanned_reports, reports)
    assert reports.shape == (3,)


def test_each_layer_has_its_own_state():
    _, states, _ = run_layers(RUN, SEPARATE, layer, X, states=[10, 20, 30])
    assert states == [11, 21, 31]
    with pytest.raises(ValueError, match="layers_1_to_3: stacked layers keep no states"):
        run_layers(RUN, STACKED, layer, X, states=[10, 20, 30])


@pytest.mark.parametrize("params", [SEPARATE, STACKED], ids=["separate", "stacked"])
def test_a_wrapper_is_told_the_run_and_changes_its_layers(params):
    runs = []

    def wrap(run, layer):
        runs.append(run)
        return jax.checkpoint(lambda x, params, state: layer(-x, params, state))

    x, _, _ = run_layers(RUN, params, layer, X, wrap=wrap)
    assert runs == [RUN]
    np.testing.assert_array_equal(x, -(-(-X * 2 + 1) * 3 + 1) * 5 + 1)
