"""Rows split along their length over eight devices train as on one; 32,768 tokens in make test-exhaustive."""

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION, Config
from dsvl2_jax.sharding import make_mesh
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.objectives.language import LanguageTrainer
from dsvl2_jax.train.settings.schema import (
    BatchSettings,
    ComputeSettings,
    DataSettings,
    OptimizerSettings,
    ParameterRule,
    Settings,
    StageSettings,
)

TOLERANCE = 2e-5  # ‖Δ‖/‖g‖ of gradients, and of losses

LANGUAGE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": None,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "initializer_range": 0.2,
    "rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0,
                     "mscale": 1.0},
}  # fmt: skip


def config(layers: int) -> Config:
    """The last of the layers has experts."""
    return Config.from_dict(
        {
            "language_config": LANGUAGE | {"num_hidden_layers": layers, "first_k_dense_replace": layers - 1},
            "vision_config": {"image_size": 28, "patch_size": 7, "width": 16, "layers": 1, "heads": 2},
            "projector_config": {"input_dim": 16, "n_embed": LANGUAGE["hidden_size"]},
            "tile_tag": "2D",
        }
    )


def row_of(lengths: list[int], total: int) -> TrainBatch:
    """One row of samples of text, and padding."""
    rng, padding = np.random.default_rng(0), total - sum(lengths)
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding, np.int64)]).astype(np.int32)
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding]).astype(np.int32)
    ids = rng.integers(0, 64, total, dtype=np.int32)
    labels = np.where((segments > 0) & (rng.random(total) < 0.8), ids, IGNORED_LABEL).astype(np.int32)
    columns = ids, labels, np.full(total, TEXT_POSITION, np.int32), positions, segments, np.zeros(total, np.bool_)
    return TrainBatch(*(column[None, None] for column in columns), np.zeros((1, 0, 28, 28, 3), np.uint8))


def stepped(batch: TrainBatch, layers: int, mesh) -> tuple[float, np.ndarray, dict]:
    """(loss, balance losses, gradients) of one step from the same weights."""
    settings = Settings(
        data=DataSettings(sequence_length=batch.ids.shape[-1], max_segments=4),
        batch=BatchSettings(sequences=1, microbatch_size=1),
        stage=StageSettings(
            (ParameterRule("vision|projector|image_|view_|correction_bias", False), ParameterRule("")), 0.02
        ),
        optimizer=OptimizerSettings(clip_norm=0.0),
        compute=ComputeSettings(dtype="float32", loss_chunk=1000),
    )
    trainer = LanguageTrainer(config(layers), settings, np.full(3, 0.5), np.full(3, 0.5), mesh)
    params = model.init_params(config(layers), jax.random.key(0))
    state, metrics = trainer.step(trainer.init(params), batch)
    (moments,) = (leaf for leaf in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(leaf))
    return float(metrics.loss), np.asarray(metrics.balance_losses), flatten_dict(jax.device_get(moments.mu))


def _is_adam(state) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


@pytest.mark.parametrize(
    ("lengths", "total", "layers"),
    [([300, 5, 190], 512, 1), pytest.param([20000, 300, 12000], 32768, 2, marks=pytest.mark.exhaustive)],
    ids=["512", "32768"],
)
def test_a_row_over_eight_devices_gives_what_one_device_gives(lengths, total, layers):
    batch = row_of(lengths, total)
    loss, balance, gradient = stepped(batch, layers, make_mesh(sequence=8))
    expected, expected_balance, expected_gradient = stepped(batch, layers, None)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    np.testing.assert_allclose(balance, expected_balance, rtol=TOLERANCE)
    assert gradient.keys() == expected_gradient.keys()
    for path, want in expected_gradient.items():
        assert np.linalg.norm(gradient[path] - want) <= TOLERANCE * np.linalg.norm(want) + 1e-9, path
