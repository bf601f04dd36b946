"""The planner: least work, choice of a mesh, and plans from the TPU compiler where it is installed."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.apps.plan import planner, saved_plans
from dsvl2_jax.apps.plan.command import config_of
from dsvl2_jax.apps.plan.job import Job, parse_job
from dsvl2_jax.apps.plan.least_work import decode_work, encode_work, prefill_work
from dsvl2_jax.apps.plan.mesh_choice import choose_mesh, meshes, resident_bytes
from dsvl2_jax.apps.plan.planner import mean_trip_count, plan
from dsvl2_jax.apps.plan.report import plan_lines
from dsvl2_jax.apps.plan.table import HEADER, TABLE_TOPOLOGIES, update_csv
from dsvl2_jax.apps.plan.training_step import abstract_batch, training_work
from dsvl2_jax.errors import UsageError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization, bytes_in_bfloat16, quantized_weights
from dsvl2_jax.model.released import released_config
from dsvl2_jax.runtime.hardware import CompilerMissing, target_config, topology
from dsvl2_jax.sharding import batch_parts, make_mesh
from dsvl2_jax.train.adapter import adapter_leaves
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.objectives.language import LanguageTrainer

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra")


@pytest.fixture(scope="module")
def released() -> dict[str, Config]:
    return {size: Config.from_dict(released_config(size)) for size in ("tiny", "small", "base")}


@pytest.mark.parametrize(("size", "activated"), [("tiny", 1.0), ("small", 2.8), ("base", 4.5)])
def test_a_token_costs_two_flops_an_activated_parameter(released, size, activated):
    """The paper's counts hold encoder and language model, and are rounded to 0.1 billion."""
    config = released[size]
    encoder = encode_work(config, 0).bytes / 2
    one = decode_work(config, 1, 0)
    assert (one.flops / 2 + encoder) / 1e9 == pytest.approx(activated, abs=0.1)


def test_decoding_reads_the_experts_that_are_visited_and_the_cache(released):
    config = released["base"]  # 72 experts of which a token visits 6, in 29 layers; 576 numbers a token in 30 layers
    expert = 3 * 2560 * 1536 * 2
    one, two, many, more = (decode_work(config, slots, 0).bytes for slots in (1, 2, 64, 65))
    assert two - one == 29 * 6 * expert + 2 * 2560
    assert more - many == 2 * 2560  # all experts are read anyway
    filled = decode_work(config, 64, 4096).bytes
    assert filled - many == 2 * 64 * 4096 * 576 * 30
    int8 = decode_work(config, 64, 4096, cache_dtype="int8").bytes
    assert int8 - many == (576 + 2 * 4) * 64 * 4096 * 30


def test_a_prompts_last_token_alone_has_logits(released):
    config = released["small"]
    one, two = (prefill_work(config, 1, length).flops for length in (1, 2))
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
        assert resident_bytes(config, job, sizes) <= 0.85 * place.memory and "with room" in reason
    alone = Job("encode", 8, 0)
    assert choose_mesh(released["tiny"], alone, topology("v5p-8"))[0] == {"data": 4, "tensor": 1, "expert": 1}
    sizes, reason = choose_mesh(config, Job("decode", 64, 4096), topology("v5e-1"))
    assert sizes == {"data": 1, "tensor": 1, "expert": 1} and "no mesh leaves room" in reason


def test_few_assignments_leave_devices_without_a_share(released):
    def turns(slots: int, **sizes: int) -> float:
        return mean_trip_count(
            released["base"], Job("decode", slots, 4096), {"data": 1, "tensor": 1, "expert": 1} | sizes
        )

    assert turns(1, expert=8) == 6 / 8  # six experts, one on each of eight devices at a time
    assert turns(2, data=2, expert=4) == 6 / (4 * 2)
    assert turns(4, expert=8) == turns(64, expert=16) == turns(1) == 1


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
    assert parse_job("chunk", None, 32768, None) == Job("chunk", 1, 32768)
    with pytest.raises(
        UsageError, match="--job 'serve': expected one of prefill, chunk, decode, encode, align, pretrain, sft"
    ):
        parse_job("serve", None, None, None)
    with pytest.raises(UsageError, match="--slots: found 0, expected a positive whole number"):
        parse_job("decode", None, None, 0)


