"""The same models in PyTorch, of the modules of `transformers`: the other side of `dsvl2 bench model --against torch`.

Nothing else imports this; torch and transformers are needed for it alone. Tested in tests/apps/bench/test_model.py.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from dsvl2_jax.apps.bench.random_params import STD
from dsvl2_jax.model.config import Config, LanguageConfig

# Fields of `LanguageConfig` that the configurations of transformers have too.
_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "first_k_dense_replace",
    "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group",
    "norm_topk_prob", "routed_scaling_factor", "max_position_embeddings", "rms_norm_eps", "attention_bias",
)  # fmt: skip
EXPERTS = ("grouped_mm", "eager")  # batched_mm copies an expert's weights for every token


class Model(torch.nn.Module):
    """Encoder, adaptor and language model, of which those are there that some jobs need."""

    def __init__(self, config: Config, parts: set[str]):
        super().__init__()
        self.config = config
        self.vision = _siglip(config) if "vision" in parts else None
        self.projector = _adaptor(config) if "vision" in parts else None
        self.language = _language(config) if "language" in parts else None
        self._forward = self.language

    @torch.no_grad()
    def randomise(self) -> None:
        """As `dsvl2_jax.apps.bench.random_params.random_params` does."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=STD)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))

    def load(self, released: Mapping[str, torch.Tensor]) -> None:
        """Weights by their names in a released checkpoint."""
        if self.vision is not None:
            self.vision.load_state_dict(_siglip_state(self.vision, released))
            numbers = {
                f"{2 * i}.{kind}": f"projector.layers.{2 * i}.{kind}" for i in range(2) for kind in ("weight", "bias")
            }
            self.projector.load_state_dict({name: released[source] for name, source in numbers.items()})
        if self.language is not None:
            state = {name: _language_tensor(name, released) for name in self.language.state_dict()}
            self.language.load_state_dict(state)

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """u8[N, side, side, 3] → [N, tokens per tile, D]."""
        kind = next(self.projector.parameters()).dtype
        pixels = (tiles.to(torch.float32) / 255 - 0.5) / 0.5
        x = self.vision(pixel_values=pixels.permute(0, 3, 1, 2).to(kind)).last_hidden_state
        side, ratio = self.config.vision.grid, self.config.projector.downsample_ratio
        pad = -side % ratio
        grid = x.transpose(1, 2).reshape(len(x), -1, side, side)
        grid = torch.nn.functional.pad(grid, (0, pad, 0, pad))
        return self.projector(torch.nn.functional.unfold(grid, ratio, stride=ratio).transpose(1, 2))

    def step(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """i64[B, T] → f32[B, V], logits after the last token; the cache grows."""
        out = self.language(input_ids=ids, use_cache=True, logits_to_keep=1, **{_cache_name(self.language): cache})
        return out.logits[:, -1].float()

    def loss(self, ids: torch.Tensor, labels: torch.Tensor, tiles: torch.Tensor | None) -> torch.Tensor:
        """Of rows that begin with their tiles: ids and labels i64[1, T]."""
        embeddings = self.language.get_input_embeddings()(ids)
        if tiles is not None and len(tiles):
            features = self.encode(tiles).reshape(1, -1, embeddings.shape[-1])[:, : embeddings.shape[1]]
            embeddings = torch.cat([features.to(embeddings.dtype), embeddings[:, features.shape[1] :]], dim=1)
        return self._forward(inputs_embeds=embeddings, labels=labels, use_cache=False).loss

    def set_up(self, experts: str | None, *, checkpointing: bool, compiled: bool) -> None:
        """How it runs: transformers' way to run the experts; in training, activation checkpointing and compilation."""
        if experts is not None:
            self.language.set_experts_implementation(experts)
        for part in (self.vision, self.language):
            if part is not None and checkpointing:
                part.gradient_checkpointing_enable({"use_reentrant": False})
            elif part is not None:
                part.gradient_checkpointing_disable()
        self._forward = torch.compile(self.language) if compiled else self.language


def new_cache(model: Model) -> Any:
    return transformers.DynamicCache(config=model.language.config)


def _cache_name(module: torch.nn.Module) -> str:
    """Later releases of transformers call the argument otherwise."""
    return "cache" if "cache" in inspect.signature(type(module).forward).parameters else "past_key_values"


def _siglip(config: Config) -> torch.nn.Module:
    vision = config.vision
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_dim,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_use_head=False,
            attn_implementation="sdpa",
        )
    )


def _adaptor(config: Config) -> torch.nn.Module:
    projector, width = config.projector, config.language.hidden_size
    inputs = config.vision.width * projector.downsample_ratio**2
    hidden = width * projector.mlp_ratio
    return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, width))


def _positions(language: LanguageConfig) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if language.rope_scaling is None else language.rope_scaling.described()
    return scaling | {"rope_theta": language.rope_theta}


def _language(config: Config) -> torch.nn.Module:
    language = config.language
    family = "DeepseekV3" if language.scoring_func == "sigmoid" else "DeepseekV2"
    fields = {name: getattr(language, name) for name in _FIELDS}
    if family == "DeepseekV2":
        fields["topk_method"] = language.topk_method
    if not language.use_mla:  # of widths that the latent modules can be made with, which are replaced below
        fields |= {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    made = getattr(transformers, f"{family}Config")(
        **fields,
        n_shared_experts=language.n_shared_experts,
        rope_parameters=_positions(language),
        attn_implementation="sdpa",
    )
    model = getattr(transformers, f"{family}ForCausalLM")(made)
    if not language.use_mla:
        plain = transformers.LlamaConfig(
            hidden_size=language.hidden_size,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.kv_heads,
            max_position_embeddings=language.max_position_embeddings,
            rope_parameters=_positions(language),
            attention_bias=language.attention_bias,
            attn_implementation="sdpa",
        )
        model.model.rotary_emb = LlamaRotaryEmbedding(plain)
        for index, layer in enumerate(model.model.layers):
            layer.self_attn = LlamaAttention(plain, index)
    return model


def _language_tensor(name: str, released: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of transformers' decoders, which stack experts, gate upon up."""
    prefix, _, kind = f"language.{name}".rpartition(".")
    experts = range(
        sum(source.startswith(f"{prefix}.") and source.endswith(".down_proj.weight") for source in released)
    )
    if kind == "gate_up_proj":
        return torch.stack(
            [torch.cat([released[f"{prefix}.{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in experts]
        )
    if kind == "down_proj":
        return torch.stack([released[f"{prefix}.{e}.down_proj.weight"] for e in experts])
    return released[f"language.{name}"]


def _siglip_state(module: torch.nn.Module, released: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SigLIP's tensors as transformers names them; the released ones have q, k and v as one."""
    renamed = {
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.out_proj": "attn.proj",
        "encoder.layers": "blocks",
    }
    state = {}
    for name in module.state_dict():
        source = name.removeprefix("vision_model.")
        for theirs, ours in renamed.items():
            source = source.replace(theirs, ours)
        part = next((at for at, p in enumerate("qkv") if f"self_attn.{p}_proj" in source), None)
        if part is not None:
            joined = released["vision." + source.replace(f"self_attn.{'qkv'[part]}_proj", "attn.qkv")]
            state[name] = joined.chunk(3)[part]
        elif source == "pos_embed.weight":
            state[name] = released["vision.pos_embed"][0]
        else:
            state[name] = released[f"vision.{source}"]
    return state


def quiet() -> None:
    """transformers' notes about its own future are no part of a measurement."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"transformers|torch")
