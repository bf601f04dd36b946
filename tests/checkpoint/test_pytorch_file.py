"""Files of `torch.save`: read without PyTorch, and a pickle that asks for anything but tensors is refused by name."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import released_checkpoint
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.pytorch_file import read_header
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model.config import Config

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("files", [1, 2])
def test_a_checkpoint_of_bin_files_loads_as_its_safetensors_do(checkpoints, tmp_path, capsys, files):
    source = checkpoints / "mini-base"
    directory = released_checkpoint.copy(source, tmp_path / "source")
    tensors = released_checkpoint.tensors(directory)
    for file in [*directory.glob("*.safetensors"), directory / released_checkpoint.INDEX]:
        file.unlink()
    state = torch.nn.ParameterDict({}).state_dict()  # with the attributes that torch gives it
    for name, tensor in tensors.items():
        state[name] = torch.nn.Parameter(tensor) if name == "image_newline" else tensor
    names, weight_map = list(state), {}
    for i in range(files):
        file = "pytorch_model.bin" if files == 1 else f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin"
        part = type(state)((name, state[name]) for name in names[i::files])
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        released_checkpoint.json.dump({"weight_map": weight_map}, (directory / f"{file[:13]}.bin.index.json").open("w"))
    config = Config.from_file(source)
    found, expected = (flatten_dict(load_params(each, config)) for each in (directory, source))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), str(path))
    convert(directory, tmp_path / "converted")
    assert "note" not in capsys.readouterr().err


def test_views_of_one_storage_and_every_dtype_are_where_torch_put_them(tmp_path):
    base = torch.arange(24, dtype=torch.float32)
    state = {"whole": base, "part": base[4:16].view(3, 4), "scalar": base[5], "empty": base[:0]}
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)
    state |= {str(dtype): torch.tensor([1, 0, 3]).to(dtype) for dtype in dtypes}
    torch.save(state, tmp_path / "x.bin")
    header, content = read_header(tmp_path / "x.bin"), (tmp_path / "x.bin").read_bytes()
    assert header.keys() == state.keys()
    for name, tensor in state.items():
        entry = header[name]
        assert entry.shape == tuple(tensor.shape)
        stored = content[entry.start : entry.start + entry.size]
        assert stored == bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()), name


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path, pickled, **entries):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, content in entries.items():
            file.writestr(f"x/{name}", content)
    return path


def encrypted(path):
    """An archive whose headers say that its entry is encrypted."""
    content = bytearray(archive(path, pickle.dumps({}, 2)).read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1
    path.write_bytes(content)


REFUSED = {
    "an encrypted archive": (encrypted, "not a complete file of torch.save .*encrypted"),
    "a call of the system": (lambda p: archive(p, pickle.dumps(Call(os.system, "true"), 2)), "posix.system"),
    "a call of eval": (lambda p: archive(p, pickle.dumps({"a": Call(eval, "1")}, 2)), r"builtin\w*\.eval"),
    "a numpy array": (lambda p: torch.save({"a": np.ones(3)}, p), r"numpy"),
    "a whole module": (lambda p: torch.save(torch.nn.Linear(1, 1), p), r"asks for torch\.nn"),
    "a number beside the tensors": (
        lambda p: torch.save({"a": torch.ones(1), "step": 3}, p),
        "holds a value of type int under 'step'",
    ),
    "tensors deeper": (lambda p: torch.save({"model": {"a": torch.ones(1)}}, p), "holds another dict under 'model'"),
    "a tensor alone": (lambda p: torch.save(torch.ones(1), p), "holds a tensor alone, expected a dict"),
    "a transposed tensor": (lambda p: torch.save({"a": torch.ones(2, 3).T}, p), r"\[3, 2\] whose elements do not lie"),
    "the form before 1.6": (
        lambda p: torch.save({"a": torch.ones(1)}, p, _use_new_zipfile_serialization=False),
        "not a zip archive, as torch.save has written since PyTorch 1.6",
    ),
    "another archive": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "without a data.pkl"),
    "an object that is memorised far away": (
        lambda p: archive(p, b"\x80\x02}r\xff\xff\xff\x7f."),
        "memorises object number",
    ),
    "a pickle out of order": (lambda p: archive(p, b"\x80\x02u."), "out of order"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_dict_of_tensors_is_refused_by_name(tmp_path, case):
    write, message = REFUSED[case]
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_header(tmp_path / "pytorch_model.bin")
    if "torch.save (" not in str(refusal.value):
        assert "torch.load('pytorch_model.bin'" in str(refusal.value)


def test_the_remedy_that_is_named_works(tmp_path):
    torch.save({"a": torch.ones(2, 3).T, "b": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as refusal:
        read_header(tmp_path / "pytorch_model.bin")
    program = str(refusal.value).split('python -c "')[1].rstrip('"')
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(program, {})
    finally:
        os.chdir(here)
    found = released_checkpoint.tensors(tmp_path)
    released_checkpoint.assert_same_tensors(found, {"a": torch.ones(3, 2), "b": torch.zeros(2)})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_a_checkpoint_error_or_does_not_reach_beyond_the_file(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bin") / "x.bin"
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, buffer)
    content = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert all(0 <= t.start <= t.start + t.size <= len(content) for t in header.values())
