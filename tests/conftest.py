"""Shared test set-up: eight virtual CPU devices, quick compilation, and the golden data."""

import os

# Before jax is imported anywhere. Optimisation level 0 halves XLA's compile time, which dominates this suite.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The directory of golden files."""
    return DATA


@pytest.fixture(scope="session")
def checkpoints(data: Path) -> Path:
    """The directory of mini checkpoints in the released layout: mini-tiny, mini-small, mini-base, mini-small-f32."""
    return data / "checkpoints"
