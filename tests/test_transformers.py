"""Decoder and encoder against the PyTorch modules of `transformers`, on fresh random weights in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.batch import IGNORED_LABEL
from dsvl2_jax.config import Config
from dsvl2_jax.convert import rules
from dsvl2_jax.decoder import Decoder
from dsvl2_jax.orbax_io import nest, unnest
from dsvl2_jax.train.loss import cross_entropy
from dsvl2_jax.vision import VisionEncoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Logits and features: of the largest element. Gradients: ‖Δ‖/‖g‖ (DESIGN §5).
TOLERANCE = 1e-4

LANGUAGE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 64,
    # One group: transformers' V3 fills the groups outside with −inf, the official DeepSeek-VL2 with 0.0 (FACTS §4).
    "n_group": 1,
    "topk_group": 1,
}
# 59 pixels in patches of 14: 4 × 4 patches and 3 pixels cut off; heads of width 12.
VISION = {"image_size": 59, "patch_size": 14, "width": 24, "layers": 2, "heads": 2, "mlp_ratio": 3.7362}

V3 = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
CASES = {
    "V2": ("DeepseekV2", {"topk_method": "greedy", "q_lora_rank": None, "routed_scaling_factor": 1.5}),
    "V2, query latent, biases": ("DeepseekV2", {"topk_method": "greedy", "q_lora_rank": 14, "attention_bias": True}),
    "V3, biases": ("DeepseekV3", V3 | {"q_lora_rank": None, "attention_bias": True}),
}


def config(**language) -> Config:
    return Config.from_dict(
        {
            "language_config": LANGUAGE | language,
            "vision_config": VISION,
            "projector_config": {"input_dim": VISION["width"], "n_embed": LANGUAGE["hidden_size"]},
            "tile_tag": "2D",
        }
    )


def randomised(module):
    """Every parameter random, biases and norms too, and float buffers that the router adds."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2, generator=generator)
    return module.eval()


def released_names(tensors: dict) -> dict[str, np.ndarray]:
    """Language tensors of transformers → those of a released checkpoint: its experts are stacked, gate upon up."""
    released = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for e, (gate, up) in enumerate(np.split(expert, 2) for expert in tensor):
                released |= {f"{prefix}.{e}.gate_proj.weight": gate, f"{prefix}.{e}.up_proj.weight": up}
        elif kind == "down_proj":
            released |= {f"{prefix}.{e}.down_proj.weight": expert for e, expert in enumerate(tensor)}
        else:
            released[name] = tensor
    return {f"language.{name}": tensor for name, tensor in released.items()}


def filled(config: Config, released: dict[str, np.ndarray], part: str) -> dict:
    """The parameters under ``part`` that the released tensors fill; all of these must be used."""
    leaves, used = {}, set()
    for leaf in rules.expand(config):
        if leaf.path[0] == part and leaf.sources[0] in released:
            leaves[leaf.path] = np.empty(leaf.shape, np.float32)
            for source, view in leaf.parts(leaves[leaf.path]):
                view[...] = released[source]
                used.add(source)
    assert used == released.keys()
    return nest(leaves)[part]


@functools.partial(jax.jit, static_argnums=1)
def loss_logits_gradient(params, cfg, ids, labels, valid):
    def loss_and_logits(params):
        decoder = Decoder(cfg, jnp.float32).bind({"params": params})
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        logits = decoder.logits(decoder.hidden(decoder.embed(ids), positions, valid)[0])
        return cross_entropy(logits, labels)[0], logits

    (loss, logits), gradient = jax.value_and_grad(loss_and_logits, has_aux=True)(params)
    return loss, logits, gradient


@pytest.mark.parametrize("case", CASES)
def test_language_model_logits_loss_and_gradients_equal(case):
    family, fields = CASES[case]
    theirs_config = getattr(transformers, f"{family}Config")(
        **LANGUAGE | fields, attn_implementation="eager", use_cache=False
    )
    theirs = randomised(getattr(transformers, f"{family}ForCausalLM")(theirs_config))

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
    expected = dict(unnest(filled(ours, released_names(grads | biases), "language")))
    found = dict(unnest(gradient))
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
    found = jax.jit(VisionEncoder(ours.vision, jnp.float32).apply)({"params": params}, tiles, half, half)
    assert found.shape == (2, 16, 24)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
