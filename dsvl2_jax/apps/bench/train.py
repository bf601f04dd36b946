"""`dsvl2 bench train`: a training step of a mid-size language model, or of an adapter for one, against PyTorch's.

Each side runs in a process of its own, with the same threads, batch and dtype. PyTorch is the DeepseekV3 of
`transformers`, in the settings that can win: with each way to run the experts, with malloc as it is or keeping what it
has, eager or compiled. Ours keeps matrix products or all of a layer for the backward pass, and has malloc keep what it
has, as `dsvl2 train` does. Short trials choose each side's quickest setting; then the sides step in turns.

The adapter is LoRA for attention, on PyTorch's side by the `peft` package.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dsvl2_jax.apps.bench.measure import machine, need_at_least, need_torch, own_bytes, restart_peak
from dsvl2_jax.apps.bench.side import Answers, Side
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.runtime.malloc import give_freed_memory_back

# Keys of `LanguageConfig` and of transformers' DeepseekV3Config alike. Routing as base's, sizes in its proportions.
LANGUAGE = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "max_position_embeddings": 4096,
}
THREADS = 2
WARM_UP = 2  # steps; the first compiles
TRIAL_STEPS = 2
LEARNING_RATE = 1e-4
RANK, ALPHA = 16, 32.0  # of the adapter

# glibc gives large arrays back to the system at once, and every step then waits for the same pages anew. This keeps
# them: quicker, with a higher peak. PyTorch's guide to CPU tuning advises an allocator that does so.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one side runs."""

    side: str  # ours or torch
    experts: str = ""  # PyTorch: which of transformers' ways to run the routed experts
    compiled: bool = False  # PyTorch
    remat: str = ""  # ours: compute.remat
    scan: bool = False  # ours: compute.scan_layers
    keep_memory: bool = False  # PyTorch; ours always does, as `keep_freed_memory` has it
    adapter: bool = False  # which alone is trained then

    def __str__(self) -> str:
        ours = f"remat {self.remat}, layers in a {'scan' if self.scan else 'loop'}"
        how = ours if self.remat else "compiled" if self.compiled else "eager"
        experts = [f"experts {self.experts}"] * bool(self.experts)
        return ", ".join([self.side, how, *experts, *["malloc keeps memory"] * self.keep_memory])


# batched_mm is left out: it copies its expert's weights for every token, 13 GB a layer at this size.
TORCH_EAGER = [
    Setting("torch", experts, keep_memory=keep) for experts in ("eager", "grouped_mm") for keep in (False, True)
]
OURS = [Setting("ours", remat="dots", scan=True), Setting("ours", remat="none")]


@dataclasses.dataclass
class Measured:
    """One side's figures. Memory is resident, in GiB."""

    setting: Setting
    parameters: int
    loss: float  # of the first step
    base: float  # before the model was made, libraries loaded
    seconds: list[float] = dataclasses.field(default_factory=list)  # of every counted step
    peak: float = math.nan  # high-water mark of the process since the warm-up
    first_peak: float = math.nan  # until then, compilation included

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)

    @property
    def model_peak(self) -> float:
        """What model, optimizer and step took at most."""
        return self.peak - self.base


@dataclasses.dataclass(frozen=True)
class TrainBench:
    """Both sides' figures, and the trial of every PyTorch setting (or why it failed)."""

    rows: int
    length: int
    ours: Measured
    torch: Measured
    trials: dict[Setting, Measured | str]

    def speed(self, side: Measured) -> float:
        """Tokens per second."""
        return self.rows * self.length / side.step


