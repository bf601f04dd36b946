"""Inputs that once ended in a traceback, an abort or a hang, and a few fresh ones of every kind: see tests/fuzz."""

import pytest
from fuzz.run import CORPUS, attempt, make_input
from fuzz.targets import TARGETS

KEPT = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("file", KEPT, ids=[f"{file.parent.name}-{file.name}" for file in KEPT])
def test_what_once_failed_is_read_or_refused(file, tmp_path):
    assert attempt(TARGETS[file.parent.name], file.read_bytes(), tmp_path) is None


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_broken_inputs_are_read_or_refused(name, tmp_path):
    problems = [attempt(TARGETS[name], make_input(TARGETS[name], number), tmp_path) for number in range(12)]
    assert not [problem for problem in problems if problem]
