"""The micro model: `base` scaled down, with its own tokenizer, trained from scratch on drawn pictures.

    dsvl2 micro start DIRECTORY      # configuration and tokenizer, from which training begins
    dsvl2 micro data DIRECTORY       # the training data of all stages
    dsvl2 micro questions DIRECTORY  # held-out questions for `dsvl2 eval`
    dsvl2 micro ship RUNS DIRECTORY  # what the repository ships: bfloat16, released layout
    dsvl2 micro examples DIRECTORY   # the pictures of ``configs/images``

`make train-micro` runs these and, between them, `dsvl2 train` with the presets ``micro-*``. Needs the ``train`` extra.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsvl2_jax.apps.micro import pictures, synthetic
from dsvl2_jax.checkpoint.digests import SUMS_NAME, sums
from dsvl2_jax.checkpoint.staging import replacing, scratch, write_text
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.inputs.tile_budget import extended_candidate_resolutions
from dsvl2_jax.inputs.tokenizer import DEFAULT_PAD_TOKEN, PROCESSOR_TOKENS

SEED = 0
VOCABULARY = 640  # rows of the embedding; the tokenizer has fewer
LEARNT_TOKENS = 600

# `base` scaled down. The tilings are added to both files.
CONFIG = """{
"model_type": "deepseek_vl_v2", "architectures": ["DeepseekVLV2ForCausalLM"], "torch_dtype": "bfloat16",
"tile_tag": "2D", "global_view_pos": "head",
"vision_config": {
  "model_type": "vision", "model_name": "siglip_so400m_patch14_384", "image_size": 126, "patch_size": 14,
  "width": 128, "layers": 4, "heads": 4, "mlp_ratio": 3.7362},
"projector_config": {"model_type": "mlp_projector", "input_dim": 128, "n_embed": 160},
"language_config": {
  "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "torch_dtype": "bfloat16",
  "vocab_size": 640, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 4096,
  "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4, "initializer_range": 0.08,
  "use_mla": true, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": null, "kv_lora_rank": 64,
  "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
  "first_k_dense_replace": 1, "moe_intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 2,
  "num_experts_per_tok": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
  "norm_topk_prob": true, "routed_scaling_factor": 2.0, "aux_loss_alpha": 0.0001, "lm_head": true, "rm_head": false}
}"""
PROCESSOR_CONFIG = """{
"processor_class": "DeepseekVLV2Processor", "patch_size": 14, "downsample_ratio": 2, "normalize": true,
"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_token": "<image>", "add_special_token": false,
"pad_token": "<｜▁pad▁｜>", "sft_format": "deepseek", "mask_prompt": false, "ignore_id": -100
}"""


def start(out: Path) -> None:
    """Writes configuration and tokenizer, all that training from scratch takes from its ``model.checkpoint``.

    Raises:
      UsageError: the fonts of the pictures, whose descriptions the tokenizer learns from, are not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    config, processor = json.loads(CONFIG), json.loads(PROCESSOR_CONFIG)
    tilings = extended_candidate_resolutions(9, config["vision_config"]["image_size"])
    _write_json(out / "config.json", config | {"candidate_resolutions": tilings})
    _write_json(out / "processor_config.json", processor | {"candidate_resolutions": tilings})
    _write_tokenizer(out, _texts(4000))


def _texts(count: int) -> Iterator[str]:
    """What the tokenizer learns from: conversations in the released template, without special tokens."""
    for index in range(count):
        rng = synthetic.rng_of(synthetic.TRAINING, SEED, index)
        turns = synthetic.text_sample(rng)
        text = "".join(f": {turn['content']}" + "\n\n" * (turn["role"] == "user") for turn in turns)
        yield re.sub(r"<\|[^|]*\|>", "\n", text)


