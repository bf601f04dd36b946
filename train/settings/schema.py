"""Settings of a training run: the tables of a CONFIG.toml. Each field says its meaning, its range, and whether a run
that resumes may change it.

`dsvl2_jax.train.settings.load` reads and writes them. Paths in them are relative to the working directory.

Tested in tests/train/settings/test_load.py and tests/train/settings/test_presets.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsvl2_jax.fields import setting
from dsvl2_jax.inputs.frame_choice import EVEN, FRAME_CHOICES, FRAMES, MAX_FRAMES
from dsvl2_jax.inputs.record_boxes import AUTO, BOX_KINDS
from dsvl2_jax.inputs.tile_budget import MAX_TILES


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What training starts from."""

    checkpoint: str = setting(
        "",
        example="deepseek-ai/deepseek-vl2-tiny",
        help="converted or released directory, hub id, or the directory of an earlier run; must be given",
    )
    random_init: bool = setting(
        False, help="take configuration, processor and tokenizer from the checkpoint, but no weights"
    )
    size: str = setting(
        "any",
        choices=("any", "tiny", "small", "base"),
        help="released size that the checkpoint must have; any: no matter which",
    )
    context: int = setting(
        0, least=0, help="max_position_embeddings of the model that the run trains and writes; 0: the checkpoint's"
    )
    rope_scaling: str = setting(
        "",
        help="how that model scales its positions, JSON as in config.json: "
        '{"type": "yarn", "factor": 4}; empty: as the checkpoint',
    )


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """One data set."""

    path: str = setting(
        "",
        help="JSON Lines (.gz, .zst), a JSON array, Parquet, .arrow, plain text or tar; a glob pattern may name "
        "several files, or a folder a Hugging Face data set; must be given, or a function",
    )
    weight: float = setting(
        1.0, least=0, help="share of the samples drawn from it, relative to the others (training only); 0: left out"
    )
    images: str = setting(
        "", help="folder or tar shards (a glob) where image names are looked up; empty: the data file's folder"
    )
    boxes: str = setting(
        AUTO,
        choices=(AUTO, *BOX_KINDS),
        help='what the numbers of boxes under "objects" are, in records that do not say it; auto: decided for each',
    )
    follow_links: bool = setting(
        False, may_change=True, help="true: links in the folder of images may lead out of it, as to a store of files"
    )
    function: str = setting(
        "",
        help="instead of a path: module:name of a Python function that gives one record for each number from 0; see "
        "docs/data.md",
    )
    count: int = setting(0, least=0, help="records of the function that make an epoch; must be given with it")
    arguments: Mapping[str, Any] = setting(factory=dict, help="keywords that the function is called with, a table")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """From samples to packed rows."""

    train: Mapping[str, SourceSettings] = setting(factory=dict, hint="one per data set")
    validation: Mapping[str, SourceSettings] = setting(factory=dict, hint="one per data set", may_change=True)
    sequence_length: int = setting(4096, least=2, help="tokens of a row")
    tiles_per_sequence: int = setting(20, least=0, help="most image tiles in a row")
    max_segments: int = setting(64, least=1, help="most samples packed into a row")
    packing: bool = setting(True, help="false: one sample per row")
    packing_bins: int = setting(
        64, least=1, help="rows that are filled at the same time; more of them waste less and hold more tiles in memory"
    )
    too_long: str = setting("skip", choices=("skip", "truncate"), help="what is done with samples longer than a row")
    as_seen: bool = setting(
        False,
        help="true: read pictures as people see them: turned as EXIF says, transparent ones over white, 16-bit gray "
        "divided; false: as the official code does",
    )
    max_tiles: int = setting(
        0, least=0, most=MAX_TILES, help="most local tiles of an image; 0: as the checkpoint's candidates (9)"
    )
    min_tiles: int = setting(
        0, least=0, most=MAX_TILES, help="fewest local tiles of an image, however many a sample has; 0: one"
    )
    frames: int = setting(FRAMES, least=1, most=MAX_FRAMES, help="most frames of a video")
    frame_choice: str = setting(
        EVEN,
        choices=FRAME_CHOICES,
        help="even: frames at equal distances; scene: one of each part between the greatest changes",
    )
    mask_prompt: bool = setting(False, help="true: loss on answers alone (stage 3); false: on all text")
    shuffle: bool = setting(True, help="read the samples of each epoch in a random order")
    workers: int = setting(
        0, least=0, may_change=True, help="processes that read and tokenise a stream; 0: the main process does"
    )
    streams: int = setting(
        1,
        least=1,
        help="parts that are read and packed separately, each by the processes that train on it; see docs/pods.md",
    )
    max_broken_share: float = setting(
        0.01, least=0, most=1, may_change=True, help="share of broken samples above which the run stops"
    )


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """Sequences of one optimizer step; accumulation steps = sequences / (microbatch_size × data shards)."""

    sequences: int = setting(64, least=1, help="rows in a step, over all devices and accumulation steps")
    microbatch_size: int = setting(
        1, least=1, may_change=True, was="micro_sequences", help="rows that a data shard computes at a time"
    )


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """What to do with parameters whose path (``language/norm/scale``) matches.

    The first rule that matches anywhere in the path (``re.search``) holds. Every parameter must be covered.
    """

    match: str = setting("", help="regular expression for parameter paths; must be given")
    train: bool = setting(True, help="false: the parameters stay as they are")
    lr_multiplier: float = setting(
        1.0, above=0, was="rate", hint="to freeze parameters say train = false", help="factor on the learning rate"
    )
    decay: bool = setting(True, help="apply weight decay")


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """What is trained and on what, and the routers' losses."""

    parameters: tuple[ParameterRule, ...] = setting((), help="the rules, in order")
    balance_loss_weight: float = setting(0.001, least=0, help="α of the sequence-wise balance loss")
    bias_update_speed: float = setting(0.0, least=0, help="of the routers' correction bias (noaux_tc), per step")
    objective: str = setting(
        "language",
        choices=("language", "contrastive", "regions"),
        help="language: the next token; or the encoder alone, on images and their captions (contrastive) or on named "
        "regions (regions)",
    )


