"""Tables of measured block sizes: which entry is taken, and which tables are refused."""

from __future__ import annotations

import json
import warnings

import jax
import pytest

from dsvl2_jax.kernels import tuning
from dsvl2_jax.kernels.block_sizes import SHARED_MEMORY, HopperAttention, HopperProduct, TritonAttention, TritonProduct
from dsvl2_jax.kernels.triton import fewer_stages
from dsvl2_jax.kernels.tuning import Gpu, chosen, current_table, entry_json, read_table, table_digest, write_table

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0")
SHAPE = {"groups": 64, "inner": 2048, "width": 1408, "rows": 6144}
BLOCKS = HopperProduct(2, 256, 3)
ENTRY = entry_json("gmm", SHAPE, BLOCKS, 1e-4)


@pytest.fixture
def table(tmp_path):
    """Writes a table, then what ``change`` makes of its JSON, and reads it."""

    def make(change=lambda content: content, entries=(ENTRY,)):
        path = tmp_path / "table.json"
        write_table(path, GPU, list(entries))
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return read_table(path, GPU)

    return make


def test_the_nearest_shape_is_taken_and_no_other_width(table):
    larger = entry_json("gmm", SHAPE | {"rows": 24576}, TritonProduct(128), 1e-4)
    found = table(entries=(ENTRY, larger))
    assert found.find("gmm", SHAPE) == found.find("gmm", SHAPE | {"rows": 3072}) == BLOCKS
    assert found.find("gmm", SHAPE | {"rows": 20000}) == TritonProduct(128)
    for other in ({"rows": 2000}, {"rows": 60000}, {"width": 1536}, {"groups": 72}, {"heads": 1}):
        assert found.find("gmm", SHAPE | other) is None
    assert found.find("tgmm", SHAPE) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t | {"device": "NVIDIA A100"}, "'NVIDIA A100'"),
        (lambda t: t | {"jax": "0.1"}, "it has jax '0.1'"),
        (lambda t: t | {"kernels": "0"}, "measured with other kernels"),
        (lambda t: t | {"format": 2}, "it has format 2"),
        (lambda t: t | {"entries": [{"operation": "gmm"}]}, "'shape' is missing"),
        (lambda t: t | {"entries": [ENTRY | {"kernel": "cutlass"}]}, "no kernel 'cutlass' of 'gmm'"),
        (lambda t: t | {"entries": [ENTRY | {"blocks": {"warpgroups": 0}}]}, "block of size 0"),
        (lambda t: t | {"entries": [ENTRY | {"blocks": {"warpgroups": "2"}}]}, "no whole numbers"),
        (lambda t: t | {"entries": [ENTRY | {"blocks": {"threads": 2}}]}, "threads"),
        (lambda t: t | {"entries": 3}, "int"),
        (lambda t: [t], "no JSON object"),
    ],
)
def test_a_broken_foreign_or_old_table_is_named_and_not_used(table, change, reason):
    with pytest.warns(UserWarning, match="bench tune") as caught:
        assert table(change) is None
    (warning,) = caught
    assert "table.json" in str(warning.message) and reason in str(warning.message)


def test_a_table_that_others_can_write_is_not_used(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, GPU, [ENTRY])
    path.chmod(0o666)
    with pytest.warns(UserWarning, match="others can write to it"):
        assert read_table(path, GPU) is None


def test_kernels_look_for_the_table_of_the_gpu_that_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    current_table.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("gmm", **SHAPE) is None and table_digest() == ""  # no GPU is here
        monkeypatch.setattr(tuning, "this_gpu", lambda: GPU)
        current_table.cache_clear()
        assert chosen("gmm", **SHAPE) is None  # it was not measured
        path = tuning.table_path(GPU)
        assert path == tmp_path / "dsvl2_jax/tuning/NVIDIA-H100-80GB-HBM3.json"
        write_table(path, GPU, [ENTRY])
        current_table.cache_clear()
        assert chosen("gmm", **SHAPE) == BLOCKS and table_digest()
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        current_table.cache_clear()
        assert chosen("gmm", **SHAPE) is None  # another process may have another table
    current_table.cache_clear()


def test_shared_memory_of_blocks():
    """The figures of compiled programs: those that a compiler refused named what they asked for."""
    assert TritonProduct(128, stages=8).shared_memory() == 262144 > SHARED_MEMORY
    assert TritonProduct(128, stages=7).shared_memory() <= SHARED_MEMORY
    for part, blocks, asked in (
        ("forward", TritonAttention(64, 128, 4, 3), 270336),
        ("forward", TritonAttention(128, 128, 8, 3), 294912),
        ("dq", TritonAttention(128, 64, 8, 4), 245760),
        ("dkv", TritonAttention(64, 64, 8, 5), 257024),
        ("dkv", TritonAttention(64, 128, 8, 4), 264448),
    ):
        assert blocks.shared_memory(part, 192, 128) == asked > SHARED_MEMORY
    assert (
        HopperAttention(128, 2).shared_memory(192, 128)
        <= SHARED_MEMORY
        < HopperAttention(128, 3).shared_memory(192, 128)
    )


def test_where_less_fits_the_default_has_fewer_stages(monkeypatch):
    monkeypatch.setattr("dsvl2_jax.kernels.triton.SHARED_MEMORY", 99 << 10)  # of a GPU for desktops
    assert fewer_stages(TritonProduct(128), TritonProduct.shared_memory) == TritonProduct(128, stages=3)
    assert fewer_stages(TritonProduct(64), TritonProduct.shared_memory) == TritonProduct(64)
