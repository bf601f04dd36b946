"""Decoder and encoder against the PyTorch modules of `transformers`, on fresh random weights in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dsvl2_jax.model.config import IGNORED_LABEL
from dsvl2_jax.model.decoder import decoder, hidden_states
from dsvl2_jax.model.vision import encode_tiles
from dsvl2_jax.train.loss import cross_entropy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_oracle import CASES, LANGUAGE, VISION, causal_lm, config, filled, randomised, released_names  # noqa: E402

# Logits and features: of the largest element. Gradients: ‖Δ‖/‖g‖.
TOLERANCE = 1e-4


@functools.partial(jax.jit, static_argnums=1)
def loss_logits_gradient(params, cfg, ids, labels, valid):
    def loss_and_logits(params):
        bound = decoder(params, cfg)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden = hidden_states(params, cfg, bound.embed(ids), positions, valid)[0]
        wanted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
        weights = (wanted >= 0) / (wanted >= 0).sum()
        loss, _ = cross_entropy(hidden, params["lm_head"]["kernel"], wanted, weights, ids.shape[1])
        return loss, bound.logits(hidden)

    (loss, logits), gradient = jax.value_and_grad(loss_and_logits, has_aux=True)(params)
    return loss, logits, gradient


@pytest.mark.parametrize("case", CASES)
def test_language_model_logits_loss_and_gradients_equal(case):
    family, fields = CASES[case]
    theirs = causal_lm(family, **fields)

    rng = np.random.default_rng(0)
    ids = rng.integers(0, LANGUAGE["vocab_size"], (2, 13))
    lengths = np.array([13, 9])
    valid = np.arange(13) < lengths[:, None]
    labels = np.where(valid & (rng.random((2, 13)) < 0.7), ids, IGNORED_LABEL)
    tensors = {"input_ids": ids, "attention_mask": valid.astype(int), "labels": labels}
    out = theirs(**{name: torch.from_numpy(array) for name, array in tensors.items()})
    out.loss.backward()

    ours = config(**fields)
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = filled(ours, released_names(weights), "language")
    loss, logits, gradient = loss_logits_gradient(params, ours.language, ids, labels, valid)

    expected = out.logits.detach().numpy()
    assert np.abs(logits - expected)[valid].max() <= TOLERANCE * np.abs(expected[valid]).max()
    assert loss == pytest.approx(out.loss.item(), rel=1e-6)
    grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    biases = {name: np.zeros_like(b.numpy()) for name, b in theirs.named_buffers() if name in weights}
    expected = flatten_dict(filled(ours, released_names(grads | biases), "language"))
    found = flatten_dict(gradient)
    assert found.keys() == expected.keys()
    for path, want in expected.items():
        assert np.linalg.norm(found[path] - want) <= TOLERANCE * np.linalg.norm(want), path


def siglip_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """SigLIP tensors of transformers → those of a released checkpoint, whose q, k and v are one."""
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    released = {"pos_embed": tensors["embeddings.position_embedding.weight"][None]}
    renamed = {"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}
    for i in range(VISION["layers"]):
        theirs = f"encoder.layers.{i}"
        renamed |= {
            f"blocks.{i}.norm1": f"{theirs}.layer_norm1",
            f"blocks.{i}.norm2": f"{theirs}.layer_norm2",
            f"blocks.{i}.attn.proj": f"{theirs}.self_attn.out_proj",
            f"blocks.{i}.mlp.fc1": f"{theirs}.mlp.fc1",
            f"blocks.{i}.mlp.fc2": f"{theirs}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            parts = [tensors[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            released[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
    for ours, theirs in renamed.items():
        released |= {f"{ours}.{kind}": tensors[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return {f"vision.{name}": tensor for name, tensor in released.items()}


def test_siglip_features_equal():
    ours = config(topk_method="greedy", q_lora_rank=None)
    theirs = randomised(
        transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(
                hidden_size=VISION["width"],
                intermediate_size=ours.vision.mlp_dim,
                num_hidden_layers=VISION["layers"],
                num_attention_heads=VISION["heads"],
                image_size=VISION["image_size"],
                patch_size=VISION["patch_size"],
                vision_use_head=False,
                attn_implementation="eager",
            )
        )
    )
    tiles = np.random.default_rng(0).integers(0, 256, (2, 59, 59, 3), dtype=np.uint8)
    pixels = torch.from_numpy((tiles.astype(np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels).last_hidden_state.numpy()
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = filled(ours, siglip_names(weights), "vision")
    half = np.full(3, 0.5, np.float32)
    encode = functools.partial(encode_tiles, config=ours.vision, mean=half, std=half, dtype=jnp.float32)
    found = jax.jit(encode)(params, tiles=tiles)
    assert found.shape == (2, 16, 24)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
