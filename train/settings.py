"""Settings of a training run: the tables of a CONFIG.toml, checked, with ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """``[model]``: what training starts from."""

    checkpoint: str = ""  # converted or released directory, hub id, or the directory of an earlier run; must be given
    random_init: bool = False  # take configuration, processor and tokenizer from the checkpoint, but no weights
    size: str = "any"  # tiny, small or base: a checkpoint of another size is refused; any: all are welcome


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """``[data.train.NAME]`` or ``[data.validation.NAME]``: one data set."""

    path: str = ""  # JSON Lines of conversations, or plain text; a glob pattern may name several files
    weight: float = 1.0  # share of the samples drawn from this source, relative to the others (training only)
    images: str = ""  # folder or tar shards (a glob) where image names are looked up; empty: the data file's folder


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """``[data]``: samples to packed rows."""

    train: Mapping[str, SourceSettings] = dataclasses.field(default_factory=dict)
    validation: Mapping[str, SourceSettings] = dataclasses.field(default_factory=dict)
    sequence_length: int = 4096  # tokens of a row
    tiles_per_sequence: int = 20  # room for image tiles, per row
    max_segments: int = 64  # most samples packed into a row
    packing: bool = True  # False: one sample a row
    packing_bins: int = 16  # rows that are filled at the same time; more waste less
    too_long: str = "skip"  # skip or truncate: samples longer than a row
    mask_prompt: bool = False  # True: loss on answers alone (stage 3); False: on all text
    shuffle: bool = True
    workers: int = 0  # processes that read and tokenise; 0: the main one
    max_broken_share: float = 0.01  # of the samples read; above it the run stops


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """``[batch]``: sequences of one optimizer step. Accumulation steps follow: sequences / (micro × data shards)."""

    sequences: int = 64  # rows in a step, over all devices and accumulation steps
    micro_sequences: int = 1  # rows that a data shard computes at a time


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """``[[stage.parameters]]``: what to do with parameters whose path (``language/norm/scale``) matches.

    The first rule that matches anywhere in the path (``re.search``) holds. Every parameter must be covered.
    """

    match: str = ""
    train: bool = True
    rate: float = 1.0  # factor on the learning rate
    decay: bool = True  # weight decay


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """``[stage]``: what is trained, and the routers' losses."""

    parameters: tuple[ParameterRule, ...] = ()
    balance_loss_weight: float = 0.001  # α of the sequence-wise balance loss
    bias_update_speed: float = 0.0  # of the router's correction bias (noaux_tc), per step


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """``[optimizer]``: AdamW."""

    learning_rate: float = 1e-4
    schedule: str = "constant"  # cosine; step (÷√10 at 50 % and at 75 % of the steps); constant
    warmup_steps: int = 0  # of linear rise; the paper does not say
    final_rate: float = 0.0  # where cosine ends, as a share of learning_rate; the paper does not say
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    state_dtype: str = "float32"  # or bfloat16, of both moments


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
    """``[compute]``: how a step runs."""

    dtype: str = "bfloat16"  # or float32; trained parameters are float32 always
    mesh: str = ""  # data=…,tensor=…,expert=…; empty: all devices along data
    scan_layers: bool = True  # stacked layers under lax.scan; False: a loop, slower to compile
    remat: str = "full"  # none; dots (keep matmul outputs); full (keep layer inputs)
    loss_chunk: int = 1024  # tokens whose logits are held at a time


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """``[run]``: the loop."""

    directory: str = ""  # of the run: checkpoints, log, resolved configuration; must be given
    steps: int = 1000
    seed: int = 0
    checkpoint_every: int = 500
    keep_last: int = 3  # checkpoints kept besides the best one by validation loss
    validate_every: int = 500
    validation_steps: int = 16  # batches of a validation, at most
    log_every: int = 1
    tensorboard: bool = False
    profile: str = ""  # "FIRST:LAST" steps to trace into the run's directory


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole CONFIG.toml."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    stage: StageSettings = StageSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    compute: ComputeSettings = ComputeSettings()
    run: RunSettings = RunSettings()
