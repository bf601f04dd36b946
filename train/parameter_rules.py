"""A training stage as a table of rules: which parameters are trained, how fast, and with weight decay or not.

The tables of the paper's three stages are in ``configs/train``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dsvl2_jax.errors import SettingsError
from dsvl2_jax.messages import listed
from dsvl2_jax.train.settings.schema import ParameterRule

# Never trained by gradient: the bias follows the measured load, and the language model computes no pooling head.
GRADIENT_FREE = re.compile(r"(^|/)correction_bias$|^vision/attn_pool/")
# The same by objective; contrastive training computes the encoder and its pooling head, and nothing else of the model;
# training on regions computes the encoder alone.
_GRADIENT_FREE = {
    "language": GRADIENT_FREE,
    "contrastive": re.compile(r"^(?!vision/)"),
    "regions": re.compile(r"^(?!vision/)|^vision/attn_pool/"),
}

_SHOWN = 20


def assign(
    paths: Iterable[str], rules: Sequence[ParameterRule], objective: str = "language"
) -> dict[str, ParameterRule]:
    """Gives every parameter its rule: the first that matches anywhere in the path (``re.search``).

    Args:
      paths: all parameters of the model, layers apart, such as ``language/layers_3/mlp/experts/gate_proj``.
      rules: of ``[[stage.parameters]]``, in order.
      objective: ``stage.objective``.

    Returns:
      {path: rule}, in the order of ``paths``.

    Raises:
      SettingsError: a parameter has no rule, a rule is never used, or a rule trains a parameter that has no gradient
        (the routers' ``correction_bias``, ``vision/attn_pool``; of the encoder's objectives all but ``vision/``). All
        problems are in one message.
    """
    patterns = [re.compile(rule.match) for rule in rules]
    assigned: dict[str, ParameterRule] = {}
    uncovered: list[str] = []
    trained_free: dict[int, list[str]] = {}
    used, matched = set(), set()
    for path in paths:
        hits = [i for i, pattern in enumerate(patterns) if pattern.search(path)]
        matched.update(hits)
        if not hits:
            uncovered.append(path)
            continue
        first = hits[0]
        used.add(first)
        assigned[path] = rules[first]
        if rules[first].train and _GRADIENT_FREE[objective].search(path):
            trained_free.setdefault(first, []).append(path)

    problems = []
    if uncovered:
        count = f"these {len(uncovered)} parameters"
        problems.append(f"no rule covers {count}; add one with train = true or false:\n{listed(uncovered, _SHOWN)}")
    for i, rule in enumerate(rules):
        name = f"rule {i + 1} (match = '{rule.match}')"
        if i not in matched:
            problems.append(f"{name} matches no parameter of this model; correct or remove it.")
        elif i not in used:
            problems.append(f"{name} is never used, since earlier rules match all its parameters; move or remove it.")
    from_what = "" if objective == "language" else f" from the {objective} objective"
    for i, paths in trained_free.items():
        problems.append(
            f"rule {i + 1} (match = '{rules[i].match}') trains parameters that get no gradient{from_what}; put a rule "
            f"with train = false for them before it:\n{listed(paths, _SHOWN)}"
        )
    if problems:
        raise SettingsError("stage.parameters: " + "\nstage.parameters: ".join(problems))
    return assigned
