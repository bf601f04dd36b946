"""The constraints in constraints/ are complete and follow from setup.cfg; make constraints writes them."""

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PINNED = re.compile(r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


def required(python: str) -> list[Requirement]:
    """Everything that setup.cfg names, base and extras, for a Python version on Linux."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    found = [Requirement(line) for text in lists for line in text.splitlines() if line and not line.startswith("#")]
    return [one for one in found if one.marker is None or one.marker.evaluate({"python_version": python})]


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_every_requirement_is_pinned_within_its_bounds_and_with_hashes(python):
    text = (ROOT / f"constraints/py{python.replace('.', '')}.txt").read_text()
    pinned = {name: version for name, version, _ in PINNED.findall(text)}
    assert len(pinned) == len(re.findall(r"^\S+==", text, re.MULTILINE)) > 60
    wrong = [
        f"{one}: {pinned.get(one.name.lower(), 'missing')}"
        for one in required(python)
        if one.name not in ("torch", "dsvl2-jax") and not one.specifier.contains(pinned.get(one.name.lower(), "0"))
    ]
    assert not wrong, "run make constraints"


def test_the_installer_itself_is_pinned_with_hashes():
    assert [name for name, _, _ in PINNED.findall((ROOT / "constraints/uv.txt").read_text())] == ["uv"]


@pytest.mark.parametrize("file", sorted((ROOT / "constraints").iterdir()), ids=lambda file: file.name)
def test_constraints_name_no_address(file):
    assert "://" not in file.read_text()