def _write_tokenizer(out: Path, texts: Iterator[str]) -> None:
    """Trains a byte-level BPE in the style of the released one, but with single digits, and writes its three files."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    pattern = (
        r"\p{N}|, (?=\p{N})|[^\r\n\p{L}\p{P}\p{S}\p{N}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (bos, eos, DEFAULT_PAD_TOKEN)]
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNT_TOKENS,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in PROCESSOR_TOKENS])
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": eos, "pad_token": DEFAULT_PAD_TOKEN}
    extra = {"additional_special_tokens": list(PROCESSOR_TOKENS[-2:])}
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": 4096}
    _write_json(out / "special_tokens_map.json", names | extra)
    _write_json(out / "tokenizer_config.json", settings | names | extra)


def _write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


# Name → (samples, arguments of `synthetic.write`): what the stages of ``configs/micro/train/*.toml`` read.
DATA: dict[str, tuple[int, dict[str, object]]] = {
    "text": (40_000, {"mixture": "text", "seed": 1}),
    "held-out-text": (400, {"mixture": "text", "seed": 1, "stream": synthetic.HELD_OUT}),
    "regions": (120_000, {"mixture": "regions parts", "seed": 11}),
    "held-out-regions": (512, {"mixture": "regions parts", "seed": 11, "stream": synthetic.HELD_OUT}),
    "digits": (40_000, {"mixture": "regions digit", "seed": 13}),
    "numbers": (80_000, {"mixture": "regions numbers", "seed": 14}),
    "edges": (80_000, {"mixture": "regions parts", "seed": 20}),
    "captions": (100_000, {"mixture": "captions simple", "seed": 2}),
    "held-out-captions": (512, {"mixture": "captions simple", "seed": 2, "stream": synthetic.HELD_OUT}),
    "simple": (32_000, {"mixture": "simple", "seed": 3, "turns": 6}),
    "numbers-alone": (30_000, {"mixture": "numbers alone", "seed": 15}),
    "charts-alone": (20_000, {"mixture": "charts alone", "seed": 16}),
    "boxes-alone": (24_000, {"mixture": "boxes alone", "seed": 17}),
    "pairs-alone": (12_000, {"mixture": "pairs alone", "seed": 18}),
    "many-boxes-alone": (24_000, {"mixture": "many boxes alone", "seed": 21}),
    "two-places-alone": (24_000, {"mixture": "two places alone", "seed": 22}),
    "two-boxes-alone": (24_000, {"mixture": "two boxes alone", "seed": 23}),
    "places-alone": (24_000, {"mixture": "places alone", "seed": 19}),
    "full": (48_000, {"mixture": "full", "seed": 4, "turns": 6}),
    "held-out-full": (500, {"mixture": "full", "seed": 4, "turns": 6, "stream": synthetic.HELD_OUT}),
    "instructions": (64_000, {"mixture": "full", "seed": 5, "turns": 6}),
}
EVALUATION_SEED, EVALUATION_SAMPLES = 6, 500  # held-out stream; samples of each task


def data(out: Path, names: Sequence[str] = (), *, workers: int = 2) -> None:
    """Writes the data sets of `DATA` that are not there yet (all, or the ones named).

    Raises:
      UsageError: there is no data set of a name, or the fonts to draw with are not installed.
    """
    if unknown := [name for name in names if name not in DATA]:
        raise UsageError(f"no data set {', '.join(unknown)}; expected some of {', '.join(DATA)}.")
    for name in names or DATA:
        count, arguments = DATA[name]
        print(synthetic.write(out, name, count, workers=workers, **arguments), flush=True)  # type: ignore[arg-type]


def evaluation(out: Path, *, seed: int = EVALUATION_SEED, samples: int = EVALUATION_SAMPLES) -> Path:
    """Writes the held-out questions that `make eval-micro` asks, ``samples`` a task; returns the file."""
    count = samples * len(synthetic.TASKS)
    return synthetic.write(out, f"questions-{seed}-{samples}", count, seed=seed, mixture="tasks")


STAGES = (
    "language",
    "regions",
    "digits",
    "order",
    "parts",
    "numbers",
    "scenes",
    "align",
    "simple",
    "tasks",
    "pretrain",
    "edges",
    "questions",
    "places",
    "where",
    "all",
    "sharpen",
    "again",
    "sft",
)
LOG_NAME = "training.jsonl"


def ship(runs: Path, out: Path) -> None:
    """Writes the trained model into ``out``: bfloat16, released layout, training log, digests of all its files.

    Args:
      runs: the folder of the runs of all `STAGES`; the last one's newest checkpoint is exported.
      out: made when needed; its other files, such as a README, stay.

    Raises:
      CheckpointError: a stage has not run, or the last one has no complete checkpoint.
    """
    if missing := [stage for stage in STAGES if not (runs / stage / "log.jsonl").is_file()]:
        raise CheckpointError(f"{runs}: has no log.jsonl of {', '.join(missing)}; run `make train-micro` to its end.")
    out.mkdir(parents=True, exist_ok=True)
    with scratch(runs / "model") as work:
        made = work / "model"
        export(str(runs / STAGES[-1]), made, dtype="bfloat16")
        for old in [*out.glob("*.safetensors*"), out / SUMS_NAME]:
            old.unlink(missing_ok=True)
        for file in sorted(made.iterdir()):
            shutil.copyfile(file, out / file.name)
        names = sorted(file.name for file in made.iterdir())
    write_text(out / LOG_NAME, "".join(_log(runs)))
    write_text(out / SUMS_NAME, sums(out, names))


def _log(runs: Path, every: int = 20) -> Iterator[str]:
    """The runs' logs as one: the versions, then every 20th step of each stage, every validation and start."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    yield json.dumps({"kind": "versions", **versions}) + "\n"
    kept = ("kind", "step", "time", "loss", "text_loss", "image_loss", "accuracy", "learning_rate", "tokens_per_second")
    kept += ("samples", "load_max_over_mean", "reason")
    for stage in STAGES:
        with (runs / stage / "log.jsonl").open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                if entry["kind"] != "step" or entry["step"] % every == 0:
                    entry = {key: _short(entry[key]) for key in kept if entry.get(key) is not None}
                    yield json.dumps({"stage": stage, **entry}) + "\n"


def _short(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def example_pictures() -> dict[str, pictures.Picture]:
    """File name → picture of ``configs/images``: four shapes, a number of four digits, a chart of four bars.

    Their random numbers are of the demo's stream, at an index that no demo reaches: no training has seen them.
    """

    def rng(seed: int) -> np.random.Generator:
        return synthetic.rng_of(synthetic.DEMO, seed, 99)

    return {
        "shapes.png": pictures.scene(rng(21), 4, size=(244, 122)),
        "number.png": pictures.writing(rng(19), "7063", size=(122, 96)),
        "chart.png": pictures.chart(rng(11), 4),
    }


def examples(out: Path) -> None:
    """Draws `example_pictures` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in example_pictures().items():
        with replacing(out / name) as new:
            picture.draw().save(new, "PNG", optimize=True)
