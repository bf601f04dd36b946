"""A stage's table of rules."""

import pytest

from dsvl2_jax.errors import SettingsError
from dsvl2_jax.train.parameter_rules import assign
from dsvl2_jax.train.settings.schema import ParameterRule

PATHS = (
    "language/layers_1/mlp/router/kernel",
    "language/layers_1/mlp/router/correction_bias",
    "vision/attn_pool/latent",
    "vision/norm/scale",
    "image_newline",
)
FROZEN = ParameterRule("attn_pool|correction_bias", train=False)


def test_the_first_rule_that_matches_holds():
    vision, rest = ParameterRule("^vision/", lr_multiplier=0.1), ParameterRule(".")
    assigned = assign(PATHS, (FROZEN, vision, rest))
    assert list(assigned) == list(PATHS)
    assert [assigned[path] for path in PATHS] == [rest, FROZEN, FROZEN, vision, rest]


def test_uncovered_parameters_are_all_listed():
    with pytest.raises(SettingsError, match="these 2 parameters") as caught:
        assign(PATHS, (FROZEN, ParameterRule("^language/")))
    assert "vision/norm/scale" in str(caught.value) and "image_newline" in str(caught.value)
    assert "router/kernel" not in str(caught.value)


def test_long_lists_are_cut():
    with pytest.raises(SettingsError, match=r"these 50 parameters[\s\S]*and 30 more"):
        assign([f"language/layers_{i}/x" for i in range(50)], ())


def test_rules_without_effect_are_errors():
    with pytest.raises(SettingsError, match=r"rule 2 \(match = 'lm_haed'\) matches no parameter") as caught:
        assign(PATHS, (FROZEN, ParameterRule("lm_haed"), ParameterRule("."), ParameterRule("^vision/")))
    assert "rule 4 (match = '^vision/') is never used" in str(caught.value)


@pytest.mark.parametrize("path", ["language/layers_1/mlp/router/correction_bias", "vision/attn_pool/latent"])
def test_what_has_no_gradient_cannot_be_trained(path):
    others = ParameterRule("correction_bias|attn_pool", train=False)
    rules = (ParameterRule(path), others, ParameterRule("."))
    with pytest.raises(SettingsError, match=f"rule 1 .*no gradient[\\s\\S]*{path}"):
        assign(PATHS, rules)