def test_a_model_is_a_size_a_checkpoint_or_a_file(released, tmp_path):
    assert config_of("base") == released["base"]
    (tmp_path / "config.json").write_text(json.dumps(released_config("small")))
    assert config_of(str(tmp_path / "config.json")) == released["small"]
    assert config_of("micro").vision.image_size == 126


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e-9"], "topology 'v5e-9' is none of"),
        (["--topology", "h100-8", "--mesh", "data=3"], "mesh data=3, tensor=1, expert=1 needs 3 devices"),
        (["--topology", "h100-8", "--mesh", "rows=8"], "unknown axis 'rows'"),
        (["--mesh", "data=8"], "--mesh data=8 is of one topology"),
        (["--topology", "v5e-4", "--micro", "2"], "--micro and --set belong to training"),
        (["--topology", "v5e-4", "--job", "sft", "--batch", "3"], "3 sequences is no multiple of 1 at a time on each"),
        (["--topology", "v5e-4", "--job", "sft", "--set", "compute.remat=half"], "'half' is none of none, dots, full"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(capsys, flags, message):
    if "--batch" in flags:
        flags = [*flags, "--mesh", "data=4"]
    assert main(["plan", "tiny", *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_training_wants_a_model_with_presets(capsys):
    assert main(["plan", "config.json", "--topology", "v5e-4", "--job", "sft"]) != 0
    with pytest.raises(UsageError, match="there is no preset large-sft; models that have one are base, micro, small"):
        parse_job("sft", None, None, None, model="large")


def test_training_jobs_are_the_presets_with_what_was_asked_for():
    job = parse_job("pretrain", 128, 1024, None, model="small", micro=2, overrides=["compute.remat=dots"])
    assert (job.batch, job.sequence, job.unit) == (128, 1024, ("tokens", 128 * 1024))
    described = {"micro": 2, "tiles": 20, "remat": "dots", "dtype": "bfloat16", "optimizer_state": "float32"}
    assert job.described() == {"kind": "pretrain", "batch": 128, "sequence": 1024} | described
    assert parse_job("sft", None, None, None, model="base").described()["optimizer_state"] == "bfloat16"


def test_a_training_state_takes_16_bytes_an_entry_or_12(released):
    """Parameters, gradients and two moments; the presets say 54, 258 and 330 GB (configs/train)."""
    one = {"data": 1, "tensor": 1, "expert": 1}
    for size, gigabytes in (("tiny", 54), ("small", 258), ("base", 330)):
        job = parse_job("sft", None, None, None, model=size)
        whole = resident_bytes(released[size], job, one)
        assert whole / 1e9 == pytest.approx(gigabytes, rel=0.02)
        assert resident_bytes(released[size], job, one | {"data": 8}) == pytest.approx(whole / 8, rel=0.01)
    frozen = parse_job("align", None, None, None, model="small")  # a language model of 32 GB
    assert resident_bytes(released["small"], frozen, one) / 1e9 == pytest.approx(32 + 16 * 0.47, rel=0.05)


def test_an_adapter_takes_the_frozen_model_and_16_bytes_an_entry(released):
    one = {"data": 1, "tensor": 1, "expert": 1}
    for kind in (None, "int8", "int4"):
        quantization = kind and Quantization(kind)
        job = parse_job("lora", 1, None, None, model="base", quantization=quantization)
        entries = sum(math.prod(shape) for shape, _ in adapter_leaves(released["base"], job.settings.adapter).values())
        frozen = bytes_in_bfloat16(released["base"], quantized_weights(released["base"], quantization))
        assert resident_bytes(released["base"], job, one) == pytest.approx(frozen + 16 * entries)
    assert (
        job.described() | {"rank": 16, "adapter": "lora", "quantize": Quantization("int4").described()}
        == job.described()
    )
    with pytest.raises(UsageError, match="--quantize int4: belongs to inference and to --job lora"):
        parse_job("sft", None, None, None, model="base", quantization=Quantization("int4"))


def test_rematerialising_costs_one_forward_more(released):
    config = released["small"]
    none, full = (
        training_work(config, parse_job("sft", 1, 512, None, model="small", overrides=[how]).settings)
        for how in ("compute.remat=none", "compute.remat=full")
    )
    forward = prefill_work(config, 1, 512).flops + encode_work(config, 20).flops
    assert 1.3 <= full.flops / none.flops <= 4 / 3
    assert full.flops - none.flops == pytest.approx(forward, rel=0.05)  # without head and adaptor, which run once


def test_the_abstract_batch_is_what_the_trainer_places():
    config = config_of("micro")
    overrides = ["data.sequence_length=64", "data.tiles_per_sequence=3", "data.max_segments=4"]
    job = parse_job("sft", 16, None, None, model="micro", micro=2, overrides=overrides)
    mesh = make_mesh(data=2, tensor=2, expert=2)
    trainer = LanguageTrainer(config, job.settings, (0.5,) * 3, (0.5,) * 3, mesh)
    found = abstract_batch(config, job.settings, mesh)
    shards = batch_parts(dict(mesh.shape))
    steps, rows, side = 16 // (2 * shards), 2 * shards, config.vision.image_size
    ids = np.zeros((steps, rows, 64), np.int32)
    tiles = np.zeros((steps, rows * 3, side, side, 3), np.uint8)
    placed = trainer._place(TrainBatch(ids, ids, ids - 1, ids, ids, ids > 0, tiles))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), placed) == jax.tree.map(lambda x: (x.shape, x.dtype), found)
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), placed, found)
    assert all(jax.tree.leaves(same))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the tpu extra is installed")
