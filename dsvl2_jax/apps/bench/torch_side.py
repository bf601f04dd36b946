"""The process of the PyTorch side of `dsvl2 bench model --against torch`; see `dsvl2_jax.apps.bench.side`.

It is asked to compare its outputs with ours on shared weights ("check"), and then to run a program some times ("run").

Tested in tests/apps/bench/test_model.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dsvl2_jax.apps.bench.model_jobs import random_ids, random_tiles
from dsvl2_jax.apps.bench.model_options import GROUPS, with_layers
from dsvl2_jax.apps.bench.side import Answers
from dsvl2_jax.apps.bench.torch_model import EXPERTS, Model, new_cache, quiet
from dsvl2_jax.apps.plan.command import config_of
from dsvl2_jax.infer.slots import GROUP
from dsvl2_jax.model.config import IGNORED_LABEL, Config

LEARNING_RATE = 1e-5


class TorchSide:
    """A model and its programs."""

    def __init__(self, config: Config, parts: set[str], device: str, dtype: torch.dtype, training: bool):
        self.config, self.device, self.dtype = config, device, dtype
        # Trained weights are float32 on both sides, and the products are in ``dtype``.
        torch.set_default_dtype(torch.float32 if training else dtype)
        with torch.device(device):
            self.model = Model(config, parts)
        torch.set_default_dtype(torch.float32)
        self.model.train(training)
        self._started: dict[str, tuple[Callable[[], None], Callable[[], Any]]] = {}

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        array = array.astype(np.int64) if array.dtype == np.int32 else array
        return torch.from_numpy(array).to(self.device)

    def program(self, job: str, sizes: dict[str, int]) -> tuple[Callable[[], None], Callable[[], Any]]:
        """What begins a series, and what runs once."""
        return getattr(self, f"_{job}")(**sizes)

    def _encode(self, tiles: int) -> tuple[Callable[[], None], Callable[[], Any]]:
        given = self.tensor(random_tiles(self.config, tiles))
        return lambda: None, torch.inference_mode()(lambda: {"features": self.model.encode(given)})

    def _prefill(self, tokens: int) -> tuple[Callable[[], None], Callable[[], Any]]:
        ids = self.tensor(random_ids(self.config, (1, tokens)))
        return lambda: None, torch.inference_mode()(lambda: {"logits": self.model.step(ids, new_cache(self.model))})

    def _decode(self, slots: int, context: int) -> tuple[Callable[[], None], Callable[[], Any]]:
        prompt = self.tensor(random_ids(self.config, (1, context)))[:, : context - GROUPS * GROUP]
        first = self.tensor(random_ids(self.config, (slots,), seed=1))[:, None]
        with torch.inference_mode():
            cache = new_cache(self.model)
            self.model.step(prompt, cache)
            cache.batch_repeat_interleave(slots)
        token = first

        def begin() -> None:
            nonlocal token
            if (more := cache.get_seq_length() - prompt.shape[1]) > 0:
                cache.crop(-more)
            token = first

        @torch.inference_mode()
        def group() -> dict[str, Any]:
            """As many steps as a group of ours has; on GPUs they are queued without waiting for each other."""
            nonlocal token
            tokens, logprobs = [], []
            for _ in range(GROUP):
                logits = self.model.step(token, cache)
                token = logits.argmax(-1, keepdim=True)
                tokens.append(token[:, 0])
                logprobs.append(logits.gather(1, token)[:, 0] - logits.logsumexp(-1))
            return {"tokens": torch.stack(tokens, 1), "logprobs": torch.stack(logprobs, 1)}

        return begin, group

    def _train(self, tokens: int, tiles: int) -> tuple[Callable[[], None], Callable[[], Any]]:
        image = min(tokens, tiles * self.config.tokens_per_tile)
        ids = random_ids(self.config, (1, tokens))
        labels = np.where(np.arange(tokens) < image, IGNORED_LABEL, ids).astype(np.int32)
        ids, labels = self.tensor(ids), self.tensor(labels)
        given = self.tensor(random_tiles(self.config, tiles)) if tiles else None
        model = self.model
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        low = self.dtype != torch.float32

        def step() -> dict[str, Any]:
            with torch.autocast(torch.device(self.device).type, self.dtype, enabled=low):
                loss = model.loss(ids, labels, given)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return {"loss": loss.detach(), "gradient_norm": norm}

        return lambda: None, step

    def settings(self, job: str) -> list[dict[str, Any]]:
        """Those that can win."""
        if job == "encode":
            return [{}]
        experts = [{"experts": name} for name in EXPERTS] if self.config.language.n_routed_experts else [{}]
        if job != "train":
            return experts
        kept = [setting | {"checkpointing": on} for setting in experts for on in (False, True)]
        return [*kept, {**kept[0], "compiled": True}]

    def apply(self, setting: dict[str, Any]) -> None:
        self.model.set_up(
            setting.get("experts"),
            checkpointing=setting.get("checkpointing", False),
            compiled=setting.get("compiled", False),
        )

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def series(self, begin: Callable[[], None], run: Callable[[], Any], runs: int) -> float:
        """Seconds of a run."""
        begin()
        self.wait()
        begun = time.perf_counter()
        for _ in range(runs):
            run()
        self.wait()
        return (time.perf_counter() - begun) / runs

    def quickest(self, job: str, sizes: dict[str, int]) -> dict[str, Any]:
        """Starts a program in its quickest setting, and says which it is."""
        tried: list[tuple[float, dict[str, Any]]] = []
        problems = []
        begin, run = self.program(job, sizes)
        for setting in self.settings(job):
            try:
                self.apply(setting)
                begin()
                self.check_finite(run())
                tried.append((self.series(begin, run, 1), setting))
            except (RuntimeError, NotImplementedError, ValueError) as error:  # out of memory; no kernel for a dtype
                problems.append(f"{_described(setting)}: {str(error).splitlines()[0]}")
        if not tried:
            raise RuntimeError(f"{job}: no setting runs: {'; '.join(problems)}")
        seconds, setting = min(tried, key=lambda trial: trial[0])
        self.apply(setting)
        self._started[_key(job, sizes)] = begin, run
        return {"setting": _described(setting), "seconds": seconds, "problems": problems}

    def run(self, job: str, sizes: dict[str, int], runs: int) -> float:
        begin, run = self._started[_key(job, sizes)]
        return self.series(begin, run, runs)

    @staticmethod
    def check_finite(outputs: dict[str, torch.Tensor]) -> None:
        for name, value in outputs.items():
            if not torch.isfinite(value.float()).all():
                raise RuntimeError(f"{name} is not finite")


def _key(job: str, sizes: dict[str, int]) -> str:
    return json.dumps([job, sizes])


def _described(setting: dict[str, Any]) -> str:
    words = [f"experts {setting['experts']}"] if "experts" in setting else []
    words += ["checkpointing"] * setting.get("checkpointing", False) + ["compiled"] * setting.get("compiled", False)
    return ", ".join(["sdpa", *words])


def check(job: dict[str, Any], folder: Path) -> dict[str, float]:
    """Runs the programs of ``folder/programs.json`` on the weights beside it; how far outputs are from ours.

    Distances are of the largest number; of tokens, the share that differs.
    """
    weights = load_file(folder / "weights.safetensors")
    found: dict[str, float] = {}
    for number, program in enumerate(json.loads((folder / "programs.json").read_text())):
        training = program["job"] == "train"
        parts = {"encode": {"vision"}, "train": {"vision", "language"}}.get(program["job"], {"language"})
        config = with_layers(config_of(job["model"]), program["layers"])
        side = TorchSide(config, parts, job["device"], torch.float32, training)
        side.model.load(weights)
        side.apply(side.settings(program["job"])[-1] | {"compiled": False})
        begin, run = side.program(program["job"], program["sizes"])
        begin()
        expected = np.load(folder / f"{number}.npz")
        outputs = {name: value.detach().float().cpu().numpy() for name, value in run().items()}
        for name, value in outputs.items():
            ours = expected[name]
            if name == "logprobs":  # later ones are of tokens that may differ
                value = value[:, : ours.shape[1]]
            distance = np.abs(value - ours).max() / np.abs(ours).max() if name != "tokens" else (value != ours).mean()
            found[f"{program['job']} {name}"] = float(distance)
        del side
    return found


def main(job: dict[str, Any]) -> None:
    answers = Answers()
    quiet()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    side: TorchSide | None = None
    answers.give({"torch": torch.__version__, "device": job["device"]})
    for question in answers.questions():
        try:
            if "check" in question:
                answers.give(check(job, Path(question["check"])))
                continue
            if side is None or side.model.training != (question["job"] == "train"):
                side = None  # before the next is made
                config = with_layers(config_of(job["model"]), job["layers"])
                training = question["job"] == "train"
                parts = {"vision", "language"} if training else set(job["parts"])
                side = TorchSide(config, parts, job["device"], getattr(torch, job["dtype"]), training)
                side.model.randomise()
            if "runs" in question:
                answers.give({"seconds": side.run(question["job"], question["sizes"], question["runs"])})
            else:
                answers.give(side.quickest(question["job"], question["sizes"]))
        except Exception as error:  # told to the side that asks
            answers.give({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
