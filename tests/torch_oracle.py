"""The PyTorch modules of `transformers` as an oracle: small configurations, and their weights under our names."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from flax.traverse_util import unflatten_dict

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.model.config import Config

torch.set_num_threads(1)  # arrays are tiny: more threads only wait for each other

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
    # One group: transformers' V3 fills the groups outside with −inf, the official DeepSeek-VL2 with 0.0.
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


def causal_lm(family: str, **fields) -> torch.nn.Module:
    """DeepseekV2 or DeepseekV3 of these sizes with random weights."""
    cfg = getattr(transformers, f"{family}Config")(**LANGUAGE | fields, attn_implementation="eager", use_cache=False)
    return randomised(getattr(transformers, f"{family}ForCausalLM")(cfg))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
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
    return unflatten_dict(leaves)[part]
