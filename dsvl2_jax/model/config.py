"""Model configuration, read straight from a released ``config.json``.

A key that is missing takes the default of the official configuration classes; a value that this implementation cannot
honour is refused with the field's name. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsvl2_jax import fields
from dsvl2_jax.errors import ConfigError
from dsvl2_jax.fields import setting
from dsvl2_jax.json_files import read_json_object
from dsvl2_jax.model.rope_scaling import RopeScaling, plain_frequencies, read_rope

ROUTING_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
SCORING_FUNCTIONS = ("softmax", "sigmoid")

# Codes of the merge index that the processor makes and the model reads: where a position's embedding comes from.
# Values from 0 up are rows of the adaptor's flattened output.
TEXT_POSITION, NEWLINE_POSITION, SEPARATOR_POSITION = -1, -2, -3
IGNORED_LABEL = -100  # where there is no loss

# The most that a size may be: far beyond any model, and small enough that a wrong file is refused at once, rather than
# after hours of making names and shapes.
_MOST_WIDTH, _MOST_LAYERS, _MOST_EXPERTS, _MOST_TOKENS = 1 << 20, 1 << 10, 1 << 14, 1 << 28
_MOST_EXPERT_LAYERS = 1 << 18  # experts of all layers together


def _count(default: int | None, most: int = _MOST_WIDTH) -> Any:
    return setting(default, least=0, most=most)


def _positive(default: int | None, most: int = _MOST_WIDTH) -> Any:
    return setting(default, least=1, most=most)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder. ``width`` and ``image_size`` are in channels and pixels; no class token."""

    model_name: str = "siglip_large_patch16_384"
    image_size: int = _positive(384, 1 << 15)
    patch_size: int = _positive(16)
    width: int = _positive(1024)
    layers: int = _positive(24, _MOST_LAYERS)
    heads: int = _positive(16)
    mlp_ratio: float = setting(4.0, above=0, most=1000)
    global_pool: str = "map"
    ignore_head: bool = True
    class_token: bool = False
    num_classes: int = _count(0)

    @property
    def grid(self) -> int:
        """Patches along one side; pixels beyond ``grid · patch_size`` are never seen."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_dim(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Pixel-shuffle adaptor from vision width ``input_dim`` to language width ``n_embed``."""

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = _positive(1152)
    n_embed: int = _positive(2048)
    depth: int = setting(2, least=2, most=_MOST_LAYERS)
    mlp_ratio: int = _positive(1, 1000)
    downsample_ratio: int = _positive(2)
    token_pooling: bool = False


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """DeepSeekMoE decoder; field names are those of the released ``language_config``."""

    vocab_size: int = _positive(102400, _MOST_TOKENS)
    hidden_size: int = _positive(4096)
    intermediate_size: int = _positive(11008)
    moe_intermediate_size: int = _count(1407)
    num_hidden_layers: int = _positive(30, _MOST_LAYERS)
    num_attention_heads: int = _positive(32)
    num_key_value_heads: int | None = _count(32)
    n_shared_experts: int | None = _count(None, _MOST_EXPERTS)
    n_routed_experts: int | None = _count(None, _MOST_EXPERTS)
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int | None = _count(512)
    q_lora_rank: int | None = _count(1536)
    qk_rope_head_dim: int = _count(64)
    v_head_dim: int = _count(128)
    qk_nope_head_dim: int = _count(128)
    topk_method: str | None = None  # the official default is misspelt and does not run: it must be named
    n_group: int | None = _count(None, _MOST_EXPERTS)
    topk_group: int | None = _count(None, _MOST_EXPERTS)
    num_experts_per_tok: int | None = _count(None, _MOST_EXPERTS)
    moe_layer_freq: int = _positive(1)
    first_k_dense_replace: int = _count(0)
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = _positive(2048, _MOST_TOKENS)
    initializer_range: float = setting(0.02, least=0)
    rms_norm_eps: float = setting(1e-6, least=0)
    bos_token_id: int = _count(100000, _MOST_TOKENS)
    eos_token_id: int = _count(100001, _MOST_TOKENS)
    tie_word_embeddings: bool = False
    rope_theta: float = setting(10000.0, above=0)
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    use_mla: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one head of multi-head attention (``use_mla`` false)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def longest_context(self) -> int:
        """Positions that the model was made for: those of its training, or as many as its scaling stretches them to."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        original = self.rope_scaling.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, int(original * self.rope_scaling.factor))

    @property
    def rotary_width(self) -> int:
        """Width of what is rotated: the part of a head that latent attention keeps for it, or a whole head."""
        return self.qk_rope_head_dim if self.use_mla else self.head_dim

    @property
    def inverse_frequencies(self) -> np.ndarray:
        """f32[rotary_width / 2], radians a position; of "dynamic" those of sequences that the context holds."""
        if self.rope_scaling is None:
            return plain_frequencies(self.rotary_width, self.rope_theta)
        return self.rope_scaling.inverse_frequencies(self.rotary_width, self.rope_theta, self.max_position_embeddings)

    def stretches(self, length: int) -> bool:
        """Whether the positions of a sequence of so many tokens are others than those of a shorter one."""
        scaling = self.rope_scaling
        return scaling is not None and scaling.kind == "dynamic" and length > self.max_position_embeddings

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores of attention.

        Yarn's ``mscale_all_dim`` is a matter of latent attention: multi-head attention is that of Llama, which has cos
        and sin scaled only.
        """
        if not self.use_mla:
            return self.head_dim**-0.5
        factor = 1.0 if self.rope_scaling is None else self.rope_scaling.softmax_factor
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * factor

    @property
    def kv_heads(self) -> int:
        """Key/value heads of multi-head attention; null in the file means one per query head."""
        return self.num_key_value_heads or self.num_attention_heads

    def is_moe_layer(self, layer: int) -> bool:
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def has_moe(self) -> bool:
        return any(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    @property
    def cache_width(self) -> int:
        """Numbers kept per token and layer: the latent and the shared key, or all keys and values."""
        if self.use_mla:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole DeepSeek-VL2 model. Hashable, so that it can be a static argument of `jax.jit`."""

    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: tuple[tuple[int, int], ...] = ((384, 384),)

    @property
    def tokens_per_side(self) -> int:
        """Adaptor outputs along one side of a tile (14 at the released size)."""
        return -(-self.vision.grid // self.projector.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return self.tokens_per_side**2

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> Config:
        """Builds and checks a configuration from the parsed json.

        Raises:
          ConfigError: a needed key is missing, or a value is of the wrong kind or unsupported.
            Every problem of the file is listed in one message.
        """
        return _Reader(source).config(raw)

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Reads ``config.json`` (the file, or the directory that holds it)."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json_object(path, ConfigError), source=str(path))


def with_rope_scaling(config: Config, scaling: Mapping[str, Any]) -> Config:
    """The configuration with other positions, given as ``rope_scaling`` of a ``config.json``.

    Raises:
      ConfigError: they are not supported, or a number is missing or wrong.
    """
    language = config.language
    rope, problems = read_rope({"rope_scaling": scaling})
    changes = {}
    for name, value in rope.items():
        changes[name], wrong = fields.build(fields.type_at(LanguageConfig, (name,)), value, (name,))
        problems += map(str, wrong)
    if not problems:
        language = dataclasses.replace(language, **changes)
        if language.rope_scaling is not None:
            problems = [f"rope_scaling: {text}" for text in language.rope_scaling.problems(language.rotary_width)]
    if problems:
        raise ConfigError("the positions cannot be scaled so:\n  " + "\n  ".join(problems))
    return dataclasses.replace(config, language=language)


@dataclasses.dataclass(frozen=True)
class _Top:
    """The file's own keys, beside the three objects."""

    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: tuple[tuple[int, int], ...] = setting(
        ((384, 384),), least=1, most=1 << 15, expected="a list of [width, height] pairs of positive whole numbers"
    )


_PARTS = {"vision_config": VisionConfig, "projector_config": ProjectorConfig, "language_config": LanguageConfig}

# Keys that are no fields of ours, and would change what is computed if they had another value than one of _NEUTRAL.
# Whole kinds of keys rather than a list of those that are known: other tools, and later ones, have their own.
_CHANGES = re.compile(
    r"rope|rotary|position_embedding_type|alibi|quanti[sz]|quant_|_quant|_bias$|^bias$|hidden_act|activation|act_layer"
    r"|act_func|softcap|sliding|window|multiplier|logit_scale|tie_|tied|qk_norm|qk_layernorm|norm_type|no_embed_class"
    r"|register_tokens|reg_tokens|parallel_residual|num_nextn|nextn_predict"
)
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", "none", [], {})
# Of some of them a further value that is what is computed here. A factor of 1 changes nothing.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_theta": (10000.0,),
    "rope_interleave": (True,),
    "position_embedding_type": ("rope", "rotary"),
    "partial_rotary_factor": (1,),
    "norm_type": ("rmsnorm", "rms_norm", "layernorm", "layer_norm"),
    "qkv_bias": (True,),  # of the encoder, whose projections have biases
    "act_layer": ("gelu_tanh", "gelu_pytorch_tanh"),
}
# Keys that say how others have stored the weights: `dsvl2_jax.checkpoint.quantized_source` reads them.
STORAGE_KEYS = ("quantization_config", "compression_config")
# Keys that every file may have and that say nothing about the computation.
_HARMLESS = re.compile(
    r"_name_or_path|architectures|auto_map|model_type|(torch_)?dtype|transformers_version|use_cache|lm_head|rm_head|ep_size"
    r"|pretraining_tp|pad_token_id|attention_dropout|_attn_implementation\w*|is_encoder_decoder|is_decoder|return_dict"
    r"|output_(attentions|hidden_states|scores)|(id2label|label2id)|_commit_hash|torchscript|chunk_size_feed_forward"
)


