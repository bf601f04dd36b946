"""Token choice against plain references, and against transformers' logits processors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer import sampling
from dsvl2_jax.infer.sampling import SamplingArrays, SamplingParams

VOCAB = 40
DRAWS = 4000


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2


def choose(logits_bv, seen_bv, counts_bv, arrays, step_b):
    return sampling.choose(sampling.adjust(logits_bv, seen_bv, counts_bv, arrays), arrays, step_b)


def frequencies(logits, params, seen=()):
    """Share of each token in many draws of one distribution."""
    rows = np.tile(logits, (DRAWS, 1))
    mask = np.zeros((DRAWS, VOCAB), bool)
    mask[:, list(seen)] = True
    arrays = SamplingArrays.of([params] * DRAWS, range(DRAWS))
    tokens = jax.jit(choose)(rows, mask, jnp.zeros(mask.shape, jnp.int32), arrays, jnp.zeros(DRAWS, jnp.int32))
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
    greedy = SamplingArrays.of([SamplingParams(repetition_penalty=2.0)])
    step, counts = jnp.zeros(1, jnp.int32), jnp.zeros((1, 4), jnp.int32)
    assert choose(logits, jnp.zeros((1, 4), bool), counts, greedy, step)[0] == 1
    assert choose(logits, jnp.asarray([[False, True, False, False]]), counts, greedy, step)[0] == 2


def test_the_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.asarray([[2.0, -2.0, 2.0]])
    found = sampling.penalise(logits, jnp.asarray([[True, True, False]]), jnp.asarray([2.0]))
    np.testing.assert_array_equal(found, [[1.0, -4.0, 2.0]])


def test_min_p_keeps_what_is_likely_beside_the_most_likely(logits):
    params = SamplingParams(temperature=1.0, top_k=0, min_p=0.2)
    probabilities = np.exp(logits - logits.max())
    kept = probabilities >= 0.2
    expected = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    found = frequencies(logits, params)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(kept))
    np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-3)


def test_presence_and_frequency_penalties_count_the_answers_tokens_and_a_bias_is_added():
    logits = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((0, 10.0), (9, 5.0)))
    counts = jnp.asarray([[0, 1, 3, 0]])
    found = sampling.adjust(logits, jnp.zeros((1, 4), bool), counts, SamplingArrays.of([params]))
    np.testing.assert_array_equal(found, [[11.0, 1.25, 1.75, 4.0]])  # there is no token 9


def test_without_penalty_or_bias_logits_stay_as_they_are_bit_for_bit(logits):
    rows, counts = logits[None], jnp.ones((1, VOCAB), jnp.int32)
    found = sampling.adjust(rows, jnp.ones((1, VOCAB), bool), counts, SamplingArrays.of([SamplingParams()]))
    np.testing.assert_array_equal(found, rows)


def test_choices_of_one_question_and_seed_differ_and_repeat(logits):
    rows, seen = np.tile(logits, (50, 1)), np.zeros((50, VOCAB), bool)
    warm = [SamplingParams(temperature=1.5, top_k=0, seed=3)] * 50
    step, counts = jnp.full(50, 7, jnp.int32), jnp.zeros((50, VOCAB), jnp.int32)
    same = choose(rows, seen, counts, SamplingArrays.of(warm), step)
    assert len(set(np.asarray(same).tolist())) == 1
    others = choose(rows, seen, counts, SamplingArrays.of(warm, range(50)), step)
    assert len(set(np.asarray(others).tolist())) > 3
    assert others[0] == same[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_p", 1.5), ("presence_penalty", 2.5), ("frequency_penalty", -3), ("logit_bias", ((1, 101.0),)),
     ("logit_bias", ((-1, 1.0),)), ("logit_bias", tuple((i, 1.0) for i in range(301)))],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(UsageError, match=field):
        SamplingParams(**{field: value})
