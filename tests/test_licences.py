"""What is installed with the package, by its licences: nothing that would bind a program that uses it."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement

# Terms that reach beyond the package itself. The LGPL and the MPL do not: their packages stay files of their own.
BINDING = re.compile(
    r"(?<!L)(?<!Lesser )\b(A?GPL|GNU (Affero )?General Public|SSPL|Server Side Public|BUSL|Commons Clause)"
)
# "or": the other licence may be chosen.
CHOICES = re.compile(r"\bOR\b")


def required(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """The installed packages that a package needs, all the way down."""
    found, waiting = set(), [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        for line in metadata.requires(name) or []:
            one = Requirement(line)
            if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                continue
            try:
                metadata.version(one.name)
            except metadata.PackageNotFoundError:
                continue  # of an extra that is not installed here
            if one.name.lower() not in found:
                found.add(one.name.lower())
                waiting.append((one.name, frozenset(one.extras)))
    return found


def licence(package: str) -> str:
    about = metadata.metadata(package)
    classifiers = [text for text in about.get_all("Classifier", []) if text.startswith("License ::")]
    # A package's whole licence may stand in its field, which may name licences of files that are not installed.
    return about.get("License-Expression") or "; ".join(classifiers) or (about.get("License") or "").split("\n")[0]


def binds(text: str) -> bool:
    return all(BINDING.search(choice) for choice in CHOICES.split(text))


@pytest.mark.parametrize("extra", ["", "serve", "train", "demo", "video"])
def test_no_package_of_the_run_time_has_a_licence_that_binds_its_users(extra):
    packages = required("dsvl2-jax", frozenset({extra}))
    assert {"jax", "pillow"} <= packages and ("fastapi" in packages) == (extra == "serve")
    assert {name: licence(name) for name in packages if binds(licence(name))} == {}
    assert {name for name in packages if not licence(name)} == set()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("GPL-3.0-only", True), ("AGPL-3.0-or-later", True), ("GNU General Public License (GPL)", True),
        ("SSPL-1.0", True), ("LGPL-3.0-or-later", False), ("GNU Lesser General Public License", False),
        ("Apache-2.0 OR GPL-2.0-only", False), ("MIT", False), ("BSD-3-Clause", False), ("MPL-2.0", False),
    ],
)  # fmt: skip
def test_licences_are_told_apart(text, expected):
    assert binds(text) == expected