def bench_train(
    *, rows: int = 2, length: int = 1024, steps: int = 3, rounds: int = 3, adapter: bool = False
) -> TrainBench:
    """Measures a training step of both sides and prints a table.

    A step is: forward and backward of ``rows`` × ``length`` random tokens, all supervised; clipping; AdamW; float32.

    Args:
      rows: sequences of the batch.
      length: tokens of a sequence.
      steps: counted steps of a side in a round.
      rounds: how often the sides take turns.
      adapter: train an adapter on the frozen model.

    Raises:
      UsageError: a number is too small, or torch, transformers or for an adapter peft is not installed.
      DSVL2Error: a side's process failed, or its loss is not finite.
    """
    for name, value, least in (("rows", rows, 1), ("length", length, 2), ("steps", steps, 1), ("rounds", rounds, 1)):
        need_at_least(f"--{name}", value, least)
    need_torch("bench train", *["peft"] * adapter)
    what = f"an adapter of rank {RANK}, " if adapter else ""
    print(f"{machine()}\n{what}{rows} × {length} tokens, float32, {THREADS} threads; trials:", flush=True)
    trials: dict[Setting, Measured | str] = {}

    def quickest(settings: list[Setting]) -> Setting:
        settings = [dataclasses.replace(setting, adapter=adapter) for setting in settings]
        trials.update((setting, _trial(setting, rows, length, TRIAL_STEPS)) for setting in settings)
        if not (done := _done(trials, settings[0].side)):
            raise DSVL2Error(f"no setting of {settings[0].side} runs; the reasons are above.")
        return min(done, key=lambda trial: trial.step).setting

    torch_setting = quickest([dataclasses.replace(quickest(TORCH_EAGER), compiled=True)])
    our_setting = quickest(OURS)
    with _Worker(torch_setting, rows, length) as theirs, _Worker(our_setting, rows, length) as ours:
        trained = theirs.measured.parameters, ours.measured.parameters
        if adapter and trained[0] != trained[1]:
            raise DSVL2Error(f"PyTorch trains {trained[0]} parameters and ours {trained[1]}: no two sides of one work.")
        for turn in range(rounds):
            for worker in (theirs, ours):
                worker.run(steps)
            print(f"  round {turn + 1}: PyTorch {theirs.last():.2f} s, ours {ours.last():.2f} s a step", flush=True)
        result = TrainBench(rows, length, ours.measured, theirs.measured, trials)
    _print(result)
    return result


def _done(trials: Mapping[Setting, Measured | str], side: str) -> list[Measured]:
    """Of a side's trials those that ran."""
    return [trial for trial in trials.values() if isinstance(trial, Measured) and trial.setting.side == side]


def _trial(setting: Setting, rows: int, length: int, steps: int) -> Measured | str:
    try:
        with _Worker(setting, rows, length) as worker:
            worker.run(steps)
    except DSVL2Error as error:
        print(f"  {setting!s:52} fails: {error}", flush=True)
        return str(error)
    measured = worker.measured
    print(f"  {setting!s:52} {measured.step:6.2f} s a step, peak {measured.model_peak:.2f} GiB", flush=True)
    return measured


def _print(result: TrainBench) -> None:
    ours, theirs = result.ours, result.torch
    for side in (theirs, ours):
        print(f"{side.setting}; {side.parameters / 1e6:.1f} M trained parameters")
    packages = ("transformers", "torch", *["peft"] * ours.setting.adapter)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"PyTorch is DeepseekV3ForCausalLM of {versions}; both sides have the same configuration")
    print(f"{'':28}{'PyTorch':>10}{'ours':>10}{'ratio':>10}")
    table = [
        ("step, s", theirs.step, ours.step, theirs.step / ours.step),
        ("tokens/s", result.speed(theirs), result.speed(ours), result.speed(ours) / result.speed(theirs)),
        ("peak memory, GiB", theirs.model_peak, ours.model_peak, ours.model_peak / theirs.model_peak),
        ("peak of the process, GiB", theirs.peak, ours.peak, ours.peak / theirs.peak),
        ("… while it compiles", theirs.first_peak, ours.first_peak, ours.first_peak / theirs.first_peak),
    ]
    for name, *values in table:
        print(f"{name:28}" + "".join(f"{value:10.2f}" for value in values))
    print(f"medians of {len(ours.seconds)} steps of each side, taken in turns; peak memory is without the libraries")
    least = min(_done(result.trials, "ours"), key=lambda trial: trial.model_peak)
    print(f"least memory of ours: {least.model_peak:.2f} GiB at {least.step:.2f} s a step, {least.setting}")


