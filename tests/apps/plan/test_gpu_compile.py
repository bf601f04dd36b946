"""Programs compiled for GPUs that are not here: they fit, and hold neither dense expert products nor whole scores.

`make test-gpu-compile` installs what this needs (4 GB, in an environment of its own) and runs all of it; without the
CUDA plugin it is skipped. The whole models are marked ``gpu``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding

from dsvl2_jax.apps.plan import planner
from dsvl2_jax.apps.plan.hlo_text import buffers
from dsvl2_jax.apps.plan.hlo_walk import walk
from dsvl2_jax.apps.plan.inference_step import abstract_parameters, lower_inference
from dsvl2_jax.apps.plan.job import Job, parse_job
from dsvl2_jax.apps.plan.launches import count_launches, count_thunks
from dsvl2_jax.apps.plan.least_work import decode_work
from dsvl2_jax.infer.slots import decode_group, init_slots
from dsvl2_jax.kernels import gpu_grouped_matmul, hopper_attention, hopper_grouped_matmul
from dsvl2_jax.kernels.block_sizes import SHARED_MEMORY, HopperProduct, TritonProduct
from dsvl2_jax.kernels.gpu_attention import attention_backward, attention_forward
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves
from dsvl2_jax.model.quantization import Quantization, quantized_weights
from dsvl2_jax.model.released import released_config
from dsvl2_jax.runtime.hardware import compile_devices, topology
from dsvl2_jax.sharding import batch_parts, make_mesh

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the GPU compiler: make test-gpu-compile, or pip install -e '.[cuda]'",
)
GB = 1e9


def compiled(function: Callable, *shapes: tuple, dtype: Any = jnp.bfloat16) -> jax.stages.Compiled:
    """For one H100. ``shapes``: shape, or (shape, dtype)."""
    (device,) = compile_devices(topology("h100-1"))
    place = SingleDeviceSharding(device)

    def argument(shape: tuple) -> jax.ShapeDtypeStruct:
        shape, kind = shape if isinstance(shape[0], tuple) else (shape, dtype)
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    return jax.jit(function).lower(*map(argument, shapes)).compile()


def dense_products(text: str, experts: int, rows: int) -> list[tuple[int, ...]]:
    """Buffers that hold every row for every expert."""

    def dense(shape: tuple[int, ...]) -> bool:
        apart = len(shape) > 2 and experts in shape and rows in shape
        return (apart or experts * rows in shape) and math.prod(shape) > 16 * experts * rows

    return [shape for _, shape, _ in buffers(text) if dense(shape)]


def whole_scores(text: str, length: int, heads: int) -> list[tuple[int, ...]]:
    """Buffers that hold each query's score of each key, for every head."""
    found = [shape for _, shape, _ in buffers(text) if shape.count(length) > 1]
    return [shape for shape in found if math.prod(shape) >= heads * length * length]


ROWS, INNER, WIDTH, EXPERTS = 4096, 2048, 1408, 64
SIZES = ((EXPERTS,), jnp.int32)


