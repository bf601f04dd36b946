"""Model FLOPs of a training step: one side of MFU; the other is `dsvl2_jax.runtime.hardware.peak_flops`.

Counted are the matrix products that the model needs (2 FLOPs for a multiplication and an addition), not what a
program happens to run: recomputation, padding and masked-out attention scores are no useful work. Forward is 1;
backward adds 1 for the gradient of the input, where anything before it is trained, and 1 for that of the weight,
where it is trained: 3 in all for a part that is wholly trained. A token counts the experts that it visits. Norms,
activations, softmax and embedding look-ups are left out, as is usual.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dsvl2_jax.model.config import Config, VisionConfig
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.train.settings.schema import ContrastiveSettings, ParameterRule

# Parameters that multiply activations; the others add, scale or are looked up.
_MATRIX = re.compile(r"/kernel$|/kv_b_proj$|/mlp/experts/")
_NONE: Mapping[LeafPath, Any] = {}
_LAYER = re.compile(r"/(?:blocks|layers)_(\d+)/")


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs per unit of a step's work, forward and backward."""

    per_token: float  # language model, attention scores left out
    per_pair: float  # a query and a key that it sees, all layers and heads
    per_tile: float  # vision encoder and adaptor

    def step(self, tokens: float, samples: float, tiles: float) -> float:
        """FLOPs of a step of ``tokens`` in ``samples`` samples with ``tiles`` tiles, none of them padding.

        A token sees itself and those before it in its sample. Samples are taken as equally long, which is the least
        that attention can cost: a step of unequal ones takes more.
        """
        mean_length = tokens / max(samples, 1)
        return self.per_token * tokens + self.per_pair * tokens * (mean_length + 1) / 2 + self.per_tile * tiles


def step_flops(
    config: Config,
    rules: Mapping[str, ParameterRule],
    *,
    remat: bool = False,
    adapter: Mapping[LeafPath, tuple[Shape, Any]] | None = None,
) -> StepFlops:
    """The counts of a model in a stage.

    Args:
      rules: path of every parameter, layers apart → its rule (`dsvl2_jax.train.parameter_rules.assign`).
      remat: count the layers' forward once more where the backward pass goes through them; no useful work.
      adapter: path → (shape, …) of the leaves of an adapter, which alone is trained then.
    """
    if adapter is not None:
        trained = {path_name(path): ParameterRule(".") for path in adapter}
        rules = {path_name(path): ParameterRule(".", train=False) for path in abstract_leaves(config)} | trained
    language = config.language
    passes = _Passes(rules, remat, adapts=adapter is not None)
    per_token = per_feature = 0.0
    for path, size in _matrices(config, adapter or {}):
        flops = 2.0 * size * passes.of(path)
        if path.startswith("projector/"):
            per_feature += flops
        elif "/experts/" in path:
            per_token += flops * language.num_experts_per_tok / language.n_routed_experts
        elif path.startswith("language/"):
            per_token += flops

    heads = language.num_attention_heads
    if language.use_mla:
        widths = language.qk_nope_head_dim + language.qk_rope_head_dim + language.v_head_dim
    else:
        widths = 2 * language.head_dim
    per_pair = 2.0 * heads * widths * passes.attention(2.0, language.num_hidden_layers)
    per_tile = _encoder(config, passes, adapter or {}) + per_feature * config.tokens_per_tile
    return StepFlops(per_token, per_pair, per_tile)


def contrastive_flops(config: Config, rules: Mapping[str, ParameterRule], settings: ContrastiveSettings) -> StepFlops:
    """The counts of contrastive training: tokens are the captions', a tile is an image, with all that it has once.

    The comparison of all images with all captions is left out: it is no part of the towers and small beside them.
    """
    vision, passes = config.vision, _Passes(rules)
    width, layers = vision.width, settings.text_layers
    per_token = 2.0 * 3 * layers * (4 * width**2 + 2 * width * vision.mlp_dim)
    # Twice, since a caption's token sees those after it too, which `StepFlops.step` does not count.
    per_pair = 2 * (2.0 * 3 * layers * 2 * width)
    head = "vision/attn_pool/"
    pooled = {f"{head}{name}_kernel": size for name, size in _pooled(vision).items()}
    per_tile = _encoder(config, passes) + sum(2.0 * size * passes.of(path) for path, size in pooled.items())
    return StepFlops(per_token, per_pair, per_tile + 2.0 * 3 * width**2)


