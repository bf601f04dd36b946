"""Files of folders that the operator names: links, dots, encodings, and what is no regular file."""

import os
import socket
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsvl2_jax.infer.serve.files import read_file, scheme_of
from dsvl2_jax.infer.serve.media_errors import MediaError

FIELD = "messages[1].content[0].image_url.url"
PNG = b"a picture"


def read(reference: str, paths: tuple[str, ...], max_bytes: int = 10**6) -> bytes:
    return read_file(reference, paths, max_bytes, FIELD)


def refused(reference: str, status: int, **options: Any) -> str:
    """What the error about a reference says after its field."""
    with pytest.raises(MediaError) as caught:
        read(reference, **options)
    assert (caught.value.status, caught.value.field) == (status, FIELD)
    message = str(caught.value)
    message.encode()  # an answer is UTF-8
    assert message.startswith(f"{FIELD}: ")
    assert len(message) < 500
    return message.removeprefix(f"{FIELD}: ")


@pytest.fixture
def folder(tmp_path) -> Path:
    root = Path(os.path.realpath(tmp_path)) / "pictures"
    (root / "sub").mkdir(parents=True)
    (root / "cat.png").write_bytes(PNG)
    (root / "sub/a b#?%41ü.png").write_bytes(b"odd name")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "pictures-too").mkdir()
    (tmp_path / "pictures-too/secret.png").write_bytes(b"secret")
    return root


def test_files_below_a_media_path_are_read(folder):
    paths = (str(folder),)
    for reference in (f"file://{folder}/cat.png", f"file://localhost{folder}/cat.png", f"FILE://{folder}/./cat.png"):
        assert read(reference, paths=paths) == PNG
    for reference in (f"{folder}/cat.png", "cat.png", f"{folder}/sub/../cat.png", "sub/../cat.png", "./cat.png"):
        assert read(reference, paths=paths) == PNG
    odd = urllib.parse.quote(f"{folder}/sub/a b#?%41ü.png")
    assert read(f"file://{odd}", paths=paths) == read("sub/a b#?%41ü.png", paths=paths) == b"odd name"


def test_a_relative_path_is_looked_up_in_every_folder_in_turn(folder):
    paths = (str(folder / "sub"), str(folder))
    assert read("cat.png", paths=paths) == PNG
    (folder / "sub/cat.png").write_bytes(b"nearer")
    assert read("cat.png", paths=paths) == b"nearer"
    assert read(f"{folder}/cat.png", paths=paths) == PNG
    assert "not in a folder" in refused("../cat.png", 403, paths=paths)  # in the second folder, but not by this path
    assert "no such file" in refused("dog.png", 400, paths=paths)


@pytest.mark.parametrize(
    "reference",
    [
        "{tmp}/secret.png",
        "file://{tmp}/secret.png",
        "../secret.png",
        "sub/../../secret.png",
        "{root}/../secret.png",
        "file://{root}/../secret.png",
        "file://{root}/%2e%2e/secret.png",
        "file://{root}/%2E%2E%2Fsecret.png",
        "file://{root}%2F..%2Fsecret.png",
        "{root}-too/secret.png",
        "{root}-too",
        "{root}",
        "{root}/",
        "{root}/sub/..",
        ".",
        "/etc/passwd",
        "file:///etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "/no/such/file",
        "~/secret.png",
    ],
)
def test_nothing_outside_of_the_media_paths_is_read_nor_said_to_exist(folder, reference):
    reference = reference.format(tmp=folder.parent, root=folder)
    problem = refused(reference, 400 if reference.startswith("~") else 403, paths=(str(folder),))
    assert ("no such file" if reference.startswith("~") else "not in a folder that this server reads from") in problem