def test_grouped_products_take_no_memory_where_the_stock_ones_are_dense():
    stock = compiled(lax.ragged_dot, (ROWS, INNER), (EXPERTS, INNER, WIDTH), SIZES)
    assert dense_products(stock.as_text(), EXPERTS, ROWS)  # the check sees what it is there for
    assert stock.memory_analysis().temp_size_in_bytes > GB
    ours = compiled(gpu_grouped_matmul.gmm, (ROWS, INNER), (EXPERTS, INNER, WIDTH), SIZES)
    assert not dense_products(ours.as_text(), EXPERTS, ROWS)
    assert ours.memory_analysis().temp_size_in_bytes < 0.001 * GB
    assert walk(ours.as_text()).flops == 2.0 * ROWS * INNER * WIDTH


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_of_grouped_products_take_no_memory(dtype):
    weights = compiled(gpu_grouped_matmul.tgmm, (ROWS, INNER), (ROWS, WIDTH), SIZES, dtype=dtype)

    def rows(cotangent: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        return gpu_grouped_matmul.gmm(cotangent, weights, sizes, transposed=True)

    turned = compiled(rows, (ROWS, WIDTH), (EXPERTS, INNER, WIDTH), SIZES, dtype=dtype)
    for program in (weights, turned):
        assert program.memory_analysis().temp_size_in_bytes < 0.001 * GB
        assert not dense_products(program.as_text(), EXPERTS, ROWS)


@pytest.mark.parametrize(("length", "heads", "key", "value"), [(4096, 16, 192, 128), (729, 16, 80, 80)])
def test_attention_and_its_gradients_hold_no_scores(length, heads, key, value):
    causal, places = length == 4096, ((1, length), jnp.int32)
    q, v, lse = (1, length, heads, key), (1, length, heads, value), ((1, heads, length), jnp.float32)
    forward = compiled(lambda *a: attention_forward(*a, 0.1, causal), q, q, v, places)
    backward = compiled(lambda *a: attention_backward(*a, 0.1, causal), q, q, v, places, places, v, lse, v)
    for program in (forward, backward):
        assert not whole_scores(program.as_text(), length, heads)
        assert program.memory_analysis().temp_size_in_bytes < 0.001 * GB
    pairs = heads * (length * (length + 1) / 2 if causal else length * length)
    assert walk(forward.as_text()).flops == 2 * pairs * (key + value)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_for_hopper(transposed):
    blocks, x = HopperProduct(2, 256, 3), (ROWS, WIDTH if transposed else INNER)
    program = compiled(
        lambda *a: hopper_grouped_matmul.gmm(*a, blocks=blocks, transposed=transposed),
        x,
        (EXPERTS, INNER, WIDTH),
        SIZES,
    )
    assert "mosaic_gpu" in program.as_text() and not dense_products(program.as_text(), EXPERTS, ROWS)
    assert walk(program.as_text()).flops == 2.0 * ROWS * INNER * WIDTH
    gradient = compiled(lambda *a: hopper_grouped_matmul.tgmm(*a, blocks=blocks), (ROWS, INNER), (ROWS, WIDTH), SIZES)
    assert walk(gradient.as_text()).flops == 2.0 * ROWS * INNER * WIDTH


@pytest.mark.parametrize(
    ("length", "heads", "key", "value"), [(4096, 16, 192, 128), (1024, 10, 128, 128), (729, 16, 80, 80)]
)
def test_attention_for_hopper(length, heads, key, value):
    causal, q = length != 729, (1, length, heads, key)
    program = compiled(
        lambda *a: hopper_attention.attention_forward(*a, 0.1, causal),
        q, q, (1, length, heads, value), ((1, length), jnp.int32),
    )  # fmt: skip
    assert "mosaic_gpu" in program.as_text() and not whole_scores(program.as_text(), length, heads)
    pairs = heads * (length * (length + 1) / 2 if causal else length * length)
    assert walk(program.as_text()).flops == 2 * pairs * (key + value)


def test_block_sizes_say_what_the_compiler_asks_for():
    """More than fits is refused in the compiler's words, and by us before."""
    for blocks in (TritonProduct(128, stages=7), TritonProduct(128, stages=8)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_grouped_matmul, "fits_shared_memory", lambda *_: None)
            fits, problem = blocks.shared_memory() <= SHARED_MEMORY, None
            try:
                compiled(
                    lambda *a, b=blocks: gpu_grouped_matmul.gmm(*a, blocks=b),
                    (ROWS, INNER),
                    (8, INNER, WIDTH),
                    ((8,), jnp.int32),
                )
            except jax.errors.JaxRuntimeError as error:
                problem = str(error)
            assert fits == (problem is None)
            assert fits or f"requested {blocks.shared_memory()}" in problem
    with pytest.raises(ValueError, match="shared memory"):
        jax.eval_shape(
            lambda *a: gpu_grouped_matmul.gmm(*a, blocks=TritonProduct(128, stages=8)),
            *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 64), (8, 64, 64))),
            jax.ShapeDtypeStruct((8,), jnp.int32),
        )


