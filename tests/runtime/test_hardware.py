"""The table of accelerators."""

from __future__ import annotations

import pytest

from dsvl2_jax.errors import UsageError
from dsvl2_jax.runtime.hardware import TOPOLOGIES, peak_flops, topology


@pytest.mark.parametrize(
    ("name", "shape", "devices", "flops", "gigabytes"),
    [
        ("v5e-16", "v5e:4x4", 16, 197e12, 16),
        ("v5p-8", "v5p:2x2x1", 4, 459e12, 102.0),  # counted in cores, two a chip
        ("v6e-8", "v6e:2x4", 8, 918e12, 34.4),
        ("tpu7x-8", "tpu7x:2x2x1", 8, 1153.5e12, 103.1),  # two devices a chip
        ("h100-8", "h100", 8, 989e12, 80),
        ("h200-1", "h200", 1, 989e12, 141),
    ],
)
def test_names_mean_what_their_vendors_mean(name, shape, devices, flops, gigabytes):
    found = topology(name)
    assert (found.name, found.shape, found.devices) == (name, shape, devices)
    assert found.flops == pytest.approx(flops) and found.memory / 1e9 == pytest.approx(gigabytes, abs=0.1)


def test_every_topology_is_listed_under_its_name():
    assert all(found.name == name and found.devices >= 1 for name, found in TOPOLOGIES.items())


def test_an_unknown_topology_is_named_with_the_nearest():
    with pytest.raises(UsageError, match=r"'v5e-12' is none of v5e-1, .*; did you mean v5e-1"):
        topology("v5e-12")
    with pytest.raises(UsageError, match="'a100-8' is none of"):
        topology("a100-8")


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    assert peak_flops(kind) == (tera and pytest.approx(tera * 1e12))
