"""FLOPs of a training step against sums by hand and against XLA's count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsvl2_jax import configs
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.parameter_paths import path_name
from dsvl2_jax.model.released import released_config
from dsvl2_jax.train.adapter import adapter_leaves
from dsvl2_jax.train.flops import step_flops
from dsvl2_jax.train.settings.schema import AdapterStage, ParameterRule

TRAIN, FREEZE = ParameterRule(".", train=True), ParameterRule(".", train=False)


def rules(config: Config, frozen: tuple[str, ...] = ()) -> dict[str, ParameterRule]:
    paths = map(path_name, model.abstract_leaves(config))
    return {path: FREEZE if path.startswith((*frozen, "vision/attn_pool")) else TRAIN for path in paths}


@pytest.fixture(scope="module")
def tiny() -> Config:
    return Config.from_dict(released_config("tiny"))


def vision_forward(hidden: int) -> tuple[float, float]:
    """FLOPs per tile of the patch embedding and of all after it, up to the adaptor's D = hidden."""
    width, mlp, patches = 1152, 4304, 729
    block = patches * (4 * width * width + 2 * width * mlp) + 2 * patches * patches * width
    adaptor = 196 * (4 * width * hidden + hidden * hidden)
    return 2.0 * patches * 588 * width, 2.0 * (27 * block + adaptor)


def test_tiny_by_hand(tiny):
    d, heads, width = 1280, 10, 128
    attention = 4 * d * heads * width
    moe = d * 64 + (6 + 2) * 3 * d * 896
    forward = 2.0 * (12 * attention + 3 * d * 6848 + 11 * moe + d * 129280)
    patch, after = vision_forward(d)
    flops = step_flops(tiny, rules(tiny))
    assert flops.per_token == pytest.approx(3 * forward)
    assert flops.per_pair == pytest.approx(3 * 12 * 2 * heads * 2 * width)
    # Nothing is trained before the pixels.
    assert flops.per_tile == pytest.approx(2 * patch + 3 * after)


def test_an_adapter_of_tiny_by_hand(tiny):
    """The frozen model has no gradients of weights; the encoder, where nothing is trained, none at all."""
    d, heads, width, rank = 1280, 10, 128, 16
    attention = 4 * d * heads * width
    moe = d * 64 + (6 + 2) * 3 * d * 896
    base = 2.0 * (12 * attention + 3 * d * 6848 + 11 * moe + d * 129280)
    own = 2.0 * rank * (12 * 4 * (d + heads * width) + 3 * (d + 6848) + 11 * 3 * (d + 2 * 896))
    leaves = adapter_leaves(tiny, AdapterStage("lora", rank=rank))
    flops = step_flops(tiny, {}, adapter=leaves)
    assert flops.per_token == pytest.approx(2 * base + 3 * own, rel=1e-3)
    assert flops.per_tile == pytest.approx(sum(vision_forward(d)))
    assert flops.per_pair == pytest.approx(3 * 12 * 2 * heads * 2 * width)


def test_base_by_hand():
    whole = Config.from_dict(released_config("base"))
    language = dataclasses.replace(whole.language, num_hidden_layers=4)
    config = dataclasses.replace(whole, vision=dataclasses.replace(whole.vision, layers=1), language=language)
    d, heads = 2560, 32
    attention = d * heads * 192 + d * (512 + 64) + 512 * heads * (128 + 128) + heads * 128 * d
    moe = d * 72 + (6 + 2) * 3 * d * 1536
    forward = 2.0 * (4 * attention + 3 * d * 12288 + 3 * moe + d * 129280)
    flops = step_flops(config, rules(config))
    assert flops.per_token == pytest.approx(3 * forward)
    assert flops.per_pair == pytest.approx(3 * 4 * 2 * heads * (192 + 128))


def test_frozen_weights_have_no_gradient_of_their_own(tiny):
    whole = step_flops(tiny, rules(tiny))
    align = step_flops(tiny, rules(tiny, ("language/",)))
    assert align.per_token == pytest.approx(whole.per_token * 2 / 3)
    assert (align.per_pair, align.per_tile) == (whole.per_pair, whole.per_tile)


def test_nothing_flows_back_below_the_first_trained_part(tiny):
    whole = step_flops(tiny, rules(tiny))
    no_vision = step_flops(tiny, rules(tiny, ("vision/",)))
    patch, after = vision_forward(1280)
    adaptor = 2.0 * 196 * (4 * 1152 * 1280 + 1280 * 1280)
    first, second = 2.0 * 196 * 4 * 1152 * 1280, 2.0 * 196 * 1280 * 1280
    assert no_vision.per_tile == pytest.approx(patch + after - adaptor + 2 * first + 3 * second)
    assert no_vision.per_token == whole.per_token
    head = step_flops(
        tiny, rules(tiny, ("vision/", "projector/", "image", "view", "language/embed", "language/layers"))
    )
    assert head.per_token == pytest.approx(whole.per_token / 3 + 2.0 * 1280 * 129280)
    assert head.per_pair == whole.per_pair / 3


def test_a_step_adds_up(tiny):
    flops = step_flops(tiny, rules(tiny))
    # Four samples of 5 tokens see 1 + 2 + 3 + 4 + 5 keys each.
    assert flops.step(20, 4, 3) == pytest.approx(20 * flops.per_token + 60 * flops.per_pair + 3 * flops.per_tile)
    assert flops.step(0, 0, 0) == 0


def test_agrees_with_xla_on_a_model_without_experts():
    config = Config.from_file(f"{configs.__path__[0]}/micro")
    language = dataclasses.replace(config.language, first_k_dense_replace=config.language.num_hidden_layers)
    config = dataclasses.replace(config, language=language)
    shapes, _ = model.abstract_params(config)
    b, t, n, size = 2, 24, 3, config.vision.image_size
    ids, tiles = jax.ShapeDtypeStruct((b, t), jnp.int32), jax.ShapeDtypeStruct((n, size, size, 3), jnp.uint8)
    unit = jnp.ones(3)

    def text(params, ids):
        hidden = model.forward(params, config, model.embed_tokens(params, config, ids))
        return model.output_logits(params, config, hidden).sum()

    def image(params, tiles):
        return model.adapt_tiles(params, config, tiles, unit, unit).sum()

    def counted(function, *args) -> float:
        return jax.jit(function).lower(*args).cost_analysis()["flops"]

    flops = step_flops(config, rules(config))
    # The program scores all pairs, masked ones too; XLA also counts norms, softmax and activations.
    whole = flops.per_token * b * t + flops.per_pair * b * t * t
    assert 1.0 < 3 * counted(text, shapes, ids) / whole < 1.06
    assert 1.0 < counted(jax.value_and_grad(text), shapes, ids) / whole < 1.10
    assert 1.0 < counted(jax.value_and_grad(image), shapes, tiles) / (flops.per_tile * n) < 1.10
