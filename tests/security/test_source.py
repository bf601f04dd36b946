"""What the source may do: the calls that run code or programs, or open ports, are all known, each with its reason."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "convert", "dsvl2_jax", "infer", "train")

# Modules that are not imported, and functions that are not called, but in the places of ALLOWED.
UNPICKLING = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "transformers"}
PROGRAMS = {"subprocess", "pty", "runpy", "code", "ctypes", "os.system", "os.popen", "importlib.import_module"}
EVALUATION = {"eval", "exec", "compile", "__import__", "yaml", "jinja2", "importlib.util.spec_from_file_location"}
UNPACKING = {"zipfile", "shutil.unpack_archive", "xml"}
NETWORK = {
    "socket",
    "http.server",
    "http.client",
    "urllib.request",
    "requests",
    "httpx",
    "httpx2",
    "httpcore2",
    "uvicorn",
    "fsspec",
}
WATCHED = UNPICKLING | PROGRAMS | EVALUATION | UNPACKING | NETWORK | {"numpy.load", "huggingface_hub"}
# Methods and keywords, whatever they belong to.
METHODS = {"extract", "extractall", "read_pickle", "from_pickle"}
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}

ALLOWED = {
    ("dsvl2_jax/runtime/stored_programs.py", "pickle"): "the user's own compiled programs, in a folder of his alone",
    ("dsvl2_jax/runtime/processes.py", "pickle"): "values between the processes of one command, which trust each other",
    ("dsvl2_jax/runtime/ports.py", "socket"): "whether an address is this host's; nothing is listened to",
    ("dsvl2_jax/__init__.py", "importlib.import_module"): "the package's own modules, by a table of constants",
    ("dsvl2_jax/runtime/lazy.py", "importlib.import_module"): "modules of libraries, by names written in our sources",
    ("train/data/function.py", "importlib.import_module"): "the function that the user's own training settings name",
    ("dsvl2_jax/apps/plan/saved_plans.py", "importlib.import_module"): "the package's own folders, for their sources",
    ("dsvl2_jax/checkpoint/locate.py", "huggingface_hub"): "downloads a hub id: data files by an allow-list",
    ("dsvl2_jax/checkpoint/pytorch_file.py", "pickle"): "an unpickler that finds nothing but functions of its own",
    ("dsvl2_jax/checkpoint/pytorch_file.py", "zipfile"): "entries are read by name, and nothing is unpacked",
    ("dsvl2_jax/checkpoint/remote.py", "fsspec"): "the buckets that a gs:// or s3:// path names",
    ("dsvl2_jax/runtime/malloc.py", "ctypes"): "how the C library keeps freed memory (mallopt, malloc_trim)",
    ("infer/eval/client.py", "httpx2"): "asks the server that --server names",
    ("infer/serve/run.py", "socket"): "the port of dsvl2 serve, at --host",
    ("infer/serve/run.py", "uvicorn"): "dsvl2 serve",
    ("infer/serve/downloads.py", "httpcore2"): "pictures from the domains that the operator allows",
    ("infer/serve/downloads.py", "socket"): "looks up those domains",
}
# Benchmarks start our own commands and servers, on this host. What is no part of serving others lies in these folders.
BENCHMARKS = "dsvl2_jax/apps/bench/"


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """``a.b.c`` of a chain of attributes that begins with something imported, by its own name; or a builtin's name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id if hasattr(builtins, node.id) else None)
    if isinstance(node, ast.Attribute) and (base := dotted(node.value, names)) is not None:
        return f"{base}.{node.attr}"
    return None


def top(module: str) -> str:
    return module.partition(".")[0]


def watched(name: str) -> str | None:
    """The entry of WATCHED that a dotted name falls under."""
    parts = name.split(".")
    return next((known for n in range(len(parts), 0, -1) if (known := ".".join(parts[:n])) in WATCHED), None)


def uses(source: str) -> set[str]:
    """The watched names that a module uses."""
    tree, names, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or top(alias.name): alias.name if alias.asname else top(alias.name) for alias in node.names
            }
            found |= {watched(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {watched(f"{node.module}.{alias.name}") for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func, names)
            found.add(watched(name) if name else None)
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                found.add(node.func.attr)
            found |= {keyword.arg for keyword in node.keywords if keyword.arg in KEYWORDS}
    return found - {None}


@pytest.mark.parametrize(
    "source, name",
    [
        ("import pickle", "pickle"),
        ("from pickle import loads as l; l(b'')", "pickle"),
        ("import numpy as np; np.load('a', allow_pickle=True)", "numpy.load"),
        ("import numpy as np; np.load('a', allow_pickle=True)", "allow_pickle"),
        ("import os as system; system.system('ls')", "os.system"),
        ("def f():\n    import subprocess as s", "subprocess"),
        ("__import__('x')", "__import__"),
        ("from importlib import import_module; import_module(name)", "importlib.import_module"),
        ("archive.extractall(folder)", "extractall"),
    ],
)
def test_the_scan_finds(source, name):
    assert name in uses(source)


def test_the_scan_lets_pass_what_only_looks_like_it():
    assert uses("import re\nmodel.eval()\nre.compile('a')\njax.jit(f).lower().compile()\njson.load(f)") == set()


def test_nothing_is_unpickled_evaluated_or_run_and_no_port_opened_but_where_it_is_known():
    found = set()
    for file in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith(BENCHMARKS):
            found |= {(name, use) for use in uses(file.read_text(encoding="utf-8"))}
    assert sorted(found - set(ALLOWED)) == []
    assert sorted(set(ALLOWED) - found) == [], "no longer used: take them out of the list"