class _Worker(Side):
    """A side in its own process, which steps when told. As a context manager, it ends with the block."""

    def __init__(self, setting: Setting, rows: int, length: int):
        environment = {"OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
        if setting.keep_memory:
            environment |= KEEP_MEMORY
        job = {"setting": dataclasses.asdict(setting), "rows": rows, "length": length}
        super().__init__("dsvl2_jax.apps.bench.train", job, f"{setting.side} ({setting})", environment)
        self.setting = setting

    def __enter__(self) -> _Worker:
        try:
            self.measured = Measured(self.setting, **self.answer())
            if not math.isfinite(self.measured.loss):
                raise DSVL2Error(f"{self.name}: the first loss is {self.measured.loss}.")
        except BaseException:
            self.__exit__()
            raise
        return self

    def run(self, steps: int) -> None:
        """Takes ``steps`` steps and adds their times."""
        answer = self.ask(steps)
        self.measured.seconds += answer["seconds"]
        self.measured.peak = answer["peak"]
        self._steps = steps

    def last(self) -> float:
        """Median step time of the latest turn."""
        return statistics.median(self.measured.seconds[-self._steps :])


def _work(job: dict[str, Any]) -> None:
    """The process of one side: makes its model, warms up, and steps as often as standard input says."""
    answers = Answers()
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    setting = Setting(**job["setting"])
    ids = np.random.default_rng(0).integers(0, LANGUAGE["vocab_size"], (job["rows"], job["length"]))
    make = _ours if setting.side == "ours" else _torch
    step, parameters, base = make(ids.astype(np.int32), setting)
    loss, *_ = [step() for _ in range(WARM_UP)]
    if setting.side == "ours":
        give_freed_memory_back(always=True)  # as `dsvl2 train` does
    first_peak = own_bytes("VmHWM") / 2**30
    restart_peak()
    answers.give({"parameters": parameters, "loss": loss, "base": base, "first_peak": first_peak})
    for steps in answers.questions():
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        answers.give({"seconds": seconds, "peak": own_bytes("VmHWM") / 2**30})


def _torch(ids: np.ndarray, setting: Setting) -> tuple[Callable[[], float], int, float]:
    """PyTorch's step (which returns the loss), parameters, and memory before the model was made."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    batch = torch.from_numpy(ids.astype(np.int64))
    base = own_bytes("VmRSS") / 2**30
    config = transformers.DeepseekV3Config(
        **LANGUAGE, attn_implementation="sdpa", experts_implementation=setting.experts, use_cache=False
    )
    model = transformers.DeepseekV3ForCausalLM(config).train()
    if setting.adapter:
        import peft

        # peft takes names of MLPs for those of the routed experts, which are no modules in transformers 5.
        targets = r".*\.(q_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if setting.compiled else model

    def step() -> float:
        loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, sum(p.numel() for p in trained), base


def _ours(ids: np.ndarray, setting: Setting) -> tuple[Callable[[], float], int, float]:
    """The step of `LanguageTrainer` (it returns the loss), trained parameters, and memory before the model was made."""
    import jax

    from dsvl2_jax.model import deepseek_vl2 as model
    from dsvl2_jax.model.config import TEXT_POSITION, Config
    from dsvl2_jax.runtime.malloc import keep_freed_memory
    from dsvl2_jax.train.data.batch import TrainBatch
    from dsvl2_jax.train.objectives.adapter import AdapterTrainer
    from dsvl2_jax.train.objectives.language import LanguageTrainer
    from dsvl2_jax.train.settings.schema import (
        AdapterStage,
        BatchSettings,
        ComputeSettings,
        DataSettings,
        OptimizerSettings,
        ParameterRule,
        Settings,
        StageSettings,
    )

    # The smallest possible vision encoder: it is neither trained nor run.
    config = Config.from_dict(
        {
            "language_config": LANGUAGE | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
            "vision_config": {"image_size": 28, "patch_size": 14, "width": 16, "layers": 1, "heads": 1},
            "projector_config": {"input_dim": 16, "n_embed": LANGUAGE["hidden_size"]},
            "tile_tag": "2D",
        }
    )
    rows, length = ids.shape
    rules = (
        ParameterRule("/correction_bias$", train=False),
        ParameterRule("^language/"),
        ParameterRule("", train=False),
    )
    settings = Settings(
        data=DataSettings(sequence_length=length, tiles_per_sequence=0, max_segments=1),
        batch=BatchSettings(sequences=rows, microbatch_size=rows),
        stage=StageSettings(() if setting.adapter else rules, balance_loss_weight=0.0),
        adapter=AdapterStage("lora", RANK, ALPHA, targets=("/self_attn/",)) if setting.adapter else AdapterStage(),
        optimizer=OptimizerSettings(learning_rate=LEARNING_RATE),
        compute=ComputeSettings(dtype="float32", remat=setting.remat, scan_layers=setting.scan, loss_chunk=256),
    )
    batch = TrainBatch(
        ids=ids[None],
        labels=ids[None],
        image_index=np.full((1, rows, length), TEXT_POSITION, np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (1, rows, length)),
        segments=np.ones((1, rows, length), np.int32),
        with_images=np.zeros((1, rows, length), bool),
        tiles=np.zeros((1, 0, 28, 28, 3), np.uint8),
    )
    keep_freed_memory()
    base = own_bytes("VmRSS") / 2**30
    half = np.full(3, 0.5, np.float32)
    trainer = (AdapterTrainer if setting.adapter else LanguageTrainer)(config, settings, half, half, None)
    state = trainer.init(trainer.begin(model.init_params(config, jax.random.key(0))))

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return step, sum(leaf.size for leaf in state.trained.values()), base


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