def region_flops(config: Config, rules: Mapping[str, ParameterRule]) -> StepFlops:
    """The counts of training on regions: the encoder. Pooling and comparison are small beside it and left out."""
    return StepFlops(0.0, 0.0, _encoder(config, _Passes(rules)))


def _pooled(vision: VisionConfig) -> dict[str, int]:
    """Products of the pooling head, multiplications an image; its query is computed once a step."""
    attention = 2 * vision.width * vision.patches  # scores and values, of one query
    mlp = vision.width * vision.mlp_dim
    kv = 2 * vision.width**2 * vision.patches + attention
    return {"kv": kv, "proj": vision.width**2, "mlp_fc1": mlp, "mlp_fc2": mlp}


class _Passes:
    """How often a product is made: 1 forward, and 1 each for the gradients that are needed of its two inputs."""

    def __init__(self, rules: Mapping[str, ParameterRule], remat: bool = False, adapts: bool = False):
        self._rules = rules
        self._remat = remat
        self._adapts = adapts
        self._trained = {_depth(path) for path, rule in rules.items() if rule.train}
        self._first = min(self._trained, default=(math.inf,))

    def of(self, path: str) -> int:
        """For a weight's product with its input."""
        depth, trained = _depth(path), self._rules[path].train
        # In the first layer that has adapters, gradients flow from its later products to its earlier ones.
        through = self._first < depth or (self._adapts and not trained and depth in self._trained)
        backward = through + trained
        return 1 + backward + (self._remat and backward > 0 and _LAYER.search(path) is not None)

    def attention(self, part: float, layers: int) -> int:
        """Summed over the layers; scores and values have two inputs, whose gradients cost the forward's each."""
        depths = [(part, 1.0, float(i)) for i in range(layers)]
        return sum(3 + self._remat if self._first < depth or depth in self._trained else 1 for depth in depths)


def _matrices(config: Config, adapter: Mapping[LeafPath, tuple[Shape, Any]] = _NONE) -> Iterator[tuple[str, int]]:
    """Path and size of the parameters that multiply activations, the pooling head's apart, and of an adapter's."""
    for keys, (shape, _) in abstract_leaves(config).items():
        path = path_name(keys)
        if _MATRIX.search(path) and not path.startswith("vision/attn_pool/"):
            yield path, math.prod(shape)
    for keys, (shape, _) in adapter.items():
        if keys[-1] != "magnitude":
            yield path_name(keys), math.prod(shape)


def _encoder(config: Config, passes: _Passes, adapter: Mapping[LeafPath, tuple[Shape, Any]] = _NONE) -> float:
    """FLOPs of a tile in the vision encoder."""
    vision = config.vision
    matrices = _matrices(config, adapter)
    per_patch = sum(2.0 * size * passes.of(path) for path, size in matrices if path.startswith("vision/"))
    per_pair = 2.0 * 2 * vision.width * passes.attention(0.0, vision.layers)
    return per_patch * vision.patches + per_pair * vision.patches**2


def _depth(path: str) -> tuple[float, ...]:
    """Where a parameter enters the forward pass; a gradient flows from later places to earlier trained ones."""
    if path in ("image_newline", "view_seperator"):
        return (2.0, 0.0)
    part = {"vision": 0.0, "projector": 1.0, "language": 2.0}[path.split("/")[0]]
    layer = _LAYER.search(path)
    if layer:
        return (part, 1.0, float(layer[1]))
    before = ("/patch_embed/", "/pos_embed", "/embed_tokens")
    return (part, 0.0) if any(name in path + "/" for name in before) else (part, 2.0)
