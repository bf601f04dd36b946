"""How a parameter is named: by its path in the nested dict of parameters, a tuple of keys.

`flax.traverse_util` takes such dicts apart (``flatten_dict``) and puts them together (``unflatten_dict``). People,
regular expressions and JSON get the path's name.
"""

LeafPath = tuple[str, ...]


def path_name(path: LeafPath) -> str:
    """``language/layers_3/mlp/router/kernel``; the same as ``flatten_dict(tree, sep="/")`` makes."""
    return "/".join(path)


def stays_float32(path: LeafPath) -> bool:
    """True for the router's parameters, which compute in float32 whatever the model's dtype."""
    return len(path) > 1 and path[-2] == "router"