def test_without_a_compiler_arithmetic_still_answers(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", "tiny", "--topology", "v5e-4"]) == 0
    text = capsys.readouterr().out
    assert "fits        yes, by arithmetic" in text and "pip install -e '.[tpu]'" in text
    assert main(["plan", "base", "--topology", "v5e-4", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["compiled"] is False and found["fits"] is False and found["resident_bytes"] > found["memory"]
    assert not list(tmp_path.rglob("*.json"))  # nothing to keep


def test_the_table_has_a_row_for_each_place_and_job(no_compiler, capsys):
    assert main(["plan", "tiny", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2 * len(TABLE_TOPOLOGIES) and {row["job"]["kind"] for row in rows} == {"prefill", "decode"}
    assert all(row["compiled"] is False and row["tokens_per_second"] > 0 for row in rows)
    assert main(["plan", "small", "--job", "sft"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == HEADER and len(printed) == 3 + len(TABLE_TOPOLOGIES)
    assert printed[-1] == "not compiled: no compiler here"
    (largest,) = (line for line in printed if line.startswith("h200-8"))
    (least,) = (line for line in printed if line.startswith("v5e-4 "))
    assert " yes " in largest and " no " in least


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    def missing(place):
        raise CompilerMissing(f"{place.name}: no compiler here")

    monkeypatch.setattr(planner, "compile_devices", missing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def csv_rows(file) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_csv_has_the_tables_of_all_models(no_compiler, capsys, tmp_path):
    file = tmp_path / "plan.csv"
    assert main(["plan", "small", "tiny", "--csv", str(file)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if " decode " in line or " prefill " in line]
    rows = csv_rows(file)
    assert len(rows) == 2 * 2 * len(TABLE_TOPOLOGIES) == len(printed) - 2  # without the two titles
    assert [row["model"] for row in rows] == ["tiny"] * (len(rows) // 2) + ["small"] * (len(rows) // 2)
    assert {(row["batch"], row["sequence"]) for row in rows if row["job"] == "decode"} == {("64", "4096")}
    largest = next(row for row in rows if (row["model"], row["topology"], row["job"]) == ("tiny", "h200-8", "decode"))
    (line,) = (line for line in printed[-2 * len(TABLE_TOPOLOGIES) :] if line.startswith("h200-8    decode"))
    for cell in (largest["mesh"], f"{largest['gb_per_device']} of {largest['gb_of_memory']}", largest["bound_by"]):
        assert cell in line
    assert f"{int(largest['per_second']):,} tokens/s" in line
    assert largest["compiled"] == "no" and largest["fits"] == "yes" and largest["flops_ratio"] == ""


def test_a_csv_keeps_other_rows_and_what_was_compiled_elsewhere(no_compiler, capsys, tmp_path):
    file = tmp_path / "plan.csv"
    assert main(["plan", "tiny", "--job", "encode", "--csv", str(file)]) == 0
    before = csv_rows(file)
    compiled = before[0] | {"compiled": "yes", "gb_per_device": "1.5", "flops_ratio": "1.02"}
    old = before[1] | {"gb_per_device": "99.9"}
    other = before[2] | {"model": "my/config.json"}
    update_csv(file, [compiled, old, other])
    assert main(["plan", "tiny", "--job", "encode", "--csv", str(file)]) == 0
    assert csv_rows(file) == [compiled, *before[1:], other]
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e-4"], "leave out --topology v5e-4"),
        (["--job", "sft"], "leave it out for --job sft"),
        (["--csv", "nowhere/plan.csv"], "the directory nowhere does not exist"),
        (["--csv", "other.csv"], "found columns 'a,b', expected 'model,topology,"),
    ],
)
def test_a_csv_is_refused_before_anything_is_planned(no_compiler, capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main(["plan", "tiny", *([] if "--csv" in flags else ["--csv", "plan.csv"]), *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["other.csv"]
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_several_models_are_planned_for_one_topology(no_compiler, capsys):
    assert main(["plan", "tiny", "base", "--topology", "v5e-4", "--json"]) == 1  # base does not fit
    plans = json.loads(capsys.readouterr().out)
    assert [(plan["model"], plan["fits"]) for plan in plans] == [("tiny", True), ("base", False)]


def test_a_copy_of_the_parameters_reads_them_for_its_own_rows(released):
    """Eight copies do not decode eight times as fast as the weights are read eight times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "compile_devices", lambda _: (_ for _ in ()).throw(CompilerMissing("none")))
        one = plan(released["small"], Job("decode", 8, 1), topology("h100-1"))
        eight = plan(released["small"], Job("decode", 64, 1), topology("h100-8"), {"data": 8, "tensor": 1, "expert": 1})
    assert eight["roofline_seconds"] == pytest.approx(one["roofline_seconds"])


def test_plans_are_kept_until_something_changes(released, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def fresh(config, job, place, sizes, say):
        made.append(job)
        return {"compiled": True, "fits": True, "number": len(made)}

    monkeypatch.setattr(saved_plans, "plan", fresh)

    def ask(job: Job, name: str = "v5e-4", sizes=None, **options):
        found = saved_plans.saved_plan(released["tiny"], job, topology(name), sizes, lambda _: None, **options)
        return found["number"], found["from_cache"]

    job = Job("decode", 8, 128)
    assert [ask(job), ask(job), ask(job, cache=False)] == [(1, False), (1, True), (2, False)]
    others = [
        ask(dataclasses.replace(job, batch=9)),
        ask(job, "v5e-8"),
        ask(job, sizes={"data": 1, "tensor": 4, "expert": 1}),
    ]
    assert others == [(3, False), (4, False), (5, False)]
    for file in tmp_path.rglob("*.json"):
        file.write_text("{broken")
    assert ask(job) == (6, False)
    monkeypatch.setattr(saved_plans, "_version", lambda name: "another")
    assert ask(job) == (7, False)
    assert not list(tmp_path.rglob("*.part"))


def test_an_h200_is_an_h100_with_more_memory():
    h100, h200 = (target_config(topology(f"{kind}-1")) for kind in ("h100", "h200"))
    assert "device_memory_size: 84942979072" in h100 and "device_memory_size: 150754820096" in h200
    assert '"NVIDIA H200"' in h200 and h200.count("memory_bandwidth: 4800000000000") == 1
    assert h100.count(":") == h200.count(":")


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
    assert any("fits        yes" in line for line in plan_lines({"model": "small"} | found))
    assert sum(scope["share"] for scope in found["scopes"]) == pytest.approx(1.0)
    assert sum(scope["bytes"] for scope in found["scopes"]) == pytest.approx(found["bytes"], rel=0.01)
    assert any("by named scope" in line for line in plan_lines({"model": "small"} | found, profile=True))
