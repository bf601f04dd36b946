import subprocess
import sys

import jax
import jax.numpy as jnp

from dsvl2_jax.checkpoint import orbax_io

LOAD = """
import sys
from pathlib import Path
import jax
from dsvl2_jax.checkpoint import orbax_io
path = Path(sys.argv[1])
placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shapes = orbax_io.read_shapes(path).items()
try:
    orbax_io.read(path, {leaf: jax.ShapeDtypeStruct(*meta, sharding=placed) for leaf, meta in shapes})
except Exception as error:
    print("refused", type(error).__name__)
"""


def test_a_read_that_fails_prints_nothing_of_the_reads_beside_it(tmp_path):
    # Of 360 arrays in one file that is empty now, some dozens are still being read when the first has failed.
    trees = {"params": {f"layer_{i}": {f"w{j}": jnp.ones((64, 64)) for j in range(12)} for i in range(30)}}
    orbax_io.Saving(tmp_path / "1", trees, {}).wait()
    files = (file for file in (tmp_path / "1" / "params").rglob("*") if file.is_file())
    max(files, key=lambda file: file.stat().st_size).write_bytes(b"")
    for _ in range(2):
        command = [sys.executable, "-c", LOAD, str(tmp_path / "1" / "params")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout.startswith("refused")
        assert "Event loop" not in done.stderr and "Traceback" not in done.stderr


def test_a_read_that_succeeds_leaves_the_hook_as_it_was(tmp_path):
    trees = {"params": {"w": jnp.ones((4, 4))}}
    orbax_io.Saving(tmp_path / "1", trees, {}).wait()
    before = sys.unraisablehook
    orbax_io.read_tree(tmp_path / "1", "params", {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)})
    assert sys.unraisablehook is before
