"""Twenty training steps against PyTorch: transformers' decoders, autograd and torch.optim.AdamW, float32; of the whole
model, and of adapters by the `peft` package.

Ours is the real step: packed rows, two accumulation steps, scanned layers, rematerialisation, the head's loss in
chunks. Theirs runs one sample at a time.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from dsvl2_jax.checkpoint.locate import ADAPTER_NAME
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION
from dsvl2_jax.model.deepseek_vl2 import abstract_params
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
    RunSettings,
    Settings,
    StageSettings,
)

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch_oracle import LANGUAGE, V3, VISION, causal_lm, config, filled, released_names  # noqa: E402

STEPS = 20
LENGTH, TILE = 32, VISION["image_size"]
# Lengths of the samples of each row; two accumulation steps of two rows. The rest of a row is padding.
ROWS = [[[12, 9, 8], [32]], [[5, 20], [17, 3, 11]]]
BATCHES = 4  # taken in turns
BALANCE, SPEED, RATE, DECAY = 0.05, 0.01, 3e-3, 0.1
NO_DECAY = ("norm", "bias", "embed_tokens", "magnitude")

CASES = {
    "V2": ("DeepseekV2", {"topk_method": "greedy", "q_lora_rank": None, "routed_scaling_factor": 1.5}),
    "V3": ("DeepseekV3", V3 | {"q_lora_rank": None}),
}

Sample = tuple[np.ndarray, np.ndarray]  # ids, labels


def packed(rng: np.random.Generator) -> tuple[TrainBatch, list[Sample]]:
    """A batch of random tokens, of which some are supervised, and its samples."""
    shape = (len(ROWS), len(ROWS[0]), LENGTH)
    ids, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    labels = np.full(shape, IGNORED_LABEL, np.int32)
    samples = []
    for a, micro in enumerate(ROWS):
        for b, lengths in enumerate(micro):
            start = 0
            for number, length in enumerate(lengths, 1):
                place = (a, b, slice(start, start + length))
                ids[place] = rng.integers(0, LANGUAGE["vocab_size"], length)
                labels[place] = np.where(rng.random(length) < 0.7, ids[place], IGNORED_LABEL)
                positions[place], segments[place] = np.arange(length), number
                samples.append((ids[place], labels[place]))
                start += length
    text, no_tiles = np.full(shape, TEXT_POSITION, np.int32), np.zeros((len(ROWS), 0, TILE, TILE, 3), np.uint8)
    return TrainBatch(ids, labels, text, positions, segments, np.zeros(shape, bool), no_tiles), samples


def settings(*, has_bias: bool) -> Settings:
    rules = (
        *[ParameterRule("/correction_bias$", train=False)] * has_bias,
        ParameterRule(r"^language/(embed_tokens|.*/scale)$", decay=False),
        ParameterRule("^language/"),
        ParameterRule("", train=False),
    )
    return Settings(
        data=DataSettings(sequence_length=LENGTH, max_segments=3),
        batch=BatchSettings(sequences=4, microbatch_size=2),
        stage=StageSettings(rules, BALANCE, SPEED if has_bias else 0.0),
        optimizer=OptimizerSettings(learning_rate=RATE, schedule="step", weight_decay=DECAY),
        compute=ComputeSettings(dtype="float32", remat="full", loss_chunk=8),
        run=RunSettings(steps=STEPS),
    )


class TorchTrainer:
    """The same training in PyTorch, written straightforwardly."""

    def __init__(self, model, family: str, speed: float = SPEED):
        self.model, self.speed = model.train(), speed
        self.sigmoid = family == "DeepseekV3"
        self.gates = [layer.mlp.gate for layer in model.model.layers[1:]]
        self.routings = []
        for gate in self.gates:
            gate.register_forward_hook(lambda _, __, out: self.routings.append(out))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if any(n in name for n in NO_DECAY) is free], "weight_decay": decay}
            for free, decay in ((True, 0.0), (False, DECAY))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)

        def drops(step: int) -> float:
            return 10 ** (-0.5 * ((step >= STEPS / 2) + (step >= 3 * STEPS / 4)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, drops)

    def balance(self, routing) -> tuple:
        """The golden formula for one sample and layer, and how often each expert was chosen."""
        logits, _, chosen = routing
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        experts, tokens = scores.shape[-1], len(chosen)
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        return BALANCE * (counts * experts / (tokens * chosen.shape[-1]) * scores.mean(0)).sum(), counts

    def step(self, samples: list[Sample]) -> float:
        total, balance, supervised, load = 0.0, 0.0, 0, 0
        for ids, labels in samples:
            self.routings.clear()
            logits = self.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
            wanted = torch.from_numpy(labels.astype(np.int64))[1:]
            total += torch.nn.functional.cross_entropy(logits[:-1], wanted, ignore_index=-100, reduction="sum")
            supervised += int((wanted >= 0).sum())
            terms, counts = zip(*map(self.balance, self.routings), strict=True)
            balance += sum(terms) / len(samples)
            load += torch.stack(counts)
        loss = total / supervised
        (loss + balance).backward()
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.sigmoid:
            for gate, counts in zip(self.gates, load.float(), strict=True):
                gate.e_score_correction_bias += self.speed * torch.sign(counts.mean() - counts)
        self.load = load.numpy()
        return loss.item()


@pytest.mark.parametrize("case", CASES)
def test_twenty_adamw_steps_equal(case):
    family, fields = CASES[case]
    fields = fields | {"num_hidden_layers": 3}  # two MoE layers, so that they are scanned
    model = causal_lm(family, **fields)
    ours = config(**fields)
    weights = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    start = filled(ours, released_names(weights), "language")
    shapes, _ = abstract_params(ours)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes) | {"language": start}
    half = np.full(3, 0.5, np.float32)
    trainer = LanguageTrainer(ours, settings(has_bias=family == "DeepseekV3"), half, half, None)
    state = trainer.init(jax.tree.map(jax.numpy.asarray, params))
    theirs = TorchTrainer(model, family)

    rng = np.random.default_rng(0)
    batches = [packed(rng) for _ in range(BATCHES)]
    losses = []
    for i in range(STEPS):
        batch, samples = batches[i % BATCHES]
        expected = theirs.step(samples)
        state, metrics = trainer.step(state, batch)
        assert metrics.loss == pytest.approx(expected, rel=1e-4), f"step {i}"
        assert metrics.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3), f"step {i}"
        np.testing.assert_array_equal(metrics.load, theirs.load, err_msg=f"step {i}")
        losses.append(expected)
    assert np.mean(losses[-BATCHES:]) < 0.9 * np.mean(losses[:BATCHES])  # there was something to learn

    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = flatten_dict(filled(ours, released_names(weights), "language"))
    found, before = (flatten_dict(tree) for tree in (trainer.params(state)["language"], start))
    assert found.keys() == expected.keys()
    for path, want in expected.items():
        change = np.linalg.norm(want - before[path])
        assert change > 0, path
        assert np.linalg.norm(found[path] - want) <= 1e-3 * change, path


ADAPTERS = {
    "V2, LoRA": ("V2", AdapterStage("lora", rank=3, alpha=6.0)),
    "V3, DoRA": ("V3", AdapterStage("dora", rank=2, alpha=4.0, rslora=True)),
}


@pytest.mark.parametrize("case", ["V3, DoRA", pytest.param("V2, LoRA", marks=pytest.mark.exhaustive)])
def test_twenty_steps_of_an_adapter_equal_those_of_peft(case, tmp_path):
    peft = pytest.importorskip("peft")
    name, stage = ADAPTERS[case]
    family, fields = CASES[name]
    fields = fields | {"num_hidden_layers": 3}
    model = causal_lm(family, **fields)
    ours = config(**fields)
    weights = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    shapes, _ = abstract_params(ours)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params |= {"language": filled(ours, released_names(weights), "language")}

    chosen = settings(has_bias=False)
    chosen = dataclasses.replace(chosen, stage=StageSettings((), BALANCE), adapter=stage)
    half = np.full(3, 0.5, np.float32)
    trainer = AdapterTrainer(ours, chosen, half, half, None)
    state = trainer.init(trainer.begin(jax.tree.map(jax.numpy.asarray, params)))
    trainer.contents(state)[ADAPTER_NAME].write(tmp_path / "begun")
    released = torch.nn.Module()  # as a released model has its names
    released.language = model
    adapted = peft.PeftModel.from_pretrained(released, tmp_path / "begun", is_trainable=True)
    theirs = TorchTrainer(model, family, speed=0.0)

    rng = np.random.default_rng(0)
    batches = [packed(rng) for _ in range(BATCHES)]
    losses = []
    for i in range(STEPS):
        batch, samples = batches[i % BATCHES]
        expected = theirs.step(samples)
        state, metrics = trainer.step(state, batch)
        assert metrics.loss == pytest.approx(expected, rel=1e-4), f"step {i}"
        assert metrics.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3), f"step {i}"
        losses.append(expected)
    assert np.mean(losses[-BATCHES:]) < 0.99 * np.mean(losses[:BATCHES])  # there was something to learn

    trainer.contents(state)[ADAPTER_NAME].write(tmp_path / "ended")
    begun, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("begun", "ended"))
    expected = peft.get_peft_model_state_dict(adapted)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        change = np.linalg.norm(want - begun[name])
        assert change > 0, name
        assert np.linalg.norm(found[name] - want.numpy()) <= 1e-3 * change, name
