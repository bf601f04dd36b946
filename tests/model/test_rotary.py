"""Rotary positions, scaled in each way, against the modules of transformers; and what scaling does to a whole model."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.errors import ConfigError
from dsvl2_jax.model.cache import init_cache
from dsvl2_jax.model.decoder import decoder, hidden_states
from dsvl2_jax.model.rotary import rotary_tables, sequence_lengths

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_oracle import CASES, LANGUAGE, causal_lm, config, filled, released_names  # noqa: E402

MULTI_HEAD = {"use_mla": False, "topk_method": "greedy"}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
SCALINGS = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "linear by its other name": {"rope_type": "linear", "factor": 2.5},
    "yarn": YARN,
    "yarn of DeepSeek-V2": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1},
    "yarn, others": YARN | {"mscale": 0.5, "mscale_all_dim": 1.2, "beta_fast": 16, "beta_slow": 2, "factor": 8},
    "yarn, by its factor": YARN | {"attention_factor": 0.9, "truncate": False},
    "yarn of the model's own context": {"rope_type": "yarn", "factor": 3},
}
POSITIONS = np.concatenate([np.arange(0, 300), np.geomspace(300, 163840, 200).astype(int)])


def their_module(family: str, scaling: dict | None, width: int, context: int, theta: float) -> torch.nn.Module:
    """The rotary embedding of a family, for heads of a width."""
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    fields = {"qk_rope_head_dim": width, "head_dim": width, "max_position_embeddings": context}
    cfg = getattr(transformers, f"{family}Config")(rope_parameters=parameters, **fields)
    module = {"DeepseekV2": "deepseek_v2", "DeepseekV3": "deepseek_v3", "Llama": "llama"}[family]
    names = getattr(transformers.models, module)
    return getattr(getattr(names, f"modeling_{module}"), f"{family}RotaryEmbedding")(cfg)


def their_tables(module: torch.nn.Module, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, [T, width / 2]."""
    out = module(torch.zeros(1), torch.from_numpy(positions)[None])
    cos, sin = out if isinstance(out, tuple) else (out.real, out.imag)
    half = module.inv_freq.shape[0]
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


def ours(width: int, **fields):
    """The language configuration of latent attention, or with ``use_mla`` false of multi-head attention."""
    heads = {"qk_rope_head_dim": width, "hidden_size": LANGUAGE["num_attention_heads"] * width}
    return dataclasses.replace(config(topk_method="greedy", **fields).language, **heads)