def _other_keys(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(object or "", key, value) of all keys that are no fields of ours."""
    tops = {*_PARTS, *STORAGE_KEYS, *(field.name for field in dataclasses.fields(_Top))}
    yield from (("", key, value) for key, value in raw.items() if key not in tops)
    for part, cls in _PARTS.items():
        inner = raw.get(part)
        known = {field.name for field in dataclasses.fields(cls)}
        known |= {"rope_parameters", *STORAGE_KEYS} if cls is LanguageConfig else set()  # see `read_rope`
        yield from (
            (part, key, value) for key, value in (inner if isinstance(inner, dict) else {}).items() if key not in known
        )


def _changes(key: str, value: Any) -> bool:
    """Whether a key that is no field of ours says that something else is computed than here."""
    if not _CHANGES.search(key.lower()):
        return False
    neutral = (*_NEUTRAL, *_COMPUTED.get(key, ()), *((1,) if "multiplier" in key or "scale" in key else ()))
    return not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def keys_that_change(raw: Mapping[str, Any]) -> list[str]:
    """A problem for each key of a parsed config.json that is not known here and changes what a model computes."""
    return [
        f"{part}{'.' if part else ''}{key}: found {_short(value)}; this changes what the model computes and is not "
        "supported, nor do the released models have it. If it means nothing here, take it out"
        for part, key, value in _other_keys(raw)
        if _changes(key, value)
    ]


def keys_without_meaning(path: str | Path) -> list[str]:
    """A note of the keys of a ``config.json`` that mean nothing here, the usual ones apart; [] if there are none.

    Raises:
      ConfigError: the file cannot be read.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    names = [
        f"{part}{'.' if part else ''}{key}"
        for part, key, value in _other_keys(read_json_object(path, ConfigError))
        if not _HARMLESS.fullmatch(key) and not (_CHANGES.search(key.lower()) and not _changes(key, value))
    ]
    return [f"config.json has keys that mean nothing here: {', '.join(names)}"] if names else []


def _short(value: Any) -> str:
    text = fields.literal(value) if value is not None else "null"
    return text if len(text) <= 100 else f"{text[:100]} …"


class _Reader:
    """Collects every problem of one file, so that they are reported together."""

    def __init__(self, source: str):
        self.source = source
        self.problems: list[str] = []

    def config(self, raw: dict[str, Any]) -> Config:
        for key in ("vision_config", "projector_config", "language_config"):
            if not isinstance(raw.get(key), dict):
                kind = "nothing" if key not in raw else type(raw[key]).__name__
                self.problems.append(f"{key}: expected an object, found {kind}")
        if "tile_tag" not in raw:
            self.problems.append('tile_tag: missing; the released models have "2D"')
        self.stop_if_wrong()
        vision = self.part(VisionConfig, raw, "vision_config")
        projector = self.part(ProjectorConfig, raw, "projector_config")
        rope, problems = read_rope(raw["language_config"])
        self.problems += [f"language_config.{problem}" for problem in problems]
        with_rope = {"language_config": raw["language_config"] | rope}
        language = self.part(LanguageConfig, with_rope, "language_config")
        top, problems = fields.build(_Top, raw, strict=False)
        self.problems += map(str, problems)
        self.problems += keys_that_change(raw)
        self.stop_if_wrong()
        config = Config(vision, projector, language, top.tile_tag, top.global_view_pos, top.candidate_resolutions)
        self.check_vision(config)
        self.check_language(language)
        self.stop_if_wrong()
        return config

    def part(self, cls: type, raw: dict[str, Any], key: str) -> Any:
        """An object of the file; `keys_that_change` and `keys_without_meaning` are about keys that are no fields."""
        value, problems = fields.build(cls, raw[key], (key,), strict=False)
        self.problems += map(str, problems)
        return value

    def expect(self, ok: bool, problem: str) -> None:
        if not ok:
            self.problems.append(problem)

    def check_vision(self, config: Config) -> None:
        vision, projector = config.vision, config.projector
        self.expect(config.tile_tag == "2D", f'tile_tag: found {config.tile_tag!r}, only "2D" is supported')
        self.expect(
            vision.global_pool == "map" and vision.ignore_head and not vision.class_token and not vision.num_classes,
            "vision_config: only global_pool map with ignore_head true, class_token false and num_classes 0 is "
            "supported (as all released models)",
        )
        self.expect(
            vision.width % vision.heads == 0,
            f"vision_config: width {vision.width} is not a multiple of heads {vision.heads}",
        )
        self.expect(
            vision.mlp_dim > 0, f"vision_config: mlp_ratio {vision.mlp_ratio} of width {vision.width} leaves nothing"
        )
        self.expect(
            vision.grid > 0,
            f"vision_config: image_size {vision.image_size} is smaller than patch_size {vision.patch_size}",
        )
        self.expect(
            projector.projector_type == "downsample_mlp_gelu",
            f'projector_config.projector_type: found {projector.projector_type!r}, only "downsample_mlp_gelu" is '
            "supported (as all released models)",
        )
        self.expect(not projector.token_pooling, "projector_config.token_pooling: true is not supported")
        self.expect(
            projector.input_dim == vision.width,
            f"projector_config.input_dim {projector.input_dim} differs from vision_config.width {vision.width}",
        )
        self.expect(
            projector.n_embed == config.language.hidden_size,
            f"projector_config.n_embed {projector.n_embed} differs from language_config.hidden_size "
            f"{config.language.hidden_size}",
        )

    def check_language(self, language: LanguageConfig) -> None:
        def expect(ok: bool, problem: str) -> None:
            self.expect(ok, f"language_config.{problem}")

        expect(language.hidden_act == "silu", f'hidden_act: found {language.hidden_act!r}, only "silu" is supported')
        expect(not language.tie_word_embeddings, "tie_word_embeddings: true is not supported")
        if language.use_mla:
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                expect(
                    bool(getattr(language, name)), f"{name}: needed with use_mla true, found {getattr(language, name)}"
                )
            expect(language.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim: {language.qk_rope_head_dim} is odd")
        else:
            heads, kv_heads = language.num_attention_heads, language.kv_heads
            expect(
                language.hidden_size % (2 * heads) == 0,
                f"hidden_size {language.hidden_size} does not give {heads} heads of an even width",
            )
            expect(
                heads % kv_heads == 0,
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
            )
        if language.rope_scaling is not None:
            for problem in language.rope_scaling.problems(language.rotary_width):
                expect(False, f"rope_scaling: {problem}")
        if language.has_moe:
            self.check_routing(language, expect)

    def check_routing(self, language: LanguageConfig, expect: Any) -> None:
        method, experts, top_k = language.topk_method, language.n_routed_experts, language.num_experts_per_tok
        expect(method is not None, f"topk_method: missing; name one of {', '.join(ROUTING_METHODS)}")
        expect(
            method is None or method in ROUTING_METHODS,
            f"topk_method: unknown routing method {method!r}; expected one of {', '.join(ROUTING_METHODS)}",
        )
        scoring = language.scoring_func
        expect(
            scoring in SCORING_FUNCTIONS,
            f"scoring_func: unknown {scoring!r}; expected one of {', '.join(SCORING_FUNCTIONS)}",
        )
        expect(top_k is not None, "num_experts_per_tok: missing, and needed with routed experts")
        expect(experts > 0, "n_routed_experts: must be positive")
        expect(language.moe_intermediate_size > 0, "moe_intermediate_size: must be positive, with routed experts")
        everywhere = experts * language.num_hidden_layers
        expect(
            everywhere <= _MOST_EXPERT_LAYERS,
            f"n_routed_experts: {experts} times num_hidden_layers {language.num_hidden_layers} is more than "
            f"{_MOST_EXPERT_LAYERS}",
        )
        expect(
            top_k is None or 0 < top_k <= experts, f"num_experts_per_tok: {top_k} of {experts} experts is impossible"
        )
        if method in ("group_limited_greedy", "noaux_tc"):
            groups, top_groups = language.n_group, language.topk_group
            if not groups or not top_groups:
                expect(False, f"n_group and topk_group: needed with topk_method {method}")
                return
            expect(experts % groups == 0, f"n_group: {experts} experts do not divide into {groups} groups")
            expect(top_groups <= groups, f"topk_group: {top_groups} of {groups} groups is impossible")
            if experts % groups == 0 and top_k is not None:
                reachable = top_groups * (experts // groups)
                expect(top_k <= reachable, f"num_experts_per_tok: {top_k}, but topk_group leaves {reachable} experts")

    def stop_if_wrong(self) -> None:
        if self.problems:
            listed = "\n  ".join(self.problems)
            raise ConfigError(f"{self.source} does not describe a model that can be built:\n  {listed}")