def test_library_attention_is_counted():
    """cuDNN's, on a program of our own: none of the model's uses it."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    shape = (2, 1024, 4, 64)
    assert walk(compiled(attend, shape, shape, shape).as_text()).flops == 2.0 * 2 * 4 * 1024 * 1024 * 128 / 2


def checked(monkeypatch: pytest.MonkeyPatch, config: Config, job: Job, place: str, most: float) -> dict[str, Any]:
    """Plans a job, and looks at its program. ``most``: bytes of temporaries, beside weights and gradients."""
    texts: list[str] = []

    def keep(text: str, *arguments: Any, **named: Any) -> Any:
        texts.append(text)
        return walk(text, *arguments, **named)

    monkeypatch.setattr(planner, "walk", keep)
    found = planner.plan(config, job, topology(place))
    assert found["compiled"], found.get("problem", found)
    assert not found["unknown_loops"] or found["mesh"]["expert"] > 1  # the experts' shares: as many as routing asks for
    taken = found["bytes_per_device"]
    sizes, language = found["mesh"], config.language
    shards = batch_parts(sizes)
    gradients = 0.0
    if job.settings is not None:
        # What must be there and is no argument of a training step are its gradients, in float32. Where they are summed
        # over several sequences, one's own and the weights, in the dtype of computation, take as much again.
        gradients = max(0.0, found["resident_bytes"] - taken["arguments"])
        gradients *= 2 if job.batch > job.settings.batch.microbatch_size * shards else 1
    assert taken["temporaries"] - gradients <= most
    if job.kind == "encode":
        assert not whole_scores(texts[0], config.vision.patches, 1)
        return found
    at_a_time = job.batch // shards if job.settings is None else job.settings.batch.microbatch_size
    tokens = max(1, at_a_time) * (1 if job.kind == "decode" else job.sequence)
    experts = language.n_routed_experts // sizes["expert"]
    assert not dense_products(texts[0], experts, tokens * language.num_experts_per_tok)
    # Of two heads at least: base's 32 heads are 4,096 numbers wide, and so is a row of their results.
    assert not whole_scores(texts[0], job.sequence, 2)
    return found


def shallow(size: str, layers: int = 2) -> Config:
    """A released model's first layers, of which one is dense, and one of the encoder's."""
    config = Config.from_dict(released_config(size))
    language = dataclasses.replace(config.language, num_hidden_layers=layers)
    return dataclasses.replace(config, language=language, vision=dataclasses.replace(config.vision, layers=1))


# Lengths and slots, and slots times experts, are no width of a model here, so that shapes tell what is what.
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("kind", ["prefill", "decode", "encode", "sft"])
def test_layers_compile_for_an_h100(monkeypatch, size, kind):
    batch = {"prefill": 1, "decode": 16, "encode": 4, "sft": 1}[kind]
    job = parse_job(kind, batch, None if kind == "encode" else 2176, None, model=size)
    found = checked(monkeypatch, shallow(size), job, "h100-1", 2 * GB)
    assert found["fits"] and 0.9 <= found["flops_ratio"] <= 1.5


WHOLE = [
    *(("h100-1", size, kind) for size in ("tiny", "small") for kind in ("prefill", "decode", "encode", "sft")),
    *(("h100-8", size, kind) for size in ("tiny", "small", "base") for kind in ("prefill", "decode", "encode", "sft")),
]


def converted_weights(text: str, config: Config, quantization: Quantization) -> set[int]:
    """How many floating-point numbers arrays have that are as large as a quantized weight, or one expert's."""
    sizes = set()
    for path in quantized_weights(config, quantization):
        shape = abstract_leaves(config)[path][0]
        sizes |= {math.prod(shape), math.prod(shape[1:])} if "experts" in path else {math.prod(shape)}
    return {math.prod(shape) for _, shape, dtype in buffers(text) if dtype in ("f32", "f16", "bf16")} & sizes


# Kernels that a dense layer and one of experts launch, and what a step launches beside its layers.
LAUNCHES = {"tiny": (6, 9), "small": (7, 10), "base": (7, 10)}
AROUND = 26


@pytest.mark.parametrize("slots", [1, 16, 64])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_a_decode_step_is_few_launches_that_read_little_more_than_they_must(size, slots):
    config = shallow(size, layers=3)
    mesh = make_mesh(devices=compile_devices(topology("h100-1")))
    text = lower_inference("decode", config, mesh, batch=slots, sequence=2176).compile().as_text()
    found, (dense, moe) = count_launches(text, scope_depth=1), LAUNCHES[size]
    assert found.sorts == 0 and found.host_transfers == 0
    assert all(found.by_scope[f"layers_{i}"] <= (moe if i else dense) for i in range(3)), found.by_scope
    assert found.total <= dense + 2 * moe + AROUND
    cost, least = walk(text), decode_work(config, slots, 2176)
    assert cost.bytes <= 1.2 * least.bytes and 0.95 <= cost.flops / least.flops <= 1.05


