"""Shared test set-up: eight virtual CPU devices, quick compilation, and the golden data.

DSVL2_TEST_PLATFORM=cuda runs tests on a GPU instead, compiled as usual (`make test-gpu`).
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import quick_compilation

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cuda,cpu" if os.environ.get("DSVL2_TEST_PLATFORM") == "cuda" else "cpu"
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8 {quick_compilation.FLAGS}"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["HF_HUB_OFFLINE"] = "1"
# One compilation cache for this run: its workers share programs, and the user's own cache stays as it was.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dsvl2-test-xla-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis
import jax
import pytest

# How long an example takes says nothing on a shared machine.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The directory of golden files."""
    return DATA


@pytest.fixture(scope="session")
def checkpoints(data: Path) -> Path:
    """The directory of mini checkpoints in the released layout: mini-tiny, mini-small, mini-base, mini-small-f32."""
    return data / "checkpoints"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the run's compilation cache, once its workers are done."""
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if not hasattr(config, "workerinput") and cache.name.startswith("dsvl2-test-xla-"):
        shutil.rmtree(cache, ignore_errors=True)


# Quick files run first, so that a broken basis shows at once, and are all of `make test-fast`. Of the rest those that
# take longest begin first: at the end no worker waits long for the other one.
SLOW_FILES = (
    "test_golden",
    "train/test_run",
    "train/objectives/test_language",
    "apps/plan/test_planner_tpu",
    "runtime/test_processes",
    "infer/test_mesh",
    "train/objectives/test_adapter",
    "train/test_overfit",
    "train/objectives/test_contrastive",
    "apps/bench/test_serve",
    "infer/test_scheduler",
    "train/test_run_adapter",
    "apps/plan/test_planner",
    "model/test_gpu_decode",
    "apps/test_serve",
    "checkpoint/test_remote",
    "train/test_transformers",
    "apps/cli/test_main",
    "convert/test_quantize",
    "infer/serve/test_async_engine",
    "kernels/test_quantized",
    "test_docs",
    "train/objectives/test_regions",
    "convert/test_to_orbax",
    "infer/eval/test_client",
    "infer/test_cache_int8",
    "apps/bench/test_model",
    "model/test_deepseek_vl2",
    "infer/test_engine",
    "infer/test_speculation",
    "infer/test_adapters",
    "kernels/test_gpu",
    "train/test_loss",
    "kernels/test_grouped_matmul",
    "apps/micro/test_build",
    "infer/serve/test_endpoints",
    "train/test_sequence",
    "infer/eval/test_evaluate",
    "model/test_attention",
    "model/test_weights",
    "infer/serve/page/test_access",
    "kernels/test_attention",
    "infer/test_context",
    "kernels/test_quantized_kernels",
    "infer/serve/test_chat",
    "kernels/test_tpu",
    "apps/cli/test_startup",
    "apps/bench/test_load",
    "model/test_moe",
    "train/data/test_pipeline",
    "model/test_rotary",
    "apps/bench/test_quantize",
    "infer/test_programs",
    "kernels/test_hopper",
    "convert/test_calibrate",
    "checkpoint/test_peft",
    "model/test_transformers",
    "infer/serve/test_run",
    "kernels/test_device",
    "convert/test_merge",
    "infer/test_constraints",
    "kernels/test_quantized_cache",
    "kernels/test_ring_attention",
    "infer/serve/test_docs",
    "infer/serve/test_clients",
    "infer/serve/page/test_boxes",
    "checkpoint/test_load",
    "infer/serve/test_auth",
    "infer/test_long_prompts",
    "apps/bench/test_tune",
    "security/test_commands",
    "chaos/test_chaos",
    "kernels/test_gpu_decode",
    "train/test_flops",
    "apps/bench/test_convert",
    "convert/test_doctor",
    "infer/serve/test_grammars",
    "convert/test_to_safetensors",
    "security/test_pages",
    "security/test_limits",
    "security/test_network",
    "infer/test_constraints_limits",
    "train/test_stacked",
    "apps/bench/test_train",
    "apps/micro/test_demo",
    "infer/serve/page/test_asking",
    "infer/serve/page/test_conversation",
    "infer/serve/page/test_screenshots",
)
# Files whose tests are split between workers by checkpoint or size.
SPLIT_FILES = {"test_golden": "mini-", "infer/test_mesh": "mini-", "train/test_overfit": ("tiny", "small", "base")}


@pytest.hookimpl(wrapper=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Orders the files, and groups tests for the workers: by file, in the slowest files also by checkpoint."""

    def place(item: pytest.Item) -> int:
        return SLOW_FILES.index(_file(item)) if _file(item) in SLOW_FILES else -1

    items.sort(key=place)
    for item in items:
        parameters = getattr(item, "callspec", None)
        prefix, values = SPLIT_FILES.get(_file(item)), list(parameters.params.values()) if parameters else []
        names = [v for v in values if str(v).startswith(prefix)] if prefix is not None else []
        item.add_marker(pytest.mark.xdist_group("-".join([_file(item), *names])))
        if _file(item) in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
        if missing := _missing_platform():
            item.add_marker(pytest.mark.skip(reason=missing))
    return (yield)


@functools.cache
def _missing_platform() -> str:
    """Why tests cannot run on the platform that was asked for; empty where they can."""
    if os.environ["JAX_PLATFORMS"] == "cpu":
        return ""
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        found = str(error).splitlines()[0]
    return "" if found == "gpu" else f"DSVL2_TEST_PLATFORM=cuda: jax sees no GPU here ({found})"


def _file(item: pytest.Item) -> str:
    """A test file as `SLOW_FILES` names it: its path in tests/, without the suffix."""
    return item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Frees a group's programs: they hold memory maps, and a worker that has 65,530 of them is killed by the next."""
    yield
    if nextitem is not None and _group(nextitem) != _group(item):
        jax.clear_caches()


def _group(item: pytest.Item) -> str:
    return item.get_closest_marker("xdist_group").args[0]
