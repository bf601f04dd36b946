"""Paths of parameters and their names."""

from flax.traverse_util import flatten_dict

from dsvl2_jax.model.parameter_paths import path_name, stays_float32


def test_a_name_is_what_flax_makes_of_a_path():
    tree = {"language": {"layers_1": {"mlp": {"router": {"kernel": 1}}}}, "image_newline": 2}
    assert list(map(path_name, flatten_dict(tree))) == list(flatten_dict(tree, sep="/"))


def test_the_router_alone_stays_float32():
    assert stays_float32(("language", "layers_1", "mlp", "router", "kernel"))
    assert not stays_float32(("language", "layers_1", "mlp", "experts", "up_proj"))
    assert not stays_float32(("image_newline",))
