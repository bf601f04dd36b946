"""Sizes as people write them. What is no size is refused in test_to_orbax.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.convert.sizes import parse_bytes
from dsvl2_jax.errors import UsageError


@given(st.integers(1, 10**15), st.sampled_from(["", "B", " kB", "KB", "MB", "GiB", " GiB", "k", "Ti"]))
def test_sizes_are_parsed_with_their_unit(number, unit):
    factors = {"": 1, "b": 1, "kb": 10**3, "k": 10**3, "mb": 10**6, "gib": 2**30}
    if unit.strip().lower() in factors:
        assert parse_bytes(f"{number}{unit}") == number * factors[unit.strip().lower()]
    else:
        with pytest.raises(UsageError):
            parse_bytes(f"{number}{unit}")
