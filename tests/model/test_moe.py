"""Router and experts against a plain numpy reference written from the official code."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.moe import MoE, choose_experts, run_experts

EXPERTS, TOP_K = 12, 4

# The reference is float64, the router float32.
WEIGHT_TOLERANCE = 2e-6
EXPERT_TOLERANCE = 2e-6  # of the largest element


def language(**fields) -> LanguageConfig:
    defaults = {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "topk_method": "greedy"}
    return LanguageConfig(**defaults | {"n_group": 1, "topk_group": 1} | fields)


def first_largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest along the last axis, the first of equals before the others."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :count]


def reference_route(logits: np.ndarray, bias: np.ndarray | None, cfg: LanguageConfig) -> tuple[np.ndarray, np.ndarray]:
    """(experts, weights) of one token in float64."""
    logits = logits.astype(np.float64)
    scores = 1 / (1 + np.exp(-logits)) if cfg.scoring_func == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    choice = scores if bias is None else scores + bias
    if cfg.topk_method != "greedy":
        groups = choice.reshape(cfg.n_group, -1)
        best = np.sort(groups, axis=-1)
        group_scores = best[:, -2:].sum(-1) if cfg.topk_method == "noaux_tc" else best[:, -1]
        outside = np.setdiff1d(np.arange(cfg.n_group), first_largest(group_scores, cfg.topk_group))
        groups = groups.copy()
        groups[outside] = 0.0
        choice = groups.reshape(-1)
    experts = first_largest(choice, cfg.num_experts_per_tok)
    weights = scores[experts]
    if cfg.norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
    return experts, weights * cfg.routed_scaling_factor


@functools.cache
def router_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Logits [2, 50, E] and a bias [E] of both signs, large enough to change many choices."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 50, EXPERTS)).astype(np.float32), (0.4 * rng.normal(size=EXPERTS)).astype(np.float32)


ROUTERS = [
    (method, scoring, norm, groups)
    for method, scoring, norm, groups in itertools.product(
        ("greedy", "group_limited_greedy", "noaux_tc"), ("softmax", "sigmoid"), (False, True), ((1, 1), (4, 2), (6, 3))
    )
    if method != "greedy" or groups == (1, 1)
]


@pytest.mark.parametrize(("method", "scoring", "norm", "groups"), ROUTERS)
def test_routing_is_the_reference_one(method, scoring, norm, groups):
    cfg = language(
        topk_method=method,
        scoring_func=scoring,
        norm_topk_prob=norm,
        n_group=groups[0],
        topk_group=groups[1],
        routed_scaling_factor=2.5,
    )
    logits, bias = router_inputs()
    bias = bias if method == "noaux_tc" else None
    routing = choose_experts(logits, bias, cfg)
    expected = [[reference_route(token, bias, cfg) for token in row] for row in logits]
    np.testing.assert_array_equal(routing.experts, [[experts for experts, _ in row] for row in expected])
    weights = [[w for _, w in row] for row in expected]
    np.testing.assert_allclose(routing.weights, weights, rtol=WEIGHT_TOLERANCE)
    scores = jax.nn.sigmoid(logits) if scoring == "sigmoid" else jax.nn.softmax(logits)
    np.testing.assert_allclose(routing.scores, scores, rtol=WEIGHT_TOLERANCE)


def test_the_correction_bias_changes_the_choice_and_nothing_else():
    cfg = language(topk_method="noaux_tc", scoring_func="sigmoid")
    logits, bias = router_inputs()
    plain, biased = (choose_experts(logits, b, cfg) for b in (np.zeros_like(bias), bias))
    assert (plain.experts != biased.experts).any()
    np.testing.assert_array_equal(plain.scores, biased.scores)
    chosen = np.take_along_axis(np.asarray(biased.scores), np.asarray(biased.experts), -1)
    np.testing.assert_array_equal(biased.weights, chosen)


def test_outside_groups_count_as_zero_so_a_negative_choice_inside_loses_to_them():
    """The official fill is 0.0, not −inf: expert 3's biased score is negative, so expert 4 of another group wins."""
    cfg = language(
        n_routed_experts=8,
        num_experts_per_tok=4,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        n_group=2,
        topk_group=1,
    )
    bias = np.array([1, 1, 1, -2, 0, 0, 0, 0], np.float32)
    routing = choose_experts(np.zeros((1, 1, 8), np.float32), bias, cfg)
    assert routing.experts.tolist() == [[[0, 1, 2, 4]]]
    assert routing.weights.tolist() == [[[0.5] * 4]]  # expert 4's own score, not the 0.0 it was chosen by


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy", "noaux_tc"])
def test_ties_choose_the_first(method):
    cfg = language(topk_method=method, n_group=4, topk_group=2)
    bias = np.zeros(EXPERTS, np.float32) if method == "noaux_tc" else None
    routing = choose_experts(np.zeros((1, 1, EXPERTS), np.float32), bias, cfg)
    assert routing.experts.tolist() == [[[0, 1, 2, 3]]]


def test_a_single_expert_per_token_keeps_its_score():
    """The official code renormalises only several experts; one alone would otherwise always weigh 1."""
    cfg = language(num_experts_per_tok=1, norm_topk_prob=True)
    routing = choose_experts(router_inputs()[0], None, cfg)
    np.testing.assert_array_equal(routing.weights[..., 0], routing.scores.max(-1))


def test_gradients_of_the_weights_reach_the_scores_of_the_chosen_only():
    cfg = language(topk_method="noaux_tc", scoring_func="sigmoid")
    logits, bias = router_inputs()
    experts = np.asarray(choose_experts(logits, bias, cfg).experts)
    gradient = jax.grad(lambda x: choose_experts(x, bias, cfg).weights.sum())(logits)
    chosen = (experts[..., None] == np.arange(EXPERTS)).any(-2)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, chosen)


