"""Token choice against plain references, and against transformers' logits processors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.infer import sampling
from dsvl2_jax.infer.sampling import SamplingArrays, SamplingParams

VOCAB = 40
DRAWS = 4000


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2


def frequencies(logits, params, seen=()):
    """Share of each token in many draws of one distribution."""
    rows = np.tile(logits, (DRAWS, 1))
    mask = np.zeros((DRAWS, VOCAB), bool)
    mask[:, list(seen)] = True
    arrays = SamplingArrays.of([params] * DRAWS, DRAWS)
    tokens = jax.jit(sampling.choose)(rows, mask, arrays, jnp.zeros(DRAWS, jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=VOCAB) / DRAWS


def official(logits, params, seen=()):
    """The distribution that the official generation code draws from, by transformers' own processors."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as lp

    scores = torch.tensor(logits)[None]
    ids = torch.tensor([list(seen) or [0]])
    if seen:
        scores = lp.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = lp.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = lp.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = lp.TopPLogitsWarper(params.top_p)(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize(
    ("params", "seen"),
    [
        (SamplingParams(temperature=0.7, top_k=0), ()),
        (SamplingParams(temperature=1.3, top_k=5), ()),
        (SamplingParams(temperature=1.0, top_k=0, top_p=0.6), ()),
        (SamplingParams(temperature=0.4, top_k=50, top_p=0.9, repetition_penalty=1.1), (3, 7, 7, 11)),
        (SamplingParams(temperature=2.0, top_k=12, top_p=0.8, repetition_penalty=1.7), (1, 2, 3, 4, 5)),
    ],
)
def test_draws_follow_the_official_distribution(logits, params, seen):
    expected = official(logits, params, seen)
    found = frequencies(logits, params, seen)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    # Five standard deviations of a binomial share, for every token at once.
    np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-3)


def test_greedy_takes_the_first_of_equals_after_the_penalty():
    logits = jnp.asarray([[1.0, 3.0, 3.0, -1.0]])
    greedy = SamplingArrays.of([SamplingParams(repetition_penalty=2.0)], 1)
    step = jnp.zeros(1, jnp.int32)
    assert sampling.choose(logits, jnp.zeros((1, 4), bool), greedy, step)[0] == 1
    assert sampling.choose(logits, jnp.asarray([[False, True, False, False]]), greedy, step)[0] == 2


def test_the_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.asarray([[2.0, -2.0, 2.0]])
    found = sampling.penalise(logits, jnp.asarray([[True, True, False]]), jnp.asarray([2.0]))
    np.testing.assert_array_equal(found, [[1.0, -4.0, 2.0]])
