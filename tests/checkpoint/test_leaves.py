"""Groups of parameters keep the order and the limit."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.checkpoint.leaves import batches, leaf_bytes


def test_bytes_of_an_array():
    assert leaf_bytes((), np.dtype(np.float32)) == 4
    assert leaf_bytes((3, 0), np.dtype(np.float32)) == 0
    assert leaf_bytes((1 << 20, 1 << 20), np.dtype(np.int16)) == 2 << 40


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 100))
def test_batches_keep_the_order_and_the_limit(sizes, limit):
    leaves = {(f"p{i}",): ((size,), np.dtype(np.float32)) for i, size in enumerate(sizes)}
    groups = list(batches(leaves, limit))
    assert [path for group in groups for path in group] == list(leaves)
    assert all(len(group) == 1 or sum(leaf_bytes(*leaves[path]) for path in group) <= limit for group in groups)
