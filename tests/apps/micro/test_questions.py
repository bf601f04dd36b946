"""Questions about drawn pictures: every answer is worked out again, from the pictures' fields alone."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given, settings
from picture_answers import asked, assert_right, groups, seeds

from dsvl2_jax.apps.micro.synthetic import MAKERS


@settings(max_examples=300)
@given(groups, seeds)
def test_every_answer_is_right_and_every_question_has_one(group, seed):
    questions = asked(group, seed)
    for question in questions:
        assert_right(question, group)
    answers: dict[str, str] = {}
    for question in questions:
        assert answers.setdefault(question.text, question.answer) == question.answer


def test_all_kinds_of_questions_occur():
    """Otherwise the test above could pass without them."""
    common = re.compile(r"[\w ]*\b(colour is|Where is|How many|Is the|Is there|Which image has|value of|Which bar)\b.*")
    texts = [
        common.sub(r"\1", question.text)
        for maker in MAKERS.values()
        for seed in range(40)
        for question in asked(maker(np.random.default_rng(seed)), seed)
    ]
    assert {"colour is", "Where is", "How many", "Is the", "Is there", "Which image has", "value of"} < set(texts)
    assert {"Which bar", "Count the shapes.", "What number is written?", "Read the word."} < set(texts)
    assert {"<|grounding|>Describe the image.", "Are both shapes of the same kind?"} < set(texts)
