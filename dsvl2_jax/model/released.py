"""The three released models' configurations, to recognise a checkpoint and to make one of that size."""

from __future__ import annotations

from typing import Any

from dsvl2_jax.model.config import Config

_TILE = 384

# Columns × rows of tiles, in the released order: among equals the first wins.
_GRIDS = (
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1),
    (2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
)  # fmt: skip

CANDIDATE_RESOLUTIONS = [[_TILE * columns, _TILE * rows] for columns, rows in _GRIDS]

_VISION = {
    "model_type": "vision",
    "model_name": "siglip_so400m_patch14_384",
    "layers": 27,
    "mlp_ratio": 3.7362,
    "patch_size": 14,
    "width": 1152,
}
_LANGUAGE_COMMON = {
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v2",
    "n_group": 1,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
}
_LANGUAGE: dict[str, dict[str, Any]] = {
    "tiny": {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "kv_lora_rank": None,
        "moe_intermediate_size": 896,
        "n_routed_experts": 64,
        "num_attention_heads": 10,
        "num_hidden_layers": 12,
        "num_key_value_heads": 10,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "topk_method": "greedy",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": 129280,
    },
    "small": {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "base": {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 72,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
    },
}
SIZES = tuple(_LANGUAGE)


def released_config(size: str) -> dict[str, Any]:
    """The content of the config.json of "tiny", "small" or "base"; keys that the file leaves out have defaults."""
    language = _LANGUAGE_COMMON | _LANGUAGE[size]
    return {
        "model_type": "deepseek_vl_v2",
        "candidate_resolutions": CANDIDATE_RESOLUTIONS,
        "global_view_pos": "head",
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "language_config": language,
        "projector_config": {"model_type": "mlp_projector", "n_embed": language["hidden_size"]},
        "vision_config": _VISION,
    }


def variant(config: Config) -> str:
    """ "tiny", "small" or "base" when the model has the shapes of that released one, else "other"."""
    for size in SIZES:
        if _shape(config) == _shape(Config.from_dict(released_config(size))):
            return size
    return "other"


def _shape(config: Config) -> tuple:
    language, vision = config.language, config.vision
    return (
        (vision.width, vision.layers, vision.heads, vision.mlp_dim, vision.patch_size, vision.image_size),
        (language.vocab_size, language.hidden_size, language.num_hidden_layers, language.num_attention_heads),
        (language.intermediate_size, language.moe_intermediate_size, language.n_routed_experts),
        (language.n_shared_experts, language.use_mla),
    )
