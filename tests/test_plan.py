"""The planner: least work, choice of a mesh, and plans from the TPU compiler where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest

from dsvl2_jax.cli import main
from dsvl2_jax.config import Config
from dsvl2_jax.convert.sizes import released_config
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer import plan_work
from dsvl2_jax.infer.plan import Job, choose_mesh, meshes, parse_job, plan, resident_bytes
from dsvl2_jax.infer.plan_report import config_of, lines
from dsvl2_jax.infer.topologies import topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra")


@pytest.fixture(scope="module")
def released() -> dict[str, Config]:
    return {size: Config.from_dict(released_config(size)) for size in ("tiny", "small", "base")}


@pytest.mark.parametrize(("size", "activated"), [("tiny", 1.0), ("small", 2.8), ("base", 4.5)])
def test_a_token_costs_two_flops_an_activated_parameter(released, size, activated):
    """The paper's counts hold encoder and language model, and are rounded to 0.1 billion."""
    config = released[size]
    encoder = plan_work.encode_work(config, 0).bytes / 2
    one = plan_work.decode_work(config, 1, 0)
    assert (one.flops / 2 + encoder) / 1e9 == pytest.approx(activated, abs=0.1)


def test_decoding_reads_the_experts_that_are_visited_and_the_cache(released):
    config = released["base"]  # 72 experts of which a token visits 6, in 29 layers; 576 numbers a token in 30 layers
    expert = 3 * 2560 * 1536 * 2
    one, two, many, more = (plan_work.decode_work(config, slots, 0).bytes for slots in (1, 2, 64, 65))
    assert two - one == 29 * 6 * expert + 2 * 2560
    assert more - many == 2 * 2560  # all experts are read anyway
    filled = plan_work.decode_work(config, 64, 4096).bytes
    assert filled - many == 2 * 64 * 4096 * 576 * 30


def test_a_prompts_last_token_alone_has_logits(released):
    config = released["small"]
    one, two = (plan_work.prefill_work(config, 1, length).flops for length in (1, 2))
    head = 2.0 * 2048 * config.language.vocab_size
    step = two - one
    pairs = 2.0 * 16 * (192 + 128) * 27  # of one more pair; the second token sees two
    assert one - head + pairs == pytest.approx(step)


def test_meshes_are_all_ways_to_split_devices():
    found = list(meshes(8))
    assert len(found) == 10 and all(m["data"] * m["tensor"] * m["expert"] == 8 for m in found)
    assert found[0] == {"data": 8, "tensor": 1, "expert": 1}


def test_the_chosen_mesh_holds_parameters_and_cache_with_room(released):
    config = released["base"]
    for name, job in (("v5p-8", Job("decode", 64, 4096)), ("v5e-16", Job("decode", 64, 4096))):
        place = topology(name)
        sizes, reason = choose_mesh(config, job, place)
        assert resident_bytes(config, job, sizes) <= 0.85 * place.memory and "leave room" in reason
    alone = Job("encode", 8, 0)
    assert choose_mesh(released["tiny"], alone, topology("v5p-8"))[0] == {"data": 4, "tensor": 1, "expert": 1}
    sizes, reason = choose_mesh(config, Job("decode", 64, 4096), topology("v5e-1"))
    assert sizes == {"data": 1, "tensor": 1, "expert": 1} and "no mesh leaves room" in reason


def test_bytes_that_stay_are_those_of_parameters_and_cache(released):
    config = released["tiny"]
    sizes = {"data": 1, "tensor": 1, "expert": 1}
    weights = resident_bytes(config, Job("encode", 1, 0), sizes)
    assert weights == pytest.approx(2 * 3.37e9, rel=0.01)
    job = Job("decode", 16, 4096)
    assert resident_bytes(config, job, sizes) - weights == 2 * 16 * 4096 * 2560 * 12
    assert resident_bytes(config, job, sizes | {"data": 2}) - weights == 16 * 4096 * 2560 * 12


def test_jobs_have_usual_sizes_and_refuse_wrong_ones():
    assert parse_job("decode", None, None, None) == Job("decode", 64, 4096)
    assert parse_job("decode", None, 512, 4) == Job("decode", 4, 512)
    assert parse_job("prefill", 2, None, None) == Job("prefill", 2, 4096)
    assert parse_job("encode", None, 77, None) == Job("encode", 32, 0)
    with pytest.raises(UsageError, match="--job 'serve': expected one of prefill, decode, encode"):
        parse_job("serve", None, None, None)
    with pytest.raises(UsageError, match="--slots: found 0, expected a positive whole number"):
        parse_job("decode", None, None, 0)


def test_a_model_is_a_size_a_checkpoint_or_a_file(released, tmp_path):
    assert config_of("base") == released["base"]
    (tmp_path / "config.json").write_text(json.dumps(released_config("small")))
    assert config_of(str(tmp_path / "config.json")) == released["small"]
    assert config_of("micro").vision.image_size == 126


def test_wrong_calls_are_refused_in_one_line(capsys):
    assert main(["plan", "tiny", "--topology", "v5e-9"]) == 2
    assert "topology 'v5e-9' is none of" in capsys.readouterr().err
    assert main(["plan", "tiny", "--topology", "h100-8"]) == 2
    assert "compiling for GPUs is not there yet" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the tpu extra is installed")
def test_a_missing_compiler_is_named_with_what_to_install(capsys):
    assert main(["plan", "tiny", "--topology", "v5e-1"]) == 2
    assert "pip install -e '.[tpu]'" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize("job", [Job("encode", 8, 0), Job("prefill", 2, 512), Job("decode", 4, 512)])
def test_tpu_programs_cost_about_what_they_must(released, job):
    config = released["small"]
    config = dataclasses.replace(
        config,
        language=dataclasses.replace(config.language, num_hidden_layers=2),
        vision=dataclasses.replace(config.vision, layers=2),
    )
    found = plan(config, job, topology("v5e-1"))
    assert found["fits"] and found["mesh"] == {"data": 1, "tensor": 1, "expert": 1}
    assert found["collectives"] == {} and found["unknown_loops"] == []
    assert 0.95 <= found["flops_ratio"] <= 1.6 and found["bytes_ratio"] >= 0.9
    assert any("fits        yes" in line for line in lines({"model": "small"} | found))