def test_links_are_resolved_before_they_are_judged(folder):
    paths = (str(folder),)
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "out").symlink_to(folder.parent)
    (folder / "in.png").symlink_to("sub/../cat.png")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to(folder.parent / "missing")
    for reference in ("out.png", "out/secret.png", "out/out/secret.png", "nowhere"):
        assert "not in a folder" in refused(reference, 403, paths=paths)
    assert read("in.png", paths=paths) == read("out/pictures/cat.png", paths=paths) == PNG
    assert "cannot be read" in refused("loop", 400, paths=paths)


@pytest.mark.parametrize("swapped", ["sub", "sub/cat.png"])
def test_a_link_put_there_after_the_check_is_not_followed(folder, monkeypatch, swapped):
    (folder / "sub/cat.png").write_bytes(PNG)
    hidden = folder.parent / "hidden"
    hidden.mkdir()
    (hidden / "cat.png").write_bytes(b"secret")
    resolve = os.path.realpath

    def swap_afterwards(path: str, **options: Any) -> str:
        found = resolve(path, **options)
        if (folder / "sub").is_dir() and not (folder / swapped).is_symlink():
            (folder / swapped).rename(folder.parent / "moved")
            (folder / swapped).symlink_to(hidden / swapped.removeprefix("sub").removeprefix("/"))
        return found

    monkeypatch.setattr(os.path, "realpath", swap_afterwards)
    assert "cannot be read" in refused("sub/cat.png", 400, paths=(str(folder),))
    assert (folder / swapped).is_symlink()


def test_only_regular_files_are_read(folder):
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as short:
        listener.bind(f"{short}/socket")
        assert "cannot be read" in refused("socket", 400, paths=(short,))
    assert "not a regular file" in refused("pipe", 400, paths=(str(folder),))  # and nobody waits for a writer
    assert "not a regular file" in refused("sub", 400, paths=(str(folder),))
    assert "cannot be read" in refused("cat.png/x", 400, paths=(str(folder),))


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("file://elsewhere/a.png", "another host"),
        ("file:a.png", "absolute path"),
        ("file:///a.png?x", "%3F"),
        ("file:///a.png#x", "%23"),
        ("file:///a%00.png", "null character"),
        ("a\0.png", "null character"),
        ("a\ud800.png", "no file's path"),
        ("file://[/a", "no file's path"),
        ("x" * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_path_says_what_is_wrong(folder, reference, problem):
    assert problem in refused(reference, 400, paths=(str(folder),))


def test_a_file_may_have_as_many_bytes_as_the_limit_and_no_more(folder):
    paths = (str(folder),)
    assert read("cat.png", paths=paths, max_bytes=len(PNG)) == PNG
    assert "more than" in refused("cat.png", 413, paths=paths, max_bytes=len(PNG) - 1)
    with open(folder / "huge.png", "wb") as file:
        file.truncate(2**40)
    assert "1000 bytes" in refused("huge.png", 413, paths=paths, max_bytes=1000)


@example("../secret.png")
@example("out/secret.png")
@given(st.lists(st.sampled_from(["..", ".", "sub", "out", "secret.png", "cat.png", "", "pictures", "%2e%2e", "a\0b"])))
def test_no_path_leads_to_a_secret(tmp_path_factory, parts):
    root = tmp_path_factory.getbasetemp() / "walk/pictures"
    if not root.exists():
        (root / "sub").mkdir(parents=True)
        (root / "cat.png").write_bytes(PNG)
        (root.parent / "secret.png").write_bytes(b"secret")
        (root / "sub/out").symlink_to("../..")
    path = "/".join(parts)
    for reference in (path, f"{root}/{path}", f"file://{root}/{path}"):
        try:
            assert read(reference, (os.path.realpath(root),)) == PNG
        except MediaError as error:
            assert error.status in (400, 403)


@pytest.mark.parametrize(
    ("reference", "scheme"),
    [("HTTPS://a", "https"), ("data:,", "data"), ("a/b:c", ""), ("", ""), (":a", ""), ("1a:b", ""), ("C:\\a", "c")],
)
def test_a_scheme_ends_at_the_first_colon(reference, scheme):
    assert scheme_of(reference) == scheme
