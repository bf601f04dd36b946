"""The optimizer against torch.optim.AdamW, and its schedules."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsvl2_jax.train.optimizer import learning_rate, make_optimizer
from dsvl2_jax.train.settings.schema import OptimizerSettings, ParameterRule, RunSettings, Settings

SHAPES = {"vision/kernel": (5, 3), "vision/bias": (3,), "language/kernel": (4, 6), "language/scale": (6,)}
GROUPS = {
    "vision/kernel": ParameterRule("^vision/", lr_multiplier=0.1),
    "vision/bias": ParameterRule("bias$", lr_multiplier=0.1, decay=False),
    "language/kernel": ParameterRule("kernel$"),
    "language/scale": ParameterRule("scale$", decay=False),
}


def make_settings(steps: int = 8, **optimizer) -> Settings:
    return Settings(optimizer=OptimizerSettings(**optimizer), run=RunSettings(steps=steps))


def arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: (scale * rng.normal(size=shape)).astype(np.float32) for path, shape in SHAPES.items()}


def run(settings: Settings, gradients: list[dict[str, np.ndarray]]):
    """Parameters after each step, and the last optimizer state."""
    optimizer = make_optimizer(settings, GROUPS)
    params = jax.tree.map(jnp.asarray, arrays(0))
    state, history = optimizer.init(params), []

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
        history.append(jax.tree.map(np.asarray, params))
    return history, state


# Global norms on both sides of clip_norm = 1: √45 values of size 0.01 to 3.
GRADIENTS = [arrays(10 + i, scale) for i, scale in enumerate((0.3, 3.0, 0.01, 1.0, 0.05, 2.0, 0.1, 0.5))]


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_equals_torch_adamw(schedule):
    torch = pytest.importorskip("torch")
    settings = make_settings(learning_rate=0.02, schedule=schedule, warmup_steps=3, weight_decay=0.1, clip_norm=1.0)
    history, _ = run(settings, GRADIENTS)

    params = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in arrays(0).items()}
    groups = [
        {"params": [params[path]], "weight_decay": 0.1 if rule.decay else 0.0, "rate": rule.lr_multiplier}
        for path, rule in GROUPS.items()
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    schedule = learning_rate(settings.optimizer, 8)
    clipped = []
    for i, gradient in enumerate(GRADIENTS):
        for path, value in gradient.items():
            params[path].grad = torch.tensor(value)
        clipped.append(float(torch.nn.utils.clip_grad_norm_(params.values(), 1.0)) > 1.0)
        for group in adamw.param_groups:
            group["lr"] = group["rate"] * float(schedule(i))
        adamw.step()
        for path in SHAPES:
            np.testing.assert_allclose(history[i][path], params[path].detach().numpy(), rtol=2e-6, atol=2e-6)
    assert any(clipped) and not all(clipped)


def test_no_clipping_at_zero():
    free, _ = run(make_settings(learning_rate=0.02, clip_norm=0.0), GRADIENTS[1:4])
    loose, _ = run(make_settings(learning_rate=0.02, clip_norm=1e6), GRADIENTS[1:4])
    tight, _ = run(make_settings(learning_rate=0.02, clip_norm=1.0), GRADIENTS[1:4])
    np.testing.assert_array_equal(free[-1]["language/kernel"], loose[-1]["language/kernel"])
    assert np.abs(free[-1]["language/kernel"] - tight[-1]["language/kernel"]).max() > 1e-4


def test_bfloat16_state_is_stored_so_and_close():
    exact, wide = run(make_settings(learning_rate=0.02), GRADIENTS)
    rounded, narrow = run(make_settings(learning_rate=0.02, state_dtype="bfloat16"), GRADIENTS)
    of_shape = [x for x in jax.tree.leaves(narrow) if x.shape in SHAPES.values()]
    assert len(of_shape) == 2 * len(SHAPES) and {x.dtype for x in of_shape} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(wide) if x.ndim} == {jnp.dtype("float32")}
    for path in SHAPES:
        moved = np.abs(exact[-1][path] - arrays(0)[path]).max()
        difference = np.abs(exact[-1][path] - rounded[-1][path]).max()
        assert 0 < difference < 0.02 * moved


def test_state_dtype_keeps_the_count_whole():
    _, state = run(make_settings(learning_rate=0.02, state_dtype="bfloat16"), GRADIENTS)
    counts = [x for x in jax.tree.leaves(state) if not x.ndim]
    assert [(int(c), c.dtype) for c in counts] == [(8, jnp.int32)] * 2


def test_frozen_parameters_are_never_seen():
    settings = make_settings()
    frozen = {"vision/attn_pool/latent": ParameterRule("attn_pool", train=False)}
    with pytest.raises(ValueError, match="vision/attn_pool/latent"):
        make_optimizer(settings, GROUPS | frozen)
    _, state = run(settings, GRADIENTS[:1])
    held = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim}
    assert held == set(GROUPS)


def rates(steps: int, **optimizer) -> list[float]:
    schedule = learning_rate(OptimizerSettings(learning_rate=1.0, **optimizer), steps)
    return [float(schedule(i)) for i in range(steps + 1)]


def test_step_schedule_divides_at_half_and_at_three_quarters():
    root = 1 / math.sqrt(10)
    assert rates(8, schedule="step") == pytest.approx([1] * 4 + [root] * 2 + [0.1] * 3)
    assert rates(7, schedule="step") == pytest.approx([1] * 4 + [root] * 2 + [0.1] * 2)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_a_plain_count_stays_on_the_host(schedule):
    rate = learning_rate(OptimizerSettings(learning_rate=1e-3, schedule=schedule, warmup_steps=2), 9)
    for count in range(9):
        assert not isinstance(rate(count), jax.Array)
        assert float(rate(count)) == pytest.approx(float(jax.jit(rate)(count)), rel=1e-5)


def test_warm_up_is_linear_and_never_zero():
    assert rates(6, schedule="constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert rates(3, schedule="constant") == [1, 1, 1, 1]


def test_cosine_falls_from_the_warm_up_to_its_floor():
    expected = [0.5, 1.0] + [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    assert rates(10, schedule="cosine", warmup_steps=2, final_rate=0.1) == pytest.approx(expected, abs=1e-6)
    assert rates(10, schedule="cosine")[-1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_optax(warmup):
    """Ours also answer on the host, without waiting for the device; optax's give arrays on the device alone."""
    steps = 40
    rise = optax.linear_schedule(1 / max(warmup, 1), 1.0, max(warmup - 1, 0))
    drop = optax.piecewise_constant_schedule(1.0, {steps // 2: 10**-0.5, 3 * steps // 4: 10**-0.5})
    fall = optax.cosine_decay_schedule(1.0, steps - warmup, 0.1)
    for i in range(steps + 1):
        expected = {"constant": 1.0, "step": drop(i), "cosine": fall(max(i - warmup, 0))}
        for schedule, value in expected.items():
            found = learning_rate(OptimizerSettings(1.0, schedule, warmup, final_rate=0.1), steps)(i)
            assert float(found) == pytest.approx(float(rise(i) * value), rel=2e-6), (schedule, i)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="cosine"):
        learning_rate(dataclasses.replace(OptimizerSettings(), schedule="cosin"), 10)
