"""Adapters read and written against the `peft` package, on the PyTorch modules of `transformers`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

import dsvl2_jax
from dsvl2_jax.checkpoint import adapters, rules
from dsvl2_jax.checkpoint.adapters import AdapterSettings, read_adapter, write_adapter
from dsvl2_jax.checkpoint.apply_adapter import with_adapter
from dsvl2_jax.model.decoder import decoder, hidden_states

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file as load_torch_file  # noqa: E402
from torch_oracle import CASES, causal_lm, config, filled, released_names  # noqa: E402

TOLERANCE = 1e-5  # of the largest logit
IDS = np.random.default_rng(0).integers(0, 96, (2, 13))


class Experts(torch.nn.Module):
    """Routed experts with modules of their own, as the released code has them, and transformers 4."""

    def __init__(self, fused):
        super().__init__()
        count, width = fused.gate_up_proj.shape[0], fused.down_proj.shape[-1]
        for e in range(count):
            gate, up = fused.gate_up_proj[e].split(width)
            expert = torch.nn.Module()
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", fused.down_proj[e])):
                linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
                linear.weight.data = weight.detach().clone()
                expert.add_module(name, linear)
            self.add_module(str(e), expert)

    def forward(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        for e, expert in self.named_children():
            weight = (weights * (index == int(e))).sum(-1, keepdim=True)
            x = torch.nn.functional.silu(expert.gate_proj(hidden)) * expert.up_proj(hidden)
            out = out + weight * expert.down_proj(x)
        return out


class Released(torch.nn.Module):
    """The language model under the names of a released checkpoint."""

    def __init__(self, language):
        super().__init__()
        self.language = language
        for layer in language.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts = Experts(layer.mlp.experts)

    def forward(self, input_ids):
        return self.language(input_ids=input_ids)


def base_params(theirs, fields):
    weights = {name: tensor.detach().numpy().copy() for name, tensor in theirs.state_dict().items()}
    return jax.tree.map(jnp.asarray, {"language": filled(config(**fields), released_names(weights), "language")})


def randomised(model):
    """With adapters that change much."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            if "magnitude" in name:
                parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
            else:
                parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def torch_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.numpy()


@functools.partial(jax.jit, static_argnums=1)
def logits(params, cfg):
    bound = decoder(params["language"], cfg)
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    return bound.logits(hidden_states(params["language"], cfg, bound.embed(IDS), positions)[0])


def assert_same_logits(directory, params, fields, model):
    cfg = config(**fields)
    found = logits(with_adapter(params, cfg, *read_adapter(directory, cfg)), cfg.language)
    expected = torch_logits(model)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    with model.disable_adapter():
        assert np.abs(torch_logits(model) - expected).max() > 0.1 * np.abs(expected).max()


MADE = {
    "target_modules": "all-linear",
    "use_rslora": True,
    "r": 2,
    "lora_alpha": 3,
    "rank_pattern": {"o_proj": 4, r"experts\.[2-4]\.up_proj": 1, "layers.0.self_attn.kv_b_proj": 3},
    "alpha_pattern": {r"experts\.3\.up_proj": 7, "mlp.down_proj": 1},
    "modules_to_save": ["lm_head", "input_layernorm"],
    "bias": "all",
}


def test_an_adapter_made_by_peft_gives_the_same_logits(tmp_path):
    """Ranks and factors that differ, even between experts; whole weights and biases; from either kind of file."""
    family, fields = CASES["V2, query latent, biases"]
    theirs = causal_lm(family, **fields)
    params = base_params(theirs, fields)
    model = randomised(peft.get_peft_model(Released(theirs), peft.LoraConfig(**MADE)))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or name.endswith(".bias"):
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, params, fields, model)
    assert read_adapter(tmp_path, config(**fields))[0]["language"]["lm_head"]["kernel"].ndim == 2  # a whole weight
    weights = tmp_path / adapters.WEIGHTS_NAME
    torch.save({name: torch.from_numpy(x) for name, x in load_file(weights).items()}, tmp_path / adapters.PICKLED_NAME)
    first = read_adapter(tmp_path, config(**fields))
    weights.unlink()
    jax.tree.map(np.testing.assert_array_equal, read_adapter(tmp_path, config(**fields))[0], first[0])


