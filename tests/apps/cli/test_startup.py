"""What commands import, and what a second start traces and compiles: counts, which no machine changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import quick_compilation

from dsvl2_jax import configs

# Runs a command, then prints the modules that it imported and the programs that jax traced and compiled.
PROGRAM = """
import contextlib, json, os, sys
from dsvl2_jax.apps.cli.main import main
programs = []
def listen(event, seconds, fun_name="", **_):
    programs.append((event.rpartition("/")[2], fun_name))
if sys.argv[1] == "generate" and "--help" not in sys.argv:
    import jax
    jax.monitoring.register_event_duration_secs_listener(listen)
with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(json.dumps({"modules": list(sys.modules), "programs": programs}))
"""
PICTURE = os.path.join(os.path.dirname(configs.__file__), "images", "shapes.png")
LARGE = {"jax", "numpy", "flax", "PIL", "tokenizers", "orbax", "grain", "optax", "torch", "transformers", "pyarrow"}


def started(cache, *args):
    """What a command imports, traces and compiles in a process of its own, which has ended well."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": quick_compilation.FLAGS}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, args)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def imported(told, names):
    return {name for name in names if any(f"{module}.".startswith(f"{name}.") for module in told["modules"])}


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["train", "--help"]])
def test_help_waits_for_no_library(tmp_path, args):
    allowed = {"numpy", "PIL", "tokenizers"} if args[0] == "train" else set()  # it lists the settings of the data
    assert imported(started(tmp_path, *args), LARGE) <= allowed


def test_checking_data_needs_no_jax(tmp_path):
    sample = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(sample) + "\n")
    told = started(tmp_path, "data", "check", tmp_path / "data.jsonl")
    assert imported(told, LARGE) == {"numpy", "PIL", "tokenizers"}


def test_a_second_start_traces_and_compiles_nothing_but_the_parameters_shapes(tmp_path):
    ask = ["generate", "--image", PICTURE, "--prompt", "What colour is the circle?", "--max-new-tokens", "4"]
    first = started(tmp_path, *ask)
    names = {name for event, name in first["programs"] if event == "backend_compile_duration"}
    assert {"jit(adapt_tiles)", "jit(prefill_chunk)", "jit(decode_group)"} <= names
    second = started(tmp_path, *ask)
    assert {event for event, _ in second["programs"]} == {"jaxpr_trace_duration"}
    assert [name for _, name in second["programs"]] == ["<lambda>", "_init"]  # a random key's shape, the parameters'
    without = LARGE - {"jax", "numpy", "flax", "PIL", "tokenizers"}
    without |= {"orbax", "tensorstore", "jax.experimental.pallas", "fastapi", "safetensors.torch"}
    assert imported(second, without) == set()