@pytest.mark.parametrize(
    ("family", "width", "theta"),
    # Of width 128 and base 10⁶ PyTorch rounds one of 64 powers the other way.
    [("DeepseekV2", 64, 1e4), ("DeepseekV3", 64, 1e6), ("Llama", 128, 1e4), ("Llama", 64, 1e6)],
)
@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_equal(name, family, width, theta):
    scaling = SCALINGS[name]
    cfg = ours(
        width,
        use_mla=family != "Llama",
        max_position_embeddings=163840,
        rope_theta=theta,
        rope_scaling=scaling,
    )
    expected = their_tables(their_module(family, scaling, width, 163840, theta), POSITIONS)
    for found, wanted in zip(rotary_tables(cfg, jnp.asarray(POSITIONS)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [100, 4096, 4097, 10000, 32768, 131072])
@pytest.mark.parametrize(("family", "width"), [("DeepseekV3", 64), ("Llama", 128)])
def test_dynamic_positions_equal_at_every_length(family, width, length):
    """PyTorch rounds the base to float32 as well: far angles differ by what an ulp of a frequency makes."""
    scaling = {"type": "dynamic", "factor": 4.0}
    cfg = ours(width, use_mla=family != "Llama", max_position_embeddings=4096, rope_scaling=scaling)
    positions = POSITIONS[length > POSITIONS]
    theirs = their_module(family, scaling, width, 4096, 10000.0)
    expected = their_tables(theirs, np.append(positions, length - 1))
    angles = positions[:, None] * theirs.inv_freq.numpy()
    cos_sin = rotary_tables(cfg, jnp.asarray(positions), jnp.full(positions.shape, length))
    for found, wanted in zip(cos_sin, expected, strict=True):
        assert (np.abs(found - wanted[:-1]) <= 1e-6 + angles * 5e-7).all()


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
@pytest.mark.parametrize("name", SCALINGS)
def test_the_softmax_scale_equals(name, family):
    scaling = SCALINGS[name]
    fields = CASES["V2" if family == "DeepseekV2" else "V3, biases"][1] | {"rope_scaling": scaling}
    attention = causal_lm(family, **fields).model.layers[0].self_attn
    assert config(**fields).language.softmax_scale == pytest.approx(attention.scaling, rel=1e-6)


def test_multi_head_attention_has_llama_s_softmax_scale():
    cfg = ours(32, use_mla=False, rope_scaling=SCALINGS["yarn of DeepSeek-V2"])
    assert cfg.softmax_scale == 32**-0.5


@functools.partial(jax.jit, static_argnames=("cfg", "how"))
def states(params, cfg, ids, positions, cache, lengths, how):
    bound = decoder(params, cfg)
    out = hidden_states(params, cfg, bound.embed(ids), positions, cache=cache, lengths_b=lengths, **dict(how))
    return bound.logits(out[0]), out[1]


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("DeepseekV2", {"type": "dynamic", "factor": 2.0}),
        ("DeepseekV3", YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}),
    ],
    ids=["dynamic", "yarn"],
)
def test_a_prompt_in_chunks_and_the_steps_after_it_equal_theirs(family, scaling):
    """A context of 16, a prompt of 24 and 8 more tokens: dynamic positions change with every step, and what is in the
    cache keeps its rotation."""
    fields = CASES["V2" if family == "DeepseekV2" else "V3, biases"][1]
    fields = fields | {"rope_scaling": dict(scaling), "max_position_embeddings": 16}
    theirs, cfg = causal_lm(family, **fields), config(**fields).language
    ids = np.random.default_rng(0).integers(0, LANGUAGE["vocab_size"], (1, 32))
    past, expected = transformers.DynamicCache(), []
    for begin, end in ((0, 24), *((i, i + 1) for i in range(24, 32))):
        tensors = {"input_ids": torch.from_numpy(ids[:, begin:end]), "position_ids": torch.arange(begin, end)[None]}
        with torch.no_grad():
            expected.append(theirs(**tensors, past_key_values=past, use_cache=True).logits[0].numpy())
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = filled(config(**fields), released_names(weights), "language")
    wrapped = types.SimpleNamespace(language=cfg)
    cache, found = init_cache(wrapped, 1, 32, jnp.float32), []
    for begin, end in ((0, 8), (8, 16), (16, 24), *((i, i + 1) for i in range(24, 32))):
        how = {"read_cache": begin > 0, "decode": begin >= 24}
        positions = jnp.arange(begin, end)[None]
        total = None if begin >= 24 else jnp.array([24])
        logits, cache = states(params, cfg, ids[:, begin:end], positions, cache, total, tuple(how.items()))
        found.append(logits[0])
    expected = np.concatenate(expected)
    assert np.abs(np.concatenate(found) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_dynamic_positions_of_packed_samples_go_by_each_sample_s_length():
    cfg = ours(8, max_position_embeddings=4, rope_scaling={"type": "dynamic", "factor": 2.0})
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0, 0], np.arange(12)])
    lengths = sequence_lengths(cfg, positions, None, decode=False)
    assert lengths.tolist() == [[6] * 6 + [3] * 3 + [1] * 3, [12] * 12]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "type: found 'longrope'; supported are linear"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling.type: missing; supported are linear, dynamic, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor: must be from 1 to 1048576, not 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, "rope_scaling.beta_fast: means nothing"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}, "is 'yarn' and rope_type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.5}}, "say which by attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 9}}, "beta_fast 1.0 is less than"),
        ({"rope_scaling": "yarn"}, 'rope_scaling: must be an object or null, not "yarn"'),
        ({"rope_scaling": {"type": "default", "factor": 2}}, "rope_scaling.factor: found 2, which means nothing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_parameters.type: found 'llama3'"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "keep the right one"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 3}},
            "rope_scaling and rope_parameters say different things",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(topk_method="greedy", **fields)


def test_every_spelling_is_the_same():
    numbers = {"factor": 4, "original_max_position_embeddings": 32, "mscale": 1, "mscale_all_dim": 1.0}
    spelled = [
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **numbers}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **numbers}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500000, **numbers}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "yarn", "type": "yarn", "rope_theta": 5e5, **numbers}},
    ]
    found = [config(topk_method="greedy", **fields) for fields in spelled]
    assert all(cfg == found[0] for cfg in found)
    assert found[0].language.rope_scaling.kind == "yarn" and found[0].language.rope_theta == 5e5
    assert hash(found[0]) == hash(found[1])  # a static argument of programs