def test_an_adapter_of_transformers_own_experts_gives_the_same_logits(tmp_path):
    """All experts' A and B in one tensor each, and the names of a language model alone."""
    family, fields = CASES["V3, biases"]
    theirs = causal_lm(family, **fields)
    params = base_params(theirs, fields)
    options = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    model = randomised(peft.get_peft_model(theirs, options))
    model.save_pretrained(tmp_path)
    assert any("experts.base_layer.lora_A" in name for name in load_file(tmp_path / adapters.WEIGHTS_NAME))
    assert_same_logits(tmp_path, params, fields, model)


def test_an_adapter_made_by_peft_for_a_released_checkpoint_gives_the_same_logits(checkpoints, tmp_path):
    directory = checkpoints / "mini-small"
    fields = json.loads((directory / "config.json").read_text())["language_config"]
    theirs = Released(transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**fields)))
    stored = {}
    for file in directory.glob("*.safetensors"):
        stored |= {name: tensor for name, tensor in load_torch_file(file).items() if name.startswith("language.")}
    theirs.load_state_dict(stored)
    options = peft.LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"], use_dora=True, r=2)
    model = randomised(peft.get_peft_model(theirs.float(), options))
    model.save_pretrained(tmp_path)
    ours = dsvl2_jax.load(directory, adapter=tmp_path)
    inputs = ours.processor([{"role": "user", "content": "What is it?"}])
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(inputs.input_ids[None]).long()).logits.numpy()
    assert np.abs(ours.logits(inputs) - expected).max() <= TOLERANCE * np.abs(expected).max()


def random_adapter(cfg, settings, targets=lambda name: True):
    rng = np.random.default_rng(0)
    arrays = {
        path: {
            name: rng.normal(1 if name == "magnitude" else 0, 0.3, shape).astype(np.float32)
            for name, shape in adapters.array_shapes(leaf, settings.rank_of(leaf.name)).items()
            if name != "magnitude" or settings.kind == "dora"
        }
        for path, leaf in rules.linear_leaves(cfg).items()
        if path[0] == "language" and targets(leaf.name)
    }
    return unflatten_dict(arrays)


def test_peft_loads_what_is_written_here(tmp_path):
    """DoRA, rank-stabilized, with ranks and factors that differ."""
    settings = AdapterSettings(
        "dora",
        2,
        3,
        rslora=True,
        ranks={"language/layers_1/mlp/experts/up_proj": 4, "language/layers_0/self_attn/o_proj/kernel": 1},
        alphas={"language/layers_1/mlp/shared_experts/up_proj/kernel": 8.5},
    )
    family, fields = CASES["V3, biases"]
    theirs = causal_lm(family, **fields)
    params = base_params(theirs, fields)
    cfg = config(**fields)
    write_adapter(tmp_path / "adapter", cfg, random_adapter(cfg, settings), settings)
    model = peft.PeftModel.from_pretrained(Released(theirs), tmp_path / "adapter").eval()
    adapted = {name for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert len(adapted) == sum(".lora_A." in name for name in load_file(tmp_path / "adapter" / adapters.WEIGHTS_NAME))
    assert_same_logits(tmp_path / "adapter", params, fields, model)


def test_transformers_loads_what_is_written_here_into_its_own_experts(tmp_path):
    family, fields = CASES["V2"]
    theirs = causal_lm(family, **fields)
    params = base_params(theirs, fields)
    cfg, settings = config(**fields), AdapterSettings("lora", 2, 6)
    adapter = random_adapter(cfg, settings, lambda name: "/experts/" in name or "o_proj" in name)
    write_adapter(tmp_path / "adapter", cfg, adapter, settings)
    # The language model alone, whose names lack the first part.
    (tmp_path / "language").mkdir()
    tensors = load_file(tmp_path / "adapter" / adapters.WEIGHTS_NAME)
    tensors = {name.replace(".language.", "."): x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "language" / adapters.WEIGHTS_NAME, {"format": "pt"})
    document = json.loads((tmp_path / "adapter" / adapters.CONFIG_NAME).read_text())
    (tmp_path / "language" / adapters.CONFIG_NAME).write_text(json.dumps(document))
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "language").eval()
    assert_same_logits(tmp_path / "language", params, fields, model)