# Of the decoder's layers, all but the routed experts.
ADAPTER_TARGETS = (
    r"^language/layers_\d+/self_attn/",
    r"^language/layers_\d+/mlp/(shared_experts/)?(gate|up|down)_proj/",
)


@dataclasses.dataclass(frozen=True)
class AdapterStage:
    """An adapter is trained instead of the model, whose parameters all stay as they are; see docs/finetune.md."""

    kind: str = setting(
        "none", choices=("none", "lora", "dora"), help="none: the parameters are trained as stage.parameters says"
    )
    rank: int = setting(16, least=1, help="of each weight's addition, A · B")
    alpha: float = setting(32.0, above=0, help="the addition is multiplied with alpha / rank")
    rslora: bool = setting(False, help="true: multiplied with alpha / √rank instead")
    dropout: float = setting(0.0, least=0, below=1, help="share of A's inputs that are dropped")
    targets: tuple[str, ...] = setting(
        ADAPTER_TARGETS,
        help="regular expressions for the paths of the weights that have one; '^language/.*/mlp/experts/' are the "
        "routed experts, each with its own A and B, '^vision/' is the encoder, '^projector/' the adaptor",
    )
    base: str = setting(
        "stored",
        choices=("stored", "float32", "bfloat16"),
        help="dtype in which the model's own parameters are kept; stored: as the checkpoint has them, quantized ones "
        "too",
    )


@dataclasses.dataclass(frozen=True)
class ContrastiveSettings:
    """The text's side of the objectives "contrastive" and "regions", and their loss (SigLIP)."""

    text_layers: int = setting(2, least=1, help="blocks of the caption encoder, as wide as the image encoder's")
    text_length: int = setting(
        64, least=2, help="tokens of a caption, its end included, or of all phrases of an image; longer ones are cut"
    )
    attributes: str = setting("", help='regions: the attributes to learn, as in "kind, colour"; empty: all')
    phrases: int = setting(32, least=1, help="regions: most phrases of an image")
    different_phrases: int = setting(1024, least=1, help="regions: most different phrases of a step")
    fresh_encoder: bool = setting(
        False, help="initialise the image encoder anew at the start of the run, to train it from scratch"
    )
    initial_scale: float = setting(10.0, above=0, help="t, which multiplies the cosines; its logarithm is learnt")
    initial_bias: float = setting(-10.0, help="b, learnt too")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW."""

    learning_rate: float = setting(1e-4, above=0, help="at its highest")
    schedule: str = setting(
        "constant",
        choices=("cosine", "step", "constant"),
        help="after the warm-up; step: divided by √10 at 50 % and at 75 % of the steps",
    )
    warmup_steps: int = setting(0, least=0, help="steps of linear rise; the paper does not say")
    final_rate: float = setting(
        0.0, least=0, most=1, help="where cosine ends, as a share of learning_rate; the paper does not say"
    )
    beta1: float = setting(0.9, least=0, below=1, help="decay of the first moment")
    beta2: float = setting(0.95, least=0, below=1, help="decay of the second moment")
    epsilon: float = setting(1e-8, above=0, help="added to the root of the second moment")
    weight_decay: float = setting(0.1, least=0, help="decoupled, of the parameters whose rule says so")
    clip_norm: float = setting(1.0, least=0, help="most of the global gradient norm; 0: no clipping")
    state_dtype: str = setting("float32", choices=("float32", "bfloat16"), help="of both moments")


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
    """How a step runs."""

    dtype: str = setting(
        "bfloat16", choices=("bfloat16", "float32"), help="of computation; trained parameters are float32 always"
    )
    mesh: str = setting("", may_change=True, help="data=…,tensor=…,expert=…,sequence=…; empty: all devices along data")
    scan_layers: bool = setting(True, help="stacked layers under lax.scan; false: a loop, slower to compile")
    remat: str = setting(
        "full",
        choices=("none", "dots", "full"),
        help="what is computed again in the backward pass; dots: all but matmul outputs; full: all but layer inputs",
    )
    loss_chunk: int = setting(1024, least=1, help="tokens whose logits are held at a time")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The training loop."""

    directory: str = setting(
        "",
        example="runs/my-run",
        may_change=True,
        help="of the run: checkpoints, log, resolved configuration; must be given",
    )
    steps: int = setting(1000, least=1, help="optimizer steps of the whole run")
    seed: int = setting(0, least=0, most=2**32 - 1, help="of shuffling and of random parameters")
    checkpoint_every: int = setting(500, least=1, may_change=True, help="steps from a checkpoint to the next")
    keep_last: int = setting(
        3, least=1, may_change=True, help="checkpoints kept besides the best one by validation loss"
    )
    validate_every: int = setting(500, least=1, may_change=True, help="steps from a validation to the next")
    validation_steps: int = setting(16, least=1, may_change=True, help="most batches of a validation")
    log_every: int = setting(1, least=1, may_change=True, help="steps from a printed line to the next")
    tensorboard: bool = setting(False, may_change=True, help="write TensorBoard files as well")
    profile: str = setting(
        "", may_change=True, help="FIRST:LAST, the steps to trace into the run's directory; empty: none"
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole CONFIG.toml."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    stage: StageSettings = StageSettings()
    adapter: AdapterStage = AdapterStage()
    contrastive: ContrastiveSettings = ContrastiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    compute: ComputeSettings = ComputeSettings()
    run: RunSettings = RunSettings()