@pytest.mark.parametrize(("size", "dense", "moe"), [("tiny", 13, 15), ("small", *LAUNCHES["small"])])
def test_a_decode_step_with_a_cache_in_int8_reads_half_of_it(size, dense, moe):
    """Latents take no launch more; heads are quantized by XLA, after the kernel that makes them."""
    config, slots = shallow(size, layers=3), 64
    mesh = make_mesh(devices=compile_devices(topology("h100-1")))
    sizes = {"batch": slots, "sequence": 2176, "cache_dtype": "int8"}
    text = lower_inference("decode", config, mesh, **sizes).compile().as_text()
    found = count_launches(text, scope_depth=1)
    assert all(found.by_scope[f"layers_{i}"] <= (moe if i else dense) for i in range(3)), found.by_scope
    assert walk(text).bytes <= 1.2 * decode_work(config, slots, 2176, cache_dtype="int8").bytes


@pytest.mark.parametrize(("size", "slots"), [("tiny", 1), ("small", 1), ("small", 24)])
@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_a_decode_step_reads_quantized_weights_as_they_lie(size, kind, slots):
    """In the launches of plain ones, without an array of floating-point numbers as large as one of the weights."""
    config, quantization = shallow(size, layers=2), Quantization(kind)
    mesh = make_mesh(devices=compile_devices(topology("h100-1")))
    job = {"batch": slots, "sequence": 2176, "quantization": quantization}
    text = lower_inference("decode", config, mesh, **job).compile().as_text()
    dense, moe = LAUNCHES[size]
    assert count_launches(text, scope_depth=1).total <= dense + moe + AROUND
    assert walk(text).bytes <= 1.1 * decode_work(config, slots, 2176, quantization=quantization).bytes
    assert not converted_weights(text, config, quantization)


def test_prefill_reads_quantized_weights_as_they_lie():
    config, quantization = shallow("tiny"), Quantization("int4")
    mesh = make_mesh(devices=compile_devices(topology("h100-1")))
    job = {"batch": 1, "sequence": 2176, "quantization": quantization}
    text = lower_inference("prefill", config, mesh, **job).compile().as_text()
    assert not converted_weights(text, config, quantization)


def test_a_step_of_the_decode_loop_is_one_command_buffer(tmp_path):
    """The loop itself is not captured by default; its condition is the one thing of a step that the host waits for."""
    config, (device,) = shallow("tiny"), compile_devices(topology("h100-1"))
    mesh = make_mesh(devices=[device])
    place = SingleDeviceSharding(device)

    def here(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    state = here(jax.eval_shape(lambda: init_slots(config, 4, 1024, jnp.bfloat16)))
    budget = here(jax.ShapeDtypeStruct((4,), jnp.int32))
    function = jax.jit(
        decode_group, static_argnames=("config", "eos", "cache_length", "top", "greedy"), donate_argnames="state"
    )
    static = {"eos": 1, "cache_length": 1024, "top": False, "greedy": True}
    params = here(abstract_parameters(config, mesh, jnp.bfloat16))
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    program = function.lower(params, config, state, budget, None, **static).compile(compiler_options=options)
    (written,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    found = count_thunks(written.read_text())
    assert found.command_buffers <= 2 and found.conditionals == 0  # what begins the loop, and the loop's body
    assert found.captured >= found.launches - 6
    assert count_launches(program.as_text()).host_transfers == 1
    assert program.memory_analysis().temp_size_in_bytes < 0.01 * GB  # no copy of the cache


@pytest.mark.gpu
@pytest.mark.parametrize(("place", "size", "kind"), WHOLE)
def test_whole_models_compile_and_fit(monkeypatch, place, size, kind):
    config = Config.from_dict(released_config(size))
    batch, length = {"decode": (72, 3968), "encode": (32, None)}.get(kind, (None, 3968))
    job = parse_job(kind, batch, length, None, model=size)
    found = checked(monkeypatch, config, job, place, 20 * GB)  # layers are gathered whole, and so are their gradients
    too_large = place == "h100-1" and size == "small" and kind == "sft"  # 258 GB of state
    assert found["fits"] != too_large


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_adapter_of_base_is_trained_on_one_card(monkeypatch, kind):
    config = Config.from_dict(released_config("base"))
    job = parse_job("lora", 1, 4096, None, model="base", quantization=Quantization(kind))
    assert checked(monkeypatch, config, job, "h100-1", 20 * GB)["fits"]