def expert_inputs(dtype: str = "float32") -> tuple[jax.Array, ...]:
    """x [2, 7, D], experts and weights [2, 7, K], gate, up [E, D, F], down [E, F, D]."""
    rng = np.random.default_rng(1)
    d, f = 8, 5
    experts = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (2, 7, 1)), axis=-1)[..., :TOP_K]
    x, gate, up, down = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((2, 7, d), (EXPERTS, d, f), (EXPERTS, d, f), (EXPERTS, f, d))
    )
    return x, jnp.asarray(experts), jnp.asarray(rng.uniform(size=experts.shape), jnp.float32), gate, up, down


def dense_experts(x, experts, weights, gate, up, down):
    """Every token through every expert, in float32."""
    exact = jax.lax.Precision.HIGHEST
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate, precision=exact))
    hidden = hidden * jnp.einsum("btd,edf->btef", x, up, precision=exact)
    out = jnp.einsum("btef,efd->bted", hidden, down, precision=exact)
    factors = (jax.nn.one_hot(experts, gate.shape[0]) * weights[..., None]).sum(2)  # [B, T, E]
    return jnp.einsum("bted,bte->btd", out, factors, precision=exact)


def close(found, expected, tolerance: float) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(apply, experts, *arrays):
    """The output of ``apply(x, experts, weights, gate, up, down)``, and gradients of x, weights, gate, up, down."""
    out, pullback = jax.vjp(lambda x, *rest: apply(x, experts, *rest), *arrays)
    return out, *pullback(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def assert_same_with_gradients(found, expected) -> None:
    for name, a, b in zip(("out", "x", "weights", "gate", "up", "down"), found, expected, strict=True):
        assert a.shape == b.shape, name
        close(a, b, EXPERT_TOLERANCE)


def test_experts_and_their_gradients_are_the_dense_sum_over_all_experts():
    x, experts, *rest = expert_inputs()
    assert_same_with_gradients(
        with_gradients(run_experts, experts, x, *rest), with_gradients(dense_experts, experts, x, *rest)
    )


ROUTINGS = {
    "even": lambda experts: experts,
    "all on one expert": lambda experts: jnp.full_like(experts, 7),
    "all on one shard": lambda experts: experts % 3 + 3,
    "some are padding": lambda experts: jnp.where(jnp.arange(7)[:, None] < 4, experts, EXPERTS),
    "none": lambda experts: jnp.full_like(experts, EXPERTS),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_shares_of_the_experts_add_up_to_all_of_them_however_uneven(routing):
    """A device of several works through a share of the assignments at a time, until its own are done."""
    x, experts, *rest = expert_inputs()
    experts = ROUTINGS[routing](experts)

    def shards(x, experts, weights, gate, up, down):
        parts = (slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12))
        return sum(run_experts(x, experts, weights, gate[s], up[s], down[s], s.start, 4) for s in parts)

    assert EXPERTS == 12
    assert_same_with_gradients(
        with_gradients(shards, experts, x, *rest), with_gradients(dense_experts, experts, x, *rest)
    )


def test_bfloat16_experts_are_within_the_rounding_of_three_products():
    arrays = expert_inputs("bfloat16")
    found = jax.jit(run_experts)(*arrays)
    assert found.dtype == jnp.bfloat16
    upcast = (a if a.dtype == jnp.int32 else a.astype(jnp.float32) for a in arrays)
    close(found, jax.jit(dense_experts)(*upcast), 2**-6)


def test_padding_visits_no_expert_and_leaves_the_others_alone():
    cfg = language(n_shared_experts=None, moe_intermediate_size=5, initializer_range=0.5)
    layer = MoE(cfg, jnp.float32)
    x = expert_inputs()[0]
    params = jax.jit(layer.init)(jax.random.key(0), x, None)
    valid = np.arange(7) < np.array([7, 4])[:, None]
    apply = jax.jit(layer.apply)
    everywhere, _ = apply(params, x, None)
    found, routing = apply(params, x, valid)
    assert not found[~valid].any()
    assert routing.experts.shape == (2, 7, TOP_K)
    close(found[valid], everywhere[valid], EXPERT_TOLERANCE)


def test_shared_experts_add_to_every_token():
    cfg = language(n_shared_experts=2, moe_intermediate_size=5, initializer_range=0.5)
    layer = MoE(cfg, jnp.float32)
    x = expert_inputs()[0]
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x, None)["params"])
    shared = params["shared_experts"]
    assert shared["gate_proj"]["kernel"].shape == (8, 10)
    routed, routing = jax.jit(layer.apply)({"params": params}, x, None)
    gate, up = (np.asarray(x) @ np.asarray(shared[n]["kernel"]) for n in ("gate_proj", "up_proj"))
    expected = gate / (1 + np.exp(-gate)) * up @ np.asarray(shared["down_proj"]["kernel"])
    experts = (params["experts"][n] for n in ("gate_proj", "up_proj", "down_proj"))
    close(routed, dense_experts(x, routing.experts, routing.weights, *experts) + expected, EXPERT_TOLERANCE)


def test_the_router_computes_in_float32_whatever_the_dtype():
    cfg = language(initializer_range=0.5, moe_intermediate_size=5)
    x = expert_inputs("bfloat16")[0]
    layer = MoE(cfg, jnp.bfloat16)
    params = jax.jit(layer.init)(jax.random.key(0), x, None)
    routing = jax.jit(layer.apply)(params, x, None)[1]
    kernel = params["params"]["router"]["kernel"].value
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert routing.scores.dtype == jnp.float32
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.scores, expected, rtol=WEIGHT_TOLERANCE)
