"""A program's costs and launches by named scope."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from dsvl2_jax.apps.plan.hlo_walk import walk
from dsvl2_jax.apps.plan.launches import count_launches
from dsvl2_jax.apps.plan.scopes import scopes_of


def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
    for number, weight in enumerate(weights):
        with jax.named_scope(f"layers_{number}"), jax.named_scope("mlp"):
            x = jnp.tanh(x @ weight)
    with jax.named_scope("head"):
        return jax.lax.fori_loop(0, 3, lambda _, y: y @ weights[0], x).sum()


def text_of(function, *shapes) -> str:
    return jax.jit(function).lower(*shapes).compile().as_text()


WEIGHT = jax.ShapeDtypeStruct((64, 64), jnp.float32)
ROWS = jax.ShapeDtypeStruct((128, 64), jnp.float32)
PRODUCT = 2.0 * 128 * 64 * 64


def test_layers_are_taken_together_and_loops_count_as_often_as_they_run():
    text = text_of(loss, [WEIGHT] * 2, ROWS)
    scopes = scopes_of(text)
    assert scopes["layers/mlp"].flops == 2 * PRODUCT and scopes["head"].flops == 3 * PRODUCT


def test_a_backward_pass_has_scopes_of_its_own():
    scopes = scopes_of(text_of(jax.grad(loss), [WEIGHT] * 2, ROWS))
    assert scopes["layers/mlp"].flops == 2 * PRODUCT and scopes["backward/layers/mlp"].flops > PRODUCT
    backward = sum(scope.flops for name, scope in scopes.items() if name.startswith("backward"))
    assert backward >= 1.5 * sum(scope.flops for name, scope in scopes.items() if not name.startswith("backward"))


def test_the_parts_are_the_whole():
    text = text_of(jax.grad(loss), [WEIGHT] * 2, ROWS)
    scopes, cost = scopes_of(text).values(), walk(text)
    assert sum(scope.flops for scope in scopes) == pytest.approx(cost.flops)
    assert sum(scope.bytes for scope in scopes) == pytest.approx(cost.bytes)
    assert sum(scope.launches for scope in scopes) == count_launches(text).total
